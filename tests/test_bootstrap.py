"""Intervals are over patients, paired, and as wide as they should be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_dp.bootstrap import paired_bootstrap

PATIENTS = [f"p{row}" for row in range(12)]


def draw(folders=1, cases=12, classes=2, seed=3) -> np.ndarray:
    return np.random.default_rng(seed).random((folders, cases, classes, 4))


def test_means_are_over_cases_and_then_over_classes():
    values = draw()
    mean = paired_bootstrap(values, PATIENTS, 10, 0)[0].estimate
    assert mean[:2] == pytest.approx(values[0].mean(axis=0))
    assert mean[2] == pytest.approx(values[0].mean(axis=(0, 1)))


def slow_means(values, owner, draws: int, seed: int) -> list[np.ndarray]:
    """Mean of each draw in which a case has the class: every case of a patient, as often as the patient is drawn."""
    units = np.unique(owner)
    counts = np.random.default_rng(seed).multinomial(len(units), [1 / len(units)] * len(units), draws)
    means = []
    for times in counts:
        drawn = [case for unit, often in zip(units, times, strict=True) for case in [*values[owner == unit]] * often]
        present = [case for case in drawn if not np.isnan(case[0])]
        means += [np.mean(present, axis=0)] if present else []
    return means


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.9), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_intervals_equal_a_slow_loop_over_resampled_patients(seed, missing, patients):
    generator = np.random.default_rng(seed)
    values, owner = draw(seed=seed, classes=1), generator.integers(0, patients, 12)
    values[:, generator.random(12) < missing] = np.nan
    found = paired_bootstrap(values, owner.astype(str), 40, 7)[0]
    if len(set(owner[~np.isnan(values[0, :, 0, 0])])) < 2:
        assert np.isnan([found.low, found.high]).all()
    else:
        expected = np.percentile(slow_means(values[0, :, 0], owner, 40, 7), (2.5, 97.5), axis=0)
        assert np.array([found.low[0], found.high[0]]) == pytest.approx(expected)


def test_the_same_seed_gives_the_same_interval_and_another_another():
    first, again, other = (paired_bootstrap(draw(), PATIENTS, 50, seed)[0] for seed in (1, 1, 2))
    assert (first.low == again.low).all() and (first.low != other.low).any()


def test_intervals_hold_their_means():
    for summary in paired_bootstrap(draw(folders=2), PATIENTS, 500, 0):
        assert (summary.low < summary.estimate).all() and (summary.estimate < summary.high).all()


def test_one_folder_has_nothing_to_compare():
    assert paired_bootstrap(draw(), PATIENTS, 5, 0)[1:] == (None, None)


# Comparison


def test_identical_folders_differ_by_exactly_nothing():
    difference = paired_bootstrap(np.repeat(draw(), 2, axis=0), PATIENTS, 200, 0)[2]
    for bound in (difference.estimate, difference.low, difference.high):
        assert (bound == 0).all()


def test_difference_is_that_of_the_means_and_changes_sign_with_the_folders():
    values = draw(folders=2)
    mine, other, difference = paired_bootstrap(values, PATIENTS, 200, 0)
    turned = paired_bootstrap(values[::-1], PATIENTS, 200, 0)[2]
    assert (difference.estimate == mine.estimate - other.estimate).all()
    assert (turned.estimate == -difference.estimate).all() and turned.low == pytest.approx(-difference.high)


def test_paired_interval_is_narrower_than_that_of_either_folder():
    worse = draw(cases=12)  # easy and hard cases vary much, the gain hardly
    gain = np.random.default_rng(0).uniform(0.01, 0.02, worse.shape)
    mine, _, difference = paired_bootstrap(np.concatenate([worse + gain, worse]), PATIENTS, 500, 0)
    assert (difference.low > 0).all() and (difference.high - difference.low < (mine.high - mine.low) / 10).all()


def test_intervals_cover_a_known_difference_about_as_often_as_they_say():
    generator, covered, trials = np.random.default_rng(0), 0, 150
    for trial in range(trials):
        level = generator.normal(0, 5, (1, 40, 1, 1))  # of a patient, shared by both folders
        values = level + np.array([0.3, 0.0])[:, None, None, None] + generator.normal(0, 1, (2, 40, 1, 4))
        gain = paired_bootstrap(values, [str(unit) for unit in range(40)], 300, trial)[2]
        covered += bool(gain.low[0, 0] <= 0.3 <= gain.high[0, 0])
        assert gain.high[0, 0] - gain.low[0, 0] < 2  # unpaired it would be 4 or more
    assert 0.87 <= covered / trials <= 0.99


# Patients and missing classes


def test_a_patients_cases_are_drawn_together():
    values = draw()
    found = paired_bootstrap(values, ["anna", "bert"] * 6, 500, 0)[0]
    of_patient = np.sort([values[0, start::2].mean(axis=0) for start in (0, 1)], axis=0)
    # Two patients can only be drawn as (a, a), (a, b) or (b, b): the interval ends at the patients' own means.
    assert found.low[:2] == pytest.approx(of_patient[0]) and found.high[:2] == pytest.approx(of_patient[1])


def test_patients_do_not_move_the_means():
    grouped, single = (paired_bootstrap(draw(), owner, 5, 0)[0] for owner in (["a", "b", "b"] * 4, PATIENTS))
    assert (grouped.estimate == single.estimate).all()


def test_one_patient_gets_no_interval():
    found = paired_bootstrap(draw(), ["anna"] * 12, 50, 0)[0]
    assert np.isfinite(found.estimate).all() and np.isnan([found.low, found.high]).all()


def test_a_class_that_one_patient_has_gets_no_interval_and_the_others_keep_theirs():
    values = draw()
    values[0, 2:, 1] = np.nan
    found = paired_bootstrap(values, ["anna", "anna", *PATIENTS[2:]], 50, 0)[0]
    assert np.isnan(found.low[1]).all() and np.isfinite(found.low[[0, 2]]).all()
    assert found.estimate[1] == pytest.approx(values[0, :2, 1].mean(axis=0))


def test_a_class_that_no_case_has_is_nan_and_does_not_touch_the_mean_over_classes():
    values = draw(classes=3)
    values[:, :, 1] = np.nan
    found, expected = (paired_bootstrap(each, PATIENTS, 50, 0)[0] for each in (values, values[:, :, [0, 2]]))
    assert np.isnan([found.estimate[1], found.low[1], found.high[1]]).all()
    assert (found.estimate[3] == expected.estimate[2]).all() and (found.low[3] == expected.low[2]).all()


def test_a_class_missing_in_one_folder_has_no_difference():
    values = draw(folders=2)
    values[1, :, 0] = np.nan
    difference = paired_bootstrap(values, PATIENTS, 50, 0)[2]
    assert np.isnan(difference.estimate[0]).all() and np.isfinite(difference.estimate[1]).all()
