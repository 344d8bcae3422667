"""Segmentations on disk: folders of files named by case, and images of integer labels with their spacing.

A case is a file's name without its ending; names are private, so that refusals count cases and name none. Axes of one
voxel are dropped, so that a 2D image in a 3D file has a contour. Images without physical spacing (png and the like,
tif) have 1 pixel per pixel, and their lengths are in pixels.

>>> unit_of_length(Path("a_case.nii.gz")), unit_of_length(Path("A_CASE.PNG"))
('mm', 'pixels')
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.torn_images import refuse_torn

Labels = npt.NDArray[np.integer]
Spacing = tuple[float, ...]

WITHOUT_SPACING = (".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff")
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", *WITHOUT_SPACING)
_SPACING_TOLERANCE_MM = 1e-3


def find_segmentations(
    reference: Path, predictions: Path, compare: Path | None, ending: str | None
) -> tuple[dict[str, Path], list[dict[str, Path]]]:
    """Files by case, sorted.

    Args:
        reference: folder (``-r``) that may have cases which the others lack.
        predictions: folder (``-p``).
        compare: folder (``--compare``) with exactly the same cases.
        ending: of the files; None takes the one that all folders have in common.

    Returns:
        All references; and of each other folder its cases, all the same.

    Raises:
        UsageRefusal: folders that are missing, empty, of several endings, or do not fit together.
    """
    folders = [predictions, *([compare] if compare else [])]
    ending = ending or _common_ending([reference, *folders])
    references, *found = (_segmentations(folder, ending) for folder in (reference, *folders))
    for option, cases in zip(("-p", "--compare"), found, strict=False):
        _require_references(option, cases, references, ending)
    differing = len(set(found[0]) ^ set(found[-1]))
    if differing:
        raise UsageRefusal(f"-p and --compare should hold the same cases; {differing} are in one only. Move them away")
    return references, found


def _require_references(option: str, cases: dict[str, Path], references: dict[str, Path], ending: str) -> None:
    if not cases:
        raise UsageRefusal(f"{option} should name a folder of segmentations that end in {ending}; it has none")
    surplus = len(set(cases) - set(references))
    if surplus:
        raise UsageRefusal(
            f"every case of {option} should have a reference; {surplus} of {len(cases)} have none. Move them "
            "away, or name the folder of their references: -r FOLDER"
        )


def _segmentations(folder: Path, ending: str) -> dict[str, Path]:
    return {name.removesuffix(ending): folder / name for name in _file_names(folder) if name.endswith(ending)}


def _file_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UsageRefusal(f"{folder} should be a folder of segmentations; there is no such folder")
    return sorted(file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _common_ending(folders: Sequence[Path]) -> str:
    """The one ending of images that all folders have."""
    names = [_file_names(folder) for folder in folders]
    common = [ending for ending in ENDINGS if all(any(name.endswith(ending) for name in each) for each in names)]
    if len(common) != 1:
        raise UsageRefusal(
            f"references and predictions should be images of one file ending; found {' and '.join(common) or 'none'} "
            f"in common. Name a dataset.json with a file_ending: -d FILE (known here: {' '.join(ENDINGS)})"
        )
    return common[0]


def unit_of_length(file: Path) -> str:
    """Unit of lengths in an image: mm or pixels."""
    return "pixels" if file.name.lower().endswith(WITHOUT_SPACING) else "mm"


def read_segmentation(file: Path) -> tuple[Labels, Spacing]:
    """Read an image of integer labels, without its axes of one voxel, and the spacing of its axes in their order.

    Raises:
        UsageRefusal: not an image, or a torn one, not of one channel, not 2D or 3D, or not of integers.
    """
    refuse_torn(file)
    try:
        image = sitk.ReadImage(str(file))
    except RuntimeError:  # its message holds the file's name
        raise UsageRefusal(
            "a segmentation should be an image that SimpleITK reads; this is not. Write it anew"
        ) from None
    array, spacing = sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]
    thin = tuple(axis for axis in range(len(spacing)) if array.shape[axis] == 1)[: max(len(spacing) - 2, 0)]
    kept = tuple(length for axis, length in enumerate(spacing) if axis not in thin)
    if image.GetNumberOfComponentsPerPixel() != 1 or len(kept) not in (2, 3):
        raise UsageRefusal("a segmentation should be 2D or 3D and have one channel (no colours). Write it anew")
    if unit_of_length(file) == "pixels":
        kept = (1.0,) * len(kept)
    return _require_integers(array.squeeze(thin)), kept


def _require_integers(array: npt.NDArray[Any]) -> Labels:
    if array.dtype.kind in "iu":
        return array
    if not np.isfinite(array).all() or (array != np.rint(array)).any():
        raise UsageRefusal("labels should be integers; found others. Give segmentations, not probabilities")
    return array.astype(np.int64)


def read_prediction(file: Path, reference: Labels, spacing_mm: Spacing) -> Labels:
    """Read a segmentation that lies on its reference's grid.

    Args:
        file: the prediction.
        reference: labels of the reference, ``[*spatial]``.
        spacing_mm: of its axes.

    Raises:
        UsageRefusal: as :func:`read_segmentation`, and for another shape or spacing.
    """
    array, found_mm = read_segmentation(file)
    if array.shape != reference.shape:
        raise UsageRefusal(
            f"a prediction should have its reference's shape {reference.shape}, found {array.shape}. Predict on the "
            "images that the references belong to"
        )
    if not np.allclose(found_mm, spacing_mm, rtol=0, atol=_SPACING_TOLERANCE_MM):
        raise UsageRefusal(
            "a prediction should have its reference's spacing, up to 0.001 mm; found another. Predict on the images "
            "that the references belong to, or correct the header"
        )
    return array
