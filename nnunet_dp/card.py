"""The privacy card: what a released model guarantees, and what anybody needs to count it again.

``privacy_card.json`` is a closed, versioned schema. Its numbers are those of the ledger, without what would tell of
other runs: equal charges are added up, and there are no times, no hashes of the chain, no sequence numbers. Its
sentence is a function of its numbers, so that it cannot say anything else.

>>> charge = CardCharge(purpose="training", mechanism="gaussian", noise_multiplier=5.0, count=3)
>>> [(row.count, row.noise_multiplier) for row in canonical_charges([charge.charge, charge.charge])]
[(6, 5.0)]

Formal guarantee:
    ``miscounted`` finds no fault only where epsilon is that of the card's charges at its delta under the zero-out
    relation (``accounting.epsilon``), for a federated model the largest of its sites', and where the sentence says
    these numbers, rounded upwards. Whether the charges are those that were made only the owner of the ledger knows.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from nnunet_dp.accounting import which_accountant
from nnunet_dp.charges import Charge, epsilon_of, events_of
from nnunet_dp.clipping import RULE_NAMES, make_rule
from nnunet_dp.errors import Refusal
from nnunet_dp.inference_plans import Plain, Released
from nnunet_dp.sections import NOT_COVERED, RAW_FINGERPRINT

NOISE_SOURCE = "PyTorch generators, keyed anew for every release by the operating system; not cryptographic"
RAW_PLANS = "nnU-Net's fingerprint of the raw images"
SAME_VERSION, OTHER_VERSION = 1e-6, 1e-3  # relative; versions of the accountant round differently
_UNIT = re.compile(r"[^\W\d][\w-]{0,39}( [\w-]{1,39})?( \(inferred\))?")
_Unit = Annotated[str, StringConstraints(pattern=rf"^{_UNIT.pattern}$", max_length=90)]
"""One or two words: it stands in the middle of the claim."""
MIXED_UNIT = "record"
"""Of a federation whose sites count different things; each site's row says which."""
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Delta = Annotated[float, Field(gt=0, lt=1)]
_Version = Annotated[str, StringConstraints(pattern=r"^[0-9][A-Za-z0-9.+]{0,40}$")]
_Fold = Annotated[str, StringConstraints(pattern=r"^(all|[0-9]{1,3})$")]


class CardCharge(Released):
    """Releases of one kind and price: a ledger's charges without run, step, place and time."""

    purpose: Plain
    mechanism: Literal["gaussian", "laplace", "pure_dp"]
    noise_multiplier: _Positive | None = None
    epsilon: _Positive | None = None
    sampling_probability: float = Field(default=1.0, gt=0, le=1)
    count: int = Field(ge=1)

    @property
    def charge(self) -> Charge:
        """For the accountant.

        Raises:
            ValueError: for numbers that no mechanism has.
        """
        return Charge.model_validate(self.model_dump())


class FoldRow(Released):
    """One fold of the model.

    Attributes:
        fold: its number, or ``all``.
        charges: releases of the run that trained it.
        steps: private ones that led to its weights; steps lost in crashes are charged, too.
    """

    fold: _Fold
    charges: int = Field(ge=0)
    steps: int = Field(ge=0)


class DatasetRow(Released):
    """The dataset, for those who have its ledger.

    Attributes:
        identity: HMAC-SHA256 under a secret that stays beside the ledger; equal for all models of the dataset.
        epsilon_total: of all runs ever charged on it; None where a run without guarantee was among them.
    """

    identity: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    epsilon_total: _Positive | None


class SiteRow(Released):
    """One site of a federated run.

    Attributes:
        site: a number; names stay with the coordinator.
        epsilon: spent at its delta.
        delta: of it.
        unit: of it.
        rounds: in which its update was used.
        counted: from its own ledger, or as the site reported (whose ledger stays there).
        charges: where counted.
        epsilon_total: of all runs on its dataset, where counted.
        thresholds: noised clipping threshold after each round, where the rule has one and the site was counted.
    """

    site: int = Field(ge=1)
    epsilon: _Positive
    delta: _Delta
    unit: _Unit
    rounds: int = Field(ge=0)
    counted: Literal["from its ledger", "as reported"]
    charges: list[CardCharge]
    epsilon_total: _Positive | None
    thresholds: list[_Positive] = Field(max_length=1000)


