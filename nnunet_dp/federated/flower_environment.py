"""Environment and command lines of Flower's processes, and what is asked of a SuperLink from its own machine.

Telemetry, update check and run-time installation of dependencies are off, the user's own FLWR_HOME stays untouched, and
requests to this machine go through no proxy.

>>> told = tls_options(None)
>>> told
['--insecure']
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nnunet_dp.errors import Refusal
from nnunet_dp.federated.flower_commands import command, write_shims
from nnunet_dp.federated.flower_keys import Certificates

CONNECTION = "coordinator"
"""Flower's name of the connection to the SuperLink of the same FLWR_HOME."""

# Ends the command when the process that started it is gone, also after kill -9 (prctl(PR_SET_PDEATHSIG) survives exec).
_TIED = """
import ctypes, os, signal, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl is not None:
    prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Server:
    """How to reach a SuperLink.

    Attributes:
        address: host:port.
        authority: certificate to check it with; None without TLS.
        home: its FLWR_HOME, on its own machine only.
    """

    address: str
    authority: Path | None = None
    home: Path | None = None


def environment(home: Path, role: Literal["server", "site"]) -> dict[str, str]:
    """This process's environment, with Flower's home and its commands, and without anything that calls out."""
    here = "127.0.0.1,localhost"
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(write_shims(home / "commands", role)), os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "no_proxy": ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), here])),
    }


def flwr(server: Server, *arguments: str) -> dict[str, Any]:
    """What Flower's command line answers, on the SuperLink's own machine."""
    assert server.home is not None, "only the SuperLink's own machine controls it"
    line = [*command("flwr"), *arguments, "--format", "json"]
    done = subprocess.run(line, env=environment(server.home, "server"), capture_output=True, text=True, timeout=300)
    try:
        return json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        text = (done.stderr or done.stdout).strip()
        raise Refusal(f"flwr {arguments[0]} should answer, found: {text[-500:]}; see server/flower.log") from None


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tied(line: Sequence[str]) -> list[str]:
    """The command line, ended by Linux once this process is gone."""
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *line]


def tls_options(certificates: Certificates | None) -> list[str]:
    """A SuperLink's options for its certificates."""
    if certificates is None:
        return ["--insecure"]
    names = {
        "--ssl-ca-certfile": certificates.authority,
        "--ssl-certfile": certificates.certificate,
        "--ssl-keyfile": certificates.key,
    }
    return [part for option, file in names.items() for part in (option, str(file.resolve()))]


def write_connection(server: Server) -> None:
    """Tell Flower's command line how to reach the SuperLink."""
    assert server.home is not None
    values: Mapping[str, object] = {"address": server.address, "insecure": server.authority is None}
    values = {**values, **({"root-certificates": str(server.authority)} if server.authority else {})}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n' + "\n".join(lines) + "\n"
    (server.home / "config.toml").write_text(text)


def answers(server: Server) -> bool:
    """Whether a SuperLink answers."""
    context = ssl.create_default_context(cafile=str(server.authority)) if server.authority else None
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    handlers += [urllib.request.HTTPSHandler(context=context)] if context else []
    try:
        url = f"http{'s' if context else ''}://{server.address}/health"
        urllib.request.build_opener(*handlers).open(url, timeout=5).close()
    except OSError:
        return False
    return True
