"""Which processes run, told from others that later got the same pid, and how they end together; for Linux.

>>> import os
>>> is_running(Process.of(os.getpid()))
True
>>> is_running(Process(os.getpid(), started=1))
False
"""

from __future__ import annotations

import ctypes
import os
import signal
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_PR_SET_PDEATHSIG = 1  # prctl(2)
_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGQUIT}


@dataclass(frozen=True)
class Process:
    """A process.

    Attributes:
        pid: its number, which is used again once it has ended.
        started: clock ticks after boot; 0 where the system does not tell.
    """

    pid: int
    started: int = 0

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has this pid now."""
        status = _status(pid)
        return cls(pid, int(status[19]) if status else 0)


def is_running(process: Process) -> bool:
    """Whether it runs; one that ended and was not reaped does not."""
    if not _PROC.is_dir():
        return _exists(process.pid)
    status = _status(process.pid)
    return status is not None and status[0] not in "ZX" and int(status[19]) == process.started


def descendants(pid: int) -> set[Process]:
    """Everything below a process, as far as parents still run; nothing where the system does not tell."""
    children: dict[int, list[Process]] = {}
    for folder in _PROC.glob("[0-9]*"):
        if status := _status(int(folder.name)):
            children.setdefault(int(status[1]), []).append(Process(int(folder.name), int(status[19])))
    found, left = set[Process](), [pid]
    while left:
        for child in children.get(left.pop(), []):
            found.add(child)
            left.append(child.pid)
    return found


def end_with_parent(parent: int) -> None:
    """Let Linux end this process once the one that started it is gone, also after kill -9.

    Args:
        parent: its pid; where it is gone already, this process ends at once.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None and prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) == 0 and os.getppid() != parent:
        os._exit(1)  # also from a hook of fork, where SystemExit would be ignored


def let_forked_workers_just_end() -> None:
    """Let workers that are forked from now on end with this process and at a signal, without its own handlers.

    Flower's handlers report the task as stopped, under its token. In a worker of a pool (nnU-Net forks one to list the
    cases) that is ended with SIGTERM they would end the task of the process that forked it, or wait forever for a lock
    that another thread held at the fork. And a worker that outlives its process keeps the dataset locked.

    Design note: signals are blocked around the fork, so that there is no moment at which a worker has the handlers.
    """
    forking = os.getpid()

    def blocked() -> None:
        nonlocal forking
        forking = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)

    def freed() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)

    def forgotten() -> None:
        for number in _ENDING:
            signal.signal(number, signal.SIG_DFL)
        freed()
        end_with_parent(forking)

    os.register_at_fork(before=blocked, after_in_parent=freed, after_in_child=forgotten)


def _status(pid: int) -> list[str] | None:
    """Fields of ``/proc/PID/stat`` after the name (proc_pid_stat(5)): state, parent, ..., start time at 19."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
