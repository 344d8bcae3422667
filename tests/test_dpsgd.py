"""One private training: its noise, its budget, its crashes. Weights are read, for they are what is released."""

from __future__ import annotations

import math
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import killable
import pytest
import torch
from asserts import RULES
from scipy import stats
from torch import nn

from nnunet_dp import dpsgd
from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.charges import MORPHOLOGY, LedgerError, epsilon_of, steps_done, steps_wasted
from nnunet_dp.clipping import RULE_NAMES, make_rule
from nnunet_dp.dpsgd import Execution, PrivacyPlan, PrivateTraining, Schedule
from nnunet_dp.errors import BudgetRefusal, Refusal
from nnunet_dp.gradients import Record, trainable
from nnunet_dp.ledger import Ledger, read_ledger
from nnunet_dp.mechanisms import GaussianWithCount, SubsampledGaussian
from nnunet_dp.run import FINAL, LATEST, LEDGER, read_checkpoint, write_checkpoint

NOISE = 2.0
BUDGET = PrivacyBudget(epsilon=60, delta=1e-5)


def plan(rule="auto_s", steps=8, probability=1.0, units=10, noise=NOISE, **constants) -> PrivacyPlan:
    chosen = make_rule(rule, RULES[rule] | constants)
    return PrivacyPlan(BUDGET, steps, probability, noise, units, chosen)


def flat_weights(width: int = 4) -> nn.Module:
    """One output, linear in the weights, which start at zero."""
    network = nn.Linear(width, 1, bias=False)
    nn.init.zeros_(network.weight)
    return network


def pull(output, target):
    """A loss whose gradient is target * data, whatever the weights are."""
    return (output * target).mean()


def start(folder: Path, plan: PrivacyPlan, network: nn.Module | None = None, run="fold_0", **schedule):
    ledger = Ledger(folder / LEDGER, run, plan.digest())
    schedule = Schedule(**{"learning_rate": 0.5} | schedule)
    return PrivateTraining(network or flat_weights(), pull, plan, schedule, Execution(), ledger)


def nobody(step, drawn):
    return []


def alike(step, drawn):
    """Every drawn patient pulls the first weight down, with a gradient of norm 1."""
    return [Record(torch.tensor([[1.0, 0, 0, 0]]), -torch.ones(1, 1)) for _ in drawn]


def weights(training) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainable(training.network)[1]]).clone()


def noise_multiplier_of_the_gradient(plan: PrivacyPlan) -> float:
    mechanism = plan.mechanism
    if isinstance(mechanism, GaussianWithCount):
        return (mechanism.noise_multiplier**-2 - (2 * mechanism.count_noise) ** -2) ** -0.5
    return mechanism.noise_multiplier


# ---- noise and division ------------------------------------------------------------------------------------------


def released_noise(folder: Path, plan: PrivacyPlan, rate: float = 0.5) -> torch.Tensor:
    """What a step with zero gradients adds to the released gradient, read from the change of the weights."""
    training = start(folder, plan, flat_weights(20_000), learning_rate=rate)
    training.advance(nobody)
    return weights(training) / -rate


def fits(noise: torch.Tensor, deviation: float) -> float:
    return stats.kstest(noise.double().numpy(), stats.norm(scale=deviation).cdf).pvalue


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_the_released_gradient_carries_the_planned_noise_and_no_other(tmp_path, rule):
    chosen = plan(rule, probability=0.4)
    bound = chosen.rule.bound
    deviation = noise_multiplier_of_the_gradient(chosen) * bound / (chosen.expected_batch * bound)
    noise = released_noise(tmp_path, chosen)
    assert fits(noise, deviation) > 1e-5
    assert fits(noise, deviation * 2 / 3) < 1e-9
    assert fits(noise, deviation * 3 / 2) < 1e-9


@pytest.mark.parametrize("regulariser", [1e-3, 10.0])
def test_the_noise_of_nsgd_does_not_scale_with_its_regulariser(tmp_path, regulariser):
    noise = released_noise(tmp_path, plan("nsgd", regulariser=regulariser))
    assert fits(noise, NOISE / 10) > 1e-5


def test_the_sum_is_divided_by_the_expected_batch_and_never_by_the_drawn_one(tmp_path):
    chosen = plan("auto_v", probability=0.3, units=1000, bound=1.0)
    training = start(tmp_path, chosen, learning_rate=1.0, power=0.0)
    sizes = []
    for _ in range(4):
        seen, before = [], weights(training)[0]
        training.advance(alike, seen.append)
        sizes.append(len(seen))
        moved = float(weights(training)[0] - before)
        assert moved * chosen.expected_batch == pytest.approx(len(seen), abs=6 * NOISE)
    assert len(set(sizes)) > 1


