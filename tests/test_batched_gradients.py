"""Engine two equals engine one, whatever the layer, the network, the rule and the chunk; nobody reaches anybody."""

from __future__ import annotations

import warnings

import pytest
import torch
from asserts import RULES, all_rules, assert_bounded, norm
from engines import LARGE, assert_same, batched, tensors_of
from test_gradients import network, nnunet_loss, records
from torch import nn

from nnunet_dp import batched_gradients
from nnunet_dp.batched_gradients import Batched, ClippedTotal, chunks
from nnunet_dp.clipping import RULE_NAMES, make_rule
from nnunet_dp.gradients import Record, one_at_a_time, trainable
from nnunet_dp.soft_morphology import MorphedNetwork, SoftMorphology


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("rule", all_rules(), ids=RULE_NAMES)
def test_engine_two_equals_engine_one_on_nnunets_networks(kind, dimension, rule):
    net, loss, patients = network(kind, dimension), nnunet_loss(), records(dimension, 5)
    assert_same(batched(2, net, loss, patients, rule), one_at_a_time(net, loss, patients, rule))


@pytest.mark.parametrize("patches", [1, 3])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7])
def test_the_size_of_a_chunk_does_not_change_the_sum(chunk, patches):
    net, loss, patients = network("PlainConvUNet", 2), nnunet_loss(), records(2, 5, patches)
    rule = make_rule("psac", RULES["psac"])
    assert_same(batched(chunk, net, loss, patients, rule), one_at_a_time(net, loss, patients, rule))


def test_the_last_chunk_is_filled_up_so_that_shapes_never_change(monkeypatch):
    shapes = []
    forward = batched_gradients.watched_forward

    def noted(network, copies, images):
        shapes.append(images.shape)
        return forward(network, copies, images)

    monkeypatch.setattr(batched_gradients, "watched_forward", noted)
    batched(3, network("PlainConvUNet", 2), nnunet_loss(), records(2, 4), LARGE)
    assert shapes == [(6, 2, 8, 8)] * 2


def test_records_of_several_shapes_are_summed_in_chunks_of_their_own():
    net, loss, patients = network("PlainConvUNet", 2), nnunet_loss(), [*records(2, 3), *records(2, 2, patches=1)]
    assert [len(chunk) for chunk in chunks(patients, 2)] == [2, 1, 2]
    assert_same(batched(2, net, loss, patients, LARGE), one_at_a_time(net, loss, patients, LARGE))


def test_an_empty_draw_gives_a_sum_of_zeros_with_its_bound():
    net = network("PlainConvUNet", 2)
    found = batched(2, net, nnunet_loss(), iter(()), make_rule("quantile", {"bound": 0.5}))
    assert norm(found.tensors) == 0 and (found.l2_bound, found.centred_count) == (0.5, 0.0)
    assert [t.shape for t in found.tensors] == [p.shape for p in trainable(net)[1]]


@pytest.mark.parametrize("rule", all_rules(), ids=RULE_NAMES)
def test_zeroing_one_patient_removes_exactly_that_patients_bounded_vector(rule):
    net, loss, patients = network("PlainConvUNet", 2), nnunet_loss(), records(2, 4)
    with_all = batched(4, net, loss, patients, rule).tensors
    without = batched(4, net, loss, patients[:1] + patients[2:], rule).tensors
    alone = batched(4, net, loss, patients[1:2], rule).tensors
    change = [a - b for a, b in zip(with_all, without, strict=True)]
    assert norm([a - b for a, b in zip(change, alone, strict=True)]) < 1e-12
    assert_bounded(alone, rule.bound)


def rows(net, loss, patients, chunk: int) -> list[list[torch.Tensor]]:
    """Each patient's own gradients, before the clip."""
    task = batched_gradients._Task(net, loss, _nothing, lambda value: None)
    found, _ = Batched(chunk)._gradients(patients, task)
    return [[g[i] for g in found if g is not None] for i in range(len(patients))]


def _nothing():
    return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("poison", [0.0, 7.0, float("nan"), float("inf")])
def test_what_one_patient_brings_moves_no_bit_of_anothers_gradient(kind, dtype, poison):
    net, loss = network(kind, 2).to(dtype), nnunet_loss()
    patients = [record._replace(data=record.data.to(dtype)) for record in records(2, 3)]
    other = Record(torch.full_like(patients[1].data, poison), patients[1].target)
    before, after = rows(net, loss, patients, 4), rows(net, loss, [patients[0], other, patients[2]], 4)
    for patient in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(before[patient], after[patient], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e300])
