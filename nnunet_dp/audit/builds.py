"""Builds: the project's own training and learning, as they are or with one fault injected into the real code.

A fault replaces one function or one class of the running package and nothing else: the rest of the step, the ledger's
file and the vote are those that patients' data meet. Each is a mistake that was found in published code, or one that a
change could bring back. A ``Subject`` is a build under a random name; checks see no more of it.

>>> with Subject("a1", CORRECT).active():
...     pass
>>> [fault.name for fault in FAULTS][:3]
['no_noise', 'wrong_sensitivity', 'contribution_above_bound']
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_dp import batched_gradients, clipping, dpsgd, ledger, mechanisms, shape_votes
from nnunet_dp.accounting import PrivacyBudget, calibrate
from nnunet_dp.audit.canaries import Canary, with_canaries
from nnunet_dp.batched_gradients import Batched
from nnunet_dp.charges import TRAINING, Charge
from nnunet_dp.clipping import make_rule
from nnunet_dp.dpsgd import Execution, PrivacyPlan, PrivateTraining, Schedule
from nnunet_dp.gradients import Engine, Record, at_least_float32, one_at_a_time, trainable
from nnunet_dp.ledger import Ledger, Receipt
from nnunet_dp.mechanisms import ClippedSum, NoisedSum, SubsampledGaussian
from nnunet_dp.morphology import ClassRefinement, Morphology
from nnunet_dp.nnunet_audit import dice_and_cross_entropy, small_network
from nnunet_dp.patient_weights import copies_of, watched_forward
from nnunet_dp.phantoms import Patient
from nnunet_dp.phantoms.shapes import kind
from nnunet_dp.run import LEDGER
from nnunet_dp.shape_votes import Ballot, questions

SHAPE = (24, 24)
CLASSES = 2
LEARNING_RATE = 0.1
RULES: dict[str, dict[str, float]] = {
    "auto_s": {"bound": 1.0, "regulariser": 0.01},
    "flat": {"bound": 0.7},
    "auto_v": {"bound": 2.0},
    "nsgd": {"bound": 1.0, "regulariser": 0.05},
    "psac": {"bound": 1.0, "regulariser": 0.1},
    "quantile": {"bound": 0.3},
    "per_layer": {"bound": 1.0},
}


def _as_it_is(engine: Engine) -> Engine:
    return engine


@dataclass(frozen=True)
class Build:
    """How a build is made.

    Attributes:
        name: of the fault, or ``correct``.
        what: the fault in a sentence.
        rule: clip rule.
        batched: whether engine two sums the gradients.
        inject: puts the fault into the running package, and takes it out again.
        engine: makes the engine from the one that would be right.
        training: class of the training.
        batch_dice: nnU-Net's switch.
    """

    name: str
    what: str
    rule: str = "auto_s"
    batched: bool = False
    inject: Callable[[], AbstractContextManager[Any]] = nullcontext
    engine: Callable[[Engine], Engine] = _as_it_is
    training: type[PrivateTraining] = PrivateTraining
    batch_dice: bool = False


class Subject:
    """A build under a random name: what the checks see.

    Args:
        label: random.
        build: what it is; hidden.
    """

    def __init__(self, label: str, build: Build) -> None:
        self.label = label
        self._build = build

    def active(self) -> AbstractContextManager[Any]:
        """Everything inside runs on this build; one at a time in a process."""
        return self._build.inject()

    def plan(self, steps: int, probability: float, units: int, budget: PrivacyBudget) -> PrivacyPlan:
        """A plan that claims the budget."""
        rule = make_rule(self._build.rule, RULES[self._build.rule])
        noise = planned_noise(steps, probability, budget.epsilon, budget.delta)
        return PrivacyPlan(budget, steps, probability, noise, units, rule)

    def training(self, folder: Path, plan: PrivacyPlan, seed: int) -> PrivateTraining:
        """A new training in float64, with its ledger in the folder; equal seeds give equal weights."""
        network = small_network(1, CLASSES + 1, seed).double()
        loss = with_canaries(dice_and_cross_entropy(self._build.batch_dice), network)
        engine = self._build.engine(Batched(4) if self._build.batched else one_at_a_time)
        charged = Ledger(folder / LEDGER, f"audit/{self.label}", plan.digest())
        schedule = Schedule(LEARNING_RATE, power=0.0)
        return self._build.training(network, loss, plan, schedule, Execution(engine=engine), charged)

    def learn(self, folder: Path, mechanism: SubsampledGaussian, votes: Iterable[np.ndarray]) -> Morphology:
        """What refinement learns from votes, with a ledger of its own in the folder."""
        charged = Ledger(folder / LEDGER, f"audit/{self.label}", "0a")
        return shape_votes.learn(ballot(), mechanism, votes, charged)


@lru_cache(maxsize=64)
def planned_noise(steps: int, probability: float, epsilon: float, delta: float) -> float:
    """Noise multiplier of a plan that spends this budget on its steps."""

    def schedule(noise_multiplier: float) -> Any:
        return dpsgd.SelfComposedDpEvent(SubsampledGaussian(noise_multiplier, probability).event, steps)

    return calibrate(schedule, PrivacyBudget(epsilon=epsilon, delta=delta))


def phantom_record(seed: int, index: int) -> Record:
    """A phantom patient: image float64 [1, 1, *SHAPE], standardised, and labels [1, 1, *SHAPE]."""
    image, labels = _phantom(seed, index)
    return Record(torch.from_numpy(image)[None, None], torch.from_numpy(labels)[None, None])


@lru_cache(maxsize=1024)
def _phantom(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    scan = kind(dimensions=2, channels=1, classes=CLASSES).render(Patient("shapes", seed, index), 0, SHAPE)
    image = scan.image[0].astype(np.float64)
    return (image - image.mean()) / (image.std() + 1e-6), scan.segmentation.astype(np.int64)


def ballot() -> Ballot:
    """What each phantom patient is asked about its masks."""
    classes = tuple(ClassRefinement(name=f"class {k}", labels=(k,), writes=k) for k in range(1, CLASSES + 1))
    return Ballot(classes, questions((1.0, 1.0)))


@lru_cache(maxsize=1024)
def phantom_votes(seed: int, index: int) -> np.ndarray:
    """One phantom patient's votes."""
    return ballot().votes([(_phantom(seed, index)[1].astype(np.uint8), (1.0, 1.0))])


