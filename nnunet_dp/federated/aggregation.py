"""Replies in, next global weights out.

The mean has fixed public weights: how many patients a site drew, or how well it did, never enters it. A reply that is
not what was asked for is left out, with a reason from a closed list; the round goes on without it.

>>> updates = {"a": {"w": np.array([1.0])}, "b": {"w": np.array([4.0])}}
>>> weighted_mean(updates, {"a": 2.0, "b": 1.0})["w"]
array([2.], dtype=float32)
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import numpy as np
from pydantic import ValidationError

from nnunet_dp.federated.protocol import LARGEST_DELTA, Arrays, Code, Reply

Shapes = Mapping[str, tuple[int, ...]]


class Rejection(str, enum.Enum):
    """Why a reply was left out."""

    header = "malformed header"
    code = "unknown code"
    epsilon = "no epsilon"
    run = "another run"
    round = "another round"
    site = "another site's name"
    names = "other parameters"
    shape = "wrong shape"
    dtype = "wrong dtype"
    not_finite = "not finite"


def shapes_of(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    """Shape of each array."""
    return {name: tuple(array.shape) for name, array in arrays.items()}


def parse(header: str) -> Reply | Rejection:
    """The reply that a header holds."""
    try:
        reply = Reply.model_validate_json(header)
    except ValidationError as error:
        only_code = {part["loc"] for part in error.errors()} == {("code",)} and error.errors()[0]["type"] == "enum"
        return Rejection.code if only_code else Rejection.header
    return reply if reply.unit is None or reply.unit.isprintable() else Rejection.header  # it is shown on terminals


def fault_of_header(reply: Reply, run: str, round: int | None, site: str | None) -> Rejection | None:
    """What is wrong with the header of a reply, if anything.

    Args:
        reply: parsed.
        run: that was asked about.
        round: that was asked for; None outside of training.
        site: name that the node has said to have; None when it is asked for it.
    """
    if reply.run != run:
        return Rejection.run
    if reply.round != round:
        return Rejection.round
    return Rejection.site if site is not None and reply.site != site else None


def fault_of_claim(reply: Reply) -> Rejection | None:
    """What is missing in the reply of a site that trained privately, if anything: it must say what that cost.

    Nothing is trained for nothing, and no site's settings allow a delta of ``LARGEST_DELTA`` or more.
    """
    said = (reply.epsilon, reply.delta, reply.unit)
    if reply.code is not Code.ok:
        return None
    return Rejection.epsilon if None in said or not reply.epsilon or (reply.delta or 1) >= LARGEST_DELTA else None


def fault_of_weights(arrays: Arrays, expected: Shapes) -> Rejection | None:
    """What is wrong with a site's weights, if anything.

    Args:
        arrays: by the names of the parameters.
        expected: shapes of the global weights.
    """
    if set(arrays) != set(expected):
        return Rejection.names
    if any(tuple(array.shape) != tuple(expected[name]) for name, array in arrays.items()):
        return Rejection.shape
    if any(array.dtype != np.float32 for array in arrays.values()):
        return Rejection.dtype
    return None if all(np.isfinite(array).all() for array in arrays.values()) else Rejection.not_finite


def weighted_mean(updates: Mapping[str, Arrays], weights: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Mean of the sites' weights, summed in float64 in the order of their names.

    Args:
        updates: of each site that replied; at least one.
        weights: public numbers, at least those sites'; they are scaled to a sum of one over the sites that replied.
    """
    sites = sorted(updates)
    total = sum(weights[site] for site in sites)
    found = {}
    for name in updates[sites[0]]:
        mean = np.zeros_like(updates[sites[0]][name], dtype=np.float64)
        for site in sites:
            mean += updates[site][name] * np.float64(weights[site] / total)
        found[name] = mean.astype(np.float32)
    return found


DROPS_OUT = (Code.budget_spent,)
"""Answers after which a site is asked no more."""
