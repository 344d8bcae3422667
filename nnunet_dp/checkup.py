"""A checkup: what could keep a private training from running here, found before anybody waits for it.

A `Finding` is one fact with a verdict and, where it is a problem, what to type. This file holds the machine's:
versions, environment variables, trainers, disk, accelerator. ``nnunet_checkup`` holds a dataset's. Nothing is written,
charged or changed, but for an empty file that is made and taken away to see whether a folder can be written to.

>>> print(Finding("python", "3.11").plain())
ok       python: 3.11
>>> def examine():
...     raise Refusal("no such folder")
>>> print(examined("raw data", examine, "export nnUNet_raw=FOLDER").plain())
problem  raw data: no such folder
remedy   export nnUNet_raw=FOLDER
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from nnunet_dp.errors import Refusal
from nnunet_dp.link import VARIABLE, external_trainer_path, is_linked

PACKAGES = ("nnunetv2", "torch", "dp-accounting")
FOLDERS = ("raw", "preprocessed", "results")
LEAST_FREE_BYTES = 2**30
"""Free disk below which a training should not begin, whatever it needs itself: logs and nnU-Net's validation."""


@dataclass(frozen=True)
class Finding:
    """One fact.

    Attributes:
        what: was looked at.
        found: in words; of a problem also what should have been found.
        ok: whether it keeps nothing from running.
        remedy: what to type, where it does.
    """

    what: str
    found: str
    ok: bool = True
    remedy: str = ""

    @property
    def verdict(self) -> str:
        """For the first column."""
        return "ok" if self.ok else "problem"

    def as_dict(self) -> dict[str, str]:
        """For ``--json``."""
        return {"what": self.what, "verdict": self.verdict, "found": self.found, "remedy": self.remedy}

    def plain(self) -> str:
        """For a log: a line, and one more with the remedy."""
        return f"{self.verdict:<8} {self.what}: {self.found}" + (f"\nremedy   {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Checkup:
    """All findings."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing keeps a training from running."""
        return all(finding.ok for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"ok": self.ok, "findings": [finding.as_dict() for finding in self.findings]}


def examined(what: str, examine: Callable[[], str], remedy: str) -> Finding:
    """A finding from a function that tells what it found, or refuses.

    Args:
        what: is looked at.
        examine: a sentence, or an expected error.
        remedy: for its errors.
    """
    try:
        return Finding(what, examine())
    except (Refusal, ValueError, OSError, RuntimeError, KeyError) as error:
        said = " ".join(str(error).split()) if isinstance(error, (Refusal, OSError)) else type(error).__name__
        return Finding(what, said, False, remedy)


def examine_machine() -> tuple[Finding, ...]:
    """Everything that does not depend on a dataset."""
    return (
        Finding("python", platform.python_version()),
        *map(_package, ("nnunet-dp", *PACKAGES)),
        *map(_folder, FOLDERS),
        _trainers(),
        _accelerator(),
        *(disk(part, LEAST_FREE_BYTES) for part in FOLDERS[1:]),
    )


def _package(name: str) -> Finding:
    wanted = {one.name: one.specifier for one in map(Requirement, requires("nnunet-dp") or ())}.get(name)
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "not installed", False, f"pip install '{name}{wanted or ''}'")
    if wanted is not None and not wanted.contains(found, prereleases=True):
        return Finding(name, f"{found}, should be {wanted}", False, f"pip install '{name}{wanted}'")
    return Finding(name, found)


def _folder(part: str) -> Finding:
    """nnU-Net's three: set, there, and all but the raw data to be written to."""
    name = f"nnUNet_{part}"
    value = os.environ.get(name)
    if not value:
        return Finding(name, "not set", False, f"export {name}=FOLDER")
    folder = Path(value)
    if not folder.is_dir():
        return Finding(name, f"{folder} is no folder", False, f"mkdir -p {folder}, or export {name}=FOLDER")

    def examine() -> str:
        if part == "raw":
            os.listdir(folder)
            return f"{folder}, readable"
        write_into(folder)
        return f"{folder}, writable"

    return examined(name, examine, f"give yourself the right to read and write {folder}, or export {name}=FOLDER")


def write_into(folder: Path) -> None:
    """Read a folder, and write a file there that is gone at once.

    Raises:
        OSError: when one of them is not allowed.
    """
    os.listdir(folder)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _trainers() -> Finding:
    what = "trainers"
    named = [Path(folder).resolve() for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder.strip()]
    if external_trainer_path() in named:
        return Finding(what, f"nnU-Net finds them through {VARIABLE}")
    try:
        if is_linked():
            return Finding(what, "nnU-Net finds them by the link")
    except (Refusal, OSError) as error:
        return Finding(what, str(error), False, 'eval "$(nnunet-dp env)"')
    remedy = 'nnunet-dp link (where nnunetv2 is installed read-only: eval "$(nnunet-dp env)")'
    return Finding(what, "nnU-Net does not find those of this version", False, remedy)


def _accelerator() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "none that torch can use; type -device cpu")
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    return Finding("gpu", names)


def disk(part: str, needed_bytes: int) -> Finding:
    """Free disk of one of nnU-Net's folders against what is needed there."""
    what, folder = f"disk of nnUNet_{part}", Path(os.environ.get(f"nnUNet_{part}") or os.devnull)
    if not folder.is_dir():
        return Finding(what, "unknown, the folder is missing", False, f"export nnUNet_{part}=FOLDER")
    free = shutil.disk_usage(folder).free
    found = f"{in_words(free)} free, {in_words(needed_bytes)} needed"
    return Finding(what, found, free >= needed_bytes, "" if free >= needed_bytes else f"make room below {folder}")


def in_words(size: int) -> str:
    """Bytes for people.

    >>> in_words(3 * 2**29), in_words(5 * 2**20)
    ('1.5 GiB', '5.0 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def plain_lines(findings: Sequence[Finding]) -> str:
    """For where nobody watches."""
    return "\n".join(finding.plain() for finding in findings)
