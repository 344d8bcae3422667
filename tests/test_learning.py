"""Learning spends a run's share once, within its budget, from real files; and its rules reach the model's folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from ordinary_plans import DATASET, ordinary_plans

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
    classes_from,
    read_morphology,
    write_morphology,
)
from nnunet_dp.nnunet import configuration_folder, data_digest, find_splits, patients_of_plan
from nnunet_dp.nnunet_files import SegmentationFiles
from nnunet_dp.planning import morphology, plan_configuration
from nnunet_dp.plans import with_section, write_json
from nnunet_dp.refined_folder import PICKLE
from nnunet_dp.run import LATEST, LEDGER, RunFolder, write_checkpoint
from nnunet_dp.sections import NOT_COVERED, MorphologyPlan, PrivacySection
from nnunet_dp.splits import fold_slots

DATASET_JSON = {
    "channel_names": {"0": "MRI"}, "labels": {"background": 0, "front": 1, "back": 2}, "file_ending": ".nii.gz",
}
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


def spoil(file: Path, fault: str) -> None:
    """A mask that cannot be read, or that holds no labels."""
    if fault == "lost":
        file.unlink()
    elif fault == "torn":
        file.write_bytes(b"torn")
    else:
        sitk.WriteImage(sitk.GetImageFromArray(np.full((4, 4, 4), 0.5, np.float32)), str(file))


@pytest.mark.parametrize("fault", ["lost", "torn", "halves"])
def test_a_patient_whose_mask_is_none_votes_nothing_and_stops_nobody(dataset, fold, fault, capfd, caplog):
    whole = votes_of_all(dataset)
    spoil(dataset / "gt_segmentations" / "walrus5_left.nii.gz", fault)
    votes = votes_of_all(dataset)
    assert not votes[5].any() and all(vote.any() for vote in whole)
    assert all(np.array_equal(votes[k], whole[k]) for k in range(8) if k != 5)
    assert learn_from(dataset, fold, plan()).kind == "private"
    assert "".join(capfd.readouterr()) == caplog.text == ""


@pytest.mark.parametrize("fault", [Exception, MemoryError, RecursionError, RuntimeWarning])
def test_whatever_reading_one_patient_raises_the_others_are_heard_and_the_user_may_still_stop(fault):
    class Reader:
        def read(self, file: Path):
            if file.name == "fault":
                raise fault
            return mask(front=True), SPACING, {}

    ballot = ballot_for(DATASET_JSON, SPACING, 8, 0.1)
    slots = [[Path("a")], [Path("a"), Path("fault")], [Path("a")]]
    votes = list(votes_of(ballot, slots, Reader(), 1, None))
    assert [bool(vote.any()) for vote in votes] == [True, False, True]
    Reader.read = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        list(votes_of(ballot, slots, Reader(), 1, None))


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


@pytest.mark.parametrize("way", ["no share", "charged and lost", "too few"])
def test_what_an_archived_run_had_learnt_is_taken_away_whichever_way_this_run_learns_nothing(dataset, fold, way):
    place(fold.parent, rules(KeepLargest(), kind="private"))
    chosen = plan(morphology_noise={"no share": None, "charged and lost": 0.4, "too few": 50.0}[way])
    if way == "charged and lost":
        ledger_of(fold, chosen).charge(chosen.morphology.charge(MORPHOLOGY, None))
    said(dataset, fold, chosen)
    if way == "too few":
        assert all(rule.operations == () for rule in read_morphology(fold.parent / FILE).classes)
    else:
        assert [item.name for item in fold.parent.iterdir()] == ["fold_0"]


def test_a_models_file_that_was_lost_is_written_again_from_what_its_folds_learnt(dataset, fold):
    said(dataset, fold, plan())
    for name in (FILE, PICKLE):
        (fold.parent / name).unlink()
    assert "learnt before" in said(dataset, fold, plan())
    assert read_morphology(fold.parent / FILE) == read_morphology(fold / FILE) and (fold.parent / PICKLE).is_file()


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


PAST = PrivacyBudget(epsilon=8, delta=1e-4, unit="case")
NOTHING_LEARNT = "nnUNetTrainerDP_AutoS__P__3d_fullres"


@pytest.fixture(scope="module")
def schedule():
    """A plan of twelve patients that gives enough to learning to be heard."""
    strides = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    return plan_configuration(
        PAST, 12, (40, 56, 40), strides, lambda _: 10**5, "small", morphology_share=0.4, classes=2
    )


@pytest.fixture
def past(tmp_path, schedule) -> tuple[Path, Path]:
    """A model that trained one step and has not learnt, and its preprocessed dataset."""
    folder, model = tmp_path / "preprocessed" / DATASET, tmp_path / "results" / DATASET / NOTHING_LEARNT
    for case in range(12):
        write_mask(folder / "gt_segmentations" / f"walrus{case:02}.nii.gz", mask(front=case % 2 == 0))
    (folder / "nnUNetPlans_3d_fullres").mkdir()
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    (model / "fold_0").mkdir(parents=True)
    past_run(model, folder, section_of(schedule))
    return model, folder


def section_of(chosen) -> PrivacySection:
    return PrivacySection(
        budget=PAST, patients=12, patients_file_sha256=None, source_plans="nnUNetPlans", public_weights_sha256=None,
        not_covered=NOT_COVERED, configurations={"3d_fullres": chosen},
    )  # fmt: skip


def past_run(model: Path, folder: Path, section: PrivacySection) -> None:
    """What a run leaves that died after its first step."""
    plans = with_section(ordinary_plans(), "P", section, {})
    write_json(plans, model / "plans.json")
    patients, chosen = patients_of_plan(folder, section), section.configurations["3d_fullres"]
    slots, _ = fold_slots(find_splits(folder, patients), 0, patients)
    private = chosen.privacy_plan(PAST, "auto_s", len(slots))
    run = RunFolder(model / "fold_0", folder / LEDGER, model.parent)
    ledger = run.start(private.digest(), False, unit="case", units=patients.table_sha256)
    ledger.charge(private.mechanism.charge("training", 0), "first")
    sequence, head = ledger.head
    data = data_digest(configuration_folder(folder, plans, "3d_fullres"), slots, chosen)
    state = {"id": "first", "run": ledger.run, "plan": private.digest(), "data": data, "step": 1}
    write_checkpoint({"private": state | {"ledger_sequence": sequence, "ledger_head": head}}, model / "fold_0" / LATEST)


def learn_past(past: tuple[Path, Path], **options) -> str:
    return learn_for_model(past[0], options.pop("fold", "0"), past[1], 1, None, **options)


def test_a_run_of_the_past_learns_once_at_the_price_its_plan_reserved(past, schedule):
    model, folder = past
    assert learn_past(past).startswith("Refinement learnt: front: ")
    trained, paid = read_ledger(folder / LEDGER)
    assert (paid.purpose, paid.run, paid.plan, paid.checkpoint) == (MORPHOLOGY, trained.run, trained.plan, "first")
    assert paid.noise_multiplier == schedule.morphology.noise_multiplier
    found = read_morphology(model / FILE)
    assert found == read_morphology(model / "fold_0" / FILE) and found.paid_by == (paid.run, 2)
    assert (model / "fold_0" / LEDGER).read_bytes() == (folder / LEDGER).read_bytes()


def test_a_second_learning_of_a_past_run_says_so_and_costs_nothing(past, monkeypatch):
    learn_past(past)
    before = (past[1] / LEDGER).read_bytes(), (past[0] / FILE).read_bytes()
    monkeypatch.setattr(RunFolder, "lock", lambda self: None)  # this process holds it until it ends
    assert "learnt before" in learn_past(past)
    assert ((past[1] / LEDGER).read_bytes(), (past[0] / FILE).read_bytes()) == before


def test_free_rules_make_way_for_learnt_ones_only_where_that_is_asked_and_nothing_is_charged_again(past, monkeypatch):
    model, folder = past
    free = classes_from(DATASET_JSON)
    place(model, free)
    said = learn_past(past)
    monkeypatch.setattr(RunFolder, "lock", lambda self: None)
    assert read_morphology(model / FILE) == free and " of 8 per case" in said
    assert "free rules are applied instead" in learn_past(past)
    assert "learnt before" in learn_past(past, overwrite=True)
    assert read_morphology(model / FILE) == read_morphology(model / "fold_0" / FILE) != free
    assert len(read_ledger(folder / LEDGER)) == 2


def test_while_its_training_runs_a_model_is_refused(past):
    RunFolder(past[0] / "fold_0", past[1] / LEDGER, past[0].parent).lock()
    with pytest.raises(Refusal, match="another training is writing"):
        learn_past(past)
    assert len(read_ledger(past[1] / LEDGER)) == 1


def test_a_fold_that_never_trained_is_refused(past):
    with pytest.raises(UsageRefusal, match="has no run in fold_3: train it"):
        learn_past(past, fold="3")


def test_a_model_whose_plan_gave_all_to_the_training_is_refused_with_the_free_ways(past, schedule):
    past_run(*past, section_of(schedule.model_copy(update={"morphology": None})))
    with pytest.raises(UsageRefusal, match=r"--no-morph.*would pass the target; --fixed FILE, --from-phantom"):
        learn_past(past)
    assert {entry.purpose for entry in read_ledger(past[1] / LEDGER)} == {"training"}


def test_a_dataset_that_changed_since_the_training_is_refused(past):
    for case in range(12):
        (past[1] / "nnUNetPlans_3d_fullres" / f"walrus{case:02}.b2nd").touch()
    with pytest.raises(Refusal, match="changed since the training") as caught:
        learn_past(past)
    assert "walrus" not in str(caught.value) and len(read_ledger(past[1] / LEDGER)) == 1


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


def test_rules_of_other_classes_in_a_later_fold_are_not_joined(fold):
    foreign = ClassRefinement(name="other", labels=(2,), writes=2, operations=(FillHoles(),))
    write_morphology(rules(KeepLargest()), fold / FILE)
    (fold.parent / "fold_1").mkdir()
    write_morphology(rules(classes=(foreign,)), fold.parent / "fold_1" / FILE)
    place(fold.parent)
    assert read_morphology(fold.parent / FILE) == rules(KeepLargest())


def test_given_rules_replace_free_ones_and_private_ones_never_do(fold):
    place(fold.parent, rules(FillHoles(), kind="fixed"))
    place(fold.parent, rules(KeepLargest(), kind="per_image"))
    assert read_morphology(fold.parent / FILE).kind == "per_image"
    before = (fold.parent / PICKLE).read_bytes()
    write_morphology(rules(FillHoles()), fold / FILE)
    place(fold.parent)
    assert read_morphology(fold.parent / FILE).kind == "per_image" and (fold.parent / PICKLE).read_bytes() == before


def test_rules_without_noise_in_a_folds_folder_are_never_placed(fold):
    write_morphology(rules(KeepLargest(), kind="not_private"), fold / FILE)
    place(fold.parent)
    assert not (fold.parent / FILE).exists()


def test_only_rules_that_this_run_paid_for_are_its_own(dataset, fold):
    chosen = plan()
    assert own_rules(fold, ledger_of(fold, chosen)) is None
    found = learn_from(dataset, fold, chosen)
    assert own_rules(fold, ledger_of(fold, chosen)) == read_morphology(fold / FILE) == found
    for changes in ({"kind": "fixed"}, {"provenance": found.provenance | {"ledger_sequence": 2}}):
        write_morphology(found.model_copy(update=changes), fold / FILE)
        assert own_rules(fold, ledger_of(fold, chosen)) is None
    write_morphology(found, fold / FILE)
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
