"""Engine one equals the plain loop on nnU-Net's own networks, and one patient never reaches another."""

from __future__ import annotations

import math

import pytest
import torch
from asserts import RULES, all_rules, assert_bounded, norm
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from ordinary_plans import architecture
from references import clipped_sum_by_loop

from nnunet_dp.clipping import RULE_NAMES, SAFETY, make_rule
from nnunet_dp.gradients import Record, one_at_a_time, trainable


def network(kind: str, dimension: int):
    """nnU-Net's own network with three stages and deep supervision, in float64."""
    torch.manual_seed(0)
    entry = architecture(dimension, 3, kind)
    entry["arch_kwargs"]["features_per_stage"] = [4, 8, 8]
    name, arguments, imports = entry.values()
    return get_network_from_plans(name, arguments, imports, 2, 3, deep_supervision=True).double()


def nnunet_loss(ignore: bool = False):
    """nnU-Net's Dice + CE with deep supervision and batch_dice off, whose last head has weight zero."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, ignore_label=3 if ignore else None, dice_class=MemoryEfficientSoftDiceLoss)
    return DeepSupervisionWrapper(loss, [1.0, 0.0])


def records(dimension: int, count: int, patches: int = 2, seed: int = 0):
    """Random patients of ``patches`` patches each, with targets at both resolutions."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        data = torch.randn(patches, 2, *[8] * dimension, generator=generator, dtype=torch.float64)
        target = torch.randint(0, 3, (patches, 1, *[8] * dimension), generator=generator)
        found.append(Record(data, [target, target[(..., *[slice(None, None, 2)] * dimension)]]))
    return found


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("name", ["flat", "auto_s", "psac"])
def test_the_engine_equals_a_plain_loop_on_nnunets_networks(kind, dimension, name):
    net, loss, patients = network(kind, dimension), nnunet_loss(), records(dimension, 3)
    rule = make_rule(name, RULES[name])
    expected = clipped_sum_by_loop(
        net, loss, patients, lambda n: rule.factors(torch.tensor([n], dtype=torch.float64)).item()
    )
    found = one_at_a_time(net, loss, patients, rule).tensors
    difference = norm([a - b for a, b in zip(found, expected, strict=True)])
    assert difference <= 1e-12 * norm(expected)


def test_a_broken_engine_that_counts_shared_modules_twice_is_caught():
    net, loss, patients = network("PlainConvUNet", 2), nnunet_loss(), records(2, 2)
    rule = make_rule("flat", {"bound": 1e6})
    expected = clipped_sum_by_loop(net, loss, patients, lambda n: 1.0)
    twice = {id(p) for name, p in net.named_parameters(remove_duplicate=False) if name.startswith("decoder.encoder.")}
    found = one_at_a_time(net, loss, patients, rule).tensors
    broken = [t * 2 if id(p) in twice else t for t, p in zip(found, trainable(net)[1], strict=True)]
    assert twice and norm([a - b for a, b in zip(broken, expected, strict=True)]) > 0.1 * norm(expected)


def test_each_parameter_is_counted_once_though_it_has_several_names():
    net = network("PlainConvUNet", 2)
    names, parameters = trainable(net)
    assert len({id(p) for p in parameters}) == len(parameters) == len(names)
    assert len(list(net.named_parameters(remove_duplicate=False))) > len(parameters)


@pytest.mark.parametrize("rule", all_rules(), ids=RULE_NAMES)
def test_zeroing_one_patient_removes_exactly_that_patients_bounded_vector(rule):
    net, loss, patients = network("PlainConvUNet", 2), nnunet_loss(), records(2, 4)
    with_all = one_at_a_time(net, loss, patients, rule).tensors
    without = one_at_a_time(net, loss, patients[:1] + patients[2:], rule).tensors
    alone = one_at_a_time(net, loss, patients[1:2], rule).tensors
    change = [a - b for a, b in zip(with_all, without, strict=True)]
    assert norm([a - b for a, b in zip(change, alone, strict=True)]) < 1e-12
    assert_bounded(alone, rule.bound)


def test_batch_dice_would_couple_patients_and_is_why_the_trainer_turns_it_off():
    dice = {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}
    coupled = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    separate = DC_and_CE_loss({**dice, "batch_dice": False}, {}, dice_class=MemoryEfficientSoftDiceLoss)
    logits, target = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 1, 8, 8))

    def first_patients_gradient(loss, other):
        x = torch.cat([logits[:1], other]).requires_grad_()
        return torch.autograd.grad(loss(x, target), x)[0][0]

    moved = [first_patients_gradient(loss, 3 * logits[1:]) - first_patients_gradient(loss, logits[1:])
             for loss in (coupled, separate)]
    assert moved[0].abs().max() > 1e-6
    assert moved[1].abs().max() == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e300])