def test_the_plans_expected_batch_does_not_depend_on_who_was_drawn(tmp_path, monkeypatch):
    chosen = plan("auto_v", probability=0.3, units=1000, bound=1.0)
    training = start(tmp_path, chosen, learning_rate=1.0)
    monkeypatch.setattr(dpsgd, "poisson_draw", lambda *_: list(range(900)))
    training.advance(alike)
    assert float(weights(training)[0]) == pytest.approx(900 / 300, abs=0.05)


def test_an_empty_draw_is_charged_and_steps_and_is_noised(tmp_path, monkeypatch):
    training = start(tmp_path, plan(probability=0.5))
    monkeypatch.setattr(dpsgd, "poisson_draw", lambda *_: [])
    training.advance(alike)
    assert training.charged == training.step == 1
    assert (weights(training) != 0).all()
    assert all((mean != 0).all() for mean in training.average)


# ---- the budget --------------------------------------------------------------------------------------------------


def test_a_run_ends_when_its_steps_are_charged_and_never_takes_another(tmp_path):
    training = start(tmp_path, plan(steps=3))
    while not training.finished:
        training.advance(alike)
    before = weights(training)
    with pytest.raises(BudgetRefusal, match="all 3 planned releases"):
        training.advance(alike)
    assert len(read_ledger(tmp_path / LEDGER)) == 3
    assert torch.equal(weights(training), before)


def test_steps_lost_in_a_crash_shorten_the_run(tmp_path):
    chosen = plan(steps=3)
    training = start(tmp_path, chosen)
    state = training.next_state("data")
    training.saved(state)
    training.advance(alike)
    again = start(tmp_path, chosen)
    again.restore(state, "data")
    while not again.finished:
        again.advance(alike)
    assert (again.step, again.charged) == (2, 3)


def test_a_plan_edited_to_less_noise_is_refused_before_anything_is_charged(tmp_path):
    honest = replace(plan(noise=4.0), budget=PrivacyBudget(epsilon=4.5, delta=1e-5))
    honest.verify()
    with pytest.raises(BudgetRefusal, match=r"would spend epsilon .* its target is 4\.5"):
        start(tmp_path, replace(honest, noise_multiplier=2.0))
    with pytest.raises(BudgetRefusal):
        replace(honest, steps=9 * honest.steps).verify()
    assert not (tmp_path / LEDGER).exists()


def test_a_charge_that_the_plan_does_not_know_stops_the_run(tmp_path):
    training = start(tmp_path, plan())
    training.ledger.charge(plan(noise=7.0).mechanism.charge("training", 0))
    with pytest.raises(Refusal, match="its plan does not know"):
        training.advance(alike)


# ---- the share of morphology -------------------------------------------------------------------------------------

LEARNING = 3.0


def learnt(training, noise=LEARNING, **fields) -> None:
    """Charge a run for what refinement learns."""
    charge = SubsampledGaussian(noise).charge(MORPHOLOGY, None)
    training.ledger.charge(charge.model_copy(update=fields))


def test_a_run_that_learnt_trains_all_its_steps_and_spends_what_was_planned(tmp_path):
    chosen = replace(plan(steps=3), morphology_noise=LEARNING)
    training = start(tmp_path, chosen)
    learnt(training)
    assert training.charged == 0 and not training.finished
    while not training.finished:
        training.advance(alike)
    assert (training.charged, training.step) == (3, 3)
    entries = read_ledger(tmp_path / LEDGER)
    assert len(entries) == 4 and epsilon_of(entries, BUDGET.delta) == pytest.approx(chosen.epsilon)


def test_a_run_may_learn_between_its_steps_or_not_at_all(tmp_path):
    chosen = replace(plan(steps=3), morphology_noise=LEARNING)
    training = start(tmp_path, chosen)
    training.advance(alike)
    learnt(training)
    training.advance(alike)
    assert training.charged == 2
    other = start(tmp_path, chosen, run="fold_1")
    other.advance(alike)
    assert other.charged == 1


