"""Steps with Laplace noise: the L1 clip, its engine, and what one step costs.

Laplace noise of scale b S hides a change of L1 norm S; a vector of L2 norm S may have an L1 norm of S sqrt(parameters),
so clipping in L2 and adding Laplace noise, as is sometimes published, promises nothing. Here the whole chain is L1:

    gradient -> L1 norm, float64 -> min(1, C / n) -> L1Bounded -> mechanisms.Laplace

A threshold that follows a quantile of the L1 norms (``clipping.QuantileL1``) needs a noised count besides. Laplace and
Gaussian noise do not combine into one event, so the count is a second release on the full batch, charged for itself:

>>> step = LaplaceStep(noise_multiplier=10.0, count_noise=20.0)
>>> [(charge.purpose, charge.mechanism, charge.noise_multiplier) for charge in step.charges(0)]
[('training', 'laplace', 10.0), ('threshold', 'gaussian', 40.0)]

On a Poisson draw the two would be queries on one draw, which has no known price (``events.canonical`` refuses it);
there is no place here to put a sampling probability.

Design note: no noise is drawn in this module. Both releases are those of ``mechanisms``, with their receipts and types:
a ``ClippedSum``, which is L2-bounded, never reaches Laplace noise.

Design note: an ablation, not a recommendation. Laplace noise on d parameters has a norm of b S sqrt(2 d), against an L1
norm of at most S.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from dp_accounting.dp_event import ComposedDpEvent, DpEvent
from torch import Tensor, nn

from nnunet_dp.charges import TRAINING, Charge
from nnunet_dp.clipping import ClipRule, QuantileL1
from nnunet_dp.errors import Refusal
from nnunet_dp.gradients import Record, gradients_of, trainable
from nnunet_dp.ledger import Receipt
from nnunet_dp.mechanisms import ClippedSum, L1Bounded, Laplace, NoisedSum, SubsampledGaussian

THRESHOLD = "threshold"
"""Purpose of the charges for counts that are released by themselves."""
COUNT_BOUND = 0.5  # one patient's share in the sum of (b_i - 1/2), on either side


@dataclass(frozen=True, eq=False)
class L1Clipped:
    """What a step releases, not noised yet; private.

    Attributes:
        gradient: sum of the patients' clipped gradients.
        count: sum of (b_i - 1/2) as a sum of one number, or None.
    """

    gradient: L1Bounded = field(repr=False)
    count: ClippedSum | None = field(default=None, repr=False)


def one_at_a_time_l1(
    network: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    records: Iterable[Record],
    rule: ClipRule,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    watch: Callable[[Tensor], None] = lambda loss: None,
) -> L1Clipped:
    """``gradients.one_at_a_time`` in L1: same arguments, same memory.

    Raises:
        TypeError: for a rule that bounds another norm.

    Formal guarantee:
        The sum is one over the records of vectors of L1 norm at most ``rule.bound``, without tolerance; replacing one
        record by none changes it by that record's vector up to rounding in float64, which the safety margin of 2^-16
        covers for any batch below 10^5 patients and any number of parameters.
    """
    if rule.order != 1:
        raise TypeError(f"the L1 engine should have an L1 rule, found {type(rule).__name__}: choose flat_l1")
    total = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in trainable(network)[1]]
    counted = 0.0
    for gradient in gradients_of(network, loss, records, autocast, watch):
        norm = l1_norm(gradient)
        if isinstance(rule, QuantileL1):
            counted += rule.centred_indicator(float(norm))
        if rule.usable(norm):
            _add_scaled(total, gradient, float(rule.factors(norm)))
    bounded = L1Bounded(tuple(total), rule.bound)
    return L1Clipped(bounded, _as_sum(counted, total[0].device) if isinstance(rule, QuantileL1) else None)


def l1_norm(gradient: Sequence[Tensor]) -> Tensor:
    """L1 norm over all tensors together, [1] on the CPU, accumulated in float64."""
    return torch.stack([tensor.double().abs().sum() for tensor in gradient]).cpu().sum()[None]


def _add_scaled(total: list[Tensor], gradient: list[Tensor], factor: float) -> None:
    for sum_, tensor in zip(total, gradient, strict=True):
        sum_ += tensor.double() * factor


def _as_sum(count: float, device: torch.device) -> ClippedSum:
    return ClippedSum((torch.tensor([count], dtype=torch.float64, device=device),), COUNT_BOUND)


@dataclass(frozen=True)
class LaplaceStep:
    """A gradient with Laplace noise on the full batch, and a count with Gaussian noise of its own where there is one.

    Attributes:
        noise_multiplier: b, scale of the gradient's noise over its L1 bound.
        count_noise: sigma_b, standard deviation of the noise on the centred count, in patients; None for no count.

    Formal guarantee:
        ``release`` adds Laplace(0, b * l1_bound) to each coordinate and N(0, sigma_b^2) to the count, each after
        spending a receipt for its own price; ``event`` is their composition.
    """

    noise_multiplier: float
    count_noise: float | None = None

    @property
    def gradient(self) -> Laplace:
        """The mechanism of the gradient."""
        return Laplace(self.noise_multiplier)

    @property
    def count(self) -> SubsampledGaussian | None:
        """The mechanism of the count."""
        return None if self.count_noise is None else SubsampledGaussian(self.count_noise / COUNT_BOUND)

    @property
    def event(self) -> DpEvent:
        """Price of one step."""
        return ComposedDpEvent([self.gradient.event, self.count.event]) if self.count else self.gradient.event

    def charges(self, step: int) -> tuple[Charge, ...]:
        """The price as lines for the ledger, the gradient's first: a crash between them leaves no unpaired count."""
        gradient = self.gradient.charge(TRAINING, step)
        return (gradient, self.count.charge(THRESHOLD, step)) if self.count else (gradient,)

    def release(self, clipped: L1Clipped, receipts: Sequence[Receipt], generator: torch.Generator) -> NoisedSum:
        """Spend the receipts, in the order of ``charges``, and add the noise.

        Raises:
            TypeError: for a value that is not ``L1Clipped``; nothing is spent.
            Refusal: for a count without its mechanism or the reverse, and without fitting receipts.
            RuntimeError: when a sum is not finite; its receipt is spent.
        """
        if not isinstance(clipped, L1Clipped):
            raise TypeError(f"Laplace noise should meet an L1Clipped, found {type(clipped).__name__}")
        if (clipped.count is None) != (self.count is None) or len(receipts) != (2 if self.count else 1):
            raise Refusal("a step with a count should come with two receipts, one without a count with one")
        tensors = self.gradient.release(clipped.gradient, receipts[0], generator)
        noised = None
        if self.count is not None and clipped.count is not None:
            noised = float(self.count.release(clipped.count, receipts[1], generator).tensors[0])
        return NoisedSum(tensors, clipped.gradient.l1_bound, noised)  # no L2 norm is larger than the L1 norm
