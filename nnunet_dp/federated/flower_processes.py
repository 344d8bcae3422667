"""Flower's processes on this machine: started, watched and stopped by their pid, everything below one folder.

    with FlowerProcesses(folder) as flower:
        server = flower.start_superlink()
        flower.start_supernode("north", settings_file, server)
        flower.start_supernode("south", other_settings_file, server)
        end = flower.wait(flower.submit(server, config_file, run_folder), say=print)

    folder/server/       the SuperLink's FLWR_HOME, commands, log and database
    folder/site_NAME/    the same of a SuperNode (its app's output too: it stays at the site)

Everything is stopped when the block ends, however it ends. Where this process is killed instead, Linux ends what it
started, and Flower's own processes end once their parent is gone.

Only the address given is listened on: 127.0.0.1 unless another is named.

Design note: a SuperLink keeps its state in a file, so that one that is started again in the same folder and at the same
port knows the nodes and keys of the one before, and SuperNodes that waited go on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from nnunet_dp.errors import Refusal
from nnunet_dp.federated.flower_commands import command
from nnunet_dp.federated.flower_environment import (
    CONNECTION,
    Server,
    answers,
    environment,
    flwr,
    free_port,
    tied,
    tls_options,
    write_connection,
)
from nnunet_dp.federated.flower_keys import Certificates
from nnunet_dp.federated.flower_runs import APP, ENDED, LINES, MANIFEST, End, Lines, Submitted, ended, said, was_killed
from nnunet_dp.federated.process_table import Process, descendants, is_running

_STARTING_SECONDS = 120.0
_STOPPING_SECONDS = 10.0  # Flower gives itself five
_AGAIN_SECONDS = 10.0


@dataclass
class Started:
    """A process that was started here.

    Attributes:
        name: for people.
        line: its command line.
        environment: its environment.
        log: file of its output.
        kept: whether it is started again when it ends by itself.
        process: it.
        begun: when it was started last, on the monotonic clock.
        children: every process seen below it so far.
    """

    name: str
    line: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    kept: bool = False
    process: subprocess.Popen[bytes] = field(init=False)
    begun: float = field(init=False)
    children: set[Process] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                tied(self.line),
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own: Ctrl-C reaches us, and we stop the others
            )
        self.begun = time.monotonic()

    @property
    def running(self) -> bool:
        """Whether it still runs; a dead one is reaped by asking, which lets Flower's own watchers see it."""
        running = self.process.poll() is None
        if running:
            self.children |= descendants(self.process.pid)
        return running


