"""Refinement rules that look at no patient and cost nothing: from a file, from phantoms, or from public constants.

Same file, same place and same use as the rules that a private training learns (``learning``); ``kind`` says which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.learning import place
from nnunet_dp.morphology import (
    FILE,
    FillHoles,
    KeepLargest,
    Morphology,
    Opening,
    classes_from,
    read_morphology,
)
from nnunet_dp.phantoms import KINDS, Patient
from nnunet_dp.refined_folder import refuse_other_classes
from nnunet_dp.shape_votes import Ballot, Mask, questions, without_noise

PHANTOMS = 40  # artificial patients asked for rules from a phantom
PHANTOM_SEED = 20260


def place_free_rules(model: Path, file: Path | None, phantom: str | None, overwrite: bool) -> None:
    """Write free rules into a model's folder: from a file, from phantoms, or else the public per-image ones.

    Raises:
        UsageRefusal: for a folder without a model, or with other rules and no ``overwrite``.
    """
    description = model / "dataset.json"
    if not description.is_file():
        raise UsageRefusal(f"there is no trained model {model.name}: train it first, or correct -d, -c, -tr and -p")
    content = json.loads(description.read_text())
    if file is not None:
        rules = fixed(file, content)
    else:
        rules = from_phantom(phantom, content) if phantom is not None else per_image(content)
    if (model / FILE).is_file() and read_morphology(model / FILE) != rules and not overwrite:
        raise UsageRefusal(f"{model.name} has a {FILE} already: give --overwrite (what a fold learnt stays in fold_X)")
    place(model, rules)


def fixed(file: Path, dataset_json: Mapping[str, Any]) -> Morphology:
    """Rules from a file, checked against the dataset's classes.

    Raises:
        UsageRefusal: for other classes, or a file learnt from masks (its provenance would be lost).
    """
    found = read_morphology(file)
    refuse_other_classes(found, dataset_json)
    if not found.free:
        raise UsageRefusal(
            f"{file.name} was learnt from patients' masks (kind {found.kind}): it belongs to the model whose ledger "
            "paid for it; write fixed rules of your own (kind fixed)"
        )
    return found


def from_phantom(kind: str, dataset_json: Mapping[str, Any]) -> Morphology:
    """Rules that the masks of artificial patients support; free, because they are made of random numbers.

    Raises:
        UsageRefusal: for an unknown kind or one with other labels.
    """
    if kind not in KINDS:
        raise UsageRefusal(f"--from-phantom should be one of {', '.join(sorted(KINDS))}, found {kind!r}")
    known = classes_from(dataset_json)
    labels = {label for rule in known.classes for label in rule.labels}
    theirs = set(range(1, len(KINDS[kind].labels)))
    if labels != theirs or known.regions:
        raise UsageRefusal(
            f"phantoms of kind {kind} have the labels {sorted(theirs)}, the dataset has {sorted(labels)}: choose "
            "another kind, or write fixed rules"
        )
    patients = [_phantom_masks(kind, index) for index in range(PHANTOMS)]
    ballot = Ballot(known.classes, questions(patients[0][0][1]), ignore_label=known.ignore_label)
    rules = without_noise(ballot, (ballot.votes(masks) for masks in patients), "phantom")
    return rules.model_copy(update={"provenance": {"phantom": kind, "patients": PHANTOMS}})


def _phantom_masks(kind: str, index: int) -> list[Mask]:
    patient = Patient(kind, PHANTOM_SEED, index)
    scans = [
        KINDS[kind].render(patient, case, None)
        for case in range(patient.number_of_cases(*KINDS[kind].cases_per_patient))
    ]
    return [(scan.segmentation, scan.spacing_mm) for scan in scans]


def per_image(dataset_json: Mapping[str, Any]) -> Morphology:
    """Public constants; what they do follows the thickness and the components of each image's own prediction."""
    known = classes_from(dataset_json)
    operations = (Opening(inscribed_share=0.2, least_kept=0.9), KeepLargest(least_kept=0.3), FillHoles())
    rules = known.with_operations([operations] * len(known.classes))
    return rules.model_copy(update={"kind": "per_image", "provenance": {"rule": "public constants"}})
