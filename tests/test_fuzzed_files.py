"""Every file that a user may have edited, damaged or mixed up: it is read, or refused in words; no other exception.

Files begin as valid ones and are cut, spliced, re-encoded, and as JSON get any value in any place.
"""

from __future__ import annotations

import functools
import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import damaged
from federation import DATASET, terms
from federation import config as run_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from released import BUDGET, PLAN, plans

from nnunet_dp.description import read_description
from nnunet_dp.errors import Refusal
from nnunet_dp.federated.coordinator import PROGRESS, RESULT
from nnunet_dp.federated.deployment import SERVER, is_running
from nnunet_dp.federated.flower_runs import APP, ENDED, at_work, ended, was_killed
from nnunet_dp.federated.new_run import CONFIG
from nnunet_dp.federated.run_config import read_config
from nnunet_dp.federated.server_state import STATE, ServerState, digest, read_state, write_state
from nnunet_dp.federated.site_settings import read_settings
from nnunet_dp.federated.summary import FEDERATED, read_summary, thresholds_of
from nnunet_dp.federated.survey import read_survey
from nnunet_dp.ledger import Ledger, TornLineWarning, read_copy, read_ledger
from nnunet_dp.mechanisms import SubsampledGaussian
from nnunet_dp.morphology import FillHoles, KeepLargest, classes_from, read_morphology
from nnunet_dp.nnunet import known_splits
from nnunet_dp.nnunet_dataset_fingerprint import FILE as FINGERPRINT
from nnunet_dp.nnunet_dataset_fingerprint import PUBLIC_RECORD, provenance_of
from nnunet_dp.patients import Patients, read_patients
from nnunet_dp.plans import SECTION, read_section
from nnunet_dp.public_start import read_start, write_start
from nnunet_dp.run import LEDGER, read_checkpoint, write_checkpoint
from nnunet_dp.sections import NOT_COVERED, PrivacySection

PEOPLE = Patients("patient", "patient", {"a_1": "ann", "a_2": "ann", "b_1": "bob", "c_1": "cleo"})
CASES = ("a_1", "a_2", "b_1", "c_1")


@dataclass(frozen=True)
class File:
    """One kind of file: a valid one, and what reads it.

    Attributes:
        write: puts a valid one into a folder.
        name: of the file there.
        read: the folder.
    """

    write: Callable[[Path], Any]
    name: str
    read: Callable[[Path], Any]


def _ledger(folder: Path) -> None:
    ledger = Ledger(folder / "ledger.jsonl", "run/fold_0/0a", "0a", folder / "copy.jsonl", "patient")
    for step in range(4):
        ledger.charge(SubsampledGaussian(1.5, 0.25).charge("training", step))


def _section(folder: Path) -> None:
    given = {"not_covered": NOT_COVERED, "source_plans": "nnUNetPlans", "patients_file_sha256": None}
    section = PrivacySection(budget=BUDGET, patients=170, configurations={"2d": PLAN}, **given)
    (folder / "plans.json").write_text(json.dumps({SECTION: section.model_dump(mode="json")}))


def _morphology(folder: Path) -> None:
    rules = classes_from({"labels": {"background": 0, "a": 1, "b": 2}})
    told = rules.with_operations([(KeepLargest(),), (FillHoles(),)])
    (folder / "morphology.json").write_text(told.model_dump_json())


def _state(folder: Path) -> None:
    weights = {"w": np.ones((2, 2), np.float32)}
    write_state(ServerState(digest(terms()), 2, weights, weights, {}, ""), folder)


PROCESS = {"pid": 1, "started": 1}
SPLITS = [{"train": ["a_1", "a_2", "b_1"], "val": ["c_1"]}]
RECORD = {"sha256": "0" * 64, "source": "phantoms"}
SPATIAL = {
    "spacings": [[1.0, 1.0, 1.0]], "shapes_after_crop": [[1, 31, 33]],
    "foreground_intensity_properties_per_channel": plans()["foreground_intensity_properties_per_channel"],
}  # fmt: skip


def _fingerprint(folder: Path) -> None:
    """A private fingerprint, its charge, and another record beside it."""
    ledger = Ledger(folder / LEDGER, "fingerprint/0a", "0a", unit="patient")
    ledger.charge(SubsampledGaussian(4.0).charge("fingerprint", None))
    section = {"run": "fingerprint/0a", "noise_multiplier": 4.0}
    (folder / FINGERPRINT).write_text(json.dumps({**SPATIAL, "differential_privacy": section}))
    (folder / PUBLIC_RECORD).write_text(json.dumps(RECORD))


def _coordinated(folder: Path) -> None:
    """What the processes of a coordinator leave for commands."""
    server = {"address": "127.0.0.1:9092", "authority": None, "process": PROCESS}
    (folder / SERVER).write_text(json.dumps(server))
    (folder / APP).write_text(json.dumps({"run_id": "7", "process": PROCESS}))
    (folder / ENDED).write_text(json.dumps({"exit_code": 0, "message": ""}))


def _federated_model(folder: Path) -> None:
    """A federated model whose run lies on this machine."""
    model, run = folder / "model", folder / "federated_runs" / "a"
    model.mkdir()
    run.mkdir(parents=True)
    _federated(run)
    (run / RESULT).rename(model / FEDERATED)
    row = {"round": 1, "sites": {"ann": {"bound": 0.5}}}
    (run / PROGRESS).write_text(json.dumps(row) + "\n" + json.dumps({**row, "round": 2}) + "\n")