@pytest.mark.parametrize(
    "strange",
    [
        {"noise": 2.9},
        {"count": 2},
        {"sampling_probability": 0.5},
        {"purpose": "audit"},
        {"purpose": "training"},
    ],
)
def test_a_charge_of_morphology_that_the_plan_does_not_know_stops_the_run(tmp_path, strange):
    training = start(tmp_path, replace(plan(), morphology_noise=LEARNING))
    learnt(training, **strange)
    with pytest.raises(Refusal, match="its plan does not know"):
        training.advance(alike)
    assert len(read_ledger(tmp_path / LEDGER)) == 1 and (weights(training) == 0).all()


def test_learning_twice_or_without_a_planned_share_stops_the_run(tmp_path):
    doubled = start(tmp_path, replace(plan(), morphology_noise=LEARNING), run="doubled")
    learnt(doubled)
    learnt(doubled)
    unplanned = start(tmp_path, plan(), run="unplanned")
    learnt(unplanned)
    for training in (doubled, unplanned):
        with pytest.raises(Refusal, match="its plan does not know"):
            training.advance(alike)


def test_what_another_run_learnt_is_none_of_this_runs_business(tmp_path):
    other = start(tmp_path, replace(plan(), morphology_noise=LEARNING), run="fold_1")
    learnt(other)
    training = start(tmp_path, plan())
    training.advance(alike)
    assert training.charged == 1


def test_a_plan_whose_training_alone_fits_is_refused_with_a_share_that_does_not(tmp_path):
    alone = replace(plan(noise=4.0), budget=PrivacyBudget(epsilon=4.5, delta=1e-5))
    alone.verify()
    with pytest.raises(BudgetRefusal, match=r"its target is 4\.5"):
        start(tmp_path, replace(alone, morphology_noise=0.5))
    assert not (tmp_path / LEDGER).exists()


def test_a_share_belongs_to_what_a_resumed_run_must_agree_with(tmp_path):
    begun(tmp_path, plan())
    with pytest.raises(Refusal, match="plan or the clip rule changed"):
        resume(tmp_path, replace(plan(), morphology_noise=LEARNING))


def test_when_the_ledger_cannot_be_written_nobody_is_drawn_and_no_weight_moves(tmp_path, monkeypatch):
    training, asked = start(tmp_path, plan()), []
    monkeypatch.setattr(dpsgd, "poisson_draw", lambda *_: asked.append("draw") or [])

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full_disk)
        with pytest.raises(LedgerError, match="No space left"):
            training.advance(lambda *_: asked.append("patches") or [])
    assert asked == [] and training.step == 0 and (weights(training) == 0).all()


def test_the_charge_is_on_disk_before_the_draw(tmp_path, monkeypatch):
    training, lines = start(tmp_path, plan()), []
    monkeypatch.setattr(dpsgd, "poisson_draw", lambda *_: lines.append(len(read_ledger(tmp_path / LEDGER))) or [])
    training.advance(nobody)
    training.advance(nobody)
    assert lines == [1, 2]


# ---- resume ------------------------------------------------------------------------------------------------------


def save(training, folder: Path, data: str = "data") -> None:
    state = training.next_state(data)
    write_checkpoint(state, folder / LATEST)
    training.saved(state)


def resume(folder: Path, chosen: PrivacyPlan, data: str = "data", run="fold_0", file=LATEST, **schedule):
    training = start(folder, chosen, run=run, **schedule)
    training.restore(read_checkpoint(folder / file), data)
    return training


def begun(folder: Path, chosen: PrivacyPlan, steps: int = 3, **schedule):
    """A run that took steps and wrote its checkpoint."""
    training = start(folder, chosen, **schedule)
    save(training, folder)
    for _ in range(steps):
        training.advance(alike)
    save(training, folder)
    return training


def test_weights_average_momentum_threshold_and_step_are_restored_exactly(tmp_path):
    chosen = plan("quantile", units=30)
    died = begun(tmp_path, chosen, momentum=0.9)
    alive = resume(tmp_path, chosen, momentum=0.9)
    assert torch.equal(weights(alive), weights(died))
    assert all(torch.equal(a, b) for a, b in zip(alive.average, died.average, strict=True))
    momenta = [t.optimizer.state_dict()["state"][0]["momentum_buffer"] for t in (alive, died)]
    assert torch.equal(*momenta) and (momenta[0] != 0).any()
    assert (alive.rule, alive.step) == (died.rule, 3) and alive.rule != chosen.rule


