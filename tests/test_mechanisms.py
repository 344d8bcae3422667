"""Noise has the promised size, is drawn only against an unspent receipt, and reads its scale off the value."""

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dp_accounting.dp_event import GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent
from scipy.stats import kstest

from nnunet_dp.accounting import z_delta
from nnunet_dp.charges import Charge
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.events import PureDpEvent
from nnunet_dp.ledger import Ledger, Receipt
from nnunet_dp.mechanisms import (
    BoundedScores,
    ClippedSum,
    ExponentialSelection,
    GaussianWithCount,
    L1Bounded,
    Laplace,
    SubsampledGaussian,
    fresh_generator,
)

SAMPLES = 20_000
Pay = Callable[[Charge], Receipt]


@pytest.fixture
def pay(tmp_path: Path) -> Pay:
    return Ledger(tmp_path / "privacy_ledger.jsonl", run="run", plan="0a").charge


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zeros(dtype: torch.dtype = torch.float32, l2_bound: float = 1.0, count: float | None = None) -> ClippedSum:
    return ClippedSum(
        (torch.zeros(SAMPLES // 2, dtype=dtype), torch.zeros(2, SAMPLES // 4, dtype=dtype)), l2_bound, count
    )


def released(mechanism: SubsampledGaussian | GaussianWithCount, value: ClippedSum, pay: Pay) -> torch.Tensor:
    noised = mechanism.release(value, pay(mechanism.charge("training", 0)), seeded())
    return torch.cat([tensor.flatten() for tensor in noised.tensors])


# ---- size of the noise ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("l2_bound", [0.03, 1.0, 40.0])
def test_the_noise_is_gaussian_with_sigma_times_bound(dtype: torch.dtype, l2_bound: float, pay: Pay) -> None:
    noise = released(SubsampledGaussian(1.7, 0.2), zeros(dtype, l2_bound), pay)
    assert noise.dtype == dtype
    assert kstest(noise.numpy(), "norm", args=(0, 1.7 * l2_bound)).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert kstest(noise.numpy(), "norm", args=(0, wrong * 1.7 * l2_bound)).pvalue < 1e-10


def test_the_noise_is_added_to_the_sum(pay: Pay) -> None:
    value = ClippedSum((torch.full((4,), 1000.0),), l2_bound=1.0)
    assert torch.allclose(released(SubsampledGaussian(0.5), value, pay), torch.tensor(1000.0), atol=5)
    assert bool((value.tensors[0] == 1000).all())


def test_no_two_coordinates_share_their_noise(pay: Pay) -> None:
    noise = released(SubsampledGaussian(1.0), zeros(torch.float64), pay)
    assert len(noise.unique()) == SAMPLES


def test_the_gradient_beside_a_count_gets_the_larger_noise(pay: Pay) -> None:
    mechanism = GaussianWithCount(noise_multiplier=3.0, count_noise=2.0, sampling_probability=0.3)
    noise = released(mechanism, zeros(count=7.0, l2_bound=2.0), pay).numpy()
    assert kstest(noise, "norm", args=(0, 2 * z_delta(3.0, 2.0))).pvalue > 1e-3
    assert kstest(noise, "norm", args=(0, 2 * 3.0)).pvalue < 1e-10


def test_the_count_gets_noise_of_its_own_size(pay: Pay) -> None:
    mechanism, generator = GaussianWithCount(1.0, 5.0), seeded()
    receipt = pay(mechanism.charge("training", 0, count=500))
    value = ClippedSum((torch.zeros(1),), 1.0, centred_count=7.5)
    counts = [mechanism.release(value, receipt, generator).noised_count for _ in range(500)]
    assert kstest(counts, "norm", args=(7.5, 5.0)).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert kstest(counts, "norm", args=(7.5, wrong * 5.0)).pvalue < 1e-4


def test_laplace_noise_has_its_scale_from_the_l1_bound(pay: Pay) -> None:
    mechanism = Laplace(2.0)
    value = L1Bounded((torch.zeros(SAMPLES, dtype=torch.float64),), l1_bound=3.0)
    (noise,) = mechanism.release(value, pay(mechanism.charge("fingerprint")), seeded())
    assert kstest(noise.numpy(), "laplace", args=(0, 6.0)).pvalue > 1e-3
    assert kstest(noise.numpy(), "laplace", args=(0, 4.0)).pvalue < 1e-10


def test_a_selection_follows_the_exponential_mechanism(pay: Pay) -> None:
    mechanism, generator = ExponentialSelection(epsilon=1.0), seeded()
    receipt = pay(Charge(purpose="fingerprint", mechanism="pure_dp", epsilon=1.0, count=2000))
    scores = BoundedScores(torch.tensor([0.0, 2.0]), sensitivity=1.0)
    chosen = sum(mechanism.release(scores, receipt, generator) for _ in range(2000)) / 2000
    assert chosen == pytest.approx(math.e / (1 + math.e), abs=0.04)


# ---- price ---------------------------------------------------------------------------------------


def test_each_mechanism_states_its_price() -> None:
    assert SubsampledGaussian(2.0).event == GaussianDpEvent(2.0)
    assert SubsampledGaussian(2.0, 0.1).event == PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0))
    assert Laplace(3.0).event == LaplaceDpEvent(3.0)
    assert ExponentialSelection(0.5).event == PureDpEvent(0.5)


