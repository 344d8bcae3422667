"""Where refinement rules come from, and where they go.

A private training learns by itself, once, before its first step, if its plan reserves a share of the budget;
``nnunet-dp morph learn`` does it for a run that has not. Rules from a file, from phantoms or from public constants cost
nothing.

    MODEL/fold_X/morphology.json    what the run of that fold learnt, for predictions by that fold
    MODEL/morphology.json           the operations on which all folds agree, for their ensemble; or free rules, for all
    MODEL/postprocessing.pkl        the same for nnUNetv2_apply_postprocessing; local

Formal guarantee:
    The only function here that looks at reference masks of real patients is ``learn_for_run``, through
    ``shape_votes.learn``, which charges the run's ledger before anything is released; a run whose total would pass its
    budget is refused. No patient's mask decides whether there is a release.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dp import TRAINER_NAMES
from nnunet_dp.charges import MORPHOLOGY, epsilon_of, of_purpose
from nnunet_dp.dpsgd import PrivacyPlan
from nnunet_dp.errors import BudgetRefusal, Refusal, UsageRefusal
from nnunet_dp.federated.summary import FEDERATED
from nnunet_dp.ledger import Ledger
from nnunet_dp.morphology import (
    FILE,
    ClassRefinement,
    Morphology,
    Opening,
    agreed,
    classes_from,
    read_morphology,
    write_morphology,
)
from nnunet_dp.nnunet import (
    common_spacing,
    configuration_folder,
    configuration_spacing,
    data_digest,
    find_splits,
    patients_of_plan,
)
from nnunet_dp.nnunet_files import SegmentationFiles
from nnunet_dp.plans import configuration_plan, read_section
from nnunet_dp.refined_folder import PICKLE, write_pickle
from nnunet_dp.refinement import refine
from nnunet_dp.run import LATEST, LEDGER, RunFolder, read_checkpoint
from nnunet_dp.sections import PrivacySection
from nnunet_dp.shape_votes import Ballot, learn, questions_for
from nnunet_dp.soft_morphology import radii_from_mm
from nnunet_dp.splits import fold_slots
from nnunet_dp.workers import Progress, in_order


def learn_for_run(
    fold: Path,
    plan: PrivacyPlan,
    ledger: Ledger,
    ballot: Ballot,
    slots: Sequence[Sequence[Path]],
    files: SegmentationFiles,
    *,
    checkpoint: str | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> Morphology:
    """Spend the run's share on the votes of its training patients and write ``morphology.json``.

    Args:
        fold: the run's folder; the caller holds its lock.
        plan: the run's; its morphology is not None.
        ledger: opened for the run.
        ballot: what every patient is asked.
        slots: reference segmentations of each training patient.
        files: reads them.
        checkpoint: identifier of the run's newest checkpoint.
        processes: that read masks side by side.
        progress: told (patients done, patients in all).

    Raises:
        BudgetRefusal: when the release would lift the run above its budget.
        Refusal: when the run was charged for it before.
    """
    mechanism = plan.morphology
    assert mechanism is not None
    plan.verify()
    charge = mechanism.charge(MORPHOLOGY, None)
    total = epsilon_of([*plan.paid, *ledger.own_entries, charge], plan.budget.delta)
    if total > plan.budget.epsilon and not of_purpose(ledger.own_entries, MORPHOLOGY):  # a second vote: see learn
        raise BudgetRefusal(
            f"learning would lift this run to epsilon {total:.4g}, its target is {plan.budget.epsilon:g}: nothing was "
            "charged; --fixed FILE, --from-phantom KIND and --per-image cost nothing"
        )
    found = learn(ballot, mechanism, votes_of(ballot, slots, files, processes, progress), ledger, checkpoint)
    write_morphology(found, fold / FILE)
    return found


def learn_once(
    fold: Path,
    plan: PrivacyPlan,
    ledger: Ledger,
    facts: ReferenceFacts,
    checkpoint: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Learn for a run that has not yet, and write the model's files; a sentence about what happened."""
    if plan.morphology is None:
        place(fold.parent, spacing_mm=facts.common_spacing_mm)
        return "Refinement: this plan gives its whole budget to the training; nothing is learnt from the masks."
    if of_purpose(ledger.own_entries, MORPHOLOGY):
        known = own_rules(fold, ledger)
        place(fold.parent, spacing_mm=facts.common_spacing_mm)
        if known is not None and _is_free(fold.parent):
            return "Refinement: learnt before; free rules are applied instead until `morph learn ... --overwrite`."
        if known is not None:
            return f"Refinement: learnt before, {FILE} is there."
        return f"Refinement: charged, but the run died before {FILE} was written; predictions stay as they are."
    ballot = ballot_for(facts.dataset_json, facts.spacing_mm, len(facts.slots), plan.morphology.noise_multiplier)
    if not ballot.questions:
        rules = ballot.rules([()] * len(ballot.classes), "private", nothing_released="too few patients for the noise")
        write_morphology(rules, fold / FILE)
        place(fold.parent, spacing_mm=facts.common_spacing_mm)
        return "Refinement: too few patients for this noise; nothing is asked, nothing charged, all classes left alone."
    files = SegmentationFiles(facts.dataset_json, facts.plans)
    before = epsilon_of([*plan.paid, *ledger.own_entries], plan.budget.delta)
    found = learn_for_run(
        fold, plan, ledger, ballot, facts.slots, files,
        checkpoint=checkpoint, processes=facts.processes, progress=progress,
    )  # fmt: skip
    dropped = place(fold.parent, spacing_mm=facts.common_spacing_mm)
    note = f" ({PICKLE} for plain nnU-Net leaves out {', '.join(dropped)}: spacings differ)" if dropped else ""
    after = epsilon_of([*plan.paid, *ledger.own_entries], plan.budget.delta)
    paid = f"charged to this run: epsilon {before:.4g} -> {after:.4g} of {plan.budget.epsilon:g} per {plan.budget.unit}"
    words = "; ".join(f"{label.strip()}: {text}" for label, text in lines(found)[1:])
    return f"Refinement learnt: {words}{note} ({paid})"


