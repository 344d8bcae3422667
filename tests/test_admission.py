"""Which networks and which trainers may train privately: known layers, no state, no function of anybody else's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from ordinary_plans import architecture
from torch import nn

from nnunet_dp import TRAINING_NAMES
from nnunet_dp.admission import refuse_coupling
from nnunet_dp.clipping import RULE_NAMES
from nnunet_dp.errors import Refusal
from nnunet_dp.morphology import FILE, ClassRefinement, Morphology, Opening, write_morphology
from nnunet_dp.soft_morphology import MorphedNetwork, SoftMorphology
from nnunet_dp.trainers import nnUNetTrainerDP as module
from nnunet_dp.trainers.nnUNetTrainerDP import nnUNetTrainerDP, nnUNetTrainerDP_AutoS_MorphAdaptive

# ---- admission ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_nnunets_unets_keep_patients_apart(kind, dimension):
    entry = architecture(dimension, 3, kind)
    arguments = entry["arch_kwargs"] | {"features_per_stage": [4, 4, 4], "dropout_op_kwargs": {}}
    network = get_network_from_plans(
        entry["network_class_name"], arguments, entry["_kw_requires_import"], 1, 3, deep_supervision=True
    )
    refuse_coupling(network)


class Homemade(nn.Module):
    """A module that nobody examined."""


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm3d(2), "BatchNorm3d at '1.0' couples patients"),
        (nn.SyncBatchNorm(2), "SyncBatchNorm at '1.0' couples patients"),
        (nn.InstanceNorm2d(2, track_running_stats=True), "InstanceNorm2d at '1.0' couples patients"),
        (nn.Dropout3d(), "Dropout3d at '1.0' draws from one stream for all patients"),
        (Homemade(), r"Homemade at '1.0' was never examined"),
        (nn.RNN(2, 2), r"torch.nn.*RNN at '1.0' was never examined"),
    ],
)
def test_what_couples_patients_is_refused_by_its_name_and_place(module, message):
    with pytest.raises(Refusal, match=message):
        refuse_coupling(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(module)))


def test_a_module_that_only_bears_a_known_name_is_refused():
    with pytest.raises(Refusal, match="never examined"):
        refuse_coupling(type("Conv3d", (nn.Conv3d,), {"__module__": "elsewhere"})(1, 1, 1))


# ---- morphology in the network -----------------------------------------------------------------------------------


def morphed() -> MorphedNetwork:
    return MorphedNetwork(nn.Conv2d(1, 2, 3), SoftMorphology(2, 2))


def test_morphology_in_the_network_is_admitted_with_its_four_buffers():
    known = {"radii", "operation", "at_prediction", "over_background"}
    assert set(dict(SoftMorphology(2, 2).named_buffers())) == known
    refuse_coupling(morphed())
    refuse_coupling(nn.Sequential(morphed(), morphed()))


@pytest.mark.parametrize("where", ["morphology", "network", ""])
def test_any_other_buffer_is_refused_wherever_it_lies(where):
    network = morphed()
    network.get_submodule(where).register_buffer("memory", torch.zeros(1))
    with pytest.raises(Refusal, match="memory"):
        refuse_coupling(network)


@pytest.mark.parametrize("name", ["radii", "operation"])
def test_a_buffer_that_only_bears_a_known_name_is_refused_elsewhere(name):
    network = morphed()
    network.network.register_buffer(name, torch.zeros(1))
    with pytest.raises(Refusal, match=f"keeps a buffer 'network.{name}'"):
        refuse_coupling(network)


@pytest.mark.parametrize("kind", [SoftMorphology, MorphedNetwork])
def test_a_subclass_of_our_own_modules_was_never_examined(kind):
    network = morphed()
    subclass = type(kind.__name__, (kind,), {"__module__": kind.__module__})
    one = subclass(2, 2) if kind is SoftMorphology else subclass(nn.Conv2d(1, 2, 3), SoftMorphology(2, 2))
    network.add_module("morphology" if kind is SoftMorphology else "network", one)
    with pytest.raises(Refusal, match="never examined"):
        refuse_coupling(network)


# ---- functions of somebody else's --------------------------------------------------------------------------------


def mean_of_the_batch(*found):
    return found[-1]


@pytest.mark.parametrize("where", ["morphology", "network", ""])
def test_a_module_with_a_forward_of_its_own_is_refused(where):
    network = morphed()
    network.get_submodule(where).forward = mean_of_the_batch
    with pytest.raises(Refusal, match="a function or hook of its own"):
        refuse_coupling(network)


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
    ],
)
def test_a_module_with_a_hook_is_refused(register):
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    refuse_coupling(network)
    register(network[1], mean_of_the_batch)
    with pytest.raises(Refusal, match="Conv2d at '1' carries a function or hook of its own"):
        refuse_coupling(network)


def test_a_buffer_is_refused_by_its_name():
    layer = nn.Conv2d(1, 1, 1)
    layer.register_buffer("seen", torch.zeros(1))
    with pytest.raises(Refusal, match=r"keeps a buffer '0\.seen', which would be released without noise"):
        refuse_coupling(nn.Sequential(layer))


# ---- trainers ----------------------------------------------------------------------------------------------------


def refuse_overrides_of(kind: type) -> None:
    """As before a training, for a trainer that was never constructed."""
    object.__new__(kind)._refuse_overrides()


@pytest.mark.parametrize("name", TRAINING_NAMES)
def test_our_own_trainers_override_nothing(name):
    kind = getattr(module, name)
    refuse_overrides_of(kind)
    assert kind.clip_rule in RULE_NAMES and kind.in_network in (None, "fixed", "adaptive", "training_only")


@pytest.mark.parametrize("words", [{"clip_rule": "psac"}, {"in_network": "fixed"}, {"in_network": None}, {}])
def test_a_subclass_may_choose_known_words(words):
    refuse_overrides_of(type("Mine", (nnUNetTrainerDP,), words))


@pytest.mark.parametrize("name", ["clip_rule", "in_network"])
@pytest.mark.parametrize("value", [property(lambda self: "flat"), lambda self: "flat", "homemade", 3])
def test_a_subclass_that_brings_anything_but_a_known_word_is_refused(name, value):
    with pytest.raises(Refusal, match=f"Mine overrides {name}: it was never examined"):
        refuse_overrides_of(type("Mine", (nnUNetTrainerDP,), {name: value}))


def test_a_property_between_two_subclasses_is_found_too():
    middle = type("Middle", (nnUNetTrainerDP,), {"clip_rule": property(lambda self: "flat")})
    with pytest.raises(Refusal, match="clip_rule"):
        refuse_overrides_of(type("Mine", (middle,), {"clip_rule": "flat"}))


@pytest.mark.parametrize("name", ["train_step", "_learn_morphology", "anything"])
def test_a_subclass_with_a_method_of_its_own_is_refused(name):
    with pytest.raises(Refusal, match=f"Mine overrides {name}"):
        refuse_overrides_of(type("Mine", (nnUNetTrainerDP,), {name: lambda self: None}))


def test_a_function_on_the_trainer_itself_is_refused():
    trainer = object.__new__(nnUNetTrainerDP)
    trainer.train_step = lambda batch: None
    with pytest.raises(Refusal, match="overrides train_step"):
        trainer._refuse_overrides()


# ---- the adaptive trainer opens with what its own run paid for ---------------------------------------------------

PAID = {"ledger_run": "model/fold_0/1", "ledger_sequence": 2}
BOX = ((2, 2),)  # of a ball of 2 mm at 1 mm


def learning(folder, monkeypatch, resumed=None, **changes) -> SimpleNamespace:
    """The adaptive trainer after ``learn_once``, with rules in its fold's folder; what it opened and saved."""
    opening = ClassRefinement(name="lesion", labels=(1,), writes=1, operations=(Opening(radius_mm=2.0),))
    provenance = PAID | changes.pop("provenance", {})
    fields = {"kind": "private", "classes": (opening,), "provenance": provenance} | changes
    write_morphology(Morphology(**fields), folder / FILE)
    entry = SimpleNamespace(run="model/fold_0/1", sequence=2, purpose="morphology")
    said = SimpleNamespace(opened=[], saved=[], radii=None)
    trainer = object.__new__(nnUNetTrainerDP_AutoS_MorphAdaptive)
    vars(trainer).update(
        preprocessed_dataset_folder_base=folder, output_folder=folder, dataset_json={}, configuration_name="2d",
        plans_manager=SimpleNamespace(plans={}), configuration_manager=SimpleNamespace(spacing=(1.0, 1.0)),
        private=SimpleNamespace(plan=None, checkpoint=None, ledger=SimpleNamespace(own_entries=[entry])),
        _radii=resumed, print_to_log_file=print, _open_logits=said.opened.append,
        _save_latest=lambda: said.saved.append(trainer._radii),
    )  # fmt: skip
    monkeypatch.setattr(module, "reference_facts", lambda *found: None)
    monkeypatch.setattr(module, "learn_once", lambda *found: "Refinement learnt")
    trainer._learn_morphology({})
    return said


def test_the_adaptive_trainer_opens_with_its_own_rules_and_its_checkpoint_carries_the_radii(tmp_path, monkeypatch):
    said = learning(tmp_path, monkeypatch)
    assert said.opened == said.saved == [BOX]


@pytest.mark.parametrize(
    "changes",
    [
        {"provenance": {"ledger_run": "model/fold_1/1"}},
        {"provenance": {"ledger_sequence": 3}},
        {"kind": "fixed"},
        {"kind": "not_private"},
    ],
)
def test_rules_that_this_run_did_not_pay_for_never_reach_the_network(tmp_path, monkeypatch, changes):
    said = learning(tmp_path, monkeypatch, **changes)
    assert said.opened == [] and said.saved == [None]


def test_a_resumed_run_goes_on_with_the_radii_it_began_with(tmp_path, monkeypatch):
    assert learning(tmp_path, monkeypatch, resumed=BOX).opened == [BOX]
    for changes in ({"classes": (ClassRefinement(name="lesion", labels=(1,), writes=1),)}, {"kind": "fixed"}):
        with pytest.raises(Refusal, match="is not the one this run began with: put it back"):
            learning(tmp_path, monkeypatch, resumed=BOX, **changes)
