"""The ledger is never below what was released: concurrency, kill -9, full disks and tampering."""

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from dp_accounting.dp_event import GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nnunet_dp import charges as module
from nnunet_dp.accounting import epsilon
from nnunet_dp.charges import FIRST_PREVIOUS, Charge, LedgerError, epsilon_of, events_of, steps_done, steps_wasted
from nnunet_dp.events import PureDpEvent
from nnunet_dp.ledger import Ledger, TornLineWarning, read_ledger

WRITER = """
import sys
from pathlib import Path
from nnunet_dp.charges import Charge
from nnunet_dp.ledger import Ledger
folder, run, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ledger = Ledger(folder / "privacy_ledger.jsonl", run=run, plan="0a", copy=folder / f"{run}.jsonl")
for step in range(count):
    ledger.charge(Charge(purpose="training", mechanism="gaussian", noise_multiplier=2.0, first_step=step))
    print(step, flush=True)
"""


def step_charge(step: int = 0, **fields: Any) -> Charge:
    return Charge(
        **{"purpose": "training", "mechanism": "gaussian", "noise_multiplier": 2.0, "first_step": step} | fields
    )


def open_ledger(folder: Path, run: str = "fold_0", copy: bool = False) -> Ledger:
    return Ledger(folder / "privacy_ledger.jsonl", run, "0a", copy=folder / f"{run}.jsonl" if copy else None)


def filled(folder: Path, lines: int = 4, copy: bool = False) -> Ledger:
    ledger = open_ledger(folder, copy=copy)
    for step in range(lines):
        ledger.charge(step_charge(step))
    return ledger


def start_writer(folder: Path, run: str, count: int) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", WRITER, folder, run, str(count)], stdout=subprocess.PIPE, text=True)


