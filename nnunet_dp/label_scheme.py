"""What the integers of a segmentation mean: classes, regions of several labels, the label to ignore.

===========================  ===================================================================================
where it is said             classes
===========================  ===================================================================================
dataset.json                 every label but background and ``ignore``; with regions, the regions by their names
nowhere                      the integers that the files hold, each a class, and none to ignore
===========================  ===================================================================================

>>> scheme = scheme_from({"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}}, "an example")
>>> [(one.key, one.labels) for one in scheme.classes], scheme.ignore_label
([('whole', (1, 2)), ('core', (2,))], 3)

Design note: ``morphology.classes_from`` reads the same section for painting, and needs to know the order in which
regions are painted; measuring does not, and takes a file without ``regions_class_order``. A test holds that the two
agree on what a class is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nnunet_dp.description import integers_of
from nnunet_dp.errors import UsageRefusal


@dataclass(frozen=True)
class SegmentedClass:
    """A class: a label, or a region of several.

    Attributes:
        key: in the output: the integer; in datasets with regions the name.
        name: in dataset.json; the integer where there is none.
        labels: integers that make it up.
    """

    key: str
    name: str
    labels: tuple[int, ...]


@dataclass(frozen=True)
class LabelScheme:
    """What the integers mean; ``classes`` is None where only the files can tell.

    Attributes:
        source: where it was read, for people.
        classes: in the order of dataset.json.
        ignore_label: of voxels whose truth nobody knows.
        file_ending: of the dataset's segmentations.
    """

    source: str
    classes: tuple[SegmentedClass, ...] | None = None
    ignore_label: int | None = None
    file_ending: str | None = None

    def labels_of_classes(self, segmentations: Sequence[npt.NDArray[np.integer]]) -> list[tuple[int, ...]]:
        """Labels of each class that these images may have; without a dataset.json the integers found.

        Raises:
            UsageRefusal: an image holds labels that the scheme does not know.
        """
        found: set[int] = set().union(*(np.unique(each[each != 0]).tolist() for each in segmentations))
        if self.classes is None:
            return [(label,) for label in sorted(found)]
        unknown = found - {label for one in self.classes for label in one.labels} - {self.ignore_label}
        if unknown:
            raise UsageRefusal(
                f"segmentations should hold only labels of dataset.json; found {len(unknown)} others. Name the "
                "dataset.json that they were made with: -d FILE"
            )
        return [one.labels for one in self.classes]


def find_scheme(given: Path | None, predictions: Path, reference: Path) -> LabelScheme:
    """The scheme of the first dataset.json there is.

    Args:
        given: a file that comes before all others.
        predictions: folder that may hold one.
        reference: folder that may have one beside it.

    Raises:
        UsageRefusal: the file is missing or has no labels in nnU-Net's form.
    """
    if given:
        return _read_scheme(given, "the dataset.json given by -d")
    beside = {
        "dataset.json in the predictions' folder": predictions / "dataset.json",
        "dataset.json beside the references' folder": reference.resolve().parent / "dataset.json",
    }
    for source, file in beside.items():
        if file.is_file():
            return _read_scheme(file, source)
    return LabelScheme("the integers in the files: no dataset.json (for names, regions, ignore label: -d FILE)")


def _read_scheme(file: Path, source: str) -> LabelScheme:
    try:
        return scheme_from(json.loads(file.read_text(encoding="utf-8")), source)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UsageRefusal(
            f"{file} should be nnU-Net's dataset.json, with labels such as "
            '{"background": 0, "whole": [1, 2], "core": 2}; it is not. Name another: -d FILE'
        ) from None


def scheme_from(dataset_json: Mapping[str, Any], source: str) -> LabelScheme:
    """The scheme of a ``dataset.json`` in nnU-Net's form.

    Args:
        dataset_json: its content; whatever is wrong with it raises what Python raises.
        source: where it was read, for people.
    """
    named = {name: integers_of(value) for name, value in dataset_json["labels"].items()}
    ignored = named["ignore"][0] if "ignore" in named else None
    regions = any(len(labels) > 1 for labels in named.values())
    classes = tuple(
        SegmentedClass(name if regions else str(labels[0]), name, labels)
        for name, labels in named.items()
        if name != "ignore" and set(labels) != {0}
    )
    return LabelScheme(source, classes, ignored, dataset_json.get("file_ending"))
