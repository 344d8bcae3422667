"""A dataset's checkup on a real one: sound as it comes, each spoilt thing is a problem, and nothing is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from doors import LEDGER, Workplace, edit_json, lesion, private_words

from nnunet_dp import nnunet_checkup
from nnunet_dp.checkup import Finding
from nnunet_dp.ledger import Charge, Ledger
from nnunet_dp.nnunet_checkup import DatasetCheckup

PRIVATE = "nnUNetPlansDP_eps8"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """2D with private plans; neither split nor ledger."""
    place = lesion(tmp_path_factory.getbasetemp()).copied_to(tmp_path_factory.mktemp("checked"))
    for file in (LEDGER, "splits_final.json"):
        (place.preprocessed / file).unlink(missing_ok=True)
    shutil.rmtree(place.results, ignore_errors=True)
    place.plan("--epsilon", 8, "--compute", "small")
    return place


@pytest.fixture
def place(planned: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A copy to spoil, in this process's environment."""
    copy = planned.copied_to(tmp_path)
    for part in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{part}", str(copy.root / part))
    return copy


def findings(plans: str = PRIVATE, configuration: str | None = "2d", cases: int = 3) -> dict[str, Finding]:
    return {one.what: one for one in DatasetCheckup("312", configuration, plans, cases).findings()}


def test_a_sound_dataset_has_no_problem_and_nothing_is_written(place):
    before = {file: file.stat().st_mtime_ns for file in place.root.rglob("*")}
    found = findings()
    assert [one for one in found.values() if not one.ok] == [] and len(found) == 12
    assert {file: file.stat().st_mtime_ns for file in place.root.rglob("*")} == before
    assert "10 units (patient) with 16 cases" in found["patients"].found and "to be made" in found["split"].found
    assert "switch it off" in found["batch dice"].found and "InstanceNorm2d" in found["network"].found


def test_ordinary_plans_are_fine_and_their_memory_is_not_measured(place):
    found = findings("nnUNetPlans")
    assert found["plans"].ok and "memory" not in found


def test_without_a_configuration_what_depends_on_it_is_left_out(place):
    assert "network" not in findings(configuration=None)


@pytest.mark.parametrize("part", ["preprocessed", "results"])
def test_a_folder_of_the_dataset_that_cannot_be_written_to_is_a_problem(place, monkeypatch, part):
    locked = place.root / part / place.preprocessed.name
    locked.mkdir(parents=True, exist_ok=True)
    assert findings()["dataset's folders"].ok
    write_into = nnunet_checkup.write_into

    def refuse(folder: Path) -> None:
        if folder == locked:
            raise OSError(30, "Read-only file system", str(folder))
        write_into(folder)

    monkeypatch.setattr(nnunet_checkup, "write_into", refuse)
    finding = findings()["dataset's folders"]
    assert not finding.ok and str(locked) in finding.found and locked.name in finding.remedy


def test_without_patients_the_unit_is_the_case(place):
    (place.raw / "patients.csv").unlink()
    (place.preprocessed / "patients.csv").unlink(missing_ok=True)
    found = findings("nnUNetPlans")
    assert found["patients"].ok and "the unit is the case (16)" in found["patients"].found


def test_an_unknown_dataset_is_two_problems_and_no_traceback(place):
    found = list(DatasetCheckup("999").findings())
    assert [one.ok for one in found] == [False, False]


def batch_norm(place: Workplace) -> None:
    def edit(plans: dict[str, Any]) -> None:
        plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["norm_op"] = "torch.nn.BatchNorm2d"

    place.edit_plans(PRIVATE, edit)


def torn_patient(place: Workplace) -> None:
    rows = [row.split(",") for row in (place.raw / "patients.csv").read_text().split()[1:]]
    patients = [patient for _, patient in rows]
    torn = next(patient for patient in patients if patients.count(patient) == 2)
    validation = [case for case, patient in rows if patient == torn][:1]
    fold = {"train": [case for case, _ in rows if case not in validation], "val": validation}
    (place.preprocessed / "splits_final.json").write_text(json.dumps([fold] * 5))


