"""Accidents that happen to a private training once: what it said, whether it went on, and whether a line was lost."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fault_place import EPSILON, TRAIN, Place, recounted

from nnunet_dp.run import FINAL, LATEST, LEDGER

_YEAR_S = 365 * 24 * 3600
_CLOCK = f"""import time
_now = time.time
time.time = lambda: _now() - {_YEAR_S}
"""


@dataclass(frozen=True)
class Outcome:
    """What an accident came to.

    Attributes:
        exit_code: of the command that met it.
        said: its last words.
        traceback: whether it showed one.
        lines_lost: of the ledger that had been there.
        over_budget: whether the lines cost more than the target.
        ended_with_a_model: whether there is a final model, after the accident is mended and the run gone on with.
    """

    exit_code: int
    said: str
    traceback: bool
    lines_lost: bool
    over_budget: bool
    ended_with_a_model: bool


def begun(place: Place, name: str) -> Place:
    """A copy in which a training was killed between two checkpoints."""
    fresh = Place(place.root.with_name(name))
    shutil.rmtree(fresh.root, ignore_errors=True)
    shutil.copytree(place.root, fresh.root, ignore=shutil.ignore_patterns("results", "console.txt", LEDGER))
    (fresh.root / "results").mkdir()
    fresh.killed(TRAIN, lambda: len(fresh.lines) > 8, 0.3)
    return fresh


def outcome(
    place: Place, before: list[dict[str, Any]], met: tuple[int, str], mend: Callable[[], object] = lambda: None
) -> Outcome:
    """Look at what is there, mend what was broken by hand, and go on with the run."""
    code, said = met
    after = place.lines
    mend()
    if not (place.fold / FINAL).is_file():
        place.run(*TRAIN, "--c")
    lines = place.lines
    words = [line for line in said.splitlines() if line.strip()]
    return Outcome(
        code, words[-1][:300] if words else "", "Traceback" in said, after[: len(before)] != before,
        recounted(lines) > EPSILON, (place.fold / FINAL).is_file(),
    )  # fmt: skip


def full_disk(place: Place) -> Outcome:
    """No file may grow beyond the size that the ledger has, which is what a full disk does to it."""
    fresh = begun(place, "full_disk")
    before = fresh.lines
    most = (fresh.preprocessed / LEDGER).stat().st_size + 700
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # noqa: E731
    return outcome(fresh, before, fresh.run(*TRAIN, "--c", before=limit))


def clock_set_back(place: Place) -> Outcome:
    """By a year, between two lives of a run."""
    fresh = begun(place, "clock")
    before = fresh.lines
    (fresh.root / "site").mkdir()
    (fresh.root / "site" / "sitecustomize.py").write_text(_CLOCK)
    return outcome(fresh, before, fresh.run(*TRAIN, "--c", PYTHONPATH=str(fresh.root / "site")))


def two_writers(place: Place) -> Outcome:
    """A second training of the same fold while the first one runs."""
    fresh = begun(place, "two_writers")
    known = len(fresh.lines)
    with fresh.running(*TRAIN, "--c") as process:
        while len(fresh.lines) == known and process.poll() is None:
            pass
        before = fresh.lines
        met = fresh.run(*TRAIN, "--c")
        process.wait()
    return outcome(fresh, before, met)


def torn_last_line(place: Place) -> Outcome:
    """Half of the last line is on disk, as after a crash of the machine; nothing follows it yet."""
    fresh = begun(place, "torn")
    ledger = fresh.preprocessed / LEDGER
    before = fresh.lines
    with ledger.open("ab") as stream:
        stream.write(ledger.read_bytes().splitlines()[-1][:80])
    return outcome(fresh, before, fresh.run(*TRAIN, "--c"))


def old_backup_of_the_ledger(place: Place) -> Outcome:
    """The dataset's ledger is put back as it was some steps ago."""
    fresh = begun(place, "backup")
    ledger, before = fresh.preprocessed / LEDGER, fresh.lines
    whole = ledger.read_bytes()
    ledger.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    met = fresh.run(*TRAIN, "--c")
    refused = fresh.lines == before[:3]
    ledger.write_bytes(whole if refused else ledger.read_bytes())
    return outcome(fresh, before, met)


def damaged_checkpoint(place: Place) -> Outcome:
    """A byte in the middle of the newest checkpoint is another one."""
    fresh = begun(place, "damaged")
    latest, before = fresh.fold / LATEST, fresh.lines
    whole = latest.read_bytes()
    latest.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    met = fresh.run(*TRAIN, "--c")
    return outcome(fresh, before, met, mend=lambda: latest.write_bytes(whole))


ACCIDENTS = (
    full_disk, clock_set_back, two_writers, torn_last_line, old_backup_of_the_ledger, damaged_checkpoint,
)  # fmt: skip
