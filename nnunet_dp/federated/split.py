"""One dataset divided into the datasets of several sites, by patient: for trying federated training on one machine.

All cases of a patient go to one site. Ways to deal them out (``deal``):

=========  ======================================================================================================
random     in the order of a keyed hash of their ids, in turn: sizes differ by one at most
column     by a column of patients.csv, such as the scanner or the centre: one site for each of its values
dirichlet  unequal in size and kind: patients are grouped by how much foreground their labels show, and each group
           is divided in proportions drawn from a Dirichlet distribution (Hsu et al. 2019, arXiv:1909.06335);
           the smaller alpha, the more the sites differ
=========  ======================================================================================================

>>> sites = deal_at_random(["anna", "bert", "cleo", "dora", "emil"], 2, seed=1)
>>> sorted(map(len, sites)), sorted(name for site in sites for name in site)
([2, 3], ['anna', 'bert', 'cleo', 'dora', 'emil'])

The new datasets are ordinary raw datasets of nnU-Net, with ``patients.csv`` and a note of where they came from
(``origin``); images are hard links where the file system has them, so they take no room, and copies elsewhere. Whoever
writes into a linked image changes the original: where sites are to be altered, ask for copies.

Design note: this is a tool for experiments. Equal sizes and foreground shares are functions of everybody's data, so
which site a patient went to is no public fact of the original dataset; in each site's own dataset the slots are fixed
before training, and that is what its guarantee is about.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.federated.origin import Part, read_origin, write_origin
from nnunet_dp.federated.raw_dataset import PATIENTS, CaseFiles, RawDataset, raw_folder, read_raw, training_patients
from nnunet_dp.patients import Patients, read_columns, write_canonical

SIZE_GROUPS = 4  # of patients, by their foreground; each is divided by its own draw
Way = Literal["random", "column", "dirichlet"]


# ---- who goes where ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dealing:
    """How patients are dealt out.

    Attributes:
        way: see the module.
        sites: how many; None only where the column says.
        column: of the table of patients, for ``column``.
        alpha: of the Dirichlet distribution, above 0.
        seed: the same gives the same sites.
    """

    way: Way = "random"
    sites: int | None = None
    column: str | None = None
    alpha: float = 0.5
    seed: int = 0

    def refuse_senseless(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageRefusal: saying which to give.
        """
        if self.way != "column" and self.column is not None:
            raise UsageRefusal(f"--column {self.column} goes with --by column: give both, or neither")
        if self.sites is None and self.way != "column":
            raise UsageRefusal("the number of sites should be given: --sites 4")
        if self.sites is not None and self.sites < 2:
            raise UsageRefusal(f"there should be at least 2 sites, found {self.sites}: try --sites 4")
        if not 0 < self.alpha < float("inf"):
            raise UsageRefusal(f"--alpha should be above 0, found {self.alpha:g}: 0.5 is usual, 100 nearly even")


def deal(
    dataset: RawDataset, slots: Mapping[str, tuple[str, ...]], dealing: Dealing, patients_file: Path | None = None
) -> tuple[list[list[str]], list[str]]:
    """Deal patients out to sites.

    Args:
        dataset: whose they are.
        slots: patients with their cases.
        dealing: how.
        patients_file: with the column; None takes the dataset's own.

    Returns:
        Sorted patients of each site, none of them empty, and what is special about each site (the column's value).

    Raises:
        UsageRefusal: for fewer patients than sites, a column that divides a patient, and options without sense.
    """
    dealing.refuse_senseless()
    if dealing.way == "column":
        return _deal_by_column(dataset, slots, dealing, patients_file)
    assert dealing.sites is not None
    if len(slots) < dealing.sites:
        raise UsageRefusal(f"each site should have a {dataset.patients.column}, found fewer than {dealing.sites}")
    if dealing.way == "random":
        return deal_at_random(slots, dealing.sites, dealing.seed), [""] * dealing.sites
    shares = {patient: _foreground_share(dataset, cases) for patient, cases in slots.items()}
    return deal_by_dirichlet(shares, dealing.sites, dealing.alpha, dealing.seed), [""] * dealing.sites


