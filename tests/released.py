"""A finished private model on disk without a training: drawn weights, a true ledger, what real folders hold beside.

``test_doors_export`` exports a model that nnU-Net trained; here only the files are like that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ordinary_plans import DATASET, DATASET_JSON, configuration

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.archive import pack, unpack
from nnunet_dp.charges import MORPHOLOGY
from nnunet_dp.inference_plans import Released
from nnunet_dp.ledger import Ledger
from nnunet_dp.mechanisms import SubsampledGaussian
from nnunet_dp.morphology import FILE, KeepLargest, classes_from, write_morphology
from nnunet_dp.nnunet import final_checkpoint
from nnunet_dp.nnunet_start import planned_network
from nnunet_dp.planning import plan_configuration
from nnunet_dp.plans import read_section, with_section, write_json
from nnunet_dp.released_model import MANIFEST, manifest_of
from nnunet_dp.run import FINAL, LEDGER, write_checkpoint
from nnunet_dp.sections import NOT_COVERED, PrivacySection
from nnunet_dp.soft_morphology import MorphedNetwork, SoftMorphology

BUDGET = PrivacyBudget(epsilon=8, delta=1e-4, unit="patient")
STRIDES = [[1, 1], [2, 2], [2, 2]]
PLAN = plan_configuration(BUDGET, 170, (32, 32), STRIDES, lambda shape: 135 * sum(f * f for f in shape), "small")
STEPS, UNITS = 5, 136
SECRETS = ("tube_07", "Meier", "hospital-gpu-3")
_RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


@dataclass(frozen=True)
class FakeModel:
    """A model's folder with one dataset's ledger."""

    folder: Path
    ledger: Path

    @property
    def digest(self) -> str:
        """Of what its trainings are charged under."""
        section = read_section(json.loads((self.folder / "plans.json").read_text()))
        assert section is not None
        return section.configurations["2d"].privacy_plan(section.budget, "auto_s", UNITS).digest()

    def finish(self, fold: str = "0", run: str = "", steps: int = STEPS, learns: bool = True) -> None:
        """What a training of this fold leaves: charges, weights, rules, and much that nobody should get."""
        place, name = self.folder / f"fold_{fold}", run or f"{self.folder.name}/fold_{fold}/0a"
        place.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(self.ledger, name, self.digest, place / LEDGER, BUDGET.unit)
        if learns:
            ledger.charge(SubsampledGaussian(PLAN.morphology.noise_multiplier).charge(MORPHOLOGY, None))
            paid = {"ledger_run": name, "ledger_sequence": ledger.head[0]}
            self._learn(place, paid)
        for step in range(steps):
            ledger.charge(SubsampledGaussian(PLAN.noise_multiplier, PLAN.sampling_probability).charge("training", step))
        self.write_weights(fold, name, len(ledger.own_entries), steps)
        for file in ("training_log_2026_11_23.txt", "progress.png", "debug.json", "checkpoint_latest.log"):
            (place / file).write_text(" ".join(SECRETS))

    def _learn(self, place: Path, paid: dict[str, Any]) -> None:
        rules = classes_from(DATASET_JSON)
        keep = rules.with_operations([(KeepLargest(),), ()])
        write_morphology(keep.model_copy(update={"kind": "private", "provenance": paid}), place / FILE)

    def write_weights(self, fold: str, run: str, charges: int, steps: int, trainer: str = "") -> None:
        """The checkpoint alone."""
        trainer = trainer or self.folder.name.split("__")[0]
        torch.manual_seed(sum(map(ord, fold)))
        network = planned_network(json.loads((self.folder / "plans.json").read_text()), "2d", DATASET_JSON)
        if "_Morph" in trainer:
            network = MorphedNetwork(network, SoftMorphology(3, 2, True))
        number = fold if fold == "all" else int(fold)
        content = final_checkpoint(network.state_dict(), trainer, "2d", number, (0, 1), run, charges, steps)
        write_checkpoint(content, self.folder / f"fold_{fold}" / FINAL)


def fake_model(root: Path, trainer: str = "nnUNetTrainerDP_AutoS", **section: Any) -> FakeModel:
    """The model's folder, with plans; no fold is trained yet."""
    folder = root / "results" / DATASET / f"{trainer}__nnUNetPlansDP_eps8__2d"
    preprocessed = root / "preprocessed" / DATASET
    folder.mkdir(parents=True)
    preprocessed.mkdir(parents=True, exist_ok=True)
    given = {"not_covered": NOT_COVERED, "source_plans": "nnUNetPlans", "patients_file_sha256": None, **section}
    private = PrivacySection(budget=BUDGET, patients=170, configurations={"2d": PLAN}, **given)
    write_json(with_section(plans(), "nnUNetPlansDP_eps8", private, {}), folder / "plans.json")
    write_json({**DATASET_JSON, "training": list(SECRETS), "licence": "of Meier"}, folder / "dataset.json")
    write_json({"shapes_after_crop": [list(SECRETS)]}, folder / "dataset_fingerprint.json")
    return FakeModel(folder, preprocessed / LEDGER)


def plans(scheme: str = "ZScoreNormalization") -> dict[str, Any]:
    """As nnU-Net's planner writes them, with statistics of the raw images."""
    planned = configuration("2d", [32, 32], 3) | {"normalization_schemes": [scheme]}
    planned["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 8]
    planned |= {"median_image_size_in_voxels": [31.0, 33.0], "batch_size": 12}
    for what in ("data", "seg", "probabilities"):
        planned[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        planned[f"resampling_fn_{what}_kwargs"] = dict(_RESAMPLING)
    statistics = {"mean": 1.5, "std": 2.5, "percentile_00_5": -3.0, "percentile_99_5": 9.0, "max": 17.0, "min": -4.0}
    return {
        "dataset_name": DATASET, "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0], "original_median_shape_after_transp": [1, 31, 33],
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "configurations": {"2d": planned},
        "experiment_planner_used": "ExperimentPlanner", "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": statistics},
    }  # fmt: skip


# ---- archives ----------------------------------------------------------------------------------------------------


def files_of(content: bytes) -> tuple[str, dict[str, bytes]]:
    """The model's folder in a good archive, and its files by their names below it."""
    found, faults = unpack(content, "/checkpoint_final.pth")
    assert not faults
    root = next(name for name in found if name.endswith("plans.json")).removesuffix("plans.json")
    return root, {name.removeprefix(root): data for name, data in found.items()}


def archive_of(root: str, files: dict[str, bytes], listed: bool = True) -> bytes:
    """An archive of these files; its manifest follows them, if whoever planted something thought of that."""
    if listed:
        files = {**files, MANIFEST: manifest_of(files).content}
    return pack({root + name: data for name, data in files.items()})


def edited(kind: type[Released], content: bytes, **changes: Any) -> bytes:
    """JSON of a schema with other values, written as the schema writes it."""
    model = kind.model_validate_json(content)
    return model.model_copy(update=changes).content
