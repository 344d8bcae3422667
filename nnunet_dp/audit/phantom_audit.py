"""One audit on phantoms: canaries, membership inference and gradient inversion, beside what the ledger claims.

Nothing private is read, so that an audit costs no budget. On patients' data every attack would be one more access to
them; until such runs are charged they are refused (``refuse_private_data``).

The protocol is fixed and hashed before anything is trained.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.audit.builds import CORRECT, Subject, phantom_record
from nnunet_dp.audit.canaries import run_canaries
from nnunet_dp.audit.membership import FALSE_POSITIVE_RATES, Attacked, attack_settings, one_thread
from nnunet_dp.audit.reconstruction import Inverted, reconstruct
from nnunet_dp.audit.self_test import NO_PROOF
from nnunet_dp.audit.statistics import OneRun, epsilon_from_one_run
from nnunet_dp.charges import content_hash
from nnunet_dp.errors import Refusal
from nnunet_dp.workers import in_tenths

CANARIES = 400
CANARY_STEPS = 10
PATIENTS_BESIDE = 8
FAMILY_ERROR = 0.05  # of calling any true claim refuted
BOUNDS_PER_SETTING = 12  # three of canaries, nine of attacks; counted by a test


def refuse_private_data(dataset: str) -> None:
    """Refuse to attack a dataset's models.

    Raises:
        Refusal: always; auditing patients' data is an access to them that no ledger pays for yet.
    """
    raise Refusal(
        f"audits run on phantoms; found dataset {dataset}: an attack on patients' data reads them once more, and such "
        "runs are not charged to the dataset's ledger yet. Leave -d out: the audited code is the same"
    )


def run_audit(
    epsilons: Sequence[float],
    sizes: Attacked | None = None,
    seed: int = 1,
    processes: int = 2,
    say: Callable[[str], None] = lambda text: None,
    canaries: int = CANARIES,
    inverted: Inverted | None = None,
) -> dict[str, Any]:
    """Audit the project's own training on phantoms.

    Args:
        epsilons: claimed by the private settings; one without privacy is attacked beside them.
        sizes: of the membership inference.
        seed: of coins, phantoms and initial weights; noise has the system's entropy.
        processes: that train side by side.
        say: told how far it is.
        canaries: in the training of each epsilon.
        inverted: sizes of the gradient inversion.

    Returns:
        The report, plain JSON.
    """
    began, sizes = time.monotonic(), sizes or Attacked()
    inverted = inverted or Inverted(epsilon=max(epsilons), delta=sizes.delta)
    protocol = _protocol(epsilons, sizes, seed, canaries, inverted)
    fixed = content_hash(protocol)
    one_thread()
    planted = []
    for number, epsilon in enumerate(epsilons, 1):
        planted.append(_canaries(epsilon, canaries, sizes, seed, _corrected(len(epsilons))))
        say(f"canaries: {number} of {len(epsilons)} trainings")
    settings = attack_settings([None, *epsilons], sizes, seed, processes, in_tenths(say, "models trained and attacked"))
    drawn = reconstruct(inverted, seed, processes, in_tenths(say, "gradients inverted"))
    return {
        "protocol": protocol,
        "protocol_sha256": fixed,
        "canaries": planted,
        "membership": settings,
        "reconstruction": drawn,
        "refuted": _refuted(planted, settings, sizes.delta),
        "refuted_confidence": 1 - FAMILY_ERROR,
        "seconds": round(time.monotonic() - began, 1),
        "note": NO_PROOF,
    }


def _corrected(settings: int) -> float:
    """Confidence of a single bound at which all bounds together hold with 1 - ``FAMILY_ERROR`` (Bonferroni)."""
    return 1 - FAMILY_ERROR / (settings * BOUNDS_PER_SETTING)


def _canaries(epsilon: float, canaries: int, sizes: Attacked, seed: int, corrected: float) -> dict[str, Any]:
    """One training of the correct build with canaries, and what they show."""
    subject = Subject("audit", CORRECT)
    patients = [phantom_record(seed, index) for index in range(PATIENTS_BESIDE)]
    budget = PrivacyBudget(epsilon=epsilon, delta=sizes.delta, unit="phantom")
    plan = subject.plan(CANARY_STEPS, 1.0, len(patients) + canaries, budget)
    with TemporaryDirectory() as folder:
        training = subject.training(Path(folder), plan, seed)
        run = run_canaries(training, patients, canaries, np.random.default_rng([seed, int(1000 * epsilon)]))
    surer = run.as_dict(corrected)
    return {
        "epsilon": epsilon,
        **run.as_dict(sizes.confidence),
        "corrected": {
            "confidence": corrected,
            "gaussian": surer["empirical_epsilon_gaussian"][-1],
            "any_mechanism": surer["empirical_epsilon_any_mechanism"][-1],
            "one_run": surer["empirical_epsilon_one_run"],
        },
    }


def _refuted(planted: Sequence[dict[str, Any]], settings: Sequence[dict[str, Any]], delta: float) -> list[str]:
    """Every claim that a corrected bound lies above: a sentence each."""
    found = []
    for run in planted:
        claimed = run["ledger_epsilon"][-1]
        for name in ("gaussian", "any_mechanism", "one_run"):
            least = run["corrected"][name]
            if least > claimed:
                found.append(f"canaries ({name}): epsilon at least {least:.3g}, the ledger says {claimed:.3g}")
    for setting in settings:
        for attack in setting["attacks"]:
            least = epsilon_from_one_run(OneRun(**attack["guesses"]), delta, _corrected(len(planted)))
            if setting["epsilon"] is not None and least > setting["epsilon"]:
                found.append(f"{attack['attack']} at {setting['setting']}: epsilon at least {least:.3g}")
    return found


def _protocol(
    epsilons: Sequence[float], sizes: Attacked, seed: int, canaries: int, inverted: Inverted
) -> dict[str, Any]:
    content = {
        "package": version("nnunet_dp"),
        "data": "phantoms: shapes beside the canaries, slices of hippocampus for membership",
        "who_is_a_member": "each canary and each patient by a fair coin of its own; an empty slot otherwise (zero-out)",
        "canaries": {"number": canaries, "steps": CANARY_STEPS, "patients": PATIENTS_BESIDE},
        "family_error": FAMILY_ERROR,
        "canary_threshold": "half-way between absent and present under the planned noise",
        "attacks": "loss, loss of each class, boundary, LiRA, labels before and after refinement",
        "guesses": "extremes of each model's scores, the stated share",
        "false_positive_rates": list(FALSE_POSITIVE_RATES),
        "epsilons": list(epsilons),
        "membership": asdict(sizes),
        "reconstruction": asdict(inverted),
        "seed": seed,
    }
    return json.loads(json.dumps(content))
