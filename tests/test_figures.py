"""What a card draws are functions of its charges: bounds hold, and other numbers are found."""

from __future__ import annotations

import math

import pytest
from cards import DELTA, federated_card, one_dataset_card
from scipy.stats import norm

from nnunet_dp.attacker import rate_from_budget, true_positive_rate, true_positive_rates
from nnunet_dp.card import Card, CardCharge, miscounted
from nnunet_dp.charges import epsilon_of, events_of
from nnunet_dp.figures import RATES, figures_of, misdrawn


def test_the_course_ends_at_the_claim_and_never_falls():
    card = one_dataset_card()
    course = [(point.releases, point.epsilon) for point in card.figures.course]
    assert course == sorted(course) and course[0][0] == 0 and course[-1][0] == 60
    assert course[-1][1] == pytest.approx(card.epsilon)
    before = [row.charge for row in card.charges if row.purpose != "training"]
    assert course[0][1] == pytest.approx(epsilon_of(before, DELTA))


def test_a_price_is_what_its_row_costs_alone():
    card = one_dataset_card()
    assert card.figures.prices == [epsilon_of([row.charge], DELTA) for row in card.charges]
    assert max(card.figures.prices) < card.epsilon < sum(card.figures.prices)


def test_the_best_attack_on_gaussians_is_the_known_curve():
    rows = [CardCharge(purpose="training", mechanism="gaussian", noise_multiplier=5.0, count=25)]
    drawn = figures_of(rows, [], epsilon_of([row.charge for row in rows], DELTA), DELTA)
    for point in drawn.attack:
        exact = norm.cdf(norm.ppf(point.false_positive_rate) + 1.0)
        assert exact - 1e-9 <= point.true_positive_rate <= 1.006 * exact


def test_several_rates_at_once_are_those_one_by_one():
    events = events_of(row.charge for row in one_dataset_card().charges)
    assert true_positive_rates(events, [0.01, 0.3]) == [true_positive_rate(events, rate) for rate in (0.01, 0.3)]


def test_a_federated_model_is_as_weak_as_its_weakest_site():
    card = federated_card(3)
    weakest = card.sites[0]
    assert weakest.epsilon == card.epsilon
    alone = true_positive_rates(events_of(row.charge for row in weakest.charges), RATES)
    assert [point.true_positive_rate for point in card.figures.attack] == alone
    assert card.figures.attack_from == "charges" and card.figures.course[-1].epsilon == pytest.approx(card.epsilon)


def test_a_site_that_only_reported_is_bounded_by_its_epsilon():
    card = federated_card(2, reported=2)
    expected = [rate_from_budget(card.epsilon, DELTA, rate) for rate in RATES]
    assert [point.true_positive_rate for point in card.figures.attack] == expected
    assert (card.figures.attack_from, card.figures.course, card.figures.prices) == ("epsilon and delta", [], [])


@pytest.mark.parametrize("make", [one_dataset_card, federated_card, lambda: federated_card(3, reported=1)])
def test_a_true_card_has_no_fault(make):
    card = Card.model_validate_json(make().content)
    assert not [*misdrawn(card), *miscounted(card)]


def test_more_thresholds_than_releases_are_found():
    card = federated_card(2)
    sites = [row.model_copy(update={"thresholds": [0.5] * 21}) for row in card.sites]
    faults = list(miscounted(card.model_copy(update={"sites": sites})))
    assert faults == [f"site {number}: 21 thresholds, more than its charges released" for number in (1, 2)]


def test_rounding_of_another_version_is_no_fault_and_a_percent_is():
    card = one_dataset_card()

    def scaled(factor: float) -> list[str]:
        prices = [price * factor for price in card.figures.prices]
        return list(misdrawn(card.model_copy(update={"figures": card.figures.model_copy(update={"prices": prices})})))

    assert not scaled(1 + 1e-5) and scaled(0.99) == ["figures.prices are not those of the charges"]
    assert not math.isclose(card.figures.prices[0], 0.99 * card.figures.prices[0])
