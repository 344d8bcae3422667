"""nnU-Net's plans without anybody's data: its own fingerprint and planner, run on phantoms.

A federated run needs one plan for all sites before any of them has been asked for anything private. Where a phantom
kind resembles the sites' dataset (axes, channels, CT or not, classes: all in dataset.json), its images stand in for
theirs: patch size, spacing, topology and, for CT, the intensity window come from random numbers and published anatomy.

    dataset.json -> matching kind -> phantoms in a temporary folder -> nnU-Net's fingerprint -> nnU-Net's plans

Formal guarantee:
    The plans are a function of the dataset.json given (channels, labels, file ending) and of the phantoms' code. No
    image, no label and no fingerprint of a private dataset is read.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.phantoms import KINDS, Kind, write_dataset
from nnunet_dp.phantoms.matching import SHAPES, PublicFacts, find_kind, matching_kinds
from nnunet_dp.plans import write_json

PHANTOMS = 20
"""Patients drawn: the medians of shapes and spacings no longer move with more."""
INTENSITIES = 1e6
"""Foreground voxels that the intensity statistics come from; nnU-Net's 1e8 takes minutes and moves no percentile."""
PHANTOM_DATASET = "Dataset999_Phantoms"
_COPIED = ("labels", "regions_class_order")


@dataclass(frozen=True)
class PublicPlans:
    """Plans and what they are a function of.

    Attributes:
        plans: nnU-Net's.
        source: for people and for the model's provenance.
        public: whether no private dataset was read for them.
    """

    plans: dict[str, Any]
    source: str
    public: bool


def described_facts(dataset_json: Mapping[str, Any]) -> PublicFacts:
    """What a dataset.json says about images and labels; axes by the reader that its file ending gets."""
    reader = determine_reader_writer_from_dataset_json(dict(dataset_json), verbose=False)
    names = channel_names(dataset_json)
    stand_in = {
        "label_manager": "LabelManager",
        "original_median_shape_after_transp": [1 if reader is NaturalImage2DIO else 2, 2, 2],
        "configurations": {"any": {"normalization_schemes": [get_normalization_scheme(n).__name__ for n in names]}},
    }
    return public_facts(stand_in, dataset_json)


def public_facts(plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> PublicFacts:
    """What decides which phantoms resemble a dataset, from its plans and its dataset.json."""
    schemes = next(iter(plans["configurations"].values())).get("normalization_schemes", ())
    shape = plans.get("original_median_shape_after_transp", ())
    values = {int(v) for label in dataset_json["labels"].values() for v in np.atleast_1d(label)}
    ignored = {dataset_json["labels"]["ignore"]} if "ignore" in dataset_json["labels"] else set()
    return PublicFacts(
        dimensions=2 if len(shape) == 3 and round(shape[0]) == 1 else 3,
        channels=len(dataset_json.get("channel_names", dataset_json.get("modality", {}))),
        calibrated="CTNormalization" in schemes,
        classes=len(values - {0} - ignored),
        regions=bool(PlansManager(dict(plans)).get_label_manager(dict(dataset_json)).has_regions),
    )


def channel_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """Names of the channels, in their order."""
    named = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    return [named[key] for key in sorted(named, key=int)]


def default_configuration(dataset_json: Mapping[str, Any]) -> str:
    """``2d`` for pictures, ``3d_fullres`` for volumes."""
    return "2d" if described_facts(dataset_json).dimensions == 2 else "3d_fullres"


def plans_from_phantoms(
    dataset_json: Mapping[str, Any],
    kind: str | None = None,
    patients: int = PHANTOMS,
    shape: tuple[int, ...] | None = None,
) -> PublicPlans:
    """Plans for datasets described so, made on phantoms.

    Args:
        dataset_json: description of the sites' datasets: channels, labels, file ending.
        kind: of phantoms; None takes the one that resembles the description.
        patients: phantoms drawn.
        shape: voxels of every phantom; None is realistic.

    Raises:
        UsageRefusal: when no kind resembles it, or the named one does not fit.
    """
    facts = described_facts(dataset_json)
    chosen = find_kind(kind, facts).name if kind else matching_kinds(facts)[0]
    if chosen == SHAPES:
        raise UsageRefusal(
            f"no phantoms resemble a dataset of {facts.dimensions} axes, {facts.channels} channels and "
            f"{facts.classes} classes: name plans of a public dataset with --plans-from DATASET, or -p NAME"
        )
    with tempfile.TemporaryDirectory(prefix="nnunet_dp_plans_") as folder, nnunet_folders_in(Path(folder)):
        write_raw_phantoms(Path(folder), chosen, patients, 0, shape, dataset_json)
        plans = plans_of_raw_phantoms()
    reader = determine_reader_writer_from_dataset_json(dict(dataset_json), verbose=False)
    plans = {**plans, "image_reader_writer": reader.__name__}
    return PublicPlans(plans, f"{patients} phantom patients of kind {chosen}", True)


def plans_of_raw_phantoms() -> dict[str, Any]:
    """What nnU-Net's fingerprint and planner make of the raw phantoms in its folders."""
    with contextlib.redirect_stdout(io.StringIO()):
        extractor = DatasetFingerprintExtractor(PHANTOM_DATASET, 1)
        extractor.show_progress_bar = False
        extractor.num_foreground_voxels_for_intensitystats = INTENSITIES
        extractor.run()
        return json.loads(json.dumps(ExperimentPlanner(PHANTOM_DATASET).plan_experiment()))


def write_raw_phantoms(
    folder: Path,
    kind: str,
    patients: int,
    seed: int,
    shape: tuple[int, ...] | None,
    dataset_json: Mapping[str, Any] | None = None,
) -> Path:
    """Phantoms as nnU-Net's raw data; the dataset's folder.

    Args:
        folder: holds nnU-Net's ``raw``.
        kind: of phantoms.
        patients: drawn.
        seed: of the drawing.
        shape: voxels of every phantom; None is realistic.
        dataset_json: of the dataset they stand for, whose names of channels and labels they get; None: their own.
    """
    written = write_dataset(folder / "raw", kind, patients, seed, dataset_id=999, shape=shape)
    dataset = written.rename(written.with_name(PHANTOM_DATASET))
    ending = KINDS[kind].file_ending
    if KINDS[kind].decathlon:  # one file for each case, with one channel
        for image in sorted((dataset / "imagesTr").iterdir()):
            image.rename(image.with_name(image.name.removesuffix(ending) + f"_0000{ending}"))
    described = _description(KINDS[kind]) if dataset_json is None else dataset_json
    named = {str(number): name for number, name in enumerate(channel_names(described))}
    copied = {key: described[key] for key in _COPIED if key in described}
    cases = len(list((dataset / "labelsTr").iterdir()))
    content = {"channel_names": named, **copied, "file_ending": ending, "numTraining": cases}
    write_json(content, dataset / "dataset.json")
    return dataset


def _description(kind: Kind) -> dict[str, Any]:
    order = {} if kind.regions_class_order is None else {"regions_class_order": list(kind.regions_class_order)}
    labels = {name: list(value) if isinstance(value, tuple) else value for name, value in kind.labels.items()}
    return {"channel_names": {str(k): name for k, name in enumerate(kind.channel_names)}, "labels": labels, **order}


@contextlib.contextmanager
def nnunet_folders_in(base: Path) -> Iterator[None]:
    """nnU-Net's three folders inside the block."""
    names = {f"nnUNet_{part}": base / part for part in ("raw", "preprocessed", "results")}
    before = {name: os.environ.get(name) for name in names}
    for name, folder in names.items():
        folder.mkdir()
        os.environ[name] = str(folder)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
