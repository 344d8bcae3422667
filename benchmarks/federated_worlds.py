"""The sites that ``federated.py`` compares on: each with raw data of its own and held-out patients of its own.

    WORLD/site1 ... siteK/raw/DatasetXXX_Benchmark/{imagesTr, labelsTr, patients.csv, imagesTs, labelsTs}
    WORLD/all/raw/...           their union, for centralised training
    WORLD/world.json            what is public: configuration, number of units

Phantoms are drawn anew for each seed. A real dataset is dealt out by patient: a fold's training patients to train on,
the official test images, or where it has none the fold's validation patients, to judge by.
"""

from __future__ import annotations

import csv
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from judging import HeldOut, held_out

DATASET = 412
NAME = f"Dataset{DATASET}_Benchmark"
UNION = "all"


@dataclass(frozen=True)
class Case:
    """One case's files, its patient, and whether it is for judging only."""

    name: str
    patient: str
    images: tuple[Path, ...]
    labels: Path
    held_out: bool


@dataclass(frozen=True)
class World:
    """Sites whose folders were made once, copied for every run.

    Attributes:
        folder: see the module.
        names: of the sites, without the union.
        configuration: nnU-Net's.
        units: training patients over all sites.
    """

    folder: Path
    names: tuple[str, ...]
    configuration: str
    units: int

    def copied(self, names: Sequence[str], to: Path) -> dict[str, Path]:
        """Fresh sites: no ledger, no state; preprocessed already where ``prepared`` was told so."""
        shutil.rmtree(to, ignore_errors=True)
        return {name: Path(shutil.copytree(self.folder / name, to / name)) for name in names}

    def raw(self, name: str) -> Path:
        """Raw dataset of a site, or of the union."""
        return self.folder / name / "raw" / NAME

    def held_out(self, name: str) -> list[HeldOut]:
        """Case, images and labels that a site is judged by."""
        return held_out(self.raw(name))


def find_world(folder: Path) -> World | None:
    """The one that was made there, if it was."""
    file = folder / "world.json"
    if not file.is_file():
        return None
    known = json.loads(file.read_text())
    return World(folder, tuple(known["names"]), known["configuration"], known["units"])


# ---- where patients come from ------------------------------------------------------------------------------------


def phantom_world(
    folder: Path, kind: str, sites: int, patients: int, held_out: int, shape: tuple[int, ...], seed: int
) -> World:
    """Each site draws patients of its own: ``patients`` to train on, ``held_out`` to judge by."""
    from nnunet_dp.phantoms import write_dataset

    with tempfile.TemporaryDirectory() as place:
        dealt, description = [], {}
        for number in range(sites):
            drawn = 1000 + 50 * seed + number
            written = write_dataset(
                Path(place) / str(number), kind, patients + held_out, drawn, dataset_id=DATASET, shape=shape
            )
            cases, description = _phantoms(written, patients)
            dealt.append(cases)
        return _write_world(folder, dealt, description)


def real_world(
    folder: Path, raw: Path, sites: int, seed: int, fold: int, patients: Path | None, column: str | None
) -> World:
    """A dataset's patients dealt out at random: the fold's training side and, apart, those to judge by."""
    from nnunet_dp.federated.raw_dataset import read_raw, training_patients
    from nnunet_dp.federated.split import deal_at_random

    source = read_raw(raw, patients, column)
    training = training_patients(source, fold)
    owners = source.patients.case_to_patient
    known = [
        Case(c, p, source.files[c].images, source.files[c].labels, False) for p, cs in training.items() for c in cs
    ]
    judging = _official_test(raw, source.description["file_ending"])
    if not judging:
        judging = [
            Case(c, owners[c], files.images, files.labels, True)
            for c, files in source.files.items() if owners[c] not in training
        ]  # fmt: skip
    dealt = []
    sides = [deal_at_random(sorted({case.patient for case in side}), sites, seed) for side in (known, judging)]
    for trained_on, judged_by in zip(*sides, strict=True):
        mine = {*trained_on, *judged_by}
        dealt.append([case for case in (*known, *judging) if case.patient in mine])
    return _write_world(folder, dealt, source.description)


