"""What the core asks of nnU-Net: private plans on a folder, flags, what a checkpoint holds."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from ordinary_plans import DATASET, DATASET_JSON, ordinary_plans, preprocessed_dataset

from nnunet_dp import loading, nnunet
from nnunet_dp.accounting import PrivacyBudget, default_delta
from nnunet_dp.charges import Charge
from nnunet_dp.cli import main
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.ledger import Ledger
from nnunet_dp.nnunet import CallingOptions
from nnunet_dp.nnunet_planning import plan_curve, plan_dataset, self_configured
from nnunet_dp.patients import Patients
from nnunet_dp.planning import plan_configuration
from nnunet_dp.plans import read_section

# ---- flags of the caller -----------------------------------------------------------------------------------------

RUN_TRAINING = """
def run_training(ask, pretrained_weights=None, num_gpus=1, only_run_validation=False, disable_checkpointing=False,
                 val_with_best=False):
    return (lambda: ask())()  # some frames lie between
def run_training_entry(ask, **options):
    return run_training(ask, **options)
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


def test_a_function_of_the_same_name_elsewhere_has_no_say(nnunets_command):
    vars(nnunets_command)["__name__"] = "my.script"
    assert nnunets_command.run_training_entry(nnunet.calling_options, num_gpus=4) == CallingOptions()


# ---- private plans -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A preprocessed dataset of twelve cases, and an empty raw and results folder beside it."""
    (tmp_path / "raw" / DATASET).mkdir(parents=True)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return preprocessed_dataset(tmp_path)


def patients_csv(file: Path, cases_each: int = 2, column: str = "patient") -> Path:
    rows = [f"tube_{case:02},person_{case // cases_each}" for case in range(12)]
    file.write_text("\n".join([f"case,{column}", *rows]) + "\n")
    return file


def raw(folder: Path) -> Path:
    return folder.parents[1] / "raw" / DATASET / "patients.csv"


def written(folder: Path, name: str = "nnUNetPlansDP_eps8") -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def charge(folder: Path) -> None:
    patients = nnunet.find_patients(folder)
    ledger = Ledger(
        folder / "privacy_ledger.jsonl", "model/fold_0/1", "0a", unit=patients.unit, units=patients.table_sha256
    )
    ledger.charge(Charge(purpose="training", mechanism="gaussian", noise_multiplier=2.0, first_step=0))


def test_planning_writes_private_plans_beside_the_ordinary_ones(folder):
    report = plan_dataset("4", "3d_fullres", 8.0)
    plans = written(folder)
    assert (report.plans_name, report.changed, report.file) == (
        "nnUNetPlansDP_eps8", True, folder / "nnUNetPlansDP_eps8.json"
    )  # fmt: skip
    assert plans["plans_name"] == report.plans_name
    assert read_section(plans) == report.section
    network = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    planned = report.section.configurations["3d_fullres"].network
    assert tuple(network["features_per_stage"]) == planned.features_per_stage
    assert 0.99 * 8 <= report.spent <= 8


def test_planning_changes_neither_the_ordinary_plans_nor_the_preprocessed_data(folder):
    plan_dataset("4", "3d_fullres", 8.0)
    assert json.loads((folder / "nnUNetPlans.json").read_text()) == ordinary_plans()
    configurations = [plans["configurations"]["3d_fullres"] for plans in (written(folder), ordinary_plans())]
    assert configurations[0]["data_identifier"] == configurations[1]["data_identifier"]


