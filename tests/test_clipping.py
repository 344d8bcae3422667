"""Clip rules keep their bound on every input, and their published formulas."""

from __future__ import annotations

import math

import pytest
import torch
from asserts import NASTY_SCALES, all_rules, assert_bounded
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_dp.clipping import RULE_NAMES, Flat, QuantileAdaptive, make_rule
from nnunet_dp.gradients import _add_scaled, group_norms

NAMES = ["conv.weight", "conv.bias", "head.weight"]


def contribution(rule, gradient):
    """What one patient adds to the sum, through the engine's own code."""
    total = [torch.zeros_like(g, dtype=torch.float64) for g in gradient]
    norms = group_norms(gradient, rule.groups(NAMES))
    if rule.usable(norms):
        _add_scaled(total, gradient, rule.factors(norms).tolist(), rule.groups(NAMES))
    return total


@pytest.mark.parametrize("rule", all_rules(), ids=RULE_NAMES)
@pytest.mark.parametrize("scale", NASTY_SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_patient_contributes_more_than_the_bound(rule, scale, dtype):
    generator = torch.Generator().manual_seed(1)
    gradient = [torch.randn(n, generator=generator, dtype=dtype) * scale for n in (200_000, 7, 30_000)]
    assert_bounded(contribution(rule, gradient), rule.bound)


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=3, max_size=3))
@settings(max_examples=200, deadline=None)
def test_no_three_numbers_break_the_bound(values):
    gradient = [torch.tensor([value], dtype=torch.float32) for value in values]
    for rule in all_rules():
        assert_bounded(contribution(rule, gradient), rule.bound)


def test_an_unsafe_factor_is_caught_by_the_bound_check():
    gradient = [torch.randn(340_000, generator=torch.Generator().manual_seed(0)), torch.zeros(1), torch.zeros(1)]
    exact = [g * (1.0001 / group_norms(gradient, (0, 0, 0)).item()) for g in gradient]
    with pytest.raises(AssertionError):
        assert_bounded(exact, 1.0)


@pytest.mark.parametrize(
    ("name", "constants", "norm", "factor"),
    [
        ("flat", {"bound": 2.0}, 1.0, 1.0),
        ("flat", {"bound": 2.0}, 8.0, 0.25),
        ("auto_v", {"bound": 2.0}, 0.5, 4.0),
        ("auto_s", {"bound": 1.0, "regulariser": 0.01}, 0.99, 1.0),
        ("nsgd", {"bound": 1.0, "regulariser": 0.5}, 1.5, 0.5),
        ("psac", {"bound": 1.0, "regulariser": 0.1}, 0.4, 1 / (0.4 + 0.1 / 0.5)),
        ("quantile", {"bound": 3.0}, 6.0, 0.5),
    ],
)
def test_factors_are_the_published_formulas(name, constants, norm, factor):
    found = make_rule(name, constants).factors(torch.tensor([norm], dtype=torch.float64)).item()
    assert found == pytest.approx(factor, rel=2e-5)
    assert found < factor  # the safety margin is on the right side


def test_auto_s_with_unit_bound_and_nsgd_are_one_map():
    norms = torch.logspace(-8, 8, 50, dtype=torch.float64)
    for n in norms:
        auto_s = make_rule("auto_s", {"bound": 1.0, "regulariser": 0.03}).factors(n[None])
        assert torch.equal(auto_s, make_rule("nsgd", {"regulariser": 0.03}).factors(n[None]))


def test_psac_contribution_rises_monotonically_though_its_factor_peaks():
    rule = make_rule("psac", {"bound": 1.0, "regulariser": 0.1})
    norms = torch.logspace(-4, 4, 400, dtype=torch.float64)
    factors = torch.cat([rule.factors(n[None]) for n in norms])
    assert (torch.diff(factors * norms) > 0).all()
    assert norms[factors.argmax()].item() == pytest.approx(math.sqrt(0.1) - 0.1, rel=0.05)


def test_nsgd_refuses_a_bound_other_than_one():
    with pytest.raises(ValueError, match="bound 1"):
        make_rule("nsgd", {"bound": 0.01, "regulariser": 0.01})


def test_per_layer_groups_weight_and_bias_of_a_module():
    assert make_rule("per_layer", {"bound": 1.0}).groups(NAMES) == (0, 0, 1)


@pytest.mark.parametrize("start", [0.01, 100.0])
def test_the_quantile_rule_converges_to_its_quantile_from_a_hundredfold_away(start):
    generator = torch.Generator().manual_seed(3)
    norms = torch.exp(torch.randn(200, generator=generator, dtype=torch.float64))  # median 1
    rule = QuantileAdaptive(bound=start * norms.median().item())
    for _ in range(150):
        count = sum(rule.centred_indicator(n.item()) for n in norms)
        noise = 20 * torch.randn((), generator=generator).item()  # sigma_b = B / 10
        rule = rule.updated(count + noise, expected_batch=200)
    assert (norms <= rule.bound).double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_the_quantile_rule_stays_inside_its_public_range():
    rule = QuantileAdaptive(bound=1.0, smallest_bound=0.5, largest_bound=2.0)
    assert rule.updated(1e9, 1.0).bound == 0.5
    assert rule.updated(-1e9, 1.0).bound == 2.0


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_bounds_nothing_is_refused(bound):
    with pytest.raises(ValueError, match="positive finite"):
        make_rule("flat", {"bound": bound})


@pytest.mark.parametrize("name", ["auto_s", "psac", "nsgd"])
@pytest.mark.parametrize("regulariser", [0.0, -0.5, math.nan, math.inf])
def test_a_regulariser_that_breaks_the_bound_is_refused(name, regulariser):
    with pytest.raises(ValueError, match="positive finite"):
        make_rule(name, {"bound": 1.0, "regulariser": regulariser})


def test_a_formula_that_lies_cannot_break_the_bound():
    class Liar(Flat):
        def _factors(self, norms):
            return 1e6 / norms

    gradient = [torch.randn(1000), torch.randn(7), torch.randn(30)]
    assert_bounded(contribution(Liar(1.0), gradient), 1.0)


def test_an_unknown_rule_is_refused_by_name():
    with pytest.raises(ValueError, match="percentile"):
        make_rule("percentile", {"bound": 1.0})
