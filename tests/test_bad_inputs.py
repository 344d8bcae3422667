"""Bad input through the doors: each is one clear error, before any charge, without a traceback, and nothing is lost.

``COMMANDS`` holds what `nnunet-dp` refuses while it plans, in this process. ``TRAININGS`` holds what spoils a dataset
after it was planned: each row is one `nnUNetv2_train` in a subprocess, some of them slow. The faults of cases, one by
one, are in ``test_nnunet_cases.py``.
"""

import fcntl
import json
import resource
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
from doors import (
    LEDGER,
    Model,
    Workplace,
    bound_by_permissions,
    chain_holds,
    edit_json,
    hippocampus,
    lesion,
    linked,
    private_words,
    unlinked_nnunet,
    wait_until,
)

from nnunet_dp.cli import main
from nnunet_dp.nnunet_cases import KEPT

PRIVATE = "nnUNetPlansDP_eps8"
PLAN = ("plan", "-d", "312", "-c", "2d", "--no-start", "-o", "Bad")
FINGERPRINT = ("fingerprint", "-d", "312", "--overwrite")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """2D with private plans of two steps, never trained."""
    place = linked(lesion(tmp_path_factory.getbasetemp())).copied_to(tmp_path_factory.mktemp("planned"))
    shutil.rmtree(place.results, ignore_errors=True)
    (place.preprocessed / LEDGER).unlink(missing_ok=True)
    place.plan("--epsilon", 8, "--compute", "small")

    set_steps(place, 2)
    return place


def set_steps(place: Workplace, steps: int) -> None:
    """Another schedule with so much noise that its budget is never reached."""

    def edit(content: dict[str, Any]) -> None:
        plan = content["differential_privacy"]["configurations"]["2d"]
        plan["steps"], plan["noise_multiplier"] = steps, 20.0

    place.edit_plans(PRIVATE, edit)


@pytest.fixture
def place(planned: Workplace, tmp_path: Path) -> Workplace:
    """A copy to spoil."""
    return planned.copied_to(tmp_path)


def files_of(place: Workplace) -> dict[str, bytes]:
    """Every file of the dataset and its models but what a training writes for itself (logs, what it has read)."""
    folders = (place.raw, place.preprocessed, place.results)
    files = (file for folder in folders if folder.is_dir() for file in folder.rglob("*") if file.is_file())
    own = ("training_log", "training.lock", "splits_final")
    kept = (file for file in files if not file.name.startswith(own) and file.parent.name != KEPT)
    return {str(file): file.read_bytes() for file in kept}


# ---- nnunet-dp ---------------------------------------------------------------------------------------------------


def table(edit: Callable[[list[str]], list[str]]) -> Callable[[Workplace], tuple[str, ...]]:
    """Options that name an edited patients file."""

    def options(place: Workplace) -> tuple[str, ...]:
        file = place.root / "people.csv"
        file.write_text("\n".join(edit((place.raw / "patients.csv").read_text().split())))
        return ("--epsilon", "8", "--patients", str(file))

    return options


def given(*options: str) -> Callable[[Workplace], tuple[str, ...]]:
    return lambda place: options


def written(name: str, text: str) -> Callable[[Workplace], tuple[str, ...]]:
    """A file of the preprocessed folder replaced."""

    def options(place: Workplace) -> tuple[str, ...]:
        (place.preprocessed / name).write_text(text)
        return ("--epsilon", "8")

    return options


def without_labels(place: Workplace) -> tuple[str, ...]:
    edit_json(place.preprocessed / "dataset.json", lambda content: content.pop("labels"))
    return ("--epsilon", "8")


def blank_last(rows: list[str]) -> list[str]:
    return [*rows[:-1], rows[-1].split(",")[0] + ","]


def one_patient(rows: list[str]) -> list[str]:
    return [rows[0], *(row.split(",")[0] + ",P0001" for row in rows[1:])]


def folder_as_file(place: Workplace) -> tuple[str, ...]:
    shutil.rmtree(place.preprocessed)
    place.preprocessed.write_text("")
    return ("--epsilon", "8")


def damaged_image(place: Workplace) -> tuple[str, ...]:
    next((place.raw / "imagesTr").iterdir()).write_bytes(b"no image")
    return ("--epsilon", "1000", "-np", "1")