def test_the_same_arguments_again_change_nothing(folder):
    plan_dataset("4", "3d_fullres", 8.0)
    before = (folder / "nnUNetPlansDP_eps8.json").stat()
    assert not plan_dataset(DATASET, "3d_fullres", 8.0).changed
    after = (folder / "nnUNetPlansDP_eps8.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_different_arguments_need_overwrite(folder):
    plan_dataset("4", "3d_fullres", 8.0)
    for different in ({"delta": 1e-6}, {"compute": "small"}):
        kept = written(folder)
        with pytest.raises(UsageRefusal, match="--overwrite"):
            plan_dataset("4", "3d_fullres", 8.0, **different)
        assert written(folder) == kept
        assert plan_dataset("4", "3d_fullres", 8.0, **different, overwrite=True).changed
        plan_dataset("4", "3d_fullres", 8.0, overwrite=True)


def test_another_configuration_is_added_and_the_first_is_kept(folder):
    plan_dataset("4", "3d_fullres", 8.0)
    first = written(folder)
    assert plan_dataset("4", "2d", 8.0).changed
    both = written(folder)
    assert set(both["differential_privacy"]["configurations"]) == {"2d", "3d_fullres"}
    for part in (both, both["differential_privacy"]):
        before = first if part is both else first["differential_privacy"]
        assert part["configurations"]["3d_fullres"] == before["configurations"]["3d_fullres"]
    assert not plan_dataset("4", "3d_fullres", 8.0).changed


def test_overwriting_one_configuration_keeps_the_other_of_the_same_budget(folder):
    plan_dataset("4", "3d_fullres", 8.0)
    plan_dataset("4", "2d", 8.0)
    first = written(folder)
    plan_dataset("4", "2d", 8.0, compute="small", overwrite=True)
    both = read_section(written(folder))
    assert both.configurations["2d"].compute == "small"
    assert both.configurations["3d_fullres"] == read_section(first).configurations["3d_fullres"]


def test_budgets_and_names_give_files_of_their_own(folder):
    assert plan_dataset("4", "2d", 3.0).plans_name == "nnUNetPlansDP_eps3"
    assert plan_dataset("4", "2d", 8.0, output="mine").plans_name == "mine"
    assert written(folder, "mine")["plans_name"] == "mine"


def test_the_json_report_gives_budget_unit_and_schedule(folder):
    report = plan_dataset("4", "2d", 8.0, 1e-4).as_dict()
    expected = {"epsilon": 8.0, "delta": 1e-4, "unit": "case", "relation": "zero-out", "patients": 12, "changed": True}
    assert expected.items() <= report.items()
    assert {"steps", "noise_multiplier", "sampling_probability", "not_covered", "accountant"} <= set(report)
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("delta", [0.0, -1e-5, 1.0, float("nan"), 1 / 12])
def test_a_delta_that_promises_nothing_is_refused(folder, delta):
    with pytest.raises(ValueError):
        plan_dataset("4", "2d", 8.0, delta)
    assert not list(folder.glob("*DP*"))


# ---- the unit ----------------------------------------------------------------------------------------------------


def test_without_a_file_every_case_is_a_unit_called_case(folder):
    section = plan_dataset("4", "2d", 8.0).section
    assert (section.budget.unit, section.patients, section.patients_file_sha256) == ("case", 12, None)
    assert section.budget.delta == default_delta(12)


def test_a_file_in_the_raw_folder_is_copied_and_its_hash_goes_into_the_plan(folder):
    patients_csv(raw(folder))
    section = plan_dataset("4", "2d", 8.0).section
    assert (section.budget.unit, section.patients) == ("patient", 6)
    assert section.patients_file_sha256 == nnunet.file_sha256(folder / "patients.csv")
    shutil.rmtree(raw(folder).parent)
    assert not plan_dataset("4", "2d", 8.0).changed  # the raw folder is often absent where people train


def test_a_file_and_a_column_may_be_named(folder, tmp_path):
    table = patients_csv(tmp_path / "units.csv", 3, "privacy_unit")
    section = plan_dataset("4", "2d", 8.0, patients_file=table, patient_column="privacy_unit").section
    assert (section.budget.unit, section.patients) == ("privacy_unit", 4)


def test_a_changed_grouping_needs_overwrite_and_a_new_plan(folder):
    patients_csv(raw(folder))
    plan_dataset("4", "2d", 8.0)
    kept = (folder / "patients.csv").read_bytes()
    patients_csv(raw(folder), 3)
    with pytest.raises(UsageRefusal, match="--overwrite"):
        plan_dataset("4", "2d", 8.0)
    assert (folder / "patients.csv").read_bytes() == kept
    assert plan_dataset("4", "2d", 8.0, overwrite=True).section.patients == 4


@pytest.mark.parametrize("charged_as", ["patient", "case"])
def test_once_charges_exist_the_unit_cannot_change(folder, charged_as):
    if charged_as == "patient":
        patients_csv(raw(folder))
    plan_dataset("4", "2d", 8.0)
    charge(folder)
    patients_csv(raw(folder), 3)
    with pytest.raises(Refusal, match="charges per different units cannot be added"):
        plan_dataset("4", "2d", 8.0, overwrite=True)
    assert not list(folder.glob("patients.csv.new"))


def test_charged_patients_do_not_turn_into_cases_when_the_file_is_lost(folder):
    patients_csv(raw(folder))
    plan_dataset("4", "2d", 8.0)
    charge(folder)
    raw(folder).unlink()
    (folder / "patients.csv").unlink()
    with pytest.raises(Refusal, match="charged per 'patient' of another table of units than today's 'case'"):
        plan_dataset("4", "2d", 8.0, overwrite=True)


def test_the_same_patients_may_be_planned_again_after_charges(folder):
    patients_csv(raw(folder))
    plan_dataset("4", "2d", 8.0)
    charge(folder)
    assert plan_dataset("4", "2d", 3.0).section.patients == 6


def test_cases_of_the_raw_datasets_test_images_may_have_rows(folder):
    table = patients_csv(raw(folder))
    table.write_text(table.read_text() + "scan_77,person_9\n")
    with pytest.raises(UsageRefusal, match="unknown to the dataset: line 14"):
        plan_dataset("4", "2d", 8.0)
    (raw(folder).parent / "imagesTs").mkdir()
    (raw(folder).parent / "imagesTs" / "scan_77_0000.nii.gz").touch()
    assert plan_dataset("4", "2d", 8.0).section.patients == 6


def test_no_error_about_patients_names_one(folder):
    patients_csv(raw(folder))
    raw(folder).write_text(raw(folder).read_text().replace("tube_07,person_3", "tube_07,"))
    with pytest.raises(UsageRefusal) as caught:
        plan_dataset("4", "2d", 8.0)
    assert "line 9" in str(caught.value) and "tube_07" not in str(caught.value) and "person" not in str(caught.value)


# ---- what planning refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "5"}, "knows no dataset '5'"),
        ({"dataset": "Tubes"}, "knows no dataset 'Tubes'"),
        ({"dataset": "Dataset005_Other"}, "is not preprocessed: run `nnUNetv2_plan_and_preprocess"),
        ({"plans": "otherPlans"}, "no plans otherPlans; found: nnUNetPlans"),
        ({"configuration": "4d"}, "no configuration 4d; they have: 2d, 3d_fullres"),
    ],
)
def test_what_does_not_exist_is_refused_and_nothing_is_written(folder, arguments, message):
    before = sorted(folder.iterdir())
    with pytest.raises(UsageRefusal, match=message):
        plan_dataset(**{"dataset": "4", "configuration": "3d_fullres", "epsilon": 8.0} | arguments)
    assert sorted(folder.iterdir()) == before


