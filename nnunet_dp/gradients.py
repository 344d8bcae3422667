"""The per-sample gradient engine: drawn patients in, ``ClippedSum`` out.

Engine one, ``one_at_a_time``, runs one patient's patches at a time through ordinary autograd, measures the norm of that
patient's gradient in float64, multiplies with the clip rule's factor and adds to a float64 sum. It is exact for every
network, uses the memory of one patient, and is the reference for any faster engine behind the same signature.

Formal guarantee:
    The returned sum is a sum over the records of vectors of L2 norm at most ``rule.bound``; replacing one record by
    none changes it by that record's vector up to rounding in float64, which the rules' safety margin of 2^-16 covers
    for any batch below 10^5 patients, whatever the other records are.

Design note: the sum is float64 because float32 additions round by what was summed before: removing one patient moved a
sum over 1600 patients by 1.03 bounds, and one over 20 000 by 6.8 (floating-point sensitivity, Casacuberta et al. 2022,
arXiv:2207.10635).

Design note: ``Module.parameters()`` lists a parameter once even where the same module is registered under several names
(``encoder.*`` is also ``decoder.encoder.*`` in nnU-Net's U-Nets); hooks on modules would count it up to four times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nnunet_dp.clipping import ClipRule, QuantileAdaptive
from nnunet_dp.mechanisms import ClippedSum


class Record(NamedTuple):
    """What one drawn patient brings to one step.

    Attributes:
        data: images [patches, channels, *spatial].
        target: segmentation [patches, 1 or regions, *spatial], or a list of it at several resolutions.
    """

    data: Tensor
    target: Any


class Engine(Protocol):
    """A function from drawn patients to their clipped sum."""

    def __call__(
        self,
        network: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        records: Iterable[Record],
        rule: ClipRule,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        watch: Callable[[Tensor], None] = lambda loss: None,
    ) -> ClippedSum:
        """Sum of the records' clipped gradients; ``watch`` sees each record's loss and must keep it local."""
        ...


def one_at_a_time(
    network: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    records: Iterable[Record],
    rule: ClipRule,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    watch: Callable[[Tensor], None] = lambda loss: None,
) -> ClippedSum:
    """Engine one: exact, one patient in memory at a time.

    Args:
        network: module; every parameter that requires a gradient takes part.
        loss: (network output, target) -> scalar, the mean over one patient's patches.
        records: the drawn patients; may be empty.
        rule: clip rule; a patient whose gradient is not finite contributes zero.
        autocast: context of the forward pass; the loss is computed in float32 or better.
        watch: called with each record's detached loss.
    """
    names, parameters = trainable(network)
    groups = rule.groups(names)
    total = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    counted = 0.0
    for gradient in gradients_of(network, loss, records, autocast, watch):
        norms = group_norms(gradient, groups)
        if isinstance(rule, QuantileAdaptive):
            counted += rule.centred_indicator(float(norms[0]))
        if rule.usable(norms):
            _add_scaled(total, gradient, rule.factors(norms).tolist(), groups)
    return ClippedSum(tuple(total), rule.bound, counted if isinstance(rule, QuantileAdaptive) else None)


def gradients_of(
    network: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    records: Iterable[Record],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    watch: Callable[[Tensor], None] = lambda loss: None,
) -> Iterator[list[Tensor]]:
    """Each record's gradient by itself, one tensor per trainable parameter; private, not clipped yet."""
    parameters = trainable(network)[1]
    for record in records:
        with autocast():
            output = network(record.data)
        value = loss(at_least_float32(output), record.target)
        watch(value.detach())
        yield _gradient(value, parameters)


def trainable(network: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters that require a gradient, each parameter once, in the network's own order."""
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    return [name for name, _ in named], [parameter for _, parameter in named]


def group_norms(gradient: Sequence[Tensor], groups: Sequence[int]) -> Tensor:
    """L2 norm of each group, [groups] on the CPU, accumulated in float64."""
    squares = torch.stack([tensor.double().square().sum() for tensor in gradient]).cpu()
    index = torch.tensor(groups)
    return torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(0, index, squares).sqrt()


def _gradient(value: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Gradient of one loss; zeros where the loss does not depend on a parameter (unused deep supervision heads)."""
    if not value.requires_grad:  # a patient without any labelled voxel
        return [torch.zeros_like(parameter) for parameter in parameters]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _add_scaled(total: list[Tensor], gradient: list[Tensor], factors: list[float], groups: Sequence[int]) -> None:
    """Add factor times gradient in float64."""
    for sum_, tensor, group in zip(total, gradient, groups, strict=True):
        sum_ += tensor.double() * factors[group]


def at_least_float32(output: Any) -> Any:
    """The network's output, or list of outputs, out of half precision."""
    if isinstance(output, (list, tuple)):
        return [at_least_float32(tensor) for tensor in output]
    return output if output.dtype == torch.float64 else output.float()
