"""Epsilon is sandwiched, calibration never overshoots, and what is not known is refused by name."""

import math
import time
from itertools import pairwise

import pytest
from dp_accounting.dp_event import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant
from pydantic import ValidationError
from scipy.optimize import brentq
from scipy.stats import norm

from nnunet_dp import accounting
from nnunet_dp.accounting import (
    ACCOUNTANT,
    PrivacyBudget,
    calibrate,
    default_delta,
    epsilon,
    gaussian_mu,
    which_accountant,
    z_delta,
)
from nnunet_dp.errors import BudgetRefusal, Refusal, UsageRefusal
from nnunet_dp.events import PureDpEvent

# (q, T, sigma, delta); the first is the schedule of PRIVACY.md: PLD 3.320 < PRV 3.330 < RDP 3.665
SCHEDULES = [(0.5, 200, 8.0, 1e-4), (0.1, 300, 1.5, 1e-5), (0.01, 1000, 1.0, 1e-6), (0.9, 60, 6.0, 1e-4)]


def schedule(q: float, steps: int, noise_multiplier: float) -> DpEvent:
    return SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(noise_multiplier)), steps)


def optimistic_pld(q: float, steps: int, sigma: float, delta: float) -> float:
    """A lower bound: losses rounded down; the tails that are cut off are added to delta again."""
    single = privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        sampling_prob=q,
        pessimistic_estimate=False,
        use_connect_dots=False,
        value_discretization_interval=1e-4,
        neighboring_relation=NeighboringRelation.REPLACE_SPECIAL,
    )
    return single.self_compose(steps).get_epsilon_for_delta(delta + 1e-12)


def rdp(q: float, steps: int, sigma: float, delta: float) -> float:
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    return accountant.compose(schedule(q, steps, sigma)).get_epsilon(delta)


