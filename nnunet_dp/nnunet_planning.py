"""Private plans from nnU-Net's ordinary ones: what ``nnunet-dp plan`` decides, shows and writes.

The rules are ``planning``'s, pure functions of budget and public facts; here the facts are read from nnU-Net's plans
and dataset.json, and the result becomes a plans file that nnU-Net understands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_dp.accounting import LARGEST_EPSILON, PrivacyBudget, default_delta
from nnunet_dp.attacker import true_positive_rate
from nnunet_dp.declared_weights import refuse_charged_weights
from nnunet_dp.description import read_description
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.morphology import classes_from
from nnunet_dp.nnunet import PATIENTS, file_sha256, find_patients, preprocessed_folder
from nnunet_dp.nnunet_dataset_fingerprint import Provenance, provenance_of
from nnunet_dp.nnunet_public_plans import public_facts
from nnunet_dp.outlook import Outlook, outlook
from nnunet_dp.patients import Patients, digest
from nnunet_dp.phantoms.matching import matching_kinds, resemble
from nnunet_dp.planning import MORPHOLOGY_SHARE, TRAINING_SHARE, plan_configuration
from nnunet_dp.plans import (
    SECTION,
    for_one_configuration,
    plans_name,
    read_json,
    read_section,
    shrunk_architecture,
    with_section,
    write_json,
)
from nnunet_dp.report import describe
from nnunet_dp.sections import NOT_COVERED, RAW_FINGERPRINT, ByHand, Compute, ConfigurationPlan, PrivacySection

DEFAULT_EPSILON = 8.0
FEWEST_UNITS = 2


@dataclass(frozen=True)
class PlanReport:
    """What ``nnunet-dp plan`` decided and where it wrote it."""

    plans_name: str
    file: Path
    changed: bool
    configuration: str
    section: PrivacySection
    spent: float

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        plan = self.section.configurations[self.configuration]
        return {
            "plans_name": self.plans_name,
            "file": str(self.file),
            "changed": self.changed,
            "configuration": self.configuration,
            "epsilon": self.section.budget.epsilon,
            "epsilon_planned": self.spent,
            "delta": self.section.budget.delta,
            "unit": self.section.budget.unit,
            "relation": self.section.budget.relation,
            "patients": self.section.patients,
            "accountant": self.section.accountant,
            "not_covered": list(self.section.not_covered),
            **plan.model_dump(mode="json"),
            **self.expected(),
        }

    def lines(self) -> list[tuple[str, str]]:
        """Label and value, for a table."""
        expected, gains = self.outlook, self.attacker_gains()
        attacker = "; ".join(f"at most {rate:.1%} at {alpha:.0%} false positives" for alpha, rate in gains.items())
        return [
            ("plans", self.plans_name),
            *describe(self.section, self.configuration, None),
            ("attacker", f"tells from this training alone whether a {self.section.budget.unit} took part: {attacker}"),
            ("verdict", f"{expected.verdict}: {expected.reason}; {expected.next_step}"),
        ]

    def expected(self) -> dict[str, Any]:
        """Signal to noise, verdict and attacker's gain, for ``--json``."""
        gains = {f"true_positive_rate_at_{alpha:g}": rate for alpha, rate in self.attacker_gains().items()}
        return {"signal_to_noise": self.outlook.signal_to_noise, "verdict": self.outlook.verdict, **gains}

    def attacker_gains(self) -> dict[float, float]:
        """Highest true-positive rate of a membership test at 1 % and 5 % false positives, by the planned releases."""
        plan = self.section.configurations[self.configuration]
        events = plan.privacy_plan(self.section.budget, "flat", 1).events
        return {alpha: true_positive_rate(events, alpha) for alpha in (0.01, 0.05)}

    @property
    def outlook(self) -> Outlook:
        """What to expect of a fold with the usual share of the patients."""
        plan = self.section.configurations[self.configuration]
        patients = int(TRAINING_SHARE * self.section.patients)
        resembles = plan.start is not None and resemble(plan.start.kinds)
        return outlook(plan, patients, resembles)