def test_two_queries_on_one_draw_are_charged_as_one_gaussian() -> None:
    both, one = GaussianWithCount(1.2, 4.0, 0.1), SubsampledGaussian(1.2, 0.1)
    assert both.event == one.event
    assert both.charge("training", 3) == one.charge("training", 3)


@pytest.mark.parametrize("mechanism", [SubsampledGaussian(1.5), SubsampledGaussian(1.5, 0.4), Laplace(2.0, 0.5)])
def test_the_ledger_is_charged_what_the_mechanism_costs(mechanism: SubsampledGaussian | Laplace) -> None:
    assert mechanism.charge("training", 2).event == mechanism.event


def test_a_selection_is_charged_as_pure_dp() -> None:
    assert ExponentialSelection(0.5).charge("fingerprint").event == PureDpEvent(0.5)


@pytest.mark.parametrize("count_noise", [0.0, 0.4, math.nan])
def test_a_count_noise_that_cannot_pay_is_refused(count_noise: float) -> None:
    with pytest.raises(ValueError, match="should be"):
        GaussianWithCount(1.0, count_noise)


@pytest.mark.parametrize("noise", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("kind", [SubsampledGaussian, Laplace, ExponentialSelection])
def test_a_mechanism_without_noise_is_refused(kind: Callable[[float], object], noise: float) -> None:
    with pytest.raises(UsageRefusal, match="above 0"):
        kind(noise)


@pytest.mark.parametrize("probability", [0.0, 1.5, -0.1, math.nan])
def test_a_sampling_probability_outside_its_range_is_refused(probability: float) -> None:
    for kind in (SubsampledGaussian, Laplace):
        with pytest.raises(UsageRefusal, match="sampling probability"):
            kind(1.0, probability)


# ---- receipts ------------------------------------------------------------------------------------


def test_no_noise_without_a_receipt() -> None:
    with pytest.raises(Refusal, match="receipt"):
        SubsampledGaussian(1.0).release(zeros(), None, seeded())  # type: ignore[arg-type]


def test_a_receipt_is_spent_once(pay: Pay) -> None:
    mechanism = SubsampledGaussian(1.0)
    receipt = pay(mechanism.charge("training", 0))
    mechanism.release(zeros(), receipt, seeded())
    with pytest.raises(Refusal, match="charge again"):
        mechanism.release(zeros(), receipt, seeded())


@pytest.mark.parametrize(
    "other", [SubsampledGaussian(1.01, 0.1), SubsampledGaussian(1.0, 0.2), SubsampledGaussian(1.0)]
)
def test_a_receipt_pays_for_nothing_else(other: SubsampledGaussian, pay: Pay) -> None:
    mechanism = SubsampledGaussian(1.0, 0.1)
    receipt = pay(mechanism.charge("training", 0))
    with pytest.raises(Refusal, match="what was charged"):
        other.release(zeros(), receipt, seeded())
    mechanism.release(zeros(), receipt, seeded())  # and is still good for what was charged


def test_a_receipt_for_a_block_pays_for_each_of_its_steps(pay: Pay) -> None:
    mechanism = SubsampledGaussian(1.0, 0.5)
    receipt = pay(mechanism.charge("training", 0, count=3))
    for _ in range(3):
        mechanism.release(zeros(), receipt, seeded())
    with pytest.raises(Refusal, match="charge again"):
        mechanism.release(zeros(), receipt, seeded())


def test_a_receipt_cannot_be_made_copied_or_stored(pay: Pay) -> None:
    charge = SubsampledGaussian(1.0).charge("training", 0)
    with pytest.raises(Refusal, match=r"Ledger\.charge"):
        Receipt(charge, maker=None)
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            duplicate(pay(charge))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sum_that_is_not_finite_stays_charged_and_is_not_described(bad: float, pay: Pay) -> None:
    mechanism = SubsampledGaussian(1.0)
    receipt = pay(mechanism.charge("training", 0))
    with pytest.raises(RuntimeError, match="finite") as caught:
        mechanism.release(ClippedSum((torch.tensor([1234.5, bad]),), 1.0), receipt, seeded())
    assert "1234" not in str(caught.value)
    with pytest.raises(Refusal, match="charge again"):
        receipt.spend(mechanism.event)


def test_a_count_that_is_not_finite_stays_charged(pay: Pay) -> None:
    mechanism = GaussianWithCount(1.0, 2.0)
    receipt = pay(mechanism.charge("training", 0))
    with pytest.raises(RuntimeError, match="finite"):
        mechanism.release(zeros(count=math.nan), receipt, seeded())
    with pytest.raises(Refusal, match="charge again"):
        receipt.spend(mechanism.event)


# ---- what may be released ------------------------------------------------------------------------


def test_laplace_refuses_a_sum_that_is_only_l2_bounded(pay: Pay) -> None:
    mechanism = Laplace(1.0)
    receipt = pay(mechanism.charge("training", 0))
    with pytest.raises(TypeError, match="L1Bounded"):
        mechanism.release(zeros(), receipt, seeded())  # type: ignore[arg-type]
    receipt.spend(mechanism.event)  # a wrong type spends nothing


def test_a_gaussian_refuses_a_sum_that_is_only_l1_bounded(pay: Pay) -> None:
    mechanism = SubsampledGaussian(1.0)
    with pytest.raises(TypeError, match="ClippedSum"):
        mechanism.release(L1Bounded((torch.zeros(1),), 1.0), pay(mechanism.charge("training", 0)), seeded())  # type: ignore[arg-type]


def test_a_count_never_travels_with_a_gradient_that_does_not_pay_for_it(pay: Pay) -> None:
    mechanism = SubsampledGaussian(1.0, 0.1)
    with pytest.raises(Refusal, match="GaussianWithCount"):
        mechanism.release(zeros(count=1.0), pay(mechanism.charge("training", 0)), seeded())


def test_a_missing_count_is_refused(pay: Pay) -> None:
    mechanism = GaussianWithCount(1.0, 2.0)
    with pytest.raises(Refusal, match="found none"):
        mechanism.release(zeros(), pay(mechanism.charge("training", 0)), seeded())


def test_one_poisson_draw_meets_noise_once(pay: Pay) -> None:
    mechanism, drawn = SubsampledGaussian(1.0, 0.1), zeros()
    mechanism.release(drawn, pay(mechanism.charge("training", 0)), seeded())
    receipt = pay(mechanism.charge("training", 1))
    with pytest.raises(Refusal, match="draw the patients afresh"):
        mechanism.release(drawn, receipt, seeded())
    mechanism.release(zeros(), receipt, seeded())


def test_a_full_batch_may_be_released_again(pay: Pay) -> None:
    mechanism, everybody = SubsampledGaussian(1.0), zeros()
    for step in range(2):
        mechanism.release(everybody, pay(mechanism.charge("training", step)), seeded())


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_must_be_one(bound: float) -> None:
    for make in (
        lambda: ClippedSum((), bound),
        lambda: L1Bounded((), bound),
        lambda: BoundedScores(torch.ones(1), bound),
    ):
        with pytest.raises(UsageRefusal, match="above 0"):
            make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_sums_in_low_precision_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UsageRefusal, match="float32 or float64"):
        ClippedSum((torch.zeros(2, dtype=dtype),), 1.0)


