"""The accountant: from what was released (``DpEvent`` values) to epsilon, and from a budget to the noise.

An event says what a release costs, and says nothing about the data. Three questions are answered here: what
do these events cost together (``epsilon``), how much noise does a schedule need (``calibrate``), and how
large a Gaussian would a budget buy at once (``gaussian_mu``, for rules of thumb). All of them speak of
*zero-out*: one patient's slot is replaced by an empty record that contributes nothing; dp_accounting's
``REPLACE_SPECIAL``.

Example:
    >>> from dp_accounting.dp_event import GaussianDpEvent, SelfComposedDpEvent
    >>> budget = PrivacyBudget(epsilon=8, delta=1e-4)
    >>> schedule = lambda noise_multiplier: SelfComposedDpEvent(GaussianDpEvent(noise_multiplier), 100)
    >>> noise_multiplier = calibrate(schedule, budget)
    >>> 7.92 <= epsilon([schedule(noise_multiplier)], budget.delta) <= 8
    True

Design note: two accountants, one rule. Privacy loss distributions (PLD) are tight and are used wherever they
fit into ``MAXIMUM_POINTS`` grid points (about a gigabyte, a few seconds). Where the expected width of the
composed loss needs more (long schedules with little noise: epsilon in the hundreds and beyond) or delta is
below ``SMALLEST_PLD_DELTA`` (the rounding of a composed FFT is no longer small against it: at 1e-10 it was
seen below the truth), Renyi (RDP) is used. Both are upper bounds; ``which_accountant`` names the one that
speaks.

Design note: the grid is a fiftieth of the loss's spread per step: the error of "connect the dots"
(arXiv:2207.04380) is of second order, always upwards, and stays under a thousandth.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import version
from typing import Annotated, Any, Literal

import numpy as np
from dp_accounting.dp_event import (
    DpEvent,
    GaussianDpEvent,
    PoissonSampledDpEvent,
)
from dp_accounting.pld import common, privacy_loss_distribution
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from nnunet_dp.errors import BudgetRefusal, Refusal, UsageRefusal
from nnunet_dp.events import Atom, PureDpEvent, Schedule, canonical, on_everybody

ACCOUNTANT = f"dp_accounting {version('dp-accounting')} PLD"
"""The accountant that speaks unless ``which_accountant`` says otherwise."""
FALLBACK_ACCOUNTANT = f"dp_accounting {version('dp-accounting')} RDP"
RELATION = NeighboringRelation.REPLACE_SPECIAL
LARGEST_EPSILON = 1000.0  # beyond it nobody is protected, and accountants run out of range
MAXIMUM_POINTS = 2**24
POINTS_PER_RELEASE = 100_000
SMALLEST_PLD_DELTA = 1e-9
CLOSE_ENOUGH = 0.995  # of the target: a calibration stops there
COARSER_GRIDS = (64, 4)  # on which a calibration's search begins
FFT_ROUNDING = 1e-12  # absolute error of a composed delta, taken off the target; about 2e-13 was seen
RDP_ROUNDING = 1e-10  # per release; below it dp_accounting's sums over binomials lose their digits
class PrivacyBudget(BaseModel):
    """What a patient may lose at most: (epsilon, delta) under a relation, per unit.

    Attributes:
        epsilon: finite, above 0.
        delta: between 0 and 1, both excluded.
        relation: ``zero-out``: one unit's record is replaced by an empty one.
        unit: what one record is, in words (``patient``, ``case``); never blank.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon: float = Field(gt=0, allow_inf_nan=False)
    delta: float = Field(gt=0, lt=1)
    relation: Literal["zero-out"] = "zero-out"
    unit: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)] = "patient"


