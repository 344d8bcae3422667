"""The audit's checks on the real training: what they compute, whom they catch, whom they pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import stats

from nnunet_dp.audit import builds, checks
from nnunet_dp.audit.builds import CORRECT, FAULTS, Build, Subject, correct_builds
from nnunet_dp.audit.canaries import Canary, released_by_step, run_canaries, weights_of
from nnunet_dp.audit.checks import TESTS, Finding, Sizes, draw_p_values, examine, variance_p_value
from nnunet_dp.errors import Refusal
from nnunet_dp.gradients import trainable
from nnunet_dp.mechanisms import _with_gaussian
from nnunet_dp.sampling import poisson_draw

LEVEL = 1e-5
SMALL = Sizes(canaries=96, canary_steps=3, patients=3, draws=16, noise_steps=2, voters=12, votes=60)
CAUGHT_BY = {
    "no_noise": {"noise_variance", "canaries_one_run", "canaries_gaussian", "morphology_noise"},
    "wrong_sensitivity": {"noise_variance", "canaries_one_run", "canaries_gaussian"},
    "contribution_above_bound": {"influence"},
    "shuffled_batches": {"batch_size_variance", "participation"},
    "batch_dice": {"coupling"},
    "data_dependent_noise": {"noise_variance"},
    "undercharged_ledger": {"ledger_recount"},
    "morphology_without_noise": {"morphology_noise", "morphology_claim"},
    "repeated_noise": {"noise_independence", "batch_size_variance", "participation"},
    "realised_batch": {"noise_variance", "influence", "coupling"},
}


CHECKED_BY = {
    "noise": checks._noise,
    "batch": checks._draws,
    "participation": checks._draws,
    "influence": checks._influence,
    "coupling": checks._influence,
    "ledger": checks._draws,
    "canaries": checks._canaries,
    "morphology": checks._morphology,
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def caught(build: Build, *functions: Callable[..., Iterator[Finding]]) -> set[str]:
    """Names of the checks that fail, out of those functions or of all."""
    if not functions:
        return {finding.check for finding in examine(Subject("ff", build), SMALL, LEVEL, 3) if finding.failed}
    subject, found = Subject("ff", build), set()
    for function in functions:
        with TemporaryDirectory() as folder, subject.active():
            found |= {one.check for one in function(subject, Path(folder), SMALL, LEVEL, 3) if one.failed}
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_is_caught_by_the_checks_that_the_table_names(fault):
    wanted = CAUGHT_BY[fault.name]
    assert wanted <= caught(fault, *{CHECKED_BY[name.split("_")[0]] for name in wanted})


@pytest.mark.parametrize("build", correct_builds(7)[::3], ids=lambda build: f"{build.rule}-{build.batched}")
def test_the_correct_build_passes(build):
    assert caught(build) == set()


def test_a_build_that_refuses_to_work_is_caught_and_not_a_crash_of_the_audit():
    def refuse(*_):
        raise Refusal("this build takes no step")

    broken = replace(CORRECT, inject=lambda: mock.patch.object(builds.PrivateTraining, "advance", refuse))
    findings = examine(Subject("ff", broken), replace(SMALL, votes=2), LEVEL, 3)
    stopped = [finding for finding in findings if finding.check == "stopped"]
    assert len(stopped) == 4 and "takes no step" in stopped[0].found and all(one.failed for one in stopped)


@pytest.mark.parametrize("factor", [0.85, 1.15])
def test_noise_that_is_15_percent_off_is_caught(factor):
    broken = replace(CORRECT, inject=partial(builds._noise_times, lambda: factor))
    assert "noise_variance" in caught(broken, checks._noise)


def test_a_fault_is_gone_when_its_build_is_done():
    right = builds.mechanisms._with_gaussian
    for fault in FAULTS:
        with Subject("a", fault).active():
            pass
    assert builds.mechanisms._with_gaussian is right is _with_gaussian
    assert builds.dpsgd.poisson_draw is poisson_draw


def test_an_examination_gives_as_many_answers_of_chance_as_the_correction_counts():
    findings = examine(Subject("ff", CORRECT), SMALL, LEVEL, 1)
    by_chance = [one for one in findings if one.p_value is not None or one.kind == "statistical"]
    assert len(by_chance) == TESTS


def test_a_subject_shows_nothing_of_its_build():
    public = {name for name in dir(Subject("ff", FAULTS[0])) if not name.startswith("_")}
    assert public == {"active", "label", "learn", "plan", "training"}


# ---- canaries --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinate", [0, 17, 400, None])
def test_a_canarys_gradient_is_what_it_says(tmp_path, coordinate):
    subject = Subject("ff", CORRECT)
    training = subject.training(tmp_path, subject.plan(1, 1.0, 2, SMALL.budget), seed=1)
    parameters = trainable(training.network)[1]
    loss = Canary(coordinate, 5.0).loss(parameters)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = torch.cat([
        torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, gradients, strict=True)
    ])  # fmt: skip
    expected = torch.full_like(flat, 5.0) if coordinate is None else torch.zeros_like(flat)
    if coordinate is not None:
        expected[coordinate] = 5.0
    assert torch.equal(flat, expected)


def test_what_is_read_from_the_weights_is_what_was_released(tmp_path):
    subject = Subject("ff", FAULTS[0])  # no noise: the canary stands alone
    with subject.active():
        training = subject.training(tmp_path, subject.plan(1, 1.0, 5, SMALL.budget), seed=1)
        record = Canary(123).record(builds.phantom_record(1, 0).data)
        found = released_by_step(training, lambda *_: [record])
    expected = torch.zeros_like(weights_of(training.network))
    expected[123] = 1.0
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_measured_noise_is_the_planned_one_and_the_ledgers_line_grows(tmp_path):
    subject = Subject("ff", CORRECT)
    patients = [builds.phantom_record(1, k) for k in range(2)]
    training = subject.training(tmp_path, subject.plan(4, 1.0, 52, SMALL.budget), seed=1)
    run = run_canaries(training, patients, 50, np.random.default_rng(1))
    assert all(0.85 < value < 1.15 for value in run.noise)
    assert list(run.ledger_epsilon) == sorted(run.ledger_epsilon) and run.ledger_epsilon[-1] <= 1
    report = run.as_dict(0.95)
    assert len(report["empirical_epsilon_gaussian"]) == 4 and report["one_run"]["canaries"] == 50


# ---- statistics of the trace checks ----------------------------------------------------------------------------------


def draws(steps: int, slots: int, probability: float, draw: Callable[..., list[int]]) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    return np.array([np.isin(np.arange(slots), draw(slots, probability, generator)) for _ in range(steps)])


def test_the_p_values_of_poisson_draws_are_uniform_and_those_of_other_draws_are_not():
    rng = np.random.default_rng(2)
    found: dict[str, list[float]] = {}
    for _ in range(400):
        taken = rng.random((40, 200)) < 0.25
        for number, (_, p_value, _) in enumerate(draw_p_values(taken, 0.25)):
            found.setdefault(str(number), []).append(p_value)
    for values in found.values():
        assert np.mean(np.array(values) < 0.05) < 0.09
    wrong = [value for _, value, _ in draw_p_values(rng.random((40, 200)) < 0.3, 0.25)]
    assert min(wrong) < 1e-5


def test_the_packages_own_draws_pass_and_fixed_sizes_do_not():
    assert min(p for _, p, _ in draw_p_values(draws(60, 100, 0.3, poisson_draw), 0.3)) > 1e-4
    fixed = draws(60, 100, 0.3, lambda slots, q, _: np.random.default_rng().permutation(slots)[: int(slots * q)])
    assert min(p for _, p, _ in draw_p_values(fixed, 0.3)) < 1e-10


def test_the_p_value_of_the_variance_is_uniform_and_rejects_another_variance():
    rng = np.random.default_rng(3)
    values = [variance_p_value(rng.normal(size=300)) for _ in range(400)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert variance_p_value(rng.normal(scale=0.8, size=300)) < 1e-3
    assert variance_p_value(rng.normal(scale=1.25, size=300)) < 1e-3


def test_the_shape_of_laplace_noise_is_not_gaussian():
    noise = np.random.default_rng(4).laplace(scale=2**-0.5, size=2400)
    assert checks._shape_p_value(noise) < 1e-5
