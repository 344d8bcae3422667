"""Two engines side by side: helpers of the tests that compare engine two with engine one."""

from __future__ import annotations

import torch
from asserts import norm

from nnunet_dp.batched_gradients import Batched
from nnunet_dp.clipping import make_rule
from nnunet_dp.gradients import Record

LARGE = make_rule("flat", {"bound": 1e6})  # clips nothing


def batched(chunk: int, *arguments, **keywords):
    """The sum by engine two, which must not have fallen back to engine one."""
    engine = Batched(chunk)
    found = engine(*arguments, **keywords)
    assert engine.fallback is None
    return found


def assert_same(found, expected):
    assert norm([a - b for a, b in zip(found.tensors, expected.tensors, strict=True)]) <= 1e-12 * norm(expected.tensors)
    assert found.l2_bound == expected.l2_bound and found.centred_count == expected.centred_count


def tensors_of(count: int, shape, patches: int = 2):
    """Patients of random images without targets."""
    generator = torch.Generator().manual_seed(1)
    return [Record(torch.randn(patches, *shape, generator=generator, dtype=torch.float64), None) for _ in range(count)]


def squares(output, _):
    return (output * output).mean() + output.mean()
