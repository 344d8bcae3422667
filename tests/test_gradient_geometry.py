"""Lengths and angles from inner products, against the vectors themselves; planted agreement is found, and its lack."""

import math

import numpy as np
import pytest
import torch

from nnunet_dp.clipping import RULE_NAMES, make_rule
from nnunet_dp.gradient_geometry import GradientGeometry

NAMES = ["a.weight", "a.bias", "b.0.weight", "c.weight"]
SHAPES = [(3, 4), (3,), (2, 2, 2), (5,)]


def gradients(patients: int = 7, seed: int = 0) -> list[list[torch.Tensor]]:
    """Of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) * 3.0**p for shape in SHAPES] for p in range(patients)]


def flat(gradient: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([tensor.reshape(-1) for tensor in gradient]).double().numpy()


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.fixture
def batch() -> tuple[np.ndarray, GradientGeometry]:
    found = gradients()
    return np.stack([flat(gradient) for gradient in found]), GradientGeometry.of(NAMES, found, [0.1] * len(found))


def test_layers_are_modules(batch):
    assert batch[1].layers == (("a", 15), ("b.0", 8), ("c", 5))


def test_norms_and_cosines_with_the_others_are_those_of_the_vectors(batch):
    vectors, geometry = batch
    assert geometry.norms == pytest.approx(np.linalg.norm(vectors, axis=1))
    others = [cosine(v, np.delete(vectors, k, 0).sum(0)) for k, v in enumerate(vectors)]
    assert geometry.cosines == pytest.approx(others)
    assert geometry.signal == pytest.approx(np.linalg.norm(vectors.sum(0)) / np.linalg.norm(vectors, axis=1).sum())


@pytest.mark.parametrize("name", RULE_NAMES)
def test_a_rule_makes_of_the_batch_what_it_makes_of_the_vectors(name, batch):
    vectors, geometry = batch
    rule = make_rule(name, {}) if name == "nsgd" else make_rule(name, {"bound": 1.0})
    parts = np.split(vectors, [15, 23], axis=1)
    clipped = np.zeros_like(vectors)
    for k in range(len(vectors)):
        norms = [np.linalg.norm(part[k]) for part in parts] if name == "per_layer" else [np.linalg.norm(vectors[k])]
        factors = rule.factors(torch.tensor(norms, dtype=torch.float64)).tolist()
        factors = factors if name == "per_layer" else factors * 3
        clipped[k] = np.concatenate([f * part[k] for f, part in zip(factors, parts, strict=True)])
    seen = geometry.clipped(rule, noise_multiplier=2.0, expected_batch=70.0)
    total = clipped.sum(0)
    assert seen.cosine == pytest.approx(cosine(total, vectors.sum(0)))
    assert seen.signal_to_noise == pytest.approx(10 * np.linalg.norm(total) / (2.0 * rule.bound * math.sqrt(28)))
    assert seen.of_layers["b.0"] == pytest.approx(
        10 * np.linalg.norm(total[15:23]) / (2.0 * rule.bound * math.sqrt(8))
    )
    shorter = np.linalg.norm(clipped, axis=1) < (1 - 2**-10) * np.linalg.norm(vectors, axis=1)
    assert seen.shortened == pytest.approx(shorter.mean())


def test_a_gradient_of_zeros_counts_as_nothing_and_breaks_nothing():
    found = [*gradients(3), [torch.zeros(shape) for shape in SHAPES]]
    geometry = GradientGeometry.of(NAMES, found, [0.0] * 4)
    assert geometry.norms[3] == geometry.cosines[3] == 0
    assert np.isfinite(geometry.clipped(make_rule("auto_v", {"bound": 1.0}), 1.0, 4).cosine)


def planted(small_disagree: bool, seed: int = 0, patients: int = 60) -> GradientGeometry:
    """Directions around a common one; where small gradients disagree, theirs are noise alone."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=200)
    found = []
    for length in np.geomspace(0.01, 1, patients):
        away = rng.normal(size=200) * (3 if small_disagree and length < 0.2 else 1)
        vector = (0 if small_disagree and length < 0.05 else 1) * common + away
        found.append([torch.from_numpy(length * vector / np.linalg.norm(vector))])
    return GradientGeometry.of(["a.weight"], found, [0.5] * patients)


def test_small_gradients_that_point_elsewhere_are_found_and_those_that_do_not_are_not():
    seen = planted(small_disagree=True).disagreement()
    assert seen.rank_correlation > 0.5 and seen.p_value < 1e-4
    assert seen.smallest_third < 0.3 < seen.largest_third and seen.opposed > 0.2
    p_values = [planted(small_disagree=False, seed=seed).disagreement().p_value for seed in range(40)]
    assert sum(p < 0.05 for p in p_values) <= 7  # 2 expected of 40; 7 or fewer in 99.9 %


def test_a_patients_own_gradient_does_not_agree_with_itself():
    """Independent directions: with the mean of all, the longest would have a cosine of nearly 1."""
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(30, 5000)) * np.geomspace(0.01, 100, 30)[:, None]
    geometry = GradientGeometry.of(["a.weight"], [[torch.from_numpy(v)] for v in vectors], [0.0] * 30)
    assert np.abs(geometry.cosines).max() < 0.06  # four deviations of 1 / sqrt(5000)
    assert abs(geometry.disagreement().rank_correlation) < 0.6
