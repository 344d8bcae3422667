"""A whole federation on one machine: every site a process of its own, everything on loopback, everything stopped again.

    raw datasets -> settings of each site -> the run's plans, weights, configuration
                 -> SuperLink, one SuperNode for each site, the coordinator -> the model

What differs from a deployment is who decides: one operator owns all sites, so their settings are written here (which
may not refuse what the same person asks for), and patients are counted over all of them. Everything that a site does,
its ledger included, is the same code in the same kind of process.

    folder/config.json ...          as ``new_run``
    folder/settings/NAME.toml       each site's settings
    folder/flower/                  Flower's own files and logs
    folder/simulation.lock          held while it runs

Design note: a run's folder outlives it; ``resume`` starts the processes again and submits the same configuration, and
the coordinator goes on after the last round that it wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_dp.accounting import LARGEST_EPSILON
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.federated.alone import alone_in, lock_of
from nnunet_dp.federated.deployment import ended_early, refuse_without_flower, told_at_ctrl_c
from nnunet_dp.federated.origin import refuse_shared_patients
from nnunet_dp.federated.protocol import Mode
from nnunet_dp.federated.raw_dataset import RawDataset, nnunet_folder, raw_folder, read_raw
from nnunet_dp.federated.site import public_part
from nnunet_dp.replacing import replacing
from nnunet_dp.workers import Progress

Say = Callable[[str], None]
SETTINGS = "settings"
_WHO = "simulation"


@dataclass(frozen=True)
class Simulation:
    """What is asked of one machine beside the run itself (``new_run.RunOptions``).

    Attributes:
        datasets: ids or names of the sites' raw datasets; names in messages come from them.
        folder: the coordinator's; None makes one below nnUNet_results.
        model_dataset: under which nnU-Net will know the model; None takes the first dataset.
        max_epsilon: of each site's settings: most that its ledger may add up to, over all runs.
        device: of every site, cpu or cuda.
        processes: of each site, beside the training.
    """

    datasets: tuple[str, ...]
    folder: Path | None = None
    model_dataset: str | None = None
    max_epsilon: float = LARGEST_EPSILON
    device: str = "cpu"
    processes: int = 1


@dataclass(frozen=True)
class LocalSite:
    """One site of a simulation: its name and its dataset."""

    name: str
    dataset: RawDataset

    @property
    def units(self) -> int:
        """Its patients."""
        return self.dataset.patients.number


def read_sites(datasets: Sequence[str]) -> list[LocalSite]:
    """The sites of a simulation.

    Args:
        datasets: ids or names of raw datasets.

    Raises:
        UsageRefusal: for unknown datasets, the same twice, patients at two sites (as far as ``origin`` knows), and
            datasets that differ in what a network sees.
    """
    raw = [read_raw(raw_folder(dataset)) for dataset in datasets]
    if len({dataset.folder for dataset in raw}) < len(raw) or not raw:
        raise UsageRefusal("--datasets should name each site's own dataset, once: for instance --datasets 301 302")
    refuse_shared_patients(raw)
    for dataset in raw[1:]:
        mine, first = public_part(dict(dataset.description)), public_part(dict(raw[0].description))
        different = [key for key in sorted({*mine, *first}) if mine.get(key) != first.get(key)]
        if different:
            raise UsageRefusal(
                f"{dataset.folder.name} should be described as {raw[0].folder.name} is, found another "
                f"{', '.join(different)} in its dataset.json: sites share one network"
            )
    return [LocalSite(name, dataset) for name, dataset in zip(site_names(raw), raw, strict=True)]


def site_names(datasets: Sequence[RawDataset]) -> list[str]:
    """Short names where they differ, else those of the datasets."""
    short = [dataset.title[-40:].lstrip("_.-") for dataset in datasets]
    return short if len(set(short)) == len(short) else [dataset.folder.name[:40] for dataset in datasets]


def write_settings(folder: Path, site: LocalSite, asked: Simulation, mode: Mode, delta: float | None) -> Path:
    """A site's settings file, with nnU-Net's folders as they are now."""
    values: dict[str, Any] = {
        "name": site.name,
        "dataset": site.dataset.folder.name,
        "max_epsilon": float(asked.max_epsilon),
        **({"delta": delta} if delta is not None else {}),
        **{part: str(nnunet_folder(part).resolve()) for part in ("raw", "preprocessed", "results")},
        "device": asked.device,
        "processes": asked.processes,
        "max_plans": 10_000,  # one operator owns images and plans
        "allow_no_guarantee": mode in (Mode.fedavg, Mode.paper),
    }
    file = folder / SETTINGS / f"{site.name}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as stream:
        stream.write("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()).encode())
    return file


def simulate(asked: Simulation, options: Any, say: Say, progress: Progress | None = None) -> Path:
    """Run a federation to its end.

    Args:
        asked: sites and machine.
        options: ``new_run.RunOptions``.
        say: told everything that is going on, line by line.
        progress: told about the public start.

    Returns:
        The run's folder; ``summary.read_summary`` tells what came out.

    Raises:
        UsageRefusal: before anything starts.
        Refusal: when another simulation works in the folder, and when the run ended otherwise than by finishing.
    """
    refuse_without_flower()
    folder, sites = _new_folder(asked.folder), _sites_of(asked, options)
    with alone_in(folder, _WHO):
        _clear(folder)
        return _decide_and_run(folder, asked, options, sites, say, progress)


def _sites_of(asked: Simulation, options: Any) -> list[LocalSite]:
    sites = read_sites(asked.datasets)
    options.refuse_senseless(len(sites))
    _refuse_weights(options.weights, sites)
    return sites


def _decide_and_run(
    folder: Path, asked: Simulation, options: Any, sites: Sequence[LocalSite], say: Say, progress: Progress | None
) -> Path:
    from nnunet_dp.federated.new_run import Sites, find_plans, make_run
    from nnunet_dp.federated.new_survey import plans_by_survey
    from nnunet_dp.nnunet_federated import default_configuration

    described = public_part(dict(sites[0].dataset.description))
    configuration = options.configuration or default_configuration(described)
    names = [site.dataset.folder.name for site in sites]
    say(f"{len(sites)} sites: {', '.join(site.name for site in sites)}; mode {options.schedule.mode.value}")
    facts = Sites(len(sites), sum(site.units for site in sites), sites[0].dataset.patients.unit, options.delta)
    for site in sites:
        write_settings(folder, site, asked, options.schedule.mode, options.delta)
    if options.fingerprint_share is None:
        found = find_plans(options, described, names)
    else:
        ask = partial(_submitted, folder, say)
        found = plans_by_survey(
            folder, asked, options, described, facts, [site.name for site in sites], ask
        )
    undecided = f"no site was asked yet: the same command with --folder {folder} begins again"
    with told_at_ctrl_c(say, undecided if options.fingerprint_share is None else _again(folder)):
        made = make_run(
            folder=folder,
            options=options,
            dataset_json=described,
            configuration=configuration,
            sites=facts,
            found=found,
            model_dataset=asked.model_dataset or names[0],
            starts=nnunet_folder("preprocessed") / names[0],
            device=device_of(asked.device),
            processes=asked.processes,
            names=[site.name for site in sites],
            say=say,
            progress=progress,
        )
    return run_to_the_end(made.folder, say)


def resume(folder: Path, say: Say, progress: Progress | None = None) -> Path:
    """Go on with a simulation whose folder is given, from its survey or after its last round.

    Raises:
        UsageRefusal: when the folder holds none.
        Refusal: as ``simulate``.
    """
    from nnunet_dp.federated.new_run import CONFIG
    from nnunet_dp.federated.new_survey import BEGUN, read_begun

    surveying = (folder / BEGUN).is_file() and not (folder / CONFIG).is_file()
    begun = (folder / CONFIG).is_file() and any((folder / SETTINGS).glob("*.toml"))
    if not surveying and not begun:
        raise UsageRefusal(f"{folder.name} should be the folder of a simulation, found no {CONFIG}: leave --resume out")
    with alone_in(folder, _WHO):
        if begun:
            return run_to_the_end(folder, say)
        asked, options = read_begun(folder, Simulation)
        return _decide_and_run(folder, asked, options, _sites_of(asked, options), say, progress)


def run_to_the_end(folder: Path, say: Say) -> Path:
    """Start the processes of a simulation, submit its run, follow it, stop everything.

    Raises:
        Refusal: when the run ended otherwise than by finishing.
    """
    from nnunet_dp.federated.new_run import CONFIG

    _submitted(folder, say, folder / CONFIG, folder)
    return folder


def _submitted(folder: Path, say: Say, config: Path, place: Path) -> None:
    """One coordinator, run to its end in ``place`` among all sites of the simulation."""
    from nnunet_dp.federated.flower_processes import FlowerProcesses

    again = _again(folder)
    with FlowerProcesses(folder / "flower") as flower, told_at_ctrl_c(say, again):
        server = flower.start_superlink()
        for settings in sorted((folder / SETTINGS).glob("*.toml")):
            flower.start_supernode(settings.stem, settings, server)
        end = flower.wait(flower.submit(server, config, place), say)
    if end.exit_code:
        raise ended_early(end, again)


def _again(folder: Path) -> str:
    return f"`nnunet-dp fed simulate --resume --folder {folder}` goes on"


def _refuse_weights(weights: Any, sites: Sequence[LocalSite]) -> None:
    names = [site.name for site in sites]
    if weights and set(weights) != set(names):
        raise UsageRefusal(f"--weights should name every site once: {','.join(f'{name}=1' for name in names)}")


def _new_folder(folder: Path | None) -> Path:
    import secrets

    made = folder or nnunet_folder("results") / "federated_runs" / f"run_{secrets.token_hex(4)}"
    _refuse_used(made)
    return made.resolve()


def _refuse_used(folder: Path) -> None:
    undecided = (SETTINGS, lock_of(_WHO))
    if folder.exists() and any(file.name not in undecided for file in folder.iterdir()):
        raise UsageRefusal(f"{folder.name} should be a new folder, found files: --resume goes on with a run")


def _clear(folder: Path) -> None:
    """Without what an attempt with other sites left, who would take part; the folder is held."""
    _refuse_used(folder)
    for file in (folder / SETTINGS).glob("*.toml"):
        file.unlink()


def device_of(name: str) -> Any:
    """Where a public start is made: cuda only where there is one."""
    import torch

    return torch.device(name if name != "cuda" or torch.cuda.is_available() else "cpu")
