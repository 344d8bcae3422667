"""``nnunet-dp export``: a model's folder in, one archive out that holds what the ledger paid for and nothing else.

    weights of the finished folds   averaged, by a whitelist of keys; the same as safetensors
    plans.json, dataset.json        what prediction needs (``inference_plans``)
    morphology.json                 rules that the exported folds paid for, or free ones; without provenance
    privacy_card.json               the claim, counted again from the ledger (``card``)
    privacy_card.html, README.md    the same for people and for a model hub (``card_page``)

Nothing is copied: every file is written anew from values that a schema admits. What is written is then read by
``verify``, as a stranger would, before anybody gets it.

Formal guarantee:
    Given the plans, what an export holds is a function of charged releases and of what the card names as public. Its
    epsilon is that of all charges of the runs that trained the exported folds, and of the fingerprint that their plans
    follow, composed from the dataset's ledger at the time of the export. For a federated model it is each site's.

Design note: with ``stock`` plain nnU-Net builds the same network, because plans of a private training are written with
the small network in them. The trainer's name changes; the plans' name stays one of its own, so that nothing unpacks
over a model of the user's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_dp.archive import pack
from nnunet_dp.card import Card, upwards
from nnunet_dp.card_page import Described, predict_command, rendered
from nnunet_dp.card_words import not_covered_rows
from nnunet_dp.claim import Claim, ledger_claim
from nnunet_dp.description import read_description
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.federated.summary import FEDERATED
from nnunet_dp.inference_plans import (
    CT,
    DatasetDescription,
    canonical_json,
    reduced_description,
    reduced_plans,
)
from nnunet_dp.morphology import FILE as RULES
from nnunet_dp.morphology import Morphology, read_morphology
from nnunet_dp.plans import read_plans
from nnunet_dp.released_model import (
    DESCRIPTION,
    MANIFEST,
    PLANS,
    SAFETENSORS,
    STOCK_TRAINER,
    manifest_of,
    refines_inside,
    weights_digest,
)
from nnunet_dp.released_weights import checkpoint_bytes, released_checkpoint, safetensors_bytes
from nnunet_dp.replacing import replacing
from nnunet_dp.run import CARD, FINAL, read_checkpoint
from nnunet_dp.sections import RAW_FINGERPRINT


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: the archive.
        dataset: DatasetXXX_Name in it.
        model: TRAINER__PLANS__CONFIGURATION in it.
        card: its privacy card.
        files: what it holds.
    """

    file: Path
    dataset: str
    model: str
    card: Card
    files: tuple[str, ...]

    @property
    def predict_command(self) -> str:
        """What to type where it was installed."""
        return predict_command(self.card, self.dataset, self.model)

    @property
    def _refined_command(self) -> str:
        """With the refinement that was paid for, where this package is there to do it."""
        here = any(name.endswith(RULES) for name in self.files) and not self.model.startswith(f"{STOCK_TRAINER}__")
        return self.predict_command.replace("nnUNetv2_predict", "nnunet-dp predict") if here else self.predict_command

    @property
    def _needed(self) -> str:
        stock = self.model.startswith(f"{STOCK_TRAINER}__")
        return "" if stock else ", with nnunet_dp installed and `nnunet-dp link` typed"

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        told = {"file": str(self.file), "dataset": self.dataset, "model": self.model, "files": list(self.files)}
        return {**told, "predict_command": self.predict_command, "card": json.loads(self.card.content)}

    def lines(self) -> list[tuple[str, str]]:
        """Label and value, for a table."""
        return [
            ("archive", str(self.file)),
            ("claim", self.card.claim),
            ("epsilon", f"{upwards(self.card.epsilon)} at delta {self.card.delta:g} per {self.card.unit}"),
            *not_covered_rows(self.card.not_covered),
            ("holds", ", ".join(self.files)),
            ("next", f"nnunet-dp verify {self.file.name}; then, where it is used{self._needed}:"),
            ("", f"nnUNetv2_install_pretrained_model_from_zip {self.file.name}"),
            ("", self._refined_command),
        ]