def test_a_patient_whose_gradient_is_not_finite_contributes_nothing(poison):
    net, loss, patients = network("PlainConvUNet", 2), nnunet_loss(), records(2, 3)
    poisoned = Record(torch.full_like(patients[0].data, poison), patients[0].target)
    rule = make_rule("quantile", RULES["quantile"])
    for drawn in ([patients[1], poisoned, patients[2]], [poisoned, patients[1], patients[2]]):
        found = batched(2, net, loss, drawn, rule)
        assert_same(found, one_at_a_time(net, loss, drawn, rule))
        assert all(torch.isfinite(tensor).all() for tensor in found.tensors)


def test_a_patient_with_only_ignored_voxels_brings_zero_and_is_counted_as_by_engine_one():
    net, loss, patients = network("PlainConvUNet", 2), nnunet_loss(ignore=True), records(2, 3)
    ignored = Record(patients[0].data, [torch.full_like(t, 3) for t in patients[0].target])
    rule = make_rule("quantile", RULES["quantile"])
    for drawn in ([ignored], [patients[1], ignored, patients[2]]):
        assert_same(batched(2, net, loss, drawn, rule), one_at_a_time(net, loss, drawn, rule))


@pytest.mark.parametrize("pattern", ["yes no yes", "no no no"])
def test_a_patient_whose_loss_depends_on_nothing_brings_zero(pattern):
    net = nn.Conv2d(2, 3, 3)
    drawn = [Record(r.data, word) for r, word in zip(tensors_of(3, (2, 6, 5)), pattern.split(), strict=True)]

    def loss(output, target):
        return output.square().mean() if target == "yes" else torch.zeros((), dtype=torch.float64)

    rule = make_rule("quantile", RULES["quantile"])
    expected = one_at_a_time(net.double(), loss, drawn, rule)
    assert_same(batched(2, net, loss, drawn, rule), expected)


def test_heads_without_weight_get_a_gradient_of_zero():
    net, loss, patients = network("PlainConvUNet", 3), nnunet_loss(), records(3, 2)
    found = batched(2, net, loss, patients, LARGE).tensors
    unused = [t for name, t in zip(trainable(net)[0], found, strict=True) if "seg_layers.0" in name]
    assert len(unused) == 2 and norm(unused) == 0


def test_without_deep_supervision_unused_heads_get_zero_too():
    net, patients = network("PlainConvUNet", 2), [Record(r.data, r.target[0]) for r in records(2, 3)]
    net.decoder.deep_supervision = False
    loss = nnunet_loss().loss
    assert_same(batched(2, net, loss, patients, LARGE), one_at_a_time(net, loss, patients, LARGE))


def test_a_network_that_changes_between_steps_is_followed():
    net, patients = network("PlainConvUNet", 2), records(2, 3)
    engine = Batched(2)
    engine(net, nnunet_loss(), patients, LARGE)
    net.decoder.deep_supervision = False
    single, loss = [Record(r.data, r.target[0]) for r in patients], nnunet_loss().loss
    assert_same(engine(net, loss, single, LARGE), one_at_a_time(net, loss, single, LARGE))


def test_a_network_with_morphology_on_its_logits_goes_through_the_same_engine():
    morphology = SoftMorphology(3, 2, True)
    morphology.set_radii([(0, 0), (1, 1), (0, 1)], ["none", "opening", "opening"])
    net, loss, patients = MorphedNetwork(network("PlainConvUNet", 2), morphology), nnunet_loss(), records(2, 3)
    assert_same(batched(2, net, loss, patients, LARGE), one_at_a_time(net, loss, patients, LARGE))


def test_frozen_layers_have_no_place_in_the_sum():
    net, loss, patients = network("PlainConvUNet", 2), nnunet_loss(), records(2, 3)
    net.encoder.requires_grad_(False)
    assert_same(batched(2, net, loss, patients, LARGE), one_at_a_time(net, loss, patients, LARGE))


def test_the_network_is_left_as_it_was():
    net = network("PlainConvUNet", 2)
    before = {name: (id(p), p.clone()) for name, p in net.named_parameters(remove_duplicate=False)}
    batched(2, net, nnunet_loss(), records(2, 3), LARGE)
    after = dict(net.named_parameters(remove_duplicate=False))
    assert all(id(after[name]) == own and torch.equal(after[name], p) for name, (own, p) in before.items())
    assert all(p.grad is None for p in net.parameters())


