"""The engine is the fastest on random data, within what a timing may cost, unless the environment names one."""

from __future__ import annotations

import pytest
import torch
from asserts import norm
from test_gradients import network, nnunet_loss, records
from torch import nn

from nnunet_dp import engine_choice
from nnunet_dp.batched_gradients import Batched
from nnunet_dp.clipping import make_rule
from nnunet_dp.engine_choice import (
    DEFAULT_CHUNK,
    SHARE,
    VARIABLE,
    EngineBudget,
    Timed,
    choose,
    engine_for,
    execution_for,
    random_record,
)
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.gradients import Record, one_at_a_time

LONG = EngineBudget(patients=1e6, largest_chunk=64)
RULE = make_rule("auto_s", {"bound": 1.0, "regulariser": 0.01})


def clock(one: float, **chunks: float):
    """Seconds a patient of engine one and of engine two by chunk; asks are remembered."""
    asked = []

    def seconds_of(engine, patients, repeats):
        asked.append(engine.chunk if isinstance(engine, Batched) else 1)
        return chunks[f"two_{engine.chunk}"] if isinstance(engine, Batched) else one

    seconds_of.asked = asked
    return seconds_of


def chosen(budget, compiled=False, **seconds):
    told = []
    watch = clock(**seconds)
    engine = choose(watch, budget, told.append, compiled)
    assert len(told) == 1
    return getattr(engine, "chunk", 1), watch.asked, told[0]


def test_chunks_are_doubled_as_long_as_it_pays():
    assert chosen(LONG, one=1.0, two_2=0.8, two_4=0.5, two_8=0.49)[:2] == (4, [1, 2, 4, 8])


def test_engine_one_stays_where_engine_two_is_hardly_faster():
    size, asked, said = chosen(LONG, one=1.0, two_2=0.95)
    assert (size, asked) == (1, [1, 2]) and said.startswith("engine one") and "two:2 0.95" in said


def test_a_chunk_is_no_larger_than_the_expected_batch():
    assert chosen(EngineBudget(1e6, 4), one=1.0, two_2=0.8, two_4=0.5)[:2] == (4, [1, 2, 4])
    assert chosen(EngineBudget(1e6, 1), one=1.0)[:2] == (1, [])


def test_a_short_run_is_not_timed_and_a_longer_one_only_as_far_as_it_pays():
    assert chosen(EngineBudget(100, 16), one=1.0)[:2] == (1, [])
    assert chosen(EngineBudget(16 / SHARE, 16), one=1.0)[:2] == (1, [1])  # 3 passes, not 3 + 14
    assert chosen(EngineBudget(20 / SHARE, 16), one=1.0, two_2=0.5)[:2] == (2, [1, 2])
    assert chosen(EngineBudget(20 / SHARE, 16), compiled=True, one=1.0)[:2] == (1, [1])


def test_the_log_names_the_choice_the_figures_and_the_variable():
    said = chosen(LONG, one=1.0, two_2=0.5, two_4=0.6)[2]
    assert said.startswith("engine two with 2 patients") and VARIABLE in said
    assert all(figure in said for figure in ("one 1", "two:2 0.5", "two:4 0.6"))


@pytest.mark.parametrize("trouble", ["memory", "fallback", "compiler"])
def test_a_chunk_that_does_not_work_ends_the_search_and_the_last_good_one_stays(trouble):
    def seconds_of(engine, patients, repeats):
        if patients == 4:
            if trouble == "compiler":
                raise RuntimeError("the compiler failed")
            engine.chunk, engine.fallback = (2, None) if trouble == "memory" else (4, "a reason")
        return 1.0 / patients

    engine = choose(seconds_of, LONG, lambda sentence: None)
    assert isinstance(engine, Batched) and engine.chunk == 2 and engine.fallback is None


@pytest.mark.parametrize(("setting", "size"), [("two", DEFAULT_CHUNK), ("two:7", 7), ("two:1", 1)])
def test_the_environment_names_engine_two(monkeypatch, setting, size):
    monkeypatch.setenv(VARIABLE, setting)
    told = []
    engine = engine_for(LONG, told.append)
    assert isinstance(engine, Batched) and engine.chunk == size
    assert told == [f"engine two with {size} patients in one pass, as {VARIABLE} says"]


