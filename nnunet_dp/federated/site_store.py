"""Where a site keeps what it must remember: every message is a new process, so all state lies on the site's disk.

    preprocessed/DATASET/federated/prepared_SHA256_CONFIGURATION.json   plans that were admitted and preprocessed
    preprocessed/DATASET/federated/fingerprint_RUN.json                 what was released for a run's fingerprint
    preprocessed/DATASET/federated/run_RUN.json                         terms of a run and this site's private plans
    preprocessed/DATASET/federated/site.lock                            held by whoever works on a message
    results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_all              an ordinary run folder
    results/DATASET/federated_log.txt                                   why messages were declined; it never leaves

>>> may_name_a_folder("nnUNetPlans"), may_name_a_folder("../../etc"), may_name_a_folder("a__b")
(True, False, False)

The order of a run's first files is: model files, ``checkpoint_latest.pth``, ``run_RUN.json``, first charge. So a run
that is recorded had a checkpoint: where it is missing, it was lost, and the run does not begin a second time.

Design note: what a site sent is in the checkpoint and nowhere else: the reply's arrays *are* the weights of the state
that the next round continues from. One file, replaced whole, cannot disagree with itself; a process killed before it
was written has lost its round (the charges stay), one killed after it sends the same arrays again for nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nnunet_dp.errors import Refusal
from nnunet_dp.federated.protocol import Code, Terms
from nnunet_dp.federated.site_settings import SiteSettings
from nnunet_dp.replacing import replacing

SITE_TRAINER = "nnUNetTrainerDP_Federated"
"""Door of the runs with a guarantee; ``run.RunFolder`` and ``nnunet-dp status`` know its folders by the first word."""
FREE_TRAINER = "nnUNetTrainer_FedNoGuarantee"
"""Folders of the modes without a guarantee; deliberately no ``nnUNetTrainerDP*``."""
NO_GUARANTEE = "NO_GUARANTEE.txt"
_FOLDER = "federated"
_TRAINING_LOCK = "training.lock"  # the one that ``run.RunFolder`` takes: nnUNetv2_train waits for us and we for it
_NAME = re.compile(r"[A-Za-z0-9](?:_?[A-Za-z0-9.-])*")
_PATIENCE_SECONDS = 3.0  # a killed process's loaders are gone within half a second


class Declined(Exception):
    """A message gets this code; the reason is for the site's own log.

    Attributes:
        code: of the reply.
        fields: further fields of the reply, all of them public (what the ledger says was spent).
    """

    def __init__(self, code: Code, reason: str, **fields: Any) -> None:
        super().__init__(reason)
        self.code, self.fields = code, fields


@dataclass(frozen=True)
class Store:
    """A site's files of one dataset.

    Attributes:
        dataset: DatasetXXX_Name.
        raw: the raw dataset's folder.
        preprocessed: the preprocessed dataset's folder.
        results: the dataset's results folder.
    """

    dataset: str
    raw: Path
    preprocessed: Path
    results: Path

    @classmethod
    def of(cls, settings: SiteSettings) -> Store:
        """The files of the settings' dataset; raises a UsageRefusal where folders or dataset are unknown."""
        name = settings.dataset_name()
        raw, preprocessed, results = (settings.folder(part) / name for part in ("raw", "preprocessed", "results"))
        return cls(name, raw, preprocessed, results)

    @property
    def dataset_ledger(self) -> Path:
        """Every charge ever made on the dataset."""
        from nnunet_dp.run import LEDGER

        return self.preprocessed / LEDGER

    def dataset_json(self) -> dict[str, Any]:
        """The dataset's description."""
        for folder in (self.raw, self.preprocessed):
            if (folder / "dataset.json").is_file():
                return json.loads((folder / "dataset.json").read_text())
        raise Refusal(f"{self.dataset} should have a dataset.json, found none: name the right dataset in the settings")

    def fold(self, trainer: str, plans_name: str, configuration: str) -> Path:
        """The run's folder: all of a site's patients train, so the fold is always ``all``."""
        return self.results / f"{trainer}__{plans_name}__{configuration}" / "fold_all"

    # ---- records -----------------------------------------------------------------------------------------------

    def prepared(self, plans_sha256: str, configuration: str) -> dict[str, Any]:
        """The admitted plans that were preprocessed.

        Raises:
            Declined: when these were not: ``plans_mismatch`` where others were, else ``not_prepared``.
        """
        if not may_name_a_folder(configuration):
            raise Declined(Code.malformed, "the configuration's name is none of nnU-Net's")
        file = self._prepared_file(plans_sha256, configuration)
        if file.is_file():
            return json.loads(file.read_text())
        others = any((self.preprocessed / _FOLDER).glob("prepared_*.json"))
        code = Code.plans_mismatch if others else Code.not_prepared
        raise Declined(code, f"these plans were not prepared here for this configuration (others: {others})")

    def is_prepared(self, plans_sha256: str, configuration: str) -> bool:
        """Whether these plans were preprocessed."""
        return self._prepared_file(plans_sha256, configuration).is_file()

    def write_prepared(self, plans_sha256: str, configuration: str, plans: Mapping[str, Any]) -> None:
        """Note that everything is preprocessed with these admitted plans."""
        self._write(self._prepared_file(plans_sha256, configuration), dict(plans))

    def note_attempt(self, plans_sha256: str, configuration: str, most: int) -> None:
        """Note on disk, before any image is read, that these plans are tried.

        Raises:
            Declined: when as many others as the site allows were tried before, whether they succeeded or not.
        """
        file, mine = self.preprocessed / _FOLDER / "plans_tried.json", f"{plans_sha256}_{configuration}"
        tried = json.loads(file.read_text()) if file.is_file() else []
        if mine in tried:
            return
        if len(tried) >= most:
            raise Declined(Code.settings_refuse, f"max_plans: {len(tried)} other plans were tried on this dataset")
        self._write(file, [*tried, mine])

    def run_record(self, run: str) -> dict[str, Any] | None:
        """``terms`` and private ``plans`` of a run that has begun here, or None."""
        file = self._run_file(run)
        return json.loads(file.read_text()) if file.is_file() else None

    def write_run_record(self, terms: Terms, plans: Mapping[str, Any]) -> None:
        """Note that a run has begun; written once its first checkpoint is on disk."""
        self._write(self._run_file(terms.run), {"terms": terms.model_dump(mode="json"), "plans": dict(plans)})

    def fingerprint(self, run: str) -> dict[str, Any] | None:
        """``asked`` and the released ``votes`` of a run's fingerprint, or None."""
        file = self._fingerprint_file(run)
        return json.loads(file.read_text()) if file.is_file() else None

    def write_fingerprint(self, run: str, asked: Mapping[str, Any], votes: Sequence[float]) -> None:
        """Keep what was released, to send it again for nothing."""
        self._write(self._fingerprint_file(run), {"asked": dict(asked), "votes": list(votes)})

    def fingerprint_charges(self, run: str) -> Path:
        """Copy of what a run's fingerprint was charged; beside the models, so that a lost ledger is noticed."""
        return self.results / _FOLDER / f"fingerprint_{run}" / "privacy_ledger.jsonl"

    def note_no_guarantee(self) -> None:
        """Note, before it begins, that a mode without guarantee is run on this dataset; the note stays."""
        for folder in (self.preprocessed, self.results):
            file = _no_guarantee_file(folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as stream:
                stream.write(b"This dataset was used without any privacy guarantee.\n")

    def _prepared_file(self, plans_sha256: str, configuration: str) -> Path:
        return self.preprocessed / _FOLDER / f"prepared_{plans_sha256}_{configuration}.json"

    def _fingerprint_file(self, run: str) -> Path:
        return self.preprocessed / _FOLDER / f"fingerprint_{run}.json"

    def _run_file(self, run: str) -> Path:
        return self.preprocessed / _FOLDER / f"run_{run}.json"

    def _write(self, file: Path, content: Any) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            stream.write(json.dumps(content, indent=1).encode())

    # ---- one message at a time ---------------------------------------------------------------------------------

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the dataset against every other message, so that no two of them spend the same remainder.

        Raises:
            Declined: ``busy``.
        """
        with _holding(self.preprocessed / _FOLDER / "site.lock"):
            yield

    @contextmanager
    def held_fold(self, fold: Path) -> Iterator[None]:
        """Hold a run's folder, also against ``nnUNetv2_train``; raises ``Declined`` as ``held``."""
        with _holding(fold / _TRAINING_LOCK):
            yield

    # ---- the log that stays ------------------------------------------------------------------------------------

    def log(self, text: str) -> None:
        """A line in the site's own log."""
        self.results.mkdir(parents=True, exist_ok=True)
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        with (self.results / "federated_log.txt").open("a") as stream:
            stream.write(f"{now} {text}\n")


def fingerprint_run(run: str) -> str:
    """Name under which the dataset's ledger holds a run's fingerprint."""
    return f"fingerprint/{run}"


def released_without_guarantee(*folders: Path) -> bool:
    """Whether a mode without guarantee was ever run on the dataset of these preprocessed and results folders."""
    noted = any(_no_guarantee_file(folder).is_file() for folder in folders)
    return noted or any(any(folder.glob(f"{FREE_TRAINER}__*")) for folder in folders)


def _no_guarantee_file(folder: Path) -> Path:
    return folder / _FOLDER / NO_GUARANTEE


def may_name_a_folder(text: Any) -> bool:
    """Whether a coordinator's text may become part of a folder's name (nnU-Net divides those at double underscores)."""
    return isinstance(text, str) and len(text) <= 60 and _NAME.fullmatch(text) is not None


@contextmanager
def _holding(file: Path) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        _lock(lock, file.name)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # for forked loaders too, which share the lock
    finally:
        os.close(lock)


def _lock(lock: int, name: str) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > end:
                raise Declined(Code.busy, f"another process holds {name}") from None
            time.sleep(0.1)