def prv(q: float, steps: int, sigma: float, delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = [(sigma, q, steps)]
    return accountant.get_epsilon(delta)


def analytic_gaussian(mu: float, delta: float) -> float:
    """Balle & Wang 2018, theorem 8, solved for epsilon."""
    return brentq(lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta, 0, 60)


# ---- epsilon -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SCHEDULES)
def test_epsilon_lies_between_the_optimistic_pld_and_rdp(case: tuple[float, int, float, float]) -> None:
    q, steps, sigma, delta = case
    ours = epsilon([schedule(q, steps, sigma)], delta)
    assert optimistic_pld(*case) <= ours <= rdp(*case)


@pytest.mark.filterwarnings("ignore:Optimal order")
@pytest.mark.parametrize("case", SCHEDULES)
def test_epsilon_is_within_one_percent_of_the_prv_accountant(case: tuple[float, int, float, float]) -> None:
    q, steps, sigma, delta = case
    assert epsilon([schedule(q, steps, sigma)], delta) == pytest.approx(prv(*case), rel=0.01)


@pytest.mark.filterwarnings("ignore:Optimal order")
def test_the_three_figures_of_the_design_document() -> None:
    case = SCHEDULES[0]
    ours = epsilon([schedule(*case[:3])], case[3])
    assert [round(value, 3) for value in (ours, prv(*case), rdp(*case))] == [3.320, 3.330, 3.665]


@pytest.mark.parametrize(("steps", "sigma", "delta"), [(1, 1.0, 1e-5), (100, 5.44, 1e-4), (20_000, 400, 1e-8)])
def test_epsilon_at_full_batch_is_the_analytic_gaussian(steps: int, sigma: float, delta: float) -> None:
    exact = analytic_gaussian(math.sqrt(steps) / sigma, delta)
    ours = epsilon([schedule(1.0, steps, sigma)], delta)
    assert exact <= ours <= exact * 1.001


@pytest.mark.parametrize("delta", [1e-9, 1e-10, 1e-12])
def test_epsilon_stays_above_the_truth_where_the_fft_rounds(delta: float) -> None:
    almost_everybody = 1 - 1e-12  # composed numerically, but as good as the full batch
    ours = epsilon([schedule(almost_everybody, 20_000, 707.1)], delta)
    assert ours >= analytic_gaussian(math.sqrt(20_000) / 707.1, delta) * (1 - 1e-9)


def test_no_release_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0.0
    assert which_accountant([]) == ACCOUNTANT


def test_the_order_of_events_does_not_matter() -> None:
    events = [
        schedule(0.1, 10, 2.0),
        PureDpEvent(0.2),
        GaussianDpEvent(3.0),
        GaussianDpEvent(7.1),
        LaplaceDpEvent(9),
    ]
    assert epsilon(events, 1e-5) == epsilon(reversed(events), 1e-5)


def test_equal_events_are_merged_however_they_are_written() -> None:
    step = PoissonSampledDpEvent(0.2, GaussianDpEvent(2.0))
    assert epsilon([step] * 6, 1e-5) == epsilon([ComposedDpEvent([step, SelfComposedDpEvent(step, 5)])], 1e-5)


def test_epsilon_grows_with_every_step() -> None:
    spent = [epsilon([schedule(0.3, steps, 4.0)], 1e-5) for steps in range(1, 40)]
    assert all(before < after for before, after in pairwise(spent))


def test_asking_again_is_cheap() -> None:
    epsilon([schedule(0.3, 20_000, 40.0)], 1e-5)
    start = time.perf_counter()
    epsilon([schedule(0.3, 20_000, 40.0)], 1e-5)
    assert time.perf_counter() - start < 0.01


def test_a_pure_epsilon_costs_that_and_composes_below_the_sum() -> None:
    assert epsilon([PureDpEvent(0.5)], 1e-9) == pytest.approx(0.5, rel=0.01)
    assert epsilon([PureDpEvent(0.1)] * 100, 1e-5) < 5


def test_a_laplace_release_costs_the_inverse_of_its_noise() -> None:
    assert epsilon([LaplaceDpEvent(2.0)], 1e-9) == pytest.approx(0.5, rel=0.01)


def test_two_queries_on_one_poisson_draw_are_one_event() -> None:
    together = PoissonSampledDpEvent(0.1, ComposedDpEvent([GaussianDpEvent(z_delta(2.0, 3.0)), GaussianDpEvent(6.0)]))
    once = PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0))
    assert epsilon([together], 1e-5) == pytest.approx(epsilon([once], 1e-5), rel=1e-6)


def test_a_stored_draw_met_twice_costs_more_than_two_events() -> None:
    step = PoissonSampledDpEvent(0.1, GaussianDpEvent(1.5))
    stored = PoissonSampledDpEvent(0.1, SelfComposedDpEvent(GaussianDpEvent(1.5), 2))
    assert [round(epsilon(e, 1e-4), 3) for e in ([stored], [step] * 2)] == [1.012, 0.564]


