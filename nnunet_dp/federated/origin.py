"""Where a site's dataset came from, and whether two sites hold the same patients: what costs would add for.

``split`` notes beside each new dataset of which dataset it is which part. The note holds names and numbers of datasets
and a random identifier of the split, nothing of the patients; it stays in the raw folder and is never sent.

    DatasetXXX_NameSite2/federated_split.json    [{"parent": "Dataset004_Name", "split": "5e1f...", "site": 2}]

A part of a part has two entries, the older one first. Parts of one split are disjoint; parts of two splits of one
dataset are not:

>>> one, two = (Part(parent="Dataset004_A", split="aa", site=site) for site in (1, 2))
>>> again = Part(parent="Dataset004_A", split="bb", site=2)
>>> common_origin("Dataset301_A1", [one], "Dataset302_A2", [two])
>>> common_origin("Dataset301_A1", [one], "Dataset312_A2", [again])
'Dataset301_A1 and Dataset312_A2 come from two splits of Dataset004_A'

Design note: the note knows of datasets that were altered after a split; equal images are found without it. Neither
knows a patient whom two hospitals saw under other names: ``charges_for_the_same_patient_at_other_sites`` is never
covered.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.federated.raw_dataset import RawDataset

ORIGIN = "federated_split.json"


class Part(BaseModel):
    """Of which dataset another is a part.

    Attributes:
        parent: DatasetXXX_Name that was divided.
        split: random identifier, the same for all parts that were made together.
        site: number of the part, from 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parent: str
    split: str
    site: int


def read_origin(folder: Path) -> list[Part]:
    """Of what a raw dataset is a part, the oldest first; nothing where no split made it.

    Raises:
        UsageRefusal: for a note that no split wrote.
    """
    file = folder / ORIGIN
    try:
        return TypeAdapter(list[Part]).validate_json(file.read_bytes()) if file.is_file() else []
    except ValidationError:
        raise UsageRefusal(
            f"{ORIGIN} in {folder.name} should be what `nnunet-dp fed split` wrote, found something else: put it back, "
            "or split again"
        ) from None


def write_origin(parts: Sequence[Part], folder: Path) -> None:
    """Note of what a new raw dataset is a part."""
    (folder / ORIGIN).write_text(json.dumps([part.model_dump() for part in parts], indent=1) + "\n")


def refuse_shared_patients(datasets: Sequence[RawDataset]) -> None:
    """Refuse datasets that are known to hold the same patients.

    Raises:
        UsageRefusal: naming two of them.
    """
    origins = [read_origin(dataset.folder) for dataset in datasets]
    for (one, mine), (other, theirs) in combinations(zip(datasets, origins, strict=True), 2):
        shared = common_origin(one.folder.name, mine, other.folder.name, theirs) or _common_image(one, other)
        if shared:
            raise UsageRefusal(
                f"--datasets should share no patients, found: {shared}. A patient at two sites pays the sum of both, "
                "which neither site's epsilon tells: take the sites of one `nnunet-dp fed split`"
            )


def common_origin(one: str, mine: Sequence[Part], other: str, theirs: Sequence[Part]) -> str | None:
    """Why two datasets hold the same patients, as far as their origins tell; None where they tell nothing.

    Args:
        one: name of a dataset.
        mine: of what it is a part.
        other: name of another dataset.
        theirs: of what that is a part.
    """
    for whole, name, parts in ((one, other, theirs), (other, one, mine)):
        if whole in (part.parent for part in parts):
            return f"{name} is a part of {whole}"
    for part, their in zip(mine, theirs, strict=False):
        if part.parent == their.parent and part.split != their.split:
            return f"{one} and {other} come from two splits of {part.parent}"
        if part != their:
            return None
    return f"{one} and {other} are the same part of {mine[-1].parent}" if mine and theirs else None


def _common_image(one: RawDataset, other: RawDataset) -> str | None:
    """Equal files under equal names; comparing ends at the first byte that differs."""
    for case in sorted(one.files.keys() & other.files.keys()):
        if filecmp.cmp(one.files[case].images[0], other.files[case].images[0], shallow=False):
            return f"{one.folder.name} and {other.folder.name} hold the same image"
    return None
