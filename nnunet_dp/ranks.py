"""Several processes that take one private step together, each with a device of its own.

The first rank (``Leader``) is the training: it charges the ledger, draws the patients, adds the noise, steps, averages
and writes checkpoints, exactly as a process that is ``Alone``. The other ranks (``Follower``) lend it their devices:

    leader     charge -> draw -> say who ------------------> own share -> sum of all -> noise -> step -> weights
    followers                    hear who was drawn -> own share ---^                           take over the weights

A draw is divided by position: rank r of R takes every R-th drawn patient from the r-th on.

Formal guarantee:
    The sum that the leader noises is, up to rounding in float64, the one that it would have found alone: each drawn
    patient's clipped gradient once, clipped to the leader's bound. Before it is noised the ranks' shares are compared
    with the draw; before the first charge (``agree``) every rank has proved that it sees the same plan, slots and data.
    A follower holds no ledger, draws nobody, makes no noise, and drops what passes through it. Nothing depends on the
    number of ranks but time: no checkpoint knows it.

Design note: no ``DistributedDataParallel``. It would average raw gradients, or, around per-sample gradients, silently
synchronise nothing.

Design note: weights are sent, not the noised sum: ranks cannot drift apart, whatever their devices round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nnunet_dp.errors import Refusal
from nnunet_dp.mechanisms import ClippedSum
from nnunet_dp.process_group import ProcessGroup


class Draw(NamedTuple):
    """Who takes part in one step, and the bound of everybody's contribution; private.

    Attributes:
        step: number of the step.
        slots: the drawn slots, each once.
        bound: of the clip rule in this step.
    """

    step: int
    slots: list[int]
    bound: float


Clip = Callable[[Draw], ClippedSum]
"""The clipped sum of a draw's patients, by this process alone."""


class Ranks(Protocol):
    """What a training asks of the processes that share its steps."""

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def clipped_sum(self, draw: Draw, clip: Clip) -> ClippedSum:
        """The sum of the whole draw's clipped gradients."""
        ...

    def send_weights(self, network: nn.Module) -> None:
        """Tell all processes what the step made of the weights."""
        ...


class Alone:
    """One process."""

    size = 1

    def clipped_sum(self, draw: Draw, clip: Clip) -> ClippedSum:
        """All by itself."""
        return clip(draw)

    def send_weights(self, network: nn.Module) -> None:
        """Nobody waits for them."""


class Leader:
    """The first rank.

    Args:
        group: that the followers are in, too.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group, self.size = group, group.size

    def agree(self, facts: Sequence[str]) -> None:
        """Let the followers go on to compare what they see with what is here; before the first charge.

        Args:
            facts: digests of plan, slots and data.

        Raises:
            Refusal: when a rank sees other facts. Rank 1 would take another patient for a slot than rank 0, and one
                patient could count twice.
        """
        self._group.said()
        others = [number for number, found in enumerate(self._group.told(list(facts))) if found != list(facts)]
        if others:
            raise Refusal(
                f"all processes of a training should see the same plan, split and data, found others in process "
                f"{', '.join(map(str, others))} of {self.size}: nothing was charged by this attempt; look whether the "
                "folders of nnU-Net are the same for all, then start again"
            )

    def begin(self, news: Any, network: nn.Module) -> None:
        """Say what followers need to know besides, then give them the weights; they are ``serve``-ing from here on."""
        self._group.said(news)
        self._group.adopt(network)

    def clipped_sum(self, draw: Draw, clip: Clip) -> ClippedSum:
        """The sum of all ranks' shares.

        Raises:
            Refusal: when the shares are not the draw, or were clipped to another bound; its charge is spent, nothing is
                released.
            LostRank: when a rank ended.
        """
        self._group.said(draw)
        mine = share_of(draw, self._group)
        own = clip(mine)
        *tensors, count = _added_up(self._group, draw, mine, own)
        return ClippedSum(tuple(tensors), draw.bound, None if own.centred_count is None else float(count))

    def send_weights(self, network: nn.Module) -> None:
        """To all followers."""
        self._group.adopt(network)

    def finish(self, network: nn.Module) -> None:
        """End the followers' service and leave the last weights with them."""
        self._group.said(None)
        self._group.adopt(network)


class Follower:
    """Any rank but the first.

    Args:
        group: that the leader is in, too.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def wait(self) -> None:
        """Until the leader has prepared everything and asks for facts."""
        self._group.said()

    def agree(self, facts: Sequence[str]) -> None:
        """Tell what is seen here; see ``Leader.agree``."""
        self._group.told(list(facts))

    def begin(self) -> Any:
        """What the leader says, once nothing but the steps is left to do."""
        return self._group.said()

    def serve(self, network: nn.Module, clip: Clip) -> None:
        """Take over the leader's weights and lend this device to every step until the leader has finished.

        Raises:
            LostRank: when a rank ended.
        """
        self._group.adopt(network)
        while (draw := self._group.said()) is not None:
            mine = share_of(draw, self._group)
            _added_up(self._group, draw, mine, clip(mine))
            self._group.adopt(network)
        self._group.adopt(network)


def share_of(draw: Draw, group: ProcessGroup) -> Draw:
    """The part of a draw that is this rank's."""
    return draw._replace(slots=draw.slots[group.rank :: group.size])


class _Report(NamedTuple):
    slots: list[int]
    bound: float


def _added_up(group: ProcessGroup, draw: Draw, mine: Draw, own: ClippedSum) -> list[Tensor]:
    """Sum over all ranks of the gradients and the count, on the first; what the others get means nothing."""
    reports = group.told(_Report(mine.slots, own.l2_bound))
    if reports:
        _refuse_other_shares(draw, reports)
    count = torch.tensor(own.centred_count or 0.0, dtype=torch.float64, device=own.tensors[0].device)
    return group.summed([*(tensor.double() for tensor in own.tensors), count])


def _refuse_other_shares(draw: Draw, reports: Sequence[_Report]) -> None:
    taken = sorted(slot for report in reports for slot in report.slots)
    if taken != sorted(draw.slots) or len(set(taken)) < len(taken):
        raise Refusal("each drawn patient should be taken by one process, found another share: nothing was released")
    if any(report.bound != draw.bound for report in reports):
        raise Refusal("all processes should clip to one bound, found another: nothing was released")
