"""Segmentations on disk, read and written the way nnU-Net does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    recursive_find_reader_writer_by_name,
)

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.torn_images import refuse_torn


def as_labels(segmentation: np.ndarray) -> np.ndarray:
    """Labels as whole numbers; nnU-Net's readers give them as float32.

    Raises:
        UsageRefusal: for values that are no labels.
    """
    if np.issubdtype(segmentation.dtype, np.integer):
        return segmentation
    with np.errstate(invalid="ignore"):
        labels = segmentation.astype(np.int16)
    if not np.array_equal(labels, segmentation):
        raise UsageRefusal("a segmentation should hold whole numbers below 32768, found other values: is it an image?")
    return labels


class SegmentationFiles:
    """Reads and writes label maps the way nnU-Net does, with the reader of the dataset.

    Args:
        dataset_json: of the dataset, for the file ending.
        plans: name the reader; without them it is found from the file ending.
    """

    def __init__(self, dataset_json: Mapping[str, Any], plans: Mapping[str, Any] | None = None) -> None:
        self.file_ending = dataset_json["file_ending"]
        name = (plans or {}).get("image_reader_writer") or dataset_json.get("overwrite_image_reader_writer")
        found = recursive_find_reader_writer_by_name(name) if name else None
        self._io = (found or determine_reader_writer_from_dataset_json(dict(dataset_json), verbose=False))()

    def read(self, file: Path) -> tuple[np.ndarray, tuple[float, ...], dict[str, Any]]:
        """Labels [*spatial], spacing in millimetres and what ``write`` needs to know.

        Raises:
            UsageRefusal: for a torn file, and for values that are no labels.
        """
        refuse_torn(file)
        segmentation, properties = self._io.read_seg(str(file))
        return as_labels(segmentation[0]), tuple(float(edge) for edge in properties["spacing"]), properties

    def write(self, segmentation: np.ndarray, file: Path, properties: dict[str, Any]) -> None:
        """Write labels [*spatial] with the geometry they were read with."""
        self._io.write_seg(segmentation, str(file), properties)


