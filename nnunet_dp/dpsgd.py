"""One private training: the step, its state, and what makes it stop.

A step is one straight line; everything below the noise is post-processing::

    ledger charged -> draw patients -> patches -> ClippedSum -> NoisedSum -> parameter.grad -> optimizer -> average

What moves epsilon (``PrivacyPlan``), what moves only accuracy (``Schedule``) and what moves only speed (``Execution``)
never share a dataclass. ``PrivateTraining`` composes them with a network, a loss and a ledger.

Formal guarantee:
    The weights, their average, the optimizer state and the clipping threshold after k steps are a function of public
    values and k releases of ``plan.mechanism``, each charged to the ledger before it was drawn. No step is taken that
    the run's charges leave no budget for, whatever crashed before.

Design note: the noised mean is divided by the rule's bound, so that a learning rate means the same for every clip rule
("normalised clipping", De et al. 2022, arXiv:2204.13650). Division is by the expected batch, never by the drawn one.
"""

from __future__ import annotations

import copy
import hashlib
import secrets
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from dp_accounting.dp_event import DpEvent, SelfComposedDpEvent
from torch import Tensor, nn

from nnunet_dp.accounting import PrivacyBudget, epsilon
from nnunet_dp.charges import MORPHOLOGY, TRAINING, Charge, of_purpose, steps_charged
from nnunet_dp.clipping import ClipRule, QuantileAdaptive
from nnunet_dp.errors import BudgetRefusal, Refusal, UsageRefusal
from nnunet_dp.gradients import Engine, Record, one_at_a_time, trainable
from nnunet_dp.l1_clipping import LaplaceStep, one_at_a_time_l1
from nnunet_dp.ledger import Ledger, Receipt
from nnunet_dp.mechanisms import ClippedSum, GaussianWithCount, NoisedSum, SubsampledGaussian, fresh_generator
from nnunet_dp.ranks import Alone, Clip, Draw, Ranks
from nnunet_dp.sampling import poisson_draw

RecordsOf = Callable[[int, list[int]], Iterable[Record]]


@dataclass(frozen=True)
class PrivacyPlan:
    """What moves epsilon.

    Attributes:
        budget: target epsilon and delta, relation and unit.
        steps: number of noised releases the budget was calibrated for.
        sampling_probability: Poisson inclusion probability q of each slot and step.
        noise_multiplier: noise standard deviation divided by the clip rule's bound.
        units: public number of training slots.
        rule: clip rule of the first step.
        morphology_noise: noise multiplier of the one release that refinement learns from, or None for no release.
        paid: what was charged for this training before it began: for the fingerprint that its plans follow.
    """

    budget: PrivacyBudget
    steps: int
    sampling_probability: float
    noise_multiplier: float
    units: int
    rule: ClipRule
    morphology_noise: float | None = None
    paid: tuple[Charge, ...] = field(default=(), repr=False)

    @property
    def expected_batch(self) -> float:
        """Public divisor of every sum: q times the number of slots."""
        return self.sampling_probability * self.units

    @property
    def mechanism(self) -> SubsampledGaussian | GaussianWithCount | LaplaceStep:
        """The one mechanism of the run; a quantile's count shares the draw and the price of the gradient.

        Beside Laplace noise the count has a price of its own, and there is no draw but the full batch.
        """
        counted = isinstance(self.rule, QuantileAdaptive)
        count_noise = max(self.expected_batch / 10, 2 * self.noise_multiplier)  # Andrew 2021, made to need z < 2 s
        if self.rule.order == 1:
            self._refuse_draw()
            return LaplaceStep(self.noise_multiplier, count_noise if counted else None)
        if counted:
            return GaussianWithCount(self.noise_multiplier, count_noise, self.sampling_probability)
        return SubsampledGaussian(self.noise_multiplier, self.sampling_probability)

    def charges_of(self, step: int) -> tuple[Charge, ...]:
        """What a step is charged before anybody is drawn, in this order."""
        mechanism = self.mechanism
        if isinstance(mechanism, LaplaceStep):
            return mechanism.charges(step)
        return (mechanism.charge(TRAINING, step),)

    def _refuse_draw(self) -> None:
        if self.sampling_probability < 1:
            raise UsageRefusal(
                f"an L1 clip rule should come with sampling probability 1, the full batch, found "
                f"{self.sampling_probability}: set it to 1, or take Gaussian noise"
            )

    @property
    def morphology(self) -> SubsampledGaussian | None:
        """The mechanism of the release that refinement learns from."""
        return None if self.morphology_noise is None else SubsampledGaussian(self.morphology_noise)

    @property
    def events(self) -> list[DpEvent]:
        """All planned releases, and those before."""
        extra = [self.morphology.event] if self.morphology else []
        return [SelfComposedDpEvent(self.mechanism.event, self.steps), *extra, *(charge.event for charge in self.paid)]

    @property
    def epsilon(self) -> float:
        """What all planned releases cost together."""
        return epsilon(self.events, self.budget.delta)

    def verify(self) -> None:
        """Refuse a schedule that costs more than its budget (a plan edited by hand, say).

        Raises:
            BudgetRefusal: with both numbers.
        """
        if self.epsilon > self.budget.epsilon:
            raise BudgetRefusal(
                f"this plan would spend epsilon {self.epsilon:.4g} at delta {self.budget.delta:g}, its target is "
                f"{self.budget.epsilon:g}: make it again with `nnunet-dp plan ... --overwrite`"
            )

    def digest(self) -> str:
        """Hash of everything that moves epsilon; written into each charge, compared when a run is resumed."""
        return hashlib.sha256(repr((1, self, *self.paid)).encode()).hexdigest()


