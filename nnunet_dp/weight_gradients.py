"""Weight gradients of a convolution, one for each patient of a batch, by the algorithm that is fastest for its shape.

The gradient of a weight is a correlation of the layer's input with the gradient of its output, summed over the batch.
Here the sum stops at the patients' borders. Three algorithms give the same numbers up to rounding:

=========  ========================================================  ==========================================
name       how                                                       pays
=========  ========================================================  ==========================================
loop       one ordinary weight gradient a patient                    where one patient fills the device
grouped    patients as groups of channels of one convolution         small volumes on a GPU
matmul     windows laid out as columns (im2col), one product each    kernels of size 1, or as large as the stride
=========  ========================================================  ==========================================

A transposed convolution has the weight gradient of a convolution whose input and output gradient change places.

>>> ones = torch.ones(4, 1, 5, 5)
>>> geometry = Geometry((3, 3), (1, 1), (0, 0), (1, 1))
>>> [float(patient_weight_gradients(ones, torch.ones(4, 1, 3, 3), geometry, 2, name).sum()) for name in ALGORITHMS]
[324.0, 324.0, 324.0]

Formal guarantee:
    Row p of the result is a function of patient p's rows alone: no number of another patient is multiplied or added.

Design note: the choice is made by timing on random numbers of the same shapes, once per shape and process. Real data
would make the choice, and so the rounding of one patient's gradient, depend on another patient.

Design note: a ``torch.library.custom_op``, so that ``torch.compile`` keeps the layers around it in one graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_COLUMNS = 2**26
"""Numbers in the columns of ``matmul`` (256 MiB in float32) beyond which it is not tried, unless they fit the input."""
_REPEATS = 2
_HOPELESS = 3.0  # times slower in its first run: not tried again
_MARGIN = 0.1  # by which the ordinary loop must be beaten: what a busy machine may feign


class Geometry(NamedTuple):
    """How windows lie on the input of a convolution, one number for each spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


Algorithm = Callable[[Tensor, Tensor, Geometry, int], Tensor]


def patient_weight_gradients(
    inputs: Tensor, gradients: Tensor, geometry: Geometry, patients: int, algorithm: str = ""
) -> Tensor:
    """Weight gradient of each patient, summed over that patient's patches.

    Args:
        inputs: of the convolution, [patients * patches, channels, *spatial], a patient's patches one after the other.
        gradients: of its output, [patients * patches, features, *windows].
        geometry: of the convolution, without groups.
        patients: number of them.
        algorithm: a name in ``ALGORITHMS``; empty for the fastest.

    Returns:
        [patients, features, channels, *kernel], in the dtype of the arguments.
    """
    return _weight_gradients(inputs, gradients, *map(list, geometry), patients, algorithm)