# ---- faults --------------------------------------------------------------------------------------------------------


@contextmanager
def _noise_times(factor: Callable[[], float]) -> Iterator[None]:
    """Gaussian noise whose deviation is multiplied."""
    right = mechanisms._with_gaussian

    def wrong(tensors: Any, deviation: float, generator: torch.Generator) -> Any:
        return right(tensors, deviation * factor(), generator)

    with mock.patch.object(mechanisms, "_with_gaussian", wrong):
        yield


def _no_noise() -> AbstractContextManager[None]:
    return _noise_times(lambda: 0.0)


def _wrong_sensitivity() -> AbstractContextManager[None]:
    return _noise_times(lambda: RULES["nsgd"]["regulariser"])


def _contribution_above_bound() -> AbstractContextManager[Any]:
    def wrong(self: clipping.PerLayer, norms: Tensor) -> Tensor:
        return (self.bound / norms.clamp(min=1e-30)).clamp(max=1.0)

    return mock.patch.object(clipping.PerLayer, "factors", wrong)


@contextmanager
def _shuffled_batches() -> Iterator[None]:
    rng, waiting = np.random.default_rng(), []

    def wrong(units: int, probability: float, generator: torch.Generator) -> list[int]:
        size = round(units * probability)
        if len(waiting) < size:
            waiting[:] = rng.permutation(units).tolist()
        taken = sorted(waiting[:size])
        del waiting[:size]
        return taken

    with mock.patch.object(dpsgd, "poisson_draw", wrong):
        yield


class _JointLoss(Batched):
    """Engine two with one loss for all patients of a pass, as a trainer would have it that knows no patients."""

    def _gradients(self, records: list[Record], task: Any) -> tuple[list[Tensor | None], list[Tensor]]:
        if any(isinstance(record.target, Canary) for record in records):
            return super()._gradients(records, task)
        names, parameters = trainable(task.network)
        copies = copies_of(names, parameters, self.chunk)
        images = batched_gradients._filled_up(records, self.chunk)
        output = at_least_float32(watched_forward(task.network, copies, images))[: len(records)]
        value = len(records) * task.loss(output, torch.cat([record.target for record in records]))
        return batched_gradients._derivative([value], list(copies.values())), [value.detach()]


