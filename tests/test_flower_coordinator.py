"""What the real coordinator makes of sites that answer badly, with real processes on loopback, TLS and registered keys.

Two sites answer as the protocol says, without a patient, but for what a test names (``flower_stand_ins.FAULTS``); in a
good round the north moves every weight by 1, the south by 3. Messages, rounds, state and model are the real ones.
"""

import json

import numpy as np
import pytest

pytest.importorskip("flwr")

import federation as in_memory
import flower_stand_ins
from flower_federation import Federation
from one_site import coordinator_plans, planned_weights
from safetensors.numpy import save_file

from nnunet_dp import __version__
from nnunet_dp.federated.coordinator import RESULT
from nnunet_dp.federated.flower_processes import FlowerProcesses
from nnunet_dp.federated.run_config import RunConfig
from nnunet_dp.federated.server_state import read_state
from nnunet_dp.plans import json_sha256

COLOURS = {"0": "R", "1": "G", "2": "B"}
SKIN = {"channel_names": COLOURS, "labels": {"background": 0, "lesion": 1}, "file_ending": ".png"}
SHA = json_sha256(coordinator_plans())
BAD = {
    "wrong shape": "wrong shape",
    "malformed header": "no text",
    "another round": "another round",
    "another run": "another run",
    "another site's name": "another name",
}
"""Why a reply is left out, and what the site does for that."""


class Run:
    """A run of the real coordinator over both sites."""

    def __init__(self, federation, name, rounds, **changes):
        self.federation, self.name, self.lines = federation, name, []
        self.folder = federation.folder / name
        self.model = federation.folder / "Dataset900_Federated" / f"T__{name}__2d"
        self.terms = in_memory.terms(rounds=rounds, plans_sha256=SHA)
        self.config = RunConfig(
            terms=self.terms, plans=coordinator_plans(), dataset_json=SKIN, sites=2, model_folder=str(self.model),
            initial_weights=str(federation.folder / "weights.safetensors"), **changes,
        )  # fmt: skip

    def __call__(self):
        submitted = self.federation.submit_config(self.config.model_dump_json(), self.name)
        return self.federation.flower.wait(submitted, self.lines.append, 250)

    @property
    def result(self):
        return json.loads((self.folder / RESULT).read_text())

    @property
    def moved(self):
        """By how much the rounds so far moved the weights."""
        state = read_state(self.folder, self.terms)
        differences = [state.weights[name] - first for name, first in self.federation.weights.items()]
        return np.unique(np.round(np.concatenate([part.ravel() for part in differences]), 3)).tolist()

    def said(self, beginning):
        (line,) = [line for line in self.lines if line.startswith(beginning)]
        return line


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """North and south, connected; every run of this module asks the same processes."""
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch, FlowerProcesses(folder / "flower") as flower:
        flower_stand_ins.put_in_place(patch, folder / "first", real="coordinator")
        federation = Federation(folder, flower)
        federation.weights = planned_weights(SKIN)
        save_file(federation.weights, folder / "weights.safetensors")
        for name in ("north", "south"):
            federation.start(name)
        yield federation


def sites_are(federation, faults=(), **south):
    """From now on the south is like this, and does this in its next rounds."""
    for name, step, wrong, told in (("north", 1, [], {}), ("south", 3, list(faults), south)):
        site = {"step": step, "dataset_json": SKIN, "confirms": SHA} | told
        (federation.folder / f"{name}.json").write_text(json.dumps({"site": site, "faults": wrong}))
        (federation.folder / f"{name}.calls").unlink(missing_ok=True)


def trained(federation, name):
    return [call["round"] for call in federation.calls(name) if call["kind"] == "train"]


OTHER_LABELS = SKIN | {"labels": {"background": 0, "naevus": 1}}


@pytest.mark.parametrize(
    ("south", "difference"),
    [
        ({"version": "0.0.1"}, f"nnunet_dp '0.0.1', this run has '{__version__}'"),
        ({"dataset_json": OTHER_LABELS}, f"labels {OTHER_LABELS['labels']}, this run has {SKIN['labels']}"),
    ],
)
def test_a_run_does_not_begin_with_a_site_that_does_not_fit_which_is_named(both, south, difference):
    sites_are(both, **south)
    run = Run(both, f"differs_{'_'.join(south)}", rounds=2)
    end = run()
    assert end.exit_code == 1 and f"south differs: {difference}" in end.message
    assert [[call["kind"] for call in both.calls(name)] for name in ("north", "south")] == [["query"]] * 2
    assert not run.model.exists()


@pytest.fixture(scope="module")
def eventful(both):
    """Nine rounds in which the south does something else each, and its end."""
    sites_are(both, ["not finite", "none", *BAD.values(), "budget spent"])
    run = Run(both, "eventful", rounds=9, minimum_replies=1)
    return run, run(), {name: trained(both, name) for name in ("north", "south")}


@pytest.mark.slow
def test_bad_replies_are_left_out_by_name_and_the_run_goes_on(eventful):
    run, end, _ = eventful
    assert (end.exit_code, end.message) == (0, ""), run.lines
    for number, why in enumerate(("not finite", None, *BAD), 1):
        missing = f"1 of 2 sites  missing south (rejected: {why})" if why else "2 of 2 sites"
        assert missing in run.said(f"round {number}/9") and ("missing" in run.said(f"round {number}/9")) == bool(why)
    assert run.moved == [8 * 1 + 2] and [site["rounds"] for site in run.result["sites"]] == [9, 1]


@pytest.mark.slow
def test_a_site_at_the_end_of_its_budget_is_asked_no_more_and_the_model_is_written(eventful):
    run, _, asked = eventful
    assert "missing south (budget_spent)" in run.said("round 8/9") and "missing" not in run.said("round 9/9")
    assert asked == {"north": list(range(9)), "south": list(range(8))}
    assert run.result["complete"] and (run.model / "fold_all" / "checkpoint_final.pth").is_file()
    assert json.loads((run.model / "federated.json").read_text())["sites"] == run.result["sites"]


@pytest.mark.slow
def test_too_few_replies_are_asked_for_again_and_then_end_the_run_with_names(both):
    sites_are(both, ["late", "none", "failed", "failed"])
    run = Run(both, "too_few", rounds=3, minimum_replies=2, retries=1, round_timeout_s=10.0)
    end = run()
    assert "1 replies, 2 needed (south: no reply in time); try 1 of 2" in run.said("round 1:")
    assert "2 of 2 sites" in run.said("round 1/3") and run.moved == [2]
    assert end.exit_code == 1
    assert "round 2 had too few replies in 2 tries (south: failed). The model of round 1 is in" in end.message
    assert not run.result["complete"] and (run.model / "fold_all" / "checkpoint_final.pth").is_file()