def test_draws_and_noise_are_fresh_after_every_resume(tmp_path):
    chosen = plan(probability=0.5, units=128)
    (tmp_path / "a").mkdir()
    begun(tmp_path / "a", chosen)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    drawn, ends = [], []
    for name in "ab":
        training = resume(tmp_path / name, chosen)
        training.advance(lambda step, slots: drawn.append(slots) or [])
        ends.append(weights(training))
    assert drawn[0] != drawn[1]
    assert (ends[0] != ends[1]).all()


def test_a_checkpoint_holds_no_draw_no_seed_and_no_generator(tmp_path):
    begun(tmp_path, plan())
    expected = "id run plan data ledger_sequence ledger_head step bound weights average optimizer"
    assert set(read_checkpoint(tmp_path / LATEST)) == set(expected.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": plan(noise=3.0)}, "plan or the clip rule changed"),
        ({"chosen": plan("auto_v")}, "plan or the clip rule changed"),
        ({"chosen": plan(units=11)}, "plan or the clip rule changed"),
        ({"data": "other data"}, "dataset, its split or its patients changed"),
        ({"run": "fold_1"}, "belongs to another run"),
    ],
)
def test_a_resume_is_refused_when_anything_it_rests_on_changed(tmp_path, change, message):
    begun(tmp_path, plan())
    with pytest.raises(Refusal, match=message):
        resume(tmp_path, **{"chosen": plan()} | change)


def test_a_ledger_shorter_than_the_checkpoint_says_is_refused(tmp_path):
    begun(tmp_path, plan())
    lines = (tmp_path / LEDGER).read_bytes().splitlines(keepends=True)
    (tmp_path / LEDGER).write_bytes(b"".join(lines[:-1]))
    with pytest.raises(LedgerError, match="shorter than the checkpoint"):
        resume(tmp_path, plan())


def test_an_older_checkpoint_is_refused_once_the_run_went_on_from_a_newer_one(tmp_path):
    training = begun(tmp_path, plan(), steps=1)
    shutil.copy(tmp_path / LATEST, tmp_path / "older.pth")
    training.advance(alike)
    save(training, tmp_path)
    training.advance(alike)
    with pytest.raises(Refusal, match="two continuations"):
        resume(tmp_path, plan(), file="older.pth")
    assert resume(tmp_path, plan()).step == 2


def test_a_checkpoint_whose_continuation_wrote_its_own_is_refused(tmp_path):
    begun(tmp_path, plan())
    shutil.copy(tmp_path / LATEST, tmp_path / "older.pth")
    continued = resume(tmp_path, plan())
    save(continued, tmp_path)
    continued.advance(alike)
    with pytest.raises(Refusal, match="two continuations"):
        resume(tmp_path, plan(), file="older.pth")


def test_two_processes_that_continue_one_run_at_once_are_refused(tmp_path):
    begun(tmp_path, plan())
    first, second = resume(tmp_path, plan()), resume(tmp_path, plan())
    first.advance(alike)
    with pytest.raises(LedgerError, match="two continuations"):
        second.advance(alike)


@pytest.mark.parametrize("saved_first", [True, False])
def test_the_honest_chain_of_crashes_is_accepted_also_when_a_life_ends_before_its_first_charge(tmp_path, saved_first):
    begun(tmp_path, plan(), steps=1)
    for charges in (1, 0, 0, 2, 0, 1):
        training = resume(tmp_path, plan())
        assert training.step == 1
        if saved_first:
            save(training, tmp_path)
        for _ in range(charges):
            training.advance(alike)
    assert training.charged == 5


def test_a_state_in_memory_does_not_change_when_the_run_goes_on(tmp_path):
    training = begun(tmp_path, plan(), momentum=0.9)
    state = training.next_state("data")
    kept = state["optimizer"]["state"][0]["momentum_buffer"].clone()
    training.advance(alike)
    assert torch.equal(state["optimizer"]["state"][0]["momentum_buffer"], kept)


# ---- kill -9 -----------------------------------------------------------------------------------------------------


