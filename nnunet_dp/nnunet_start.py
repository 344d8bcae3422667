"""The public start inside nnU-Net: phantoms preprocessed by the plans, the planned network, nnU-Net's loss.

``public_start`` holds the learning and the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch.nn import functional

from nnunet_dp import randomisation
from nnunet_dp.declared_weights import refuse_charged_weights
from nnunet_dp.description import integers_of, read_description
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.forecast import machine_memory_bytes, measure
from nnunet_dp.nnunet import autocast, file_sha256, model_folder, preprocessed_folder
from nnunet_dp.nnunet_planning import PlanReport, build_network
from nnunet_dp.nnunet_public_plans import public_facts
from nnunet_dp.phantoms import Kind, Patient, anatomy
from nnunet_dp.phantoms.matching import SHAPES, find_kind
from nnunet_dp.planning import TRAINING_SHARE
from nnunet_dp.plans import (
    SECTION,
    configuration_plan,
    json_sha256,
    read_private_plans,
    read_section,
    write_json,
)
from nnunet_dp.public_start import LabelledImage, Phantoms, learn, only_one, read_start, start_file, write_start
from nnunet_dp.sections import PublicStart
from nnunet_dp.workers import Progress, in_order, in_tenths

Say = Callable[[str], None]
LEAST_ADOPTED = 0.1  # share of the parameters that a public checkpoint should give
SHARE_OF_MEMORY = 0.25  # that the phantoms may take together
FEWEST_IMAGES = 50  # phantoms, whatever they take
IMAGES_DRAWN = "images_drawn"  # in the provenance, where they are fewer than the recipe's


def ensure_start(
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    folder: Path,
    device: torch.device,
    processes: int,
    say: Say = lambda text: None,
    progress: Progress | None = None,
    public_weights: Path | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The planned network's public start, made now if it was not there.

    Args:
        plans: private plans with a public start for the configuration.
        configuration: nnU-Net's name.
        dataset_json: of the dataset: names of channels and labels, which are public.
        folder: the preprocessed dataset folder; nothing in it is read but an earlier start.
        device: where to learn.
        processes: at most, for drawing phantoms.
        say: told what is going on.
        progress: told after each phantom and each iteration, counted together; without it ``say`` is, at each tenth.
        public_weights: the checkpoint that the recipe begins from, where it names one.

    Returns:
        Weights of the planned network, and their provenance.

    Raises:
        Refusal: when the file was changed, or the recipe's checkpoint is needed and was not given.
    """
    section = read_section(plans)
    assert section is not None
    recipe = configuration_plan(section, configuration).start
    assert recipe is not None
    facts = _facts(plans, configuration, dataset_json, recipe)
    file = start_file(folder, configuration, facts)
    told = {key: value for key, value in facts.items() if key != "intensities_sha256"}  # would confirm a guess
    with contextlib.nullcontext() if file.is_file() else only_one(file):
        if not file.is_file():
            say(f"making the public start once: {recipe.describe()}")
            _refuse_other_weights(recipe, public_weights)
            weights, drawn = _learn(
                plans, configuration, dataset_json, recipe, device, processes, say, progress, public_weights
            )
            made_by = {"torch": torch.__version__, "nnunet_dp": version("nnunet_dp")}
            declared = {"declared": "no patient overlaps with the public weights' data"} if public_weights else {}
            fewer = {IMAGES_DRAWN: drawn} if drawn < recipe.images else {}
            write_start(file, weights, {**told, **made_by, **declared, **fewer})
    weights, provenance = read_start(file, told)
    say(f"public start {file.name} (no private data): {describe_start(provenance)}")
    return weights, provenance


def describe_start(provenance: dict[str, Any]) -> str:
    """The recipe in words, and what became of it where memory was short."""
    recipe = PublicStart.model_validate(provenance["recipe"])
    drawn = provenance.get(IMAGES_DRAWN, recipe.images)
    short = f"; only {drawn} phantoms were drawn, more would have taken over a quarter of the memory"
    return recipe.describe() + (short if drawn < recipe.images else "")


