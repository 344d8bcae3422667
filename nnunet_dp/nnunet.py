"""What this package asks of nnU-Net; only the core files named after it import ``nnunetv2``.

Here: datasets and their units, models, patches of one patient, flags, what a finished checkpoint may hold. Beside it:
``nnunet_planning`` (private plans), ``nnunet_start`` (the public start), ``nnunet_files`` (segmentations on disk). The
trainers (``nnunet_dp.trainers``) call these functions and contain no algorithm.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

from nnunet_dp.description import read_description
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.federated.raw_dataset import dataset_names
from nnunet_dp.ledger import read_ledger, refuse_other_units
from nnunet_dp.patients import (
    Patients,
    canonical_digest,
    cases_as_units,
    digest,
    read_canonical,
    read_patients,
    write_canonical,
)
from nnunet_dp.plans import json_sha256, write_json
from nnunet_dp.run import LEDGER
from nnunet_dp.sections import ConfigurationPlan, PrivacySection, as_first_written
from nnunet_dp.splits import Splits, check_splits, make_splits

PATIENTS = "patients.csv"
SPLITS = "splits_final.json"


# ---- datasets and their units ------------------------------------------------------------------------------------


def preprocessed_folder(dataset: str) -> Path:
    """The dataset's preprocessed folder; ``dataset`` is an id or a name.

    Raises:
        UsageRefusal: when nnU-Net does not know the dataset or it was not planned.
    """
    if not nnUNet_preprocessed.is_set():
        raise UsageRefusal("nnUNet_preprocessed is not set: export nnUNet_raw, nnUNet_preprocessed, nnUNet_results")
    try:
        name = maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset)
    except (RuntimeError, ValueError):
        bases = [Path(str(base)) for base in (nnUNet_raw, nnUNet_preprocessed) if base.is_set()]
        raise UsageRefusal(
            f"nnU-Net knows no dataset {dataset!r} below nnUNet_raw or nnUNet_preprocessed; there are: "
            f"{dataset_names(*bases)}"
        ) from None
    folder = Path(str(nnUNet_preprocessed)) / name
    if not (folder / "dataset.json").is_file():
        raise UsageRefusal(f"{name} is not preprocessed: run `nnUNetv2_plan_and_preprocess -d {dataset}` first")
    return folder


def dataset_cases(folder: Path) -> list[str]:
    """All training cases of a preprocessed dataset, sorted: the public slots.

    Raises:
        UsageRefusal: when the folder holds no reference segmentations yet.
    """
    ending = read_description(folder / "dataset.json")["file_ending"]
    references = folder / "gt_segmentations"
    files = os.listdir(references) if references.is_dir() else []
    names = sorted(name.removesuffix(ending) for name in files if name.endswith(ending))
    if not names:
        raise UsageRefusal(f"{folder.name} holds no gt_segmentations: run `nnUNetv2_plan_and_preprocess` first")
    return names


def find_patients(folder: Path, file: Path | None = None, column: str | None = None, replace: bool = False) -> Patients:
    """The dataset's units, with the canonical ``patients.csv`` kept in the preprocessed folder.

    The file is looked for as given, then in the raw dataset folder, then in the preprocessed folder. Without any, every
    case is its own unit.

    Args:
        folder: the preprocessed dataset folder.
        file: a file named by the user.
        column: its column that names the unit.
        replace: whether a differing copy may be replaced (never once the ledger holds charges).
    """
    patients, from_source = known_patients(folder, file, column)
    if from_source:
        _keep_patients(patients, folder / PATIENTS, replace)
    return patients


def known_patients(folder: Path, file: Path | None = None, column: str | None = None) -> tuple[Patients, bool]:
    """As ``find_patients``, without writing: the units, and whether they come from outside the preprocessed folder."""
    cases, kept = dataset_cases(folder), folder / PATIENTS
    raw = Path(str(nnUNet_raw)) / folder.name / PATIENTS if nnUNet_raw.is_set() else None
    source = file or (raw if raw is not None and raw.is_file() else None)
    if source is None:
        patients = read_patients(kept, None, cases) if kept.is_file() else cases_as_units(cases)
    else:
        if file is None and column is None and kept.is_file():
            column = read_patients(kept, None, cases).column  # the column chosen when the copy was made
        patients = read_patients(source, column, cases, _held_out(folder))
    _refuse_other_units(patients, folder)
    return patients, source is not None


def _refuse_other_units(patients: Patients, folder: Path) -> None:
    ledger = folder / LEDGER
    if ledger.is_file():
        refuse_other_units(read_ledger(ledger), patients.unit, patients.table_sha256)


def _held_out(folder: Path) -> set[str]:
    """Cases of the raw dataset's imagesTs: they may have rows in a patients file, and are no training slots."""
    ending = read_description(folder / "dataset.json")["file_ending"]
    images = Path(str(nnUNet_raw)) / folder.name / "imagesTs" if nnUNet_raw.is_set() else None
    files = images.glob(f"*_0000{ending}") if images is not None and images.is_dir() else ()
    return {file.name.removesuffix(f"_0000{ending}") for file in files}


