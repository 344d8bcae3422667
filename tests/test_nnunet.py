"""What the core asks of nnU-Net: flags, splits, patches of one patient, digests, what a checkpoint holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from ordinary_plans import DATASET_JSON, ordinary_plans, preprocessed_dataset

from nnunet_dp import loading, nnunet
from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.nnunet import CallingOptions
from nnunet_dp.patients import Patients
from nnunet_dp.planning import plan_configuration

# ---- flags of the caller -----------------------------------------------------------------------------------------

RUN_TRAINING = """
def run_training(ask, pretrained_weights=None, num_gpus=1, only_run_validation=False, disable_checkpointing=False,
                 val_with_best=False):
    return (lambda: ask())()  # some frames lie between
def run_training_entry(ask, **options):
    return run_training(ask, **options)
def run_ddp(ask, disable_checkpointing, val, pretrained_weights, val_with_best, world_size):
    return ask()
"""


@pytest.fixture
def nnunets_command() -> ModuleType:
    module = ModuleType("nnunetv2.run.run_training")
    exec(RUN_TRAINING, vars(module))
    return module


def test_the_fake_command_has_the_flags_of_nnunets_own():
    from inspect import signature

    from nnunetv2.run.run_training import run_training

    flags = set(signature(CallingOptions).parameters) - {"from_command_line"}
    assert flags <= set(signature(run_training).parameters)


def test_the_flags_are_read_from_the_call_that_made_the_trainer(nnunets_command):
    options = {"pretrained_weights": "w.pth", "num_gpus": 2, "only_run_validation": True}
    found = nnunets_command.run_training(nnunet.calling_options, **options)
    assert found == CallingOptions(**options)
    found = nnunets_command.run_training(nnunet.calling_options, val_with_best=True, disable_checkpointing=True)
    assert found == CallingOptions(val_with_best=True, disable_checkpointing=True)


def test_the_command_line_is_told_from_a_call_in_python(nnunets_command):
    assert nnunets_command.run_training_entry(nnunet.calling_options).from_command_line
    assert not nnunets_command.run_training(nnunet.calling_options).from_command_line


def test_with_several_gpus_the_flags_are_those_of_each_process(nnunets_command):
    found = nnunets_command.run_ddp(nnunet.calling_options, True, True, "w.pth", True, 4)
    assert found == CallingOptions("w.pth", True, True, True, 4, from_command_line=True)


def test_nnunet_names_the_flags_of_each_process_as_expected():
    from inspect import signature

    from nnunetv2.run.run_training import run_ddp

    expected = {"disable_checkpointing", "val", "pretrained_weights", "val_with_best", "world_size"}
    assert expected <= set(signature(run_ddp).parameters)


def test_a_function_of_the_same_name_elsewhere_has_no_say(nnunets_command):
    vars(nnunets_command)["__name__"] = "my.script"
    assert nnunets_command.run_training_entry(nnunet.calling_options, num_gpus=4) == CallingOptions()


# ---- splits ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A preprocessed dataset of twelve cases."""
    return preprocessed_dataset(tmp_path)


BY_PAIRS = Patients("patient", "patient", {f"tube_{case:02}": f"person_{case // 2}" for case in range(60)})


def test_a_missing_split_is_made_by_patient_and_kept(folder):
    for case in BY_PAIRS.case_to_patient:
        (folder / "gt_segmentations" / f"{case}.nii.gz").touch()
    splits = nnunet.find_splits(folder, BY_PAIRS)
    for fold in splits:
        sides = [{BY_PAIRS.case_to_patient[case] for case in fold[side]} for side in ("train", "val")]
        assert not sides[0] & sides[1]
    assert json.loads((folder / "splits_final.json").read_text()) == splits == nnunet.find_splits(folder, BY_PAIRS)


def test_a_split_that_is_no_json_is_refused(folder):
    (folder / "splits_final.json").write_text("[{")
    with pytest.raises(UsageRefusal, match="not JSON: delete it"):
        nnunet.find_splits(folder, BY_PAIRS)


def test_a_split_that_tears_a_patient_apart_is_refused(folder):
    cases = sorted(BY_PAIRS.case_to_patient)
    (folder / "splits_final.json").write_text(json.dumps([{"train": cases[:7], "val": cases[7:]}]))
    with pytest.raises(UsageRefusal, match="both sides") as caught:
        nnunet.find_splits(folder, BY_PAIRS)
    assert "person" not in str(caught.value) and "tube" not in str(caught.value)


# ---- patches of one patient --------------------------------------------------------------------------------------