def default_delta(units: int) -> float:
    """Delta when nobody chose one: min(1e-5, 10^floor(log10(1 / (10 N)))), exact at powers of ten.

    Args:
        units: N, the public number of units (patients) of the dataset.

    Raises:
        UsageRefusal: if there are no units.

    Example:
        >>> default_delta(208), default_delta(100_000), default_delta(100_001)
        (1e-05, 1e-06, 1e-07)
    """
    if units < 1:
        raise UsageRefusal(f"the number of units should be at least 1, found {units}; give a dataset with patients")
    digits = len(str(units - 1)) if units > 1 else 0  # ceil(log10 N) without floating point
    return min(1e-5, float(f"1e-{digits + 1}"))


def epsilon(events: Iterable[DpEvent], delta: float) -> float:
    """Epsilon that all events cost together, in any order.

    Args:
        events: what was released; equal events are merged, so the order does not matter.
        delta: between 0 and 1, both excluded.

    Returns:
        An upper bound of the true epsilon; 0.0 for no events; ``math.inf`` where no finite bound is known.

    Raises:
        Refusal: for an event this accountant does not know, by its name.

    Formal guarantee:
        The adaptive composition of the events is (result, delta)-DP under zero-out.
    """
    if not 0 < delta < 1:
        raise UsageRefusal(f"delta should lie between 0 and 1, found {delta}; type for example 1e-5")
    schedule = canonical(events)
    return _epsilon(schedule, delta) if schedule else 0.0


def composed_distribution(events: Iterable[DpEvent]) -> PrivacyLossDistribution | None:
    """Pessimistic PLD of all events together; None where RDP has to speak.

    Add ``FFT_ROUNDING`` to its deltas. Refuses an event this accountant does not know, by its name.
    """
    schedule = canonical(events)
    if not schedule:
        return privacy_loss_distribution.identity()
    interval = _pld_interval(schedule, SMALLEST_PLD_DELTA)
    return None if interval is None else _composed(schedule, interval)


def which_accountant(events: Iterable[DpEvent], delta: float = 1e-5) -> str:
    """Name and version of the accountant that ``epsilon`` uses for these events."""
    schedule = canonical(events)
    return ACCOUNTANT if not schedule or _pld_interval(schedule, delta) is not None else FALLBACK_ACCOUNTANT


def calibrate(make_event: Callable[[float], DpEvent], budget: PrivacyBudget) -> float:
    """Smallest noise multiplier with which a schedule stays within its budget.

    The search starts where the central limit theorem puts the answer (mu-GDP of subsampled Gaussians, Bu et
    al. 2020, arXiv:1911.11607) and never visits a noise that is absurdly small, where an accountant would
    exhaust the memory.

    Args:
        make_event: noise multiplier -> the whole schedule as one event; more noise must not cost more.
        budget: epsilon and delta to reach.

    Returns:
        A noise multiplier whose epsilon is never above the target and at most 1 % below it.

    Raises:
        BudgetRefusal: when a part of the schedule that does not depend on the noise is too expensive already.
        UsageRefusal: when delta is so large that the schedule would need next to no noise.

    Formal guarantee:
        ``epsilon([make_event(result)], budget.delta)``, by the accountant's own grid, was computed and is at most
        ``budget.epsilon``: the coarser grids on which the search begins have no say in that.

    Design note: not ``dp_accounting.calibrate_dp_mechanism``: its tolerance is in units of the noise, ours in
    epsilon, and a search that may stop as soon as epsilon is close enough needs a third of the evaluations.

    Design note: on a grid 64 times coarser an evaluation takes a twentieth of the time and epsilon comes out a few
    percent too high, on one 4 times coarser a quarter and a thousandth. Most steps of the search are taken there.
    """

    def cost_on_grid(coarseness: int) -> Callable[[float], float]:
        return lambda noise_multiplier: _cost(canonical([make_event(noise_multiplier)]), budget.delta, coarseness)

    guess = _analytic_noise(make_event, budget)
    for coarseness in COARSER_GRIDS:
        # what is too dear, or out of range, on a coarse grid may still fit: the last search decides
        with suppress(Refusal, ArithmeticError, ValueError):
            guess = _search(cost_on_grid(coarseness), guess, budget.epsilon, close=0.997, narrowest=5e-4)
    return _search(cost_on_grid(1), guess, budget.epsilon)


