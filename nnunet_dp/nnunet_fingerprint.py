"""nnU-Net's side of the private fingerprint: its measurements of each case, and its planner run on what was released.

    raw cases -> nnU-Net's own measurements -> votes, noise, charge (``fingerprint``) -> nnU-Net's planner -> plans

Formal guarantee:
    ``plans_from`` reads no image: its plans are a function of the fingerprint given, of the dataset's public
    description and of its public number of cases.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_dp.fingerprint import Ballot, Estimate, Values, as_nnunet, statistics_for
from nnunet_dp.nnunet_public_plans import channel_names, described_facts, nnunet_folders_in
from nnunet_dp.plans import write_json
from nnunet_dp.torn_images import refuse_torn
from nnunet_dp.workers import Progress, in_order

_DATASET = "Dataset999_Fingerprint"
_VOXELS = 10_000  # of a case's foreground, for the deviation of its intensities
_COPIED = ("labels", "regions_class_order", "file_ending")
Case = tuple[list[str], str]
"""Image files, segmentation file."""


def ballot_for(dataset_json: Mapping[str, Any]) -> Ballot:
    """What is asked about datasets described so."""
    return Ballot(statistics_for(described_facts(dataset_json).dimensions, ct_channels(dataset_json)))


def ct_channels(dataset_json: Mapping[str, Any]) -> tuple[int, ...]:
    """Channels whose intensities nnU-Net clips to a window of the whole dataset."""
    names = enumerate(channel_names(dataset_json))
    return tuple(number for number, name in names if get_normalization_scheme(name) is CTNormalization)


def measure(raw: Path, processes: int = 1, progress: Progress | None = None) -> dict[str, Values]:
    """nnU-Net's measurements of every training case, by case; private.

    Args:
        raw: the raw dataset's folder.
        processes: that read images, at most.
        progress: told after each case.
    """
    dataset_json = json.loads((raw / "dataset.json").read_text())
    found = get_filenames_of_train_images_and_targets(str(raw), json.loads(json.dumps(dataset_json)))
    names = sorted(found)
    cases = [(found[name]["images"], found[name]["label"]) for name in names]
    picture = described_facts(dataset_json).dimensions == 2
    work = partial(_measure_one, dataset_json, ct_channels(dataset_json), picture)
    return dict(zip(names, in_order(work, cases, processes, progress), strict=True))


def _measure_one(dataset_json: dict[str, Any], windows: tuple[int, ...], picture: bool, case: Case) -> Values:
    images, labels = case
    for file in (*images, labels):
        refuse_torn(Path(file))
    reader = determine_reader_writer_from_dataset_json(dataset_json, verbose=False)
    shape, spacing, intensities, stats, relative = DatasetFingerprintExtractor.analyze_case(
        images, labels, reader, _VOXELS
    )
    values = {} if picture else {f"spacing_{axis}": float(edge) for axis, edge in enumerate(spacing)}
    values |= {f"size_{axis}": float(length) for axis, length in enumerate(shape)}
    values |= {"relative_size": float(relative)}
    for channel in windows:
        told = stats[channel]
        values |= {
            f"low_{channel}": float(told["percentile_00_5"]),
            f"high_{channel}": float(told["percentile_99_5"]),
            f"mean_{channel}": float(told["mean"]),
            f"deviation_{channel}": float(np.std(intensities[channel])) if len(intensities[channel]) else np.nan,
        }
    return values


def plans_from(found: Mapping[str, Estimate], dataset_json: Mapping[str, Any], cases: int) -> dict[str, Any]:
    """nnU-Net's plans for a fingerprint.

    Args:
        found: released distributions, by statistic.
        dataset_json: public description: channels, labels, file ending.
        cases: public number of them, by which nnU-Net bounds its batch size.
    """
    facts = described_facts(dataset_json)
    reader = determine_reader_writer_from_dataset_json(dict(dataset_json), verbose=False).__name__
    named = {str(number): name for number, name in enumerate(channel_names(dataset_json))}
    described = {key: dataset_json[key] for key in _COPIED if key in dataset_json}
    described |= {"channel_names": named, "numTraining": cases, "overwrite_image_reader_writer": reader}
    with tempfile.TemporaryDirectory(prefix="nnunet_dp_plans_") as place, nnunet_folders_in(Path(place)):
        raw, preprocessed = (Path(place) / part / _DATASET for part in ("raw", "preprocessed"))
        for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
            folder.mkdir(parents=True)
        for number in named:  # the planner looks for names, never into the files
            (raw / "imagesTr" / f"case_{int(number):04d}{described['file_ending']}").touch()
        (raw / "labelsTr" / f"case{described['file_ending']}").touch()
        write_json(described, raw / "dataset.json")
        write_json(as_nnunet(found, facts.dimensions, facts.channels), preprocessed / "dataset_fingerprint.json")
        with contextlib.redirect_stdout(io.StringIO()):
            plans = ExperimentPlanner(_DATASET).plan_experiment()
    return {**json.loads(json.dumps(plans)), "image_reader_writer": reader}
