"""Cards without a model: of one dataset and of a federation, with names that a user might give."""

from __future__ import annotations

from typing import Any

from nnunet_dp.accounting import which_accountant
from nnunet_dp.card import (
    Card,
    CardCharge,
    ClientLevelRow,
    ClipRow,
    DatasetRow,
    SiteRow,
    TrainingRow,
    canonical_charges,
    sampler_of,
)
from nnunet_dp.card_page import Described
from nnunet_dp.charges import epsilon_of, events_of
from nnunet_dp.claim import Claim
from nnunet_dp.inference_plans import DatasetDescription
from nnunet_dp.sections import NOT_COVERED

DELTA = 1e-5
LONG = "Rindfleischetikettierungsueberwachungsaufgabenuebertragungsgesetz" * 3
NASTY = ("<script>alert(1)<", "{{ 7 * 7 }}", "{% raw %}", "[x](javascript:alert)", "a|b `c` *d*", '"onload="x', LONG)
MODEL = "nnUNetTrainerDP_AutoS__nnUNetPlansDP_eps8_0123456789abcdef__3d_fullres"


def one_dataset_card(sampling_probability: float = 0.5, **changes: Any) -> Card:
    """A training with a vote and a fingerprint before it."""
    training = {"noise_multiplier": 4.0, "sampling_probability": sampling_probability, "count": 60}
    rows = [
        CardCharge(purpose="training", mechanism="gaussian", **training),
        CardCharge(purpose="morphology", mechanism="gaussian", noise_multiplier=4.0, count=1),
        CardCharge(purpose="fingerprint", mechanism="gaussian", noise_multiplier=3.0, count=1),
    ]
    rows = canonical_charges(row.charge for row in rows)
    charges = [row.charge for row in rows]
    epsilon = epsilon_of(charges, DELTA)
    fields = {
        "unit": "patient", "relation": "zero-out", "epsilon": epsilon, "delta": DELTA,
        "dataset": DatasetRow(identity="0a" * 32, epsilon_total=1.5 * epsilon), "charges": rows, "sites": [],
        "client_level": None, "clip": ClipRow(rule="auto_s", constants={"bound": 1.0, "regulariser": 0.01}),
        "sampler": sampler_of(rows), "accountant": which_accountant(events_of(charges), DELTA),
        "training": TrainingRow(steps=60, learning_rate=0.8, decay_power=0.9, momentum=0.0, average_share=0.1),
        "public_inputs": ["number of units, fold of each unit, channels and labels", "plans from a noised fingerprint"],
        "covers": ["training of the network weights", "the plans, which follow a noised fingerprint"],
        "not_covered": sorted(NOT_COVERED[1:]),
    }  # fmt: skip
    return Claim({**fields, **changes}, {"0": (61, 60)}).card()


def federated_card(sites: int = 3, reported: int = 0, **changes: Any) -> Card:
    """Sites with Laplace noise and a count of their own; the last of them only reported."""
    rows = [_site(number, number > sites - reported) for number in range(1, sites + 1)]
    charges = [row for site in rows for row in site.charges]
    fields = {
        "unit": "patient", "relation": "zero-out", "epsilon": max(row.epsilon for row in rows), "delta": DELTA,
        "dataset": None, "charges": [], "sites": rows,
        "client_level": ClientLevelRow(epsilon=9.5, delta=1e-2, unit="site", bound=0.25), "clip": None,
        "sampler": sampler_of([] if reported else charges), "training": None,
        "accountant": which_accountant(events_of(row.charge for row in charges), DELTA),
        "public_inputs": ["number of units at each site, channels and labels"],
        "covers": ["weights of the model, which are means of what the sites released"],
        "not_covered": sorted((*NOT_COVERED, "charges_for_the_same_patient_at_other_sites")),
    }  # fmt: skip
    return Claim({**fields, **changes}, {"all": (0, 20)}).card()


def _site(number: int, reported: bool) -> SiteRow:
    price = {"mechanism": "laplace", "noise_multiplier": 12.0 + number, "count": 20}
    rows = [CardCharge(purpose=purpose, **price) for purpose in ("threshold", "training")]
    epsilon = epsilon_of([row.charge for row in rows], DELTA)
    return SiteRow(
        site=number, epsilon=epsilon, delta=DELTA, unit="patient", rounds=20,
        counted="as reported" if reported else "from its ledger", charges=[] if reported else rows,
        epsilon_total=None if reported else epsilon,
        thresholds=[] if reported else [0.9**round * number for round in range(20)],
    )  # fmt: skip


def described(*labels: str, dataset: str = "Dataset004_Hippocampus", model: str = MODEL) -> Described:
    """A model whose labels and channels have these names."""
    names = labels or ("front", "back")
    told = DatasetDescription(
        channel_names={str(number): name for number, name in enumerate(names[:2])},
        labels={"background": 0, **{name: number for number, name in enumerate(names, 1)}},
        file_ending=".nii.gz",
    )
    return Described(dataset=dataset, model=model, description=told)
