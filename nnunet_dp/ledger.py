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
    >>> from nnunet_dp.charges import epsilon_of
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

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dp_accounting.dp_event import DpEvent

from nnunet_dp.appending import (
    append_line,
    append_to_copy,
    locked_for_reading,
    locked_for_writing,
    read_range,
    set_torn_line_aside,
)
from nnunet_dp.charges import (
    FIRST_PREVIOUS,
    RESTORE,
    VERSION,
    Charge,
    LedgerEntry,
    LedgerError,
    content_hash,
    parse_chain,
    parse_line,
)
from nnunet_dp.errors import Refusal


class TornLineWarning(UserWarning):
    """The last line has no end: a process died while it wrote it, before it drew any noise."""


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
        with locked_for_reading(self.path) as descriptor:
            self._catch_up(descriptor, opening=True)
        self.verify_copy()

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """All lines of the dataset, verified, those of other runs included."""
        with locked_for_reading(self.path) as descriptor:
            self._catch_up(descriptor)
        return tuple(self._entries)

    def entries_of(self, run: str) -> tuple[LedgerEntry, ...]:
        """The lines of one run."""
        return tuple(entry for entry in self.entries if entry.run == run)

    @property
    def own_entries(self) -> tuple[LedgerEntry, ...]:
        """The lines of this run."""
        return self.entries_of(self.run)

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
        with locked_for_writing(self.path) as descriptor:
            self._catch_up(descriptor)
            set_torn_line_aside(self.path, descriptor, self._size)
            entry = self._entry(charge, checkpoint)
            append_line(descriptor, entry.line)
            self._entries.append(entry)
            self._size += len(entry.line)
            if self.copy is not None:
                append_to_copy(self.copy, entry.line)

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
        return LedgerEntry(**fields, hash=content_hash(fields))

    def _catch_up(self, descriptor: int | None, opening: bool = False) -> None:
        """Verify what others appended since the last look; must hold the lock."""
        size = 0 if descriptor is None else os.fstat(descriptor).st_size
        last = self._entries[-1].line if self._entries else b""
        if size < self._size or read_range(descriptor, self._size - len(last), self._size) != last:
            raise LedgerError("the ledger should only grow, found it shorter or rewritten under this run; " + RESTORE)
        text = read_range(descriptor, self._size, size)
        complete = text[: text.rfind(b"\n") + 1]
        fresh = list(parse_chain(complete, self.head))
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
                "per different units cannot be added; plan with the earlier patients file, or start a new dataset id"
            )


# ---- reading -------------------------------------------------------------------------------------


def read_ledger(path: Path) -> tuple[LedgerEntry, ...]:
    """All lines of a ledger, verified from the first to the last. Safe while a training writes.

    A torn last line is left out with a ``TornLineWarning``.

    Raises:
        LedgerError: naming the line that is unknown, edited, missing, doubled or out of order, or a missing
        file.
    """
    with locked_for_reading(Path(path)) as descriptor:
        if descriptor is None:
            raise LedgerError(f"there should be a ledger named {Path(path).name}, found no such file; " + RESTORE)
        text = read_range(descriptor, 0, os.fstat(descriptor).st_size)
    complete = text[: text.rfind(b"\n") + 1]
    if complete != text:
        message = "the last line of the ledger is torn: a process died while writing it; it is left out"
        warnings.warn(message, TornLineWarning, stacklevel=2)
    return tuple(parse_chain(complete, (0, FIRST_PREVIOUS)))


def read_copy(path: Path) -> tuple[LedgerEntry, ...]:
    """The lines of a run's copy, each verified by itself: as a selection, they are no chain.

    Raises:
        LedgerError: naming the line that is unknown or edited.
    """
    with locked_for_reading(Path(path)) as descriptor:
        text = b"" if descriptor is None else read_range(descriptor, 0, os.fstat(descriptor).st_size)
    complete = text[: text.rfind(b"\n") + 1]
    return tuple(parse_line(number, line) for number, line in enumerate(complete.splitlines(keepends=True), 1))
