"""Gradient inversion: it must work where nothing protects, or its failure elsewhere says nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_dp.audit import reconstruction
from nnunet_dp.audit.membership import phantom_slice
from nnunet_dp.audit.reconstruction import Inverted, correlation, invert, reconstruct


class Lookup(nn.Module):
    """A network of one bias for each pixel after a convolution: its gradient tells the image."""

    def __init__(self, pixels: int):
        super().__init__()
        self.mixed = nn.Linear(pixels, 3 * pixels).double()

    def forward(self, image):
        batch, _, *spatial = image.shape
        return self.mixed(image.flatten(1)).reshape(batch, 3, *spatial)


def gradient_of(network: nn.Module, image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    loss = reconstruction.dice_and_cross_entropy()(network(image), labels)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(network.parameters()))])


def test_an_image_is_found_again_in_the_gradient_of_a_linear_network_and_not_under_noise():
    torch.manual_seed(0)
    record = phantom_slice(1, 0)
    image, labels = record.data.double()[..., :8, :8], record.target[..., :8, :8]
    network = Lookup(64)
    with torch.no_grad():
        network.mixed.weight.mul_(0.01)
    gradient = gradient_of(network, image, labels)
    found = invert(network, gradient, labels, tuple(image.shape), 150, seed=1)
    assert correlation(found, image) > 0.8
    noise = torch.randn_like(gradient) * gradient.norm() * 3
    assert correlation(invert(network, gradient + noise, labels, tuple(image.shape), 150, seed=1), image) < 0.6


def test_each_setting_reports_own_and_other_correlations():
    found = reconstruct(Inverted(patients=1, iterations=2), seed=1)
    assert [setting["setting"] for setting in found] == ["no noise", "epsilon 8"]
    assert all(len(setting["own"]) == len(setting["other"]) == 1 for setting in found)
    assert found[0]["own_mean"] == pytest.approx(found[0]["own"][0], abs=1e-4)
