"""The metrics of every class of every case, in one folder of predictions or two.

Cases are read and measured one at a time, in as many processes as asked. Voxels that the reference ignores belong to
neither mask (a surface runs along them in both). A refusal names a case by its position, since its name is private.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.label_scheme import LabelScheme, SegmentedClass
from nnunet_dp.segmentation_metrics import NOTHING_TO_MEASURE, Mask, Metrics, segmentation_metrics
from nnunet_dp.segmentations import Spacing, read_prediction, read_segmentation
from nnunet_dp.workers import Progress, in_order


class CaseFiles(NamedTuple):
    """Files of one case.

    Attributes:
        position: says which case it is without its name, for refusals.
        reference: its reference.
        predictions: its prediction in every folder.
    """

    position: str
    reference: Path
    predictions: Sequence[Path]


@dataclass(frozen=True)
class CaseMeasurements:
    """What was measured.

    Attributes:
        classes: of the scheme; without one, those of the integers found in any case.
        values: ``[folders, cases, classes, metrics]``, NaN where both masks are empty.
        one_empty: ``[folders, cases, classes]``, whether exactly one of the masks is empty.
    """

    classes: tuple[SegmentedClass, ...]
    values: npt.NDArray[np.float64]
    one_empty: Mask


class _Measured(NamedTuple):
    """One class of one case in one folder."""

    metrics: Metrics
    one_empty: bool


_Case = Mapping[tuple[int, ...], Sequence[_Measured]]  # labels of a class -> by folder


def measure_cases(
    cases: Sequence[CaseFiles],
    scheme: LabelScheme,
    tolerance_mm: float,
    processes: int = 1,
    progress: Progress | None = None,
) -> CaseMeasurements:
    """Measure all cases.

    Args:
        cases: at least one; all of as many folders.
        scheme: what the integers mean.
        tolerance_mm: of the surface Dice.
        processes: that measure side by side; they change no number.
        progress: told (cases done, cases in all) after each case.

    Raises:
        UsageRefusal: images that cannot be read or do not fit their reference, labels that are unknown, or none.
    """
    measure = partial(_measure_case, scheme=scheme, tolerance_mm=tolerance_mm)
    measured = list(in_order(measure, cases, processes, progress, prepare=_use_one_thread))
    return _stack(measured, scheme.classes or _classes_found(measured), len(cases[0].predictions))


def _use_one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _measure_case(case: CaseFiles, scheme: LabelScheme, tolerance_mm: float) -> _Case:
    try:
        reference, spacing_mm = read_segmentation(case.reference)
        predictions = [read_prediction(file, reference, spacing_mm) for file in case.predictions]
        classes = scheme.labels_of_classes([reference, *predictions])
    except UsageRefusal as refusal:
        raise UsageRefusal(f"{case.position}: {refusal}") from None
    counted = np.True_ if scheme.ignore_label is None else reference != scheme.ignore_label
    images = (reference, *predictions)
    return {
        labels: _measure_class([np.isin(each, labels) & counted for each in images], spacing_mm, tolerance_mm)
        for labels in classes
    }


def _measure_class(masks: Sequence[Mask], spacing_mm: Spacing, tolerance_mm: float) -> list[_Measured]:
    """One class in every folder; the reference's mask comes first."""
    reference, *predictions = masks
    return [
        _Measured(
            segmentation_metrics(reference, each, spacing_mm, tolerance_mm),
            one_empty=bool(reference.any()) != bool(each.any()),
        )
        for each in predictions
    ]


def _classes_found(measured: Sequence[_Case]) -> tuple[SegmentedClass, ...]:
    labels = sorted(set().union(*measured))
    if not labels:
        raise UsageRefusal("references or predictions should hold a label besides 0; none does. Check -r and -p")
    return tuple(SegmentedClass(str(label), str(label), (label,)) for (label,) in labels)


def _stack(measured: Sequence[_Case], classes: tuple[SegmentedClass, ...], folders: int) -> CaseMeasurements:
    """A class that an image has nowhere is NaN."""
    nowhere = [_Measured(NOTHING_TO_MEASURE, False)] * folders
    table = [[case.get(one.labels, nowhere) for one in classes] for case in measured]
    values = np.array([[[cell.metrics for cell in cells] for cells in row] for row in table], dtype=np.float64)
    one_empty = np.array([[[cell.one_empty for cell in cells] for cells in row] for row in table], dtype=np.bool_)
    return CaseMeasurements(classes, np.moveaxis(values, 2, 0), np.moveaxis(one_empty, 2, 0))
