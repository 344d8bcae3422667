"""What a federated site asks of nnU-Net: its preprocessing with given plans, and the model of the fold ``all``.

The same parts that the trainers use (``PatchSource``, ``PatientLoader``, nnU-Net's loss and transforms), without a
trainer: a round is a few steps in a process of its own, and needs no logger, no validation and no epochs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from torch import Tensor, nn

from nnunet_dp import nnunet
from nnunet_dp.accounting import PrivacyBudget, default_delta
from nnunet_dp.admission import refuse_coupling
from nnunet_dp.dpsgd import Execution, RecordsOf
from nnunet_dp.engine_choice import execution_for
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.federated.protocol import Terms
from nnunet_dp.federated.site_plans import private_plans
from nnunet_dp.federated.site_settings import SiteSettings
from nnunet_dp.federated.site_store import fingerprint_run
from nnunet_dp.gradients import trainable
from nnunet_dp.ledger import read_ledger
from nnunet_dp.loading import PatientLoader
from nnunet_dp.nnunet_planning import build_network
from nnunet_dp.nnunet_public_plans import channel_names
from nnunet_dp.patients import Patients, digest
from nnunet_dp.plans import read_section, without_patients_digest, write_json
from nnunet_dp.run import LEDGER
from nnunet_dp.sections import ConfigurationPlan, FingerprintPlan
from nnunet_dp.splits import fold_slots
from nnunet_dp.torn_images import refuse_torn
from nnunet_dp.unusable import EmptyWhereUnusable, target_shapes
from nnunet_dp.workers import in_order

Case = tuple[str, list[str], str]
"""Name, image files, segmentation file."""
_FOREGROUND = 0.33  # nnU-Net's oversample_foreground_percent


# ---- preparation -------------------------------------------------------------------------------------------------


def refuse_other_reading(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> None:
    """Refuse plans that read or normalise images otherwise than nnU-Net does by the site's own description.

    Whether a reader or a normalisation fails on an image says something about it; a coordinator may not choose which.

    Raises:
        Refusal: naming what differs.
    """
    reader = determine_reader_writer_from_dataset_json(dict(dataset_json), verbose=False).__name__
    schemes = [get_normalization_scheme(name).__name__ for name in channel_names(dataset_json)]
    asked = plans["configurations"][configuration]["normalization_schemes"]
    if plans["image_reader_writer"] != reader or asked != schemes:
        raise Refusal(
            f"the coordinator's plans should read with {reader} and normalise by {schemes}, as the description of this "
            f"dataset says, found {plans['image_reader_writer']} and {asked}"
        )


def preprocess(plans: dict[str, Any], configuration: str, raw: Path, folder: Path, processes: int) -> None:
    """Preprocess all training cases with nnU-Net's own preprocessor; what an earlier attempt left is replaced.

    Args:
        plans: admitted ones, whose ``data_identifier`` the site chose.
        configuration: nnU-Net's name.
        raw: the raw dataset.
        folder: the preprocessed dataset, to be made.
        processes: at most.

    Raises:
        Refusal: when there is no raw dataset.
    """
    if not (raw / "dataset.json").is_file():
        raise Refusal(f"{raw.name} should lie below nnUNet_raw, found no dataset.json there: set raw in the settings")
    dataset_json = json.loads((raw / "dataset.json").read_text())
    output = nnunet.configuration_folder(folder, plans, configuration)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    found = get_filenames_of_train_images_and_targets(str(raw), json.loads(json.dumps(dataset_json)))
    cases = [(name, files["images"], files["label"]) for name, files in sorted(found.items())]
    work = partial(_preprocess_one, plans, configuration, dataset_json, output)
    for _ in in_order(work, cases, processes, prepare=partial(torch.set_num_threads, 1)):
        pass
    _keep_references(cases, dataset_json, folder)


def _preprocess_one(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], output: Path, case: Case
) -> None:
    manager = PlansManager(plans)
    configured = manager.get_configuration(configuration)
    name, images, labels = case
    for file in (*images, labels):
        refuse_torn(Path(file))
    preprocessor = configured.preprocessor_class(verbose=False)
    preprocessor.run_case_save(str(output / name), images, labels, manager, configured, dataset_json)


def _keep_references(cases: Sequence[Case], dataset_json: dict[str, Any], folder: Path) -> None:
    """As nnU-Net's own preprocessing leaves them: dataset.json and the reference segmentations, the public slots."""
    references = folder / "gt_segmentations"
    references.mkdir(exist_ok=True)
    for name, _, labels in cases:
        kept = references / f"{name}{dataset_json['file_ending']}"
        if not kept.is_file():
            shutil.copyfile(labels, kept)
    if not (folder / "dataset.json").is_file():
        write_json(dataset_json, folder / "dataset.json")


