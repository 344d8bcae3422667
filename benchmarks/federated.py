"""Federated training: every way to train at equal epsilon for each patient, on phantoms or on a real dataset.

    python benchmarks/federated.py --work WORK --kind ct_kidney --shape 24 32 32 --sites 3 --seeds 0 1 2 3 4 5 6 7 8 9
    python benchmarks/federated.py --work WORK --dataset 4 --plans nnUNetPlansPublic --delta 1e-4

Every way trains the same network from the same public start for the same number of rounds, through ``coordinator`` and
``site.handle`` as Flower's apps call them; a message is answered in a forked process instead of one that Flower starts,
which saves the half minute of imports a round and changes nothing else. Ways:

    start            the public start alone: epsilon 0
    local            every site by itself, adp-fl; judged on its own held-out patients
    fedavg           no privacy: as many gradients a round, in --fedavg-steps local steps of SGD
    dp-fedavg        fixed clipping bound
    adp-fl           threshold that follows a privately counted percentile
    central          all patients at one place, adp-fl, the same epsilon
    central-as-fed   the same with noise multiplier sigma sqrt(K): what K sites that do not share patients cost
    central-sgd      no privacy, all patients at one place, as many gradients

The learning rate is the rule's for the federated run; ``central``, whose signal is stronger, gets the rule's own.
One row a run is added to WORK/federated.jsonl; what stands there is not run again. ``--summary`` prints the tables.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from federated_worlds import DATASET, NAME, UNION, World, find_world, phantom_world, real_world
from judging import Judge

WAYS = ("start", "local", "fedavg", "dp-fedavg", "adp-fl", "central", "central-as-fed", "central-sgd")
WITHOUT_PRIVACY = ("fedavg", "central-sgd")
CENTRAL = ("central", "central-as-fed", "central-sgd")

Scores = dict[str, dict[str, Any]]  # of each site: dice, hd95, dice_of_each_case


def settings(name: str, root: Path, delta: float) -> Any:
    from nnunet_dp.federated.site_settings import SiteSettings

    folders = {part: root / part for part in ("raw", "preprocessed", "results")}
    more = {"delta": delta, "allow_no_guarantee": True, "max_epsilon": 1000.0, "max_plans": 1000}
    return SiteSettings(name=name, dataset=str(DATASET), **folders, **more)


class Forked:
    """A transport: every message is answered in a process of its own, on this machine, one after the other."""

    def __init__(self, sites: Mapping[str, Any]) -> None:
        for module in ("federated.site", "federated.site_plans", "federated.site_round", "nnunet_site"):
            importlib.import_module(f"nnunet_dp.{module}")  # here, so that no child has to
        self._sites, self._context = sites, multiprocessing.get_context("fork")

    def sites(self, minimum: int, timeout_s: float) -> list[str]:
        return sorted(self._sites)

    def exchange(self, kind: str, messages: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        return {node: self._answered(kind, node, message) for node, message in messages.items()}

    def _answered(self, kind: str, node: str, message: Any) -> Any:
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(there, kind, message, self._sites[node]))
        process.start()
        there.close()
        reply = here.recv()
        process.join()
        return reply


def _answer(pipe: Any, kind: str, message: Any, site: Any) -> None:
    from nnunet_dp.federated.site import handle

    pipe.send(handle(kind, *message, site))
    pipe.close()


# ---- one run -----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, world: World, way: str, epsilon: float, seed: int) -> dict[str, Any]:
    """Train one way and judge it on each site's held-out patients."""
    began, curve, spent = time.time(), [], 0.0
    if way == "local":
        scores = {}
        for name in world.names:
            config, weights, result, _ = trained(options, world, way, [name], epsilon)
            scores |= judged(config, weights, world, [name])
            spent = max(spent, result.epsilon)
    else:
        taking_part = [UNION] if way in CENTRAL else list(world.names)
        config, weights, result, curve = trained(options, world, way, taking_part, epsilon)
        scores = judged(config, weights, world, world.names)
        spent = result.epsilon if result is not None and way not in WITHOUT_PRIVACY else 0.0
    return {
        "way": way, "epsilon": epsilon, "seed": seed, "rounds": options.rounds,
        "dice": mean(site["dice"] for site in scores.values()), "hd95": mean(site["hd95"] for site in scores.values()),
        "of_each_site": scores, "curve": curve, "spent": spent, "seconds": round(time.time() - began),
    }  # fmt: skip


