"""A site and a coordinator that do what a test says, in place of the real ones, inside Flower's processes.

``put_in_place`` makes every Python that is started from now on begin with ``install``: the production code has no hook
for it. One side may be the real one:

    real=None           the coordinator's configuration is a list of steps; the site echoes, unless told otherwise
    real="site"         the same coordinator; the site's upload may be lost
    real="coordinator"  the site answers as the protocol says (``federation.Site``), but for what ``NAME.json`` names
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file


def put_in_place(monkeypatch: pytest.MonkeyPatch, folder: Path, real: Literal["site", "coordinator"] | None = None):
    """Let the processes that are started from now on use the stand-ins."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(f"import flower_stand_ins\nflower_stand_ins.install({real!r})\n")
    paths = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def install(real: Literal["site", "coordinator"] | None = None) -> None:
    """Stand in for the modules before anybody imports them."""
    of_a_site = {"site_settings": {"read_settings": read_settings}, "site": {"handle": handle}}
    of_a_coordinator = {
        "coordinator": {"Coordinator": Coordinator},
        "run_config": {"read_config": lambda file: json.loads(Path(file).read_text())},
    }
    given = {
        None: of_a_site | of_a_coordinator,
        "site": {"site": {"handle": losing_handle}} | of_a_coordinator,
        "coordinator": of_a_site | {"site": {"handle": faulty_handle}},
    }
    for name, content in given[real].items():
        module = types.ModuleType(f"nnunet_dp.federated.{name}")
        module.__dict__.update(content)
        sys.modules[module.__name__] = module


def read_settings(file: Path) -> types.SimpleNamespace:
    return types.SimpleNamespace(name=file.stem, folder=file.parent)


def handle(kind, header, arrays, settings):
    told = json.loads(header)
    mine = told.get("only") in (None, settings.name)
    note_call(settings, kind, told.get("round"))
    if mine and told.get("do") == "raise":
        raise RuntimeError("patient 17 has a tumour")
    if mine and told.get("do") == "sleep":
        time.sleep(told["seconds"])
    if mine and told.get("do") == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if mine and told.get("do") == "end":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    if mine and told.get("do") == "fork":
        end_a_forked_worker()
    if mine and told.get("do") == "orphan":
        worker = forked_worker()
        (settings.folder / "orphan").write_text(str(worker.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    reply = {"code": "ok", "site": settings.name, "kind": kind, "run": "0", "round": told.get("round")}
    return json.dumps(reply), dict(arrays)


def forked_worker():
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()
    return worker


def note_call(settings, kind, number):
    with (settings.folder / f"{settings.name}.calls").open("a") as stream:
        stream.write(json.dumps({"kind": kind, "pid": os.getpid(), "round": number}) + "\n")


def end_a_forked_worker():
    """As the end of a pool: one worker forked, told to end, waited for."""
    worker = forked_worker()
    worker.terminate()
    worker.join()
    assert worker.exitcode == -signal.SIGTERM, "the worker should end by the signal alone"


def losing_handle(kind, header, arrays, settings):
    """The real site; where the file ``lose`` lies beside its results, the process is killed before it can answer."""
    del sys.modules["nnunet_dp.federated.site"]
    from nnunet_dp.federated.site import handle as real

    answer = real(kind, header, arrays, settings)
    if (settings.folder("results").parent / "lose").exists():
        (settings.folder("results").parent / "lose").unlink()
        os.kill(os.getpid(), 9)
    return answer


def faulty_handle(kind, header, arrays, settings):
    """A site by the protocol, but for what ``NAME.json`` says is wrong with it and with its next ``train`` replies."""
    from federation import Site

    note_call(settings, kind, json.loads(header).get("round"))
    file = settings.folder / f"{settings.name}.json"
    told = json.loads(file.read_text())
    reply, weights = Site(settings.name, **told["site"]).answer(kind, header, arrays)
    if kind == "train" and told["faults"]:
        fault, *rest = told["faults"]
        file.write_text(json.dumps(told | {"faults": rest}))
        return FAULTS[fault](reply, weights)
    return reply, weights


def late(reply, weights):
    time.sleep(12)
    return reply, weights


def coded(code):
    """A reply that says it in one word, without weights."""
    return lambda reply, weights: (json.dumps(json.loads(reply) | {"code": code}), {})


def addressed(**other):
    """A good reply, but to another question."""
    return lambda reply, weights: (json.dumps(json.loads(reply) | other), weights)


FAULTS = {
    "none": lambda reply, weights: (reply, weights),
    "not finite": lambda reply, weights: (reply, {name: np.full_like(w, np.nan) for name, w in weights.items()}),
    "wrong shape": lambda reply, weights: (reply, {name: w[..., None] for name, w in weights.items()}),
    "no JSON": lambda reply, weights: (reply[:-1], weights),
    "no text": lambda reply, weights: (3, weights),
    "late": late,
    "another round": addressed(round=7),
    "another run": addressed(run="0b"),
    "another name": addressed(site="north"),
    "failed": coded("failed"),
    "budget spent": coded("budget_spent"),
}
"""What a site may do wrong, as a function of the good reply."""


class Coordinator:
    """Does its configuration's steps, one exchange with all nodes each, and writes down what came back."""

    def __init__(self, config, transport, folder, say):
        self.config, self.transport, self.folder, self.say = config, transport, folder, say

    def run(self):
        state = self.folder / "rounds.json"
        done = json.loads(state.read_text()) if state.is_file() else []
        for step in self.config["steps"][len(done) :]:
            done.append(self.step(step, len(done)))
            state.write_text(json.dumps(done))
            self.say(f"round {len(done)}: {sorted(done[-1]['sites'])}")
        return {"rounds": done}

    def step(self, step, number):
        nodes = self.transport.sites(step.get("minimum", 2), step.get("patience", 60))
        generator = np.random.default_rng(number)
        sent = {f"layer{i}": generator.normal(size=step.get("size", 10)).astype(np.float32) for i in range(4)}
        header = json.dumps({**step, "round": number})
        if "header" in step:
            header, sent = step["header"], load_file(step["arrays"])
        replies = self.transport.exchange(step["kind"], dict.fromkeys(nodes, (header, sent)), step.get("timeout", 60))
        traffic = self.transport.traffic
        heads = [json.loads(reply[0]) if reply[0] else {"site": "?"} for reply in replies.values()]
        same = all(np.array_equal(sent[name], reply[1].get(name)) for reply in replies.values() for name in sent)
        numbers = {"seconds": traffic.seconds, "sent": traffic.sent_bytes, "received": traffic.received_bytes}
        for node, reply in replies.items():
            save_file(reply[1], self.folder / f"reply_{number}_{node}.safetensors")
        return {"sites": [head["site"] for head in heads], "heads": heads, "same": same, "nodes": nodes, **numbers}
