"""A site's part of the federation's fingerprint: its patients' votes, noised and charged before they leave.

    images -> nnU-Net's measurements -> votes of the patients -> charge -> noise -> kept on disk -> sent

The votes are released once for a run: asked again, what lies on disk is sent, uncharged. A process that was killed
between charge and disk has lost its release; the charge stays, and a new one is made. The run's training is calibrated
for everything that was charged before it (``local.private_plan``), so all together keep within the run's epsilon.

Formal guarantee:
    What is sent is one Gaussian release at the full batch (``fingerprint.release``), of the multiplier that the asked
    share of the run's budget buys at the smaller of the run's and the site's delta; the dataset's ledger holds its
    charge first, and its total stays within ``max_epsilon``. In the modes without a guarantee the votes are exact.
    Whether the images can be measured at all is told, too, and depends on nothing that the coordinator chooses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.charges import FINGERPRINT, LedgerError, epsilon_of
from nnunet_dp.errors import BudgetRefusal, Refusal
from nnunet_dp.federated.protocol import Code, FingerprintRequest
from nnunet_dp.federated.site_budget import fits, raw_units
from nnunet_dp.federated.site_settings import SiteSettings
from nnunet_dp.federated.site_store import Declined, Store, fingerprint_run
from nnunet_dp.fingerprint import Ballot, mechanism_for, release
from nnunet_dp.ledger import Ledger
from nnunet_dp.nnunet_fingerprint import ballot_for, measure
from nnunet_dp.nnunet_site import run_budget
from nnunet_dp.patients import Patients
from nnunet_dp.plans import json_sha256
from nnunet_dp.run import RunFolder

VOTES = "votes"
Answer = tuple[dict[str, Any], dict[str, np.ndarray]]


def release_fingerprint(request: FingerprintRequest, settings: SiteSettings, store: Store) -> Answer:
    """Answer a ``fingerprint`` message; the caller holds the dataset.

    Args:
        request: public numbers.
        settings: the site's own.
        store: the site's files.

    Returns:
        Fields of the reply, and the votes [numbers of the ballot], float64.

    Raises:
        Declined: with the code for the coordinator.
    """
    patients = raw_units(settings, store)
    budget = run_budget(request.epsilon, request.delta, settings, patients)
    asked = request.model_dump(mode="json", exclude={"protocol", "run", "dataset_json"})
    released = store.fingerprint(request.run)
    if released is None and store.run_record(request.run) is not None:
        raise Declined(Code.malformed, "this run trains already: its noise was calibrated without a fingerprint")
    if released is None:
        votes = _released(request, asked, budget, patients, settings, store)
    elif released["asked"] == asked:
        votes = np.asarray(released["votes"])
    else:
        raise Declined(Code.malformed, "this run's fingerprint was asked for with other numbers before")
    return {"run": request.run, **_spent(request, budget)}, {VOTES: votes}


def _released(
    request: FingerprintRequest,
    asked: Mapping[str, Any],
    budget: PrivacyBudget,
    patients: Patients,
    settings: SiteSettings,
    store: Store,
) -> np.ndarray:
    """The votes, measured, paid for, noised and kept."""
    ballot = ballot_for(store.dataset_json())
    if not request.mode.private:
        store.note_no_guarantee()
        votes = _sum_of_votes(ballot, patients, settings, store)
    else:
        ledger = _ledger(request, asked, patients, store)
        mechanism = mechanism_for(budget, request.share)
        charge = mechanism.charge(FINGERPRINT, step=None)

        def refuse_beyond_budget() -> None:
            if not fits(ledger.entries, [charge], settings, patients):
                raise BudgetRefusal("the fingerprint does not fit the dataset's budget")

        refuse_beyond_budget()
        exact = _sum_of_votes(ballot, patients, settings, store)
        refuse_beyond_budget()  # a training here may have charged since
        votes = release(ballot, exact, mechanism, ledger.charge(charge))
    store.write_fingerprint(request.run, asked, votes.tolist())
    return votes


def _ledger(request: FingerprintRequest, asked: Mapping[str, Any], patients: Patients, store: Store) -> Ledger:
    """The dataset's, opened for this release."""
    copy, name = store.fingerprint_charges(request.run), fingerprint_run(request.run)
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        RunFolder(copy.parent, store.dataset_ledger, store.results).verify_ledger()
        ledger = Ledger(
            store.dataset_ledger, name, json_sha256(dict(asked)), copy, patients.unit, patients.table_sha256
        )
    except Refusal as refusal:
        raise LedgerError(str(refusal)) from None
    if any(entry.plan != ledger.plan for entry in ledger.own_entries):
        raise Declined(Code.malformed, "this run's fingerprint was charged for other numbers before")
    return ledger


def _sum_of_votes(ballot: Ballot, patients: Patients, settings: SiteSettings, store: Store) -> np.ndarray:
    """Added over all patients; private."""
    values = measure(store.raw, settings.processes)
    cases = patients.cases_of(values)
    return np.sum([ballot.votes([values[case] for case in mine]) for mine in cases.values()], axis=0)


def _spent(request: FingerprintRequest, budget: PrivacyBudget) -> dict[str, Any]:
    """What the release cost by itself."""
    if not request.mode.private:
        return {}
    charge = mechanism_for(budget, request.share).charge(FINGERPRINT, step=None)
    return {"epsilon": epsilon_of([charge], budget.delta), "delta": budget.delta, "unit": budget.unit[:40]}
