"""A patient whose data cannot be used brings an empty record, as if it were not there.

>>> def broken(cases):
...     raise OSError("no such file")
>>> with warnings.catch_warnings():
...     warnings.simplefilter("ignore")
...     data, target = EmptyWhereUnusable(broken, (1, 1, 4, 4), ((1, 1, 4, 4),), None)(("case",))
>>> bool(np.isnan(data).all()), target.shape
(True, (1, 1, 4, 4))

An error that reaches the outside says something about the one patient who caused it, without any noise. Where others
see whether a step succeeded (a federated site's reply), what cannot be read, or has labels that do not exist, becomes
a record whose gradient is not a number: the engines count it as nothing. The trainers read every case before the first
charge (``nnunet_cases``) and do the same with one that breaks later.

Formal guarantee:
    Whether a step fails does not depend on whether a patient's files can be read, nor on the values in them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np

from nnunet_dp.errors import Refusal

Source = Callable[[tuple[str, ...]], tuple[np.ndarray, Any]]


def target_shapes(
    patches: int, channels: int, patch: Iterable[int], scales: Iterable[Iterable[float]] | None
) -> tuple[tuple[int, ...], ...]:
    """Shapes [patches, channels, *spatial] of nnU-Net's targets, one for each resolution of deep supervision.

    >>> target_shapes(2, 1, (40, 56), [[1.0, 1.0], [0.5, 0.5]])
    ((2, 1, 40, 56), (2, 1, 20, 28))
    """
    patch = tuple(patch)
    known = [[1.0] * len(patch)] if scales is None else [list(scale) for scale in scales]
    return tuple((patches, channels, *np.round(np.multiply(patch, scale)).astype(int).tolist()) for scale in known)


class EmptyWhereUnusable:
    """A source of patches that never fails.

    Args:
        source: a patient's cases -> images and targets.
        data_shape: [patches, channels, *spatial] of its images.
        target_shapes: of its targets, one for each resolution.
        labels: that targets may hold; None for anything (regions are 0 and 1 by construction).
    """

    def __init__(
        self,
        source: Source,
        data_shape: tuple[int, ...],
        target_shapes: tuple[tuple[int, ...], ...],
        labels: Collection[int] | None,
    ) -> None:
        self._source, self._data_shape, self._target_shapes = source, data_shape, target_shapes
        self._labels = None if labels is None else sorted(labels)

    def __call__(self, cases: tuple[str, ...]) -> tuple[np.ndarray, Any]:
        """Images and targets; no number in the images where they cannot be used."""
        try:
            data, target = self._source(cases)
            if self._usable(data, target):
                return data, target
            reason = "labels or shapes that do not exist"
        except Exception as error:  # whatever a reader raises, it is this patient's
            reason = type(error).__name__
        warnings.warn(f"a training case cannot be used and counts as nothing ({reason})", stacklevel=2)
        empty = [np.zeros(shape, np.float32) for shape in self._target_shapes]
        return np.full(self._data_shape, np.nan, np.float32), empty if len(empty) > 1 else empty[0]

    def refuse_fault(self, cases: tuple[str, ...]) -> None:
        """Try one patient before anything is charged, so that no wrong expectation makes all of them count as nothing.

        Raises:
            Refusal: when the images or targets are not of the shapes and labels expected, or cannot be read.
        """
        data, _ = self(cases)
        if np.isnan(data).all():
            raise Refusal(
                "patches should have the shapes and labels that plans and dataset.json say, found others in the first "
                "patient tried: type nnunet-dp doctor -d DATASET -c CONFIGURATION"
            )

    def _usable(self, data: np.ndarray, target: Any) -> bool:
        targets = target if isinstance(target, list) else [target]
        shapes = tuple(tuple(one.shape) for one in targets)
        if tuple(data.shape) != self._data_shape or shapes != self._target_shapes:
            return False
        return self._labels is None or all(bool(np.isin(one, self._labels).all()) for one in targets)