COMMANDS = {
    "epsilon 0": (PLAN, given("--epsilon", "0"), 2, "(0, 1000], found 0"),
    "epsilon negative": (PLAN, given("--epsilon", "-1"), 2, "found -1"),
    "epsilon infinite": (PLAN, given("--epsilon", "inf"), 2, "found inf"),
    "epsilon nan": (PLAN, given("--epsilon", "nan"), 2, "found nan"),
    "epsilon a word": (PLAN, given("--epsilon", "much"), 2, "'much' is not a valid float"),
    "delta 0": (PLAN, given("--epsilon", "8", "--delta", "0"), 2, "between 0 and 1, found 0"),
    "delta nan": (PLAN, given("--epsilon", "8", "--delta", "nan"), 2, "found nan"),
    "delta of 1 / N": (PLAN, given("--epsilon", "8", "--delta", "0.1"), 2, "below 1 / 10 patients, found 0.1"),
    "a curve with 0": (PLAN, given("--curve", "0,8"), 2, "found 0"),
    "a doubled row": (PLAN, table(lambda rows: [*rows, rows[1]]), 2, "two or more: line 2, 18"),
    "a blank patient": (PLAN, table(blank_last), 2, "blank patient: line 17"),
    "a missing row": (PLAN, table(lambda rows: rows[:-1]), 2, "no row for 1 of the dataset's 16 cases"),
    "semicolons": (PLAN, table(lambda rows: [row.replace(",", ";") for row in rows]), 2, "a wrong delimiter"),
    "an empty table": (PLAN, table(lambda rows: []), 2, "it holds nothing"),
    "one patient": (PLAN, table(one_patient), 2, "2 patients or more, found 1"),
    "damaged dataset.json": (PLAN, written("dataset.json", "{"), 2, "should hold JSON"),
    "damaged plans": (PLAN, written("nnUNetPlans.json", "{"), 2, "should hold JSON"),
    "no labels named": (PLAN, without_labels, 2, "should name labels"),
    "a file for a folder": (PLAN, folder_as_file, 2, "is not preprocessed"),
    "an unknown dataset": ((*PLAN[:2], "999", *PLAN[3:]), given("--epsilon", "8"), 2, "knows no dataset"),
    "fingerprint epsilon infinite": (FINGERPRINT, given("--epsilon", "inf"), 2, "(0, 1000], found inf"),
    "fingerprint share nan": (FINGERPRINT, given("--share", "nan"), 2, "found nan"),
    "fingerprint of a damaged image": (FINGERPRINT, damaged_image, 1, "nothing was charged"),
}


@pytest.mark.parametrize("row", COMMANDS)
def test_a_command_refuses_in_one_line_and_leaves_everything(row, place, monkeypatch, capfd):
    command, spoil, exit_code, words = COMMANDS[row]
    for name, value in place.environment().items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    if "one patient" in row or "damaged image" in row:
        (place.preprocessed / "patients.csv").unlink()
    options = spoil(place)
    before = files_of(place)
    assert main([*command, *options]) == exit_code
    said = capfd.readouterr().err
    assert words in said and "Traceback" not in said
    assert said.splitlines()[-1].startswith(("nnunet-dp: ", "Error: ")) and files_of(place).items() >= before.items()
    assert not [word for word in private_words(place) if word in said] and not place.charges()


# ---- nnUNetv2_train ----------------------------------------------------------------------------------------------


def data(place: Workplace) -> list[Path]:
    return sorted(file for file in (place.preprocessed / "nnUNetPlans_2d").glob("*.b2nd") if "_seg" not in file.name)