def gaussian_mu(budget: PrivacyBudget) -> float:
    """Sensitivity over noise of the one Gaussian release that spends the budget (mu of mu-GDP).

    The analytic Gaussian mechanism, Balle & Wang 2018, arXiv:1805.06530, theorem 8: T full-batch steps may
    use the noise multiplier sqrt(T) / mu.
    """

    def excess(mu: float) -> float:
        return gaussian_delta(mu, budget.epsilon) - budget.delta

    return _positive_root(excess, 1e-12, 1e6)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Delta of one Gaussian release with sensitivity ``mu`` and unit noise (Balle & Wang 2018, theorem 8)."""
    tail = math.exp(epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)))
    return float(ndtr(mu / 2 - epsilon / mu)) - tail


def z_delta(noise_multiplier: float, count_noise: float) -> float:
    """Noise multiplier left to the gradient when a noisy count shares its draw and its price.

    (z^-2 - (2 sigma_b)^-2)^(-1/2), Andrew et al. 2021, arXiv:1905.03871, theorem 1: the count of (b_i - 1/2)
    has sensitivity 1/2, so noise sigma_b on it is a Gaussian of multiplier 2 sigma_b.

    Args:
        noise_multiplier: z, the price of both releases together.
        count_noise: sigma_b, standard deviation of the noise on the centred count, in patients.

    Raises:
        UsageRefusal: (a ``ValueError``) unless z < 2 sigma_b.
    """
    if not 0 < noise_multiplier < 2 * count_noise:
        raise UsageRefusal(
            f"the noise multiplier should be below twice the count's noise ({2 * count_noise}), found "
            f"{noise_multiplier}; take count_noise = max(expected batch / 10, 2 * noise_multiplier)"
        )
    return (noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5


# ---- the two accountants -------------------------------------------------------------------------


def _cost(schedule: Schedule, delta: float, coarseness: int) -> float:
    """``epsilon`` of a schedule, on a grid that is coarser so many times; where RDP speaks there is no grid."""
    if not schedule:
        return 0.0
    interval = _pld_interval(schedule, delta)
    if coarseness == 1 or interval is None:
        return _epsilon(schedule, delta)
    return float(_composed(schedule, coarseness * interval).get_epsilon_for_delta(delta))


@lru_cache(maxsize=8192)
def _epsilon(schedule: Schedule, delta: float) -> float:
    interval = _pld_interval(schedule, delta)
    if interval is not None:
        rounding = FFT_ROUNDING if delta >= SMALLEST_PLD_DELTA else 0.0
        found = float(_composed(schedule, interval).get_epsilon_for_delta(delta - rounding))
        if math.isfinite(found):
            return found
    return _rdp_epsilon(schedule, delta)


def _composed(schedule: Schedule, interval: float) -> PrivacyLossDistribution:
    """PLD of the whole schedule, pessimistic, on a grid of the given interval."""
    total: PrivacyLossDistribution | None = None
    for atom, count in schedule:
        part = _single(atom, interval)
        part = part.self_compose(count) if count > 1 else part
        total = part if total is None else total.compose(part)
    assert total is not None
    return total


@lru_cache(maxsize=16)
def _single(atom: Atom, interval: float) -> PrivacyLossDistribution:
    """PLD of one release; kept, because a training asks for one more of the same at every step."""
    options: dict[str, Any] = {"value_discretization_interval": interval}
    if atom.kind == "pure_dp":
        return privacy_loss_distribution.from_privacy_parameters(
            common.DifferentialPrivacyParameters(atom.parameter), **options
        )
    options["sampling_prob"] = atom.sampling_probability
    if atom.kind == "laplace":
        return privacy_loss_distribution.from_laplace_mechanism(atom.parameter, **options)
    return privacy_loss_distribution.from_gaussian_mechanism(atom.parameter, neighboring_relation=RELATION, **options)


def _pld_interval(schedule: Schedule, delta: float) -> float | None:
    """Grid interval for PLD, or None where RDP has to speak (the rule in the module's docstring)."""
    spread, widest = _spread(schedule), max(_width(atom) for atom, _ in schedule)
    counts = [count for _, count in schedule]
    finest = min([_pure_epsilon(atom) / 100 for atom, _ in schedule if atom.kind != "gaussian"], default=1e-2)
    accurate = min(finest, 1e-2, 0.02 * spread / math.sqrt(sum(counts)))
    interval = max(_power_of_two(accurate, math.floor), _power_of_two(widest / POINTS_PER_RELEASE, math.ceil))
    composed = sum(counts) > 1
    tails = widest * (40 if composed else 1)  # dp_accounting's Chernoff bound tries few orders
    fits = (spread**2 + 20 * spread + tails) / interval <= MAXIMUM_POINTS
    return interval if fits and (delta >= SMALLEST_PLD_DELTA or not composed) else None


def _power_of_two(value: float, rounding: Callable[[float], int]) -> float:
    return 1e-4 * 2.0 ** rounding(math.log2(value / 1e-4))


def _spread(schedule: Schedule) -> float:
    """Standard deviation of the composed loss, roughly (the mu of the central limit theorem)."""
    return math.sqrt(math.fsum(count * _mu(atom) ** 2 for atom, count in schedule))


def _mu(atom: Atom) -> float:
    if atom.kind == "gaussian":
        whole = 1 / atom.parameter
        sampled = atom.sampling_probability * math.sqrt(math.expm1(min(whole**2, 700)))
        return whole if on_everybody(atom) else min(whole, sampled)
    return _pure_epsilon(atom)


def _pure_epsilon(atom: Atom) -> float:
    """Epsilon of a pure-DP atom; a Poisson draw turns eps into log(1 + q (e^eps - 1))."""
    whole = atom.parameter if atom.kind == "pure_dp" else 1 / atom.parameter
    if on_everybody(atom) or whole > 700:
        return whole
    return math.log1p(atom.sampling_probability * math.expm1(whole))


def _width(atom: Atom) -> float:
    """Width of one release's loss, cut where dp_accounting does: at ten deviations of the noise."""
    if atom.kind != "gaussian":
        return 2 * _pure_epsilon(atom)
    highest = 10 / atom.parameter + 0.5 * atom.parameter**-2
    if on_everybody(atom):
        return 2 * highest
    absent, drawn = math.log1p(-atom.sampling_probability), math.log(atom.sampling_probability)
    return float(np.logaddexp(absent, drawn + highest) - np.logaddexp(absent, drawn - highest))


class _RdpAccountant(RdpAccountant):
    """RDP that also knows pure DP, and leaves out the orders at which dp_accounting's arithmetic fails.

    dp_accounting 0.6 answers epsilon = 0 when cancellation makes a divergence negative; an order says nothing
    then.
    """

    def _maybe_compose(self, event: DpEvent, count: int, do_compose: bool) -> Any:
        if not isinstance(event, PureDpEvent):
            return super()._maybe_compose(event, count, do_compose)
        if do_compose:
            # An eps-DP release has RDP min(eps, order eps^2 / 2): Bun & Steinke 2016, arXiv:1605.02065.
            self._rdp += count * np.minimum(event.epsilon, self._orders * event.epsilon**2 / 2)
        return None

    def reliable_epsilon(self, delta: float, releases: int) -> float:
        """Epsilon from the orders whose divergence stands clear of rounding; infinite if there is none."""
        keep = np.flatnonzero(self._rdp > RDP_ROUNDING * releases)
        if not keep.size:
            return math.inf
        return float(compute_epsilon(self._orders[keep].tolist(), self._rdp[keep].tolist(), delta)[0])


def _rdp_epsilon(schedule: Schedule, delta: float) -> float:
    accountant = _RdpAccountant(neighboring_relation=RELATION)
    with _quiet_absl():
        for atom, count in schedule:
            event: DpEvent = PureDpEvent(_pure_epsilon(atom)) if atom.kind != "gaussian" else _event(atom)
            accountant.compose(event, count)
        return accountant.reliable_epsilon(delta, sum(count for _, count in schedule))


def _event(atom: Atom) -> DpEvent:
    return PoissonSampledDpEvent(atom.sampling_probability, GaussianDpEvent(atom.parameter))


@contextmanager
def _quiet_absl() -> Iterator[None]:
    """No line for each order that dp_accounting leaves out: leaving one out is safe."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# ---- the search for the noise --------------------------------------------------------------------

_Point = tuple[float, float]  # noise multiplier, epsilon


def _analytic_noise(make_event: Callable[[float], DpEvent], budget: PrivacyBudget) -> float:
    """Noise multiplier at which the schedule's mu is the budget's."""
    target = gaussian_mu(budget)

    def excess(noise_multiplier: float) -> float:
        return math.log(_spread(canonical([make_event(noise_multiplier)])) / target)

    lowest, highest = 1e-4, 1e8
    if excess(highest) > 0:  # a part that this noise does not touch is too dear: _bracket will say so
        return 1.0
    return _positive_root(excess, lowest, highest) if excess(lowest) > 0 else lowest


def _positive_root(function: Callable[[float], float], lowest: float, highest: float) -> float:
    """Root of a monotone function of a positive number, to full precision on a logarithmic scale."""
    found: Any = brentq(lambda log: function(math.exp(log)), math.log(lowest), math.log(highest), xtol=1e-13)
    return math.exp(found)


def _search(
    cost: Callable[[float], float],
    noise_guess: float,
    target: float,
    close: float = CLOSE_ENOUGH,
    narrowest: float = 1e-7,
) -> float:
    """A noise multiplier whose cost is at most the target and hardly below it.

    Args:
        cost: noise multiplier -> epsilon.
        noise_guess: where to begin.
        target: epsilon.
        close: share of the target that is good enough.
        narrowest: relative width of the bracket at which its upper end is good enough.
    """
    first = (noise_guess, cost(noise_guess))
    if close * target <= first[1] <= target:
        return noise_guess
    lower, upper = _bracket(cost, first, target)
    while upper[1] < close * target and upper[0] / lower[0] > 1 + narrowest:
        middle = _interpolate(lower, upper, 0.998 * target)
        found = (middle, cost(middle))
        lower, upper = (lower, found) if found[1] <= target else (found, upper)
    return upper[0]


def _bracket(cost: Callable[[float], float], here: _Point, target: float) -> tuple[_Point, _Point]:
    """Two points with epsilon above and at most the target, found by growing steps from a good guess."""
    noise_guess, distance = here[0], abs(here[1] / target - 1)
    factor, upwards = min(max(1 + distance / 2, 1.002), 1.05), here[1] > target
    while 1e-3 * noise_guess < here[0] < 1e9 * noise_guess:
        last, noise = here, here[0] * (factor if upwards else 1 / factor)
        here, factor = (noise, cost(noise)), min(factor**1.7, 16.0)
        if (here[1] > target) != upwards:
            return (last, here) if upwards else (here, last)
    if not upwards:
        raise UsageRefusal(
            f"epsilon should exceed {target} with little noise, found {here[1]:.4g} at noise multiplier "
            f"{here[0]:.3g}: delta alone permits what this schedule does; choose a delta below 1 / patients"
        )
    raise BudgetRefusal(
        f"epsilon should come down to {target} by adding noise, found {here[1]:.4g} at noise multiplier "
        f"{here[0]:.3g}: a part of the schedule that this noise does not touch costs that much; "
        "spend less on that part or raise epsilon"
    )


def _interpolate(lower: _Point, upper: _Point, target: float) -> float:
    """Between two points along log epsilon over log noise (nearly a line), kept away from both ends."""
    position = 0.5
    if math.isfinite(lower[1]) and upper[1] > 0:
        position = math.log(lower[1] / target) / math.log(lower[1] / upper[1])
    return lower[0] * (upper[0] / lower[0]) ** min(max(position, 0.02), 0.98)
