"""The public start inside nnU-Net: drawn by public facts, learnt once, shared, recorded, refused when touched."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ordinary_plans import DATASET_JSON, ordinary_plans, preprocessed_dataset

from nnunet_dp import nnunet_start, planning
from nnunet_dp.charges import Charge
from nnunet_dp.cli import main
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.ledger import Ledger, read_ledger
from nnunet_dp.nnunet import find_patients
from nnunet_dp.nnunet_planning import plan_dataset
from nnunet_dp.nnunet_public_plans import public_facts
from nnunet_dp.nnunet_start import adopt, draw, ensure_start, planned_loss, planned_network, pretrain
from nnunet_dp.phantoms.matching import PublicFacts
from nnunet_dp.public_start import FOLDER, PROVENANCE
from nnunet_dp.run import FINAL, LATEST, LEDGER, read_checkpoint, write_checkpoint
from nnunet_dp.sections import ByHand, PublicStart
from nnunet_dp.trainers import nnUNetTrainerDP as trainers

CPU = torch.device("cpu")
PLANS = "nnUNetPlansDP_eps8"
RESAMPLING = {
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
}


def recipe(*kinds: str, images: int = 2) -> PublicStart:
    return PublicStart(kinds=kinds, images=images, iterations=2, batch=2, learning_rate=1e-3)


def small_plans(patch: tuple[int, ...] = (16, 24, 16)) -> dict:
    plans = ordinary_plans()
    plans["configurations"]["3d_fullres"] |= {"patch_size": list(patch), **RESAMPLING}
    plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": 12345.0}}
    return plans


@pytest.fixture(autouse=True)
def readable(monkeypatch):
    """The cases here are names alone; that each can be read is tested in test_nnunet_cases."""
    monkeypatch.setattr("nnunet_dp.nnunet_cases.CaseReader.fault", lambda self, case: "")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A dataset planned for epsilon 8 with a tiny network and a public start of two phantoms."""
    monkeypatch.setattr(planning, "START_IMAGES", 2)
    (tmp_path / "raw").mkdir()
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    made = preprocessed_dataset(tmp_path)
    (made / "nnUNetPlans.json").write_text(json.dumps(small_plans()))
    plan_dataset("4", "3d_fullres", 8.0, by_hand=ByHand(features_per_stage=(4, 4, 4)))
    return made


def start(folder: Path, **options):
    return pretrain("4", "3d_fullres", PLANS, CPU, 1, iterations=2, **options)


# ---- which phantoms ----------------------------------------------------------------------------------------------


def test_public_facts_come_from_plans_and_dataset_json_alone():
    assert public_facts(ordinary_plans(), DATASET_JSON) == PublicFacts(3, 1, False, 2, False)
    ct = ordinary_plans()
    ct["configurations"]["2d"]["normalization_schemes"] = ["CTNormalization"]
    flat = {**ct, "original_median_shape_after_transp": [1, 128, 128]}
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "ignore": 4}
    regions = {"labels": labels, "channel_names": {"0": "CT"}, "regions_class_order": [1, 2]}
    assert public_facts(flat, regions) == PublicFacts(2, 1, True, 3, True)


def test_a_plan_starts_from_the_phantoms_that_resemble_the_dataset(folder):
    planned = json.loads((folder / f"{PLANS}.json").read_text())["differential_privacy"]["configurations"]
    assert planned["3d_fullres"]["start"]["kinds"] == ["hippocampus"]


def test_phantoms_are_oriented_normalised_and_labelled_as_nnunet_loads_them():
    plans = small_plans((40, 56, 40))
    drawn = draw(plans, "3d_fullres", DATASET_JSON, recipe("hippocampus", images=1)).images[0]
    assert drawn.image.shape[1:] == drawn.labels.shape and set(np.unique(drawn.labels)) == {0, 1, 2}
    assert abs(drawn.image.mean()) < 0.05 and abs(drawn.image.std() - 1) < 0.05
    front, back = (np.argwhere(drawn.labels == label)[:, 1].mean() for label in (1, 2))
    assert front > back  # y runs forward, and is the middle axis of [z, y, x]


