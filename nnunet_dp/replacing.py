"""Files that are replaced whole or not at all: checkpoints, plans, splits, tables of patients.

>>> from tempfile import TemporaryDirectory
>>> with TemporaryDirectory() as folder:
...     with replacing(Path(folder) / "plans.json") as stream:
...         _ = stream.write(b"{}")
...     [file.name for file in Path(folder).iterdir()]
['plans.json']
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A stream whose content takes the file's name when the block ends well, and is on disk then.

    Any number of processes may do this at once; the last one wins. A failure leaves the old file and no debris; a
    process killed inside leaves a ``.<name>.*.tmp``.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(file)


def sync_folder(file: Path) -> None:
    """A new name is on disk only when its folder is."""
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