@dataclass(frozen=True)
class Schedule:
    """What moves accuracy and not epsilon.

    Attributes:
        learning_rate: of the first step, in units of the clip rule's bound.
        power: exponent of the polynomial decay over the planned steps.
        momentum: of SGD; 0 with normalised gradients.
        average_share: window of the weight average as a share of the planned steps.
    """

    learning_rate: float
    power: float = 0.9
    momentum: float = 0.0
    average_share: float = 0.1

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Polynomial decay; a run that ends early has simply not reached the tail."""
        return self.learning_rate * (1 - step / steps) ** self.power

    def average_decay(self, step: int, steps: int) -> float:
        """Weight of the old average: a running mean at first, then an exponential window."""
        return min(step / (step + 1), 1 - 1 / max(2.0, self.average_share * steps))


@dataclass(frozen=True)
class Execution:
    """What moves only speed.

    Attributes:
        device: where the network lives.
        engine: per-sample gradient engine.
        autocast: context of the forward pass (bfloat16 where the device is fast at it).
        ranks: processes that share each step.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    engine: Engine = one_at_a_time
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    ranks: Ranks = field(default_factory=Alone)

    def clip(
        self,
        network: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        records_of: RecordsOf,
        rule: ClipRule,
        watch: Callable[[Tensor], None] = lambda loss: None,
    ) -> Clip:
        """This process's part of a step: the clipped sum of the patients that it is given, with the draw's bound."""

        def clipped(draw: Draw) -> ClippedSum:
            own = replace(rule, bound=draw.bound)
            return self.engine(network, loss, records_of(draw.step, draw.slots), own, self.autocast, watch)

        return clipped