def test_the_environment_names_engine_one_and_its_absence_means_a_timing(monkeypatch):
    monkeypatch.setenv(VARIABLE, "one")
    assert engine_for(LONG) is one_at_a_time
    monkeypatch.delenv(VARIABLE)
    assert isinstance(engine_for(LONG), Timed)


@pytest.mark.parametrize("setting", ["three", "two:", "two:0", "two:x", "two:-1", "one:2", "One"])
def test_a_setting_that_names_no_engine_is_refused(monkeypatch, setting):
    monkeypatch.setenv(VARIABLE, setting)
    with pytest.raises(UsageRefusal, match=f"{VARIABLE} should be one, two or two:CHUNK, found '{setting}'"):
        engine_for(LONG)


def test_the_engine_is_timed_at_the_first_record_and_then_kept(monkeypatch):
    net, loss, patients, told = network("PlainConvUNet", 2), nnunet_loss(), records(2, 5), []
    asked = []
    seconds = {1: 1.0, 2: 0.5, 4: 0.6}

    def fake(self, engine, count, repeats):
        asked.append(count)
        return seconds[count]

    monkeypatch.setattr(engine_choice._Stopwatch, "__call__", fake)
    engine = Timed(LONG, told.append)
    empty = engine(net, loss, (), RULE)
    assert norm(empty.tensors) == 0 and not asked
    expected = one_at_a_time(net, loss, patients, RULE).tensors
    for _ in range(2):
        found = engine(net, loss, iter(patients), RULE).tensors
        assert norm([a - b for a, b in zip(found, expected, strict=True)]) <= 1e-12 * norm(expected)
    assert asked == [1, 2, 4] and len(told) == 1 and isinstance(engine.chosen, Batched) and engine.chosen.chunk == 2


def test_a_real_timing_ends_with_an_engine_that_gives_the_same_sum():
    net, loss, patients, told = network("PlainConvUNet", 2), nnunet_loss(), records(2, 3), []
    before = torch.get_rng_state()
    found = Timed(LONG, told.append)(net, loss, patients, RULE).tensors
    assert torch.equal(torch.get_rng_state(), before)  # nothing else moves because an engine was timed
    expected = one_at_a_time(net, loss, patients, RULE).tensors
    assert norm([a - b for a, b in zip(found, expected, strict=True)]) <= 1e-12 * norm(expected)
    assert told[-1].startswith("engine ") and "one " in told[-1] and "two:2 " in told[-1]


def test_only_the_drawn_patients_are_watched_and_nothing_of_them_is_timed():
    seen, watched = [], []
    net, patients = nn.Linear(5, 3).double(), [Record(torch.full((1, 5), 7.0, dtype=torch.float64), torch.ones(1))] * 2

    def loss(output, target):
        seen.append(target.clone())
        return output.sum() * target.sum()

    Timed(LONG)(net, loss, patients, RULE, watch=watched.append)
    assert len(watched) == 2 and sum(bool(target.all()) for target in seen) == 2


def test_a_random_record_has_the_shapes_and_no_number_of_the_real_one():
    real = records(2, 1)[0]._replace(target=[torch.ones(2, 1, 8, 8), torch.ones(2, 1, 4, 4)])
    found = random_record(real)
    assert found.data.shape == real.data.shape and found.data.dtype == real.data.dtype
    assert not (found.data == real.data).any()
    assert [t.shape for t in found.target] == [t.shape for t in real.target]
    assert not any(t.any() for t in found.target)
    assert random_record(Record(real.data, torch.ones(2, 1))).target.sum() == 0
    assert random_record(Record(real.data, None)).target is None


def test_an_execution_holds_the_engine_for_the_steps_it_takes(monkeypatch):
    monkeypatch.setenv(VARIABLE, "two:3")
    device = torch.device("cpu")
    execution = execution_for(device, _no_autocast, 10, 2.5, print)
    assert execution.device == device and execution.autocast is _no_autocast
    assert isinstance(execution.engine, Batched) and execution.engine.chunk == 3
    monkeypatch.delenv(VARIABLE)
    timed = execution_for(device, _no_autocast, 10, 2.5, print).engine
    assert isinstance(timed, Timed) and timed._budget == EngineBudget(25.0, 3)


def _no_autocast():
    return torch.autocast("cpu", enabled=False)
