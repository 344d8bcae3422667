"""Morphology of logits equals scipy's, keeps its algebra, passes gradients, and travels with the weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from ordinary_plans import architecture
from scipy import ndimage

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.gradients import trainable
from nnunet_dp.soft_morphology import OPERATIONS, MorphedNetwork, SoftMorphology, SoftRule, radii_from_mm

RADII = {2: [(0, 0), (1, 2), (3, 0)], 3: [(0, 0, 0), (1, 2, 1), (0, 1, 2)]}
SHAPES = {2: (9, 12), 3: (6, 7, 8)}
MORPHING = [name for name in OPERATIONS if name != "none"]


def logits(dimension: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Three classes of distinct values around zero, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, *SHAPES[dimension])
    order = torch.randperm(int(np.prod(shape)), generator=generator).double()
    return (order / order.numel() - 0.5).view(shape)


def morphology(dimension: int, operation: str = "opening", **modes: bool) -> SoftMorphology:
    """Background alone, two classes with different boxes."""
    made = SoftMorphology(3, dimension, **modes)
    made.set_radii(RADII[dimension], ["none", operation, operation])
    return made


def erode_slowly(values: np.ndarray, radii: tuple[int, ...]) -> np.ndarray:
    size = [2 * radius + 1 for radius in radii]
    return ndimage.grey_erosion(values, size=size, mode="constant", cval=np.inf)


def dilate_slowly(values: np.ndarray, radii: tuple[int, ...]) -> np.ndarray:
    size = [2 * radius + 1 for radius in radii]
    return ndimage.grey_dilation(values, size=size, mode="constant", cval=-np.inf)


def apply_slowly(values: np.ndarray, operation: str, radii: tuple[int, ...]) -> np.ndarray:
    """One channel of one sample, with scipy."""
    if operation in ("opening", "opening_then_closing"):
        values = dilate_slowly(erode_slowly(values, radii), radii)
    if operation in ("closing", "opening_then_closing"):
        values = erode_slowly(dilate_slowly(values, radii), radii)
    return values


# ---- what it computes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dimension", [2, 3])
def test_each_class_equals_scipys_grey_morphology(dimension, operation):
    given_, found = logits(dimension), morphology(dimension, operation)(logits(dimension))
    for sample in range(2):
        for channel, radii in enumerate(RADII[dimension]):
            expected = apply_slowly(given_[sample, channel].numpy(), operation, radii)
            np.testing.assert_array_equal(found[sample, channel].numpy(), expected)


@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    radii=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    operation=st.sampled_from(MORPHING),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_box_on_any_small_image_equals_scipys(shape, radii, operation, seed):
    image = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))
    found = SoftRule(operation, radii)(image)
    np.testing.assert_array_equal(found[0, 0].numpy(), apply_slowly(image[0, 0].numpy(), operation, radii))


@pytest.mark.parametrize("dimension", [2, 3])
def test_opening_never_raises_a_logit_and_closing_never_lowers_one(dimension):
    values = logits(dimension)
    opened, closed = morphology(dimension, "opening")(values), morphology(dimension, "closing")(values)
    assert (opened <= values).all() and (values <= closed).all()
    assert (opened < values).any() and (values < closed).any()


@pytest.mark.parametrize("operation", MORPHING)
@pytest.mark.parametrize("dimension", [2, 3])
def test_refining_twice_changes_nothing_more(dimension, operation):
    refine = morphology(dimension, operation)
    once = refine(logits(dimension))
    assert torch.equal(refine(once), once)


@pytest.mark.parametrize("dimension", [2, 3])
def test_the_threshold_of_the_opening_is_the_opening_of_the_threshold(dimension):
    values = logits(dimension) + 0.4  # mostly foreground, else an opening of noise is empty
    found = morphology(dimension)(values) > 0
    box = np.ones([2 * radius + 1 for radius in RADII[dimension][1]])
    eroded = ndimage.binary_erosion(values[0, 1].numpy() > 0, box, border_value=1)
    expected = ndimage.binary_dilation(eroded, box)
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(found[0, 1].numpy(), expected)


@pytest.mark.parametrize("axes", [(2,), (3,), (2, 3, 4)])
def test_a_mirrored_image_is_refined_to_the_mirrored_result(axes):
    values, refine = logits(3), morphology(3, "opening_then_closing")
    assert torch.equal(refine(values.flip(axes)), refine(values).flip(axes))


def test_nothing_wraps_and_what_fills_the_image_is_kept():
    values = torch.full((1, 3, 9, 12), 2.0)
    for operation in MORPHING:
        assert torch.equal(morphology(2, operation)(values), values)
    values[..., 0] = -2.0  # one edge: a wrapping box would carry it to the other
    assert (morphology(2, "opening")(values)[..., -1] == 2.0).all()


def test_the_background_and_classes_of_radius_zero_are_untouched():
    refine = SoftMorphology(3, 2)
    assert torch.equal(refine(logits(2)), logits(2))
    refine.set_radii([(0, 0), (0, 0), (1, 1)], ["none", "opening", "opening"])
    found = refine(logits(2))
    assert torch.equal(found[:, :2], logits(2)[:, :2])
    assert not torch.equal(found[:, 2], logits(2)[:, 2])


def test_regions_may_refine_their_first_channel():
    refine = SoftMorphology(3, 2)
    refine.set_radii([(1, 1)] * 3, ["opening"] * 3)
    assert (refine(logits(2))[:, 0] < logits(2)[:, 0]).any()


def test_over_the_background_a_constant_per_voxel_changes_nothing():
    refine, values = morphology(2, "opening", over_background=True), logits(2)
    shift = torch.randn(2, 1, 9, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(refine(values + shift) - shift, refine(values))


def test_over_the_background_the_winner_is_refined_as_a_mask():
    values = logits(2)
    values[:, 1] += 0.3
    refined = morphology(2, "opening", over_background=True)(values)
    eroded = ndimage.binary_erosion((values[0, 1] > values[0, 0]).numpy(), np.ones((3, 5)), border_value=1)
    expected = ndimage.binary_dilation(eroded, np.ones((3, 5)))
    assert expected.any()
    np.testing.assert_array_equal((refined[0, 1] - refined[0, 0]).numpy() > 1e-12, expected)
    assert torch.equal(refined[:, 0], values[:, 0])


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over_background", [False, True])
@pytest.mark.parametrize("operation", MORPHING)
@pytest.mark.parametrize("dimension", [2, 3])
def test_gradients_match_finite_differences(dimension, operation, over_background):
    refine = SoftMorphology(2, dimension, over_background=over_background)
    refine.set_radii([(0,) * dimension, (1,) * dimension], ["none", operation])
    shape = (1, 2, 4, 5) if dimension == 2 else (1, 2, 3, 3, 4)
    order = torch.randperm(int(np.prod(shape)), generator=torch.Generator().manual_seed(1)).double()
    order[: order.numel() // 2] *= np.sqrt(2)  # differences to the background are distinct too
    assert torch.autograd.gradcheck(refine, order.view(shape).requires_grad_())


def test_the_gradient_goes_to_the_selected_voxels_and_is_neither_lost_nor_doubled():
    values = logits(3).requires_grad_()
    (gradient,) = torch.autograd.grad(morphology(3)(values).sum(), values)
    assert gradient.sum().item() == values.numel()
    assert torch.equal(gradient[:, 0], torch.ones_like(gradient[:, 0]))
    assert (gradient[:, 1] == 0).any() and (gradient[:, 1] > 1).any()


def test_samples_of_a_batch_do_not_couple():
    values, refine = logits(2).requires_grad_(), morphology(2, "opening_then_closing")
    weights = torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (both,) = torch.autograd.grad((refine(values)[0] * weights).sum(), values)
    (alone,) = torch.autograd.grad((refine(values[:1])[0] * weights).sum(), values)
    assert torch.equal(both[0], alone[0])
    assert both[0].any() and not both[1].any()


# ---- modes, dtypes, compilation ----------------------------------------------------------------------------------


def test_training_only_leaves_predictions_alone():
    refine, values = morphology(2, at_prediction=False), logits(2)
    assert torch.equal(refine.train()(values), morphology(2)(values))
    assert torch.equal(refine.eval()(values), values)
    assert not torch.equal(morphology(2).eval()(values), values)


@pytest.mark.parametrize("dimension", [2, 3])
def test_bfloat16_stays_bfloat16_under_autocast_and_picks_the_same_voxels(dimension):
    values, refine = logits(dimension).bfloat16(), morphology(dimension)
    with torch.autocast("cpu", torch.bfloat16):
        found = refine(values)
        assert refine(values.float()).dtype == torch.float32
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.double(), refine(values.double()))


def test_it_traces_without_a_graph_break_and_notices_new_radii():
    refine, values = morphology(2), logits(2)
    compiled = torch.compile(refine, fullgraph=True, backend="eager")
    assert torch.equal(compiled(values), refine(values))
    before = refine(values)
    refine.set_radii([(0, 0), (2, 2), (2, 2)], ["none", "closing", "closing"])
    assert torch.equal(compiled(values), refine(values)) and not torch.equal(before, refine(values))


def test_logits_of_another_shape_are_refused():
    with pytest.raises(UsageRefusal, match="3 classes and 2 spatial axes"):
        morphology(2)(torch.zeros(1, 4, 8, 8))
    with pytest.raises(UsageRefusal, match="3 classes and 2 spatial axes"):
        morphology(2)(torch.zeros(1, 3, 8, 8, 8))


# ---- radii -------------------------------------------------------------------------------------------------------


def test_radii_in_mm_become_whole_voxels_that_reach_no_further():
    assert radii_from_mm([0.3, 5, -1], [0.1, 2.5, 6]) == ((3, 0, 0), (50, 2, 0), (0, 0, 0))


@pytest.mark.parametrize(("radius", "spacing"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, 0.0), (1.0, -1.0)])
def test_impossible_lengths_are_refused(radius, spacing):
    with pytest.raises(UsageRefusal, match="should be"):
        radii_from_mm([radius], [spacing])


@pytest.mark.parametrize(
    ("radii", "operations"),
    [
        ([(1, 1)] * 2, ["opening"] * 2),
        ([(1,)] * 3, ["opening"] * 3),
        ([(1, -1)] * 3, ["opening"] * 3),
        ([(1, 1)] * 3, ["dilation"] * 3),
        ([(1, 1)] * 3, ["opening"] * 2),
    ],
)
def test_impossible_rules_are_refused_and_change_nothing(radii, operations):
    refine = morphology(2)
    before = copy.deepcopy(refine.state_dict())
    with pytest.raises(UsageRefusal):
        refine.set_radii(radii, operations)
    assert all(torch.equal(tensor, before[name]) for name, tensor in refine.state_dict().items())


def test_a_refined_background_is_refused_where_classes_are_compared_with_it():
    refine = SoftMorphology(3, 2, over_background=True)
    with pytest.raises(UsageRefusal, match="channel 0 is the background"):
        refine.set_radii([(1, 1)] * 3, ["opening"] * 3)


# ---- the weights file --------------------------------------------------------------------------------------------


def test_the_weights_alone_carry_radii_operations_and_modes(tmp_path):
    trained = morphology(3, "closing", at_prediction=False)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    fresh = SoftMorphology(3, 3).eval()
    fresh.load_state_dict(torch.load(tmp_path / "weights.pth"))
    assert fresh.rules == trained.rules
    assert torch.equal(fresh(logits(3)), logits(3))
    assert torch.equal(fresh.train()(logits(3)), trained(logits(3)))


def test_casting_copying_and_moving_keep_the_rules():
    refine = copy.deepcopy(morphology(2)).half().to("cpu")
    assert refine.radii.dtype == torch.int64 and refine.rules == morphology(2).rules
    assert list(refine.parameters()) == []


@pytest.mark.parametrize(("name", "value"), [("operation", 99), ("operation", -1), ("radii", -1)])
def test_weights_with_impossible_rules_are_refused(name, value):
    state = {key: tensor.clone() for key, tensor in morphology(2).state_dict().items()}
    state[name][1] = value
    with pytest.raises(RuntimeError, match=name):
        SoftMorphology(3, 2).load_state_dict(state)


# ---- around nnU-Net's network ------------------------------------------------------------------------------------


def plain_network(dimension: int, deep_supervision: bool = True) -> torch.nn.Module:
    """nnU-Net's own network with three stages, two channels in, three classes out, in float64."""
    torch.manual_seed(0)
    entry = architecture(dimension, 3)
    entry["arch_kwargs"]["features_per_stage"] = [4, 8, 8]
    name, arguments, imports = entry.values()
    return get_network_from_plans(name, arguments, imports, 2, 3, deep_supervision=deep_supervision).double()


