"""Engine two: several patients in one forward and one backward pass, each with a weight gradient of its own.

The same sum as ``gradients.one_at_a_time``, at the speed of a batch::

    chunk of patients -> forward with one copy of the weights a patient (``patient_weights``) -> each patient's own loss
    -> one backward pass -> float32 gradients [patients, *parameter] -> norms in float64, factors, float64 sum

>>> from nnunet_dp.clipping import make_rule
>>> records = [Record(torch.tensor([[3.0, 4.0]]), None), Record(torch.tensor([[0.0, 0.5]]), None)]
>>> rule = make_rule("flat", {"bound": 1})
>>> found = Batched(2)(nn.Linear(2, 1, bias=False), lambda output, _: output.sum(), records, rule)
>>> [round(number, 3) for number in found.tensors[0].flatten().tolist()]
[0.6, 1.3]

=============================================  ====================================================================
what may happen                                what is done
=============================================  ====================================================================
fewer patients than a chunk holds              zeros fill it, have no loss, and their rows are not read
a patient's loss or gradient is not finite     that patient contributes zero; rows are apart, so nobody else notices
records of several shapes                      a chunk ends where the shape changes
out of memory                                  the same patients again in chunks of half the size, which stays
a network that was never examined              engine one, with the reason in the log
a parameter used in an unknown way             the same
=============================================  ====================================================================

Formal guarantee:
    That of ``gradients.one_at_a_time``. A record whose place is filled with zeros instead changes the sum by its vector
    of L2 norm at most ``rule.bound``, up to rounding in float64; no number of it enters another record's vector.

Design note: shapes, memory and the point where memory ends do not depend on how many patients were drawn, which is
private; only the number of chunks does.

Design note: a patient who leaves the draw, instead of leaving zeros behind, moves others to other rows; kernels may
round differently there. The relation is zero-out, in which slots keep their places.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunet_dp.admission import refuse_coupling
from nnunet_dp.clipping import ClipRule, QuantileAdaptive
from nnunet_dp.errors import Refusal
from nnunet_dp.gradients import Record, at_least_float32, gradients_of, trainable
from nnunet_dp.mechanisms import ClippedSum
from nnunet_dp.patient_weights import Unbatchable, copies_of, forward_with_copies, watched_forward

Report = Callable[[str], None]


class _Task(NamedTuple):
    """What an engine is called with, but the records and the rule."""

    network: nn.Module
    loss: Callable[[Any, Any], Tensor]
    autocast: Callable[[], AbstractContextManager[Any]]
    watch: Callable[[Tensor], None]


class Batched:
    """Engine two, behind the signature of ``gradients.Engine``.

    A network from ``torch.compile`` is compiled here, too: once for each size of chunk.

    Args:
        chunk: patients in one pass.
        report: is told, in a sentence without private facts, when the chunk shrinks or engine one takes over.

    Raises:
        ValueError: for a chunk below 1.
    """

    def __init__(self, chunk: int, report: Report = lambda sentence: None) -> None:
        if chunk < 1:
            raise ValueError(f"a chunk should hold at least 1 patient, found {chunk}")
        self.chunk = chunk
        self.fallback: str | None = None
        self._report = report
        self._examined: set[tuple[int, int, bool]] = set()
        self._compiled: Callable[..., Any] | None = None

    def __call__(
        self,
        network: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        records: Iterable[Record],
        rule: ClipRule,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        watch: Callable[[Tensor], None] = lambda loss: None,
    ) -> ClippedSum:
        """Sum of the records' clipped gradients; see ``gradients.one_at_a_time``.

        Raises:
            torch.OutOfMemoryError: when not even one patient fits.
        """
        task, total = _Task(network, loss, autocast, watch), ClippedTotal(*trainable(network), rule)
        self._refuse_coupling(network)
        for records_of_chunk in chunks(records, self.chunk):
            self._add(total, records_of_chunk, task)
        return total.result()

    def _refuse_coupling(self, network: nn.Module) -> None:
        try:
            refuse_coupling(plain(network))
        except Refusal as refusal:
            self._fall_back(str(refusal))

    def _fall_back(self, reason: str) -> None:
        if self.fallback is None:
            self._report(f"engine one takes over, one patient at a time: {reason}")
        self.fallback = reason

    def _add(self, total: ClippedTotal, records: list[Record], task: _Task) -> None:
        """Add the vectors of all records, in passes as large as memory allows by now."""
        while records and self.fallback is None:
            done = self._add_one_pass(total, records[: self.chunk], task)
            records = records[done:]
        for gradient in gradients_of(task.network, task.loss, records, task.autocast, task.watch):
            alone = [tensor[None] for tensor in gradient]
            norms = total.norms(alone, 1)
            total.add(total.shares(alone, norms), norms)

    def _add_one_pass(self, total: ClippedTotal, records: list[Record], task: _Task) -> int:
        """Add the vectors of all these records, or of none; how many were added."""
        try:
            gradients, values = self._gradients(records, task)
            norms = total.norms(gradients, len(records))
            shares = total.shares(gradients, norms)
        except Unbatchable as unbatchable:
            self._fall_back(str(unbatchable))
            return 0
        except torch.OutOfMemoryError:
            if self.chunk == 1:
                raise
            self._shrink()
            return 0
        total.add(shares, norms)
        for value in values:
            task.watch(value)
        return len(records)

    def _shrink(self) -> None:
        """Half the size, for this step and all that follow."""
        self.chunk = (self.chunk + 1) // 2
        self._report(f"out of memory: engine two goes on with {self.chunk} patients in one pass")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _gradients(self, records: list[Record], task: _Task) -> tuple[list[Tensor | None], list[Tensor]]:
        """Each parameter's gradients [chunk, *parameter.shape], None where no loss depends on it; the losses."""
        names, parameters = trainable(plain(task.network))
        copies = copies_of(names, parameters, self.chunk)
        images, patches = _filled_up(records, self.chunk), len(records[0].data)
        with task.autocast():
            output = self._forward(task.network, patches)(plain(task.network), copies, images)
        outputs = _each_patient(at_least_float32(output), patches)
        values = [task.loss(mine, record.target) for mine, record in zip(outputs, records, strict=False)]
        learnt = [value for value in values if value.requires_grad]  # not where no voxel is labelled
        found = _derivative(learnt, [*copies.values(), *parameters])
        passed = [name for name, gradient in zip(names, found[len(names) :], strict=True) if gradient is not None]
        if passed:
            raise Unbatchable(f"parameter '{passed[0]}' is reached past its copies, as two modules share it")
        return found[: len(names)], [value.detach() for value in values]

    def _forward(self, network: nn.Module, patches: int) -> Callable[..., Any]:
        """Watched for the first chunk, and always where nothing is compiled."""
        key = (id(network), patches, network.training)
        if network is plain(network) or key not in self._examined:
            self._examined.add(key)
            return watched_forward
        if self._compiled is None:
            self._compiled = torch.compile(forward_with_copies, dynamic=False)
        return self._compiled