def _keep_patients(patients: Patients, kept: Path, replace: bool) -> None:
    if kept.is_file() and digest(kept) == canonical_digest(patients):
        return
    if kept.is_file() and not replace:
        raise UsageRefusal(f"{PATIENTS} in {kept.parent.name} groups cases differently: give --overwrite")
    write_canonical(patients, kept)


def patients_of_plan(folder: Path, section: PrivacySection) -> Patients:
    """The units that a plan was made for, as kept in the preprocessed folder.

    A model's own copy of the plan carries no digest of the table; the ledger's charges do, and are compared when it is
    opened.

    Raises:
        Refusal: when their number or name changed since.
    """
    cases, kept = dataset_cases(folder), folder / PATIENTS
    expected = section.patients_file_sha256
    if expected:
        patients = read_canonical(kept, expected, cases)
    elif section.budget.unit != "case" and kept.is_file():
        patients = read_patients(kept, None, cases)
    else:
        patients = cases_as_units(cases)
    if (patients.number, patients.unit) != (section.patients, section.budget.unit):
        raise Refusal(
            f"the plan was made for {section.patients} units ({section.budget.unit}), the dataset has "
            f"{patients.number} ({patients.unit}): make the plan again"
        )
    return patients


def find_splits(folder: Path, patients: Patients) -> Splits:
    """The dataset's splits, made by patient with a keyed hash where none exist.

    Raises:
        Refusal: for a split with one patient on both sides.
    """
    file = folder / SPLITS
    splits = known_splits(folder, patients)
    if not file.is_file():
        write_json(splits, file)
    return splits


def known_splits(folder: Path, patients: Patients) -> Splits:
    """As ``find_splits``, without writing: those that are there, or those that would be made."""
    file = folder / SPLITS
    if not file.is_file():
        return make_splits(patients, dataset_cases(folder), key=f"nnunet_dp splits 1 {folder.name}".encode())
    try:
        splits = json.loads(file.read_text())
    except ValueError:
        raise UsageRefusal(f"{SPLITS} is not JSON: delete it, so that it is made by patient, or mend it") from None
    check_splits(splits, patients)
    return splits


# ---- models, cases and configurations ------------------------------------------------------------------------------


def input_cases(folder: Path, file_ending: str) -> list[str]:
    """Names of the cases whose images lie in a folder, in nnU-Net's order (which its ``-num_parts`` divides)."""
    return [str(case) for case in get_identifiers_from_splitted_dataset_folder(str(folder), file_ending)]


def predict(arguments: list[str]) -> None:
    """Run ``nnUNetv2_predict`` with these arguments, in this process."""
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point

    before = sys.argv
    sys.argv = ["nnUNetv2_predict", *arguments]
    try:
        predict_entry_point()
    finally:
        sys.argv = before


def model_folder(dataset: str, trainer: str, plans: str, configuration: str) -> Path:
    """Folder of a model, whether it exists or not.

    Raises:
        UsageRefusal: when nnU-Net does not know the dataset or nnUNet_results is not set.
    """
    if not nnUNet_results.is_set():
        raise UsageRefusal("nnUNet_results is not set: export nnUNet_raw, nnUNet_preprocessed, nnUNet_results")
    try:
        return Path(get_output_folder(dataset, trainer, plans, configuration))
    except (RuntimeError, ValueError):
        raise UsageRefusal(f"nnU-Net knows no dataset {dataset!r}") from None


