"""What the audit takes from nnU-Net: its loss, and a U-Net small enough to be trained many times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from nnunet_dp.admission import refuse_coupling


def dice_and_cross_entropy(batch_dice: bool = False) -> Callable[[Any, Any], Tensor]:
    """nnU-Net's loss of outputs [batch, classes, *spatial] and labels [batch, 1, *spatial].

    Args:
        batch_dice: whether Dice is summed over the batch, as nnU-Net's 2D plans ask for; it couples patients, and the
            private trainers switch it off. The audit's broken build switches it on.
    """
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    kind: Any = MemoryEfficientSoftDiceLoss
    return DC_and_CE_loss(dice, {}, dice_class=kind)


def small_network(channels: int, classes: int, seed: int, features: tuple[int, ...] = (4, 8)) -> nn.Module:
    """A 2D PlainConvUNet with these features for each stage; the same seed gives the same weights.

    Args:
        channels: of the images.
        classes: of the segmentation, background included.
        seed: of the initialisation.
        features: of each stage.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PlainConvUNet(
            channels, len(features), features, nn.Conv2d, 3, (1, *[2] * (len(features) - 1)), 1, classes, 1,
            conv_bias=True, norm_op=nn.InstanceNorm2d, norm_op_kwargs={"affine": True, "eps": 1e-5},
            nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=False,
        )  # fmt: skip
    refuse_coupling(network)
    return network