def export_model(
    model: Path,
    file: Path,
    folds: Sequence[str] = (),
    stock: bool = False,
    dataset: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model's archive.

    Args:
        model: folder that holds the folds.
        file: to write.
        folds: to export; none exports all that are there.
        stock: for plain nnU-Net, without this package.
        dataset: DatasetXXX_Name in the archive; None keeps the model's.
        overwrite: whether a file that is there may be replaced.

    Raises:
        UsageRefusal: for folders that hold no model, and models without a guarantee.
        Refusal: for unfinished folds, a ledger that is missing or does not agree, plans that would tell of the images.
    """
    model, file = Path(model).resolve(), Path(file)
    if file.exists() and not overwrite:
        raise UsageRefusal(f"{file} should not exist yet, found a file: choose another name, or give --overwrite")
    if dataset is not None and re.fullmatch(r"Dataset\d{3}_[A-Za-z0-9][\w.\-]*", dataset, re.ASCII) is None:
        raise UsageRefusal(f"--as should be like Dataset004_Hippocampus, found {dataset!r:.100}")
    if not file.parent.is_dir():
        raise UsageRefusal(f"the folder of {file} should exist, found none: make it")
    chosen = _folds(model, folds)
    claim = _claim(model, chosen)
    trainer = _trainer(model, stock)
    card, files = claim.card(), {}
    for fold in chosen:
        files |= _weights(model / f"fold_{fold}", fold, trainer, *claim.counts[fold])
    files |= _rules(model, chosen)
    dataset, plans_name = dataset or model.parent.name, f"{_plans_name(model)}_{weights_digest(files)}"
    name = f"{trainer}__{plans_name}__{_configuration(model)}"
    files |= _description(model, card, plans_name, dataset)
    files |= _card(card, dataset, name, files[DESCRIPTION])
    files[MANIFEST] = manifest_of(files).content
    content = pack({f"{dataset}/{name}/{path}": data for path, data in files.items()})
    _refuse_faults(content, file.name)
    with replacing(file) as stream:
        stream.write(content)
    return Exported(file, dataset, name, card, tuple(sorted(files)))


def card_files(model: Path, folds: Sequence[str] = ()) -> tuple[Card, dict[str, bytes]]:
    """A model's card and its files, with the names that an export gives the model.

    Args:
        model: folder that holds the folds.
        folds: that are counted together; none counts all that are there.

    Raises:
        UsageRefusal: for folders that hold no model, and models without a guarantee.
        Refusal: for unfinished folds, and a ledger that is missing or does not agree.
    """
    model = Path(model).resolve()
    chosen = _folds(model, folds)
    claim, trainer, weights = _claim(model, chosen), _trainer(model, False), {}
    for fold in chosen:
        weights |= _weights(model / f"fold_{fold}", fold, trainer, *claim.counts[fold])
    name = f"{trainer}__{_plans_name(model)}_{weights_digest(weights)}__{_configuration(model)}"
    description = reduced_description(read_description(model / DESCRIPTION))
    card = claim.card()
    return card, _card(card, model.parent.name, name, description.content)


def _refuse_faults(content: bytes, name: str) -> None:
    from nnunet_dp.verify import verify_content

    wrong = verify_content(content, name).faults
    if wrong:
        raise Refusal(f"the archive would not pass `nnunet-dp verify`, and was not written: {'; '.join(wrong)}")


# ---- which model -------------------------------------------------------------------------------------------------


def _folds(model: Path, asked: Sequence[str]) -> tuple[str, ...]:
    if not (model / PLANS).is_file() or model.name.count("__") != 2:
        raise UsageRefusal(
            f"expected a model's folder, such as nnUNetTrainerDP_AutoS__nnUNetPlansDP_eps8__3d_fullres; {model.name} "
            "is none: name the folder that holds fold_0"
        )
    there = sorted(folder.name[5:] for folder in model.glob("fold_*") if folder.is_dir())
    missing = [fold for fold in asked if fold not in there]
    if missing or not there:
        raise UsageRefusal(
            f"{model.name} has no fold {', '.join(missing) or 'at all'}: give -f {' '.join(there) or 'after training'}"
        )
    return tuple(dict.fromkeys(asked)) or tuple(there)


def _trainer(model: Path, stock: bool) -> str:
    """The trainer's name in the archive."""
    trainer = model.name.split("__")[0]
    if stock and refines_inside(trainer):
        raise UsageRefusal(
            f"{trainer} refines inside its network, which plain nnU-Net cannot build: export it without --stock"
        )
    return STOCK_TRAINER if stock else trainer


def _plans_name(model: Path) -> str:
    return model.name.split("__")[1]


def _configuration(model: Path) -> str:
    return model.name.split("__")[2]


def _claim(model: Path, folds: Sequence[str]) -> Claim:
    if not (model / FEDERATED).is_file():
        return ledger_claim(model, folds)
    from nnunet_dp.federated.claim import federated_claim

    return federated_claim(model)


# ---- files -------------------------------------------------------------------------------------------------------


def _weights(folder: Path, fold: str, trainer: str, charges: int, steps: int) -> dict[str, bytes]:
    """A fold's weights, twice; of its checkpoint nothing else is taken but configuration and mirroring."""
    checkpoint = read_checkpoint(folder / FINAL)
    number: int | str = fold if fold == "all" else int(fold)
    released = released_checkpoint(
        checkpoint["network_weights"],
        trainer,
        _configuration(folder.parent),
        number,
        checkpoint["inference_allowed_mirroring_axes"],
        charges,
        steps,
    )
    return {
        f"fold_{fold}/{FINAL}": checkpoint_bytes(released),
        f"fold_{fold}/{SAFETENSORS}": safetensors_bytes(released["network_weights"]),
    }


def _description(model: Path, card: Card, name: str, dataset: str) -> dict[str, bytes]:
    from nnunet_dp.nnunet_inference import resolved_configuration

    plans, configuration = read_plans(model / PLANS), _configuration(model)
    resolved = resolved_configuration(plans, configuration)
    if CT in resolved["normalization_schemes"] and RAW_FINGERPRINT in card.not_covered:
        raise Refusal(
            f"the plans hold intensity statistics of the raw images ({CT}), which prediction needs and no charge "
            "covers: make plans with `nnunet-dp fingerprint` (noised, or public ones), plan and train on them"
        )
    description = read_description(model / DESCRIPTION)
    return {
        PLANS: reduced_plans(plans, configuration, resolved, name, dataset).content,
        DESCRIPTION: reduced_description(description).content,
    }


def _card(card: Card, dataset: str, name: str, description: bytes) -> dict[str, bytes]:
    """The card for machines, for people and for a model hub."""
    described = Described(
        dataset=dataset, model=name, description=DatasetDescription.model_validate_json(description)
    )
    return {CARD: card.content, **rendered(card, described)}


def _rules(model: Path, folds: Sequence[str]) -> dict[str, bytes]:
    """Rules for the ensemble of these folds, and what each of them has learnt."""
    from nnunet_dp.learning import rules_of

    ensemble = rules_of(model, folds)
    learnt = {f"fold_{fold}/{RULES}": _learnt(model / f"fold_{fold}") for fold in folds}
    found = {RULES: ensemble, **learnt}
    return {name: _written(rules) for name, rules in found.items() if rules is not None}


def _learnt(fold: Path) -> Morphology | None:
    """A fold's own rules; that a charge of its run paid for them was verified with its status."""
    if not (fold / RULES).is_file():
        return None
    rules = read_morphology(fold / RULES)
    if rules.kind != "private":
        return None
    if rules.paid_by is None and any(rule.operations for rule in rules.classes):
        raise Refusal(f"{RULES} in {fold.name} names no charge that paid for it: put the run's own file back")
    return rules


def _written(rules: Morphology) -> bytes:
    """Without provenance, which names runs and lines of the ledger."""
    released = rules.model_copy(update={"provenance": {}})
    return canonical_json(released.model_dump(mode="json", exclude_none=True))
