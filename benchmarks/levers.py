"""Which levers help private training after a public start: phantoms only, so that choosing costs no privacy.

    python benchmarks/levers.py --work WORK --variants default steps=10 rule=psac,views=2 --epsilon 1 3 8 --seeds 0 1 2
    python benchmarks/levers.py --work WORK --summary

A network learns from hippocampus phantoms (once per WORK and width), then trains privately on phantoms of another
scanner, another rater and another anatomy (``lever_phantoms.shifted``). Dice is that of 30 further patients. A variant
is a list of settings (``lever_settings.Settings``), ``default`` the planner's rules, ``stock=True`` nnU-Net's schedule
made private.

Each run is a line of WORK/levers.jsonl; what stands there is not run again. A start without private training is a line
of epsilon 0. A seed chooses patients, patches and noise of the private training, so differences are paired by seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from lever_phantoms import WIDTH, Cases, dice, patients, public_start, random_network, shifted
from lever_settings import Settings, parsed
from lever_training import Cohort, private_training
from torch import nn

from nnunet_dp.accounting import PrivacyBudget

DELTA = 1e-4
START_ALONE = "start alone"
SCALE = ("patients", "drawn", "iterations")  # options that make runs comparable
KEY = ("epsilon", "variant", "seed", *SCALE)

Row = dict[str, Any]


# ---- the runs ----------------------------------------------------------------------------------------------------


def jobs(options: argparse.Namespace, variants: dict[str, Settings]) -> list[Row]:
    """What was asked for and is not in the table yet; starts alone first."""
    scale = {name: getattr(options, name) for name in SCALE}
    starts = {START_ALONE + _of_width(chosen.width): None for chosen in variants.values() if chosen.start}
    asked = [(0.0, name, 0) for name in starts]
    asked += [(epsilon, text, seed) for epsilon in options.epsilon for text in variants for seed in options.seeds]
    wanted = [{"epsilon": epsilon, "variant": text, "seed": seed, **scale} for epsilon, text, seed in asked]
    done = {_key(row) for row in rows(options.work)}
    return [job for job in wanted if _key(job) not in done]


def run(job: Row, chosen: Settings, start: nn.Module | None, cohort: Cohort, held_out: Sequence[Cases]) -> Row:
    """The job's row: with Dice and seconds."""
    began = time.time()
    network = random_network(chosen.width, job["seed"]) if start is None else copy.deepcopy(start)
    if job["epsilon"] > 0:
        budget = PrivacyBudget(epsilon=job["epsilon"], delta=DELTA)
        private_training(network, cohort, budget, chosen, job["seed"])
    return {**job, "dice": dice(network, held_out), "seconds": round(time.time() - began)}


def settings_of(text: str) -> Settings:
    """Of a variant, or of a start alone."""
    return parsed(text.removeprefix(START_ALONE).removeprefix(",") or "default")


def _of_width(width: int) -> str:
    return "" if width == WIDTH else f",width={width}"


# ---- the table ---------------------------------------------------------------------------------------------------


def rows(work: Path) -> list[Row]:
    """All runs so far; lines of an older form (several seeds in one) are passed over."""
    file = work / "levers.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [row for row in found if "seed" in row]


def append(row: Row, work: Path) -> None:
    with (work / "levers.jsonl").open("a") as table:
        table.write(json.dumps(row) + "\n")


def summary(found: Iterable[Row]) -> Iterator[str]:
    """Markdown: mean and standard deviation over seeds, and the difference from ``default`` at the same seeds."""
    by_variant: dict[tuple[float, str], dict[int, float]] = {}
    for row in found:
        by_variant.setdefault((row["epsilon"], row["variant"]), {})[row["seed"]] = row["dice"]
    yield "| variant | epsilon | Dice | seeds | over default, paired by seed |"
    yield "|---|---|---|---|---|"
    for (epsilon, variant), scores in sorted(by_variant.items()):
        default = by_variant.get((epsilon, "default"), {}) if variant != "default" else {}
        paired = [score - default[seed] for seed, score in scores.items() if seed in default]
        yield f"| {variant} | {epsilon:g} | {_spread(scores.values(), '')} | {len(scores)} | {_spread(paired, '+')} |"


def _spread(values: Iterable[float], sign: str) -> str:
    """Mean and standard deviation, as far as there are any."""
    known = list(values)
    deviation = f" ± {stdev(known):.4f}" if len(known) > 1 else ""
    return f"{mean(known):{sign}.4f}{deviation}" if known else ""


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=["default"])
    parser.add_argument("--epsilon", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--patients", type=int, default=136, help="whose budget it is")
    parser.add_argument("--drawn", type=int, default=34, help="whose gradients are computed")
    parser.add_argument("--iterations", type=int, default=1200, help="of the public start")
    parser.add_argument("--summary", action="store_true", help="only print the table of these three")
    return parser


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    try:
        variants = {text: parsed(text) for text in options.variants}
    except ValueError as error:
        parser.error(str(error))
    if not options.summary:
        for row in results(jobs(options, variants), options):
            append(row, options.work)
            told = f"epsilon {row['epsilon']:g}  {row['variant']}  seed {row['seed']}"
            print(f"{told}: Dice {row['dice']:.4f}  {row['seconds']} s", flush=True)
    comparable = [row for row in rows(options.work) if all(row[name] == getattr(options, name) for name in SCALE)]
    print("\n".join(summary(comparable)))


def results(todo: Sequence[Row], options: argparse.Namespace) -> Iterator[Row]:
    """One row after the other. The starts come first: the world of phantoms shifts but once."""
    chosen = [settings_of(job["variant"]) for job in todo]
    widths = {settings.width for settings in chosen if settings.start}
    starts = {width: public_start(options.work, width, options.iterations) for width in sorted(widths)}
    if not todo:
        return
    shifted()
    cohort, held_out = Cohort(patients(136, 700), options.patients, options.drawn), patients(30, 900)
    for job, settings in zip(todo, chosen, strict=True):
        yield run(job, settings, starts[settings.width] if settings.start else None, cohort, held_out)


if __name__ == "__main__":
    main()