class ClientLevelRow(Released):
    """The second guarantee of a federated run: a whole site as the unit."""

    epsilon: _Positive
    delta: _Delta
    unit: Literal["site"]
    bound: _Positive


class ClipRow(Released):
    """How each unit's gradient was bounded."""

    rule: Literal[RULE_NAMES]  # pyright: ignore[reportInvalidTypeForm]
    constants: dict[Plain, Annotated[float, Field(allow_inf_nan=False)]] = Field(max_length=8)


class TrainingRow(Released):
    """The schedule of the private steps: public, planned before the first of them.

    Attributes:
        steps: planned for each fold.
        learning_rate: of the first step, in units of the clip rule's bound.
        decay_power: exponent of its polynomial decay.
        momentum: of SGD.
        average_share: window of the weight average, as a share of the steps.
    """

    steps: int = Field(ge=1)
    learning_rate: _Positive
    decay_power: float = Field(ge=0, allow_inf_nan=False)
    momentum: float = Field(ge=0, lt=1)
    average_share: float = Field(gt=0, le=1)


class CoursePoint(Released):
    """Epsilon once so many training releases were made, after everything that came before the training."""

    releases: int = Field(ge=0)
    epsilon: float = Field(ge=0, allow_inf_nan=False)


class AttackPoint(Released):
    """The largest true-positive rate of any membership attack with this false-positive rate (``attacker``)."""

    false_positive_rate: float = Field(gt=0, lt=1)
    true_positive_rate: float = Field(gt=0, le=1)


class Figures(Released):
    """What a page draws: functions of the charges alone, so that the page is a function of its card (``figures``).

    Attributes:
        prices: epsilon of each row of charges by itself: the card's, then each site's, in their order.
        course: epsilon over the training's releases; of a federated model that of its dearest site that was counted.
        attack: the best attack on one unit; of a federated model on a unit of its weakest site.
        attack_from: what it is computed from: all charges, or (for sites that only reported) epsilon and delta.
    """

    prices: list[_Positive]
    course: list[CoursePoint] = Field(max_length=100)
    attack: list[AttackPoint] = Field(min_length=1, max_length=100)
    attack_from: Literal["charges", "epsilon and delta"]


class Card(Released):
    """The content of ``privacy_card.json``; see the module.

    Attributes:
        schema_version: of this format.
        claim: ``sentence`` of this card.
        unit: what one record is.
        relation: one record is replaced by an empty one.
        epsilon: of all folds in the archive together; for a federated model the largest of its sites'.
        delta: of it.
        dataset: None for federated models.
        folds: in the archive.
        charges: all that were made for these folds, canonical; empty for federated models.
        sites: of a federated model.
        client_level: of a federated model, where asked for.
        clip: None for federated models, whose sites may have rules of their own.
        sampler: who takes part in a training step; None where no site's charges are at hand.
        noise_source: of all noise.
        training: the schedule; None for federated models, whose sites may have schedules of their own.
        accountant: by which epsilon was computed.
        versions: of the software that exported.
        public_inputs: what is taken as known to everybody.
        covers: what epsilon pays for.
        not_covered: what it does not.
        figures: what a page draws.
    """

    schema_version: Literal[1]
    claim: Plain
    unit: _Unit
    relation: Literal["zero-out"]
    epsilon: _Positive
    delta: _Delta
    dataset: DatasetRow | None
    folds: list[FoldRow] = Field(min_length=1)
    charges: list[CardCharge]
    sites: list[SiteRow]
    client_level: ClientLevelRow | None
    clip: ClipRow | None
    sampler: Literal["poisson", "full batch"] | None
    noise_source: Literal[NOISE_SOURCE]  # pyright: ignore[reportInvalidTypeForm]
    training: TrainingRow | None
    accountant: Plain
    versions: dict[Literal["nnunet_dp", "dp_accounting", "nnunetv2", "torch"], _Version]
    public_inputs: list[Plain]
    covers: list[Plain] = Field(min_length=1)
    not_covered: list[Plain] = Field(min_length=1)
    figures: Figures


