"""The phantom of the heart: published volumes and walls, a closed shell of muscle, two phases of one beat."""

import json

import numpy as np
import pytest
from scipy import ndimage

from nnunet_dp import phantoms
from nnunet_dp.phantoms import Patient, Scan, heart

RIGHT, MYOCARDIUM, LEFT = 1, 2, 3
PATIENTS = 16
IN_PLANE = ndimage.generate_binary_structure(2, 1)[..., None]


def anatomy(index: int) -> heart.Anatomy:
    shared = Patient("heart", 3, index).shared()
    shared.integers(len(heart.SITES))
    return heart._draw_anatomy(shared)


@pytest.fixture(scope="module")
def diastoles() -> list[Scan]:
    return [heart.KIND.render(Patient("heart", 3, index), 0, None) for index in range(PATIENTS)]


@pytest.fixture(scope="module")
def systoles() -> list[Scan]:
    return [heart.KIND.render(Patient("heart", 3, index), 1, None) for index in range(PATIENTS)]


def millilitres(scan: Scan, label: int) -> float:
    return float((scan.segmentation == label).sum() * np.prod(scan.spacing_mm) / 1000)


def wall_mm(scan: Scan) -> float:
    """Mean thickness in the slice with the most cavity: the difference of two radii of equal area."""
    middle = int((scan.segmentation == LEFT).sum((0, 1)).argmax())
    labels, pixel = scan.segmentation[..., middle], scan.spacing_mm[0] * scan.spacing_mm[1]
    inner, whole = (labels == LEFT).sum(), np.isin(labels, (LEFT, MYOCARDIUM)).sum()
    return float((np.sqrt(whole) - np.sqrt(inner)) * np.sqrt(pixel / np.pi))


def is_healthy(index: int) -> bool:
    drawn = anatomy(index)
    return drawn.left_ejection > 0.45 and drawn.right_ejection > 0.41 and drawn.wall_mm + drawn.septum_mm < 11.6


def test_labelled_volumes_are_those_that_were_drawn(diastoles):
    for label, name, tolerance in ((LEFT, "left_ml", 0.12), (RIGHT, "right_ml", 0.15)):
        ratios = [millilitres(scan, label) / getattr(anatomy(i), name) for i, scan in enumerate(diastoles)]
        assert abs(np.median(ratios) - 1) < tolerance and 0.7 < min(ratios) and max(ratios) < 1.3


def test_healthy_hearts_measure_and_eject_what_the_uk_biobank_reports(diastoles, systoles):
    healthy = [index for index in range(PATIENTS) if is_healthy(index)]
    filled = np.array([millilitres(diastoles[index], LEFT) for index in healthy])
    emptied = np.array([millilitres(systoles[index], LEFT) for index in healthy])
    assert len(healthy) >= 4 and 110 < filled.mean() < 185
    assert 0.5 < np.median(1 - emptied / filled) < 0.68


def test_walls_are_as_thick_as_published_and_thicken_in_systole(diastoles, systoles):
    resting, contracted = (np.array([wall_mm(scan) for scan in scans]) for scans in (diastoles, systoles))
    healthy = [index for index in range(PATIENTS) if is_healthy(index)]
    assert 5 < np.median(resting[healthy]) < 9 and 4 < resting.min() and resting.max() < 17
    assert 8 < np.median(contracted[healthy]) < 14
    assert 1.25 < np.median((contracted / resting)[healthy]) < 1.9


def test_muscle_keeps_its_volume_while_the_cavities_empty(diastoles, systoles):
    for filled, emptied in zip(diastoles, systoles, strict=True):
        assert 0.8 < millilitres(emptied, MYOCARDIUM) / millilitres(filled, MYOCARDIUM) < 1.25
        assert millilitres(emptied, LEFT) < millilitres(filled, LEFT)
        assert millilitres(emptied, RIGHT) < millilitres(filled, RIGHT)


@pytest.mark.parametrize("shape", [None, (32, 40, 8), heart.KIND.smallest_shape])
def test_in_each_slice_the_left_cavity_touches_nothing_but_muscle(shape):
    for index in range(8):
        labels = heart.KIND.render(Patient("heart", 4, index), index % 2, shape).segmentation
        cavity = labels == LEFT
        assert np.isin(labels[ndimage.binary_dilation(cavity, IN_PLANE)], (LEFT, MYOCARDIUM)).all()


def test_the_right_ventricle_hugs_the_septum(diastoles):
    for scan in diastoles:
        middle = int((scan.segmentation == LEFT).sum((0, 1)).argmax())
        right, muscle = scan.segmentation[..., middle] == RIGHT, scan.segmentation[..., middle] == MYOCARDIUM
        contact = (ndimage.binary_dilation(right) & muscle).sum() * scan.spacing_mm[0]
        assert contact > 25
        assert np.argwhere(right)[:, 0].mean() > np.argwhere(muscle)[:, 0].mean()  # lies to the right