def test_shapes_fill_the_patch_of_any_configuration():
    drawn = draw(ordinary_plans(), "2d", DATASET_JSON, recipe("shapes")).images  # slices of a volume
    assert [image.labels.ndim for image in drawn] == [3, 3] or [image.labels.ndim for image in drawn] == [2, 2]


def test_drawing_in_this_process_leaves_its_threads_as_they_are():
    before = torch.get_num_threads()
    draw(ordinary_plans(), "2d", DATASET_JSON, recipe("shapes"), processes=1)
    assert torch.get_num_threads() == before


# ---- memory ------------------------------------------------------------------------------------------------------


def test_no_more_phantoms_are_drawn_than_fit_but_some_in_any_case(monkeypatch):
    monkeypatch.setattr(nnunet_start, "FEWEST_IMAGES", 2)
    arguments = (ordinary_plans(), "2d", DATASET_JSON, recipe("shapes", images=6))
    whole = draw(*arguments).images
    each = whole[0].image.nbytes + whole[0].labels.nbytes
    for most, number in ((0, 2), (3.5 * each, 3), (4 * each, 4), (6 * each, 6), (None, 6)):
        found = draw(*arguments, most_bytes=most).images
        assert len(found) == number
        assert all(np.array_equal(a.image, b.image) for a, b in zip(found, whole, strict=False))


def test_drawing_is_ended_when_no_more_phantoms_fit(monkeypatch):
    ended: list[bool] = []

    def endless(work, items, *options):
        try:
            while True:
                yield work(0)
        finally:
            ended.append(True)

    monkeypatch.setattr(nnunet_start, "in_order", endless)
    drawn = draw(ordinary_plans(), "2d", DATASET_JSON, recipe("shapes", images=2000), most_bytes=0)
    assert len(drawn.images) == 50 and ended == [True]


@pytest.mark.slow
def test_processes_end_when_no_more_phantoms_fit(monkeypatch):
    monkeypatch.setattr(nnunet_start, "FEWEST_IMAGES", 2)
    arguments = (ordinary_plans(), "2d", DATASET_JSON, recipe("shapes", images=2000))
    assert len(draw(*arguments, processes=2, most_bytes=0).images) == 2
    assert not multiprocessing.active_children()


def test_a_start_from_fewer_phantoms_says_so_in_the_log_and_for_good(folder, monkeypatch):
    monkeypatch.setattr(nnunet_start, "FEWEST_IMAGES", 1)
    monkeypatch.setattr(nnunet_start, "machine_memory_bytes", lambda: 1)
    told: list[str] = []
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    plans["differential_privacy"]["configurations"]["3d_fullres"]["start"]["iterations"] = 2
    ensure_start(plans, "3d_fullres", DATASET_JSON, folder, CPU, 1, told.append)
    assert "no more than 1 of 2 phantoms: a quarter of this machine's memory" in told
    assert "only 1 phantoms were drawn" in told[-1]
    (provenance,) = (folder / FOLDER).glob("*.json")
    assert json.loads(provenance.read_text())["images_drawn"] == 1


def test_where_all_phantoms_fit_nothing_is_said_of_memory(folder):
    made = start(folder)
    assert "images_drawn" not in made.provenance
    assert dict(made.lines())["recipe"] == PublicStart.model_validate(made.provenance["recipe"]).describe()


# ---- learning once -----------------------------------------------------------------------------------------------


def test_the_start_is_made_once_and_found_again(folder):
    first = start(folder)
    stamp = os.stat(first.file).st_mtime_ns
    told: list[str] = []
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    weights, _ = ensure_start(plans, "3d_fullres", DATASET_JSON, folder, CPU, 1, told.append)
    assert os.stat(first.file).st_mtime_ns == stamp and "no private data" in told[-1] and len(told) == 1
    planned_network(plans, "3d_fullres", DATASET_JSON).load_state_dict(weights)


def test_budgets_with_the_same_network_share_it_and_another_network_does_not(folder):
    start(folder)
    for epsilon, features in ((3.0, (4, 4, 4)), (1.0, (4, 4, 6))):
        plan_dataset("4", "3d_fullres", epsilon, by_hand=ByHand(features_per_stage=features))
        pretrain("4", "3d_fullres", f"nnUNetPlansDP_eps{epsilon:g}", CPU, 1, iterations=2)
    assert len(list((folder / FOLDER).glob("*.pth"))) == 2