class Images:
    """A dataset in nnU-Net's manner: each case filled with its own number, one voxel of foreground."""

    def __init__(self, *numbers: int, edge: int = 12) -> None:
        self.identifiers, self.edge = [str(number) for number in numbers], edge

    def load_case(self, identifier):
        segmentation = np.zeros((1, *[self.edge] * 3), dtype=np.int16)
        segmentation[0, 1, 2, 3] = 1
        locations = {1: np.array([[0, 1, 2, 3]])}
        return np.full(segmentation.shape, float(identifier)), segmentation, None, {"class_locations": locations}


def source(dataset, patches=4, oversample=0.33):
    labels = PlansManager(ordinary_plans()).get_label_manager(DATASET_JSON)
    return nnunet.PatchSource(dataset, patches, [8] * 3, [8] * 3, labels, oversample, None)


def test_a_patient_brings_its_planned_patches_from_all_its_cases_evenly():
    data, target = source(Images(1, 2, 3), patches=6)(("1", "3"))
    assert data.shape == target.shape == (6, 1, 8, 8, 8)
    largest = data.max(axis=(1, 2, 3, 4)).tolist()
    assert sorted(largest) == [1, 1, 1, 3, 3, 3]


def test_one_patch_comes_from_either_case():
    one = source(Images(1, 2), patches=1)
    assert {one(("1", "2"))[0].max() for _ in range(40)} == {1, 2}


def test_foreground_is_oversampled_inside_the_patient():
    assert all((target == 1).any() for target in source(Images(1), 8, oversample=1.0)(("1",))[1])
    found = [(target == 1).any() for target in source(Images(1, edge=40), 8, oversample=0.0)(("1",))[1]]
    assert not all(found)


def test_a_patients_patches_do_not_change_when_another_patients_images_do(monkeypatch):
    monkeypatch.setattr(loading, "fresh_key", lambda: b"fixed" * 6)
    found = []
    for dataset in (Images(1, 2, 3), Images(1, 2, 7)):
        third = dataset.identifiers[2]
        loader = loading.PatientLoader(source(dataset), [("1",), (third,), ("2",)], torch.device("cpu"), 0)
        found.append([record.data for record in loader.records(0, [0, 1, 2])])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][2], found[1][2])
    assert not torch.equal(found[0][1], found[1][1])


# ---- names of cases ----------------------------------------------------------------------------------------------


def test_cases_to_predict_are_named_once_and_in_nnunets_order(tmp_path):
    for name in ("b_0000.nii.gz", "b_0001.nii.gz", "a.x_0000.nii.gz", "C_0000.nii.gz", "notes.txt", "d_0000.mha"):
        (tmp_path / name).touch()
    theirs = create_lists_from_splitted_dataset_folder(str(tmp_path), ".nii.gz")
    found = nnunet.input_cases(tmp_path, ".nii.gz")
    assert found == [Path(files[0]).name.removesuffix("_0000.nii.gz") for files in theirs]
    assert sorted(found) == ["C", "a.x", "b"]


# ---- digests and checkpoints -------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path) -> Path:
    """A configuration's preprocessed folder of three cases."""
    for case in ("tube_00", "tube_01", "tube_02"):
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (tmp_path / f"{case}{ending}").write_bytes(b"x" * 10)
    return tmp_path


SLOTS = {"person_0": ("tube_00",), "person_1": ("tube_01",)}


def plan_2d(steps: int = 20):
    budget = PrivacyBudget(epsilon=8, delta=1e-4)
    plan = plan_configuration(budget, 12, (64, 64), [[1, 1], [2, 2]], lambda shape: 1000, "small")
    return plan.model_copy(update={"steps": steps})


@pytest.mark.parametrize("changed", ["tube_00.b2nd", "tube_01_seg.b2nd", "tube_00.pkl"])
def test_a_training_file_of_another_size_changes_the_digest(data, changed):
    before = nnunet.data_digest(data, SLOTS, plan_2d())
    (data / changed).write_bytes(b"x" * 11)
    assert nnunet.data_digest(data, SLOTS, plan_2d()) != before


def test_a_missing_training_file_changes_the_digest(data):
    before = nnunet.data_digest(data, SLOTS, plan_2d())
    (data / "tube_01_seg.b2nd").unlink()
    assert nnunet.data_digest(data, SLOTS, plan_2d()) != before


def test_another_split_grouping_or_plan_changes_the_digest(data):
    other_slots = ({"person_0": ("tube_00",)}, {"person_0": ("tube_00", "tube_01")}, SLOTS | {"p": ("tube_02",)})
    digests = [nnunet.data_digest(data, slots, plan_2d()) for slots in (SLOTS, *other_slots)]
    assert len({*digests, nnunet.data_digest(data, SLOTS, plan_2d(21))}) == 5