def as_federated(epsilon: float, options: argparse.Namespace) -> float:
    """Epsilon of the same schedule with sqrt(K) times the noise."""
    from dp_accounting.dp_event import SelfComposedDpEvent

    from nnunet_dp import accounting
    from nnunet_dp.mechanisms import SubsampledGaussian

    def schedule(noise: float) -> Any:
        return SelfComposedDpEvent(SubsampledGaussian(noise, options.sampling).event, options.rounds)

    budget = accounting.PrivacyBudget(epsilon=epsilon, delta=options.delta)
    return accounting.epsilon(
        [schedule(math.sqrt(options.sites) * accounting.calibrate(schedule, budget))], options.delta
    )


def trained(
    options: argparse.Namespace, world: World, way: str, names: Sequence[str], epsilon: float
) -> tuple[Any, Mapping[str, np.ndarray], Any, list[float]]:
    """Config, weights, result and Dice after rounds of one run."""
    import torch
    from safetensors.numpy import load_file

    from nnunet_dp.federated.coordinator import Coordinator
    from nnunet_dp.federated.new_run import RunOptions, Schedule, Sites, make_run
    from nnunet_dp.federated.protocol import Mode
    from nnunet_dp.federated.run_config import read_config
    from nnunet_dp.federated.server_state import read_state
    from nnunet_dp.federated.site import public_part

    place = options.work / f"run_{os.getpid()}"
    described = public_part(json.loads((world.raw(names[0]) / "dataset.json").read_text()))
    mode = Mode.fedavg if way in WITHOUT_PRIVACY else Mode.dp_fedavg if way == "dp-fedavg" else Mode.adp_fl
    plain = {"local_steps": options.fedavg_steps, "sampling_probability": options.sampling / options.fedavg_steps}
    schedule = Schedule(
        mode, options.rounds, start_iterations=options.iterations, features=tuple(options.features) or None,
        **(plain if mode is Mode.fedavg else {"sampling_probability": options.sampling}),
    )  # fmt: skip
    of_rule = Sites(1 if way == "central" else options.sites, world.units, "patient", options.delta)
    agreed = RunOptions(schedule, epsilon=epsilon, delta=options.delta, minimum_replies=min(len(names), of_rule.number))
    model = make_run(
        place / "run", agreed, described, world.configuration, of_rule, public_plans(options, described), NAME,
        options.work / "starts", torch.device("cpu"),
    )  # fmt: skip
    config = read_config(model.config)
    asked = as_federated(epsilon, options) if way == "central-as-fed" else epsilon
    config = config.model_copy(
        update={
            "terms": config.terms.model_copy(update={"epsilon": asked}),
            "sites": len(names),
            "minimum_replies": len(names),
        }
    )
    if way == "start":
        return config, load_file(config.initial_weights), None, []
    prepare(world, names, config, options)
    curve: list[float] = []

    def watch(line: str) -> None:
        state = read_state(place / "run", config.terms)
        if options.curve and state is not None and state.round > len(curve) * options.curve:
            curve.append(mean(site["dice"] for site in judged(config, state.weights, world, world.names).values()))

    kept: list[Any] = []
    roots = world.copied(names, place / "sites")
    transport = Forked({name: settings(name, root, options.delta) for name, root in roots.items()})
    write = lambda config, weights, facts, steps: kept.append(weights)  # noqa: E731
    result = Coordinator(config, transport, place / "run", watch, write).run()
    shutil.rmtree(place)
    return config, kept[-1], result, curve