def test_no_private_file_is_opened(folder, monkeypatch):
    """References are empty files and there is no image at all: reading one would fail."""
    assert not list(folder.glob("**/*.b2nd")) and start(folder).provenance["recipe"]["kinds"] == ["hippocampus"]


def test_no_statistic_of_private_images_is_recorded(folder):
    """Intensities in the plans may come from the raw fingerprint; only CT normalisation needs them."""
    assert "12345" not in start(folder).file.with_suffix(".json").read_text()


def test_drawing_and_learning_are_reported_apart_in_a_log(folder):
    told: list[str] = []
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    plans["differential_privacy"]["configurations"]["3d_fullres"]["start"]["iterations"] = 2
    ensure_start(plans, "3d_fullres", DATASET_JSON, folder, CPU, 1, told.append)
    phases = [line.split(",")[0] for line in told if "min left" in line]
    assert phases == [f"{what}: {done} of 2" for what in ("phantoms drawn", "public start") for done in (1, 2)]


def test_drawing_and_learning_are_one_bar(folder):
    counted: list[tuple[int, int]] = []
    start(folder, progress=lambda done, total: counted.append((done, total)))
    assert counted == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_touched_start_is_refused(folder):
    made = start(folder)
    made.file.write_bytes(made.file.read_bytes() + b" ")
    with pytest.raises(Refusal, match="delete both"):
        start(folder)


def test_what_is_given_by_hand_is_written_into_the_plan(folder):
    start(folder, kinds=("shapes", "hippocampus"))
    planned = json.loads((folder / f"{PLANS}.json").read_text())["differential_privacy"]["configurations"]
    assert planned["3d_fullres"]["start"]["kinds"] == ["shapes", "hippocampus"]
    with pytest.raises(UsageRefusal, match="--phantom shapes"):
        start(folder, kinds=("lesion",))


def test_a_plan_without_a_start_is_refused(folder):
    plan_dataset("4", "3d_fullres", 2.0, public_start=False)
    with pytest.raises(UsageRefusal, match="--no-start"):
        pretrain("4", "3d_fullres", "nnUNetPlansDP_eps2", CPU, 1)
    with pytest.raises(UsageRefusal, match="without privacy"):
        pretrain("4", "3d_fullres", "nnUNetPlans", CPU, 1)


def test_the_command_makes_it_and_says_where(folder, capsys):
    chosen = ["-d", "4", "-c", "3d_fullres", "-p", PLANS, "--iterations", "2", "-device", "cpu", "-np", "1"]
    assert main(["pretrain", *chosen]) == 0
    printed = capsys.readouterr().out
    assert ".pth" in printed and "2 iterations" in printed and f"-p {PLANS}" in printed


# ---- checkpoints on public data ------------------------------------------------------------------------------------


def test_tensors_of_the_same_name_and_shape_are_adopted_and_others_left(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 1))
    before = network[1].weight.clone()
    theirs = {"0.weight": torch.ones(4, 1, 3, 3), "0.bias": torch.ones(4), "1.weight": torch.ones(5, 4, 1, 1)}
    torch.save({"network_weights": theirs}, tmp_path / "public.pth")
    assert adopt(network, tmp_path / "public.pth") == 40 / 50
    assert bool((network[0].weight == 1).all()) and torch.equal(network[1].weight, before)


def test_a_checkpoint_that_fits_nothing_is_refused(tmp_path):
    torch.save({"network_weights": {"0.weight": torch.ones(9)}}, tmp_path / "public.pth")
    with pytest.raises(UsageRefusal, match="names and shapes"):
        adopt(torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3)), tmp_path / "public.pth")


def test_a_foreign_file_is_refused_before_the_plan_is_touched(folder, tmp_path):
    torch.save({"weights": {}}, tmp_path / "foreign.pth")
    before = (folder / f"{PLANS}.json").read_bytes()
    with pytest.raises(UsageRefusal, match="at least 10%"):
        start(folder, public_weights=tmp_path / "foreign.pth")
    assert (folder / f"{PLANS}.json").read_bytes() == before


