"""Private plans are nnU-Net's own plans with a smaller network and one more section."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from ordinary_plans import DATASET_JSON, architecture, ordinary_plans

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.nnunet_planning import count_parameters
from nnunet_dp.planning import plan_configuration
from nnunet_dp.plans import (
    configuration_plan,
    for_one_configuration,
    plans_name,
    read_section,
    shrunk_architecture,
    with_section,
    without_patients_digest,
    write_json,
)
from nnunet_dp.sections import PrivacySection

KINDS = ["PlainConvUNet", "ResidualEncoderUNet"]


def section(*configurations: str, target: float = 8.0) -> PrivacySection:
    budget = PrivacyBudget(epsilon=target, delta=1e-4)
    strides = [[1, 1], [2, 2], [2, 2]]
    plan = plan_configuration(budget, 100, (64, 64), strides, lambda shape: 135 * sum(shape) ** 2, "small")
    return PrivacySection(
        budget=budget,
        patients=100,
        patients_file_sha256=None,
        source_plans="nnUNetPlans",
        public_weights_sha256=None,
        not_covered=("plans_from_raw_fingerprint",),
        configurations={name: plan for name in configurations},
    )


def private(target: float = 8.0) -> dict:
    names = ("2d", "3d_fullres")
    shrunk = {name: shrunk_architecture(architecture(int(name[0]), 4), (8, 16)) for name in names}
    return with_section(ordinary_plans(), "nnUNetPlansDP_eps8", section(*names, target=target), shrunk)


# ---- shrinking ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("configuration", "shape"), [("3d_fullres", (4, 8, 16)), ("2d", (8, 8))])
def test_the_shrunk_network_builds_in_nnunet_and_has_the_counted_parameters(kind, configuration, shape):
    plans = ordinary_plans(kind)
    smaller = shrunk_architecture(plans["configurations"][configuration]["architecture"], shape)
    arguments = (smaller["network_class_name"], smaller["arch_kwargs"], smaller["_kw_requires_import"])
    network = get_network_from_plans(*arguments, 1, 3, deep_supervision=False)
    assert sum(parameter.numel() for parameter in network.parameters()) == count_parameters(
        plans, configuration, DATASET_JSON, shape
    )
    edges = [8] * len(smaller["arch_kwargs"]["kernel_sizes"][0])
    with torch.no_grad():
        assert network(torch.zeros(1, 1, *edges)).shape == (1, 3, *edges)


def test_counting_parameters_allocates_no_memory_and_draws_nothing():
    before = torch.get_rng_state()
    wide = count_parameters(ordinary_plans(), "3d_fullres", DATASET_JSON, (2000, 4000, 8000, 8000))
    assert wide > 2 * 10**9
    assert torch.equal(torch.get_rng_state(), before)


def test_shrinking_leaves_the_plans_it_was_given_alone():
    source = architecture(3, 4)
    kept = copy.deepcopy(source)
    shrunk_architecture(source, (4, 8))
    assert source == kept


@pytest.mark.parametrize("kind", KINDS)
def test_every_list_of_the_shrunk_architecture_has_one_entry_a_stage(kind):
    arguments = shrunk_architecture(architecture(3, 5, kind), (4, 8, 8))["arch_kwargs"]
    lists = {key: len(value) for key, value in arguments.items() if isinstance(value, list)}
    assert lists.pop("n_conv_per_stage_decoder") == 2
    assert set(lists.values()) == {arguments["n_stages"]} == {3}


def test_an_unknown_network_class_is_refused_by_its_name():
    primus = architecture(3, 4) | {"network_class_name": "dynamic_network_architectures.architectures.primus.PrimusM"}
    with pytest.raises(Refusal, match="network PrimusM is not supported; expected one of PlainConvUNet"):
        shrunk_architecture(primus, (4, 8))


# ---- the section -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epsilon", "name"),
    [
        (8, "nnUNetPlansDP_eps8"),
        (8.0, "nnUNetPlansDP_eps8"),
        (0.5, "nnUNetPlansDP_eps0.5"),
        (10, "nnUNetPlansDP_eps10"),
    ],
)
def test_private_plans_are_named_after_their_source_and_epsilon(epsilon, name):
    assert plans_name("nnUNetPlans", epsilon) == name


def test_private_plans_change_name_network_and_section_and_nothing_else():
    source, plans = ordinary_plans(), private()
    assert read_section(plans) == section("2d", "3d_fullres")
    del plans["differential_privacy"]
    for name in ("2d", "3d_fullres"):
        assert plans["configurations"][name]["architecture"] != source["configurations"][name]["architecture"]
        plans["configurations"][name]["architecture"] = source["configurations"][name]["architecture"]
    assert plans == source | {"plans_name": "nnUNetPlansDP_eps8"}


def test_ordinary_plans_have_no_section():
    assert read_section(ordinary_plans()) is None


@pytest.mark.parametrize("change", [{"version": 9}, {"sigma": 1.0}, {"budget": None}])
def test_a_section_that_this_version_does_not_write_is_refused_with_its_fields(change):
    plans = private()
    plans["differential_privacy"] |= change
    with pytest.raises(Refusal, match=rf"fields: {next(iter(change))}.*--overwrite"):
        read_section(plans)


def test_a_configuration_that_was_not_planned_is_refused_with_the_command_that_plans_it():
    assert configuration_plan(section("2d"), "2d").steps > 0
    with pytest.raises(UsageRefusal, match=r"only 2d\): add it with `nnunet-dp plan -c 3d_fullres"):
        configuration_plan(section("2d"), "3d_fullres")


# ---- one configuration's plans -----------------------------------------------------------------------------------


def test_another_configuration_added_later_does_not_change_this_ones_plans():
    before, after = private(), private()
    del before["configurations"]["2d"], before["differential_privacy"]["configurations"]["2d"]
    assert for_one_configuration(before, "3d_fullres") == for_one_configuration(after, "3d_fullres")


def test_a_changed_budget_network_or_name_makes_this_configurations_plans_differ():
    plans = for_one_configuration(private(), "3d_fullres")
    assert for_one_configuration(private(target=4), "3d_fullres") != plans
    assert for_one_configuration(private() | {"plans_name": "other"}, "3d_fullres") != plans
    wider = private()
    wider["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [16, 16]
    assert for_one_configuration(wider, "3d_fullres") != plans


def test_the_patients_digest_is_no_part_of_a_models_plans():
    private_plans = private()
    private_plans["differential_privacy"]["patients_file_sha256"] = "a" * 64
    assert for_one_configuration(private_plans, "2d") == for_one_configuration(private(), "2d")
    assert "a" * 64 not in json.dumps(without_patients_digest(private_plans))
    assert private_plans["differential_privacy"]["patients_file_sha256"] == "a" * 64
    assert without_patients_digest(ordinary_plans()) == ordinary_plans()


def test_plans_in_memory_equal_those_read_back_from_disk(tmp_path):
    plans = private()
    plans["configurations"]["3d_fullres"]["patch_size"] = (40, 56, 40)  # JSON knows no tuples
    write_json(plans, tmp_path / "plans.json")
    read = json.loads((tmp_path / "plans.json").read_text())
    assert for_one_configuration(read, "3d_fullres") == for_one_configuration(plans, "3d_fullres")


def test_ordinary_plans_have_one_configuration_too():
    assert list(for_one_configuration(ordinary_plans(), "2d")["configurations"]) == ["2d"]


# ---- writing -----------------------------------------------------------------------------------------------------


def test_writing_replaces_the_file_at_once(tmp_path):
    write_json({"a": 1}, tmp_path / "plans.json")
    write_json({"a": 2}, tmp_path / "plans.json")
    assert json.loads((tmp_path / "plans.json").read_text()) == {"a": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["plans.json"]


@pytest.mark.parametrize("failure", ["content", "disk"])
def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch, failure):
    write_json({"a": 1}, tmp_path / "plans.json")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    if failure == "disk":
        monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises((TypeError, OSError)):
        write_json({"a": 2, "b": object() if failure == "content" else 0}, tmp_path / "plans.json")
    assert json.loads((tmp_path / "plans.json").read_text()) == {"a": 1}
