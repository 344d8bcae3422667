"""The phantom of a glioblastoma: nested regions, published volumes, the contrasts of four sequences."""

import numpy as np
import pytest
from scipy import ndimage

from nnunet_dp.phantoms import Patient, Scan, mpmri

T1, T1CE, T2, FLAIR = range(4)
OEDEMA, NECROSIS, ENHANCING = 1, 2, 3
PATIENTS = 14


def anatomy(index: int) -> mpmri.Anatomy:
    shared = Patient("mpmri", 3, index).shared()
    shared.integers(len(mpmri.SITES))
    return mpmri._draw_anatomy(shared)


@pytest.fixture(scope="module")
def scans() -> list[Scan]:
    return [mpmri.render(Patient("mpmri", 3, index), 0) for index in range(PATIENTS)]


@pytest.fixture(scope="module")
def follow_ups() -> list[Scan]:
    return [mpmri.render(Patient("mpmri", 3, index), 1) for index in range(PATIENTS)]


def millilitres(scan: Scan, *labels: int) -> float:
    return float(np.isin(scan.segmentation, labels).sum() * np.prod(scan.spacing_mm) / 1000)


def test_the_rim_keeps_necrosis_from_touching_anything_but_core(scans):
    for scan in scans:
        necrosis = scan.segmentation == NECROSIS
        shell = ndimage.binary_dilation(necrosis) & ~necrosis
        assert np.mean(scan.segmentation[shell] == ENHANCING) > 0.97


def test_the_whole_tumour_is_one_piece_around_one_core(scans):
    for scan in scans:
        assert ndimage.label(scan.segmentation > 0, np.ones((3, 3, 3)))[1] == 1
        assert np.count_nonzero(scan.segmentation == OEDEMA) > 0.1 * np.count_nonzero(scan.segmentation > 1)


def test_regions_written_in_their_order_give_the_labels_back(scans):
    for scan in scans[:3]:
        written = np.zeros_like(scan.segmentation)
        regions = [values for name, values in mpmri.KIND.labels.items() if name != "background"]
        for values, value in zip(regions, mpmri.KIND.regions_class_order, strict=True):
            written[np.isin(scan.segmentation, values)] = value
        np.testing.assert_array_equal(written, scan.segmentation)


def test_volumes_are_those_of_untreated_glioblastomas(scans):
    core = np.array([millilitres(scan, NECROSIS, ENHANCING) for scan in scans])
    whole = np.array([millilitres(scan, OEDEMA, NECROSIS, ENHANCING) for scan in scans])
    assert 17 < np.median(core) < 40 and core.min() > 4 and core.max() < 100
    assert 50 < np.median(whole) < 140 and whole.max() < 260
    assert np.median([millilitres(scan, ENHANCING) / volume for scan, volume in zip(scans, core, strict=True)]) > 0.35


@pytest.mark.parametrize("site", mpmri.SITES)
def test_relaxation_orders_the_tissues_of_each_sequence(site):
    signal = {name: value.ravel() for name, value in mpmri._signals(np.random.default_rng(1), site).items()}
    for sequence, order in (
        (T1, ("white", "grey", "necrosis")),
        (T1, ("white", "oedema", "necrosis")),
        (T1CE, ("enhancing", "white", "grey", "fluid")),
        (T2, ("fluid", "necrosis", "oedema", "enhancing", "grey", "white")),
        (FLAIR, ("oedema", "enhancing", "white", "fluid")),
        (FLAIR, ("oedema", "necrosis", "fluid")),
    ):
        values = [signal[name][sequence] for name in order]
        assert values == sorted(values, reverse=True), (sequence, order)


@pytest.mark.parametrize(
    ("sequence", "brighter", "darker"),
    [
        (T1, 0, OEDEMA),
        (T1, OEDEMA, NECROSIS),
        (T1CE, ENHANCING, 0),
        (T1CE, ENHANCING, OEDEMA),
        (T1CE, OEDEMA, NECROSIS),
        (T2, OEDEMA, 0),
        (T2, NECROSIS, ENHANCING),
        (FLAIR, OEDEMA, 0),
        (FLAIR, OEDEMA, NECROSIS),
    ],
)
def test_scans_show_the_contrasts_of_their_sequences(scans, sequence, brighter, darker):
    def median(scan: Scan, label: int) -> float:  # healthy: inside the brain's box around the tumour, air left out
        where = (scan.segmentation == label) & (scan.image[T1] > 0)
        near = ndimage.binary_dilation(scan.segmentation > 0, iterations=5)
        return float(np.median(scan.image[sequence][where & near]))

    assert np.mean([median(scan, brighter) > median(scan, darker) for scan in scans]) > 0.85


def test_stripped_scans_are_zero_outside_the_brain_and_the_others_show_scalp(scans):
    stripped = [anatomy(index).stripped for index in range(PATIENTS)]
    assert 0 < sum(stripped) < PATIENTS
    for scan, bare in zip(scans, stripped, strict=True):
        zero = (scan.image == 0).all(0)
        assert (zero.mean() > 0.1) == bare
        assert not zero[scan.segmentation > 0].any() or not bare or zero[scan.segmentation > 0].mean() < 0.01


def test_oedema_stays_on_its_side(scans):
    for index, scan in enumerate(scans):
        middle = 31.5 - 0.5 * anatomy(index).centre_mm[0] / 2  # where the midline is, about, in voxels of 2 mm
        beyond = np.arange(64) < middle - 5 if anatomy(index).side > 0 else np.arange(64) > middle + 5
        assert (scan.segmentation[beyond] == OEDEMA).sum() < 0.03 * (scan.segmentation == OEDEMA).sum()


def test_tumours_grow_between_scans_at_about_the_published_rate(scans, follow_ups):
    growth = [
        millilitres(later, NECROSIS, ENHANCING) / millilitres(first, NECROSIS, ENHANCING)
        for first, later in zip(scans, follow_ups, strict=True)
    ]
    assert 1.1 < np.median(growth) < 2.0  # 1.4 % a day over two to six weeks: 1.22 to 1.8
    assert np.mean(np.array(growth) > 1) > 0.9


def test_follow_ups_are_more_alike_than_two_patients(scans, follow_ups):
    def dice(one: Scan, other: Scan) -> float:
        a, b = one.segmentation > 0, other.segmentation > 0
        return 2 * (a & b).sum() / (a.sum() + b.sum())

    within = [dice(scan, later) for scan, later in zip(scans, follow_ups, strict=True)]
    between = [dice(scans[i], follow_ups[i - 1]) for i in range(PATIENTS)]
    assert np.mean(between) + 0.3 < np.mean(within) < 0.98


def test_a_follow_up_does_not_depend_on_the_ones_before():
    patient = Patient("mpmri", 3, 0)
    alone = mpmri.render(patient, 4, (24, 24, 18))
    mpmri.render(patient, 1, (24, 24, 18))
    np.testing.assert_array_equal(alone.image, mpmri.render(patient, 4, (24, 24, 18)).image)


def test_sulci_and_ventricles_are_dark_in_flair_and_bright_in_t2(scans):
    for index, scan in enumerate(scans):
        healthy = (scan.segmentation == 0) & (scan.image[T1] > 0)
        if not anatomy(index).stripped:
            continue
        fluid = healthy & (scan.image[T2] > np.percentile(scan.image[T2][healthy], 99))
        assert np.median(scan.image[FLAIR][fluid]) < np.median(scan.image[FLAIR][healthy])
