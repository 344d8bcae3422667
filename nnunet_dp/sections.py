"""What a private plan holds: the ``differential_privacy`` section of a plans file, as frozen, validated values.

``planning`` decides the numbers, ``plans`` reads and writes the file; what moves epsilon is taken out of a section by
``ConfigurationPlan.privacy_plan``, what moves only accuracy by ``ConfigurationPlan.schedule``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from nnunet_dp.accounting import ACCOUNTANT, PrivacyBudget
from nnunet_dp.charges import FINGERPRINT, Charge, LedgerEntry, LedgerError
from nnunet_dp.clipping import ClipRule, make_rule
from nnunet_dp.dpsgd import PrivacyPlan, Schedule
from nnunet_dp.errors import UsageRefusal

Compute = Literal["full", "small"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RulePlan(_Frozen):
    """A clip rule's constants and the learning rate that goes with it."""

    constants: dict[str, float]
    learning_rate: float = Field(gt=0)

    def rule(self, name: str) -> ClipRule:
        """The rule of that name with these constants."""
        return make_rule(name, self.constants)


class NetworkPlan(_Frozen):
    """Size of the network: stages, features of each and number of trainable parameters."""

    features_per_stage: tuple[int, ...]
    parameters: int = Field(gt=0)


class MorphologyPlan(_Frozen):
    """The one release from which refinement learns its rules.

    Attributes:
        share: of the budget, as mu_m^2 / mu^2.
        noise_multiplier: noise over L2 sensitivity, on the full batch of training patients.
    """

    share: float = Field(gt=0, lt=1)
    noise_multiplier: float = Field(gt=0)


class FingerprintPlan(_Frozen):
    """The noised fingerprint that the plans follow: charged before the training, which keeps within what is left.

    Attributes:
        run: its name in the dataset's ledger.
        noise_multiplier: noise over L2 sensitivity, on all patients.
        count: charges; more than one where a crash lost a release.
    """

    run: str
    noise_multiplier: float = Field(gt=0)
    count: int = Field(default=1, ge=1)

    @property
    def charge(self) -> Charge:
        """Its price."""
        return Charge(
            purpose=FINGERPRINT, mechanism="gaussian", noise_multiplier=self.noise_multiplier, count=self.count
        )

    @classmethod
    def of(cls, run: str, entries: Iterable[LedgerEntry]) -> FingerprintPlan | None:
        """What a dataset's ledger holds of that name; None for nothing.

        Raises:
            LedgerError: for releases of different prices, which are not those of one fingerprint.
        """
        mine = [entry for entry in entries if entry.run == run]
        if not mine:
            return None
        prices = {entry.noise_multiplier for entry in mine}
        if len(prices) > 1 or any(entry.purpose != FINGERPRINT for entry in mine):
            raise LedgerError(f"the ledger holds different charges under {run}: start with a new fingerprint")
        (noise,) = prices
        return cls(run=run, noise_multiplier=noise or 0.0, count=sum(entry.count for entry in mine))

    def refuse_unpaid(self, entries: Iterable[LedgerEntry]) -> None:
        """Refuse where the dataset's ledger does not hold these charges.

        Raises:
            LedgerError: naming the run.
        """
        if FingerprintPlan.of(self.run, entries) != self:
            raise LedgerError(
                f"the plans follow the fingerprint {self.run}, and the dataset's ledger holds other charges of it: put "
                "the ledger back from a backup, or plan again"
            )


class PublicStart(_Frozen):
    """What the network learns from phantoms before the first private step; costs no privacy.

    Attributes:
        kinds: phantom kinds, in turn.
        images: phantoms drawn; each is randomised anew whenever it is used.
        iterations: batches learnt from.
        batch: patches in each.
        learning_rate: of AdamW, at its highest.
        seed: of phantoms, network and batches.
        public_weights_sha256: a file of weights on public data that it began from, if any.
    """

    kinds: tuple[str, ...] = Field(min_length=1)
    images: int = Field(gt=0)
    iterations: int = Field(gt=0)
    batch: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    seed: int = Field(default=0, ge=0)
    public_weights_sha256: str | None = None

    def describe(self) -> str:
        """For people."""
        begun = f" from public weights {self.public_weights_sha256[:12]}" if self.public_weights_sha256 else ""
        kinds = ", ".join(self.kinds)
        return f"{self.iterations} iterations of {self.batch} on {self.images} phantoms ({kinds}){begun}"


class ConfigurationPlan(_Frozen):
    """The private training of one nnU-Net configuration."""

    steps: int = Field(gt=0)
    sampling_probability: float = Field(gt=0, le=1)
    noise_multiplier: float = Field(gt=0)
    patches_per_patient: int = Field(gt=0)
    augmentation: Literal["none", "nnunet"]
    average_share: float = Field(gt=0, le=1)
    momentum: float = Field(ge=0, lt=1)
    decay_power: float = Field(ge=0)
    network: NetworkPlan
    compute: Compute
    clip_rules: dict[str, RulePlan]
    morphology: MorphologyPlan | None = None
    start: PublicStart | None = None
    by_hand: tuple[str, ...] = ()
    fingerprint: FingerprintPlan | None = None

    @property
    def paid(self) -> tuple[Charge, ...]:
        """What was charged before the training."""
        return (self.fingerprint.charge,) if self.fingerprint else ()

    def privacy_plan(self, budget: PrivacyBudget, rule: str, units: int) -> PrivacyPlan:
        """What moves epsilon, for a fold with that public number of training slots."""
        return PrivacyPlan(
            budget=budget,
            steps=self.steps,
            sampling_probability=self.sampling_probability,
            noise_multiplier=self.noise_multiplier,
            units=units,
            rule=self.clip_rules[rule].rule(rule),
            morphology_noise=self.morphology.noise_multiplier if self.morphology else None,
            paid=self.paid,
        )

    def patches(self, units: int) -> tuple[float, int]:
        """Patches that a training of that many units processes: expected private ones, and public ones."""
        private = self.steps * self.sampling_probability * units * self.patches_per_patient
        return private, self.start.iterations * self.start.batch if self.start else 0

    def schedule(self, rule: str) -> Schedule:
        """What moves only accuracy."""
        return Schedule(self.clip_rules[rule].learning_rate, self.decay_power, self.momentum, self.average_share)


