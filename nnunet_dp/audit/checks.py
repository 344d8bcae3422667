"""What a build is put through. Each check sees a ``Subject``, runs its real training or vote, and returns findings.

=====================  ===========  ==================================================================================
check                  kind         asks
=====================  ===========  ==================================================================================
noise_variance         trace        is the noise on the gradient as large as planned, whoever takes part: nobody,
                                    patients with tiny gradients, patients?
noise_shape            trace        is it Gaussian?
noise_independence     trace        does each step draw noise of its own?
batch_size_variance    trace        do the sizes of the draws vary as Poisson sampling makes them vary?
participation          trace        is a patient who was drawn as likely drawn again?
influence              trace        with entropy fixed: does one patient move the sum by more than the bound?
coupling               trace        does one patient's share depend on whether another is there?
ledger_recount         trace        do the steps that were seen cost, by dp_accounting alone, what the ledger says?
canaries_one_run       statistical  do guesses about canaries refute the ledger's epsilon, whatever the mechanism?
canaries_gaussian      statistical  do they refute it, if the mechanism is Gaussian?
morphology_noise       trace        is the noise on the released votes as large as charged?
morphology_claim       statistical  do votes with and without one patient refute the charged epsilon?
stopped                trace        did the build refuse, or break down?
=====================  ===========  ==================================================================================

Checks with a p-value fail below the level they are given; the others, but for ``canaries_gaussian`` and
``morphology_claim``, which compare a bound of that confidence, make no random errors. The auditor supplies patients and
reads weights, ledger and released votes; for ``influence`` it also fixes the entropy, so that noise cancels.

Formal guarantee:
    A correct build fails any one check with probability at most its level (approximately, where a chi-squared or normal
    limit is used; tests measure it).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from dp_accounting.dp_event import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from scipy import stats
from torch import Tensor

from nnunet_dp import dpsgd
from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.audit import statistics
from nnunet_dp.audit.builds import Subject, ballot, phantom_record, phantom_votes
from nnunet_dp.audit.canaries import (
    Canary,
    clipped_sum,
    planned_deviation,
    released_by_step,
    run_canaries,
)
from nnunet_dp.audit.statistics import Counts
from nnunet_dp.charges import MORPHOLOGY, TRAINING, epsilon_of
from nnunet_dp.dpsgd import PrivateTraining
from nnunet_dp.gradients import Record
from nnunet_dp.ledger import read_ledger
from nnunet_dp.mechanisms import SubsampledGaussian
from nnunet_dp.run import LEDGER
from nnunet_dp.shape_votes import PRESENCE_WEIGHT

Kind = Literal["trace", "statistical"]
TESTS = 16  # answers of one examination that chance can turn, for the correction; counted by a test
COUPLING_TOLERANCE = 1e-6  # of the bound; float64 leaves 1e-12
RECOUNT_TOLERANCE = 1e-2  # two accountants' grids


@dataclass(frozen=True)
class Sizes:
    """How much is tried; part of the protocol.

    Attributes:
        epsilon: claimed by every plan, at most 1.
        delta: claimed; far below the level over the canaries, or the one-run bound could say nothing.
        canaries: in the training that is audited.
        canary_steps: of it.
        patients: phantoms beside them.
        slots: of the training whose draws are watched.
        probability: its q.
        draws: its steps.
        noise_steps: steps of each training whose noise is measured.
        voters: phantoms that vote.
        votes: releases of the vote with, and as many without, one patient.
        morphology_noise: noise multiplier of the vote.
    """

    epsilon: float = 1.0
    delta: float = 1e-7
    canaries: int = 128
    canary_steps: int = 8
    patients: int = 6
    slots: int = 200
    probability: float = 0.25
    draws: int = 40
    noise_steps: int = 3
    voters: int = 40
    votes: int = 60
    morphology_noise: float = 6.0

    @property
    def budget(self) -> PrivacyBudget:
        """What each plan claims."""
        return PrivacyBudget(epsilon=self.epsilon, delta=self.delta, unit="phantom")


@dataclass(frozen=True)
class Finding:
    """One answer of a check.

    Attributes:
        check: its name.
        kind: ``trace`` or ``statistical``.
        failed: whether the build was caught by it.
        p_value: None where no chance is involved.
        found: the figures, in words.
    """

    check: str
    kind: Kind
    failed: bool
    p_value: float | None
    found: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine(subject: Subject, sizes: Sizes, level: float, seed: int) -> list[Finding]:
    """All checks on one build.

    Args:
        subject: the build.
        sizes: how much is tried.
        level: probability with which each single p-value may fail a correct build.
        seed: of coins, initial weights and phantoms; noise and draws are the build's own.
    """
    findings: list[Finding] = []
    with subject.active():
        for number, check in enumerate((_noise, _draws, _influence, _canaries, _morphology)):
            with TemporaryDirectory() as folder:
                findings += _unless_stopped(check(subject, Path(folder), sizes, level, seed + 1000 * number))
    return findings


def _unless_stopped(found: Iterator[Finding]) -> Iterator[Finding]:
    """The findings; a build that refuses or breaks down is caught by that."""
    try:
        yield from found
    except Exception as error:
        yield _compared("stopped", True, f"{type(error).__name__}: {error}")


def _by_chance(check: str, kind: Kind, p_value: float, level: float, found: str) -> Finding:
    return Finding(check, kind, p_value < level, p_value, found)


def _compared(check: str, failed: bool, found: str) -> Finding:
    return Finding(check, "trace", failed, None, found)


# ---- noise ---------------------------------------------------------------------------------------------------------


def _noise(subject: Subject, folder: Path, sizes: Sizes, level: float, seed: int) -> Iterator[Finding]:
    patients = [phantom_record(seed, index) for index in range(sizes.patients)]
    tiny = [Canary(None, 1e-9).record(patients[0].data) for _ in range(2)]
    for who, records in (("nobody", []), ("tiny gradients", tiny), ("patients", patients)):
        residuals = _residuals(subject, folder / who, records, sizes, seed)
        every = np.concatenate(residuals)
        said = f"{who}: deviation {every.std():.4g} of the planned 1, {len(every)} numbers"
        yield _by_chance("noise_variance", "trace", variance_p_value(every), level, said)
        yield _by_chance("noise_shape", "trace", _shape_p_value(every), level, said)
        yield _by_chance("noise_independence", "trace", _independence_p_value(residuals), level, who)


def _residuals(
    subject: Subject, folder: Path, records: list[Record], sizes: Sizes, seed: int
) -> list[npt.NDArray[np.float64]]:
    """What each step added to the clipped sum, over the planned deviation: [steps][parameters]."""
    folder.mkdir()
    plan = subject.plan(sizes.canary_steps, 1.0, max(2, sizes.patients), sizes.budget)
    training = subject.training(folder, plan, seed)
    found = []
    for _ in range(sizes.noise_steps):
        known = clipped_sum(training, records)
        noise = released_by_step(training, lambda *_: records) - known
        found.append((noise / planned_deviation(training)).numpy())
    return found


def variance_p_value(standardised: npt.NDArray[np.float64]) -> float:
    """Two-sided: independent N(0, 1) have a sum of squares that is chi-squared."""
    return _two_sided(stats.chi2(len(standardised)), float(np.square(standardised).sum()))


def _two_sided(distribution: Any, value: float) -> float:
    return min(1.0, 2 * min(float(distribution.cdf(value)), float(distribution.sf(value))))


def _shape_p_value(values: npt.NDArray[np.float64]) -> float:
    """Kolmogorov and Smirnov against N(0, 1)."""
    return float(stats.kstest(values, "norm").pvalue)


def _independence_p_value(residuals: Sequence[npt.NDArray[np.float64]]) -> float:
    """Two-sided: products of independent N(0, 1) of successive steps have mean 0 and variance 1."""
    products = np.concatenate([first * second for first, second in itertools.pairwise(residuals)])
    return float(2 * stats.norm.sf(abs(products.sum()) / math.sqrt(len(products))))


# ---- draws ---------------------------------------------------------------------------------------------------------


def _draws(subject: Subject, folder: Path, sizes: Sizes, level: float, seed: int) -> Iterator[Finding]:
    plan = subject.plan(sizes.draws, sizes.probability, sizes.slots, sizes.budget)
    training = subject.training(folder, plan, seed)
    drawn: list[npt.NDArray[np.bool_]] = []

    def watch(step: int, slots: list[int]) -> list[Record]:
        drawn.append(np.isin(np.arange(sizes.slots), slots))
        return []

    for _ in range(sizes.draws):
        training.advance(watch)
    taken = np.array(drawn)
    for name, p_value, said in draw_p_values(taken, sizes.probability):
        yield _by_chance(name, "trace", p_value, level, said)
    yield _recount(training, len(taken))


def draw_p_values(taken: npt.NDArray[np.bool_], probability: float) -> Iterator[tuple[str, float, str]]:
    """Three tests of draws [steps, slots] against Poisson sampling: mean size, spread of sizes, being drawn again."""
    steps, slots = taken.shape
    sizes = taken.sum(1)
    mean = stats.binomtest(int(sizes.sum()), steps * slots, probability).pvalue
    yield "batch_size_variance", float(mean), f"mean size {sizes.mean():.4g}, expected {slots * probability:.4g}"
    expected = slots * probability * (1 - probability)
    spread = float(np.square(sizes - slots * probability).sum() / expected)
    said = f"variance of the size {sizes.var():.4g}, expected {expected:.4g}"
    yield "batch_size_variance", _two_sided(stats.chi2(steps), spread), said
    pairs = taken[: steps // 2 * 2].reshape(-1, 2, slots).all(1)
    again = stats.binomtest(int(pairs.sum()), pairs.size, probability**2).pvalue
    yield "participation", float(again), f"drawn twice in a row: {pairs.mean():.4g}, expected {probability**2:.4g}"


# ---- influence -----------------------------------------------------------------------------------------------------


def _influence(subject: Subject, folder: Path, sizes: Sizes, level: float, seed: int) -> Iterator[Finding]:
    patients = [phantom_record(seed, index) for index in range(sizes.patients)]
    loud = Canary(None).record(patients[0].data[:, :, :8, :8])  # pulls at all parameters, far above any bound
    everybody = [*patients, loud]
    plan = subject.plan(1, 1.0, len(everybody), sizes.budget)

    def released(*left_out: int) -> Tensor:
        place = folder / "-".join(["without", *map(str, left_out)])
        place.mkdir()
        training = subject.training(place, plan, seed)
        present = [record for slot, record in enumerate(everybody) if slot not in left_out]
        with mock.patch.object(dpsgd, "fresh_generator", _fixed_entropy):
            return released_by_step(training, lambda *_: present)

    last, whole = len(patients), released()
    without_0, without_1 = released(0), released(1)
    moved = max(float((whole - other).norm()) for other in (without_0, without_1, released(last)))
    said = f"one patient moves the sum by at most {moved:.6g} bounds, at most 1 is promised"
    yield _compared("influence", moved > 1 + 1e-9, said)
    coupled = float(((whole - without_0) - (without_1 - released(0, 1))).norm())
    said = f"one patient's share changes by {coupled:.3g} bounds where another leaves, 0 is promised"
    yield _compared("coupling", coupled > COUPLING_TOLERANCE, said)


def _fixed_entropy(device: torch.device | str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(20)


# ---- ledger --------------------------------------------------------------------------------------------------------


def _recount(training: PrivateTraining, steps: int) -> Finding:
    """Epsilon of the steps that were seen, by dp_accounting alone, against what the ledger's lines come to."""
    plan = training.plan
    lines = read_ledger(training.ledger.path)
    gaussian = GaussianDpEvent(plan.noise_multiplier)
    sampled = gaussian if plan.sampling_probability == 1 else PoissonSampledDpEvent(plan.sampling_probability, gaussian)
    seen = _accounted(SelfComposedDpEvent(sampled, steps), plan.budget.delta)
    charged = epsilon_of(lines, plan.budget.delta)
    paid = sum(line.count for line in lines if line.purpose == TRAINING)
    said = f"{steps} steps were seen, {paid} charged: epsilon {seen:.4g} against the ledger's {charged:.4g}"
    return _compared("ledger_recount", paid < steps or charged < seen * (1 - RECOUNT_TOLERANCE), said)


