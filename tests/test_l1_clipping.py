"""Laplace steps: the L1 bound holds without tolerance, the noise has its size, and both releases are paid for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from asserts import NASTY_SCALES, RULES
from dp_accounting.dp_event import (
    ComposedDpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld.privacy_loss_distribution import from_laplace_mechanism
from hypothesis import given, settings
from hypothesis import strategies as st
from references import clipped_sum_by_loop
from scipy.stats import kstest
from torch import nn

from nnunet_dp.accounting import PrivacyBudget, epsilon
from nnunet_dp.charges import Charge
from nnunet_dp.clipping import RULE_NAMES, SAFETY, ClipRule, Flat, make_rule
from nnunet_dp.dpsgd import PrivacyPlan
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.gradients import Record, group_norms, one_at_a_time
from nnunet_dp.l1_clipping import L1Clipped, LaplaceStep, l1_norm, one_at_a_time_l1
from nnunet_dp.ledger import Ledger
from nnunet_dp.mechanisms import ClippedSum, L1Bounded, Laplace

L1_RULES = ("flat_l1", "quantile_l1")
BUDGET = PrivacyBudget(epsilon=8, delta=1e-5)


class Given(nn.Module):
    """A network whose gradient for a record is the record itself, in parameters of several shapes."""

    def __init__(self, *sizes: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes)

    def forward(self, data):
        return sum((part * piece).sum() for part, piece in zip(self.parts, data, strict=True))


def total_of(patients, rule: ClipRule) -> L1Clipped:
    network = Given(*(len(piece) for piece in patients[0]), dtype=patients[0][0].dtype)
    return one_at_a_time_l1(network, lambda output, _: output, [Record(patient, None) for patient in patients], rule)


def assert_l1_bounded(tensors, bound: float) -> None:
    """No tolerance, summed exactly: ``math.fsum`` rounds once."""
    numbers = torch.cat([tensor.flatten() for tensor in tensors])
    assert torch.isfinite(numbers).all()
    assert math.fsum(numbers.double().abs().tolist()) <= bound


# ---- the bound ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", L1_RULES)
@pytest.mark.parametrize("scale", NASTY_SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_patient_contributes_more_than_the_l1_bound(name, scale, dtype):
    generator = torch.Generator().manual_seed(1)
    patient = [torch.randn(size, generator=generator, dtype=dtype) * scale for size in (200_000, 7, 30_000)]
    assert_l1_bounded(total_of([patient], make_rule(name, {"bound": 0.3})).gradient.tensors, 0.3)


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=3, max_size=3),
    st.sampled_from([1e-12, 0.3, 1.0, 1e6]),
)
@settings(max_examples=150, deadline=None)
def test_no_three_numbers_break_the_l1_bound(values, bound):
    patient = [torch.tensor([value]) for value in values]
    for name in L1_RULES:
        assert_l1_bounded(total_of([patient], make_rule(name, {"bound": bound})).gradient.tensors, bound)


def test_clipping_in_l2_breaks_the_l1_bound_many_times_over():
    patient = [torch.randn(10_000, generator=torch.Generator().manual_seed(0))]
    factor = Flat(1.0).factors(group_norms(patient, (0,)))
    with pytest.raises(AssertionError):
        assert_l1_bounded([patient[0] * factor], 1.0)
    assert float(l1_norm([patient[0] * factor])) > 70


def test_short_gradients_pass_and_long_ones_are_scaled_to_the_bound():
    short = total_of([[torch.tensor([0.2, -0.1])]], make_rule("flat_l1", {"bound": 1.0}))
    long = total_of([[torch.tensor([2.0, -6.0])]], make_rule("flat_l1", {"bound": 4.0}))
    torch.testing.assert_close(short.gradient.tensors[0], torch.tensor([0.2, -0.1]).double() * SAFETY)
    torch.testing.assert_close(long.gradient.tensors[0], torch.tensor([1.0, -3.0]).double() * SAFETY)


def test_the_l1_engine_equals_a_plain_loop():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    records = [Record(torch.randn(3, 6).double(), torch.randn(3, 2).double()) for _ in range(4)]
    loss = nn.functional.mse_loss
    expected = [torch.zeros_like(parameter) for parameter in network.parameters()]
    for record in records:
        alone = clipped_sum_by_loop(network, loss, [record], lambda n: 1.0)
        factor = min(1.0, 0.8 / sum(float(tensor.abs().sum()) for tensor in alone))
        expected = [sum_ + factor * tensor for sum_, tensor in zip(expected, alone, strict=True)]
    found = one_at_a_time_l1(network, loss, records, make_rule("flat_l1", {"bound": 0.8})).gradient
    for one, other in zip(found.tensors, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=0)
    assert found.l1_bound == 0.8


def test_a_layer_with_two_names_is_counted_once():
    network = nn.Sequential(nn.Linear(3, 3, bias=False))
    network.decoder = network[0]
    network.forward = network[0].forward
    assert len(list(network.named_parameters(remove_duplicate=False))) == 2
    records = [Record(torch.ones(1, 3), None)]
    found = one_at_a_time_l1(network, lambda output, _: output.sum(), records, make_rule("flat_l1", {"bound": 9.0}))
    assert len(found.gradient.tensors) == 1
    assert float(found.gradient.tensors[0].sum()) == 9.0 * SAFETY  # clipped as if once: its L1 norm is 9


def test_zeroing_one_patient_moves_the_sum_by_no_more_than_the_bound_though_others_are_nasty():
    generator = torch.Generator().manual_seed(2)
    patients = [[torch.randn(500, generator=generator) * scale] for scale in (1e-12, 1.0, 1e12, float("nan"), 3.0)]
    rule = make_rule("flat_l1", {"bound": 0.7})
    everybody = total_of(patients, rule).gradient.tensors[0]
    for index in range(len(patients)):
        without = total_of(patients[:index] + patients[index + 1 :], rule).gradient.tensors[0]
        assert_l1_bounded([everybody - without], 0.7)


def test_the_count_knows_who_is_below_and_one_patient_moves_it_by_half():
    patients = [[torch.full((10,), size)] for size in (0.05, 0.09, 0.11, 7.0, float("nan"))]  # L1 norms: tenfold
    rule = make_rule("quantile_l1", {"bound": 1.0})
    clipped = total_of(patients, rule)
    assert clipped.count is not None and clipped.count.l2_bound == 0.5
    assert float(clipped.count.tensors[0]) == 2 / 2 - 3 / 2
    for index in range(5):
        fewer = total_of(patients[:index] + patients[index + 1 :], rule).count
        assert fewer is not None and abs(float(fewer.tensors[0] - clipped.count.tensors[0])) == 0.5


def test_the_threshold_rule_counts_l1_norms_and_not_l2_norms():
    patients = [[torch.full((100,), 0.05)]]  # L1 norm 5, L2 norm 0.5
    above, below = (total_of(patients, make_rule("quantile_l1", {"bound": bound})).count for bound in (1.0, 6.0))
    assert (float(above.tensors[0]), float(below.tensors[0])) == (-0.5, 0.5)


# ---- what never meets Laplace noise ------------------------------------------------------------------------------


@pytest.fixture
def pay(tmp_path):
    return Ledger(tmp_path / "privacy_ledger.jsonl", run="run", plan="0a").charge


def paid(pay, step: LaplaceStep, number: int = 0):
    return [pay(charge) for charge in step.charges(number)]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def zeros(size: int, bound: float, count: float | None = None) -> L1Clipped:
    centred = None if count is None else ClippedSum((torch.tensor([count], dtype=torch.float64),), 0.5)
    return L1Clipped(L1Bounded((torch.zeros(size, dtype=torch.float64),), bound), centred)


def test_a_sum_that_is_only_l2_bounded_is_refused_by_its_type(pay):
    network, records = nn.Linear(4, 1, bias=False), [Record(torch.ones(1, 4), None)]
    sum_ = one_at_a_time(network, lambda output, _: output.sum(), records, Flat(1.0))
    step = LaplaceStep(2.0)
    (receipt,) = paid(pay, step)
    for refused in (step.release, lambda value, receipts, generator: Laplace(2.0).release(value, *receipts, generator)):
        with pytest.raises(TypeError, match="L1"):
            refused(sum_, [receipt], seeded())
    step.release(zeros(1, 1.0), [receipt], seeded())  # nothing was spent


@pytest.mark.parametrize("name", RULE_NAMES)
def test_the_l1_engine_refuses_rules_that_bound_the_l2_norm(name):
    with pytest.raises(TypeError, match="should have an L1 rule"):
        total_of([[torch.ones(3)]], make_rule(name, RULES[name]))


def test_no_l1_rule_can_be_chosen_outside_federated_runs():
    assert not set(L1_RULES) & set(RULE_NAMES)


@pytest.mark.parametrize("name", L1_RULES)
def test_an_l1_rule_on_a_poisson_draw_is_refused(name):
    plan = PrivacyPlan(BUDGET, 5, 0.5, 3.0, 10, make_rule(name, {"bound": 1.0}))
    with pytest.raises(UsageRefusal, match=r"full batch, found 0\.5"):
        plan.verify()


def test_a_laplace_gradient_with_a_gaussian_count_on_one_draw_has_no_price():
    both = ComposedDpEvent([LaplaceDpEvent(3.0), GaussianDpEvent(6.0)])
    with pytest.raises(Refusal, match="use the full batch or a separate draw"):
        epsilon([PoissonSampledDpEvent(0.5, both)], 1e-5)


def test_a_count_and_its_mechanism_come_together_or_not_at_all(pay):
    lone, both = LaplaceStep(2.0), LaplaceStep(2.0, 5.0)
    with pytest.raises(Refusal, match="with two receipts"):
        lone.release(zeros(1, 1.0, count=0.5), paid(pay, lone), seeded())
    with pytest.raises(Refusal, match="with two receipts"):
        both.release(zeros(1, 1.0), paid(pay, both), seeded())
    with pytest.raises(Refusal, match="with two receipts"):
        both.release(zeros(1, 1.0, count=0.5), paid(pay, both)[:1], seeded())


def test_a_count_is_not_released_on_the_gradients_receipt(pay):
    both = LaplaceStep(2.0, 5.0)
    receipts = paid(pay, both)
    with pytest.raises(Refusal, match="should cost what was charged"):
        both.release(zeros(1, 1.0, count=0.5), [receipts[0], receipts[0]], seeded())


# ---- size of the noise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.03, 40.0])
def test_the_noise_of_the_gradient_is_laplace_of_b_times_the_bound(pay, bound):
    step = LaplaceStep(1.7)
    noised = step.release(zeros(20_000, bound), paid(pay, step), seeded())
    noise = noised.tensors[0].numpy()
    assert noised.noised_count is None and noised.l2_bound == bound
    assert kstest(noise, "laplace", args=(0, 1.7 * bound)).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert kstest(noise, "laplace", args=(0, wrong * 1.7 * bound)).pvalue < 1e-10


def test_the_noise_of_the_count_is_gaussian_of_its_own_size(pay):
    step, generator = LaplaceStep(1.0, 5.0), seeded()
    receipts = [pay(charge.model_copy(update={"count": 500})) for charge in step.charges(0)]
    counts = [step.release(zeros(1, 1.0, count=7.5), receipts, generator).noised_count for _ in range(500)]
    assert kstest(counts, "norm", args=(7.5, 5.0)).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert kstest(counts, "norm", args=(7.5, wrong * 5.0)).pvalue < 1e-4


# ---- price -------------------------------------------------------------------------------------------------------


def test_a_step_with_a_count_is_two_events_and_two_lines():
    step = LaplaceStep(3.0, 7.0)
    assert step.event == ComposedDpEvent([LaplaceDpEvent(3.0), GaussianDpEvent(14.0)])
    assert [charge.event for charge in step.charges(4)] == step.event.events
    assert [charge.purpose for charge in step.charges(4)] == ["training", "threshold"]
    assert LaplaceStep(3.0).event == LaplaceDpEvent(3.0) and len(LaplaceStep(3.0).charges(0)) == 1


def test_the_count_of_a_laplace_step_costs_more_than_none():
    steps = LaplaceStep(9.0), LaplaceStep(9.0, 18.0)
    prices = [epsilon([SelfComposedDpEvent(step.event, 20)], 1e-5) for step in steps]
    assert 1.005 * prices[0] < prices[1] < 1.1 * prices[0]  # about a sixteenth more of mu squared


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (5.0, 20), (30.0, 100)])
def test_the_epsilon_of_composed_laplace_steps_lies_between_an_optimistic_and_the_basic_one(noise, steps):
    plan = PrivacyPlan(BUDGET, steps, 1.0, noise, 10, make_rule("flat_l1", {"bound": 1.0}))
    coarse = {"value_discretization_interval": 1e-4, "use_connect_dots": False}
    optimistic = from_laplace_mechanism(noise, pessimistic_estimate=False, **coarse)
    lower = optimistic.self_compose(steps).get_epsilon_for_delta(BUDGET.delta)
    renyi = [(alpha, steps * laplace_renyi(alpha, noise)) for alpha in (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)]
    upper = min(divergence + math.log(1 / BUDGET.delta) / (alpha - 1) for alpha, divergence in renyi)
    assert lower <= plan.epsilon <= min(1.01 * steps / noise, upper)  # the grid rounds up, by a hundredth at T = 1
    assert plan.epsilon <= 1.01 * lower


def laplace_renyi(alpha: float, noise: float) -> float:
    """Renyi divergence of a Laplace release with L1 sensitivity 1: Mironov 2017, arXiv:1702.07476, corollary 2."""
    shift = 1 / noise
    first = math.log(alpha / (2 * alpha - 1)) + (alpha - 1) * shift
    second = math.log((alpha - 1) / (2 * alpha - 1)) - alpha * shift
    return (first + math.log1p(math.exp(second - first))) / (alpha - 1)


def test_plans_from_before_laplace_noise_keep_their_digest():
    plan = PrivacyPlan(PrivacyBudget(epsilon=60, delta=1e-5), 8, 0.5, 2.0, 10, make_rule("auto_s", RULES["auto_s"]))
    quantile = replace(plan, rule=make_rule("quantile", RULES["quantile"]))
    assert plan.digest() == "cf9368931bd9ac14f2151ae32d6b34ae178cd01d8d6cbef7a9f217fd6000a58f"
    assert quantile.digest() == "fbba50c0ff59f375f0da358d2b92edf53315087d78dd6ea9a9e22a752e72e13f"
    assert replace(plan, rule=make_rule("flat_l1", {"bound": 0.7})).digest() != replace(plan, rule=Flat(0.7)).digest()


def test_a_charge_for_a_count_can_be_read_back(pay, tmp_path):
    paid(pay, LaplaceStep(3.0, 7.0), 2)
    entries = Ledger(tmp_path / "privacy_ledger.jsonl", run="other", plan="0a").entries
    assert [Charge(**entry.model_dump(include=set(Charge.model_fields))) for entry in entries] == list(
        LaplaceStep(3.0, 7.0).charges(2)
    )
