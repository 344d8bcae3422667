"""Federated training on phantoms: local only, FedAvg, DP-FedAvg, ADP-FL and centralised DP at equal epsilon a patient.

    python benchmarks/federated.py --work WORK --epsilon 1 3 8 --seeds 0 1 2 3 4 5 6 7 8 9

Each seed draws new patients for every site, held-out ones too. Every way trains the same network from the same public
start for the same number of steps with the same learning rate rule, through ``coordinator`` and ``site.handle`` as
Flower's apps call them; a message is answered in a forked process instead of one that Flower starts, which saves the
half minute of imports a round and changes nothing else. Ways:

    local            every site by itself, adp-fl; judged on its own held-out patients
    fedavg           no privacy
    dp-fedavg        fixed clipping bound
    adp-fl           threshold that follows a privately counted percentile
    central          all patients at one place, adp-fl, the same epsilon
    central-as-fed   the same with noise multiplier sigma sqrt(K): what K sites that do not share patients cost

One row a run is added to WORK/federated.jsonl; what stands there is not run again. ``--summary`` prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

WAYS = ("local", "fedavg", "dp-fedavg", "adp-fl", "central", "central-as-fed")
DATASET = 412
DELTA = 1e-3


@dataclass(frozen=True)
class World:
    """One seed's sites: folders that were prepared once, copied for every run.

    Attributes:
        folder: of the seed.
        names: of the sites, and ``all`` for their union.
    """

    folder: Path
    names: tuple[str, ...]

    def copied(self, names: Sequence[str], to: Path) -> dict[str, Path]:
        """Fresh sites: no ledger, no state."""
        shutil.rmtree(to, ignore_errors=True)
        return {name: Path(shutil.copytree(self.folder / name, to / name)) for name in names}


def settings(name: str, root: Path) -> Any:
    from nnunet_dp.federated.site_settings import SiteSettings

    folders = {part: root / part for part in ("raw", "preprocessed", "results")}
    more = {"delta": DELTA, "allow_no_guarantee": True, "max_epsilon": 1000.0}
    return SiteSettings(name=name, dataset=str(DATASET), **folders, **more)


class Forked:
    """A transport: every message is answered in a process of its own, on this machine, one after the other."""

    def __init__(self, sites: Mapping[str, Any]) -> None:
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


# ---- a seed's patients -------------------------------------------------------------------------------------------


def make_world(options: argparse.Namespace, seed: int) -> World:
    """Raw datasets of all sites and of their union, held-out patients in imagesTs."""
    from nnunet_dp.phantoms import write_dataset

    names = tuple(f"site{k}" for k in range(1, options.sites + 1))
    world = World(options.work / f"seed_{seed}", (*names, "all"))
    if (world.folder / "all").is_dir():
        return world
    partial = world.folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for number, name in enumerate(names):
        raw = partial / name / "raw"
        raw.mkdir(parents=True)
        written = write_dataset(
            raw, options.kind, options.patients, 1000 + 50 * seed + number, dataset_id=DATASET,
            shape=tuple(options.shape), test_patients=options.held_out,
        )  # fmt: skip
        _shift(written, number, options.sites)
    _join([partial / name / "raw" for name in names], partial / "all" / "raw")
    partial.rename(world.folder)
    return world


def _shift(dataset: Path, number: int, sites: int) -> None:
    """Acquisition: each site has a brightness, contrast and sharpness of its own."""
    import SimpleITK as sitk

    place = number / max(1, sites - 1) - 0.5  # -0.5 ... 0.5
    for file in [*dataset.glob("imagesT*/*.png")]:
        image = sitk.ReadImage(str(file))
        array = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(image, 0.6 + place)).astype(float)
        array = (array - 128) * (1 + 0.6 * place) + 128 + 50 * place
        changed = sitk.GetImageFromArray(np.clip(array, 0, 255).astype(np.uint8), isVector=array.ndim == 3)
        sitk.WriteImage(changed, str(file))


def _join(sources: Sequence[Path], target: Path) -> None:
    """All sites' cases in one dataset; case and patient names get the site's number in front."""
    rows, training = ["case,patient"], 0
    for number, source in enumerate(sources, 1):
        (dataset,) = source.iterdir()
        into = target / dataset.name
        for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (into / part).mkdir(parents=True, exist_ok=True)
            for file in sorted((dataset / part).iterdir()):
                shutil.copyfile(file, into / part / f"s{number}{file.name}")
        description = json.loads((dataset / "dataset.json").read_text())
        training += description["numTraining"]
        (into / "dataset.json").write_text(json.dumps(description | {"numTraining": training}))
        lines = (dataset / "patients.csv").read_text().splitlines()[1:]
        rows += [",".join(f"s{number}{cell}" for cell in line.split(",")[:2]) for line in lines]
    (into / "patients.csv").write_text("\n".join(rows) + "\n")


# ---- one run -----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, world: World, way: str, epsilon: float, seed: int) -> dict[str, Any]:
    """Train one way and judge it on each site's held-out patients."""
    sites = [name for name in world.names if name != "all"]
    began = time.time()
    if way == "local":
        found = {name: trained(options, world, [name], "adp-fl", epsilon, seed) for name in sites}
        dice = {name: judged(*found[name], world.folder / name) for name in sites}
        spent = max(result.epsilon for *_, result in found.values())
    else:
        taking_part = ["all"] if way.startswith("central") else sites
        mode = "adp-fl" if way.startswith("central") else way
        weaker = as_federated(epsilon, options) if way == "central-as-fed" else epsilon
        model = trained(options, world, taking_part, mode, weaker, seed, weights_of_epsilon=epsilon)
        dice = {name: judged(*model, world.folder / name) for name in sites}
        spent = model[-1].epsilon
    return {
        "way": way, "epsilon": epsilon, "seed": seed, "dice": mean(dice.values()), "of_each_site": dice,
        "spent": spent, "seconds": round(time.time() - began),
    }  # fmt: skip


