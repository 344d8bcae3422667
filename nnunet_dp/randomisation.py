"""Domain randomisation: labelled phantoms, made to look as if they came from anywhere.

A network that has seen an organ in every pose, contrast and quality takes a real scan for one more variation
(Tobin et al. 2017; for brain scans Billot et al. 2023, SynthSeg). So a phantom is

1. moved: rotated, scaled and sheared in millimetres, shifted, and bent by two random fields, coarse and fine;
2. recoloured: each channel's intensities pass a random curve, mostly monotone, sometimes not;
3. spoilt: bias field, lower resolution, noise;
4. normalised again the way nnU-Net normalises the channel: z-scored per image, or left in its range (CT, RGB).

    >>> generator = torch.Generator().manual_seed(1)
    >>> image, labels = torch.rand(2, 1, 16, 16), torch.zeros(2, 16, 16, dtype=torch.long)
    >>> moved, same = randomise(image, labels, (1.0, 1.0), (True,), generator)
    >>> moved.shape, bool(abs(moved[0].mean()) < 1e-5)
    (torch.Size([2, 1, 16, 16]), True)

Everything here is applied to public images only. A private patient's image is never augmented by this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

ROTATION_DEGREES = 12.0  # standard deviations, as all numbers below
SCALE, STRETCH = 0.12, 0.08  # of the logarithm: of all axes together, and of each
SHIFT = 0.07  # of the patch
BENDS = ((4, 2.0), (9, 0.6))  # control points per axis, displacement in voxels of the finest axis
GAMMA = 0.35  # of the logarithm of the exponent
BIAS = 0.25
CURVE_KNOTS = 6
SHARE_GAMMA, SHARE_MONOTONE = 0.35, 0.45  # of the recolourings; the rest are arbitrary curves
SHARE_LOW_RESOLUTION = 0.3
MOST_NOISE = 0.5  # of the image's standard deviation


def randomise(
    images: Tensor,
    labels: Tensor,
    spacing_mm: Sequence[float],
    zscored: Sequence[bool],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A random variation of each labelled image.

    Args:
        images: normalised intensities, float32 [batch, channels, *spatial].
        labels: int64 [batch, *spatial].
        spacing_mm: voxel edges, [axes]; rotations are rotations in millimetres.
        zscored: for each channel, whether nnU-Net z-scores it per image; other channels keep their range.
        generator: randomness, on the CPU.

    Returns:
        Images and labels of the same shapes and types.
    """
    grid = _grid(images.shape[0], images.shape[2:], spacing_mm, generator).to(images.device)
    moved = functional.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    drawn = functional.grid_sample(labels[:, None].float(), grid, "nearest", "zeros", align_corners=False)
    for image in moved:
        for channel, again in zip(image, zscored, strict=True):
            channel.copy_(_appearance(channel, again, generator))
    return moved, drawn[:, 0].to(labels.dtype)


# ---- place -------------------------------------------------------------------------------------------------------


def _grid(batch: int, shape: Sequence[int], spacing_mm: Sequence[float], generator: torch.Generator) -> Tensor:
    """Where each voxel is fetched from, in grid_sample's coordinates (last axis first, -1 to 1)."""
    affine = torch.stack([_affine(shape, spacing_mm, generator) for _ in range(batch)])
    grid = functional.affine_grid(affine, [batch, 1, *shape], align_corners=False)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    edges = torch.tensor(list(shape)[::-1], dtype=torch.float32)
    voxels = torch.tensor([min(spacing_mm) / edge for edge in spacing_mm][::-1])
    for knots, amplitude in BENDS:
        control = torch.randn(batch, len(shape), *[knots] * len(shape), generator=generator) * amplitude
        field = functional.interpolate(control, size=tuple(shape), mode=mode, align_corners=True).movedim(1, -1)
        grid = grid + field * voxels * 2 / edges
    return grid