class FlowerProcesses:
    """Flower's processes of one folder; a context manager that stops what it started."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder).resolve()
        self.started: list[Started] = []
        self._superlink: Started | None = None

    def __enter__(self) -> FlowerProcesses:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---- start -------------------------------------------------------------------------------------------------

    def start_superlink(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        certificates: Certificates | None = None,
        authenticate: bool = False,
    ) -> Server:
        """Start a SuperLink and wait until it answers.

        Args:
            host: address to listen on.
            port: 0 takes a free one.
            certificates: of the server; None is without TLS.
            authenticate: whether SuperNodes need a registered key; needs certificates.

        Raises:
            Refusal: when it does not come up.
        """
        home = self.folder / "server"
        port = port or free_port()
        options = ["--host", host, "--port", str(port), "--disable-runtime-dependency-installation"]
        options += ["--database", str(home / "superlink.db")]
        options += ["--enable-supernode-auth"] if authenticate else []
        options += tls_options(certificates)
        started = self._start("superlink", "server", home, [*command("superlink"), *options])
        self._superlink = started
        here = f"127.0.0.1:{port}" if host in ("127.0.0.1", "0.0.0.0", "localhost") else f"{host}:{port}"
        server = Server(here, certificates.authority.resolve() if certificates else None, home)
        while not answers(server):
            if not started.running or time.monotonic() > started.begun + _STARTING_SECONDS:
                tail = started.log.read_text(errors="replace")[-500:]
                raise Refusal(f"the SuperLink should answer at {server.address}, but it does not: {tail}")
            time.sleep(0.2)
        write_connection(server)
        return server

    def start_supernode(self, name: str, settings: Path, server: Server, private_key: Path | None = None) -> Started:
        """Start a SuperNode of the site whose settings are given; whenever it ends, ``poll`` starts it again.

        A SuperLink lets nobody in whose key is not registered (yet), nor one that was killed until it has missed the
        other's heartbeats for a minute; in both cases a SuperNode ends, and comes in at a later try.

        Args:
            name: of its folder and in messages.
            settings: the site's settings file.
            server: to connect to.
            private_key: of a registered pair, where the server asks for one.
        """
        home = self.folder / f"site_{name}"
        options = ["--superlink", server.address, "--host", "127.0.0.1", "--port", str(free_port())]
        options += ["--node-config", f"settings={json.dumps(str(Path(settings).resolve()))}"]
        options += ["--root-certificates", str(server.authority)] if server.authority else ["--insecure"]
        options += ["--auth-supernode-private-key", str(Path(private_key).resolve())] if private_key else []
        return self._start(name, "site", home, [*command("supernode"), *options])

    def _start(self, name: str, role: Literal["server", "site"], home: Path, line: Sequence[str]) -> Started:
        home.mkdir(parents=True, exist_ok=True)
        started = Started(name, line, environment(home, role), home / "flower.log", kept=role == "site")
        self.started.append(started)
        return started

    # ---- talk to the SuperLink ---------------------------------------------------------------------------------

    def register(self, server: Server, public_key: Path) -> None:
        """Let SuperNodes with this key in; a key that is registered already is left as it is."""
        answer = flwr(server, "supernode", "register", str(Path(public_key).resolve()), CONNECTION)
        if not answer.get("success") and "already in use" not in str(answer):
            raise Refusal(f"the key should be registered, found: {answer.get('error-message', answer)}")

    def submit(self, server: Server, config: Path, run_folder: Path) -> Submitted:
        """Start the coordinator of a run; see ``flower_server`` for what it leaves in its folder."""
        assert server.home is not None, "only the SuperLink's own machine starts runs"
        run_folder = Path(run_folder).resolve()
        run_folder.mkdir(parents=True, exist_ok=True)
        for name in (ENDED, APP):
            (run_folder / name).unlink(missing_ok=True)
        manifest = server.home / "app" / "pyproject.toml"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(MANIFEST)
        values = {"config": str(Path(config).resolve()), "folder": str(run_folder)}
        told = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        answer = flwr(server, "run", str(manifest.parent), CONNECTION, "--run-config", told)
        if not answer.get("success"):
            raise Refusal(f"the run should start, found: {answer.get('error-message', answer)}")
        return Submitted(str(answer["run-id"]), run_folder, said(run_folder))

    def wait(
        self, run: Submitted, say: Callable[[str], None] = lambda line: None, timeout_s: float = float("inf")
    ) -> End:
        """Wait for the end of a run, passing on what its coordinator says.

        Returns:
            The coordinator's own end; exit code 1 where it, or the SuperLink, was killed. Submit again to resume.
        """
        end, lines = time.monotonic() + timeout_s, Lines(run.folder / LINES, run.said_bytes)
        begun = time.monotonic()
        while time.monotonic() < end:
            self.poll()
            found = ended(run.folder)
            for line in lines.new():
                say(line)
            if found:
                return found
            if self._superlink is not None and not self._superlink.running:
                return End(1, "the SuperLink should run until the end, but it ended: run again to resume")
            if was_killed(run.folder):
                return ended(run.folder) or End(1, "the coordinator's process was killed: run again to resume")
            if not (run.folder / APP).is_file() and time.monotonic() > begun + _STARTING_SECONDS:
                return End(1, f"the coordinator should start within {_STARTING_SECONDS:.0f} s: see server/flower.log")
            time.sleep(0.3)
        return End(1, f"the run should end within {timeout_s:.0f} s, but it goes on")

    # ---- stop --------------------------------------------------------------------------------------------------

    def poll(self) -> list[str]:
        """Names of the processes that have ended; SuperNodes among them are started again after a while.

        Whoever started something calls this every now and then (``wait`` and ``watch`` do).
        """
        gone = [one for one in self.started if not one.running]
        for one in gone:
            if one.kept and time.monotonic() > one.begun + _AGAIN_SECONDS:
                one.start()
        return [one.name for one in gone]

    def watch(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Look after what was started until Ctrl-C, or until a process that is not started again has ended.

        Raises:
            Refusal: when such a one has ended.
        """
        known: list[str] = []
        while True:
            gone = self.poll()
            for name in set(gone) - set(known):
                logs = ", ".join(str(one.log) for one in self.started if one.name == name)
                say(f"{name} has ended: see {logs}. Is the key registered, and ca.pem this server's?")
            if lost := [one for one in self.started if not one.kept and one.name in gone]:
                raise Refusal(f"{lost[0].name} should run until it is stopped, but it ended: see {lost[0].log.name}")
            known = gone
            time.sleep(0.5)

    def stop(self) -> None:
        """Stop everything that was started here: SuperNodes first, so that they can sign off."""
        sites = [one for one in self.started if one is not self._superlink]
        stop(*sites)
        stop(*(one for one in self.started if one is self._superlink))
        self.started.clear()
        self._superlink = None


def stop(*started: Started) -> None:
    """Stop processes and everything below them: asked to, and killed where they do not listen."""
    for one in started:
        if one.running:
            _signal_group(one.process, signal.SIGTERM)
    for one in started:
        _end_of(one)


def _end_of(one: Started) -> None:
    try:
        one.process.wait(_STOPPING_SECONDS)
    except subprocess.TimeoutExpired:
        _signal_group(one.process, signal.SIGKILL)
        one.process.wait()
    end = time.monotonic() + _STOPPING_SECONDS
    while (left := [child for child in one.children if is_running(child)]) and time.monotonic() < end:
        time.sleep(0.1)
    for child in left:
        if is_running(child):
            os.kill(child.pid, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
