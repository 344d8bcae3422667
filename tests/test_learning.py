"""Learning spends a run's share once, within its budget, from real files; and its rules reach the model's folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from ordinary_plans import ordinary_plans

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.charges import MORPHOLOGY, epsilon_of
from nnunet_dp.clipping import make_rule
from nnunet_dp.dpsgd import PrivacyPlan
from nnunet_dp.errors import BudgetRefusal, Refusal, UsageRefusal
from nnunet_dp.learning import (
    RulesReport,
    ballot_for,
    boxes_around,
    learn_for_model,
    learn_for_run,
    learn_once,
    lines,
    own_rules,
    place,
    reference_facts,
    votes_of,
)
from nnunet_dp.ledger import Ledger, read_ledger
from nnunet_dp.morphology import (
    FILE,
    ClassRefinement,
    FillHoles,
    KeepLargest,
    Morphology,
    Opening,
    RemoveSmall,
    read_morphology,
    write_morphology,
)
from nnunet_dp.nnunet import SegmentationFiles
from nnunet_dp.planning import MorphologyPlan, morphology
from nnunet_dp.refined_folder import PICKLE
from nnunet_dp.run import LEDGER

DATASET_JSON = {"labels": {"background": 0, "front": 1, "back": 2}, "file_ending": ".nii.gz"}
PLANS = {"image_reader_writer": "SimpleITKIO"}
BUDGET = PrivacyBudget(epsilon=200, delta=1e-5)
SPACING = (1.0, 1.0, 2.0)


def plan(morphology_noise: float | None = 0.4, steps=8, noise=3.0, units=8, **changes) -> PrivacyPlan:
    budget = changes.pop("budget", BUDGET)
    rule = make_rule("flat", {"bound": 1.0})
    return PrivacyPlan(budget, steps, 1.0, noise, units, rule, morphology_noise)


def mask(front: bool) -> np.ndarray:
    """A front and a back box, with a piece cut off the back one."""
    image = np.zeros((10, 20, 20), np.uint8)
    if front:
        image[2:8, 2:9, 2:18] = 1
    image[2:8, 11:18, 2:18] = 2
    image[2:8, 11:18, 12:14] = 0
    return image


def write_mask(file: Path, image: np.ndarray, spacing_mm=SPACING) -> None:
    volume = sitk.GetImageFromArray(image)
    volume.SetSpacing(spacing_mm[::-1])
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(volume, str(file))


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Eight patients with two cases each, whose back is always in two pieces."""
    folder = tmp_path / "preprocessed"
    for patient in range(8):
        for side in ("left", "right"):
            file = folder / "gt_segmentations" / f"walrus{patient}_{side}.nii.gz"
            write_mask(file, mask(front=side == "left"))
    return folder


@pytest.fixture
def fold(tmp_path) -> Path:
    folder = tmp_path / "nnUNetTrainerDP__P__3d_fullres" / "fold_0"
    folder.mkdir(parents=True)
    return folder


def facts_of(dataset: Path, patients: int = 8, edges=SPACING, processes: int = 1):
    slots = {f"p{k}": (f"walrus{k}_left", f"walrus{k}_right") for k in range(patients)}
    plans = ordinary_plans() | PLANS
    plans["configurations"]["3d_fullres"]["spacing"] = list(edges)
    return reference_facts(dataset, slots, plans, DATASET_JSON, "3d_fullres", processes)


def ledger_of(fold: Path, chosen: PrivacyPlan, run: str = "model/fold_0/1") -> Ledger:
    return Ledger(fold.parent.parent / LEDGER, run, chosen.digest(), fold / LEDGER)


def learn_from(dataset: Path, fold: Path, chosen: PrivacyPlan, **more):
    facts = facts_of(dataset, **more)
    ballot = ballot_for(DATASET_JSON, facts.spacing_mm, len(facts.slots), chosen.morphology.noise_multiplier)
    files = SegmentationFiles(DATASET_JSON, PLANS)
    return learn_for_run(fold, chosen, ledger_of(fold, chosen), ballot, facts.slots, files, processes=facts.processes)


def votes_of_all(dataset: Path) -> list[np.ndarray]:
    facts = facts_of(dataset)
    ballot = ballot_for(DATASET_JSON, facts.spacing_mm, 8, 0.1)
    return list(votes_of(ballot, facts.slots, SegmentationFiles(DATASET_JSON, PLANS), 1, None))