def test_private_values_are_not_printed() -> None:
    text = repr(ClippedSum((torch.full((2,), 4321.0),), 1.5, centred_count=8765.0))
    assert "1.5" in text
    assert "4321" not in text
    assert "8765" not in text


def test_a_bounded_value_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        zeros().l2_bound = 0.1  # type: ignore[misc]


# ---- randomness ----------------------------------------------------------------------------------


def test_a_fresh_cpu_generator_has_its_whole_state_filled_with_entropy() -> None:
    words = slice(24, 24 + 8 * 624)
    seeded = torch.Generator().manual_seed(77).get_state()
    assert seeded[words][:8].tolist() == [77, 0, 0, 0, 0, 0, 0, 0]  # pins torch's layout: the first word is the seed
    filled = fresh_generator("cpu").get_state()[words].view(torch.int64)
    low_bits = (filled & 1).float().mean().item()
    assert 0.3 < low_bits < 0.7
    assert len(set(filled.tolist())) == 624
    assert not torch.equal(filled, torch.Generator().manual_seed(int(filled[0])).get_state()[words].view(torch.int64))


def test_seeding_by_number_keeps_only_32_bits_which_is_why_it_is_not_done() -> None:
    one, other = (torch.randn(9, generator=torch.Generator().manual_seed(5 + k * 2**32)) for k in (0, 7))
    assert torch.equal(one, other)


