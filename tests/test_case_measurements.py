"""Every class of every case is measured by the module's conventions; refusals name a case by its position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from label_folders import cube, save

from nnunet_dp.case_measurements import CaseFiles, CaseMeasurements, measure_cases
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.label_scheme import LabelScheme, scheme_from
from nnunet_dp.segmentation_metrics import segmentation_metrics

INTEGERS = LabelScheme("the integers in the files")
TWO = scheme_from({"labels": {"background": 0, "front": 1, "back": 2}}, "an example")


def write_cases(root: Path, *cases, **more) -> list[CaseFiles]:
    """Each case: labels of the reference, then of the prediction in every folder; the last case is secret."""
    names = [*(f"c{row}" for row in range(len(cases) - 1)), "secret"]
    files = [
        [save(root / str(column), name, labels, ending=".mha", **more) for column, labels in enumerate(case)]
        for name, case in zip(names, cases, strict=True)
    ]
    return [CaseFiles(f"case {row} of {len(files)}", first, rest) for row, (first, *rest) in enumerate(files, 1)]


def measured(root: Path, *cases, scheme: LabelScheme = INTEGERS, **more) -> CaseMeasurements:
    return measure_cases(write_cases(root, *cases, **more), scheme, 1.0)


def refusal_of(cases: list[CaseFiles], scheme: LabelScheme = INTEGERS) -> str:
    with pytest.raises(UsageRefusal) as refusal:
        measure_cases(cases, scheme, 1.0)
    assert "secret" not in str(refusal.value)
    return str(refusal.value)


def test_values_stand_by_folder_case_and_class(tmp_path):
    truth, near, far = (cube(1, 4) + cube(5, high, 2) for high in (8, 7, 6))
    found = measured(tmp_path, (truth, near, far), (truth, truth, near), scheme=TWO)
    assert found.values.shape == (2, 2, 2, 4)
    for place, (prediction, label) in {(0, 0, 1): (near, 2), (1, 0, 1): (far, 2), (1, 1, 0): (near, 1)}.items():
        expected = segmentation_metrics(truth == label, prediction == label, (3.0, 1.0, 2.0), 1.0)
        assert tuple(found.values[place]) == expected


def test_empty_classes_are_nan_or_punished_and_marked(tmp_path):
    full, empty = cube(), 0 * cube()
    found = measured(tmp_path, (full, full), (empty, empty), (full, empty), (empty, full), spacing=(1, 1, 1))
    assert found.one_empty[0, :, 0].tolist() == [False, False, True, True]
    assert np.isnan(found.values[0, 1, 0]).all()
    diagonal = np.linalg.norm((8, 9, 10))
    assert found.values[0, 2, 0].tolist() == found.values[0, 3, 0].tolist() == [0, diagonal, 0, diagonal]


def test_without_a_scheme_classes_are_the_integers_of_any_case(tmp_path):
    found = measured(tmp_path, (cube(), cube()), (cube(label=5), cube()))
    assert [one.key for one in found.classes] == ["1", "5"]
    assert np.isnan(found.values[0, 0, 1]).all() and found.one_empty.tolist() == [[[False, False], [True, True]]]


def test_regions_are_unions_of_labels(tmp_path):
    regions = scheme_from({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "an example")
    found = measured(tmp_path, (cube(1, 7) + cube(3, 5), cube(1, 7) + cube(3, 6)), scheme=regions)
    assert found.values[0, 0, :, 0] == pytest.approx([1, 2 * 8 / (8 + 27)])


def test_what_the_reference_ignores_counts_for_nobody(tmp_path):
    ignoring = scheme_from({"labels": {"background": 0, "lesion": 1, "ignore": 2}}, "an example")
    truth, prediction = cube(), cube()
    truth[0], prediction[0] = 2, 1  # a whole plane, ignored, where the prediction raves
    assert measured(tmp_path, (truth, prediction), scheme=ignoring).values[0, 0, 0].tolist() == [1, 0, 1, 0]


def test_one_slice_in_a_3d_file_is_measured_as_the_2d_image_it_is(tmp_path):
    flat, shifted = cube(shape=(12, 14)), np.roll(cube(shape=(12, 14)), 1, axis=0)
    as_2d = measured(tmp_path / "flat", (flat, shifted), spacing=(3, 2)).values
    as_3d = measured(tmp_path / "thick", (flat[None], shifted[None]), spacing=(9, 3, 2)).values
    assert (as_2d == as_3d).all() and as_2d[0, 0, 0, 3] < 3


def test_more_processes_change_nothing(tmp_path):
    noise = np.random.default_rng(5)
    pairs = [[np.where(noise.random((8, 9, 10)) < 0.1, 0, cube(1, 7)) for _ in range(2)] for _ in range(4)]
    cases = write_cases(tmp_path, *pairs)
    assert (measure_cases(cases, INTEGERS, 1.0, processes=2).values == measure_cases(cases, INTEGERS, 1.0).values).all()


def test_progress_counts_the_cases(tmp_path):
    told = []
    cases = write_cases(tmp_path, *[(cube(), cube())] * 3)
    measure_cases(cases, INTEGERS, 1.0, progress=lambda *done: told.append(done))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("labels", "said"), [(cube(shape=(8, 9, 11)), "shape"), (cube(label=3), "only labels of dataset.json")]
)
def test_images_that_do_not_fit_are_refused_by_position(tmp_path, labels, said):
    message = refusal_of(write_cases(tmp_path, (cube(), cube()), (cube(), labels)), TWO)
    assert message.startswith("case 2 of 2: ") and said in message


def test_background_alone_is_nothing_to_measure(tmp_path):
    assert "a label besides 0" in refusal_of(write_cases(tmp_path, (0 * cube(), 0 * cube())))