def pretrain(
    dataset: str,
    configuration: str,
    plans_name: str,
    device: torch.device,
    processes: int,
    kinds: tuple[str, ...] = (),
    iterations: int | None = None,
    images: int | None = None,
    public_weights: Path | None = None,
    progress: Progress | None = None,
) -> StartReport:
    """Make a private plan's public start now; what is given by hand changes the plan's recipe first.

    Raises:
        UsageRefusal: for unknown datasets, plans or kinds, and plans without privacy or without a public start.
    """
    folder = preprocessed_folder(dataset)
    plans, section = read_private_plans(folder, plans_name)
    recipe = configuration_plan(section, configuration).start
    dataset_json = read_description(folder / "dataset.json")
    facts = public_facts(plans, dataset_json)
    if recipe is None:
        raise UsageRefusal(f"{plans_name} plan no public start for {configuration}: plan again without --no-start")
    changes = {
        **({"kinds": kinds} if kinds else {}),
        **({"iterations": iterations} if iterations else {}),
        **({"images": images} if images else {}),
        **({"public_weights_sha256": file_sha256(public_weights)} if public_weights else {}),
    }
    for kind in changes.get("kinds", ()):
        find_kind(kind, facts)
    if changes:
        _refuse_trained(dataset, plans_name, configuration)
        recipe = PublicStart.model_validate({**recipe.model_dump(), **changes})
        plans[SECTION]["configurations"][configuration]["start"] = recipe.model_dump(mode="json")
    if public_weights is not None:
        refuse_charged_weights(public_weights, folder)
        adopt(planned_network(plans, configuration, dataset_json), public_weights)  # refuse before anything is made
    _, provenance = ensure_start(
        plans, configuration, dataset_json, folder, device, processes, progress=progress, public_weights=public_weights
    )
    if changes:
        write_json(plans, folder / f"{plans_name}.json")
    made = start_file(folder, configuration, _facts(plans, configuration, dataset_json, recipe))
    return StartReport(made, provenance)


def _refuse_trained(dataset: str, plans_name: str, configuration: str) -> None:
    """A model that was begun with the old recipe could not go on with the new one."""
    anywhere = model_folder(dataset, "ANY", plans_name, configuration)
    if any(anywhere.parent.glob(anywhere.name.replace("ANY", "*") + "/fold_*")):
        raise UsageRefusal(f"models were trained with {plans_name} already: plan under another name (-o) first")


@dataclass(frozen=True)
class StartReport:
    """What ``nnunet-dp pretrain`` made, or found."""

    file: Path
    provenance: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"file": str(self.file), "sha256": self.provenance["sha256"], "recipe": self.provenance["recipe"]}

    def lines(self) -> list[tuple[str, str]]:
        """Label and value, for a table."""
        recipe, sha256 = describe_start(self.provenance), self.provenance["sha256"]
        return [("public start", str(self.file)), ("recipe", recipe), ("sha256", sha256)]


def _facts(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], recipe: PublicStart
) -> dict[str, Any]:
    """Everything that the weights depend on; the phantoms' own code by its bytes."""
    facts = public_facts(plans, dataset_json)
    configured = PlansManager(plans).get_configuration(configuration).configuration
    intensities = plans.get("foreground_intensity_properties_per_channel")
    kept = ("architecture", "patch_size", "spacing", "normalization_schemes", "use_mask_for_norm")
    drawn = [anatomy, randomisation, *(sys.modules[find_kind(name, facts).render_module] for name in recipe.kinds)]
    code = hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in drawn))
    return {
        "recipe": recipe.model_dump(mode="json"),
        "configuration": {key: configured[key] for key in kept},
        "intensities_sha256": json_sha256(intensities if facts.calibrated else None),
        "channels": dataset_json.get("channel_names", dataset_json.get("modality")),
        "labels": dataset_json["labels"],
        "phantoms_sha256": code.hexdigest(),
    }


def _learn(
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    recipe: PublicStart,
    device: torch.device,
    processes: int,
    say: Say,
    progress: Progress | None,
    public_weights: Path | None,
) -> tuple[dict[str, Tensor], int]:
    """The start's weights, and from how many phantoms."""
    drawing = _part(progress, 0, recipe) or in_tenths(say, "phantoms drawn")
    phantoms = draw(plans, configuration, dataset_json, recipe, processes, drawing)
    if len(phantoms.images) < recipe.images:
        say(f"no more than {len(phantoms.images)} of {recipe.images} phantoms: a quarter of this machine's memory")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = planned_network(plans, configuration, dataset_json)
    if public_weights is not None:
        adopt(network, public_weights)
    network = network.to(device)
    loss = planned_loss(plans, configuration, dataset_json)
    learning = _part(progress, recipe.images, recipe) or in_tenths(say, "public start")
    weights = learn(network, loss, phantoms, recipe, device, partial(autocast, device), learning)
    return weights, len(phantoms.images)


