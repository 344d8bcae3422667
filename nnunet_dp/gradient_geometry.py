"""The geometry of a batch's per-patient gradients: lengths, angles, and what each clip rule makes of their sum.

All of it follows from inner products, layer by layer: K_l[i, j] = <g_i, g_j> over the parameters of layer l. With
factors f_i of a clip rule, the clipped sum s = sum_i f_i g_i has length sqrt(f^T K f), and its cosine with the true sum
is f^T K 1 / sqrt(f^T K f  1^T K 1).

**None of this is private.** Whoever sees a patient's gradient norm, or an angle with it, has been told something about
that patient that no noise covers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_dp.clipping import ClipRule

TINY = 1e-300  # below any squared norm of a gradient that is not zero
AS_IT_WAS = 1 - 2**-10  # factors above it count as not shortened


@dataclass(frozen=True)
class Clipped:
    """What a clip rule makes of the batch.

    Attributes:
        shortened: share of the patients whose contribution is shorter than their gradient.
        cosine: between the clipped sum and the true one.
        signal_to_noise: length of the clipped sum over the expected length of the noise.
        of_layers: the same for each layer.
    """

    shortened: float
    cosine: float
    signal_to_noise: float
    of_layers: dict[str, float]


@dataclass(frozen=True)
class Disagreement:
    """Whether patients with small gradients point elsewhere than the others, which PSAC's weights assume.

    Xia et al. 2023 (arXiv:2212.00328) give a patient with a small gradient less weight than Auto-S does, because such a
    gradient deviate from the batch's. Where that is so, length and cosine rise together.

    Attributes:
        rank_correlation: Spearman's, of the norm with the cosine to the mean of the *other* patients.
        p_value: two-sided, of no correlation (permutations would give the same order of magnitude).
        smallest_third: mean cosine of the third with the smallest norms.
        largest_third: of the third with the largest.
        opposed: share of the smallest third that points away from the others (negative cosine).
        between_thirds: cosine between the means of these two thirds.
    """

    rank_correlation: float
    p_value: float
    smallest_third: float
    largest_third: float
    opposed: float
    between_thirds: float


@dataclass(frozen=True)
class GradientGeometry:
    """Inner products of the gradients of n patients, and how much of each patch is foreground.

    Attributes:
        grams: float64 [layers, n, n].
        layers: name and number of parameters of each layer.
        foreground: share of labelled voxels in each patient's patches, [n].
    """

    grams: np.ndarray
    layers: tuple[tuple[str, int], ...]
    foreground: np.ndarray

    @classmethod
    def of(
        cls, names: Sequence[str], gradients: Iterable[Sequence[Tensor]], foreground: Sequence[float]
    ) -> GradientGeometry:
        """From one list of tensors a patient; those of one module (weight and bias) are one layer.

        Args:
            names: of the parameters, in the order of the tensors.
            gradients: of each patient.
            foreground: of each patient.
        """
        index: dict[str, int] = {}
        groups = [index.setdefault(name.rpartition(".")[0], len(index)) for name in names]
        parts: list[list[Tensor]] = [[] for _ in index]
        sizes = [0] * len(index)
        for number, gradient in enumerate(gradients):
            flat: list[list[Tensor]] = [[] for _ in index]
            for group, tensor in zip(groups, gradient, strict=True):
                flat[group].append(tensor.detach().reshape(-1).float().cpu())
            for group, pieces in enumerate(flat):
                parts[group].append(torch.cat(pieces))
                if number == 0:
                    sizes[group] = len(parts[group][0])
        grams = [torch.stack(rows).double() for rows in parts]
        return cls(
            np.stack([(rows @ rows.T).numpy() for rows in grams]),
            tuple(zip(index, sizes, strict=True)), np.asarray(foreground, np.float64),
        )  # fmt: skip

    @cached_property
    def gram(self) -> np.ndarray:
        """Inner products over all parameters, [n, n]."""
        return self.grams.sum(0)

    @cached_property
    def norms(self) -> np.ndarray:
        """L2 norm of each patient's gradient, [n]."""
        return np.sqrt(np.diagonal(self.gram))

    @cached_property
    def cosines(self) -> np.ndarray:
        """Of each patient's gradient with the mean of the *others*, [n]: its own share in the mean would flatter it."""
        with_sum, squares = self.gram.sum(1), np.diagonal(self.gram)
        others = self.gram.sum() - 2 * with_sum + squares
        return _cosine(with_sum - squares, squares, others)

    @cached_property
    def signal(self) -> float:
        """Length of the mean gradient over the mean length: 1 where all agree, about 1 / sqrt(n) where none do."""
        return float(np.sqrt(max(self.gram.sum(), 0.0)) / max(self.norms.sum(), TINY))

    def factors(self, rule: ClipRule) -> np.ndarray:
        """What the rule multiplies each patient's layers with, [layers, n]."""
        groups = np.asarray(rule.groups([f"{name}.weight" for name, _ in self.layers]))
        squares = np.stack([np.diagonal(gram) for gram in self.grams])  # [layers, n]
        of_groups = np.zeros((groups.max() + 1, squares.shape[1]))
        np.add.at(of_groups, groups, squares)
        found = [rule.factors(torch.from_numpy(norms)).numpy() for norms in np.sqrt(of_groups).T]
        return np.stack(found, 1)[groups]

    def clipped(self, rule: ClipRule, noise_multiplier: float, expected_batch: float) -> Clipped:
        """What the rule makes of these patients, as a sample of a batch of the expected size.

        Args:
            rule: whose factors and bound.
            noise_multiplier: standard deviation of the noise over the rule's bound.
            expected_batch: patients in a step's sum.
        """
        factors = self.factors(rule)
        squares = np.einsum("li,lij,lj->l", factors, self.grams, factors)
        with_true = np.einsum("li,lij->", factors, self.grams)
        shorter = (np.einsum("li,li,lii->i", factors, factors, self.grams) / np.maximum(self.norms**2, TINY)) ** 0.5
        scale = expected_batch / factors.shape[1] / (noise_multiplier * rule.bound)
        sizes = np.asarray([size for _, size in self.layers])
        to_noise = np.sqrt(np.maximum(squares, 0)) * scale / np.sqrt(sizes)
        whole = float(np.sqrt(max(squares.sum(), 0.0)) * scale / np.sqrt(sizes.sum()))
        return Clipped(
            shortened=float(np.mean(shorter < AS_IT_WAS)),
            cosine=float(_cosine(with_true, squares.sum(), self.gram.sum())),
            signal_to_noise=whole,
            of_layers={name: float(value) for (name, _), value in zip(self.layers, to_noise, strict=True)},
        )

    def disagreement(self) -> Disagreement:
        """Whether small gradients point elsewhere; NaN with fewer than three patients."""
        from scipy.stats import spearmanr

        order, third = np.argsort(self.norms), max(1, len(self.norms) // 3)
        small, large = order[:third], order[-third:]
        between = self.gram[np.ix_(small, large)].sum()
        own = self.gram[np.ix_(small, small)].sum(), self.gram[np.ix_(large, large)].sum()
        rank: Any = spearmanr(self.norms, self.cosines) if len(order) > 2 else None
        return Disagreement(
            rank_correlation=float(rank.statistic) if rank else float("nan"),
            p_value=float(rank.pvalue) if rank else float("nan"),
            smallest_third=float(self.cosines[small].mean()),
            largest_third=float(self.cosines[large].mean()),
            opposed=float((self.cosines[small] < 0).mean()),
            between_thirds=float(_cosine(between, *own)),
        )

    def with_foreground(self) -> Mapping[str, float]:
        """Spearman's correlation of norm and of cosine with the share of foreground; NaN where that never changes."""
        from scipy.stats import spearmanr

        if len(self.norms) < 3 or np.ptp(self.foreground) == 0:
            return {"norm": float("nan"), "cosine": float("nan")}
        told = {"norm": self.norms, "cosine": self.cosines}
        return {name: float(spearmanr(values, self.foreground).statistic) for name, values in told.items()}  # type: ignore


def _cosine(inner: Any, first: Any, second: Any) -> Any:
    """From an inner product and two squared lengths; 0 where one of them is none."""
    lengths = np.sqrt(np.maximum(first, 0)) * np.sqrt(np.maximum(second, 0))
    return np.where(lengths > TINY, inner / np.maximum(lengths, TINY), 0.0)
