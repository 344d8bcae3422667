"""The phantom of a kidney in CT: Hounsfield units, published sizes, a tumour that always touches the kidney."""

import json

import numpy as np
import pytest
from scipy import ndimage

from nnunet_dp import phantoms
from nnunet_dp.phantoms import Patient, Scan, ct_kidney
from nnunet_dp.phantoms.ct_kidney import PHASES, SITES, TUMOURS, Anatomy, Growth

KIDNEY, TUMOUR = 1, 2
PATIENTS = 16
NO_AGENT, CORTICOMEDULLARY, NEPHROGRAPHIC, EXCRETORY = PHASES
TOUCHING = np.ones((3, 3, 3))


def anatomy(index: int) -> Anatomy:
    shared = Patient("ct_kidney", 3, index).shared()
    shared.integers(len(SITES))
    return ct_kidney._draw_anatomy(shared)


def drawn_growth(index: int, case: int) -> Growth:
    shared, rng = Patient("ct_kidney", 3, index).shared(), Patient("ct_kidney", 3, index).case(case)
    site = SITES[shared.integers(len(SITES))]
    return ct_kidney._draw_growth(rng, ct_kidney._grid(rng, site, None, 1.0))


@pytest.fixture(scope="module")
def scans() -> list[Scan]:
    return [ct_kidney.KIND.render(Patient("ct_kidney", 3, index), 0, None) for index in range(PATIENTS)]


@pytest.fixture(scope="module")
def other_sides() -> list[Scan]:
    return [ct_kidney.KIND.render(Patient("ct_kidney", 3, index), 1, None) for index in range(PATIENTS)]


def millilitres(scan: Scan, *labels: int) -> float:
    return float(np.isin(scan.segmentation, labels).sum() * np.prod(scan.spacing_mm) / 1000)


def median_hu(scan: Scan, label: int) -> float:
    inside = ndimage.binary_erosion(scan.segmentation == label)
    return float(np.median(scan.image[0][inside if inside.any() else scan.segmentation == label]))


def fat(scan: Scan) -> np.ndarray:
    """Voxels near the kidney that are neither organ nor gas."""
    organ = scan.segmentation > 0
    near = ndimage.binary_dilation(organ, iterations=5) & ~ndimage.binary_dilation(organ, iterations=2)
    values = scan.image[0][near]
    return values[(values > -170) & (values < -40)]


def test_kidneys_are_as_large_as_published(scans, other_sides):
    lengths, volumes = [], []
    for scan in scans + other_sides:
        lengths.append(np.ptp(np.flatnonzero((scan.segmentation == KIDNEY).any((0, 1)))) * scan.spacing_mm[2])
        volumes.append(millilitres(scan, KIDNEY))
    assert 98 < np.median(lengths) < 122 and min(lengths) > 75 and max(lengths) < 132
    assert 115 < np.median(volumes) < 185 and min(volumes) > 55 and max(volumes) < 260


def test_tumours_have_the_drawn_size(scans):
    for index, scan in enumerate(scans):
        radius = drawn_growth(index, 0).radius_mm
        assert 0.6 < millilitres(scan, TUMOUR) / (4 / 3 * np.pi * radius**3 / 1000) < 1.6


@pytest.mark.parametrize("shape", [None, (32, 32, 24), ct_kidney.KIND.smallest_shape])
def test_the_tumour_touches_the_kidney_and_is_one_piece(shape):
    for index in range(10):
        labels = ct_kidney.KIND.render(Patient("ct_kidney", 4, index), index % 2, shape).segmentation
        assert (ndimage.binary_dilation(labels == TUMOUR, TOUCHING) & (labels == KIDNEY)).any()
        sizes = np.bincount(ndimage.label(labels == TUMOUR, TOUCHING)[0].ravel())[1:]
        assert sizes.max() > 0.97 * sizes.sum()


def test_some_tumours_grow_out_of_the_kidney_and_some_lie_within(scans, other_sides):
    buried = []
    for scan in scans + other_sides:
        tumour = scan.segmentation == TUMOUR
        shell = ndimage.binary_dilation(tumour) & ~tumour
        buried.append(np.mean(scan.segmentation[shell] == KIDNEY))
    assert min(buried) < 0.35 and max(buried) > 0.85


def test_all_kinds_of_tumours_and_phases_are_drawn():
    grown = {drawn_growth(index, 0).kind for index in range(40)}
    assert grown == set(TUMOURS)
    assert np.ptp([anatomy(index).tissue.urine for index in range(40)]) > 200  # with and without excretion


def test_kidneys_have_the_hounsfield_units_of_their_phase(scans):
    for index, scan in enumerate(scans):
        tissue = anatomy(index).tissue
        low, high = sorted((tissue.cortex, tissue.medulla))
        assert low - 25 < median_hu(scan, KIDNEY) < high + 15


def test_kidneys_lie_in_fat(scans):
    for scan in scans:
        values = fat(scan)
        assert -115 < np.median(values) < -75
        assert np.percentile(scan.image, 99.5) > 150 and scan.image.max() < 1500


def test_cortex_outshines_medulla_in_the_corticomedullary_phase_only():
    assert CORTICOMEDULLARY.cortex > 1.8 * CORTICOMEDULLARY.medulla
    assert abs(NEPHROGRAPHIC.cortex - NEPHROGRAPHIC.medulla) < 20 and abs(NO_AGENT.cortex - NO_AGENT.medulla) < 10
    assert EXCRETORY.urine > 2 * EXCRETORY.cortex


