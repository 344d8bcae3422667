"""The papers' experiments at equal true epsilon: clip rules x budgets x morphology, on phantoms and real datasets.

    python benchmarks/study.py --work WORK layers --repeats 3
    python benchmarks/study.py --work WORK isic2017 --epsilon 8 --rules flat auto_s --repeats 1
    python benchmarks/study.py --work WORK layers --summary
    python benchmarks/study.py --work WORK layers --plot layers.png

Every run is what a user types: ``nnunet-dp plan``, ``nnunet-dp pretrain``, ``nnUNetv2_train`` of fold 0 with nnU-Net's
validation of its held-out cases. All rules of one dataset and epsilon share schedule, network and public start; noise
is calibrated for each plan to the same epsilon, 4 % of it (as mu^2) for the vote on refinement. The predictions of one
run are then judged as they are, after a fixed refinement, and after the one that the run's private vote allowed, so
that refinements pair up case by case; the morphology inside the network (``auto_s_morph``) is a training of its own.

Phantoms are drawn by the command itself; their start is learnt from shapes, not from phantoms of their own kind. For
the real datasets nnU-Net's three folders must be set, with the dataset preprocessed by public plans. One row a run is
added to WORK/study.jsonl (Dice, HD95, NSD of every held-out case); what stands there is not run again, and a training
that was interrupted goes on. ``--summary`` prints the tables. Refinements are compared on the same predictions: 95 %
intervals over patients, each with all its repeats. Rules are compared between trainings, and trainings differ by their
noise: their 95 % intervals are Welch's, over runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from accuracy import DRAWS, Row, shell
from dp_morph import METRICS, Judged, fixed_menu, judged, measure_model
from scipy.stats import ttest_ind

from nnunet_dp.bootstrap import paired_bootstrap
from nnunet_dp.morphology import Morphology
from nnunet_dp.plans import read_section
from nnunet_dp.status import read_status

TRAINERS = {
    "flat": "nnUNetTrainerDP",
    "auto_s": "nnUNetTrainerDP_AutoS",
    "nsgd": "nnUNetTrainerDP_NSGD",
    "psac": "nnUNetTrainerDP_PSAC",
    "quantile": "nnUNetTrainerDP_Quantile",
    "auto_s_morph": "nnUNetTrainerDP_AutoS_Morph",
}
BASELINE = "flat"  # of the comparison of rules
FIXED = "fixed: opening and closing k=3"  # the papers' own, on the prediction
REFINEMENTS = ("none", FIXED, "adaptive private")


@dataclass(frozen=True)
class Setup:
    """A dataset of the study.

    Attributes:
        dataset: nnU-Net's number.
        configuration: nnU-Net's.
        plans: to start from.
        delta: of the budget.
        plan: further options of ``nnunet-dp plan``, for all rules alike.
        draw: options of ``nnunet-dp phantom``; none for a real dataset.
        start: kind, batches and number of the phantoms that the public start learns from; None is the plan's own.
    """

    dataset: str
    configuration: str
    plans: str = "nnUNetPlans"
    delta: float = 1e-5
    plan: str = ""
    draw: str = ""
    start: tuple[str, int, int] | None = None


SETUPS = {
    "layers": Setup(
        "431", "2d", plan="--set features_per_stage=8,16,32,32",
        draw="--kind layers --patients 125 --seed 31 --id 431 --shape 48,64",
        start=("shapes", 600, 200),
    ),
    "ct_kidney": Setup(
        "432", "3d_fullres", plan="--set features_per_stage=8,16,32",
        draw="--kind ct_kidney --patients 125 --seed 32 --id 432 --shape 24,32,32",
        start=("shapes", 600, 200),
    ),
    "hippocampus": Setup("4", "3d_fullres", "nnUNetPlansPublic", 1e-4),
    "isic2017": Setup(
        "117", "2d", "nnUNetPlansPublic",
        plan="--compute small --patient-column privacy_unit --patients $nnUNet_raw/Dataset117_ISIC2017/cases.csv",
    ),
}  # fmt: skip

Run = dict[str, Any]


# ---- the runs ----------------------------------------------------------------------------------------------------


def prepare(setup: Setup, work: Path) -> None:
    """Draw and preprocess the phantoms, once; a real dataset is the user's own."""
    if not setup.draw:
        return
    for part in ("raw", "preprocessed", "results"):
        (work / part).mkdir(exist_ok=True)
        os.environ[f"nnUNet_{part}"] = str(work / part)
    drawn = list((work / "raw").glob(f"Dataset{setup.dataset}_*"))
    if not drawn:
        _draw(setup, work)
        drawn = list((work / "raw").glob(f"Dataset{setup.dataset}_*"))
    if not (work / "preprocessed" / drawn[0].name / f"{setup.plans}.json").is_file():
        shell("nnUNetv2_plan_and_preprocess", "-d", setup.dataset, "-c", setup.configuration, "-np", 2)