def test_files_of_nobody_who_trains_do_not_change_the_digest(data):
    before = nnunet.data_digest(data, SLOTS, plan_2d())
    (data / "notes.txt").touch()
    (data / "tube_02.b2nd").write_bytes(b"")
    (data / "folder").mkdir()
    assert nnunet.data_digest(data, SLOTS, plan_2d()) == before


def test_runs_from_before_a_plan_could_name_a_start_are_still_known(tmp_path):
    """Their digest was taken of a plan without the fields that are empty in them today."""
    plan = plan_2d()
    later = ("start", "by_hand", "fingerprint")
    old = {key: value for key, value in plan.model_dump(mode="json").items() if key not in later}
    digest = hashlib.sha256(json.dumps([old, {"p": ["c"]}, {}], sort_keys=True).encode()).hexdigest()
    assert nnunet.data_digest(tmp_path, {"p": ("c",)}, plan) == digest
    changed = plan.model_copy(update={"by_hand": ("steps",)})
    assert nnunet.data_digest(tmp_path, {"p": ("c",)}, changed) != digest


def test_a_case_whose_name_holds_dots_is_in_the_digest(tmp_path):
    (tmp_path / "1.2.840.b2nd").write_bytes(b"x")
    before = nnunet.data_digest(tmp_path, {"person_0": ("1.2.840",)}, plan_2d())
    (tmp_path / "1.2.840.b2nd").write_bytes(b"xx")
    assert nnunet.data_digest(tmp_path, {"person_0": ("1.2.840",)}, plan_2d()) != before


def test_cases_that_were_not_preprocessed_are_refused_by_their_number(data):
    class Folder:
        get_identifiers = staticmethod(lambda folder: sorted({file.name[:7] for file in Path(folder).iterdir()}))

    nnunet.refuse_missing(Folder, data, ["tube_00", "tube_02"])
    with pytest.raises(Refusal, match="2 cases of this fold are not in") as caught:
        nnunet.refuse_missing(Folder, data, ["tube_00", "tube_70", "tube_71"])
    assert "tube_7" not in str(caught.value)


def test_archives_that_cannot_be_unpacked_are_refused_by_their_number(tmp_path):
    """nnU-Net's older format: unpacking comes before anything else reads the cases."""

    class Folder:
        get_identifiers = staticmethod(lambda folder: ["tube_00", "tube_01"])

    for name in Folder.get_identifiers(""):
        np.savez_compressed(tmp_path / f"{name}.npz", data=np.ones((4, 5)))
    nnunet.refuse_missing(Folder, tmp_path, ["tube_00"])
    torn = tmp_path / "tube_01.npz"
    torn.write_bytes(torn.read_bytes()[:60])
    with pytest.raises(Refusal, match="cut short or damaged: run nnUNetv2_preprocess") as no:
        nnunet.refuse_missing(Folder, tmp_path, ["tube_00"])
    assert "1 of the .npz files" in str(no.value) and "tube" not in str(no.value)
    np.save(tmp_path / "tube_01.npy", np.ones(3))  # unpacked before it was torn
    nnunet.refuse_missing(Folder, tmp_path, ["tube_00"])


def test_a_finished_checkpoint_holds_weights_and_neutral_values_only():
    weights = {"conv.weight": torch.ones(2)}
    content = nnunet.final_checkpoint(
        weights, "nnUNetTrainerDP_AutoS", "2d", 0, (0, 1), run="model/fold_0/1", charges=9, steps=8
    )
    assert content == {
        "network_weights": weights,
        "trainer_name": "nnUNetTrainerDP_AutoS",
        "inference_allowed_mirroring_axes": (0, 1),
        "init_args": {"configuration": "2d", "fold": 0, "run": "model/fold_0/1", "charges": 9, "steps": 8},
        "optimizer_state": {},
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": 0,
    }


def test_the_predictor_finds_what_it_reads_in_a_finished_checkpoint():
    import inspect

    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    read = inspect.getsource(nnUNetPredictor.initialize_from_trained_model_folder)
    wanted = {part.split("'")[1] for part in read.split("checkpoint[")[1:]}
    assert wanted >= {"trainer_name", "init_args", "network_weights"}
    assert wanted <= set(nnunet.final_checkpoint({}, "t", "2d", 0, None, "model/fold_0/1", 9, 8))


def test_a_models_dataset_json_names_no_case():
    private = {
        "training": [{"image": "./imagesTr/tube_00.nii.gz"}],
        "dataset": {"tube_00": {}},
        "description": "tube_00",
    }
    assert nnunet.public_dataset_json(DATASET_JSON | private) == DATASET_JSON
