"""The audit's own test: it must catch every broken build and let the correct one pass, without knowing which is which.

The protocol (who is a member, which attack, which threshold, seeds, numbers of trials, error level) is fixed and hashed
before the first build is run, and so is, with a salt, who hides behind which random name. All builds are then examined
under those names; only the finished verdicts are opened.

Error level: a single answer that chance can turn may fail a correct build with probability ``FAMILY_ERROR`` divided by
the number of all such answers of all builds (Bonferroni), so that the whole test calls any correct build broken with
probability at most ``FAMILY_ERROR``.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from nnunet_dp.audit.builds import FAULTS, LEARNING_RATE, RULES, SHAPE, Build, Subject, correct_builds
from nnunet_dp.audit.checks import TESTS, Finding, Sizes, examine
from nnunet_dp.charges import content_hash
from nnunet_dp.workers import Progress, in_order

FAMILY_ERROR = 0.01
CORRECT_RUNS = 20
BROKEN_RUNS = 2
NO_PROOF = (
    "An audit does not prove privacy. It can show that a claim is wrong; where it shows nothing, a fault that no check "
    "looks for may still be there."
)


@dataclass(frozen=True)
class Verdict:
    """What one examined build came to.

    Attributes:
        label: its random name.
        build: what it was; opened after the findings were made.
        findings: of all checks.
        seconds: the examination took.
    """

    label: str
    build: Build
    findings: tuple[Finding, ...] = field(repr=False)
    seconds: float

    @property
    def by(self) -> tuple[str, ...]:
        """Checks that failed it."""
        return tuple(sorted({finding.check for finding in self.findings if finding.failed}))


@dataclass(frozen=True)
class SelfTest:
    """What came of all builds.

    Attributes:
        protocol: fixed before the run.
        protocol_sha256: of its canonical JSON, taken before the run.
        verdicts: in the order of examination.
        seconds: the whole run took.
    """

    protocol: dict[str, Any]
    protocol_sha256: str
    verdicts: tuple[Verdict, ...]
    seconds: float

    @property
    def builds(self) -> list[dict[str, Any]]:
        """One entry a build: a broken one counts as caught if it was in each of its runs, the correct one if in any."""
        return [self._entry(name) for name in ("correct", *self.protocol["faults"]) if self._of(name)]

    @property
    def passed(self) -> bool:
        """Whether exactly the broken builds were caught."""
        return all(entry["caught"] == (entry["name"] != "correct") for entry in self.builds)

    def _of(self, name: str) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.build.name == name]

    def _entry(self, name: str) -> dict[str, Any]:
        runs = self._of(name)
        caught = [bool(run.by) for run in runs]
        return {
            "name": name,
            "what": runs[0].build.what,
            "caught": any(caught) if name == "correct" else all(caught),
            "by": sorted({check for run in runs for check in run.by}),
            "runs": len(runs),
            "caught_runs": sum(caught),
            "examined_as": [
                {
                    "label": run.label,
                    "rule": run.build.rule,
                    "engine": "two" if run.build.batched else "one",
                    "seconds": round(run.seconds, 1),
                    "findings": [finding.as_dict() for finding in run.findings],
                }
                for run in runs
            ],
        }

    def as_dict(self) -> dict[str, Any]:
        """The report."""
        return {
            "passed": self.passed,
            "builds": self.builds,
            "protocol": self.protocol,
            "protocol_sha256": self.protocol_sha256,
            "seconds": round(self.seconds, 1),
            "note": NO_PROOF,
        }

    def lines(self) -> list[tuple[str, str]]:
        """For people: which check catches which fault."""
        rows = []
        for entry in self.builds:
            verdict = f"caught in {entry['caught_runs']} of {entry['runs']}"
            rows.append((entry["name"], f"{verdict}{': ' if entry['by'] else ''}{', '.join(entry['by'])}"))
        end = "exactly the broken builds were caught" if self.passed else "THE SELF-TEST FAILED"
        result = ("result", f"{end}, {self.seconds:.0f} s")
        return [*rows, result, ("protocol", self.protocol_sha256), ("note", NO_PROOF)]


def run_self_test(
    seed: int = 1,
    processes: int = 2,
    progress: Progress | None = None,
    sizes: Sizes | None = None,
    correct: int = CORRECT_RUNS,
    broken: int = BROKEN_RUNS,
    faults: Sequence[Build] = FAULTS,
) -> SelfTest:
    """Examine the correct build and the broken ones under random names.

    Args:
        seed: of names, order, coins, phantoms and initial weights; noise and draws have the system's entropy.
        processes: that examine builds side by side.
        progress: told (builds examined, builds in all).
        sizes: how much is tried in each check.
        correct: how many times the correct build is examined, under all rules and both engines.
        broken: how many times each broken build is.
        faults: the broken builds.
    """
    began, sizes = time.monotonic(), sizes or Sizes()
    rng = np.random.default_rng(seed)
    builds = [*correct_builds(correct), *(fault for fault in faults for _ in range(broken))]
    order = rng.permutation(len(builds))
    hidden = {rng.bytes(4).hex(): builds[place] for place in order}
    salt = secrets.token_hex(16)
    protocol = {
        **_protocol(sizes, len(builds), [fault.name for fault in faults], correct, broken, seed),
        "assignment_sha256": content_hash({"salt": salt, **{label: build.name for label, build in hidden.items()}}),
    }
    fixed = content_hash(protocol)
    items = [_Item(label, build, sizes, protocol["level"], int(rng.integers(2**20))) for label, build in hidden.items()]
    verdicts = tuple(in_order(_examined, items, processes, progress, _one_thread))
    return SelfTest({**protocol, "salt": salt}, fixed, verdicts, time.monotonic() - began)


def _protocol(
    sizes: Sizes, builds: int, faults: Sequence[str], correct: int, broken: int, seed: int
) -> dict[str, Any]:
    """Everything that is decided before the run; plain JSON."""
    content = {
        "package": version("nnunet_dp"),
        "who_is_a_member": "each canary by a fair coin of its own; an empty slot otherwise (zero-out)",
        "attack": "released sum at the canary's coordinate, added over the steps; everybody else known",
        "threshold": "half-way between absent and present under the planned noise; fixed",
        "family_error": FAMILY_ERROR,
        "level": FAMILY_ERROR / (builds * TESTS),
        "answers_of_chance_per_build": TESTS,
        "correct_runs": correct,
        "runs_of_each_fault": broken,
        "faults": list(faults),
        "rules": RULES,
        "learning_rate": LEARNING_RATE,
        "image": list(SHAPE),
        "sizes": asdict(sizes),
        "seed": seed,
    }
    return json.loads(json.dumps(content))


@dataclass(frozen=True)
class _Item:
    label: str
    build: Build
    sizes: Sizes
    level: float
    seed: int


def _examined(item: _Item) -> Verdict:
    _one_thread()
    began = time.monotonic()
    findings = examine(Subject(item.label, item.build), item.sizes, item.level, item.seed)
    return Verdict(item.label, item.build, tuple(findings), time.monotonic() - began)


def _one_thread() -> None:
    """Networks so small gain nothing from threads, and lose much where others compute."""
    torch.set_num_threads(1)
