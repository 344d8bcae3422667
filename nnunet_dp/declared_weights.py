"""Weights that a user declares public, and the one thing that can be checked: that this dataset did not train them.

A model that was trained on a dataset's patients is no public input of the next one on the same patients, whatever it
cost: its charges would be missing from the claim. Of other files nothing is known; the plan records their hash, and
``not_covered`` says that somebody declared them.
"""

from __future__ import annotations

from pathlib import Path

from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.ledger import read_ledger
from nnunet_dp.run import LEDGER, read_checkpoint


def refuse_charged_weights(file: Path, preprocessed: Path) -> None:
    """Refuse a final checkpoint of a run that the dataset's ledger knows.

    Args:
        file: declared public.
        preprocessed: the dataset's folder, with its ledger if it was ever charged.

    Raises:
        UsageRefusal: for a model of these patients.
        LedgerError: for a damaged ledger.
    """
    if not (preprocessed / LEDGER).is_file():
        return
    try:
        told = read_checkpoint(file).get("init_args")
    except Refusal:  # not one of ours: those load as weights alone
        return
    run = told.get("run") if isinstance(told, dict) else None
    if run is not None and run in {entry.run for entry in read_ledger(preprocessed / LEDGER)}:
        raise UsageRefusal(
            f"{file.name} was trained on the patients of {preprocessed.name}, whose ledger holds its charges: it is no "
            "public input for them. Continue that run with --c, or name weights of other patients"
        )
