"""What a federated model guarantees, for its privacy card: one row for each site.

A site whose ledger lies on this machine (a simulation) is counted again; of the others there is what they reported, and
the card says so. Sites become numbers: who took part is theirs to tell.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_dp.accounting import which_accountant
from nnunet_dp.card import ClientLevelRow, SiteRow, canonical_charges, sampler_of, unit_of
from nnunet_dp.charges import LedgerEntry, events_of
from nnunet_dp.claim import NO_GUARANTEE_RUNS, Claim
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.federated.summary import SiteSummary, Summary, charges_of_sites, read_summary, thresholds_of
from nnunet_dp.run import FINAL, read_checkpoint

_FOLD = "all"  # of every federated model
_PUBLIC = "number of units at each site, channels and labels"


def federated_claim(model: Path) -> Claim:
    """What a federated model claims.

    Args:
        model: folder of a federated model.

    Raises:
        UsageRefusal: for a mode without a guarantee.
        Refusal: where nothing was spent, a ledger says less than was reported, or the model is another run's.
    """
    told = read_summary(model)
    if not told.private:
        raise UsageRefusal(
            f"{model.name} was trained by {told.mode.value}, without a guarantee, for comparison: there is nothing "
            "that an export could claim"
        )
    if told.epsilon is None:
        raise Refusal(f"{model.name} says nothing of what its sites spent: finish the run with --resume")
    checkpoint = read_checkpoint(model / f"fold_{_FOLD}" / FINAL)
    if checkpoint["init_args"].get("run") != told.run:
        raise Refusal(f"{FINAL} in {model.name} was written by another run than federated.json says: --resume mends it")
    charges, thresholds = charges_of_sites(told), thresholds_of(told)
    spent = [site for site in told.sites if site.spent or site.rounds]  # the others released nothing
    known = [(site, charges.get(site.name), thresholds.get(site.name, ())) for site in spent]
    rows = [_row(number, *about) for number, about in enumerate(known, 1)]
    return Claim(_fields(told, rows), {_FOLD: (0, int(checkpoint["init_args"]["steps"]))})


def _anonymous(words: str) -> str:
    """Without the name of anybody's dataset."""
    return re.sub(r"Dataset\d{3}_\S+", "a named dataset", words)


def _row(
    number: int, site: SiteSummary, charged: tuple[LedgerEntry, ...] | None, thresholds: Sequence[float]
) -> SiteRow:
    counted = site.recounted is not None and charged is not None
    if not site.spent or site.delta is None or site.unit is None:
        raise Refusal(f"site {number} took part without saying what that cost and per what: nothing can be claimed")
    return SiteRow(
        site=number,
        epsilon=site.spent,
        delta=site.delta,
        unit=unit_of([site.unit]),
        rounds=site.rounds,
        counted="from its ledger" if counted else "as reported",
        charges=canonical_charges(charged or ()) if counted else [],
        epsilon_total=site.dataset_total if counted else None,
        thresholds=list(thresholds) if counted else [],
    )


def _fields(told: Summary, rows: list[SiteRow]) -> dict[str, Any]:
    charges = [row for site in rows for row in site.charges]
    unguarded = any(site.released_without_guarantee for site in told.sites)
    delta, whole = max(row.delta for row in rows), told.client_level
    level = {name: whole[name] for name in ClientLevelRow.model_fields} if whole else None
    return {
        "unit": unit_of(row.unit for row in rows),
        "relation": "zero-out",
        "epsilon": max(row.epsilon for row in rows),
        "delta": delta,
        "dataset": None,
        "charges": [],
        "sites": rows,
        "client_level": level,
        "clip": None,
        "sampler": sampler_of(charges if all(row.charges for row in rows) else []),
        "training": None,
        "accountant": which_accountant(events_of(row.charge for row in charges), delta),
        "public_inputs": [_PUBLIC, *(f"{what}: {_anonymous(words)}" for what, words in told.inputs.items())],
        "covers": ["weights of the model, which are means of what the sites released"],
        "not_covered": sorted({*told.not_covered, *([NO_GUARANTEE_RUNS] if unguarded else [])}),
    }