class Lives:
    """Lives of one training in killable.py, one after the other."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(Path(killable.__file__)), str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, bufsize=1, env=environment, **pipes)
        self.released = 0

    def live(self, killed_after: int | None = None, moments_later: float = 0.0) -> None:
        """One life, to its end or to its kill; every line it printed is counted."""
        self.process.stdin.write("live\n")
        child, steps = int(self._line().split()[1]), 0
        if killed_after == 0:
            self._kill(child, moments_later)
        while self._line() != "ended":
            steps, self.released = steps + 1, self.released + 1
            if steps == killed_after:
                self._kill(child, moments_later)

    def _line(self) -> str:
        line = self.process.stdout.readline().strip()
        assert line, "killable.py died itself"
        return line

    @staticmethod
    def _kill(child: int, moments_later: float) -> None:
        time.sleep(moments_later)
        os.kill(child, 9)


@pytest.fixture
def lives(tmp_path):
    lives = Lives(tmp_path)
    yield lives
    lives.process.stdin.close()
    lives.process.wait(timeout=10)
    lives.process.stdout.close()


def test_nine_kills_never_release_more_than_was_charged_and_each_wastes_five_steps_at_most(tmp_path, lives):
    moments = random.Random(3)
    for _ in range(9):
        lives.live(killed_after=moments.choice((0, 1, 2, 4, 5, 6, 7, 9)), moments_later=moments.uniform(0, 0.02))
        entries = read_ledger(tmp_path / LEDGER) if (tmp_path / LEDGER).is_file() else ()
        state = read_checkpoint(tmp_path / LATEST) if (tmp_path / LATEST).is_file() else {"ledger_sequence": 0}
        assert len(entries) >= lives.released
        assert len(entries) - state["ledger_sequence"] <= 5  # 5 % of the steps, the one in flight included
    lives.live()
    entries = read_ledger(tmp_path / LEDGER)
    assert lives.released <= len(entries) == killable.PLAN.steps
    assert steps_wasted(entries) <= 9 * 5 and steps_done(entries) >= 100 - 9 * 5
    assert epsilon_of(entries, killable.PLAN.budget.delta) <= killable.PLAN.budget.epsilon
    model = killable.network()
    model.load_state_dict(read_checkpoint(tmp_path / FINAL)["network_weights"])
    assert torch.isfinite(model(torch.ones(1, 4))).all()


# ---- the weight average ------------------------------------------------------------------------------------------


def test_the_average_is_a_running_mean_first_and_a_window_later(tmp_path):
    training, history = start(tmp_path, plan(), average_share=0.5), []
    for step in range(8):
        training.advance(alike)
        history.append(weights(training))
        if step < 4:  # a window of half of 8 steps
            expected = torch.stack(history).mean(0)
        else:
            expected = 0.75 * expected + 0.25 * history[-1]
        torch.testing.assert_close(training.average[0].flatten(), expected)


class Shared(nn.Module):
    """One layer under two names, as in nnU-Net's decoder, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 1)
        self.decoder = nn.ModuleDict({"encoder": self.encoder})
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, data):
        return self.encoder(data)


def test_averaged_weights_stand_under_all_names_of_a_shared_module(tmp_path):
    training = start(tmp_path, plan(), Shared(), average_share=0.5)
    for _ in range(3):
        training.advance(alike)
    state = training.averaged_weights()
    assert set(state) == set(training.network.state_dict())
    for name in ("encoder", "decoder.encoder"):
        assert torch.equal(state[f"{name}.weight"], training.average[0])
        assert torch.equal(state[f"{name}.bias"], training.average[1])
    assert not torch.equal(state["encoder.weight"], training.network.encoder.weight)
    assert torch.equal(state["frozen.weight"], training.network.frozen.weight)


def test_averaged_weights_are_a_copy_that_later_steps_leave_alone(tmp_path):
    training = start(tmp_path, plan())
    training.advance(alike)
    state = training.averaged_weights()
    kept = state["weight"].clone()
    training.advance(alike)
    assert torch.equal(state["weight"], kept)


# ---- the quantile rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_bound", [0.01, 100.0])
def test_the_threshold_finds_the_median_norm_from_a_hundred_times_below_and_above(tmp_path, first_bound):
    chosen = plan("quantile", steps=80, units=60, bound=first_bound)
    norms = torch.linspace(0.5, 1.5, 60)
    training = start(tmp_path, chosen)
    for _ in range(80):
        training.advance(lambda _, drawn: [Record(torch.eye(4)[:1], norms[slot].view(1, 1)) for slot in drawn])
    assert 0.7 < training.rule.bound < 1.4
    assert len(read_ledger(tmp_path / LEDGER)) == 80  # gradient and count share one charge


def test_the_threshold_moves_by_a_noised_count_and_not_by_the_count(tmp_path):
    bounds = set()
    for run in ("fold_0", "fold_1"):
        training = start(tmp_path, plan("quantile", units=50), run=run)
        training.advance(alike)
        bounds.add(training.rule.bound)
        assert math.log(training.rule.bound / 0.3) == pytest.approx(0.1, abs=0.15)  # all above: exp(0.2 * 0.5)
    assert len(bounds) == 2
