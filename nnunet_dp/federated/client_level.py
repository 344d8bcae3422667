"""Client-level privacy: a whole site as the unit, beside the guarantee that each site gives its patients.

Each round the coordinator clips every site's update to a public bound, adds Gaussian noise to their sum and divides by
the number of sites that were agreed on, not by those that replied: a missing site counts as zero.

Formal guarantee:
    The global weights after k rounds are k Gaussian releases on the full batch of sites (no amplification is claimed),
    each charged to ``server_ledger.jsonl`` before it was drawn: replacing one site's replies by none moves the noised
    sum by at most the bound. It holds against those who see the model, not against the coordinator, who sees the
    updates. Brendan McMahan et al. 2018, arXiv:1710.06963. Not covered: who took part in which round, and what sites
    say of themselves (epsilon, threshold).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dp_accounting.dp_event import SelfComposedDpEvent

from nnunet_dp.accounting import PrivacyBudget, calibrate
from nnunet_dp.charges import RESTORE, LedgerError, epsilon_of, steps_charged
from nnunet_dp.errors import BudgetRefusal
from nnunet_dp.federated.protocol import Arrays
from nnunet_dp.federated.run_config import ClientLevel
from nnunet_dp.ledger import Ledger
from nnunet_dp.mechanisms import ClippedSum, SubsampledGaussian, fresh_generator

LEDGER = "server_ledger.jsonl"
PURPOSE = "training"
_SAFETY = 1 - 2**-16  # as in ``clipping``: the float64 sum keeps the bound with a margin


class ClientLevelMean:
    """The noised mean update of a run's rounds.

    Args:
        asked: bound and budget.
        rounds: releases that the noise is calibrated for.
        sites: public number that is divided by.
        folder: of the run, which holds the ledger.
        run: identifier.
    """

    def __init__(self, asked: ClientLevel, rounds: int, sites: int, folder: Path, run: str) -> None:
        budget = PrivacyBudget(epsilon=asked.epsilon, delta=asked.delta, unit="site")
        self._asked, self._rounds, self._sites = asked, rounds, sites
        noise = calibrate(lambda z: SelfComposedDpEvent(SubsampledGaussian(z).event, rounds), budget)
        self.mechanism = SubsampledGaussian(noise)
        self._ledger = Ledger(folder / LEDGER, run, plan="0", unit="site")

    @property
    def head(self) -> tuple[int, str]:
        """Sequence number and hash of the ledger's newest line."""
        return self._ledger.head

    def refuse_lost(self, round: int, head: tuple[int, str] | None) -> None:
        """Refuse to go on where the ledger knows less than the state.

        Args:
            round: finished rounds, each of which was charged.
            head: of the ledger, when the state was written.

        Raises:
            LedgerError: for a ledger that is missing, shorter or another one.
        """
        charged = steps_charged(self._ledger.own_entries)
        if charged < round:
            raise LedgerError(f"{LEDGER} should hold at least {round} charges, found {charged}; " + RESTORE)
        if head is not None:
            self._ledger.verify_contains(*head)

    @property
    def claim(self) -> dict[str, Any]:
        """What the release of the model costs each site, and whom it is protected from."""
        asked = self._asked
        words = (
            f"epsilon {self.epsilon:.4g} at delta {asked.delta:g} per site, whatever the site sent; no amplification "
            "is claimed; it holds against those who see the model, not against the coordinator, who is trusted"
        )
        return {"epsilon": self.epsilon, "delta": asked.delta, "unit": "site", "bound": asked.bound, "guarantee": words}

    @property
    def epsilon(self) -> float:
        """Spent so far, per site."""
        return epsilon_of(self._ledger.own_entries, self._asked.delta)

    def next_weights(self, now: Arrays, updates: Mapping[str, Arrays], round: int) -> dict[str, np.ndarray]:
        """Global weights after a round: charge, clip, sum, noise, division by the number of sites.

        Args:
            now: global weights that the sites began from.
            updates: their weights; missing sites count as zero.
            round: its number.

        Raises:
            BudgetRefusal: when all planned releases are charged (rounds lost in crashes count).
        """
        if steps_charged(self._ledger.own_entries) >= self._rounds:
            raise BudgetRefusal(f"all {self._rounds} releases of the sites' budget are charged: the run ends")
        receipt = self._ledger.charge(self.mechanism.charge(PURPOSE, round))
        names = sorted(now)
        total = [torch.zeros(now[name].shape, dtype=torch.float64) for name in names]
        for site in sorted(updates):
            step = [torch.from_numpy(updates[site][name].astype(np.float64) - now[name]) for name in names]
            norm = math.sqrt(sum(float(part.square().sum()) for part in step))
            factor = min(1.0, self._asked.bound / norm) * _SAFETY if norm > 0 else 0.0
            for sum_, part in zip(total, step, strict=True):
                sum_ += part * factor
        noised = self.mechanism.release(ClippedSum(tuple(total), self._asked.bound), receipt, fresh_generator("cpu"))
        moved = zip(names, noised.tensors, strict=True)
        return {name: (now[name] + (tensor / self._sites).numpy()).astype(np.float32) for name, tensor in moved}