class ClippedTotal:
    """The float64 sum of clipped gradients of several patients at a time.

    Args:
        names: of the trainable parameters.
        parameters: themselves.
        rule: clip rule.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[Tensor], rule: ClipRule) -> None:
        self._rule = rule
        self._groups = torch.tensor(rule.groups(names))
        self._sums = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
        self._count = 0.0

    def norms(self, gradients: Sequence[Tensor | None], patients: int) -> Tensor:
        """L2 norms [patients, groups] on the CPU, accumulated in float64, of the first rows of each gradient."""
        squares = torch.stack(
            [
                sum_.new_zeros(patients) if g is None else _rows(g[:patients]).square().sum(1)
                for g, sum_ in zip(gradients, self._sums, strict=True)
            ]
        ).cpu()
        groups = squares.new_zeros(int(self._groups.max()) + 1, patients)
        return groups.index_add_(0, self._groups, squares).sqrt().T

    def shares(self, gradients: Sequence[Tensor | None], norms: Tensor) -> list[Tensor | None]:
        """Sum of factor times gradient over the patients whose norms are usable, for each parameter; float64.

        Every row is computed with, whoever is usable: memory does not follow the patients' values.
        """
        usable = [self._rule.usable(own) for own in norms]
        factors = [
            self._rule.factors(own) if heard else own.new_zeros(len(own))
            for own, heard in zip(norms, usable, strict=True)
        ]
        weights = torch.stack(factors, 1).to(self._sums[0].device)
        heard = torch.tensor(usable, device=self._sums[0].device).unsqueeze(1)
        return [
            # an unusable row may hold NaN, which no factor of zero removes
            None if g is None else (weights[group] @ _rows(g[: len(norms)]).where(heard, 0.0)).view_as(sum_)
            for sum_, g, group in zip(self._sums, gradients, self._groups.tolist(), strict=True)
        ]

    def add(self, shares: Sequence[Tensor | None], norms: Tensor) -> None:
        """Add what ``shares`` gave for patients with these norms."""
        if isinstance(self._rule, QuantileAdaptive):
            self._count += sum(self._rule.centred_indicator(float(own[0])) for own in norms)
        for sum_, share in zip(self._sums, shares, strict=True):
            if share is not None:
                sum_ += share

    def result(self) -> ClippedSum:
        """What was added so far."""
        count = self._count if isinstance(self._rule, QuantileAdaptive) else None
        return ClippedSum(tuple(self._sums), self._rule.bound, count)


def chunks(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Runs of at most ``size`` records whose images have one shape and dtype, in order."""
    for _, alike in itertools.groupby(records, lambda record: (record.data.shape, record.data.dtype)):
        while found := list(itertools.islice(alike, size)):
            yield found


def _rows(gradient: Tensor) -> Tensor:
    """[patients, *parameter.shape] -> [patients, numbers] in float64; a parameter may be a single number."""
    return gradient.reshape(len(gradient), -1).double()


def plain(network: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wraps, or the module itself."""
    inner = getattr(network, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else network


def _filled_up(records: Sequence[Record], patients: int) -> Tensor:
    """Images of all records [patients * patches, channels, *spatial], with zeros for the patients that are missing."""
    first = records[0].data
    missing = first.new_zeros(((patients - len(records)) * len(first), *first.shape[1:]))
    return torch.cat([*(record.data for record in records), missing])


def _each_patient(output: Any, patches: int) -> Iterator[Any]:
    """The output, or list of outputs, of one patient after the other."""
    if isinstance(output, list):
        return map(list, zip(*(tensor.split(patches) for tensor in output), strict=True))
    return iter(output.split(patches))


def _derivative(values: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of the sum; each patient's copies meet that patient's loss alone."""
    if not values:
        return [None] * len(leaves)
    return list(torch.autograd.grad(list(values), leaves, [torch.ones_like(v) for v in values], allow_unused=True))
