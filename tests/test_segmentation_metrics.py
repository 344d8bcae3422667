"""Dice, HD95, NSD and ASSD of a pair of masks equal slow oracles and DeepMind's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion

from nnunet_dp.segmentation_metrics import Metrics, segmentation_metrics

with warnings.catch_warnings():
    # surface-distance-based-measures 0.1 has invalid escape sequences in its docstrings.
    warnings.simplefilter("ignore", SyntaxWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    import surface_distance

GRIDS = [((9, 11, 10), (2.5, 0.8, 0.8)), ((10, 8, 9), (0.7, 1.1, 1.9)), ((14, 17), (1.0, 2.0))]


def ball(shape, spacing, centre, radius_mm) -> np.ndarray:
    offsets = (np.indices(shape).T - centre) * spacing
    return (np.linalg.norm(offsets, axis=-1) <= radius_mm).T


def surface_points(mask, spacing) -> np.ndarray:
    return np.argwhere(mask & ~binary_erosion(mask)) * spacing


def oracle(reference, prediction, spacing) -> tuple[float, float, float]:
    """Dice, HD95, ASSD by all pairs of surface voxels."""
    a, b = surface_points(reference, spacing), surface_points(prediction, spacing)
    pairs = np.linalg.norm(a[:, None] - b[None], axis=-1)
    there, back = pairs.min(axis=1), pairs.min(axis=0)
    dice = 2 * (reference & prediction).sum() / (reference.sum() + prediction.sum())
    return dice, max(np.percentile(there, 95), np.percentile(back, 95)), np.concatenate([there, back]).mean()


def deepmind(reference, prediction, spacing, tolerance_mm) -> tuple[float, float, float]:
    """HD95, NSD, ASSD weighted by area."""
    with warnings.catch_warnings():
        # It calls scipy.ndimage by namespaces that scipy has renamed.
        warnings.simplefilter("ignore", DeprecationWarning)
        found = surface_distance.compute_surface_distances(reference, prediction, spacing)
    areas = found["surfel_areas_gt"].sum(), found["surfel_areas_pred"].sum()
    assd = np.average(surface_distance.compute_average_surface_distance(found), weights=areas)
    nsd = surface_distance.compute_surface_dice_at_tolerance(found, tolerance_mm)
    return surface_distance.compute_robust_hausdorff(found, 95), nsd, assd


def nasty_pairs(shape, spacing):
    """Overlapping, apart, one voxel each, at the border, full against one voxel, the whole image twice, noise."""
    near, far = (np.array(shape) // 2, np.array(shape) // 2 + 2)
    one, corner = ball(shape, spacing, near, 0.01), ball(shape, spacing, 0 * near, 0.01)
    noise = np.random.default_rng(1)
    yield ball(shape, spacing, near, 4), ball(shape, spacing, far, 4)
    yield ball(shape, spacing, 0 * near, 3), ball(shape, spacing, np.array(shape) - 1, 3)
    yield one, ball(shape, spacing, far, 0.01)
    yield np.ones(shape, bool), corner
    yield np.ones(shape, bool), np.ones(shape, bool)
    yield noise.random(shape) < 0.3, noise.random(shape) < 0.2


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_dice_hd95_and_assd_equal_the_slow_oracle(shape, spacing):
    for reference, prediction in nasty_pairs(shape, spacing):
        found = segmentation_metrics(reference, prediction, spacing, 1.01)
        assert (found.dice, found.hd95, found.assd) == pytest.approx(oracle(reference, prediction, spacing), rel=1e-5)


@pytest.mark.parametrize("tolerance_mm", [0.0, 1.01, 2.6])
@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_nsd_equals_deepminds(shape, spacing, tolerance_mm):
    for reference, prediction in nasty_pairs(shape, spacing):
        found = segmentation_metrics(reference, prediction, spacing, tolerance_mm)
        assert found.nsd == pytest.approx(deepmind(reference, prediction, spacing, tolerance_mm)[1], abs=1e-5)


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_hd95_and_assd_are_within_a_voxel_of_deepminds_on_compact_shapes(shape, spacing):
    middle, diagonal = np.array(shape) // 2, np.linalg.norm(spacing)
    for shift, radius_mm in ((0, 3), (1, 3.5), (2, 4)):
        pair = ball(shape, spacing, middle, 4), ball(shape, spacing, middle + shift, radius_mm)
        found, (hd95, _, assd) = segmentation_metrics(*pair, spacing, 1), deepmind(*pair, spacing, 1)
        assert abs(found.hd95 - hd95) <= diagonal and abs(found.assd - assd) <= diagonal / 2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.9))
def test_metrics_are_symmetric_and_perfect_for_a_mask_against_itself(seed, density):
    a, b = np.random.default_rng(seed).random((2, 6, 5, 7)) < density
    a[2, 2, 2] = b[3, 3, 3] = True
    spacing = (3.0, 0.5, 1.0)
    assert segmentation_metrics(a, a, spacing, 0) == Metrics(1, 0, 1, 0)
    forth, back = segmentation_metrics(a, b, spacing, 0.6), segmentation_metrics(b, a, spacing, 0.6)
    assert forth == pytest.approx(back, rel=1e-5)


def test_a_distance_that_equals_the_tolerance_is_within_whatever_the_rounding():
    plane, shifted = np.zeros((2, 8, 8, 8), bool)
    plane[2], shifted[5] = True, True
    for spacing_mm in (0.1, 0.3, 0.7, 1.0):
        tolerance_mm = round(3 * spacing_mm, 10)
        assert segmentation_metrics(plane, shifted, [spacing_mm] * 3, tolerance_mm).nsd == 1
        assert segmentation_metrics(plane, shifted, [spacing_mm] * 3, 0.99 * tolerance_mm).nsd < 1


def test_a_class_empty_in_both_is_nan_and_in_one_as_bad_as_the_image_is_long():
    empty, full = np.zeros((3, 4), bool), np.ones((3, 4), bool)
    assert np.isnan(segmentation_metrics(empty, empty, (2, 1), 1)).all()
    worst = Metrics(0, pytest.approx(np.hypot(6, 4)), 0, pytest.approx(np.hypot(6, 4)))
    assert segmentation_metrics(empty, full, (2, 1), 1) == segmentation_metrics(full, empty, (2, 1), 1) == worst
