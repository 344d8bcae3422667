"""Segmentations on disk: labels stay labels, geometry stays geometry, and the reader is the dataset's."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from ordinary_plans import DATASET_JSON

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.nnunet_files import SegmentationFiles, as_labels

LABELS = np.random.default_rng(0).integers(0, 3, (3, 4, 5)).astype(np.uint8)

# ---- labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.uint8])
def test_whole_numbers_of_any_type_are_labels(dtype):
    found = as_labels(LABELS.astype(dtype))
    assert np.issubdtype(found.dtype, np.integer) and np.array_equal(found, LABELS)


def test_labels_that_are_whole_numbers_already_are_not_copied():
    assert as_labels(LABELS) is LABELS


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf, 40_000.0, -1e9])
def test_what_is_no_label_is_refused(value):
    with pytest.raises(UsageRefusal, match="is it an image"):
        as_labels(np.array([[0.0, value]], np.float32))


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """An oblique volume as SimpleITK writes it: labels [z, y, x], spacing [x, y, z]."""
    image = sitk.GetImageFromArray(LABELS)
    image.SetSpacing((0.5, 1.0, 3.0))
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / "tube.nii.gz"))
    return tmp_path / "tube.nii.gz"


def test_axes_and_spacing_are_nnunets(written):
    labels, spacing_mm, _ = SegmentationFiles(DATASET_JSON, {"image_reader_writer": "SimpleITKIO"}).read(written)
    assert np.array_equal(labels, LABELS) and labels.dtype == np.int16
    assert spacing_mm == pytest.approx((3.0, 1.0, 0.5))


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_what_is_read_is_written_with_the_same_labels_and_geometry(written, reader):
    files = SegmentationFiles(DATASET_JSON, {"image_reader_writer": reader})
    labels, _, properties = files.read(written)
    files.write(labels, written.with_name("again.nii.gz"), properties)
    first, second = (sitk.ReadImage(str(file)) for file in (written, written.with_name("again.nii.gz")))
    assert np.array_equal(sitk.GetArrayFromImage(second), LABELS)
    for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(second, geometry)() == pytest.approx(getattr(first, geometry)())


def test_a_2d_file_holds_labels_too(tmp_path):
    files = SegmentationFiles({**DATASET_JSON, "file_ending": ".png"})
    assert isinstance(files._io, NaturalImage2DIO)
    files.write(LABELS[:1], tmp_path / "mole.png", {})
    labels, spacing_mm, _ = files.read(tmp_path / "mole.png")
    assert np.array_equal(labels, LABELS[:1]) and len(spacing_mm) == 3


def test_plans_name_the_reader_then_the_dataset_then_the_file_ending():
    described = {**DATASET_JSON, "overwrite_image_reader_writer": "NibabelIO"}
    assert isinstance(SegmentationFiles(described, {"image_reader_writer": "SimpleITKIO"})._io, SimpleITKIO)
    assert isinstance(SegmentationFiles(described)._io, NibabelIO)
    assert isinstance(SegmentationFiles(DATASET_JSON, {})._io, SimpleITKIO)
    assert SegmentationFiles(DATASET_JSON).file_ending == ".nii.gz"
