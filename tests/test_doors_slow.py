"""The doors at length: every trainer, every kind of dataset, every refusal and many crashes, by the real commands.

Run before an issue is closed: ``pytest -m slow tests/test_doors_slow.py``. Trainings are cut to two steps by editing
the plan, which costs less than its budget and is therefore allowed.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from doors import (
    FINAL,
    LATEST,
    LEDGER,
    Model,
    Workplace,
    chain_holds,
    edit_json,
    hippocampus_with_regions,
    lesion,
    linked,
    over_gloo,
    private_words,
    read_lines,
    recounted_epsilon,
    segmentations,
    spawned,
    unlinked_nnunet,
    wait_until,
)

from nnunet_dp import TRAINING_NAMES

pytestmark = pytest.mark.slow

PRIVATE = "nnUNetPlansDP_eps8"
CHECKOUT = Path(__file__).resolve().parent.parent


# ---- places ------------------------------------------------------------------------------------------------------


def set_schedule(place: Workplace, steps: int, noise_factor: float = 1.0, plans: str = PRIVATE) -> None:
    """Other steps than planned; more of them need more noise, or the plan's own check refuses."""

    def edit(content: dict[str, Any]) -> None:
        plan = content["differential_privacy"]["configurations"][place.configuration]
        plan["steps"], plan["noise_multiplier"] = steps, noise_factor * plan["noise_multiplier"]

    place.edit_plans(plans, edit)