def _affine(shape: Sequence[int], spacing_mm: Sequence[float], generator: torch.Generator) -> Tensor:
    """[axes, axes + 1]: rotation and stretch in millimetres, and a shift."""
    axes = len(shape)
    millimetres = torch.eye(axes)
    for first in range(axes):
        for second in range(first + 1, axes):
            angle = math.radians(ROTATION_DEGREES) * float(torch.randn(1, generator=generator))
            millimetres = millimetres @ _plane_rotation(axes, first, second, angle)
    common, own = torch.randn(1, generator=generator), torch.randn(axes, generator=generator)
    millimetres = millimetres @ torch.diag(torch.exp(SCALE * common + STRETCH * own))
    half_edges = torch.tensor([size * edge for size, edge in zip(shape, spacing_mm, strict=True)][::-1]) / 2
    shift = 2 * SHIFT * torch.randn(axes, generator=generator)
    return torch.cat([millimetres * half_edges[None] / half_edges[:, None], shift[:, None]], 1)


def _plane_rotation(axes: int, first: int, second: int, radians: float) -> Tensor:
    matrix = torch.eye(axes)
    matrix[first, first] = matrix[second, second] = math.cos(radians)
    matrix[first, second], matrix[second, first] = -math.sin(radians), math.sin(radians)
    return matrix


# ---- appearance of one channel, [*spatial] ------------------------------------------------------------------------


def _appearance(channel: Tensor, zscored: bool, generator: torch.Generator) -> Tensor:
    """Recoloured, spoilt, and normalised as it came."""
    sample = channel.flatten()[:: max(1, channel.numel() // 10_000)]
    low, high = torch.quantile(sample, torch.tensor([0.005, 0.995], device=sample.device))
    extent = high - low + 1e-6
    unit = _recoloured(((channel - low) / extent).clamp(0, 1), generator, gently=not zscored)
    spoilt = _spoilt(_standardised(unit), generator, gently=not zscored)
    if zscored:
        return _standardised(spoilt)
    return low + extent * (spoilt * unit.std() + unit.mean())


def _recoloured(unit: Tensor, generator: torch.Generator, gently: bool) -> Tensor:
    """Values in [0, 1] through a random curve; gently where intensities mean something by themselves."""
    toss = float(torch.rand(1, generator=generator))
    if gently or toss < SHARE_GAMMA:
        return unit ** float(torch.exp(GAMMA * torch.randn(1, generator=generator)))
    if toss < SHARE_GAMMA + SHARE_MONOTONE:
        rise = torch.cumsum(torch.rand(CURVE_KNOTS, generator=generator) ** 2 + 0.03, 0)
        curve = (rise - rise[0]) / (rise[-1] - rise[0])
    else:
        curve = torch.linspace(0, 1, CURVE_KNOTS) + 0.5 * torch.randn(CURVE_KNOTS, generator=generator)
    curve = curve.to(unit.device)
    place = unit * (CURVE_KNOTS - 1)
    left = place.floor().long().clamp(max=CURVE_KNOTS - 2)
    return torch.lerp(curve[left], curve[left + 1], place - left)


def _spoilt(channel: Tensor, generator: torch.Generator, gently: bool) -> Tensor:
    """Bias field, lower resolution, noise; ``channel`` has mean 0 and deviation 1."""
    mode = "bilinear" if channel.ndim == 2 else "trilinear"
    share = float(torch.rand(1, generator=generator)) * (0.3 if gently else 1)
    control = torch.randn(1, 1, *[3] * channel.ndim, generator=generator).to(channel.device)
    bias = BIAS * share * functional.interpolate(control, size=tuple(channel.shape), mode=mode, align_corners=True)
    channel = channel * torch.exp(bias[0, 0]) + bias[0, 0]
    if float(torch.rand(1, generator=generator)) < SHARE_LOW_RESOLUTION:
        factor = 0.5 + 0.4 * float(torch.rand(1, generator=generator))
        size = [max(2, round(factor * edge)) for edge in channel.shape]
        small = functional.interpolate(channel[None, None], size=size, mode=mode, align_corners=False)
        channel = functional.interpolate(small, size=tuple(channel.shape), mode=mode, align_corners=False)[0, 0]
    noise = torch.randn(channel.shape, generator=generator).to(channel.device)
    return channel + MOST_NOISE * float(torch.rand(1, generator=generator)) ** 2 * noise * (0.5 if gently else 1)


def _standardised(channel: Tensor) -> Tensor:
    return (channel - channel.mean()) / (channel.std() + 1e-6)
