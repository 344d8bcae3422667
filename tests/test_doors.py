"""The doors as users use them: nnU-Net's own commands on tiny phantoms, one 3D run and one that is killed.

Each dataset is prepared once and each training runs once; the tests look at what it left. The 3D run finds its trainer
through ``nnUNet_extTrainer``, the 2D run through ``nnunet-dp link``. What takes longer is in ``test_doors_slow.py``.
"""

import hashlib
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from doors import (
    FINAL,
    LATEST,
    LEDGER,
    Model,
    chain_holds,
    hippocampus_with_regions,
    lesion,
    linked,
    private_words,
    read_lines,
    recounted_epsilon,
    segmentations,
    with_variable,
)

ALLOWED_KEYS = {
    "network_weights", "trainer_name", "inference_allowed_mirroring_axes", "init_args",
    "optimizer_state", "grad_scaler_state", "logging", "_best_ema", "current_epoch",
}  # fmt: skip


class Trained(NamedTuple):
    model: Model
    console: str


class Crashed(NamedTuple):
    model: Model
    charges_at_death: int
    processes: int
    survivors: int
    console: str


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """3d_fullres with regions and an ignore label, planned by ``nnunet-dp plan`` and trained to its end.

    Ten patients are few for a vote: it gets a large share, so that its answers can be heard. So few are not worth a
    timing either: engine two is asked for.
    """
    place = with_variable(hippocampus_with_regions(tmp_path_factory.getbasetemp()))
    place = replace(place, variables={**place.variables, "NNUNET_DP_ENGINE": "two:3"})
    place.plan("--epsilon", 8, "--delta", 1e-3, "--compute", "small", "--morphology-share", 0.3)
    model = Model(place, "nnUNetTrainerDP_AutoS", "nnUNetPlansDP_eps8")
    return Trained(model, model.train())


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Crashed:
    """2d on nnU-Net's ordinary plans: killed with -9 at a random moment after the first charges, then ``--c``."""
    model = Model(linked(lesion(tmp_path_factory.getbasetemp())), "nnUNetTrainerDP_Quantile", "nnUNetPlans")
    processes, survivors = model.killed(random.randint(2, 5), random.uniform(0, 0.3))
    return Crashed(model, len(model.place.charges()), processes, survivors, model.train("--c"))


def log_of(model: Model) -> str:
    return "".join(file.read_text() for file in model.fold_folder.glob("training_log_*.txt"))


def is_neutral(value: object) -> bool:
    return value in ({}, None, 0)


# ---- a training that begins from phantoms ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_makes_its_public_start_once_and_records_it(tmp_path):
    place = linked(lesion(tmp_path))
    place.plan("--epsilon", 8, "--compute", "small", "--set", "steps=2", start=True)
    model = Model(place, "nnUNetTrainerDP_AutoS", "nnUNetPlansDP_eps8")
    few = ("--iterations", 3, "--images", 6, "-device", "cpu", "-np", 1)
    place.run("nnunet-dp", "pretrain", "-d", place.number, "-c", place.configuration, "-p", model.plans, *few)
    (made,) = (place.preprocessed / "public_starts").glob("*.pth")
    made.unlink()
    console = model.train()
    assert "making the public start once" in console and "3 iterations" in console and "SET BY HAND" in console
    recorded = json.loads((model.fold_folder / "public_start.json").read_text())
    assert recorded["sha256"] == hashlib.sha256(made.read_bytes()).hexdigest()
    assert recorded["recipe"]["kinds"] == ["lesion"] and model.status()["steps_done"] == 2
    assert "making" not in Model(place, model.trainer, model.plans, "1").train()


# ---- a 3D training from the Decathlon's layout to predictions ----------------------------------------------------


def test_the_trainer_is_found_through_the_environment_variable(hippocampus):
    assert "Using trainer 'nnUNetTrainerDP_AutoS' from:" in hippocampus.console


def test_the_whole_schedule_was_trained(hippocampus):
    status = hippocampus.model.status()
    assert status["finished"] and status["steps_done"] == status["steps_planned"] >= 10
    assert status["steps_wasted"] == 0


def test_the_log_names_the_engine_and_why(hippocampus, crashed):
    assert "engine two with 3 patients in one pass, as NNUNET_DP_ENGINE says" in log_of(hippocampus.model)
    assert "takes over" not in hippocampus.console
    assert re.search(r"engine (one|two).*(random data|too short)", log_of(crashed.model))