def plan_dataset(
    dataset: str, configuration: str, epsilon: float, delta: float | None = None, **options: Any
) -> PlanReport:
    """Write private plans beside nnU-Net's; a pure function of the budget and public facts.

    The same arguments again change nothing; another configuration is added to the file.

    Args:
        dataset: id or name.
        configuration: nnU-Net's name.
        epsilon: of the budget.
        delta: of the budget; None follows the number of units.
        options: the other fields of ``Draft``.

    Raises:
        UsageRefusal: for unknown datasets, plans or configurations, and for a differing plan of that name without
            ``overwrite``.
    """
    draft = Draft(dataset, configuration, delta, **options)
    ((private, report),) = draft.plan([epsilon])
    changed = _merge_into(report.file, private, report.section, configuration, draft.overwrite)
    return replace(report, changed=changed)


def plan_curve(dataset: str, configuration: str, epsilons: Sequence[float], **options: Any) -> list[PlanReport]:
    """Plans for several budgets, side by side; no plan is written. The dataset's files are read once.

    Args:
        dataset: id or name.
        configuration: nnU-Net's name.
        epsilons: the budgets.
        options: the other fields of ``Draft``.
    """
    if not epsilons:
        raise UsageRefusal("--curve should name budgets, found none: try --curve 1,3,8,20")
    draft = Draft(dataset, configuration, **options)
    return [report for _, report in draft.plan(epsilons)]


@dataclass(frozen=True)
class DatasetFacts:
    """What planning reads of a dataset, whatever the budget: its folder, plans and dataset.json, and its units."""

    folder: Path
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    patients: Patients


