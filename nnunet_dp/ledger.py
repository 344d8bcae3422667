"""The ledger: one append-only, hash-chained file per dataset, written before any noise is drawn.

The law: charge first (fsync), then draw noise. ``Ledger.charge`` appends one line and only then hands out a
``Receipt``; a mechanism draws noise only against an unspent receipt for exactly its price. Whatever dies in
between stays charged: the ledger may say more than was released, never less.

Each line is one canonical JSON object: the charge's fields, the run, the plan's hash, the newest checkpoint,
a sequence number from 1, the hash of the line before and its own hash. Runs (folds) of several processes
append to the same file, one at a time under an exclusive flock, each continuing the chain that it finds. A
run's own lines are written a second time to its ``copy``, beside the model.

Example:
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     ledger = Ledger(Path(folder) / "privacy_ledger.jsonl", run="fold_0", plan="0a")
    ...     charge = Charge(purpose="training", mechanism="gaussian", noise_multiplier=5.0, first_step=0)
    ...     receipt = ledger.charge(charge)
    ...     entries = read_ledger(ledger.path)
    >>> len(entries), entries[0].sequence, round(epsilon_of(entries, 1e-5), 1)
    (1, 1, 0.7)

What a reader refuses: a line it does not know (version, field, mechanism), edited, missing, doubled or out of
order. What a chain cannot see is that its *end* was cut off. Two other places remember the end: the run's
copy (``verify_copy``) and the sequence number and hash that every checkpoint carries (``verify_contains``).

Design note: a torn last line (no newline at its end) comes from a process that died inside ``write``. Its
receipt was never handed out, so no noise was drawn for it, and setting it aside is safe: the next writer,
under the lock, moves it to ``<name>.torn``; a reader leaves it out and warns (``TornLineWarning``). Somebody
who cuts the last characters of a *complete* line gets the same treatment here, and is caught by the copy and
by the checkpoint.

Design note: another writer's line for *this* run means that two processes continue the same run: refused.
flock is advisory and per host; on a network file system it must be supported by the server.
"""

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from dp_accounting.dp_event import (
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from nnunet_dp.accounting import epsilon
from nnunet_dp.errors import Refusal
from nnunet_dp.events import PureDpEvent

VERSION = 1
TRAINING = "training"
FIRST_PREVIOUS = "0" * 64
RESTORE = "restore the file from a backup, or archive model and ledger and start anew; do not continue on it"

_Word = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
_Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]+$")]
_Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LedgerError(Refusal):
    """The ledger is not what it should be: nothing may be charged to it, and no epsilon read from it."""


class TornLineWarning(UserWarning):
    """The last line has no end: a process died while it wrote it, before it drew any noise."""


