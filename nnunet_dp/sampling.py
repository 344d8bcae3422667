"""Who takes part in a step, and with which randomness.

Every step draws patients by Poisson sampling: each slot is in with probability q, independently of all others, from
entropy of the operating system. The accountant's amplification by sampling holds for this and for nothing else:
shuffling is not Poisson (Chua et al. 2024, arXiv:2403.17673).

>>> import torch
>>> poisson_draw(4, 1.0, torch.Generator().manual_seed(0))
[0, 1, 2, 3]

Patches and augmentation of a drawn patient come from a stream of that patient's own (``patch_seed``), so that one
patient's content never shifts another's patches. Neither draws nor keys are ever written: a stored draw met by fresh
noise twice is not two events.
"""

from __future__ import annotations

import hashlib
import os

import torch


def poisson_draw(units: int, probability: float, generator: torch.Generator) -> list[int]:
    """Indices of the drawn slots, in increasing order; the list may be empty.

    Args:
        units: public number of training slots.
        probability: inclusion probability q in (0, 1].
        generator: CPU generator, freshly keyed for this step (``mechanisms.fresh_generator``).

    Raises:
        ValueError: for a probability outside (0, 1] or no slots.
    """
    if units < 1 or not 0.0 < probability <= 1.0:
        raise ValueError(f"expected at least one slot and 0 < q <= 1, found {units} slots and q = {probability}")
    uniform = torch.rand(units, generator=generator, dtype=torch.float64)  # 53 bits, in [0, 1)
    return torch.nonzero(uniform < probability).flatten().tolist()


def fresh_key() -> bytes:
    """A key for the patch streams of one process: 32 bytes of the operating system's entropy, kept in memory only."""
    return os.urandom(32)


def patch_seed(key: bytes, step: int, unit: int) -> int:
    """128-bit seed of one patient's patches in one step; independent of every other patient."""
    message = step.to_bytes(8, "big") + unit.to_bytes(8, "big")
    return int.from_bytes(hashlib.blake2b(message, key=key, digest_size=16).digest(), "big")
