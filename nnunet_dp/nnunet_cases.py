"""Preprocessed cases, read once before anything is charged: what would fail in a training's middle fails before it.

A file that cannot be read, a voxel that is no number or a label that does not exist would end a training after its
first charges, and each attempt would be charged again. So every case of the fold is read whole, once; the result is
kept in the preprocessed folder and holds until one of their files changes.

==============================================  =====================================
a case                                          what becomes of the training
==============================================  =====================================
whose files are missing, damaged or shapeless   refused
with a voxel that is NaN or infinite            refused: its gradient would be nothing
with a label that dataset.json does not know    refused
whose raw image is torn                         refused: nnU-Net has read zeros instead
whose reference segmentation cannot be read     refused: the validation reads it
without foreground                              trained on: a healthy patient
all of them without foreground                  refused: nothing could be learnt
==============================================  =====================================

Names of cases are private: a refusal gives numbers of lines in a sorted listing, and the command that prints them.

Design note: whether a training begins tells something about one case, without noise. It is told on the machine that
holds the data, before anything is charged, and ``sections.NOT_COVERED`` names it. Once charges are made,
``unusable.EmptyWhereUnusable`` takes over: a case that breaks later counts as nothing, and no error tells of it.
"""

from __future__ import annotations

import os
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dp.description import channels as count_channels
from nnunet_dp.description import known_labels
from nnunet_dp.errors import Refusal
from nnunet_dp.nnunet_files import SegmentationFiles
from nnunet_dp.plans import json_sha256, read_json, write_json
from nnunet_dp.torn_images import refuse_torn
from nnunet_dp.workers import Progress, in_order

KEPT = "nnunet_dp_cases_read"  # a folder beside the configurations': inside them nnU-Net knows only its own files
UNREADABLE, NOT_NUMBERS = "cannot be read", "hold voxels that are no numbers"
UNKNOWN_LABELS, OTHER_CHANNELS = "hold labels that dataset.json does not know", "have other channels than dataset.json"
BAD_REFERENCE = "have a reference in gt_segmentations that cannot be read"
TORN_IMAGE = "have a raw image that is cut short or damaged, which nnU-Net reads without a word"
_OUTSIDE = -1  # nnU-Net's label outside the non-zero region
_NAMED_AT_MOST = 10
_MANY = 20  # cases, from which on several processes read


@dataclass(frozen=True)
class CaseReader:
    """Where and how a configuration's preprocessed cases are read.

    Attributes:
        dataset_class: nnU-Net's, of the format on disk.
        folder: the configuration's preprocessed folder.
        references: the dataset's ``gt_segmentations``.
        dataset_json: of the dataset.
        plans: name the reader of the references.
    """

    dataset_class: Any
    folder: Path
    references: Path
    dataset_json: Mapping[str, Any]
    plans: Mapping[str, Any]

    @property
    def ending(self) -> str:
        """Of the references' files."""
        return self.dataset_json["file_ending"]

    @property
    def kept(self) -> Path:
        """What was read and found sound, until one of its files changes."""
        return self.references.parent / KEPT / f"{self.folder.name}.json"

    def raw_images(self, case: str) -> list[Path]:
        """The images that were preprocessed, where the raw dataset is at hand."""
        base = os.environ.get("nnUNet_raw")
        folder = Path(base or ".") / self.references.parent.name / "imagesTr"
        named = (folder / f"{case}_{channel:04d}{self.ending}" for channel in range(count_channels(self.dataset_json)))
        return [file for file in named if base and os.access(file, os.R_OK)]

    def fault(self, case: str) -> str | None:
        """What is wrong with one case; ``""`` for none and foreground, None for none and no foreground."""
        try:
            data, seg, _, properties = self.dataset_class(str(self.folder), [case]).load_case(case)
            channels = [np.asarray(data[channel]) for channel in range(data.shape[0])]
            labels = np.asarray(seg[:])
            if data.shape[1:] != labels.shape[1:] or "class_locations" not in properties:
                return UNREADABLE
        except Exception:  # whatever a reader raises; its message names the case
            return UNREADABLE
        if len(channels) != count_channels(self.dataset_json):
            return OTHER_CHANNELS
        if not all(np.isfinite(channel).all() for channel in channels):
            return NOT_NUMBERS
        if not np.isin(labels, [_OUTSIDE, *known_labels(self.dataset_json)]).all():
            return UNKNOWN_LABELS
        try:
            SegmentationFiles(self.dataset_json, self.plans).read(self.references / f"{case}{self.ending}")
        except Exception:
            return BAD_REFERENCE
        try:
            for image in self.raw_images(case):
                refuse_torn(image)
        except (Refusal, OSError):
            return TORN_IMAGE
        return "" if (labels > 0).any() else None