# ---- charges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "event"),
    [
        ({"mechanism": "gaussian", "noise_multiplier": 2.0}, GaussianDpEvent(2.0)),
        ({"mechanism": "laplace", "noise_multiplier": 3.0}, LaplaceDpEvent(3.0)),
        ({"mechanism": "pure_dp", "epsilon": 0.5}, PureDpEvent(0.5)),
        (
            {"mechanism": "gaussian", "noise_multiplier": 2.0, "sampling_probability": 0.1, "count": 7},
            SelfComposedDpEvent(PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0)), 7),
        ),
    ],
)
def test_a_charge_is_its_event(fields: dict[str, Any], event: object) -> None:
    assert Charge(purpose="training", **fields).event == event


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": None},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": float("inf")},
        {"noise_multiplier": "2"},
        {"epsilon": 1.0},
        {"mechanism": "pure_dp"},
        {"mechanism": "pure_dp", "epsilon": 1.0},
        {"mechanism": "pure_dp", "noise_multiplier": None},
        {"mechanism": "pure_dp", "noise_multiplier": None, "epsilon": 0.0},
        {"mechanism": "pure_dp", "noise_multiplier": None, "epsilon": 1.0, "sampling_probability": 0.5},
        {"mechanism": "exponential"},
        {"sampling_probability": 0.0},
        {"sampling_probability": 1.1},
        {"count": 0},
        {"count": 1.5},
        {"first_step": -1},
        {"purpose": " "},
        {"patient": "x"},
    ],
)
def test_a_charge_has_exactly_the_fields_of_its_mechanism(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        step_charge(**wrong)


# ---- the file ------------------------------------------------------------------------------------


def test_every_line_continues_the_chain_and_hashes_its_content(tmp_path: Path) -> None:
    filled(tmp_path)
    previous = FIRST_PREVIOUS
    for number, line in enumerate((tmp_path / "privacy_ledger.jsonl").read_text().splitlines(), 1):
        fields = json.loads(line)
        content = {key: value for key, value in fields.items() if key != "hash"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        assert (fields["sequence"], fields["previous"], fields["version"]) == (number, previous, 1)
        assert fields["hash"] == hashlib.sha256(text.encode()).hexdigest()
        previous = fields["hash"]


def test_the_charge_is_on_disk_before_the_receipt_is_handed_out(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    receipt = ledger.charge(step_charge(3), checkpoint="c1")
    (entry,) = read_ledger(ledger.path)
    assert receipt.charge == step_charge(3)
    assert (entry.event, entry.first_step, entry.checkpoint, entry.run) == (step_charge(3).event, 3, "c1", "fold_0")


def test_the_charge_is_synced_in_file_folder_and_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    open_ledger(tmp_path, copy=True).charge(step_charge())
    file, copy = str(tmp_path / "privacy_ledger.jsonl"), str(tmp_path / "fold_0.jsonl")
    assert synced == [str(tmp_path), file, str(tmp_path), copy]


def test_opening_and_reading_write_nothing(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, copy=True)
    assert ledger.entries == ()
    assert ledger.head == (0, FIRST_PREVIOUS)
    assert list(tmp_path.iterdir()) == []


def test_a_later_process_continues_the_chain(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    again = filled(tmp_path, 3)
    assert [entry.sequence for entry in again.entries] == [1, 2, 3, 4, 5]
    assert again.head == (5, again.entries[-1].hash)


def test_runs_share_the_dataset_and_keep_their_own_view(tmp_path: Path) -> None:
    first, second = open_ledger(tmp_path, "fold_0", copy=True), open_ledger(tmp_path, "fold_1", copy=True)
    for step in range(3):
        first.charge(step_charge(step))
        second.charge(step_charge(step, noise_multiplier=5.0))
    assert len(first.entries) == len(second.entries) == 6
    assert [entry.noise_multiplier for entry in first.entries_of("fold_1")] == [5.0] * 3
    own = (tmp_path / "fold_1.jsonl").read_bytes().splitlines(keepends=True)
    assert own == [entry.line for entry in first.entries_of("fold_1")]


def test_two_continuations_of_one_run_are_refused(tmp_path: Path) -> None:
    first, second = open_ledger(tmp_path), open_ledger(tmp_path)
    first.charge(step_charge(0))
    with pytest.raises(LedgerError, match="two continuations"):
        second.charge(step_charge(0))
    assert len(read_ledger(first.path)) == 1


def test_a_missing_ledger_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no such file"):
        read_ledger(tmp_path / "privacy_ledger.jsonl")


# ---- concurrency and death -----------------------------------------------------------------------


def test_two_processes_charge_one_ledger_and_the_chain_holds(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, run, 50) for run in ("fold_0", "fold_1")]
    acknowledged = [len(writer.communicate(timeout=60)[0].splitlines()) for writer in writers]
    entries = read_ledger(tmp_path / "privacy_ledger.jsonl")
    assert acknowledged == [50, 50]
    assert len(entries) == 100
    assert [sum(entry.run == run for entry in entries) for run in ("fold_0", "fold_1")] == [50, 50]


@pytest.mark.filterwarnings("ignore::nnunet_dp.ledger.TornLineWarning")
def test_after_kill_nine_the_ledger_is_never_below_what_was_acknowledged(tmp_path: Path) -> None:
    acknowledged, dice = 0, random.Random(3)
    for _ in range(5):
        writer = start_writer(tmp_path, "fold_0", 10**6)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(dice.uniform(0, 0.1))
        writer.kill()
        acknowledged += 1 + len(writer.communicate()[0].splitlines())
        assert len(read_ledger(tmp_path / "privacy_ledger.jsonl")) >= acknowledged
    filled(tmp_path, 1, copy=True).verify_copy()


@pytest.mark.parametrize("kept", [1, 100, -1])
def test_a_torn_last_line_is_set_aside_and_the_chain_goes_on(tmp_path: Path, kept: int) -> None:
    ledger = filled(tmp_path, 3)
    whole = ledger.path.read_bytes()
    torn = whole.splitlines(keepends=True)[2][:kept]
    ledger.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + torn)
    with pytest.warns(TornLineWarning, match="left out"):
        assert len(read_ledger(ledger.path)) == 2
    filled(tmp_path, 1)
    assert [entry.sequence for entry in read_ledger(ledger.path)] == [1, 2, 3]
    assert ledger.path.with_name("privacy_ledger.jsonl.torn").read_bytes() == torn + b"\n"


def test_a_torn_copy_is_set_aside_too(tmp_path: Path) -> None:
    filled(tmp_path, 2, copy=True)
    copy = tmp_path / "fold_0.jsonl"
    copy.write_bytes(copy.read_bytes()[:-20])
    filled(tmp_path, 1, copy=True).verify_copy()
    assert len(copy.read_bytes().splitlines()) == 2


# ---- full disks ----------------------------------------------------------------------------------


def fail_after(written: int) -> Any:
    """An os.write that writes so many bytes and then finds the disk full."""
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if written:
            return write(descriptor, data[:written])
        raise OSError(errno.ENOSPC, "No space left on device")

    return full


@pytest.mark.parametrize("written", [0, 1, 100])
def test_a_full_disk_gives_no_receipt_and_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    ledger = filled(tmp_path, 2)
    before = ledger.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail_after(written))
        with pytest.raises(LedgerError, match="nothing was released"):
            ledger.charge(step_charge(2))
    assert ledger.path.read_bytes() == before
    ledger.charge(step_charge(2))
    assert len(read_ledger(ledger.path)) == 3


def test_a_disk_that_cannot_sync_gives_no_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    ledger = filled(tmp_path, 2)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(LedgerError, match="Input/output error"):
        ledger.charge(step_charge(2))


def test_a_copy_that_cannot_be_written_gives_no_receipt_but_stays_charged(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, copy=True)
    (tmp_path / "fold_0.jsonl").mkdir()
    with pytest.raises(LedgerError, match="before noise is drawn"):
        ledger.charge(step_charge(0))
    (tmp_path / "fold_0.jsonl").rmdir()
    ledger.charge(step_charge(0))
    assert len(read_ledger(ledger.path)) == 2


def test_a_missing_folder_gives_no_receipt(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="before noise is drawn"):
        open_ledger(tmp_path / "absent").charge(step_charge())


# ---- tampering -----------------------------------------------------------------------------------

Lines = list[bytes]


def edited(line: bytes, **changes: Any) -> bytes:
    """A line with other fields and a hash that fits them: a forger who knows the format."""
    fields = json.loads(line) | changes
    content = {key: value for key, value in fields.items() if key != "hash"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps(content | {"hash": digest}, sort_keys=True, separators=(",", ":")).encode() + b"\n"


TAMPERINGS = {
    "a changed number": (lambda x: [x[0], x[1].replace(b":2.0", b":9.0"), *x[2:]], "line 2.*edited"),
    "a forged line": (lambda x: [x[0], edited(x[1], noise_multiplier=9.0), *x[2:]], "line 3.*missing"),
    "a dropped line": (lambda x: [x[0], *x[2:]], "line 2.*missing"),
    "a dropped first line": (lambda x: x[1:], "line 1.*missing"),
    "swapped lines": (lambda x: [x[0], x[2], x[1], x[3]], "line 2.*out of order"),
    "a doubled line": (lambda x: [x[0], x[1], x[1], *x[2:]], "line 3.*doubled"),
    "a doubled last line": (lambda x: [*x, x[3]], "line 5.*doubled"),
    "garbage at the end": (lambda x: [*x, b"garbage\n"], "line 5.*JSON"),
    "an empty line": (lambda x: [*x, b"\n"], "line 5.*JSON"),
    "bytes that are no text": (lambda x: [*x, b"\xff\xfe\n"], "line 5.*JSON"),
    "a list": (lambda x: [*x, b"[]\n"], "line 5.*version"),
    "other white space": (lambda x: [x[0].replace(b",", b", "), *x[1:]], "line 1.*edited"),
    "a newer version": (lambda x: [*x[:3], edited(x[3], version=2)], "line 4.*version 1, found 2"),
    "an unknown field": (lambda x: [*x[:3], edited(x[3], discount=0.5)], "line 4.*discount"),
    "an unknown mechanism": (lambda x: [*x[:3], edited(x[3], mechanism="shuffle")], "line 4.*mechanism"),
    "no noise": (lambda x: [*x[:3], edited(x[3], noise_multiplier=None)], "line 4"),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_tampered_ledger_is_refused_with_the_line(tmp_path: Path, what: str) -> None:
    tamper, message = TAMPERINGS[what]
    path = filled(tmp_path).path
    path.write_bytes(b"".join(tamper(path.read_bytes().splitlines(keepends=True))))
    for open_again in (lambda: read_ledger(path), lambda: open_ledger(tmp_path)):
        with pytest.raises(LedgerError, match=message):
            open_again()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_no_byte_can_be_changed_unseen(tmp_path: Path, position: int, byte: int) -> None:
    path = tmp_path / "privacy_ledger.jsonl"
    whole = path.read_bytes() if path.exists() else filled(tmp_path).path.read_bytes()
    position %= len(whole) - 1  # the last newline: its loss is a torn line, see below
    changed = whole[:position] + bytes([byte]) + whole[position + 1 :]
    path.with_name("changed.jsonl").write_bytes(changed)
    if changed != whole:
        with pytest.raises(LedgerError):
            read_ledger(path.with_name("changed.jsonl"))


@pytest.mark.parametrize("missing", [1, 2, 4])
@pytest.mark.filterwarnings("ignore::nnunet_dp.ledger.TornLineWarning")
def test_an_end_cut_off_is_caught_by_the_checkpoint_and_by_the_copy(tmp_path: Path, missing: int) -> None:
    ledger = filled(tmp_path, copy=True)
    sequence, head = ledger.head
    ledger.path.write_bytes(b"".join(ledger.path.read_bytes().splitlines(keepends=True)[:-missing]))
    with pytest.raises(LedgerError, match="ledger shorter than the checkpoint says"):
        open_ledger(tmp_path).verify_contains(sequence, head)
    with pytest.raises(LedgerError, match="run's copy"):
        open_ledger(tmp_path, copy=True)


def test_a_cut_last_line_is_caught_by_the_checkpoint_and_by_the_copy(tmp_path: Path) -> None:
    ledger = filled(tmp_path, copy=True)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-1])
    with pytest.raises(LedgerError, match="ledger shorter"):
        open_ledger(tmp_path).verify_contains(*ledger.head)
    with pytest.raises(LedgerError, match="run's copy"):
        open_ledger(tmp_path, copy=True)


def test_a_ledger_written_anew_is_not_the_one_the_checkpoint_knows(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    ledger.path.unlink()
    again = open_ledger(tmp_path)
    for step in range(5):
        again.charge(step_charge(step, noise_multiplier=9.0))
    with pytest.raises(LedgerError, match="found another"):
        again.verify_contains(*ledger.head)


def test_the_checkpoints_of_an_intact_ledger_are_contained(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    heads = [ledger.head]
    for step in range(3):
        ledger.charge(step_charge(step))
        heads.append(ledger.head)
    for head in heads:
        open_ledger(tmp_path).verify_contains(*head)


@pytest.mark.parametrize("lines", [0, 3])
def test_a_ledger_that_shrinks_under_a_run_is_refused(tmp_path: Path, lines: int) -> None:
    ledger = filled(tmp_path)
    ledger.path.write_bytes(b"".join(ledger.path.read_bytes().splitlines(keepends=True)[:lines]))
    with pytest.raises(LedgerError, match="only grow"):
        ledger.charge(step_charge(4))


def test_a_ledger_that_vanishes_under_a_run_is_refused_and_not_made_again(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="only grow"):
        ledger.charge(step_charge(4))
    assert not ledger.path.exists()


# ---- what it says --------------------------------------------------------------------------------


def test_epsilon_is_that_of_the_charges(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    ledger.charge(step_charge(0, count=10, sampling_probability=0.2))
    ledger.charge(step_charge(10, sampling_probability=0.2))
    ledger.charge(Charge(purpose="fingerprint", mechanism="pure_dp", epsilon=0.5))
    step = PoissonSampledDpEvent(0.2, GaussianDpEvent(2.0))
    assert epsilon_of(ledger.entries, 1e-5) == epsilon([step] * 11 + [PureDpEvent(0.5)], 1e-5)
    assert events_of(ledger.entries)[1] == step


def test_an_empty_ledger_has_spent_nothing() -> None:
    assert epsilon_of((), 1e-5) == 0.0
    assert steps_done(()) == steps_wasted(()) == 0


def test_steps_charged_again_after_a_crash_are_wasted(tmp_path: Path) -> None:
    ledger, other = open_ledger(tmp_path), open_ledger(tmp_path, "fold_1")
    for step, count in ((0, 1), (1, 4), (3, 2)):
        ledger.charge(step_charge(step, count=count))
    ledger.charge(Charge(purpose="fingerprint", mechanism="pure_dp", epsilon=0.1))
    other.charge(step_charge(0))
    assert (steps_done(ledger.entries), steps_wasted(ledger.entries)) == (6, 2)


def test_catching_up_reads_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, other = filled(tmp_path, 20), open_ledger(tmp_path, "fold_1")
    other.charge(step_charge(0))
    parsed: list[int] = []
    parse = module.parse_line
    monkeypatch.setattr(module, "parse_line", lambda number, line: (parsed.append(number), parse(number, line))[1])
    ledger.charge(step_charge(20))
    assert parsed == [21]


def test_charges_per_other_units_are_never_added(tmp_path: Path) -> None:
    path = tmp_path / "privacy_ledger.jsonl"
    charge = Charge(purpose="training", mechanism="gaussian", noise_multiplier=5.0, first_step=0)
    Ledger(path, "one", "0a", unit="patient", units="1" * 64).charge(charge)
    Ledger(path, "two", "0a", unit="patient", units="1" * 64).charge(charge)
    for unit, units in (("case", "1" * 64), ("patient", "2" * 64)):
        with pytest.raises(LedgerError, match="charged per 'patient'"):
            Ledger(path, "three", "0a", unit=unit, units=units)
