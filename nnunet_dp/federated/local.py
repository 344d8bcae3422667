"""The local steps of a site: from a run's public terms to a training that takes them.

``make_training`` chooses by mode and noise; everything after it speaks one interface (``LocalTraining``).

=========  ========  ====================  ===========================================================================
mode       noise     training              clipping bound, and what a step costs
=========  ========  ====================  ===========================================================================
dp-fedavg  gaussian  ``PrivateTraining``   fixed C; one (subsampled) Gaussian
dp-fedavg  laplace   ``PrivateTraining``   fixed C on L1 norms; one Laplace, full batch
adp-fl     gaussian  ``PrivateTraining``   follows a percentile by a noised count on the same draw; one Gaussian
adp-fl     laplace   ``PrivateTraining``   the same on L1 norms; one Laplace and one Gaussian, full batch
fedavg     none      NoGuaranteeTraining   none; no guarantee
paper      either    NoGuaranteeTraining   raw percentile of the drawn patients' norms; no guarantee
=========  ========  ====================  ===========================================================================

>>> terms = Terms(run="0a", mode="adp-fl", epsilon=8.0, rounds=20, plans_sha256="0", configuration="2d", percentile=75)
>>> plan = private_plan(terms, units=50, budget=PrivacyBudget(epsilon=8.0, delta=1e-4))
>>> plan.rule.target_quantile, plan.steps, plan.epsilon <= 8.0
(0.75, 20, True)

Formal guarantee:
    In the private modes, that of ``dpsgd.PrivateTraining``. In the others, none: their training says ``no guarantee``,
    and is made without a ledger.

Design note: how far the threshold travels is public too. Each step moves ln C by at most ``ADAPTATION`` times the
distance of the target from 0 or 1, so a first threshold that is wrong by a factor f needs about
ln f / (ADAPTATION * min(p, 1 - p)) steps with p the percentile as a share: 46 steps for f = 100 and the median, 230
from above for the 90th percentile. A first threshold is worth choosing well where steps are few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Protocol

from dp_accounting.dp_event import ComposedDpEvent
from torch import Tensor, nn

from nnunet_dp.accounting import PrivacyBudget, calibrate
from nnunet_dp.charges import Charge
from nnunet_dp.clipping import ClipRule, make_rule
from nnunet_dp.dpsgd import Execution, PrivacyPlan, PrivateTraining, RecordsOf, Schedule
from nnunet_dp.errors import Refusal
from nnunet_dp.federated.local_no_guarantee import NoGuaranteeTraining, mean_gradient, raw_percentile
from nnunet_dp.federated.protocol import Mode, Terms
from nnunet_dp.ledger import Ledger

ADAPTATION = 0.2
"""Learning rate of the threshold: Andrew et al. 2021, arXiv:1905.03871."""


class LocalTraining(Protocol):
    """A site's training in progress, with a guarantee (``private``) or without."""

    private: ClassVar[bool]
    network: nn.Module
    plan: PrivacyPlan
    rule: ClipRule
    step: int

    @property
    def finished(self) -> bool:
        """Whether no further step is planned or paid for."""
        ...

    @property
    def next_charges(self) -> tuple[Charge, ...]:
        """What the next step will be charged; nothing without a guarantee."""
        ...

    def advance(self, records_of: RecordsOf, watch: Callable[[Tensor], None] = ...) -> None:
        """Take one step; ``BudgetRefusal`` beyond the plan."""
        ...

    def next_state(self, data: str) -> dict[str, Any]:
        """State for the next checkpoint: step, threshold, weights, optimizer."""
        ...

    def restore(self, state: dict[str, Any], data: str) -> None:
        """Continue from a checkpoint, or refuse."""
        ...

    def saved(self, state: dict[str, Any]) -> None:
        """Note that ``state`` is the newest checkpoint on disk."""
        ...


def make_training(
    terms: Terms,
    network: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    plan: PrivacyPlan,
    schedule: Schedule,
    execution: Execution,
    ledger: Ledger | None,
) -> LocalTraining:
    """The training that the terms ask for.

    Args:
        terms: of the run.
        network: on the device; its weights are replaced each round.
        loss: (output, target) -> scalar mean over one patient's patches.
        plan: of the same terms (``private_plan``).
        schedule: of the same terms (``schedule_of``).
        execution: what moves speed.
        ledger: opened for this run; the modes without a guarantee have none.

    Raises:
        Refusal: for a plan of other terms, and for a private mode without a ledger.
        BudgetRefusal: for a plan that costs more than its budget.
    """
    _refuse_other_plan(terms, plan)
    parts = (network, loss, plan, schedule, execution)
    if terms.mode is Mode.fedavg:
        return NoGuaranteeTraining(*parts, mean_gradient, nesterov=terms.momentum > 0)
    if terms.mode is Mode.paper:
        return NoGuaranteeTraining(*parts, partial(raw_percentile, percentile=terms.percentile, noise=terms.noise))
    if ledger is None:
        raise Refusal(f"{terms.mode.value} should charge a ledger, found none: open the site's ledger first")
    return PrivateTraining(*parts, ledger)


def private_plan(terms: Terms, units: int, budget: PrivacyBudget, paid: tuple[Charge, ...] = ()) -> PrivacyPlan:
    """What moves epsilon, with the least noise that keeps all steps of the terms, and what was paid, within the budget.

    ``paper`` is calibrated as if its threshold were a fixed one, which it is not; ``fedavg`` has noise 0, with which no
    mechanism can be made.

    Args:
        terms: of the run.
        units: public number of the site's patients.
        budget: the site's own target.
        paid: what the run was charged before its training: for its fingerprint.

    Raises:
        BudgetRefusal: for a budget that no noise reaches.
    """
    plan = PrivacyPlan(budget, terms.steps, terms.sampling_probability, 0.0, units, first_rule(terms), paid=paid)
    if terms.mode is Mode.fedavg:
        return plan
    return replace(plan, noise_multiplier=calibrate(lambda noise: _schedule_at(plan, noise), budget))


def schedule_of(terms: Terms) -> Schedule:
    """What moves accuracy and not epsilon."""
    return Schedule(terms.learning_rate, power=terms.decay_power, momentum=terms.momentum)


def first_rule(terms: Terms) -> ClipRule:
    """Clip rule of the first step; of no effect in ``fedavg``, and without promise in ``paper``."""
    adaptive = {"target_quantile": terms.percentile / 100, "learning_rate": ADAPTATION}
    return make_rule(terms.rule, {"bound": terms.bound} | (adaptive if terms.mode is Mode.adp_fl else {}))


def _schedule_at(plan: PrivacyPlan, noise_multiplier: float) -> Any:
    events = replace(plan, noise_multiplier=noise_multiplier).events
    return ComposedDpEvent(events) if len(events) > 1 else events[0]


def _refuse_other_plan(terms: Terms, plan: PrivacyPlan) -> None:
    asked = (terms.steps, terms.sampling_probability, first_rule(terms))
    if (plan.steps, plan.sampling_probability, plan.rule) != asked:
        raise Refusal("steps, sampling and clip rule of the plan should be those of the terms: make it by private_plan")
