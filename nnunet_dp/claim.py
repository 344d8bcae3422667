"""What a model claims: its charges, counted again from the dataset's ledger, and the words that go with them.

``status`` verifies ledger, copies and checkpoints, fold by fold; here the folds of a model are added up, and what an
export may not be made from is refused. Of federated models see ``federated.claim``.

Formal guarantee:
    A claim's epsilon is that of all charges of the runs that trained the folds, and of the fingerprint that their plans
    follow. There is none for a fold that is not finished, for a checkpoint of another run than the ledger's, and
    without the dataset's own ledger.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunet_dp import __version__
from nnunet_dp.accounting import which_accountant
from nnunet_dp.card import (
    NOISE_SOURCE,
    RAW_PLANS,
    Card,
    ClipRow,
    DatasetRow,
    FoldRow,
    TrainingRow,
    canonical_charges,
    sampler_of,
    sentence,
    unit_of,
)
from nnunet_dp.charges import LedgerEntry, epsilon_of, events_of
from nnunet_dp.dataset_identity import identity
from nnunet_dp.errors import Refusal
from nnunet_dp.figures import figures_of
from nnunet_dp.ledger import read_ledger
from nnunet_dp.morphology import FILE as RULES
from nnunet_dp.morphology import Morphology, read_morphology
from nnunet_dp.plans import configuration_plan, read_plans, read_section
from nnunet_dp.released_model import PLANS
from nnunet_dp.run import LEDGER
from nnunet_dp.sections import ConfigurationPlan, PrivacySection, covered, not_covered
from nnunet_dp.status import Status, read_status

CLIP_RULES = {
    "nnUNetTrainerDP": "flat",
    "nnUNetTrainerDP_AutoS": "auto_s",
    "nnUNetTrainerDP_AutoS_Morph": "auto_s",
    "nnUNetTrainerDP_AutoS_MorphAdaptive": "auto_s",
    "nnUNetTrainerDP_AutoS_MorphTrainingOnly": "auto_s",
    "nnUNetTrainerDP_AutoV": "auto_v",
    "nnUNetTrainerDP_NSGD": "nsgd",
    "nnUNetTrainerDP_PSAC": "psac",
    "nnUNetTrainerDP_Quantile": "quantile",
    "nnUNetTrainerDP_PerLayer": "per_layer",
}
NO_GUARANTEE_RUNS = "runs_without_guarantee_on_this_dataset"
_PUBLIC = "number of units, fold of each unit, channels and labels"


@dataclass(frozen=True)
class Claim:
    """What a model guarantees, before its weights have a name: the card's fields, and each fold's counts.

    Attributes:
        fields: of the card, without folds, versions, figures and sentence.
        counts: charges and steps by fold.
    """

    fields: Mapping[str, Any]
    counts: Mapping[str, tuple[int, int]]

    def card(self) -> Card:
        """The card."""
        folds = [FoldRow(fold=fold, charges=charges, steps=steps) for fold, (charges, steps) in self.counts.items()]
        packages = {"dp_accounting": "dp-accounting", "nnunetv2": "nnunetv2", "torch": "torch"}
        versions = {"nnunet_dp": __version__, **{name: version(package) for name, package in packages.items()}}
        drawn = figures_of(*(self.fields[name] for name in ("charges", "sites", "epsilon", "delta")))
        counted = {"folds": folds, "versions": versions, "figures": drawn, "noise_source": NOISE_SOURCE}
        given = {"schema_version": 1, "claim": "-", **self.fields, **counted}
        draft = Card.model_validate({name: given[name] for name in Card.model_fields})
        return draft.model_copy(update={"claim": sentence(draft)})


def ledger_claim(model: Path, folds: Sequence[str]) -> Claim:
    """What a model of one dataset claims, counted again from the dataset's ledger, in which every line was verified.

    Args:
        model: folder that holds the folds.
        folds: that are charged together.

    Raises:
        UsageRefusal: for models without a guarantee.
        Refusal: for unfinished folds, and a ledger that is missing or does not agree.
    """
    told = [read_status(model / f"fold_{fold}") for fold in folds]
    plans, configuration = read_plans(model / PLANS), model.name.split("__")[2]
    section = read_section(plans)
    assert section is not None  # read_status refuses
    for fold, status in zip(folds, told, strict=True):
        _refuse_unfinished(model, fold, status)
    preprocessed = _preprocessed(plans["dataset_name"])
    ledger = read_ledger(preprocessed / LEDGER)
    if len({(entry.unit, entry.units) for entry in ledger}) != 1:
        raise Refusal("the dataset was charged per different units: their charges cannot be added, nothing is claimed")
    of_run = {status.run: [entry for entry in ledger if entry.run == status.run] for status in told}
    runs = {fold: of_run[status.run] for fold, status in zip(folds, told, strict=True)}
    plan, budget = configuration_plan(section, configuration), section.budget
    rule = CLIP_RULES[model.name.split("__")[0]]
    for fold, entries in runs.items():
        _refuse_other_plan(plan, section, rule, entries, f"fold_{fold} of {model.name}")
    charges = [*plan.paid, *(entry for entries in runs.values() for entry in entries)]
    unguarded = told[0].released_without_guarantee
    rows = canonical_charges(charges)
    fields = {
        "unit": unit_of([told[0].unit]),
        "relation": budget.relation,
        "epsilon": epsilon_of([row.charge for row in rows], budget.delta),
        "delta": budget.delta,
        "dataset": DatasetRow(
            identity=identity(preprocessed, ledger[0].units),
            epsilon_total=told[0].epsilon_dataset_total,
        ),
        "charges": rows,
        "sites": [],
        "client_level": None,
        "clip": _clip(model, section, configuration),
        "sampler": sampler_of(rows),
        "training": _training(plan, rule),
        "accountant": which_accountant(events_of(charges), budget.delta),
        "public_inputs": _public_inputs(model, section, configuration),
        "covers": list(covered(section, configuration)),
        "not_covered": sorted({*not_covered(section, configuration), *([NO_GUARANTEE_RUNS] if unguarded else [])}),
    }
    counts = {fold: (_count(runs[fold]), status.steps_done) for fold, status in zip(folds, told, strict=True)}
    return Claim(fields, counts)


def _preprocessed(dataset: str) -> Path:
    """The folder that holds the dataset's ledger; the copy beside the model does not tell of the dataset's total."""
    base = os.environ.get("nnUNet_preprocessed")
    folder = Path(base) / dataset if base else None
    if folder is None or not (folder / LEDGER).is_file():
        raise Refusal(
            f"the dataset's {LEDGER} is not at hand, from which an export's epsilon is counted: set "
            "nnUNet_preprocessed, or put the ledger back from a backup"
        )
    return folder


def _refuse_other_plan(
    plan: ConfigurationPlan, section: PrivacySection, rule: str, entries: Sequence[LedgerEntry], where: str
) -> None:
    """Refuse plans.json that is not what the run was charged under; how many units a fold has is public."""
    charged = {entry.plan for entry in entries}

    def planned(units: int) -> set[str]:  # a vote that is held later is charged under the flat rule
        return {plan.privacy_plan(section.budget, name, units).digest() for name in (rule, "flat")}

    if not charged or not any(charged <= planned(units) for units in range(section.patients, 0, -1)):
        raise Refusal(
            f"{PLANS} beside {where} says another budget, schedule or fingerprint than its ledger lines were charged "
            "under: put the model's own plans.json back"
        )


def _count(entries: Sequence[LedgerEntry]) -> int:
    return sum(entry.count for entry in entries)


def _refuse_unfinished(model: Path, fold: str, status: Status) -> None:
    """What ``read_status`` reports and an export cannot use."""
    if not status.finished:
        raise Refusal(
            f"fold_{fold} of {model.name} is not finished ({status.steps_done} of {status.steps_planned} steps): go on "
            "with nnUNetv2_train ... --c, or name the finished folds with -f"
        )


def _clip(model: Path, section: PrivacySection, configuration: str) -> ClipRow:
    rule = CLIP_RULES[model.name.split("__")[0]]
    constants = configuration_plan(section, configuration).clip_rules[rule].constants
    return ClipRow(rule=rule, constants=dict(constants))


def _training(plan: ConfigurationPlan, rule: str) -> TrainingRow:
    schedule = plan.schedule(rule)
    return TrainingRow(
        steps=plan.steps,
        learning_rate=schedule.learning_rate,
        decay_power=schedule.power,
        momentum=schedule.momentum,
        average_share=schedule.average_share,
    )


def _public_inputs(model: Path, section: PrivacySection, configuration: str) -> list[str]:
    plan = configuration_plan(section, configuration)
    plans = section.public_plans or f"{RAW_PLANS}, which is not covered"
    weights = section.public_weights_sha256
    free = _free_rules(model)
    return [
        _PUBLIC,
        f"plans from {'a noised fingerprint, which is charged' if plan.fingerprint else plans}",
        *([f"public start: {plan.start.describe()}"] if plan.start else []),
        *([f"weights declared public, SHA-256 {weights}"] if weights else []),
        *([f"refinement rules that asked no patient ({free.kind})"] if free else []),
    ]


def _free_rules(model: Path) -> Morphology | None:
    rules = read_morphology(model / RULES) if (model / RULES).is_file() else None
    return rules if rules is not None and rules.free else None