def own_rules(fold: Path, ledger: Ledger) -> Morphology | None:
    """The rules of the fold's folder, if the ledger's run paid for them; None for foreign, hand-made or lost ones."""
    if not (fold / FILE).is_file():
        return None
    rules = read_morphology(fold / FILE)
    paid = {(entry.run, entry.sequence) for entry in of_purpose(ledger.own_entries, MORPHOLOGY)}
    return rules if rules.kind == "private" and rules.paid_by in paid else None


@dataclass(frozen=True)
class ReferenceFacts:
    """What learning needs to know of a fold.

    Attributes:
        dataset_json: of the dataset.
        plans: nnU-Net's, which name the reader of the masks.
        spacing_mm: of the configuration; public, given the plans.
        slots: reference segmentations of each training patient.
        common_spacing_mm: of all images, if it is one; for nnU-Net's local pickle.
        processes: that read masks side by side.
    """

    dataset_json: Mapping[str, Any] = field(repr=False)
    plans: Mapping[str, Any] = field(repr=False)
    spacing_mm: tuple[float, ...]
    slots: tuple[tuple[Path, ...], ...] = field(repr=False)
    common_spacing_mm: tuple[float, ...] | None = field(default=None, repr=False)
    processes: int = 1


def reference_facts(
    folder: Path,
    slots: Mapping[str, tuple[str, ...]],
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    configuration: str,
    processes: int,
) -> ReferenceFacts:
    """The facts of one fold.

    Args:
        folder: the preprocessed dataset folder.
        slots: training patients and their cases.
        plans: of the model.
        dataset_json: of the dataset.
        configuration: whose spacing sets the radii.
        processes: that read masks side by side.
    """
    ending, masks = dataset_json["file_ending"], folder / "gt_segmentations"
    return ReferenceFacts(
        dataset_json=dataset_json,
        plans={"image_reader_writer": plans["image_reader_writer"]},
        spacing_mm=configuration_spacing(plans, configuration),
        slots=tuple(tuple(masks / f"{case}{ending}" for case in cases) for cases in slots.values()),
        common_spacing_mm=common_spacing(folder),
        processes=processes,
    )


