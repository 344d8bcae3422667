"""Status is computed from the ledger, and refuses where ledger and model disagree."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from ordinary_plans import DATASET, ordinary_plans

from nnunet_dp import status
from nnunet_dp.accounting import ACCOUNTANT, PrivacyBudget
from nnunet_dp.charges import MORPHOLOGY, LedgerError, epsilon_of
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.ledger import Ledger, TornLineWarning, read_ledger
from nnunet_dp.mechanisms import SubsampledGaussian
from nnunet_dp.morphology import FILE, ClassRefinement, Morphology, write_morphology
from nnunet_dp.planning import plan_configuration
from nnunet_dp.plans import with_section, write_json
from nnunet_dp.run import FINAL, LATEST, LEDGER, write_checkpoint
from nnunet_dp.sections import NOT_COVERED, PrivacySection
from nnunet_dp.status import read_status

BUDGET = PrivacyBudget(epsilon=8, delta=1e-4, unit="patient (inferred)")
STRIDES = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
PLAN = plan_configuration(BUDGET, 170, (40, 56, 40), STRIDES, lambda shape: 135 * sum(f * f for f in shape), "small")
MECHANISM = SubsampledGaussian(PLAN.noise_multiplier, PLAN.sampling_probability)


@pytest.fixture
def fold(tmp_path, monkeypatch) -> Path:
    """The fold's folder of a model, with a dataset ledger still to be written."""
    folder = tmp_path / "results" / DATASET / "nnUNetTrainerDP__nnUNetPlansDP_eps8__3d_fullres" / "fold_0"
    folder.mkdir(parents=True)
    (tmp_path / "preprocessed" / DATASET).mkdir(parents=True)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    section = PrivacySection(
        budget=BUDGET,
        patients=170,
        patients_file_sha256=None,
        source_plans="nnUNetPlans",
        public_weights_sha256=None,
        not_covered=NOT_COVERED,
        configurations={"3d_fullres": PLAN},
    )
    write_json(with_section(ordinary_plans(), "nnUNetPlansDP_eps8", section, {}), folder.parent / "plans.json")
    return folder


def dataset_ledger(fold: Path) -> Path:
    return fold.parents[3] / "preprocessed" / DATASET / LEDGER


def charge(fold: Path, steps, run: str = "model/fold_0/1", copy: bool = True) -> None:
    ledger = Ledger(dataset_ledger(fold), run, "0a", fold / LEDGER if copy else None, BUDGET.unit)
    for step in steps:
        ledger.charge(MECHANISM.charge("training", step))


def ended(charges: int, steps: int, run: str = "model/fold_0/1", trainer: str = "nnUNetTrainerDP") -> dict[str, Any]:
    return {"init_args": {"run": run, "charges": charges, "steps": steps}, "trainer_name": trainer}


def finish(fold: Path, **told: Any) -> None:
    """Write the final checkpoint."""
    write_checkpoint(ended(**told), fold / FINAL)


@pytest.mark.parametrize("other", [{"run": "model/fold_0/2"}, {"trainer": "nnUNetTrainerDP_PSAC"}])
def test_the_final_checkpoint_of_another_run_or_trainer_is_refused(fold, other):
    charge(fold, range(3))
    finish(fold, charges=3, steps=3, **other)
    with pytest.raises(Refusal, match="written by another run or trainer"):
        read_status(fold)


def test_a_run_without_a_charge_has_spent_nothing(fold):
    found = read_status(fold)
    assert (found.epsilon_spent, found.epsilon_dataset_total, found.steps_done, found.entries) == (0, None, 0, 0)
    assert found.accountant == ACCOUNTANT


def test_epsilon_is_that_of_the_ledgers_lines(fold):
    charge(fold, range(5))
    found = read_status(fold)
    assert found.epsilon_spent == epsilon_of(read_ledger(dataset_ledger(fold)), BUDGET.delta) > 0
    assert found.epsilon_spent == found.epsilon_dataset_total


def learn(fold: Path, run: str = "model/fold_0/1") -> None:
    """Charge what refinement learns."""
    mechanism = SubsampledGaussian(PLAN.morphology.noise_multiplier)
    Ledger(dataset_ledger(fold), run, "0a", fold / LEDGER, BUDGET.unit).charge(mechanism.charge(MORPHOLOGY, None))


def test_a_finished_schedule_has_spent_its_target_and_no_more(fold):
    learn(fold)
    charge(fold, range(PLAN.steps))
    found = read_status(fold)
    assert 0.99 * 8 <= found.epsilon_spent <= found.epsilon_target == 8
    assert found.steps_done == found.steps_planned == PLAN.steps


def test_the_datasets_total_counts_every_run_and_the_spent_one_only_this(fold):
    charge(fold, range(3))
    alone = read_status(fold)
    charge(fold, range(4), run="other/fold_1/1", copy=False)
    both = read_status(fold)
    assert both.epsilon_spent == alone.epsilon_spent == alone.epsilon_dataset_total
    assert both.epsilon_dataset_total == epsilon_of(read_ledger(dataset_ledger(fold)), BUDGET.delta)
    assert both.epsilon_dataset_total > both.epsilon_spent


