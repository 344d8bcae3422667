"""The private fingerprint: what one patient changes, what is released, and what is heard of it."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_dp.accounting import PrivacyBudget, gaussian_mu
from nnunet_dp.charges import FINGERPRINT, epsilon_of
from nnunet_dp.errors import Refusal
from nnunet_dp.fingerprint import (
    ROUNDED_TO,
    Ballot,
    as_nnunet,
    deviation_of,
    estimates,
    fewest_patients,
    is_audible,
    mechanism_for,
    release,
    statistics_for,
)
from nnunet_dp.ledger import Ledger

BALLOT = Ballot(statistics_for(3, ct_channels=(1,)))
NAMES = [statistic.name for statistic in BALLOT.statistics]
BUDGET = PrivacyBudget(epsilon=8.0, delta=1e-4)


def case(**changes):
    usual = {f"spacing_{axis}": (3.0, 0.75, 0.75)[axis] for axis in range(3)}
    usual |= {f"size_{axis}": (40.0, 400.0, 512.0)[axis] for axis in range(3)}
    window = {"low_1": -120.0, "high_1": 300.0, "mean_1": 75.0, "deviation_1": 60.0}
    return usual | {"relative_size": 1.0} | window | changes


ANYTHING = st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, st.floats()))


@settings(max_examples=200)
@given(st.lists(ANYTHING, max_size=7))
def test_a_patient_changes_the_sum_by_at_most_the_bound_whatever_the_images_hold(cases):
    votes = BALLOT.votes(cases)
    assert math.fsum(votes**2) <= len(BALLOT.statistics)
    assert votes.shape == (BALLOT.size,) and np.isfinite(votes).all() and (votes >= 0).all()


def test_the_bound_is_reached_so_no_noise_is_wasted():
    assert math.fsum(BALLOT.votes([case()]) ** 2) == len(BALLOT.statistics) == 11


def test_a_patient_with_many_cases_votes_once():
    assert np.array_equal(BALLOT.votes([case()] * 5), BALLOT.votes([case()]))
    apart = BALLOT.votes([case(size_0=10.0), case(size_0=1000.0)])
    assert sorted(set(BALLOT.split(apart)["size_0"])) == [0.0, 0.5]


def test_the_noise_is_what_the_charge_says(tmp_path):
    """Two hundred releases: their deviation is within 3 %, and noise of half or double the size would not be."""
    mechanism = mechanism_for(BUDGET, 0.1)
    ledger = Ledger(tmp_path / "privacy_ledger.jsonl", "fingerprint/0a", "0a")
    receipt = ledger.charge(mechanism.charge(FINGERPRINT, step=None, count=200))
    zero = np.zeros(BALLOT.size)
    drawn = np.array([release(BALLOT, zero, mechanism, receipt) for _ in range(200)])
    expected = mechanism.noise_multiplier * math.sqrt(11)
    assert drawn.std() == pytest.approx(expected, rel=0.03) and abs(drawn.mean()) < 4 * expected / drawn.size**0.5
    assert deviation_of(BALLOT, mechanism.noise_multiplier) == pytest.approx(expected)
    assert np.allclose(drawn / ROUNDED_TO, np.round(drawn / ROUNDED_TO), atol=1e-6)
    with pytest.raises(Refusal):
        release(BALLOT, zero, mechanism, receipt)


def test_the_price_is_the_share_of_the_budget():
    mechanism = mechanism_for(BUDGET, 0.1)
    assert 1 / mechanism.noise_multiplier == pytest.approx(math.sqrt(0.1) * gaussian_mu(BUDGET))
    ten = [mechanism.charge(FINGERPRINT, step=None)] * 10  # ten tenths of mu^2 are the whole budget
    assert epsilon_of(ten, BUDGET.delta) == pytest.approx(8.0, rel=0.01)


def _spread(generator, patients=200):
    """Patients whose images differ by a quarter, and the medians of what they hold."""
    usual = enumerate((40, 400, 512))
    factors = {f"size_{axis}": size * np.exp(generator.normal(0, 0.25, patients)) for axis, size in usual}
    values = [case(**{name: sizes[patient] for name, sizes in factors.items()}) for patient in range(patients)]
    return values, {name: float(np.median([one[name] for one in values])) for name in NAMES}


@pytest.mark.parametrize("noise_multiplier", [0.0, 1.7])
def test_medians_are_found_within_a_step_of_the_grid(noise_multiplier):
    generator = np.random.default_rng(0)
    values, medians = _spread(generator)
    votes = sum(BALLOT.votes([one]) for one in values)
    deviation = deviation_of(BALLOT, noise_multiplier)
    found = estimates(BALLOT, votes + generator.normal(0, 1, votes.shape) * deviation, 200, deviation)
    for statistic in BALLOT.statistics:
        value, wanted = found[statistic.name].quantile(0.5), medians[statistic.name]
        relative = statistic.logarithmic or statistic.name.startswith("size")
        near = abs(math.log(value / wanted)) < 0.15 if relative else abs(value - wanted) <= 60
        assert near or statistic.name == "relative_size", (statistic.name, value, wanted)
    assert found["relative_size"].shares[1] > 0.5
    assert found["spacing_1"].quantile(0.5) == found["spacing_2"].quantile(0.5)  # equal axes stay equal


@pytest.mark.parametrize("length", [12, 40, 48, 64, 96, 256, 320, 512, 1024])
@pytest.mark.parametrize("deviation", [1.0, 5.0])
def test_a_matrix_that_all_scans_have_is_planned_as_it_is(length, deviation):
    """A voxel too many, and nnU-Net rounds the patch up by a whole step."""
    noise = np.random.default_rng(length).normal(0, deviation, BALLOT.size)
    found = estimates(BALLOT, 160 * BALLOT.votes([case(size_0=float(length))]) + noise, 160, deviation)
    assert {shape[0] for shape in as_nnunet(found, 3, 2)["shapes_after_crop"][5:16]} == {length}


@pytest.mark.parametrize("deviation", [1.0, 5.0])
def test_sizes_that_all_differ_are_not_drawn_to_a_matrix(deviation):
    rng = np.random.default_rng(3)
    lengths = np.round(rng.normal(50, 6, 400))
    votes = sum(BALLOT.votes([case(size_0=length)]) for length in lengths) + rng.normal(0, deviation, BALLOT.size)
    shapes = as_nnunet(estimates(BALLOT, votes, 400, deviation), 3, 2)["shapes_after_crop"]
    assert np.median([shape[0] for shape in shapes]) == pytest.approx(np.median(lengths), abs=2)


@pytest.mark.parametrize("edge", [0.5, 0.75, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0])
def test_round_spacings_are_planned_as_they_are(edge):
    found = estimates(BALLOT, 100 * BALLOT.votes([case(spacing_0=edge)]), 100, 1.0)
    assert found["spacing_0"].quantile(0.5) == edge


def test_a_ct_window_is_that_of_all_voxels_together_not_of_the_usual_case():
    generator = np.random.default_rng(0)
    tissue = [generator.normal(middle, 40, 2000) for middle in generator.normal(130, 45, 400)]
    names = {"low_1": 0.5, "high_1": 99.5}
    values = [
        case(**{name: float(np.percentile(one, level)) for name, level in names.items()}, mean_1=float(one.mean()),
             deviation_1=float(one.std()))
        for one in tissue
    ]  # fmt: skip
    pooled = np.concatenate(tissue)
    for noise in (0.0, 1.7):
        deviation = deviation_of(BALLOT, noise)
        votes = sum(BALLOT.votes([one]) for one in values) + generator.normal(0, 1, BALLOT.size) * deviation
        window = as_nnunet(estimates(BALLOT, votes, 400, deviation), 3, 2)[
            "foreground_intensity_properties_per_channel"
        ]["1"]
        assert window["std"] == pytest.approx(pooled.std(), rel=0.1) and abs(window["mean"] - pooled.mean()) < 10
        for name, level in (("percentile_00_5", 0.5), ("percentile_99_5", 99.5)):
            assert abs(window[name] - np.percentile(pooled, level)) < 35, (noise, name)


def test_what_nnunet_reads_holds_the_medians_and_no_case():
    values, medians = _spread(np.random.default_rng(1))
    told = as_nnunet(estimates(BALLOT, sum(BALLOT.votes([one]) for one in values), 200, 0.0), 3, 2)
    assert len(told["spacings"]) == len(told["shapes_after_crop"]) == 21
    sizes = np.median(told["shapes_after_crop"], axis=0)
    assert np.allclose(np.log(sizes), np.log([medians[f"size_{axis}"] for axis in range(3)]), atol=0.12)
    assert told["median_relative_size_after_cropping"] == 1.0
    window = told["foreground_intensity_properties_per_channel"]["1"]
    assert window["percentile_00_5"] == pytest.approx(-100, abs=25)
    assert window["percentile_99_5"] == pytest.approx(300, abs=50)


def test_pictures_have_no_spacing():
    ballot = Ballot(statistics_for(2))
    assert [statistic.name for statistic in ballot.statistics] == ["size_1", "size_2", "relative_size"]
    votes = 50 * ballot.votes([{"size_1": 256.0, "size_2": 320.0, "relative_size": 1.0}])
    told = as_nnunet(estimates(ballot, votes, 50, 0.0), 2, 3)
    assert told["spacings"][0] == [999.0, 1.0, 1.0] and told["shapes_after_crop"][10][0] == 1
    assert told["shapes_after_crop"][10][1:] == pytest.approx([256, 320], rel=0.12)


def test_where_noise_drowns_everything_that_is_said_and_nothing_invented():
    votes = np.random.default_rng(2).normal(0, 30, BALLOT.size)
    with pytest.raises(Refusal, match="take public plans, which cost nothing"):
        for _ in range(20):
            estimates(BALLOT, votes, 40, 300.0)
    assert not is_audible(BALLOT, 40, 30.0) and is_audible(BALLOT, 400, 10.0)
    assert not is_audible(BALLOT, fewest_patients(BALLOT, 10.0) - 1, 10.0)
    assert is_audible(BALLOT, fewest_patients(BALLOT, 10.0), 10.0)


def test_the_core_knows_no_nnunet():
    source = Path(__import__("nnunet_dp.fingerprint", fromlist=["x"]).__file__).read_text()
    assert "nnunetv2" not in source