def prepare(world: World, names: Sequence[str], config: Any, options: argparse.Namespace) -> None:
    """Have the world's own folders preprocessed, so that their copies are."""
    from nnunet_dp.federated.protocol import PrepareRequest

    request = PrepareRequest(
        run="0", plans=config.plans, dataset_json=config.dataset_json, configuration=config.terms.configuration,
        plans_sha256=config.terms.plans_sha256,
    ).model_dump_json()  # fmt: skip
    transport = Forked({name: settings(name, world.folder / name, options.delta) for name in names})
    for name, (reply, _) in transport.exchange("prepare", {name: (request, {}) for name in names}, math.inf).items():
        if json.loads(reply)["code"] != "ok":
            raise SystemExit(f"{name} should have prepared, found {reply}")


def public_plans(options: argparse.Namespace, described: Mapping[str, Any]) -> Any:
    """From phantoms, made once; for a real dataset those that ``nnunet-dp public-plans`` made."""
    from nnunet_dp.nnunet_public_plans import PublicPlans, plans_from_phantoms

    if options.dataset:
        from nnunet_dp.nnunet_federated import named_plans

        return PublicPlans(named_plans(options.dataset, options.plans).plans, options.plans, True)
    file = options.work / "public_plans.json"
    if not file.is_file():
        found = plans_from_phantoms(described, options.kind, shape=tuple(options.shape))
        file.write_text(json.dumps(found.plans))
    return PublicPlans(json.loads(file.read_text()), f"{options.kind} phantoms", True)


# ---- judging -----------------------------------------------------------------------------------------------------


def judged(config: Any, weights: Mapping[str, np.ndarray], world: World, names: Sequence[str]) -> Scores:
    """Each site's held-out cases, predicted by nnU-Net's own predictor without mirroring."""
    import torch

    from nnunet_dp.nnunet_start import planned_network

    plans = {"dataset_name": "Dataset000_Benchmark", **config.plans}
    network = planned_network(plans, config.terms.configuration, dict(config.dataset_json))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    judge = Judge(plans, config.terms.configuration, config.dataset_json, network)
    return {name: judge.scores(world.held_out(name)) for name in names}


# ---- tables ------------------------------------------------------------------------------------------------------


def rows(work: Path) -> list[dict[str, Any]]:
    file = work / "federated.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def summary(found: Sequence[Mapping[str, Any]]) -> None:
    """Means over runs, and differences to dp-fedavg and to central-as-fed of the same seed, by case."""
    print("| epsilon | way | runs | Dice | HD95 | lowest and highest site | over dp-fedavg | over central-as-fed |")
    print("|---|---|---|---|---|---|---|---|")
    by = {(row["epsilon"], row["way"], row["seed"]): row for row in found}
    for epsilon in sorted({row["epsilon"] for row in found}):
        for way in WAYS:
            mine = [row for (e, w, _), row in sorted(by.items()) if (e, w) == (epsilon, way)]
            if mine:
                sites = [mean(row["of_each_site"][s]["dice"] for row in mine) for s in mine[0]["of_each_site"]]
                told = [_difference(by, epsilon, way, other) for other in ("dp-fedavg", "central-as-fed")]
                dice, hd95 = (_spread([row[metric] for row in mine], n) for metric, n in (("dice", 4), ("hd95", 2)))
                extremes = f"{min(sites):.3f} {max(sites):.3f}"
                print(f"| {epsilon:g} | {way} | {len(mine)} | {dice} | {hd95} | {extremes} | {' | '.join(told)} |")


