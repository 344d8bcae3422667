"""What an attack's hits and false alarms say about epsilon: exact intervals, ROC curves, lower bounds.

An attacker decides for each trial whether one record was there. Hits are decisions "there" where it was (true
positives), false alarms those where an empty record stood in its place (false positives). Differential privacy bounds
hits by false alarms; read backwards, many hits beside few false alarms are evidence of a large epsilon:

==========================  ==========================================  ==========================================
function                    asks for                                    assumes
==========================  ==========================================  ==========================================
``epsilon_from_rates``      counts of independent trials                nothing: (epsilon, delta) for any mechanism
``mu_from_rates``           the same                                    the mechanism is Gaussian (f-DP)
``epsilon_from_one_run``    right guesses on canaries of one training   nothing; canaries included by fair coins
==========================  ==========================================  ==========================================

All bounds hold with the stated confidence, whatever the attack. None of them is evidence that epsilon is small.

>>> epsilon_from_rates(Counts(hits=100, members=100, false_alarms=0, others=100), delta=1e-5) > 3
True
>>> epsilon_from_one_run(OneRun(canaries=100, guesses=100, right=50), delta=1e-5)
0.0

References: Clopper & Pearson 1934; Jagielski et al. 2020, arXiv:2006.07709 (epsilon from counts); Nasr et al. 2023,
arXiv:2302.07956 (through Gaussian DP); Steinke, Nasr & Jagielski 2023, arXiv:2305.08846 (one training run); DeLong,
DeLong & Clarke-Pearson 1988 (variance of the AUC).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.optimize import brentq

from nnunet_dp.accounting import gaussian_delta
from nnunet_dp.errors import UsageRefusal

LARGEST_EPSILON = 100.0  # where a search ends; no number of trials that fits a computer proves more
Scores = npt.NDArray[np.float64] | Sequence[float]
Truth = npt.NDArray[np.bool_] | Sequence[bool]


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Counts:
    """Decisions of an attack in independent trials.

    Attributes:
        hits: trials with the record in which the attack said so.
        members: trials with the record.
        false_alarms: trials without it in which the attack said it was there.
        others: trials without it.
    """

    hits: int
    members: int
    false_alarms: int
    others: int

    def __post_init__(self) -> None:
        """Refuse counts that no trials can have."""
        _require_counts(self.hits, self.members)
        _require_counts(self.false_alarms, self.others)


@dataclass(frozen=True)
class OneRun:
    """Guesses about canaries that were included in one training by independent fair coins.

    Attributes:
        canaries: m, all that were flipped for, those about which nothing was guessed included.
        guesses: r, canaries about which the attack guessed.
        right: v, guesses that were right.
    """

    canaries: int
    guesses: int
    right: int

    def __post_init__(self) -> None:
        """Refuse counts that no run can have."""
        _require_counts(self.guesses, self.canaries)
        if not 0 <= self.right <= self.guesses:
            raise UsageRefusal(f"right guesses should lie between 0 and {self.guesses}, found {self.right}")


# ---- rates -------------------------------------------------------------------------------------------------------


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Exact two-sided interval of a rate (Clopper & Pearson 1934).

    Raises:
        UsageRefusal: for counts or a confidence that cannot be.
    """
    _require_counts(successes, trials)
    _require_confidence(confidence)
    found = stats.binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return Interval(float(found.low), float(found.high))


def lower_limit(successes: int, trials: int, confidence: float) -> float:
    """One-sided exact limit that the rate exceeds with this confidence."""
    return clopper_pearson(successes, trials, 2 * confidence - 1).low if confidence > 0.5 else 0.0


def upper_limit(successes: int, trials: int, confidence: float) -> float:
    """One-sided exact limit that the rate stays below with this confidence."""
    return 1.0 - lower_limit(trials - successes, trials, confidence)


class Roc(NamedTuple):
    """A receiver operating characteristic, from "nobody" to "everybody".

    Attributes:
        thresholds: decisions are scores >= threshold; infinite first.
        false_positive_rate: of each threshold.
        true_positive_rate: of each threshold.
    """

    thresholds: npt.NDArray[np.float64]
    false_positive_rate: npt.NDArray[np.float64]
    true_positive_rate: npt.NDArray[np.float64]


