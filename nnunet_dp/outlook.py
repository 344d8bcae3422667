"""What to expect of a plan, before anybody trains: signal against noise, an attacker's gain, and a verdict in words.

The network travels along the patients' mean clipped gradient and is pushed about by noise. At full batch, T steps of
noise sigma = sqrt(T) / mu on a sum over N patients move it by noise of norm T sqrt(d) / (mu N) for a signal of at most
T (in units of learning rate and clipping bound). So

    signal to noise = mu N / sqrt(d),

whatever the number of steps. Noise in directions that the loss does not feel is harmless, so a number far below 1 can
be good. The limits are judgements from a few phantom and prototype runs (docs/accuracy.md), not measured thresholds.

>>> outlook(PrivacyBudget(epsilon=8, delta=1e-5), patients=136, parameters=340_000, start=True).verdict
'comfortable'
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.planning import signal_to_noise

Verdict = Literal["comfortable", "doubtful", "hopeless"]
COMFORTABLE, DOUBTFUL = 0.2, 0.05  # signal to noise from random weights
START_GAIN = 4.0  # with a public start, a signal so many times weaker does as well


@dataclass(frozen=True)
class Outlook:
    """What to expect.

    Attributes:
        signal_to_noise: mu N / sqrt(d).
        verdict: one word.
        reason: a sentence.
        next_step: what to do about it.
    """

    signal_to_noise: float
    verdict: Verdict
    reason: str
    next_step: str


def outlook(budget: PrivacyBudget, patients: int, parameters: int, start: bool) -> Outlook:
    """The verdict on training that many patients with that many parameters.

    Args:
        budget: target.
        patients: that train in one run.
        parameters: trainable ones.
        start: whether the network begins from phantoms that resemble the dataset.
    """
    signal = signal_to_noise(budget, patients, parameters)
    scaled = signal * (START_GAIN if start else 1)
    verdict: Verdict = "comfortable" if scaled >= COMFORTABLE else "doubtful" if scaled >= DOUBTFUL else "hopeless"
    wanted = math.ceil(patients * COMFORTABLE / scaled)
    began = "from a public start" if start else "from random weights"
    return Outlook(signal, verdict, f"signal to noise {signal:.2g} {began}", _next_step(verdict, wanted, start))


def _next_step(verdict: Verdict, wanted: int, start: bool) -> str:
    if verdict == "comfortable":
        return "train"
    better = "" if start else "plan with a public start, "
    return f"{better}take a larger epsilon, or some {wanted} training patients; a smaller network helps a little"
