"""Gradient inversion: can a patient's image be drawn again from what one step released?

The attacker knows the weights, the patient's labels and everybody else, and sees what one step released of one patient
alone, the worst case. It looks for an image whose gradient points the same way (cosine distance with a little total
variation, as Geiping et al. 2020, arXiv:2003.14053), by Adam from a random image. Quality is the correlation with the
patient's image; beside it stands the correlation with *another* patient's image, which is what one gets for knowing
what such images look like.

=========  ==============================================================================
setting    what was released
=========  ==============================================================================
no noise   the clipped gradient, by a build whose noise is switched off
private    the same by the project's own step at the claimed epsilon
=========  ==============================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.audit.builds import CORRECT, FAULTS, Build, Subject
from nnunet_dp.audit.canaries import released_by_step
from nnunet_dp.audit.membership import phantom_slice
from nnunet_dp.gradients import Record, trainable
from nnunet_dp.nnunet_audit import dice_and_cross_entropy
from nnunet_dp.workers import Progress, in_order

SMOOTHNESS = 1e-3  # weight of the total variation
STEP_SIZE = 0.05


@dataclass(frozen=True)
class Inverted:
    """What is inverted; part of the protocol.

    Attributes:
        patients: whose image is sought, one after the other.
        iterations: of Adam.
        steps: of the private plan, of which the first is seen.
        slots: of the plan.
        epsilon: that it claims.
        delta: the same.
    """

    patients: int = 6
    iterations: int = 300
    steps: int = 30
    slots: int = 64
    epsilon: float = 8.0
    delta: float = 1e-5


def invert(
    network: nn.Module, released: Tensor, labels: Tensor, shape: tuple[int, ...], iterations: int, seed: int
) -> Tensor:
    """An image whose gradient points where the released one does.

    Args:
        network: at the weights at which the gradient was taken.
        released: [parameters].
        labels: [1, 1, *spatial], known to the attacker.
        shape: of the image.
        iterations: of Adam.
        seed: of the first image.

    Returns:
        float64 tensor of that shape.
    """
    parameters, loss = trainable(network)[1], dice_and_cross_entropy()
    image = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimizer = torch.optim.Adam([image], STEP_SIZE)
    for _ in range(iterations):
        gradients = torch.autograd.grad(loss(network(image), labels), parameters, create_graph=True)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distance = 1 - functional.cosine_similarity(flat, released, dim=0)
        (image.grad,) = torch.autograd.grad(distance + SMOOTHNESS * _total_variation(image), [image])
        optimizer.step()
    return image.detach()


def _total_variation(image: Tensor) -> Tensor:
    return image.diff(dim=-1).abs().mean() + image.diff(dim=-2).abs().mean()


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's, over all pixels."""
    return float(np.corrcoef(first.flatten().numpy(), second.flatten().numpy())[0, 1])


def reconstruct(
    sizes: Inverted, seed: int, processes: int = 1, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Invert one step's release of each patient alone, without and with noise.

    Args:
        sizes: what is inverted.
        seed: of phantoms, weights and first images.
        processes: that invert side by side.
        progress: told (inversions done, in all).

    Returns:
        For each setting its correlations, with the patients' own images and with another's.
    """
    settings = (("no noise", FAULTS[0]), ("private", CORRECT))
    items = [_Item(build, sizes, seed, index) for _, build in settings for index in range(sizes.patients)]
    pairs = list(in_order(_inverted, items, processes, progress, _one_thread))
    found = []
    for place, (name, _) in enumerate(settings):
        own, other = np.array(pairs[place * sizes.patients : (place + 1) * sizes.patients]).T
        found.append({
            "setting": name if name == "no noise" else f"epsilon {sizes.epsilon:g}",
            "own": own.round(4).tolist(),
            "other": other.round(4).tolist(),
            "own_mean": float(own.mean()),
            "other_mean": float(other.mean()),
        })  # fmt: skip
    return found


@dataclass(frozen=True)
class _Item:
    build: Build
    sizes: Inverted
    seed: int
    index: int


def _one_thread() -> None:
    torch.set_num_threads(1)


def _inverted(item: _Item) -> tuple[float, float]:
    """Correlation of one reconstruction with the patient's image and with another patient's."""
    _one_thread()
    record = _double(phantom_slice(item.seed, item.index))
    another = _double(phantom_slice(item.seed, item.index + item.sizes.patients))
    subject = Subject("inversion", item.build)
    sizes = item.sizes
    budget = PrivacyBudget(epsilon=sizes.epsilon, delta=sizes.delta, unit="phantom")
    with TemporaryDirectory() as folder, subject.active():
        training = subject.training(Path(folder), subject.plan(sizes.steps, 1.0, sizes.slots, budget), item.seed)
        before = {name: value.clone() for name, value in training.network.state_dict().items()}
        released = released_by_step(training, lambda *_: [record])
    training.network.load_state_dict(before)
    found = invert(
        training.network, released, record.target, tuple(record.data.shape), sizes.iterations, item.index
    )  # fmt: skip
    return correlation(found, record.data), correlation(found, another.data)


def _double(record: Record) -> Record:
    return Record(record.data.double(), record.target)
