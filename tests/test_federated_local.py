"""A site's local steps: the plan is calibrated, the threshold follows its percentile, and crashes change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.stats import kstest
from torch import nn

from nnunet_dp import dpsgd
from nnunet_dp.accounting import PrivacyBudget, z_delta
from nnunet_dp.charges import TRAINING, LedgerError, epsilon_of, steps_done
from nnunet_dp.clipping import ClipRule, QuantileAdaptive
from nnunet_dp.dpsgd import Execution, PrivacyPlan, PrivateTraining
from nnunet_dp.errors import BudgetRefusal, Refusal
from nnunet_dp.federated import local_no_guarantee
from nnunet_dp.federated.local import ADAPTATION, first_rule, make_training, private_plan, schedule_of
from nnunet_dp.federated.local_no_guarantee import NO_GUARANTEE, NoGuaranteeTraining
from nnunet_dp.federated.protocol import Terms
from nnunet_dp.gradients import Record, one_at_a_time, trainable
from nnunet_dp.l1_clipping import THRESHOLD, L1Clipped, LaplaceStep
from nnunet_dp.ledger import Ledger, read_ledger
from nnunet_dp.mechanisms import ClippedSum, GaussianWithCount, L1Bounded, SubsampledGaussian
from nnunet_dp.run import LEDGER

BUDGET = PrivacyBudget(epsilon=8, delta=1e-5)
PRIVATE = [("dp-fedavg", "gaussian"), ("dp-fedavg", "laplace"), ("adp-fl", "gaussian"), ("adp-fl", "laplace")]
WITHOUT = [("fedavg", "gaussian"), ("paper", "gaussian"), ("paper", "laplace")]


def asked(mode: str = "adp-fl", noise: str = "gaussian", **fields) -> Terms:
    usual = {"run": "0a", "epsilon": 8.0, "rounds": 4, "local_steps": 2, "configuration": "2d", "plans_sha256": "0"}
    return Terms(mode=mode, noise=noise, **(usual | fields))


def weights_at_zero(width: int = 4) -> nn.Module:
    network = nn.Linear(width, 1, bias=False)
    nn.init.zeros_(network.weight)
    return network


def pull(output, target):
    """A loss whose gradient is target * data, whatever the weights are."""
    return (output * target).mean()


def start(folder: Path, terms: Terms, units: int = 20, width: int = 4, plan: PrivacyPlan | None = None):
    plan = plan or private_plan(terms, units, BUDGET)
    ledger = Ledger(folder / LEDGER, terms.run, plan.digest()) if terms.private else None
    return make_training(terms, weights_at_zero(width), pull, plan, schedule_of(terms), Execution(), ledger)


def alike(step, drawn):
    """Every drawn patient pulls the first weight up, with a gradient of norm 1."""
    return [Record(torch.tensor([[1.0, 0, 0, 0]]), -torch.ones(1, 1)) for _ in drawn]


def nobody(step, drawn):
    return []


def weights(training) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainable(training.network)[1]]).clone()


# ---- from terms to a plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "noise"), PRIVATE)
def test_all_steps_of_the_terms_together_cost_the_budget_and_hardly_less(tmp_path, mode, noise):
    terms = asked(mode, noise, rounds=3)
    training = start(tmp_path, terms)
    while not training.finished:
        training.advance(alike)
    spent = epsilon_of(read_ledger(tmp_path / LEDGER), BUDGET.delta)
    assert spent == pytest.approx(training.plan.epsilon) and training.step == 6
    assert 0.98 * BUDGET.epsilon <= spent <= BUDGET.epsilon


def test_a_sampled_round_needs_less_noise_than_a_full_one():
    noises = [private_plan(asked(sampling_probability=q), 20, BUDGET).noise_multiplier for q in (0.2, 1.0)]
    assert noises[0] < 0.7 * noises[1]


def test_the_noise_of_adaptive_laplace_pays_for_its_count():
    flat, adaptive = (private_plan(asked(mode, "laplace"), 20, BUDGET) for mode in ("dp-fedavg", "adp-fl"))
    assert 1.01 * flat.noise_multiplier < adaptive.noise_multiplier < 1.3 * flat.noise_multiplier


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
def test_the_rule_has_the_terms_percentile_and_first_threshold(noise):
    rule = first_rule(asked(noise=noise, percentile=90, bound=3.0))
    assert isinstance(rule, QuantileAdaptive)
    assert (rule.target_quantile, rule.bound, rule.learning_rate) == (0.9, 3.0, ADAPTATION)
    assert rule.order == (1 if noise == "laplace" else 2)


@pytest.mark.parametrize("change", [{"rounds": 5}, {"percentile": 60}, {"bound": 2.0}, {"mode": "dp-fedavg"}])
def test_a_plan_of_other_terms_is_refused(tmp_path, change):
    with pytest.raises(Refusal, match="should be those of the terms"):
        start(tmp_path, asked(**{"mode": "adp-fl"} | change), plan=private_plan(asked(), 20, BUDGET))


def test_a_plan_for_laplace_that_forgot_its_count_is_refused(tmp_path):
    terms = asked("adp-fl", "laplace")
    forgot = private_plan(asked("dp-fedavg", "laplace"), 20, BUDGET).noise_multiplier
    plan = PrivacyPlan(BUDGET, terms.steps, 1.0, forgot, 20, first_rule(terms))
    with pytest.raises(BudgetRefusal, match="its target is 8"):
        start(tmp_path, terms, plan=plan)


def test_a_private_mode_without_a_ledger_is_refused():
    plan = private_plan(asked(), 20, BUDGET)
    with pytest.raises(Refusal, match="open the site's ledger"):
        make_training(asked(), weights_at_zero(), pull, plan, schedule_of(asked()), Execution(), None)


# ---- what private steps release ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dp-fedavg", "adp-fl"])
def test_laplace_training_adds_laplace_noise_of_b_over_the_expected_batch(tmp_path, mode):
    terms = asked(mode, "laplace", bound=0.2, learning_rate=0.5)
    training = start(tmp_path, terms, width=20_000)
    training.advance(nobody)
    noise, scale = (weights(training) / -0.5).double().numpy(), training.plan.noise_multiplier / 20
    assert kstest(noise, "laplace", args=(0, scale)).pvalue > 1e-5
    for wrong in (2 / 3, 3 / 2):
        assert kstest(noise, "laplace", args=(0, wrong * scale)).pvalue < 1e-9


@pytest.mark.parametrize(("mode", "noise"), [*PRIVATE, ("paper", "gaussian")])
def test_two_draws_of_different_size_have_the_same_divisor(tmp_path, monkeypatch, mode, noise):
    terms = asked(mode, noise, learning_rate=1.0, decay_power=0.0, bound=2.0)
    training, module = start(tmp_path, terms, units=2000), local_no_guarantee if mode == "paper" else dpsgd
    moved = []
    for size in (2000, 500):
        before = weights(training)[0]
        bound = training.rule.bound if mode != "paper" else 1.0
        monkeypatch.setattr(module, "poisson_draw", lambda *_, size=size: list(range(size)))
        training.advance(alike)
        moved.append(float(weights(training)[0] - before) * bound)
    assert moved == pytest.approx([1.0, 0.25], abs=0.06)


def test_the_count_shares_the_gradients_draw_and_its_price_is_that_of_one_gaussian(tmp_path):
    terms = asked(sampling_probability=0.5)
    plan = private_plan(terms, 400, BUDGET)
    mechanism = plan.mechanism
    assert isinstance(mechanism, GaussianWithCount)
    assert mechanism.event == SubsampledGaussian(plan.noise_multiplier, 0.5).event
    seen: list[tuple[int, float | None]] = []

    def spying(network, loss, records, rule, autocast, watch):
        records = list(records)
        clipped = one_at_a_time(network, loss, records, rule, autocast, watch)
        seen.append((len(records), clipped.centred_count))
        return clipped

    ledger = Ledger(tmp_path / LEDGER, "0a", plan.digest())
    execution = Execution(engine=spying)
    training = make_training(terms, weights_at_zero(), pull, plan, schedule_of(terms), execution, ledger)
    for _ in range(3):
        training.advance(lambda step, drawn: [Record(0.01 * r.data, r.target) for r in alike(step, drawn)])
    assert all(count == size / 2 for size, count in seen) and len(set(seen)) > 1
    assert [entry.event for entry in read_ledger(tmp_path / LEDGER)] == [mechanism.event] * 3


def test_the_gradient_beside_the_count_carries_the_larger_noise_that_pays_for_it(tmp_path):
    terms = asked(learning_rate=0.5, bound=0.2)
    training = start(tmp_path, terms, width=20_000)
    training.advance(nobody)
    mechanism = training.plan.mechanism
    scale = z_delta(mechanism.noise_multiplier, mechanism.count_noise) / 20
    noise = (weights(training) / -0.5).double().numpy()
    assert kstest(noise, "norm", args=(0, scale)).pvalue > 1e-5
    assert kstest(noise, "norm", args=(0, 1.5 * scale)).pvalue < 1e-9


def test_adaptive_laplace_writes_a_line_for_the_gradient_and_one_for_the_count_before_anybody_is_read(tmp_path):
    training, lines = start(tmp_path, asked("adp-fl", "laplace")), []
    expected = [charge.purpose for charge in training.next_charges]
    for _ in range(2):
        training.advance(lambda step, drawn: lines.append(len(read_ledger(tmp_path / LEDGER))) or [])
    entries = read_ledger(tmp_path / LEDGER)
    assert lines == [2, 4] and expected == [TRAINING, THRESHOLD]
    assert [entry.purpose for entry in entries] == 2 * expected and steps_done(entries) == 2


@pytest.mark.parametrize(("mode", "noise"), PRIVATE)
def test_no_private_training_takes_a_step_beyond_its_plan(tmp_path, mode, noise):
    training = start(tmp_path, asked(mode, noise, rounds=1))
    while not training.finished:
        training.advance(alike)
    lines, before = len(read_ledger(tmp_path / LEDGER)), weights(training)
    with pytest.raises(BudgetRefusal, match="all 2 planned releases"):
        training.advance(alike)
    assert len(read_ledger(tmp_path / LEDGER)) == lines and torch.equal(weights(training), before)


# ---- the threshold -----------------------------------------------------------------------------------------------


def steps_to_settle(percentile: float) -> int:
    """A hundredfold way at full speed towards the nearer end, and half as much again and 50 steps to settle."""
    share = percentile / 100
    return math.ceil(1.5 * math.log(100) / (ADAPTATION * min(share, 1 - share))) + 50


def lognormal_norms(units: int) -> torch.Tensor:
    return torch.exp(torch.randn(units, generator=torch.Generator().manual_seed(3), dtype=torch.float64))


def noised_counts(folder: Path, plan: PrivacyPlan, steps: int) -> Callable[[QuantileAdaptive, float], float]:
    """The count as the plan's mechanism releases it, against receipts of a real ledger."""
    mechanism, generator = plan.mechanism, torch.Generator().manual_seed(5)
    pay = Ledger(folder / LEDGER, "run", plan.digest()).charge
    if isinstance(mechanism, LaplaceStep):
        receipts = [pay(charge.model_copy(update={"count": steps})) for charge in mechanism.charges(0)]
    else:
        receipts = [pay(mechanism.charge(TRAINING, 0, count=steps))]

    def release(rule: QuantileAdaptive, count: float) -> float:
        nothing = (torch.zeros(1, dtype=torch.float64),)
        if isinstance(mechanism, LaplaceStep):
            centred = ClippedSum((torch.tensor([count], dtype=torch.float64),), 0.5)
            clipped = L1Clipped(L1Bounded(nothing, rule.bound), centred)
            return mechanism.release(clipped, receipts, generator).noised_count
        return mechanism.release(ClippedSum(nothing, rule.bound, count), receipts[0], generator).noised_count

    return release