def as_federated(epsilon: float, options: argparse.Namespace) -> float:
    """Epsilon of the same schedule with sqrt(K) times the noise."""
    from dp_accounting.dp_event import GaussianDpEvent, SelfComposedDpEvent

    from nnunet_dp import accounting

    def schedule(noise: float) -> Any:
        return SelfComposedDpEvent(GaussianDpEvent(noise), options.rounds * options.local_steps)

    budget = accounting.PrivacyBudget(epsilon=epsilon, delta=DELTA)
    return accounting.epsilon([schedule(math.sqrt(options.sites) * accounting.calibrate(schedule, budget))], DELTA)


def trained(
    options: argparse.Namespace, world: World, names: Sequence[str], mode: str, epsilon: float, seed: int,
    weights_of_epsilon: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Config, weights and result of one run; its learning rate is that of the federated run."""
    import torch

    from nnunet_dp.federated.coordinator import Coordinator
    from nnunet_dp.federated.new_run import RunOptions, Schedule, Sites, make_run
    from nnunet_dp.federated.protocol import Mode
    from nnunet_dp.federated.run_config import read_config
    from nnunet_dp.federated.site import public_part

    place = options.work / f"run_{seed}_{os.getpid()}"
    roots = world.copied(names, place / "sites")
    (raw,) = (roots[names[0]] / "raw").iterdir()
    described = public_part(json.loads((raw / "dataset.json").read_text()))
    schedule = Schedule(Mode(mode), options.rounds, options.local_steps, start_iterations=options.iterations)
    units = options.patients * options.sites
    agreed = RunOptions(schedule, epsilon=weights_of_epsilon or epsilon, delta=DELTA, minimum_replies=len(names))
    public = public_plans(options, described)
    model = make_run(
        place / "run", agreed, described, "2d", Sites(options.sites, units, "patient", DELTA), public,
        f"Dataset{DATASET}_Benchmark", options.work / "starts", torch.device("cpu"),
    )  # fmt: skip
    config = read_config(model.config)
    config = config.model_copy(
        update={"terms": config.terms.model_copy(update={"epsilon": epsilon}), "sites": len(names)}
    )
    kept: list[Any] = []
    transport = Forked({name: settings(name, root) for name, root in roots.items()})
    write = lambda config, weights, facts, steps: kept.append(weights)  # noqa: E731
    result = Coordinator(config, transport, place / "run", lambda line: None, write).run()
    shutil.rmtree(place)
    return config, kept[-1], result


def public_plans(options: argparse.Namespace, described: Mapping[str, Any]) -> Any:
    """From phantoms of another seed, made once."""
    from nnunet_dp.nnunet_public_plans import PublicPlans, plans_from_phantoms

    file = options.work / "public_plans.json"
    if not file.is_file():
        found = plans_from_phantoms(described, options.kind, shape=tuple(options.shape))
        file.write_text(json.dumps(found.plans))
    return PublicPlans(json.loads(file.read_text()), f"{options.kind} phantoms", True)


def judged(config: Any, weights: Mapping[str, np.ndarray], result: Any, site: Path) -> float:
    """Mean foreground Dice over the site's held-out cases, with nnU-Net's own predictor."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_dp.nnunet_start import planned_network

    plans = {"dataset_name": "Dataset000_Benchmark", **config.plans}
    network = planned_network(plans, config.terms.configuration, dict(config.dataset_json))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    network.decoder.deep_supervision = False
    manager = PlansManager(plans)
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), verbose=False, allow_tqdm=False)
    description = {**config.dataset_json, "numTraining": 1}
    predictor.manual_initialization(
        network, manager, manager.get_configuration(config.terms.configuration), [network.state_dict()], description,
        "benchmark", None,
    )  # fmt: skip
    reader = manager.image_reader_writer_class()
    (dataset,) = (site / "raw").iterdir()
    ending, found = description["file_ending"], []
    for truth_file in sorted((dataset / "labelsTs").glob(f"*{ending}")):
        images = sorted((dataset / "imagesTs").glob(f"{truth_file.name.removesuffix(ending)}_*{ending}"))
        image, properties = reader.read_images([str(file) for file in images])
        truth = reader.read_seg(str(truth_file))[0][0]
        guess = np.asarray(predictor.predict_single_npy_array(image, properties))
        guess = guess[0] if guess.ndim > truth.ndim else guess
        for label in sorted({int(value) for value in np.unique(truth)} - {0}):
            a, b = guess == label, truth == label
            found.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    return float(mean(found))


