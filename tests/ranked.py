"""Trainings that several gloo processes share, for the tests of the ranks: each rank is a real process.

``start`` spawns the ranks as nnU-Net does; a job is a function of (group, folder) that every rank runs and that leaves
what it saw in ``folder``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killable
import torch
from asserts import RULES
from torch import distributed, nn

from nnunet_dp import dpsgd, mechanisms
from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.batched_gradients import Batched
from nnunet_dp.clipping import RULE_NAMES, make_rule
from nnunet_dp.dpsgd import Execution, PrivacyPlan, PrivateTraining, Schedule
from nnunet_dp.errors import Refusal
from nnunet_dp.gradients import Engine, Record, one_at_a_time
from nnunet_dp.ledger import Ledger
from nnunet_dp.process_group import ProcessGroup
from nnunet_dp.ranks import Draw, Follower, Leader, Ranks
from nnunet_dp.run import LATEST, LEDGER, read_checkpoint, write_checkpoint

BUDGET = PrivacyBudget(epsilon=60, delta=1e-5)
UNITS, STEPS, NOISE = 10, 6, 2.0
DRAWS = ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [4], [], [1, 5, 9], [0, 2, 3, 7], [8, 9])
ENGINES = {"one": one_at_a_time, "two": Batched(2)}
Job = Callable[[ProcessGroup, Path], None]


def start(job: Job, folder: Path, size: int = 2) -> Any:
    """The context of the spawned ranks, which have not ended yet."""
    (folder / "rendezvous").unlink(missing_ok=True)
    return torch.multiprocessing.spawn(_live, (size, folder, job), nprocs=size, join=False)


def _live(rank: int, size: int, folder: Path, job: Job) -> None:
    os.environ["MASTER_ADDR"] = "localhost"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=size)
    job(ProcessGroup(), folder)
    distributed.destroy_process_group()


# ---- one small training ------------------------------------------------------------------------------------------


def plan(rule: str, probability: float = 0.4) -> PrivacyPlan:
    return PrivacyPlan(BUDGET, STEPS, probability, NOISE, UNITS, make_rule(rule, RULES[rule]))


def network(seed: int, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 8), nn.LeakyReLU(), nn.Linear(8, 3)).double()


def records_of(step: int, drawn: list[int]) -> Iterator[Record]:
    """Every slot has its own images and its own size of gradients; two patches each."""
    for slot in drawn:
        generator = torch.Generator().manual_seed(100 * step + slot)
        data = torch.randn(2, 4, generator=generator, dtype=torch.float64) * 10.0 ** (slot % 4 - 2)
        yield Record(data, torch.randn(2, 3, generator=generator, dtype=torch.float64))


def without_noise_or_chance() -> None:
    """In this process the draws are ``DRAWS``, and what is released carries no noise."""
    draws = iter(DRAWS)
    dpsgd.poisson_draw = lambda *_: list(next(draws))
    mechanisms._with_gaussian = lambda tensors, *_: tuple(tensors)


def training(folder: Path, net: nn.Module, chosen: PrivacyPlan, engine: Engine, ranks: Ranks | None = None, run="0"):
    ledger = Ledger(folder / LEDGER, run, chosen.digest())
    execution = Execution(engine=engine, **({"ranks": ranks} if ranks else {}))
    return PrivateTraining(net, nn.functional.mse_loss, chosen, Schedule(0.5, momentum=0.5), execution, ledger)


def shared(group, folder, net, chosen, records=records_of, engine=one_at_a_time, steps=STEPS) -> Any:
    """The steps of this rank: led with a ledger in ``folder``, or followed; the leader's training."""
    if group.rank:
        follower = Follower(group)
        follower.begin()
        follower.serve(net, Execution(engine=engine).clip(net, nn.functional.mse_loss, records, chosen.rule))
        return None
    folder.mkdir(parents=True)
    leader = Leader(group)
    led = training(folder, net, chosen, engine, leader)
    leader.begin(None, net)
    for _ in range(steps):
        led.advance(records)
    leader.finish(net)
    return led


# ---- jobs --------------------------------------------------------------------------------------------------------