class Charge(BaseModel):
    """What is about to be released, in public numbers.

    Attributes:
        purpose: what it is for (``training``); public, never a name from the data.
        mechanism: kind of noise.
        noise_multiplier: noise over sensitivity; gaussian and laplace.
        epsilon: only pure_dp.
        sampling_probability: q of a Poisson draw; 1 is the full batch.
        count: number of releases that this one line pays for.
        first_step: step of the first of them, or None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    purpose: _Word
    mechanism: Literal["gaussian", "laplace", "pure_dp"]
    noise_multiplier: _Positive | None = None
    epsilon: _Positive | None = None
    sampling_probability: float = Field(default=1.0, gt=0, le=1)
    count: int = Field(default=1, ge=1)
    first_step: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _require_fields_of_the_mechanism(self) -> "Charge":
        pure = self.mechanism == "pure_dp"
        if (self.epsilon is not None) != pure or (self.noise_multiplier is None) != pure:
            wanted = "epsilon and no noise_multiplier" if pure else "noise_multiplier and no epsilon"
            raise ValueError(f"a {self.mechanism} charge should have {wanted}")
        if pure and self.sampling_probability != 1:
            raise ValueError("a pure_dp charge should have sampling_probability 1: its epsilon is for the full batch")
        return self

    @property
    def unit_event(self) -> DpEvent:
        """Price of one of the releases: what a receipt is spent on."""
        if self.mechanism == "pure_dp":
            return PureDpEvent(self.epsilon or 0.0)
        kind = GaussianDpEvent if self.mechanism == "gaussian" else LaplaceDpEvent
        event = kind(self.noise_multiplier or 0.0)
        if self.sampling_probability == 1:
            return event
        return PoissonSampledDpEvent(self.sampling_probability, event)

    @property
    def event(self) -> DpEvent:
        """Price of all of them."""
        return self.unit_event if self.count == 1 else SelfComposedDpEvent(self.unit_event, self.count)

    @property
    def steps(self) -> range:
        """Steps paid for; empty for a charge that belongs to no step."""
        return range(0) if self.first_step is None else range(self.first_step, self.first_step + self.count)


class LedgerEntry(Charge):
    """One line of the file: a charge, who made it, and its place in the chain.

    Attributes:
        run: the run's identifier; public.
        plan: hash of the privacy plan, hex.
        checkpoint: identifier of the newest checkpoint on disk when it was charged, or None.
        unit: what the charge is counted per (``patient``, ``case``).
        units: digest of the table that says which case belongs to which unit.
        sequence: 1, 2, 3, ...
        previous: ``hash`` of the line before, 64 zeros for the first.
        version: of this format.
        hash: SHA-256 over the canonical JSON of all other fields.
    """

    run: _Word
    plan: _Hex
    checkpoint: str | None = None
    unit: _Word
    units: _Hash
    sequence: int = Field(ge=1)
    previous: _Hash
    version: Literal[1] = VERSION
    hash: _Hash

    @property
    def line(self) -> bytes:
        """The entry as it stands in the file, newline included."""
        return _canonical(self.model_dump()) + b"\n"


class Receipt:
    """Proof of a charge that is on disk; pays for as many releases as were charged, once each.

    Only ``Ledger.charge`` makes receipts.
    """

    __slots__ = ("_charge", "_left")

    def __init__(self, charge: Charge, *, maker: object) -> None:
        if maker is not _MAKER:
            raise Refusal("a receipt should come from Ledger.charge, found one made by hand: charge the ledger")
        self._charge = charge
        self._left = charge.count

    @property
    def charge(self) -> Charge:
        """What was paid."""
        return self._charge

    def spend(self, event: DpEvent) -> None:
        """Use it up for one release of this price.

        Raises:
            Refusal: if it is spent, or was paid for another price.
        """
        if event != self._charge.unit_event:
            raise Refusal(
                f"the release should cost what was charged, {self._charge.unit_event}, found {event}: charge this event"
            )
        if self._left < 1:
            raise Refusal(f"a receipt should pay for {self._charge.count} release(s), found one more: charge again")
        self._left -= 1

    def __reduce__(self) -> Any:
        raise TypeError("a receipt cannot be copied or stored: charge the ledger for every release")


_MAKER = object()


class Ledger:
    """A run's access to the ledger of its dataset.

    Args:
        path: the dataset's file; made by the first charge.
        run: identifier of this run.
        plan: hash of this run's privacy plan, hex.
        copy: the run's own file, which receives its lines again.
        unit: what charges are counted per.
        units: digest of the table of units; charges per one table cannot be added to charges per another.

    Raises:
        LedgerError: when the file, or the copy against the file, does not verify, or the dataset was charged per other
            units before.

    Formal guarantee:
        When ``charge`` returns, its line is on disk in the dataset's file (and in the copy). Whatever is
        drawn against receipts is therefore in the ledger, whenever the process dies and however many runs
        write at once.
    """

    def __init__(
        self,
        path: Path,
        run: str,
        plan: str,
        copy: Path | None = None,
        unit: str = "patient",
        units: str = FIRST_PREVIOUS,
    ) -> None:
        self.path, self.run, self.plan, self.copy = Path(path), run, plan, copy and Path(copy)
        self.unit, self.units = unit, units
        self._entries: list[LedgerEntry] = []
        self._size = 0  # bytes of the file that were verified
        with _locked_for_reading(self.path) as descriptor:
            self._catch_up(descriptor, opening=True)
        self.verify_copy()

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """All lines of the dataset, verified, those of other runs included."""
        with _locked_for_reading(self.path) as descriptor:
            self._catch_up(descriptor)
        return tuple(self._entries)

    def entries_of(self, run: str) -> tuple[LedgerEntry, ...]:
        """The lines of one run."""
        return tuple(entry for entry in self.entries if entry.run == run)

    @property
    def head(self) -> tuple[int, str]:
        """Sequence number and hash of the newest line known here; (0, zeros) for none. For the checkpoint."""
        return (self._entries[-1].sequence, self._entries[-1].hash) if self._entries else (0, FIRST_PREVIOUS)

    def charge(self, charge: Charge, checkpoint: str | None = None) -> Receipt:
        """Write a charge to disk and return the receipt for it.

        Args:
            charge: what is about to be released.
            checkpoint: identifier of the newest checkpoint on disk.

        Raises:
            LedgerError: when the file was tampered with, another process continues this run, or the line
                could not be written; no receipt exists then and nothing may be released.
        """
        try:
            self._append(charge, checkpoint)
        except OSError as error:
            raise LedgerError(
                f"a charge should be on disk before noise is drawn, found: {error.strerror or error}; "
                "nothing was released; make room or repair the disk, then continue with --c"
            ) from error
        return Receipt(charge, maker=_MAKER)

    def _append(self, charge: Charge, checkpoint: str | None) -> None:
        if self._size and not self.path.exists():
            raise LedgerError("the ledger should only grow, found no file any more; " + RESTORE)
        with _locked_for_writing(self.path) as descriptor:
            self._catch_up(descriptor)
            _set_torn_line_aside(self.path, descriptor, self._size)
            entry = self._entry(charge, checkpoint)
            _append(descriptor, entry.line)
            self._entries.append(entry)
            self._size += len(entry.line)
            if self.copy is not None:
                _append_to_copy(self.copy, entry.line)

    def verify_contains(self, sequence: int, hash: str) -> None:
        """Check that the file still holds the line that was its head when a checkpoint was written.

        Raises:
            LedgerError: if the ledger is shorter than that, or holds another line there.
        """
        found = len(self.entries)
        if sequence > found:
            raise LedgerError(
                f"ledger shorter than the checkpoint says: it should have at least {sequence} lines, found "
                f"{found}; " + RESTORE
            )
        if sequence and self._entries[sequence - 1].hash != hash:
            raise LedgerError(
                f"line {sequence} of the ledger should be the one the checkpoint knows, found another; " + RESTORE
            )

    def verify_copy(self) -> None:
        """Check that every line of the run's copy is in the dataset's file.

        The reverse may fail: a crash between the two writes leaves a line in the file alone.

        Raises:
            LedgerError: naming the first line of the copy that is missing.
        """
        if self.copy is None or not self.copy.exists():
            return
        known = {entry.line for entry in self.entries}
        for number, line in enumerate(self.copy.read_bytes().splitlines(keepends=True), 1):
            if line.endswith(b"\n") and line not in known:
                raise LedgerError(
                    f"line {number} of the run's copy should be in the dataset's ledger, found no such line; " + RESTORE
                )

    def _entry(self, charge: Charge, checkpoint: str | None) -> LedgerEntry:
        sequence, previous = self.head
        fields = charge.model_dump() | {
            "run": self.run,
            "plan": self.plan,
            "checkpoint": checkpoint,
            "unit": self.unit,
            "units": self.units,
            "sequence": sequence + 1,
            "previous": previous,
            "version": VERSION,
        }
        return LedgerEntry(**fields, hash=_digest(fields))

    def _catch_up(self, descriptor: int | None, opening: bool = False) -> None:
        """Verify what others appended since the last look; must hold the lock."""
        size = 0 if descriptor is None else os.fstat(descriptor).st_size
        last = self._entries[-1].line if self._entries else b""
        if size < self._size or _read(descriptor, self._size - len(last), self._size) != last:
            raise LedgerError("the ledger should only grow, found it shorter or rewritten under this run; " + RESTORE)
        text = _read(descriptor, self._size, size)
        complete = text[: text.rfind(b"\n") + 1]
        fresh = list(_parse(complete, self.head))
        if not opening and any(entry.run == self.run for entry in fresh):
            raise LedgerError(
                "one process should continue a run, found charges of another for it (two continuations): "
                "stop one of them, then continue from the newest checkpoint"
            )
        refuse_other_units(fresh, self.unit, self.units)
        self._entries += fresh
        self._size += len(complete)


def refuse_other_units(entries: Iterable[LedgerEntry], unit: str, units: str) -> None:
    """Refuse to go on where a dataset was charged per other units than now.

    Raises:
        LedgerError: naming both units.
    """
    for entry in entries:
        if (entry.unit, entry.units) != (unit, units):
            raise LedgerError(
                f"this dataset was charged per '{entry.unit}' of another table of units than today's '{unit}': charges "
                "per different units cannot be added; put the patients file back, or start a new dataset id"
            )


# ---- reading -------------------------------------------------------------------------------------


def read_ledger(path: Path) -> tuple[LedgerEntry, ...]:
    """All lines of a ledger, verified from the first to the last. Safe while a training writes.

    A torn last line is left out with a ``TornLineWarning``.

    Raises:
        LedgerError: naming the line that is unknown, edited, missing, doubled or out of order, or a missing
        file.
    """
    with _locked_for_reading(Path(path)) as descriptor:
        if descriptor is None:
            raise LedgerError(f"there should be a ledger named {Path(path).name}, found no such file; " + RESTORE)
        text = _read(descriptor, 0, os.fstat(descriptor).st_size)
    complete = text[: text.rfind(b"\n") + 1]
    if complete != text:
        message = "the last line of the ledger is torn: a process died while writing it; it is left out"
        warnings.warn(message, TornLineWarning, stacklevel=2)
    return tuple(_parse(complete, (0, FIRST_PREVIOUS)))


def read_copy(path: Path) -> tuple[LedgerEntry, ...]:
    """The lines of a run's copy, each verified by itself: as a selection, they are no chain.

    Raises:
        LedgerError: naming the line that is unknown or edited.
    """
    with _locked_for_reading(Path(path)) as descriptor:
        text = b"" if descriptor is None else _read(descriptor, 0, os.fstat(descriptor).st_size)
    complete = text[: text.rfind(b"\n") + 1]
    return tuple(_parse_line(number, line) for number, line in enumerate(complete.splitlines(keepends=True), 1))


def events_of(entries: Iterable[Charge]) -> list[DpEvent]:
    """The entries as events, counts as self-composition."""
    return [entry.event for entry in entries]


def epsilon_of(entries: Iterable[Charge], delta: float) -> float:
    """Epsilon of all entries together, computed from what was charged (``accounting.epsilon``)."""
    return epsilon(events_of(entries), delta)


def steps_done(entries: Iterable[LedgerEntry]) -> int:
    """Number of different training steps that were charged, counted per run."""
    return len({(entry.run, step) for entry in entries if entry.purpose == TRAINING for step in entry.steps})


def steps_wasted(entries: Iterable[LedgerEntry]) -> int:
    """Training steps that were charged again, because a crash lost them after their charge."""
    training = [entry for entry in entries if entry.purpose == TRAINING]
    return sum(len(entry.steps) for entry in training) - steps_done(training)


def _parse(text: bytes, head: tuple[int, str]) -> Iterator[LedgerEntry]:
    """Entries of complete lines that continue the chain after ``head``."""
    sequence, previous = head
    for line in text.splitlines(keepends=True):
        sequence += 1
        entry = _parse_line(sequence, line)
        if entry.sequence != sequence or entry.previous != previous:
            raise LedgerError(
                f"line {sequence} of the ledger should continue the line before it, found sequence "
                f"{entry.sequence}: a line is missing, doubled or out of order; " + RESTORE
            )
        previous = entry.hash
        yield entry


def _parse_line(number: int, line: bytes) -> LedgerEntry:
    """One line by itself: known, canonical, and with the hash of its content."""
    try:
        fields = json.loads(line)
    except ValueError:
        raise LedgerError(
            f"line {number} of the ledger should be a JSON object, found something else; " + RESTORE
        ) from None
    version = fields.get("version") if isinstance(fields, dict) else None
    if version != VERSION:
        raise LedgerError(
            f"line {number} of the ledger should have version {VERSION}, found {version!r}: update nnunet-dp"
        )
    try:
        entry = LedgerEntry.model_validate(fields)
    except ValidationError as error:
        where = sorted({".".join(map(str, part["loc"])) or "fields" for part in error.errors()})
        raise LedgerError(
            f"line {number} of the ledger holds {', '.join(where)} that this version does not know: update "
            "nnunet-dp, or " + RESTORE
        ) from None
    if entry.line != line or entry.hash != _digest({key: fields[key] for key in fields if key != "hash"}):
        raise LedgerError(
            f"line {number} of the ledger should have the hash of its content, found it edited; " + RESTORE
        )
    return entry


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(fields)).hexdigest()


# ---- the file ------------------------------------------------------------------------------------


@contextmanager
def _locked_for_writing(path: Path) -> Iterator[int]:
    """A descriptor under the exclusive lock; makes the file."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_size == 0:
            _sync_folder(path)
        yield descriptor
    finally:
        os.close(descriptor)  # releases the lock


