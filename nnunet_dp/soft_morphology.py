"""Morphology inside the network: flat grey-scale opening and closing of the logits, per class, with gradients.

DP-Morph (arXiv:2606.21763) refines a private network's output by morphology while it learns. A dilation is the largest
logit of a box around each voxel, an erosion the smallest; each passes its gradient to the voxel it picked, so the
network learns through them. Everything is four settings of these two:

=====================  ==================  ============================================================
operation              is                  does to a class
=====================  ==================  ============================================================
none                   identity            nothing
opening                erode, dilate       lowers what no box fits into (specks); never raises a logit
closing                dilate, erode       raises gaps that no box fits into (holes); never lowers one
opening_then_closing   the one, the other  both; the published code's default
=====================  ==================  ============================================================

>>> class_logits = torch.tensor([-1., 5., -1., -1., 4., 4., 4., -1.]).view(1, 1, 8, 1)  # a speck, a bar of three
>>> morphology = SoftMorphology(classes=1, dimensions=2)
>>> morphology.set_radii([(1, 0)], ["opening"])
>>> morphology(class_logits).flatten().tolist()
[-1.0, -1.0, -1.0, -1.0, 4.0, 4.0, 4.0, -1.0]

A flat operation commutes with every threshold: thresholding the refined logits is refining the thresholded mask. Boxes
have 2 * radius + 1 voxels an axis and are taken axis by axis; beyond the image nothing is seen (erosion pads with plus,
dilation with minus infinity), so that what touches the border is kept, and opening and closing stay idempotent there.

Formal guarantee:
    The module has no trainable parameter and treats each sample by itself, so it adds nothing to what a step releases.
    Its buffers are never written by ``forward``: they are public constants or the outcome of a release that the ledger
    was charged for, whichever the caller gave to ``set_radii``.

Design note: radii, operations and modes are buffers, so that the weights file alone carries them to prediction, where
nnU-Net builds the network anew and loads it. ``forward`` reads a copy in Python numbers, renewed by ``set_radii`` and
by loading, and waits for no device; a plain network's weights lack the buffers and are refused by strict loading.

Design note: softmax ignores a number added to all logits of a voxel, which morphology of single logits does not. With
``over_background`` it works on a class's logit minus the background's: whether the class beats the background is then
refined exactly as a mask would be. The published code works on single logits, which is the default.

Design note: a box of radius r holds the ball of radius r, so that it removes more than ``refinement``'s opening with
that ball; the box inside the ball has the radius r / sqrt(dimensions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_dp.errors import UsageRefusal


def dilate(values: Tensor, radii: Sequence[int]) -> Tensor:
    """Largest value in a box around each voxel.

    Args:
        values: [batch, channels, *spatial], 2D or 3D.
        radii: voxels per spatial axis; 0 leaves an axis alone.
    """
    for axis, radius in enumerate(radii):
        reach = min(radius, values.shape[2 + axis] - 1)  # a box wider than the image sees all of it
        if reach > 0:
            values = _largest_along(values, axis, reach)
    return values


def erode(values: Tensor, radii: Sequence[int]) -> Tensor:
    """Smallest value in a box around each voxel; arguments as ``dilate``."""
    return -dilate(-values, radii)


def _largest_along(values: Tensor, axis: int, radius: int) -> Tensor:
    """Running maximum along one spatial axis; max pooling pads with minus infinity."""
    dimensions = values.ndim - 2
    kernel, padding = [1] * dimensions, [0] * dimensions
    kernel[axis], padding[axis] = 2 * radius + 1, radius
    pool = F.max_pool2d if dimensions == 2 else F.max_pool3d
    return pool(values, kernel, stride=1, padding=padding).to(values.dtype)  # autocast on the CPU widens bfloat16


_STEPS: dict[str, tuple[Callable[[Tensor, Sequence[int]], Tensor], ...]] = {
    "none": (),
    "opening": (erode, dilate),
    "closing": (dilate, erode),
    "opening_then_closing": (erode, dilate, dilate, erode),
}
OPERATIONS = tuple(_STEPS)  # the position is the code in the weights file: append, never reorder


class SoftRule(NamedTuple):
    """What happens to one class.

    Attributes:
        operation: one of ``OPERATIONS``.
        radii: of the box, in voxels per spatial axis.
    """

    operation: str
    radii: tuple[int, ...]

    @property
    def idle(self) -> bool:
        """Whether it is the identity."""
        return not _STEPS[self.operation] or not any(self.radii)

    def __call__(self, values: Tensor) -> Tensor:
        """Apply to [batch, channels, *spatial]."""
        for step in _STEPS[self.operation]:
            values = step(values, self.radii)
        return values


class SoftMorphology(nn.Module):
    """Per-class morphology of logits [batch, classes, *spatial], same shape out; the identity until ``set_radii``.

    Args:
        classes: channels of the logits; with softmax labels the background is channel 0 and stays ``none``.
        dimensions: 2 or 3.
        at_prediction: whether it acts at prediction (``eval()``) too, or in training only, as the published code did.
        over_background: whether it acts on each logit minus that of channel 0; see the module.

    Attributes:
        radii: buffer, int64 [classes, dimensions], voxels.
        operation: buffer, int64 [classes], positions in ``OPERATIONS``.
        at_prediction: buffer, bool [].
        over_background: buffer, bool [].

    Raises:
        UsageRefusal: for other numbers of dimensions.

    Formal guarantee:
        No trainable parameters; no sample reaches another's output or gradient; ``forward`` writes no buffer.
    """

    radii: Tensor
    operation: Tensor
    at_prediction: Tensor
    over_background: Tensor

    def __init__(
        self, classes: int, dimensions: int, at_prediction: bool = True, over_background: bool = False
    ) -> None:
        super().__init__()
        if dimensions not in (2, 3):
            raise UsageRefusal(f"dimensions should be 2 or 3, found {dimensions}: give the patch's number of axes")
        self.register_buffer("radii", torch.zeros(classes, dimensions, dtype=torch.int64))
        self.register_buffer("operation", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("at_prediction", torch.tensor(at_prediction))
        self.register_buffer("over_background", torch.tensor(over_background))
        self._adopt((SoftRule("none", (0,) * dimensions),) * classes, at_prediction, over_background)

    @property
    def rules(self) -> tuple[SoftRule, ...]:
        """What happens to each class, as ``forward`` does it."""
        return self._rules

    def set_radii(self, radii: Sequence[Sequence[int]], operations: Sequence[str]) -> None:
        """Choose each class's operation; public values or the outcome of a charged release, nothing else.

        Args:
            radii: voxels per spatial axis, for each class (``radii_from_mm``).
            operations: of ``OPERATIONS``, for each class.

        Raises:
            UsageRefusal: for other shapes, unknown operations, negative radii or a changed background.
        """
        if len(operations) != len(radii) or not set(operations) <= set(OPERATIONS):
            raise UsageRefusal(f"each class should have one of {', '.join(OPERATIONS)}, found {list(operations)}")
        rules = tuple(SoftRule(name, tuple(box)) for name, box in zip(operations, radii, strict=True))
        fault = self._fault(rules, self._acts_over_background)
        if fault:
            raise UsageRefusal(fault)
        self.radii.copy_(torch.tensor([rule.radii for rule in rules]))
        self.operation.copy_(torch.tensor([OPERATIONS.index(rule.operation) for rule in rules]))
        self._adopt(rules, self._acts_at_prediction, self._acts_over_background)

    def _adopt(self, rules: tuple[SoftRule, ...], at_prediction: bool, over_background: bool) -> None:
        """Keep what ``forward`` reads; neighbouring classes with one rule are refined together."""
        self._rules, self._acts_at_prediction, self._acts_over_background = rules, at_prediction, over_background
        runs = [(rule, len(list(same))) for rule, same in groupby(rules)]
        stops = list(accumulate(length for _, length in runs))
        self._runs = tuple((stop - length, stop, rule) for (rule, length), stop in zip(runs, stops, strict=True))

    def forward(self, logits: Tensor) -> Tensor:
        """Refined logits, same shape and dtype.

        Args:
            logits: [batch, classes, *spatial].

        Raises:
            UsageRefusal: when classes or dimensions are not those of the radii.
        """
        classes, dimensions = len(self._rules), len(self._rules[0].radii)
        if logits.shape[1] != classes or logits.ndim != dimensions + 2:
            raise UsageRefusal(
                f"logits should have {classes} classes and {dimensions} spatial axes, found shape "
                f"{tuple(logits.shape)}: build SoftMorphology for this network's output"
            )
        if not (self.training or self._acts_at_prediction) or all(rule.idle for rule in self._rules):
            return logits
        return torch.cat([self._refined(logits, *run) for run in self._runs], dim=1)

    def _refined(self, logits: Tensor, start: int, stop: int, rule: SoftRule) -> Tensor:
        """The classes from start to stop."""
        chosen = logits[:, start:stop]
        if rule.idle:
            return chosen
        if not self._acts_over_background:
            return rule(chosen)
        background = logits[:, :1]
        return background + rule(chosen - background)

    def _fault(self, rules: Sequence[SoftRule], over_background: bool) -> str | None:
        """Why these rules cannot be applied, or None."""
        classes, dimensions = self.radii.shape
        if len(rules) != classes or any(len(rule.radii) != dimensions for rule in rules):
            return f"radii should be given for {classes} classes and {dimensions} axes each, found {len(rules)} classes"
        if any(radius < 0 for rule in rules for radius in rule.radii):
            return "radii should be 0 voxels or more, found a negative one: radii_from_mm gives usable ones"
        if over_background and not rules[0].idle:
            return f"channel 0 is the background and should have none, found {rules[0].operation}"
        return None

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: Any,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: list[str],
    ) -> None:
        """Load the buffers and renew the numbers that ``forward`` reads; torch collects what is wrong."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        codes, over_background = self.operation.tolist(), bool(self.over_background)
        if any(not 0 <= code < len(OPERATIONS) for code in codes):
            error_msgs.append(f"{prefix}operation should hold codes below {len(OPERATIONS)}: update nnunet_dp")
            return
        rules = tuple(SoftRule(OPERATIONS[c], tuple(box)) for c, box in zip(codes, self.radii.tolist(), strict=True))
        fault = self._fault(rules, over_background)
        if fault:
            error_msgs.append(f"{prefix}radii: {fault}")
            return
        self._adopt(rules, bool(self.at_prediction), over_background)