class ByHand(_Frozen):
    """What a user sets in place of a rule; None leaves it to the rule.

    The noise is calibrated afterwards in any case, so nothing set here moves what the training spends.

    >>> ByHand.parse(["steps=50", "features_per_stage=8,16,32"]).names
    ('features_per_stage', 'steps')
    """

    features_per_stage: tuple[PositiveInt, ...] | None = Field(default=None, min_length=3)
    steps: int | None = Field(default=None, gt=0, le=100_000)
    sampling_probability: float | None = Field(default=None, gt=0, le=1)
    patches_per_patient: int | None = Field(default=None, gt=0, le=64)
    augmentation: Literal["none", "nnunet"] | None = None
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    average_share: float | None = Field(default=None, gt=0, le=1)
    momentum: float | None = Field(default=None, ge=0, lt=1)
    decay_power: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @classmethod
    def parse(cls, settings: Sequence[str]) -> ByHand:
        """From words such as ``steps=50``.

        Raises:
            UsageRefusal: for unknown names and impossible values, with all names.
        """
        given: dict[str, Any] = {}
        for setting in settings:
            name, _, value = setting.partition("=")
            given[name.strip()] = value.split(",") if name.strip() == "features_per_stage" else value.strip()
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            wrong = ", ".join(str(found["loc"][0]) for found in error.errors())
            raise UsageRefusal(
                f"--set should name a field of the plan and give a possible value, found a wrong {wrong}; fields: "
                f"{', '.join(cls.model_fields)}; type for instance --set steps=50"
            ) from None

    @property
    def names(self) -> tuple[str, ...]:
        """What is set."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)

    def instead_of(self, name: str, ruled: Any) -> Any:
        """The user's value, or the rule's."""
        mine = getattr(self, name)
        return ruled if mine is None else mine


_LATER: dict[str, Any] = {"start": None, "by_hand": [], "fingerprint": None}  # gained after the first runs


def as_first_written(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's plan as JSON without the later fields that are empty: so runs from before are still known."""
    return {key: value for key, value in plan.items() if _LATER.get(key, ...) != value}


class PrivacySection(_Frozen):
    """The versioned ``differential_privacy`` section of a plans file."""

    version: Literal[1] = 1
    budget: PrivacyBudget
    patients: int = Field(gt=0, description="number of units in the whole dataset: public, fixed before training")
    patients_file_sha256: str | None = Field(description="canonical patients.csv in the preprocessed folder, if any")
    source_plans: str
    accountant: str = ACCOUNTANT
    public_weights_sha256: str | None = Field(default=None, description="declared public -pretrained_weights, if any")
    public_plans: str | None = Field(default=None, description="what the source plans were made from, if not private")
    covers: tuple[str, ...] = ("training of the network weights",)
    not_covered: tuple[str, ...]
    configurations: dict[str, ConfigurationPlan]

    @model_validator(mode="after")
    def _refuse_meaningless_delta(self) -> PrivacySection:
        if self.budget.delta * self.patients >= 1:
            raise ValueError("delta should be below 1 / number of units")
        return self


DECLARED_WEIGHTS = "weights_that_were_declared_public"
RAW_FINGERPRINT = "plans_from_raw_fingerprint"  # epsilon of training *given the plans*
NOT_COVERED = (
    RAW_FINGERPRINT,
    "validation_results_logs_and_everything_else_in_the_model_folder",
    "floating_point_gaussian_from_a_non_cryptographic_generator",  # Mironov 2012
    "choosing_between_models_by_their_validation_results",  # nnUNetv2_find_best_configuration, for one
    "copies_of_the_dataset_under_another_id_and_their_ledgers",
    "models_trained_without_privacy_on_the_same_patients",
    "whether_all_cases_could_be_read_before_the_training",  # nnunet_cases
)


def not_covered(section: PrivacySection, configuration: str) -> tuple[str, ...]:
    """What the epsilon of one configuration leaves out, whatever the section leaves unsaid."""
    plan = section.configurations.get(configuration)
    mended = section.public_plans is not None or (plan is not None and plan.fingerprint is not None)
    standing = {what for what in NOT_COVERED if not (mended and what == RAW_FINGERPRINT)}
    started = plan.start if plan is not None else None
    if section.public_weights_sha256 or (started is not None and started.public_weights_sha256):
        standing.add(DECLARED_WEIGHTS)
    return tuple(sorted({*standing, *section.not_covered}))


def covered(section: PrivacySection, configuration: str) -> tuple[str, ...]:
    """What the epsilon of one configuration pays for."""
    plan = section.configurations.get(configuration)
    learns = plan is not None and plan.morphology is not None
    follows = plan is not None and plan.fingerprint is not None
    return (
        *section.covers,
        *(("refinement rules learnt in the run (morphology.json)",) if learns else ()),
        *(("the plans, which follow a noised fingerprint",) if follows else ()),
    )
