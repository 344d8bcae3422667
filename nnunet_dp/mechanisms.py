"""Mechanisms: how noise is drawn and what it costs, as one frozen value.

Every mechanism has the same three parts. ``event`` is its price, ``charge(purpose, step)`` is that price as a
line for the ledger, and ``release(bounded, receipt, generator)`` draws the noise, with the bound read from
the value itself and only against an unspent receipt for exactly this price. They differ in the bounded value
that they accept:

    SubsampledGaussian    ClippedSum     L2 bound, full batch or one Poisson draw
    GaussianWithCount     ClippedSum     the same with a centred count on the same draw: one event (quantile clipping)
    Laplace               L1Bounded      L1 bound
    ExponentialSelection  BoundedScores  index of a good score, pure epsilon

Example:
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> from nnunet_dp.ledger import Ledger
    >>> mechanism = SubsampledGaussian(noise_multiplier=1.1, sampling_probability=0.5)
    >>> clipped = ClippedSum((torch.zeros(3),), l2_bound=1.0)
    >>> with TemporaryDirectory() as folder:
    ...     ledger = Ledger(Path(folder) / "privacy_ledger.jsonl", run="example", plan="0a")
    ...     receipt = ledger.charge(mechanism.charge("training", step=0))
    ...     noised = mechanism.release(clipped, receipt, fresh_generator("cpu"))
    >>> noised.tensors[0].shape
    torch.Size([3])

Design note: order within ``release``: wrong types are refused first (nothing is spent), then the receipt is
spent, then the values are looked at. A sum that is not finite therefore stays paid for, and its error says
nothing but that.

Design note: a draw that meets fresh noise twice is not two subsampled events (q = 0.1, sigma = 1.5: epsilon
1.012 against 0.564), so a bounded value is released once only when its mechanism is subsampled.

Not covered: noise comes from torch's generators, which are not cryptographic, in finite precision (Mironov
2012).
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from dp_accounting.dp_event import DpEvent, GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent

from nnunet_dp.accounting import z_delta
from nnunet_dp.charges import Charge
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.events import PureDpEvent
from nnunet_dp.ledger import Receipt


class _Once:
    """Whether a value met noise already."""

    __slots__ = ("used",)

    def __init__(self) -> None:
        self.used = False


@dataclass(frozen=True, eq=False)
class ClippedSum:
    """A sum over the drawn patients of clipped gradients, with the bound that each of them keeps.

    Attributes:
        tensors: the sum, one tensor per parameter, float32 or float64, all on one device; private.
        l2_bound: what one patient changes at most, L2 norm over all tensors together.
        centred_count: sum over the drawn of (b_i - 1/2), sensitivity 1/2; only for quantile clipping; private.
    """

    tensors: tuple[torch.Tensor, ...] = field(repr=False)
    l2_bound: float
    centred_count: float | None = field(default=None, repr=False)
    _once: _Once = field(default_factory=_Once, init=False, repr=False)

    def __post_init__(self) -> None:
        _require_positive("l2_bound", self.l2_bound)
        _require_floats(self.tensors)


@dataclass(frozen=True, eq=False)
class L1Bounded:
    """A sum to which one patient contributes at most ``l1_bound`` in L1 norm over all tensors together."""

    tensors: tuple[torch.Tensor, ...] = field(repr=False)
    l1_bound: float
    _once: _Once = field(default_factory=_Once, init=False, repr=False)

    def __post_init__(self) -> None:
        _require_positive("l1_bound", self.l1_bound)
        _require_floats(self.tensors)


@dataclass(frozen=True, eq=False)
class BoundedScores:
    """Scores of public candidates [candidates]; one patient changes each by at most ``sensitivity``.

    With the number of slots fixed, the score of a candidate for a quantile (how far the count of values below
    it is from the wanted rank) has sensitivity 1.
    """

    scores: torch.Tensor = field(repr=False)
    sensitivity: float

    def __post_init__(self) -> None:
        _require_positive("sensitivity", self.sensitivity)
        _require_floats((self.scores,))


@dataclass(frozen=True, eq=False)
class NoisedSum:
    """What was released: free to use, post-processing from here on.

    Attributes:
        tensors: noised sum, shapes and dtypes of the ``ClippedSum``.
        l2_bound: bound of the sum, for the division by expected batch and bound.
        noised_count: noised sum of (b_i - 1/2), or None.
    """

    tensors: tuple[torch.Tensor, ...]
    l2_bound: float
    noised_count: float | None = None


@dataclass(frozen=True)
class SubsampledGaussian:
    """Gaussian noise on a clipped sum over the full batch (q = 1) or over one Poisson draw.

    Formal guarantee:
        ``release`` adds N(0, (noise_multiplier * bounded.l2_bound)^2), independently to each coordinate,
        after spending a receipt for exactly ``event``. Abadi et al. 2016, arXiv:1607.00133.
    """

    noise_multiplier: float
    sampling_probability: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("noise_multiplier", self.noise_multiplier)
        _require_probability(self.sampling_probability)

    @property
    def event(self) -> DpEvent:
        """Price of one release."""
        return _sampled(self.sampling_probability, GaussianDpEvent(self.noise_multiplier))

    def charge(self, purpose: str, step: int | None, count: int = 1) -> Charge:
        """The price as a line for the ledger, for ``count`` releases from ``step`` on (None: of no step)."""
        return Charge(
            purpose=purpose,
            mechanism="gaussian",
            noise_multiplier=self.noise_multiplier,
            sampling_probability=self.sampling_probability,
            count=count,
            first_step=step,
        )

    def release(self, bounded: ClippedSum, receipt: Receipt, generator: torch.Generator) -> NoisedSum:
        """Spend the receipt, then add the noise.

        Args:
            bounded: what is released; without a count, which would leave the house un-noised.
            receipt: of a charge for exactly ``event``, not spent yet.
            generator: fresh, on the tensors' device (``fresh_generator``).

        Raises:
            TypeError: for a value that is not a ``ClippedSum``, or a generator of another device; nothing is
            spent. Refusal: for a count on the same draw, for a draw released already, or without a fitting
            receipt. RuntimeError: when the sum is not finite; the receipt is spent.
        """
        _require_type(bounded, ClippedSum)
        _require_device(bounded.tensors, generator)
        if bounded.centred_count is not None:
            raise Refusal(
                "a sum without a count should come here, found a count on the same draw: release both with "
                "GaussianWithCount, which prices them as one event"
            )
        _spend(receipt, self.event, bounded._once, self.sampling_probability)
        deviation = self.noise_multiplier * bounded.l2_bound
        return NoisedSum(_with_gaussian(bounded.tensors, deviation, generator), bounded.l2_bound)


@dataclass(frozen=True)
class GaussianWithCount:
    """A gradient and a centred count on one Poisson draw: the price of one Gaussian (quantile clipping).

    Attributes:
        noise_multiplier: z, the price of both together.
        count_noise: sigma_b, standard deviation of the noise on the centred count, in patients.
        sampling_probability: q.

    Formal guarantee:
        ``release`` adds N(0, (z_delta * l2_bound)^2) to the gradient and N(0, count_noise^2) to the count,
        where z_delta^-2 + (2 count_noise)^-2 = z^-2: jointly one Gaussian of multiplier z (Andrew et al.
        2021, arXiv:1905.03871, theorem 1).
    """

    noise_multiplier: float
    count_noise: float
    sampling_probability: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("count_noise", self.count_noise)
        _require_probability(self.sampling_probability)
        z_delta(self.noise_multiplier, self.count_noise)

    @property
    def event(self) -> DpEvent:
        """Price of one release of both."""
        return SubsampledGaussian(self.noise_multiplier, self.sampling_probability).event

    def charge(self, purpose: str, step: int, count: int = 1) -> Charge:
        """The price as a line for the ledger, for ``count`` releases from ``step`` on."""
        gaussian = SubsampledGaussian(self.noise_multiplier, self.sampling_probability)
        return gaussian.charge(purpose, step, count)

    def release(self, bounded: ClippedSum, receipt: Receipt, generator: torch.Generator) -> NoisedSum:
        """Spend the receipt, then add noise to the gradient and to the count.

        Raises:
            TypeError: for a value that is not a ``ClippedSum``, or a generator of another device; nothing is
            spent. Refusal: when the sum brings no count, its draw was released already, or the receipt does
            not fit. RuntimeError: when the sum or the count is not finite; the receipt is spent.
        """
        _require_type(bounded, ClippedSum)
        _require_device(bounded.tensors, generator)
        if bounded.centred_count is None:
            raise Refusal("a centred count should come with the sum, found none: release with SubsampledGaussian")
        _spend(receipt, self.event, bounded._once, self.sampling_probability)
        count = torch.tensor(bounded.centred_count, dtype=torch.float64, device=generator.device)
        deviation = z_delta(self.noise_multiplier, self.count_noise) * bounded.l2_bound
        _require_finite((*bounded.tensors, count))
        tensors = _with_gaussian(bounded.tensors, deviation, generator)
        (noised,) = _with_gaussian((count,), self.count_noise, generator)
        return NoisedSum(tensors, bounded.l2_bound, float(noised))


@dataclass(frozen=True)
class Laplace:
    """Laplace noise on an L1-bounded sum; a sum that is only L2-bounded is refused by its type.

    Formal guarantee:
        ``release`` adds Laplace(0, noise_multiplier * l1_bound) to each coordinate: (1 / noise_multiplier)-DP
        on the full batch.
    """

    noise_multiplier: float
    sampling_probability: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("noise_multiplier", self.noise_multiplier)
        _require_probability(self.sampling_probability)

    @property
    def event(self) -> DpEvent:
        """Price of one release."""
        return _sampled(self.sampling_probability, LaplaceDpEvent(self.noise_multiplier))

    def charge(self, purpose: str, step: int | None = None) -> Charge:
        """The price as a line for the ledger."""
        return Charge(
            purpose=purpose,
            mechanism="laplace",
            noise_multiplier=self.noise_multiplier,
            sampling_probability=self.sampling_probability,
            first_step=step,
        )

    def release(self, bounded: L1Bounded, receipt: Receipt, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Spend the receipt, then add the noise; raises like ``SubsampledGaussian.release``."""
        _require_type(bounded, L1Bounded)
        _require_device(bounded.tensors, generator)
        _spend(receipt, self.event, bounded._once, self.sampling_probability)
        _require_finite(bounded.tensors)
        scale = self.noise_multiplier * bounded.l1_bound
        return tuple(tensor + scale * _laplace_like(tensor, generator) for tensor in bounded.tensors)


