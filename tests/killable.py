"""A training that may die at any moment, for the tests that kill it: ``python killable.py FOLDER``.

Imports once, then starts one life of the same training for every line on stdin, in a forked process: it prints
``life PID``, then ``released STEP`` after each step, and ``ended`` when that process is gone, killed or not. A life
does what the trainers do: it continues from the newest checkpoint, writes one of its own before its first charge,
another every five steps, and the averaged weights when schedule or budget end.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer would import it in every life anew
from torch import nn

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.clipping import AutoS
from nnunet_dp.dpsgd import Execution, PrivacyPlan, PrivateTraining, Schedule
from nnunet_dp.gradients import Record
from nnunet_dp.ledger import Ledger
from nnunet_dp.run import FINAL, LATEST, LEDGER, read_checkpoint, write_checkpoint

PLAN = PrivacyPlan(
    PrivacyBudget(epsilon=8, delta=1e-5),
    steps=100,
    sampling_probability=0.5,
    noise_multiplier=4.0,
    units=12,
    rule=AutoS(bound=1.0),
)
STEPS_PER_CHECKPOINT = 5
DATA = "digest of unchanging data"


def network() -> nn.Module:
    """Two layers, the same at every start."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Linear(8, 1))


def records_of(step: int, drawn: list[int]) -> list[Record]:
    """One record a slot: all alike, for who is drawn is not what is tested here."""
    return [Record(torch.ones(2, 4), torch.ones(2, 1)) for _ in drawn]


def live(folder: Path) -> None:
    """From the newest checkpoint, or from the beginning, to the end."""
    state = read_checkpoint(folder / LATEST) if (folder / LATEST).is_file() else None
    run = state["run"] if state else "killable/fold_0/0"
    ledger = Ledger(folder / LEDGER, run, PLAN.digest(), copy=folder / "copy.jsonl")
    training = PrivateTraining(network(), nn.functional.mse_loss, PLAN, Schedule(0.1), Execution(), ledger)
    if state:
        training.restore(state, DATA)
    _save(training, folder)
    while not training.finished:
        training.advance(records_of)
        print(f"released {training.step}", flush=True)
        if training.step % STEPS_PER_CHECKPOINT == 0:
            _save(training, folder)
    write_checkpoint({"network_weights": training.averaged_weights()}, folder / FINAL)


def _save(training: PrivateTraining, folder: Path) -> None:
    state = training.next_state(DATA)
    write_checkpoint(state, folder / LATEST)
    training.saved(state)


def _start_lives(folder: Path) -> None:
    PLAN.verify()  # the lives inherit the accountant's memory
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            live(folder)
            os._exit(0)
        print(f"life {child}", flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    _start_lives(Path(sys.argv[1]))
