"""The private fingerprint: what nnU-Net has to know of the images to plan for them, as noised votes on public grids.

nnU-Net's own fingerprint lists spacing and shape of every case and pools the intensities of all. Its planner needs
little of that: medians (and one tenth percentile) of spacing and size along each axis, whether cropping shrinks the
images, and for CT an intensity window. Each of these is a *statistic*: every patient votes for one point of a public
grid, the votes are added and released once, with Gaussian noise, and quantiles are read off the noised histogram.

>>> ballot = Ballot(statistics_for(dimensions=3))
>>> [statistic.name for statistic in ballot.statistics]
['spacing_0', 'spacing_1', 'spacing_2', 'size_0', 'size_1', 'size_2', 'relative_size']
>>> one = ballot.votes([{"spacing_0": 1.0, "spacing_1": 1.0, "spacing_2": 1.0, "relative_size": 1.0,
...                      "size_0": 35.0, "size_1": 50.0, "size_2": 36.0}])
>>> float((one ** 2).sum()), round(ballot.l2_bound ** 2, 9)
(7.0, 7.0)
>>> found = estimates(ballot, votes=100 * one, patients=100, deviation=1.0)
>>> [round(found[name].quantile(0.5), 2) for name in ("spacing_1", "size_1")]
[1.0, 50.0]

Sites of a federated run release each their own; the sum of their votes is the federation's.

Formal guarantee:
    With the slot of one patient zeroed, the sum of the votes changes by at most ``Ballot.l2_bound`` in L2 norm over all
    statistics together, whatever the images hold: a patient's vote on a statistic is a histogram over its cases that
    sums to at most 1. Which statistics are asked is a function of public facts. Everything after the release is
    post-processing.

Design note: votes and no clamped means: a mean's noise is a share of the whole range (a factor of 40 in spacing), a
vote's is a share of the number of patients. Both carry a threshold: bins that pure noise would fill are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nnunet_dp.accounting import PrivacyBudget, gaussian_mu
from nnunet_dp.errors import Refusal
from nnunet_dp.ledger import Receipt
from nnunet_dp.mechanisms import ClippedSum, SubsampledGaussian, fresh_generator

SHARE = 0.1  # of mu^2: five percent more noise on the training
ROUNDED_TO = 1e-3  # what is released, so that nothing hides in the last digits
AUDIBLE_SHARE = 0.25  # of the patients in one bin should be told from noise
_CASES = 21  # pseudo cases that carry the quantiles to nnU-Net's planner
_TAIL = 0.1  # of the cases reach beyond the pooled 0.5 % and 99.5 % of CT intensities
_ATOM = 0.5  # of the patients at one point: a value that all scans are made with, and no distribution
_SHRUNK = 0.75  # nnU-Net's own threshold of the relative size

Values = Mapping[str, float]
"""Of one case, by the statistic's name."""


def _powers(per_decade: int, least: int, most: int) -> tuple[float, ...]:
    return tuple(10 ** (power / per_decade) for power in range(least, most + 1))


_ROUND = (
    1, 1.1, 1.25, 1.4, 1.5, 1.6, 1.8, 2, 2.2, 2.5, 2.75, 3, 3.3, 3.6, 4, 4.5, 5, 5.5, 6, 6.75, 7.5, 8, 9,
)  # fmt: skip
"""Numbers that scanners are set to, at most a factor of 1.14 apart."""
SPACINGS_MM = tuple(round(number * 10.0**power, 4) for power in (-2, -1, 0, 1) for number in _ROUND if
                    0.05 <= number * 10.0**power <= 18)  # fmt: skip
