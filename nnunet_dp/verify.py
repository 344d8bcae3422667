"""``nnunet-dp verify model.zip``: what an archive holds, what in it is not declared, and whether its claim counts.

It trusts nothing: the archive is not unpacked to disk, JSON is compared with a closed schema and with the one way in
which it is written, a checkpoint's pickle is read before it is loaded, plans are admitted before a network is built
from them. What it proves is that nothing undeclared is in the archive and that the card adds up; that the weights were
trained as the card says only the owner of the ledger can know, for nothing here is signed.

Formal guarantee:
    ``verify`` carries out no code from the archive and writes nothing. Without a fault the archive's bytes are a
    function of weights of the network that its plans describe, and of values that the schemas of plans,
    dataset.json, card, manifest and refinement rules declare.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from nnunet_dp import FEDERATED_TRAINER, __version__
from nnunet_dp.archive import unpack
from nnunet_dp.card import Card, miscounted, upwards
from nnunet_dp.card_page import Described, rendered
from nnunet_dp.card_words import not_covered_rows
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.figures import misdrawn
from nnunet_dp.inference_plans import CT, DatasetDescription, InferencePlans, canonical_json, faults
from nnunet_dp.morphology import FILE as RULES
from nnunet_dp.morphology import Morphology
from nnunet_dp.refined_folder import refuse_other_classes
from nnunet_dp.released_model import (
    DESCRIPTION,
    MANIFEST,
    PLANS,
    SAFETENSORS,
    STOCK_TRAINER,
    TRAINERS,
    Manifest,
    folds_of,
    manifest_of,
    meaning,
    refines_inside,
    required,
    weights_digest,
)
from nnunet_dp.released_weights import read_checkpoint_bytes, same_bits, same_weights
from nnunet_dp.run import CARD, FINAL
from nnunet_dp.sections import RAW_FINGERPRINT

_PATH = re.compile(r"(?<![\w.\-])(?:~|/[\w.\-]+)/[\w.\-]+|\b[A-Za-z]:\\|\\\\\w")
_NO_MODEL = "there is no single folder DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION with plans.json"
_TIME = re.compile(r"\b(?:19|20)\d\d-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b")


@dataclass(frozen=True)
class Verified:
    """What was found in an archive.

    Attributes:
        file: its name.
        files: name, size and meaning of everything in it; no meaning for what is not declared.
        faults: in words; none for an archive that is what it should be.
        card: where it can be read.
    """

    file: str
    files: tuple[tuple[str, int, str | None], ...]
    faults: tuple[str, ...]
    card: Card | None

    @property
    def ok(self) -> bool:
        """Whether nothing was found that is not declared, and everything counts."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "file": self.file,
            "ok": self.ok,
            "faults": list(self.faults),
            "files": [{"name": name, "bytes": size, "meaning": what} for name, size, what in self.files],
            "card": json.loads(self.card.content) if self.card else None,
        }

    def lines(self) -> list[tuple[str, str]]:
        """Label and value, for a table."""
        listed = [(what or "NOT DECLARED", f"{_shown(name)}, {size} bytes") for name, size, what in self.files]
        wrong = [("FAULT", _shown(fault)) for fault in self.faults]
        verdict = "nothing undeclared was found; hashes, charges and card agree (this is no signature)"
        return [
            ("archive", self.file),
            *listed,
            *(_claim(self.card) if self.card else []),
            *wrong,
            ("verdict", verdict if self.ok else f"{len(self.faults)} faults: do not install or share it"),
        ]


def _shown(text: str) -> str:
    """Text from an archive, with nothing that a terminal would carry out."""
    return ascii(text)[1:-1]


def _claim(card: Card) -> list[tuple[str, str]]:
    rows = [("claim", card.claim), ("epsilon", f"{upwards(card.epsilon)} at delta {card.delta:g} per {card.unit}")]
    reported = [str(row.site) for row in card.sites if row.counted == "as reported"]
    rows += [("NOT recounted", f"sites {', '.join(reported)}: only they have their ledgers")] if reported else []
    return [*rows, ("covers", "; ".join(card.covers)), *not_covered_rows(card.not_covered)]