# ---- a run learns ------------------------------------------------------------------------------------------------


def test_real_masks_are_read_once_a_patient_and_what_they_support_is_learnt(dataset, fold):
    chosen = plan(morphology_noise=0.1)
    found = learn_from(dataset, fold, chosen)
    given = found.provenance["answers"]
    deviation = found.provenance["noise_standard_deviation"]
    assert given["front"][0]["present"] == pytest.approx(8, abs=6 * 2 * deviation)  # cases without a front: no matter
    assert given["front"][0]["balance"] == pytest.approx(8, abs=6 * deviation)
    assert given["back"][0]["balance"] == pytest.approx(-8, abs=6 * deviation)
    assert [KeepLargest(least_kept=0.3) in rule.operations for rule in found.classes] == [True, False]
    assert read_morphology(fold / FILE) == found


def test_two_processes_read_what_one_reads(dataset):
    facts, told = facts_of(dataset), []
    ballot = ballot_for(DATASET_JSON, facts.spacing_mm, 8, 0.1)
    files = SegmentationFiles(DATASET_JSON, PLANS)
    one = list(votes_of(ballot, facts.slots, files, 1, None))
    two = list(votes_of(ballot, facts.slots, files, 2, lambda *found: told.append(found)))
    assert np.array_equal(one, two) and len(one) == 8
    assert told == [(done, 8) for done in range(1, 9)]


def test_learning_pays_one_line_and_the_runs_copy_has_it_too(dataset, fold):
    learn_from(dataset, fold, plan())
    (paid,) = read_ledger(fold.parent.parent / LEDGER)
    assert (paid.purpose, paid.noise_multiplier, paid.first_step) == (MORPHOLOGY, 0.4, None)
    assert (fold / LEDGER).read_bytes() == (fold.parent.parent / LEDGER).read_bytes()


def test_a_release_that_would_lift_the_run_above_its_budget_is_refused_before_it_is_charged(dataset, fold):
    modest = PrivacyBudget(epsilon=14, delta=1e-5)
    chosen = plan(budget=modest, morphology_noise=1.0, noise=6.0)
    chosen.verify()
    ledger = ledger_of(fold, chosen)
    ledger.charge(replace(chosen.mechanism, noise_multiplier=0.5).charge("training", 0, count=2))
    before = ledger.path.read_bytes()
    with pytest.raises(BudgetRefusal, match=r"its target is 14: nothing was charged"):
        learn_from(dataset, fold, chosen)
    assert ledger.path.read_bytes() == before and not (fold / FILE).exists()


def test_a_plan_that_would_pass_its_budget_is_refused_before_a_mask_is_read(fold):
    chosen = plan(budget=PrivacyBudget(epsilon=1, delta=1e-5))
    ballot = ballot_for(DATASET_JSON, SPACING, 8, 0.4)
    with pytest.raises(BudgetRefusal, match="would spend epsilon"):
        learn_for_run(fold, chosen, ledger_of(fold, chosen), ballot, [[fold / "absent.nii.gz"]], None)


def test_after_the_last_step_the_share_is_still_there_and_the_total_meets_the_plan(dataset, fold):
    chosen = plan()
    ledger = ledger_of(fold, chosen)
    ledger.charge(chosen.mechanism.charge("training", 0, count=chosen.steps))
    learn_from(dataset, fold, chosen)
    entries = read_ledger(ledger.path)
    assert epsilon_of(entries, BUDGET.delta) == pytest.approx(chosen.epsilon) and chosen.epsilon <= BUDGET.epsilon


def test_a_second_learning_is_refused_and_leaves_ledger_and_rules_alone(dataset, fold):
    found = learn_from(dataset, fold, plan())
    before = (fold / LEDGER).read_bytes()
    with pytest.raises(Refusal, match="charged already"):
        learn_from(dataset, fold, plan())
    assert (fold / LEDGER).read_bytes() == before and read_morphology(fold / FILE) == found


