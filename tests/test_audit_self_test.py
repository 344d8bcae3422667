"""The audit's self-test: blinded, corrected, and right about who is broken."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nnunet_dp.audit import self_test
from nnunet_dp.audit.builds import CORRECT, FAULTS
from nnunet_dp.audit.checks import TESTS, Sizes
from nnunet_dp.audit.self_test import run_self_test
from nnunet_dp.charges import content_hash
from nnunet_dp.cli import main

TINY = Sizes(canaries=40, canary_steps=2, patients=3, draws=8, noise_steps=2, voters=8, votes=20)
TWO = [fault for fault in FAULTS if fault.name in ("no_noise", "shuffled_batches")]


def quick(**options):
    return run_self_test(**{"processes": 1, "sizes": TINY, "correct": 2, "broken": 1, "faults": TWO} | options)


def test_exactly_the_broken_builds_are_caught_under_names_that_tell_nothing():
    told = []
    found = quick(progress=lambda done, total: told.append((done, total)))
    report = json.loads(json.dumps(found.as_dict()))
    assert [(entry["name"], entry["caught"]) for entry in report["builds"]] == [
        ("correct", False), ("no_noise", True), ("shuffled_batches", True),
    ]  # fmt: skip
    assert report["passed"] and told[-1] == (4, 4)
    labels = [verdict.label for verdict in found.verdicts]
    assert len(set(labels)) == 4 and not any(name in " ".join(labels) for name in ("correct", "noise"))
    assert "does not prove privacy" in report["note"]


def test_the_protocol_is_hashed_before_the_run_and_holds_the_corrected_level():
    found = quick(faults=[], correct=1)
    before = {key: value for key, value in found.protocol.items() if key != "salt"}
    assert content_hash(before) == found.protocol_sha256
    assert found.protocol["level"] == pytest.approx(self_test.FAMILY_ERROR / TESTS)
    assignment = {verdict.label: verdict.build.name for verdict in found.verdicts}
    assert content_hash({"salt": found.protocol["salt"], **assignment}) == found.protocol["assignment_sha256"]


def test_a_broken_build_that_nobody_catches_fails_the_self_test():
    unnoticed = replace(CORRECT, name="unnoticed", what="nothing is wrong with it")
    found = quick(faults=[unnoticed], correct=1)
    assert not found.passed
    assert found.lines()[-3][1].startswith("THE SELF-TEST FAILED")


def test_a_correct_build_that_is_caught_fails_the_self_test():
    wrongly = replace(FAULTS[0], name="correct")
    assert not quick(faults=[wrongly], correct=1).passed


def test_the_command_ends_with_1_unless_exactly_the_broken_ones_are_caught(monkeypatch, capsys):
    monkeypatch.setattr("nnunet_dp.audit.self_test.run_self_test", lambda *_: quick(faults=[], correct=1))
    assert main(["audit", "--self-test", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["builds"][0] | {"examined_as": None} == {
        "name": "correct", "what": CORRECT.what, "caught": False, "by": [], "runs": 1, "caught_runs": 0,
        "examined_as": None,
    }  # fmt: skip
    missed = replace(CORRECT, name="missed")
    monkeypatch.setattr("nnunet_dp.audit.self_test.run_self_test", lambda *_: quick(faults=[missed], correct=1))
    assert main(["audit", "--self-test"]) == 1
    assert "THE SELF-TEST FAILED" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_self_test_passes():
    found = run_self_test(seed=2)
    assert found.passed, found.lines()
    assert found.builds[0]["runs"] == 20 and len(found.builds) == 1 + len(FAULTS) >= 8
