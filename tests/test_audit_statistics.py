"""Statistics of the audit, each against a second implementation, and where a wrong answer must be rejected."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent
from scipy import stats
from sklearn import metrics

from nnunet_dp.accounting import epsilon as accounted_epsilon
from nnunet_dp.audit import statistics as audit
from nnunet_dp.audit.statistics import Counts, OneRun
from nnunet_dp.errors import UsageRefusal

RNG = np.random.default_rng(7)


# ---- second implementations ----------------------------------------------------------------------------------------


def binomial(trials: int, rate: float) -> list[float]:
    """Probabilities of 0 to ``trials`` successes, by exact integers and float powers."""
    return [math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(trials + 1)]


def clopper_pearson_by_bisection(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """The rates at which so many, or so few, successes have probability (1 - confidence) / 2."""

    def bisect(too_low) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if too_low(middle) else (low, middle)
        return low

    tail = (1 - confidence) / 2
    low = bisect(lambda rate: sum(binomial(trials, rate)[successes:]) < tail) if successes else 0.0
    high = bisect(lambda rate: sum(binomial(trials, rate)[: successes + 1]) > tail) if successes < trials else 1.0
    return low, high


def one_run_by_fractions(run: OneRun, odds: Fraction, delta: Fraction) -> float:
    """Steinke's bound by sums of exact fractions; ``odds`` is e^epsilon."""
    rate = odds / (1 + odds)
    mass = [math.comb(run.guesses, k) * rate**k * (1 - rate) ** (run.guesses - k) for k in range(run.guesses + 1)]
    tail = sum(mass[run.right :], Fraction(0))
    steepest = max((sum(mass[run.right - i : run.right]) / i for i in range(1, run.right + 1)), default=Fraction(0))
    return float(min(Fraction(1), tail + 2 * run.canaries * delta * steepest))


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (1, 30), (17, 30), (29, 30), (60, 100)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.9999])
def test_clopper_pearson_inverts_binomial_sums(successes, trials, confidence):
    found = audit.clopper_pearson(successes, trials, confidence)
    assert found == pytest.approx(clopper_pearson_by_bisection(successes, trials, confidence), abs=1e-9)
    upper = audit.upper_limit(successes, trials, (1 + confidence) / 2)
    assert upper == pytest.approx(found.high, abs=1e-12)


def test_roc_and_auc_are_those_of_scikit_learn_with_ties_too():
    scores = RNG.integers(0, 12, 200).astype(float)
    members = RNG.random(200) < 0.4
    curve = audit.roc(scores, members)
    false, true, thresholds = metrics.roc_curve(members, scores, drop_intermediate=False)
    assert np.allclose(curve.false_positive_rate, false) and np.allclose(curve.true_positive_rate, true)
    assert np.allclose(curve.thresholds, thresholds)
    assert audit.auc(scores, members) == pytest.approx(metrics.roc_auc_score(members, scores))


def test_the_interval_of_the_auc_is_as_wide_as_repetitions_vary():
    members = np.arange(120) < 60
    draws = [np.random.default_rng(seed).normal(0.5 * members) for seed in range(400)]
    areas = [audit.auc(scores, members) for scores in draws]
    truth = stats.norm.cdf(0.5 / math.sqrt(2))
    inside = [low <= truth <= high for low, high in (audit.auc_interval(scores, members) for scores in draws)]
    assert np.mean(areas) == pytest.approx(truth, abs=0.01)
    assert 0.91 < np.mean(inside) < 0.98


def test_hits_at_a_rate_of_false_alarms_are_never_interpolated():
    scores, members = [5, 4, 3, 2, 1, 0], [True, False, True, True, False, False]
    assert audit.counts_at_rate(scores, members, 0.0) == Counts(1, 3, 0, 3)
    assert audit.counts_at_rate(scores, members, 0.4) == Counts(3, 3, 1, 3)
    assert audit.counts_at_rate(scores, members, 0.2) == Counts(1, 3, 0, 3)


def test_equal_scores_are_no_attack():
    assert audit.counts_at_rate([1.0] * 10, [True, False] * 5, 0.05) == Counts(0, 5, 0, 5)
    assert audit.auc([1.0] * 10, [True, False] * 5) == 0.5


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("counts", [Counts(90, 100, 3, 100), Counts(99, 100, 50, 100), Counts(20, 100, 0, 100)])
def test_epsilon_of_counts_is_the_boundary_of_the_definition(counts, delta):
    """Rates at their limits keep (epsilon, delta)-DP just above the result, and break it just below."""
    found = audit.epsilon_from_rates(counts, delta, 0.95)
    hits = clopper_pearson_by_bisection(counts.hits, counts.members, 0.95)[0]
    alarms = clopper_pearson_by_bisection(counts.false_alarms, counts.others, 0.95)[1]

    def kept(epsilon):
        growth = math.exp(epsilon)
        return hits <= growth * alarms + delta + 1e-12 and 1 - alarms <= growth * (1 - hits) + delta + 1e-12

    assert kept(found + 1e-6) and (found == 0 or not kept(found - 1e-6))


