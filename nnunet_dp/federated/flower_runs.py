"""A run as Flower sees it: what is submitted, and what its coordinator leaves in the run's folder as it goes.

See ``flower_server`` for the files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_dp.federated.notes import read_note
from nnunet_dp.federated.process_table import Process, is_running

LINES, APP, ENDED = "server_lines.txt", "server_app.json", "server_ended.json"
MANIFEST = """[project]
name = "nnunet-dp-federated"
version = "1.0.0"
description = "Federated private training; the code is that of the installed nnunet_dp"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "nnunet-dp"

[tool.flwr.app.components]
serverapp = "nnunet_dp.federated.flower_server:app"
clientapp = "nnunet_dp.federated.flower_client:app"

[tool.flwr.app.config]
config = ""
folder = ""
"""
"""All there is of our Flower app: no code travels."""


@dataclass(frozen=True)
class Submitted:
    """A run that was submitted.

    Attributes:
        run_id: Flower's.
        folder: of the run.
        said_bytes: length of what coordinators had said in this folder before.
    """

    run_id: str
    folder: Path
    said_bytes: int = 0


@dataclass(frozen=True)
class End:
    """How a run ended.

    Attributes:
        exit_code: 0 when the coordinator reached its end.
        message: what it said otherwise.
    """

    exit_code: int
    message: str = ""


class Lines:
    """The lines that are added to a file after the given number of bytes."""

    def __init__(self, file: Path, offset: int) -> None:
        self._file, self._offset = file, offset

    def new(self) -> list[str]:
        """Whole lines since the last call."""
        if not self._file.is_file():
            return []
        with self._file.open("rb") as stream:
            stream.seek(self._offset)
            whole = stream.read().rpartition(b"\n")[0]
        self._offset += len(whole) + 1 if whole else 0
        return whole.decode(errors="replace").split("\n") if whole else []


def ended(folder: Path) -> End | None:
    """How the coordinator of this folder ended; None where it has not."""
    file = folder / ENDED
    return read_note(file, End) if file.is_file() else None


@dataclass(frozen=True)
class Began:
    """What a coordinator leaves in its folder when it begins.

    Attributes:
        run_id: Flower's.
        process: that works.
    """

    run_id: str
    process: Process


def began(run_id: str, process: Process) -> dict[str, Any]:
    """The same as JSON."""
    return asdict(Began(run_id, process))


def was_killed(folder: Path) -> bool:
    """Whether the coordinator of this folder had begun and its process is gone."""
    file = folder / APP
    return file.is_file() and not is_running(read_note(file, Began).process)


def at_work(folder: Path) -> Submitted | None:
    """The run whose coordinator works in this folder, which outlives the command that submitted it; None without."""
    if not (folder / APP).is_file() or ended(folder) or was_killed(folder):
        return None
    return Submitted(read_note(folder / APP, Began).run_id, folder, said(folder))


def said(folder: Path) -> int:
    """Bytes that coordinators have said in this folder so far."""
    file = folder / LINES
    return file.stat().st_size if file.is_file() else 0