def share_below_in_the_end(
    folder: Path, percentile: float, factor: float, noise: str = "gaussian", update=QuantileAdaptive.updated
) -> float:
    """Share of the norms below the threshold, averaged over the last 40 steps of the stated number."""
    norms, steps = lognormal_norms(200), steps_to_settle(percentile)
    first = factor * float(norms.quantile(percentile / 100))
    terms = asked(noise=noise, percentile=percentile, bound=first)
    rule = first_rule(terms)
    plan = PrivacyPlan(BUDGET, steps, 1.0, 8.0, 200, rule)  # noise of 20 patients on the count
    release, shares = noised_counts(folder, plan, steps), []
    for _ in range(steps):
        count = sum(rule.centred_indicator(norm) for norm in norms.tolist())
        rule = update(rule, release(rule, count), plan.expected_batch)
        shares.append(float((norms <= rule.bound).double().mean()))
    return sum(shares[-40:]) / 40


@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
@pytest.mark.parametrize("factor", [0.01, 100.0])
@pytest.mark.parametrize("percentile", [25, 50, 90])
def test_the_threshold_reaches_its_percentile_from_a_hundredfold_away(tmp_path, percentile, factor, noise):
    assert share_below_in_the_end(tmp_path, percentile, factor, noise) == pytest.approx(percentile / 100, abs=0.08)