def test_a_fresh_prediction_is_the_validation_voxel_for_voxel(hippocampus, tmp_path):
    validated = segmentations(hippocampus.model.fold_folder / "validation")
    predicted = hippocampus.model.predict(hippocampus.model.validation_images(tmp_path / "in"), tmp_path / "out")
    assert validated.keys() == predicted.keys() and len(validated) >= 2
    assert all(np.array_equal(validated[name], predicted[name]) for name in validated)


def test_predictions_hold_the_regions_classes_and_never_the_ignore_label(hippocampus):
    found = [np.unique(image) for image in segmentations(hippocampus.model.fold_folder / "validation").values()]
    assert set(np.concatenate(found)) <= {0, 1, 2}
    summary = json.loads((hippocampus.model.fold_folder / "validation" / "summary.json").read_text())
    assert set(summary["mean"]) == {"(1, 2)", "2"}


def test_every_step_had_a_finite_loss(hippocampus):
    lines = [line for line in hippocampus.console.splitlines() if " (local) " in line]
    assert len(lines) == hippocampus.model.status()["steps_done"]
    assert "nan" not in "".join(lines)


def test_status_agrees_with_an_independent_recount_of_the_ledger(hippocampus):
    status, lines = hippocampus.model.status(), hippocampus.model.place.charges()
    assert status["epsilon_spent"] == pytest.approx(recounted_epsilon(lines, 1e-3), rel=2e-3)
    assert status["epsilon_dataset_total"] == status["epsilon_spent"] <= status["epsilon_target"] == 8
    assert status["entries"] == len(lines) and status["delta"] == 1e-3
    assert status["patients"] == 12 and (status["unit"], status["relation"]) == ("patient", "zero-out")


def test_the_budget_is_used_to_within_a_hundredth(hippocampus):
    assert 0.99 * 8 <= recounted_epsilon(hippocampus.model.place.charges(), 1e-3) <= 8.01


def test_the_ledger_is_a_chain_and_lies_in_both_places(hippocampus):
    lines = hippocampus.model.place.charges()
    assert chain_holds(lines) and lines == hippocampus.model.copied_charges()
    assert [line["first_step"] for line in lines] == [None, *range(len(lines) - 1)]
    assert not chain_holds(lines[1:]) and not chain_holds([{**lines[0], "noise_multiplier": 99.0}])


def test_the_final_checkpoint_holds_weights_and_nothing_of_the_training(hippocampus):
    content = torch.load(hippocampus.model.fold_folder / FINAL, weights_only=True)
    assert set(content) == ALLOWED_KEYS
    assert content["trainer_name"] == "nnUNetTrainerDP_AutoS"
    lines = hippocampus.model.place.charges()
    count = len(lines)
    public = {"configuration": "3d_fullres", "fold": 0, "run": lines[0]["run"], "charges": count, "steps": count - 1}
    assert content["init_args"] == public
    neutral = ("optimizer_state", "grad_scaler_state", "logging", "_best_ema", "current_epoch")
    assert all(is_neutral(content[key]) for key in neutral)


def test_no_byte_of_the_final_checkpoint_names_a_place_or_a_person(hippocampus):
    content = (hippocampus.model.fold_folder / FINAL).read_bytes()
    secrets = [str(hippocampus.model.place.root), *private_words(hippocampus.model.place)]
    assert not [word for word in secrets if word.encode() in content]


def test_the_final_weights_are_the_average_and_not_the_last_ones(hippocampus):
    final = torch.load(hippocampus.model.fold_folder / FINAL, weights_only=True)["network_weights"]
    latest = torch.load(hippocampus.model.fold_folder / LATEST, weights_only=True)["private"]
    shape = latest["average"][0].shape
    first = next(tensor for tensor in final.values() if tensor.shape == shape)
    assert torch.equal(first, latest["average"][0]) and not torch.equal(first, latest["weights"][0])


def test_the_model_folder_holds_no_best_checkpoint_no_debug_and_no_fingerprint(hippocampus):
    names = {file.name for file in hippocampus.model.folder.rglob("*")}
    assert not names & {"checkpoint_best.pth", "debug.json"}
    assert json.loads((hippocampus.model.folder / "dataset_fingerprint.json").read_text()) == {}


def test_console_and_log_name_no_case_and_no_patient(hippocampus):
    said = hippocampus.console + log_of(hippocampus.model)
    assert "Mean Validation Dice" in said  # this is where nnU-Net would print the names
    assert not [word for word in private_words(hippocampus.model.place) if word in said]


