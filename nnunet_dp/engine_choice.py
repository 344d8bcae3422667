"""Which gradient engine a run uses: by a short timing on random data, or by an environment variable.

``NNUNET_DP_ENGINE`` is ``one`` (one patient at a time), ``two`` or ``two:CHUNK`` (several patients in one pass). Where
it is not set, the first step times engine one on random images of the shape of its first record, then engine two with
chunks of 2, 4, 8, ... patients as long as that is faster, fits the memory and pays: all timing together may take
``SHARE`` of what the run is expected to take. A run too short for that uses engine one.

>>> engine_for(EngineBudget(patients=20, largest_chunk=4), setting="two:8").chunk
8
>>> engine_for(EngineBudget(patients=20, largest_chunk=4), setting="one") is one_at_a_time
True

Formal guarantee:
    The choice is a function of public shapes, of the network and of the clock: images and targets that are timed are
    random and empty, and nothing of a record but its shapes is read. Both engines keep the same promise.

Design note: a timing at the first step, not at the start, because only then is the network what it will be (deep
supervision, morphology) and the shape of a target known.

Design note: engine two must beat engine one by ``MARGIN``, for it needs the memory of its chunk.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_dp.batched_gradients import Batched, Report, plain
from nnunet_dp.clipping import ClipRule
from nnunet_dp.dpsgd import Execution
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.gradients import Engine, Record, one_at_a_time
from nnunet_dp.mechanisms import ClippedSum

VARIABLE = "NNUNET_DP_ENGINE"
SHARE = 0.02
MARGIN = 0.1
DEFAULT_CHUNK = 4
_REPEATS = 2
_FIRST_PASS = 4.0  # passes that the timing of weight gradients takes besides a chunk's own
_COMPILING = 60.0  # seconds that torch.compile takes for one more chunk size, roughly


@dataclass(frozen=True)
class EngineBudget:
    """What a timing may cost.

    Attributes:
        patients: gradients that the run takes, one for each patient and step; expected, public.
        largest_chunk: patients in one pass at most: the expected batch.
    """

    patients: float
    largest_chunk: int


def execution_for(
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    steps: int,
    expected_batch: float,
    report: Report,
) -> Execution:
    """How a trainer, or one round of a federated site, takes its steps.

    Args:
        device: where the network lives.
        autocast: context of the forward pass.
        steps: that this process takes.
        expected_batch: patients drawn in each of them; expected, public.
        report: is told which engine was chosen, at the first step.

    Raises:
        UsageRefusal: for a value of ``NNUNET_DP_ENGINE`` that names no engine.
    """
    budget = EngineBudget(steps * expected_batch, math.ceil(expected_batch))
    return Execution(device, engine_for(budget, report), autocast)


def engine_for(budget: EngineBudget, report: Report = lambda sentence: None, setting: str | None = None) -> Engine:
    """The engine of a run.

    Args:
        budget: what a timing may cost.
        report: is told what was chosen and why; public.
        setting: in place of the environment variable.

    Raises:
        UsageRefusal: for a setting that names no engine.
    """
    wish = os.environ.get(VARIABLE, "") if setting is None else setting
    name, _, size = wish.partition(":")
    if not wish:
        return Timed(budget, report)
    if wish == "one":
        report(f"engine one, one patient at a time, as {VARIABLE} says")
        return one_at_a_time
    if wish == "two" or (name == "two" and size.isdecimal() and int(size) > 0):
        chunk = int(size) if size else DEFAULT_CHUNK
        report(f"engine two with {chunk} patients in one pass, as {VARIABLE} says")
        return Batched(chunk, report)
    raise UsageRefusal(f"{VARIABLE} should be one, two or two:CHUNK, found {wish!r}: unset it to choose by timing")


class Timed:
    """The engine that was fastest on random data, chosen at the first record.

    Args:
        budget: what the timing may cost.
        report: is told what was chosen.
    """

    def __init__(self, budget: EngineBudget, report: Report = lambda sentence: None) -> None:
        self._budget, self._report = budget, report
        self.chosen: Engine | None = None

    def __call__(
        self,
        network: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        records: Iterable[Record],
        rule: ClipRule,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        watch: Callable[[Tensor], None] = lambda loss: None,
    ) -> ClippedSum:
        """Sum of the records' clipped gradients; see ``gradients.one_at_a_time``."""
        records = iter(records)
        first = next(records, None)
        if first is None:  # nothing to look at, and nothing to do
            return one_at_a_time(network, loss, (), rule, autocast, watch)
        if self.chosen is None:
            seconds_of = _Stopwatch(network, loss, first, rule, autocast)
            self.chosen = choose(seconds_of, self._budget, self._report, compiled=plain(network) is not network)
        return self.chosen(network, loss, itertools.chain([first], records), rule, autocast, watch)