@pytest.mark.parametrize("content", [b"torn", None])
def test_a_patient_whose_mask_is_none_votes_nothing_and_stops_nobody(dataset, fold, content, capfd):
    whole = sum(votes_of_all(dataset))
    file = dataset / "gt_segmentations" / "walrus5_left.nii.gz"
    if content is None:
        image = sitk.GetImageFromArray(np.full((4, 4, 4), 0.5, np.float32))
        sitk.WriteImage(image, str(file))
    else:
        file.write_bytes(content)
    votes = votes_of_all(dataset)
    assert sum(not vote.any() for vote in votes) == 1 and not np.array_equal(sum(votes), whole)
    assert learn_from(dataset, fold, plan()).kind == "private"
    assert "walrus5" not in "".join(capfd.readouterr())


# ---- learn once --------------------------------------------------------------------------------------------------


def said(dataset: Path, fold: Path, chosen: PrivacyPlan, **more) -> str:
    return learn_once(fold, chosen, ledger_of(fold, chosen), facts_of(dataset, **more))


def test_a_training_learns_once_and_says_what(dataset, fold):
    first = said(dataset, fold, plan(morphology_noise=0.1))
    assert first.startswith("Refinement learnt: front: ") and "keep_largest" in first
    assert read_morphology(fold.parent / FILE) == read_morphology(fold / FILE)
    assert (fold.parent / PICKLE).is_file()
    assert "learnt before" in said(dataset, fold, plan(morphology_noise=0.1))
    assert len(read_ledger(fold.parent.parent / LEDGER)) == 1


def test_a_run_that_died_between_charge_and_file_is_not_charged_again(dataset, fold):
    chosen = plan()
    ledger_of(fold, chosen).charge(chosen.morphology.charge(MORPHOLOGY, None))
    assert "charged, but the run died" in said(dataset, fold, chosen)
    assert len(read_ledger(fold.parent.parent / LEDGER)) == 1 and not (fold / FILE).exists()


def test_a_plan_without_a_share_learns_nothing(dataset, fold):
    assert "gives its whole budget to the training" in said(dataset, fold, plan(morphology_noise=None))
    assert not (fold.parent.parent / LEDGER).exists() and not (fold / FILE).exists()


def test_too_few_patients_for_the_noise_are_asked_nothing_and_charged_nothing(dataset, fold):
    assert "nothing is asked, nothing charged" in said(dataset, fold, plan(morphology_noise=50.0))
    assert not (fold.parent.parent / LEDGER).exists()
    found = read_morphology(fold.parent / FILE)
    assert found.kind == "private" and all(rule.operations == () for rule in found.classes)


def test_nothing_that_is_said_names_a_case_or_a_patient(dataset, fold):
    text = said(dataset, fold, plan(morphology_noise=0.1)) + (fold / FILE).read_text() + repr(facts_of(dataset))
    assert "walrus" not in text and "p3" not in text


def test_radii_come_from_the_configuration_and_not_from_the_images(dataset, fold):
    ballot = ballot_for(DATASET_JSON, facts_of(dataset, edges=(3.0, 0.5, 0.5)).spacing_mm, 8, 0.01)
    radii = [q.operation.radius_mm for q in ballot.questions if isinstance(q.operation, Opening)]
    assert radii == [0.5]
    assert [rule.name for rule in ballot.classes] == ["front", "back"]


@pytest.mark.parametrize("same", [True, False])
def test_a_spacing_common_to_all_images_is_known_to_the_pickle_and_another_is_not(dataset, fold, same):
    spacings = [[2.0, 1.0, 1.0], [2.0, 1.0, 1.0 if same else 0.5]]
    (dataset / "dataset_fingerprint.json").write_text(json.dumps({"spacings": spacings}))
    assert facts_of(dataset).common_spacing_mm == ((2.0, 1.0, 1.0) if same else None)


# ---- learning for a model of the past ----------------------------------------------------------------------------


def test_a_folder_that_is_no_private_model_is_refused_with_the_free_ways(tmp_path):
    for name in ("nnUNetTrainer__nnUNetPlans__2d", "nnUNetTrainerDP__nnUNetPlans__2d"):
        (tmp_path / name).mkdir()
        with pytest.raises(UsageRefusal, match=r"is no private model.*--per-image"):
            learn_for_model(tmp_path / name, "0", tmp_path, 1, None)


# ---- where rules go ----------------------------------------------------------------------------------------------


