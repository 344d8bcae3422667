"""Which levers help private training after a public start: phantoms only, so that choosing costs no privacy.

    python benchmarks/levers.py --work WORK --variants default steps=10 learning_rate=0.3 --epsilon 1 3 8 --seeds 0 1

A network learns from hippocampus phantoms (once per WORK), then trains privately on phantoms of another scanner,
another rater and another anatomy (``shifted``): that is the gap between phantoms and patients, as far as it can be
imitated. A step sums the clipped gradients of ``--drawn`` patients, scales them to ``--patients`` and adds the noise
that so many patients' budget asks for: the mean gradient of 34 is nearly that of 136, and takes a quarter of the time.
Dice is that of 30 further patients. The variants are settings of ``Settings``; ``default`` follows the planner's rules.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from nnunet_dp import nnunet
from nnunet_dp.accounting import PrivacyBudget, gaussian_mu
from nnunet_dp.gradients import trainable
from nnunet_dp.nnunet_start import planned_loss
from nnunet_dp.phantoms import Patient, hippocampus
from nnunet_dp.planning import MORPHOLOGY_SHARE, learning_rate, signal_to_noise, steps
from nnunet_dp.public_start import LabelledImage, Phantoms, crop, learn
from nnunet_dp.sections import PublicStart

PATCH = (40, 56, 40)
FEATURES = (16, 32, 64)
DELTA = 1e-4
PLANS = {
    "dataset_name": "Dataset301_PhantomHippocampus",
    "plans_name": "levers",
    "label_manager": "LabelManager",
    "configurations": {"3d_fullres": {}},
}
DATASET_JSON = {"labels": {"background": 0, "Anterior": 1, "Posterior": 2}, "file_ending": ".nii.gz"}


@dataclass(frozen=True)
class Settings:
    """One variant; None leaves the planner's rule."""

    steps: int | None = None
    learning_rate: float | None = None
    power: float = 0.9
    momentum: float = 0.0
    average_share: float = 0.1
    patches: int = 1
    trains: str = "all"  # or: norms
    shrink: bool = False  # each tensor of the released gradient by its estimated share of signal
    gamma: float = 0.01


def shifted() -> None:
    """Another scanner (less contrast, blurred, noisy), another rater (a later cut), another anatomy and pose."""
    hippocampus.T1_MS.update(white=900.0, grey=1250.0, fluid=3000.0)
    hippocampus.PROTON_DENSITY.update(white=0.75, grey=0.85, fluid=1.0)
    hippocampus.SITES = (
        hippocampus.Site(inversion_ms=700, repetition_ms=1800, fwhm_voxels=1.6, noise=0.07, gain=400),
        hippocampus.Site(inversion_ms=850, repetition_ms=2000, fwhm_voxels=1.9, noise=0.06, gain=300),
    )
    hippocampus.CROSS_SECTION = np.array([1.15, 1.0, 0.95], dtype=np.float32)
    draw = hippocampus._draw_anatomy

    def other(rng: np.random.Generator) -> hippocampus.Anatomy:
        known = draw(rng)
        return dataclasses.replace(
            known, volume_mm3=0.85 * known.volume_mm3, pitch_degrees=known.pitch_degrees - 22,
            yaw_degrees=known.yaw_degrees - 12, cut=known.cut - 0.1, tail_curl_mm=known.tail_curl_mm + 3,
            head_to_tail=0.85 * known.head_to_tail,
        )  # fmt: skip

    hippocampus._draw_anatomy = other


def patients(number: int, seed: int) -> list[list[LabelledImage]]:
    """Cases of each patient, z-scored."""
    found = []
    for index in range(number):
        patient, cases = Patient("hippocampus", seed, index), []
        for case in range(patient.number_of_cases(1, 2)):
            scan = hippocampus.render(patient, case)
            image = (scan.image - scan.image.mean()) / scan.image.std()
            cases.append(LabelledImage(image.astype(np.float32), scan.segmentation.astype(np.int16)))
        found.append(cases)
    return found


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    depth = len(FEATURES)
    made = PlainConvUNet(
        1, depth, list(FEATURES), nn.Conv3d, [[3] * 3] * depth, [1] + [2] * (depth - 1), [2] * depth, 3,
        [2] * (depth - 1), True, nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU,
        {"inplace": True}, True,
    )  # fmt: skip
    made.apply(InitWeights_He(1e-2))
    return made


def batch(cases: list[LabelledImage], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    crops = [crop(case, PATCH, rng) for case in cases]
    images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*crops, strict=True))
    return images.float(), labels.long()


def dice(model: nn.Module, held_out: list[list[LabelledImage]]) -> float:
    """Mean over cases and classes."""
    found, rng = [], np.random.default_rng(0)
    model.eval()
    for cases in held_out:
        images, labels = batch(cases, rng)
        with torch.no_grad(), autocast():
            guess = model(images)[0].argmax(1)
        for one, truth in zip(guess, labels, strict=True):
            for label in (1, 2):
                a, b = one == label, truth == label
                found.append(float(2 * (a & b).sum() / (a.sum() + b.sum()).clamp(min=1)))
    model.train()
    return float(np.mean(found))


