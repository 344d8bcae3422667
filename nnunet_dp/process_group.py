"""The process group of one training: the few things that its ranks say to each other, and an end for all when one ends.

Two channels. Words (draws, reports, facts) go over a gloo group of our own, which waits as long as the first rank needs
to prepare, and notices at once when a process is gone. Tensors go over the group that nnU-Net made: NCCL between GPUs,
gloo between processors. Before every exchange of tensors the ranks meet over words, so that NCCL never waits for long.

What is exchanged during a step is private: processes on machines of different names are refused, and gloo is told to
use the loopback interface where nnU-Net made the group. The port at which torch's processes find each other is
nnU-Net's, listens on all interfaces and asks nobody who they are: see the FAQ.

Formal guarantee:
    No call returns on one rank unless every rank that takes part in it was alive; where one is not, it raises
    ``LostRank``. A rank that ``multiprocessing`` spawned ends with the process that spawned it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from nnunet_dp.errors import Refusal
from nnunet_dp.loading import end_with

FIRST = 0
"""The rank that holds ledger, noise, optimizer and checkpoints."""
DEVICES = {"nccl": "cuda", "gloo": "cpu"}
_AS_LONG_AS_IT_TAKES = timedelta(days=30)  # reading cases and the public start may take hours


class LostRank(Refusal):
    """Another process of this training ended."""


def is_shared() -> bool:
    """Whether this process is one of a process group."""
    return distributed.is_available() and distributed.is_initialized()


def device_type() -> str:
    """Type of the device that the group's tensors live on.

    Raises:
        Refusal: for a backend that is neither NCCL nor gloo.
    """
    backend = distributed.get_backend()
    if backend not in DEVICES:
        raise Refusal(f"processes should share a training over nccl or gloo, found {backend}: initialise one of these")
    return DEVICES[backend]


class ProcessGroup:
    """This process's place in the group that ``torch.distributed`` was initialised with.

    Attributes:
        rank: 0 is the first.
        size: number of ranks.

    Raises:
        Refusal: for a backend that is not known, and for processes on several machines.
    """

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        device_type()
        if sys.platform.startswith("linux") and os.environ.get("MASTER_ADDR") in ("localhost", "127.0.0.1"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with _together():
            self._words: Any = distributed.new_group(backend="gloo", timeout=_AS_LONG_AS_IT_TAKES)
        self._refuse_several_machines()
        if multiprocessing.parent_process() is not None:
            threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()

    def _refuse_several_machines(self) -> None:
        """Sums without noise must not cross a network."""
        hosts: list[str] = [""] * self.size
        with _together():
            distributed.all_gather_object(hosts, socket.gethostname(), group=self._words)
        if len(set(hosts)) > 1:
            raise Refusal(
                f"all processes of a training should run on one machine, found {len(set(hosts))}: sums without noise "
                "would cross the network; use the GPUs of one machine, or `nnunet-dp fed` between sites"
            )

    def __repr__(self) -> str:
        """Public facts only: nnU-Net prints every attribute of a trainer to disk."""
        return f"ProcessGroup({self.rank} of {self.size})"

    def said(self, words: Any = None) -> Any:
        """What the first rank says to all; the others wait for it."""
        message = [words if self.rank == FIRST else None]
        with _together():
            distributed.broadcast_object_list(message, src=FIRST, group=self._words)
        return message[0]

    def told(self, words: Any) -> list[Any]:
        """What each rank tells the first one, by rank; an empty list everywhere else."""
        heard: list[Any] = [None] * self.size if self.rank == FIRST else []
        with _together():
            distributed.gather_object(words, heard if self.rank == FIRST else None, dst=FIRST, group=self._words)
        return heard

    def wait(self) -> None:
        """Until every rank is here."""
        with _together():
            distributed.barrier(group=self._words)

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum over all ranks, on the first; all others get numbers that mean nothing.

        Args:
            tensors: float64, of the same shapes on every rank, on the device of ``device_type``.
        """
        whole = torch.cat([tensor.flatten() for tensor in tensors])
        with _together():
            distributed.reduce(whole, dst=FIRST)
        parts = whole.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def adopt(self, network: nn.Module) -> None:
        """Every parameter and buffer becomes that of the first rank, bit for bit."""
        state = [*network.parameters(), *network.buffers()]
        with _together(), torch.no_grad():
            for alike in _by_dtype(state):
                whole = torch.cat([tensor.detach().flatten() for tensor in alike])
                distributed.broadcast(whole, src=FIRST)
                for tensor, part in zip(alike, whole.split([t.numel() for t in alike]), strict=True):
                    tensor.copy_(part.view_as(tensor))


def _by_dtype(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    return found.values()


@contextmanager
def _together() -> Iterator[None]:
    """Every error of an exchange means the same: this training cannot go on."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
        raise LostRank(
            "every process of this training should go on until its end, found one that ended (its own message, if it "
            "had one, is above); what was charged stays charged: the same command with --c goes on"
        ) from error
