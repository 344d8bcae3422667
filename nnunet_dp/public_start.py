"""The public start: weights learnt from phantoms before the first private step.

DP-SGD moves weights through noise whose norm grows with the square root of their number, so what matters most is how
little is left to learn. Phantoms are public and free: a network that already segments them, in any pose and contrast
(``randomisation``), needs a few private steps where one from scratch needs more than the budget allows.

The recipe (``sections.PublicStart``) is a part of the plan; the weights are a file beside the plans, named after a
digest of recipe, network, preprocessing and the phantoms' code, with a JSON beside it that says how they came about and
their SHA-256::

    nnUNet_preprocessed/DatasetXXX/public_starts/3d_fullres_0123456789ab.pth
                                                 3d_fullres_0123456789ab.json

The first training that needs it makes it (or ``nnunet-dp pretrain``, beforehand); all budgets, folds and repeats with
the same network share it.

Formal guarantee:
    The weights are a function of random numbers, of the plans, of the phantoms' code and, where the recipe names one,
    of a checkpoint that was declared public: no private image or label is read here. A file whose SHA-256 or recipe is
    not the recorded and planned one is refused.

Reference: Tang et al. 2023, "Differentially private image classification by learning priors from random processes",
arXiv:2306.06076 (pre-training on synthetic images costs no privacy).
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_dp.errors import Refusal
from nnunet_dp.plans import json_sha256, read_json, write_json
from nnunet_dp.randomisation import randomise
from nnunet_dp.replacing import replacing
from nnunet_dp.sections import PublicStart
from nnunet_dp.workers import Progress

FOLDER = "public_starts"
PROVENANCE = "public_start.json"  # in the fold's folder
WARM_UP = 50  # iterations
WEIGHT_DECAY = 0.01
LARGEST_NORM = 1.0
AVERAGE = 0.995
FOREGROUND_CROPS = 0.67  # of the crops from images larger than the patch


@dataclass(frozen=True)
class LabelledImage:
    """A preprocessed phantom: image float32 [channels, *spatial], labels int16 [*spatial]."""

    image: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Phantoms:
    """Public images to start from, and how nnU-Net sees them.

    Attributes:
        images: preprocessed as the private ones will be.
        patch_size: voxels the network sees, [axes].
        spacing_mm: voxel edges, [axes].
        zscored: for each channel, whether nnU-Net z-scores it per image.
    """

    images: Sequence[LabelledImage]
    patch_size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    zscored: tuple[bool, ...]

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random patches, randomised: images float32 [size, channels, *patch], labels int64 [size, *patch]."""
        crops = [self._crop(generator) for _ in range(size)]
        images = torch.from_numpy(np.stack([image for image, _ in crops])).float()
        labels = torch.from_numpy(np.stack([labels for _, labels in crops])).long()
        return randomise(images, labels, self.spacing_mm, self.zscored, generator)

    def _crop(self, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.images[int(torch.randint(len(self.images), (1,), generator=generator))]
        seed = int(torch.randint(2**31, (1,), generator=generator))
        return crop(chosen, self.patch_size, np.random.default_rng(seed))


def crop(
    labelled: LabelledImage, patch_size: tuple[int, ...], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A patch of an image; where the image is smaller it lies in the middle, in zeros, as in nnU-Net's loader.

    Args:
        labelled: image [channels, *spatial]; one more axis than the patch has means slices of a volume.
        patch_size: [axes].
        rng: where to crop; two crops of three hold a voxel of a random class, if there is any.
    """
    shape = labelled.labels.shape
    centre = _centre(labelled.labels, rng)
    if len(shape) > len(patch_size):
        at = centre[0]
        return crop(LabelledImage(labelled.image[:, at], labelled.labels[at]), patch_size, rng)
    image = np.zeros((len(labelled.image), *patch_size), np.float32)
    labels = np.zeros(patch_size, np.int16)
    source, target = [], []
    for edge, wanted, middle in zip(shape, patch_size, centre, strict=True):
        taken = min(edge, wanted)
        first = int(np.clip(middle - wanted // 2, 0, edge - taken))
        source.append(slice(first, first + taken))
        target.append(slice((wanted - taken) // 2, (wanted - taken) // 2 + taken))
    image[(slice(None), *target)] = labelled.image[(slice(None), *source)]
    labels[tuple(target)] = labelled.labels[tuple(source)]
    return image, labels


def _centre(labels: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    classes = np.unique(labels[labels > 0])
    if classes.size and rng.random() < FOREGROUND_CROPS:
        places = np.argwhere(labels == rng.choice(classes))
        jitter = rng.integers(-4, 5, labels.ndim)
        return tuple(int(x) for x in np.clip(rng.choice(places) + jitter, 0, np.array(labels.shape) - 1))
    return tuple(int(rng.integers(edge)) for edge in labels.shape)


# ---- learning ----------------------------------------------------------------------------------------------------


def learn(
    network: nn.Module,
    loss: Callable[[Any, Tensor], Tensor],
    phantoms: Phantoms,
    recipe: PublicStart,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Train on phantoms: AdamW, warm-up, polynomial decay, running average of the weights.

    Args:
        network: on the device; changed in place.
        loss: (output, labels [batch, *spatial]) -> scalar.
        phantoms: source of batches.
        recipe: iterations, batch, learning rate, seed.
        device: where to train.
        autocast: context of the forward pass.
        progress: told after each iteration.

    Returns:
        The averaged weights, on the CPU.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=WEIGHT_DECAY)
    average = copy.deepcopy(network)
    network.train()
    for iteration in range(recipe.iterations):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _rate(iteration, recipe.iterations)
        images, labels = phantoms.batch(recipe.batch, generator)
        with autocast():
            output = network(images.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss(output, labels.to(device)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), LARGEST_NORM)
        optimizer.step()
        _average(average, network, min(AVERAGE, (iteration + 1) / (iteration + 10)))
        if progress:
            progress(iteration + 1, recipe.iterations)
    return {name: tensor.detach().cpu().clone() for name, tensor in average.state_dict().items()}


def _rate(iteration: int, iterations: int) -> float:
    return min(1.0, (iteration + 1) / WARM_UP) * (1 - iteration / iterations) ** 0.9


def _average(average: nn.Module, network: nn.Module, keep: float) -> None:
    with torch.no_grad():
        for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
            mean.lerp_(parameter, 1 - keep)


# ---- the file ----------------------------------------------------------------------------------------------------


def start_file(folder: Path, configuration: str, facts: Mapping[str, Any]) -> Path:
    """Where the weights lie that follow from these facts (recipe, network, preprocessing: all public).

    Args:
        folder: the preprocessed dataset folder.
        configuration: nnU-Net's name.
        facts: whatever the weights depend on, as JSON.
    """
    return folder / FOLDER / f"{configuration}_{json_sha256(facts)[:12]}.pth"


@contextmanager
def only_one(file: Path) -> Iterator[None]:
    """Whoever comes second waits until the first has made the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_start(file: Path, weights: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
    """How the weights came about, then the weights in nnU-Net's form of a checkpoint: a crash between leaves no start.

    Raises:
        Refusal: for weights that are not finite: every private step from them would be wasted.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
        raise Refusal("the public start did not converge (its weights are not finite): plan with --no-start")
    file.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save({"network_weights": dict(weights)}, buffer)
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    write_json({**provenance, "sha256": sha256}, file.with_suffix(".json"))
    with replacing(file) as stream:
        stream.write(buffer.getvalue())


def read_start(file: Path, facts: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and their provenance.

    Args:
        file: of the weights.
        facts: what the plan says about them; all of it must stand in the provenance.

    Raises:
        Refusal: when the file is not the one its provenance describes, or not the one of this plan.
    """
    beside = file.with_suffix(".json")
    content = file.read_bytes()
    provenance = read_json(beside) if beside.is_file() else {}
    planned = json.loads(json.dumps(dict(facts)))
    other = not isinstance(provenance, dict) or any(provenance.get(key) != value for key, value in planned.items())
    if other or provenance.get("sha256") != hashlib.sha256(content).hexdigest():
        raise Refusal(
            f"{file.name} is not the public start that {beside.name} describes: delete both, and it is made again"
        )
    weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)["network_weights"]
    return weights, provenance
