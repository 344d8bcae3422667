"""Rounds with sites in memory: who is missing, what is written, how it goes on after a crash."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from federation import DATASET, Memory, Site, config, terms, three

from nnunet_dp.errors import BudgetRefusal, Refusal, UsageRefusal
from nnunet_dp.federated.coordinator import PROGRESS, RESULT, Coordinator
from nnunet_dp.federated.enrolment import Enrolment
from nnunet_dp.federated.protocol import Code, Reply
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
    assert json.loads((tmp_path / RESULT).read_text())["guarantee"].startswith("epsilon 4 at delta 1e-05 per patient")


def test_public_weights_decide_how_much_a_site_counts(tmp_path):
    Run(tmp_path, three(), weights={"ann": 2.0, "bob": 1.0, "cleo": 1.0})()
    np.testing.assert_allclose(weights(tmp_path).weights["b"], 4 * (2 * 1 + 2 + 3) / 4)


def test_a_line_a_round_names_replies_thresholds_and_epsilon(tmp_path):
    run = Run(tmp_path, three())
    run()
    (last,) = [line for line in run.lines if line.startswith("round 4/4")]
    assert "3 of 3 sites  threshold 0.5 0.5 0.5  epsilon 4 (ann 4, bob 4, cleo 4) of 8 per patient  " in last
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
        (lambda q, r, w: (r.model_dump_json().replace('"ok"', '"splendid"'), w), "rejected: unknown code"),
        (lambda q, r, w: (r.model_copy(update={"epsilon": None}), w), "rejected: no epsilon"),
        (lambda q, r, w: (r.model_copy(update={"unit": "\x1b[2Jpatient"}), w), "rejected: malformed header"),
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


def test_what_a_site_spent_on_a_round_that_failed_is_in_the_result(tmp_path):
    sites = three()
    for node in "12":
        sites.nodes[node].spoil = lambda request, reply, arrays: None if request.round == 2 else (reply, arrays)
    run = Run(tmp_path, sites, retries=0)
    with pytest.raises(Refusal):
        run()
    assert [site["epsilon_spent"] for site in run.models[0][1]["sites"]] == [2.0, 2.0, 3.0]
    assert weights(tmp_path).sites["cleo"].epsilon == 3.0


def test_what_a_site_spent_counts_even_where_its_weights_are_rejected(tmp_path):
    sites = three()
    sites.nodes["3"].spoil = lambda request, reply, arrays: (reply, {} if request.round == 3 else arrays)
    result = Run(tmp_path, sites)()
    assert result.sites[2]["epsilon_spent"] == 4.0 and result.sites[2]["rounds"] == 3


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
    with pytest.raises(UsageRefusal, match=r"holds another run: go on with that one with --resume, or .* --folder"):
        Run(tmp_path, three(), asked=terms(epsilon=3.0))()


@pytest.mark.parametrize("changes", [{"weights": {"ann": 5.0}}, {"sites": 4}])
def test_what_was_agreed_before_the_first_round_cannot_change_after_it(tmp_path, changes):
    Run(tmp_path, three())()
    with pytest.raises(UsageRefusal, match="number of sites, weights and client-level budget that it began with"):
        Run(tmp_path, three(), **changes)()


def spent(request, reply: Reply, arrays):
    gone = Reply(code=Code.budget_spent, site=reply.site, run="0a", round=request.round, epsilon=7.9, delta=1e-5)
    return (gone, {}) if request.round >= 2 else (reply, arrays)


def test_a_site_whose_budget_is_spent_drops_out_and_is_asked_no_more(tmp_path):
    sites = three()
    sites.nodes["1"].spoil = spent
    result = Run(tmp_path, sites, minimum_replies=3)()
    assert result.complete and sites.nodes["1"].trained == [0, 1, 2]
    assert result.sites[0] == {"name": "ann", "epsilon_spent": 7.9, "delta": 1e-5, "unit": "patient", "rounds": 2}


def test_a_run_begins_without_a_site_that_has_no_budget_for_its_first_step(tmp_path):
    sites = Memory(three().nodes | {"3": Site("cleo", prepares=Code.budget_spent)})
    run = Run(tmp_path, sites)
    result = run()
    assert result.complete and [site["rounds"] for site in result.sites] == [4, 4, 0]
    assert not sites.nodes["3"].trained and weights(tmp_path).sites["cleo"].dropped_out
    assert [line for line in run.lines if line.startswith("cleo drops out: budget_spent (")]
    assert not [line for line in run.lines if "missing" in line]
    assert Run(tmp_path, sites)().complete  # and resumed


def test_where_too_few_have_budget_left_the_run_says_who_has_none_and_does_not_begin(tmp_path):
    sites = Memory(three().nodes | {"3": Site("cleo", prepares=Code.budget_spent)})
    with pytest.raises(BudgetRefusal, match=r"3 sites at least .*, found 2; no budget is left at cleo: begin a new"):
        Run(tmp_path, sites, minimum_replies=3)()
    assert not sites.nodes["1"].trained


def test_a_site_that_comes_back_without_budget_drops_out_of_the_run(tmp_path):
    sites = three()

    def restarted(kind):
        if kind == "train" and sites.nodes.get("3") and sites.nodes["3"].trained == [0]:
            sites.nodes.pop("3")
            sites.nodes["9"] = Site("cleo", prepares=Code.budget_spent)

    sites.before = restarted
    result = Run(tmp_path, sites)()
    assert result.complete and [site["rounds"] for site in result.sites] == [4, 4, 1]


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


def test_what_a_site_said_it_spent_never_falls(tmp_path):
    sites = three()
    lower = {"epsilon": 0.01, "delta": 0.005, "unit": "image"}  # an admitted reply
    sites.nodes["1"].spoil = faulty(lambda q, r, w: (r.model_copy(update=lower), w))
    run = Run(tmp_path, sites, asked=terms(rounds=2))
    first, *_ = run().sites
    assert (first["epsilon_spent"], first["delta"], first["unit"]) == (1.0, 1e-5, "patient")


def test_two_coordinators_in_one_folder_are_refused(tmp_path):
    sites, second = three(), Run(tmp_path, three())
    refused = []

    def meanwhile(kind):
        if kind == "train" and not refused:
            with pytest.raises(Refusal, match="another coordinator works in"):
                second()
            refused.append(kind)

    sites.before = meanwhile
    assert Run(tmp_path, sites)().complete and refused


def test_two_sites_of_one_name_are_refused(tmp_path):
    with pytest.raises(Refusal, match="found twice: ann"):
        Run(tmp_path, Memory({"1": Site("ann"), "2": Site("ann"), "3": Site("bob")}))()


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (Site("cleo", dataset_json={"labels": {"background": 0, "tumour": 1}}), r"cleo differs: labels .*tumour"),
        (Site("cleo", dataset_json=DATASET | {"channel_names": {"0": "CT"}}), "cleo differs: channels .*'CT'.*'MRI'"),
        (Site("cleo", dataset_json=DATASET | {"channel_names": ["MRI"]}), r"cleo differs: channels \['MRI'\]"),
        (Site("cleo", dataset_json=DATASET | {"file_ending": ".png"}), "cleo differs: file_ending '.png'"),
        (Site("cleo", dataset_json=DATASET | {"regions_class_order": [1]}), r"cleo differs: regions_class_order \[1\]"),
        (Site("cleo", dataset_json={}), "cleo differs: labels None"),
        (Site("cleo", version="0.0.1"), r"cleo differs: nnunet_dp '0\.0\.1'"),
        (Site("cleo", nnunetv2="2.0"), r"cleo differs: nnunetv2 '2\.0'"),
        (Site("cleo", prepares=Code.settings_refuse), r"cleo did not prepare: settings_refuse \(.*its own settings"),
        (Site("cleo", prepares=Code.version_mismatch), "cleo did not prepare: version_mismatch"),
        (Site("cleo", prepares=Code.plans_mismatch), "cleo did not prepare: plans_mismatch"),
        (Site("cleo", confirms="cd" * 32), "cleo did not prepare: plans_mismatch"),
    ],
)
def test_a_site_that_does_not_fit_is_named_with_the_difference(tmp_path, site, message):
    sites = three()
    sites.nodes["3"] = site
    with pytest.raises(Refusal, match=message):
        Run(tmp_path / "a", sites)()
    assert not sites.nodes["1"].trained
    assert Run(tmp_path / "b", sites, go_on_without=True)().complete


def test_no_site_preprocesses_for_a_run_that_another_one_does_not_fit(tmp_path):
    kinds = []
    sites = Memory(three().nodes | {"3": Site("cleo", version="0.0.1")}, before=kinds.append)
    with pytest.raises(Refusal, match="cleo differs: nnunet_dp"):
        Run(tmp_path, sites)()
    assert kinds == ["query"]


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


def test_a_coordinator_killed_anywhere_goes_on_to_the_same_end(tmp_path):
    here = str(Path(__file__).parent)
    words = [sys.executable, "-c", textwrap.dedent(DYING), str(tmp_path), here]
    subprocess.run(words, env=os.environ, check=True, stdout=subprocess.DEVNULL)
    whole, *killed = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    assert len(killed) > 20 and (whole / RESULT).is_file()
    reached = {None if (state := read_state(folder, terms())) is None else state.round for folder in killed}
    assert reached == {None, 0, 1, 2, 3, 4}  # where they were killed
    for folder in killed:
        run = Run(folder, three())
        result = run()
        expected = json.loads((whole / RESULT).read_text())
        assert result.as_dict() | {"model_folder": ""} == expected | {"model_folder": ""} and len(run.models) == 1
        np.testing.assert_array_equal(weights(folder).weights["w"], np.full((2, 2), 8.0, np.float32))


DYING = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from federation import config, three
    from nnunet_dp import replacing
    from nnunet_dp.federated.coordinator import Coordinator

    def live(folder, last):  # every step that can be seen from outside is one where it may die; 0 is never
        left, replace = [last], os.replace

        def tick(*_):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def replaced(*files):
            tick()
            replace(*files)
            tick()

        sites = three()
        sites.before, replacing.os.replace = tick, replaced
        Coordinator(config(folder), sites, folder, tick, tick).run()

    last, status = 0, None
    while status != 0 or last == 1:
        folder = Path(sys.argv[1]) / str(last)
        child = os.fork()
        if not child:
            live(folder, last)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        last += 1
"""


