"""What a federated run survives, with real processes on loopback, TLS and registered keys.

Site and coordinator are stand-ins that do what a step says (``flower_stand_ins``), unless a test names the real one;
what the real coordinator makes of bad sites stands in ``test_flower_coordinator.py``.
"""

import json
import os
import signal
import time

import pytest

pytest.importorskip("flwr")

import flower_stand_ins
from flower_federation import Federation
from one_site import DATASET, coordinator_plans, first_weights, make_site, terms, train_header
from safetensors.numpy import load_file, save_file

from nnunet_dp.federated.flower_environment import flwr
from nnunet_dp.federated.flower_keys import make_certificates, make_key_pair
from nnunet_dp.federated.flower_processes import FlowerProcesses
from nnunet_dp.federated.process_table import Process, is_running
from nnunet_dp.federated.protocol import arrays_sha256
from nnunet_dp.federated.run_config import RunConfig


@pytest.fixture
def federation(tmp_path, monkeypatch):
    flower_stand_ins.put_in_place(monkeypatch, tmp_path / "first")
    with FlowerProcesses(tmp_path / "flower") as flower:
        yield Federation(tmp_path, flower)


def settings_text(site):
    settings = {key: value for key, value in site.settings.model_dump(mode="json").items() if value is not None}
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())


def kill(started):
    os.kill(started.process.pid, signal.SIGKILL)
    started.process.wait()


def test_a_key_that_was_not_registered_is_refused(federation):
    federation.start("north")
    stranger = federation.start("stranger", registered=False)
    assert federation.wait(federation.submit({"minimum": 1})).exit_code == 0
    assert federation.rounds()[0]["sites"] == ["north"]
    assert not federation.calls("stranger")
    assert "Failed to initialize the connection to the SuperLink" in stranger.log.read_text()


def test_a_key_may_be_registered_twice(federation):
    public = make_key_pair(federation.folder / "a.key")
    federation.flower.register(federation.server, public)
    federation.flower.register(federation.server, public)


def test_a_site_checks_the_server_and_does_not_talk_to_another(federation):
    other = make_certificates(federation.folder / "other")
    good, federation.server = federation.server, type(federation.server)(
        federation.server.address, other.authority, federation.server.home
    )
    federation.flower.register(good, make_key_pair(federation.folder / "north.key"))
    (federation.folder / "north.toml").write_text("")
    north = federation.start("north")
    time.sleep(8)
    assert "SuperNode ID" not in north.log.read_text()


@pytest.mark.slow
def test_a_site_killed_within_a_round_is_missing_until_it_is_back(federation):
    north, _ = federation.start("north"), federation.start("south")
    slow = {"do": "sleep", "only": "north", "seconds": 100, "timeout": 25}
    run = federation.submit(slow, {"timeout": 100}, {"patience": 100})
    federation.until(lambda: federation.calls("north"))
    app = Process.of(federation.calls("north")[0]["pid"])
    kill(north)
    federation.until(lambda: not is_running(app), 10)  # what it was doing ends with it
    assert federation.wait(run).exit_code == 0  # which starts it again
    first, _, third = federation.rounds()  # in the second, Flower may still take it for online
    assert first["sites"] == ["south"] and sorted(third["sites"]) == ["north", "south"]
    assert first["nodes"] == third["nodes"]


@pytest.mark.slow
def test_an_app_that_is_killed_costs_its_site_that_round_alone(federation):
    federation.start("north"), federation.start("south")
    assert federation.wait(federation.submit({"do": "kill", "only": "north", "timeout": 30}, {}, {})).exit_code == 0
    first, _, third = federation.rounds()
    assert first["sites"] == ["south"] and sorted(third["sites"]) == ["north", "south"]


def test_a_worker_that_an_app_forked_and_ends_does_not_end_the_app(federation):
    federation.start("north"), federation.start("south")
    assert federation.wait(federation.submit(*[{"do": "fork"}] * 3)).exit_code == 0
    assert [sorted(done["sites"]) for done in federation.rounds()] == [["north", "south"]] * 3


def test_a_worker_that_an_app_forked_ends_with_it_and_holds_no_lock_of_its_dataset(federation):
    federation.start("north")
    federation.submit({"do": "orphan", "minimum": 1})
    orphan = federation.folder / "orphan"
    federation.until(lambda: orphan.is_file() and orphan.read_text())
    federation.until(lambda: not is_running(Process.of(int(orphan.read_text()))), 10)


def test_an_app_that_is_ended_costs_its_site_that_round_alone(federation):
    federation.start("north"), federation.start("south")
    assert federation.wait(federation.submit({"do": "end", "only": "north"}, {})).exit_code == 0
    first, second = federation.rounds()
    assert first["sites"] == ["south"] and first["seconds"] < 30  # Flower says so; nobody waits for the time to be over
    assert sorted(second["sites"]) == ["north", "south"]


@pytest.mark.slow
def test_a_killed_coordinator_is_noticed_and_its_run_resumed(federation):
    federation.start("north"), federation.start("south")
    steps = {}, {"do": "sleep", "seconds": 15}, {}
    run = federation.submit(*steps)
    federation.until(lambda: len(federation.rounds()) == 1 and len(federation.calls("north")) == 2)
    os.kill(json.loads((run.folder / "server_app.json").read_text())["process"]["pid"], signal.SIGKILL)
    end = federation.wait(run, 60)
    assert end.exit_code == 1 and "run again to resume" in end.message
    assert federation.wait(federation.submit(*steps)).exit_code == 0
    assert [sorted(done["sites"]) for done in federation.rounds()] == [["north", "south"]] * 3