def test_the_cascades_second_stage_is_refused(folder):
    with pytest.raises(Refusal, match="cascade's second stage"):
        plan_dataset("4", "3d_cascade_fullres", 8.0)


def test_private_plans_are_no_source_for_private_plans_and_are_not_confused_with_ordinary_ones(folder):
    plan_dataset("4", "2d", 8.0)
    with pytest.raises(UsageRefusal, match="are private plans already"):
        plan_dataset("4", "2d", 3.0, plans="nnUNetPlansDP_eps8")
    with pytest.raises(UsageRefusal, match="plans without privacy: choose another name with -o"):
        plan_dataset("4", "2d", 8.0, output="nnUNetPlans", overwrite=True)


def test_a_dataset_without_references_is_refused(folder):
    shutil.rmtree(folder / "gt_segmentations")
    with pytest.raises(UsageRefusal, match="no gt_segmentations"):
        plan_dataset("4", "2d", 8.0)


def test_without_nnunets_variables_the_user_is_told_which_to_set(folder, monkeypatch):
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(UsageRefusal, match="export nnUNet_raw, nnUNet_preprocessed, nnUNet_results"):
        plan_dataset("4", "2d", 8.0)


def test_ordinary_plans_configure_themselves_to_the_default_budget_under_their_own_name(folder):
    plans = self_configured(ordinary_plans(), "3d_fullres", DATASET_JSON)
    section = read_section(plans)
    assert (plans["plans_name"], section.budget.epsilon, section.budget.delta) == ("nnUNetPlans", 8.0, 1e-5)
    assert plan_dataset("4", "3d_fullres", 8.0, public_start=False).section == section


