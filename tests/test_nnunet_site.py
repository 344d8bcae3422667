"""What a site asks of nnU-Net, against nnU-Net's own commands and the trainers' own parts."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from one_site import DATASET, Site, coordinator_plans, make_site, terms

from nnunet_dp import nnunet_site
from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.errors import Refusal
from nnunet_dp.federated.site_plans import admit, configuration_plan
from nnunet_dp.gradients import trainable
from nnunet_dp.plans import read_section


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    site = make_site(tmp_path_factory.mktemp("site"), patients=6)
    assert site.prepare().code == "ok", site.log()
    return site


@pytest.fixture
def folders(site):
    with site.settings.as_environment():
        yield


def admitted(site: Site) -> dict:
    return json.loads(next((site.preprocessed / "federated").glob("prepared_*.json")).read_text())


def described(site: Site) -> dict:
    return json.loads((site.root / "raw" / DATASET / "dataset.json").read_text())


def opened(site: Site, plans: dict):
    return nnunet_site.open_model(plans, "2d", site.preprocessed, described(site), torch.device("cpu"), 1)


def private(site: Site, **settings) -> dict:
    chosen = site.with_settings(**settings).settings
    return nnunet_site.site_plans(admitted(site), terms(), chosen, site.preprocessed, described(site))


def test_cases_are_preprocessed_as_by_nnunets_own_command(site, folders):
    import blosc2
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = admitted(site)
    other = copy.deepcopy(plans)
    other["configurations"]["2d"]["data_identifier"] = "by_nnunet"
    (site.preprocessed / "other.json").write_text(json.dumps(other))
    preprocessor = PlansManager(other).get_configuration("2d").preprocessor_class(verbose=False)
    preprocessor.show_progress_bar = False
    preprocessor.run(DATASET, "2d", "other", num_processes=1)
    ours, theirs = site.preprocessed / plans["configurations"]["2d"]["data_identifier"], site.preprocessed / "by_nnunet"
    names = sorted(file.name for file in theirs.iterdir())
    assert sorted(file.name for file in ours.iterdir()) == names and len(names) >= 18
    for name in names:
        if name.endswith(".b2nd"):
            assert np.array_equal(*(blosc2.open(str(folder / name), mode="r")[:] for folder in (ours, theirs)))
        else:
            assert set(load_pickle(str(ours / name))) == set(load_pickle(str(theirs / name)))


def test_reference_segmentations_are_the_public_slots(site, folders):
    patients = nnunet_site.find_units(site.settings, site.preprocessed)
    assert patients.number == 6 and opened(site, private(site)).slots == 6
    cases = {file.stem for file in (site.preprocessed / "gt_segmentations").iterdir()}
    assert cases == set(patients.case_to_patient)


def test_without_a_raw_dataset_nothing_is_prepared(site, tmp_path):
    with pytest.raises(Refusal, match="set raw in the settings"):
        nnunet_site.preprocess(admitted(site), "2d", tmp_path / DATASET, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_the_section_is_the_sites_own(site, folders):
    section = read_section(private(site, delta=1e-6))
    assert section is not None and section.patients == 6 and section.budget.unit == "patient"
    assert section.budget == PrivacyBudget(epsilon=8, delta=1e-6, unit="patient")
    plan = section.configurations["2d"]
    assert (plan.steps, plan.morphology, plan.start) == (6, None, None)
    assert 7.9 <= plan.privacy_plan(section.budget, "flat", 6).epsilon <= 8


def test_parameters_in_the_section_are_those_that_are_sent(site, folders):
    plans = private(site)
    section = read_section(plans)
    assert section is not None
    network = opened(site, plans).network
    assert section.configurations["2d"].network.parameters == sum(p.numel() for p in trainable(network)[1])


def test_a_section_of_the_coordinator_is_thrown_away():
    plans = coordinator_plans(differential_privacy={"budget": {"epsilon": 1e9}}, patients={"a": 1})
    mine = admit(plans, "2d", DATASET, "here")
    assert "differential_privacy" not in mine and "patients" not in mine
    assert (mine["dataset_name"], mine["configurations"]["2d"]["data_identifier"]) == (DATASET, "here")


def test_a_batch_dice_of_the_coordinator_is_turned_off():
    plans = coordinator_plans()
    plans["configurations"]["2d"]["batch_dice"] = True
    assert admit(plans, "2d", DATASET, "here")["configurations"]["2d"]["batch_dice"] is False


@pytest.mark.parametrize("probability", [1.0, 0.25])
def test_noise_is_calibrated_to_all_rounds_and_local_steps(probability):
    asked = terms(rounds=5, local_steps=4, sampling_probability=probability)
    budget = PrivacyBudget(epsilon=3, delta=1e-5)
    plan = configuration_plan(coordinator_plans(), asked, budget, 40, 1000)
    assert plan.steps == 20 and 0.99 * 3 <= plan.privacy_plan(budget, "flat", 40).epsilon <= 3


def test_a_threshold_follows_the_percentile_of_the_terms():
    budget = PrivacyBudget(epsilon=3, delta=1e-5)
    plan = configuration_plan(coordinator_plans(), terms(mode="adp-fl", percentile=75, bound=3.0), budget, 40, 1000)
    rule = plan.privacy_plan(budget, "quantile", 40).rule
    assert (rule.bound, rule.target_quantile) == (3.0, 0.75)


def test_a_network_that_couples_patients_is_refused(site, folders):
    plans = private(site)
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["norm_op"] = "torch.nn.BatchNorm2d"
    with pytest.raises(Refusal, match="couples patients"):
        opened(site, plans)


def test_model_files_carry_no_digest_of_the_patients(site, folders, tmp_path):
    plans = private(site)
    nnunet_site.write_model_files(tmp_path / "model", plans, described(site))
    written = (tmp_path / "model" / "plans.json").read_text()
    digest = plans["differential_privacy"]["patients_file_sha256"]
    assert len(digest) == 64 and digest not in written
    assert json.loads((tmp_path / "model" / "dataset_fingerprint.json").read_text()) == {}


def test_the_loss_looks_at_each_output_at_its_own_resolution(site, folders):
    model = opened(site, private(site))
    (record,) = model.records(0, [0])
    assert [target.shape[2:] for target in record.target] == [(32, 32), (16, 16)]
    outputs = model.network(record.data)
    assert [output.shape[2:] for output in outputs] == [(32, 32), (16, 16)]
    assert torch.isfinite(model.loss(outputs, record.target))


def test_two_stages_have_no_deep_supervision(site, folders):
    plans = private(site)
    kwargs = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    for key in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
        kwargs[key] = kwargs[key][:2]
    kwargs |= {"n_stages": 2, "n_conv_per_stage_decoder": [2]}
    model = opened(site, plans)
    (record,) = model.records(0, [0])
    assert torch.is_tensor(model.network(record.data)) and torch.is_tensor(record.target)
    assert torch.isfinite(model.loss(model.network(record.data), record.target))


@pytest.mark.parametrize(
    ("labels", "channels"),
    [
        ({"background": 0, "a": 1, "b": 2, "ignore": 3}, 1),
        ({"background": 0, "whole": [1, 2], "part": 2}, 2),
        ({"background": 0, "whole": [1, 2], "part": 2, "ignore": 3}, 3),
    ],
)
def test_targets_have_the_channels_that_nnunets_own_transforms_give(labels, channels):
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    from nnunet_dp.nnunet import target_channels

    manager = LabelManager(labels, [1, 2] if channels > 1 else None)
    regions = manager.foreground_regions if manager.has_regions else None
    transforms = nnUNetTrainer.get_validation_transforms(
        None, False, manager.foreground_labels, regions, manager.ignore_label
    )
    target = transforms(image=torch.zeros(1, 4, 4), segmentation=torch.zeros(1, 4, 4))["segmentation"]
    assert target.shape[0] == channels == target_channels(manager)