class MorphedNetwork(nn.Module):
    """A network with morphology on its full-resolution output; what nnU-Net asks of its U-Nets still works.

    Names in the state dict are ``network.*`` and ``morphology.*``: strict loading refuses a plain network's weights.

    Args:
        network: [batch, channels, *spatial] -> logits, or a list of logits with full resolution first.
        morphology: for the classes and dimensions of these logits.

    Formal guarantee:
        The trainable parameters are the network's; see ``SoftMorphology``.
    """

    def __init__(self, network: nn.Module, morphology: SoftMorphology) -> None:
        super().__init__()
        self.network = network
        self.morphology = morphology

    @property
    def encoder(self) -> nn.Module:
        """The wrapped network's encoder."""
        return self.network.get_submodule("encoder")

    @property
    def decoder(self) -> nn.Module:
        """The wrapped network's decoder, on which nnU-Net switches deep supervision."""
        return self.network.get_submodule("decoder")

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Refined logits, or with deep supervision a list whose first entry is refined.

        Args:
            images: [batch, channels, *spatial].
        """
        output = self.network(images)
        if isinstance(output, (list, tuple)):
            return [self.morphology(output[0]), *output[1:]]
        return self.morphology(output)


def radii_from_mm(radius_mm: Sequence[float], spacing_mm: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """Radii in voxels, [classes][dimensions]: the largest box that reaches no further than the radius.

    >>> radii_from_mm([0, 2.5], spacing_mm=[2.5, 1.0, 0.8])
    ((0, 0, 0), (1, 2, 3))

    Args:
        radius_mm: for each class; negative counts as 0.
        spacing_mm: of the configuration, in the order of the patch's axes.

    Raises:
        UsageRefusal: for a radius that is not finite or a spacing that is not positive.
    """
    if not all(map(math.isfinite, radius_mm)):
        raise UsageRefusal(f"radius_mm should be finite, found {list(radius_mm)}: give 0 to leave a class alone")
    if not all(math.isfinite(spacing) and spacing > 0 for spacing in spacing_mm):
        raise UsageRefusal(f"spacing_mm should be positive, found {list(spacing_mm)}: take it from the plans")
    return tuple(tuple(_voxels(radius, spacing) for spacing in spacing_mm) for radius in radius_mm)


def _voxels(radius_mm: float, spacing_mm: float) -> int:
    return max(0, math.floor(radius_mm / spacing_mm * (1 + 1e-9)))  # 0.3 mm at 0.1 mm is 3 voxels
