"""Slow and obvious oracles: what the fast code must equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def clipped_sum_by_loop(
    network: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    records: Sequence[Any],
    factor_of: Callable[[float], float],
) -> list[Tensor]:
    """Sum of factor(norm) * gradient, with ``backward`` on one record after the other and nothing clever."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    for record in records:
        network.zero_grad(set_to_none=True)
        loss(network(record.data), record.target).backward()
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        norm = torch.cat([g.flatten() for g in gradient]).double().norm().item()
        for sum_, g in zip(total, gradient, strict=True):
            sum_ += factor_of(norm) * g
    network.zero_grad(set_to_none=True)
    return total