# ---- the site's private plans ------------------------------------------------------------------------------------


def site_plans(
    plans: dict[str, Any], terms: Terms, settings: SiteSettings, folder: Path, dataset_json: dict[str, Any]
) -> dict[str, Any]:
    """Admitted plans with this site's private section, calibrated to its own delta.

    Raises:
        UsageRefusal: for a delta that means nothing for so few units.
    """
    patients = find_units(settings, folder)
    budget = run_budget(terms.epsilon, terms.delta, settings, patients)
    kept = folder / nnunet.PATIENTS
    sha256 = digest(kept) if kept.is_file() else None
    architecture = plans["configurations"][terms.configuration]["architecture"]
    with torch.device("meta"):
        network = build_network(plans, terms.configuration, dataset_json, architecture, initialised=False)
    parameters = sum(parameter.numel() for parameter in trainable(network)[1])
    charged = read_ledger(folder / LEDGER) if (folder / LEDGER).is_file() else ()
    fingerprint = FingerprintPlan.of(fingerprint_run(terms.run), charged)
    return private_plans(plans, terms, budget, patients.number, sha256, parameters, fingerprint)


def find_units(settings: SiteSettings, folder: Path) -> Patients:
    """The site's units; a table that does not fit the cases, or the ledger's charges, is refused."""
    return nnunet.find_patients(folder, settings.patients_file, settings.patients_column)


def own_delta(settings: SiteSettings, patients: Patients) -> float:
    """The delta at which the dataset's total is bounded: the settings', or one that follows the number of units."""
    delta = settings.delta or default_delta(patients.number)
    if delta * patients.number >= 1:
        raise UsageRefusal(f"delta in the settings should be below 1 / {patients.unit}s, found {delta:g}: try 1e-5")
    return delta


def run_budget(epsilon: float, delta: float | None, settings: SiteSettings, patients: Patients) -> PrivacyBudget:
    """Target of a run at this site: the run's epsilon, at the smaller of its delta and the site's own."""
    return PrivacyBudget(epsilon=epsilon, delta=min(own_delta(settings, patients), delta or 1.0), unit=patients.unit)


def write_model_files(folder: Path, plans: dict[str, Any], dataset_json: dict[str, Any]) -> None:
    """What makes a model's folder readable: for ``nnunet-dp status``, for one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(without_patients_digest(plans), folder / "plans.json")
    write_json(nnunet.public_dataset_json(dataset_json), folder / "dataset.json")
    write_json({}, folder / "dataset_fingerprint.json")  # a stub: nnU-Net's tools look for the file


# ---- the model ---------------------------------------------------------------------------------------------------


@dataclass
class SiteModel:
    """Everything of a site's training but its mechanism.

    Attributes:
        network: of the plans, on the device, freshly initialised.
        loss: nnU-Net's, (outputs, targets) -> scalar.
        patients: the site's units; all of them train.
        slots: how many.
        execution: device and autocast.
        data_digest: what a resumed run must find unchanged.
    """

    network: nn.Module
    loss: Callable[[Any, Any], Tensor]
    patients: Patients
    slots: int
    execution: Execution
    data_digest: str
    _loader: PatientLoader

    @property
    def records(self) -> RecordsOf:
        """(step, drawn slots) -> their records."""
        return self._loader.records

    def close(self) -> None:
        """End the loader's processes."""
        self._loader.close()


