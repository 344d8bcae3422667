"""Every algorithm gives each patient the weight gradient that autograd gives that patient alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from nnunet_dp import weight_gradients
from nnunet_dp.weight_gradients import ALGORITHMS, Geometry, fastest, patient_weight_gradients

PATIENTS = 3
GEOMETRIES = {
    "3x3": Geometry((3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1": Geometry((1, 1), (1, 1), (0, 0), (1, 1)),
    "strided": Geometry((3, 3), (2, 2), (1, 1), (1, 1)),
    "uneven": Geometry((1, 3), (1, 2), (0, 1), (1, 1)),
    "dilated": Geometry((3, 3), (1, 1), (2, 2), (2, 2)),
    "stride 2 that leaves a rest": Geometry((2, 2), (2, 2), (0, 0), (1, 1)),
    "1d": Geometry((3,), (1,), (1,), (1,)),
    "3d": Geometry((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
    "3d strided": Geometry((3, 3, 3), (1, 2, 2), (1, 1, 1), (1, 1, 1)),
    "3d windows side by side": Geometry((2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1)),
}
CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def arguments(geometry: Geometry, patches: int, channels: int = 2, features: int = 4):
    """Random inputs and output gradients in float64, and the gradient of each patient by autograd."""
    generator = torch.Generator().manual_seed(0)
    axes = len(geometry.kernel)
    convolution = CONVOLUTIONS[axes]
    inputs = torch.randn(PATIENTS * patches, channels, *[7, 6, 5][:axes], generator=generator, dtype=torch.float64)
    weight = torch.randn(features, channels, *geometry.kernel, generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    output = convolution(inputs, weight, None, *geometry[1:])
    gradients = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    parts = zip(output.split(patches), gradients.split(patches), strict=True)
    expected = [torch.autograd.grad(out, weight, grad, retain_graph=True)[0] for out, grad in parts]
    return inputs, gradients, torch.stack(expected)


@pytest.mark.parametrize("patches", [1, 2])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_patient_gets_its_own_weight_gradient(algorithm, geometry, patches):
    inputs, gradients, expected = arguments(geometry, patches)
    found = patient_weight_gradients(inputs, gradients, geometry, PATIENTS, algorithm)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_patient_of_nan_leaves_the_others_gradients_as_they_were_bit_for_bit(algorithm):
    inputs, gradients, _ = arguments(GEOMETRIES["3d"], 2)
    before = patient_weight_gradients(inputs, gradients, GEOMETRIES["3d"], PATIENTS, algorithm)
    inputs[2:4], gradients[2:4] = float("nan"), float("inf")
    after = patient_weight_gradients(inputs, gradients, GEOMETRIES["3d"], PATIENTS, algorithm)
    assert torch.isnan(after[1]).all()
    assert torch.equal(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_operator_keeps_what_torch_compile_relies_on(algorithm):
    inputs, gradients, _ = arguments(GEOMETRIES["strided"], 2)
    operator = torch.ops.nnunet_dp.weight_gradients.default
    numbers = [list(part) for part in GEOMETRIES["strided"]]
    torch.library.opcheck(operator, (inputs, gradients, *numbers, PATIENTS, algorithm))


def test_the_choice_is_made_once_for_a_shape_and_reads_no_number(monkeypatch):
    monkeypatch.setattr(weight_gradients, "_chosen", {})
    seen = []

    def remember(inputs, gradients, geometry, patients):
        seen.append((inputs.clone(), gradients.clone()))
        return torch.zeros(0)

    monkeypatch.setattr(weight_gradients, "ALGORITHMS", dict.fromkeys(ALGORITHMS, remember))
    inputs, gradients, _ = arguments(GEOMETRIES["3x3"], 2)
    fastest(inputs, gradients, GEOMETRIES["3x3"], PATIENTS)
    calls = len(seen)
    fastest(torch.full_like(inputs, 3.0), gradients, GEOMETRIES["3x3"], PATIENTS)
    assert calls == len(seen) > 0
    assert not any(torch.equal(x, inputs) or torch.equal(g, gradients) for x, g in seen)


def test_an_algorithm_that_fails_on_this_device_is_not_chosen(monkeypatch):
    def refuse(*_):
        raise RuntimeError("not built for this dtype")

    monkeypatch.setattr(weight_gradients, "_chosen", {})
    monkeypatch.setattr(weight_gradients, "ALGORITHMS", {**ALGORITHMS, "loop": refuse, "grouped": refuse})
    inputs, gradients, _ = arguments(GEOMETRIES["3x3"], 1)
    assert fastest(inputs, gradients, GEOMETRIES["3x3"], PATIENTS) == "matmul"


def test_columns_that_would_fill_the_memory_are_not_tried(monkeypatch):
    inputs, gradients, _ = arguments(GEOMETRIES["3x3"], 1)
    monkeypatch.setattr(weight_gradients, "LARGEST_COLUMNS", 10)
    assert "matmul" not in weight_gradients._candidates(inputs, gradients, GEOMETRIES["3x3"], PATIENTS)
    inputs, gradients, _ = arguments(GEOMETRIES["1x1"], 1)  # its columns are the input itself
    assert "matmul" in weight_gradients._candidates(inputs, gradients, GEOMETRIES["1x1"], PATIENTS)


@pytest.mark.gpu
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_each_algorithm_is_right_on_the_gpu(algorithm, geometry, dtype, tolerance):
    inputs, gradients, _ = arguments(geometry, 2)
    inputs, gradients = inputs.to("cuda", dtype), gradients.to("cuda", dtype)
    expected = patient_weight_gradients(inputs.cpu().double(), gradients.cpu().double(), geometry, PATIENTS, "loop")
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = patient_weight_gradients(inputs, gradients, geometry, PATIENTS, algorithm)
    assert (found.cpu().double() - expected).abs().max() <= tolerance * expected.abs().max()