def test_a_plan_that_models_were_trained_with_keeps_its_recipe(folder):
    fold = folder.parents[1] / "results" / folder.name / f"nnUNetTrainerDP__{PLANS}__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    with pytest.raises(UsageRefusal, match="trained with"):
        start(folder)


def test_a_start_from_public_data_needs_its_checkpoint_until_it_is_made(folder, tmp_path):
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    file = tmp_path / "public.pth"
    torch.save({"network_weights": planned_network(plans, "3d_fullres", DATASET_JSON).state_dict()}, file)
    made = start(folder, public_weights=file)
    assert made.provenance["recipe"]["public_weights_sha256"]
    start(folder)  # it is there: the checkpoint is needed no more
    made.file.unlink()
    with pytest.raises(Refusal, match="--from-public"):
        start(folder)


@pytest.mark.parametrize("half", [["--no-patient-overlap"], ["--from-public"]])
def test_a_checkpoint_and_the_declaration_go_together(folder, tmp_path, half, capsys):
    (tmp_path / "public.pth").touch()
    given = [*half, str(tmp_path / "public.pth")] if half == ["--from-public"] else half
    assert main(["pretrain", "-d", "4", "-c", "3d_fullres", "-p", PLANS, *given]) == 2
    assert "go together" in capsys.readouterr().err


# ---- when a training makes it ------------------------------------------------------------------------------------

MODEL = f"nnUNetTrainerDP_AutoS__{PLANS}__3d_fullres"


@pytest.fixture
def dataset(folder) -> Path:
    """The planned dataset with its cases, as far as a trainer looks before it loads them."""
    (folder / "nnUNetPlans_3d_fullres").mkdir()
    for case in range(12):
        (folder / "nnUNetPlans_3d_fullres" / f"tube_{case:02}.b2nd").touch()
    return folder


def trainer(dataset: Path, continuing: bool = False) -> trainers.nnUNetTrainerDP_AutoS:
    plans = json.loads((dataset / f"{PLANS}.json").read_text())
    return trainers.nnUNetTrainerDP_AutoS(
        {**plans, "continue_training": continuing}, "3d_fullres", 0, DATASET_JSON, CPU
    )  # fmt: skip


def model(dataset: Path) -> Path:
    return dataset.parents[1] / "results" / dataset.name / MODEL


def charge(dataset: Path, **unit: str) -> None:
    """A charge of an earlier run of the same fold, with its copy beside the model."""
    (model(dataset) / "fold_0").mkdir(parents=True, exist_ok=True)
    patients = find_patients(dataset)
    known = {"unit": patients.unit, "units": patients.table_sha256} | unit
    ledger = Ledger(dataset / LEDGER, f"{MODEL}/fold_0/1", "0a", model(dataset) / "fold_0" / LEDGER, **known)
    ledger.charge(Charge(purpose="training", mechanism="gaussian", noise_multiplier=2.0, first_step=0))


def charge_other_units(dataset: Path) -> None:
    charge(dataset, unit="patient")


def lose_the_ledger(dataset: Path) -> None:
    charge(dataset)
    (dataset / LEDGER).unlink()


def edit_the_ledger(dataset: Path) -> None:
    charge(dataset)
    (dataset / LEDGER).write_text((dataset / LEDGER).read_text().replace("2.0", "9.0"))


def lose_a_case(dataset: Path) -> None:
    (dataset / "nnUNetPlans_3d_fullres" / "tube_03.b2nd").unlink()


def spend_more(dataset: Path) -> None:
    plans = json.loads((dataset / f"{PLANS}.json").read_text())
    plans["differential_privacy"]["configurations"]["3d_fullres"]["noise_multiplier"] = 0.1
    (dataset / f"{PLANS}.json").write_text(json.dumps(plans))