def test_steps_that_a_crash_lost_are_wasted_and_stay_spent(fold):
    charge(fold, [0, 1, 2, 1, 2, 3])
    found = read_status(fold)
    assert (found.steps_done, found.steps_wasted, found.entries) == (4, 2, 6)
    assert dict(found.lines())["steps"] == f"4 of {PLAN.steps}, 2 lost in crashes and charged; not finished"


def test_only_the_newest_run_of_the_folder_is_reported(fold):
    charge(fold, range(3))
    charge(fold, range(2), run="model/fold_0/2")
    assert (read_status(fold).run, read_status(fold).entries) == ("model/fold_0/2", 2)


def test_the_line_that_a_crash_left_out_of_the_copy_counts(fold):
    charge(fold, [0, 1])
    charge(fold, [2], copy=False)
    assert read_status(fold).entries == 3


@pytest.mark.parametrize("elsewhere", ["no variable", "no file"])
def test_without_the_datasets_ledger_its_total_is_unknown_and_said_so(fold, monkeypatch, elsewhere):
    charge(fold, range(3))
    if elsewhere == "no variable":
        monkeypatch.delenv("nnUNet_preprocessed")
    else:
        dataset_ledger(fold).unlink()
    found = read_status(fold)
    assert found.epsilon_dataset_total is None and found.entries == 3 and found.epsilon_spent > 0
    assert dict(found.lines())["dataset"].startswith("unknown")


def test_a_dataset_ledger_that_lost_lines_of_the_run_is_refused(fold):
    charge(fold, range(3))
    lines = dataset_ledger(fold).read_bytes().splitlines(keepends=True)
    dataset_ledger(fold).write_bytes(b"".join(lines[:-1]))
    with pytest.raises(Refusal, match="missing from the dataset's"):
        read_status(fold)


@pytest.mark.parametrize("which", ["dataset", "copy"])
def test_an_edited_line_is_refused(fold, which):
    charge(fold, range(3))
    file = dataset_ledger(fold) if which == "dataset" else fold / LEDGER
    file.write_text(file.read_text().replace('"first_step":1', '"first_step":7'))
    with pytest.raises(LedgerError, match="line 2"):
        read_status(fold)


def test_the_json_holds_the_promised_keys_and_survives_json(fold):
    charge(fold, range(2))
    found = read_status(fold).as_dict()
    promised = (
        "epsilon_spent epsilon_target epsilon_dataset_total delta unit relation accountant covers not_covered "
        "steps_done steps_planned steps_wasted noise_multiplier sampling_probability patients entries"
    )
    assert set(found) == {*promised.split(), "run", "finished", "released_without_guarantee"}
    assert json.loads(json.dumps(found)) == found
    assert found["not_covered"] == sorted(NOT_COVERED)


def test_wherever_epsilon_is_printed_delta_and_unit_are_printed_too(fold):
    lines = dict(read_status(fold).lines())
    assert lines["spent"] == "epsilon 0 of 8 at delta 0.0001 per patient (inferred)"
    assert lines["unit"] == "patient (inferred) (170 in the dataset), relation zero-out"


def test_finished_means_that_the_final_model_is_there(fold):
    charge(fold, [0])
    assert not read_status(fold).finished
    finish(fold, charges=1, steps=1)
    assert read_status(fold).finished


@pytest.mark.parametrize(
    ("name", "content"), [(FINAL, ended(4, 4)), (LATEST, {"private": {"step": 4}})]
)
def test_a_checkpoint_that_proves_more_charges_than_there_are_lines_is_refused(fold, name, content):
    charge(fold, range(3))
    write_checkpoint(content, fold / name)
    with pytest.raises(Refusal, match="proves at least 4 charges, found 3 in the ledger"):
        read_status(fold)
    charge(fold, [3])
    assert read_status(fold).entries == 4


def test_status_is_safe_while_a_training_writes(fold):
    writer = threading.Thread(target=charge, args=(fold, range(40)))
    writer.start()
    seen = []
    while writer.is_alive():
        found = read_status(fold)
        seen.append(found.entries)
        assert found.steps_done == found.entries
    writer.join()
    assert seen == sorted(seen) and len(set(seen)) > 2
    assert read_status(fold).entries == 40


def test_a_line_whose_writer_died_in_the_middle_is_left_out(fold):
    charge(fold, range(2))
    with open(dataset_ledger(fold), "a") as ledger:
        ledger.write('{"count":1,')
    with pytest.warns(TornLineWarning):
        assert read_status(fold).entries == 2


def test_a_step_that_a_crash_lost_for_good_is_not_called_done(fold):
    charge(fold, [0, 1, 2, 3])
    finish(fold, charges=4, steps=3)
    found = read_status(fold)
    assert (found.steps_done, found.steps_wasted) == (3, 1)


