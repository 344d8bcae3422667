"""What ``levers.py`` learns from and is judged on: hippocampus phantoms of two worlds, and the network between them.

The public start sees phantoms of the usual kind. After ``shifted`` the same code draws those of another scanner,
another rater and another anatomy: the gap between phantoms and patients, as far as it can be imitated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from nnunet_dp import nnunet
from nnunet_dp.nnunet_start import planned_loss
from nnunet_dp.phantoms import Patient, hippocampus
from nnunet_dp.public_start import LabelledImage, Phantoms, crop, learn, only_one
from nnunet_dp.replacing import replacing
from nnunet_dp.sections import PublicStart

PATCH = (40, 56, 40)
WIDTH = 16  # features of the first stage; three stages, doubled at each
PLANS = {
    "dataset_name": "Dataset301_PhantomHippocampus",
    "plans_name": "levers",
    "label_manager": "LabelManager",
    "configurations": {"3d_fullres": {}},
}
DATASET_JSON = {"labels": {"background": 0, "Anterior": 1, "Posterior": 2}, "file_ending": ".nii.gz"}

Cases = list[LabelledImage]  # of one patient
autocast = partial(nnunet.autocast, torch.device("cpu"))
usual_loss = partial(planned_loss, PLANS, "3d_fullres", DATASET_JSON)


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


def patients(number: int, seed: int) -> list[Cases]:
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


def batch(cases: Sequence[LabelledImage], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A patch of each case: images float32 [cases, 1, *PATCH], labels int64 [cases, *PATCH]."""
    crops = [crop(case, PATCH, rng) for case in cases]
    images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*crops, strict=True))
    return images.float(), labels.long()


def random_network(width: int, seed: int) -> nn.Module:
    """nnU-Net's plain U-Net of three stages with deep supervision, He weights."""
    torch.manual_seed(seed)
    features = [width, 2 * width, 4 * width]
    depth = len(features)
    made = PlainConvUNet(
        1, depth, features, nn.Conv3d, [[3] * 3] * depth, [1] + [2] * (depth - 1), [2] * depth, 3,
        [2] * (depth - 1), True, nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU,
        {"inplace": True}, True,
    )  # fmt: skip
    made.apply(InitWeights_He(1e-2))
    return made


def public_start(work: Path, width: int, iterations: int) -> nn.Module:
    """The network after phantoms of the usual kind, learnt once per folder; call before ``shifted``."""
    name = f"start_{iterations}" if width == WIDTH else f"start_{iterations}_width{width}"
    file, network = work / f"{name}.pt", random_network(width, 0)
    with only_one(file):
        if not file.is_file():
            with replacing(file) as stream:
                torch.save(_learnt(network, iterations), stream)
    network.load_state_dict(torch.load(file))
    return network


def _learnt(network: nn.Module, iterations: int) -> dict[str, Tensor]:
    images = [case for cases in patients(300, 11) for case in cases]
    phantoms = Phantoms(images, PATCH, (1.0, 1.0, 1.0), (True,))
    recipe = PublicStart(kinds=("hippocampus",), images=len(images), iterations=iterations, batch=2, learning_rate=2e-3)
    return learn(network, usual_loss(), phantoms, recipe, torch.device("cpu"), autocast)


def dice(network: nn.Module, held_out: Sequence[Cases]) -> float:
    """Mean over cases and classes, on the same patches whenever it is asked."""
    found, rng = [], np.random.default_rng(0)
    network.eval()
    for cases in held_out:
        images, labels = batch(cases, rng)
        with torch.no_grad(), autocast():
            guess = network(images)[0].argmax(1)
        for one, truth in zip(guess, labels, strict=True):
            for label in (1, 2):
                a, b = one == label, truth == label
                found.append(float(2 * (a & b).sum() / (a.sum() + b.sum()).clamp(min=1)))
    network.train()
    return float(np.mean(found))
