"""A folder of predictions in, a refined folder out: ``nnunet-dp morph apply``, and the end of ``nnunet-dp predict``.

Post-processing: it reads predictions and ``morphology.json`` and nothing else, so it costs no privacy. Files are
replaced whole or not at all; since refinement is idempotent, a run that was killed is simply started again.

``write_pickle`` writes the same rules in nnU-Net's own form, for plain ``nnUNetv2_apply_postprocessing``. That command
passes no spacing: radii are kept only where the caller says that one spacing holds for all images.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dp.description import read_description
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.morphology import FILE, Closing, Morphology, Opening, classes_from, write_morphology
from nnunet_dp.nnunet_files import SegmentationFiles, as_labels
from nnunet_dp.refinement import refine
from nnunet_dp.replacing import replacing
from nnunet_dp.workers import Progress, in_order

PICKLE = "postprocessing.pkl"


def refine_folder(
    source: Path,
    target: Path,
    morphology: Morphology,
    *,
    dataset_json: Path | None = None,
    only: Sequence[str] | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> int:
    """Refine every prediction of a folder; ``source`` and ``target`` may be the same.

    Args:
        source: predictions, as ``nnUNetv2_predict`` leaves them, with its dataset.json and plans.json.
        target: made if it does not exist; receives the refined files, dataset.json, plans.json and the rules applied.
        morphology: the rules.
        dataset_json: where ``source`` holds none.
        only: names of files to refine; None refines all.
        processes: that work side by side.
        progress: told (files done, files in all).

    Returns:
        Number of files refined.

    Raises:
        UsageRefusal: for a folder without predictions or dataset.json, or rules made for other classes.
    """
    description = _description(source, dataset_json)
    refuse_other_classes(morphology, description)
    if morphology.kind == "not_private":
        raise UsageRefusal("these rules were learnt from masks without noise, for comparison only: learn private ones")
    plans = json.loads((source / "plans.json").read_text()) if (source / "plans.json").is_file() else None
    ending = description["file_ending"]
    names = sorted(file.name for file in source.glob(f"*{ending}") if only is None or file.name in only)
    if not names:
        raise UsageRefusal(f"{source} holds no predictions that end in {ending}: is it the output of nnUNetv2_predict?")
    target.mkdir(parents=True, exist_ok=True)
    work = [(description, plans, morphology, source / name, target / name) for name in names]
    for _ in in_order(_refine_file, work, processes, progress):
        pass
    _carry_along(source, target, morphology, dataset_json)
    return len(names)


def _description(source: Path, dataset_json: Path | None) -> dict[str, Any]:
    """The dataset.json that goes with a folder of predictions; refused where there is none, or none of nnU-Net's."""
    file = dataset_json or source / "dataset.json"
    if not file.is_file():
        raise UsageRefusal(f"{source} holds no dataset.json: name the dataset's own with --dataset-json FILE")
    return read_description(file)


def refuse_other_classes(morphology: Morphology, dataset_json: Mapping[str, Any]) -> None:
    """Refuse rules that were made for a dataset with other labels.

    Raises:
        UsageRefusal: naming both.
    """
    expected = classes_from(dataset_json)
    mine = [(rule.labels, rule.writes) for rule in expected.classes]
    found = [(rule.labels, rule.writes) for rule in morphology.classes]
    if found != mine or morphology.regions != expected.regions:
        names = ", ".join(f"{rule.name} {list(rule.labels)}" for rule in expected.classes)
        theirs = ", ".join(f"{rule.name} {list(rule.labels)}" for rule in morphology.classes)
        raise UsageRefusal(f"the rules are for other classes: the dataset has {names}; the rules speak of {theirs}")


def _refine_file(item: tuple[dict[str, Any], dict[str, Any] | None, Morphology, Path, Path]) -> None:
    description, plans, morphology, source, target = item
    files = SegmentationFiles(description, plans)
    segmentation, spacing_mm, properties = files.read(source)
    refined = refine(segmentation, morphology, spacing_mm)
    folder = Path(tempfile.mkdtemp(prefix=".refining_", dir=target.parent))  # nnU-Net's writers go by the file ending
    try:
        files.write(refined, folder / target.name, properties)
        os.replace(folder / target.name, target)
    finally:
        shutil.rmtree(folder)


def _carry_along(source: Path, target: Path, morphology: Morphology, dataset_json: Path | None) -> None:
    found = {"dataset.json": dataset_json or source / "dataset.json", "plans.json": source / "plans.json"}
    for name, file in found.items():
        if file.is_file() and file.resolve() != (target / name).resolve():
            shutil.copyfile(file, target / name)
    write_morphology(morphology, target / FILE)


# ---- nnU-Net's own form ------------------------------------------------------------------------------------------


def refine_in_nnunet(segmentation: np.ndarray, rules: str, spacing_mm: Sequence[float] | None) -> np.ndarray:
    """What ``postprocessing.pkl`` calls: labels [1, *spatial] or [*spatial] in and out, rules as JSON.

    Args:
        segmentation: as nnU-Net's readers give it.
        rules: content of a morphology file.
        spacing_mm: one spacing for all images; None where the rules hold no radius or volume.
    """
    morphology = Morphology.model_validate_json(rules)
    dimensions = 3 if spacing_mm is None else len(spacing_mm)
    labels = as_labels(segmentation[0] if segmentation.ndim > dimensions else segmentation)
    refined = refine(labels, morphology, spacing_mm or (1.0,) * labels.ndim)
    return refined.reshape(segmentation.shape).astype(segmentation.dtype)


def write_pickle(morphology: Morphology, folder: Path, spacing_mm: Sequence[float] | None) -> tuple[str, ...]:
    """Write ``postprocessing.pkl`` beside the rules: local, like every pickle never to be exported.

    Args:
        morphology: the rules.
        folder: the model's.
        spacing_mm: of all images, if it is one; None drops what is measured in millimetres.

    Returns:
        Operations that had to be dropped.
    """
    kept, dropped = (morphology, ()) if spacing_mm is not None else _without_lengths(morphology)
    arguments = {"rules": kept.model_dump_json(exclude_none=True), "spacing_mm": spacing_mm and tuple(spacing_mm)}
    with replacing(folder / PICKLE) as stream:
        pickle.dump(([refine_in_nnunet], [arguments]), stream)
    return dropped


def _without_lengths(morphology: Morphology) -> tuple[Morphology, tuple[str, ...]]:
    dropped: list[str] = []
    kept = []
    for rule in morphology.classes:
        lengths = [operation for operation in rule.operations if _needs_spacing(operation)]
        dropped += [f"{operation.operation} of {rule.name}" for operation in lengths]
        kept.append(tuple(operation for operation in rule.operations if operation not in lengths))
    return morphology.with_operations(kept), tuple(dropped)


def _needs_spacing(operation: Any) -> bool:
    volumes = (getattr(operation, name, None) for name in ("largest_mm3", "below_mm3"))
    return isinstance(operation, Opening | Closing) or any(volume is not None for volume in volumes)