@pytest.fixture(scope="module")
def planned_lesion(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """2D with private plans, never trained."""
    place = linked(lesion(tmp_path_factory.getbasetemp())).copied_to(tmp_path_factory.mktemp("planned"))
    shutil.rmtree(place.results, ignore_errors=True)
    (place.preprocessed / LEDGER).unlink(missing_ok=True)
    place.plan("--epsilon", 8, "--compute", "small")
    return place


@pytest.fixture
def place(planned_lesion: Workplace, tmp_path: Path) -> Workplace:
    """A copy to spoil, with a schedule of two steps."""
    copy = planned_lesion.copied_to(tmp_path)
    set_schedule(copy, 2)
    return copy


@pytest.fixture
def volumes(planned_lesion: Workplace, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Workplace:
    """3D with regions, a copy to spoil without private plans; with the nnunetv2 that is linked already."""
    place = hippocampus_with_regions(tmp_path_factory.getbasetemp()).copied_to(tmp_path)
    place = replace(place, nnunet=planned_lesion.nnunet)
    shutil.rmtree(place.results, ignore_errors=True)
    (place.preprocessed / LEDGER).unlink(missing_ok=True)
    (place.preprocessed / f"{PRIVATE}.json").unlink(missing_ok=True)
    return place


@pytest.fixture(scope="module")
def killed_lesion(planned_lesion: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A training killed after six charges; ``older.pth`` is a checkpoint it wrote on the way."""
    place = planned_lesion.copied_to(tmp_path_factory.mktemp("killed"))
    set_schedule(place, 20, noise_factor=2)
    model = auto_s(place)
    with model.training() as process:
        wait_until(lambda: len(place.charges()) >= 2, process)
        shutil.copy(model.fold_folder / LATEST, place.results / "older.pth")
        wait_until(lambda: len(place.charges()) >= 6, process)
        process.kill()
    return place


@pytest.fixture
def crashed(killed_lesion: Workplace, tmp_path: Path) -> Model:
    """A copy of the killed training, to be spoilt."""
    return auto_s(killed_lesion.copied_to(tmp_path))


def auto_s(place: Workplace, plans: str = PRIVATE, fold: str = "0") -> Model:
    return Model(place, "nnUNetTrainerDP_AutoS", plans, fold)


def assert_trained(model: Model, steps: int = 2) -> None:
    """A finished model whose ledger, status and recount agree."""
    status, lines = model.status(), model.copied_charges()
    assert status["finished"] and status["steps_done"] == steps == len(lines)
    recounted = recounted_epsilon(lines, status["delta"])
    assert status["epsilon_spent"] == pytest.approx(recounted, rel=2e-3) and recounted <= 8.01


def assert_refused(model: Model, words: str, *options: object, exit_code: int = 1, **variables: str) -> None:
    """One line, the exit code, nothing charged, nobody named."""
    before = model.place.charges()
    said = model.train(*options, exit_code=exit_code, **variables)
    (refusal,) = [line for line in said.splitlines() if line.startswith("nnunet_dp refuses: ")]
    assert words in refusal, refusal
    assert "Traceback" not in said and model.place.charges() == before
    assert not [word for word in private_words(model.place) if word in said]


# ---- every trainer, every kind of dataset ------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", TRAINING_NAMES)
def test_every_trainer_trains(trainer, place):
    model = Model(place, trainer, PRIVATE)
    console = model.train()
    assert_trained(model)
    assert not [word for word in private_words(place) if word in console]


def test_a_trainer_trains_on_all_cases_and_predicts(place, tmp_path):
    model = auto_s(place, fold="all")
    model.train()
    assert_trained(model)
    assert model.predict(place.raw / "imagesTr", tmp_path / "out").keys()


def test_residual_encoder_plans_train(volumes):
    volumes.run("nnUNetv2_plan_experiment", "-d", volumes.number, "-pl", "nnUNetPlannerResEncM")
    volumes.plan("--epsilon", 8, "-p", "nnUNetResEncUNetMPlans", "--compute", "small")
    plans = "nnUNetResEncUNetMPlansDP_eps8"
    set_schedule(volumes, 2, plans=plans)
    model = auto_s(volumes, plans)
    model.train()
    assert_trained(model)
    kept = json.loads((model.folder / "plans.json").read_text())["configurations"]["3d_fullres"]["architecture"]
    assert kept["network_class_name"].endswith("ResidualEncoderUNet")


def add_low_resolution(plans: dict[str, Any]) -> None:
    fullres = plans["configurations"]["3d_fullres"]
    coarse = [1.25 * spacing for spacing in fullres["spacing"]]
    lowres = {**fullres, "data_identifier": "nnUNetPlans_3d_lowres", "spacing": coarse}
    plans["configurations"]["3d_lowres"] = lowres | {"next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}


def test_3d_lowres_trains(volumes):
    volumes.edit_plans("nnUNetPlans", add_low_resolution)
    volumes.run("nnUNetv2_preprocess", "-d", volumes.number, "-c", "3d_lowres", "-np", 1)
    lowres = replace(volumes, configuration="3d_lowres")
    lowres.plan("--epsilon", 8, "--compute", "small")
    set_schedule(lowres, 2)
    auto_s(lowres).train()
    assert_trained(auto_s(lowres))


def test_several_channels_train_in_3d(volumes):
    for image in (volumes.raw / "imagesTr").glob("*_0000.nii.gz"):
        negative = sitk.ReadImage(str(image)) * -1
        sitk.WriteImage(negative, str(image).replace("_0000", "_0001"))
    edit_json(volumes.raw / "dataset.json", lambda dataset: dataset["channel_names"].update({"1": "CT"}))
    shutil.rmtree(volumes.preprocessed)
    volumes.preprocess()
    volumes.plan("--epsilon", 8, "--compute", "small")
    set_schedule(volumes, 2)
    auto_s(volumes).train()
    assert_trained(auto_s(volumes))


def test_two_configurations_share_one_plans_file_and_one_ledger(volumes):
    volumes.preprocess("-c", "2d", "3d_fullres")
    flat = replace(volumes, configuration="2d")
    for place in (volumes, flat):
        place.plan("--epsilon", 8, "--compute", "small")
        set_schedule(place, 2)
        auto_s(place).train()
    assert len(volumes.charges()) == 4 and chain_holds(volumes.charges())
    assert auto_s(flat).status()["epsilon_dataset_total"] > auto_s(flat).status()["epsilon_spent"]


def test_declared_public_weights_are_loaded_and_others_refused(place):
    first = auto_s(place)
    first.train()
    weights = first.fold_folder / FINAL
    place.plan("--epsilon", 8, "--compute", "small", "-o", "FromPublic", "--public-weights", weights)
    set_schedule(place, 2, plans="FromPublic")
    assert_refused(auto_s(place, "FromPublic"), "declare public", "-pretrained_weights", place.raw / "dataset.json")
    auto_s(place, "FromPublic").train("-pretrained_weights", weights)
    assert_trained(auto_s(place, "FromPublic"))


# ---- refusals, each before the first charge ----------------------------------------------------------------------


def set_batch_norm(place: Workplace) -> None:
    def edit(plans: dict[str, Any]) -> None:
        arguments = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
        arguments["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm2d"

    place.edit_plans(PRIVATE, edit)


def rename_a_patient(place: Workplace) -> None:
    file = place.preprocessed / "patients.csv"
    file.write_text(file.read_text().replace("P0001", "P9999"))


def tear_a_patient(place: Workplace) -> None:
    """Two cases of one patient on both sides of every fold."""
    rows = [row.split(",") for row in (place.raw / "patients.csv").read_text().split()[1:]]
    patients = [patient for _, patient in rows]
    torn = next(patient for patient in patients if patients.count(patient) == 2)
    validation = [case for case, patient in rows if patient == torn][:1]
    fold = {"train": [case for case, _ in rows if case not in validation], "val": validation}
    (place.preprocessed / "splits_final.json").write_text(json.dumps([fold] * 5))


def do_nothing(place: Workplace) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "options", "variables", "exit_code", "words"),
    [
        pytest.param(set_batch_norm, (), {}, 1, "BatchNorm", id="a network that couples patients"),
        pytest.param(do_nothing, ("--val_best",), {}, 1, "--val_best", id="--val_best"),
        pytest.param(do_nothing, ("--disable_checkpointing",), {}, 1, "--disable_checkpointing", id="no checkpoints"),
        pytest.param(do_nothing, (), {"nnUNet_wandb_enabled": "1"}, 1, "nnUNet_wandb_enabled", id="uploads"),
        pytest.param(rename_a_patient, (), {}, 2, "SHA-256", id="changed patients"),
        pytest.param(
            lambda place: (place.preprocessed / "patients.csv").unlink(), (), {}, 2, "no such file", id="no patients"
        ),
        pytest.param(tear_a_patient, (), {}, 2, "both sides", id="a torn patient"),
    ],
)
def test_refused_before_the_first_charge(
    spoil: Callable[[Workplace], None], options: tuple[str, ...], variables: dict[str, str], exit_code: int, words: str,
    place: Workplace,
):  # fmt: skip
    spoil(place)
    assert_refused(auto_s(place), words, *options, exit_code=exit_code, **variables)


def test_the_flags_are_seen_when_nnunet_is_run_as_a_module(place):
    chosen = (place.number, "2d", 0, "-tr", "nnUNetTrainerDP", "-p", PRIVATE, "-device", "cpu", "--val_best")
    said = place.run(sys.executable, "-m", "nnunetv2.run.run_training", *chosen, exit_code=1)
    assert "nnunet_dp refuses: --val_best" in said and not place.charges()


def test_undeclared_pretrained_weights_are_refused(place):
    weights = place.root / "weights.pth"
    torch.save({"network_weights": {}}, weights)
    assert_refused(auto_s(place), "does not declare public", "-pretrained_weights", weights)


def test_a_fold_beyond_the_splits_is_refused(place):
    assert_refused(auto_s(place, fold="7"), "fold 7", exit_code=2)


def test_the_second_stage_of_the_cascade_is_refused(volumes):
    volumes.edit_plans("nnUNetPlans", add_low_resolution)
    cascade = replace(volumes, configuration="3d_cascade_fullres")
    assert "cascade" in cascade.plan("--epsilon", 8, exit_code=1)
    assert_refused(auto_s(cascade, "nnUNetPlans"), "cascade")


def test_two_gpus_on_the_cpu_are_refused_by_nnunet_itself(place):
    said = auto_s(place).train("-num_gpus", 2, exit_code=1)
    assert "only implemented for cuda" in said and not place.charges()


def test_a_schedule_that_costs_more_than_its_budget_is_refused(place):
    set_schedule(place, 40)
    assert_refused(auto_s(place), "would spend epsilon", exit_code=3)


def test_a_trainer_with_a_loss_of_its_own_is_refused(place):
    folder = place.root / "theirs"
    folder.mkdir()
    (folder / "mine.py").write_text(
        "from nnunet_dp.trainers.nnUNetTrainerDP import nnUNetTrainerDP_AutoS\n\n\n"
        "class nnUNetTrainerMine(nnUNetTrainerDP_AutoS):\n"
        "    def _build_loss(self):\n        return super()._build_loss()\n"
    )
    place = replace(place, variables={"nnUNet_extTrainer": str(folder)})
    assert_refused(Model(place, "nnUNetTrainerMine", PRIVATE), "_build_loss")


def test_two_trainings_of_one_fold_at_once_are_refused(place):
    set_schedule(place, 400, noise_factor=20)
    model = auto_s(place)
    with model.training() as process:
        wait_until(lambda: len(place.charges()) >= 2, process)
        said = model.train(exit_code=1)
        assert "another training is writing" in said and process.poll() is None
        wait_until(lambda: len(place.charges()) >= 4, process)
    assert len({line["run"] for line in place.charges()}) == 1
    assert not (model.folder / "archive").exists()


def test_two_folds_at_once_share_the_ledger(place):
    other = auto_s(place, fold="1")
    set_schedule(place, 6)
    with other.training() as process:
        auto_s(place).train()
        assert process.wait(timeout=300) == 0
    assert len(place.charges()) == 12 and chain_holds(place.charges())


# ---- continuing --------------------------------------------------------------------------------------------------


def cut_ledgers(*files: Path) -> None:
    for file in files:
        file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:2]))


def test_the_killed_training_continues_where_it_was(crashed):
    before = crashed.place.charges()
    crashed.train("--c")
    after = crashed.place.charges()
    assert after[: len(before)] == before and chain_holds(after)
    assert len({line["run"] for line in after}) == 1 and len(after) <= 20
    assert crashed.status()["steps_wasted"] <= 1


def test_a_missing_checkpoint_is_refused(crashed):
    (crashed.fold_folder / LATEST).unlink()
    assert_refused(crashed, f"{LATEST} is missing", "--c")


def test_a_checkpoint_with_code_is_refused_and_the_code_not_run(crashed):
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(crashed.place.root / "exploded"),)

    torch.save({"private": Bomb()}, crashed.fold_folder / LATEST)
    assert_refused(crashed, "put an intact copy back", "--c")
    assert not (crashed.place.root / "exploded").exists()


def test_a_ledger_shorter_than_its_copy_is_refused(crashed):
    cut_ledgers(crashed.place.preprocessed / LEDGER)
    assert_refused(crashed, "missing from the dataset's", "--c")
    assert_refused(crashed, "missing from the dataset's")


def test_a_ledger_and_copy_shorter_than_the_checkpoint_are_refused(crashed):
    cut_ledgers(crashed.place.preprocessed / LEDGER, crashed.fold_folder / LEDGER)
    assert_refused(crashed, "shorter than a checkpoint", "--c")


def test_no_ledger_beside_a_checkpoint_is_refused(crashed):
    (crashed.place.preprocessed / LEDGER).unlink()
    (crashed.fold_folder / LEDGER).unlink()
    assert_refused(crashed, "shorter than a checkpoint", "--c")


def test_an_older_checkpoint_put_back_is_refused(crashed):
    shutil.copy(crashed.place.results / "older.pth", crashed.fold_folder / LATEST)
    assert_refused(crashed, "two continuations", "--c")


def test_a_changed_plan_is_refused(crashed):
    set_schedule(crashed.place, 20, noise_factor=1.5)
    assert_refused(crashed, "plan", "--c")


def test_a_changed_clip_rule_is_refused(crashed):
    other = replace(crashed, trainer="nnUNetTrainerDP_AutoV")
    crashed.folder.rename(other.folder)
    assert_refused(other, "clip rule", "--c")


def test_a_changed_split_is_refused(crashed):
    edit_json(crashed.place.preprocessed / "splits_final.json", lambda splits: splits.reverse())
    assert_refused(crashed, "changed since the checkpoint", "--c")


def test_changed_data_are_refused(crashed):
    for file in (crashed.place.preprocessed / "nnUNetPlans_2d").glob("*.pkl"):
        file.write_bytes(file.read_bytes() + b" ")
    assert_refused(crashed, "the dataset, its split or its patients changed", "--c")


def test_a_new_run_archives_the_old_model_and_keeps_its_charges(crashed):
    before = crashed.place.charges()
    crashed.train()
    after, status = crashed.place.charges(), crashed.status()
    (archived,) = (crashed.folder / "archive").iterdir()
    assert after[: len(before)] == before == read_lines(archived / LEDGER)
    assert (archived / LATEST).is_file() and status["steps_done"] == status["entries"] == 20
    total = recounted_epsilon(after, status["delta"])
    assert status["epsilon_dataset_total"] == pytest.approx(total, rel=2e-3)
    assert status["epsilon_dataset_total"] > status["epsilon_spent"]


def test_many_kills_at_random_moments_never_exceed_the_budget_and_leave_a_usable_model(place, tmp_path):
    set_schedule(place, 20, noise_factor=2)
    model, kills = auto_s(place), 4
    model.killed(random.randint(1, 5), random.uniform(0, 0.4))
    for _ in range(kills - 1):
        model.killed(random.randint(1, 3), random.uniform(0, 0.4), "--c")
    model.train("--c")
    status, lines = model.status(), place.charges()
    assert chain_holds(lines) and len(lines) == 20 and status["finished"]
    assert status["steps_wasted"] <= kills and status["steps_done"] >= 20 - kills
    assert recounted_epsilon(lines, status["delta"]) <= 8
    assert len(model.predict(model.validation_images(tmp_path / "in"), tmp_path / "out")) >= 1


def test_a_kill_after_the_last_step_leaves_only_the_validation_to_do(place):
    model = auto_s(place)
    with model.training() as process:
        wait_until((model.fold_folder / FINAL).is_file, process)
        process.kill()
    before = (place.preprocessed / LEDGER).read_bytes()
    assert "Mean Validation Dice" in model.train("--c")
    assert (place.preprocessed / LEDGER).read_bytes() == before
    assert np.isfinite(model.status()["epsilon_spent"])


def test_validation_alone_charges_nothing(place):
    model = auto_s(place)
    model.train()
    shutil.rmtree(model.fold_folder / "validation")
    assert "Mean Validation Dice" in model.train("--val")
    assert len(place.charges()) == 2


# ---- several processes: nnU-Net's own command, with gloo in place of NCCL ----------------------------------------


TWO = ("-device", "cuda", "-num_gpus", 2)  # nnU-Net's command wants cuda; over gloo the trainer takes the processor


def test_two_processes_train_one_model_with_one_ledger(place, tmp_path):
    model = auto_s(over_gloo(place, tmp_path / "gloo"))
    console = model.train(*TWO)
    assert_trained(model)
    assert "2 processes share each step" in console and "Mean Validation Dice" in console
    assert console.count("guarantee         epsilon 8") == console.count("Training done") == 1
    assert [line["first_step"] for line in place.charges()] == [0, 1]
    assert not [word for word in private_words(place) if word in console]
    validated = segmentations(model.fold_folder / "validation")  # by both processes, half each
    predicted = auto_s(place).predict(model.validation_images(tmp_path / "in"), tmp_path / "out")
    assert validated.keys() == predicted.keys() and len(validated) >= 2
    assert all(np.array_equal(validated[name], predicted[name]) for name in validated)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_command_and_one_device_goes_on(killed_lesion, tmp_path, rank):
    crashed = auto_s(killed_lesion.copied_to(tmp_path / "copy"))
    model = replace(crashed, place=over_gloo(crashed.place, tmp_path / "gloo"))
    before = len(model.place.charges())
    with model.training("--c", *TWO) as process:
        wait_until(lambda: len(model.place.charges()) >= before + 2, process)
        os.kill(spawned(process)[rank], 9)
        assert process.wait(timeout=60) != 0
    left = len(model.place.charges())
    assert chain_holds(model.place.charges()) and before + 2 <= left < 20
    crashed.train("--c")
    status = model.status()
    assert status["finished"] and len(model.place.charges()) == 20 and status["epsilon_spent"] <= 8


def test_the_kill_of_the_command_leaves_no_process_behind(killed_lesion, tmp_path):
    model = auto_s(over_gloo(killed_lesion.copied_to(tmp_path / "copy"), tmp_path / "gloo"))
    processes, survivors = model.killed(2, 0.0, "--c", *TWO)
    assert processes >= 3 and survivors == 0


def test_what_is_refused_is_refused_by_the_first_process_alone(place, tmp_path):
    model = auto_s(over_gloo(place, tmp_path / "gloo"))
    said = model.train(*TWO, "--disable_checkpointing", exit_code=1)
    assert said.count("nnunet_dp refuses: --disable_checkpointing") == 1 and not place.charges()


# ---- the wheel ---------------------------------------------------------------------------------------------------


def fresh_environment(folder: Path) -> Path:
    """A new virtual environment with our wheel in it, and everything else lent from this one; its bin folder."""
    source = folder / "source"
    for name in ("nnunet_dp", "trainers", "postprocessing"):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(CHECKOUT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    wheels = [*pip, "wheel", *offline, "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(wheels, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "fresh")], check=True)
    python = folder / "fresh" / "bin" / "python"
    wheel = str(next(folder.glob("*.whl")))
    subprocess.run([*pip, "--python", str(python), "install", *offline, wheel], check=True)
    site = next((folder / "fresh" / "lib").glob("python*/site-packages"))
    (site / "lent.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    return python.parent


def test_a_wheel_in_a_fresh_environment_links_plans_trains_and_predicts(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    programs = fresh_environment(folder)
    place = replace(place, nnunet=unlinked_nnunet(folder / "site"))
    where = place.run(str(programs / "python"), "-c", "import nnunet_dp.trainers as t; print(t.__file__)")
    assert where.startswith(str(folder / "fresh"))
    place.run(str(programs / "nnunet-dp"), "link")
    train = "from nnunetv2.run.run_training import run_training_entry as train; train()"
    chosen = ("-tr", "nnUNetTrainerDP_AutoS", "-p", PRIVATE, "-device", "cpu")
    place.run(str(programs / "python"), "-c", train, place.number, "2d", 0, *chosen)
    assert_trained(auto_s(place))
