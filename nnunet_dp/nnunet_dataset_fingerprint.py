"""``nnunet-dp fingerprint``: where a dataset's plans come from, so that they tell nothing, or nothing unpaid.

    private   noised statistics of the images -> preprocessed/DATASET/dataset_fingerprint.json, for nnU-Net's planner
    public    plans of phantoms, or of a public dataset -> preprocessed/DATASET/nnUNetPlansPublic.json

``nnunet-dp plan`` recognises both: plans that follow the private fingerprint are paid for from its budget, plans that
are known to be public cost nothing, and any others are ``plans_from_raw_fingerprint``.

Design note: nnU-Net keeps a fingerprint that exists (``nnUNetv2_plan_and_preprocess`` does not make it again), and its
planner reads what it needs of the pseudo cases in ours. The section that says who paid is a further key of that file.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dp.accounting import LARGEST_EPSILON, PrivacyBudget, default_delta
from nnunet_dp.charges import FINGERPRINT, epsilon_of
from nnunet_dp.description import read_description
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.federated.raw_dataset import nnunet_folder, raw_folder, read_raw
from nnunet_dp.fingerprint import (
    SHARE,
    Ballot,
    Values,
    as_nnunet,
    deviation_of,
    estimates,
    fewest_patients,
    is_audible,
    mechanism_for,
    release,
)
from nnunet_dp.ledger import Ledger, read_ledger, refuse_other_units
from nnunet_dp.nnunet_fingerprint import ballot_for, measure
from nnunet_dp.nnunet_public_plans import channel_names, described_facts, plans_from_phantoms
from nnunet_dp.patients import Patients
from nnunet_dp.plans import json_sha256, read_json, read_section, write_json
from nnunet_dp.report import CASE_NOTE
from nnunet_dp.run import LEDGER, RunFolder
from nnunet_dp.sections import FingerprintPlan
from nnunet_dp.workers import Progress

FILE, PUBLIC_PLANS, PUBLIC_RECORD = "dataset_fingerprint.json", "nnUNetPlansPublic", "public_plans.json"
SECTION = "differential_privacy"
LARGEST_SHARE = 0.5
_BUDGETS = tuple(round(0.5 * 1.1**step, 2) for step in range(80))  # searched for the least that is heard


@dataclass(frozen=True)
class Made:
    """What the command did.

    Attributes:
        how: ``private``, ``public``, or ``public`` because noise would have drowned everything (``drowned``).
        file: written, or found as asked.
        changed: whether anything was written or charged.
        epsilon: spent by this alone; 0 for public plans.
        delta: of it.
        unit: of it.
        share: of the budget.
        reason: in words.
        next_command: to type.
    """

    how: str
    file: Path
    changed: bool
    epsilon: float
    delta: float | None
    unit: str
    share: float | None
    reason: str
    next_command: str

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "file": str(self.file)}


@dataclass(frozen=True)
class Asked:
    """What was typed.

    Attributes:
        dataset: id or name.
        epsilon: of the budget that the share is of.
        delta: of it; None follows the number of units.
        share: of mu^2.
        patients_file: which case belongs to whom; None takes the dataset's own.
        patient_column: its column that names the unit.
        processes: that read images.
        overwrite: whether another fingerprint is replaced (and charged).
    """

    dataset: str
    epsilon: float = 8.0
    delta: float | None = None
    share: float = SHARE
    patients_file: Path | None = None
    patient_column: str | None = None
    processes: int = 1
    overwrite: bool = False

    def budget(self, patients: Patients) -> PrivacyBudget:
        """Of the whole: fingerprint, training, morphology."""
        if not 0 < self.epsilon <= LARGEST_EPSILON:
            raise UsageRefusal(f"epsilon should lie in (0, {LARGEST_EPSILON:g}], found {self.epsilon:g}: 8 is usual")
        if not 0 < self.share <= LARGEST_SHARE:
            raise UsageRefusal(f"the share should lie in (0, {LARGEST_SHARE}], found {self.share:g}: try --share 0.1")
        delta = self.delta if self.delta is not None else default_delta(patients.number)
        if not 0 < delta * patients.number < 1:
            raise UsageRefusal(f"delta should lie in (0, 1 / number of {patients.unit}s), found {delta:g}: try 1e-5")
        return PrivacyBudget(epsilon=self.epsilon, delta=delta, unit=patients.unit)


# ---- private -----------------------------------------------------------------------------------------------------


def fingerprint_dataset(
    asked: Asked, progress: Progress | None = None, say: Callable[[str], None] = lambda line: None
) -> Made:
    """The private fingerprint of a dataset where it can be heard, else plans from phantoms.

    Args:
        asked: what was typed.
        progress: told after each case.
        say: told before anything is charged where the unit is one case.

    Raises:
        UsageRefusal: for unknown datasets and budgets without sense, and where another fingerprint lies there.
        BudgetRefusal, Refusal: of the ledger; nothing is charged then.
    """
    raw = raw_folder(asked.dataset)
    patients = read_raw(raw, asked.patients_file, asked.patient_column).patients
    budget = asked.budget(patients)
    description = read_description(raw / "dataset.json")
    ballot = ballot_for(description)
    reason = _drowned(ballot, budget, asked.share, patients.number)
    if reason is not None:
        return from_phantoms(asked.dataset, None, reason=reason, overwrite=asked.overwrite)
    if patients.unit == "case":
        say(f"NOTE: {CASE_NOTE}")
    folder = nnunet_folder("preprocessed") / raw.name
    numbers = {"epsilon": budget.epsilon, "delta": budget.delta, "unit": budget.unit, "share": asked.share}
    numbers |= {"patients": patients.number}
    known = _known(folder, numbers, asked.overwrite)
    if known is None:
        known = _release(raw, folder, ballot, patients, budget, asked, numbers, progress)
        _write(folder, known, ballot, description, budget, asked.share)
        changed = True
    else:
        changed = False
    charge = mechanism_for(budget, asked.share).charge(FINGERPRINT, step=None)
    return Made(
        "private", folder / FILE, changed, epsilon_of([charge], budget.delta), budget.delta, budget.unit, asked.share,
        f"{asked.share:.0%} of the budget (as mu^2) of epsilon {budget.epsilon:g}; the training gets the rest",
        f"nnUNetv2_plan_experiment -d {asked.dataset}; nnUNetv2_preprocess -d {asked.dataset}; "
        f"nnunet-dp plan -d {asked.dataset} -c CONFIGURATION --epsilon {budget.epsilon:g}",
    )  # fmt: skip


def _drowned(ballot: Ballot, budget: PrivacyBudget, share: float, patients: int) -> str | None:
    """Why public plans are the better choice, with the numbers from which they are not; None where they are not."""

    def deviation(epsilon: float) -> float:
        other = PrivacyBudget(epsilon=epsilon, delta=budget.delta, unit=budget.unit)
        return deviation_of(ballot, mechanism_for(other, share).noise_multiplier)

    if is_audible(ballot, patients, deviation(budget.epsilon)):
        return None
    least = next((epsilon for epsilon in _BUDGETS if is_audible(ballot, patients, deviation(epsilon))), None)
    return (
        f"{patients} {budget.unit}s drown in the noise of epsilon {budget.epsilon:g}: a private fingerprint needs "
        f"{fewest_patients(ballot, deviation(budget.epsilon))} {budget.unit}s at this epsilon"
        + (f", or epsilon {least:g} with these {budget.unit}s" if least else "")
    )


def _known(folder: Path, numbers: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The release that lies there and was asked for by the same numbers; None for none."""
    file = folder / FILE
    if not file.is_file():
        return None
    found = _read(file).get(SECTION)
    if isinstance(found, dict) and {key: found.get(key) for key in numbers} == dict(numbers):
        return found
    if overwrite:
        return None
    what = "another private fingerprint" if found is not None else "a raw fingerprint, made from the images as they are"
    raise UsageRefusal(
        f"{folder.name} has {what}: give --overwrite to make a private one in its place"
        + (" (charged again)" if found is not None else ", and plan and preprocess anew")
    )


