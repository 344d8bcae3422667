"""Shared properties: what every clip rule and every engine must keep, whatever the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_dp.clipping import ClipRule, make_rule

RULES = {
    "flat": {"bound": 0.7},
    "auto_s": {"bound": 1.3, "regulariser": 0.01},
    "auto_v": {"bound": 2.0},
    "nsgd": {"bound": 1.0, "regulariser": 0.05},
    "psac": {"bound": 1.0, "regulariser": 0.1},
    "quantile": {"bound": 0.3},
    "per_layer": {"bound": 1.0},
}
NASTY_SCALES = (0.0, 1e-38, 1e-20, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e28, 1e37, float("inf"), float("nan"))


def all_rules() -> list[ClipRule]:
    """One instance of every rule the package knows."""
    return [make_rule(name, constants) for name, constants in RULES.items()]


def norm(tensors: Sequence[Tensor]) -> float:
    """L2 norm in float64, whatever the dtype of the tensors."""
    return torch.sqrt(sum(t.double().square().sum() for t in tensors)).item()  # type: ignore[arg-type]


def assert_bounded(tensors: Sequence[Tensor], bound: float) -> None:
    """No tolerance: the bound holds in the dtype that is summed."""
    assert all(torch.isfinite(t).all() for t in tensors)
    assert norm(tensors) <= bound
