"""Flower's part: messages keep every bit, sites run their own code alone, nothing is left running."""

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numbers

pytest.importorskip("flwr")

import flower_stand_ins
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Metadata, RecordDict
from flwr.app.message import Array, make_message
from flwr.supercore.task_identity import TaskIdentity

from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.federated import flower_client, flower_commands, flower_server
from nnunet_dp.federated.flower_environment import environment
from nnunet_dp.federated.flower_keys import make_certificates, make_key_pair
from nnunet_dp.federated.flower_processes import FlowerProcesses
from nnunet_dp.federated.flower_transport import GridTransport, packed, unpacked
from nnunet_dp.federated.process_table import Process, is_running
from nnunet_dp.federated.protocol import Code, Reply, arrays_sha256

# ---- messages ----------------------------------------------------------------------------------------------------

WEIGHTS = {"encoder.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.float32([np.nan, -0.0])}


@settings(max_examples=30)
@given(st.dictionaries(st.text(min_size=1, max_size=8), numbers.arrays(np.float32, numbers.array_shapes(min_dims=0))))
def test_a_message_keeps_every_bit_of_its_arrays(arrays):
    header, received = unpacked(packed("{}", arrays))
    assert header == "{}" and arrays_sha256(received) == arrays_sha256(arrays)


def test_a_message_is_little_more_than_its_weights():
    million = {f"layer{i}": np.zeros(10_000, np.float32) for i in range(100)}
    assert len(packed("{}", million)["arrays"]["arrays"].data) < 1.01 * 4_000_000


def _content(header=None, arrays=None):
    content = RecordDict()
    content["header"] = ConfigRecord({"header": "{}"}) if header is None else header
    content["arrays"] = ArrayRecord({"arrays": Array.from_numpy_ndarray(arrays)}) if arrays is not None else arrays
    return content


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"header": ConfigRecord({"header": "{}"})}),
        RecordDict({"header": ConfigRecord({"header": 3}), "arrays": ArrayRecord()}),
        _content(arrays=np.zeros(7, np.uint8)),
        _content(arrays=np.zeros((2, 2), np.float32)),
        _content(header=ConfigRecord({"header": ["{}"]}), arrays=np.zeros(7, np.uint8)),
        RecordDict(
            {
                "header": ConfigRecord({"header": "{}"}),
                "arrays": ArrayRecord({"arrays": Array("object", (1,), "numpy.ndarray", b"\x80\x04pickle")}),
            }
        ),
    ],
)
def test_anything_else_is_malformed(content):
    with pytest.raises(ValueError, match="malformed message"):
        unpacked(content)