def inverted(rule: QuantileAdaptive, noised_count: float, expected_batch: float) -> ClipRule:
    """The sign that Flower's adaptive clipping has."""
    return type(rule)(
        rule.bound * rule.bound / rule.updated(noised_count, expected_batch).bound,
        target_quantile=rule.target_quantile,
        learning_rate=rule.learning_rate,
    )


@pytest.mark.parametrize("factor", [0.01, 100.0])
@pytest.mark.parametrize("percentile", [25, 50, 90])
def test_the_inverted_sign_runs_away_and_fails_the_same_test(tmp_path, percentile, factor):
    try:
        share = share_below_in_the_end(tmp_path, percentile, factor, update=inverted)
    except (ValueError, OverflowError):  # it ran out of the floating-point numbers
        return
    assert share == pytest.approx(0.0 if factor < 1 else 1.0, abs=0.01)
    assert share != pytest.approx(percentile / 100, abs=0.08)


def test_the_threshold_of_a_whole_training_follows_the_norms(tmp_path):
    terms = asked(rounds=40, local_steps=1, bound=20.0)
    plan = PrivacyPlan(PrivacyBudget(epsilon=60, delta=1e-5), 40, 1.0, 3.0, 60, first_rule(terms))
    training, norms = start(tmp_path, terms, plan=plan), lognormal_norms(60)
    data = [Record(torch.tensor([[float(norm), 0, 0, 0]]), torch.ones(1, 1)) for norm in norms]
    while not training.finished:
        training.advance(lambda step, drawn: [data[index] for index in drawn])
    assert 0.3 < float((norms <= training.rule.bound).double().mean()) < 0.85