def verify(file: Path) -> Verified:
    """Look at an archive without trusting it.

    Raises:
        UsageRefusal: when there is no such file.
    """
    if not Path(file).is_file():
        raise UsageRefusal(f"there should be an archive {file}, found none: name one that `nnunet-dp export` wrote")
    return verify_content(Path(file).read_bytes(), Path(file).name)


def verify_content(content: bytes, name: str) -> Verified:
    """The same for an archive in memory.

    Args:
        content: of the archive.
        name: to call it by.
    """
    found, wrong = unpack(content, may_nest=f"/{FINAL}")
    root, files = _below_root(found)
    listed = tuple((name, len(data), _meaning(name, root)) for name, data in sorted(found.items()))
    undeclared = tuple(f"{name} is not declared" for name, _, what in listed if what is None)
    card = _read(Card, files.get(CARD, b""))
    try:
        contents = tuple(_faults(root, files)) if root else (_NO_MODEL,)
    except Exception as error:  # what nobody thought of is a fault of the archive
        contents = (f"cannot be checked ({type(error).__name__})",)
    return Verified(name, listed, (*wrong, *undeclared, *contents), card)


def _below_root(found: Mapping[str, bytes]) -> tuple[str, dict[str, bytes]]:
    """The model's folder in the archive, and its files by their names below it."""
    roots = {name[: -len(PLANS)] for name in found if re.fullmatch(rf"Dataset\d{{3}}_[^/]+/[^/]+/{PLANS}", name)}
    if len(roots) != 1:
        return "", {}
    (root,) = roots
    return root, {name.removeprefix(root): data for name, data in found.items() if name.startswith(root)}


def _meaning(name: str, root: str) -> str | None:
    return meaning(name.removeprefix(root)) if root and name.startswith(root) else None


def _read(kind: type[BaseModel], content: bytes) -> Any:
    """What a file says, or None where it is not what it should be."""
    try:
        return kind.model_validate_json(content)
    except ValueError:
        return None


# ---- one model ---------------------------------------------------------------------------------------------------


def _faults(root: str, files: Mapping[str, bytes]) -> Iterator[str]:
    yield from _told(files)
    yield from (
        f"{name}: {fault}"
        for name, kind in ((PLANS, InferencePlans), (DESCRIPTION, DatasetDescription), (CARD, Card))
        for fault in _unlike(kind, files.get(name, b""))
    )
    yield from _other_hashes(files)
    card, plans = _read(Card, files.get(CARD, b"")), _read(InferencePlans, files.get(PLANS, b""))
    description = _read(DatasetDescription, files.get(DESCRIPTION, b""))
    if card is not None:
        folds = [row.fold for row in card.folds]
        yield from (f"{name} is missing" for name in required(folds) if name not in files)
        if sorted(folds) != list(folds_of(files)):
            yield f"{CARD} speaks of folds {', '.join(folds)}, the archive holds {', '.join(folds_of(files)) or 'none'}"
        yield from (f"{CARD}: {fault}" for fault in miscounted(card))
    if plans is not None:
        yield from _odd_names(root, plans, card, files)
        yield from _uncovered(plans, card)
    if card is not None:
        yield from (f"{CARD}: {fault}" for fault in misdrawn(card))
    if description is not None and card is not None:
        yield from _odd_rules(files, description, card)
        yield from _odd_pages(root, files, description, card)
    yield from _odd_weights(root, files, card, plans, description)


def _unlike(kind: type[BaseModel], content: bytes) -> tuple[str, ...]:
    """How a file differs from what its schema would write."""
    try:
        wrong = faults(kind, json.loads(content))
    except (ValueError, RecursionError):
        return ("is not JSON",)
    if wrong:
        return wrong
    return () if _read(kind, content).content == content else ("is not written as the schema writes it",)