@pytest.mark.parametrize("mu", [0.05, 0.3, 1.0, 4.0])
def test_gaussian_epsilon_agrees_with_the_accountant(mu):
    found = audit.gaussian_epsilon(mu, 1e-5)
    assert found <= accounted_epsilon([GaussianDpEvent(1 / mu)], 1e-5) <= 1.01 * found + 1e-3


RUNS = [OneRun(20, 20, 20), OneRun(20, 20, 13), OneRun(50, 12, 11), OneRun(9, 9, 0), OneRun(40, 30, 1)]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("odds", [1, 2, Fraction(27, 10)])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 10**5), Fraction(1, 100)])
def test_the_one_run_p_value_equals_sums_of_fractions(run, odds, delta):
    found = audit.one_run_p_value(run, math.log(odds), float(delta))
    assert found == pytest.approx(one_run_by_fractions(run, Fraction(odds), delta), rel=1e-9)


# ---- coverage, and wrong answers ------------------------------------------------------------------------------------


def rejected(trials: int, claimed: float, true: float, delta: float, leak: float = 0.0) -> float:
    """How often guesses on randomised response of a true epsilon refute a claim; with probability ``leak`` it leaks."""
    rate = 1 / (1 + math.exp(-true))
    wrong = 0
    for _ in range(trials):
        leaking = RNG.random(200) < leak
        right = int((leaking | (RNG.random(200) < rate)).sum())
        wrong += audit.epsilon_from_one_run(OneRun(200, 200, right), delta, 0.9) > claimed
    return wrong / trials


def test_one_run_refutes_a_true_claim_no_more_often_than_promised_and_a_false_one_nearly_always():
    assert rejected(400, claimed=1.0, true=1.0, delta=0.0) < 0.14
    assert rejected(400, claimed=1.0, true=1.0, delta=1e-3, leak=1e-3) < 0.14
    assert rejected(100, claimed=1.0, true=2.0, delta=0.0) > 0.95


def test_a_delta_that_is_ignored_would_refute_a_true_claim():
    """Each canary is published with probability delta: pure DP would be refuted, the claim with its delta is not."""
    assert rejected(200, claimed=0.05, true=0.0, delta=0.0, leak=0.2) > 0.5
    assert rejected(200, claimed=0.05, true=0.0, delta=0.2, leak=0.2) < 0.1


@pytest.mark.parametrize(("true", "least", "most"), [(1.0, 0.0, 0.07), (3.0, 0.95, 1.0)])
def test_a_gaussian_claim_of_mu_1_survives_mu_1_and_falls_for_mu_3(true, least, most):
    found = []
    for _ in range(400):
        hits = int((RNG.normal(true, 1, 300) > true / 2).sum())
        alarms = int((RNG.normal(0, 1, 300) > true / 2).sum())
        found.append(audit.mu_from_rates(Counts(hits, 300, alarms, 300), 0.95) > 1.0)
    assert least <= np.mean(found) <= most


def test_epsilon_of_rates_refutes_no_true_claim_and_catches_a_mechanism_without_noise():
    rate = 1 / (1 + math.exp(-1.0))
    wrong = 0
    for _ in range(400):
        counts = Counts(int(RNG.binomial(200, rate)), 200, int(RNG.binomial(200, 1 - rate)), 200)
        wrong += audit.epsilon_from_rates(counts, 0.0, 0.95) > 1.0
    assert wrong / 400 < 0.07
    assert audit.epsilon_from_rates(Counts(200, 200, 0, 200), 1e-5, 0.999) > 3


def test_nothing_is_refuted_by_a_coin():
    assert audit.epsilon_from_rates(Counts(50, 100, 50, 100), 1e-5) == 0
    assert audit.mu_from_rates(Counts(50, 100, 50, 100)) == 0
    assert audit.epsilon_from_one_run(OneRun(100, 100, 50), 1e-5) == 0


@pytest.mark.parametrize("hits, alarms", [(0, 0), (0, 2), (2, 2), (1, 1)])
def test_hardly_any_trials_refute_nothing(hits, alarms):
    assert audit.epsilon_from_rates(Counts(hits, 2, alarms, 2), 1e-6, 0.9999) == 0


def test_guesses_about_the_extremes_leave_the_middle_alone():
    scores, members = np.arange(10.0), np.arange(10) >= 4
    assert audit.guess_extremes(scores, members, 1.0) == OneRun(10, 10, 9)
    assert audit.guess_extremes(scores, members, 0.4) == OneRun(10, 4, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Counts(3, 2, 0, 1),
        lambda: OneRun(3, 4, 1),
        lambda: OneRun(4, 3, 4),
        lambda: audit.clopper_pearson(1, 2, 1.0),
        lambda: audit.auc([1.0, 2.0], [True, True]),
        lambda: audit.auc([1.0, float("nan")], [True, False]),
        lambda: audit.epsilon_from_rates(Counts(1, 2, 0, 1), -0.1),
        lambda: audit.one_run_p_value(OneRun(2, 2, 2), -1.0, 0.0),
        lambda: audit.counts_at_rate([1.0, 2.0], [True, False], 1.0),
    ],
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(UsageRefusal):
        wrong()