autocast = partial(nnunet.autocast, torch.device("cpu"))


def private_training(model: nn.Module, pool, epsilon: float, chosen: Settings, options, seed: int) -> nn.Module:
    """As ``dpsgd``, without a ledger: nobody's data are at stake."""
    loss, generator = planned_loss(PLANS, "3d_fullres", DATASET_JSON), torch.Generator().manual_seed(seed)
    rng, parameters = np.random.default_rng(seed), trainable(model)[1]
    parameters = [p for p in parameters if chosen.trains == "all" or p.ndim == 1]
    budget = PrivacyBudget(epsilon=epsilon, delta=DELTA)
    count = sum(p.numel() for p in parameters)
    whole = sum(p.numel() for p in model.parameters())
    total = chosen.steps or steps(budget, round(options.patients / 0.8), whole, "full", True)
    signal = signal_to_noise(budget, options.patients, whole)
    rate = chosen.learning_rate or learning_rate(total, signal)
    noise = math.sqrt(total / (1 - MORPHOLOGY_SHARE)) / gaussian_mu(budget) / options.patients
    average, speed = [p.detach().clone() for p in parameters], [torch.zeros_like(p) for p in parameters]
    for step in range(total):
        mean = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        for index in rng.choice(len(pool), min(options.drawn, len(pool)), replace=False):
            cases = [pool[index][k % len(pool[index])] for k in rng.permutation(chosen.patches)]
            images, labels = batch(cases, rng)
            with autocast():
                output = model(images)
            gradient = torch.autograd.grad(loss(output, labels), parameters, allow_unused=True)
            gradient = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradient, strict=True)]
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
            for sum_, g in zip(mean, gradient, strict=True):
                sum_ += g.double() / (norm + chosen.gamma) / min(options.drawn, len(pool))
        released = [m + noise * torch.randn(m.shape, generator=generator, dtype=torch.float64) for m in mean]
        if chosen.shrink:
            released = [r * max(0.0, 1 - noise**2 * r.numel() / float(r.square().sum())) for r in released]
        with torch.no_grad():
            for p, r, v, w in zip(parameters, released, speed, average, strict=True):
                v.mul_(chosen.momentum).add_(r.float())
                p.add_(v, alpha=-rate * (1 - step / total) ** chosen.power)
                w.lerp_(p, 1 - min(step / (step + 1), 1 - 1 / max(2.0, chosen.average_share * total)))
    with torch.no_grad():
        for p, w in zip(parameters, average, strict=True):
            p.copy_(w)
    print(f"    {total} steps, rate {rate:g}, {count} parameters trained", flush=True)
    return model


def start(options: argparse.Namespace) -> nn.Module:
    """The network after phantoms of the usual kind, learnt once."""
    file, model = options.work / f"start_{options.iterations}.pt", network(0)
    if not file.is_file():
        images = [case for cases in patients(300, 11) for case in cases]
        phantoms = Phantoms(images, PATCH, (1.0, 1.0, 1.0), (True,))
        recipe = PublicStart(
            kinds=("hippocampus",), images=len(images), iterations=options.iterations, batch=2, learning_rate=2e-3
        )
        loss = planned_loss(PLANS, "3d_fullres", DATASET_JSON)
        torch.save(learn(model, loss, phantoms, recipe, torch.device("cpu"), autocast), file)
    model.load_state_dict(torch.load(file))
    return model


def parsed(text: str) -> Settings:
    """``default``, or ``steps=10,learning_rate=0.3``."""
    given = dict(pair.split("=") for pair in text.split(",")) if text != "default" else {}
    kinds = {"steps": int, "patches": int, "trains": str, "shrink": lambda word: word == "True"}
    return Settings(**{name: kinds.get(name, float)(value) for name, value in given.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=["default"])
    parser.add_argument("--epsilon", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--patients", type=int, default=136, help="whose budget it is")
    parser.add_argument("--drawn", type=int, default=34, help="whose gradients are computed")
    parser.add_argument("--iterations", type=int, default=1200, help="of the public start")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    begun = start(options)
    shifted()
    pool, held_out = patients(136, 700), patients(30, 900)
    print(f"the start alone: Dice {dice(begun, held_out):.4f}", flush=True)
    for epsilon in options.epsilon:
        for text in options.variants:
            found, began = [], time.time()
            for seed in options.seeds:
                model = private_training(copy.deepcopy(begun), pool, epsilon, parsed(text), options, seed)
                found.append(dice(model, held_out))
            row = {"epsilon": epsilon, "variant": text, "patients": options.patients, "dice": found}
            with (options.work / "levers.jsonl").open("a") as table:
                table.write(json.dumps(row) + "\n")
            spread = f" +- {np.std(found, ddof=1):.4f}" if len(found) > 1 else ""
            seconds = f"{time.time() - began:.0f} s"
            print(f"epsilon {epsilon:g}  {text}: Dice {np.mean(found):.4f}{spread}  {seconds}", flush=True)


if __name__ == "__main__":
    main()
