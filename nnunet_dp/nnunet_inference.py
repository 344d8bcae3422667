"""What nnU-Net makes of plans when it predicts: a configuration with what it inherits, and the network's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dp.admission import refuse_coupling
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.nnunet_start import planned_network
from nnunet_dp.soft_morphology import MorphedNetwork, SoftMorphology


def resolved_configuration(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """A configuration with what it inherits from others.

    Raises:
        UsageRefusal: for a configuration that the plans do not have.
    """
    if configuration not in plans["configurations"]:
        raise UsageRefusal(f"the plans have no configuration {configuration}: is the model's folder complete?")
    return dict(PlansManager(dict(plans)).get_configuration(configuration).configuration)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a planned network.

    Attributes:
        shape: of it.
        dtype: of it.
        first: the first name under which the network knows the same tensor, often its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    first: str


def planned_tensors(
    plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any], morphology: bool = False
) -> dict[str, PlannedTensor]:
    """All tensors that nnU-Net loads into the network of these plans, by name.

    Args:
        plans: whose classes are known to be harmless: they are imported and called.
        configuration: nnU-Net's name.
        dataset_json: channels and labels.
        morphology: whether the trainer refines inside the network.

    Raises:
        Refusal: for a network that no private training has: BatchNorm, dropout, buffers, unknown modules.
    """
    with torch.device("meta"):  # shapes alone, whatever size the plans ask for
        network = planned_network(dict(plans), configuration, dict(dataset_json))
        if morphology:
            heads = PlansManager(dict(plans)).get_label_manager(dict(dataset_json)).num_segmentation_heads
            dimensions = len(plans["configurations"][configuration]["patch_size"])
            network = MorphedNetwork(network, SoftMorphology(heads, dimensions, True))
    refuse_coupling(network)
    names: dict[int, str] = {}
    tensors = network.state_dict(keep_vars=True)
    return {
        name: PlannedTensor(tuple(tensor.shape), tensor.dtype, names.setdefault(id(tensor), name))
        for name, tensor in tensors.items()
    }