def edited_ledger(place: Workplace) -> None:
    ledger = Ledger(place.preprocessed / LEDGER, "a/fold_0/1", "0a")
    ledger.charge(Charge(purpose="training", mechanism="gaussian", noise_multiplier=5.0, first_step=0))
    ledger.path.write_text(ledger.path.read_text().replace("5.0", "6.0"))


def lost_ledger(place: Workplace) -> None:
    fold = place.results / "nnUNetTrainerDP__P__2d" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").touch()


def damaged(pattern: str) -> Callable[[Workplace], None]:
    return lambda place: sorted(place.root.glob(pattern))[0].write_bytes(b"no image")


def blank_patient(place: Workplace) -> None:
    with (place.raw / "patients.csv").open("a") as file:
        file.write("lesion_999,\n")


def unknown_raw_label(place: Workplace) -> None:
    edit_json(place.raw / "dataset.json", lambda content: content.update(labels={"background": 0, "other": 3}))


SPOILT: dict[str, tuple[Callable[[Workplace], object], set[str], str]] = {
    "raw image": (damaged("raw/*/imagesTr/*"), {"raw dataset"}, "no. 1"),
    "raw label": (unknown_raw_label, {"raw dataset"}, "no. 1, 2, 3"),
    "preprocessed case": (damaged("preprocessed/*/nnUNetPlans_2d/*.b2nd"), {"preprocessed cases"}, "line 1"),
    "reference": (damaged("preprocessed/*/gt_segmentations/*"), {"preprocessed cases"}, "line 1"),
    "no configuration": (lambda p: shutil.rmtree(p.preprocessed / "nnUNetPlans_2d"), {"preprocessed cases"}, "no nnUN"),
    "patients": (blank_patient, {"patients", "plans"}, "blank patient"),
    "split": (torn_patient, {"split"}, "both sides"),
    "BatchNorm": (batch_norm, {"network"}, "BatchNorm2d"),
    "ledger": (edited_ledger, {"ledger", "patients", "plans"}, "line 1"),
    "lost ledger": (lost_ledger, {"ledger"}, "private models of this dataset exist"),
    "plans": (lambda p: (p.preprocessed / f"{PRIVATE}.json").write_text("{"), {"plans"}, "should hold JSON"),
    "no plans": (lambda p: (p.preprocessed / f"{PRIVATE}.json").unlink(), {"plans"}, "should be readable"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_each_spoilt_thing_is_a_problem_with_a_remedy_and_without_a_name(spoilt, place):
    spoil, problems, words = SPOILT[spoilt]
    spoil(place)
    found = [one for one in findings().values() if not one.ok]
    assert {one.what for one in found} <= problems and found
    assert words in " ".join(one.found for one in found) and all(one.remedy for one in found)
    said = " ".join(one.plain() for one in found)
    assert not [word for word in private_words(place) if word and word in said]


def test_too_little_memory_is_a_problem(place, monkeypatch):
    monkeypatch.setattr(nnunet_checkup, "available_memory_bytes", lambda device: 1000)
    assert not findings()["memory"].ok


def test_a_ledger_is_counted_and_a_torn_line_told(place):
    ledger = Ledger(place.preprocessed / LEDGER, "a/fold_0/1", "0a", unit="patient", units=_units(place))
    ledger.charge(Charge(purpose="training", mechanism="gaussian", noise_multiplier=5.0, first_step=0))
    with ledger.path.open("a") as file:
        file.write('{"torn')
    found = findings(cases=1)["ledger"]
    assert found.ok and "1 lines, the chain holds" in found.found and "torn" in found.found


def _units(place: Workplace) -> str:
    from nnunet_dp.nnunet import known_patients

    return known_patients(place.preprocessed)[0].table_sha256
