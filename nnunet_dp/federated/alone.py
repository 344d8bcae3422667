"""One at a time in a run's folder: two coordinators, or two simulations, would overwrite each other's state.

>>> import tempfile
>>> run = Path(tempfile.mkdtemp()) / "run"
>>> with alone_in(run, "simulation"), alone_in(run, "coordinator"):
...     sorted(file.name for file in run.iterdir())
['coordinator.lock', 'simulation.lock']
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunet_dp.errors import Refusal


def lock_of(who: str) -> str:
    """Name of the file that is held."""
    return f"{who}.lock"


@contextmanager
def alone_in(folder: Path, who: str) -> Iterator[None]:
    """Hold a folder against others of the same kind, as long as the block lasts and the process lives.

    Args:
        folder: made where absent.
        who: works there, in a word.

    Raises:
        Refusal: when another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / lock_of(who), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refusal(f"another {who} works in {folder.name}: wait for it, or stop it") from None
        yield
    finally:
        os.close(lock)
