"""What a site's dataset has left: one rule for every charge, and the question whether a run could begin at all.

A run that no step fits is declined while it prepares, before the site preprocesses for it and the others wait; one that
some steps fit takes part until the budget is spent, as the settings say.

Formal guarantee:
    No charge ``fits`` that would bring the dataset's total, over every run in its ledger, above ``max_epsilon`` at the
    site's own delta. ``refuse_spent`` charges nothing, and is a function of the ledger, the settings and the terms.
"""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_dp.charges import Charge, epsilon_of
from nnunet_dp.errors import BudgetRefusal
from nnunet_dp.federated.local import private_plan
from nnunet_dp.federated.protocol import Terms
from nnunet_dp.federated.raw_dataset import PATIENTS, read_raw
from nnunet_dp.federated.site_settings import SiteSettings
from nnunet_dp.federated.site_store import Store, fingerprint_run
from nnunet_dp.ledger import read_ledger
from nnunet_dp.nnunet_site import find_units, own_delta, run_budget
from nnunet_dp.patients import Patients
from nnunet_dp.sections import FingerprintPlan


def fits(charged: Sequence[Charge], further: Sequence[Charge], settings: SiteSettings, patients: Patients) -> bool:
    """Whether further charges keep the dataset's total within the site's own settings.

    Args:
        charged: every line of the dataset's ledger.
        further: about to be charged.
        settings: the site's own.
        patients: its units.
    """
    return epsilon_of([*charged, *further], own_delta(settings, patients)) <= settings.max_epsilon


def refuse_spent(terms: Terms, settings: SiteSettings, store: Store) -> None:
    """Refuse a new run whose first step does not fit.

    Raises:
        BudgetRefusal: for terms that the dataset's budget has no room for.
        LedgerError: for a ledger that cannot be read.
    """
    charged = read_ledger(store.dataset_ledger) if terms.private and store.dataset_ledger.is_file() else ()
    if not charged:
        return
    prepared = store.is_prepared(terms.plans_sha256, terms.configuration)  # then raw data may have been put away
    patients = find_units(settings, store.preprocessed) if prepared else raw_units(settings, store)
    fingerprint = FingerprintPlan.of(fingerprint_run(terms.run), charged)
    budget = run_budget(terms.epsilon, terms.delta, settings, patients)
    plan = private_plan(terms, patients.number, budget, (fingerprint.charge,) if fingerprint else ())
    if not fits(charged, plan.charges_of(0), settings, patients):
        raise BudgetRefusal("no step of this run fits the dataset's budget: it would pass max_epsilon")


def raw_units(settings: SiteSettings, store: Store) -> Patients:
    """The units that a training would have, before anything is preprocessed: a table kept for it counts, too."""
    kept = store.preprocessed / PATIENTS
    named = settings.patients_file or (kept if kept.is_file() and not (store.raw / PATIENTS).is_file() else None)
    return read_raw(store.raw, named, settings.patients_column).patients
