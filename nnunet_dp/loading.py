"""Background loading: exactly the drawn patients of each step, each with a random stream of its own.

``PatientLoader`` keeps a pool of processes that turn a slot and a seed into a ``Record``; a bounded window of jobs runs
ahead of the gradient engine within the step. It never draws a patient by itself and never discards a batch.

Design note: processes, not threads, because nnU-Net's cropping and augmentation use the global generators of numpy and
torch; one job at a time per process makes these a stream of the patient's own. A worker ends with its parent, also when
the parent was killed with -9.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np
import torch

from nnunet_dp.gradients import Record
from nnunet_dp.sampling import fresh_key, patch_seed

Source = Callable[[tuple[str, ...]], tuple[np.ndarray, Any]]
"""A patient's cases -> (images, target or list of targets) as arrays; uses the global random generators."""

_source: Source | None = None


class PatientLoader:
    """Records of drawn slots, loaded ahead by ``workers`` processes (0: in this process).

    Args:
        source: turns a patient's cases into arrays; must be picklable where processes are spawned.
        cases: the cases of each slot, in the order of the slots.
        device: where records are delivered.
        workers: number of processes.
    """

    def __init__(
        self, source: Source, cases: Sequence[tuple[str, ...]], device: torch.device, workers: int
    ) -> None:
        self._cases = tuple(cases)
        self._source, self._key, self._device = source, fresh_key(), device
        self._pool = _start_pool(source, workers) if workers > 0 else None
        self._window = 2 * workers + 1
        self._closed = False

    def __repr__(self) -> str:
        """Public facts only: nnU-Net prints every attribute of a trainer to disk."""
        return f"PatientLoader({len(self._cases)} slots)"

    def records(self, step: int, drawn: list[int]) -> Iterator[Record]:
        """The records of the drawn slots, in that order.

        Raises:
            RuntimeError: when a case cannot be read; the message names no case.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        if self._pool is None:
            for slot in drawn:
                yield self._deliver(_load_apart(self._source, self._cases[slot], patch_seed(self._key, step, slot)))
            return
        pending: deque[Future[Any]] = deque()
        for slot in drawn:
            pending.append(self._pool.submit(_load, self._cases[slot], patch_seed(self._key, step, slot)))
            if len(pending) >= self._window:
                yield self._deliver(pending.popleft().result())
        while pending:
            yield self._deliver(pending.popleft().result())

    def close(self) -> None:
        """End the worker processes."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _deliver(self, arrays: tuple[np.ndarray, Any]) -> Record:
        data, target = arrays
        move = self._to_device
        return Record(move(data), [move(t) for t in target] if isinstance(target, list) else move(target))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)


def seed_everything(seed: int) -> None:
    """Set the global generators of random, numpy and torch from one 128-bit seed."""
    random.seed(seed)
    np.random.seed(np.random.SeedSequence(seed).generate_state(8))
    torch.manual_seed(seed % 2**63)


def _load_apart(source: Source, cases: tuple[str, ...], seed: int) -> Any:
    """Load in this process without moving its own global generators."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        return _load_with(source, cases, seed)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _load_with(source: Source, cases: tuple[str, ...], seed: int) -> Any:
    seed_everything(seed)
    try:
        return source(cases)
    except Exception as error:  # the original message may name a file, and files are named after cases
        raise RuntimeError(
            f"a training case could not be read ({type(error).__name__}): check the preprocessed data with "
            "`nnUNetv2_plan_and_preprocess ... --verify_dataset_integrity`"
        ) from None


def _load(cases: tuple[str, ...], seed: int) -> Any:
    assert _source is not None
    return _load_with(_source, cases, seed)


def _start_pool(source: Source, workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else "spawn")
    return ProcessPoolExecutor(workers, context, _initialise, (source, os.getpid()))


def _initialise(source: Source, parent: int) -> None:
    """Set up one worker: single-threaded, quiet on Ctrl-C, gone when the parent is."""
    import signal

    global _source
    _source = source
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Warning! No annotated pixels")  # says something about one patient
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: int) -> None:
    """End this process when the one that started it is gone; for a thread."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