@pytest.mark.parametrize(
    ("spoil", "continuing", "message"),
    [
        (charge_other_units, False, "charged per 'patient' of another table"),
        (lose_the_ledger, False, "1 charges in .* are missing"),
        (edit_the_ledger, False, "found it edited"),
        (charge, True, "checkpoint_latest.pth is missing"),
        (lose_a_case, False, "1 cases of this fold are not in"),
        (spend_more, False, "this plan would spend"),
    ],
)
def test_what_is_refused_without_a_charge_is_refused_before_the_start_is_made(
    dataset, monkeypatch, spoil, continuing, message
):
    made: list[str] = []
    monkeypatch.setattr(trainers, "ensure_start", lambda *words: made.append("start"))
    spoil(dataset)
    with pytest.raises(Refusal, match=message):
        trainer(dataset, continuing).on_train_start()
    assert not made and not (model(dataset) / "archive").exists()


class Enough(Exception):
    """The training was begun; what follows needs images."""


@pytest.fixture
def finished(dataset) -> Path:
    """The fold's folder with an earlier, finished run."""
    charge(dataset)
    fold = model(dataset) / "fold_0"
    write_checkpoint({"network_weights": {}}, fold / FINAL)
    (fold / PROVENANCE).write_text("the earlier run's")
    return fold


def test_an_older_model_stays_where_it_is_until_the_start_is_made(dataset, finished, monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainers, "ensure_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer(dataset).on_train_start()
    assert (finished / FINAL).is_file() and (finished / PROVENANCE).read_text() == "the earlier run's"
    assert len(read_ledger(dataset / LEDGER)) == 1


@pytest.fixture
def until_images(monkeypatch) -> Callable[..., None]:
    """Train until the first image is wanted; a start has 0.25 in all weights."""

    def stop(*words):
        raise Enough

    def begin(training, known: Path | None = None) -> None:
        training.initialize()
        weights = {name: torch.full_like(tensor, 0.25) for name, tensor in training.network.state_dict().items()}
        monkeypatch.setattr(trainers, "ensure_start", lambda *words: stop() if known else (weights, {"sha256": "0a"}))
        if known:
            training.load_checkpoint(str(known))
        with pytest.raises(Enough):
            training.on_train_start()

    monkeypatch.setattr(trainers.nnUNetTrainerDP, "get_dataloaders", stop)
    monkeypatch.setattr(trainers.RunFolder, "lock", lambda run: None)  # of a process, and all runs here are in one
    return begin


@pytest.mark.parametrize("older", [True, False])
def test_the_first_checkpoint_holds_the_start_and_the_older_model_keeps_its_own(dataset, request, until_images, older):
    archived = older and request.getfixturevalue("finished")
    until_images(trainer(dataset, continuing=not older))
    fold = model(dataset) / "fold_0"
    state = read_checkpoint(fold / LATEST)["private"]
    assert all(bool((tensor == 0.25).all()) for tensor in (*state["weights"], *state["average"]))
    assert json.loads((fold / PROVENANCE).read_text()) == {"sha256": "0a"}
    kept = [file.read_text() for file in model(dataset).glob(f"archive/*/{PROVENANCE}")]
    assert kept == (["the earlier run's"] if archived else [])


def test_a_run_that_goes_on_has_its_own_weights_and_makes_no_start(dataset, finished, until_images):
    until_images(trainer(dataset))
    going_on = trainer(dataset, continuing=True)
    until_images(going_on, finished / LATEST)
    assert going_on.private is not None  # it came as far as the first
    assert all(bool((parameter == 0.25).all()) for parameter in going_on.network.parameters())
    assert len(list(model(dataset).glob("archive/*"))) == 1


# ---- loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regions", [False, True])
def test_the_loss_falls_when_outputs_are_right(regions):
    description = dict(DATASET_JSON)
    if regions:
        description |= {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    loss = planned_loss(ordinary_plans(), "3d_fullres", description)
    labels = torch.randint(0, 3, (1, 8, 8, 8))
    if regions:
        right = torch.stack([labels > 0, labels == 2], 1).float() * 20 - 10
    else:
        right = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float() * 20 - 10
    coarse = torch.zeros(1, right.shape[1], 4, 4, 4)
    assert float(loss([right, coarse], labels)) < -0.9 < float(loss([-right, coarse], labels))
    assert float(loss([right], labels)) < -0.9  # a network of two stages has one output