def test_the_rim_of_the_kidney_is_brighter_than_its_depth_after_contrast(scans):
    seen = 0
    for index, scan in enumerate(scans):
        if anatomy(index).tissue.cortex - anatomy(index).tissue.medulla < 60:
            continue
        kidney, mm = scan.segmentation == KIDNEY, scan.spacing_mm
        depth = ndimage.distance_transform_edt(scan.segmentation > 0, sampling=mm)
        rim, deep = kidney & (depth > 3) & (depth < 6), kidney & (depth > 11)
        assert np.mean(scan.image[0][rim]) > np.mean(scan.image[0][deep]) + 10
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize("phase", [CORTICOMEDULLARY, NEPHROGRAPHIC])
def test_clear_cell_tumours_take_up_most_and_papillary_ones_least(phase):
    of = dict(zip(TUMOURS, phase.tumours, strict=True))
    assert phase.cortex > of["clear cell"] > of["oncocytic"] > of["papillary"] > 50


def test_solid_tumours_differ_from_fat_and_cystic_ones_are_nearly_water(scans, other_sides):
    for case, sides in enumerate((scans, other_sides)):
        for index, scan in enumerate(sides):
            growth, value = drawn_growth(index, case), median_hu(scan, TUMOUR)
            assert (-5 < value < 60) if growth.kind == "cystic" and growth.radius_mm > 12 else (-5 < value < 230)
            assert value > np.median(fat(scan)) + 70


def coarse_share(noise: np.ndarray) -> float:
    """Deviation of the means of 8 x 8 pixels, over that of the pixels."""
    return float(noise.reshape(8, 8, 8, 8, 20).mean((1, 3)).std() / noise.std())


def test_noise_is_that_of_a_body_scan_and_has_little_of_low_frequency():
    for site in SITES:
        grid = ct_kidney._grid(np.random.default_rng(1), site, (64, 64, 20), 1.0)
        flat = ct_kidney._acquire(np.random.default_rng(2), np.zeros(grid.size, np.float32), grid, site)
        assert 0.6 * site.noise_hu < flat.std() < 1.5 * site.noise_hu
        sigma = site.fwhm_voxels / 2.355
        blurred = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=grid.size), (sigma, sigma, 0.35))
        assert coarse_share(flat) < 0.7 * coarse_share(blurred)


def test_a_soft_kernel_ties_neighbouring_voxels_and_a_sharp_one_does_not():
    ties = {}
    for site in SITES:
        grid = ct_kidney._grid(np.random.default_rng(1), site, (64, 64, 20), 1.0)
        flat = ct_kidney._acquire(np.random.default_rng(2), np.zeros(grid.size, np.float32), grid, site)
        ties[site.fwhm_voxels] = np.corrcoef(flat[1:].ravel(), flat[:-1].ravel())[0, 1]
    soft, sharp = ties[max(ties)], ties[min(ties)]
    assert sharp + 0.2 < soft < 0.9 and abs(sharp) < 0.2


def test_values_are_whole_hounsfield_units_that_fit_into_int16(scans):
    for scan in scans:
        np.testing.assert_array_equal(scan.image, np.rint(scan.image))
        np.testing.assert_array_equal(scan.image.astype(np.int16), scan.image)
        assert scan.image.min() >= -1024 and scan.image.max() <= 3071


def test_the_spine_lies_on_the_inner_side_of_either_kidney(scans, other_sides):
    for case, sides in enumerate((scans, other_sides)):
        for index, scan in enumerate(sides):
            right_edge, left_edge = scan.image[0][-6:, 18:32].mean(), scan.image[0][:6, 18:32].mean()
            left = anatomy(index).left_first == (case == 0)
            assert (right_edge > left_edge) == left  # x runs to the right: a left kidney has the spine there


def test_the_two_kidneys_of_a_patient_are_more_alike_than_those_of_two_patients(scans, other_sides):
    def unlike(one: Scan, other: Scan) -> tuple[float, float]:
        volume = abs(millilitres(one, KIDNEY, TUMOUR) - millilitres(other, KIDNEY, TUMOUR))
        return volume, abs(median_hu(one, KIDNEY) - median_hu(other, KIDNEY))

    within = np.median([unlike(scans[i], other_sides[i]) for i in range(PATIENTS)], axis=0)
    between = np.median([unlike(scans[i], other_sides[i - 1]) for i in range(PATIENTS)], axis=0)
    assert (within < 0.8 * between).all()


def test_every_small_case_holds_every_class():
    for index in range(20):
        scan = ct_kidney.KIND.render(Patient("ct_kidney", 9, index), index % 2, ct_kidney.KIND.smallest_shape)
        assert tuple(np.unique(scan.segmentation)) == ct_kidney.KIND.label_values
        assert np.isfinite(scan.image).all() and scan.image.dtype == np.float32


def test_a_case_depends_on_nothing_but_kind_seed_patient_and_case(scans):
    patient = Patient("ct_kidney", 3, 0)
    ct_kidney.KIND.render(patient, 1, (24, 24, 20))
    np.testing.assert_array_equal(ct_kidney.KIND.render(patient, 0, None).image, scans[0].image)
    other = ct_kidney.KIND.render(Patient("ct_kidney", 4, 0), 0, (24, 24, 20))
    assert (ct_kidney.KIND.render(patient, 0, (24, 24, 20)).image != other.image).mean() > 0.9


def test_nnunet_normalises_it_as_ct(tmp_path):
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

    folder = phantoms.write_dataset(tmp_path, "ct_kidney", 1, 5, shape=ct_kidney.KIND.smallest_shape)
    assert folder.name == "Task304_PhantomKidney"
    description = json.loads((folder / "dataset.json").read_text())
    assert get_normalization_scheme(description["modality"]["0"]).__name__ == "CTNormalization"