def rewritten(file: Path, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    content = edit(np.asarray(blosc2.open(str(file))[:]))
    file.unlink()
    blosc2.asarray(np.ascontiguousarray(content), urlpath=str(file))


def nan_image(place: Workplace) -> None:
    rewritten(data(place)[0], lambda image: np.full_like(image, np.nan))


def damaged_case(place: Workplace) -> None:
    data(place)[0].write_bytes(b"no array")


def no_labels(place: Workplace) -> None:
    data(place)[0].with_name(data(place)[0].stem + "_seg.b2nd").unlink()


def unknown_labels(place: Workplace) -> None:
    file = data(place)[0]
    rewritten(file.with_name(file.stem + "_seg.b2nd"), lambda labels: np.full_like(labels, 7))


def no_foreground(place: Workplace) -> None:
    for file in data(place):
        rewritten(file.with_name(file.stem + "_seg.b2nd"), np.zeros_like)


def damaged_reference(place: Workplace) -> None:
    next((place.preprocessed / "gt_segmentations").iterdir()).write_bytes(b"no image")


def not_preprocessed(place: Workplace) -> None:
    for file in data(place)[0].parent.glob(f"{data(place)[0].stem}*"):
        file.unlink()


def results_are_a_file(place: Workplace) -> None:
    shutil.rmtree(place.root / "results")
    (place.root / "results").write_text("")


@contextmanager
def another_training(place: Workplace) -> Iterator[None]:
    """Somebody who holds the fold's folder."""
    fold = Model(place, "nnUNetTrainerDP_AutoS", PRIVATE).fold_folder
    fold.mkdir(parents=True)
    with (fold / "training.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


TRAININGS = {
    "a voxel that is no number": (nan_image, 1, "1 hold voxels that are no numbers (line 1)", ()),
    "a damaged case": (damaged_case, 1, "1 cannot be read (line 1)", slow),
    "labels missing": (no_labels, 1, "1 cannot be read (line 1)", slow),
    "unknown labels": (unknown_labels, 1, "1 hold labels that dataset.json does not know", slow),
    "no foreground anywhere": (no_foreground, 1, "found none in any of the 16", slow),
    "a damaged reference": (damaged_reference, 1, "a reference in gt_segmentations that cannot be read", slow),
    "a case not preprocessed": (not_preprocessed, 1, "1 cases of this fold are not in", slow),
    "results that are no folder": (results_are_a_file, 1, "Not a directory", slow),
    "two runs in one folder": (another_training, 1, "another training is writing", ()),
}


@pytest.mark.parametrize("row", [pytest.param(row, marks=TRAININGS[row][3]) for row in TRAININGS])
def test_a_training_refuses_before_the_first_charge(row, place):
    spoil, exit_code, words, _ = TRAININGS[row]
    with spoil(place) or nullcontext():
        before = files_of(place)
        said = Model(place, "nnUNetTrainerDP_AutoS", PRIVATE).train(exit_code=exit_code)
    assert words in said and "Traceback" not in said
    assert not place.charges() and files_of(place) == before
    assert not [word for word in private_words(place) if word in said]


def test_a_full_disk_stops_before_the_first_charge_and_what_is_there_stays(place):
    """No file may grow beyond 40 KiB: the first checkpoint cannot be written, a line of the ledger could."""
    before = files_of(place)
    train = (
        Path(sysconfig.get_path("scripts")) / "nnUNetv2_train",
        place.number,
        "2d",
        "0",
        "-tr",
        "nnUNetTrainerDP_AutoS",
        "-p",
        PRIVATE,
        "-device",
        "cpu",
    )
    said = place.run("/bin/sh", "-c", 'ulimit -f 80; exec "$@"', "sh", *train, exit_code=1)
    assert "nnunet_dp stops: File too large" in said and "--c goes on" in said and "Traceback" not in said
    assert not place.charges()
    assert {name: content for name, content in files_of(place).items() if name in before} == before
    assert not list(place.results.rglob("*.pth*"))


@slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of a running process are Linux's")
def test_a_disk_that_fills_up_loses_nothing_and_the_training_goes_on(place):
    set_steps(place, 10)
    model = Model(place, "nnUNetTrainerDP_AutoS", PRIVATE)
    with model.training() as process:
        wait_until(lambda: len(place.charges()) >= 3, process)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # no checkpoint fits
        assert process.wait(timeout=300) == 1
    said, charged = (place.root / "console.txt").read_text(), place.charges()
    assert "Traceback" not in said and "--c" in said.splitlines()[-1]
    assert chain_holds(charged) and 3 <= len(charged) < 10
    model.train("--c")
    assert model.status()["finished"] and place.charges()[: len(charged)] == charged
    assert len(place.charges()) <= 10


@slow
def test_a_case_that_breaks_after_the_first_charge_counts_as_nothing_and_no_error_tells(place):
    set_steps(place, 10)
    model = Model(place, "nnUNetTrainerDP_AutoS", PRIVATE)
    with model.training() as process:
        wait_until(lambda: len(place.charges()) >= 2, process)
        case = json.loads((place.preprocessed / "splits_final.json").read_text())[0]["train"][0]
        (place.preprocessed / "nnUNetPlans_2d" / f"{case}.b2nd").unlink()
        assert process.wait(timeout=300) == 0
    said = (place.root / "console.txt").read_text()
    assert model.status()["finished"] and len(place.charges()) == 10
    assert "Traceback" not in said and not [word for word in private_words(place) if word in said]


def test_a_link_into_a_read_only_nnunet_says_what_to_type_instead(place, tmp_path):
    somebody = bound_by_permissions(replace(place, nnunet=unlinked_nnunet(tmp_path / "site")))
    with with_mode(0o555, somebody.nnunet / "nnunetv2" / "training" / "nnUNetTrainer"):
        said = somebody.run("nnunet-dp", "link", exit_code=1)
    assert 'eval "$(nnunet-dp env)"' in said and "Traceback" not in said


@slow
@pytest.mark.parametrize("folder, mode", [("nnUNetPlans_2d", 0), (".", 0o555)])
def test_a_folder_without_permission_is_an_error_before_the_first_charge(folder, mode, place):
    before = files_of(place)
    with with_mode(mode, place.preprocessed / folder):
        said = Model(bound_by_permissions(place), "nnUNetTrainerDP_AutoS", PRIVATE).train(exit_code=1)
    assert "Permission denied" in said and "nnunet-dp doctor" in said and "Traceback" not in said
    assert not place.charges() and files_of(place) == before


@contextmanager
def with_mode(mode: int, folder: Path) -> Iterator[None]:
    """Other permissions, for a while."""
    before = folder.stat().st_mode
    folder.chmod(mode)
    try:
        yield
    finally:
        folder.chmod(before)


# ---- torn images, which nnU-Net reads without a word -------------------------------------------------------------


@pytest.fixture
def volumes(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Workplace:
    """A raw 3D dataset to spoil."""
    return linked(hippocampus(tmp_path_factory.getbasetemp())).copied_to(tmp_path)


def tear(folder: Path) -> None:
    """Half of the first file is lost."""
    file = sorted(folder.iterdir())[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_fingerprint_of_torn_images_is_not_charged(volumes):
    tear(volumes.raw / "imagesTr")
    said = volumes.run("nnunet-dp", "fingerprint", "-d", 313, "--epsilon", 1000, "-np", 1, exit_code=1)
    assert "nothing was charged" in said and "doctor -d 313 --cases" in said and "Traceback" not in said
    assert not volumes.charges() and not [word for word in private_words(volumes) if word in said]
    assert "no. 1" in volumes.run("nnunet-dp", "doctor", "-d", 313, "--cases", 100, exit_code=1)


@slow
def test_nnunet_preprocesses_a_torn_image_and_no_private_training_begins(volumes):
    tear(volumes.raw / "imagesTr")
    volumes.preprocess()
    volumes.plan("--epsilon", 8, "--compute", "small")
    before = files_of(volumes)
    said = Model(volumes, "nnUNetTrainerDP_AutoS", PRIVATE, "all").train(exit_code=1)
    assert "1 have a raw image that is cut short or damaged" in said and "(line 1)" in said and "Traceback" not in said
    assert not volumes.charges() and files_of(volumes) == before
    assert not [word for word in private_words(volumes) if word in said]


@slow
def test_a_torn_archive_of_an_older_nnunet_is_refused_before_it_is_unpacked(place):
    for file in data(place):
        seg = file.with_name(f"{file.stem}_seg.b2nd")
        arrays = {"data": blosc2.open(str(file))[:], "seg": blosc2.open(str(seg))[:]}
        np.savez_compressed(file.with_suffix(".npz"), **arrays)
        file.unlink()
        seg.unlink()
    torn = sorted(file for file in (place.preprocessed / "nnUNetPlans_2d").glob("*.npz"))[0]
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    said = Model(place, "nnUNetTrainerDP_AutoS", PRIVATE).train(exit_code=1)
    assert "1 of the .npz files" in said and "Traceback" not in said and not place.charges()
    assert not [word for word in private_words(place) if word in said]


def test_the_table_would_notice_a_charge(place):
    """The sound dataset is planned and the doctor finds nothing: each row above fails for its own reason."""
    said = json.loads(place.run("nnunet-dp", "doctor", "-d", "312", "-c", "2d", "-p", PRIVATE, "--json"))
    assert said["ok"], [finding for finding in said["findings"] if finding["verdict"] != "ok"]
    assert len(said["findings"]) > 20