# ---- sites that come, go, and are busy -----------------------------------------------------------------------------


def test_a_site_that_still_works_for_a_coordinator_that_died_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(Enrolment, "busy_pause_s", 0.0)
    sites, answers = three(), []

    def busy_at_first(kind, header):
        answers.append(kind)
        return Code.busy if answers.count(kind) < 3 else None

    sites.nodes["3"].instead = busy_at_first
    result = Run(tmp_path, sites, retries=0)()
    assert [site["rounds"] for site in result.sites] == [4, 4, 4] and answers.count("prepare") == 3
    assert sites.nodes["1"].trained == [0, 1, 2, 3]  # the others are not asked again


def test_a_site_that_stays_busy_costs_the_time_of_a_round_and_no_more(tmp_path):
    sites = three()
    sites.nodes["3"].instead = lambda kind, header: Code.busy if kind == "train" else None
    run = Run(tmp_path, sites, round_timeout_s=0.2)
    assert [site["rounds"] for site in run().sites][:2] == [4, 4]
    assert any("missing cleo (busy)" in line for line in run.lines)


def test_a_site_that_was_silent_at_first_takes_part_when_it_answers(tmp_path):
    sites, queries = three(), []

    def silent_at_first(kind, header):
        queries.append(kind)
        return "silence" if kind == "query" and queries.count("query") < 3 else None

    sites.nodes["3"].instead = silent_at_first
    result = Run(tmp_path, sites, go_on_without=True)()
    assert [site["rounds"] for site in result.sites] == [4, 4, 3]


