"""What a training has spent: read from the ledger, never from a stored number; safe while the training runs.

Epsilon is composed from the run's lines in the fold's folder, checked against the dataset's ledger where that is at
hand; the dataset's total counts every run ever charged on it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_dp import TRAINER_NAMES
from nnunet_dp.accounting import which_accountant
from nnunet_dp.card_words import not_covered_rows
from nnunet_dp.charges import (
    MORPHOLOGY,
    LedgerEntry,
    epsilon_of,
    events_of,
    of_purpose,
    steps_charged,
    steps_done,
    steps_wasted,
)
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.federated.site_store import released_without_guarantee
from nnunet_dp.ledger import read_copy, read_ledger
from nnunet_dp.morphology import FILE, read_morphology
from nnunet_dp.plans import configuration_plan, read_plans, read_section
from nnunet_dp.run import CARD, FINAL, LATEST, LEDGER, read_checkpoint
from nnunet_dp.sections import PrivacySection, covered, not_covered


@dataclass(frozen=True)
class Status:
    """A run's claim and what it rests on.

    Attributes:
        epsilon_spent: of this run, from its ledger lines.
        epsilon_target: of the plan.
        epsilon_dataset_total: of all runs on the dataset; None where the dataset's ledger is not at hand.
        steps_done: different steps taken.
        steps_wasted: steps charged again because a crash lost them.
        patients: units in the dataset.
        entries: number of the run's ledger lines.
        finished: whether the training is.
        released_without_guarantee: whether the dataset was used without any guarantee, so that no total is claimed.
    """

    run: str
    epsilon_spent: float
    epsilon_target: float
    epsilon_dataset_total: float | None
    delta: float
    unit: str
    relation: str
    accountant: str
    covers: tuple[str, ...]
    not_covered: tuple[str, ...]
    steps_done: int
    steps_planned: int
    steps_wasted: int
    noise_multiplier: float
    sampling_probability: float
    patients: int
    entries: int
    finished: bool
    released_without_guarantee: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return json.loads(json.dumps(asdict(self)))

    def lines(self) -> list[tuple[str, str]]:
        """Label and value, for a table."""
        per, state = f"per {self.unit}", "finished" if self.finished else "not finished"
        total = "unknown: the dataset's ledger is not at hand (set nnUNet_preprocessed)"
        if self.epsilon_dataset_total is not None:
            total = f"epsilon {self.epsilon_dataset_total:.4g} {per} by all runs on this dataset"
        if self.released_without_guarantee:
            total = "no total: it was used WITHOUT ANY GUARANTEE too (fedavg, paper); the epsilon is of this run alone"
        wasted = f", {self.steps_wasted} lost in crashes and charged" if self.steps_wasted else ""
        return [
            ("run", self.run),
            ("spent", f"epsilon {self.epsilon_spent:.4g} of {self.epsilon_target:g} at delta {self.delta:g} {per}"),
            ("unit", f"{self.unit} ({self.patients} in the dataset), relation {self.relation}"),
            ("dataset", total),
            ("steps", f"{self.steps_done} of {self.steps_planned}{wasted}; {state}"),
            ("mechanism", f"noise {self.noise_multiplier:.4g}, sampling probability {self.sampling_probability:g}"),
            ("accountant", f"{self.accountant}, {self.entries} ledger lines"),
            ("covers", "; ".join(self.covers)),
            *not_covered_rows(self.not_covered),
        ]


def read_status(folder: Path) -> Status:
    """Status of the newest run in a fold's folder.

    Raises:
        UsageRefusal: when the folder holds no private training.
        Refusal: when the run's lines and the dataset's ledger disagree.
    """
    folder = Path(folder).resolve()
    plans, copy = folder.parent / "plans.json", folder / LEDGER
    if not plans.is_file() or not folder.name.startswith("fold_"):
        raise UsageRefusal(
            f"expected the folder of a fold, such as nnUNetTrainerDP__nnUNetPlansDP_eps8__3d_fullres/fold_0; "
            f"{folder.name} has no plans.json beside it"
        )
    if (folder.parent / CARD).is_file():
        raise UsageRefusal(
            f"{folder.parent.name} was installed from an export: its claim is in {CARD}, its ledger stayed behind"
        )
    trainer = folder.parent.name.split("__")[0]
    if trainer not in TRAINER_NAMES:
        raise UsageRefusal(
            f"{folder.parent.name} was trained by {trainer}, without privacy: nothing is guaranteed, whatever its "
            "plans are called; train again with -tr nnUNetTrainerDP_AutoS"
        )
    content = read_plans(plans)
    section = read_section(content)
    if section is None and (folder.parent / "federated.json").is_file():
        raise UsageRefusal(f"{folder.parent.name} is a federated model: type `nnunet-dp fed status {folder.parent}`")
    if section is None:
        raise UsageRefusal(f"{folder.parent.name} was not trained with privacy: its plans have no private section")
    configuration = folder.parent.name.rsplit("__", 1)[-1]
    # Read in the order in which a running training is behind: checkpoint, copies, dataset's ledger.
    proved, taken = _proved(folder)
    copies = {file: read_copy(file) for file in folder.parent.parent.rglob(LEDGER)}
    dataset = _dataset_entries(content["dataset_name"])
    if dataset is not None and {entry.hash for lines in copies.values() for entry in lines} - {e.hash for e in dataset}:
        raise Refusal(f"charges in a model folder are missing from the dataset's {LEDGER}: put it back from a backup")
    mine = _run_entries(folder, copies.get(copy, ()), dataset)
    charged = sum(entry.count for entry in mine)
    if charged < proved or steps_charged(mine) < (taken or 0):
        raise Refusal(
            f"the checkpoint in {folder.name} proves at least {proved} charges, found {charged} in the ledger: put "
            f"{LEDGER} back from a backup"
        )
    paid = [(entry.run, entry.sequence) for entry in of_purpose(mine, MORPHOLOGY)]
    if (folder / FILE).is_file() and read_morphology(folder / FILE).paid_by not in (None, *paid):
        raise Refusal(f"{FILE} in {folder.name} was learnt from masks, but no charge paid for it: put {LEDGER} back")
    _refuse_foreign_checkpoint(folder, mine)
    free = released_without_guarantee(*_dataset_folders(content["dataset_name"]), folder.parent.parent)
    return _status(section, configuration, mine, dataset, taken, free)


def _run_entries(
    folder: Path, copied: tuple[LedgerEntry, ...], dataset: tuple[LedgerEntry, ...] | None
) -> tuple[LedgerEntry, ...]:
    """The newest run's lines: from the dataset's ledger where it is at hand, else from the copy beside the model."""
    known = copied if dataset is None else dataset
    name = f"{folder.parent.name}/{folder.name}/"
    runs = [entry.run for entry in copied] or [entry.run for entry in known if entry.run.startswith(name)]
    return tuple(entry for entry in known if entry.run == runs[-1]) if runs else ()


def _proved(folder: Path) -> tuple[int, int | None]:
    """How many charges the fold's checkpoint knows of at least, and the steps taken where the run is finished."""
    final, latest = folder / FINAL, folder / LATEST
    if final.is_file():
        found = read_checkpoint(final).get("init_args", {})
        if "charges" not in found:
            raise Refusal(f"{FINAL} was not written at the end of a private training: finish it with --c")
        return int(found["charges"]), int(found["steps"])
    return (int(read_checkpoint(latest)["private"]["step"]) if latest.is_file() else 0), None