def _told(files: Mapping[str, bytes]) -> Iterator[str]:
    """Paths and times in any text of the archive."""
    for name, content in sorted(files.items()):
        if not name.endswith(".json"):
            continue
        text = content.decode("utf-8", "replace")
        for what, pattern in (("a path of a machine", _PATH), ("a date or time", _TIME)):
            if (found := pattern.search(text)) is not None:
                yield f"{name} says {what}: {found[0]!r}"


def _other_hashes(files: Mapping[str, bytes]) -> Iterator[str]:
    try:
        told = Manifest.model_validate_json(files.get(MANIFEST, b""))
    except ValueError:
        yield f"{MANIFEST} is missing or not one"
        return
    real = manifest_of(files)
    for name in sorted({*told.files, *real.files}):
        if name not in told.files:
            yield f"{MANIFEST} does not list {name}"
        elif name not in real.files:
            yield f"{MANIFEST} lists {name}, which is missing"
        elif told.files[name] != real.files[name]:
            yield f"{name} has another hash than {MANIFEST} says"
    if told == real and real.content != files[MANIFEST]:
        yield f"{MANIFEST} is not written as the schema writes it"


def _odd_names(
    root: str, plans: InferencePlans, card: Card | None, files: Mapping[str, bytes]
) -> Iterator[str]:
    dataset, model = root.rstrip("/").split("/")
    trainer, _, rest = model.partition("__")
    if trainer not in TRAINERS:
        yield f"the trainer {trainer} is not one of nnunet_dp's or nnU-Net's own"
    if card is not None and trainer != STOCK_TRAINER and (trainer == FEDERATED_TRAINER) != bool(card.sites):
        yield f"a model of {trainer} should {'' if trainer == FEDERATED_TRAINER else 'not '}be charged at sites"
    name, _ = plans.configuration
    if (plans.dataset_name, f"{plans.plans_name}__{name}") != (dataset, rest):
        yield f"{PLANS} speaks of {plans.dataset_name}, {plans.plans_name}, {name}; the folder is {root}"
    if not plans.plans_name.endswith(f"_{weights_digest(files)}"):
        yield f"the plans' name should end with the digest of the weights, {weights_digest(files)}"


def _uncovered(plans: InferencePlans, card: Card | None) -> Iterator[str]:
    if plans.surplus_intensities:
        yield f"{PLANS} holds intensity statistics that normalisation does not read"
    schemes = plans.configuration[1].normalization_schemes
    if sorted(plans.foreground_intensity_properties_per_channel) != sorted(map(str, range(len(schemes)))):
        yield f"{PLANS} should hold intensity properties of its {len(schemes)} channels, found others"
    if card is not None and RAW_FINGERPRINT in card.not_covered and CT in schemes:
        yield f"{PLANS} holds intensity statistics of the raw images, which no charge covers"


def _odd_pages(
    root: str, files: Mapping[str, bytes], description: DatasetDescription, card: Card
) -> Iterator[str]:
    """Pages that say anything but what the card says: they are rendered again."""
    dataset, model = root.rstrip("/").split("/")
    try:
        pages = rendered(card, Described(dataset=dataset, model=model, description=description))
    except Exception as error:  # names that nnU-Net does not write, numbers that no mechanism has
        yield f"{CARD} and the names of dataset and model cannot be rendered to a page ({type(error).__name__})"
        return
    other = card.versions.get("nnunet_dp")
    hint = "" if other == __version__ else f" (by nnunet_dp {__version__}; the card is by {other}, verify with that)"
    for name, content in pages.items():
        if name in files and files[name] != content:
            yield f"{name} is not what {CARD} is rendered to{hint}"