@pytest.mark.parametrize(
    ("event", "name"),
    [
        (NonPrivateDpEvent(), "NonPrivateDpEvent"),
        (SampledWithoutReplacementDpEvent(10, 2, GaussianDpEvent(1.0)), "SampledWithoutReplacementDpEvent"),
        (PoissonSampledDpEvent(0.1, PureDpEvent(1.0)), "PureDpEvent"),
        (
            PoissonSampledDpEvent(0.1, ComposedDpEvent([LaplaceDpEvent(1), GaussianDpEvent(1)])),
            "ComposedDpEvent",
        ),
        (PoissonSampledDpEvent(0.1, SelfComposedDpEvent(LaplaceDpEvent(1), 2)), "SelfComposedDpEvent"),
    ],
)
def test_an_event_the_accountant_does_not_know_is_refused_by_name(event: DpEvent, name: str) -> None:
    with pytest.raises(Refusal, match=name):
        epsilon([SelfComposedDpEvent(event, 3)], 1e-5)


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, math.inf])
def test_impossible_noise_is_refused(noise: float) -> None:
    with pytest.raises(UsageRefusal, match="above 0"):
        epsilon([GaussianDpEvent(noise)], 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_an_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(UsageRefusal, match="delta"):
        epsilon([], delta)


# ---- the fallback --------------------------------------------------------------------------------


def test_rdp_speaks_for_long_schedules_with_little_noise_and_quickly() -> None:
    events = [schedule(0.5, 250_000, 0.3)]
    start = time.perf_counter()
    assert epsilon(events, 1e-5) == pytest.approx(rdp(0.5, 250_000, 0.3, 1e-5))
    assert time.perf_counter() - start < 5
    assert which_accountant(events).endswith("RDP")


def test_the_stock_schedule_of_nnunet_still_fits_pld() -> None:
    events = [schedule(0.01, 250_000, 1.0)]
    assert which_accountant(events) == ACCOUNTANT
    assert epsilon(events, 1e-5) < rdp(0.01, 250_000, 1.0, 1e-5)


def test_rdp_also_prices_pure_laplace_and_sampled_laplace_events() -> None:
    events = [
        GaussianDpEvent(2.0),
        PureDpEvent(0.3),
        LaplaceDpEvent(5.0),
        PoissonSampledDpEvent(0.5, LaplaceDpEvent(2)),
    ]
    assert epsilon(events, 1e-9) <= accounting._rdp_epsilon(accounting.canonical(events), 1e-9)


def test_an_order_whose_divergence_drowned_in_rounding_says_nothing() -> None:
    assert rdp(0.3, 20_000, 4e7, 1e-9) == 0.0  # dp_accounting 0.6 by itself: cancellation made them negative
    assert accounting._rdp_epsilon(accounting.canonical([schedule(0.3, 20_000, 4e7)]), 1e-9) > 0


# ---- calibration ---------------------------------------------------------------------------------

GRID = [
    (1.0, 100, 8, 1e-4),
    (0.01, 20_000, 1, 1e-6),
    (0.1, 1000, 0.5, 1e-5),
    (1.0, 20_000, 0.1, 1e-9),
    (0.3, 1, 3, 1e-3),
    (0.5, 300, 50, 1e-5),
    (0.999, 60, 1, 1e-5),
    (0.001, 20_000, 2, 1e-6),
]


@pytest.mark.parametrize(("q", "steps", "target", "delta"), GRID)
def test_calibration_is_never_above_the_target_and_at_most_one_percent_below(
    q: float, steps: int, target: float, delta: float
) -> None:
    start = time.process_time()  # of a core: other work on the machine does not count
    noise = calibrate(lambda z: schedule(q, steps, z), PrivacyBudget(epsilon=target, delta=delta))
    assert time.process_time() - start < 5
    assert 0.99 * target <= epsilon([schedule(q, steps, noise)], delta) <= target


@pytest.mark.parametrize("nonsense", [0.0, math.inf, math.nan])
def test_coarse_grids_have_no_say_in_what_a_calibration_finds(monkeypatch, nonsense: float) -> None:
    honest = accounting._cost
    monkeypatch.setattr(accounting, "_cost", lambda s, d, coarse: honest(s, d, 1) if coarse == 1 else nonsense)
    noise = calibrate(lambda z: schedule(0.2, 50, z), PrivacyBudget(epsilon=3, delta=1e-5))
    assert 2.97 <= epsilon([schedule(0.2, 50, noise)], 1e-5) <= 3


@pytest.mark.parametrize(("q", "steps", "target"), [(0.001, 100, 0.5), (0.01, 1000, 1), (0.1, 100_000, 8)])
def test_a_calibration_takes_few_evaluations_on_the_accountants_own_grid(monkeypatch, q, steps, target) -> None:
    honest, asked = accounting._cost, []

    def counted(events, delta, coarseness):
        asked.append(coarseness)
        return honest(events, delta, coarseness)

    monkeypatch.setattr(accounting, "_cost", counted)
    calibrate(lambda z: schedule(q, steps, z), PrivacyBudget(epsilon=target, delta=1e-5))
    assert asked.count(1) <= 3 and asked.count(4) <= 8 and asked.count(64) <= 20


def test_calibration_leaves_room_for_what_else_is_in_the_schedule() -> None:
    def with_fingerprint(z: float) -> DpEvent:
        return ComposedDpEvent([PureDpEvent(1.0), schedule(0.5, 100, z)])

    noise = calibrate(with_fingerprint, PrivacyBudget(epsilon=3, delta=1e-5))
    assert 2.97 <= epsilon([with_fingerprint(noise)], 1e-5) <= 3
    assert epsilon([schedule(0.5, 100, noise)], 1e-5) < 3


def test_calibration_refuses_when_the_fixed_part_is_too_dear() -> None:
    with pytest.raises(BudgetRefusal, match="does not touch"):
        calibrate(
            lambda z: ComposedDpEvent([PureDpEvent(9.0), GaussianDpEvent(z)]),
            PrivacyBudget(epsilon=8, delta=1e-5),
        )


def test_calibration_refuses_a_delta_that_needs_no_noise() -> None:
    with pytest.raises(UsageRefusal, match="delta"):
        calibrate(lambda z: schedule(1e-4, 1, z), PrivacyBudget(epsilon=1, delta=1e-2))


@pytest.mark.parametrize(("target", "delta"), [(0.01, 1e-9), (1, 1e-5), (8, 1e-4), (200, 1e-6)])
def test_the_budgets_gaussian_spends_exactly_the_budget(target: float, delta: float) -> None:
    mu = gaussian_mu(PrivacyBudget(epsilon=target, delta=delta))
    assert accounting.gaussian_delta(mu, target) == pytest.approx(delta, rel=1e-6)
    assert epsilon([GaussianDpEvent(1 / mu)], delta) == pytest.approx(target, rel=1e-3)


# ---- budget and small formulas -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "delta"),
    [
        (1, 1e-5),
        (208, 1e-5),
        (10_000, 1e-5),
        (10_001, 1e-6),
        (100_000, 1e-6),
        (10**8, 1e-9),
        (10**8 + 1, 1e-10),
    ],
)
def test_default_delta_is_exact_at_powers_of_ten(units: int, delta: float) -> None:
    assert default_delta(units) == delta