def _refuse_foreign_checkpoint(folder: Path, mine: tuple[LedgerEntry, ...]) -> None:
    """Refuse weights that the newest run's lines did not pay for."""
    if not (folder / FINAL).is_file():
        return
    checkpoint = read_checkpoint(folder / FINAL)
    found = checkpoint.get("init_args", {}).get("run"), checkpoint.get("trainer_name")
    if found != (mine[-1].run if mine else None, folder.parent.name.split("__")[0]):
        raise Refusal(
            f"{FINAL} in {folder.name} of {folder.parent.name} was written by another run or trainer than its ledger "
            "lines: put the run's own checkpoint back"
        )


def _dataset_folders(dataset: str) -> list[Path]:
    """The dataset's preprocessed folder, where that is known."""
    base = os.environ.get("nnUNet_preprocessed")
    return [Path(base) / dataset] if base else []


def _dataset_entries(dataset: str) -> tuple[LedgerEntry, ...] | None:
    files = [folder / LEDGER for folder in _dataset_folders(dataset)]
    return read_ledger(files[0]) if files and files[0].is_file() else None


def _status(
    section: PrivacySection,
    configuration: str,
    mine: tuple[LedgerEntry, ...],
    dataset: tuple[LedgerEntry, ...] | None,
    taken: int | None,
    free: bool,
) -> Status:
    """Steps taken come from the finished checkpoint, before that from the ledger: a lost step may never be repeated."""
    plan, budget = configuration_plan(section, configuration), section.budget
    if plan.fingerprint and dataset is not None:
        plan.fingerprint.refuse_unpaid(dataset)
    return Status(
        run=mine[-1].run if mine else "no charge yet",
        epsilon_spent=epsilon_of([*plan.paid, *mine], budget.delta) if mine else 0.0,
        epsilon_target=budget.epsilon,
        epsilon_dataset_total=None if dataset is None or free else epsilon_of(dataset, budget.delta),
        delta=budget.delta,
        unit=mine[-1].unit if mine else budget.unit,
        relation=budget.relation,
        accountant=which_accountant(events_of(mine), budget.delta),
        covers=covered(section, configuration),
        not_covered=not_covered(section, configuration),
        steps_done=steps_done(mine) if taken is None else taken,
        steps_planned=plan.steps,
        steps_wasted=steps_wasted(mine) if taken is None else steps_charged(mine) - taken,
        noise_multiplier=plan.noise_multiplier,
        sampling_probability=plan.sampling_probability,
        patients=section.patients,
        entries=len(mine),
        finished=taken is not None,
        released_without_guarantee=free,
    )
