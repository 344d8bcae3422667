"""The attacker: how often, at most, the best membership attack finds the patient that it looks for.

An attacker who sees everything that was released, and knows every other patient, wants to tell whether one patient's
record was there or an empty one in its place. Tests of that kind are judged by two rates: false alarms (alpha, the
false-positive rate) and hits (the true-positive rate). Differential privacy bounds the second by the first, for every
test: with delta(eps) the price of all releases together,

    hits  <=  e^eps alpha + delta(eps)    for every real eps,

and the smallest of these lines *is* the trade-off curve of the best test (f-DP: Dong, Roth & Su 2022,
arXiv:1905.02383, proposition 2.13). Three ways to know delta(eps) give three bounds:

| what is known | lines | function |
|---|---|---|
| the composed privacy loss distribution (PLD) | all of them | ``true_positive_rate`` |
| Renyi (RDP), where PLD does not fit | two for each delta of a list | ``true_positive_rate``, by itself |
| the budget alone | two | ``rate_from_budget`` |

The difference is large. One patient in a full-batch training of epsilon 8:

>>> from dp_accounting.dp_event import GaussianDpEvent, SelfComposedDpEvent
>>> from nnunet_dp.accounting import PrivacyBudget, calibrate
>>> schedule = lambda noise_multiplier: SelfComposedDpEvent(GaussianDpEvent(noise_multiplier), 100)
>>> budget = PrivacyBudget(epsilon=8, delta=1e-4)
>>> training = schedule(calibrate(schedule, budget))
>>> round(true_positive_rate([training], false_positive_rate=0.01), 2)
0.31
>>> round(rate_from_budget(budget.epsilon, budget.delta, false_positive_rate=0.01), 4)
0.9997

Design note: negative eps are the lines of the reversed test (delta(-eps) = 1 - e^-eps (1 - delta(eps)) with the roles
of the two records exchanged), and dp_accounting's pessimistic PLD stands above the truth for them too (it dominates
for every e^eps >= 0: arXiv:2207.04380, section 3). So one search over the real line replaces the two branches
max(0, 1 - delta - e^eps alpha, e^-eps (1 - delta - alpha)) of the textbook formula.

Design note: every eps gives a true bound; how well the search for the best one goes decides how tight the answer is,
never whether it holds.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from dp_accounting.dp_event import DpEvent
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from scipy.optimize import minimize_scalar

from nnunet_dp import accounting
from nnunet_dp.errors import UsageRefusal

LOWEST_EPSILON = -40.0  # lines below it differ from 1 by less than a double can tell
DELTAS = tuple(10 ** (-exponent / 2) for exponent in range(1, 25))  # 0.32 to 1e-12: the lines that RDP is asked for


def true_positive_rate(events: Iterable[DpEvent], false_positive_rate: float) -> float:
    """The largest true-positive rate that any membership attack with this false-positive rate can reach.

    Args:
        events: what was released or will be: the events that ``accounting.epsilon`` knows, in any order.
        false_positive_rate: alpha, the share of false alarms; between 0 and 1, both excluded.

    Returns:
        An upper bound between alpha (nothing was learnt: no events; up to the rounding of 1e-12) and 1; the larger of
        both directions: false alarms counted where the record is missing, or where it is present.

    Raises:
        UsageRefusal: for a rate outside (0, 1). Refusal: for an event the accountant does not know, by its name.

    Formal guarantee:
        Whatever test is run on the adaptive composition of the events, and whatever is known of all other records:
        if it alarms with probability at most alpha under one of (record, empty record), it alarms with probability
        at most the result under the other. For full-batch Gaussians of joint multiplier 1 / mu the result is
        Phi(Phi^-1(alpha) + mu), Dong, Roth & Su 2022, arXiv:1905.02383, and at most 0.5 % more.

    Design note: the delta of the PLD is the larger one of the two directions at each eps. Where both directions' best
    lines have eps of one sign (small alpha), that is the curve of the worse direction; between, the two curves are
    joined by their common tangent, which is higher than both: exact at q = 1; at q < 1 up to 0.035 was seen for one
    release and alpha around 0.4, below 1e-4 for ten releases, nothing for schedules.
    """
    (rate,) = true_positive_rates(events, [false_positive_rate])
    return rate


def true_positive_rates(events: Iterable[DpEvent], false_positive_rates: Sequence[float]) -> list[float]:
    """``true_positive_rate`` at several false-positive rates: the trade-off curve, composed once."""
    for rate in false_positive_rates:
        _require_rate(rate)
    events = list(events)
    distribution = accounting.composed_distribution(events)
    if distribution is not None:
        return [_lowest_line(distribution, rate) for rate in false_positive_rates]
    budgets = [(accounting.epsilon(events, delta), delta) for delta in DELTAS]
    return [min(rate_from_budget(*budget, rate) for budget in budgets) for rate in false_positive_rates]


def rate_from_budget(epsilon: float, delta: float, false_positive_rate: float) -> float:
    """The largest true-positive rate when nothing is known but (epsilon, delta).

    Args:
        epsilon: at least 0; ``math.inf`` says nothing.
        delta: from 0 to 1.
        false_positive_rate: alpha, between 0 and 1, both excluded.

    Returns:
        An upper bound between alpha and 1.

    Raises:
        UsageRefusal: for a number outside its range.

    Formal guarantee:
        Holds for every attack on every (epsilon, delta)-DP mechanism: min(1, e^epsilon alpha + delta,
        1 - e^-epsilon (1 - delta - alpha)), Wasserman & Zhou 2010, arXiv:0811.2501, theorem 2.4, and Dong, Roth & Su
        2022, arXiv:1905.02383, proposition 2.5.

    Example:
        >>> rate_from_budget(0.0, 0.0, 0.05)
        0.05
    """
    _require_rate(false_positive_rate)
    if not (epsilon >= 0 and 0 <= delta <= 1):
        raise UsageRefusal(
            f"epsilon should be at least 0 and delta from 0 to 1, found {epsilon} and {delta}; "
            "type for example 8 and 1e-5"
        )
    missed = math.exp(-epsilon) * (1 - delta - false_positive_rate)
    if epsilon >= -math.log(false_positive_rate):  # the other line is above 1, and its exponential may overflow
        return min(1.0, 1 - missed)
    return min(1.0, math.exp(epsilon) * false_positive_rate + delta, 1 - missed)


def _lowest_line(distribution: PrivacyLossDistribution, false_positive_rate: float) -> float:
    """The smallest e^eps alpha + delta(eps): convex in e^eps, so a bounded search finds it; at least 1 past the end."""

    def line(privacy_loss: float) -> float:
        delta = float(distribution.get_delta_for_epsilon(float(privacy_loss)))  # type: ignore[arg-type]
        return math.exp(privacy_loss) * false_positive_rate + delta + accounting.FFT_ROUNDING

    bounds = (LOWEST_EPSILON, -math.log(false_positive_rate))
    found: Any = minimize_scalar(line, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return max(false_positive_rate, min(1.0, float(found.fun), line(0.0)))


def _require_rate(false_positive_rate: float) -> None:
    if not 0 < false_positive_rate < 1:
        raise UsageRefusal(
            f"the false-positive rate should lie between 0 and 1, found {false_positive_rate}; type for example 0.01"
        )