SIZES = (*range(4, 32), *(2**octave * (16 + step) // 16 for octave in range(5, 11) for step in range(16)), 2048)
"""Voxels along an axis, in steps of at most 7 %: matrices of scanners (48, 96, 320, 512, ...) are among them."""
LOW_HU = tuple(np.arange(-1000.0, 501.0, 50.0))
HIGH_HU = tuple(np.arange(-500.0, 2501.0, 50.0))
MEAN_HU = tuple(np.arange(-900.0, 1201.0, 50.0))
DEVIATION_HU = _powers(8, 6, 24)  # 5.6 to 1000


@dataclass(frozen=True)
class Statistic:
    """One question and the grid that its answer lies on.

    Attributes:
        name: of the value in a case's measurements.
        grid: public points, rising.
        logarithmic: whether steps of the grid are factors.
        exact: whether estimates are points of the grid; else they are interpolated.
        single: whether only the points around the loudest count: distributions whose tails are read.
        downwards: whether a value between two points votes for the lower one, not for the nearest; a point that most
            patients have is then read as it is.
        widths: numbers of neighbouring points that are heard together.
    """

    name: str
    grid: tuple[float, ...]
    logarithmic: bool = False
    exact: bool = False
    single: bool = False
    downwards: bool = False
    widths: tuple[int, ...] = (1, 3)

    def vote(self, value: float) -> np.ndarray:
        """One at the nearest point [points]; nothing for a value that is no number."""
        votes = np.zeros(len(self.grid))
        place = self._place(value)
        if not math.isnan(place):
            below = np.searchsorted(self._places(), place, "right") - 1
            votes[max(0, int(below)) if self.downwards else int(np.abs(self._places() - place).argmin())] = 1
        return votes

    def value_at(self, place: float) -> float:
        """The value at a place on the grid, of which point i takes [i, i + 1], upwards from it or around it."""
        if self.exact:
            return self.grid[min(int(place), len(self.grid) - 1)]
        positions = np.arange(len(self.grid)) + (0.0 if self.downwards else 0.5)
        found = float(np.interp(place, positions, self._places()))
        return math.exp(found) if self.logarithmic else found

    def _places(self) -> np.ndarray:
        return np.log(self.grid) if self.logarithmic else np.asarray(self.grid)

    def _place(self, value: float) -> float:
        if not self.logarithmic:
            return float(value)
        return math.log(value) if value > 0 else math.nan


def statistics_for(dimensions: int, ct_channels: Sequence[int] = ()) -> tuple[Statistic, ...]:
    """What is asked about a dataset, by public facts.

    Args:
        dimensions: axes of the images; pictures have no spacing.
        ct_channels: channels whose intensities nnU-Net clips to a window of the whole dataset.
    """
    axes, edges = ((0, 1, 2), (0, 1, 2)) if dimensions == 3 else ((1, 2), ())
    spacings = [Statistic(f"spacing_{axis}", SPACINGS_MM, logarithmic=True, exact=True) for axis in edges]
    sizes = [Statistic(f"size_{axis}", SIZES, downwards=True, widths=(1, 3, 9)) for axis in axes]
    windows = [
        statistic
        for channel in ct_channels
        for statistic in (
            Statistic(f"low_{channel}", LOW_HU, single=True),
            Statistic(f"high_{channel}", HIGH_HU, single=True),
            Statistic(f"mean_{channel}", MEAN_HU, single=True),
            Statistic(f"deviation_{channel}", DEVIATION_HU, logarithmic=True, single=True),
        )
    ]
    return (*spacings, *sizes, Statistic("relative_size", (0.5, 1.0)), *windows)


@dataclass(frozen=True)
class Ballot:
    """What every patient is asked."""

    statistics: tuple[Statistic, ...]

    @property
    def l2_bound(self) -> float:
        """What one patient changes at most, over all statistics."""
        return math.sqrt(len(self.statistics))

    @property
    def size(self) -> int:
        """Numbers that are released."""
        return sum(len(statistic.grid) for statistic in self.statistics)

    def votes(self, cases: Sequence[Values]) -> np.ndarray:
        """One patient's votes [size], the mean over its cases.

        Args:
            cases: measurements of all its cases; a missing one is no vote.
        """
        one_by_one = [self._votes(case) for case in cases]
        return np.sum(one_by_one, 0) / len(one_by_one) if one_by_one else np.zeros(self.size)

    def _votes(self, case: Values) -> np.ndarray:
        return np.concatenate([statistic.vote(case.get(statistic.name, math.nan)) for statistic in self.statistics])

    def split(self, votes: np.ndarray) -> dict[str, np.ndarray]:
        """The histogram of each statistic [points], by name."""
        ends = np.cumsum([len(statistic.grid) for statistic in self.statistics])
        parts = np.split(votes, ends[:-1])
        return {statistic.name: part for statistic, part in zip(self.statistics, parts, strict=True)}


# ---- the release -------------------------------------------------------------------------------------------------


def mechanism_for(budget: PrivacyBudget, share: float) -> SubsampledGaussian:
    """The Gaussian that a share of mu^2 buys: multiplier 1 / (sqrt(share) mu)."""
    return SubsampledGaussian(1 / (math.sqrt(share) * gaussian_mu(budget)))


def release(ballot: Ballot, votes: np.ndarray, mechanism: SubsampledGaussian, receipt: Receipt) -> np.ndarray:
    """The noised sum of all patients' votes [size], float64, rounded.

    Args:
        ballot: that was voted on.
        votes: sum over all patients; private.
        mechanism: full batch.
        receipt: of a charge for it.
    """
    bounded = ClippedSum((torch.from_numpy(np.asarray(votes, np.float64)),), ballot.l2_bound)
    noised = mechanism.release(bounded, receipt, fresh_generator("cpu")).tensors[0].numpy()
    return np.round(noised / ROUNDED_TO) * ROUNDED_TO


def deviation_of(ballot: Ballot, noise_multiplier: float, sites: int = 1) -> float:
    """Standard deviation of each released number, in patients, after adding so many sites."""
    return noise_multiplier * ballot.l2_bound * math.sqrt(sites)


def is_audible(ballot: Ballot, patients: int, deviation: float) -> bool:
    """Whether a quarter of the patients in one bin can be told from noise: else public plans are the better choice."""
    return AUDIBLE_SHARE * patients >= max(_threshold(statistic, deviation) for statistic in ballot.statistics)


def fewest_patients(ballot: Ballot, deviation: float) -> int:
    """Patients from which the statistics are audible at that noise."""
    return math.ceil(max(_threshold(statistic, deviation) for statistic in ballot.statistics) / AUDIBLE_SHARE)


def _threshold(statistic: Statistic, deviation: float) -> float:
    """What the largest of as many pure noises stays below, about."""
    return deviation * math.sqrt(2 * math.log(max(2, len(statistic.grid))))


# ---- reading it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A distribution on a statistic's grid, as far as it could be heard.

    Attributes:
        statistic: whose.
        shares: of the patients at each point, summing to 1.
    """

    statistic: Statistic
    shares: np.ndarray

    @property
    def mean(self) -> float:
        """Over the patients."""
        return float(self.shares @ np.asarray(self.statistic.grid))

    @property
    def mean_square(self) -> float:
        """Of the values, over the patients."""
        return float(self.shares @ np.square(self.statistic.grid))

    def quantile(self, level: float) -> float:
        """The value below which that share of the patients lies."""
        edges = np.concatenate([[0.0], np.cumsum(self.shares)])
        place = float(np.interp(level, edges, np.arange(len(edges)), left=0.0))
        if self.statistic.downwards and self.shares[min(int(place), len(self.shares) - 1)] >= _ATOM:
            place = math.floor(place)
        return self.statistic.value_at(place)


def estimates(ballot: Ballot, votes: np.ndarray, patients: int, deviation: float) -> dict[str, Estimate]:
    """The distributions behind noised votes, by name.

    Args:
        ballot: that was voted on.
        votes: released, added over sites [size].
        patients: that voted, about; public.
        deviation: of the noise on each number.

    Raises:
        Refusal: where a statistic drowned.
    """
    found = {}
    for statistic, (name, histogram) in zip(ballot.statistics, ballot.split(votes).items(), strict=True):
        heard = _heard(statistic, histogram, _threshold(statistic, deviation))
        if heard.sum() <= 0:
            raise Refusal(
                f"the fingerprint should be heard above its noise, found nothing of {name} with {patients} patients: "
                "take public plans, which cost nothing, or a larger epsilon"
            )
        found[name] = Estimate(statistic, heard / heard.sum())
    return found


def _heard(statistic: Statistic, histogram: np.ndarray, threshold: float) -> np.ndarray:
    """Counts of the points that, alone or with their neighbours, stand above the noise."""
    widths = [width for width in statistic.widths if width <= len(histogram)]
    around = {width: np.convolve(histogram, np.ones(width), "same") for width in widths}
    loud = np.any([around[width] > threshold * math.sqrt(width) for width in widths], axis=0)
    if not loud.any():
        return np.zeros_like(histogram)
    if statistic.single:
        runs = np.cumsum(~loud)  # loud neighbours have as many quiet points before them
        loud = loud & (runs == runs[np.where(loud, around[widths[-1]], -np.inf).argmax()])
    return np.where(loud, np.maximum(histogram, 0), 0)


def as_nnunet(found: Mapping[str, Estimate], dimensions: int, channels: int) -> dict[str, object]:
    """nnU-Net's ``dataset_fingerprint.json``, of pseudo cases that carry the quantiles; no case of anybody's is in it.

    Args:
        found: by statistic.
        dimensions: axes of the images.
        channels: image channels; those without a window get numbers that nnU-Net does not use.
    """
    levels = [(case + 0.5) / _CASES for case in range(_CASES)]
    picture = dimensions == 2
    spacings = [
        [999.0, 1.0, 1.0] if picture else [found[f"spacing_{axis}"].quantile(level) for axis in range(3)]
        for level in levels
    ]
    shapes = [
        [1 if picture and axis == 0 else int(found[f"size_{axis}"].quantile(level)) for axis in range(3)]
        for level in levels
    ]
    relative = found["relative_size"].shares
    return {
        "spacings": spacings,
        "shapes_after_crop": shapes,
        "foreground_intensity_properties_per_channel": {
            str(channel): _window(found, channel) for channel in range(channels)
        },
        "median_relative_size_after_cropping": 1.0 if relative[-1] >= 0.5 else _SHRUNK - 0.25,
    }


def _window(found: Mapping[str, Estimate], channel: int) -> dict[str, float]:
    """nnU-Net's intensity properties; of CT what ``CTNormalization`` reads, which is not min, max and median.

    nnU-Net pools the voxels of all cases. The pooled variance is that within cases and that between their means; the
    pooled extreme percentiles lie where a tenth of the cases have theirs.
    """
    if f"low_{channel}" not in found:
        low, high, mean, deviation = 0.0, 1.0, 0.5, 1.0
    else:
        lows, highs, means, deviations = (found[f"{name}_{channel}"] for name in ("low", "high", "mean", "deviation"))
        mean, between = means.mean, means.mean_square - means.mean**2
        deviation = math.sqrt(deviations.mean_square + max(0.0, between))
        low = lows.quantile(_TAIL)
        high = max(highs.quantile(1 - _TAIL), low + deviation)
    return {
        "mean": mean, "median": mean, "std": deviation, "min": low, "max": high, "percentile_00_5": low,
        "percentile_99_5": high,
    }  # fmt: skip
