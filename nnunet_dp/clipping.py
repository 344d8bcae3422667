"""Clip rules: what one patient's gradient may contribute to the sum that is noised.

A rule is a frozen value with two parts: a ``bound`` S, the largest L2 norm that one patient's contribution can have,
and one pure function from the norm n of that patient's gradient to the factor it is multiplied with. The noise reads
its scale from the bound of the sum it is added to, never from a second number.

=========  ====================  =====  =====================================================================
name       factor                S      source
=========  ====================  =====  =====================================================================
flat       min(1, C / n)         C      Abadi et al. 2016, arXiv:1607.00133
auto_v     C / n                 C      Bu et al. 2023, arXiv:2206.07136
auto_s     C / (n + gamma)       C      Bu et al. 2023, arXiv:2206.07136
nsgd       1 / (n + r)           1      Yang et al. 2022, arXiv:2206.13033 (S is 1 whatever r is)
psac       C / (n + r / (n + r)) C      Xia et al. 2023, arXiv:2212.00328
quantile   min(1, C_t / n)       C_t    Andrew et al. 2021, arXiv:1905.03871 (C_t follows a noised count)
per_layer  min(1, C_l / n_l)     C      each layer clamped to C_l = C / sqrt(layers)
=========  ====================  =====  =====================================================================

``flat_l1`` and ``quantile_l1`` are flat and quantile with L1 norms in place of L2 norms, for Laplace noise; they are
rules of federated runs only (``l1_clipping``) and not among ``RULE_NAMES``.

>>> import torch
>>> rule = make_rule("auto_s", {"bound": 1.0, "regulariser": 0.01})
>>> float(rule.factors(torch.tensor([0.99], dtype=torch.float64))) < 1.0
True

Edge cases, the same for every rule: a norm that is NaN, infinite or at least ``LARGEST_NORM`` makes the whole
contribution zero; a norm of zero contributes zero.

Design note: in float32 a factor C / n applied to 340 000 numbers can return a norm of 1.000002 C. The norm is therefore
taken in float64, each factor shrunk by ``SAFETY`` = 1 - 2^-16, which costs nothing one could measure, and the product
summed in float64 (``gradients``): the bound holds without tolerance. A rule's formula is not trusted with the promise:
``factors`` shrinks whatever would be too long, so that no constant in an edited plan can break it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

SAFETY = 1.0 - 2.0**-16
LARGEST_NORM = 1e30
SMALLEST_NORM = 1e-12
SMALLEST_BOUND = 1e-100  # below, products with it underflow and a contribution may exceed it


@dataclass(frozen=True)
class ClipRule(ABC):
    """A bound and the factor that keeps every contribution below it.

    Attributes:
        order: of the norm that is bounded: L2, or L1 in the rules for Laplace noise.

    Formal guarantee:
        For every gradient g split into groups of norms n, the vector ``factors(n) * g`` has an L2 norm of at most
        ``bound``, in the dtype in which it is summed, without tolerance. Where ``order`` is 1, n is one L1 norm, and
        so is the bound.
    """

    bound: float
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Refuse a bound that is not a positive finite number."""
        if not (math.isfinite(self.bound) and self.bound >= SMALLEST_BOUND):
            least = f"a positive finite number of at least {SMALLEST_BOUND}"
            raise ValueError(f"a clipping bound must be {least}, found {self.bound}")

    def groups(self, names: Sequence[str]) -> tuple[int, ...]:
        """Group index of each parameter: one group for all, unless the rule clips groups apart."""
        return (0,) * len(names)

    def factors(self, norms: Tensor) -> Tensor:
        """Factor for each group.

        Args:
            norms: float64 tensor [groups], the L2 norm of the patient's gradient in each group.

        Returns:
            float64 tensor [groups]; all zero where any norm is not usable.
        """
        if not self.usable(norms):
            return torch.zeros_like(norms)
        factors = self._factors(norms) * SAFETY
        length = float((factors * norms).square().sum().sqrt())
        if not math.isfinite(length):
            return torch.zeros_like(norms)
        longest = self.bound * SAFETY  # the promise is kept here, whatever formula and constants a rule has
        return factors * (longest / length) if length > longest else factors

    @staticmethod
    def usable(norms: Tensor) -> bool:
        """Whether every norm is a finite number small enough for float32 factors."""
        return bool((torch.isfinite(norms) & (norms < LARGEST_NORM)).all())

    @abstractmethod
    def _factors(self, norms: Tensor) -> Tensor:
        """The rule's formula on usable norms."""


@dataclass(frozen=True)
class Flat(ClipRule):
    """min(1, C / n): gradients shorter than C pass unchanged."""

    def _factors(self, norms: Tensor) -> Tensor:
        return (self.bound / norms).clamp(max=1.0)


@dataclass(frozen=True)
class AutoV(ClipRule):
    """C / n: every gradient is scaled to length C; below ``SMALLEST_NORM`` it contributes nothing."""

    def _factors(self, norms: Tensor) -> Tensor:
        return torch.where(norms < SMALLEST_NORM, torch.zeros_like(norms), self.bound / norms)