@dataclass(frozen=True)
class ExponentialSelection:
    """The exponential mechanism: the index of a candidate with a high score.

    Formal guarantee:
        ``release`` returns index i with probability proportional to exp(epsilon * score_i / (2 sensitivity)):
        epsilon-DP with delta 0 (McSherry & Talwar 2007), drawn as a maximum with Gumbel noise in float64.
    """

    epsilon: float

    def __post_init__(self) -> None:
        _require_positive("epsilon", self.epsilon)

    @property
    def event(self) -> DpEvent:
        """Price of one selection."""
        return PureDpEvent(self.epsilon)

    def charge(self, purpose: str, step: int | None = None) -> Charge:
        """The price as a line for the ledger."""
        return Charge(purpose=purpose, mechanism="pure_dp", epsilon=self.epsilon, first_step=step)

    def release(self, bounded: BoundedScores, receipt: Receipt, generator: torch.Generator) -> int:
        """Spend the receipt, then choose; raises like ``SubsampledGaussian.release``."""
        _require_type(bounded, BoundedScores)
        _require_device((bounded.scores,), generator)
        receipt.spend(self.event)
        _require_finite((bounded.scores,))
        logits = bounded.scores.double() * (self.epsilon / (2 * bounded.sensitivity))
        return int((logits - _exponential_like(logits, generator).log()).argmax())