@torch.library.custom_op("nnunet_dp::weight_gradients", mutates_args=())
def _weight_gradients(
    inputs: Tensor,
    gradients: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    patients: int,
    algorithm: str,
) -> Tensor:
    geometry = Geometry(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    name = algorithm or fastest(inputs, gradients, geometry, patients)
    return ALGORITHMS[name](inputs, gradients, geometry, patients)


@_weight_gradients.register_fake
def _(
    inputs: Tensor,
    gradients: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    patients: int,
    algorithm: str,
) -> Tensor:
    return gradients.new_empty([patients, gradients.shape[1], inputs.shape[1], *kernel])


# ---- the algorithms ----------------------------------------------------------------------------------------------


def _loop(inputs: Tensor, gradients: Tensor, geometry: Geometry, patients: int) -> Tensor:
    weight = gradients.new_empty([gradients.shape[1], inputs.shape[1], *geometry.kernel])
    pairs = zip(inputs.chunk(patients), gradients.chunk(patients), strict=True)
    return torch.stack([_ordinary(x, g, weight, geometry, 1) for x, g in pairs])


def _grouped(inputs: Tensor, gradients: Tensor, geometry: Geometry, patients: int) -> Tensor:
    x, g = _patients_as_channels(inputs, patients), _patients_as_channels(gradients, patients)
    weight = gradients.new_empty([g.shape[1], inputs.shape[1], *geometry.kernel])
    found = _ordinary(x, g, weight, geometry, patients)
    return found.reshape(patients, gradients.shape[1], inputs.shape[1], *geometry.kernel)


def _matmul(inputs: Tensor, gradients: Tensor, geometry: Geometry, patients: int) -> Tensor:
    axes, channels, features = len(geometry.kernel), inputs.shape[1], gradients.shape[1]
    windows = _windows(inputs, geometry).unflatten(0, (patients, -1))
    # [patients, patches, channels, *windows, *kernel] -> [patients, channels, *kernel, patches, *windows]
    order = [0, 2, *range(3 + axes, 3 + 2 * axes), 1, *range(3, 3 + axes)]
    columns = windows.permute(order).reshape(patients, channels * math.prod(geometry.kernel), -1)
    rows = gradients.unflatten(0, (patients, -1)).transpose(1, 2).reshape(patients, features, -1)
    return torch.bmm(rows, columns.transpose(1, 2)).reshape(patients, features, channels, *geometry.kernel)


ALGORITHMS: dict[str, Algorithm] = {"loop": _loop, "grouped": _grouped, "matmul": _matmul}


def _ordinary(inputs: Tensor, gradients: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
    """PyTorch's own weight gradient; only the shape of ``weight`` is read."""
    _, stride, padding, dilation = map(list, geometry)
    nothing, wanted = [0] * len(stride), [False, True, False]
    backward = torch.ops.aten.convolution_backward.default
    return backward(gradients, inputs, weight, None, stride, padding, dilation, False, nothing, groups, wanted)[1]


def _patients_as_channels(tensor: Tensor, patients: int) -> Tensor:
    """[patients * patches, channels, ...] -> [patches, patients * channels, ...]."""
    return tensor.unflatten(0, (patients, -1)).transpose(0, 1).flatten(1, 2)


def _windows(inputs: Tensor, geometry: Geometry) -> Tensor:
    """[batch, channels, *spatial] -> [batch, channels, *windows, *kernel], a view of the padded input."""
    found = functional.pad(inputs, [p for padding in reversed(geometry.padding) for p in (padding, padding)])
    for axis, (kernel, stride, _, dilation) in enumerate(zip(*geometry, strict=True)):
        found = found.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return found


# ---- the choice --------------------------------------------------------------------------------------------------

_chosen: dict[tuple[object, ...], str] = {}


def fastest(inputs: Tensor, gradients: Tensor, geometry: Geometry, patients: int) -> str:
    """Name of the fastest algorithm for these shapes on this device, timed once; the numbers are not read."""
    shapes = (tuple(inputs.shape), tuple(gradients.shape), geometry, patients)
    key = (*shapes, str(inputs.device), inputs.dtype, torch.get_num_threads())
    if key not in _chosen:
        if inputs.is_cuda and torch.cuda.is_current_stream_capturing():
            return "loop"  # nothing can be timed while a graph is recorded
        _chosen[key] = _timed(inputs, gradients, geometry, patients)
    return _chosen[key]


def choices() -> dict[str, int]:
    """How many shapes of this process use each algorithm; public, as shapes are."""
    return {name: list(_chosen.values()).count(name) for name in ALGORITHMS}


def _timed(inputs: Tensor, gradients: Tensor, geometry: Geometry, patients: int) -> str:
    candidates = _candidates(inputs, gradients, geometry, patients)
    if len(candidates) == 1:
        return candidates[0]
    generator = torch.Generator(inputs.device).manual_seed(0)
    x, g = (torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype) for t in (inputs, gradients))
    seconds: dict[str, float] = {}
    for name in candidates:
        best = min(seconds.values(), default=math.inf)
        try:
            seconds[name] = _seconds(ALGORITHMS[name], x, g, geometry, patients, best)
        except RuntimeError:  # out of memory, or not built for this dtype and device
            continue
    if "loop" in seconds:
        seconds["loop"] *= 1 - _MARGIN
    return min(seconds, key=seconds.__getitem__) if seconds else "loop"


def _candidates(inputs: Tensor, gradients: Tensor, geometry: Geometry, patients: int) -> list[str]:
    columns = inputs.shape[1] * math.prod(geometry.kernel) * gradients.numel() // gradients.shape[1]
    fits = columns <= max(LARGEST_COLUMNS, inputs.numel())
    return ["loop", *(["grouped"] if patients > 1 else []), *(["matmul"] if fits else [])]


def _seconds(
    algorithm: Algorithm, inputs: Tensor, gradients: Tensor, geometry: Geometry, patients: int, best: float
) -> float:
    """Best of a few runs after one to warm up, which is all that a hopeless algorithm gets."""
    found = math.inf
    for attempt in range(1 + _REPEATS):
        _wait(inputs.device)
        began = time.perf_counter()
        algorithm(inputs, gradients, geometry, patients)
        _wait(inputs.device)
        took = time.perf_counter() - began
        if attempt == 0 and took > _HOPELESS * best and inputs.device.type == "cpu":
            return took
        found = min(found, took) if attempt else found
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
