"""The verdict: better with more budget, patients, fewer parameters and a public start, and of the plan as it stands."""

import math

import numpy as np
import pytest

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.outlook import Outlook, outlook, planned_signal_to_noise
from nnunet_dp.planning import plan_configuration, signal_to_noise
from nnunet_dp.sections import ByHand, ConfigurationPlan

ORDER = ["hopeless", "doubtful", "comfortable"]


def plan(epsilon=1.0, patients=136, parameters=340_000, share=0.0, **by_hand) -> ConfigurationPlan:
    """Without a release for refinement, unless it gets a share: all of the budget to the training."""
    return plan_configuration(
        PrivacyBudget(epsilon=epsilon, delta=1e-5), round(patients / 0.8), (64, 64), [[1, 1]] * 3,
        lambda shape: parameters, "full", morphology_share=share, by_hand=ByHand(**by_hand),
    )  # fmt: skip


def expect(start=False, patients=136, **options) -> Outlook:
    return outlook(plan(patients=patients, **options), patients, start)


def verdict(**options) -> int:
    return ORDER.index(expect(**options).verdict)


@pytest.mark.parametrize(
    "better", [{"epsilon": 8.0}, {"patients": 1600}, {"parameters": 30_000}, {"start": True}], ids=str
)
def test_what_helps_never_worsens_the_verdict(better):
    for epsilon in (0.5, 1.0, 3.0):
        assert verdict(**{"epsilon": epsilon, **better}) >= verdict(epsilon=epsilon)


def test_the_usual_cases_span_all_verdicts():
    assert verdict(epsilon=0.5, patients=24) == 0 and verdict() == 1 and verdict(epsilon=8.0) == 2


def test_whoever_has_too_little_is_told_what_to_do():
    assert "public start" in expect(epsilon=0.5, patients=24).next_step
    assert "training patients" in expect(epsilon=0.5, patients=24, start=True).next_step
    assert expect(epsilon=8.0, patients=1600, parameters=480_000, start=True).next_step == "train"


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_at_full_batch_the_number_is_the_one_that_the_rules_choose_steps_by(epsilon):
    found = planned_signal_to_noise(plan(epsilon), 136)
    assert found == pytest.approx(signal_to_noise(PrivacyBudget(epsilon=epsilon, delta=1e-5), 136, 340_000), rel=0.01)


def test_the_number_is_what_a_simulated_descent_shows():
    planned = plan(8.0, parameters=2_000, sampling_probability=0.3, steps=40)
    scale = planned.noise_multiplier / (planned.sampling_probability * 136)
    walk = np.random.default_rng(0).normal(0, scale, (40, 2_000)).sum(0)
    assert planned_signal_to_noise(planned, 136) == pytest.approx(40 / np.linalg.norm(walk), rel=0.1)


def test_sampling_set_by_hand_counts_in_the_number():
    """A draw of few patients needs a noise that no longer shrinks with it: the verdict may not be the full batch's."""
    usual, sparse = expect(epsilon=8.0), expect(epsilon=8.0, sampling_probability=0.02)
    assert sparse.signal_to_noise < 0.7 * usual.signal_to_noise
    assert math.isclose(usual.signal_to_noise, expect(epsilon=8.0, steps=10).signal_to_noise, rel_tol=0.01)


def test_what_refinement_learns_leaves_less_signal():
    assert expect(epsilon=8.0, share=0.3).signal_to_noise < 0.9 * expect(epsilon=8.0).signal_to_noise


def test_a_schedule_set_by_hand_is_named_in_the_reason():
    assert "steps set by hand" in expect(steps=1).reason
    assert "sampling_probability, learning_rate set by hand" in expect(
        learning_rate=0.5, sampling_probability=0.9
    ).reason  # fmt: skip
    for same_schedule in ({}, {"patches_per_patient": 2}):
        assert "by hand" not in expect(**same_schedule).reason