def test_a_dataset_without_units_has_no_delta() -> None:
    with pytest.raises(UsageRefusal, match="at least 1"):
        default_delta(0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": 0, "delta": 1e-5},
        {"epsilon": math.inf, "delta": 1e-5},
        {"epsilon": math.nan, "delta": 1e-5},
        {"epsilon": 1, "delta": 0},
        {"epsilon": 1, "delta": 1},
        {"epsilon": 1, "delta": 1e-5, "unit": "  "},
        {"epsilon": 1, "delta": 1e-5, "relation": "add-remove"},
        {"epsilon": 1, "delta": 1e-5, "note": "x"},
    ],
)
def test_an_impossible_budget_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PrivacyBudget.model_validate(wrong)


def test_a_budget_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PrivacyBudget(epsilon=8, delta=1e-4).epsilon = 9  # type: ignore[misc]


def test_gradient_and_count_share_one_price() -> None:
    z, count_noise = 1.1, 5.0
    assert z_delta(z, count_noise) ** -2 + (2 * count_noise) ** -2 == pytest.approx(z**-2)


@pytest.mark.parametrize("count_noise", [1.0, 0.5])
def test_a_count_with_too_little_noise_is_refused(count_noise: float) -> None:
    with pytest.raises(ValueError, match="twice the count's noise"):
        z_delta(2.0, count_noise)
