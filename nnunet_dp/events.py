"""Events: what a release costs, and the canonical schedule that equal releases share.

An event says what was released and nothing about the data: a Gaussian, a Laplace or a pure-epsilon release
(``PureDpEvent``), on everybody or on a Poisson draw, repeated and mixed in any order. ``canonical`` turns any mixture
into a sorted multiset of atoms, so that the order of composition never matters and equal ledgers share one computation.
Several Gaussians on *one* draw are one Gaussian; any other mixture on one draw is refused, as is every event not named.

>>> [(atom, count)] = canonical([GaussianDpEvent(2.0), GaussianDpEvent(2.0)])  # on everybody: one Gaussian
>>> round(atom.parameter, 6), count
(1.414214, 1)
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dp_accounting.dp_event import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)

from nnunet_dp.errors import Refusal, UsageRefusal

SUPPORTED = (
    "GaussianDpEvent, LaplaceDpEvent, PureDpEvent, PoissonSampledDpEvent of a Gaussian or a Laplace, "
    "SelfComposedDpEvent and ComposedDpEvent of these"
)


@dataclass(frozen=True)
class PureDpEvent(DpEvent):
    """A release that is epsilon-DP with delta 0: exponential mechanism, noisy maximum."""

    epsilon: float


class Atom(NamedTuple):
    """One kind of release: the canonical form that equal events share."""

    kind: Literal["gaussian", "laplace", "pure_dp"]
    sampling_probability: float
    parameter: float


Schedule = tuple[tuple[Atom, int], ...]


def canonical(events: Iterable[DpEvent]) -> Schedule:
    """The multiset of atoms, sorted; all full-batch Gaussians become one."""
    counts: Counter[Atom] = Counter()
    for event in events:
        for atom, count in _atoms(event):
            counts[atom] += count
    whole = {atom: count for atom, count in counts.items() if _is_gaussian_on_everybody(atom)}
    rest = [(atom, count) for atom, count in counts.items() if atom not in whole]
    if whole:
        rest.append((Atom("gaussian", 1.0, _joint_multiplier(whole.items())), 1))
    return tuple(sorted(rest))


def _atoms(event: DpEvent) -> Iterator[tuple[Atom, int]]:
    """Every release in an event with its count, or a refusal by name."""
    if isinstance(event, GaussianDpEvent):
        yield Atom("gaussian", 1.0, _positive(event.noise_multiplier)), 1
    elif isinstance(event, LaplaceDpEvent):
        yield Atom("laplace", 1.0, _positive(event.noise_multiplier)), 1
    elif isinstance(event, PureDpEvent):
        yield Atom("pure_dp", 1.0, _positive(event.epsilon)), 1
    elif isinstance(event, SelfComposedDpEvent):
        yield from ((atom, count * _natural(event.count)) for atom, count in _atoms(event.event))
    elif isinstance(event, ComposedDpEvent):
        yield from (pair for part in event.events for pair in _atoms(part))
    elif isinstance(event, PoissonSampledDpEvent):
        yield from _sampled(event)
    elif not isinstance(event, NoOpDpEvent):
        raise Refusal(f"an event should be one of {SUPPORTED}; found {type(event).__name__}: no epsilon is claimed")


def _sampled(event: PoissonSampledDpEvent) -> Iterator[tuple[Atom, int]]:
    """Releases on one Poisson draw: one Laplace, or Gaussians that count as one."""
    probability = _positive(event.sampling_probability)
    inner = list(_atoms(event.event))
    if probability > 1:
        raise UsageRefusal(f"the sampling probability should be at most 1, found {probability}")
    if probability == 1:
        yield from inner
    elif inner and all(_is_gaussian_on_everybody(atom) for atom, _ in inner):
        yield Atom("gaussian", probability, _joint_multiplier(inner)), 1
    elif [(atom.kind, atom.sampling_probability, count) for atom, count in inner] == [("laplace", 1.0, 1)]:
        yield inner[0][0]._replace(sampling_probability=probability), 1
    elif inner:
        raise Refusal(
            "one Poisson draw should meet Gaussian queries, or one Laplace query; found "
            f"PoissonSampledDpEvent of {type(event.event).__name__}; use the full batch or a separate draw "
            "for each"
        )


def on_everybody(atom: Atom) -> bool:
    """Whether the release sees all records, not a Poisson draw of them."""
    return atom.sampling_probability == 1


def _is_gaussian_on_everybody(atom: Atom) -> bool:
    return atom.kind == "gaussian" and on_everybody(atom)


def _joint_multiplier(pairs: Iterable[tuple[Atom, int]]) -> float:
    """Gaussians on the same records are one Gaussian: inverse variances add (fsum: whatever the order)."""
    return math.fsum(count / atom.parameter**2 for atom, count in pairs) ** -0.5


def _positive(value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise UsageRefusal(f"a parameter of an event should be finite and above 0, found {value}")
    return float(value)


def _natural(count: int) -> int:
    if count < 1 or count != int(count):
        raise UsageRefusal(f"the count of a composition should be a whole number from 1, found {count}")
    return int(count)