def refuse_unpaid_fingerprint(ledger: Path, plan: ConfigurationPlan) -> None:
    """Refuse plans that follow a fingerprint whose charges the dataset's ledger does not hold.

    Raises:
        LedgerError: naming it.
    """
    if plan.fingerprint is not None:
        plan.fingerprint.refuse_unpaid(read_ledger(ledger) if ledger.is_file() else ())


def configuration_spacing(plans: Mapping[str, Any], configuration: str) -> tuple[float, ...]:
    """Voxel edges of a configuration, in millimetres."""
    return tuple(float(edge) for edge in PlansManager(dict(plans)).get_configuration(configuration).spacing)


def configuration_folder(folder: Path, plans: Mapping[str, Any], configuration: str) -> Path:
    """Where a configuration's preprocessed cases lie."""
    return folder / PlansManager(dict(plans)).get_configuration(configuration).data_identifier


def common_spacing(folder: Path) -> tuple[float, ...] | None:
    """The spacing of all images, if it is one."""
    file = folder / "dataset_fingerprint.json"
    spacings: list[list[float]] = json.loads(file.read_text()).get("spacings", []) if file.is_file() else []
    if not spacings or not np.allclose(spacings, spacings[0], rtol=1e-3):
        return None
    return tuple(float(edge) for edge in spacings[0])


# ---- patches of one patient --------------------------------------------------------------------------------------


class _ChosenCases(nnUNetDataLoader):
    """nnU-Net's loader, told which cases to load instead of drawing them."""

    chosen: list[str]

    def get_indices(self) -> list[str]:
        return self.chosen


def target_channels(labels: Any) -> int:
    """Channels of nnU-Net's targets: one of labels; with regions one for each, and one for an ignore label."""
    return len(labels.foreground_regions) + (labels.ignore_label is not None) if labels.has_regions else 1


class PatchSource:
    """A patient's cases -> K patches with their targets, by nnU-Net's own cropping, oversampling and transforms.

    Foreground oversampling is a rule inside the patient: each patch tosses its own coin, from the patient's stream.

    Args:
        dataset: nnU-Net dataset holding the cases.
        patches: number K of patches.
        initial_patch_size: voxels cropped before the transforms.
        patch_size: voxels delivered.
        label_manager: nnU-Net's.
        oversample: probability that a patch is centred on foreground.
        transforms: nnU-Net's.
    """

    def __init__(
        self,
        dataset: Any,
        patches: int,
        initial_patch_size: Iterable[int],
        patch_size: Iterable[int],
        label_manager: Any,
        oversample: float,
        transforms: Any,
    ) -> None:
        self._patches = patches
        self._loader = _ChosenCases(
            dataset,
            patches,
            tuple(initial_patch_size),
            tuple(patch_size),
            label_manager,
            oversample,
            probabilistic_oversampling=True,
            transforms=transforms,
        )

    def __call__(self, cases: tuple[str, ...]) -> tuple[np.ndarray, Any]:
        """Images [K, channels, *spatial] and targets; cases are visited evenly, in an order drawn anew."""
        order = np.random.permutation(len(cases))
        self._loader.chosen = [cases[order[k % len(cases)]] for k in range(self._patches)]
        batch = self._loader.generate_train_batch()
        target = batch["target"]
        arrays = [t.numpy() for t in target] if isinstance(target, list) else target.numpy()
        return batch["data"].numpy(), arrays


# ---- flags, files, checkpoints ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallingOptions:
    """Flags of ``nnUNetv2_train`` that nnU-Net does not tell its trainers."""

    pretrained_weights: str | None = None
    val_with_best: bool = False
    disable_checkpointing: bool = False
    only_run_validation: bool = False
    num_gpus: int = 1
    from_command_line: bool = False