def deal_at_random(patients: Iterable[str], sites: int, seed: int) -> list[list[str]]:
    """In the order of a keyed hash, in turn."""
    order = sorted(patients, key=lambda patient: _hashed(patient, seed))
    return [sorted(order[site::sites]) for site in range(sites)]


def _hashed(patient: str, seed: int) -> bytes:
    key = f"nnunet_dp federated split {seed}".encode()
    return hmac.new(key, patient.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()


def deal_by_dirichlet(shares: Mapping[str, float], sites: int, alpha: float, seed: int) -> list[list[str]]:
    """Groups of similar foreground, each divided in its own proportions; nobody is left with an empty site.

    Args:
        shares: of foreground in each patient's labels.
        sites: how many.
        alpha: of the symmetric Dirichlet distribution.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    order = sorted(shares, key=lambda patient: (shares[patient], patient))
    dealt: list[list[str]] = [[] for _ in range(sites)]
    for group in np.array_split(np.array(order, dtype=object), min(SIZE_GROUPS, len(order))):
        proportions = rng.dirichlet([alpha] * sites)
        counts = rng.multinomial(len(group), proportions)
        mixed = iter(rng.permutation(group))
        for site, count in enumerate(counts):
            dealt[site] += [str(next(mixed)) for _ in range(count)]
    for site in dealt:
        if not site:  # the largest gives one away
            site.append(max(dealt, key=len).pop())
    return [sorted(site) for site in dealt]


def _foreground_share(dataset: RawDataset, cases: Sequence[str]) -> float:
    import SimpleITK as sitk

    ignored = dataset.description.get("labels", {}).get("ignore", -1)
    shares = []
    for case in cases:
        labels = sitk.GetArrayViewFromImage(sitk.ReadImage(str(dataset.files[case].labels)))
        shares.append(float(np.mean((labels > 0) & (labels != ignored))))
    return float(np.mean(shares))


def _deal_by_column(
    dataset: RawDataset, slots: Mapping[str, tuple[str, ...]], dealing: Dealing, patients_file: Path | None
) -> tuple[list[list[str]], list[str]]:
    table = patients_file or dataset.folder / PATIENTS
    known = read_columns(table)
    if dealing.column not in known:
        raise UsageRefusal(
            f"--by column should come with --column NAME, a column of {table.name}, found {dealing.column}; there are: "
            f"{', '.join(known) or 'none (its first line should name them: case,patient,scanner)'}"
        )
    values = read_raw(dataset.folder, table, dealing.column).patients.case_to_patient
    seen = {patient: {values[case] for case in cases} for patient, cases in slots.items()}
    torn = sum(len(found) > 1 for found in seen.values())
    if torn:
        raise UsageRefusal(
            f"all cases of a {dataset.patients.column} should have one value of {dealing.column}, found {torn} with "
            "several: choose another column, or --by random"
        )
    names = sorted({value for found in seen.values() for value in found})
    if dealing.sites not in (None, len(names)):
        raise UsageRefusal(
            f"{dealing.column} has {len(names)} values, one site each, found --sites {dealing.sites}: leave it out"
        )
    if len(names) < 2:
        raise UsageRefusal(f"{dealing.column} should have at least 2 values, found 1: choose another column")
    return [sorted(patient for patient, found in seen.items() if found == {name}) for name in names], names


# ---- new datasets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteDataset:
    """A site's new raw dataset.

    Attributes:
        folder: DatasetXXX_NameSiteY below ``nnUNet_raw``.
        units: number of patients.
        unit: what they are called.
        cases: number of cases.
        value: of the column that divided them, if one did.
    """

    folder: Path
    units: int
    unit: str
    cases: int
    value: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        number = int(self.folder.name[7:10])
        told = {"dataset": self.folder.name, "id": number, "folder": str(self.folder), "unit": self.unit}
        return told | {"units": self.units, "cases": self.cases} | ({"value": self.value} if self.value else {})


def split_dataset(
    dataset: str,
    dealing: Dealing,
    first_id: int,
    fold: int | None = None,
    patients_file: Path | None = None,
    column: str | None = None,
    links: bool = True,
) -> list[SiteDataset]:
    """Make a raw dataset for each site.

    Args:
        dataset: id or name of the dataset to divide; it is left as it is.
        dealing: how.
        first_id: number of the first site's dataset; the others follow.
        fold: takes only this fold's training patients.
        patients_file: CSV of case,patient; None takes the dataset's own.
        column: its column that names the unit.
        links: hard links where possible; without, copies, which may be changed without changing the original.

    Raises:
        UsageRefusal: before anything is written; for numbers that are taken, for one.
    """
    dealing.refuse_senseless()
    source = read_raw(raw_folder(dataset), patients_file, column)
    slots = training_patients(source, fold)
    dealt, values = deal(source, slots, dealing, patients_file)
    folders = _free_folders(source, first_id, len(dealt))
    owned = [{patient: slots[patient] for patient in mine} for mine in dealt]
    origins = _origins(source, len(dealt))
    try:
        return [_write_site(source, *one, links) for one in zip(folders, owned, values, origins, strict=True)]
    except BaseException:  # all of them or none
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(_partial(folder), ignore_errors=True)
        raise


def _free_folders(source: RawDataset, first_id: int, sites: int) -> list[Path]:
    if not 1 <= first_id <= 1000 - sites:
        raise UsageRefusal(f"--first-id should leave room for {sites} numbers up to 999, found {first_id}: try 301")
    bases = [Path(os.environ[name]) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
             if os.environ.get(name)]  # fmt: skip
    numbers = range(first_id, first_id + sites)
    taken = [n for n in numbers if any(found for base in bases for found in base.glob(f"Dataset{n:03d}_*"))]
    if taken:
        found = ", ".join(map(str, taken))
        raise UsageRefusal(
            f"the numbers {first_id} to {first_id + sites - 1} should be free below nnUNet_raw, nnUNet_preprocessed "
            f"and nnUNet_results, found datasets {found}: choose another --first-id"
        )
    base = source.folder.parent
    return [base / f"Dataset{n:03d}_{source.title}Site{k}" for k, n in enumerate(numbers, start=1)]


def _origins(source: RawDataset, sites: int) -> list[list[Part]]:
    """Of what each site's dataset is a part: of this split, and of what the source is a part of."""
    older, split = read_origin(source.folder), secrets.token_hex(8)
    return [[*older, Part(parent=source.folder.name, split=split, site=k)] for k in range(1, sites + 1)]


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _write_site(
    source: RawDataset,
    folder: Path,
    slots: Mapping[str, tuple[str, ...]],
    value: str,
    origin: Sequence[Part],
    links: bool,
) -> SiteDataset:
    partial = _partial(folder)
    for part in ("imagesTr", "labelsTr"):
        (partial / part).mkdir(parents=True)
    cases = sorted(case for mine in slots.values() for case in mine)
    ending = source.description["file_ending"]
    for case in cases:
        _place_case(case, source.files[case], partial, ending, place if links else shutil.copyfile)
    mine = Patients(
        source.patients.unit, source.patients.column, {case: source.patients.case_to_patient[case] for case in cases}
    )
    if mine.unit != "case":
        write_canonical(mine, partial / PATIENTS)
    write_origin(origin, partial)
    (partial / "dataset.json").write_text(json.dumps(_description(source, folder, len(cases)), indent=1) + "\n")
    partial.rename(folder)
    return SiteDataset(folder, mine.number, mine.unit, len(cases), value)


def _place_case(case: str, files: CaseFiles, folder: Path, ending: str, put: Callable[[Path, Path], Any]) -> None:
    for channel, image in enumerate(files.images):
        put(image, folder / "imagesTr" / f"{case}_{channel:04d}{ending}")
    put(files.labels, folder / "labelsTr" / f"{case}{ending}")
    for file in files.beside:
        put(file, folder / file.parent.name / file.name)


def place(source: Path, target: Path) -> None:
    """A hard link, or a copy where there can be none (another file system, links forbidden)."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _description(source: RawDataset, folder: Path, cases: int) -> dict[str, Any]:
    """dataset.json without the lists of files, which name other sites' cases."""
    lists = ("training", "test", "dataset", "numTest")
    kept = {key: value for key, value in source.description.items() if key not in lists}
    return {**kept, "name": folder.name.split("_", 1)[1], "numTraining": cases}
