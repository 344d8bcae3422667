"""The same work on many items, side by side: masks that are read, predictions that are refined or measured.

>>> told = []
>>> list(in_order(abs, [-1, 2, -3], progress=lambda done, total: told.append((done, total)))), told
([1, 2, 3], [(1, 3), (2, 3), (3, 3)])

Design note: processes are spawned, never forked: torch's and ITK's threads do not survive a fork.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]
"""Told (items done, items in all) after each item."""
LONGEST_SILENCE_S = 15.0
"""Of a log, while something is under way."""


def in_order(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    processes: int = 1,
    progress: Progress | None = None,
    prepare: Callable[[], None] | None = None,
) -> Iterator[Result]:
    """The result of every item, in the order of the items; the number of processes changes nothing else.

    Args:
        work: picklable where there is more than one process.
        items: to work on.
        processes: at most; one works here.
        progress: told after each result.
        prepare: called once in each process that is started.
    """
    workers = min(processes, len(items))
    if workers <= 1:
        yield from _reported(map(work, items), len(items), progress)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=prepare) as pool:
        yield from _reported(pool.map(work, items), len(items), progress)


def is_tenth(done: int, total: int) -> bool:
    """Whether a log should have a line now: at every tenth, and at the end."""
    return done == total or done % max(-(-total // 10), 1) == 0


def in_tenths(say: Callable[[str], None], what: str) -> Progress:
    """Progress for a log: a line with the time that is left, at every tenth and where that takes long."""
    began = told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if is_tenth(done, total) or now >= told + LONGEST_SILENCE_S:
            told = now
            say(f"{what}: {done} of {total}, {(now - began) / done * (total - done) / 60:.1f} min left")

    return tell


def _reported(results: Iterator[Result], total: int, progress: Progress | None) -> Iterator[Result]:
    for done, result in enumerate(results, 1):
        if progress:
            progress(done, total)
        yield result