def _accounted(event: DpEvent, delta: float) -> float:
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=1e-3)
    return float(accountant.compose(event).get_epsilon(delta))


# ---- canaries ------------------------------------------------------------------------------------------------------


def _canaries(subject: Subject, folder: Path, sizes: Sizes, level: float, seed: int) -> Iterator[Finding]:
    patients = [phantom_record(seed, index) for index in range(sizes.patients)]
    plan = subject.plan(sizes.canary_steps, 1.0, sizes.patients + sizes.canaries, sizes.budget)
    training = subject.training(folder, plan, seed)
    run = run_canaries(training, patients, sizes.canaries, np.random.default_rng(seed))
    claimed = run.ledger_epsilon[-1]
    guesses = run.one_run()
    p_value = statistics.one_run_p_value(guesses, claimed, sizes.delta)
    least = statistics.epsilon_from_one_run(guesses, sizes.delta, 1 - level)
    said = f"{guesses.right} of {guesses.guesses} guesses right: epsilon at least {least:.3g}, ledger {claimed:.3g}"
    yield _by_chance("canaries_one_run", "statistical", p_value, level, said)
    mu = statistics.mu_from_rates(run.counts(), 1 - level)
    gaussian = statistics.gaussian_epsilon(mu, sizes.delta)
    counts = run.counts()
    said = f"{counts.hits} of {counts.members} hits, {counts.false_alarms} of {counts.others} false alarms: epsilon at "
    said += f"least {gaussian:.3g}, ledger {claimed:.3g}"
    yield Finding("canaries_gaussian", "statistical", gaussian > claimed, None, said)
    yield _recount(training, len(run.scores))