def _part(progress: Progress | None, before: int, recipe: PublicStart) -> Progress | None:
    """Progress of one part, told as progress of phantoms and iterations together."""
    whole = recipe.images + recipe.iterations
    return progress and (lambda done, _: progress(before + done, whole))


def _refuse_other_weights(recipe: PublicStart, file: Path | None) -> None:
    wanted = recipe.public_weights_sha256
    if wanted != (file_sha256(file) if file else None):
        raise Refusal(
            "this plan's public start begins from a checkpoint on public data: make it once with "
            "`nnunet-dp pretrain ... --from-public CHECKPOINT --no-patient-overlap`"
            if wanted
            else "this plan's public start begins from no checkpoint: leave --from-public out"
        )


def adopt(network: nn.Module, checkpoint: Path) -> float:
    """Take over what fits from an nnU-Net checkpoint on public data.

    The rule: tensors with the same name and the same shape are taken, all others stay as they were initialised. So a
    network of another width gives next to nothing, one of another depth its outer encoder stages, other classes all but
    the outputs.

    Args:
        network: changed in place.
        checkpoint: nnU-Net's; it is unpickled, as nnU-Net does it, so it must come from somebody you trust.

    Returns:
        Share of the network's parameters that was taken.

    Raises:
        UsageRefusal: when less than a tenth fits.
    """
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=False)
    theirs = loaded.get("network_weights", {}) if isinstance(loaded, dict) else {}
    own = network.state_dict()
    fitting = {name: theirs[name] for name in own if name in theirs and theirs[name].shape == own[name].shape}
    share = sum(own[name].numel() for name in fitting) / sum(tensor.numel() for tensor in own.values())
    if share < LEAST_ADOPTED:
        raise UsageRefusal(
            f"{checkpoint.name} should hold at least {LEAST_ADOPTED:.0%} of the planned network's parameters under the "
            f"same names and shapes, found {share:.1%}: plan its width (--set features_per_stage=...), or leave it out"
        )
    network.load_state_dict({**own, **fitting})
    return share


def forecast(report: PlanReport) -> str:
    """Time and memory of a fold on this machine, from one patch of noise through the planned network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plans = json.loads(report.file.read_text())
    dataset_json = json.loads((report.file.parent / "dataset.json").read_text())
    network = planned_network(plans, report.configuration, dataset_json)
    patch = PlansManager(plans).get_configuration(report.configuration).patch_size
    found = measure(network, (public_facts(plans, dataset_json).channels, *patch), device, partial(autocast, device))
    plan = report.section.configurations[report.configuration]
    return found.describe(*plan.patches(int(TRAINING_SHARE * report.section.patients)))


def planned_network(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> nn.Module:
    """nnU-Net's network of a configuration, with deep supervision, freshly initialised."""
    planned = PlansManager(plans).get_configuration(configuration).configuration["architecture"]
    return build_network(plans, configuration, dataset_json, planned, initialised=True)


def planned_loss(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]
) -> Callable[[Any, Tensor], Tensor]:
    """nnU-Net's loss with deep supervision, as a function of outputs and labels [batch, *spatial]."""
    labels = PlansManager(plans).get_label_manager(dataset_json)
    dice = {"batch_dice": False, "smooth": 1e-5, "ddp": False, "do_bg": labels.has_regions}
    kind: Any = MemoryEfficientSoftDiceLoss
    make = partial(DC_and_BCE_loss, {}, dice) if labels.has_regions else partial(DC_and_CE_loss, dice, {})
    single = make(dice_class=kind)
    regions = [list(integers_of(region)) for region in labels.foreground_regions] if labels.has_regions else None

    def loss(outputs: Any, target: Tensor) -> Tensor:
        outputs = [output.float() for output in outputs]
        weights = np.array([0.5**level for level in range(len(outputs) - 1)] + [0.0 if len(outputs) > 1 else 1.0])
        targets = [_target(target, output.shape[2:], regions) for output in outputs]
        return DeepSupervisionWrapper(single, weights / weights.sum())(outputs, targets)

    return loss