def all_scenarios(group: ProcessGroup, folder: Path) -> None:
    """One start of the processes for everything that ends well, or in a refusal."""
    draw, noise = dpsgd.poisson_draw, mechanisms._with_gaussian
    seen = {"drawn": drawn_slots(group, folder), "noise": noised(group, folder)}
    seen["disagreement"], seen["agreement"] = agreement(group, ["plan", str(group.rank)]), agreement(group, ["plan"])
    seen["twice"], seen["never"] = wrong_shares(group, 0, 2), wrong_shares(group, group.rank, 3)
    seen["bound"], seen["elsewhere"] = other_bound(group), elsewhere(group)
    for rule in RULE_NAMES:
        for name, engine in ENGINES.items():
            without_noise_or_chance()
            net = network(seed=group.rank)  # the followers begin with other weights
            led = shared(group, folder / f"{rule}_{name}", net, plan(rule), engine=engine)
            average, bound = (led.average, led.rule.bound) if led else (None, None)
            seen[rule, name] = {"weights": list(net.parameters()), "average": average, "bound": bound}
    dpsgd.poisson_draw, mechanisms._with_gaussian = draw, noise
    torch.save(seen, folder / f"rank_{group.rank}.pt")


def drawn_slots(group: ProcessGroup, folder: Path) -> list[list[int]]:
    """With real draws: the slots that this rank's loader was asked for, by step."""
    asked = []

    def listening(step, drawn):
        asked.append(list(drawn))
        return records_of(step, drawn)

    shared(group, folder / "drawn", network(0), plan("auto_s"), listening)
    return asked


def noised(group: ProcessGroup, folder: Path) -> torch.Tensor:
    """Weights after one step in which nobody pulls, from zero, at learning rate 0.5."""
    net = nn.Linear(20_000, 1, bias=False)
    nn.init.zeros_(net.weight)
    shared(group, folder / "noise", net, plan("quantile"), lambda step, drawn: [], steps=1)
    return net.weight.detach().flatten()


def agreement(group: ProcessGroup, facts: list[str]) -> str:
    """What the leader says to facts that every rank brings."""
    if group.rank:
        follower = Follower(group)
        follower.wait()
        follower.agree(facts)
        return ""
    return refusal(lambda: Leader(group).agree(facts))


def wrong_shares(group: ProcessGroup, first: int, step: int) -> str:
    """Ranks that take every ``step``-th patient from ``first`` on, whatever is theirs."""
    return clip_once(group, share=lambda draw: draw._replace(slots=draw.slots[first::step]))


def other_bound(group: ProcessGroup) -> str:
    """A follower that clips to twice the leader's bound."""
    return clip_once(group, bound=1.0 + group.rank)


def elsewhere(group: ProcessGroup) -> str:
    """A second group, of which every rank believes to be on a machine of its own."""
    real = socket.gethostname
    socket.gethostname = lambda: f"machine {group.rank}"
    try:
        return refusal(ProcessGroup)
    finally:
        socket.gethostname = real


def clip_once(group: ProcessGroup, share: Callable[[Draw], Draw] | None = None, bound: float = 1.0) -> str:
    from nnunet_dp import ranks

    before = ranks.share_of
    if share is not None:
        ranks.share_of = lambda draw, group: share(draw)
    own = mechanisms.ClippedSum((torch.zeros(3, dtype=torch.float64),), bound)
    try:
        if group.rank:
            draw = group.said()
            group.told(ranks._Report(ranks.share_of(draw, group).slots, own.l2_bound))
            return ""
        return refusal(lambda: Leader(group).clipped_sum(Draw(0, list(range(6)), 1.0), lambda draw: own))
    finally:
        ranks.share_of = before


def refusal(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except Refusal as refused:
        return str(refused)
    return ""


def killable_life(group: ProcessGroup, folder: Path) -> None:
    """``killable.live`` by several ranks: from the newest checkpoint to the end."""
    net, clip_rule = killable.network(), killable.PLAN.rule
    if group.rank:
        follower = Follower(group)
        follower.begin()
        clip = Execution().clip(net, nn.functional.mse_loss, killable.records_of, clip_rule)
        follower.serve(net, clip)
        return
    state = read_checkpoint(folder / LATEST) if (folder / LATEST).is_file() else None
    run = state["run"] if state else "killable/fold_0/0"
    ledger = Ledger(folder / LEDGER, run, killable.PLAN.digest(), copy=folder / "copy.jsonl")
    leader = Leader(group)
    execution = Execution(ranks=leader)
    led = PrivateTraining(net, nn.functional.mse_loss, killable.PLAN, Schedule(0.1), execution, ledger)
    if state:
        led.restore(state, killable.DATA)
    killable._save(led, folder)
    leader.begin(None, net)
    while not led.finished:
        led.advance(killable.records_of)
        if led.step % killable.STEPS_PER_CHECKPOINT == 0:
            killable._save(led, folder)
    leader.finish(net)
    write_checkpoint({"network_weights": led.averaged_weights()}, folder / "final.pth")
