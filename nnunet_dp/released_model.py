"""What lies where in an exported model: the one list that export writes by and verify reads by.

    Dataset004_Hippocampus/
      nnUNetTrainerDP_AutoS__nnUNetPlansDP_eps8_3f2a9c1e__3d_fullres/
        plans.json  dataset.json          what prediction needs
        privacy_card.json                 what is guaranteed
        privacy_card.html                 the same for people, rendered from it
        README.md                         the same for a model hub, rendered from it
        morphology.json                   refinement rules, where there are some
        manifest.json                     SHA-256 and size of every other file
        fold_0/checkpoint_final.pth       weights, for nnU-Net
        fold_0/weights.safetensors        the same weights, for everybody else
        fold_0/morphology.json            rules that this fold has learnt

The plans' name ends with a digest of the weights, so that no export unpacks over another model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping

from nnunet_dp import TRAINER_NAMES
from nnunet_dp.inference_plans import Released
from nnunet_dp.morphology import FILE as RULES
from nnunet_dp.run import CARD, FINAL

STOCK_TRAINER = "nnUNetTrainer"
TRAINERS = (STOCK_TRAINER, *TRAINER_NAMES)
PLANS, DESCRIPTION, MANIFEST, SAFETENSORS = "plans.json", "dataset.json", "manifest.json", "weights.safetensors"
PAGE, README = "privacy_card.html", "README.md"
_IN_NETWORK = tuple(name for name in TRAINER_NAMES if "_Morph" in name)
_OF_FOLD = {FINAL: "averaged weights, for nnU-Net", SAFETENSORS: "the same weights", RULES: "rules this fold learnt"}
_OF_MODEL = {
    PLANS: "what prediction needs of the plans",
    DESCRIPTION: "channels, labels, file ending",
    CARD: "the privacy card",
    PAGE: "the privacy card as a page",
    README: "the privacy card for a model hub",
    MANIFEST: "hashes of all other files",
    RULES: "refinement rules",
}
_FOLD = re.compile(r"fold_(all|[0-9]{1,3})/(.+)")


class ManifestRow(Released):
    """Size and hash of a file."""

    bytes: int
    sha256: str


class Manifest(Released):
    """The content of ``manifest.json``."""

    version: int
    files: dict[str, ManifestRow]


def manifest_of(files: Mapping[str, bytes]) -> Manifest:
    """Of all files but itself; names are relative to the model's folder."""
    rows = {
        name: ManifestRow(bytes=len(files[name]), sha256=hashlib.sha256(files[name]).hexdigest())
        for name in sorted(files)
        if name != MANIFEST
    }
    return Manifest(version=1, files=rows)


def meaning(name: str) -> str | None:
    """What a file of the model's folder is; None for one that is not declared."""
    fold = _FOLD.fullmatch(name)
    return _OF_FOLD.get(fold[2]) if fold else _OF_MODEL.get(name)


def required(folds: Iterable[str]) -> tuple[str, ...]:
    """Files without which a model of these folds is not one."""
    weights = (f"fold_{fold}/{file}" for fold in folds for file in (FINAL, SAFETENSORS))
    return (PLANS, DESCRIPTION, CARD, PAGE, README, MANIFEST, *weights)


def folds_of(files: Iterable[str]) -> tuple[str, ...]:
    """The folds that have weights."""
    found = (_FOLD.fullmatch(name) for name in files)
    return tuple(sorted({match[1] for match in found if match and match[2] == FINAL}))


def weights_digest(files: Mapping[str, bytes]) -> str:
    """Sixteen digits that tell these weights from others."""
    digest = hashlib.sha256()
    for name in sorted(files):
        if name.endswith(f"/{SAFETENSORS}"):
            digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()[:16]


def refines_inside(trainer: str) -> bool:
    """Whether a trainer's network holds morphology, which plain nnU-Net cannot build."""
    return trainer in _IN_NETWORK
