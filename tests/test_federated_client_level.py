"""A whole site as the unit: one clipped release a round, charged before it is drawn, divided by an agreed number."""

import json

import numpy as np
import pytest
from federation import config, three
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunet_dp.charges import LedgerError, epsilon_of
from nnunet_dp.errors import BudgetRefusal, UsageRefusal
from nnunet_dp.federated import client_level as module
from nnunet_dp.federated.client_level import LEDGER, ClientLevelMean
from nnunet_dp.federated.coordinator import Coordinator
from nnunet_dp.federated.run_config import ClientLevel
from nnunet_dp.ledger import read_ledger
from nnunet_dp.mechanisms import NoisedSum

BOUND, SITES = 0.5, 4
NOW = {"w": np.full(10, 3.0, np.float32)}
ASKED = {"epsilon": 4.0, "delta": 1e-5, "bound": 1.0}


def mean_of(folder, rounds=1):
    return ClientLevelMean(ClientLevel(epsilon=8.0, delta=1e-5, bound=BOUND), rounds, SITES, folder, "0a")


def moved_by(*steps):
    return {f"site{k}": {"w": (NOW["w"] + step).astype(np.float32)} for k, step in enumerate(steps)}


@pytest.fixture
def sums(monkeypatch):
    """Sums before their noise, in place of the release; receipts are spent as ever."""
    seen = []

    def release(self, bounded, receipt, generator):
        receipt.spend(self.event)
        seen.append(bounded)
        return NoisedSum(bounded.tensors, bounded.l2_bound)

    monkeypatch.setattr(module.SubsampledGaussian, "release", release)
    return seen


def test_the_noise_of_a_round_is_the_calibrated_one_over_the_number_of_sites(tmp_path):
    mean, now = mean_of(tmp_path), {"w": np.zeros(20_000, np.float32)}
    spread = float(np.std(mean.next_weights(now, {}, 0)["w"]))
    expected = mean.mechanism.noise_multiplier * BOUND / SITES
    assert abs(spread / expected - 1) < 0.03  # six standard errors
    for wrong in (2 / 3, 3 / 2):
        assert abs(spread / (wrong * expected) - 1) > 0.03


@pytest.mark.parametrize("replied", [1, 2, 3, 4])
def test_the_sum_is_divided_by_the_agreed_number_and_missing_sites_count_as_zero(tmp_path, sums, replied):
    step = 0.01
    found = mean_of(tmp_path).next_weights(NOW, moved_by(*[step] * replied), 0)["w"]
    np.testing.assert_allclose(found - NOW["w"], step * replied / SITES, rtol=1e-3)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays(np.float32, 10, elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.sampled_from([0.0, 1e-30, 1e-3, 1e10]),
)
def test_one_site_moves_the_sum_by_at_most_the_bound(tmp_path_factory, sums, step, others):
    folder = tmp_path_factory.mktemp("ledger")
    with_it, without = moved_by(others, -others, step), moved_by(others, -others)
    mean, before = mean_of(folder, rounds=2), len(sums)
    mean.next_weights(NOW, with_it, 0)
    mean.next_weights(NOW, without, 1)
    one, other = (bounded.tensors[0].numpy() for bounded in sums[before:])
    assert np.linalg.norm(one - other) <= BOUND and sums[before].l2_bound == BOUND


def test_small_steps_are_not_shortened(tmp_path, sums):
    mean_of(tmp_path).next_weights(NOW, moved_by(0.1), 0)
    np.testing.assert_allclose(sums[0].tensors[0].numpy(), np.float32(3.1) - np.float64(3.0), rtol=1e-4)


def test_a_release_is_in_the_ledger_before_its_noise_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "fresh_generator", lambda device: drawn.append(len(read_ledger(tmp_path / LEDGER))))
    with pytest.raises((TypeError, AttributeError)):
        mean_of(tmp_path).next_weights(NOW, {}, 0)
    assert drawn == [1]


def test_epsilon_is_that_of_the_charges_on_the_full_batch_of_sites(tmp_path):
    mean = mean_of(tmp_path, rounds=3)
    for round in range(3):
        mean.next_weights(NOW, {}, round)
    lines = read_ledger(tmp_path / LEDGER)
    assert [(line.unit, line.sampling_probability, line.mechanism) for line in lines] == [("site", 1.0, "gaussian")] * 3
    assert mean.epsilon == epsilon_of(lines, 1e-5) and 7.9 < mean.epsilon <= 8.0
    with pytest.raises(BudgetRefusal, match="all 3 releases"):
        mean.next_weights(NOW, {}, 3)


def test_a_result_says_whose_guarantee_it_is_and_against_whom(tmp_path):
    claim = run(tmp_path).client_level
    assert claim["unit"] == "site" and 3.9 < claim["epsilon"] <= 4.0 and claim["bound"] == 1.0
    assert "per site" in claim["guarantee"] and "no amplification" in claim["guarantee"]
    assert "not against the coordinator, who is trusted" in claim["guarantee"]
    assert json.loads((tmp_path / "federated_result.json").read_text())["client_level"] == claim


def run(folder, **changes):
    return Coordinator(config(folder, client_level=ASKED | changes), three(), folder, lambda line: None, kept).run()


def kept(settings, weights, facts, steps):
    pass


def stopped_after(folder, rounds):
    """A run whose transport breaks."""
    sites = three()

    def broken(kind):
        if kind == "train" and len(sites.nodes["1"].trained) == rounds:
            raise KeyboardInterrupt

    sites.before = broken
    with pytest.raises(KeyboardInterrupt):
        Coordinator(config(folder, client_level=ASKED), sites, folder, lambda line: None, kept).run()


def test_a_release_that_a_crash_lost_stays_charged_and_costs_a_round(tmp_path):
    stopped_after(tmp_path, 1)
    mean = ClientLevelMean(ClientLevel.model_validate(ASKED), 4, 3, tmp_path, "0a")
    mean.next_weights({"w": np.zeros(3, np.float32)}, {}, 1)  # and dies before the state is written
    result = run(tmp_path)
    assert result.rounds == 3 and not result.complete and result.client_level["epsilon"] <= 4.0


def test_a_run_does_not_go_on_without_its_ledger(tmp_path):
    stopped_after(tmp_path, 2)
    (tmp_path / LEDGER).unlink()
    with pytest.raises(LedgerError, match="at least 2 charges, found 0"):
        run(tmp_path)


def test_a_run_does_not_go_on_with_another_ledger(tmp_path):
    stopped_after(tmp_path, 2)
    (tmp_path / LEDGER).unlink()
    cheaper = ClientLevelMean(ClientLevel.model_validate(ASKED | {"epsilon": 1.0}), 2, 3, tmp_path, "0a")
    for round in range(2):
        cheaper.next_weights(NOW, {}, round)
    with pytest.raises(LedgerError, match="line 2 of the ledger should be the one the checkpoint knows"):
        run(tmp_path)


def test_a_larger_budget_for_sites_is_refused_on_resume(tmp_path):
    stopped_after(tmp_path, 1)
    with pytest.raises(UsageRefusal, match="client-level budget that it began with"):
        run(tmp_path, epsilon=40.0)
