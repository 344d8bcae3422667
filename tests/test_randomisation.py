"""Domain randomisation: labels move with the image, intensities change, nnU-Net's normalisation stays."""

import pytest
import torch

from nnunet_dp.randomisation import randomise


def ball(shape: tuple[int, ...], radius: float) -> torch.Tensor:
    axes = torch.meshgrid(*[torch.arange(edge) - (edge - 1) / 2 for edge in shape], indexing="ij")
    return (sum(axis.square() for axis in axes) < radius**2).long()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(32, 40), (20, 24, 28)])
def test_shapes_types_and_label_values_stay(shape):
    images, labels = torch.randn(3, 2, *shape), torch.randint(0, 3, (3, *shape))
    moved, drawn = randomise(images, labels, (1.0,) * len(shape), (True, False), generator())
    assert moved.shape == images.shape and moved.dtype == torch.float32 and torch.isfinite(moved).all()
    assert drawn.shape == labels.shape and drawn.dtype == torch.int64 and set(drawn.unique().tolist()) <= {0, 1, 2}


def test_labels_move_with_the_image():
    labels = torch.stack([ball((32, 32, 32), 9)] * 6)
    images = labels[:, None].float() + 0.01 * torch.randn(6, 1, 32, 32, 32)
    moved, drawn = randomise(images, labels, (1.0,) * 3, (True,), generator(3))
    assert any((drawn[i] != labels[i]).float().mean() > 0.01 for i in range(6))
    for image, label in zip(moved[:, 0], drawn, strict=True):
        inside, outside = image[label == 1], image[label == 0]
        assert abs(inside.mean() - outside.mean()) > inside.std().clamp(min=outside.std()) * 0.5


def test_every_image_of_a_batch_is_varied_on_its_own_and_a_seed_repeats_it():
    images, labels = torch.randn(1, 1, 24, 24).repeat(2, 1, 1, 1), torch.zeros(2, 24, 24, dtype=torch.long)
    first, _ = randomise(images, labels, (1.0, 1.0), (True,), generator(5))
    again, _ = randomise(images, labels, (1.0, 1.0), (True,), generator(5))
    assert torch.equal(first, again) and not torch.allclose(first[0], first[1])


def test_zscored_channels_are_zscored_again_and_others_stay_near_their_range():
    images = 100 + 50 * torch.rand(8, 2, 32, 32)
    moved, _ = randomise(images, torch.zeros(8, 32, 32, dtype=torch.long), (1.0, 1.0), (True, False), generator(1))
    assert moved[:, 0].flatten(1).mean(1).abs().max() < 1e-4
    assert (moved[:, 0].flatten(1).std(1) - 1).abs().max() < 1e-3
    kept = moved[:, 1].flatten(1).mean(1)
    assert kept.min() > 90 and kept.max() < 160


def test_rotations_are_rotations_in_millimetres():
    """A ball in millimetres stays a ball: its extents along both axes change alike, whatever the voxels."""
    labels = torch.zeros(24, 16, 64, dtype=torch.long)[None].repeat(1, 1, 1, 1)
    axes = torch.meshgrid(torch.arange(24) - 11.5, 4 * (torch.arange(16) - 7.5), torch.arange(64) - 31.5, indexing="ij")
    labels[0] = (sum(axis.square() for axis in axes) < 10**2).long()
    volumes = []
    for seed in range(12):
        _, drawn = randomise(labels[:, None].float(), labels, (1.0, 4.0, 1.0), (True,), generator(seed))
        places = drawn[0].nonzero().float() * torch.tensor([1.0, 4.0, 1.0])
        volumes.append(places.std(0))
    spread = torch.stack(volumes).mean(0)
    assert (spread / spread.mean() - 1).abs().max() < 0.25