# ---- transport ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def inside_a_task(monkeypatch):
    """Messages name the task that sends them."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def _message(content=None, error=None, reply_to="", node=2):
    metadata = Metadata(
        run_id=1, message_id="r", src_node_id=node, dst_node_id=1, reply_to_message_id=reply_to, group_id="",
        created_at=time.time(), ttl=100.0, message_type="train",
    )  # fmt: skip
    return make_message(metadata=metadata, content=content, error=error)


class Grid:
    """A grid whose nodes do what ``behaviour`` says; every reply stays available to whoever asks for its message."""

    def __init__(self, behaviour):
        self.behaviour, self.pushed, self.asked = behaviour, {}, []

    def get_node_ids(self):
        return list(self.behaviour)

    def push_messages(self, messages):
        (message,) = messages
        node, identifier = message.metadata.dst_node_id, f"m{len(self.pushed)}"
        if self.behaviour[node] == "refused":
            return [None]
        self.pushed[identifier] = message
        return [identifier]

    def pull_messages(self, identifiers):
        self.asked.append(set(identifiers))
        return [reply for one in identifiers if (reply := self._reply(one)) is not None]

    def _reply(self, identifier):
        message = self.pushed[identifier]
        node = message.metadata.dst_node_id
        content, error = {
            "echo": (message.content, None),
            "error": (None, Error(code=2, reason="patient 17")),
            "malformed": (RecordDict(), None),
        }.get(self.behaviour[node], (None, None))
        return None if content is error else _message(content, error, identifier, node)


def _exchange(behaviour, log=lambda line: None, timeout_s=0.05):
    transport = GridTransport(Grid(behaviour), log, poll_seconds=0.01)
    sent = {str(node): ('{"round": 0}', WEIGHTS) for node in behaviour}
    return transport, transport.exchange("train", sent, timeout_s)


def test_every_node_gets_its_message_and_its_reply_comes_back():
    transport, replies = _exchange({2: "echo", 3: "echo"})
    assert set(replies) == {"2", "3"}
    assert all(arrays_sha256(arrays) == arrays_sha256(WEIGHTS) for _, arrays in replies.values())
    assert transport.traffic.sent_bytes == transport.traffic.received_bytes > 2 * 32


def test_a_node_that_is_silent_refused_or_in_error_is_missing_and_the_others_count():
    assert set(_exchange({2: "echo", 3: "silent", 4: "refused", 5: "error"})[1]) == {"2"}


def test_the_text_of_an_error_is_not_repeated():
    said = []
    _exchange({5: "error"}, said.append)
    assert said == ["node 5: Flower's error 2"]


def test_a_malformed_reply_comes_back_empty_for_the_coordinator_to_name():
    assert _exchange({2: "echo", 3: "malformed"})[1]["3"] == ("", {})


def test_a_late_reply_is_never_taken_for_one_of_a_newer_exchange():
    grid = Grid({2: "silent"})
    transport = GridTransport(grid, poll_seconds=0.01)
    transport.exchange("train", {"2": ('{"round": 0}', {})}, 0.03)
    grid.behaviour[2] = "echo"  # from now on there is a reply to the first message too
    replies = transport.exchange("train", {"2": ('{"round": 1}', {})}, 0.03)
    assert replies["2"][0] == '{"round": 1}' and grid.asked[-1] == {"m1"}


def test_messages_end_with_the_time_of_their_round():
    transport, _ = _exchange({2: "echo"}, timeout_s=7.0)
    assert transport._grid.pushed["m0"].metadata.ttl == 7.0


def test_sites_are_waited_for_until_there_are_enough():
    assert GridTransport(Grid({3: "echo", 2: "echo"})).sites(2, 0.0) == ["2", "3"]
    assert GridTransport(Grid({2: "echo"}), poll_seconds=0.01).sites(2, 0.05) == ["2"]


# ---- the site's app ----------------------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch):
    """The stand-in site in this process."""
    before = {name: sys.modules.get(name) for name in list(sys.modules) if name.startswith("nnunet_dp.federated.")}
    for name in ("site", "site_settings", "coordinator", "run_config"):
        monkeypatch.setitem(sys.modules, f"nnunet_dp.federated.{name}", None)
    flower_stand_ins.install()
    yield
    sys.modules.update({name: module for name, module in before.items() if module is not None})


def _ask(tmp_path, message_type="train", header='{"run": "ab", "round": 4}', **node_config):
    content = packed(header, WEIGHTS)
    message = _message(content)
    message.metadata.message_type = message_type
    config = {"settings": str(tmp_path / "north.toml"), **node_config}
    context = Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})
    return flower_client.app(message, context), context


@pytest.mark.parametrize(
    ("message_type", "kind"), [("query", "query"), ("query.prepare", "prepare"), ("train", "train")]
)
def test_the_app_hands_each_kind_to_the_site_and_sends_what_it_answers(stand_ins, tmp_path, message_type, kind):
    reply, context = _ask(tmp_path, message_type)
    header, arrays = unpacked(reply.content)
    assert json.loads(header)["kind"] == kind and arrays_sha256(arrays) == arrays_sha256(WEIGHTS)
    assert len(context.state) == 0


def test_an_exception_at_the_site_leaves_as_one_word(stand_ins, tmp_path, capsys):
    reply, _ = _ask(tmp_path, header='{"run": "ab", "do": "raise"}')
    header, arrays = unpacked(reply.content)
    assert Reply.model_validate_json(header) == Reply(code=Code.failed, site="north", run="ab") and not arrays
    assert "patient 17" not in str(reply.content) and "patient 17" in capsys.readouterr().err


def test_settings_that_cannot_be_read_leave_as_one_word(tmp_path):
    reply, _ = _ask(tmp_path, settings=str(tmp_path / "patient_17.toml"))
    assert json.loads(unpacked(reply.content)[0]) == {"protocol": 1, "code": "failed", "site": "nameless", "run": "ab"}


def test_a_header_that_is_no_json_is_answered_all_the_same(stand_ins, tmp_path):
    reply, _ = _ask(tmp_path, header="no json")
    assert json.loads(unpacked(reply.content)[0])["run"] == "0"


# ---- the coordinator's app ---------------------------------------------------------------------------------------


def test_the_end_of_a_run_is_on_disk(tmp_path):
    flower_server.end_is_written(tmp_path, "17", lambda: {"rounds": 3})
    assert json.loads((tmp_path / "server_ended.json").read_text()) == {"exit_code": 0, "message": ""}
    assert json.loads((tmp_path / "server_result.json").read_text()) == {"rounds": 3}
    assert is_running(Process(**json.loads((tmp_path / "server_app.json").read_text())["process"]))


@pytest.mark.parametrize(("error", "code", "said"), [(UsageRefusal("no"), 2, "no"), (KeyError(), 1, "KeyError: see")])
def test_a_run_that_fails_says_why_and_fails(tmp_path, error, code, said):
    def work():
        raise error

    with pytest.raises(type(error)):
        flower_server.end_is_written(tmp_path, "17", work)
    ended = json.loads((tmp_path / "server_ended.json").read_text())
    assert ended["exit_code"] == code and ended["message"].startswith(said)
    assert (tmp_path / "server_error.txt").read_text().strip()


# ---- narrowed commands -------------------------------------------------------------------------------------------


def _status(path, client):
    """Status that ``FleetAloneFromOutside`` answers; None where the request went on."""
    sent = []

    async def application(scope, receive, send):
        sent.append({"status": None})

    async def send(event):
        sent.append(event)

    guarded = flower_commands.FleetAloneFromOutside(application)
    asyncio.run(guarded({"type": "http", "path": path, "client": client}, None, send))
    return sent[0]["status"]


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/", "/v1/fleetx"])
def test_only_this_machine_controls_a_superlink(path):
    assert _status(path, ("127.0.0.1", 1)) is None and _status(path, ("::1", 1)) is None
    assert _status(path, ("10.0.0.7", 1)) == 403 and _status(path, None) == 403


def test_supernodes_of_other_machines_are_let_through_to_their_key_check():
    assert _status("/v1/fleet/pull-messages", ("10.0.0.7", 1)) is None


def test_a_site_can_start_nothing_but_its_own_app(tmp_path):
    folder = flower_commands.write_shims(tmp_path / "commands", "site")
    for name in ("flwr-agentapp", "flwr-serverapp", "flwr-simulation", "flwr-model", "flwr-connector"):
        assert subprocess.run([folder / name]).returncode == 1
    assert "flower_commands clientapp" in (folder / "flwr-clientapp").read_text()


def test_the_site_runs_its_own_app_whatever_was_sent(monkeypatch):
    import flwr.supernode.runtime.run_clientapp as runner

    for name in ("install_from_fab", "get_load_client_app_fn"):
        monkeypatch.setattr(runner, name, getattr(runner, name))
    loaded = []
    monkeypatch.setattr(
        runner, "run_clientapp", lambda **_: loaded.append(runner.get_load_client_app_fn(multi_app=True)("evil", "1"))
    )
    line = "x clientapp --runtime-api-address 127.0.0.1:1 --token t --insecure"
    monkeypatch.setattr(sys, "argv", line.split())
    flower_commands.main()
    assert loaded == [flower_client.app] and runner.install_from_fab(b"code") is None


def test_a_flower_that_cannot_be_guarded_is_not_started():
    with pytest.raises(SystemExit, match="has no gone"):
        flower_commands._replaceable(SimpleNamespace(), "gone")


def test_nothing_calls_out(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "example.org")
    told = environment(tmp_path, "site")
    assert told["FLWR_TELEMETRY_ENABLED"] == "0" and told["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert told["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1" and told["FLWR_HOME"] == str(tmp_path)
    assert told["no_proxy"] == "example.org,127.0.0.1,localhost"


# ---- keys --------------------------------------------------------------------------------------------------------


def test_private_keys_are_their_owners_alone_and_never_overwritten(tmp_path):
    public = make_key_pair(tmp_path / "north.key")
    made = make_certificates(tmp_path / "tls", ["server.example.org", "10.1.2.3"])
    for file in (tmp_path / "north.key", made.key):
        assert file.stat().st_mode & 0o077 == 0
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ")
    with pytest.raises(UsageRefusal, match="should not exist yet"):
        make_key_pair(tmp_path / "north.key")
    with pytest.raises(UsageRefusal, match="should not exist yet"):
        make_certificates(tmp_path / "tls")


@pytest.mark.parametrize(("host", "trusted"), [("server.example.org", True), ("10.1.2.3", True), ("other.org", False)])
def test_the_certificate_is_good_for_its_hosts_and_no_others(tmp_path, host, trusted):
    made = make_certificates(tmp_path, ["server.example.org", "10.1.2.3"])
    server, client = ssl.MemoryBIO(), ssl.MemoryBIO()
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(made.certificate, made.key)
    asking = ssl.create_default_context(cafile=str(made.authority))
    near = asking.wrap_bio(client, server, server_hostname=host)
    far = serving.wrap_bio(server, client, server_side=True)
    ends = {False: near, True: far}
    failed = False
    for turn in range(8):
        try:
            ends[turn % 2 == 1].do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError:
            failed = True
            break
    assert failed is not trusted


# ---- real processes on loopback ----------------------------------------------------------------------------------


def _sites(tmp_path, *names):
    for name in names:
        (tmp_path / f"{name}.toml").write_text("")
    return {name: tmp_path / f"{name}.toml" for name in names}


def test_arrays_come_back_from_two_sites_and_nothing_is_left_running(tmp_path, monkeypatch):
    flower_stand_ins.put_in_place(monkeypatch, tmp_path / "first")
    (tmp_path / "config.json").write_text(json.dumps({"steps": [{"kind": "train", "size": 75_000}]}))
    said = []
    with FlowerProcesses(tmp_path / "flower") as flower:
        server = flower.start_superlink()
        for name, settings in _sites(tmp_path, "north", "south").items():
            flower.start_supernode(name, settings, server)
        end = flower.wait(flower.submit(server, tmp_path / "config.json", tmp_path / "run"), said.append, 200)
        everything = {child for one in flower.started for child in one.children}
        everything |= {Process.of(one.process.pid) for one in flower.started}
    (done,) = json.loads((tmp_path / "run" / "rounds.json").read_text())
    assert end.exit_code == 0 and sorted(done["sites"]) == ["north", "south"] and done["same"]
    assert said == ["round 1: ['north', 'south']"] and done["received"] > 2 * 4 * 75_000 * 4
    assert len(everything) >= 6 and not any(map(is_running, everything))
    assert not (Path.home() / ".flwr" / "apps").is_dir() or "nnunet" not in str(os.listdir(Path.home() / ".flwr/apps"))


def test_processes_end_with_the_one_that_started_them_even_when_it_is_killed(tmp_path):
    code = f"""
import pathlib, time
from nnunet_dp.federated.flower_processes import FlowerProcesses
flower = FlowerProcesses(pathlib.Path({str(tmp_path)!r}))
flower._start("sleeper", "site", flower.folder / "site", ["/bin/sleep", "100"])
print(flower.started[0].process.pid, flush=True)
time.sleep(100)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = Process.of(int(parent.stdout.readline()))
    time.sleep(0.5)
    assert is_running(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 10
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(child)


def test_a_superlink_that_does_not_come_up_says_so(tmp_path):
    (tmp_path / "server" / "superlink.db").mkdir(parents=True)
    with FlowerProcesses(tmp_path) as flower, pytest.raises(Refusal, match="should answer at 127"):
        flower.start_superlink()
