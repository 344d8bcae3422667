"""Local training without any guarantee, for comparison only: never release its weights.

Two ways from the drawn patients' gradients to a descent direction, both functions of private values that no noise
hides and no ledger pays for:

    mean_gradient   ``fedavg``: what nnU-Net does, without privacy
    raw_percentile  ``paper``: adaptive clipping as the original ADP-FL describes it

``raw_percentile`` looks private and is not. The percentile of this batch's norms sets the clipping bound and with it
the size of the noise, so the noise itself tells about the norms: with one patient's gradient zeroed, bound and noise
change by factors that no epsilon covers. Where it is asked for Laplace noise it adds it to L2-clipped vectors, as
published. Its noise multiplier is the one that a *fixed* bound would need, and means nothing here.

Formal guarantee:
    None.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nnunet_dp.charges import Charge
from nnunet_dp.clipping import LARGEST_NORM, SMALLEST_NORM, ClipRule, Flat
from nnunet_dp.dpsgd import Execution, PrivacyPlan, RecordsOf, Schedule
from nnunet_dp.errors import BudgetRefusal, Refusal
from nnunet_dp.gradients import gradients_of, group_norms, trainable
from nnunet_dp.mechanisms import fresh_generator
from nnunet_dp.sampling import poisson_draw

NO_GUARANTEE = "no guarantee"
LARGEST_MEAN_NORM = 12.0  # of the mean gradient: nnU-Net's own clip_grad_norm_

Gradients = Iterable[Sequence[Tensor]]
Direction = Callable[[Gradients, list[Tensor], PrivacyPlan, ClipRule], tuple[list[Tensor], ClipRule]]
"""(drawn patients' gradients, zeros like the parameters, plan, last rule) -> (direction, rule that was used)."""


def mean_gradient(
    gradients: Gradients, zeros: list[Tensor], plan: PrivacyPlan, rule: ClipRule
) -> tuple[list[Tensor], ClipRule]:
    """Mean over the patients that were drawn, shortened to norm 12 as nnU-Net does; no guarantee."""
    drawn = 0
    for gradient in gradients:
        if rule.usable(_norm(gradient)):
            drawn += 1
            _add(zeros, gradient, 1.0)
    factor = 1.0 / max(drawn, 1)
    factor *= min(1.0, LARGEST_MEAN_NORM / max(factor * float(_norm(zeros)), SMALLEST_NORM))
    return [tensor * factor for tensor in zeros], rule


def raw_percentile(
    gradients: Gradients,
    zeros: list[Tensor],
    plan: PrivacyPlan,
    rule: ClipRule,
    *,
    percentile: float,
    noise: Literal["gaussian", "laplace"],
) -> tuple[list[Tensor], ClipRule]:
    """L2-clipped to a raw percentile of these very norms, with noise in proportion to it; no guarantee.

    All drawn gradients are held at once. Divided by the expected batch and the bound, as in the private modes.
    """
    held = [gradient for gradient in gradients if rule.usable(_norm(gradient))]
    bound = _percentile([float(_norm(gradient)) for gradient in held], percentile, rule.bound)
    flat = Flat(bound)
    for gradient in held:
        _add(zeros, gradient, float(flat.factors(_norm(gradient))))
    scale = 1.0 / (plan.expected_batch * bound)
    generator = fresh_generator(zeros[0].device)
    noised = [tensor + plan.noise_multiplier * bound * _noise(tensor, noise, generator) for tensor in zeros]
    return [tensor * scale for tensor in noised], replace(rule, bound=bound)


def _percentile(norms: list[float], percentile: float, last: float) -> float:
    """Percentile of the norms themselves; the last bound where nobody was drawn."""
    if not norms:
        return last
    found = float(torch.tensor(norms, dtype=torch.float64).quantile(percentile / 100))
    return min(max(found, SMALLEST_NORM), LARGEST_NORM)


def _norm(gradient: Sequence[Tensor]) -> Tensor:
    return group_norms(gradient, (0,) * len(gradient))


def _add(total: list[Tensor], gradient: Sequence[Tensor], factor: float) -> None:
    for sum_, tensor in zip(total, gradient, strict=True):
        sum_ += tensor.double() * factor


def _noise(tensor: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    if kind == "gaussian":
        return torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device, generator=generator)
    first, second = (torch.empty_like(tensor).exponential_(generator=generator) for _ in range(2))
    return first - second


class NoGuaranteeTraining:
    """``dpsgd.PrivateTraining`` without its promise: same interface, no ledger, no charge.

    Args:
        network: trainable module, already on the device.
        loss: (output, target) -> scalar mean over one patient's patches.
        plan: steps, sampling and noise multiplier; its budget is not kept.
        schedule: learning rate, decay, momentum.
        execution: what moves speed.
        direction: from the drawn patients' gradients to what is put into ``parameter.grad``.
        nesterov: momentum as nnU-Net's own.

    Formal guarantee:
        None; ``guarantee`` says so.
    """

    private: ClassVar[bool] = False
    guarantee: ClassVar[str] = NO_GUARANTEE

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        plan: PrivacyPlan,
        schedule: Schedule,
        execution: Execution,
        direction: Direction,
        nesterov: bool = False,
    ) -> None:
        self.network, self.loss, self.plan = network, loss, plan
        self.schedule, self.execution, self.direction = schedule, execution, direction
        self.rule = plan.rule
        self.step = 0
        self.checkpoint: str | None = None
        self.optimizer = torch.optim.SGD(
            trainable(network)[1], schedule.learning_rate, momentum=schedule.momentum, nesterov=nesterov
        )

    @property
    def next_charges(self) -> tuple[Charge, ...]:
        """Nothing: there is no ledger."""
        return ()

    @property
    def finished(self) -> bool:
        """Whether all planned steps are taken."""
        return self.step >= self.plan.steps

    def advance(self, records_of: RecordsOf, watch: Callable[[Tensor], None] = lambda loss: None) -> None:
        """Take one step; nothing is charged, nothing is guaranteed.

        Raises:
            BudgetRefusal: when all planned steps are taken.
        """
        if self.finished:
            raise BudgetRefusal(f"all {self.plan.steps} planned steps are taken: plan more rounds")
        drawn = poisson_draw(self.plan.units, self.plan.sampling_probability, fresh_generator("cpu"))
        records = records_of(self.step, drawn)
        gradients = gradients_of(self.network, self.loss, records, self.execution.autocast, watch)
        parameters = trainable(self.network)[1]
        zeros = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
        direction, self.rule = self.direction(gradients, zeros, self.plan, self.rule)
        self._descend(parameters, direction)

    def _descend(self, parameters: Sequence[nn.Parameter], direction: Sequence[Tensor]) -> None:
        for parameter, tensor in zip(parameters, direction, strict=True):
            parameter.grad = tensor.to(parameter.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate_at(self.step, self.plan.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def next_state(self, data: str) -> dict[str, Any]:
        """State for the next checkpoint; private, must stay at the site.

        Args:
            data: digest of dataset and patients, compared on ``restore``.
        """
        return {
            "id": secrets.token_hex(16),
            "guarantee": self.guarantee,
            "plan": self.plan.digest(),
            "data": data,
            "step": self.step,
            "bound": self.rule.bound,
            "weights": [parameter.detach().cpu().clone() for parameter in trainable(self.network)[1]],
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def saved(self, state: dict[str, Any]) -> None:
        """Note that ``state`` is now the newest checkpoint on disk."""
        self.checkpoint = state["id"]

    def restore(self, state: dict[str, Any], data: str) -> None:
        """Continue from a checkpoint.

        Raises:
            Refusal: for a checkpoint of a private training, of another plan or of other data.
        """
        if (state.get("guarantee"), state["plan"], state["data"]) != (self.guarantee, self.plan.digest(), data):
            raise Refusal("the checkpoint should be of this plan, dataset and mode, found another: start a new run")
        with torch.no_grad():
            for parameter, saved in zip(trainable(self.network)[1], state["weights"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.rule = replace(self.rule, bound=state["bound"])
        self.step, self.checkpoint = state["step"], state["id"]