@dataclass(frozen=True)
class AutoS(ClipRule):
    """C / (n + gamma): scaled to nearly C, with a little of the norm's own size kept."""

    regulariser: float = 0.01

    def __post_init__(self) -> None:
        """Refuse a regulariser that is not positive."""
        super().__post_init__()
        _require_positive(self.regulariser)

    def _factors(self, norms: Tensor) -> Tensor:
        return self.bound / (norms + self.regulariser)


@dataclass(frozen=True)
class Nsgd(ClipRule):
    """1 / (r + n), whose bound is 1 whatever r is: noise must not scale with r."""

    bound: float = 1.0
    regulariser: float = 0.01

    def __post_init__(self) -> None:
        """Refuse any bound but 1 and a regulariser that is not positive."""
        if self.bound != 1.0:
            raise ValueError(f"NSGD has bound 1 whatever r is, found bound {self.bound}")
        _require_positive(self.regulariser)

    def _factors(self, norms: Tensor) -> Tensor:
        return 1.0 / (norms + self.regulariser)


@dataclass(frozen=True)
class Psac(ClipRule):
    """C / (n + r / (n + r)): per-sample adaptive clipping; the contribution rises monotonically to C."""

    regulariser: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a regulariser that is not positive."""
        super().__post_init__()
        _require_positive(self.regulariser)

    def _factors(self, norms: Tensor) -> Tensor:
        r = self.regulariser
        return self.bound / (norms + r / (norms + r))


@dataclass(frozen=True)
class QuantileAdaptive(Flat):
    """Flat clipping whose threshold follows a quantile of the norms, seen only through a noised count.

    The drawn patients' sum of (1{n <= C} - 1/2) changes by at most 1/2 when one patient is zeroed out; it shares the
    draw with the gradient and is accounted with it as one event (``mechanisms.GaussianWithCount``).
    """

    target_quantile: float = 0.5
    learning_rate: float = 0.2
    smallest_bound: float = 1e-4
    largest_bound: float = 1e4

    def centred_indicator(self, norm: float) -> float:
        """1{n <= C} - 1/2; a norm that is not usable counts as above."""
        return 0.5 if norm <= self.bound else -0.5

    def updated(self, noised_count: float, expected_batch: float) -> QuantileAdaptive:
        """The rule for the next step, from the released count divided by the public expected batch."""
        fraction_below = noised_count / expected_batch + 0.5
        exponent = -self.learning_rate * (fraction_below - self.target_quantile)
        bound = self.bound * math.exp(max(-50.0, min(50.0, exponent)))
        return replace(self, bound=min(self.largest_bound, max(self.smallest_bound, bound)))


@dataclass(frozen=True)
class FlatL1(Flat):
    """min(1, C / n) with n the L1 norm of all parameters together: what Laplace noise asks for."""

    order: ClassVar[int] = 1


@dataclass(frozen=True)
class QuantileL1(QuantileAdaptive):
    """An L1 threshold that follows a quantile of the L1 norms, seen only through a noised count.

    The count is a release of its own (``l1_clipping.LaplaceStep``): Laplace and Gaussian do not combine into one.
    L1 norms are up to sqrt(parameters) times larger than L2 norms, and so is the public range.
    """

    largest_bound: float = 1e8
    order: ClassVar[int] = 1


@dataclass(frozen=True)
class PerLayer(ClipRule):
    """Each layer clamped to C / sqrt(layers): no layer's gradient drowns another's."""

    def groups(self, names: Sequence[str]) -> tuple[int, ...]:
        """Parameters of one module (weight and bias) form one layer."""
        layers: dict[str, int] = {}
        return tuple(layers.setdefault(name.rpartition(".")[0], len(layers)) for name in names)

    def _factors(self, norms: Tensor) -> Tensor:
        return (self.bound / math.sqrt(len(norms)) / norms).clamp(max=1.0)


def _require_positive(regulariser: float) -> None:
    if not (math.isfinite(regulariser) and regulariser > 0):
        raise ValueError(f"a regulariser must be a positive finite number, found {regulariser}")


_RULES: dict[str, type[ClipRule]] = {
    "flat": Flat,
    "auto_s": AutoS,
    "auto_v": AutoV,
    "nsgd": Nsgd,
    "psac": Psac,
    "quantile": QuantileAdaptive,
    "per_layer": PerLayer,
}
RULE_NAMES = tuple(_RULES)
_L1_RULES: dict[str, type[ClipRule]] = {"flat_l1": FlatL1, "quantile_l1": QuantileL1}


def make_rule(name: str, constants: Mapping[str, float]) -> ClipRule:
    """The rule of that name; the set of rules is closed, because each must keep its bound.

    Raises:
        ValueError: for a name or a constant that no rule has.
    """
    known = _RULES | _L1_RULES
    if name not in known:
        raise ValueError(f"unknown clip rule {name!r}; known: {', '.join(known)}")
    try:
        return known[name](**constants)
    except TypeError as error:
        raise ValueError(f"clip rule {name!r}: {error}") from None
