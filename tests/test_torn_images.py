"""Whatever a reader would silently fill up is refused, and nothing that is whole."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.torn_images import refuse_torn

RNG = np.random.default_rng(0)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """As nnU-Net's datasets are; 4 MiB, so that a reader has begun before it comes to the fault."""
    file = tmp_path / "anna.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(RNG.normal(size=(64, 128, 128)).astype(np.float32)), str(file))
    return file


FAULTS = {
    "cut": lambda content: content[: len(content) // 2],
    "a byte changed": lambda content: content[:-5000] + bytes([content[-5000] ^ 255]) + content[-4999:],
    "a part lost": lambda content: content[:9000] + content[12000:],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_nnunet_reads_without_a_word_is_refused_without_its_name(fault, written):
    refuse_torn(written)
    written.write_bytes(FAULTS[fault](written.read_bytes()))
    SimpleITKIO().read_images([str(written)])  # once this fails, torn_images is not needed any more
    with pytest.raises(UsageRefusal, match="cut short or damaged") as refused:
        refuse_torn(written)
    assert "anna" not in str(refused.value)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7), (5, 6, 7, 2)])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_every_header_tells_how_long_its_file_is(kind, order, shape, ending, tmp_path):
    file = tmp_path / f"a{ending}"
    nibabel.save(kind(np.ones(shape, np.int16), np.eye(4), kind.header_class(endianness=order)), file)
    refuse_torn(file)
    content = file.read_bytes()
    unpacked = gzip.decompress(content) if ending == ".nii.gz" else content
    shorter = unpacked[:-1]
    file.write_bytes(gzip.compress(shorter) if ending == ".nii.gz" else shorter)
    with pytest.raises(UsageRefusal):
        refuse_torn(file)


@pytest.mark.parametrize("name", ["a.png", "a.nrrd", "a.nii"])
def test_what_is_no_nifti_is_left_to_its_reader(name, tmp_path):
    (tmp_path / name).write_bytes(b"no image")
    refuse_torn(tmp_path / name)