def roc(scores: Scores, members: Truth) -> Roc:
    """All decisions that a threshold on the scores can make; equal scores are decided alike.

    Args:
        scores: [trials], larger where membership is likelier.
        members: [trials], whether the record was there.

    Raises:
        UsageRefusal: without a member, without a non-member, or for scores that are not numbers.
    """
    values, truth = _scored(scores, members)
    thresholds = np.concatenate([[np.inf], np.unique(values)[::-1]])
    inside, outside = np.sort(values[truth]), np.sort(values[~truth])
    hits = len(inside) - np.searchsorted(inside, thresholds, side="left")
    alarms = len(outside) - np.searchsorted(outside, thresholds, side="left")
    return Roc(thresholds, alarms / len(outside), hits / len(inside))


def auc(scores: Scores, members: Truth) -> float:
    """Area under the ROC: how often a member scores above a non-member, ties counting half (Mann & Whitney 1947)."""
    values, truth = _scored(scores, members)
    ranks, inside = stats.rankdata(values), int(truth.sum())
    return float((ranks[truth].sum() - inside * (inside + 1) / 2) / (inside * (len(truth) - inside)))


def auc_interval(scores: Scores, members: Truth, confidence: float = 0.95) -> Interval:
    """Normal interval of the AUC for independent trials (DeLong et al. 1988), cut to [0, 1]."""
    _require_confidence(confidence)
    values, truth = _scored(scores, members)
    inside, outside = values[truth], values[~truth]
    beats = (inside[:, None] > outside).astype(float) + 0.5 * (inside[:, None] == outside)
    parts = [placements.var(ddof=1) / len(placements) for placements in (beats.mean(1), beats.mean(0))]
    width = float(stats.norm.ppf((1 + confidence) / 2) * math.sqrt(sum(parts)))
    middle = float(beats.mean())
    return Interval(max(0.0, middle - width), min(1.0, middle + width))


def counts_at(scores: Scores, members: Truth, threshold: float) -> Counts:
    """Decisions "scores >= threshold"."""
    values, truth = _scored(scores, members)
    said = values >= threshold
    return Counts(int((said & truth).sum()), int(truth.sum()), int((said & ~truth).sum()), int((~truth).sum()))


def counts_at_rate(scores: Scores, members: Truth, false_positive_rate: float) -> Counts:
    """Decisions of the threshold with the most hits whose false alarms do not pass a rate; never interpolated.

    The threshold is chosen on the same scores, so that an interval of its hits is about this threshold, not about an
    attack of exactly this rate.
    """
    if not 0 <= false_positive_rate < 1:
        raise UsageRefusal(f"the false-positive rate should lie in [0, 1), found {false_positive_rate}; such as 0.01")
    curve = roc(scores, members)
    last = int(np.flatnonzero(curve.false_positive_rate <= false_positive_rate)[-1])
    return counts_at(scores, members, float(curve.thresholds[last]))


# ---- epsilon from independent trials -----------------------------------------------------------------------------


