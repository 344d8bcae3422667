"""Folders in, metrics with intervals out: means, comparison, patients, conventions and what is said about them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from label_folders import PATIENTS, cube, draw_folders, save, write_labels, write_patients

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.evaluation import evaluate_folders
from nnunet_dp.segmentation_metrics import segmentation_metrics


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path, Path]:
    return draw_folders(tmp_path, fault=0.2)


def test_means_over_cases_and_over_classes_equal_a_loop_over_files(tmp_path, folders):
    values = []
    for file in sorted((tmp_path / "ref").iterdir()):
        pair = [sitk.GetArrayFromImage(sitk.ReadImage(str(folder / file.name))) for folder in folders[:2]]
        masks = [[labels == label for labels in pair] for label in (1, 2)]
        values.append([segmentation_metrics(*each, spacing_mm=(3, 1, 2), tolerance_mm=1) for each in masks])
    found = evaluate_folders(*folders[:2]).as_dict()
    for row, label in enumerate("12"):
        one = found["per_class"][label]
        assert [one[name] for name in ("dice", "hd95", "nsd", "assd")] == pytest.approx(np.mean(values, axis=0)[row])
    assert found["mean"]["assd"] == pytest.approx(np.mean(values, axis=(0, 1))[3])
    assert (found["cases"], found["unit"], found["length_unit"]) == (PATIENTS, "case", "mm")


def test_spacing_follows_the_axes_of_the_file(tmp_path):
    save(tmp_path / "ref", "a", cube(), spacing=(5.0, 1.0, 1.0))
    save(tmp_path / "pred", "a", np.roll(cube(), 1, axis=0), spacing=(5.0, 1.0, 1.0))
    assert evaluate_folders(tmp_path / "ref", tmp_path / "pred").as_dict()["per_class"]["1"]["hd95"] == 5


def test_json_is_plain_and_names_no_case(folders):
    found = evaluate_folders(*folders, resamples=50)
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert "case_0" not in text + str(found.lines()) + repr(found)
    assert found.cases[0] == "case_00" and found.values.shape == (2, PATIENTS, 2, 4)


def test_intervals_hold_their_means_and_come_out_the_same_again(folders):
    first, second = (evaluate_folders(*folders[:2]).as_dict() for _ in range(2))
    assert first == second
    for one in (*first["per_class"].values(), first["mean"]):
        for metric in ("dice", "hd95", "nsd", "assd"):
            low, high = one["intervals"][metric]
            assert low <= one[metric] <= high
        assert one["intervals"]["dice"][0] < one["intervals"]["dice"][1]


def test_progress_counts_the_cases(folders):
    told = []
    evaluate_folders(*folders[:2], resamples=1, progress=lambda *done: told.append(done))
    assert told == [(done, PATIENTS) for done in range(1, PATIENTS + 1)]


# Comparison


def test_difference_is_positive_where_the_predictions_are_better_and_paired(folders):
    found = evaluate_folders(*folders).as_dict()
    for label in ("1", "2"):
        gain = found["difference"]["per_class"][label]
        mine, other = found["per_class"][label], found["compare"]["per_class"][label]
        assert gain["dice"] == pytest.approx(mine["dice"] - other["dice"])
        assert 0 < gain["intervals"]["dice"][0] < gain["dice"] < gain["intervals"]["dice"][1]
    means = [found[folder]["mean"]["dice"] for folder in ("compare", "difference")]
    assert found["mean"]["dice"] == pytest.approx(sum(means))


def test_a_table_shows_both_folders_and_signs_their_difference(tmp_path):
    found = evaluate_folders(*draw_folders(tmp_path, fault=0.2, cases=4), resamples=20)
    table = dict(found.lines())
    assert {"1", "compare: 1", "difference: 1", "mean", "compare: mean", "difference: mean"} <= set(table)
    assert table["difference: 1"].startswith(f"dice +{found.difference.estimate[0, 0]:.4f} [+")


# Patients


def test_a_patients_cases_are_drawn_together(folders, tmp_path):
    table = {f"case_{case:02}": f"p{case % 2}" for case in range(PATIENTS)} | {"not_evaluated": "p9"}
    found = evaluate_folders(*folders[:2], patients=write_patients(tmp_path, table))
    assert (found.patients, found.unit) == (2, "patient")
    of_patient = [np.mean(found.values[0, start::2, 0, 0]) for start in (0, 1)]
    # Two patients can only be drawn as (a, a), (a, b) or (b, b): the interval ends at the patients' own means.
    assert (found.predictions.low[0, 0], found.predictions.high[0, 0]) == pytest.approx(sorted(of_patient))
    assert dict(found.lines())["cases"] == f"{PATIENTS} of 2 units (patient)"


def test_one_patient_gets_no_interval(folders, tmp_path):
    table = write_patients(tmp_path, {f"case_{case:02}": "anna" for case in range(PATIENTS)})
    found = evaluate_folders(*folders[:2], patients=table)
    mean = found.as_dict()["mean"]
    assert mean["dice"] > 0.5 and mean["intervals"]["dice"] == [None, None]
    assert "[" not in dict(found.lines())["mean"]


def test_a_case_without_a_patient_is_refused_by_count(folders, tmp_path):
    table = write_patients(tmp_path, {f"case_{case:02}": "anna" for case in range(PATIENTS - 2)})
    with pytest.raises(UsageRefusal, match="no row for 2 of") as refusal:
        evaluate_folders(*folders[:2], patients=table)
    assert "case_1" not in str(refusal.value)


# Conventions


def test_cases_only_in_the_reference_are_counted_and_left_out(folders):
    (folders[1] / "case_03.nii.gz").unlink()
    found = evaluate_folders(*folders[:2])
    assert (len(found.cases), found.cases_only_in_reference) == (PATIENTS - 1, 1)
    assert "1 only in the reference" in dict(found.lines())["cases"]


def test_empty_classes_are_left_out_or_punished_and_counted(tmp_path):
    for case, (truth, found) in enumerate([(cube(), cube()), (0 * cube(), 0 * cube()), (cube(), 0 * cube())]):
        save(tmp_path / "ref", f"c{case}", truth, spacing=(1, 1, 1))
        save(tmp_path / "pred", f"c{case}", found, spacing=(1, 1, 1))
    evaluation = evaluate_folders(tmp_path / "ref", tmp_path / "pred")
    one = evaluation.as_dict()["per_class"]["1"]
    assert (one["cases"], one["empty_in_both"], one["empty_in_one"]) == (2, 1, 1)
    assert (one["dice"], one["nsd"]) == (0.5, 0.5)
    assert one["hd95"] == one["assd"] == pytest.approx(np.linalg.norm((8, 9, 10)) / 2)
    assert "in both images: 1 times, left out" in dict(evaluation.lines())["empty class"]


def test_a_class_that_no_image_has_is_null_and_does_not_touch_the_mean(folders, tmp_path):
    file = write_labels(tmp_path / "some.json", {"a": 1, "b": 2, "absent": 3})
    evaluation = evaluate_folders(*folders[:2], dataset_json=file, resamples=20)
    found = evaluation.as_dict()
    assert found["per_class"]["3"]["dice"] is None and found["per_class"]["3"]["empty_in_both"] == PATIENTS
    assert found["mean"]["dice"] == pytest.approx(np.mean([found["per_class"][label]["dice"] for label in "12"]))
    assert dict(evaluation.lines())["3 (absent)"].startswith("dice -")


def test_regions_stand_under_their_names(tmp_path):
    save(tmp_path / "ref", "a", cube(1, 7) + cube(3, 5))
    save(tmp_path / "pred", "a", cube(1, 7) + cube(3, 6))
    write_labels(tmp_path / "pred" / "dataset.json", {"whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    evaluation = evaluate_folders(tmp_path / "ref", tmp_path / "pred").as_dict()
    assert evaluation["per_class"]["whole"]["dice"] == 1 and list(evaluation["per_class"]) == ["whole", "core"]
    assert evaluation["per_class"]["core"]["dice"] == pytest.approx(2 * 8 / (8 + 27))
    assert "predictions' folder" in evaluation["labels_from"]


def test_what_the_reference_ignores_counts_for_nobody(tmp_path):
    truth, found = cube(), cube()
    truth[0], found[0] = 2, 1  # a whole plane, ignored, where the prediction raves
    save(tmp_path / "ref", "a", truth)
    save(tmp_path / "pred", "a", found)
    file = write_labels(tmp_path / "labels.json", {"lesion": 1, "ignore": 2})
    evaluation = evaluate_folders(tmp_path / "ref", tmp_path / "pred", dataset_json=file)
    assert [one.key for one in evaluation.classes] == ["1"]
    assert tuple(evaluation.values[0, 0, 0]) == (1, 0, 1, 0)


def test_png_has_pixels_and_says_so(tmp_path):
    save(tmp_path / "ref", "a", cube(shape=(12, 14)), ending=".png")
    save(tmp_path / "pred", "a", np.roll(cube(shape=(12, 14)), 2, axis=0), ending=".png")
    found = evaluate_folders(tmp_path / "ref", tmp_path / "pred")
    assert found.length_unit == "pixels" and found.predictions.estimate[0, 1] == 2
    assert "in pixels" in dict(found.lines())["lengths"]


# Refusals


def refusal_of(*folders: Path, **options) -> str:
    with pytest.raises(UsageRefusal) as refusal:
        evaluate_folders(*folders, **options)
    assert "secret" not in str(refusal.value)
    return str(refusal.value)


def test_cases_only_in_the_predictions_are_an_error_by_count(folders):
    save(folders[1], "secret", cube())
    assert "1 of 13 have none" in refusal_of(*folders[:2])


def test_images_that_do_not_fit_are_refused_by_position(tmp_path):
    for folder in ("ref", "pred"):
        save(tmp_path / folder, "a", cube())
    save(tmp_path / "ref", "secret", cube())
    (tmp_path / "pred" / "secret.nii.gz").write_bytes(b"no image")
    assert refusal_of(tmp_path / "ref", tmp_path / "pred").startswith("case 2 of 2 by name: ")


def test_folders_with_different_cases_are_not_compared(folders):
    (folders[2] / "case_03.nii.gz").unlink()
    assert "same cases; 1 are in one only" in refusal_of(*folders)


@pytest.mark.parametrize("option", [{"tolerance_mm": -1}, {"tolerance_mm": np.inf}, {"resamples": 0}, {"processes": 0}])
def test_settings_out_of_range_are_refused(tmp_path, option):
    assert "should be" in refusal_of(tmp_path, tmp_path, **option)
