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
from federation import config as run_config
from federation import terms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from released import BUDGET, PLAN

from nnunet_dp.errors import Refusal
from nnunet_dp.federated.coordinator import RESULT
from nnunet_dp.federated.new_run import CONFIG
from nnunet_dp.federated.run_config import read_config
from nnunet_dp.federated.server_state import STATE, ServerState, digest, read_state, write_state
from nnunet_dp.federated.site_settings import read_settings
from nnunet_dp.federated.summary import read_summary
from nnunet_dp.federated.survey import read_survey
from nnunet_dp.ledger import Ledger, TornLineWarning, read_copy, read_ledger
from nnunet_dp.mechanisms import SubsampledGaussian
from nnunet_dp.morphology import FillHoles, KeepLargest, classes_from, read_morphology
from nnunet_dp.patients import read_patients
from nnunet_dp.plans import SECTION, read_section
from nnunet_dp.run import read_checkpoint, write_checkpoint
from nnunet_dp.sections import NOT_COVERED, PrivacySection

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
}  # fmt: skip


def _plans(folder: Path) -> dict[str, Any]:
    """Only the section is ours; the file around it is nnU-Net's and is JSON."""
    try:
        content = json.loads((folder / "plans.json").read_bytes())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


# ---- damage ------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The file, cut, spliced, with other bytes in a place, in another encoding, or with another value in its JSON."""
    how = draw(st.sampled_from(["cut", "splice", "bytes", "encoding", "value", "anything"]))
    place = draw(st.integers(0, len(content)))
    if how == "cut":
        return content[:place]
    if how == "splice":
        return content[:place] + content[draw(st.integers(0, len(content))) :]
    if how == "bytes":
        return content[:place] + draw(st.binary(min_size=1, max_size=6)) + content[place + draw(st.integers(0, 6)) :]
    if how == "encoding":
        return content.decode(errors="replace").encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32"])))
    if how == "value":
        return _with_another_value(draw, content)
    return draw(st.binary(max_size=60) | st.text(max_size=30).map(str.encode) | VALUES.map(json.dumps).map(str.encode))


def _with_another_value(draw: st.DrawFn, content: bytes) -> bytes:
    """Some value of some line of JSON replaced, removed or renamed; other files are left as they are."""
    lines = content.splitlines(keepends=True)
    number = draw(st.integers(0, len(lines) - 1))
    whole = len(lines) == 1 or not lines[0].rstrip().endswith(b"}")
    try:
        told = json.loads(content if whole else lines[number])
    except ValueError:
        return content
    where = told
    while isinstance(where, dict | list) and where:
        keys = list(where) if isinstance(where, dict) else list(range(len(where)))
        key = draw(st.sampled_from(keys))
        if not isinstance(where[key], dict | list) or not where[key] or draw(st.booleans()):
            change = draw(st.sampled_from(["value", "value", "remove", "add"]))
            if change == "remove":
                del where[key]
            elif change == "add" and isinstance(where, dict):
                where[draw(st.text(max_size=5))] = draw(VALUES)
            else:
                where[key] = draw(VALUES)
            break
        where = where[key]
    mended = json.dumps(told).encode()
    return mended if whole else b"".join([*lines[:number], mended + b"\n", *lines[number + 1 :]])


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