# ---- without a guarantee -----------------------------------------------------------------------------------------


def test_federated_averaging_equals_torchs_own_descent_on_the_mean_loss(tmp_path):
    torch.manual_seed(1)
    data, target = torch.randn(20, 1, 4), torch.randn(20, 1, 1)
    terms = asked("fedavg", momentum=0.9, learning_rate=0.05)
    training, other = start(tmp_path, terms), weights_at_zero()
    optimizer = torch.optim.SGD(other.parameters(), 0.05, momentum=0.9, nesterov=True)
    for step in range(5):
        training.advance(lambda _, drawn: [Record(data[index], target[index]) for index in drawn])
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 8) ** 0.9
        optimizer.zero_grad()
        torch.stack([pull(other(x), y) for x, y in zip(data, target, strict=True)]).mean().backward()
        optimizer.step()
    torch.testing.assert_close(weights(training), other.weight.detach().flatten())


def test_federated_averaging_divides_by_the_drawn_and_leaves_out_what_is_not_finite(tmp_path, monkeypatch):
    training = start(tmp_path, asked("fedavg", learning_rate=1.0))
    monkeypatch.setattr(local_no_guarantee, "poisson_draw", lambda *_: [0, 1, 2])
    lost = Record(torch.full((1, 4), float("nan")), torch.ones(1, 1))
    training.advance(lambda step, drawn: [*alike(step, drawn[1:]), lost])
    assert float(weights(training)[0]) == pytest.approx(1.0)


def test_a_mean_gradient_is_shortened_as_nnunet_does(tmp_path):
    training = start(tmp_path, asked("fedavg", learning_rate=1.0))
    training.advance(lambda step, drawn: [Record(1e3 * record.data, record.target) for record in alike(step, drawn)])
    assert float(weights(training).norm()) == pytest.approx(12.0)


@pytest.mark.parametrize(("mode", "noise"), WITHOUT)
def test_what_has_no_guarantee_says_so_and_touches_no_ledger(tmp_path, mode, noise):
    training = start(tmp_path, asked(mode, noise, rounds=1))
    while not training.finished:
        training.advance(alike)
    assert isinstance(training, NoGuaranteeTraining) and not training.private
    assert training.guarantee == NO_GUARANTEE == "no guarantee"
    assert not list(tmp_path.iterdir()) and not training.next_charges
    assert all(isinstance(start(tmp_path, asked(*kind)), PrivateTraining) for kind in PRIVATE)


@pytest.mark.parametrize(("mode", "noise"), WITHOUT)
def test_no_training_without_a_guarantee_takes_a_step_beyond_its_plan_either(tmp_path, mode, noise):
    training = start(tmp_path, asked(mode, noise, rounds=1))
    for _ in range(2):
        training.advance(alike)
    with pytest.raises(BudgetRefusal, match="all 2 planned steps"):
        training.advance(alike)


def test_the_papers_bound_is_the_raw_percentile_which_one_patient_moves_without_limit(tmp_path):
    def of_norms(*norms):
        return lambda *_: [Record(torch.tensor([[norm, 0, 0, 0]]), torch.ones(1, 1)) for norm in norms]

    training = start(tmp_path, asked("paper", percentile=50), units=3)
    training.advance(of_norms(1.0, 2.0, 1e6))
    assert training.rule.bound == pytest.approx(2.0)
    training.advance(of_norms(1.0, 1e6, 1e6))
    assert training.rule.bound == pytest.approx(1e6)
    training.advance(nobody)
    assert training.rule.bound == pytest.approx(1e6)