def test_a_node_that_never_says_who_it_is_is_asked_as_often_as_a_round(tmp_path):
    sites, asked = three(), []
    sites.nodes["3"].instead = lambda kind, header: asked.append(kind) or "silence"
    assert Run(tmp_path, sites, go_on_without=True, retries=1)().complete
    assert asked == ["query", "query"]


def test_nodes_of_killed_sites_that_are_still_listed_do_not_keep_a_run_from_beginning(tmp_path, monkeypatch):
    """As after ``kill -9`` and ``--resume``: the old nodes are listed at once, the sites come as new ones."""
    monkeypatch.setattr(Enrolment, "meeting_pause_s", 0.0)
    old = {str(k): Site(name, instead=lambda kind, header: "silence") for k, name in enumerate(("ann", "bob", "cleo"))}
    sites, listed = Memory(dict(old)), []

    def come_after_a_while(minimum, timeout_s):
        listed.append(minimum)
        if len(listed) == 3:
            sites.nodes |= {f"new {name}": site for name, site in three().nodes.items()}
        return sorted(sites.nodes)

    sites.sites = come_after_a_while
    result = Run(tmp_path, sites, wait_for_sites_s=60.0)()
    assert [site["rounds"] for site in result.sites] == [4, 4, 4] and result.complete


def test_a_run_says_for_whom_it_waits_whenever_somebody_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(Enrolment, "meeting_pause_s", 0.0)
    later, sites = three().nodes, Memory({})

    def one_comes(minimum, timeout_s):
        if later:
            assert timeout_s <= Enrolment.waiting_line_s
            sites.nodes |= dict([later.popitem()])
        return sorted(sites.nodes)

    sites.sites = one_comes
    run = Run(tmp_path, sites, wait_for_sites_s=60.0)
    assert run().complete
    waiting = [line for line in run.lines if line.startswith("waiting for sites")]
    assert [line.split(";")[0] for line in waiting] == [
        "waiting for sites: 1 of 3 connected (cleo)", "waiting for sites: 2 of 3 connected (bob, cleo)",
    ]  # fmt: skip


def test_a_run_with_too_few_sites_names_the_nodes_that_said_nothing(tmp_path):
    sites = three()
    sites.nodes["3"].instead = lambda kind, header: "silence"
    with pytest.raises(Refusal, match="node 3 did not say who it is"):
        Run(tmp_path, sites)()
    assert not sites.nodes["1"].trained


def test_two_newcomers_of_one_name_do_not_end_a_run(tmp_path):
    sites = three()

    def two_come(kind):
        if sites.nodes["1"].trained == [0]:
            sites.nodes |= {"7": Site("dora", step=1e6), "8": Site("dora", step=1e6)}

    sites.before = two_come
    run = Run(tmp_path, sites)
    assert run().complete and "dora is the name of two sites" in run.lines
    np.testing.assert_array_equal(weights(tmp_path).weights["w"], np.full((2, 2), 8.0, np.float32))


@pytest.mark.parametrize("mode", ["fedavg", "adp-fl"])
def test_the_words_of_a_result_say_what_is_not_known(tmp_path, mode):
    words = Run(tmp_path, three(), asked=terms(mode=mode))().guarantee
    assert "as last reported, at most 8 at each; costs add" in words if mode == "adp-fl" else "no guarantee" in words
