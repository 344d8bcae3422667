"""What refinement learns from the reference masks: one noised vote of the training patients, paid from the budget.

A *question* is an operation (keep the largest component, open with a ball of 1 mm, ...). A patient votes +1 on it for a
class if the operation would leave the class in all of that patient's reference masks as it is, -1 if it would change
one, and 0 where the class is absent; one more number says that the class is present. The votes of all training patients
are added and released once, with Gaussian noise. An operation is *allowed* for a class only if the noised vote supports
it; applied to a prediction, it then takes away what reference masks do not have: specks, spikes, holes.

>>> rule = ClassRefinement(name="lesion", labels=(1,), writes=1)
>>> ballot = Ballot((rule,), questions_for(units=100, noise_multiplier=5.0, classes=1, spacing_mm=(1.0, 1.0)))
>>> two_specks = np.array([[1, 1, 0, 0, 1]], np.uint8).repeat(2, 0)
>>> [question.name for question in ballot.questions], ballot.votes([(two_specks, (1.0, 1.0))]).tolist()
(['keep_largest', 'fill_holes', 'opening'], [[-1.0, 1.0, -1.0, 0.5]])

Formal guarantee:
    With the slot of one patient zeroed, the sum of the votes changes by at most ``Ballot.l2_bound`` in L2 norm over all
    classes and questions together: each vote is -1, 0 or 1 and each presence 0 or ``PRESENCE_WEIGHT``, whatever the
    masks hold. Which questions are asked is a function of public numbers. Sums are exact in float64. Everything after
    the release (``decide``) is post-processing.

Design note: votes, and no means of clamped lengths: a yes spans the whole range of its clamp, so that unanimous
patients stand N / (z sqrt(questions)) deviations clear of the noise, and a decision is all that refinement needs.
Every further question adds noise to all; ``questions_for`` therefore asks the most useful first and stops where a
unanimous vote would no longer be heard.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch

from nnunet_dp.ball_morphology import components, opened
from nnunet_dp.charges import MORPHOLOGY, of_purpose
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.ledger import Ledger
from nnunet_dp.mechanisms import ClippedSum, SubsampledGaussian, fresh_generator
from nnunet_dp.morphology import (
    ClassRefinement,
    FillHoles,
    KeepLargest,
    Morphology,
    Opening,
    Operation,
)
from nnunet_dp.refinement import image_axes, refine

Mask = tuple[np.ndarray, Sequence[float]]  # integer labels [*spatial], spacing_mm

PRESENCE_WEIGHT = 0.5  # presence is only compared with; its own noise may be twice that of a vote
ERROR_RATE_Z = 1.645  # one-sided 5 %: of accepting where patients are evenly divided
GRID = 1e-3  # of the noise: what is released is rounded to it, so that nothing hides in the last digits
WANTED_SHARE = 0.9  # of the patients whose masks an allowed operation should leave as they are


@dataclass(frozen=True)
class Question:
    """May this operation be applied?

    Attributes:
        name: in the file and in the log.
        operation: what would be done to a prediction; patients are asked about it without its guard ``least_kept``.
        least_dice: between a reference class before and after the operation, to count as left as it is.
        shaved_mm: radius of the opening whose largest piece is the class's core.
        least_core: between a reference class and its core. What falls apart where a voxel is shaved off falls apart in
            a prediction too, and its largest piece is not what to keep.
    """

    name: str
    operation: Operation
    least_dice: float
    shaved_mm: float = 0.0
    least_core: float = 0.0


def questions(spacing_mm: Sequence[float]) -> tuple[Question, ...]:
    """All questions, the most useful first (order, radius and guards were chosen on phantoms: docs/dp_morph.md).

    Args:
        spacing_mm: of the configuration's plans; the radius is its smallest edge.
    """
    edge = min(spacing_mm)
    return (
        Question("keep_largest", KeepLargest(least_kept=0.3), 0.98, edge, 0.8),
        Question("fill_holes", FillHoles(), 0.98),
        Question("opening", Opening(radius_mm=edge, least_kept=0.9), 0.95, edge, 0.95),
    )


def questions_for(
    units: int, noise_multiplier: float, classes: int, spacing_mm: Sequence[float]
) -> tuple[Question, ...]:
    """The questions that this much noise leaves audible: as many as keep a unanimous vote above its threshold.

    Args:
        units: public number of training patients.
        noise_multiplier: noise over sensitivity of the release.
        classes: number of classes.
        spacing_mm: of the configuration's plans.
    """
    return questions(spacing_mm)[: audible(units, noise_multiplier, classes)]


def audible(units: int, noise_multiplier: float, classes: int) -> int:
    """How many questions a unanimous vote of ``units`` patients survives in more than nine of ten releases."""
    asked = len(questions((1.0,)))
    while asked and units < 2 * ERROR_RATE_Z * noise_multiplier * _l2_bound(classes, asked):
        asked -= 1
    return asked


def _l2_bound(classes: int, asked: int) -> float:
    return math.sqrt(classes * (asked + PRESENCE_WEIGHT**2))


@dataclass(frozen=True)
class Ballot:
    """What every patient is asked.

    Attributes:
        classes: of the dataset, without operations.
        questions: asked about each class.
        regions: whether the classes are nested regions.
        ignore_label: of the reference masks.
    """

    classes: tuple[ClassRefinement, ...]
    questions: tuple[Question, ...]
    regions: bool = False
    ignore_label: int | None = None

    @property
    def l2_bound(self) -> float:
        """What one patient changes at most, over all classes and questions."""
        return _l2_bound(len(self.classes), len(self.questions))

    def votes(self, masks: Iterable[Mask]) -> np.ndarray:
        """One patient's votes [classes, questions + 1], presence last; a patient with several masks votes once.

        Args:
            masks: all reference masks of the patient; an iterable, so that only one needs to be in memory.
        """
        shape = len(self.classes), len(self.questions)
        left_alone, present = np.ones(shape, bool), np.zeros(len(self.classes), bool)
        for segmentation, spacing_mm in masks:
            for row, rule in enumerate(self.classes):
                if np.isin(segmentation, rule.labels).any():
                    present[row] = True
                    left_alone[row] &= [self._left_alone(q, rule, segmentation, spacing_mm) for q in self.questions]
        signed = np.where(left_alone, 1.0, -1.0) * present[:, None]
        return np.concatenate([signed, PRESENCE_WEIGHT * present[:, None]], axis=1)

    def total(self, votes: Iterable[np.ndarray]) -> ClippedSum:
        """Sum over the patients, with the bound that each of them keeps; private until it is released."""
        total = np.zeros((len(self.classes), len(self.questions) + 1))
        for one in votes:
            if not np.linalg.norm(one) <= self.l2_bound:
                raise AssertionError("a patient's votes should keep the bound")
            total += one
        return ClippedSum((torch.from_numpy(total),), self.l2_bound)

    def _left_alone(
        self, question: Question, rule: ClassRefinement, segmentation: np.ndarray, spacing_mm: Sequence[float]
    ) -> bool:
        axes = image_axes(segmentation.shape)
        before = np.isin(segmentation, rule.labels).reshape([segmentation.shape[axis] for axis in axes])
        step = [float(spacing_mm[axis]) for axis in axes]
        if question.least_core and not _alike(before, _core(before, question.shaved_mm, step), question.least_core):
            return False
        if isinstance(question.operation, Opening):  # refine would not let it empty a class
            return _alike(before, opened(before, question.operation.radius_mm or 0.0, step), question.least_dice)
        after = self._after(question.operation, rule, segmentation, spacing_mm)
        return _alike(before, after.reshape(before.shape), question.least_dice)

    def _after(
        self, operation: Operation, rule: ClassRefinement, segmentation: np.ndarray, spacing_mm: Sequence[float]
    ) -> np.ndarray:
        """The class in a reference mask after the operation, without the guard that spares a prediction."""
        asked = operation.model_copy(update={"least_kept": 0.0}) if isinstance(operation, KeepLargest) else operation
        rules = self.rules([(asked,) if other == rule else () for other in self.classes], "fixed")
        return np.isin(refine(segmentation, rules, spacing_mm), rule.labels)

    def rules(self, operations: Sequence[tuple[Operation, ...]], kind: Any, **provenance: Any) -> Morphology:
        """The classes with these operations, one tuple for each."""
        known = Morphology(
            kind=kind,
            regions=self.regions,
            ignore_label=self.ignore_label,
            classes=self.classes,
            provenance=provenance,
        )
        return known.with_operations(operations)


def _alike(one: np.ndarray, other: np.ndarray, least_dice: float) -> bool:
    return bool(2 * np.count_nonzero(one & other) >= least_dice * (one.sum() + other.sum()))


def _core(mask: np.ndarray, shaved_mm: float, step: Sequence[float]) -> np.ndarray:
    """The largest piece of what an opening leaves; nothing where it leaves nothing."""
    left = opened(mask, shaved_mm, step)
    labels, volumes = components(left)
    return labels == 1 + volumes.argmax() if len(volumes) else left


@dataclass(frozen=True)
class Answer:
    """What the released numbers say about one operation for one class.

    Attributes:
        question: its name.
        balance: noised number of patients for minus number against.
        present: noised number of patients who have the class.
        accepted: whether the operation is allowed.
    """

    question: str
    balance: float
    present: float
    accepted: bool


def answers(ballot: Ballot, released: np.ndarray, deviation: float) -> tuple[tuple[Answer, ...], ...]:
    """What was released, per class and question.

    An operation is allowed if patients for it outnumber those against by more than the noise explains, and if the
    share that ``WANTED_SHARE`` asks for is not contradicted by more than the noise explains. With little noise the
    second test decides, with much noise the first.

    Args:
        ballot: what was asked.
        released: noised sums [classes, questions + 1].
        deviation: standard deviation of the noise on each number; 0 for exact sums (phantoms, comparisons).
    """
    names = [question.name for question in ballot.questions]
    return tuple(
        tuple(
            _answer(name, float(balance), float(row[-1]) / PRESENCE_WEIGHT, deviation)
            for name, balance in zip(names, row[:-1], strict=True)
        )
        for row in released
    )


def _answer(question: str, balance: float, present: float, deviation: float) -> Answer:
    wanted = 2 * WANTED_SHARE - 1
    doubt = ERROR_RATE_Z * deviation
    supported = balance > doubt
    contradicted = balance < wanted * present - doubt * math.sqrt(1 + (wanted / PRESENCE_WEIGHT) ** 2)
    return Answer(question, balance, present, supported and not contradicted)


def learn(
    ballot: Ballot,
    mechanism: SubsampledGaussian,
    votes: Iterable[np.ndarray],
    ledger: Ledger,
    checkpoint: str | None = None,
) -> Morphology:
    """Spend the planned share of the budget: charge, release the votes once, decide.

    Args:
        ballot: what every patient is asked.
        mechanism: full-batch Gaussian of the plan.
        votes: of the training patients; counted before the charge, so that a crash while reading costs nothing.
        ledger: opened for the run.
        checkpoint: identifier of the run's newest checkpoint.

    Raises:
        Refusal: when the run was charged for this before: its share is spent, whatever became of the result.
    """
    if mechanism.sampling_probability != 1:
        raise UsageRefusal("votes are released on the full batch: sampling_probability 1")
    if of_purpose(ledger.own_entries, MORPHOLOGY):
        raise Refusal(
            "this run's share for morphology is charged already: use its morphology.json; if that was lost in a crash, "
            "--fixed FILE, --from-phantom KIND and --per-image cost nothing"
        )
    total = ballot.total(votes)
    receipt = ledger.charge(mechanism.charge(MORPHOLOGY, None), checkpoint)
    (noised,) = mechanism.release(total, receipt, fresh_generator("cpu")).tensors
    deviation = mechanism.noise_multiplier * ballot.l2_bound
    grid = GRID * deviation
    given = answers(ballot, np.round(noised.numpy() / grid) * grid, deviation)
    paid = ledger.own_entries[-1]
    return ballot.rules(
        decide(ballot, given),
        "private",
        ledger_run=paid.run,
        ledger_sequence=paid.sequence,
        unit=ledger.unit,
        noise_multiplier=mechanism.noise_multiplier,
        l2_bound=ballot.l2_bound,
        noise_standard_deviation=deviation,
        answers=_as_dict(ballot, given),
    )


def without_noise(ballot: Ballot, votes: Iterable[np.ndarray], kind: Literal["phantom", "not_private"]) -> Morphology:
    """The same decisions from exact sums: of phantoms (free), or of real masks (for comparison only, not private)."""
    (total,) = ballot.total(votes).tensors
    return ballot.rules(decide(ballot, answers(ballot, total.numpy(), 0.0)), kind)


def _as_dict(ballot: Ballot, given: Sequence[Sequence[Answer]]) -> dict[str, list[dict[str, Any]]]:
    return {rule.name: [asdict(answer) for answer in row] for rule, row in zip(ballot.classes, given, strict=True)}


def decide(ballot: Ballot, given: Sequence[Sequence[Answer]]) -> list[tuple[Operation, ...]]:
    """The operations that were allowed for each class: opening, then components, then holes."""
    return [_in_order(ballot.questions, row) for row in given]


def _in_order(asked: Sequence[Question], row: Sequence[Answer]) -> tuple[Operation, ...]:
    allowed = [question.operation for question, answer in zip(asked, row, strict=True) if answer.accepted]
    order = (Opening, KeepLargest, FillHoles)
    return tuple(sorted(allowed, key=lambda operation: order.index(type(operation))))
