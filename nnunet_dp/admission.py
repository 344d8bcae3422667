"""Which networks may train privately: every layer is known to keep patients apart, anything else is refused by name.

The gradient engine runs one patient at a time, so what could still couple patients is state: running statistics and
buffers, which would be released without noise. The list is closed; a new layer is added here after it was examined.
"""

from __future__ import annotations

from torch import nn

from nnunet_dp.errors import Refusal
from nnunet_dp.soft_morphology import MorphedNetwork, SoftMorphology

_SAFE_TORCH = frozenset(
    "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Linear Identity Sequential ModuleList "
    "InstanceNorm1d InstanceNorm2d InstanceNorm3d GroupNorm LayerNorm LeakyReLU ReLU GELU SiLU ELU PReLU Sigmoid "
    "Softmax AvgPool2d AvgPool3d MaxPool2d MaxPool3d AdaptiveAvgPool2d AdaptiveAvgPool3d Upsample".split()
)
_SAFE_BLOCKS = frozenset(
    "PlainConvUNet ResidualEncoderUNet PlainConvEncoder ResidualEncoder UNetDecoder ConvDropoutNormReLU "
    "StackedConvBlocks StackedResidualBlocks BasicBlockD BottleneckD".split()
)
_MORPHOLOGY_BUFFERS = ("radii", "operation", "at_prediction", "over_background")


def refuse_coupling(network: nn.Module) -> None:
    """Refuse a network in which one patient could reach another's gradient or an un-noised buffer.

    Raises:
        Refusal: naming the module (BatchNorm, running statistics, buffers, anything unknown).
    """
    for name, module in network.named_modules():
        kind, home = type(module).__name__, type(module).__module__
        if "BatchNorm" in kind or getattr(module, "track_running_stats", False):
            raise Refusal(f"{kind} at '{name}' couples patients or keeps un-noised statistics: use InstanceNorm")
        if kind.startswith("Dropout"):
            raise Refusal(f"{kind} at '{name}' draws from one stream for all patients: set dropout_op to null")
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise Refusal(f"{kind} at '{name}' carries a function or hook of its own: it was never examined")
        known = (home.startswith("torch.nn.") and kind in _SAFE_TORCH) or (
            home.startswith("dynamic_network_architectures.") and kind in _SAFE_BLOCKS
        )
        if not known and type(module) not in (SoftMorphology, MorphedNetwork):
            raise Refusal(f"module {home}.{kind} at '{name}' was never examined for privacy: use nnU-Net's U-Nets")
    morphed = [module for module in network.modules() if type(module) is SoftMorphology]
    examined = {id(getattr(module, name)) for module in morphed for name in _MORPHOLOGY_BUFFERS}
    for name in (name for name, buffer in network.named_buffers() if id(buffer) not in examined):
        raise Refusal(f"the network keeps a buffer '{name}', which would be released without noise")
