"""The phantom of the macula: layers in order, as thick as published, brighter and darker as in OCT."""

import numpy as np
import pytest
from scipy.special import polygamma

from nnunet_dp.phantoms import Patient, Scan, layers

PUBLISHED_UM = {  # BMC Ophthalmology 2018, 18:169: mean of nasal and temporal sectors, pericentral then peripheral
    "NFL": (18.5, 32.7),
    "GCL-IPL": (90.1, 70.6),
    "INL": (37.5, 34.5),
    "OPL": (31.5, 27.3),
    "whole retina": (332.3, 300.6),
}


def patient(index: int) -> Patient:
    return Patient("layers", 3, index)


def scan(index: int, case: int = 0) -> Scan:
    return layers.render(patient(index), case)


def eye(index: int) -> layers.Eye:
    shared = patient(index).shared()
    shared.integers(len(layers.SITES))
    return layers._draw_eye(shared)


def eccentricity_mm(of: layers.Eye, columns: int) -> np.ndarray:
    along = (np.arange(columns) + 0.5) / columns * of.width_mm - of.width_mm / 2
    return np.hypot(along - of.fovea_mm, of.first_scan_mm)


def thickness_um(index: int, name: str) -> np.ndarray:
    labels = scan(index).segmentation
    inside = labels > 0 if name == "whole retina" else labels == 1 + layers.NAMES.index(name)
    return inside.sum(0) * eye(index).depth_um / len(labels)


def test_layers_lie_in_their_order_in_every_column_without_gaps():
    for index in range(20):
        for column in scan(index, index % 3).segmentation.T:
            tissue = np.flatnonzero(column)
            assert tissue.size == tissue[-1] - tissue[0] + 1
            assert (np.diff(column[tissue].astype(int)) >= 0).all() and column[tissue[-1]] == 7


def test_the_whole_retina_lies_in_the_picture():
    for index in range(40):
        labels = scan(index).segmentation
        assert not labels[0].any() and not labels[-1].any()


@pytest.mark.parametrize("name", sorted(PUBLISHED_UM))
def test_layers_are_as_thick_as_published(name):
    rings: list[list[float]] = [[], []]
    for index in range(60):
        distance, thickness = eccentricity_mm(eye(index), 192), thickness_um(index, name)
        for ring, (inner, outer) in zip(rings, ((0.5, 1.5), (1.5, 3.0)), strict=True):
            inside = (distance > inner) & (distance < outer)
            ring.append(np.average(thickness[inside], weights=distance[inside]))  # as over the ring's area
    np.testing.assert_allclose([np.mean(ring) for ring in rings], PUBLISHED_UM[name], rtol=0.12)
    assert 0.02 < np.std(rings[0]) / np.mean(rings[0]) < 0.25


def test_the_fovea_is_a_pit():
    depths = []
    for index in range(60):
        distance, thickness = eccentricity_mm(eye(index), 192), thickness_um(index, "whole retina")
        if distance.min() < 0.15:
            depths.append(thickness[distance < 1.5].max() - thickness[np.argmin(distance)])
    assert len(depths) > 5 and 60 < min(depths) and max(depths) < 200


def test_nerve_fibres_are_thicker_towards_the_nose():
    for index in range(20):
        labels, one = scan(index).segmentation, eye(index)
        fibres = (labels == 1).sum(0)
        right, left = fibres[-20:].mean(), fibres[:20].mean()
        assert (right > left) == (one.nasal_side > 0)


def test_brightness_follows_the_published_order():
    means = []
    for index in range(20):
        one = scan(index)
        above = np.cumsum(one.segmentation > 0, axis=0) == 0
        means.append([one.image[0][above].mean()] + [one.image[0][one.segmentation == k].mean() for k in range(1, 8)])
    vitreous, fibres, ganglion, nuclear, plexiform, photoreceptors, ellipsoid, pigment = np.transpose(means)
    for brighter, darker in (
        (fibres, ganglion), (ganglion, nuclear), (plexiform, nuclear), (nuclear, photoreceptors),
        (photoreceptors, vitreous), (ellipsoid, plexiform), (pigment, photoreceptors),
    ):  # fmt: skip
        assert np.mean(brighter > darker) >= 0.95


def test_speckle_is_the_logarithm_of_gamma_noise():
    site = layers.Site(looks=4.0, fwhm_voxels=0.01, range_db=60.0, signal_db=0.0)
    shown = layers._acquire(np.random.default_rng(1), np.full((200, 200), 30.0), site)
    decibels = shown / 255 * 60
    most, least = (10 / np.log(10) * np.sqrt(polygamma(1, 4.0 * looks)) for looks in (0.8, 1.3))
    assert least < decibels.std() < most
    assert np.mean((decibels - decibels.mean()) ** 3) < 0  # Gaussian noise would have no tail to the dark


def test_vessels_darken_what_lies_below_them_and_nothing_above():
    one = eye(0)
    depth = np.linspace(0, one.depth_um, 128)[:, None]
    along = np.linspace(-3, 3, 192)
    surfaces = np.tile(np.linspace(200, 500, 8)[:, None], (1, 192))
    lost = layers._shadows(np.random.default_rng(2), one, depth, along, surfaces, 0)
    assert np.abs(lost[depth[:, 0] < 150]).max() < 0.01 and lost[-1].max() > 2 and lost[-1].min() >= 0


def test_neighbouring_scans_of_an_eye_are_more_alike_than_scans_of_two_eyes():
    def agreement(one: np.ndarray, other: np.ndarray) -> float:
        both = (one > 0) | (other > 0)
        return float((one == other)[both].mean())

    first, second = ([scan(index, case).segmentation for index in range(15)] for case in (0, 1))
    within = np.mean([agreement(first[i], second[i]) for i in range(15)])
    between = np.mean([agreement(first[i], second[i - 1]) for i in range(15)])
    assert between + 0.2 < within < 0.99


def test_images_are_bytes_and_use_their_range():
    for index in range(10):
        image = scan(index).image
        np.testing.assert_array_equal(image, np.rint(image))
        assert image.min() >= 0 and image.max() <= 255 and np.ptp(np.percentile(image, [5, 95])) > 80
        assert np.mean(image == 255) < 0.05