def _odd_rules(files: Mapping[str, bytes], description: DatasetDescription, card: Card) -> Iterator[str]:
    for name, content in sorted(files.items()):
        if name.rsplit("/", 1)[-1] != RULES:
            continue
        rules = _read(Morphology, content)
        if rules is None or canonical_json(rules.model_dump(mode="json", exclude_none=True)) != content:
            yield f"{name} is not written as the schema writes it"
            continue
        if rules.provenance or rules.kind == "not_private":
            yield f"{name} should hold released rules alone, found their provenance, or rules that were not released"
        learnt = rules.kind == "private" and any(rule.operations for rule in rules.classes)
        paid = any(row.purpose == "morphology" for row in card.charges)
        if learnt and not paid:
            yield f"{name} was learnt from masks, and no charge paid for it"
        try:
            refuse_other_classes(rules, json.loads(description.content))
        except ValueError as refusal:  # a usage refusal, or labels that are no classes
            yield f"{name}: {' '.join(str(refusal).split())}"


# ---- weights -----------------------------------------------------------------------------------------------------


def _odd_weights(
    root: str,
    files: Mapping[str, bytes],
    card: Card | None,
    plans: InferencePlans | None,
    description: DatasetDescription | None,
) -> Iterator[str]:
    trainer = root.split("/")[1].split("__")[0]
    planned, unplanned = _planned(plans, description, trainer)
    yield from unplanned
    for fold in folds_of(files):
        name, twin = f"fold_{fold}/{FINAL}", f"fold_{fold}/{SAFETENSORS}"
        checkpoint, wrong = read_checkpoint_bytes(files[name])
        yield from (f"{name}: {fault}" for fault in wrong)
        if wrong:
            continue
        weights = checkpoint["network_weights"]
        yield from (f"{twin}: {fault}" for fault in same_weights(weights, files.get(twin, b"")))
        yield from (f"{name}: {fault}" for fault in _other_counts(checkpoint, fold, trainer, card, plans))
        yield from (f"{name}: {fault}" for fault in itertools.islice(_odd_tensors(weights, planned), 5))


def _planned(
    plans: InferencePlans | None, description: DatasetDescription | None, trainer: str
) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """The planned network's tensors, None where the plans are not admitted; and why the network is not, if so."""
    if plans is None or description is None or trainer not in TRAINERS:
        return None, ()
    from nnunet_dp.nnunet_inference import planned_tensors

    name, _ = plans.configuration
    told = json.loads(plans.content), name, json.loads(description.content), refines_inside(trainer)
    try:
        return planned_tensors(*told), ()
    except Refusal as refusal:
        return None, (f"{PLANS}: {refusal}",)
    except Exception as error:  # sizes that fit no network fail anywhere in torch
        return None, (f"{PLANS}: no network can be built from them ({type(error).__name__})",)


def _odd_tensors(weights: Mapping[str, torch.Tensor], planned: Mapping[str, Any] | None) -> Iterator[str]:
    """Tensors that are not the planned network's, or that hold what no network's arithmetic has."""
    if planned is None:
        return
    for name in sorted({*weights, *planned}):
        tensor, expected = weights.get(name), planned.get(name)
        if tensor is None or expected is None or tuple(tensor.shape) != expected.shape:
            yield f"the tensor {name} is not one of the planned network's"
        elif tensor.dtype != expected.dtype:
            yield f"the tensor {name} is {tensor.dtype}, the network computes with {expected.dtype}"
        elif tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            yield f"the tensor {name} holds numbers that are not finite"
        elif expected.first in weights and not same_bits(tensor, weights[expected.first]):
            yield f"the tensor {name} differs from {expected.first}, which the network knows as the same"


def _other_counts(
    checkpoint: Mapping[str, Any], fold: str, trainer: str, card: Card | None, plans: InferencePlans | None
) -> Iterator[str]:
    counted = checkpoint["init_args"]
    if (str(counted["fold"]), checkpoint["trainer_name"]) != (fold, trainer):
        yield "speaks of another fold or trainer than the folder"
    if plans is not None and counted["configuration"] != plans.configuration[0]:
        yield "speaks of another configuration than the plans"
    rows = [row for row in card.folds if row.fold == fold] if card else []
    if any((row.charges, row.steps) != (counted["charges"], counted["steps"]) for row in rows):
        yield f"says {counted['charges']} charges and {counted['steps']} steps, {CARD} says others"
