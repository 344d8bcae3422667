"""Gradient canaries: records whose gradient the auditor knows, in a real private training.

A canary's loss is ``strength`` times one of the network's parameters (one coordinate of one tensor), so that its
gradient is that coordinate's unit vector, whatever the weights are; clipped it has the length that the rule allows. To
an attacker who sees every release, no patient is easier to find (Nasr et al. 2023, arXiv:2302.07956). Canaries on
different coordinates meet independent noise and do not disturb one another: one training tries them all.

What is released is read from the weights, which is what an attacker sees: with plain SGD a step moves them by minus the
learning rate times the noised sum, divided by the expected batch and the rule's bound.

=================  ====================================================================================
is put in          a canary for each coordinate, included by a fair coin of its own (zero-out: else nothing)
is seen            the released sum over the bound, at the canary's coordinate, added up over the steps
is known           everybody else: their clipped sum is subtracted (full batch)
is concluded       noise really there at each step; epsilon at least (``statistics``), beside the ledger's
=================  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nnunet_dp.audit import statistics
from nnunet_dp.audit.statistics import Counts, OneRun
from nnunet_dp.charges import epsilon_of
from nnunet_dp.dpsgd import PrivateTraining
from nnunet_dp.gradients import Record, trainable
from nnunet_dp.l1_clipping import LaplaceStep

STRENGTH = 1e3  # far above any bound, so that a canary is clipped to the full length
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Canary:
    """What stands in a record's target in place of labels.

    Attributes:
        coordinate: index into all parameters, one after the other; None for all of them alike.
        strength: length of the raw gradient at that coordinate.
    """

    coordinate: int | None
    strength: float = STRENGTH

    def record(self, like: Tensor) -> Record:
        """The canary as a record; its image is empty.

        Args:
            like: an image [1, channels, *spatial] of the network's kind.
        """
        return Record(torch.zeros_like(like), self)

    def loss(self, parameters: Sequence[Tensor]) -> Tensor:
        """Strength times the coordinate's value, or times the sum of all values."""
        if self.coordinate is None:
            return self.strength * torch.stack([parameter.sum() for parameter in parameters]).sum()
        left = self.coordinate
        for parameter in parameters:
            if left < parameter.numel():
                return self.strength * parameter.flatten()[left]
            left -= parameter.numel()
        raise IndexError("a canary's coordinate should lie below the number of parameters")


def with_canaries(loss: Loss, network: nn.Module) -> Loss:
    """The loss, which also knows what a canary is."""
    parameters = trainable(network)[1]

    def either(output: Any, target: Any) -> Tensor:
        return target.loss(parameters) if isinstance(target, Canary) else loss(output, target)

    return either


# ---- what a step released ------------------------------------------------------------------------------------------


def weights_of(network: nn.Module) -> Tensor:
    """All parameters in one vector, float64."""
    return torch.cat([parameter.detach().flatten().double() for parameter in trainable(network)[1]])


def released_by_step(training: PrivateTraining, records_of: Callable[[int, list[int]], list[Record]]) -> Tensor:
    """Take a step and read from the weights what it released, in units of the rule's bound.

    Args:
        training: plain SGD without momentum and with a constant learning rate.
        records_of: (step, drawn slots) -> their records.

    Returns:
        Noised sum over the bound, float64 [parameters].
    """
    before = weights_of(training.network)
    training.advance(records_of)
    return (before - weights_of(training.network)) * training.plan.expected_batch / training.schedule.learning_rate


def clipped_sum(training: PrivateTraining, records: list[Record]) -> Tensor:
    """What the records contribute at the present weights without noise, in units of the bound; by the same engine."""
    engine = training.execution.engine
    found = engine(training.network, training.loss, records, training.rule, training.execution.autocast)
    return torch.cat([tensor.flatten().double() for tensor in found.tensors]) / training.rule.bound