@pytest.mark.parametrize(("noise", "shape"), [("gaussian", "norm"), ("laplace", "laplace")])
def test_the_papers_noise_is_in_proportion_to_the_raw_bound(tmp_path, noise, shape):
    terms, width = asked("paper", noise, learning_rate=1.0), 20_000
    training = start(tmp_path, terms, width=width)
    data = torch.zeros(1, width)
    data[0, 0] = 5.0
    training.advance(lambda step, drawn: [Record(data, torch.ones(1, 1)) for _ in drawn])
    assert training.rule.bound == pytest.approx(5.0)
    released = -weights(training)[1:].double().numpy() * 20 * 5.0  # the noised sum, all of it noise here
    scale = training.plan.noise_multiplier * 5.0
    assert kstest(released, shape, args=(0, scale)).pvalue > 1e-5
    assert kstest(released, shape, args=(0, 1.5 * scale)).pvalue < 1e-9


# ---- crash and restore -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "noise"), [*PRIVATE, *WITHOUT])
def test_threshold_momentum_and_step_survive_a_crash(tmp_path, mode, noise):
    terms = asked(mode, noise, momentum=0.9, bound=3.0)
    plan = private_plan(terms, 20, BUDGET)
    died = start(tmp_path, terms, plan=plan)
    died.saved(died.next_state("data"))
    for _ in range(3):
        died.advance(alike)
    state = died.next_state("data")
    died.saved(state)
    alive = start(tmp_path, terms, plan=plan)
    alive.restore(state, "data")
    momenta = [training.optimizer.state_dict()["state"][0]["momentum_buffer"] for training in (died, alive)]
    assert torch.equal(*momenta) and (momenta[0] != 0).any()
    assert (alive.rule, alive.step, alive.checkpoint) == (died.rule, 3, state["id"])
    assert torch.equal(weights(alive), weights(died))
    assert (alive.rule != plan.rule) == (mode in ("adp-fl", "paper"))
    alive.advance(alike)
    assert alive.step == 4


def test_a_crash_between_the_two_charges_of_a_step_shortens_the_run_by_one_step(tmp_path):
    terms = asked("adp-fl", "laplace", rounds=1, local_steps=3)
    training = start(tmp_path, terms)
    state = training.next_state("data")
    training.saved(state)
    training.ledger.charge(training.next_charges[0], training.checkpoint)  # and here it dies
    again = start(tmp_path, terms)
    again.restore(state, "data")
    while not again.finished:
        again.advance(alike)
    purposes = [entry.purpose for entry in read_ledger(tmp_path / LEDGER)]
    assert again.step == 2 and (purposes.count(TRAINING), purposes.count(THRESHOLD)) == (3, 2)


def test_a_count_that_no_step_of_the_ledger_goes_with_stops_the_run(tmp_path):
    training = start(tmp_path, asked("adp-fl", "laplace"))
    training.ledger.charge(training.next_charges[1])
    with pytest.raises(Refusal, match="its plan does not know"):
        training.advance(alike)


def test_a_charge_for_a_count_stops_a_run_whose_plan_has_none(tmp_path):
    training = start(tmp_path, asked("dp-fedavg", "laplace"))
    training.ledger.charge(LaplaceStep(3.0, 6.0).charges(0)[1])
    with pytest.raises(Refusal, match="its plan does not know"):
        training.advance(alike)


@pytest.mark.parametrize(("mode", "noise"), WITHOUT[:2])
def test_without_a_guarantee_too_a_state_of_another_kind_is_refused(tmp_path, mode, noise):
    terms = asked(mode, noise)
    training = start(tmp_path, terms)
    state = training.next_state("data")
    private = start(tmp_path, asked("dp-fedavg")).next_state("data")
    for found, data in ((state, "other data"), (private, "data"), (state | {"plan": "0"}, "data")):
        with pytest.raises(Refusal, match="should be of this plan, dataset and mode"):
            training.restore(found, data)


def test_two_continuations_of_one_round_are_refused(tmp_path):
    terms = asked("adp-fl", "laplace")
    training = start(tmp_path, terms)
    state = training.next_state("data")
    training.saved(state)
    others = [start(tmp_path, terms) for _ in range(2)]
    for other in others:
        other.restore(state, "data")
    others[0].advance(alike)
    with pytest.raises(LedgerError, match="two continuations"):
        others[1].advance(alike)