def rules(*operations, **changes) -> Morphology:
    rule = ClassRefinement(name="lesion", labels=(1,), writes=1, operations=operations)
    return Morphology(**{"kind": "private", "classes": (rule,)} | changes)


def test_what_the_folds_agree_on_is_placed(fold):
    model = fold.parent
    write_morphology(rules(KeepLargest(), FillHoles()), fold / FILE)
    assert place(model) == ()
    assert read_morphology(model / FILE).classes[0].operations == (KeepLargest(), FillHoles())
    (model / "fold_1").mkdir()
    write_morphology(rules(FillHoles()), model / "fold_1" / FILE)
    place(model)
    assert read_morphology(model / FILE).classes[0].operations == (FillHoles(),)


def test_a_model_whose_folds_learnt_nothing_has_nothing_to_place(fold):
    write_morphology(rules(KeepLargest(), kind="private"), fold.parent / FILE)  # of a run that was archived since
    (fold.parent / PICKLE).write_bytes(b"of the same run")
    assert place(fold.parent) == ()
    assert [item.name for item in fold.parent.iterdir()] == ["fold_0"]


def test_free_rules_stay_when_a_training_learns(fold):
    place(fold.parent, rules(FillHoles(), kind="fixed"))
    write_morphology(rules(KeepLargest(), kind="private"), fold / FILE)
    place(fold.parent)
    assert read_morphology(fold.parent / FILE) == rules(FillHoles(), kind="fixed")


def test_rules_without_noise_in_a_folds_folder_are_never_placed(fold):
    write_morphology(rules(KeepLargest(), kind="not_private"), fold / FILE)
    place(fold.parent)
    assert not (fold.parent / FILE).exists()


def test_only_rules_that_this_run_paid_for_are_its_own(dataset, fold):
    chosen = plan()
    learn_from(dataset, fold, chosen)
    assert own_rules(fold, ledger_of(fold, chosen)) == read_morphology(fold / FILE)
    assert own_rules(fold, ledger_of(fold, chosen, run="model/fold_0/2")) is None
    write_morphology(rules(KeepLargest(), kind="private"), fold / FILE)
    assert own_rules(fold, ledger_of(fold, chosen)) is None


def test_operations_in_millimetres_are_dropped_from_the_pickle_only_and_named(fold):
    chosen = rules(Opening(radius_mm=1.0), KeepLargest())
    assert place(fold.parent, chosen) == ("opening of lesion",)
    assert read_morphology(fold.parent / FILE) == chosen
    assert place(fold.parent, chosen, spacing_mm=(1.0, 1.0)) == ()


def test_rules_are_told_to_people_and_to_programs(fold):
    chosen = rules(Opening(radius_mm=1.0, least_kept=0.9), RemoveSmall(below_share=0.5), kind="fixed")
    place(fold.parent, chosen)
    report = RulesReport(fold.parent)
    assert Morphology.model_validate(report.as_dict()) == chosen
    assert report.lines()[0] == ("model", fold.parent.name)
    words = dict(lines(chosen))["  lesion"]
    assert words.index("opening") < words.index('"radius_mm": 1.0') < words.index("remove_small")
    assert dict(lines(rules()))["  lesion"] == "left alone"


@pytest.mark.parametrize(
    ("radius_mm", "spacing_mm", "box"),
    [(3.0, (1.0, 1.0), (3, 3)), (4.0, (2.5, 0.8, 0.8), (1, 5, 5)), (0.3, (0.1, 5.0), (3, 0))],
)
def test_the_box_in_the_network_reaches_as_far_as_the_ball_of_the_rules(radius_mm, spacing_mm, box):
    assert boxes_around(rules(KeepLargest(), Opening(radius_mm=radius_mm)), spacing_mm) == (box,)
    assert boxes_around(rules(KeepLargest()), spacing_mm) == ((0,) * len(spacing_mm),)


# ---- the price ---------------------------------------------------------------------------------------------------


def test_the_share_is_a_full_batch_release_of_the_plan():
    share = morphology(PrivacyBudget(epsilon=8, delta=1e-5), 0.04, patients=170, classes=2)
    assert isinstance(share, MorphologyPlan)
    assert plan(morphology_noise=share.noise_multiplier).morphology.sampling_probability == 1