def ballot_for(
    dataset_json: Mapping[str, Any], spacing_mm: Sequence[float], units: int, noise_multiplier: float
) -> Ballot:
    """The questions that the noise leaves audible; none at all where even one vote would be lost in it."""
    known = classes_from(dataset_json)
    refine(np.zeros((2, 2), np.int16), known, (1.0, 1.0))  # classes that cannot be refined are refused before a charge
    asked = questions_for(units, noise_multiplier, len(known.classes), spacing_mm)
    return Ballot(known.classes, asked, known.regions, known.ignore_label)


def learn_for_model(
    model: Path, fold: str, dataset_folder: Path, processes: int, progress: Progress | None, overwrite: bool = False
) -> str:
    """``nnunet-dp morph learn``: learn for a run of the past that reserved its share and has not spent it.

    Args:
        model: folder that holds the folds.
        fold: its number, or ``all``.
        dataset_folder: preprocessed.
        processes: that read masks side by side.
        progress: told (patients done, patients in all).
        overwrite: whether free rules in the model's folder make way for what its folds have learnt.

    Raises:
        UsageRefusal: when there is no private run, or its plan reserves nothing.
        Refusal: while the training runs, or when dataset, split or patients changed.
    """
    folder, trainer = model / f"fold_{fold}", model.name.split("__")[0]
    section, plans, configuration = _private_model(model, trainer)
    if not (folder / LATEST).is_file():
        raise UsageRefusal(f"{model.name} has no run in fold_{fold}: train it; a private training learns by itself")
    run = RunFolder(folder, dataset_folder / LEDGER, model.parent)
    run.lock()
    state = read_checkpoint(folder / LATEST)["private"]
    patients = patients_of_plan(dataset_folder, section)
    splits = [] if fold == "all" else find_splits(dataset_folder, patients)
    slots, _ = fold_slots(splits, fold if fold == "all" else int(fold), patients)
    chosen = configuration_plan(section, configuration)
    plan = chosen.privacy_plan(section.budget, "flat", len(slots))  # all clip rules release alike
    if plan.morphology is None:
        raise UsageRefusal(
            "this model's plan gave its whole budget to the training (--no-morph): learning from its masks now would "
            "pass the target; --fixed FILE, --from-phantom KIND and --per-image cost nothing"
        )
    if state["data"] != data_digest(configuration_folder(dataset_folder, plans, configuration), slots, chosen):
        raise Refusal("the dataset, its split or its patients changed since the training")
    ledger = run.resume(state, patients.unit, patients.table_sha256)
    description = json.loads((dataset_folder / "dataset.json").read_text())
    facts = reference_facts(dataset_folder, slots, plans, description, configuration, processes)
    if overwrite and _is_free(model):
        (model / FILE).unlink()
    return learn_once(folder, plan, ledger, facts, state["id"], progress)


def _private_model(model: Path, trainer: str) -> tuple[PrivacySection, dict[str, Any], str]:
    """Privacy section, plans and configuration of a model's folder."""
    file = model / "plans.json"
    plans = json.loads(file.read_text()) if file.is_file() else {}
    section = read_section(plans)
    if (model / FEDERATED).is_file():
        raise UsageRefusal(
            f"{model.name} is a federated model, whose sites paid for no vote about their masks: --fixed FILE, "
            "--from-phantom KIND and --per-image cost nothing"
        )
    if section is None or trainer not in TRAINER_NAMES:
        raise UsageRefusal(
            f"{model.name} is no private model: expected one trained with -tr nnUNetTrainerDP_..., and its plans.json; "
            "train it, or give free rules with --fixed FILE, --from-phantom KIND or --per-image"
        )
    return section, plans, model.name.rsplit("__", 1)[-1]