@dataclass(frozen=True)
class Draft:
    """What ``nnunet-dp plan`` was asked for, but for epsilon.

    Attributes:
        dataset: id or name.
        configuration: nnU-Net's name.
        delta: of the budget; None follows the number of units.
        patients_file: which case belongs to whom; None takes the dataset's own.
        patient_column: its column that names the unit.
        plans: nnU-Net's, to start from.
        output: name of the private plans; None follows source and epsilon.
        compute: how long a schedule may be.
        public_weights: declared public for ``-pretrained_weights``.
        morphology_share: of mu^2, for what refinement learns.
        public_start: whether to begin from phantoms.
        by_hand: what is set in place of a rule.
        overwrite: whether a differing plan of that name is replaced.
    """

    dataset: str
    configuration: str
    delta: float | None = None
    patients_file: Path | None = None
    patient_column: str | None = None
    plans: str = "nnUNetPlans"
    output: str | None = None
    compute: Compute = "full"
    public_weights: Path | None = None
    morphology_share: float = MORPHOLOGY_SHARE
    public_start: bool = True
    by_hand: ByHand = ByHand()  # noqa: RUF009 (frozen)
    overwrite: bool = False

    def plan(self, epsilons: Sequence[float]) -> list[tuple[dict[str, Any], PlanReport]]:
        """The private plans for each epsilon, not yet written."""
        for epsilon in epsilons:
            self._refuse_meaningless(epsilon)
        facts = self._read()
        return [self._planned(epsilon, facts) for epsilon in epsilons]

    def _read(self) -> DatasetFacts:
        folder = preprocessed_folder(self.dataset)
        source = _read_plans(folder, self.plans)
        _refuse_configuration(source, self.configuration)
        patients = find_patients(folder, self.patients_file, self.patient_column, self.overwrite)
        return DatasetFacts(folder, source, read_description(folder / "dataset.json"), patients)

    def _planned(self, epsilon: float, facts: DatasetFacts) -> tuple[dict[str, Any], PlanReport]:
        private, section = self.private(facts, self._budget(epsilon, facts.patients))
        name = self.output or plans_name(self.plans, epsilon)
        private["plans_name"] = name
        spent = _planned_epsilon(section, self.configuration)
        return private, PlanReport(name, facts.folder / f"{name}.json", False, self.configuration, section, spent)

    def private(self, facts: DatasetFacts, budget: PrivacyBudget) -> tuple[dict[str, Any], PrivacySection]:
        """The dataset's plans with a private section, in memory."""
        source, dataset_json, patients = facts.plans, facts.dataset_json, facts.patients
        if patients.number < FEWEST_UNITS:
            raise UsageRefusal(
                f"a private training should have {FEWEST_UNITS} {patients.unit}s or more, found {patients.number}: one "
                f"to learn from and one to validate on; mend patients.csv, or add {patients.unit}s"
            )
        provenance = provenance_of(facts.folder, source)
        starts = self.public_start and self.public_weights is None  # declared weights are a start by themselves
        manager = PlansManager(source).get_configuration(self.configuration)
        architecture = manager.configuration["architecture"]
        plan = plan_configuration(
            budget,
            patients.number,
            tuple(manager.patch_size),
            architecture["arch_kwargs"]["strides"],
            lambda features: count_parameters(source, self.configuration, dataset_json, features),
            self.compute,
            tuple(round(edge) for edge in source.get("original_median_shape_after_transp", ())),
            self.morphology_share,
            len(classes_from(dataset_json).classes),
            matching_kinds(public_facts(source, dataset_json)) if starts else (),
            self.by_hand,
            provenance.fingerprint,
        )
        kept = facts.folder / PATIENTS
        if self.public_weights is not None:
            refuse_charged_weights(self.public_weights, facts.folder)
        section = PrivacySection(
            budget=budget,
            patients=patients.number,
            patients_file_sha256=digest(kept) if kept.is_file() else None,
            source_plans=source["plans_name"],
            public_weights_sha256=file_sha256(self.public_weights) if self.public_weights else None,
            public_plans=provenance.public,
            not_covered=tuple(what for what in NOT_COVERED if what != RAW_FINGERPRINT or provenance == Provenance()),
            configurations={self.configuration: plan},
        )
        shrunk = {self.configuration: shrunk_architecture(architecture, plan.network.features_per_stage)}
        return with_section(source, source["plans_name"], section, shrunk), section

    def _refuse_meaningless(self, epsilon: float) -> None:
        output, delta = self.output, self.delta
        if not 0 < epsilon <= LARGEST_EPSILON:
            raise UsageRefusal(f"epsilon should lie in (0, {LARGEST_EPSILON:g}], found {epsilon:g}: try --epsilon 8")
        if output is not None and (not output or Path(output).name != output or output.endswith(".json")):
            raise UsageRefusal(f"-o should be a name without folder and .json, found {output!r}: try -o myplans")
        if delta is not None and not 0 < delta < 1:
            raise UsageRefusal(f"delta should lie between 0 and 1, found {delta:g}: try 1e-5")

    def _budget(self, epsilon: float, patients: Patients) -> PrivacyBudget:
        delta = default_delta(patients.number) if self.delta is None else self.delta
        if delta * patients.number >= 1:
            raise UsageRefusal(
                f"delta should be below 1 / {patients.number} {patients.unit}s, found {delta:g}: try 1e-5"
            )
        return PrivacyBudget(epsilon=epsilon, delta=delta, unit=patients.unit)