def _target(labels: Tensor, shape: torch.Size, regions: list[list[int]] | None) -> Tensor:
    """Labels at an output's resolution: [batch, 1, *shape], or one map per region."""
    small = functional.interpolate(labels[:, None].float(), size=tuple(shape), mode="nearest")
    if regions is None:
        return small
    return torch.cat([torch.isin(small, torch.tensor(r, device=small.device)).float() for r in regions], 1)


# ---- phantoms as the private images will be ------------------------------------------------------------------------


def draw(
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    recipe: PublicStart,
    processes: int = 1,
    progress: Progress | None = None,
    most_bytes: float | None = None,
) -> Phantoms:
    """Phantoms of the recipe's kinds in turn, preprocessed by the plans.

    Args:
        plans: nnU-Net's; CT windows come from them.
        configuration: nnU-Net's name.
        dataset_json: of the dataset that will be trained on.
        recipe: kinds, number of images and seed.
        processes: at most.
        progress: told after each phantom.
        most_bytes: that they may take together, though 50 are drawn in any case; None for a quarter of the memory.
    """
    configured = PlansManager(plans).get_configuration(configuration)
    most = SHARE_OF_MEMORY * machine_memory_bytes() if most_bytes is None else most_bytes
    work = partial(_draw_one, plans, configuration, dataset_json, recipe)
    drawn: Any = in_order(work, range(recipe.images), processes, progress, partial(torch.set_num_threads, 1))
    with contextlib.closing(drawn):  # ends the processes where not all are drawn
        images = list(_fitting(drawn, most))
    return Phantoms(
        images,
        tuple(configured.patch_size),
        tuple(float(edge) for edge in configured.spacing),
        tuple("ZScore" in scheme for scheme in configured.normalization_schemes),
    )


def _fitting(images: Iterator[LabelledImage], most_bytes: float) -> Iterator[LabelledImage]:
    """The first images, as many as fit together; their sizes are known when they are drawn."""
    taken = 0
    for number, image in enumerate(images):
        taken += image.image.nbytes + image.labels.nbytes
        if taken > most_bytes and number >= FEWEST_IMAGES:
            return
        yield image


def _draw_one(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], recipe: PublicStart, number: int
) -> LabelledImage:
    kind = find_kind(recipe.kinds[number % len(recipe.kinds)], public_facts(plans, dataset_json))
    patient = Patient(kind.name, recipe.seed, number // len(recipe.kinds))
    if kind.name == SHAPES:
        return _shapes(kind, patient, PlansManager(plans).get_configuration(configuration))
    return _preprocessed(kind, patient, plans, configuration, dataset_json)


def _shapes(kind: Kind, patient: Patient, configured: Any) -> LabelledImage:
    """Shapes have no size of their own: drawn into the patch, voxel by voxel, and standardised."""
    scan = kind.render(patient, 0, tuple(configured.patch_size)[-kind.dimensions :])
    image = np.array(scan.image, np.float32)
    for channel, scheme in zip(image, configured.normalization_schemes, strict=True):
        if "01" not in scheme:
            channel[...] = (channel - channel.mean()) / (channel.std() + 1e-6)
    return LabelledImage(image, scan.segmentation.astype(np.int16))


def _preprocessed(
    kind: Kind, patient: Patient, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]
) -> LabelledImage:
    """As nnU-Net's readers would load the written file, through nnU-Net's preprocessing."""
    scan = kind.render(patient, int(patient.case(0).integers(2)), None)
    if kind.dimensions == 3:  # readers give [z, y, x]
        image, labels, spacing = scan.image.transpose(0, 3, 2, 1), scan.segmentation.T, scan.spacing_mm[::-1]
    else:
        image, labels, spacing = scan.image[:, None], scan.segmentation[None], (999.0, *scan.spacing_mm)
    manager = PlansManager(plans)
    configured = manager.get_configuration(configuration)
    preprocessor = configured.preprocessor_class(verbose=False)
    with contextlib.redirect_stdout(io.StringIO()):
        data, seg, _ = preprocessor.run_case_npy(
            np.ascontiguousarray(image), labels.astype(np.float32)[None], {"spacing": list(spacing)}, manager,
            configured, json.loads(json.dumps(dataset_json)),
        )  # fmt: skip
    return LabelledImage(np.asarray(data, np.float32), np.maximum(seg[0], 0).astype(np.int16))
