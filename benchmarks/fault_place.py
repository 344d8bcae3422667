"""A tiny phantom dataset in folders of its own, commands that are killed in them, and an independent recount."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from nnunet_dp.phantoms import write_dataset
from nnunet_dp.run import LEDGER

EPSILON, DELTA, STEPS, ROUNDS = 8.0, 1e-3, 30, 4
PLANS, TRAINER = "nnUNetPlansDP_faults", "nnUNetTrainerDP_AutoS"
TRAIN = ("nnUNetv2_train", "312", "2d", "0", "-tr", TRAINER, "-p", PLANS, "-device", "cpu")


def recounted(lines: Sequence[Mapping[str, Any]]) -> float:
    """Epsilon of ledger lines at the target's delta, as anybody would compute it."""
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    for line in lines:
        event, probability = GaussianDpEvent(line["noise_multiplier"]), line["sampling_probability"]
        accountant.compose(PoissonSampledDpEvent(probability, event) if probability < 1 else event, line["count"])
    return accountant.get_epsilon(DELTA)


def lines_of(ledger: Path) -> list[dict[str, Any]]:
    """Its complete lines."""
    text = ledger.read_text() if ledger.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@dataclass
class Place:
    """nnU-Net's folders with one dataset, in a folder of their own."""

    root: Path
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        folders = {f"nnUNet_{part}": str(self.root / part) for part in ("raw", "preprocessed", "results")}
        few = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        trainers = {"nnUNet_extTrainer": str(Path(__file__).resolve().parent.parent / "trainers")}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        self.environment = {**os.environ, **folders, **few, **trainers, "PATH": path}

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed" / "Dataset312_PhantomLesion"

    @property
    def model(self) -> Path:
        return self.root / "results" / "Dataset312_PhantomLesion" / f"{TRAINER}__{PLANS}__2d"

    @property
    def fold(self) -> Path:
        return self.model / "fold_0"

    def prepare(self) -> None:
        """Ten patients, preprocessed, and a plan of few steps."""
        if (self.preprocessed / f"{PLANS}.json").is_file():
            return
        for part in ("raw", "preprocessed", "results"):
            (self.root / part).mkdir(parents=True, exist_ok=True)
        write_dataset(self.root / "raw", "lesion", 10, 3, dataset_id=312, shape=(32, 32))
        self.must("nnUNetv2_plan_and_preprocess", "-d", "312", "-c", "2d", "-np", "1", "-npfp", "1")
        given = ("--epsilon", f"{EPSILON:g}", "--delta", f"{DELTA:g}", "--no-start", "--morphology-share", "0.3")
        hand = ("--set", f"steps={STEPS}", "--set", "features_per_stage=4,8,8", "-o", PLANS)
        self.must("nnunet-dp", "plan", "-d", "312", "-c", "2d", *given, *hand)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Complete lines of the dataset's ledger."""
        return lines_of(self.preprocessed / LEDGER)

    def run(self, *line: str, before: Callable[[], None] | None = None, **variables: str) -> tuple[int, str]:
        """A command to its end: exit code and what it said; ``before`` runs in the new process."""
        done = subprocess.run(
            line, env=self.environment | variables, cwd=self.root, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1800, preexec_fn=before,
        )  # fmt: skip
        return done.returncode, done.stdout

    def must(self, *line: str) -> None:
        """A command that has to succeed."""
        code, said = self.run(*line)
        if code:
            raise SystemExit(f"{' '.join(line)} ended with {code}:\n{said[-3000:]}")

    @contextmanager
    def running(self, *line: str) -> Iterator[subprocess.Popen[bytes]]:
        """A command in the background; it and everything below it is killed in the end."""
        with (self.root / "console.txt").open("ab") as console:
            process = subprocess.Popen(
                line, env=self.environment, cwd=self.root, stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                start_new_session=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def killed(self, line: Sequence[str], begun: Callable[[], object], seconds: float) -> bool:
        """Start, wait until it has begun its work, and a random while of at most ``seconds``; kill.

        Returns:
            Whether there was anything left to kill.
        """
        with self.running(*line) as process:
            end = time.monotonic() + 300
            while not begun() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            time.sleep(random.uniform(0, seconds))
            if process.poll():
                said = (self.root / "console.txt").read_text(errors="replace")
                raise SystemExit(f"{' '.join(line)} ended by itself with {process.poll()}:\n{said[-3000:]}")
            return process.poll() is None
