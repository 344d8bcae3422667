"""Files are matched by case and read as integers on one grid; refusals count cases and name none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from label_folders import cube, save

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.segmentations import find_segmentations, read_prediction, read_segmentation

# Folders


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Three folders of three cases, whose content nobody reads."""
    for name in ("ref", "pred", "other"):
        (tmp_path / name).mkdir()
        for case in ("a", "b", "secret"):
            (tmp_path / name / f"{case}.nii.gz").touch()
    return [tmp_path / name for name in ("ref", "pred", "other")]


def refusal_of(*folders: Path | None, ending: str | None = None) -> str:
    with pytest.raises(UsageRefusal) as refusal:
        find_segmentations(*folders, ending)
    assert "secret" not in str(refusal.value)
    return str(refusal.value)


def test_cases_are_sorted_and_the_same_in_every_folder(folders):
    references, found = find_segmentations(*folders, None)
    assert [list(each) for each in (references, *found)] == [["a", "b", "secret"]] * 3
    assert found[1]["a"] == folders[2] / "a.nii.gz"


def test_hidden_files_and_other_endings_are_no_cases(folders):
    for name in (".a.nii.gz", "dataset.json", "plans.json"):
        (folders[1] / name).touch()
    assert list(find_segmentations(*folders[:2], None, None)[1][0]) == ["a", "b", "secret"]


def test_references_may_have_more_cases(folders):
    (folders[1] / "secret.nii.gz").unlink()
    references, (predictions,) = find_segmentations(*folders[:2], None, None)
    assert list(references) == ["a", "b", "secret"] and list(predictions) == ["a", "b"]


def test_cases_only_in_the_predictions_are_an_error_by_count(folders):
    (folders[0] / "secret.nii.gz").unlink()
    assert "-p should have a reference; 1 of 3 have none" in refusal_of(*folders[:2], None)
    (folders[1] / "secret.nii.gz").unlink()
    assert "--compare should have a reference; 1 of 3 have none" in refusal_of(*folders)


def test_folders_with_different_cases_are_not_compared(folders):
    (folders[2] / "secret.nii.gz").unlink()
    assert "same cases; 1 are in one only" in refusal_of(*folders)


def test_empty_missing_and_mixed_folders_are_refused(tmp_path, folders):
    (tmp_path / "empty").mkdir()
    assert "found none" in refusal_of(folders[0], tmp_path / "empty", None)
    assert "no such folder" in refusal_of(folders[0], tmp_path / "absent", None)
    assert "it has none" in refusal_of(folders[0], tmp_path / "empty", None, ending=".nii.gz")
    for folder in folders[:2]:
        (folder / "plot.png").touch()
    assert ".nii.gz and .png" in refusal_of(*folders[:2], None)
    assert len(find_segmentations(*folders[:2], None, ".nii.gz")[0]) == 3


# Images


def refusal_of_prediction(file: Path) -> str:
    with pytest.raises(UsageRefusal) as refusal:
        read_prediction(file, cube(), (3.0, 1.0, 2.0))
    assert "secret" not in str(refusal.value)
    return str(refusal.value)


def test_spacing_follows_the_axes_of_the_file(tmp_path):
    labels, spacing_mm = read_segmentation(save(tmp_path, "a", cube(), spacing=(5.0, 1.0, 2.0)))
    assert (labels == cube()).all() and spacing_mm == (5.0, 1.0, 2.0)


def test_one_slice_in_a_3d_file_is_read_as_the_2d_image_it_is(tmp_path):
    flat = cube(shape=(12, 14))
    labels, spacing_mm = read_segmentation(save(tmp_path, "thick", flat[None], spacing=(9, 3, 2)))
    assert (labels == flat).all() and spacing_mm == (3, 2)


def test_an_image_of_one_voxel_is_still_2d(tmp_path):
    labels, spacing_mm = read_segmentation(save(tmp_path, "dot", np.ones((1, 1, 1)), spacing=(9, 3, 2)))
    assert labels.shape == (1, 1) and len(spacing_mm) == 2


def test_png_has_one_pixel_per_pixel(tmp_path):
    assert read_segmentation(save(tmp_path, "a", cube(shape=(12, 14)), ending=".png"))[1] == (1, 1)


def test_float_images_of_whole_numbers_are_read_as_integers(tmp_path):
    labels, _ = read_segmentation(save(tmp_path, "a", cube(), dtype=np.float32))
    assert labels.dtype.kind == "i" and (labels == cube()).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("factor", [0.5, np.nan, np.inf])
def test_probabilities_and_what_is_not_finite_are_no_labels(factor, dtype, tmp_path):
    file = save(tmp_path, "secret", np.where(cube(), factor, 0.0), dtype=dtype, ending=".mha")  # NIfTI reads NaN as 0
    assert "integers" in refusal_of_prediction(file)


def test_a_prediction_of_another_shape_or_spacing_is_refused(tmp_path):
    wider = save(tmp_path, "secret", cube(shape=(8, 9, 11)))
    assert "shape (8, 9, 10), found (8, 9, 11)" in refusal_of_prediction(wider)
    assert "spacing" in refusal_of_prediction(save(tmp_path, "secret", cube(), spacing=(3.0, 1.0, 2.01)))


def test_spacing_may_differ_by_rounding(tmp_path):
    file = save(tmp_path, "a", cube(), spacing=(3, 1, 2.0005))
    assert (read_prediction(file, cube(), (3.0, 1.0, 2.0)) == cube()).all()


def test_a_file_that_is_no_image_is_refused_without_its_name(tmp_path):
    file = tmp_path / "secret.mha"
    file.write_bytes(b"no image")
    assert "an image that SimpleITK reads" in refusal_of_prediction(file)


def test_a_torn_file_is_refused_without_its_name(tmp_path):
    file = save(tmp_path, "secret", cube())
    file.write_bytes(file.read_bytes()[:-9])
    assert "cut short or damaged" in refusal_of_prediction(file)


def test_colours_are_no_labels(tmp_path):
    colours = sitk.GetImageFromArray(np.zeros((6, 6, 3), np.uint8), isVector=True)
    sitk.WriteImage(colours, str(tmp_path / "secret.png"))
    assert "one channel" in refusal_of_prediction(tmp_path / "secret.png")
