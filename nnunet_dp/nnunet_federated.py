"""What a coordinator asks of nnU-Net: the plans that it sends, the weights to begin from, the model in the end.

    plans (public ones from phantoms, or some that are named)
      -> ``plan_run``          the small network of ``nnunet-dp plan``, schedule and learning rate for K sites
      -> ``initial_weights``   a public start from phantoms, or random ones with a public seed
      -> ``write_model``       an ordinary model folder, for nnUNetv2_predict

What ``nnunet-dp plan`` decides for one dataset is decided here for all sites together, by the same rules
(``planning``) from the same kind of public facts: the number of units over all sites, the plans' patch size and
topology. Two things differ. Rounds and local steps are given, and the steps of the schedule are their product. And each
of K sites adds noise for its own sum: the mean of their updates carries 1/sqrt(K) of one site's, so that noise is as
small against the signal as with N/K sqrt(K) patients at one place.

Formal guarantee:
    Nothing here reads a private image or label, or a private section of plans. The weights to begin from are a function
    of plans, seed and the phantoms' code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dp import nnunet
from nnunet_dp.accounting import PrivacyBudget, default_delta
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.federated.protocol import Mode
from nnunet_dp.gradients import trainable
from nnunet_dp.morphology import classes_from
from nnunet_dp.nnunet_planning import count_parameters
from nnunet_dp.nnunet_public_plans import PublicPlans, default_configuration, plans_from_phantoms, public_facts
from nnunet_dp.nnunet_start import Say, ensure_start, planned_network
from nnunet_dp.phantoms.matching import matching_kinds, resemble
from nnunet_dp.planning import TRAINING_SHARE, learning_rate, plan_configuration, signal_to_noise
from nnunet_dp.plans import (
    SECTION,
    json_sha256,
    read_plans,
    read_section,
    shrunk_architecture,
    with_section,
    write_json,
)
from nnunet_dp.run import FINAL, write_checkpoint
from nnunet_dp.sections import ByHand, ConfigurationPlan, PrivacySection, PublicStart
from nnunet_dp.workers import Progress

TRAINER = "nnUNetTrainerDP_Federated"
STOCK_TRAINER = "nnUNetTrainer"
FEDERATED = "federated.json"
SITE_PLANS = "nnUNetPlansFed"
_BOUND = 0.1  # of a patient's gradient, as ``planning.clip_rules`` has it
_FEDAVG = {"learning_rate": 0.01, "momentum": 0.99}  # nnU-Net's own SGD

__all__ = ["PublicPlans", "default_configuration", "plans_from_phantoms"]  # a coordinator's one module of nnU-Net


# ---- plans -------------------------------------------------------------------------------------------------------


def named_plans(dataset: str, name: str = "nnUNetPlans") -> PublicPlans:
    """Plans of a preprocessed dataset; whether they are public nobody knows here.

    Raises:
        UsageRefusal: for unknown datasets and plans, and for plans with a private section.
    """
    folder = nnunet.preprocessed_folder(dataset)
    file = folder / f"{name}.json"
    if not file.is_file():
        found = ", ".join(sorted(f.stem for f in folder.glob("*lans*.json"))) or "none"
        raise UsageRefusal(f"{folder.name} has no plans {name}; found: {found}. Run nnUNetv2_plan_and_preprocess")
    plans = read_plans(file)
    if read_section(plans) is not None:
        raise UsageRefusal(f"{name} are one dataset's private plans: name the plans they were made from")
    return PublicPlans(plans, f"{name} of {folder.name}", False)


@dataclass(frozen=True)
class Sites:
    """What is public about the sites together.

    Attributes:
        number: of sites.
        units: patients over all of them.
        unit: what they are called.
        delta: of each site's budget; None follows the size of the average site.
    """

    number: int
    units: int
    unit: str = "patient"
    delta: float | None = None

    def budget(self, epsilon: float) -> PrivacyBudget:
        """One average site's."""
        return PrivacyBudget(
            epsilon=epsilon, delta=self.delta or default_delta(max(1, self.units // self.number)), unit=self.unit
        )


@dataclass(frozen=True)
class Schedule:
    """Rounds, and what is set in place of a rule (None leaves it to the rule).

    Attributes:
        mode: of training.
        rounds: planned.
        local_steps: in each.
        sampling_probability: of each patient and step.
        noise: of the gradient.
        learning_rate: of the first step.
        momentum: of SGD.
        bound: of a patient's gradient, or the threshold's first value.
        start: whether to begin from phantoms.
        start_iterations: of that, in place of the recipe's.
        start_images: phantoms drawn for it, in place of the recipe's.
        features: of each stage of the network.
    """

    mode: Mode
    rounds: int
    local_steps: int = 1
    sampling_probability: float = 1.0
    noise: str = "gaussian"
    learning_rate: float | None = None
    momentum: float | None = None
    bound: float | None = None
    start: bool = True
    start_iterations: int | None = None
    start_images: int | None = None
    features: tuple[int, ...] | None = None

    @property
    def steps(self) -> int:
        """Private steps in all."""
        return self.rounds * self.local_steps


@dataclass(frozen=True)
class RunPlan:
    """What the coordinator decided, from public facts alone.

    Attributes:
        plans: as sent to the sites: the small network, no private section.
        configuration: nnU-Net's name.
        dataset_json: public description that the plans are for.
        learning_rate: of the first step.
        momentum: of SGD.
        bound: see ``Schedule``.
        signal_to_noise: as ``nnunet-dp plan`` shows it, for all sites together.
        for_start: the plans with the recipe of the public start, for this machine only.
    """

    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    learning_rate: float
    momentum: float
    bound: float
    signal_to_noise: float
    for_start: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Of the plans, as sites confirm it."""
        return json_sha256(self.plans)

    @property
    def recipe(self) -> PublicStart | None:
        """Of the public start, if there is one."""
        section = read_section(self.for_start)
        assert section is not None
        return section.configurations[self.configuration].start

    @property
    def parameters(self) -> int:
        """Trainable ones."""
        section = read_section(self.for_start)
        assert section is not None
        return section.configurations[self.configuration].network.parameters


def plan_run(
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    sites: Sites,
    epsilon: float,
    schedule: Schedule,
    plans_name: str | None = None,
) -> RunPlan:
    """Size of the network, learning rate and public start for a run.

    Args:
        plans: nnU-Net's.
        configuration: its name.
        dataset_json: public description of the sites' datasets.
        sites: public facts about them.
        epsilon: of each site.
        schedule: given and left open.
        plans_name: of the plans that are sent; None follows their content, so that the same plans are not preprocessed
            twice.

    Raises:
        UsageRefusal: for an unknown configuration, and for features that this network cannot have.
    """
    source = json.loads(json.dumps(dict(plans)))
    if configuration not in source["configurations"]:
        known = ", ".join(source["configurations"])
        raise UsageRefusal(f"the plans have no configuration {configuration}; they have: {known}. Name one with -c")
    source["configurations"] = {configuration: PlansManager(source).get_configuration(configuration).configuration}
    described = dict(dataset_json)
    plan = _configuration_plan(source, configuration, described, sites, epsilon, schedule)
    signal = signal_to_noise(
        sites.budget(epsilon), sites.units / math.sqrt(sites.number), plan.network.parameters
    )  # N/K patients a site, and sqrt(K) from K noises that are averaged
    private = _with_recipe(source, configuration, sites, epsilon, plan)
    sent = _sent(private, configuration, plans_name)
    near = plan.start is not None and resemble(plan.start.kinds)
    rates = _FEDAVG if schedule.mode is Mode.fedavg else {
        "learning_rate": learning_rate(schedule.steps, signal if near else None), "momentum": 0.0
    }  # fmt: skip
    return RunPlan(
        plans=sent,
        configuration=configuration,
        dataset_json=described,
        learning_rate=_given(schedule.learning_rate, rates["learning_rate"]),
        momentum=_given(schedule.momentum, rates["momentum"]),
        bound=_given(schedule.bound, _bound(schedule, plan.network.parameters)),
        signal_to_noise=signal,
        for_start={**private, "plans_name": sent["plans_name"]},
    )


def _given(value: float | None, ruled: float) -> float:
    return ruled if value is None else value


def _bound(schedule: Schedule, parameters: int) -> float:
    """An L1 norm is up to sqrt(parameters) times the L2 norm, and of that order for a gradient."""
    return _BOUND * math.sqrt(parameters) if schedule.noise == "laplace" else _BOUND


def _configuration_plan(
    source: dict[str, Any], configuration: str, dataset_json: dict[str, Any], sites: Sites, epsilon: float,
    schedule: Schedule,
) -> ConfigurationPlan:  # fmt: skip
    """As ``nnunet-dp plan`` would for a dataset whose training patients are all sites' together."""
    configured = source["configurations"][configuration]
    facts = public_facts(source, dataset_json)
    plan = plan_configuration(
        sites.budget(epsilon),
        max(1, round(sites.units / TRAINING_SHARE)),
        tuple(configured["patch_size"]),
        configured["architecture"]["arch_kwargs"]["strides"],
        lambda features: count_parameters(source, configuration, dataset_json, features),
        "full",
        tuple(round(edge) for edge in source.get("original_median_shape_after_transp", ())),
        0.0,
        len(classes_from(dataset_json).classes),
        matching_kinds(facts) if schedule.start else (),
        ByHand(
            steps=schedule.steps,
            sampling_probability=schedule.sampling_probability,
            features_per_stage=schedule.features,
        ),
    )
    changes = {"iterations": schedule.start_iterations, "images": schedule.start_images}
    given = {key: value for key, value in changes.items() if value is not None}
    return plan.model_copy(update={"start": plan.start.model_copy(update=given)}) if plan.start and given else plan


def _with_recipe(
    source: dict[str, Any], configuration: str, sites: Sites, epsilon: float, plan: ConfigurationPlan
) -> dict[str, Any]:
    """Plans with a section, which ``ensure_start`` reads its recipe from; they stay on this machine."""
    section = PrivacySection(
        budget=sites.budget(epsilon),
        patients=max(1, sites.units // sites.number),
        patients_file_sha256=None,
        source_plans=source["plans_name"],
        not_covered=(),
        configurations={configuration: plan},
    )
    configured = source["configurations"][configuration]
    smaller = shrunk_architecture(configured["architecture"], plan.network.features_per_stage)
    return with_section(source, source["plans_name"], section, {configuration: smaller})


def _sent(private: dict[str, Any], configuration: str, plans_name: str | None) -> dict[str, Any]:
    """What sites get: no section, no folder of the source, a name of its own, no coupling of patients."""
    sent = {key: value for key, value in private.items() if key not in (SECTION, "dataset_name", "continue_training")}
    sent["configurations"][configuration]["batch_dice"] = False
    sent["configurations"][configuration].pop("next_stage", None)
    sent["configurations"][configuration].pop("data_identifier", None)
    sent.pop("plans_name")
    return {"plans_name": plans_name or f"{SITE_PLANS}_{json_sha256(sent)[:8]}", **sent}


# ---- weights -----------------------------------------------------------------------------------------------------


def initial_weights(
    plan: RunPlan,
    folder: Path,
    device: torch.device,
    processes: int,
    seed: int = 0,
    say: Say = lambda text: None,
    progress: Progress | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Weights that all sites begin from, by the names of the trainable parameters.

    Args:
        plan: of the run.
        folder: in which a public start is kept and found again.
        device: where to make one.
        processes: that draw phantoms.
        seed: of random weights, where there is no public start.
        say: told what is going on.
        progress: told about the public start.

    Returns:
        Arrays [float32], and how they came about.
    """
    network = _seeded_network(plan, seed)
    provenance: dict[str, Any] = {"start": "random weights", "seed": seed}
    if plan.recipe is not None:
        folder.mkdir(parents=True, exist_ok=True)
        weights, made = ensure_start(
            plan.for_start, plan.configuration, plan.dataset_json, folder, device, processes, say, progress
        )
        network.load_state_dict(weights)
        provenance = {"start": plan.recipe.describe(), "sha256": made["sha256"]}
    return arrays_of(network), provenance


def _seeded_network(plan: RunPlan, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return planned_network(_complete(plan.plans), plan.configuration, plan.dataset_json)


def _complete(plans: Mapping[str, Any]) -> dict[str, Any]:
    """What nnU-Net's managers need beside what is sent."""
    return {"dataset_name": "Dataset000_Federated", **plans}


def arrays_of(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """A network's trainable parameters as they travel: float32, each once."""
    return {
        name: parameter.detach().to("cpu", torch.float32).numpy().copy()
        for name, parameter in zip(*trainable(network), strict=True)
    }


# ---- the model ---------------------------------------------------------------------------------------------------


def model_plans_name(mode: Mode, epsilon: float, run: str) -> str:
    """Name of the model's plans: mode and budget, and the run, so that no two models meet in one folder."""
    if mode in (Mode.fedavg, Mode.paper):
        return f"{SITE_PLANS}_{mode.value}_NoGuarantee_{run[:8]}"
    return f"{SITE_PLANS}_{mode.value}_eps{epsilon:g}_{run[:8]}"


def federated_model_folder(dataset: str, mode: Mode, plans_name: str, configuration: str) -> Path:
    """Where nnUNetv2_predict looks for the model; those without a guarantee have nnU-Net's own trainer's name.

    Args:
        dataset: full name, DatasetXXX_Name; it need not exist on this machine.
        mode: of the run.
        plans_name: of the model.
        configuration: nnU-Net's name.
    """
    if not nnUNet_results.is_set():
        raise UsageRefusal("nnUNet_results is not set: export nnUNet_raw, nnUNet_preprocessed, nnUNet_results")
    trainer = STOCK_TRAINER if mode in (Mode.fedavg, Mode.paper) else TRAINER
    return Path(str(nnUNet_results)) / dataset / f"{trainer}__{plans_name}__{configuration}"


def write_model(
    folder: Path,
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
    run: str = "0",
    steps: int = 0,
) -> Path:
    """Write the final model as an ordinary nnU-Net model folder.

    Args:
        folder: ``TRAINER__PLANS__CONFIGURATION`` below the results of a dataset, as nnU-Net names it.
        plans: as sent to the sites.
        configuration: nnU-Net's name.
        dataset_json: public description of the sites' datasets.
        weights: final ones, by the names of the trainable parameters.
        facts: for ``federated.json``: what was spent at which site, and what that does not cover.
        run: identifier.
        steps: that led to the weights.

    Returns:
        The checkpoint's file.

    Raises:
        UsageRefusal: for weights of another network.
    """
    trainer, plans_name, _ = folder.name.split("__")
    network = planned_network(_complete(plans), configuration, dict(dataset_json))
    _load(network, weights)
    content = nnunet.final_checkpoint(network.state_dict(), trainer, configuration, "all", None, run, 0, steps)
    shared = {"dataset_name": folder.parent.name, **plans, "plans_name": plans_name}
    (folder / "fold_all").mkdir(parents=True, exist_ok=True)
    write_json(shared, folder / "plans.json")
    write_json(_described(dataset_json), folder / "dataset.json")
    write_json({}, folder / "dataset_fingerprint.json")  # a stub: nnU-Net's tools look for the file
    write_json({**facts, "model_folder": folder.name}, folder / FEDERATED)  # no path of this machine
    write_checkpoint(content, folder / "fold_all" / FINAL)
    return folder / "fold_all" / FINAL


def _described(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """nnU-Net writes numTraining everywhere and reads it nowhere when it predicts; how many there are is not told."""
    return {**nnunet.public_dataset_json(dataset_json), "numTraining": 0}


def _load(network: torch.nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    names, parameters = trainable(network)
    shapes = {name: tuple(parameter.shape) for name, parameter in zip(names, parameters, strict=True)}
    if {name: tuple(array.shape) for name, array in weights.items()} != shapes:
        raise UsageRefusal("the final weights should be those of the planned network, found other names or shapes")
    with torch.no_grad():
        for name, parameter in zip(names, parameters, strict=True):
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(weights[name], dtype=np.float32)))
