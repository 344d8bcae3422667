"""A training that two processes share is the training of one: same sums, same noise, one ledger, one end for all."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import killable
import pytest
import ranked
import torch
from scipy import stats
from torch.multiprocessing import ProcessExitedException

from nnunet_dp import dpsgd, mechanisms
from nnunet_dp.charges import LedgerError, epsilon_of, steps_done
from nnunet_dp.clipping import RULE_NAMES, make_rule
from nnunet_dp.dpsgd import Execution, PrivateTraining, Schedule
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.ledger import Ledger, read_ledger
from nnunet_dp.ranks import Alone, Draw, Leader, share_of
from nnunet_dp.run import LEDGER, read_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def seen(folder) -> list[dict[Any, Any]]:
    """What each of two processes saw, in real processes over gloo."""
    context = ranked.start(ranked.all_scenarios, folder)
    while not context.join():
        pass
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]


# ---- the same sum ------------------------------------------------------------------------------------------------


def alone(tmp_path, monkeypatch, rule, engine):
    """The same training by one process, without noise."""
    monkeypatch.setattr(dpsgd, "poisson_draw", dpsgd.poisson_draw)
    monkeypatch.setattr(mechanisms, "_with_gaussian", mechanisms._with_gaussian)
    ranked.without_noise_or_chance()
    training = ranked.training(tmp_path, ranked.network(seed=0), ranked.plan(rule), ranked.ENGINES[engine])
    for _ in range(ranked.STEPS):
        training.advance(ranked.records_of)
    return training


@pytest.mark.parametrize("engine", ranked.ENGINES)
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_two_processes_train_what_one_trains(seen, tmp_path, monkeypatch, rule, engine):
    training = alone(tmp_path, monkeypatch, rule, engine)
    found = seen[0][rule, engine]
    torch.testing.assert_close(found["weights"], list(training.network.parameters()), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["average"], training.average, rtol=1e-9, atol=1e-12)
    assert found["bound"] == pytest.approx(training.rule.bound, rel=1e-12)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_all_processes_end_with_the_same_weights_bit_for_bit(seen, rule):
    first, second = (found[rule, "one"]["weights"] for found in seen)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


# ---- each patient once -------------------------------------------------------------------------------------------


def test_every_drawn_patient_is_asked_of_one_process_only(seen):
    for first, second in zip(seen[0]["drawn"], seen[1]["drawn"], strict=True):
        both = [*first, *second]
        assert len(set(both)) == len(both) and set(both) <= set(range(ranked.UNITS))
        assert 0 <= len(first) - len(second) <= 1


class Place(NamedTuple):
    rank: int
    size: int


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("drawn", [[], [5], [1, 2, 8], list(range(11))])
def test_the_shares_of_any_number_of_processes_are_the_draw(size, drawn):
    shares = [share_of(Draw(0, drawn, 1.0), Place(rank, size)).slots for rank in range(size)]  # type: ignore[arg-type]
    assert sorted(slot for share in shares for slot in share) == drawn
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_draws_are_not_the_same_at_every_step(seen):
    steps = [sorted([*first, *second]) for first, second in zip(seen[0]["drawn"], seen[1]["drawn"], strict=True)]
    assert len(steps) == ranked.STEPS and len({tuple(step) for step in steps}) > 1


def test_a_patient_taken_twice_or_by_nobody_ends_the_step_before_its_noise(seen):
    assert "taken by one process" in seen[0]["twice"]
    assert "taken by one process" in seen[0]["never"]


def test_a_process_that_clips_to_another_bound_ends_the_step_before_its_noise(seen):
    assert "clip to one bound" in seen[0]["bound"]


def test_processes_that_see_other_data_are_refused_before_any_charge(seen):
    assert "same plan, split and data" in seen[0]["disagreement"] and "process 1 of 2" in seen[0]["disagreement"]
    assert seen[0]["agreement"] == ""


def test_processes_on_several_machines_are_refused(seen):
    assert all("on one machine, found 2" in found["elsewhere"] for found in seen)


# ---- noise once, charges once ------------------------------------------------------------------------------------


def fits(noise: torch.Tensor, deviation: float) -> float:
    return stats.kstest(noise.double().numpy(), stats.norm(scale=deviation).cdf).pvalue


def test_the_noise_is_that_of_one_process_and_neither_twice_nor_half_of_it(seen):
    chosen = ranked.plan("quantile")
    mechanism = chosen.mechanism
    multiplier = (mechanism.noise_multiplier**-2 - (2 * mechanism.count_noise) ** -2) ** -0.5
    deviation = multiplier / chosen.expected_batch
    noise = seen[0]["noise"] / -0.5
    assert fits(noise, deviation) > 1e-5
    for wrong in (math.sqrt(2), math.sqrt(0.5), 2, 0.5, 3 / 2, 2 / 3):
        assert fits(noise, deviation * wrong) < 1e-9, wrong


def test_both_processes_have_the_very_same_noise(seen):
    assert torch.equal(seen[0]["noise"], seen[1]["noise"]) and seen[0]["noise"].abs().max() > 0


def test_every_step_is_charged_once_whatever_the_number_of_processes(seen, folder):
    for ledger in folder.glob(f"*/{LEDGER}"):
        entries = read_ledger(ledger)
        assert [entry.first_step for entry in entries] == list(range(len(entries)))
        assert {entry.count for entry in entries} == {1}
    assert len(read_ledger(folder / "drawn" / LEDGER)) == ranked.STEPS


class Listening:
    """A group of one that notes how many lines the ledger on disk had when each draw was told."""

    rank, size = 0, 1

    def __init__(self, ledger: Path) -> None:
        self.ledger, self.heard = ledger, []

    def said(self, draw):
        self.heard.append(len(read_ledger(self.ledger)))

    def told(self, report):
        return [report]

    def summed(self, tensors):
        return list(tensors)

    def adopt(self, network):
        pass


def led(tmp_path) -> tuple[PrivateTraining, Listening]:
    group = Listening(tmp_path / LEDGER)
    leader = Leader(group)  # type: ignore[arg-type]
    net, chosen, engine = ranked.network(0), ranked.plan("auto_s"), ranked.ENGINES["one"]
    return ranked.training(tmp_path, net, chosen, engine, leader), group


def test_nobody_hears_who_was_drawn_before_the_charge_is_on_disk(tmp_path):
    training, group = led(tmp_path)
    for _ in range(3):
        training.advance(ranked.records_of)
    assert group.heard == [1, 2, 3]


def test_without_a_charge_nobody_hears_anything(tmp_path, monkeypatch):
    training, group = led(tmp_path)

    def full_disk(charge, checkpoint):
        raise LedgerError("no room")

    monkeypatch.setattr(training.ledger, "charge", full_disk)
    before = [parameter.clone() for parameter in training.network.parameters()]
    with pytest.raises(LedgerError):
        training.advance(ranked.records_of)
    assert group.heard == [] and training.step == 0
    assert all(map(torch.equal, before, training.network.parameters()))


# ---- one end for all ---------------------------------------------------------------------------------------------


def killed(folder: Path, rank: int, charges: int) -> None:
    """Two processes train; one dies by -9 once so many lines are in the ledger."""
    context = ranked.start(ranked.killable_life, folder)
    end = time.monotonic() + 120
    while not (folder / LEDGER).is_file() or len((folder / LEDGER).read_bytes().splitlines()) < charges:
        assert time.monotonic() < end and all(process.is_alive() for process in context.processes)
        time.sleep(0.002)
    os.kill(context.pids()[rank], 9)
    with pytest.raises(ProcessExitedException):
        while not context.join():
            pass
    assert not any(process.is_alive() for process in context.processes)


def test_a_killed_process_ends_all_and_the_run_goes_on_with_one_or_with_two(tmp_path):
    killed(tmp_path, rank=1, charges=7)
    after_follower = len(read_ledger(tmp_path / LEDGER))
    killed(tmp_path, rank=0, charges=after_follower + 8)
    before = read_checkpoint(tmp_path / "checkpoint_latest.pth")["step"]
    assert 0 < before < killable.PLAN.steps
    killable.live(tmp_path)  # by one process: nothing depends on how many there were
    entries = read_ledger(tmp_path / LEDGER)
    assert len(entries) == killable.PLAN.steps  # what was lost stays charged: the budget ends the run
    assert steps_done(entries) >= killable.PLAN.steps - 2 * killable.STEPS_PER_CHECKPOINT
    assert epsilon_of(entries, killable.PLAN.budget.delta) <= killable.PLAN.budget.epsilon


# ---- refused -----------------------------------------------------------------------------------------------------


def test_laplace_noise_is_refused_for_several_processes_before_any_charge(tmp_path):
    class Two(Alone):
        size = 2

    chosen = dpsgd.PrivacyPlan(ranked.BUDGET, 1, 1.0, 5.0, 10, make_rule("flat_l1", {"bound": 1.0}))
    ledger = Ledger(tmp_path / LEDGER, "0", chosen.digest())
    with pytest.raises(UsageRefusal, match="L1 clip rule"):
        PrivateTraining(ranked.network(0), torch.nn.functional.mse_loss, chosen, Schedule(0.1),
                        Execution(ranks=Two()), ledger)  # fmt: skip
    assert not (tmp_path / LEDGER).exists()