@pytest.mark.slow
def test_a_killed_superlink_is_started_again_and_its_sites_go_on(federation):
    north, south = federation.start("north"), federation.start("south")
    steps = {}, {"do": "sleep", "seconds": 10}, {}
    run = federation.submit(*steps)
    federation.until(lambda: len(federation.rounds()) == 1 and len(federation.calls("north")) == 2)
    kill(federation.flower.started[0])
    assert federation.wait(run, 60).exit_code == 1
    time.sleep(3)
    federation.flower.start_superlink(port=federation.port, certificates=federation.certificates, authenticate=True)
    assert federation.wait(federation.submit(*steps)).exit_code == 0
    assert [sorted(done["sites"]) for done in federation.rounds()] == [["north", "south"]] * 3
    assert north.running and south.running


@pytest.mark.slow
def test_a_late_reply_is_not_mixed_into_the_next_round(federation):
    federation.start("north"), federation.start("south")
    late = {"do": "sleep", "only": "north", "seconds": 12, "timeout": 6, "patience": 1}
    assert federation.wait(federation.submit({}, late, {"timeout": 60})).exit_code == 0
    _, second, third = federation.rounds()
    assert "north" not in second["sites"]
    assert sorted(third["sites"]) == ["north", "south"] and {head["round"] for head in third["heads"]} == {2}


def test_flower_itself_is_told_what_ended_badly(federation):
    federation.start("north")
    end = federation.wait(federation.submit_config("no json", "run"))
    assert end.exit_code == 1 and "see server_error.txt" in end.message
    federation.until(lambda: "failed" in str(flwr(federation.server, "list", "coordinator")), 30)


@pytest.mark.slow
def test_an_upload_that_is_lost_stays_charged_and_is_sent_again_for_nothing(tmp_path, monkeypatch):
    site = make_site(tmp_path / "north")
    assert site.prepare().code == "ok", site.log()
    weights = first_weights(site)
    save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "north.toml").write_text(settings_text(site))
    (site.root / "lose").touch()
    message = {"header": train_header(terms(), 0, weights), "arrays": str(tmp_path / "weights.safetensors")}
    flower_stand_ins.put_in_place(monkeypatch, tmp_path / "first", real="site")
    with FlowerProcesses(tmp_path / "flower") as flower:
        federation = Federation(tmp_path, flower)
        federation.start("north")
        run = federation.submit({"minimum": 1, "timeout": 90, **message}, {"minimum": 1, "timeout": 240, **message})
        federation.until(lambda: not (site.root / "lose").exists(), 200)
        charged = site.charges()
        assert federation.wait(run, 400).exit_code == 0
    lost, sent_again = federation.rounds()
    assert lost["sites"] == [] and [head["code"] for head in sent_again["heads"]] == ["ok"]
    assert len(charged) == len(site.charges()) == terms().local_steps
    (reply,) = (tmp_path / "run").glob("reply_1_*.safetensors")
    assert arrays_sha256(load_file(reply)) == arrays_sha256(site.train(terms(), 0, weights).arrays)
    assert arrays_sha256(load_file(reply)) != arrays_sha256(weights)


@pytest.mark.slow
def test_a_real_run_goes_on_after_its_server_was_killed_and_charges_every_round_once(tmp_path):
    site = make_site(tmp_path / "first")
    described = site.query().reply.dataset_json
    assert site.prepare().code == "ok", site.log()
    save_file(first_weights(site), tmp_path / "weights.safetensors")
    sites = {name: site.copied_to(tmp_path / name).with_settings(name=name) for name in ("north", "south")}
    model = tmp_path / "model" / DATASET / "nnUNetTrainerDP_Federated__fedPlans__2d"
    files = {"initial_weights": str(tmp_path / "weights.safetensors"), "model_folder": str(model)}
    asked = terms(mode="adp-fl", rounds=2, local_steps=1)
    config = RunConfig(terms=asked, plans=coordinator_plans(), dataset_json=described, sites=2, **files)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    said = []
    with FlowerProcesses(tmp_path / "flower") as flower:
        server = flower.start_superlink()
        for name, one in sites.items():
            (tmp_path / f"{name}.toml").write_text(settings_text(one))
            flower.start_supernode(name, tmp_path / f"{name}.toml", server)
        run = flower.submit(server, tmp_path / "config.json", tmp_path / "run")

        def say(line):
            said.append(line)
            if line.startswith("round 1/") and not killed:
                killed.append(json.loads((run.folder / "server_app.json").read_text())["process"]["pid"])
                os.kill(killed[0], signal.SIGKILL)

        killed = []
        assert flower.wait(run, say, 1800).exit_code == 1 and killed
        end = flower.wait(flower.submit(server, tmp_path / "config.json", tmp_path / "run"), said.append, 1800)
    assert (end.exit_code, end.message) == (0, ""), said
    assert [len(one.charges()) for one in sites.values()] == [2, 2], said
    assert (model / "fold_all" / "checkpoint_final.pth").is_file()
    result = json.loads((tmp_path / "run" / "server_result.json").read_text())
    assert result["rounds"] == 2 and {one["name"] for one in result["sites"]} == {"north", "south"}