def open_model(
    plans: dict[str, Any],
    configuration: str,
    folder: Path,
    dataset_json: dict[str, Any],
    device: torch.device,
    processes: int,
    steps: int = 1,
    report: Callable[[str], None] = lambda sentence: None,
) -> SiteModel:
    """Network, loss and patients of the fold ``all``; nothing is trained or charged.

    Args:
        plans: with the site's private section.
        configuration: nnU-Net's name.
        folder: the preprocessed dataset.
        dataset_json: the dataset's description.
        device: where to train.
        processes: that load patients beside the training; one loads in this process, which is not forked then
            (Flower's has threads of its own).
        steps: that this process takes.
        report: is told which gradient engine was chosen.

    Raises:
        Refusal: for a network that couples patients, and for cases that are missing or changed their units.
    """
    section = read_section(plans)
    assert section is not None
    plan = section.configurations[configuration]
    patients = nnunet.patients_of_plan(folder, section)
    slots, cases = fold_slots([], "all", patients)
    manager = PlansManager(plans)
    configured = manager.get_configuration(configuration)
    network = _network(plans, configuration, dataset_json, configured).to(device)
    data = nnunet.configuration_folder(folder, plans, configuration)
    channels = len(channel_names(dataset_json))
    source = _patch_source(data, cases, manager.get_label_manager(dataset_json), configured, plan, channels)
    return SiteModel(
        network=network,
        loss=_loss(manager.get_label_manager(dataset_json), configured),
        patients=patients,
        slots=len(slots),
        execution=execution_for(
            device, partial(nnunet.autocast, device), steps, plan.sampling_probability * len(slots), report
        ),
        data_digest=nnunet.data_digest(data, slots, plan),
        _loader=PatientLoader(source, list(slots.values()), device, processes if processes > 1 else 0),
    )


def _network(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], configured: ConfigurationManager
) -> nn.Module:
    architecture = configured.configuration["architecture"]
    network: Any = build_network(plans, configuration, dataset_json, architecture, initialised=True)
    refuse_coupling(network)
    network.decoder.deep_supervision = _supervised_deeply(configured)
    return network.train()


def _supervised_deeply(configured: ConfigurationManager) -> bool:
    return len(configured.pool_op_kernel_sizes) >= 3  # nnU-Net gives the last output no weight: with one, 0 / 0


def _scales(configured: ConfigurationManager) -> list[list[float]] | None:
    """Resolution of each output, as ``nnUNetTrainer._get_deep_supervision_scales``."""
    if not _supervised_deeply(configured):
        return None
    return [list(scale) for scale in 1 / np.cumprod(np.vstack(configured.pool_op_kernel_sizes), axis=0)][:-1]


def _loss(labels: Any, configured: ConfigurationManager) -> Callable[[Any, Any], Tensor]:
    """As ``nnUNetTrainer._build_loss``, for one patient's patches (``batch_dice`` off)."""
    dice = {"batch_dice": False, "do_bg": labels.has_regions, "smooth": 1e-5, "ddp": False}
    kind: Any = MemoryEfficientSoftDiceLoss
    if labels.has_regions:
        loss: Any = DC_and_BCE_loss({}, dice, use_ignore_label=labels.ignore_label is not None, dice_class=kind)
    else:
        loss = DC_and_CE_loss(dice, {}, weight_ce=1, weight_dice=1, ignore_label=labels.ignore_label, dice_class=kind)
    scales = _scales(configured)
    if scales is None:
        return loss
    weights = np.array([0.5**level for level in range(len(scales))])
    weights[-1] = 0.0
    return DeepSupervisionWrapper(loss, weights / weights.sum())


def _patch_source(
    data: Path, cases: Iterable[str], labels: Any, configured: ConfigurationManager, plan: ConfigurationPlan,
    channels: int,
) -> EmptyWhereUnusable:
    """nnU-Net's cropping without augmentation, as the trainers' where the plan says none; it never fails."""
    cases = list(cases)
    dataset_class: Any = infer_dataset_class(str(data))
    nnunet.refuse_missing(dataset_class, data, cases)
    dataset_class.unpack_dataset(str(data), overwrite_existing=False, verify=True)
    regions: Any = labels.foreground_regions if labels.has_regions else None
    transforms = nnUNetTrainer.get_validation_transforms(
        _scales(configured), False, labels.foreground_labels, regions, labels.ignore_label
    )
    patch, count = tuple(configured.patch_size), plan.patches_per_patient
    source = nnunet.PatchSource(dataset_class(str(data), cases), count, patch, patch, labels, _FOREGROUND, transforms)
    targets = target_shapes(count, nnunet.target_channels(labels), patch, _scales(configured))
    ignored = [] if labels.ignore_label is None else [labels.ignore_label]
    known = None if labels.has_regions else {0, *labels.foreground_labels, *ignored}
    return EmptyWhereUnusable(source, (count, channels, *patch), targets, known)
