"""Background loading: exactly the drawn slots, each patient with a stream of its own, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import traceback

import numpy as np
import pytest
import torch

from nnunet_dp import loading
from nnunet_dp.loading import PatientLoader

CASES = [("left_a", "right_a"), ("left_b",), ("left_c", "right_c"), ("left_d",)]
DRAWN = [3, 0, 2]


def patches(cases):
    """The case's number and noise from all three global generators; some cases cannot be read."""
    if cases[0].startswith("unreadable"):
        raise OSError(f"cannot read {cases[0]}.b2nd")
    noise = [np.random.rand(), random.random(), torch.rand(()).item()]
    data = np.array([[ord(cases[0][-1]), len(cases), *noise]])
    return data, [data[:, :1], data[:, 1:2]]


@pytest.fixture
def load(monkeypatch):
    """Records of drawn slots as one array, by a loader with a fixed key, closed at the end."""
    loaders = []
    monkeypatch.setattr(loading, "fresh_key", lambda: b"fixed" * 6)

    def load(cases=CASES, drawn=DRAWN, step=0, workers=0):
        loaders.append(PatientLoader(patches, cases, torch.device("cpu"), workers))
        return torch.cat([record.data for record in loaders[-1].records(step, list(drawn))])

    yield load
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_exactly_the_drawn_slots_are_delivered_in_their_order(load, workers):
    many = [0, 1, 2, 3] * 5
    found = load(drawn=many, workers=workers)
    assert [chr(int(number)) for number in found[:, 0]] == list("abcd" * 5)
    assert found[:, 1].tolist() == [2, 1, 2, 1] * 5


@pytest.mark.parametrize("workers", [0, 2])
def test_an_empty_draw_loads_nothing(workers):
    loader = PatientLoader(patches, CASES, torch.device("cpu"), workers)
    assert list(loader.records(0, [])) == []
    loader.close()


def test_targets_come_as_the_source_gave_them():
    (record,) = PatientLoader(patches, CASES, torch.device("cpu"), 0).records(0, [2])
    assert isinstance(record.target, list)
    assert torch.equal(torch.cat([record.data[:, :1], record.target[1]], 1), record.data[:, :2])


def test_workers_deliver_what_this_process_would(load):
    assert torch.equal(load(workers=0), load(workers=2))


def test_each_patient_and_each_step_has_noise_of_its_own(load):
    noise = torch.cat([load(drawn=range(4), step=step)[:, 2:].flatten() for step in range(5)])
    assert len(noise.unique()) == 4 * 5 * 3


def test_two_loaders_never_share_their_noise():
    first, second = (PatientLoader(patches, CASES, torch.device("cpu"), 0) for _ in range(2))
    a, b = (next(iter(loader.records(0, [0]))).data for loader in (first, second))
    assert (a[:, 2:] != b[:, 2:]).all()


def test_a_patients_patches_do_not_change_when_another_is_not_drawn(load):
    assert torch.equal(load(drawn=[3, 2]), load(drawn=[3, 0, 2])[[0, 2]])


def test_a_patients_patches_do_not_change_when_another_is_replaced(load):
    replaced = [("some", "other", "scans_z"), *CASES[1:]]
    before, after = load(), load(cases=replaced)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_patients_patches_do_not_change_when_another_is_unreadable(load, workers):
    broken = [("unreadable_a",), *CASES[1:]]
    assert torch.equal(load(cases=broken, drawn=[3, 2], workers=workers), load(drawn=[3, 2]))
    with pytest.raises(RuntimeError):
        load(cases=broken, workers=workers)


def test_loading_in_this_process_leaves_its_generators_where_they_were(load):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    load(workers=0)
    with pytest.raises(RuntimeError):
        load(cases=[("unreadable_a",)], drawn=[0], workers=0)
    assert states() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_case_that_cannot_be_read_is_not_named(load, workers):
    number = 4711
    with pytest.raises(RuntimeError, match=r"a training case could not be read \(OSError\)") as caught:
        load(cases=[(f"unreadable_{number}",)], drawn=[0], workers=workers)
    assert "4711" not in "".join(traceback.format_exception(caught.value)).replace("number = 4711", "")


def test_printing_a_loader_shows_no_case():
    assert repr(PatientLoader(patches, CASES, torch.device("cpu"), 0)) == "PatientLoader(4 slots)"


def test_closing_ends_the_workers_and_may_be_repeated():
    loader = PatientLoader(patches, CASES, torch.device("cpu"), 2)
    list(loader.records(0, DRAWN))
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    loader.close()
    loader.close()
    assert not any(worker.is_alive() for worker in workers)


def test_no_step_starts_a_worker_of_its_own():
    loader = PatientLoader(patches, CASES, torch.device("cpu"), 2)
    workers = []
    for step in range(4):
        assert len(list(loader.records(step, DRAWN))) == len(DRAWN)
        workers.append({process.pid for process in multiprocessing.active_children()})
    loader.close()
    assert all(found == workers[0] and len(found) == 2 for found in workers)


ORPHANS = """
import time, torch
from nnunet_dp.loading import PatientLoader
def slow(cases):
    time.sleep(float(cases[0]))
loader = PatientLoader(slow, [("0",), ("600",)], torch.device("cpu"), 2)
loader._pool.submit(time.sleep, 0).result()
next(iter(loader._pool.map(time.sleep, [0, 600])))
print("loading", flush=True)
time.sleep(600)
"""


def test_no_worker_survives_the_kill_of_its_parent():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None and parent.stdout.readline() == "loading\n"
    parent.send_signal(signal.SIGKILL)
    rest, _ = parent.communicate(timeout=10)  # ends only when the last process that inherited the pipe is gone
    assert rest == ""