def _release(
    raw: Path,
    folder: Path,
    ballot: Ballot,
    patients: Patients,
    budget: PrivacyBudget,
    asked: Asked,
    numbers: Mapping[str, Any],
    progress: Progress | None,
) -> dict[str, Any]:
    """Measure, charge, noise: the section of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    results, name = nnunet_folder("results") / raw.name, secrets.token_hex(8)
    RunFolder(results / FINGERPRINT / name, folder / LEDGER, results).verify_ledger()
    if (folder / LEDGER).is_file():
        refuse_other_units(read_ledger(folder / LEDGER), patients.unit, patients.table_sha256)
    values = _measured(raw, asked, progress)
    grouped = patients.cases_of(values)
    votes = np.sum([ballot.votes([values[case] for case in mine]) for mine in grouped.values()], axis=0)
    copy = results / FINGERPRINT / name / LEDGER
    copy.parent.mkdir(parents=True, exist_ok=True)
    run = f"{FINGERPRINT}/{name}"
    ledger = Ledger(folder / LEDGER, run, json_sha256(dict(numbers)), copy, patients.unit, patients.table_sha256)
    mechanism = mechanism_for(budget, asked.share)
    noised = release(ballot, votes, mechanism, ledger.charge(mechanism.charge(FINGERPRINT, step=None)))
    return {**numbers, "run": run, "noise_multiplier": mechanism.noise_multiplier, "votes": noised.tolist()}


def _measured(raw: Path, asked: Asked, progress: Progress | None) -> dict[str, Values]:
    """Before the charge, on the machine that holds the data: a case that cannot be read may be told of."""
    try:
        return measure(raw, asked.processes, progress)
    except Exception as error:  # whatever a reader raises; its message names the case
        raise Refusal(
            f"nnU-Net should read every raw case, found one that it cannot ({type(error).__name__}); nothing was "
            f"charged. See which: nnunet-dp doctor -d {asked.dataset} --cases 100000"
        ) from None


def _write(
    folder: Path, told: Mapping[str, Any], ballot: Ballot, description: Mapping[str, Any], budget: PrivacyBudget,
    share: float,
) -> None:  # fmt: skip
    deviation = deviation_of(ballot, mechanism_for(budget, share).noise_multiplier)
    found = estimates(ballot, np.asarray(told["votes"]), told["patients"], deviation)
    facts = described_facts(description)
    content = as_nnunet(found, facts.dimensions, len(channel_names(description)))
    write_json({**content, SECTION: dict(told)}, folder / FILE)


# ---- public ------------------------------------------------------------------------------------------------------


def from_phantoms(
    dataset: str, kind: str | None, shape: tuple[int, ...] | None = None, reason: str = "", overwrite: bool = False
) -> Made:
    """Public plans from phantoms.

    Args:
        dataset: id or name.
        kind: of phantoms; None takes the one that resembles.
        shape: voxels of every phantom; None is realistic.
        reason: why, where they were not asked for.
        overwrite: whether other plans of that name are replaced.

    Raises:
        UsageRefusal: where no kind resembles the dataset, and for other plans of that name.
    """
    raw = raw_folder(dataset)
    description = read_description(raw / "dataset.json")
    found = plans_from_phantoms(description, kind, shape=shape)
    return _keep_public(raw.name, dataset, found.plans, found.source, reason, overwrite)


def from_dataset(dataset: str, source: str, plans: str = "nnUNetPlans", overwrite: bool = False) -> Made:
    """Plans of another dataset that were declared public: no patient of ours is in it.

    Raises:
        UsageRefusal: where there are none, or they are private ones.
    """
    from nnunet_dp.nnunet_federated import named_plans

    found = named_plans(source, plans)
    return _keep_public(
        raw_folder(dataset).name, dataset, found.plans, f"{found.source}, declared: no patient overlaps", "", overwrite
    )


def _keep_public(
    name: str, dataset: str, plans: Mapping[str, Any], source: str, reason: str, overwrite: bool
) -> Made:
    folder = nnunet_folder("preprocessed") / name
    folder.mkdir(parents=True, exist_ok=True)
    content = _renamed(plans, name)
    file, record = folder / f"{PUBLIC_PLANS}.json", {"sha256": json_sha256(content), "source": source}
    changed = not file.is_file() or read_json(file) != content
    if changed and file.is_file() and not overwrite:
        raise UsageRefusal(f"{folder.name} has other plans {PUBLIC_PLANS}: give --overwrite to replace them")
    write_json(content, file)
    write_json(record, folder / PUBLIC_RECORD)
    description = nnunet_folder("raw") / name / "dataset.json"
    if not (folder / "dataset.json").is_file():
        write_json(read_json(description), folder / "dataset.json")
    how = "drowned" if reason else "public"
    return Made(
        how, file, changed, 0.0, None, "", None, reason or f"from {source}: they cost nothing",
        f"nnUNetv2_preprocess -d {dataset} -plans_name {PUBLIC_PLANS}; "
        f"nnunet-dp plan -d {dataset} -c CONFIGURATION --epsilon 8 -p {PUBLIC_PLANS}",
    )  # fmt: skip


def _renamed(plans: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """The same plans under our name for this dataset; preprocessed cases go to folders of that name."""
    old, content = plans["plans_name"], json.loads(json.dumps(dict(plans)))
    for configuration in content["configurations"].values():
        if "data_identifier" in configuration:
            configuration["data_identifier"] = configuration["data_identifier"].replace(old, PUBLIC_PLANS)
    return {**content, "plans_name": PUBLIC_PLANS, "dataset_name": dataset}


# ---- where plans come from ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provenance:
    """Where the source plans of a private plan come from.

    Attributes:
        fingerprint: that was paid for; None for plans that were not made from one.
        public: what public plans were made from; None where nobody knows.
    """

    fingerprint: FingerprintPlan | None = None
    public: str | None = None


def provenance_of(folder: Path, plans: Mapping[str, Any]) -> Provenance:
    """Where plans in a preprocessed folder come from; nothing is claimed of plans that are not recognised.

    Args:
        folder: the dataset's preprocessed folder.
        plans: nnU-Net's.

    Raises:
        LedgerError: where the private fingerprint's charges are missing.
        Refusal: for a private fingerprint, or plans beside it, that cannot be understood.
    """
    record = folder / PUBLIC_RECORD
    if record.is_file():
        told = _read(record)
        if told.get("sha256") == json_sha256(dict(plans)) and isinstance(told.get("source"), str):
            return Provenance(public=told["source"])
    file = folder / FILE
    content = _read(file) if file.is_file() else {}
    section = content.get(SECTION)
    if section is None or read_section(dict(plans)) is not None:
        return Provenance()
    try:
        followed = follows(plans, content)
        expected = FingerprintPlan(run=section["run"], noise_multiplier=section["noise_multiplier"])
    except (LookupError, TypeError, ValueError, AttributeError):
        raise Refusal(
            f"{FILE} in {folder.name} should be what `nnunet-dp fingerprint` wrote, and the plans what nnU-Net makes "
            "of it, found something else: put both back from a backup"
        ) from None
    if not followed:
        return Provenance()
    charged = read_ledger(folder / LEDGER) if (folder / LEDGER).is_file() else ()
    plan = FingerprintPlan.of(expected.run, charged)
    expected.refuse_unpaid(charged)
    return Provenance(fingerprint=plan)


def _read(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise UsageRefusal(f"{file} should hold an object, found something else: put it back from a backup")
    return content


def follows(plans: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> bool:
    """Whether plans are what nnU-Net's planner makes of this fingerprint, as far as they repeat it.

    Medians of spacing and shape and all intensities are compared; a full-resolution spacing that is none of the
    fingerprint's was set by hand, and is not known to be public.
    """
    forward = list(plans["transpose_forward"])
    spacing = np.median(fingerprint["spacings"], axis=0)[forward]
    shape = np.round(np.median(fingerprint["shapes_after_crop"], axis=0)[forward])
    same = np.allclose(spacing, plans["original_median_spacing_after_transp"], rtol=1e-6)
    same = same and np.array_equal(shape, plans["original_median_shape_after_transp"])
    told = fingerprint["foreground_intensity_properties_per_channel"]
    same = same and json.loads(json.dumps(plans["foreground_intensity_properties_per_channel"])) == told
    named = [name for name in ("2d", "3d_fullres") if name in plans["configurations"]]
    manager = PlansManager(dict(plans))
    spacings = np.asarray(fingerprint["spacings"])[:, forward]
    for name in named:
        edges = np.asarray(manager.get_configuration(name).spacing)
        known = spacings[:, -len(edges) :]
        same = same and bool((edges >= known.min(0) - 1e-4).all() and (edges <= known.max(0) + 1e-4).all())
    return bool(same)


__all__ = ["Asked", "Made", "Provenance", "fingerprint_dataset", "from_dataset", "from_phantoms", "provenance_of"]
