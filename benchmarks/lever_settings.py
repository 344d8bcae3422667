"""What a variant of ``levers.py`` is: the levers it pulls, and the schedule and noise that the planner makes of it.

A lever is a field of ``Settings``; every default is what ``nnunet_dp.planning`` does today. Whatever is pulled, the
price is the same: ``planned`` scales the noise so that the steps and morphology's share cost the budget.

>>> parsed("rule=psac,views=2").rule, parsed("default").views, parsed("stock=True,steps=50").optimizer
('psac', 1, 'nesterov')
>>> schedule, steps = planned(parsed("steps=4,noise=falling"), PrivacyBudget(epsilon=1, delta=1e-4), 136, 340_000)
>>> [round(step.noise_multiplier / steps[0].noise_multiplier, 3) for step in steps]
[1.0, 0.841, 0.707, 0.595]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, get_args, get_type_hints

from lever_phantoms import WIDTH

from nnunet_dp import planning
from nnunet_dp.accounting import PrivacyBudget, calibrate, gaussian_mu
from nnunet_dp.clipping import RULE_NAMES, ClipRule, make_rule
from nnunet_dp.dpsgd import PrivacyPlan, Schedule
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.sections import MorphologyPlan

NOISE_SLOPES = {"constant": 0.0, "falling": -1.0, "rising": 1.0}  # doublings of the noise over the run
CHOICES: dict[str, Sequence[str]] = {
    "trains": ("all", "norms"),
    "rule": RULE_NAMES,
    "optimizer": ("sgd", "nesterov", "adam"),
    "loss": ("both", "ce", "dice"),
    "noise": tuple(NOISE_SLOPES),
}


@dataclass(frozen=True)
class Settings:
    """One variant; None leaves the planner's rule.

    Attributes:
        steps, learning_rate: of the schedule; the rate in units of the rule's bound (of Adam: its own).
        power, momentum, average_share: as in ``dpsgd.Schedule``.
        patches: of a patient, averaged before the clip.
        views: of each patch, averaged before the clip: itself and gentle variations of it.
        trains: ``all`` parameters or ``norms`` (and biases) only.
        shrink: each tensor of the released gradient by its estimated share of signal.
        rule, bound, gamma: the clip rule's name, and constants in place of the planner's.
        optimizer: ``sgd``, ``nesterov`` or ``adam``.
        floor: of Adam's second moment, as a share of the noise's variance.
        loss: ``both``, ``ce`` (cross-entropy) or ``dice``.
        deep: nnU-Net's weights of the resolutions, or the finest alone.
        coarse: the coarsest counts as well. nnU-Net gives it no weight, so of three stages only the finest output
            counts: ``deep=False`` changes nothing there, and this is the lever.
        noise: a name in ``NOISE_SLOPES``; all cost the same.
        start: from phantoms, or random weights (and the planner's rules for these).
        width: features of the first stage.
        batch: expected patients of a step, drawn by Poisson sampling; None for the full batch.
    """

    steps: int | None = None
    learning_rate: float | None = None
    power: float = 0.9
    momentum: float = 0.0
    average_share: float = 0.1
    patches: int = 1
    views: int = 1
    trains: str = "all"
    shrink: bool = False
    rule: str = "auto_s"
    bound: float | None = None
    gamma: float | None = None
    optimizer: str = "sgd"
    floor: float = 0.1
    loss: str = "both"
    deep: bool = True
    coarse: bool = False
    noise: str = "constant"
    start: bool = True
    width: int = WIDTH
    batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse, before anything is learnt, what would fail or mislead after it."""
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageRefusal(f"{name} should be one of {', '.join(known)}, found {getattr(self, name)}")
        if self.optimizer == "adam" and self.learning_rate is None:
            raise UsageRefusal("adam should come with a rate of its own, found none: add learning_rate=0.001, say")
        if self.batch is not None and self.noise != "constant":
            raise UsageRefusal(f"noise should be constant with a batch, found {self.noise}: leave out one of them")


STOCK: dict[str, Any] = {
    "rule": "flat", "bound": 1.0, "optimizer": "nesterov", "momentum": 0.99, "learning_rate": 0.01,
    "average_share": 0.0, "batch": 2, "start": False, "steps": 1000,
}  # fmt: skip
"""nnU-Net's stock schedule made private, as ``stock=True``: the naive baseline.

Two of the patients a step, SGD with Nesterov's momentum, polynomial decay, random weights; no augmentation and no
weight decay, as in all variants here. The true one has 250 000 steps and thus more noise in each: this one is kind.
"""


def parsed(text: str) -> Settings:
    """``default``, or ``steps=10,learning_rate=0.3``; ``stock=True`` sets what ``STOCK`` holds and others can change.

    Raises:
        UsageRefusal: for an unknown setting or a value that it cannot have.
    """
    pairs = [pair.partition("=") for pair in text.split(",")] if text != "default" else []
    given = {name: value for name, _, value in pairs}
    preset = STOCK if _truth(given.pop("stock", "False")) else {}
    unknown = set(given) - {field.name for field in fields(Settings)}
    if unknown:
        raise UsageRefusal(f"settings should be fields of Settings or stock, found {', '.join(sorted(unknown))}")
    return Settings(**{**preset, **{name: _reader(name)(value) for name, value in given.items()}})


def _truth(word: str) -> bool:
    if word not in ("True", "False"):
        raise UsageRefusal(f"a switch should be True or False, found {word}")
    return word == "True"


def _reader(name: str) -> Callable[[str], Any]:
    hint = get_type_hints(Settings)[name]
    kind = next((part for part in get_args(hint) if part is not type(None)), hint)
    return _truth if kind is bool else kind


# ---- the plan: what a budget buys -------------------------------------------------------------------------------


def planned(
    chosen: Settings, budget: PrivacyBudget, patients: int, parameters: int
) -> tuple[Schedule, list[PrivacyPlan]]:
    """The planner's rules, but for what was chosen: a schedule, and the privacy of each step."""
    total = chosen.steps or planning.steps(
        budget, round(patients / planning.TRAINING_SHARE), parameters, "full", chosen.start
    )
    signal = planning.signal_to_noise(budget, patients, parameters) if chosen.start else None
    rate = chosen.learning_rate or planning.learning_rate(total, signal)
    privacy = partial(PrivacyPlan, budget, total, _probability(chosen, patients), units=patients, rule=_rule(chosen))
    multipliers = _noise_multipliers(chosen, budget, total, patients)
    schedule = Schedule(rate, chosen.power, chosen.momentum, chosen.average_share)
    return schedule, [privacy(noise_multiplier=multiplier) for multiplier in multipliers]


def _rule(chosen: Settings) -> ClipRule:
    by_hand = {"bound": chosen.bound, "regulariser": chosen.gamma}
    constants = planning.clip_rules(1.0)[chosen.rule].constants
    return make_rule(chosen.rule, {**constants, **{name: x for name, x in by_hand.items() if x is not None}})


def _probability(chosen: Settings, patients: int) -> float:
    return 1.0 if chosen.batch is None else chosen.batch / patients


def _noise_multipliers(chosen: Settings, budget: PrivacyBudget, total: int, patients: int) -> list[float]:
    """Of each step: what the budget leaves beside morphology's share.

    At full batch Gaussians compose exactly, 1 / sigma^2 adds up to mu^2 (Dong et al. 2019, arXiv:1905.02383,
    corollary 3.3), so noise that falls or rises by a factor of two is scaled to the sum of the constant one.
    """
    mu, share = gaussian_mu(budget), planning.MORPHOLOGY_SHARE
    if chosen.batch is not None:
        refinement = MorphologyPlan(share=share, noise_multiplier=1 / (math.sqrt(share) * mu))
        q = _probability(chosen, patients)
        return [calibrate(lambda z: planning._composed(z, q, total, refinement), budget)] * total
    shape = [2 ** (NOISE_SLOPES[chosen.noise] * step / total) for step in range(total)]
    scale = math.sqrt(sum(sigma**-2 for sigma in shape) / (1 - share)) / mu
    return [scale * sigma for sigma in shape]