def refuse_unusable(
    reader: CaseReader, cases: Collection[str], processes: int = 1, progress: Progress | None = None
) -> None:
    """Read all cases of a fold, unless that was done and no file changed since; nothing is charged here.

    Args:
        reader: of the configuration.
        cases: names of the fold's training and validation cases.
        processes: at most, that read.
        progress: told after each case.

    Raises:
        Refusal: saying what is wrong with how many cases, and how to see which.
    """
    files = _files(reader, cases)
    kept = reader.kept
    before = _known(kept)
    fresh = sorted(case for case in cases if before.get(case) != files[case])
    workers = processes if len(fresh) >= _MANY else 1  # a process takes seconds to start
    found = dict(zip(fresh, in_order(reader.fault, fresh, workers, progress, _one_thread), strict=True))
    faults = {case: fault for case, fault in found.items() if fault}
    if faults:
        raise Refusal(describe_faults(reader, faults, len(cases)))
    empty = {case for case, fault in found.items() if fault is None}
    if cases and empty == set(cases):
        raise Refusal(
            f"cases should hold foreground, found none in any of the {len(cases)}: nothing could be learnt, and "
            "nothing was charged by this attempt; check labelsTr and the labels in dataset.json, then preprocess again"
        )
    sound = {case: files[case] for case in fresh if case not in empty}
    if sound:
        kept.parent.mkdir(exist_ok=True)
        write_json({**before, **sound}, kept)


def describe_faults(reader: CaseReader, faults: Mapping[str, str], total: int) -> str:
    """One sentence for all faults, with line numbers in a listing in place of names."""
    listed = sorted(file.name for file in reader.references.glob(f"*{reader.ending}"))
    lines = {name.removesuffix(reader.ending): number for number, name in enumerate(listed, 1)}
    by_fault: dict[str, list[int]] = defaultdict(list)
    for case, fault in faults.items():
        by_fault[fault].append(lines.get(case, 0))
    parts = [f"{len(numbers)} {fault} ({_lines(numbers)})" for fault, numbers in sorted(by_fault.items())]
    shown = ";".join(f"{number}p" for numbers in by_fault.values() for number in numbers[:_NAMED_AT_MOST] if number)
    listing = f"LC_ALL=C ls {shlex.quote(str(reader.references))} | grep {shlex.quote(reader.ending + '$')}"
    return (
        f"all {total} cases should be readable images with labels, found {'; '.join(parts)}. This attempt "
        f"charged nothing. See which: {listing} | sed -n '{shown}'; mend or remove them in the raw dataset and type "
        "nnUNetv2_plan_and_preprocess again"
    )


def _lines(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _NAMED_AT_MOST} more" if len(numbers) > _NAMED_AT_MOST else ""
    return f"line {', '.join(map(str, sorted(numbers)[:_NAMED_AT_MOST]))}{more}"


def _files(reader: CaseReader, cases: Iterable[str]) -> dict[str, str]:
    """A digest of each case's files (name, size, time) and of what they were compared with."""
    by_case: dict[str, list[Any]] = {case: [] for case in cases}
    for folder in (reader.folder, reader.references):
        with os.scandir(folder) as entries:
            for entry in entries:
                stem = entry.name.removesuffix(reader.ending) if folder is reader.references else _stem(entry.name)
                if stem in by_case:
                    by_case[stem].append(_as_it_is(entry))
    for case, found in by_case.items():
        found += map(_as_it_is, reader.raw_images(case))
    expected = [sorted(known_labels(reader.dataset_json)), reader.dataset_class.__name__]
    return {case: json_sha256([sorted(found), expected]) for case, found in by_case.items()}


def _as_it_is(file: os.DirEntry[str] | Path) -> tuple[str, int, int]:
    """What changes when a file is written."""
    stat = file.stat()
    return file.name, stat.st_size, stat.st_mtime_ns


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0].removesuffix("_seg")


def _known(kept: Path) -> dict[str, str]:
    try:
        return dict(read_json(kept)) if kept.is_file() else {}
    except (Refusal, TypeError, ValueError):
        return {}


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
