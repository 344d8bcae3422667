"""Every layer gives each patient's gradient, and what is not in the table is never used in silence."""

from __future__ import annotations

import pytest
import torch
from asserts import RULES
from engines import LARGE, assert_same, batched, squares, tensors_of
from torch import nn

from nnunet_dp import batched_gradients
from nnunet_dp.batched_gradients import Batched
from nnunet_dp.clipping import make_rule
from nnunet_dp.gradients import one_at_a_time

LAYERS = {
    "conv1d": (nn.Conv1d(2, 3, 3, padding=1), (2, 6)),
    "conv2d": (nn.Conv2d(2, 3, 3, padding=1), (2, 6, 5)),
    "conv2d strided": (nn.Conv2d(2, 3, (3, 1), stride=(2, 1), padding=(1, 0)), (2, 6, 5)),
    "conv2d without bias": (nn.Conv2d(2, 3, 3, bias=False), (2, 6, 5)),
    "conv2d dilated": (nn.Conv2d(2, 3, 3, dilation=2, padding=2), (2, 6, 5)),
    "conv2d reflecting": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 6, 5)),
    "conv3d": (nn.Conv3d(2, 3, 3, padding=1), (2, 4, 6, 5)),
    "conv3d strided": (nn.Conv3d(2, 3, 3, stride=(1, 2, 2), padding=1), (2, 4, 6, 5)),
    "conv3d 1x1": (nn.Conv3d(2, 3, 1), (2, 4, 6, 5)),
    "transposed 1d": (nn.ConvTranspose1d(2, 3, 2, stride=2), (2, 6)),
    "transposed 2d": (nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 6, 5)),
    "transposed 2d overlapping": (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 6, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, (1, 2, 2), stride=(1, 2, 2)), (2, 4, 6, 5)),
    "transposed 3d without bias": (nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), (2, 4, 6, 5)),
    "instance norm 2d": (nn.InstanceNorm2d(2, affine=True), (2, 6, 5)),
    "instance norm 3d": (nn.InstanceNorm3d(2, affine=True), (2, 4, 6, 5)),
    "group norm": (nn.GroupNorm(2, 4), (4, 6, 5)),
    "linear": (nn.Linear(5, 3), (5,)),
    "linear on the last axis": (nn.Linear(5, 3, bias=False), (2, 6, 5)),
}


@pytest.mark.parametrize("patches", [1, 3])
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_every_layer_of_nnunets_networks_gives_engine_ones_gradients(layer, shape, patches):
    torch.manual_seed(0)
    leaky = nn.LeakyReLU(inplace=True)
    net = nn.Sequential(layer, leaky).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    patients, rule = tensors_of(5, shape, patches), make_rule("auto_s", RULES["auto_s"])
    assert_same(batched(2, net, squares, patients, rule), one_at_a_time(net, squares, patients, rule))


@pytest.mark.parametrize("layer", ["conv2d", "transposed 3d", "instance norm 3d", "group norm", "linear"])
def test_the_gradient_that_a_layer_passes_on_is_right(layer):
    torch.manual_seed(0)
    own, shape = LAYERS[layer]
    first = {1: nn.Linear(shape[0], shape[0]), 3: nn.Conv2d(shape[0], shape[0], 1), 4: nn.Conv3d(shape[0], shape[0], 1)}
    net, patients = nn.Sequential(first[len(shape)], own).double(), tensors_of(4, shape)
    assert_same(batched(4, net, squares, patients, LARGE), one_at_a_time(net, squares, patients, LARGE))


# ---- what it refuses ---------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Uses a parameter outside any layer; two patients' copies of it would fit the layer's output in silence."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(5, 2), nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.layer(images) * self.scale


def tied():
    """Two layers with one weight: the second is reached past its copies."""
    net = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    net[1].weight = net[0].weight
    return net


def partly_frozen(name):
    """A layer that learns its weight or its bias alone."""
    net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    net[1].get_parameter(name).requires_grad_(False)
    return net


UNFIT = {
    "a module that was never examined": (Scaled(), (5,), "Scaled"),
    "batch norm": (nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), (2, 4, 4), "Batch"),
    "running statistics": (nn.InstanceNorm2d(2, affine=True, track_running_stats=True), (2, 4, 4), "statistics"),
    "dropout": (nn.Sequential(nn.Conv2d(2, 3, 1), nn.Dropout2d(1e-9)), (2, 4, 4), "Dropout"),
    "groups": (nn.Conv2d(2, 4, 1, groups=2), (2, 4, 4), "groups"),
    "a layer norm": (nn.LayerNorm(5), (5,), "layer_norm"),
    "a learnt slope": (nn.Sequential(nn.Conv2d(2, 3, 1), nn.PReLU()), (2, 4, 4), "prelu"),
    "a frozen weight": (partly_frozen("weight"), (5,), "its bias is not"),
    "a frozen bias": (partly_frozen("bias"), (5,), "its bias is not"),
    "one weight in two layers": (tied(), (5,), "past its copies"),
}


@pytest.mark.parametrize(("net", "shape", "reason"), UNFIT.values(), ids=UNFIT)
def test_what_engine_two_does_not_know_goes_to_engine_one_with_the_reason_said_once(net, shape, reason):
    net, patients, told = net.double().train(), tensors_of(3, shape), []
    engine = Batched(2, told.append)
    for _ in range(2):
        assert_same(engine(net, squares, patients, LARGE), one_at_a_time(net, squares, patients, LARGE))
    assert len(told) == 1 and "engine one" in told[0] and reason in told[0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a module that was never examined", "parameter 'scale' is used by mul"),
        ("batch norm", "parameter '1.weight' is used by batch_norm"),
        ("a learnt slope", "parameter '1.weight' is used by prelu"),
        ("running statistics", "running statistics"),
    ],
)
def test_a_use_of_parameters_that_was_never_examined_is_noticed_without_the_list_of_modules(name, reason, monkeypatch):
    monkeypatch.setattr(batched_gradients, "refuse_coupling", lambda network: None)
    net, shape, _ = UNFIT[name]
    engine, patients = Batched(2), tensors_of(3, shape)
    found = engine(net.double(), squares, patients, LARGE)
    assert engine.fallback is not None and reason in engine.fallback
    assert_same(found, one_at_a_time(net, squares, patients, LARGE))


def test_a_layer_that_sees_another_number_of_samples_is_noticed(monkeypatch):
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, images):
            return self.layer(images.transpose(0, 1).reshape(-1, 5)).reshape(6, -1, 3).transpose(0, 1)

    monkeypatch.setattr(batched_gradients, "refuse_coupling", lambda network: None)
    net, patients, engine = Folded().double(), tensors_of(2, (6, 5), 1), Batched(2)
    assert_same(engine(net, squares, patients, LARGE), one_at_a_time(net, squares, patients, LARGE))
    assert engine.fallback is not None and "samples" in engine.fallback
