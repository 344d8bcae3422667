"""Private plans on a folder: what is written, per which unit, what is refused, and several budgets side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from ordinary_plans import DATASET, DATASET_JSON, ordinary_plans, preprocessed_dataset

from nnunet_dp import nnunet, nnunet_planning
from nnunet_dp.accounting import default_delta
from nnunet_dp.charges import Charge
from nnunet_dp.cli import main
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.ledger import Ledger
from nnunet_dp.nnunet_planning import plan_curve, plan_dataset, self_configured
from nnunet_dp.plans import read_section
from nnunet_dp.sections import ByHand

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
    other_delta = r"otherwise \(delta 1e-05 there, 1e-06 now\)"
    for different, named in (({"delta": 1e-6}, other_delta), ({"compute": "small"}, "3d_fullres differently")):
        kept = written(folder)
        with pytest.raises(UsageRefusal, match=f"{named}.*--overwrite"):
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
        ({"dataset": "5"}, r"knows no dataset '5'.*there are: Dataset004_"),
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


@pytest.mark.parametrize("name", ["../evil", "a/b", "plans.json", ""])
def test_plans_are_never_written_outside_the_dataset(folder, name):
    with pytest.raises(UsageRefusal, match="without folder"):
        plan_dataset(DATASET, "3d_fullres", 8, output=name)


def test_an_epsilon_that_protects_nobody_is_refused(folder):
    with pytest.raises(UsageRefusal, match="1000"):
        plan_dataset(DATASET, "3d_fullres", 1e9)


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


def test_ordinary_plans_configure_themselves_to_the_default_budget_under_their_own_name(folder):
    plans = self_configured(ordinary_plans(), "3d_fullres", DATASET_JSON)
    section = read_section(plans)
    assert (plans["plans_name"], section.budget.epsilon, section.budget.delta) == ("nnUNetPlans", 8.0, 1e-5)
    assert plan_dataset("4", "3d_fullres", 8.0, public_start=False).section == section


# ---- several budgets ---------------------------------------------------------------------------------------------


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


def test_a_curve_reads_the_dataset_once_and_plans_as_if_each_budget_were_alone(folder, monkeypatch):
    alone = [plan_dataset("4", "2d", epsilon, 1e-5) for epsilon in (1.0, 8.0)]
    read: list[str] = []
    for name in ("_read_plans", "find_patients"):
        reader = getattr(nnunet_planning, name)
        monkeypatch.setattr(nnunet_planning, name, lambda *words, n=name, r=reader: read.append(n) or r(*words))
    curve = plan_curve("4", "2d", [1.0, 8.0], delta=1e-5)
    assert [report.section for report in curve] == [report.section for report in alone]
    assert read == ["_read_plans", "find_patients"]


def test_one_impossible_budget_of_a_curve_is_refused_before_anything_is_read(folder):
    patients_csv(raw(folder))
    with pytest.raises(UsageRefusal, match="epsilon should lie in"):
        plan_curve("4", "2d", [1.0, -1.0])
    assert not (folder / "patients.csv").exists()


def test_the_verdict_is_of_the_plan_as_it_stands(folder):
    usual = plan_dataset("4", "2d", 8.0, 1e-5)
    sparse = plan_dataset("4", "2d", 8.0, 1e-5, output="sparse", by_hand=ByHand(sampling_probability=0.1, steps=50))
    assert sparse.outlook.signal_to_noise < 0.9 * usual.outlook.signal_to_noise
    verdicts = [dict(report.lines())["verdict"] for report in (usual, sparse)]
    assert "by hand" not in verdicts[0] and "steps, sampling_probability set by hand" in verdicts[1]