class PrivateTraining:
    """A private training in progress: network, optimizer, average, threshold and step number.

    Args:
        network: trainable module, already on the device.
        loss: (output, target) -> scalar mean over one patient's patches.
        plan: what moves epsilon; verified against its budget.
        schedule: what moves accuracy.
        execution: what moves speed.
        ledger: opened for this run; it is charged before each release.
    """

    private: ClassVar[bool] = True

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        plan: PrivacyPlan,
        schedule: Schedule,
        execution: Execution,
        ledger: Ledger,
    ) -> None:
        plan.verify()
        if plan.rule.order == 1 and execution.ranks.size > 1:
            raise UsageRefusal("an L1 clip rule should be trained with by one process, found several: use one device")
        self.network, self.loss, self.ledger = network, loss, ledger
        self.plan, self.schedule, self.execution = plan, schedule, execution
        self.rule = plan.rule
        self.step = 0
        self.checkpoint: str | None = None
        self.optimizer = torch.optim.SGD(trainable(network)[1], schedule.learning_rate, momentum=schedule.momentum)
        self.average = [parameter.detach().clone() for parameter in trainable(network)[1]]

    @property
    def charged(self) -> int:
        """Steps charged to this run, those lost in a crash included."""
        return steps_charged(self.ledger.own_entries)

    @property
    def finished(self) -> bool:
        """Whether the schedule is done or the budget leaves no further step."""
        return self.step >= self.plan.steps or self.charged >= self.plan.steps

    @property
    def next_charges(self) -> tuple[Charge, ...]:
        """What the next step is charged."""
        return self.plan.charges_of(self.step)

    def advance(self, records_of: RecordsOf, watch: Callable[[Tensor], None] = lambda loss: None) -> None:
        """Take one private step.

        Args:
            records_of: (step, drawn slots) -> their records, in any order.
            watch: sees each drawn patient's loss; private, must stay local.

        Raises:
            BudgetRefusal: when the run's charges leave no budget for another step.
        """
        self._refuse_beyond_budget()
        receipts = [self.ledger.charge(charge, self.checkpoint) for charge in self.next_charges]
        drawn = poisson_draw(self.plan.units, self.plan.sampling_probability, fresh_generator("cpu"))
        self._descend(self._released(records_of, drawn, receipts, watch))
        self.execution.ranks.send_weights(self.network)

    def _released(
        self, records_of: RecordsOf, drawn: list[int], receipts: list[Receipt], watch: Callable[[Tensor], None]
    ) -> NoisedSum:
        """The clipped sum of the drawn patients, noised against its receipts."""
        mechanism, execution = self.plan.mechanism, self.execution
        if isinstance(mechanism, LaplaceStep):
            records = records_of(self.step, drawn)
            clipped = one_at_a_time_l1(self.network, self.loss, records, self.rule, execution.autocast, watch)
            return mechanism.release(clipped, receipts, fresh_generator(execution.device))
        (receipt,) = receipts
        clip = execution.clip(self.network, self.loss, records_of, self.rule, watch)
        whole = execution.ranks.clipped_sum(Draw(self.step, drawn, self.rule.bound), clip)
        return mechanism.release(whole, receipt, fresh_generator(execution.device))

    def _refuse_beyond_budget(self) -> None:
        own = self.ledger.own_entries
        learnt = [entry.event for entry in of_purpose(own, MORPHOLOGY)]
        learning = [self.plan.morphology.event] if self.plan.morphology else []
        prices = {charge.purpose: charge.unit_event for charge in self.next_charges}
        stepped = [entry for entry in own if entry.purpose in prices]
        strange = any(entry.unit_event != prices[entry.purpose] for entry in stepped)
        unpaired = any(len(of_purpose(own, purpose)) > len(of_purpose(own, TRAINING)) for purpose in prices)
        if strange or unpaired or learnt not in ([], learning) or len(stepped) + len(learnt) < len(own):
            raise Refusal("the ledger holds charges of this run that its plan does not know: start a new run")
        if steps_charged(own) >= self.plan.steps:
            raise BudgetRefusal(f"all {self.plan.steps} planned releases are charged: the budget is spent")

    def _descend(self, noised: NoisedSum) -> None:
        """Post-processing: mean by public numbers, optimizer step, threshold, weight average."""
        scale = 1.0 / (self.plan.expected_batch * noised.l2_bound)
        parameters = trainable(self.network)[1]
        for parameter, tensor in zip(parameters, noised.tensors, strict=True):
            parameter.grad = (tensor * scale).to(parameter.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate_at(self.step, self.plan.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.rule, QuantileAdaptive):
            assert noised.noised_count is not None
            self.rule = self.rule.updated(noised.noised_count, self.plan.expected_batch)
        decay = self.schedule.average_decay(self.step, self.plan.steps)
        with torch.no_grad():
            for mean, parameter in zip(self.average, parameters, strict=True):
                mean.lerp_(parameter, 1 - decay)
        self.step += 1

    def averaged_weights(self) -> dict[str, Tensor]:
        """State dict of the network with the averaged weights in place of the raw ones."""
        state = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}
        by_identity = {
            parameter.data_ptr(): mean for parameter, mean in zip(trainable(self.network)[1], self.average, strict=True)
        }
        for name, tensor in self.network.state_dict().items():  # one parameter may stand under several names
            if tensor.data_ptr() in by_identity:
                state[name] = by_identity[tensor.data_ptr()].clone()
        return state

    # ---- what a crash leaves -----------------------------------------------------------------------------------

    def next_state(self, data: str) -> dict[str, Any]:
        """State for the next checkpoint: released values only, plus its place in the chain of checkpoints.

        Draws, patches, noise and generator states are not part of it: after a resume everything is drawn afresh.

        Args:
            data: digest of dataset, split and patients, compared on ``restore``.
        """
        sequence, head = self.ledger.head
        return {
            "id": secrets.token_hex(16),
            "run": self.ledger.run,
            "plan": self.plan.digest(),
            "data": data,
            "ledger_sequence": sequence,
            "ledger_head": head,
            "step": self.step,
            "bound": self.rule.bound,
            "weights": [parameter.detach().cpu().clone() for parameter in trainable(self.network)[1]],
            "average": [mean.cpu().clone() for mean in self.average],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def saved(self, state: dict[str, Any]) -> None:
        """Note that ``state`` is now the newest checkpoint on disk; later charges name it."""
        self.checkpoint = state["id"]

    def restore(self, state: dict[str, Any], data: str) -> None:
        """Continue from a checkpoint, or refuse.

        Raises:
            Refusal: for a changed plan, clip rule, dataset or split, a ledger shorter than the checkpoint says, or a
                checkpoint from which, or from a later one, the run was already continued.
        """
        self._refuse_foreign(state, data)
        with torch.no_grad():
            for parameter, saved in zip(trainable(self.network)[1], state["weights"], strict=True):
                parameter.copy_(saved)
            for mean, saved in zip(self.average, state["average"], strict=True):
                mean.copy_(saved)
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.rule = replace(self.rule, bound=state["bound"])
        self.step = state["step"]
        self.checkpoint = state["id"]

    def _refuse_foreign(self, state: dict[str, Any], data: str) -> None:
        if state["run"] != self.ledger.run:
            raise Refusal("the checkpoint belongs to another run than the ledger beside it: start without --c")
        if state["plan"] != self.plan.digest():
            raise Refusal("the plan or the clip rule changed since the checkpoint was written: start without --c")
        if state["data"] != data:
            raise Refusal("the dataset, its split or its patients changed since the checkpoint: start without --c")
        self.ledger.verify_contains(state["ledger_sequence"], state["ledger_head"])
        later = [entry for entry in self.ledger.own_entries if entry.sequence > state["ledger_sequence"]]
        if any(entry.checkpoint != state["id"] for entry in later):
            raise Refusal(
                "this run was already continued from a later checkpoint (two continuations of one checkpoint): "
                "use the newest checkpoint_latest.pth, or start without --c"
            )
