"""What stands in for Flower's own commands, narrowed to what federated training needs.

    superlink   as ``flower-superlink``; from other machines it answers SuperNodes alone
    supernode   as ``flower-supernode``
    superexec   as ``flower-superexec``
    serverapp   as ``flwr-serverapp``
    clientapp   as ``flwr-clientapp``; it runs the app of this installation, whatever the server sent
    flwr        as ``flwr``

Flower 1.41 serves the SuperNodes and whoever controls the SuperLink at one port, and asks the latter for nothing:
anybody who reaches the port may register keys and start apps, and an app's code runs at every site. Both ends close
this here. A SuperLink answers ``/v1/fleet/``, which SuperNode keys guard, to everybody, and everything else to its own
machine. A site executes ``flower_client`` of its own installation and nothing that was sent.

Design note: Flower has no setting for either. The names replaced below were read in 1.41.0; where one is missing the
command ends instead of running unguarded, and the extra ``federated`` pins the versions that were tried.

Flower starts its processes by name, so ``write_shims`` makes a folder of commands to put first on the path: those of a
role, and every other of Flower's as one that fails.
"""

from __future__ import annotations

import argparse
import ipaddress
import shlex
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Literal

from nnunet_dp.federated.process_table import end_with_parent, let_forked_workers_just_end

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

SHIMS: dict[str, dict[str, str]] = {
    "server": {"flower-superexec": "superexec", "flwr-serverapp": "serverapp"},
    "site": {"flower-superexec": "superexec", "flwr-clientapp": "clientapp"},
}
"""Commands that Flower may start by name, and what they are here."""
_FLOWERS = ("superexec", "superlink", "supernode"), ("agentapp", "clientapp", "connector", "model", "serverapp")
_FLEET = "/v1/fleet/"
_ASKING_SECONDS = 0.5


def command(name: str) -> list[str]:
    """Command line of one of the commands above, by this interpreter."""
    return [sys.executable, "-m", "nnunet_dp.federated.flower_commands", name]


def write_shims(folder: Path, role: Literal["server", "site"]) -> Path:
    """Write the commands that a role's processes may start; returns the folder, for the front of the path."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"flower-{name}" for name in _FLOWERS[0]] + [f"flwr-{name}" for name in (*_FLOWERS[1], "simulation")]
    for name in names:
        ours = SHIMS[role].get(name)
        line = f'exec {shlex.join(command(ours))} "$@"' if ours else "exit 1"
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o700)
    return folder


class FleetAloneFromOutside:
    """An ASGI application that other machines may ask for ``/v1/fleet/`` only."""

    def __init__(self, application: Application) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        if scope["type"] == "lifespan" or _is_here(scope) or scope["path"].startswith(_FLEET):
            await self._application(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})


def _is_here(scope: Scope) -> bool:
    client = scope.get("client")
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def _superlink() -> None:
    import flwr.superlink.main as served
    from flwr.superlink.cli import flower_superlink

    create = _replaceable(served, "create_app")
    served.create_app = lambda *given: FleetAloneFromOutside(create(*given))  # pyright: ignore
    flower_superlink()


def _supernode() -> None:
    """Ask for messages every half second instead of three, and answer for an app that ended without a reply."""
    import flwr.supernode.nodestate.in_memory_nodestate as states
    import flwr.supernode.start_client_internal as node
    from flwr.supernode.cli import flower_supernode

    kept = _replaceable(states, "InMemoryNodeState")
    kept.finish_task = _with_a_reply(_replaceable(kept, "finish_task"), _replaceable(kept, "_on_task_tokens_expired"))
    node._pull_and_store_message = _until_there_is_one(_replaceable(node, "_pull_and_store_message"))  # pyright: ignore
    flower_supernode()


def _until_there_is_one(pull: Callable[..., int | None]) -> Callable[..., int]:
    def pulled(**given: Any) -> int:
        while (run := pull(**given)) is None:
            time.sleep(_ASKING_SECONDS)
        return run

    return pulled


def _with_a_reply(finish: Callable[..., bool], reply_error: Callable[..., None]) -> Callable[..., bool]:
    """Flower answers for an app that was killed, not for one that was ended; the site would wait for it for good."""

    def finished(state: Any, task_id: int, sub_status: str, details: str) -> bool:
        ended = finish(state, task_id, sub_status, details)
        if ended and sub_status != "completed":
            reply_error(state, state.get_tasks(task_ids=[task_id]))
        return ended

    return finished


def _superexec() -> None:
    from flwr.supercore.cli import flower_superexec

    flower_superexec()


def _serverapp() -> None:
    from flwr.superlink.cli import flwr_serverapp

    let_forked_workers_just_end()
    flwr_serverapp()


def _clientapp() -> None:
    """Run the installed app: neither unpack nor import what the server sent."""
    import flwr.supernode.runtime.run_clientapp as runner
    from flwr.common.args import add_args_flwr_app_common, try_obtain_flwr_app_token
    from flwr.supercore.tls import validate_and_resolve_root_certificates

    _replaceable(runner, "install_from_fab")
    _replaceable(runner, "get_load_client_app_fn")
    runner.install_from_fab = lambda *_, **__: None  # pyright: ignore
    runner.get_load_client_app_fn = lambda **_: _installed_app  # pyright: ignore
    parser = argparse.ArgumentParser()  # that of flwr-clientapp, whose module takes another second to import
    parser.add_argument("--runtime-api-address", required=True)
    add_args_flwr_app_common(parser)
    given = parser.parse_args()
    let_forked_workers_just_end()
    runner.run_clientapp(
        runtime_api_address=given.runtime_api_address,
        token=try_obtain_flwr_app_token(given),
        insecure=given.insecure,
        certificates=validate_and_resolve_root_certificates(given.root_certificates, given.insecure),
        parent_pid=given.parent_pid,
        runtime_dependency_install=False,
    )


def _installed_app(*_: object) -> object:
    from nnunet_dp.federated.flower_client import app

    return app


def _flwr() -> None:
    from flwr.cli.app import app

    app()


def _replaceable(module: object, name: str) -> Any:
    found = getattr(module, name, None)
    if not callable(found):
        sys.exit(f"this version of flwr has no {name}, so it cannot be guarded: install nnunet-dp[federated]")
    return found


def main() -> None:
    """Run the command that the first argument names, with the others."""
    commands = {"superlink": _superlink, "supernode": _supernode, "superexec": _superexec}
    commands |= {"serverapp": _serverapp, "clientapp": _clientapp, "flwr": _flwr}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in commands:
        sys.exit(f"the command should be one of {', '.join(commands)}, found {name!r}")
    sys.argv = [name, *sys.argv[2:]]
    if "--parent-pid" in sys.argv:  # Flower's own watcher waits for the main thread, which may be in a long sleep
        end_with_parent(int(sys.argv[sys.argv.index("--parent-pid") + 1]))
    commands[name]()


if __name__ == "__main__":
    main()