def fresh_generator(device: torch.device | str) -> torch.Generator:
    """A generator keyed by the operating system's entropy; make one per step, never store it.

    On the CPU all 624 words of the Mersenne twister are filled. ``manual_seed`` would keep 32 bits of its seed there,
    and whoever knows one release could try all keys in minutes and take the noise off every step. On CUDA the seed of
    the counter-based generator has 64 bits.
    """
    generator = torch.Generator(device=device)
    if generator.device.type != "cpu":
        return generator.manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))
    state = generator.manual_seed(0).get_state()
    words = torch.frombuffer(bytearray(os.urandom(4 * _TWISTER_WORDS)), dtype=torch.int32).to(torch.int64) & 0xFFFFFFFF
    state[_TWISTER_OFFSET : _TWISTER_OFFSET + 8 * _TWISTER_WORDS] = words.view(torch.uint8)
    generator.set_state(state)
    return generator


_TWISTER_WORDS = 624
_TWISTER_OFFSET = 24  # bytes of torch's CPU state before the words, each stored in 8 bytes; pinned by a test


# ---- shared by the mechanisms --------------------------------------------------------------------


def _sampled(probability: float, event: DpEvent) -> DpEvent:
    return event if probability == 1 else PoissonSampledDpEvent(probability, event)


def _spend(receipt: Receipt, event: DpEvent, once: _Once, sampling_probability: float) -> None:
    if not isinstance(receipt, Receipt):
        raise Refusal("a receipt of the ledger should come with a release, found none: call Ledger.charge first")
    if once.used and sampling_probability < 1:
        raise Refusal("a Poisson draw should meet noise once, found a second release of it: draw the patients afresh")
    receipt.spend(event)
    once.used = True