def test_the_banner_says_what_is_promised_to_whom_and_what_is_not(hippocampus):
    for words in ("epsilon 8 at delta 0.001 per patient", "zero-out", "NOT covered", "LOCAL ONLY", "batch_dice off"):
        assert words in hippocampus.console, words


def test_the_same_plan_again_changes_nothing_and_another_needs_overwrite(hippocampus):
    place = hippocampus.model.place
    plans = place.preprocessed / "nnUNetPlansDP_eps8.json"
    before = plans.read_bytes()
    place.plan("--epsilon", 8, "--delta", 1e-3, "--compute", "small", "--morphology-share", 0.3)
    assert "--overwrite" in place.plan("--epsilon", 8, "--delta", 1e-4, "--compute", "small", exit_code=2)
    assert plans.read_bytes() == before


# ---- what the training learnt for refinement ---------------------------------------------------------------------


def test_the_masks_were_asked_once_before_the_first_step_and_paid_for(hippocampus):
    first, *steps = hippocampus.model.place.charges()
    assert (first["purpose"], first["sampling_probability"], first["count"]) == ("morphology", 1.0, 1)
    assert {line["purpose"] for line in steps} == {"training"}
    assert "refinement rules learnt in the run (morphology.json)" in hippocampus.model.status()["covers"]


def test_the_rules_lie_in_the_model_folder_and_name_what_paid_for_them(hippocampus):
    rules = json.loads((hippocampus.model.folder / "morphology.json").read_text())
    first = hippocampus.model.place.charges()[0]
    assert rules["kind"] == "private" and rules["regions"] and rules["ignore_label"] == 3
    assert rules["provenance"]["ledger_run"] == first["run"] and rules["provenance"]["ledger_sequence"] == 1
    deviation = rules["provenance"]["l2_bound"] * first["noise_multiplier"]
    assert rules["provenance"]["noise_standard_deviation"] == pytest.approx(deviation)
    assert "Refinement learnt: " in hippocampus.console and "Refinement learnt: " in log_of(hippocampus.model)


def test_predict_is_prediction_and_then_refinement(hippocampus, tmp_path):
    place, model = hippocampus.model.place, hippocampus.model
    chosen = ("-d", place.number, "-c", place.configuration, "-f", 0, "-tr", model.trainer, "-p", model.plans)
    images = model.validation_images(tmp_path / "in")
    where = ("-i", images, "-device", "cpu", "-npp", 1, "-nps", 1)
    said = place.run("nnunet-dp", "predict", *chosen, *where, "-o", tmp_path / "ours")
    assert "Refined" in said
    rules, plain = model.folder / "morphology.json", model.fold_folder / "validation"
    description = model.folder / "dataset.json"
    apply = ("morph", "apply", "-i", plain, "-m", rules, "--dataset-json", description, "-np", 1)
    place.run("nnunet-dp", *apply, "-o", tmp_path / "applied")
    ours, applied = segmentations(tmp_path / "ours"), segmentations(tmp_path / "applied")
    assert ours.keys() == applied.keys() and all(np.array_equal(ours[name], applied[name]) for name in ours)


def test_plain_nnunet_refines_with_the_pickle(hippocampus, tmp_path):
    model, plain = hippocampus.model, hippocampus.model.fold_folder / "validation"
    files = ("-plans_json", model.folder / "plans.json", "-dataset_json", model.folder / "dataset.json")
    pickle = model.folder / "postprocessing.pkl"
    apply = ("-i", plain, "-o", tmp_path / "nnunet", "-pp_pkl_file", pickle, *files, "-np", 1)
    model.place.run("nnUNetv2_apply_postprocessing", *apply)
    rules = ("-m", model.folder / "morphology.json", "--dataset-json", model.folder / "dataset.json", "-np", 1)
    model.place.run("nnunet-dp", "morph", "apply", "-i", plain, "-o", tmp_path / "ours", *rules)
    theirs, ours = segmentations(tmp_path / "nnunet"), segmentations(tmp_path / "ours")
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[name], ours[name]) for name in ours)


def test_learning_again_says_so_and_charges_nothing(hippocampus):
    model, before = hippocampus.model, hippocampus.model.place.charges()
    chosen = ("-d", model.place.number, "-c", model.place.configuration, "-tr", model.trainer, "-p", model.plans)
    said = model.place.run("nnunet-dp", "morph", "learn", *chosen, "-f", 0)
    assert "learnt before" in said and model.place.charges() == before