@contextmanager
def _locked_for_reading(path: Path) -> Iterator[int | None]:
    """A descriptor under the shared lock, so that no line is half written; None where there is no file."""
    if not path.exists():
        yield None
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield descriptor
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """A new file's name is on disk only when its folder is."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(descriptor: int | None, start: int, end: int) -> bytes:
    parts: list[bytes] = []
    while descriptor is not None and start < end and (part := os.pread(descriptor, end - start, start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def _append(descriptor: int, line: bytes) -> None:
    """One write and one fsync; on failure the file as it was, and the error."""
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(f"{written} of {len(line)} bytes were written")
        os.fsync(descriptor)
    except OSError:
        _roll_back(descriptor, size)
        raise


def _roll_back(descriptor: int, size: int) -> None:
    """Safe even for a whole line: its receipt was not handed out. What stays on disk stays charged."""
    try:
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    except OSError:
        pass


def _set_torn_line_aside(path: Path, descriptor: int, end: int) -> None:
    """Move what follows the last newline to ``<name>.torn``, under the exclusive lock."""
    torn = _read(descriptor, end, os.fstat(descriptor).st_size)
    if torn:
        with _locked_for_writing(path.with_name(path.name + ".torn")) as side:
            _append(side, torn + b"\n")
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)


def _append_to_copy(path: Path, line: bytes) -> None:
    with _locked_for_writing(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size and _read(descriptor, size - 1, size) != b"\n":
            _set_torn_line_aside(path, descriptor, _read(descriptor, 0, size).rfind(b"\n") + 1)
        _append(descriptor, line)
