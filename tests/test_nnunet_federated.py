"""What a coordinator decides: from public facts alone, by the rules of `nnunet-dp plan`, in a form that sites admit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from one_site import coordinator_plans
from ordinary_plans import DATASET_JSON, ordinary_plans

from nnunet_dp import nnunet_federated as federated
from nnunet_dp import nnunet_public_plans as public
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.federated.protocol import Mode
from nnunet_dp.federated.site_plans import admit
from nnunet_dp.nnunet_federated import Schedule, Sites, plan_run
from nnunet_dp.plans import SECTION, json_sha256

PICTURES = {
    "channel_names": {"0": "R", "1": "G", "2": "B"},
    "labels": {"background": 0, "lesion": 1},
    "file_ending": ".png",
    "numTraining": 100,
}
SMALL = (4, 8, 8)


def planned(units: int = 136, sites: int = 4, epsilon: float = 8.0, **schedule):
    settings = {"mode": Mode.adp_fl, "rounds": 20, "start": False} | schedule
    return plan_run(ordinary_plans(), "3d_fullres", DATASET_JSON, Sites(sites, units), epsilon, Schedule(**settings))


def small_run(**schedule):
    settings = {"mode": Mode.adp_fl, "rounds": 2, "start": False, "features": SMALL} | schedule
    return plan_run(coordinator_plans(), "2d", PICTURES, Sites(2, 10), 8.0, Schedule(**settings))


# ---- decisions ---------------------------------------------------------------------------------------------------


def test_the_network_is_the_one_that_nnunet_dp_plan_chooses_for_all_patients_at_one_place():
    """170 patients of which four fifths train, here as four sites with 34 each: 16, 32, 64 features."""
    arguments = planned().plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert arguments["features_per_stage"] == [16, 32, 64] and planned().parameters < 510_000


def test_noise_of_four_sites_is_that_of_half_as_many_patients_at_one_place():
    four, one = planned(sites=4), planned(sites=1)
    assert four.parameters == one.parameters
    mu = four.signal_to_noise / one.signal_to_noise
    assert mu == pytest.approx(0.5, rel=0.05)  # delta follows each site's size, hence not exactly


def test_the_learning_rate_follows_rounds_times_local_steps():
    assert planned(rounds=25).learning_rate == 0.5 == planned(rounds=5, local_steps=5).learning_rate


def test_after_a_public_start_the_learning_rate_follows_the_noise():
    begun = planned(start=True)
    assert begun.recipe is not None and begun.recipe.kinds == ("hippocampus",)
    assert begun.learning_rate == pytest.approx(min(1.0, max(0.01, 40 * begun.signal_to_noise / 20)), rel=0.01)


def test_what_is_given_takes_the_place_of_a_rule():
    run = planned(learning_rate=0.7, bound=3.0, momentum=0.5)
    assert (run.learning_rate, run.bound, run.momentum) == (0.7, 3.0, 0.5)


def test_plain_fedavg_takes_nnunets_own_optimizer():
    run = planned(mode=Mode.fedavg)
    assert (run.learning_rate, run.momentum) == (0.01, 0.99)


def test_a_bound_on_the_l1_norm_grows_with_the_root_of_the_parameters():
    assert planned(noise="laplace").bound == pytest.approx(0.1 * planned().parameters**0.5)


def test_what_is_sent_holds_no_private_section_and_no_folder_of_the_source():
    sent = planned(start=True).plans
    text = json.dumps(sent)
    assert SECTION not in sent and "Dataset004_Tubes" not in text and "nnUNetPlans_3d_fullres" not in text
    assert list(sent["configurations"]) == ["3d_fullres"]


def test_equal_plans_have_equal_names_and_others_do_not():
    name = planned().plans["plans_name"]
    assert name == planned(rounds=7, epsilon=1.0).plans["plans_name"] != planned(features=SMALL).plans["plans_name"]
    assert name.startswith("nnUNetPlansFed_")


def test_a_site_admits_what_is_sent():
    run = small_run()
    admitted = admit(run.plans, "2d", "Dataset412_PhantomLesion", "federated_2d")
    assert admitted["plans_name"] == run.plans["plans_name"]
    assert run.sha256 == json_sha256(json.loads(json.dumps(run.plans)))


def test_an_unknown_configuration_is_refused_with_those_there_are():
    with pytest.raises(UsageRefusal, match="3d_fullres"):
        plan_run(ordinary_plans(), "4d", DATASET_JSON, Sites(2, 10), 8.0, Schedule(Mode.adp_fl, 2))


# ---- public plans ------------------------------------------------------------------------------------------------


def test_the_description_alone_says_what_phantoms_resemble_the_dataset():
    facts = public.described_facts(PICTURES)
    assert (facts.dimensions, facts.channels, facts.calibrated, facts.classes) == (2, 3, False, 1)
    volumes = public.described_facts({**DATASET_JSON, "channel_names": {"0": "CT"}})
    assert (volumes.dimensions, volumes.calibrated) == (3, True)


def test_pictures_are_planned_in_2d_and_volumes_in_3d():
    assert federated.default_configuration(PICTURES) == "2d"
    assert federated.default_configuration(DATASET_JSON) == "3d_fullres"


def test_plans_from_phantoms_are_nnunets_own_and_a_site_admits_them(monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "untouched")
    made = federated.plans_from_phantoms(PICTURES, patients=2, shape=(32, 40))
    assert made.public and made.source == "2 phantom patients of kind lesion"
    assert made.plans["configurations"]["2d"]["patch_size"] == [32, 40]
    assert made.plans["image_reader_writer"] == "NaturalImage2DIO"
    assert admit(made.plans, "2d", "Dataset412_PhantomLesion", "federated_2d")
    import os

    assert os.environ["nnUNet_raw"] == "untouched"


def test_a_dataset_that_no_phantom_resembles_needs_plans_of_another():
    with pytest.raises(UsageRefusal, match="--plans-from"):
        federated.plans_from_phantoms({**PICTURES, "channel_names": {str(k): "x" for k in range(7)}})


def test_plans_that_are_private_already_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "Dataset004_Tubes"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    (folder / "mine.json").write_text(json.dumps(planned().for_start))
    (folder / "nnUNetPlans.json").write_text(json.dumps(ordinary_plans()))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    assert not federated.named_plans("Dataset004_Tubes").public
    with pytest.raises(UsageRefusal, match="private plans"):
        federated.named_plans("Dataset004_Tubes", "mine")
    with pytest.raises(UsageRefusal, match="found: nnUNetPlans"):
        federated.named_plans("Dataset004_Tubes", "other")


# ---- weights and model -------------------------------------------------------------------------------------------


def test_random_weights_follow_the_public_seed():
    cpu = torch.device("cpu")
    weights = [federated.initial_weights(small_run(), Path("none"), cpu, 1, seed)[0] for seed in (1, 1, 2)]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not np.array_equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert {array.dtype for array in weights[0].values()} == {np.dtype(np.float32)}


def test_a_public_start_is_made_once_and_found_again(tmp_path):
    run = small_run(start=True, start_iterations=2, start_images=2)
    said: list[str] = []
    first, provenance = federated.initial_weights(run, tmp_path, torch.device("cpu"), 1, say=said.append)
    again, _ = federated.initial_weights(run, tmp_path, torch.device("cpu"), 1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert "lesion" in provenance["start"] and any("making the public start" in line for line in said)
    random, _ = federated.initial_weights(small_run(), tmp_path, torch.device("cpu"), 1)
    assert any(not np.array_equal(first[name], random[name]) for name in first)


@pytest.mark.parametrize(
    ("mode", "trainer"), [(Mode.adp_fl, "nnUNetTrainerDP_Federated"), (Mode.paper, "nnUNetTrainer")]
)
def test_the_model_is_a_folder_that_nnunets_predictor_loads(tmp_path, monkeypatch, mode, trainer):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(__file__).parent.parent / "trainers"))
    run = small_run()
    weights, _ = federated.initial_weights(run, tmp_path, torch.device("cpu"), 1, seed=3)
    name = federated.model_plans_name(mode, 8.0, "0123456789ab")
    folder = federated.federated_model_folder("Dataset412_PhantomLesion", mode, name, "2d")
    federated.write_model(folder, run.plans, "2d", PICTURES, weights, {"mode": mode.value}, "0a", 2)
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(folder), ("all",))
    assert predictor.trainer_name == trainer and folder.name == f"{trainer}__{name}__2d"
    loaded = dict(predictor.network.named_parameters())
    assert all(np.array_equal(loaded[key].detach().numpy(), weights[key]) for key in weights)


def test_models_without_a_guarantee_say_so_in_their_name():
    assert "NoGuarantee" in federated.model_plans_name(Mode.fedavg, 8.0, "ab")
    assert federated.model_plans_name(Mode.dp_fedavg, 8.0, "ab" * 8) == "nnUNetPlansFed_dp-fedavg_eps8_abababab"


def test_a_model_tells_no_counts_and_no_cases(tmp_path):
    run = small_run()
    weights, _ = federated.initial_weights(run, tmp_path, torch.device("cpu"), 1)
    folder = tmp_path / "Dataset412_X" / "nnUNetTrainerDP_Federated__a__2d"
    federated.write_model(folder, run.plans, "2d", {**PICTURES, "training": ["anna"]}, weights, {})
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 0
    assert not [file for file in folder.rglob("*.json") if "anna" in file.read_text()]


def test_weights_of_another_network_are_not_written(tmp_path):
    run = small_run()
    weights, _ = federated.initial_weights(run, tmp_path, torch.device("cpu"), 1)
    weights.pop(next(iter(weights)))
    with pytest.raises(UsageRefusal, match="other names"):
        federated.write_model(tmp_path / "D" / "T__a__2d", run.plans, "2d", PICTURES, weights, {})
    assert not (tmp_path / "D").exists()


def test_the_door_predicts_and_refuses_to_train(tmp_path):
    from nnunet_dp.trainers.nnUNetTrainerDP import nnUNetTrainerDP_Federated

    with pytest.raises(Refusal, match="nnunet-dp fed"):
        nnUNetTrainerDP_Federated(ordinary_plans(), "2d", "all", DATASET_JSON)


def test_the_final_model_disturbs_neither_ledger_nor_charges_of_the_dataset_it_lies_at(tmp_path, monkeypatch):
    """As ``RunFolder.verify_ledger`` looks at it before every later training on that dataset."""
    from nnunet_dp.ledger import Ledger
    from nnunet_dp.mechanisms import SubsampledGaussian
    from nnunet_dp.run import RunFolder

    run = small_run()
    weights, _ = federated.initial_weights(run, tmp_path, torch.device("cpu"), 1)
    results = tmp_path / "results"
    folder = results / "nnUNetTrainerDP_Federated__a__2d"
    federated.write_model(folder, run.plans, "2d", PICTURES, weights, {})
    ledger = Ledger(tmp_path / "privacy_ledger.jsonl", "site/fold_all/0a", "0a", None, "patient")
    ledger.charge(SubsampledGaussian(10.0, 1.0).charge("training", 0), "0a")
    RunFolder(results / "other" / "fold_0", tmp_path / "privacy_ledger.jsonl", results).verify_ledger()


def test_sites_decide_the_average_sites_delta():
    assert replace(Sites(4, 4000), delta=1e-3).budget(8.0).delta == 1e-3
    assert Sites(4, 400_000).budget(8.0).delta == 1e-6