def test_a_patient_whose_gradient_is_not_finite_contributes_nothing(poison):
    net, loss, patients = network("PlainConvUNet", 2), nnunet_loss(), records(2, 2)
    poisoned = Record(torch.full_like(patients[0].data, poison), patients[0].target)
    rule = make_rule("auto_s", RULES["auto_s"])
    found = one_at_a_time(net, loss, [poisoned, patients[1]], rule).tensors
    alone = one_at_a_time(net, loss, [patients[1]], rule).tensors
    assert norm([a - b for a, b in zip(found, alone, strict=True)]) <= rule.bound
    if not torch.isfinite(poisoned.data).all():
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_an_empty_draw_gives_a_sum_of_zeros_with_its_bound():
    net = network("PlainConvUNet", 2)
    found = one_at_a_time(net, nnunet_loss(), [], make_rule("flat", {"bound": 0.5}))
    assert norm(found.tensors) == 0 and found.l2_bound == 0.5
    assert [t.shape for t in found.tensors] == [p.shape for p in trainable(net)[1]]


def test_a_patient_with_only_ignored_voxels_contributes_no_more_than_the_bound():
    net, patients = network("PlainConvUNet", 2), records(2, 1)
    ignored = Record(patients[0].data, [torch.full_like(t, 3) for t in patients[0].target])
    found = one_at_a_time(net, nnunet_loss(ignore=True), [ignored], make_rule("auto_v", {"bound": 1.0}))
    assert_bounded(found.tensors, 1.0)


def test_regions_with_an_ignore_channel_go_through_the_same_engine():
    net, patients = network("PlainConvUNet", 2), records(2, 2)
    dice = {"batch_dice": False, "do_bg": True, "smooth": 1e-5, "ddp": False}
    loss = DeepSupervisionWrapper(DC_and_BCE_loss({}, dice, use_ignore_label=True), [1.0, 0.0])
    regions = [Record(r.data, [torch.cat([t >= 1, t >= 2, t >= 1, t == 0], 1).double() for t in r.target])
               for r in patients]
    rule = make_rule("flat", {"bound": 0.2})
    expected = clipped_sum_by_loop(
        net, loss, regions, lambda n: rule.factors(torch.tensor([n], dtype=torch.float64)).item()
    )
    found = one_at_a_time(net, loss, regions, rule).tensors
    assert norm([a - b for a, b in zip(found, expected, strict=True)]) <= 1e-12 * norm(expected)


def test_the_quantile_rule_counts_the_drawn_patients_and_no_other():
    net, loss, patients = network("PlainConvUNet", 2), nnunet_loss(), records(2, 3)
    above = one_at_a_time(net, loss, patients, make_rule("quantile", {"bound": 1e-3}))
    below = one_at_a_time(net, loss, patients, make_rule("quantile", {"bound": 1e3}))
    assert (above.centred_count, below.centred_count) == (-1.5, 1.5)


def test_the_loss_is_watched_once_per_patient():
    seen: list[float] = []
    net = network("PlainConvUNet", 2)
    one_at_a_time(net, nnunet_loss(), records(2, 3), make_rule("auto_s", RULES["auto_s"]), watch=seen.append)
    assert len(seen) == 3


@pytest.mark.parametrize("batch", [1600, 5000])
def test_removing_one_patient_moves_the_rounded_sum_by_no_more_than_the_bound(batch):
    """Gradients chosen against float32 sums, which move by 1.03 bounds at 1600 patients and by more at more."""
    edge = 2 ** math.floor(math.log2(batch * 0.62))
    before = math.ceil((edge - 0.5) / SAFETY)
    value, step = (edge - 0.5) / before / SAFETY, -0.26 * edge * 2.0**-23 / SAFETY
    others = [value] * before, [step] * (batch - before - 1)
    net = torch.nn.Linear(1, 1, bias=False)

    def total(middle, dtype):
        numbers = torch.tensor([*others[0], middle, *others[1]])
        if dtype == torch.float32:  # what the engine must not do
            sum_ = torch.zeros((), dtype=dtype)
            for number in numbers:
                sum_ += number * SAFETY
            return sum_.item()
        records = (Record(number.reshape(1, 1), None) for number in numbers)
        rule = make_rule("flat", {"bound": 1.0})
        return one_at_a_time(net, lambda output, _: output.sum(), records, rule).tensors[0].item()

    assert total(1.0, torch.float64) - total(0.0, torch.float64) <= 1.0
    assert total(1.0, torch.float32) - total(0.0, torch.float32) > 1.0