def votes_of(
    ballot: Ballot, slots: Sequence[Sequence[Path]], files: SegmentationFiles, processes: int, progress: Progress | None
) -> Iterator[np.ndarray]:
    """Each training patient's votes, as ``Ballot.votes``: private, for ``learn`` alone (and for comparisons)."""
    return in_order(_votes_of, [(ballot, tuple(slot), files) for slot in slots], processes, progress)


def _votes_of(item: tuple[Ballot, tuple[Path, ...], SegmentationFiles]) -> np.ndarray:
    """A patient whose mask cannot be read or is no mask votes nothing: it must not decide whether others are heard."""
    ballot, references, files = item
    try:
        return ballot.votes(files.read(file)[:2] for file in references)
    except Exception:
        return ballot.votes(())


def boxes_around(morphology: Morphology, spacing_mm: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """Per class the box [dimensions], in voxels about its middle, around the ball that the rules open with."""
    balls = [[op.radius_mm or 0.0 for op in rule.operations if isinstance(op, Opening)] for rule in morphology.classes]
    return radii_from_mm([max(radii, default=0.0) for radii in balls], spacing_mm)


# ---- where they go -----------------------------------------------------------------------------------------------


def place(
    model: Path, morphology: Morphology | None = None, spacing_mm: Sequence[float] | None = None
) -> tuple[str, ...]:
    """Write ``morphology.json`` and ``postprocessing.pkl`` into a model's folder.

    Args:
        model: the folder that holds the folds.
        morphology: free rules; None joins what the folds have learnt.
        spacing_mm: of all images of the dataset, if it is one.

    Returns:
        Operations that nnU-Net's pickle cannot hold without a spacing.

    Free rules that are there stay, unless others are given. Where nothing was learnt, what an archived run had learnt
    is taken away.
    """
    if morphology is None:
        if _is_free(model):
            return ()
        learnt = _learnt([file.parent for file in sorted(model.glob(f"fold_*/{FILE}"))])
        if not learnt:
            for file in (model / FILE, model / PICKLE):
                file.unlink(missing_ok=True)
            return ()
        morphology = agreed(learnt)
    write_morphology(morphology, model / FILE)
    return write_pickle(morphology, model, spacing_mm)


def _is_free(model: Path) -> bool:
    """Whether rules that looked at no patient lie in the model's folder."""
    return (model / FILE).is_file() and read_morphology(model / FILE).free


def _learnt(folds: Sequence[Path]) -> list[Morphology]:
    """What the folds have learnt privately, for the classes of the first."""
    known = [read_morphology(fold / FILE) for fold in folds if (fold / FILE).is_file()]
    private = [rules for rules in known if rules.kind == "private"]
    return [rules for rules in private if rules.without_operations() == private[0].without_operations()]


def rules_of(model: Path, folds: Sequence[str]) -> Morphology | None:
    """The rules for predictions by these folds: free ones that lie in the model's folder, else what these folds learnt.

    Rules of other folds are never used: the runs of the folds that predict have paid for what is applied.
    """
    if _is_free(model):
        return read_morphology(model / FILE)
    learnt = _learnt([model / f"fold_{fold}" for fold in folds])
    return agreed(learnt) if len(learnt) == len(folds) else None


@dataclass(frozen=True)
class RulesReport:
    """A model's rules, for people and for ``--json``."""

    model: Path

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return json.loads(read_morphology(self.model / FILE).model_dump_json(exclude_none=True))

    def lines(self) -> list[tuple[str, str]]:
        """Label and value, for a table."""
        return [("model", self.model.name), *lines(read_morphology(self.model / FILE))]


def lines(morphology: Morphology) -> list[tuple[str, str]]:
    """Label and value, for a table."""
    return [("rules", morphology.kind), *((f"  {rule.name}", _words(rule)) for rule in morphology.classes)]


def _words(rule: ClassRefinement) -> str:
    sentences = [_sentence(operation.model_dump(exclude_none=True)) for operation in rule.operations]
    return ", ".join(sentences) or "left alone"


def _sentence(fields: dict[str, Any]) -> str:
    name = fields.pop("operation")
    return name + (f" {json.dumps(fields)}" if fields else "")