def test_fresh_generators_differ() -> None:
    drawn = {float(torch.rand((), dtype=torch.float64, generator=fresh_generator("cpu"))) for _ in range(50)}
    assert len(drawn) == 50


def test_the_noise_comes_from_the_generator_alone(pay: Pay) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    mechanism = SubsampledGaussian(1.0)
    assert torch.equal(released(mechanism, zeros(), pay), released(mechanism, zeros(), pay))
    assert torch.equal(before, torch.get_rng_state())


def test_a_generator_of_another_device_spends_nothing(pay: Pay) -> None:
    mechanism = SubsampledGaussian(1.0)
    receipt = pay(mechanism.charge("training", 0))
    with pytest.raises(TypeError, match="device"):
        mechanism.release(ClippedSum((torch.zeros(1, device="meta"),), 1.0), receipt, seeded())
    receipt.spend(mechanism.event)


@pytest.mark.gpu
def test_noise_on_the_gpu_has_its_size_too(pay: Pay) -> None:
    mechanism = GaussianWithCount(1.7, 4.0)
    value = ClippedSum((torch.zeros(SAMPLES, device="cuda"),), 2.0, centred_count=0.0)
    noised = mechanism.release(value, pay(mechanism.charge("training", 0)), fresh_generator("cuda"))
    deviation = 2 * z_delta(1.7, 4.0)
    assert noised.tensors[0].is_cuda
    assert kstest(noised.tensors[0].cpu().numpy(), "norm", args=(0, deviation)).pvalue > 1e-4
    assert kstest(noised.tensors[0].cpu().numpy(), "norm", args=(0, deviation * 2 / 3)).pvalue < 1e-10
