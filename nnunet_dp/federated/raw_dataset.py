"""nnU-Net's raw datasets on disk: cases, their files and their units; no image is read.

A site of a federated run needs no more than this to take part, and ``split`` writes new ones.

>>> import tempfile
>>> from nnunet_dp.phantoms import write_dataset
>>> folder = write_dataset(Path(tempfile.mkdtemp()), "lesion", patients=2, seed=1, shape=(32, 32))
>>> read_raw(folder).patients
Patients(unit='patient', column='patient')
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_dp.description import read_description
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.patients import Patients, cases_as_units, read_patients
from nnunet_dp.splits import fold_slots, make_splits

PATIENTS, SPLITS = "patients.csv", "splits_final.json"


@dataclass(frozen=True)
class CaseFiles:
    """Files of one case: an image per channel (or one with all), its labels, and what some readers keep beside them."""

    images: tuple[Path, ...]
    labels: Path
    beside: tuple[Path, ...] = ()


@dataclass(frozen=True)
class RawDataset:
    """A raw dataset of nnU-Net's with its units; printing it shows neither cases nor patients.

    Attributes:
        folder: DatasetXXX_Name below ``nnUNet_raw``.
        description: its dataset.json.
        files: of every training case.
        patients: whose case each is; every case by itself where no table says so.
    """

    folder: Path
    description: Mapping[str, Any]
    files: Mapping[str, CaseFiles] = field(repr=False)
    patients: Patients

    @property
    def title(self) -> str:
        """The name behind the number."""
        return self.folder.name.split("_", 1)[1]


def nnunet_folder(part: str) -> Path:
    """One of nnU-Net's three folders (``raw``, ``preprocessed``, ``results``), by the environment.

    Raises:
        UsageRefusal: when it is not set.
    """
    value = os.environ.get(f"nnUNet_{part}")
    if not value:
        raise UsageRefusal(f"nnUNet_{part} is not set: export nnUNet_raw, nnUNet_preprocessed, nnUNet_results")
    return Path(value)


def raw_folder(dataset: str) -> Path:
    """Folder of a raw dataset, named by id or name.

    Raises:
        UsageRefusal: when there is none, or more than one with that id.
    """
    base = nnunet_folder("raw")
    pattern = f"Dataset{int(dataset):03d}_*" if dataset.isdigit() else dataset
    found = [folder for folder in base.glob(pattern) if (folder / "dataset.json").is_file()] if dataset else []
    if len(found) != 1:
        raise UsageRefusal(
            f"{dataset!r} should name one dataset with a dataset.json below nnUNet_raw, found {len(found)}: give its "
            f"number or its full name, DatasetXXX_Name; there are: {dataset_names(base)}"
        )
    return found[0]


def dataset_names(*bases: Path) -> str:
    """Names of the datasets below some of nnU-Net's folders, for people."""
    names = {folder.name for base in bases for folder in base.glob("Dataset*_*") if folder.is_dir()}
    return ", ".join(sorted(names)) or "none"


def read_raw(folder: Path, patients_file: Path | None = None, column: str | None = None) -> RawDataset:
    """A raw dataset's cases and units.

    Args:
        folder: of the dataset.
        patients_file: CSV of case,patient; None takes the dataset's own ``patients.csv``, else the one that
            ``nnunet-dp plan`` kept in the preprocessed folder.
        column: its column that names the unit.

    Raises:
        UsageRefusal: when there is no case, or a case without files.
    """
    description = read_description(folder / "dataset.json")
    files = case_files(folder, description)
    if not files:
        raise UsageRefusal(f"{folder.name} should hold training cases in imagesTr and labelsTr, found none")
    table = patients_file or next((file for file in _tables(folder) if file.is_file()), None)
    if table is None:
        return RawDataset(folder, description, files, cases_as_units(files))
    held_out = {_case_of(file, description["file_ending"]) for file in _files(folder / "imagesTs")}
    return RawDataset(folder, description, files, read_patients(table, column, set(files), held_out))


def _tables(folder: Path) -> list[Path]:
    """Where a dataset's own table of patients may lie."""
    base = os.environ.get("nnUNet_preprocessed")
    return [folder / PATIENTS, *([Path(base) / folder.name / PATIENTS] if base else [])]


def case_files(folder: Path, description: Mapping[str, Any]) -> dict[str, CaseFiles]:
    """Files of all training cases of a raw dataset.

    Raises:
        UsageRefusal: for a case without labels, or a listed file that is missing.
    """
    return _listed(folder, description) if "dataset" in description else _found(folder, description["file_ending"])


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []


def _case_of(image: Path, ending: str) -> str:
    return re.sub(r"_\d{4}$", "", image.name.removesuffix(ending))


def _found(folder: Path, ending: str) -> dict[str, CaseFiles]:
    """By their names, as nnU-Net finds them: imagesTr/CASE_0000.png, labelsTr/CASE.png."""
    images: dict[str, list[Path]] = {}
    for file in _files(folder / "imagesTr"):
        if re.search(r"_\d{4}$", file.name.removesuffix(ending)) and file.name.endswith(ending):
            images.setdefault(_case_of(file, ending), []).append(file)
    beside = {case: _beside(folder, case, ending) for case in images}
    return {
        case: CaseFiles(tuple(mine), _existing(folder / "labelsTr" / f"{case}{ending}"), beside[case])
        for case, mine in images.items()
    }


def _beside(folder: Path, case: str, ending: str) -> tuple[Path, ...]:
    """Spacings of TIFF stacks lie in CASE.json (nnU-Net's Tiff3DIO)."""
    candidates = (folder / part / f"{case}.json" for part in ("imagesTr", "labelsTr"))
    return tuple(file for file in candidates if ending != ".json" and file.is_file())


def _listed(folder: Path, description: Mapping[str, Any]) -> dict[str, CaseFiles]:
    """By the paths that dataset.json gives."""
    return {
        case: CaseFiles(
            tuple(_existing(folder / image) for image in given["images"]), _existing(folder / given["label"])
        )
        for case, given in description["dataset"].items()
    }


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise UsageRefusal(
            f"every case of {file.parent.parent.name} should have images and labels, but a file is missing: "
            "`nnUNetv2_plan_and_preprocess --verify_dataset_integrity` says which"
        )
    return file.resolve()


def training_patients(dataset: RawDataset, fold: int | None) -> dict[str, tuple[str, ...]]:
    """Patients with their cases: everybody's, or those of one fold's training side (the others stay for judging).

    The split is that of the preprocessed dataset, else the raw one's, else the one this package would make.

    Args:
        dataset: to be divided.
        fold: its number; None takes all.

    Raises:
        SplitError: for a fold that is not there and a split that tears a patient apart.
    """
    if fold is None:
        return fold_slots([], "all", dataset.patients)[0]
    base = os.environ.get("nnUNet_preprocessed")
    places = [*([Path(base) / dataset.folder.name] if base else []), dataset.folder]
    kept = next((place / SPLITS for place in places if (place / SPLITS).is_file()), None)
    if kept is not None:
        splits = json.loads(kept.read_text())
    else:  # as ``nnunet.find_splits`` will
        key = f"nnunet_dp splits 1 {dataset.folder.name}".encode()
        splits = make_splits(dataset.patients, dataset.files, key)
    return fold_slots(splits, fold, dataset.patients)[0]