def test_each_class_is_one_piece(diastoles, systoles):
    for scan in diastoles + systoles:
        for label in (RIGHT, MYOCARDIUM, LEFT):
            pieces, _ = ndimage.label(scan.segmentation == label, np.ones((3, 3, 3)))
            sizes = np.bincount(pieces.ravel())[1:]
            assert sizes.max() > 0.97 * sizes.sum()


def test_blood_is_bright_muscle_dark_and_lung_darkest(diastoles):
    for scan in diastoles:
        order = (LEFT, MYOCARDIUM, RIGHT)
        left, muscle, right = (np.median(scan.image[0][scan.segmentation == label]) for label in order)
        assert left > 1.7 * muscle and 0.7 < right / left < 1.4
        assert np.percentile(scan.image[0], 5) < 0.6 * muscle


def test_papillary_muscles_are_dark_islands_within_the_cavity(diastoles):
    dark = []
    for scan in diastoles:
        slices = np.flatnonzero((scan.segmentation == LEFT).any((0, 1)))
        lower = slices[len(slices) // 4 : len(slices) // 2]
        inside = ndimage.binary_erosion(scan.segmentation == LEFT, IN_PLANE, iterations=2)[..., lower]
        blood = scan.image[0][..., lower][inside]
        dark.append(np.mean(blood < 0.7 * np.median(blood)))
    assert 0.01 < np.median(dark) < 0.2


def test_slices_are_thick_and_pixels_small(diastoles):
    for scan in diastoles:
        assert 1.2 < scan.spacing_mm[0] == scan.spacing_mm[1] < 1.7 and 8 <= scan.spacing_mm[2] <= 10
        assert scan.image.shape[1:3] == (96, 96) and 10 <= scan.image.shape[3] <= 13


def test_the_phases_of_a_beat_share_the_chest_but_not_the_noise(diastoles, systoles):
    for filled, emptied in zip(diastoles[:6], systoles[:6], strict=True):
        one, other = filled.image[0][:, :16], emptied.image[0][:, :16]  # below the heart
        blood = np.median(filled.image[0][filled.segmentation == LEFT])
        assert np.quantile(np.abs(one - other), 0.9) < 0.15 * blood
        assert np.mean(one != other) > 0.5


def test_two_patients_have_different_chests(diastoles):
    one, other = (scan.image[0][:, :16, :10] / scan.image.max() for scan in diastoles[3:5])
    assert np.quantile(np.abs(one - other), 0.9) > 0.15


def test_two_phases_of_a_heart_are_more_alike_than_two_hearts(diastoles, systoles):
    def dice(one: Scan, other: Scan) -> float:
        slices = min(one.segmentation.shape[2], other.segmentation.shape[2])
        a, b = one.segmentation[..., :slices] == MYOCARDIUM, other.segmentation[..., :slices] == MYOCARDIUM
        return 2 * (a & b).sum() / (a.sum() + b.sum())

    within = [dice(diastoles[i], systoles[i]) for i in range(PATIENTS)]
    between = [dice(diastoles[i], systoles[i - 1]) for i in range(PATIENTS)]
    assert np.mean(between) + 0.1 < np.mean(within) < 0.95


def test_further_cases_are_phases_between_the_two(diastoles, systoles):
    for index in range(4):
        volume = millilitres(heart.KIND.render(Patient("heart", 3, index), 2, None), LEFT)
        assert 0.9 * millilitres(systoles[index], LEFT) < volume < 1.1 * millilitres(diastoles[index], LEFT)


@pytest.mark.parametrize("site", heart.SITES)
def test_steady_state_signals_order_the_tissues(site):
    signal = heart._signals(np.random.default_rng(1), site)
    assert 1 == signal["blood"] > signal["spleen"] > signal["heart"] > signal["lung"]
    assert signal["blood"] > signal["fat"] > signal["liver"] > signal["muscle"]


def test_every_small_case_holds_every_class():
    for index in range(20):
        scan = heart.KIND.render(Patient("heart", 9, index), index % 2, heart.KIND.smallest_shape)
        assert tuple(np.unique(scan.segmentation)) == heart.KIND.label_values
        assert np.isfinite(scan.image).all() and scan.image.dtype == np.float32


def test_a_case_depends_on_nothing_but_kind_seed_patient_and_case(diastoles):
    patient = Patient("heart", 3, 0)
    heart.KIND.render(patient, 1, (32, 32, 6))
    np.testing.assert_array_equal(heart.KIND.render(patient, 0, None).image, diastoles[0].image)
    other = heart.KIND.render(Patient("heart", 4, 0), 0, (32, 32, 6))
    assert (heart.KIND.render(patient, 0, (32, 32, 6)).image != other.image).mean() > 0.9


def test_it_is_written_as_a_decathlon_task(tmp_path):
    folder = phantoms.write_dataset(tmp_path, "heart", 1, 5, shape=heart.KIND.smallest_shape)
    assert folder.name == "Task303_PhantomHeart"
    description = json.loads((folder / "dataset.json").read_text())
    assert description["labels"] == {
        "0": "background",
        "1": "right ventricle",
        "2": "myocardium",
        "3": "left ventricle",
    }
    assert description["modality"] == {"0": "MRI"}