def test_learning_for_refinement_is_spent_but_neither_a_step_nor_a_wasted_one(fold):
    learn(fold)
    charge(fold, range(4))
    running = read_status(fold)
    assert (running.steps_done, running.steps_wasted, running.entries) == (4, 0, 5)
    assert running.epsilon_spent == epsilon_of(read_ledger(dataset_ledger(fold)), BUDGET.delta)
    finish(fold, charges=4, steps=4)
    finished = read_status(fold)
    assert (finished.steps_done, finished.steps_wasted) == (4, 0)


def test_the_line_of_morphology_does_not_stand_in_for_a_lost_step(fold):
    learn(fold)
    charge(fold, range(3))
    finish(fold, charges=4, steps=4)
    with pytest.raises(Refusal, match="proves at least 4 charges"):
        read_status(fold)


def test_the_final_checkpoint_proves_the_vote_too(fold):
    charge(fold, range(4))
    finish(fold, charges=5, steps=4)
    with pytest.raises(Refusal, match="proves at least 5 charges, found 4"):
        read_status(fold)
    learn(fold)
    assert (read_status(fold).steps_done, read_status(fold).entries) == (4, 5)


def rules(kind: str = "private", **provenance) -> Morphology:
    lesion = ClassRefinement(name="lesion", labels=(1,), writes=1)
    return Morphology(kind=kind, classes=(lesion,), provenance=provenance)


def test_rules_of_the_fold_are_paid_by_a_line_of_its_run(fold):
    charge(fold, range(2))
    learn(fold)
    write_morphology(rules(ledger_run="model/fold_0/1", ledger_sequence=3), fold / FILE)
    assert read_status(fold).entries == 3


@pytest.mark.parametrize(("run", "sequence"), [("model/fold_0/1", 1), ("model/fold_0/1", 4), ("model/fold_0/2", 3)])
def test_rules_that_no_line_of_the_run_paid_for_are_refused(fold, run, sequence):
    charge(fold, range(2))
    learn(fold)
    charge(fold, [2])
    write_morphology(rules(ledger_run=run, ledger_sequence=sequence), fold / FILE)
    with pytest.raises(Refusal, match="no charge paid for it"):
        read_status(fold)


def test_what_another_run_learnt_on_the_dataset_pays_for_no_rules_here(fold):
    learn(fold, run="model/fold_1/1")
    (fold / LEDGER).unlink()
    charge(fold, [0])
    write_morphology(rules(ledger_run="model/fold_1/1", ledger_sequence=1), fold / FILE)
    with pytest.raises(Refusal, match="no charge paid for it"):
        read_status(fold)


def test_rules_that_asked_no_patient_need_no_charge(fold):
    charge(fold, [0])
    for free in (rules(nothing_released="too few patients"), rules("fixed")):
        write_morphology(free, fold / FILE)
        assert read_status(fold).entries == 1


def test_a_copied_running_checkpoint_is_no_finished_model(fold):
    charge(fold, [0])
    write_checkpoint({"private": {"step": 1}}, fold / FINAL)
    with pytest.raises(Refusal, match="not written at the end"):
        read_status(fold)


def test_a_model_that_nnunet_trained_on_private_plans_is_called_unprotected(fold):
    plain = fold.parent.with_name(fold.parent.name.replace(fold.parent.name.split("__")[0], "nnUNetTrainer"))
    fold.parent.rename(plain)
    with pytest.raises(UsageRefusal, match="without privacy"):
        read_status(plain / fold.name)


@pytest.mark.parametrize("wrong", ["no plans", "no fold", "no privacy"])
def test_a_folder_without_a_private_training_is_refused(fold, wrong):
    if wrong == "no plans":
        (fold.parent / "plans.json").unlink()
    if wrong == "no privacy":
        write_json(ordinary_plans(), fold.parent / "plans.json")
    with pytest.raises(UsageRefusal):
        read_status(fold.parent if wrong == "no fold" else fold)


def test_a_model_whose_own_lines_are_gone_is_not_reported_as_free(fold, monkeypatch):
    charge(fold, range(3), run=f"{fold.parent.name}/fold_0/1")
    finish(fold, charges=3, steps=3, run=f"{fold.parent.name}/fold_0/1")
    (fold / LEDGER).unlink()
    assert read_status(fold).entries == 3
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(Refusal, match="proves at least 3 charges, found 0"):
        read_status(fold)


def test_a_checkpoint_that_is_written_while_status_reads_is_no_loss(fold, monkeypatch):
    charge(fold, range(3))
    read = status._dataset_entries

    def read_and_train_on(dataset):
        found = read(dataset)
        charge(fold, [3, 4])
        write_checkpoint({"private": {"step": 5}}, fold / LATEST)
        return found

    monkeypatch.setattr(status, "_dataset_entries", read_and_train_on)
    assert read_status(fold).entries >= 3