def _with_gaussian(
    tensors: Sequence[torch.Tensor], deviation: float, generator: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Tensors plus independent noise of the given standard deviation, in their own precision."""
    _require_finite(tensors)
    return tuple(
        torch.add(
            tensor.detach(),
            torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device, generator=generator),
            alpha=deviation,
        )
        for tensor in tensors
    )


def _laplace_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard Laplace noise: the difference of two standard exponentials."""
    return _exponential_like(tensor, generator) - _exponential_like(tensor, generator)


def _exponential_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.empty_like(tensor).exponential_(generator=generator)


def _require_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise UsageRefusal(f"{name} should be finite and above 0, found {value}")


def _require_probability(value: float) -> None:
    if not 0 < value <= 1:
        raise UsageRefusal(f"the sampling probability should lie in (0, 1], found {value}; 1 is the full batch")


def _require_floats(tensors: Sequence[torch.Tensor]) -> None:
    wrong = {str(tensor.dtype) for tensor in tensors} - {"torch.float32", "torch.float64"}
    if wrong:
        raise UsageRefusal(f"sums should be float32 or float64, found {sorted(wrong)}: call .float() before clipping")


def _require_type(value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"this mechanism releases a {kind.__name__}, found {type(value).__name__}")


def _require_device(tensors: Sequence[torch.Tensor], generator: torch.Generator) -> None:
    wrong = {tensor.device.type for tensor in tensors} - {generator.device.type}
    if wrong:
        raise TypeError(
            f"the generator should be on the tensors' device {sorted(wrong)}, found {generator.device.type}: "
            "make it with fresh_generator(device)"
        )


def _require_finite(tensors: Sequence[torch.Tensor]) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise RuntimeError(
            "the sum should be finite, found a value that is not: its charge stays spent; set a gradient that"
            " "
            "is not finite to zero before it is summed"
        )
