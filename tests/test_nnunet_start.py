"""The public start inside nnU-Net: drawn by public facts, learnt once, shared, recorded, refused when touched."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ordinary_plans import DATASET_JSON, ordinary_plans, preprocessed_dataset

from nnunet_dp import planning
from nnunet_dp.cli import main
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.nnunet_planning import plan_dataset, public_facts
from nnunet_dp.nnunet_start import adopt, draw, ensure_start, planned_loss, planned_network, pretrain
from nnunet_dp.phantoms.matching import PublicFacts
from nnunet_dp.public_start import FOLDER
from nnunet_dp.sections import ByHand, PublicStart

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