def _joint_loss(engine: Engine) -> Engine:
    return _JointLoss(4)


_longest = [1.0]  # of the contributions to the last sum, over the bound


def _measuring_engine(engine: Engine) -> Engine:
    """The same sum; leaves behind how long its longest contribution was."""

    def measured(
        network: nn.Module,
        loss: Any,
        records: Iterable[Record],
        rule: clipping.ClipRule,
        autocast: Any = nullcontext,
        watch: Callable[[Tensor], None] = lambda loss: None,
    ) -> ClippedSum:
        parts = [engine(network, loss, [record], rule, autocast, watch).tensors for record in records]
        lengths = [float(torch.cat([tensor.flatten() for tensor in part]).norm()) for part in parts]
        _longest[:] = [max(lengths, default=0.0) / rule.bound]
        zero = engine(network, loss, [], rule).tensors
        return ClippedSum(tuple(torch.stack(each).sum(0) for each in zip(zero, *parts, strict=True)), rule.bound)

    return measured


def _noise_by_longest() -> AbstractContextManager[None]:
    return _noise_times(lambda: _longest[0])


def _undercharged_ledger() -> AbstractContextManager[Any]:
    right = ledger.Ledger.charge

    def wrong(self: Ledger, charge: Charge, checkpoint: str | None = None) -> Receipt:
        if charge.purpose == TRAINING and charge.first_step and charge.first_step % 2:
            return Receipt(charge, maker=ledger._MAKER)  # nothing is written
        return right(self, charge, checkpoint)

    return mock.patch.object(ledger.Ledger, "charge", wrong)


def _morphology_without_noise() -> AbstractContextManager[Any]:
    right = shape_votes.learn

    def wrong(*arguments: Any, **options: Any) -> Morphology:
        with _noise_times(lambda: 0.0):
            return right(*arguments, **options)

    return mock.patch.object(shape_votes, "learn", wrong)


def _repeated_noise() -> AbstractContextManager[Any]:
    def wrong(device: torch.device | str) -> torch.Generator:
        return torch.Generator(device=device).manual_seed(1)

    return mock.patch.object(dpsgd, "fresh_generator", wrong)


class _DividesByDrawn(PrivateTraining):
    """Divides by the number of records that came, which is private."""

    def _released(self, records_of: Any, drawn: list[int], receipts: Any, watch: Any) -> NoisedSum:
        came = list(records_of(self.step, drawn))
        noised = super()._released(lambda *_: came, drawn, receipts, watch)
        factor = self.plan.expected_batch / max(1, len(came))
        return replace(noised, tensors=tuple(tensor * factor for tensor in noised.tensors))


CORRECT = Build("correct", "the project as it is")
FAULTS = (
    Build("no_noise", "nothing is added to the sum of gradients", inject=_no_noise),
    Build("wrong_sensitivity", "noise times NSGD's regulariser r, not times its bound 1", "nsgd",
          inject=_wrong_sensitivity),
    Build("contribution_above_bound", "each layer is clipped to C, noise is that of C for all layers", "per_layer",
          inject=_contribution_above_bound),
    Build("shuffled_batches", "batches of one size from a shuffled list, priced as Poisson draws",
          inject=_shuffled_batches),
    Build("batch_dice", "nnU-Net's batch Dice over all patients of a pass", engine=_joint_loss, batch_dice=True),
    Build("data_dependent_noise", "noise scaled to the longest contribution of the batch", "flat",
          inject=_noise_by_longest, engine=_measuring_engine),
    Build("undercharged_ledger", "every second step is not written to the ledger", inject=_undercharged_ledger),
    Build("morphology_without_noise", "the vote is charged, and released as it is", inject=_morphology_without_noise),
    Build("repeated_noise", "the generator has a fixed seed: every step draws the same", inject=_repeated_noise),
    Build("realised_batch", "the sum is divided by the number of patients that were drawn", training=_DividesByDrawn),
)  # fmt: skip


def correct_builds(number: int) -> list[Build]:
    """The correct build under all clip rules and both engines, in turn."""
    rules = list(RULES)
    return [replace(CORRECT, rule=rules[k % len(rules)], batched=k % 2 == 1) for k in range(number)]