def epsilon_from_rates(counts: Counts, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that the counts refute, with this confidence; 0 where they refute none.

    Formal guarantee:
        If trials are independent and what the attack saw was (epsilon, delta)-DP for the record, the result exceeds
        epsilon with probability at most 1 - confidence. The attack, with its threshold, must have been fixed before the
        trials. Jagielski et al. 2020, arXiv:2006.07709, with both directions of the definition.
    """
    _require_delta(delta)
    hits, alarms = _limits(counts, confidence)
    ratios = [(hits - delta, alarms), (1 - alarms - delta, 1 - hits)]
    refuted = [math.log(above / below) if below > 0 else LARGEST_EPSILON for above, below in ratios if above > 0]
    return min(LARGEST_EPSILON, max([0.0, *refuted]))


def mu_from_rates(counts: Counts, confidence: float = 0.95) -> float:
    """The largest mu that the counts refute if the mechanism is mu-Gaussian DP; 0 where they refute none.

    mu = quantile(hits) - quantile(false alarms): Dong, Roth & Su 2022, arXiv:1905.02383, with limits in place of rates.
    """
    hits, alarms = _limits(counts, confidence)
    return max(0.0, float(stats.norm.ppf(hits) - stats.norm.ppf(alarms))) if hits > 0 and alarms < 1 else 0.0


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-Gaussian DP at delta, exact (Balle & Wang 2018, arXiv:1805.06530, theorem 8)."""
    _require_delta(delta)
    if mu <= 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0

    def excess(epsilon: float) -> float:
        return gaussian_delta(mu, epsilon) - delta

    if excess(LARGEST_EPSILON) > 0:
        return LARGEST_EPSILON
    found: Any = brentq(excess, 0.0, LARGEST_EPSILON, xtol=1e-12)
    return float(found)


def _limits(counts: Counts, confidence: float) -> tuple[float, float]:
    """Lower limit of the hits and upper limit of the false alarms; both hold together with this confidence."""
    _require_confidence(confidence)
    each = (1 + confidence) / 2
    return (
        lower_limit(counts.hits, counts.members, each),
        upper_limit(counts.false_alarms, counts.others, each),
    )


# ---- epsilon from one run ----------------------------------------------------------------------------------------


def one_run_p_value(run: OneRun, epsilon: float, delta: float) -> float:
    """How probable so many right guesses are at most, if the training is (epsilon, delta)-DP.

    With delta = 0 the right guesses are dominated by Binomial(r, e^epsilon / (1 + e^epsilon)); delta adds at most
    2 m delta max_i P[v - i <= Binomial < v] / i (Steinke, Nasr & Jagielski 2023, arXiv:2305.08846, theorem 5.2 and
    the program in its appendix D).

    Args:
        run: what was guessed.
        epsilon: of the claim, at least 0.
        delta: of the claim.
    """
    _require_delta(delta)
    if not epsilon >= 0:
        raise UsageRefusal(f"epsilon should be at least 0, found {epsilon}")
    rate = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(run.right - 1, run.guesses, rate))
    if delta == 0 or run.right == 0:
        return min(1.0, tail)
    fewer = np.arange(run.right - 1, -1, -1)
    below = np.cumsum(stats.binom.pmf(fewer, run.guesses, rate))  # P[v - i <= Binomial < v], i from 1
    steepest = float((below / np.arange(1, run.right + 1)).max())
    return min(1.0, tail + 2 * run.canaries * delta * steepest)


def epsilon_from_one_run(run: OneRun, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that the guesses refute, with this confidence; 0 where they refute none.

    Formal guarantee:
        If the training is (epsilon, delta)-DP for each canary and each was included by a fair coin of its own, the
        result exceeds epsilon with probability at most 1 - confidence, whatever the guesses follow from but the coins.
    """
    _require_confidence(confidence)

    def excess(epsilon: float) -> float:
        return one_run_p_value(run, epsilon, delta) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    if excess(LARGEST_EPSILON) < 0:
        return LARGEST_EPSILON
    found: Any = brentq(excess, 0.0, LARGEST_EPSILON, xtol=1e-9)
    return max(0.0, float(found) - 1e-9)


def guess_extremes(scores: Scores, members: Truth, share: float) -> OneRun:
    """Guess "there" for the highest scores and "not there" for the lowest; nothing is guessed between.

    Args:
        scores: [canaries].
        members: [canaries], the coins.
        share: of the canaries that are guessed about, half of them on each side; chosen before the run.
    """
    values, truth = _scored(scores, members, both=False)
    each = int(share * len(values) / 2)
    order = np.argsort(values, kind="stable")
    right = int((~truth[order[:each]]).sum() + truth[order[len(order) - each :]].sum())
    return OneRun(len(values), 2 * each, right)


# ---- refusals ----------------------------------------------------------------------------------------------------


def _scored(scores: Scores, members: Truth, both: bool = True) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    values, truth = np.asarray(scores, np.float64), np.asarray(members, bool)
    if values.shape != truth.shape or values.ndim != 1 or np.isnan(values).any():
        raise UsageRefusal(
            f"scores and members should be two lists of one length without NaN, found {values.shape} and {truth.shape}"
        )
    if both and (truth.all() or not truth.any()):
        raise UsageRefusal("an attack should be tried on members and on others, found one kind only: draw both")
    return values, truth


def _require_counts(successes: int, trials: int) -> None:
    if not 0 <= successes <= trials or trials < 1:
        raise UsageRefusal(f"counts should be 0 <= successes <= trials, found {successes} of {trials}")


def _require_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UsageRefusal(f"the confidence should lie between 0 and 1, found {confidence}; type for example 0.95")


def _require_delta(delta: float) -> None:
    if not 0 <= delta < 1:
        raise UsageRefusal(f"delta should lie in [0, 1), found {delta}; type for example 1e-5")
