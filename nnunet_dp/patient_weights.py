"""A network whose weights have one copy a patient, so that one backward pass gives one weight gradient a patient.

Each trainable parameter is replaced, for the length of a forward pass, by a view [patients, *parameter.shape] that
repeats it without memory, and the functions that layers call are replaced by ones that know what to do with it:

==============================  ==================================================================================
function                        per-patient weight gradient
==============================  ==================================================================================
conv1d, conv2d, conv3d          ``weight_gradients``; the gradient of the input is the ordinary one, of the batch
conv_transpose1d, 2d, 3d        the same with input and output gradient in each other's place
linear                          one matrix product a patient
instance_norm                   channels of all samples side by side: statistics are those of one sample and channel
group_norm                      normalised as ever, then scaled and shifted by the patient's own copy
==============================  ==================================================================================

>>> layer = torch.nn.Linear(2, 1, bias=False)
>>> copies = copies_of(["weight"], list(layer.parameters()), patients=3)
>>> output = forward_with_copies(layer, copies, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
>>> torch.autograd.grad(output.sum(), list(copies.values()))[0].tolist()
[[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]]

Formal guarantee:
    Under ``Watched`` every use of a copy is one of the table's, or ``Unbatchable`` is raised: nothing is left out or
    counted twice in silence. A parameter reached past the copies is found by its gradient (``batched_gradients``).

Design note: functions are replaced, not modules: nothing is hung on nnU-Net's modules, a module registered under
several names needs no care, and a network that is changed between steps (deep supervision, morphology) stays itself.

Design note: ``functional_call`` with ``tie_weights`` leaves its replacements behind where one module has several names
(torch 2.14); each parameter is named once here, which is enough for such modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from nnunet_dp.weight_gradients import Geometry, patient_weight_gradients


class Unbatchable(Exception):
    """The network does something with its parameters for which per-patient gradients were never written."""


def copies_of(names: Sequence[str], parameters: Sequence[Tensor], patients: int) -> dict[str, Tensor]:
    """For each parameter a leaf [patients, *parameter.shape] that takes no memory of its own."""
    expanded = [p.detach().expand(patients, *p.shape).requires_grad_() for p in parameters]
    return dict(zip(names, expanded, strict=True))


def forward_with_copies(network: nn.Module, copies: Mapping[str, Tensor], images: Tensor) -> Any:
    """The network's output; fit for ``torch.compile`` without graph breaks.

    Args:
        network: with every trainable parameter in ``copies``.
        copies: of ``copies_of``.
        images: [patients * patches, channels, *spatial], a patient's patches one after the other.
    """
    with _Layers():
        return functional_call(network, dict(copies), (images,), tie_weights=False)


def watched_forward(network: nn.Module, copies: Mapping[str, Tensor], images: Tensor) -> Any:
    """``forward_with_copies`` that looks at every use of a copy.

    Raises:
        Unbatchable: for a use that is not in the module's table.
    """
    with Watched(copies, len(images)):
        return functional_call(network, dict(copies), (images,), tie_weights=False)


class _Layers(TorchFunctionMode):
    """Layers' functions replaced by those of the table where they meet a copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LAYERS:
            found = _LAYERS[func](*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


class Watched(TorchFunctionMode):
    """As ``_Layers``; refuses what is not in the table.

    Args:
        copies: of ``copies_of``.
        batch: samples in the batch, which no layer may change.
    """

    def __init__(self, copies: Mapping[str, Tensor], batch: int) -> None:
        super().__init__()
        self._names = {id(copy): name for name, copy in copies.items()}
        self._batch = batch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = [self._names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._names]
        if not used:
            return func(*args, **kwargs)
        found = _LAYERS[func](*args, **kwargs) if func in _LAYERS else None
        if found is None:
            return _harmless(func, args, kwargs, f"parameter '{used[0]}' is used by {getattr(func, '__name__', func)}")
        if len(found) != self._batch:
            raise Unbatchable(f"parameter '{used[0]}' meets {len(found)} samples, the batch has {self._batch}")
        return found


def _harmless(func: Any, args: Any, kwargs: Any, complaint: str) -> Any:
    """A shape or a dtype of a copy may be asked for; no number may be computed that learns from it."""
    try:
        found = func(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the shapes of copies fit no other function
        raise Unbatchable(complaint) from error
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(found)):
        raise Unbatchable(complaint)
    return found


# ---- layers ------------------------------------------------------------------------------------------------------
# Each has the signature of the function it stands for, and returns None where no argument is a patient's copy.


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    return _convolved(input, weight, bias, False, stride, padding, 0, dilation, groups)


def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor | None:
    return _convolved(input, weight, bias, True, stride, padding, output_padding, dilation, groups)


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    stride: Any,
    padding: Any,
    output_padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor | None:
    axes = input.ndim - 2
    if not _has_copies(weight, input.ndim + 1, bias):
        return None
    if groups != 1 or isinstance(padding, str):
        raise Unbatchable(f"a convolution has {groups} groups and padding {padding!r}: 1 and numbers are known")
    numbers = [_per_axis(value, axes) for value in (stride, padding, output_padding, dilation)]
    return _Convolution.apply(_as_autocast(input), weight, bias, transposed, *numbers)


class _Convolution(torch.autograd.Function):
    """A convolution whose weight and bias are copies [patients, ...] that are all equal."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        stride: list[int],
        padding: list[int],
        output_padding: list[int],
        dilation: list[int],
    ) -> Tensor:
        one = weight[0].to(input.dtype)
        offset = None if bias is None else bias[0].to(input.dtype)
        ctx.save_for_backward(input, one)
        ctx.transposed, ctx.patients, ctx.dtype = transposed, weight.shape[0], weight.dtype
        ctx.stride, ctx.padding, ctx.output_padding, ctx.dilation = stride, padding, output_padding, dilation
        convolution = torch.ops.aten.convolution.default
        return convolution(input, one, offset, stride, padding, dilation, transposed, output_padding, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        input, one = ctx.saved_tensors
        of_input = _input_gradient(gradient, input, one, ctx) if ctx.needs_input_grad[0] else None
        pair = (gradient, input) if ctx.transposed else (input, gradient)
        geometry = Geometry(tuple(one.shape[2:]), tuple(ctx.stride), tuple(ctx.padding), tuple(ctx.dilation))
        of_weight = patient_weight_gradients(*pair, geometry, ctx.patients).to(ctx.dtype)
        of_bias = _bias_gradient(gradient, ctx.patients, ctx.dtype) if ctx.needs_input_grad[2] else None
        return of_input, of_weight, of_bias, None, None, None, None, None


def _input_gradient(gradient: Tensor, input: Tensor, weight: Tensor, ctx: Any) -> Tensor:
    wanted = [True, False, False]
    backward = torch.ops.aten.convolution_backward.default
    settings = (ctx.stride, ctx.padding, ctx.dilation, ctx.transposed, ctx.output_padding, 1, wanted)
    return backward(gradient, input, weight, None, *settings)[0]


def _bias_gradient(gradient: Tensor, patients: int, dtype: torch.dtype) -> Tensor:
    return gradient.flatten(2).sum(2, dtype=dtype).unflatten(0, (patients, -1)).sum(1)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if not _has_copies(weight, 3, bias):
        return None
    features = input.reshape(weight.shape[0], -1, input.shape[-1])
    found = torch.bmm(features, weight.transpose(1, 2))
    found = found if bias is None else found + bias[:, None].to(found.dtype)
    return found.reshape(*input.shape[:-1], -1)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if not _has_copies(weight, 2, bias):
        return None
    if running_mean is not None or running_var is not None or not use_input_stats:
        raise Unbatchable("an instance norm keeps running statistics")
    scale, shift = (None if copy is None else _for_each_sample(copy, input).flatten() for copy in (weight, bias))
    samples_as_channels = input.reshape(1, -1, *input.shape[2:])  # as torch.instance_norm itself does
    normalised = functional.batch_norm(samples_as_channels, None, None, scale, shift, True, 0.0, eps)
    return normalised.reshape(input.shape)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor | None:
    if not _has_copies(weight, 2, bias):
        return None
    normalised = functional.group_norm(input, num_groups, None, None, eps)
    found, axes = normalised, [1] * (input.ndim - 2)
    if weight is not None:
        found = found * _for_each_sample(weight, input).unflatten(1, (-1, *axes))
    if bias is not None:
        found = found + _for_each_sample(bias, input).unflatten(1, (-1, *axes))
    return found.to(normalised.dtype)


_LAYERS: dict[Any, Callable[..., Tensor | None]] = {
    torch.conv1d: _convolution,
    torch.conv2d: _convolution,
    torch.conv3d: _convolution,
    torch.conv_transpose1d: _transposed_convolution,
    torch.conv_transpose2d: _transposed_convolution,
    torch.conv_transpose3d: _transposed_convolution,
    functional.linear: _linear,
    functional.instance_norm: _instance_norm,
    functional.group_norm: _group_norm,
}


def _has_copies(weight: Tensor | None, axes: int, bias: Tensor | None) -> bool:
    """Whether weight and bias are patients' copies: these have one axis more than a layer's own, ``axes`` and 2."""
    found = [tensor.ndim == expected for tensor, expected in ((weight, axes), (bias, 2)) if tensor is not None]
    if any(found) and not all(found):
        raise Unbatchable("a layer's weight is trained and its bias is not, or the reverse")
    return any(found)


def _for_each_sample(copy: Tensor, input: Tensor) -> Tensor:
    """[patients, channels] -> [samples, channels]."""
    return copy.repeat_interleave(len(input) // len(copy), 0)


def _per_axis(value: Any, axes: int) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * axes if len(numbers) == 1 else numbers


def _as_autocast(input: Tensor) -> Tensor:
    """In the dtype that autocast would give a convolution."""
    kind = input.device.type
    if input.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return input
    return input.to(torch.get_autocast_dtype(kind))
