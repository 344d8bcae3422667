"""Rounds with sites in memory: who is missing, what is written, how it goes on after a crash."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from federation import Memory, Site, config, terms, three

from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.federated.client_level import ClientLevelMean
from nnunet_dp.federated.coordinator import PROGRESS, RESULT, Coordinator
from nnunet_dp.federated.protocol import Code, Reply
from nnunet_dp.federated.run_config import ClientLevel
from nnunet_dp.federated.server_state import read_state


class Run:
    """A coordinator whose lines and model are kept."""

    def __init__(self, folder, transport, **changes):
        self.lines, self.models = [], []
        write = lambda config, weights, facts, steps: self.models.append((weights, facts, steps))  # noqa: E731
        self.coordinator = Coordinator(config(folder, **changes), transport, folder, self.lines.append, write)

    def __call__(self):
        return self.coordinator.run()


def weights(folder):
    state = read_state(folder, terms())
    assert state is not None
    return state


def test_four_rounds_move_the_weights_by_the_mean_step_each(tmp_path):
    run = Run(tmp_path, three())
    result = run()
    assert result.complete and result.rounds == 4 and result.epsilon == 4.0
    np.testing.assert_array_equal(weights(tmp_path).weights["w"], np.full((2, 2), 8.0, np.float32))
    assert [(site["name"], site["rounds"]) for site in result.sites] == [("ann", 4), ("bob", 4), ("cleo", 4)]
    assert json.loads((tmp_path / RESULT).read_text())["guarantee"].startswith("epsilon 4 per patient, the largest")


def test_public_weights_decide_how_much_a_site_counts(tmp_path):
    Run(tmp_path, three(), weights={"ann": 2.0, "bob": 1.0, "cleo": 1.0})()
    np.testing.assert_allclose(weights(tmp_path).weights["b"], 4 * (2 * 1 + 2 + 3) / 4)


def test_a_line_a_round_names_replies_thresholds_and_epsilon(tmp_path):
    run = Run(tmp_path, three())
    run()
    (last,) = [line for line in run.lines if line.startswith("round 4/4")]
    assert (
        "3 of 3 sites" in last and "threshold 0.5 0.5 0.5" in last and "epsilon 4 (ann 4, bob 4, cleo 4) of 8" in last
    )
    assert len((tmp_path / PROGRESS).read_text().splitlines()) == 4


@pytest.mark.parametrize("mode", ["fedavg", "paper"])
def test_modes_without_a_guarantee_say_so_everywhere(tmp_path, mode):
    run = Run(tmp_path, three(), asked=terms(mode=mode))
    result = run()
    assert result.epsilon is None and result.guarantee.startswith("no guarantee")
    assert all("NO GUARANTEE" in line for line in run.lines if line.startswith("round"))


def faulty(change):
    return lambda request, reply, arrays: change(request, reply, arrays) if request.round == 1 else (reply, arrays)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda q, r, w: None, "no reply in time"),
        (lambda q, r, w: ("", {}), "rejected: malformed header"),
        (lambda q, r, w: (r, {}), "rejected: other parameters"),
        (lambda q, r, w: (r, {**w, "b": np.full(3, np.nan, np.float32)}), "rejected: not finite"),
        (lambda q, r, w: (r, {**w, "b": np.zeros(4, np.float32)}), "rejected: wrong shape"),
        (lambda q, r, w: (r.model_copy(update={"round": 0}), w), "rejected: another round"),
        (lambda q, r, w: (r.model_copy(update={"run": "0b"}), w), "rejected: another run"),
        (lambda q, r, w: (r.model_copy(update={"site": "ann"}), w), "rejected: another site's name"),
        (lambda q, r, w: (r.model_copy(update={"code": Code.failed}), {}), "failed"),
    ],
)
def test_a_bad_reply_costs_its_site_the_round_and_nobody_else(tmp_path, change, why):
    sites = three()
    sites.nodes["3"].spoil = faulty(change)
    run = Run(tmp_path, sites)
    result = run()
    assert [site["rounds"] for site in result.sites] == [4, 4, 3]
    assert any(f"missing cleo ({why})" in line for line in run.lines if line.startswith("round 2/4"))
    np.testing.assert_allclose(weights(tmp_path).weights["w"], 3 * 2 + 1.5)


def test_a_round_with_too_few_replies_is_asked_for_again_and_then_ends_the_run(tmp_path):
    sites = three()
    for node in "12":
        sites.nodes[node].spoil = lambda request, reply, arrays: None if request.round == 2 else (reply, arrays)
    run = Run(tmp_path, sites, retries=1)
    with pytest.raises(Refusal, match=r"round 3 had too few replies in 2 tries \(ann: no reply in time; bob"):
        run()
    assert sites.nodes["3"].trained == [0, 1, 2, 2] and weights(tmp_path).round == 2
    assert len(run.models) == 1 and run.models[0][2] == 2 and not run.models[0][1]["complete"]


def test_a_run_that_ended_early_goes_on_where_it_was(tmp_path):
    sites = three()
    for node in "12":
        sites.nodes[node].spoil = lambda request, reply, arrays: None if request.round == 2 else (reply, arrays)
    with pytest.raises(Refusal):
        Run(tmp_path, sites, retries=0)()
    healthy = three()
    assert Run(tmp_path, healthy)().complete
    assert healthy.nodes["1"].trained == [2, 3]
    np.testing.assert_array_equal(weights(tmp_path).weights["w"], np.full((2, 2), 8.0, np.float32))


def test_a_folder_of_another_run_is_refused(tmp_path):
    Run(tmp_path, three())()
    with pytest.raises(UsageRefusal, match="holds another run"):
        Run(tmp_path, three(), asked=terms(epsilon=3.0))()


def spent(request, reply: Reply, arrays):
    gone = Reply(code=Code.budget_spent, site=reply.site, run="0a", round=request.round, epsilon=7.9, delta=1e-5)
    return (gone, {}) if request.round >= 2 else (reply, arrays)


def test_a_site_whose_budget_is_spent_drops_out_and_is_asked_no_more(tmp_path):
    sites = three()
    sites.nodes["1"].spoil = spent
    result = Run(tmp_path, sites, minimum_replies=3)()
    assert result.complete and sites.nodes["1"].trained == [0, 1, 2]
    assert result.sites[0] == {"name": "ann", "epsilon_spent": 7.9, "delta": 1e-5, "unit": "patient", "rounds": 2}


def test_when_every_budget_is_spent_the_model_is_still_written(tmp_path):
    run = Run(tmp_path, three(spoil=spent))
    result = run()
    assert result.rounds == 2 and not result.complete and len(run.models) == 1
    assert Run(tmp_path, three(spoil=spent))().rounds == 2  # and it stays so


def test_a_site_that_comes_back_as_another_node_goes_on(tmp_path):
    sites = three()

    def restarted(kind):
        if kind == "train" and sites.nodes.get("1") and sites.nodes["1"].trained == [0]:
            sites.nodes["9"] = sites.nodes.pop("1")

    sites.before = restarted
    result = Run(tmp_path, sites)()
    assert [site["rounds"] for site in result.sites] == [3, 4, 4] and result.complete


def test_nobody_takes_the_name_of_a_site_that_is_there(tmp_path):
    sites, eve = three(), Site("ann", step=1e6)
    sites.before = lambda kind: sites.nodes.setdefault("8", eve) and None
    sites.nodes["8"] = Site("dora")
    sites.nodes.pop("8")
    Run(tmp_path, sites)()
    assert eve.trained == [] and weights(tmp_path).weights["w"].max() < 100


def test_two_sites_of_one_name_are_refused(tmp_path):
    with pytest.raises(Refusal, match="found twice: ann"):
        Run(tmp_path, Memory({"1": Site("ann"), "2": Site("ann"), "3": Site("bob")}))()


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("cleo", dataset_json={"labels": {"background": 0, "tumour": 1}}), r"cleo differs: labels .*tumour"),
        (Site("cleo", version="0.0.1"), r"cleo differs: nnunet_dp 0\.0\.1"),
        (Site("cleo", prepares=Code.settings_refuse), "cleo did not prepare: settings_refuse"),
    ],
)
def test_a_site_that_does_not_fit_is_named_with_the_difference(tmp_path, site, message):
    sites = three()
    sites.nodes["3"] = site
    with pytest.raises(Refusal, match=message):
        Run(tmp_path / "a", sites)()
    assert not sites.nodes["1"].trained
    assert Run(tmp_path / "b", sites, go_on_without=True)().complete


def test_a_site_that_is_not_on_the_list_does_not_take_part(tmp_path):
    with pytest.raises(Refusal, match="cleo is not one of the sites"):
        Run(tmp_path, three(), allowed_sites=("ann", "bob"))()


def test_too_few_sites_are_counted_and_told_how_to_come(tmp_path):
    with pytest.raises(Refusal, match=r"3 sites should take part, 2 at least; found 1 .*fed site"):
        Run(tmp_path, Memory({"1": Site("ann")}))()


def test_the_model_is_an_average_of_the_last_rounds(tmp_path):
    run = Run(tmp_path, three(), asked=terms(rounds=40))
    run()
    ((average, _, steps),) = run.models
    assert steps == 40 and 70 < average["w"].mean() < 80  # weights end at 80, two a round


def test_a_killed_coordinator_goes_on_after_the_last_finished_round(tmp_path):
    code = """
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from federation import config, three
        from nnunet_dp.federated.coordinator import Coordinator
        folder, sites = Path(sys.argv[1]), three()
        def die(kind):
            if kind == "train" and sites.nodes["1"].trained == [0, 1]:
                os.kill(os.getpid(), signal.SIGKILL)
        sites.before = die
        Coordinator(config(folder), sites, folder, print, lambda *_: None).run()
    """
    here = str(Path(__file__).parent)
    words = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), here]
    died = subprocess.run(words, env=os.environ, check=False)
    assert died.returncode == -signal.SIGKILL and weights(tmp_path).round == 2
    sites = three()
    assert Run(tmp_path, sites)().complete and sites.nodes["1"].trained == [2, 3]


# ---- client-level privacy ------------------------------------------------------------------------------------------


def client_level(folder, bound=0.5, rounds=1):
    return ClientLevelMean(ClientLevel(epsilon=8.0, delta=1e-5, bound=bound), rounds, 4, folder, "0a")


def test_the_noise_of_a_round_is_the_calibrated_one_over_the_number_of_sites(tmp_path):
    mean, now = client_level(tmp_path), {"w": np.zeros(20_000, np.float32)}
    moved = mean.next_weights(now, {}, 0)["w"]
    expected = mean.mechanism.noise_multiplier * 0.5 / 4
    spread = float(np.std(moved))
    assert abs(spread / expected - 1) < 0.03
    for wrong in (2 / 3, 3 / 2):
        assert abs(spread / (wrong * expected) - 1) > 0.03


def test_a_missing_site_counts_as_zero_and_one_site_moves_the_sum_by_at_most_the_bound(tmp_path, monkeypatch):
    from nnunet_dp.federated import client_level as module

    sums, real = [], module.SubsampledGaussian.release

    def seen(self, bounded, receipt, generator):
        sums.append(bounded.tensors[0].numpy())
        return real(self, bounded, receipt, generator)

    monkeypatch.setattr(module.SubsampledGaussian, "release", seen)
    now = {"w": np.zeros(10, np.float32)}
    updates = {"a": {"w": np.full(10, 1e3, np.float32)}, "b": {"w": np.full(10, -0.01, np.float32)}}
    mean = client_level(tmp_path, rounds=2)
    mean.next_weights(now, updates, 0)
    mean.next_weights(now, {"b": updates["b"]}, 1)
    assert np.linalg.norm(sums[0] - sums[1]) <= 0.5 and np.linalg.norm(sums[0] - sums[1]) > 0.49


def test_a_sites_budget_ends_the_run_and_is_in_the_result(tmp_path):
    asked = {"epsilon": 4.0, "delta": 1e-5, "bound": 1.0}
    result = Run(tmp_path, three(), client_level=asked)()
    assert result.client_level is not None and 3.9 < result.client_level["epsilon"] <= 4.0
    assert (tmp_path / "server_ledger.jsonl").read_text().count("\n") == 4
