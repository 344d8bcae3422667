"""What a privacy card draws: prices, epsilon over the releases, and the best attack; functions of the charges alone.

They are numbers of the card, so that its page is a function of the card: whoever renders it anywhere gets the same
bytes, and ``misdrawn`` compares the numbers with the charges.

>>> row = CardCharge(purpose="training", mechanism="gaussian", noise_multiplier=5.0, count=4)
>>> drawn = figures_of([row], [], 0.7, 1e-5)
>>> [point.releases for point in drawn.course], drawn.attack_from
([0, 1, 2, 3, 4], 'charges')

Design note: the prices of several rows do not add up to epsilon, because composition is cheaper than addition. Each is
what the row would cost by itself, which is what can be said of it without a convention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from nnunet_dp.attacker import rate_from_budget, true_positive_rates
from nnunet_dp.card import AttackPoint, Card, CardCharge, CoursePoint, Figures, SiteRow
from nnunet_dp.charges import TRAINING, Charge, epsilon_of, events_of

RATES = (0.001, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
"""False-positive rates at which the best attack is drawn."""
POINTS = 16  # of the course
TOLERANCE = 1e-3  # relative: versions of the accountant and of its libraries round differently


def figures_of(rows: Sequence[CardCharge], sites: Sequence[SiteRow], epsilon: float, delta: float) -> Figures:
    """What is drawn of a model.

    Args:
        rows: charges of a model of one dataset; none for a federated model.
        sites: of a federated model.
        epsilon: of the whole model.
        delta: of it.
    """
    listed = [(row, delta) for row in rows] + [(row, site.delta) for site in sites for row in site.charges]
    dearest = max(sites, key=lambda site: site.epsilon, default=None)  # where it only reported, nothing is drawn
    followed = (dearest.charges, dearest.delta) if dearest else (rows, delta)
    reported = any(not site.charges for site in sites) if sites else not rows
    return Figures(
        prices=[epsilon_of([row.charge], at) for row, at in listed],
        course=_course(*followed),
        attack=_attack(rows, sites, epsilon, delta),
        attack_from="epsilon and delta" if reported else "charges",
    )


def _course(rows: Sequence[CardCharge], delta: float) -> list[CoursePoint]:
    """Epsilon at evenly spaced numbers of training releases, everything else before them."""
    before = [row.charge for row in rows if row.purpose != TRAINING]
    training = [row.charge for row in rows if row.purpose == TRAINING]
    total = sum(charge.count for charge in training)
    stops = sorted({round(total * stop / POINTS) for stop in range(POINTS + 1)}) if total else []
    return [CoursePoint(releases=n, epsilon=epsilon_of([*before, *_first(training, n)], delta)) for n in stops]


def _first(charges: Sequence[Charge], releases: int) -> Iterator[Charge]:
    """The first so many releases of some charges."""
    for charge in charges:
        taken = min(charge.count, releases)
        releases -= taken
        if taken:
            yield charge.model_copy(update={"count": taken})


def _attack(
    rows: Sequence[CardCharge], sites: Sequence[SiteRow], epsilon: float, delta: float
) -> list[AttackPoint]:
    """The weakest site's, at each rate; of one dataset its own."""
    curves = [_curve(site.charges, site.epsilon, site.delta) for site in sites] or [_curve(rows, epsilon, delta)]
    worst = [max(hits) for hits in zip(*curves, strict=True)]
    pairs = zip(RATES, worst, strict=True)
    return [AttackPoint(false_positive_rate=rate, true_positive_rate=hit) for rate, hit in pairs]


def _curve(rows: Sequence[CardCharge], epsilon: float, delta: float) -> list[float]:
    if rows:
        return true_positive_rates(events_of(row.charge for row in rows), RATES)
    return [rate_from_budget(epsilon, delta, rate) for rate in RATES]


def misdrawn(card: Card) -> Iterator[str]:
    """Where a card's figures are not those of its charges."""
    try:
        real = figures_of(card.charges, card.sites, card.epsilon, card.delta)
    except Exception as error:  # numbers that no mechanism has fail anywhere in an accountant
        yield f"figures: cannot be computed from the charges ({type(error).__name__})"
        return
    told = card.figures
    if told.attack_from != real.attack_from:
        yield f"figures.attack_from should be {real.attack_from!r}"
    pairs = {
        "prices": (told.prices, real.prices),
        "course": (_numbers(told.course), _numbers(real.course)),
        "attack": (_numbers(told.attack), _numbers(real.attack)),
    }
    yield from (f"figures.{name} are not those of the charges" for name, pair in pairs.items() if not _close(*pair))


def _numbers(points: Sequence[CoursePoint | AttackPoint]) -> list[float]:
    return [number for point in points for number in point.model_dump().values()]


def _close(told: Sequence[float], real: Sequence[float]) -> bool:
    pairs = zip(told, real, strict=False)
    return len(told) == len(real) and all(math.isclose(*pair, rel_tol=TOLERANCE, abs_tol=1e-9) for pair in pairs)
