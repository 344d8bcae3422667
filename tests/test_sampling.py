"""Poisson draws have the frequency, the independence and the emptiness that the accountant assumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from nnunet_dp.sampling import fresh_key, patch_seed, poisson_draw


def draws(units, probability, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    table = np.zeros((steps, units), dtype=bool)
    for row in table:
        row[poisson_draw(units, probability, generator)] = True
    return table


def test_each_slot_is_drawn_with_the_stated_frequency_and_not_another():
    counts = draws(50, 0.3, 2000).sum(0)
    assert stats.chisquare(counts, np.full(50, 600 * counts.sum() / (50 * 600))).pvalue > 1e-4
    assert stats.binomtest(int(counts.sum()), 100_000, 0.3).pvalue > 1e-4
    assert stats.binomtest(int(counts.sum()), 100_000, 0.31).pvalue < 1e-4  # the wrong answer is rejected


def test_batch_sizes_vary_as_a_binomial_which_shuffled_batches_do_not():
    sizes = draws(100, 0.2, 3000).sum(1)
    assert sizes.var() == pytest.approx(100 * 0.2 * 0.8, rel=0.15)
    shuffled = np.full(3000, 20)
    assert shuffled.var() != pytest.approx(100 * 0.2 * 0.8, rel=0.15)


def test_slots_are_drawn_independently_of_each_other():
    table = draws(8, 0.4, 20_000).astype(float)
    correlation = np.corrcoef(table.T) - np.eye(8)
    assert np.abs(correlation).max() < 0.04


def test_empty_draws_happen_as_often_as_they_should():
    empty = (draws(5, 0.2, 5000).sum(1) == 0).sum()
    assert stats.binomtest(int(empty), 5000, 0.8**5).pvalue > 1e-4


def test_full_batch_draws_everybody_every_time():
    assert draws(7, 1.0, 50).all()


def test_the_distribution_is_that_of_opacus():
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    sampler = UniformWithReplacementSampler(
        num_samples=100, sample_rate=0.2, generator=torch.Generator().manual_seed(5), steps=2000
    )
    theirs = [len(batch) for batch in sampler]
    assert stats.ks_2samp(theirs, draws(100, 0.2, 2000, seed=6).sum(1)).pvalue > 1e-3


@pytest.mark.parametrize(("units", "probability"), [(0, 0.5), (5, 0.0), (5, 1.5), (5, float("nan"))])
def test_a_draw_that_is_no_poisson_draw_is_refused(units, probability):
    with pytest.raises(ValueError, match="at least one slot"):
        poisson_draw(units, probability, torch.Generator())


def test_patch_seeds_differ_between_patients_steps_and_processes():
    key = fresh_key()
    seeds = {patch_seed(k, s, u) for k in (key, fresh_key()) for s in range(20) for u in range(20)}
    assert len(seeds) == 800


def test_one_patients_seed_does_not_depend_on_the_others():
    key = fresh_key()
    assert patch_seed(key, 3, 7) == patch_seed(key, 3, 7)