def test_the_loss_is_watched_once_per_patient_in_order_and_detached():
    net, loss, patients = network("PlainConvUNet", 2), nnunet_loss(), records(2, 3)
    found, expected = [], []
    batched(2, net, loss, patients, LARGE, watch=found.append)
    one_at_a_time(net, loss, patients, LARGE, watch=expected.append)
    assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-12)
    assert not any(value.requires_grad for value in found)


def test_under_autocast_gradients_are_float32_and_near_engine_ones():
    net, loss = network("PlainConvUNet", 2).float(), nnunet_loss()
    patients = [record._replace(data=record.data.float()) for record in records(2, 3)]

    def bfloat16():
        return torch.autocast("cpu", torch.bfloat16)

    found = batched(2, net, loss, patients, LARGE, autocast=bfloat16).tensors
    expected = one_at_a_time(net, loss, patients, LARGE, autocast=bfloat16).tensors
    assert norm([a - b for a, b in zip(found, expected, strict=True)]) <= 0.05 * norm(expected)


def test_a_chunk_holds_at_least_one_patient():
    with pytest.raises(ValueError, match="at least 1"):
        Batched(0)


# ---- memory ------------------------------------------------------------------------------------------------------


def small_memory(monkeypatch, most: int, place: str = "forward"):
    """Memory ends in a pass of more than ``most`` patients."""
    if place == "forward":
        forward = batched_gradients.watched_forward

        def limited(network, copies, images):
            if len(next(iter(copies.values()))) > most:
                raise torch.OutOfMemoryError("simulated")
            return forward(network, copies, images)

        monkeypatch.setattr(batched_gradients, "watched_forward", limited)
        return
    norms = ClippedTotal.norms

    def limited_norms(self, gradients, patients):
        if max(len(g) for g in gradients if g is not None) > most:
            raise torch.OutOfMemoryError("simulated")
        return norms(self, gradients, patients)

    monkeypatch.setattr(ClippedTotal, "norms", limited_norms)


@pytest.mark.parametrize("place", ["forward", "norms"])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_out_of_memory_goes_on_in_smaller_chunks_within_the_same_step(monkeypatch, most, place):
    net, loss, patients, told, watched = network("PlainConvUNet", 2), nnunet_loss(), records(2, 7), [], []
    rule = make_rule("quantile", RULES["quantile"])
    expected = one_at_a_time(net, loss, patients, rule)
    small_memory(monkeypatch, most, place)
    engine = Batched(8, told.append)
    assert_same(engine(net, loss, patients, rule, watch=watched.append), expected)
    assert engine.chunk <= most and engine.fallback is None and len(watched) == 7
    assert all("out of memory" in line for line in told) and told
    told.clear()
    assert_same(engine(net, loss, patients, rule), expected)
    assert not told  # the smaller chunk stays


def test_where_not_even_one_patient_fits_the_step_fails_loudly(monkeypatch):
    small_memory(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        Batched(4)(network("PlainConvUNet", 2), nnunet_loss(), records(2, 3), LARGE)


# ---- torch.compile -----------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    """The compiler's state is global: fresh for each test."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dimension", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_both_engines_take_a_compiled_network_without_graph_breaks(kind, dimension, compiler, monkeypatch):
    compiled = torch.compile
    calls = []

    def in_one_graph(function, **settings):
        calls.append(function)
        return compiled(function, **{**settings, "fullgraph": True, "backend": "aot_eager"})

    monkeypatch.setattr(torch, "compile", in_one_graph)
    net, loss, patients = network(kind, dimension), nnunet_loss(), records(dimension, 5)
    expected = one_at_a_time(net, loss, patients, LARGE)
    fast = torch.compile(net)
    assert_same(one_at_a_time(fast, loss, patients, LARGE), expected)
    assert_same(batched(2, fast, loss, patients, LARGE), expected)
    assert len(calls) == 2  # the network itself, and engine two's forward pass


@pytest.mark.slow
def test_both_engines_take_nnunets_compiled_network_with_the_real_compiler(compiler):
    net, loss = network("PlainConvUNet", 2).float(), nnunet_loss()
    patients = [record._replace(data=record.data.float()) for record in records(2, 4)]
    expected = one_at_a_time(net, loss, patients, LARGE).tensors
    fast = torch.compile(net)
    for engine in (one_at_a_time, Batched(2)):
        found = engine(fast, loss, patients, LARGE).tensors
        assert norm([a - b for a, b in zip(found, expected, strict=True)]) <= 1e-3 * norm(expected)