# ---- table -------------------------------------------------------------------------------------------------------


def rows(work: Path) -> list[dict[str, Any]]:
    file = work / "federated.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def summary(found: Sequence[Mapping[str, Any]]) -> None:
    print("| epsilon | way | runs | Dice, mean ± deviation over runs | over dp-fedavg, paired by seed | worst run |")
    print("|---|---|---|---|---|---|")
    by = {(row["epsilon"], row["way"], row["seed"]): row["dice"] for row in found}
    for epsilon in sorted({row["epsilon"] for row in found}):
        for way in WAYS:
            dice = {seed: value for (e, w, seed), value in by.items() if (e, w) == (epsilon, way)}
            if not dice:
                continue
            paired = [v - by[epsilon, "dp-fedavg", s] for s, v in dice.items() if (epsilon, "dp-fedavg", s) in by]
            told = _spread(paired) if way != "dp-fedavg" and paired else ""
            scores = list(dice.values())
            print(f"| {epsilon:g} | {way} | {len(scores)} | {_spread(scores)} | {told} | {min(scores):.3f} |")


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kind", default="lesion", choices=("lesion", "layers"))
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--patients", type=int, default=30, help="of each site")
    parser.add_argument("--held-out", type=int, default=10, help="of each site")
    parser.add_argument("--shape", type=int, nargs="+", default=[48, 48])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 3.0, 8.0])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--iterations", type=int, default=300, help="of the public start")
    parser.add_argument("--summary", action="store_true", help="only print the table")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    for part in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{part}"] = str(options.work / "coordinator")
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
                if (way, epsilon, seed) not in done:
                    row = run(options, world, way, epsilon, seed)
                    with (options.work / "federated.jsonl").open("a") as table:
                        table.write(json.dumps(row) + "\n")
                    told = f"Dice {row['dice']:.4f}  {row['seconds']} s"
                    print(f"seed {seed}  epsilon {epsilon:g}  {way}: {told}", flush=True)


if __name__ == "__main__":
    main()