def _draw(setup: Setup, work: Path) -> None:
    """Phantoms as nnU-Net's raw data, whichever layout their kind is written in."""
    shell("nnunet-dp", "phantom", work / "drawn", *shlex.split(setup.draw))
    for task in (work / "drawn").glob(f"Task{setup.dataset}_*"):
        shell("nnUNetv2_convert_MSD_dataset", "-i", task, "-np", 2)
        converted = work / "raw" / task.name.replace("Task", "Dataset")
        (converted / "patients.csv").write_bytes((task / "patients.csv").read_bytes())
    for dataset in (work / "drawn").glob(f"Dataset{setup.dataset}_*"):
        dataset.rename(work / "raw" / dataset.name)


def run(name: str, epsilon: float, rule: str, repeat: int, options: argparse.Namespace) -> Run:
    """Plan, start, train and judge once."""
    began, setup = time.time(), SETUPS[name]
    plan = os.path.expandvars(setup.plan)
    row = Row(
        argparse.Namespace(
            dataset=setup.dataset, configuration=setup.configuration, plans=setup.plans, delta=setup.delta,
            plan=plan, trainer=TRAINERS[rule], device=options.device,
        )
    )  # fmt: skip
    plans = row.plans_name(epsilon, repeat, "study")
    row.plan(plans, epsilon)
    pretrain(setup, row.folder / f"{plans}.json", options.device)
    fold = row.train(plans) / "fold_0"
    model, spent = judged(fold), read_status(fold).as_dict()
    found = measure_model(model, refinements(model), 1)
    return {
        "study": name, "rule": rule, "repeat": repeat, "steps": spent["steps_done"],
        "epsilon_spent": spent["epsilon_spent"], "delta": spent["delta"], "unit": spent["unit"],
        "seconds": round(time.time() - began), **found,
    }  # fmt: skip


def pretrain(setup: Setup, plans: Path, device: str) -> None:
    """Write the study's start into the plans, before the first of the rules trains by them."""
    section = read_section(json.loads(plans.read_text()))
    assert section is not None
    known = section.configurations[setup.configuration].start
    if setup.start is None or (known is not None and known.kinds == (setup.start[0],)):
        return
    kind, iterations, images = setup.start
    where = ("-d", setup.dataset, "-c", setup.configuration, "-p", plans.stem, "-device", device)
    shell("nnunet-dp", "pretrain", *where, "--phantom", kind, "--iterations", iterations, "--images", images)


def refinements(model: Judged) -> dict[str, Morphology]:
    """What the predictions of one run are judged after."""
    menu = fixed_menu(min(model.facts.spacing_mm))
    return dict(zip(REFINEMENTS, (model.unrefined, model.fixed(menu[FIXED]), model.learnt()), strict=True))


# ---- the tables --------------------------------------------------------------------------------------------------


def rows(work: Path) -> list[Run]:
    """All runs so far."""
    file = work / "study.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def summary(found: Sequence[Run]) -> Iterator[str]:
    """Markdown: rules against the baseline, and each refinement against none."""
    groups = _groups(found)
    order = sorted(groups, key=lambda key: (key[0], key[1], list(TRAINERS).index(key[2])))
    yield "| dataset | epsilon | rule | runs | Dice | HD95 | NSD | Dice over flat clipping, interval over runs |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, epsilon, rule in order:
        mine, flat = groups[name, epsilon, rule], groups.get((name, epsilon, BASELINE), [])
        cells = [_spread(mine, "none", metric) for metric in METRICS]
        over = _between(mine, flat) if rule != BASELINE else ""
        yield f"| {name} | {epsilon:g} | {rule} | {len(mine)} | {' | '.join(cells)} | {over} |"
    yield ""
    yield "| dataset | epsilon | rule | refinement | Dice over none | HD95 over none | NSD over none |"
    yield "|---|---|---|---|---|---|---|"
    for (name, epsilon, rule), refinement in product(order, REFINEMENTS[1:]):
        mine = groups[name, epsilon, rule]
        cells = [_over_none(mine, refinement, metric) for metric in METRICS]
        yield f"| {name} | {epsilon:g} | {rule} | {refinement} | {' | '.join(cells)} |"


def _groups(found: Sequence[Run]) -> dict[tuple[str, float, str], list[Run]]:
    """The repeats of each dataset, epsilon and rule."""
    groups: dict[tuple[str, float, str], list[Run]] = {}
    for each in found:
        groups.setdefault((each["study"], each["epsilon"], each["rule"]), []).append(each)
    return groups


def _spread(runs: Sequence[Run], refinement: str, metric: str) -> str:
    """Mean over cases and classes: mean and standard deviation over runs."""
    told = _means(runs, refinement, metric)
    deviation = f" ± {stdev(told):.3f}" if len(told) > 1 else ""
    return f"{mean(told):.3f}{deviation}"


