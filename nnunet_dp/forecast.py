"""What a plan will take on this machine: seconds and memory, from one patch of noise.

>>> network = torch.nn.Conv2d(1, 2, 3)
>>> found = measure(network, (1, 32, 32), torch.device("cpu"))
>>> found.seconds_per_patch > 0, found.memory_bytes > 0
(True, True)

A forward and a backward pass of the planned network on random numbers, the second of two (the first pays for
libraries). Nothing of the dataset is read, and nothing here moves the plan.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FLOAT64_SUM = 8  # bytes of a parameter in the clipped sum; noise and average add two float32 or less
MEMORY = Path("/proc/meminfo")  # Linux
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # v2, v1
BYTES_PER_PARAMETER = 4 + 4 + 4 + FLOAT64_SUM  # weight, gradient, average, sum


@dataclass(frozen=True)
class Forecast:
    """Of one patch on one device.

    Attributes:
        device: where it was measured.
        seconds_per_patch: forward and backward pass.
        memory_bytes: activations kept for the backward pass, and the parameters' share.
    """

    device: str
    seconds_per_patch: float
    memory_bytes: int

    def describe(self, private_patches: float, public_patches: int) -> str:
        """For people: minutes of both parts of a training, loading and validation apart, and memory."""
        private, public = (self.seconds_per_patch * patches / 60 for patches in (private_patches, public_patches))
        start = f", the public start before it {public:.0f}" if public_patches else ""
        memory = f"{self.memory_bytes / 2**20:.0f} MiB"
        return f"private training about {private:.0f} min a fold{start}; {memory} a patch; on {self.device}"


def measure(
    network: nn.Module,
    shape: tuple[int, ...],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Forecast:
    """Time one patch twice and keep the second.

    Args:
        network: the planned one.
        shape: of a patch, [channels, *spatial].
        device: where the training will run.
        autocast: context of the forward pass.
    """
    network = network.to(device)
    patch = torch.randn(1, *shape, device=device)
    _once(network, patch, device, autocast)
    seconds, kept = _once(network, patch, device, autocast)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Forecast(str(device), seconds, kept + BYTES_PER_PARAMETER * parameters)


def machine_memory_bytes() -> int:
    """Memory of this machine, or of the container that this process runs in where that is less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    written = [file.read_text().strip() for file in CONTAINER_LIMITS if file.is_file()]
    return min([whole, *(int(limit) for limit in written if limit.isdigit())])


def available_memory_bytes(device: torch.device) -> int:
    """Memory that a training could have now: of the card, or of this machine or container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    told = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines()) if MEMORY.is_file() else {}
    free = told.get("MemAvailable", "").split()
    return min([machine_memory_bytes(), *([int(free[0]) * 1024] if free else [])])


def _once(
    network: nn.Module, patch: Tensor, device: torch.device, autocast: Callable[[], AbstractContextManager[Any]]
) -> tuple[float, int]:
    """Seconds of a forward and a backward pass, and bytes kept between them."""
    kept: dict[int, int] = {}
    began = _now(device)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: _noted(tensor, kept), lambda tensor: tensor):
        with autocast():
            output = network(patch)
        parts = output if isinstance(output, list) else [output]
        total = torch.stack([part.float().square().mean() for part in parts]).sum()
    torch.autograd.grad(total, list(network.parameters()), allow_unused=True)
    return _now(device) - began, sum(kept.values())


def _noted(tensor: Tensor, kept: dict[int, int]) -> Tensor:
    kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
