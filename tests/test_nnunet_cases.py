"""Preprocessed cases that would end a training in its middle."""

import os
import pickle
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2

from nnunet_dp.errors import Refusal
from nnunet_dp.nnunet_cases import (
    BAD_REFERENCE,
    NOT_NUMBERS,
    OTHER_CHANNELS,
    TORN_IMAGE,
    UNKNOWN_LABELS,
    UNREADABLE,
    CaseReader,
    refuse_unusable,
)

DESCRIPTION = {"labels": {"background": 0, "organ": [1, 2], "core": 2}, "channel_names": {"0": "MRI"},
               "file_ending": ".nii.gz"}  # fmt: skip
CASES = ("anna-1", "anna", "bert")  # in this order by file name, whatever a language's rules
SHAPE = (4, 6, 5)


def write(file: Path, array: np.ndarray) -> None:
    file.unlink(missing_ok=True)
    blosc2.asarray(np.ascontiguousarray(array), urlpath=str(file))


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CaseReader:
    base, images = tmp_path / "Dataset001_A", tmp_path / "raw" / "Dataset001_A" / "imagesTr"
    folder, references = base / "nnUNetPlans_3d_fullres", base / "gt_segmentations"
    for made in (folder, references, images):
        made.mkdir(parents=True)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    labels = np.zeros((1, *SHAPE), np.int8)
    labels[0, 0, :3, 0] = -1, 1, 2
    for case in CASES:
        write(folder / f"{case}.b2nd", np.ones((1, *SHAPE), np.float32))
        write(folder / f"{case}_seg.b2nd", labels)
        (folder / f"{case}.pkl").write_bytes(pickle.dumps({"class_locations": {}}))
        image = sitk.GetImageFromArray(np.zeros(SHAPE, np.uint8))
        sitk.WriteImage(image, str(references / f"{case}.nii.gz"))
        sitk.WriteImage(image, str(images / f"{case}_0000.nii.gz"))
    return CaseReader(nnUNetDatasetBlosc2, folder, references, DESCRIPTION, {"image_reader_writer": "SimpleITKIO"})


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def truncated(reader: CaseReader) -> None:
    halve(reader.folder / "bert.b2nd")


FAULTS: dict[str, tuple[Callable[[CaseReader], object], str]] = {
    "truncated": (truncated, UNREADABLE),
    "no image": (lambda reader: (reader.folder / "bert.b2nd").unlink(), UNREADABLE),
    "no labels": (lambda reader: (reader.folder / "bert_seg.b2nd").unlink(), UNREADABLE),
    "no properties": (lambda reader: (reader.folder / "bert.pkl").unlink(), UNREADABLE),
    "other shapes": (lambda r: write(r.folder / "bert_seg.b2nd", np.zeros((1, 2, 2, 2), np.int8)), UNREADABLE),
    "nan": (lambda r: write(r.folder / "bert.b2nd", np.full((1, *SHAPE), np.nan, np.float32)), NOT_NUMBERS),
    "infinite": (lambda r: write(r.folder / "bert.b2nd", np.full((1, *SHAPE), np.inf, np.float32)), NOT_NUMBERS),
    "label 3": (lambda r: write(r.folder / "bert_seg.b2nd", np.full((1, *SHAPE), 3, np.int8)), UNKNOWN_LABELS),
    "label -2": (lambda r: write(r.folder / "bert_seg.b2nd", np.full((1, *SHAPE), -2, np.int8)), UNKNOWN_LABELS),
    "two channels": (lambda r: write(r.folder / "bert.b2nd", np.ones((2, *SHAPE), np.float32)), OTHER_CHANNELS),
    "reference": (lambda r: (r.references / "bert.nii.gz").write_bytes(b"no image"), BAD_REFERENCE),
    "torn reference": (lambda r: halve(r.references / "bert.nii.gz"), BAD_REFERENCE),
    "torn raw image": (lambda r: halve(r.raw_images("bert")[0]), TORN_IMAGE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_faulty_case_is_refused_by_its_line_and_without_its_name(fault, reader):
    spoil, words = FAULTS[fault]
    spoil(reader)
    with pytest.raises(Refusal, match=re.escape(f"1 {words} (line 3)")) as refused:
        refuse_unusable(reader, CASES)
    assert "bert" not in str(refused.value)


def test_the_printed_command_prints_the_name(reader):
    truncated(reader)
    with pytest.raises(Refusal) as refused:
        refuse_unusable(reader, CASES)
    command = re.search(r"See which: (.*?); mend", str(refused.value))
    assert command
    done = subprocess.run(command.group(1), shell=True, capture_output=True, text=True)
    assert done.stdout == "bert.nii.gz\n"


def test_sound_cases_are_read_once(reader, monkeypatch):
    read = []
    monkeypatch.setattr(CaseReader, "fault", lambda self, case: read.append(case) or "")
    refuse_unusable(reader, CASES)
    refuse_unusable(reader, CASES)
    assert sorted(read) == sorted(CASES)
    os.utime(reader.folder / "anna_seg.b2nd", ns=(1, 1))
    refuse_unusable(reader, CASES)
    assert read[3:] == ["anna"]


def test_a_faulty_case_is_read_again_each_time(reader):
    truncated(reader)
    for _ in range(2):
        with pytest.raises(Refusal, match="line 3"):
            refuse_unusable(reader, CASES)
    assert not reader.kept.exists()


def test_what_was_kept_and_cannot_be_understood_is_read_again(reader):
    reader.kept.parent.mkdir()
    reader.kept.write_text("[1")
    refuse_unusable(reader, CASES)
    assert "bert" in reader.kept.read_text()


def test_a_healthy_patient_is_fine_and_nobody_but_healthy_ones_are_refused(reader):
    empty = np.zeros((1, *SHAPE), np.int8)
    for case in CASES[:2]:
        write(reader.folder / f"{case}_seg.b2nd", empty)
    refuse_unusable(reader, CASES)
    write(reader.folder / "bert_seg.b2nd", empty)
    with pytest.raises(Refusal, match="found none in any of the 3"):
        refuse_unusable(reader, CASES)


def test_the_kept_file_disturbs_neither_nnunet_nor_a_resumed_run(reader):
    refuse_unusable(reader, CASES)
    assert reader.kept.is_file()
    assert infer_dataset_class(str(reader.folder)) is nnUNetDatasetBlosc2  # refuses files that it does not know
    assert sorted(nnUNetDatasetBlosc2.get_identifiers(str(reader.folder))) == sorted(CASES)


def test_without_the_raw_dataset_what_was_preprocessed_is_enough(reader, monkeypatch):
    halve(reader.raw_images("bert")[0])
    monkeypatch.delenv("nnUNet_raw")
    refuse_unusable(reader, CASES)


def test_a_raw_image_that_changes_is_read_again(reader):
    refuse_unusable(reader, CASES)
    halve(reader.raw_images("bert")[0])
    with pytest.raises(Refusal, match=TORN_IMAGE):
        refuse_unusable(reader, CASES)