def _federated_status(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(folder))
        told = read_summary(folder / "model")
        told.lines()
        thresholds_of(told)


def _federated(folder: Path) -> None:
    (folder / CONFIG).write_text(run_config(folder).model_dump_json())
    site = {"name": "ann", "rounds": 2, "epsilon_spent": 1.5, "delta": 1e-5, "unit": "patient"}
    told = {"run": "0a", "mode": "adp-fl", "rounds": 2, "complete": True, "sites": [site]}
    (folder / RESULT).write_text(json.dumps(told))


SURVEY = {"run": "0a", "mode": "adp-fl", "epsilon": 8, "share": 0.1, "numbers": 7, "sites": 2, "dataset_json": {}}
SETTINGS = 'name = "north"\ndataset = 4\nmax_epsilon = 8.0\nraw = "r"\npreprocessed = "p"\nresults = "s"\n'
PATIENTS = "case,patient\na_1,ann\na_2,ann\nb_1,bob\nc_1,cleo\n"
FILES = {
    "patients": File(
        lambda folder: (folder / "patients.csv").write_text(PATIENTS), "patients.csv",
        lambda folder: read_patients(folder / "patients.csv", None, CASES),
    ),
    "plans": File(_section, "plans.json", lambda folder: read_section(_plans(folder))),
    "morphology": File(_morphology, "morphology.json", lambda folder: read_morphology(folder / "morphology.json")),
    "ledger": File(_ledger, "ledger.jsonl", lambda folder: read_ledger(folder / "ledger.jsonl")),
    "ledger's copy": File(_ledger, "copy.jsonl", lambda folder: read_copy(folder / "copy.jsonl")),
    "checkpoint": File(
        lambda folder: write_checkpoint({"a": np.float64(1).item(), "b": "text"}, folder / "final.pth"), "final.pth",
        lambda folder: read_checkpoint(folder / "final.pth"),
    ),
    "site's settings": File(
        lambda folder: (folder / "site.toml").write_text(SETTINGS), "site.toml",
        lambda folder: read_settings(folder / "site.toml"),
    ),
    "run's configuration": File(_federated, CONFIG, lambda folder: read_config(folder / CONFIG)),
    "finished run's configuration": File(_federated, CONFIG, read_summary),
    "run's result": File(_federated, RESULT, read_summary),
    "coordinator's state": File(_state, STATE, lambda folder: read_state(folder, terms())),
    "survey's configuration": File(
        lambda folder: (folder / "survey.json").write_text(json.dumps(SURVEY)), "survey.json",
        lambda folder: read_survey(folder / "survey.json"),
    ),
    "fingerprint": File(_fingerprint, FINGERPRINT, lambda folder: provenance_of(folder, plans())),
    "public plans' record": File(_fingerprint, PUBLIC_RECORD, lambda folder: provenance_of(folder, plans())),
    "splits": File(
        lambda folder: (folder / "splits_final.json").write_text(json.dumps(SPLITS)), "splits_final.json",
        lambda folder: known_splits(folder, PEOPLE),
    ),
    "dataset.json": File(
        lambda folder: (folder / "dataset.json").write_text(json.dumps(DATASET)), "dataset.json",
        lambda folder: read_description(folder / "dataset.json"),
    ),
    "public start's provenance": File(
        lambda folder: write_start(folder / "start.pth", {}, {"kind": "phantoms"}), "start.json",
        lambda folder: read_start(folder / "start.pth", {"kind": "phantoms"}),
    ),
    "server's note": File(_coordinated, SERVER, is_running),
    "coordinator's note": File(_coordinated, APP, lambda folder: (was_killed(folder), at_work(folder))),
    "coordinator's end": File(_coordinated, ENDED, ended),
    "federated model's result": File(_federated_model, f"model/{FEDERATED}", _federated_status),
    "its run's configuration": File(_federated_model, f"federated_runs/a/{CONFIG}", _federated_status),
    "its run's progress": File(_federated_model, f"federated_runs/a/{PROGRESS}", _federated_status),
}  # fmt: skip


def _plans(folder: Path) -> dict[str, Any]:
    """Only the section is ours; the file around it is nnU-Net's and is JSON."""
    try:
        content = json.loads((folder / "plans.json").read_bytes())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


@functools.cache
def _valid(name: str) -> bytes:
    kind = FILES[name]
    with tempfile.TemporaryDirectory() as place:
        kind.write(Path(place))
        kind.read(Path(place))
        return (Path(place) / kind.name).read_bytes()


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example])
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_words(name, data):
    kind = FILES[name]
    content = data.draw(damaged(_valid(name)))
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", TornLineWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of medians of nothing
        kind.write(Path(place))
        (Path(place) / kind.name).write_bytes(content)
        try:
            kind.read(Path(place))
        except Refusal as refusal:
            assert str(refusal).strip() and "Traceback" not in str(refusal)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_ledger_never_counts_less_than_a_shorter_one_would(data):
    """What is still read of it is how it began: no line is changed, left out or moved without being noticed."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", TornLineWarning)
        _ledger(Path(place))
        file = Path(place) / "ledger.jsonl"
        before, content = read_ledger(file), file.read_bytes()
        file.write_bytes(data.draw(damaged(content)))
        try:
            found = read_ledger(file)
        except Refusal:
            return
        assert found == before[: len(found)]
