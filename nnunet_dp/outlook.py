"""What to expect of a plan, before anybody trains: signal against noise, and a verdict in words.

The network travels along the patients' mean clipped gradient and is pushed about by noise. T steps of learning rate r
move it by a signal of norm at most r T (in units of the clipping bound). Their noise, of multiplier sigma on a sum over
an expected batch of q N patients, moves d parameters by r sqrt(T) sigma sqrt(d) / (q N). So

    signal to noise = sqrt(T) q N / (sigma sqrt(d)),

from the plan's own numbers, set by hand or not. At full batch sigma is sqrt(T) / mu, and this is mu N / sqrt(d),
whatever the number of steps (``planning.signal_to_noise``, by which the rules choose it; mu is what the release for
refinement leaves). Noise in directions that the loss does not feel is harmless, so a number far below 1 can be good.

The limits are judgements from a few phantom and prototype runs (docs/accuracy.md), not measured thresholds, and those
runs followed the rules' own schedules. The number knows nothing of a single step that goes nowhere: where the schedule
was set by hand, the reason says so.

>>> from nnunet_dp.accounting import PrivacyBudget
>>> from nnunet_dp.planning import plan_configuration
>>> budget = PrivacyBudget(epsilon=8, delta=1e-5)
>>> plan = plan_configuration(budget, 170, (64, 64), [[1, 1], [2, 2], [2, 2]], lambda shape: 340_000, "full")
>>> outlook(plan, patients=136, start=True).verdict
'comfortable'
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nnunet_dp.sections import ConfigurationPlan

Verdict = Literal["comfortable", "doubtful", "hopeless"]
COMFORTABLE, DOUBTFUL = 0.2, 0.05  # signal to noise from random weights
START_GAIN = 4.0  # with a public start, a signal so many times weaker does as well
SCHEDULE = ("steps", "sampling_probability", "learning_rate", "momentum", "decay_power", "average_share")


@dataclass(frozen=True)
class Outlook:
    """What to expect.

    Attributes:
        signal_to_noise: of the planned schedule, sqrt(T) q N / (sigma sqrt(d)).
        verdict: one word.
        reason: a sentence.
        next_step: what to do about it.
    """

    signal_to_noise: float
    verdict: Verdict
    reason: str
    next_step: str


def outlook(plan: ConfigurationPlan, patients: int, start: bool) -> Outlook:
    """The verdict on a training by that plan.

    Args:
        plan: steps, sampling, noise, number of parameters, and what of it was set by hand.
        patients: that train in one run.
        start: whether the network begins from phantoms that resemble the dataset.
    """
    signal = planned_signal_to_noise(plan, patients)
    scaled = signal * (START_GAIN if start else 1)
    verdict: Verdict = "comfortable" if scaled >= COMFORTABLE else "doubtful" if scaled >= DOUBTFUL else "hopeless"
    wanted = math.ceil(patients * COMFORTABLE / scaled)
    return Outlook(signal, verdict, _reason(plan, signal, start), _next_step(verdict, wanted, start))


def planned_signal_to_noise(plan: ConfigurationPlan, patients: int) -> float:
    """How far that schedule moves the network at most, over how far its noise does: sqrt(T) q N / (sigma sqrt(d))."""
    expected_batch = plan.sampling_probability * patients
    return math.sqrt(plan.steps / plan.network.parameters) * expected_batch / plan.noise_multiplier


def _reason(plan: ConfigurationPlan, signal: float, start: bool) -> str:
    began = "from a public start" if start else "from random weights"
    changed = ", ".join(name for name in plan.by_hand if name in SCHEDULE)
    judged = f" (judged by runs of the planner's own schedule; {changed} set by hand)" if changed else ""
    return f"signal to noise {signal:.2g} {began}{judged}"


def _next_step(verdict: Verdict, wanted: int, start: bool) -> str:
    if verdict == "comfortable":
        return "train"
    better = "" if start else "plan with a public start, "
    return f"{better}take a larger epsilon, or some {wanted} training patients; a smaller network helps a little"