def canonical_charges(charges: Iterable[Charge]) -> list[CardCharge]:
    """Equal charges added up, in the order of their words and numbers: whoever made them, and when."""
    counts: Counter[tuple[str, str, float | None, float | None, float]] = Counter()
    for charge in charges:
        price = (charge.purpose, charge.mechanism, charge.noise_multiplier, charge.epsilon, charge.sampling_probability)
        counts[price] += charge.count
    names = ("purpose", "mechanism", "noise_multiplier", "epsilon", "sampling_probability")
    rows = sorted(counts.items(), key=lambda item: tuple(map(str, item[0])))
    return [CardCharge.model_validate({**dict(zip(names, price, strict=True)), "count": n}) for price, n in rows]


def sampler_of(rows: Sequence[CardCharge]) -> Literal["poisson", "full batch"] | None:
    """Who takes part in a step: a Poisson draw, or everybody; None where there are no charges."""
    if not rows:
        return None
    return "poisson" if any(row.sampling_probability < 1 for row in rows) else "full batch"


def unit_of(units: Iterable[str]) -> str:
    """What one record is, over all sites: their unit, or a word that promises none of several."""
    found = {unit if _UNIT.fullmatch(unit) else MIXED_UNIT for unit in units}
    return found.pop() if len(found) == 1 else MIXED_UNIT


def sentence(card: Card) -> str:
    """The claim in one sentence, from the card's numbers.

    Args:
        card: its ``claim`` is not read.
    """
    given = ", given the plans" if RAW_FINGERPRINT in card.not_covered else ""
    what = f"({upwards(card.epsilon)}, {card.delta:g})-differentially private per {card.unit}"
    if not card.sites:
        parts = "the averaged weights and the refinement rules of this model"
        return f"Taken together, {parts} are {what} under the {card.relation} relation{given}."
    sites = f"for each of its {len(card.sites)} sites" if len(card.sites) > 1 else "for its one site"
    told = any(row.counted != "from its ledger" for row in card.sites)
    reported = ", as far as sites reported what they spent" if told else ""
    adds = "; costs add for a patient known to several sites"
    return f"This model is {what} under the {card.relation} relation {sites}{given}{reported}{adds}."


def upwards(epsilon: float) -> str:
    """Four digits that promise no more than the number itself.

    >>> upwards(7.96111), upwards(0.5), upwards(5e-324)
    ('7.962', '0.5', '1e-300')
    """
    unit = 10.0 ** max(math.floor(math.log10(epsilon)) - 3, -300)  # a forged card may say any positive number
    return f"{max(math.ceil(epsilon / unit - 1e-9), 1) * unit:.4g}"


# ---- counting again ----------------------------------------------------------------------------------------------


def miscounted(card: Card) -> Iterator[str]:
    """Where a card's epsilon is not that of its charges, or its words are not those of its numbers."""
    if card.sites:
        yield from _miscounted_sites(card)
    else:
        yield from _other_epsilon("", card.epsilon, card.charges, card.delta, card.accountant)
        charged = sum(row.count for row in card.charges if row.purpose != "fingerprint")
        of_folds = sum(row.charges for row in card.folds)
        if charged != of_folds:
            yield f"the charges count {charged} releases, the folds {of_folds}: a charge is missing or added"
        yield from _untrained(card)
        if card.dataset is None or card.clip is None or card.training is None:
            yield "a model of one dataset should name its identity, its clip rule and its schedule"
        elif (card.dataset.epsilon_total or math.inf) < card.epsilon * (1 - SAME_VERSION):
            yield "the dataset's total is below this model's epsilon"
    charges = [*card.charges, *(row for site in card.sites for row in site.charges)]
    if charges != _sorted(card.charges) + [row for site in card.sites for row in _sorted(site.charges)]:
        yield "the charges are not in their canonical form"
    listed = charges if all(site.charges for site in card.sites) else []
    if card.sampler != sampler_of(listed):
        yield f"the sampler should follow the charges ({sampler_of(listed)}), found {card.sampler}"
    if card.client_level is not None and not card.sites:
        yield "a guarantee for whole sites belongs to a federated model"
    forgotten = sorted({*NOT_COVERED} - {RAW_FINGERPRINT, *card.not_covered})
    if forgotten:
        yield f"not_covered leaves out what is never covered: {', '.join(forgotten)}"
    if card.claim != sentence(card):
        yield f"the claim should be: {sentence(card)}"


