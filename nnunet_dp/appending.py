"""Append-only files of lines, shared by processes: one lock, one write, one fsync, and no half lines.

What a ledger needs of a file and nothing about privacy. A line is appended whole under an exclusive flock and is on
disk when ``append_line`` returns; a failed write leaves the file as it was; a torn last line of a dead process is moved
to ``<name>.torn`` by the next writer.

Design note: flock is advisory and per host; on a network file system it must be supported by the server.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunet_dp.replacing import sync_folder


@contextmanager
def locked_for_writing(path: Path) -> Iterator[int]:
    """A descriptor under the exclusive lock; makes the file."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_size == 0:
            sync_folder(path)
        yield descriptor
    finally:
        os.close(descriptor)  # releases the lock


@contextmanager
def locked_for_reading(path: Path) -> Iterator[int | None]:
    """A descriptor under the shared lock, so that no line is half written; None where there is no file."""
    if not path.exists():
        yield None
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield descriptor
    finally:
        os.close(descriptor)


def read_range(descriptor: int | None, start: int, end: int) -> bytes:
    """The file's bytes from start to end, or fewer where it ends before; none without a file."""
    parts: list[bytes] = []
    while descriptor is not None and start < end and (part := os.pread(descriptor, end - start, start)):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def append_line(descriptor: int, line: bytes) -> None:
    """One write and one fsync; on failure the file as it was, and the error."""
    size = os.fstat(descriptor).st_size
    try:
        written = os.write(descriptor, line)
        if written != len(line):
            raise OSError(f"{written} of {len(line)} bytes were written")
        os.fsync(descriptor)
    except OSError:
        _roll_back(descriptor, size)
        raise


def _roll_back(descriptor: int, size: int) -> None:
    """Safe even for a whole line: its receipt was not handed out. What stays on disk stays charged."""
    try:
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    except OSError:
        pass


def set_torn_line_aside(path: Path, descriptor: int, end: int) -> None:
    """Move what follows the last newline to ``<name>.torn``, under the exclusive lock."""
    torn = read_range(descriptor, end, os.fstat(descriptor).st_size)
    if torn:
        with locked_for_writing(path.with_name(path.name + ".torn")) as side:
            append_line(side, torn + b"\n")
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)


def append_to_copy(path: Path, line: bytes) -> None:
    """Append a line to a file of selected lines, setting a torn one aside first."""
    with locked_for_writing(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size and read_range(descriptor, size - 1, size) != b"\n":
            set_torn_line_aside(path, descriptor, read_range(descriptor, 0, size).rfind(b"\n") + 1)
        append_line(descriptor, line)