def self_configured(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> dict[str, Any]:
    """Ordinary plans turned private in memory, to the default budget and under their own name.

    Without a public start, so that a training that nobody planned begins at once.
    """
    folder = preprocessed_folder(plans["dataset_name"])
    _refuse_configuration(plans, configuration)
    patients = find_patients(folder)
    budget = PrivacyBudget(epsilon=DEFAULT_EPSILON, delta=default_delta(patients.number), unit=patients.unit)
    draft = Draft(plans["dataset_name"], configuration, public_start=False)
    return draft.private(DatasetFacts(folder, plans, dataset_json, patients), budget)[0]


def _refuse_configuration(plans: dict[str, Any], configuration: str) -> None:
    if configuration not in plans["configurations"]:
        known = ", ".join(plans["configurations"])
        raise UsageRefusal(f"plans {plans['plans_name']} have no configuration {configuration}; they have: {known}")
    if PlansManager(plans).get_configuration(configuration).previous_stage_name is not None:
        raise Refusal("the cascade's second stage is not supported: it sees predictions of an earlier private model")


def _merge_into(
    file: Path, private: dict[str, Any], section: PrivacySection, configuration: str, overwrite: bool
) -> bool:
    """Write the private plans, keeping what the file already plans for other configurations; whether it changed."""
    if file.is_file():
        old = read_json(file)
        before = read_section(old)
        if before is None:
            raise UsageRefusal(f"{file.name} holds plans without privacy: choose another name with -o")
        same_budget = before.model_copy(update={"configurations": {}}) == section.model_copy(
            update={"configurations": {}}
        )
        known = before.configurations.get(configuration)
        if known is not None and for_one_configuration(old, configuration) == for_one_configuration(
            private, configuration
        ):
            return False
        if not overwrite and not (same_budget and known is None):
            what = f"{configuration} differently" if same_budget else f"otherwise ({_difference(before, section)})"
            raise UsageRefusal(
                f"{file.name} already plans {what}: give --overwrite to replace it, or another name with -o"
            )
        if same_budget:
            for other, plan in before.configurations.items():
                if other != configuration:
                    private["configurations"][other] = old["configurations"][other]
                    private[SECTION]["configurations"][other] = plan.model_dump(mode="json")
    write_json(private, file)
    return True


def _difference(before: PrivacySection, now: PrivacySection) -> str:
    """Which fields of two plans differ, but for their configurations, and how."""
    pairs = {
        name: (vars(before)[name], vars(now)[name]) for name in PrivacySection.model_fields if name != "configurations"
    }
    budgets = pairs.pop("budget")
    pairs |= {name: tuple(vars(budget)[name] for budget in budgets) for name in PrivacyBudget.model_fields}
    shown = ("epsilon", "delta", "unit", "patients", "source_plans")
    told = [
        f"{name} {old} there, {new} now" if name in shown else name for name, (old, new) in pairs.items() if old != new
    ]
    return "; ".join(told)


def _read_plans(folder: Path, plans: str) -> dict[str, Any]:
    file = folder / f"{plans}.json"
    if not file.is_file():
        found = ", ".join(sorted(f.stem for f in folder.glob("*lans*.json"))) or "none"
        raise UsageRefusal(f"{folder.name} has no plans {plans}; found: {found}. Run nnUNetv2_plan_and_preprocess")
    content = read_json(file)
    if read_section(content) is not None:
        raise UsageRefusal(f"{plans} are private plans already: start from the plans they were made from")
    return content


def _planned_epsilon(section: PrivacySection, configuration: str) -> float:
    plan: ConfigurationPlan = section.configurations[configuration]
    return plan.privacy_plan(section.budget, "flat", 1).epsilon


def count_parameters(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], features: tuple[int, ...]
) -> int:
    """Trainable parameters of the configuration's network with these features per stage; no memory is allocated."""
    planned = PlansManager(plans).get_configuration(configuration).configuration["architecture"]
    with torch.device("meta"):
        network = build_network(plans, configuration, dataset_json, shrunk_architecture(planned, features), False)
    return sum(parameter.numel() for parameter in network.parameters())


def build_network(
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    architecture: dict[str, Any],
    initialised: bool,
) -> nn.Module:
    """nnU-Net's network of that architecture for the configuration's channels and classes, with deep supervision."""
    manager = PlansManager(plans)
    return get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        determine_num_input_channels(manager, manager.get_configuration(configuration), dataset_json),
        manager.get_label_manager(dataset_json).num_segmentation_heads,
        allow_init=initialised,
        deep_supervision=True,
    )