def images(dimension: int) -> torch.Tensor:
    return torch.randn(2, 2, *[8] * dimension, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("dimension", [2, 3])
def test_only_the_full_resolution_of_nnunets_network_is_refined(dimension):
    plain = plain_network(dimension)
    network = MorphedNetwork(plain, morphology(dimension))
    with torch.no_grad():
        full, coarse = network(images(dimension))
        plain_full, plain_coarse = plain(images(dimension))
    assert torch.equal(full, network.morphology(plain_full)) and not torch.equal(full, plain_full)
    assert torch.equal(coarse, plain_coarse)


@pytest.mark.parametrize("dimension", [2, 3])
def test_deep_supervision_is_switched_as_nnunet_does_it(dimension):
    network = MorphedNetwork(plain_network(dimension), morphology(dimension))
    with torch.no_grad():
        first = network(images(dimension))[0]
        network.decoder.deep_supervision = False
        only = network(images(dimension))
    assert isinstance(only, torch.Tensor) and torch.equal(only, first)
    assert network.encoder is network.network.encoder


def test_a_network_built_for_prediction_loads_weights_and_radii():
    trained = MorphedNetwork(plain_network(2), morphology(2))
    built = MorphedNetwork(plain_network(2, deep_supervision=False), SoftMorphology(3, 2)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.zero_()
        built.load_state_dict(trained.state_dict())
        assert torch.equal(built(images(2)), trained(images(2))[0])


def test_weights_with_and_without_morphology_are_not_mistaken_for_each_other():
    plain, morphed = plain_network(2), MorphedNetwork(plain_network(2), morphology(2))
    with pytest.raises(RuntimeError, match=r"morphology\.radii"):
        morphed.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"morphology\.radii"):
        plain.load_state_dict(morphed.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        MorphedNetwork(plain_network(2), SoftMorphology(4, 2)).load_state_dict(morphed.state_dict())


def test_every_trainable_parameter_is_the_networks_own():
    plain = plain_network(2)
    names, parameters = trainable(MorphedNetwork(plain, morphology(2)))
    assert [name.removeprefix("network.") for name in names] == trainable(plain)[0]
    assert all(a is b for a, b in zip(parameters, trainable(plain)[1], strict=True))


def test_a_samples_parameter_gradient_is_the_same_alone_and_in_a_batch():
    network = MorphedNetwork(plain_network(2, deep_supervision=False), morphology(2, "opening_then_closing"))
    parameters = trainable(network)[1]
    target = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(4))
    loss = torch.nn.functional.cross_entropy
    batch = torch.autograd.grad(loss(network(images(2))[:1], target[:1]), parameters, allow_unused=True)
    alone = torch.autograd.grad(loss(network(images(2)[:1]), target[:1]), parameters, allow_unused=True)
    assert any(gradient is not None and gradient.any() for gradient in alone)
    for in_batch, by_itself in zip(batch, alone, strict=True):
        if by_itself is not None:
            torch.testing.assert_close(in_batch, by_itself, rtol=1e-9, atol=1e-12)
