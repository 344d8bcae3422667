"""Private training as ``nnunet_dp.dpsgd`` does it, without a ledger: nobody's data are at stake.

The step is the package's own: its engine, clip rules, schedule and prices (``lever_settings``). Only draw and noise
differ. Of a full batch a sample of the patients stands for all: the mean gradient of 34 is nearly that of 136, and
takes a quarter of the time; the noise is that of all. And both come from a seed, so that variants pair up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lever_phantoms import Cases, autocast, batch, usual_loss
from lever_settings import Settings, planned
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch.nn import functional

from nnunet_dp import randomisation
from nnunet_dp.accounting import PrivacyBudget, z_delta
from nnunet_dp.clipping import QuantileAdaptive
from nnunet_dp.dpsgd import PrivacyPlan
from nnunet_dp.gradients import Record, one_at_a_time, trainable
from nnunet_dp.mechanisms import ClippedSum, GaussianWithCount

VIEW_STRENGTH = 0.4  # of the public start's: rotations of 5 degrees, 5 % of scale, bends below a voxel
ADAM_MEMORY = (0.9, 0.999)  # of the first and the second moment
LOSS_WEIGHTS = {"both": (1, 1), "ce": (1, 0), "dice": (0, 1)}  # of cross-entropy and soft Dice


# ---- the loss, and what it is shown -------------------------------------------------------------------------------


def segmentation_loss(chosen: Settings) -> Callable[[Any, Tensor], Tensor]:
    """nnU-Net's loss, or what the variant makes of it, as a function of outputs and labels [batch, *spatial]."""
    usual = chosen.loss == "both" and not chosen.coarse
    loss = usual_loss() if usual else _own_loss(*LOSS_WEIGHTS[chosen.loss], chosen.coarse)
    return loss if chosen.deep else lambda outputs, labels: loss(outputs[:1], labels)


def _own_loss(cross_entropy: int, dice: int, coarse: bool) -> Callable[[Any, Tensor], Tensor]:
    options = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    kind: Any = MemoryEfficientSoftDiceLoss
    single = DC_and_CE_loss(options, {}, cross_entropy, dice, dice_class=kind)

    def loss(outputs: Any, labels: Tensor) -> Tensor:
        used = outputs if coarse else outputs[: max(1, len(outputs) - 1)]  # as nnU-Net, unless the coarsest is alone
        targets = [functional.interpolate(labels[:, None].float(), size=output.shape[2:]) for output in used]
        weights = torch.tensor([0.5**level for level in range(len(used))])
        parts = [single(output.float(), target) for output, target in zip(used, targets, strict=True)]
        return (torch.stack(parts) * weights).sum() / weights.sum()

    return loss