def _difference(by: Mapping[Any, Mapping[str, Any]], epsilon: float, way: str, other: str) -> str:
    """Mean paired difference with its 95 % interval: over runs where there are several, else over cases."""
    if way == other:
        return ""
    pairs = [
        (row, by[e, other, s]) for (e, w, s), row in by.items() if (e, w) == (epsilon, way) and (e, other, s) in by
    ]
    if not pairs:
        return ""
    if len(pairs) > 2:
        paired = [mine["dice"] - theirs["dice"] for mine, theirs in pairs]
    else:
        paired = [a - b for mine, theirs in pairs for a, b in zip(_of_cases(mine), _of_cases(theirs), strict=True)]
    from scipy.stats import t

    half = float(t.ppf(0.975, len(paired) - 1)) * stdev(paired) / math.sqrt(len(paired))
    over = "runs" if len(pairs) > 2 else "cases"
    return f"{mean(paired):+.4f} ± {half:.4f} ({len(paired)} {over})"


def _of_cases(row: Mapping[str, Any]) -> list[float]:
    return [dice for _, site in sorted(row["of_each_site"].items()) for dice in site["dice_of_each_case"].values()]


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    phantoms = parser.add_argument_group("phantoms")
    phantoms.add_argument("--kind", default="lesion", choices=("lesion", "layers", "ct_kidney", "mpmri", "heart"))
    phantoms.add_argument("--patients", type=int, default=30, help="of each site")
    phantoms.add_argument("--held-out", type=int, default=10, help="of each site")
    phantoms.add_argument("--shape", type=int, nargs="+", default=[48, 48])
    real = parser.add_argument_group("a real dataset, by nnU-Net's folders")
    real.add_argument("--dataset", help="number")
    real.add_argument("--plans", default="nnUNetPlansPublic", help="public plans in its preprocessed folder")
    real.add_argument("--fold", type=int, default=0)
    real.add_argument("--patients-file", type=Path)
    real.add_argument("--patient-column")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 3.0, 8.0])
    parser.add_argument("--delta", type=float, default=1e-3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sampling", type=float, default=1.0, help="of each patient into each round's private step")
    parser.add_argument("--fedavg-steps", type=int, default=10, help="local steps a round, each of 1/so many of those")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--iterations", type=int, help="of the public start; default: the plan's")
    parser.add_argument("--features", type=int, nargs="*", default=[], help="of each stage; default: the rule's")
    parser.add_argument("--curve", type=int, default=0, help="judge after every so many rounds, too")
    parser.add_argument("--summary", action="store_true", help="only print the tables")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    for part in ("raw", "preprocessed", "results"):
        os.environ.setdefault(f"nnUNet_{part}", str(options.work / "coordinator"))
    if not options.summary:
        import torch

        torch.set_num_threads(1)
        measure(options)
    summary(rows(options.work))


def measure(options: argparse.Namespace) -> None:
    done = {(row["way"], row["epsilon"], row["seed"]) for row in rows(options.work)}
    for seed in options.seeds:
        world = make_world(options, seed)
        for epsilon in options.epsilon:
            for way in options.ways:
                at = 0.0 if way in ("start", *WITHOUT_PRIVACY) else epsilon
                if (way, at, seed) not in done:
                    row = run(options, world, way, epsilon, seed) | {"epsilon": at}
                    done.add((way, at, seed))
                    with (options.work / "federated.jsonl").open("a") as table:
                        table.write(json.dumps(row) + "\n")
                    told = f"Dice {row['dice']:.4f}  HD95 {row['hd95']:.2f}  {row['seconds']} s"
                    print(f"seed {seed}  epsilon {at:g}  {way}: {told}", flush=True)


def make_world(options: argparse.Namespace, seed: int) -> World:
    folder = options.work / f"seed_{seed}"
    known = find_world(folder)
    if known is not None:
        return known
    if options.dataset:
        from nnunet_dp.federated.raw_dataset import raw_folder

        raw, patients = raw_folder(options.dataset), (options.patients_file, options.patient_column)
        return real_world(folder, raw, options.sites, seed, options.fold, *patients)
    counts = (options.sites, options.patients, options.held_out)
    return phantom_world(folder, options.kind, *counts, tuple(options.shape), seed)


if __name__ == "__main__":
    main()