def _phantoms(dataset: Path, patients: int) -> tuple[list[Case], dict[str, Any]]:
    """Cases of a written phantom dataset, in the layout of the Decathlon or in nnU-Net's."""
    description = json.loads((dataset / "dataset.json").read_text())
    if "modality" in description:
        description = {
            "channel_names": description["modality"],
            "labels": {name: int(value) for value, name in description["labels"].items()},
            "file_ending": ".nii.gz",
        }
    ending = description["file_ending"]
    with (dataset / "patients.csv").open() as table:
        rows = list(csv.DictReader(table))
    order = list(dict.fromkeys(row["patient"] for row in rows))
    cases = []
    for row in rows:
        case, patient = row["case"], row["patient"]
        images = sorted((dataset / "imagesTr").glob(f"{case}_????{ending}"))
        images = images or [dataset / "imagesTr" / f"{case}{ending}"]
        labels = dataset / "labelsTr" / f"{case}{ending}"
        cases.append(Case(case, patient, tuple(images), labels, order.index(patient) >= patients))
    return cases, description


def _official_test(raw: Path, ending: str) -> list[Case]:
    """Held-out images with labels that the dataset brings along; nobody knows whose they are."""
    labels = sorted((raw / "labelsTs").glob(f"*{ending}")) if (raw / "labelsTs").is_dir() else []
    names = [file.name.removesuffix(ending) for file in labels]
    found = []
    for name, file in zip(names, labels, strict=True):
        found.append(Case(name, name, tuple(sorted((raw / "imagesTs").glob(f"{name}_????{ending}"))), file, True))
    return found


# ---- writing -----------------------------------------------------------------------------------------------------


def _write_world(folder: Path, dealt: Sequence[Sequence[Case]], description: Mapping[str, Any]) -> World:
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    names = [f"site{k}" for k in range(1, len(dealt) + 1)]
    shifted = []
    for number, (name, cases) in enumerate(zip(names, dealt, strict=True)):
        _write_site(partial / name / "raw" / NAME, cases, description)
        _shift(partial / name / "raw" / NAME, number, len(dealt))
        shifted += [_moved(case, partial / name / "raw" / NAME, name, description["file_ending"]) for case in cases]
    _write_site(partial / UNION / "raw" / NAME, shifted, description)
    configuration = "2d" if description["file_ending"] == ".png" else "3d_fullres"
    units = len({case.patient for case in shifted if not case.held_out})
    (partial / "world.json").write_text(json.dumps({"names": names, "configuration": configuration, "units": units}))
    partial.rename(folder)
    return World(folder, tuple(names), configuration, units)


def _moved(case: Case, site: Path, name: str, ending: str) -> Case:
    """The case as the site has it, with the site's name in front: sites' phantoms have the same names."""
    side = "Ts" if case.held_out else "Tr"
    images = tuple(site / f"images{side}" / f"{case.name}_{k:04d}{ending}" for k in range(len(case.images)))
    labels = site / f"labels{side}" / f"{case.name}{ending}"
    return Case(f"{name}_{case.name}", f"{name}_{case.patient}", images, labels, case.held_out)


def _write_site(raw: Path, cases: Iterable[Case], description: Mapping[str, Any]) -> None:
    rows, ending = [["case", "patient"]], description["file_ending"]
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (raw / part).mkdir(parents=True)
    for case in cases:
        side = "Ts" if case.held_out else "Tr"
        for channel, image in enumerate(case.images):
            shutil.copyfile(image, raw / f"images{side}" / f"{case.name}_{channel:04d}{ending}")
        shutil.copyfile(case.labels, raw / f"labels{side}" / f"{case.name}{ending}")
        rows += [] if case.held_out else [[case.name, case.patient]]
    with (raw / "patients.csv").open("w", newline="") as table:
        csv.writer(table).writerows(rows)
    kept = {key: value for key, value in description.items() if key not in ("training", "test", "dataset", "numTest")}
    (raw / "dataset.json").write_text(json.dumps({**kept, "numTraining": len(rows) - 1}))


def _shift(dataset: Path, number: int, sites: int) -> None:
    """Acquisition: pictures of each site have a brightness, contrast and sharpness of their own; volumes are left."""
    import SimpleITK as sitk

    place = number / max(1, sites - 1) - 0.5  # -0.5 ... 0.5
    for file in [*dataset.glob("imagesT*/*.png")]:
        image = sitk.ReadImage(str(file))
        array = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(image, 0.6 + place)).astype(float)
        array = (array - 128) * (1 + 0.6 * place) + 128 + 50 * place
        changed = sitk.GetImageFromArray(np.clip(array, 0, 255).astype(np.uint8), isVector=array.ndim == 3)
        sitk.WriteImage(changed, str(file))