# ---- morphology ----------------------------------------------------------------------------------------------------


def _morphology(subject: Subject, folder: Path, sizes: Sizes, level: float, seed: int) -> Iterator[Finding]:
    votes = [phantom_votes(seed, index) for index in range(sizes.voters)]
    outspoken = max(votes, key=lambda one: float(np.linalg.norm(one)))
    without = [one for one in votes if one is not outspoken]
    mechanism = SubsampledGaussian(sizes.morphology_noise)
    deviation = sizes.morphology_noise * ballot().l2_bound
    released = [_votes_released(subject, folder, mechanism, who, sizes.votes) for who in (votes, without)]
    exact = [np.sum(who, axis=0) for who in (votes, without)]
    residuals = np.concatenate([found - sum_ for found, sum_ in zip(released, exact, strict=True)])
    scale = np.full(residuals.shape[-1], deviation)
    standard = (residuals / scale).ravel()
    said = f"deviation {standard.std():.4g} of the charged 1, {len(standard)} numbers"
    yield _by_chance("morphology_noise", "trace", variance_p_value(standard), level, said)
    direction = exact[0] - exact[1]
    present, absent = (((found - exact[1]) * direction).sum((1, 2)) for found in released)
    half_way = float(np.square(direction).sum() / 2)
    hits, alarms = int((present >= half_way).sum()), int((absent >= half_way).sum())
    claimed = _accounted(mechanism.event, sizes.delta)
    least = statistics.epsilon_from_rates(Counts(hits, sizes.votes, alarms, sizes.votes), sizes.delta, 1 - level)
    said = f"{hits} hits and {alarms} false alarms in {sizes.votes} votes each: epsilon at least {least:.3g}, "
    yield Finding("morphology_claim", "statistical", least > claimed, None, said + f"charged {claimed:.3g}")


def _votes_released(
    subject: Subject, folder: Path, mechanism: SubsampledGaussian, votes: Sequence[npt.NDArray[np.float64]], times: int
) -> npt.NDArray[np.float64]:
    """Released numbers [times, classes, questions + 1], each time with a ledger of its own."""
    found = []
    for number in range(times):
        place = folder / f"{len(votes)}-{number}"
        place.mkdir()
        rules = subject.learn(place, mechanism, votes)
        lines = read_ledger(place / LEDGER)
        assert [line.purpose for line in lines] == [MORPHOLOGY]
        found.append(_numbers(rules.provenance["answers"]))
    return np.array(found)


def _numbers(answers: dict[str, list[dict[str, Any]]]) -> npt.NDArray[np.float64]:
    """Balances and weighted presence [classes, questions + 1] out of a morphology.json."""
    rows = answers.values()
    return np.array([[*(one["balance"] for one in row), row[0]["present"] * PRESENCE_WEIGHT] for row in rows])
