"""How well one mask meets another: Dice, HD95, NSD and ASSD of a class in an image.

======  ==============================================================================  ====================
metric  what it is                                                                      computed by
======  ==============================================================================  ====================
dice    twice the overlap over the sum of both volumes                                  numpy
hd95    larger one of the two directed 95th percentiles of surface distances            MONAI, surface voxels
nsd     share of both surfaces within the tolerance of the other (surface area)         MONAI, surface elements
assd    mean of all surface distances, both directions together                         MONAI, surface voxels
======  ==============================================================================  ====================

NSD is that of Nikolov et al., arXiv:1809.04430, and equals DeepMind's ``surface_distance``. HD95 and ASSD count every
surface voxel alike, where DeepMind weights by area: theirs differ from ours by less than a voxel's diagonal on compact
shapes (tests). A mask that touches the image's border has a surface there.

==============================  ======================================================================================
a class that is empty           counts as
==============================  ======================================================================================
in both masks                   nothing: NaN, to be left out of every mean, as nnU-Net does
in one of the two               Dice 0, NSD 0, HD95 and ASSD the image's diagonal (so an emptied class is punished)
==============================  ======================================================================================

>>> import numpy as np
>>> reference, prediction = np.zeros((2, 8, 8), bool)
>>> reference[2:6, 2:6] = prediction[2:6, 3:7] = True
>>> segmentation_metrics(reference, prediction, spacing_mm=(1.0, 0.5), tolerance_mm=0.6)
Metrics(dice=0.75, hd95=0.5, nsd=1.0, assd=0.25)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


class Metrics(NamedTuple):
    """Metrics of one class in one image; lengths in the unit of the spacing."""

    dice: float
    hd95: float
    nsd: float
    assd: float


NOTHING_TO_MEASURE = Metrics(*[float("nan")] * 4)
"""Metrics of a class that neither mask has."""


def segmentation_metrics(
    reference: Mask, prediction: Mask, spacing_mm: Sequence[float], tolerance_mm: float
) -> Metrics:
    """Metrics of one class in one image, by the conventions of the module.

    Args:
        reference: ``[*spatial]``, 2D or 3D.
        prediction: of the same shape.
        spacing_mm: of each axis, in the order of the array's axes.
        tolerance_mm: of the surface Dice; a distance that equals it is within.
    """
    volumes = np.count_nonzero(reference), np.count_nonzero(prediction)
    if not any(volumes):
        return NOTHING_TO_MEASURE
    if not all(volumes):
        diagonal = float(np.linalg.norm(np.multiply(reference.shape, spacing_mm)))
        return Metrics(0.0, diagonal, 0.0, diagonal)
    dice = float(2 * np.count_nonzero(reference & prediction) / sum(volumes))
    return Metrics(dice, *_surface_metrics(*_cropped(reference, prediction), spacing_mm, tolerance_mm))


def _cropped(reference: Mask, prediction: Mask) -> tuple[Mask, Mask]:
    """Both masks in their common bounding box, with one voxel of background around it."""
    either = reference | prediction
    axes = range(either.ndim)
    occupied = [np.flatnonzero(either.any(axis=tuple(other for other in axes if other != axis))) for axis in axes]
    box = tuple(slice(where[0], where[-1] + 1) for where in occupied)
    return np.pad(reference[box], 1), np.pad(prediction[box], 1)


def _surface_metrics(
    reference: Mask, prediction: Mask, spacing_mm: Sequence[float], tolerance_mm: float
) -> tuple[float, float, float]:
    """HD95, NSD, ASSD of two masks that are not empty; imported here because MONAI takes seconds to import."""
    import torch
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice
    from monai.metrics.surface_distance import compute_average_surface_distance

    pair = [torch.from_numpy(mask)[None, None] for mask in (prediction, reference)]
    spacing = [float(length) for length in spacing_mm]
    with warnings.catch_warnings():
        # MONAI 1.6 hands itself the argument that it deprecates.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        # Without include_background MONAI drops the first channel, and ours is the only one.
        hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
        nsd = compute_surface_dice(
            *pair, class_thresholds=[tolerance_mm], include_background=True, spacing=spacing, use_subvoxels=True
        )
        assd = compute_average_surface_distance(*pair, include_background=True, symmetric=True, spacing=spacing)
    return float(hd95), float(nsd), float(assd)