def calling_options() -> CallingOptions:
    """The flags of the ``run_training`` call that made this trainer, read from its stack frame.

    With several GPUs nnU-Net makes one trainer in each process of its own, by ``run_ddp``.
    """
    frame, found, command_line = inspect.currentframe(), None, False
    while frame is not None:
        spec = frame.f_globals.get("__spec__")  # under `python -m` the module's name is __main__
        if "nnunetv2.run.run_training" in (frame.f_globals.get("__name__"), getattr(spec, "name", None)):
            if frame.f_code.co_name in ("run_training", "run_ddp"):
                flags = {_OF_RUN_DDP.get(name, name): value for name, value in frame.f_locals.items()}
                found = {k: flags[k] for k in inspect.signature(CallingOptions).parameters if k in flags}
            command_line |= frame.f_code.co_name in ("run_training_entry", "run_ddp")
        frame = frame.f_back
    return CallingOptions(**{**(found or {}), "from_command_line": command_line})


_OF_RUN_DDP = {"val": "only_run_validation", "world_size": "num_gpus"}


def file_sha256(file: Path | str) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def refuse_missing(dataset_class: Any, folder: Path, cases: Iterable[str]) -> None:
    """Refuse a fold whose training and validation cases were not all preprocessed for this configuration.

    nnU-Net unpacks archives (its older ``.npz``) before anything else reads them: a torn one counts as missing.

    Raises:
        Refusal: saying how many are missing; their names are private.
    """
    missing = set(cases) - set(dataset_class.get_identifiers(str(folder)))
    if missing:
        raise Refusal(f"{len(missing)} cases of this fold are not in {folder.name}: run nnUNetv2_preprocess for it")
    packed = [file for file in folder.glob("*.npz") if not file.with_suffix(".npy").is_file()]
    torn = len(packed) - sum(map(_can_be_unpacked, packed))
    if torn:
        raise Refusal(f"{torn} of the .npz files in {folder.name} are cut short or damaged: run nnUNetv2_preprocess")


def _can_be_unpacked(archive: Path) -> bool:
    try:
        with zipfile.ZipFile(archive) as opened:
            return opened.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return False


def data_digest(folder: Path, slots: Mapping[str, tuple[str, ...]], plan: ConfigurationPlan) -> str:
    """Digest of what a resumed run must find unchanged: slots, their files' names and sizes, and the plan.

    Args:
        folder: the configuration's preprocessed folder.
        slots: the training patients and their cases.
        plan: the configuration's private plan.
    """
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}
    mine = {case for cases in slots.values() for case in cases}
    files = {name: size for name, size in sizes.items() if name.rsplit(".", 1)[0].removesuffix("_seg") in mine}
    content = [as_first_written(plan.model_dump(mode="json")), {k: list(v) for k, v in slots.items()}, files]
    return json_sha256(content)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 natively: recent cards, processors with AMX tiles."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device is fast at it; never float16, whose scaler skips steps on un-noised infinities."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))


_PUBLIC_IN_DATASET_JSON = (
    "name", "channel_names", "modality", "labels", "regions_class_order", "file_ending", "numTraining",
    "overwrite_image_reader_writer",
)  # fmt: skip


def public_dataset_json(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """The part of dataset.json that prediction needs; lists of training files, for one, name cases."""
    return {key: dataset_json[key] for key in _PUBLIC_IN_DATASET_JSON if key in dataset_json}


def results_folder(dataset: str) -> Path:
    """nnU-Net's results folder of a dataset."""
    return Path(str(nnUNet_results)) / dataset


def final_checkpoint(
    weights: dict[str, torch.Tensor],
    trainer: str,
    configuration: str,
    fold: int | str,
    mirroring: Any,
    run: str,
    charges: int,
    steps: int,
) -> dict[str, Any]:
    """What a finished checkpoint may hold: averaged weights and what nnU-Net needs to load them; neutral elsewhere.

    The run's name and the numbers of its charges and steps let ``nnunet-dp status`` notice a ledger that lost lines.
    """
    return {
        "network_weights": {name: tensor.cpu() for name, tensor in weights.items()},
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": mirroring,
        "init_args": {"configuration": configuration, "fold": fold, "run": run, "charges": charges, "steps": steps},
        "optimizer_state": {},
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": 0,
    }