def _untrained(card: Card) -> Iterator[str]:
    """Steps that nobody paid for, and words about plans and clipping that the rest does not bear out."""
    for row in card.folds:
        if not 0 < row.steps <= row.charges:
            yield f"fold {row.fold} took {row.steps} steps on {row.charges} charges: each step is charged"
        if card.training is not None and row.steps > card.training.steps:
            yield f"fold {row.fold} took {row.steps} steps, the schedule has {card.training.steps}"
    trained, steps = _training(card.charges), sum(row.steps for row in card.folds)
    if trained < steps:
        yield f"the charges count {trained} training steps, the folds took {steps}"
    followed = any(row.purpose == "fingerprint" for row in card.charges)
    named = any(line.startswith("plans from ") and RAW_PLANS not in line for line in card.public_inputs)
    if RAW_FINGERPRINT not in card.not_covered and not followed and not named:
        yield f"{RAW_FINGERPRINT} should be in not_covered: neither a charge nor a public input says otherwise"
    if card.clip is not None:
        try:
            make_rule(card.clip.rule, card.clip.constants)
        except (ValueError, Refusal) as wrong:
            yield f"clip: {wrong}"


def _training(rows: Iterable[CardCharge]) -> int:
    return sum(row.count for row in rows if row.purpose == "training")


def _miscounted_sites(card: Card) -> Iterator[str]:
    if [row.fold for row in card.folds] != ["all"]:
        yield "a federated model has one fold, all"
    for row in card.sites:
        if row.counted == "from its ledger" and _training(row.charges) < row.rounds:
            yield f"site {row.site}: {row.rounds} rounds were used, {_training(row.charges)} training steps charged"
        if row.counted == "from its ledger":
            yield from _other_epsilon(f"site {row.site}: ", row.epsilon, row.charges, row.delta, card.accountant)
        if len(row.thresholds) > _training(row.charges):
            yield f"site {row.site}: {len(row.thresholds)} thresholds, more than its charges released"
        if row.counted == "as reported" and (row.charges or row.epsilon_total is not None):
            yield f"site {row.site}: charges or a total are listed, although it only reported what it spent"
        if row.epsilon_total is not None and row.epsilon_total < row.epsilon * (1 - SAME_VERSION):
            yield f"site {row.site}: the total of its data is below what this model spent"
    if card.unit != unit_of(row.unit for row in card.sites):
        yield f"the unit should be the sites' ({unit_of(row.unit for row in card.sites)}), found {card.unit}"
    if card.epsilon != max(row.epsilon for row in card.sites) or card.delta != max(row.delta for row in card.sites):
        yield "epsilon and delta of a federated model should be the largest of its sites'"
    if card.charges or card.dataset is not None or card.training is not None:
        yield "a federated model is charged at its sites, not here"


def _other_epsilon(
    whose: str, claimed: float, rows: Sequence[CardCharge], delta: float, accountant: str
) -> Iterator[str]:
    try:
        charges = [row.charge for row in rows]
        found = epsilon_of(charges, delta)
    except Exception as error:  # numbers that no mechanism has fail anywhere in an accountant
        yield f"{whose}the charges cannot be composed ({type(error).__name__})"
        return
    tolerance = SAME_VERSION if accountant == which_accountant(events_of(charges), delta) else OTHER_VERSION
    if not math.isclose(found, claimed, rel_tol=tolerance):
        yield f"{whose}epsilon {claimed:.6g} is claimed, the charges compose to {found:.6g} at delta {delta:g}"


def _sorted(rows: Sequence[CardCharge]) -> list[CardCharge]:
    try:
        return canonical_charges(row.charge for row in rows)
    except ValueError:
        return list(rows)  # reported where they are composed