SecondsOf = Callable[[Engine, int, int], float]
"""(engine, patients, repeats) -> seconds a patient: best of the repeats, after one pass to warm up."""


def choose(seconds_of: SecondsOf, budget: EngineBudget, report: Report, compiled: bool = False) -> Engine:
    """Engine one, or engine two with the chunk up to which doubling it paid.

    Args:
        seconds_of: times an engine on random records.
        budget: what all timing together may cost.
        report: is told what was chosen and why.
        compiled: whether each chunk size is compiled first.
    """
    own_cost = 1 + _REPEATS
    if budget.largest_chunk < 2 or own_cost > SHARE * budget.patients:
        report("engine one, one patient at a time: the run is too short to time another")
        return one_at_a_time
    one = seconds_of(one_at_a_time, 1, _REPEATS)
    left = SHARE * budget.patients * one - own_cost * one
    found, chosen, best, chunk = [f"one {one:.3g}"], one_at_a_time, one, 2
    while chunk <= budget.largest_chunk:
        expected = (1 + _REPEATS + _FIRST_PASS) * chunk * one + (_COMPILING if compiled else 0)
        if expected > left:
            break
        began = time.perf_counter()
        engine = Batched(chunk, report)
        try:
            seconds = seconds_of(engine, chunk, _REPEATS)
        except RuntimeError as error:  # a compiler that fails, say; engine one needs none of its own
            report(f"engine two cannot run here: {type(error).__name__}")
            break
        left -= time.perf_counter() - began
        if engine.fallback is not None or engine.chunk < chunk:  # not this network; not this much memory
            break
        found.append(f"two:{chunk} {seconds:.3g}")
        if seconds > best * (1 - MARGIN):
            break
        chosen, best, chunk = engine, seconds, chunk * 2
    name = f"engine two with {chosen.chunk} patients in one pass" if isinstance(chosen, Batched) else "engine one"
    report(f"{name}, by seconds a patient on random data: {', '.join(found)} ({VARIABLE} overrides)")
    return chosen


class _Stopwatch:
    """``SecondsOf`` for one network, loss and shape of records."""

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        alike: Record,
        rule: ClipRule,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._rest, self._inputs, self._device = (rule, autocast), (network, loss), alike.data.device
        self._record = random_record(alike)

    def __call__(self, engine: Engine, patients: int, repeats: int) -> float:
        found = math.inf
        for attempt in range(1 + repeats):
            began = time.perf_counter()
            engine(*self._inputs, [self._record] * patients, *self._rest)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            found = min(found, time.perf_counter() - began) if attempt else found
        return found / patients


def random_record(alike: Record) -> Record:
    """Random images and an empty target of the same shapes; no number of the record is read."""
    generator = torch.Generator(alike.data.device).manual_seed(0)
    data = torch.randn(alike.data.shape, generator=generator, device=alike.data.device).to(alike.data.dtype)
    target = alike.target
    return Record(data, [torch.zeros_like(t) for t in target] if isinstance(target, list) else _empty(target))


def _empty(target: Any) -> Any:
    return torch.zeros_like(target) if isinstance(target, Tensor) else target
