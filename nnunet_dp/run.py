"""A training run on disk: its lock, its ledger, its checkpoints, and what becomes of an older run in the same folder.

The dataset's ledger lies in the preprocessed folder and counts every charge ever made on the dataset; the run's own
lines lie again in the fold's folder, beside the weights they paid for. Starting anew beside an old run archives the old
model and keeps its charges; continuing needs the checkpoint that the ledger knows.

Formal guarantee:
    No training starts on a dataset whose ledger has lost a line that any model folder or checkpoint still proves.
"""

from __future__ import annotations

import fcntl
import io
import os
import secrets
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from nnunet_dp.charges import FIRST_PREVIOUS, LedgerEntry
from nnunet_dp.errors import Refusal
from nnunet_dp.ledger import Ledger, read_ledger
from nnunet_dp.morphology import FILE as RULES
from nnunet_dp.replacing import replacing

LEDGER = "privacy_ledger.jsonl"
LATEST = "checkpoint_latest.pth"
FINAL = "checkpoint_final.pth"
CARD = "privacy_card.json"  # in an exported model, whose charges lie in a ledger that stayed with its data
_LOCK = "training.lock"
_MODELS = "nnUNetTrainerDP*"
_FEDERATED = "federated.json"  # beside the model of a federated run, whose charges lie in the sites' ledgers
_BACK = "put the dataset's ledger back from a backup before training on"


class RunFolder:
    """The folder of one fold of one model.

    Args:
        folder: fold folder, e.g. ``nnUNetTrainerDP__nnUNetPlansDP_eps8__3d_fullres/fold_0``.
        dataset_ledger: the dataset's ledger in the preprocessed folder.
        results: the dataset's results folder, whose other models must agree with that ledger.
    """

    def __init__(self, folder: Path, dataset_ledger: Path, results: Path) -> None:
        self.folder, self.dataset_ledger, self.results = folder, dataset_ledger, results
        self.archived: str | None = None

    def __repr__(self) -> str:
        """The folder's name."""
        return f"RunFolder({self.name})"

    @property
    def name(self) -> str:
        """Model and fold, the public part of a run's name."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    def lock(self) -> None:
        """Hold the folder until this process ends.

        Raises:
            Refusal: when another training holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)  # held for the life of the process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise Refusal(f"another training is writing to {self.name}: wait for it, or choose another fold") from None

    def start(
        self,
        plan: str,
        continuing: bool,
        keep: Path | None = None,
        unit: str = "patient",
        units: str = FIRST_PREVIOUS,
        label: str = "",
    ) -> Ledger:
        """Open the ledger for a new run; an older run in the folder is archived.

        Args:
            plan: digest of the privacy plan.
            unit: what charges are counted per.
            units: digest of the table of units.
            continuing: whether the user asked to continue (``--c``), though no checkpoint was found.
            keep: a file of this process in the folder that stays (its log).
            label: public, the beginning of the run's own part of its name.

        Raises:
            Refusal: when continuing was asked and the ledger shows that a run was begun here.
        """
        self.verify_ledger()
        if continuing and any(entry.run.startswith(self.name + "/") for entry in self._charges()):
            raise Refusal(
                f"--c was given and the ledger holds charges of {self.name}, but its {LATEST} is missing: put the "
                "checkpoint back, or start a new run without --c (the old charges stay)"
            )
        run = f"{self.name}/{label}{secrets.token_hex(8)}"
        ledger = Ledger(self.dataset_ledger, run, plan, self.folder / LEDGER, unit, units)
        self.archived = self._archive(keep)
        return ledger

    def resume(self, state: dict[str, Any], unit: str = "patient", units: str = FIRST_PREVIOUS) -> Ledger:
        """Open the ledger of the run that wrote a checkpoint.

        Args:
            state: the checkpoint's.
            unit: what charges are counted per.
            units: digest of the table of units.

        Raises:
            Refusal: when the dataset's ledger is missing or lacks lines.
        """
        self.verify_ledger()
        if not self.dataset_ledger.is_file():
            raise Refusal(f"{LEDGER} is missing in the preprocessed folder although a checkpoint exists: put it back")
        return Ledger(self.dataset_ledger, state["run"], state["plan"], self.folder / LEDGER, unit, units)

    def verify_ledger(self) -> None:
        """Refuse a dataset ledger that lacks charges which a model or a checkpoint of the dataset still proves.

        Raises:
            Refusal: saying what proves the loss.
        """
        copies = {copy: copy.read_bytes() for copy in sorted(self.results.rglob(LEDGER))}  # before the ledger grows on
        states = [read_checkpoint(file).get("private") for file in sorted(self.results.rglob(f"{_MODELS}/**/{LATEST}"))]
        finals = self.results.rglob(f"{_MODELS}/**/{FINAL}")
        models = any(_was_trained_here(file.parent.parent) for file in finals)
        charges = self._charges()
        known = {entry.line for entry in charges}
        for copy, content in copies.items():
            lost = sum(line not in known for line in content.splitlines(keepends=True) if line.endswith(b"\n"))
            if lost:
                name = copy.parent.relative_to(self.results)
                raise Refusal(f"{lost} charges in {name}/{LEDGER} are missing from the dataset's {LEDGER}: {_BACK}")
        if models and not charges:
            raise Refusal(f"private models of this dataset exist, but no {LEDGER} in its preprocessed folder: {_BACK}")
        heads = {(0, FIRST_PREVIOUS), *((entry.sequence, entry.hash) for entry in charges)}
        if any(state and (state["ledger_sequence"], state["ledger_head"]) not in heads for state in states):
            raise Refusal(f"the dataset's {LEDGER} is shorter than a checkpoint of this dataset says: {_BACK}")

    def _charges(self) -> tuple[LedgerEntry, ...]:
        return read_ledger(self.dataset_ledger) if self.dataset_ledger.is_file() else ()

    def _archive(self, keep: Path | None) -> str | None:
        """Move an older run's files to ``archive/`` beside the fold (nnU-Net parses every fold_*); say where."""
        old = [file for file in self.folder.iterdir() if file.name != _LOCK and file != keep]
        if not any(file.name in (LEDGER, LATEST, FINAL, RULES) for file in old):
            return None
        target = self.folder.parent / "archive" / f"{self.folder.name}_{secrets.token_hex(4)}"
        target.mkdir(parents=True)
        for file in old:
            shutil.move(str(file), target / file.name)
        return f"archive/{target.name}"


def _was_trained_here(model: Path) -> bool:
    """Whether this dataset paid for a model: not those of federated runs (their sites did), nor installed exports."""
    return not any((model / file).is_file() for file in (_FEDERATED, CARD))


def write_checkpoint(content: dict[str, Any], file: Path) -> None:
    """Write a checkpoint whole or not at all; whoever holds the folder's lock also clears what a killed writer left."""
    for left in file.parent.glob(f".{file.name}.*.tmp"):
        left.unlink()
    with replacing(file) as stream:
        buffer = io.BytesIO()
        torch.save(content, buffer)  # on a full disk torch raises no OSError by itself
        stream.write(buffer.getbuffer())


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint without running any code from it.

    Raises:
        Refusal: for a file that is damaged or holds anything but tensors and plain values.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load does not look at the checksums
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in every part of zipfile, pickle and torch
        raise Refusal(f"{file.name} cannot be read ({type(error).__name__}): put an intact copy back") from None
