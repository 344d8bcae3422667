"""``nnunet-dp fingerprint``: what is charged, what nnU-Net makes of it, and what a plan may claim about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from doors import read_lines
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.charges import LedgerError, epsilon_of
from nnunet_dp.cli import main
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.ledger import read_ledger
from nnunet_dp.nnunet_dataset_fingerprint import Asked, fingerprint_dataset, from_phantoms, provenance_of
from nnunet_dp.nnunet_planning import plan_dataset
from nnunet_dp.phantoms import write_dataset
from nnunet_dp.sections import RAW_FINGERPRINT

LEDGER, DATASET = "privacy_ledger.jsonl", "Dataset004_PhantomLesion"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    for part in ("raw", "preprocessed", "results"):
        (tmp_path / part).mkdir()
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
    write_dataset(tmp_path / "raw", "lesion", 60, 3, dataset_id=4, shape=(40, 56))
    return tmp_path


@pytest.fixture
def folder(place) -> Path:
    return place / "preprocessed" / DATASET


ASKED = Asked("4", epsilon=8.0, delta=1e-4)


def planned(place: Path) -> dict:
    """nnU-Net's own planner, as ``nnUNetv2_plan_experiment`` calls it, and its reference segmentations."""
    plans = ExperimentPlanner("Dataset004_PhantomLesion").plan_experiment()
    references = place / "preprocessed" / DATASET / "gt_segmentations"
    references.mkdir()
    for label in (place / "raw" / DATASET / "labelsTr").iterdir():
        (references / label.name).write_bytes(label.read_bytes())
    return json.loads(json.dumps(plans))


def test_it_is_charged_once_and_nnunet_plans_on_it_as_always(place, folder):
    made = fingerprint_dataset(ASKED)
    assert (made.how, made.changed, made.unit) == ("private", True, "patient")
    (line,) = read_lines(folder / LEDGER)
    assert line["purpose"] == "fingerprint" and line["run"].startswith("fingerprint/")
    assert made.epsilon == pytest.approx(epsilon_of(read_ledger(folder / LEDGER), 1e-4))
    assert not fingerprint_dataset(ASKED).changed and len(read_lines(folder / LEDGER)) == 1
    told = json.loads((folder / "dataset_fingerprint.json").read_text())
    raw = [list(map(float, shape)) for shape in told["shapes_after_crop"]]
    assert len(raw) == 21 and all(shape[0] == 1 for shape in raw)  # pseudo cases, not the 94 there are
    plans = planned(place)
    assert plans["original_median_shape_after_transp"] == pytest.approx([1, 40, 56], rel=0.12)


def test_a_plan_that_follows_it_is_paid_from_the_same_budget_and_covers_it(place, folder):
    fingerprint_dataset(ASKED)
    planned(place)
    options = {"delta": 1e-4, "public_start": False}
    report = plan_dataset("4", "2d", 8.0, **options)
    plan, charged = report.section.configurations["2d"], read_ledger(folder / LEDGER)
    assert plan.fingerprint is not None and plan.fingerprint.run == charged[0].run
    assert RAW_FINGERPRINT not in report.section.not_covered and 7.9 < report.spent <= 8.0
    alone = plan.model_copy(update={"fingerprint": None}).privacy_plan(report.section.budget, "flat", 1).epsilon
    assert alone < 7.7  # it leaves room
    greedy = plan.privacy_plan(PrivacyBudget(epsilon=7.7, delta=1e-4), "flat", 1)
    with pytest.raises(Exception, match="would spend epsilon"):
        greedy.verify()
    (folder / LEDGER).unlink()
    with pytest.raises(LedgerError, match="put the ledger back"):
        plan_dataset("4", "2d", 4.0, **options)


@pytest.mark.parametrize("spoil", ["median", "spacing", "intensity"])
def test_plans_that_say_anything_else_are_taken_for_raw(place, folder, spoil):
    fingerprint_dataset(ASKED)
    plans = planned(place)
    assert provenance_of(folder, plans).fingerprint is not None
    if spoil == "median":
        plans["original_median_shape_after_transp"][1] += 1
    elif spoil == "spacing":
        plans["configurations"]["2d"]["spacing"] = [1.1, 1.1]
    else:
        plans["foreground_intensity_properties_per_channel"]["0"]["mean"] = 0.4
    found = provenance_of(folder, plans)
    assert found.fingerprint is None and found.public is None


def test_a_raw_fingerprint_is_never_taken_for_a_private_one_and_gives_way_only_when_asked(place, folder):
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    extractor = DatasetFingerprintExtractor(DATASET, 1)
    extractor.show_progress_bar = False
    extractor.run()
    assert provenance_of(folder, planned(place)).fingerprint is None
    report = plan_dataset("4", "2d", 8.0, delta=1e-4, public_start=False)
    assert RAW_FINGERPRINT in report.section.not_covered
    assert any("does NOT cover" in value for label, value in report.lines() if label == "plans from")
    with pytest.raises(UsageRefusal, match="a raw fingerprint, made from the images as they are"):
        fingerprint_dataset(ASKED)
    assert not (folder / LEDGER).exists()
    assert fingerprint_dataset(Asked("4", delta=1e-4, overwrite=True)).changed
    assert provenance_of(folder, json.loads((folder / "nnUNetPlans.json").read_text())).fingerprint is None


def test_where_it_would_drown_public_plans_are_made_and_the_numbers_said(place, folder, capsys):
    assert main(["fingerprint", "-d", "4", "--epsilon", "0.5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["how"] == "drowned" and "60 patients drown in the noise of epsilon 0.5" in told["reason"]
    assert "or epsilon" in told["reason"] and "nnUNetPlansPublic" in told["next_command"]
    assert not (folder / LEDGER).exists() and not (folder / "dataset_fingerprint.json").exists()


def test_public_plans_are_recognised_and_cost_nothing(place, folder):
    made = from_phantoms("4", "lesion", (40, 56))
    assert (made.how, made.epsilon, made.changed) == ("public", 0.0, True)
    assert not from_phantoms("4", "lesion", (40, 56)).changed
    (folder / "gt_segmentations").mkdir()
    for label in (place / "raw" / DATASET / "labelsTr").iterdir():
        (folder / "gt_segmentations" / label.name).write_bytes(label.read_bytes())
    report = plan_dataset("4", "2d", 8.0, delta=1e-4, plans="nnUNetPlansPublic", public_start=False)
    assert "phantom patients of kind lesion" in report.section.public_plans
    assert RAW_FINGERPRINT not in report.section.not_covered and not (folder / LEDGER).exists()
    plans = json.loads((folder / "nnUNetPlansPublic.json").read_text())
    plans["configurations"]["2d"]["batch_size"] += 1
    assert provenance_of(folder, plans).public is None


@pytest.mark.parametrize(
    "arguments",
    [("--share", "0.9"), ("--epsilon", "0"), ("--delta", "0.1"), ("--from-dataset", "5"), ("--no-patient-overlap",)],
)
def test_senseless_requests_are_refused_before_anything_is_read(place, folder, arguments, capsys):
    assert main(["fingerprint", "-d", "4", *arguments]) == 2
    assert not folder.exists() or not any(folder.iterdir())
