"""Charges: what one line of the ledger says, how it is written, and what many lines cost together.

Each line is one canonical JSON object: the charge's fields, the run, the plan's hash, the newest checkpoint, the unit,
a sequence number from 1, the hash of the line before and its own hash.

>>> charge = Charge(purpose="training", mechanism="gaussian", noise_multiplier=5.0, first_step=0)
>>> round(epsilon_of([charge], 1e-5), 1)
0.7

What a reader refuses: a line it does not know (version, field, mechanism), edited, missing, doubled or out of order.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, TypeVar

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
MORPHOLOGY = "morphology"
FINGERPRINT = "fingerprint"
FIRST_PREVIOUS = "0" * 64
RESTORE = "restore the file from a backup, or archive model and ledger and start anew; do not continue on it"

_Word = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
_Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]+$")]
_Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LedgerError(Refusal):
    """The ledger is not what it should be: nothing may be charged to it, and no epsilon read from it."""


class Charge(BaseModel):
    """What is about to be released, in public numbers.

    Attributes:
        purpose: what it is for (``training``, ``morphology``, ``fingerprint``); public, never a name from the data.
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
        return canonical_line(self.model_dump()) + b"\n"


Entry = TypeVar("Entry", bound=Charge)


def events_of(entries: Iterable[Charge]) -> list[DpEvent]:
    """The entries as events, counts as self-composition."""
    return [entry.event for entry in entries]


def epsilon_of(entries: Iterable[Charge], delta: float) -> float:
    """Epsilon of all entries together, computed from what was charged (``accounting.epsilon``)."""
    return epsilon(events_of(entries), delta)


def of_purpose(entries: Iterable[Entry], purpose: str) -> list[Entry]:
    """The entries that paid for ``purpose``."""
    return [entry for entry in entries if entry.purpose == purpose]


def steps_charged(entries: Iterable[Charge]) -> int:
    """Number of training releases charged, those lost in a crash included."""
    return sum(entry.count for entry in of_purpose(entries, TRAINING))


def steps_done(entries: Iterable[LedgerEntry]) -> int:
    """Number of different training steps that were charged, counted per run."""
    return len({(entry.run, step) for entry in of_purpose(entries, TRAINING) for step in entry.steps})


def steps_wasted(entries: Iterable[LedgerEntry]) -> int:
    """Training steps that were charged again, because a crash lost them after their charge."""
    training = of_purpose(entries, TRAINING)
    return sum(len(entry.steps) for entry in training) - steps_done(training)


def parse_chain(text: bytes, head: tuple[int, str]) -> Iterator[LedgerEntry]:
    """Entries of complete lines that continue the chain after ``head``."""
    sequence, previous = head
    for line in text.splitlines(keepends=True):
        sequence += 1
        entry = parse_line(sequence, line)
        if entry.sequence != sequence or entry.previous != previous:
            raise LedgerError(
                f"line {sequence} of the ledger should continue the line before it, found sequence "
                f"{entry.sequence}: a line is missing, doubled or out of order; " + RESTORE
            )
        previous = entry.hash
        yield entry


def parse_line(number: int, line: bytes) -> LedgerEntry:
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
    if entry.line != line or entry.hash != content_hash({key: fields[key] for key in fields if key != "hash"}):
        raise LedgerError(
            f"line {number} of the ledger should have the hash of its content, found it edited; " + RESTORE
        )
    return entry


def canonical_line(fields: dict[str, Any]) -> bytes:
    """The one way to write a line's fields: sorted keys, no spaces, no newline."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def content_hash(fields: dict[str, Any]) -> str:
    """SHA-256 of a line's fields without its hash, hex."""
    return hashlib.sha256(canonical_line(fields)).hexdigest()
