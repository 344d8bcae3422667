"""What a hundred ``kill -9`` and other accidents leave, on a tiny phantom, through the commands that users type.

    python benchmarks/faults.py --work WORK --json docs/results/faults.json

A training (its vote on the masks included), ``nnunet-dp export`` and ``nnunet-dp fed simulate`` are started, killed at
a random moment with everything below them, and gone on with as they say, until they end. After each kill:

    under_counted     a ledger line that was there is gone, or a checkpoint holds a step that no line has paid for
    over_budget       epsilon, recounted from the lines by dp_accounting alone, is above the target
    lost_final        a final model that was there is gone or does not read
    silent_restart    a run went on from an earlier step, or round, than its last checkpoint

Then one accident each: a disk that is full (a limit on the size of files), a clock set back by a year, two trainings
of one fold, a torn last line, an old backup of the ledger, a damaged checkpoint. Each should be refused in words or
survived, without a traceback.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fault_accidents import ACCIDENTS
from fault_place import EPSILON, ROUNDS, STEPS, TRAIN, Place, lines_of, recounted
from safetensors import safe_open

from nnunet_dp.federated.server_state import STATE
from nnunet_dp.phantoms import write_dataset
from nnunet_dp.run import FINAL, LATEST, LEDGER, read_checkpoint
from nnunet_dp.verify import verify

Say = Callable[[str], None]

# ---- kills -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sight:
    """What lies on disk after a kill.

    Attributes:
        lines: of each ledger.
        step: of the newest checkpoint, or round of the coordinator.
        paid: steps that have a line.
        final: whether a final model reads.
    """

    lines: tuple[tuple[str, ...], ...]
    step: int
    paid: int
    final: bool


def judged(before: Sight, now: Sight, counts: Counter[str]) -> None:
    """Add what went wrong between two sights."""
    shorter = any(after[: len(old)] != old for old, after in zip(before.lines, now.lines, strict=True))
    counts["under_counted"] += shorter or now.step > now.paid
    counts["over_budget"] += any(
        recounted([json.loads(line) for line in lines]) > EPSILON for lines in now.lines if lines
    )
    counts["lost_final"] += before.final and not now.final
    counts["silent_restart"] += now.step < before.step and not now.final


def sight_of_training(place: Place) -> Sight:
    lines = place.lines
    latest, final = place.fold / LATEST, place.fold / FINAL
    step = int(read_checkpoint(latest)["private"]["step"]) if latest.is_file() else 0
    trained = sum(line["purpose"] == "training" for line in lines)
    return Sight((tuple(map(json.dumps, lines)),), step, trained, final.is_file() and bool(read_checkpoint(final)))


def kill_trainings(place: Place, kills: int, say: Say) -> Counter[str]:
    """Trainings, each killed again and again until it ends by itself."""
    counts: Counter[str] = Counter()
    while counts["kills"] < kills:
        fresh = Place(place.root.with_name("training"))
        shutil.rmtree(fresh.root, ignore_errors=True)
        shutil.copytree(place.root, fresh.root, ignore=shutil.ignore_patterns("results", "console.txt"))
        (fresh.root / "results").mkdir()
        before, going_on = sight_of_training(fresh), ()
        while True:
            has_begun = partial(_has_another_log, fresh, _logs(fresh))
            alive = fresh.killed([*TRAIN, *going_on], has_begun, random.choice([0.5, 2.0, 6.0]))
            now = sight_of_training(fresh)
            judged(before, now, counts)
            counts["kills"] += alive
            say(f"training: kill {counts['kills']} of {kills}, step {now.step} of {STEPS}, {len(now.lines[0])} lines")
            before, going_on = now, ("--c",) if (fresh.fold / LATEST).is_file() else ()
            if now.final or not alive:
                break
            if counts["kills"] >= kills:
                fresh.must(*TRAIN, *going_on)
        ended = sight_of_training(fresh)
        judged(before, ended, counts)
        counts["runs"] += 1
        counts["runs_that_ended_with_a_model"] += ended.final
    return counts


def _logs(place: Place) -> int:
    return len(list(place.fold.glob("training_log*")))


def _has_another_log(place: Place, known: int) -> bool:
    return _logs(place) > known


def kill_exports(place: Place, kills: int, say: Say) -> Counter[str]:
    """Exports of one model; what lies there afterwards is whole or nothing."""
    counts: Counter[str] = Counter()
    archive = place.root / "model.zip"
    line = ("nnunet-dp", "export", "-m", str(place.model), "-o", str(archive), "--overwrite")
    started = time.monotonic()
    place.must(*line)
    seconds = time.monotonic() - started
    lines = place.lines
    while counts["kills"] < kills:
        archive.unlink(missing_ok=True)
        counts["kills"] += place.killed(line, lambda: True, seconds)
        counts["archives"] += archive.is_file()
        counts["bad_archives"] += archive.is_file() and bool(verify(archive).faults)
        counts["under_counted"] += place.lines != lines
        say(f"export: kill {counts['kills']} of {kills}")
    counts["runs"] += 1
    counts["runs_that_ended_with_a_model"] += place.run(*line)[0] == 0 and archive.is_file()
    return counts


def kill_federations(place: Place, kills: int, say: Say) -> Counter[str]:
    """Simulated federations of two sites, killed and resumed until they end."""
    counts: Counter[str] = Counter()
    while counts["kills"] < kills:
        fresh = Place(place.root.with_name("federated"))
        shutil.rmtree(fresh.root, ignore_errors=True)
        for part in ("raw", "preprocessed", "results"):
            (fresh.root / part).mkdir(parents=True)
        for number in (301, 302):
            write_dataset(fresh.root / "raw", "lesion", 5, number, dataset_id=number, shape=(32, 32))
        run = fresh.root / "run"
        small = ("--phantom-shape", "32,32", "--features", "4,8,8", "--no-start", "--delta", "1e-3")
        first = ("--datasets", "301", "302", "--rounds", f"{ROUNDS}", "--epsilon", f"{EPSILON:g}", *small)
        before = sight_of_federation(fresh, run)
        while not before.final:
            given = ("--resume",) if (run / "config.json").is_file() else first
            if not (run / "config.json").is_file():
                shutil.rmtree(run, ignore_errors=True)
            line = ("nnunet-dp", "fed", "simulate", *given, "--folder", str(run))
            said, told = run / "server_lines.txt", _size(run / "server_lines.txt")
            if counts["kills"] < kills:
                has_begun = partial(_is_longer, said, told)
                counts["kills"] += fresh.killed(line, has_begun, random.choice([1.0, 5.0, 20.0]))
            else:
                fresh.must(*line)
            now = sight_of_federation(fresh, run)
            judged(before, now, counts)
            before = now
            say(f"federated: kill {counts['kills']} of {kills}, round {now.step} of {ROUNDS}")
        counts["runs"] += 1
        counts["runs_that_ended_with_a_model"] += before.final
    return counts


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _is_longer(file: Path, known: int) -> bool:
    return _size(file) > known


def sight_of_federation(place: Place, run: Path) -> Sight:
    ledgers = [
        lines_of(next(iter(place.root.glob(f"preprocessed/Dataset{number}_*/{LEDGER}")), Path("none")))
        for number in (301, 302)
    ]
    step = 0
    if (run / STATE).is_file():
        with safe_open(run / STATE, "np") as opened:
            step = int(json.loads(opened.metadata()["state"])["round"])
    paid = min(sum(line["purpose"] == "training" for line in lines) for lines in ledgers)
    finals = list(place.root.glob(f"results/*/*/fold_all/{FINAL}"))
    ended = (run / "federated_result.json").is_file() and all(map(read_checkpoint, finals)) and bool(finals)
    return Sight(tuple(tuple(map(json.dumps, lines)) for lines in ledgers), step, paid, ended)


# ---- all of it ---------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=60, help="of trainings")
    parser.add_argument("--export-kills", type=int, default=20)
    parser.add_argument("--federated-kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    random.seed(options.seed)
    started, place = time.monotonic(), Place(options.work.resolve() / "place")
    say: Say = lambda line: print(f"{time.monotonic() - started:6.0f} s  {line}", file=sys.stderr, flush=True)  # noqa: E731
    place.prepare()
    results: dict[str, Any] = {}
    results["training"] = dict(kill_trainings(place, options.kills, say))
    if not (place.fold / FINAL).is_file():
        place.must(*TRAIN)
    results["export"] = dict(kill_exports(place, options.export_kills, say))
    results["federated"] = dict(kill_federations(place, options.federated_kills, say))
    for accident in ACCIDENTS:
        results[accident.__name__] = asdict(accident(place))
        say(f"{accident.__name__}: {results[accident.__name__]}")
    about = {"machine": platform.machine(), "date": datetime.date.today().isoformat(), "seed": options.seed}
    text = json.dumps({**about, "results": results}, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