def planned_deviation(training: PrivateTraining) -> float:
    """Standard deviation that the plan promises for each coordinate of the gradient, in units of the bound."""
    mechanism = training.plan.mechanism
    if isinstance(mechanism, LaplaceStep):
        raise TypeError("canaries know Gaussian noise only")
    count_noise = getattr(mechanism, "count_noise", None)
    if count_noise is None:
        return mechanism.noise_multiplier
    return float((mechanism.noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5)  # Andrew 2021, theorem 1


# ---- the audit of one training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CanaryRun:
    """What one training with canaries showed.

    Attributes:
        included: [canaries], the coins.
        scores: [steps, canaries], released sum at each canary's coordinate over the planned noise, summed over the
            steps so far and divided by the square root of their number: unit variance if the noise is as planned.
        noise: [steps], measured standard deviation of the noise over the planned one, coordinates without canary.
        ledger_epsilon: [steps], recounted from the ledger's lines after each step.
        delta: of the budget.
        expected_shift: of the score by a canary in one step, in deviations of the planned noise.
    """

    included: npt.NDArray[np.bool_] = field(repr=False)
    scores: npt.NDArray[np.float64] = field(repr=False)
    noise: tuple[float, ...]
    ledger_epsilon: tuple[float, ...]
    delta: float
    expected_shift: float

    def counts(self, step: int = -1) -> Counts:
        """Decisions of the threshold half-way between absent and present, which the plan fixes before the run."""
        return statistics.counts_at(self.scores[step], self.included, self._half_way(step))

    def one_run(self, step: int = -1) -> OneRun:
        """Guesses about all canaries, by the same threshold."""
        said = self.scores[step] >= self._half_way(step)
        return OneRun(len(said), len(said), int((said == self.included).sum()))

    def _half_way(self, step: int) -> float:
        return float(np.arange(1, len(self.scores) + 1)[step] ** 0.5 * self.expected_shift / 2)

    def as_dict(self, confidence: float) -> dict[str, Any]:
        """Figures for the report, with bounds of this confidence each."""
        steps = range(len(self.scores))
        mus = [statistics.mu_from_rates(self.counts(step), confidence) for step in steps]
        one_run = self.one_run()
        return {
            "canaries": len(self.included),
            "included": int(self.included.sum()),
            "steps": len(self.scores),
            "delta": self.delta,
            "measured_over_planned_noise": [round(value, 4) for value in self.noise],
            "ledger_epsilon": list(self.ledger_epsilon),
            "empirical_epsilon_gaussian": [statistics.gaussian_epsilon(mu, self.delta) for mu in mus],
            "empirical_epsilon_any_mechanism": [
                statistics.epsilon_from_rates(self.counts(step), self.delta, confidence) for step in steps
            ],
            "empirical_epsilon_one_run": statistics.epsilon_from_one_run(one_run, self.delta, confidence),
            "one_run": {"canaries": one_run.canaries, "guesses": one_run.guesses, "right": one_run.right},
            "confidence": confidence,
        }


def run_canaries(
    training: PrivateTraining, patients: list[Record], canaries: int, rng: np.random.Generator
) -> CanaryRun:
    """Train with canaries beside patients, all steps of a full-batch plan.

    Args:
        training: new; its plan's slots are the patients and after them the canaries; its loss knows canaries.
        patients: records of the first slots.
        canaries: number of slots that follow.
        rng: of the coins and of the coordinates.
    """
    where = rng.permutation(len(weights_of(training.network)))[:canaries]
    included = rng.random(canaries) < 0.5
    free = np.ones(len(weights_of(training.network)), bool)
    free[where] = False
    like = patients[0].data[:1, :, :8, :8]  # canaries need no forward pass worth its name
    present = [Canary(int(spot)).record(like) for spot, coin in zip(where, included, strict=True) if coin]
    seen, noise, spent = [], [], []
    deviation = planned_deviation(training)
    for _ in range(training.plan.steps):
        known = clipped_sum(training, patients)
        residual = ((released_by_step(training, lambda *_: [*patients, *present]) - known) / deviation).numpy()
        seen.append(residual[where])
        noise.append(float(np.sqrt(np.mean(residual[free] ** 2))))
        spent.append(epsilon_of(training.ledger.own_entries, training.plan.budget.delta))
    steps = np.arange(1, len(seen) + 1)[:, None]
    scores = np.cumsum(seen, axis=0) / np.sqrt(steps)
    return CanaryRun(included, scores, tuple(noise), tuple(spent), training.plan.budget.delta, 1 / deviation)