# ---- a 2D training on ordinary plans, killed and continued -------------------------------------------------------


def test_the_trainer_is_found_through_the_link_alone(crashed):
    shims = list(crashed.model.place.nnunet.rglob("nnunet_dp_link.py"))
    assert len(shims) == 1 and "nnUNet_extTrainer" not in crashed.model.place.environment()


def test_ordinary_plans_configure_themselves_to_the_default_budget(crashed):
    status = crashed.model.status()
    assert (status["epsilon_target"], status["delta"], status["unit"]) == (8, 1e-5, "patient")
    assert "epsilon 8 at delta 1e-05 per patient" in crashed.console
    assert "nnunet-dp plan -d" in crashed.console


def test_the_ordinary_plans_file_stays_ordinary(crashed):
    preprocessed = json.loads((crashed.model.place.preprocessed / "nnUNetPlans.json").read_text())
    kept = json.loads((crashed.model.folder / "plans.json").read_text())
    assert "differential_privacy" not in preprocessed and "differential_privacy" in kept


def test_the_killed_training_left_no_process_behind(crashed):
    assert crashed.processes > 1 and crashed.survivors == 0


def test_what_was_charged_before_the_kill_stays_charged(crashed):
    lines = crashed.model.place.charges()
    assert 2 <= crashed.charges_at_death <= len(lines) and chain_holds(lines)
    assert len({line["run"] for line in lines}) == 1  # one run, continued


def test_the_continued_run_ends_and_never_exceeds_its_budget(crashed):
    status, lines = crashed.model.status(), crashed.model.place.charges()
    assert status["finished"] and len(lines) <= status["steps_planned"]
    assert recounted_epsilon(lines, 1e-5) <= 8.01
    assert status["epsilon_spent"] == pytest.approx(recounted_epsilon(lines, 1e-5), rel=2e-3)


def test_the_ledger_holds_at_least_as_many_lines_as_steps_were_taken(crashed):
    latest = torch.load(crashed.model.fold_folder / LATEST, weights_only=True)["private"]
    assert len(crashed.model.place.charges()) >= latest["step"]


def test_at_most_a_tenth_of_the_steps_is_lost(crashed):
    status = crashed.model.status()
    latest = torch.load(crashed.model.fold_folder / LATEST, weights_only=True)["private"]
    assert status["steps_wasted"] <= math.ceil(status["steps_planned"] / 10)
    assert latest["step"] >= 0.9 * status["steps_planned"]


def test_the_quantile_threshold_moved_and_survived_the_crash(crashed):
    bound = torch.load(crashed.model.fold_folder / LATEST, weights_only=True)["private"]["bound"]
    assert bound > 0 and bound != 0.1


def test_the_model_that_comes_out_predicts(crashed, tmp_path):
    images = crashed.model.validation_images(tmp_path / "in")
    predicted = crashed.model.predict(images, tmp_path / "out")
    wanted = {file.name.replace("_0000.png", ".png") for file in images.iterdir()}
    assert predicted.keys() == wanted and wanted
    assert all(image.shape == (32, 32) and set(np.unique(image)) <= {0, 1} for image in predicted.values())


def test_the_split_that_was_made_tears_no_patient_apart(crashed):
    rows = (crashed.model.place.raw / "patients.csv").read_text().split()[1:]
    patient = dict(row.split(",") for row in rows)
    for fold in json.loads((crashed.model.place.preprocessed / "splits_final.json").read_text()):
        sides = [{patient[case] for case in fold[side]} for side in ("train", "val")]
        assert not sides[0] & sides[1] and sides[0] and sides[1]


def test_continuing_a_finished_training_charges_nothing(crashed):
    before = (crashed.model.place.preprocessed / LEDGER).read_bytes()
    assert "nothing is left to continue" in crashed.model.train("--c")
    assert (crashed.model.place.preprocessed / LEDGER).read_bytes() == before


# ---- the auditor himself -----------------------------------------------------------------------------------------


def test_the_recount_knows_one_gaussian_release(tmp_path: Path):
    line = {"mechanism": "gaussian", "epsilon": None, "noise_multiplier": 4.0, "sampling_probability": 1.0, "count": 1}
    assert recounted_epsilon([line], 1e-5) == pytest.approx(0.9263, rel=5e-3)  # Balle & Wang 2018, theorem 8
    (tmp_path / LEDGER).write_text(json.dumps(line) + '\n{"torn')
    assert read_lines(tmp_path / LEDGER) == [line]