def _means(runs: Sequence[Run], refinement: str, metric: str) -> list[float]:
    """Mean over cases, then over classes, of each run."""
    column = METRICS.index(metric)
    return [float(np.nanmean(np.nanmean(_values([each], refinement)[..., column], axis=0))) for each in runs]


def _between(mine: Sequence[Run], theirs: Sequence[Run]) -> str:
    """Difference of two rules' Dice; with several runs of both Welch's interval for other noise."""
    if not theirs:
        return ""
    ours, others = _means(mine, "none", "dice"), _means(theirs, "none", "dice")
    told = f"{mean(ours) - mean(others):+.3f}"
    if min(len(ours), len(others)) < 2:
        return told
    low, high = ttest_ind(ours, others, equal_var=False).confidence_interval(0.95)
    return f"{told} [{low:+.3f}, {high:+.3f}]"


def _over_none(runs: Sequence[Run], refinement: str, metric: str) -> str:
    """What a refinement changes on the same predictions; interval over patients."""
    pairs = np.stack([_values(runs, refinement), _values(runs, "none")])
    patients = [f"{number:06}" for each in runs for number in each["patient"]]
    _, _, over = paired_bootstrap(pairs, patients, DRAWS, seed=0)
    assert over is not None
    middle, low, high = (each[-1, METRICS.index(metric)] for each in (over.estimate, over.low, over.high))
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def _values(runs: Sequence[Run], refinement: str) -> np.ndarray:
    """[cases of all runs, classes, metrics]"""
    return np.concatenate([np.array(each["values"][refinement], float) for each in runs])


def plot(found: Sequence[Run], file: Path) -> None:
    """Dice of every run of one dataset over epsilon: how far rules lie apart, beside how far runs of one rule do."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(8, 4), layout="tight")
    axes = figure.subplots()
    budgets = sorted({each["epsilon"] for each in found})
    groups = sorted(_groups(found).items())
    for number, rule in enumerate(TRAINERS):
        told = {e: _means(runs, "none", "dice") for (_, e, one), runs in groups if one == rule}
        if not told:
            continue
        beside = 1.06 ** (number - (len(TRAINERS) - 1) / 2)  # of each other, not upon each other
        dots = [(e * beside, dice) for e, each in told.items() for dice in each]
        axes.plot(*zip(*dots, strict=True), "o", color=f"C{number}", markersize=4, label=rule)
        axes.plot([e * beside for e in told], [mean(each) for each in told.values()], color=f"C{number}", linewidth=0.8)
    axes.set(xscale="log", xlabel="epsilon per patient", ylabel="Dice of a run, lines: mean", ylim=(0, 1))
    axes.set_xticks(budgets, [f"{e:g}" for e in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(title="clip rule")
    FigureCanvasAgg(figure).print_png(file)


def compact(each: Run) -> Run:
    """The row without its cases: what docs/results/study.jsonl keeps."""
    shown = {k: v for k, v in each.items() if k not in ("values", "patient")}
    return shown | {one: {m: round(_means([each], one, m)[0], 4) for m in METRICS} for one in REFINEMENTS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=SETUPS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 3.0, 8.0, 200.0])
    parser.add_argument("--rules", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--summary", action="store_true", help="only print the tables")
    parser.add_argument("--compact", action="store_true", help="only print a line a run, without its cases")
    parser.add_argument("--plot", type=Path, help="only draw Dice over epsilon, into this PNG")
    o = parser.parse_args()
    o.work = o.work.resolve()
    o.work.mkdir(parents=True, exist_ok=True)
    if not (o.summary or o.compact or o.plot):
        measure(o)
    mine = [each for each in rows(o.work) if each["study"] == o.study]
    if o.plot:
        plot(mine, o.plot)
        return
    print("\n".join(json.dumps(compact(each)) for each in mine) if o.compact else "\n".join(summary(mine)))


def measure(o: argparse.Namespace) -> None:
    """All runs that were asked for and are not there yet; one repeat of everything before the next."""
    prepare(SETUPS[o.study], o.work)
    done = {(each["study"], each["epsilon"], each["rule"], each["repeat"]) for each in rows(o.work)}
    asked = [(epsilon, rule, repeat) for repeat in range(1, o.repeats + 1) for epsilon in o.epsilon for rule in o.rules]
    for epsilon, rule, repeat in asked:
        if (o.study, epsilon, rule, repeat) in done:
            continue
        each = run(o.study, epsilon, rule, repeat, o)
        with (o.work / "study.jsonl").open("a") as table:
            table.write(json.dumps(each) + "\n")
        told = f"Dice {_spread([each], 'none', 'dice')} and {_spread([each], REFINEMENTS[-1], 'dice')} refined"
        print(f"{o.study}  epsilon {epsilon:g}  {rule}  repeat {repeat}: {told}  {each['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