def test_a_curve_plans_several_budgets_and_writes_nothing(folder):
    reports = plan_curve("4", "3d_fullres", [1.0, 8.0], delta=1e-5)
    assert [report.section.budget.epsilon for report in reports] == [1, 8]
    assert reports[0].as_dict()["true_positive_rate_at_0.01"] < reports[1].as_dict()["true_positive_rate_at_0.01"]
    assert not list(folder.glob("*DP_eps*"))


def test_a_curve_is_printed_and_drawn(folder, capsys):
    assert main(["plan", "-d", "4", "-c", "3d_fullres", "--curve", "8,1,3", "--delta", "1e-5"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[2:5]] == ["1", "3", "8"]
    assert (folder / "plan_curve_3d_fullres.png").read_bytes().startswith(b"\x89PNG")


def test_runs_from_before_a_plan_could_name_a_start_are_still_known(tmp_path):
    """Their digest was taken of a plan without the fields that are empty in them today."""
    plan = plan_2d()
    old = {key: value for key, value in plan.model_dump(mode="json").items() if key not in ("start", "by_hand")}
    digest = hashlib.sha256(json.dumps([old, {"p": ["c"]}, {}], sort_keys=True).encode()).hexdigest()
    assert nnunet.data_digest(tmp_path, {"p": ("c",)}, plan) == digest
    changed = plan.model_copy(update={"by_hand": ("steps",)})
    assert nnunet.data_digest(tmp_path, {"p": ("c",)}, changed) != digest


# ---- known defects, to be mended in the core ----------------------------------------------------------------------


def test_ordinary_plans_that_were_made_anew_change_the_private_ones(folder):
    plan_dataset("4", "3d_fullres", 8.0)
    plans = ordinary_plans()
    plans["configurations"]["3d_fullres"]["patch_size"] = [40, 48, 40]
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    with pytest.raises(UsageRefusal, match="--overwrite"):
        plan_dataset("4", "3d_fullres", 8.0)


def test_an_impossible_budget_is_refused_in_one_line(folder):
    with pytest.raises(UsageRefusal):
        plan_dataset("4", "2d", -1.0)


def test_a_refused_plan_leaves_no_patients_file_behind(folder):
    patients_csv(raw(folder))
    with pytest.raises(UsageRefusal):
        plan_dataset("4", "4d", 8.0)
    assert not (folder / "patients.csv").exists()


def test_a_case_whose_name_holds_dots_is_in_the_digest(tmp_path):
    (tmp_path / "1.2.840.b2nd").write_bytes(b"x")
    before = nnunet.data_digest(tmp_path, {"person_0": ("1.2.840",)}, plan_2d())
    (tmp_path / "1.2.840.b2nd").write_bytes(b"xx")
    assert nnunet.data_digest(tmp_path, {"person_0": ("1.2.840",)}, plan_2d()) != before


# ---- splits ------------------------------------------------------------------------------------------------------


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


def test_cases_that_were_not_preprocessed_are_refused_by_their_number(data):
    class Folder:
        get_identifiers = staticmethod(lambda folder: sorted({file.name[:7] for file in Path(folder).iterdir()}))

    nnunet.refuse_missing(Folder, data, ["tube_00", "tube_02"])
    with pytest.raises(Refusal, match="2 cases of this fold are not in") as caught:
        nnunet.refuse_missing(Folder, data, ["tube_00", "tube_70", "tube_71"])
    assert "tube_7" not in str(caught.value)


@pytest.mark.parametrize("name", ["../evil", "a/b", "plans.json", ""])
def test_plans_are_never_written_outside_the_dataset(folder, name):
    with pytest.raises(UsageRefusal, match="without folder"):
        plan_dataset(DATASET, "3d_fullres", 8, output=name)


def test_an_epsilon_that_protects_nobody_is_refused(folder):
    with pytest.raises(UsageRefusal, match="1000"):
        plan_dataset(DATASET, "3d_fullres", 1e9)


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
