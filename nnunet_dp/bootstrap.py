"""Intervals over patients: how far a mean would move had other patients been there.

Intervals are 95 % percentile bootstraps (Efron 1979): patients are drawn with replacement, all cases of one together,
and a mean is over the cases of the drawn patients. Two folders are compared on the same draws, which makes the
comparison paired; the difference is that of the printed means.

==========================================  ========================================================
edge case                                   what happens
==========================================  ========================================================
NaN                                         the case has no such class, and is left out of its mean
a draw without a class                      leaves it out of the mean over classes
a class that fewer than two patients have   gets no interval: NaN
==========================================  ========================================================

>>> values = np.array([0.5, 0.7, 0.9]).reshape(1, 3, 1, 1)
>>> mean, _, _ = paired_bootstrap(values, ["anna", "anna", "bert"], resamples=100, seed=0)
>>> [round(float(bound[0, 0]), 3) for bound in (mean.low, mean.estimate, mean.high)]
[0.6, 0.7, 0.9]
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Summary:
    """Means and their intervals, ``[classes + 1, metrics]``; the last row is the mean over classes."""

    estimate: Floats
    low: Floats
    high: Floats


def paired_bootstrap(
    values: Floats, patient_of_case: Sequence[str], resamples: int, seed: int
) -> tuple[Summary, Summary | None, Summary | None]:
    """Means over cases with their intervals over patients.

    Args:
        values: ``[folders, cases, classes, metrics]`` of one folder or two.
        patient_of_case: whose each case is.
        resamples: number of draws.
        seed: the same seed gives the same intervals.

    Returns:
        Of the first folder; of the second; of the first minus the second, on the same draws.
    """
    names, unit_of_case = np.unique(np.asarray(patient_of_case, dtype=str), return_inverse=True)
    weights = _draws(len(names), resamples, seed)[:, unit_of_case]
    means = [_means(weights, each) for each in values]
    allowed = [_enough_units(each, unit_of_case, len(names)) for each in values]
    first = _summary(means[0], allowed[0])
    if len(values) == 1:
        return first, None, None
    return first, _summary(means[1], allowed[1]), _summary(means[0] - means[1], allowed[0] & allowed[1])


def _draws(units: int, resamples: int, seed: int) -> Floats:
    """How often each unit occurs in each draw, ``[1 + resamples, units]``; the first holds each one once."""
    drawn = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)
    return np.vstack([np.ones_like(drawn[:1]), drawn]).astype(np.float64)


def _means(weights: Floats, values: Floats) -> Floats:
    """Weighted means ``[draws, classes + 1, metrics]`` over the cases that have the class, the last over classes."""
    present = ~np.isnan(values)
    totals = np.tensordot(weights, np.where(present, values, 0.0), 1)
    means = _quotient(totals, np.tensordot(weights, present.astype(np.float64), 1))
    known = ~np.isnan(means)
    over_classes = _quotient(np.where(known, means, 0.0).sum(1, keepdims=True), known.sum(1, keepdims=True))
    return np.concatenate([means, over_classes], axis=1)


def _quotient(total: Floats, count: npt.NDArray[Any]) -> Floats:
    """Nothing divided by nothing is NaN."""
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _enough_units(values: Floats, unit_of_case: npt.NDArray[np.intp], units: int) -> npt.NDArray[np.bool_]:
    """Which classes, and whether their mean, at least two units have: ``[classes + 1, 1]``."""
    present = ~np.isnan(values[..., 0])
    has = np.zeros((units, present.shape[1]), dtype=np.bool_)
    np.logical_or.at(has, unit_of_case, present)
    return (np.column_stack([has, has.any(axis=1)]).sum(axis=0) >= 2)[:, None]


def _summary(draws: Floats, allowed: npt.NDArray[np.bool_]) -> Summary:
    """The first draw is the estimate; percentiles of the others are the interval."""
    with warnings.catch_warnings():
        # A class that no case has is NaN in every draw, and so is its interval.
        warnings.filterwarnings("ignore", message="All-NaN slice encountered", category=RuntimeWarning)
        low, high = np.nanpercentile(draws[1:], _PERCENTILES, axis=0)
    return Summary(draws[0], np.where(allowed, low, np.nan), np.where(allowed, high, np.nan))