def views(images: Tensor, labels: Tensor, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each patch and ``number - 1`` gentle variations of it, in one batch: their gradients average before the clip."""
    more = [_varied(images, labels, generator) for _ in range(number - 1)]
    batches = zip((images, labels), *more, strict=True)
    images, labels = (torch.cat(part) for part in batches)
    return images, labels


def _varied(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Moved, recoloured and spoilt as the public start does it to CT, at a part of its strength."""
    number, shape = len(images), images.shape[2:]
    still = functional.affine_grid(torch.eye(3, 4).expand(number, 3, 4), [number, 1, *shape], align_corners=False)
    grid = torch.lerp(still, randomisation._grid(number, shape, (1.0, 1.0, 1.0), generator), VIEW_STRENGTH)
    moved = functional.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    drawn = functional.grid_sample(labels[:, None].float(), grid, "nearest", "zeros", align_corners=False)
    for channel in moved.flatten(0, 1):
        channel.lerp_(randomisation._appearance(channel, False, generator), VIEW_STRENGTH)
    return moved, drawn[:, 0].to(labels.dtype)


@dataclass(frozen=True)
class Cohort:
    """Whose budget it is, and whose gradients are computed.

    Attributes:
        pool: cases of each patient.
        patients: as many as the noise is made for.
        drawn: as many of the pool as stand for a full batch.
    """

    pool: Sequence[Cases]
    patients: int
    drawn: int

    def computed(self, chosen: Settings) -> int:
        """Expected number of gradients in a step's sum."""
        return chosen.batch or min(self.drawn, len(self.pool))

    def draw(self, chosen: Settings, rng: np.random.Generator) -> Iterable[int]:
        """Poisson sampling of a batch, a sample of fixed size in place of all."""
        if chosen.batch is not None:
            return np.flatnonzero(rng.random(len(self.pool)) < chosen.batch / len(self.pool))
        return rng.choice(len(self.pool), self.computed(chosen), replace=False)

    def records(self, chosen: Settings, rng: np.random.Generator, appearance: torch.Generator) -> Iterator[Record]:
        """What the drawn patients bring to one step."""
        for index in self.draw(chosen, rng):
            cases = self.pool[index]
            patches = batch([cases[k % len(cases)] for k in rng.permutation(chosen.patches)], rng)
            yield Record(*views(*patches, chosen.views, appearance))


# ---- the noise, and what becomes of it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Released:
    """A noised mean gradient in units of the rule's bound, the noise's deviation in it, and a quantile's count."""

    gradient: list[Tensor]
    deviation: float
    count: float | None


def release(clipped: ClippedSum, computed: int, plan: PrivacyPlan, generator: torch.Generator) -> Released:
    """Mean over ``computed`` patients, with the noise of all the plan's; a count shares their price."""
    mechanism, multiplier, count = plan.mechanism, plan.noise_multiplier, None
    if isinstance(mechanism, GaussianWithCount):
        multiplier = z_delta(multiplier, mechanism.count_noise)
    deviation = multiplier / plan.expected_batch
    noise = [torch.randn(sum_.shape, generator=generator, dtype=torch.float64) for sum_ in clipped.tensors]
    scale = 1 / (computed * clipped.l2_bound)
    gradient = [sum_ * scale + deviation * z for sum_, z in zip(clipped.tensors, noise, strict=True)]
    if isinstance(mechanism, GaussianWithCount) and clipped.centred_count is not None:
        noised = mechanism.count_noise * float(torch.randn((), generator=generator))
        count = clipped.centred_count * plan.expected_batch / computed + noised
    return Released(gradient, deviation, count)


def shrunk(found: Released) -> list[Tensor]:
    """Each tensor times its estimated share of signal (positive part James-Stein)."""
    energy = [found.deviation**2 * tensor.numel() / float(tensor.square().sum()) for tensor in found.gradient]
    return [tensor * max(0.0, 1 - noise) for tensor, noise in zip(found.gradient, energy, strict=True)]


class Sgd:
    """Momentum, plain or Nesterov's: released gradient in, direction out."""

    def __init__(self, chosen: Settings, parameters: Sequence[Tensor], nesterov: bool = False) -> None:
        self.momentum, self.nesterov = chosen.momentum, nesterov
        self.speed = [torch.zeros_like(parameter) for parameter in parameters]

    def __call__(self, gradient: Sequence[Tensor], deviation: float) -> list[Tensor]:
        for speed, tensor in zip(self.speed, gradient, strict=True):
            speed.mul_(self.momentum).add_(tensor.float())
        if not self.nesterov:
            return self.speed
        return [g.float() + self.momentum * speed for g, speed in zip(gradient, self.speed, strict=True)]


class Adam:
    """DP-Adam whose second moment is freed of the noise's known variance (Tang et al. 2023, arXiv:2312.14334).

    What is left may be negative; the floor is a share of that variance, since with few steps the estimate is no better.
    """

    def __init__(self, chosen: Settings, parameters: Sequence[Tensor]) -> None:
        self.floor, self.step, self.variance = chosen.floor, 0, 0.0
        self.first, self.second = ([torch.zeros_like(p, dtype=torch.float64) for p in parameters] for _ in range(2))

    def __call__(self, gradient: Sequence[Tensor], deviation: float) -> list[Tensor]:
        self.step += 1
        beta, gamma = ADAM_MEMORY
        unbiased_first, unbiased_second = 1 - beta**self.step, 1 - gamma**self.step
        self.variance = gamma * self.variance + (1 - gamma) * deviation**2
        for first, second, tensor in zip(self.first, self.second, gradient, strict=True):
            first.lerp_(tensor, 1 - beta)
            second.lerp_(tensor.square(), 1 - gamma)
        noise = self.variance / unbiased_second
        roots = [(second / unbiased_second - noise).clamp(min=self.floor * noise).sqrt() for second in self.second]
        return [first / unbiased_first / root for first, root in zip(self.first, roots, strict=True)]


OPTIMIZERS: dict[str, Callable[..., Callable[[Sequence[Tensor], float], list[Tensor]]]] = {
    "sgd": Sgd,
    "nesterov": partial(Sgd, nesterov=True),
    "adam": Adam,
}


def private_training(
    network: nn.Module, cohort: Cohort, budget: PrivacyBudget, chosen: Settings, seed: int
) -> nn.Module:
    """Train the network in place as the variant says; patients, patches, views and noise follow from the seed."""
    schedule, plans = planned(chosen, budget, cohort.patients, sum(p.numel() for p in network.parameters()))
    for parameter in network.parameters():
        parameter.requires_grad_(chosen.trains == "all" or parameter.ndim == 1)
    parameters, loss, rule = trainable(network)[1], segmentation_loss(chosen), plans[0].rule
    optimizer = OPTIMIZERS[chosen.optimizer](chosen, parameters)
    average = [parameter.detach().clone() for parameter in parameters]
    rng, noise, appearance = np.random.default_rng(seed), _generator(seed), _generator(seed + 1_000_000)
    for step, plan in enumerate(plans):
        records = cohort.records(chosen, rng, appearance)
        clipped = one_at_a_time(network, loss, records, rule, autocast)
        found = release(clipped, cohort.computed(chosen), plan, noise)
        if isinstance(rule, QuantileAdaptive) and found.count is not None:
            rule = rule.updated(found.count, plan.expected_batch)
        direction = optimizer(shrunk(found) if chosen.shrink else found.gradient, found.deviation)
        _descend(parameters, direction, schedule.learning_rate_at(step, len(plans)))
        _pull(average, parameters, 1 - schedule.average_decay(step, len(plans)))
    _pull(parameters, average, 1.0)
    count = sum(parameter.numel() for parameter in parameters)
    print(f"    {len(plans)} steps, rate {schedule.learning_rate:g}, {count} parameters trained", flush=True)
    return network


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def _descend(parameters: Sequence[Tensor], direction: Sequence[Tensor], rate: float) -> None:
    for parameter, tensor in zip(parameters, direction, strict=True):
        parameter.add_(tensor.to(parameter.dtype), alpha=-rate)


@torch.no_grad()
def _pull(tensors: Sequence[Tensor], goals: Sequence[Tensor], share: float) -> None:
    for tensor, goal in zip(tensors, goals, strict=True):
        tensor.lerp_(goal, share)
