"""Federated training between machines, the coordinator's side; ``hospital`` is the other one.

    run_server   FOLDER/certificates, FOLDER/server: listens and lets registered keys in, until Ctrl-C
    run          FOLDER/runs/RUN: a run over the sites that are connected

Two things pass between people before anything passes between machines: ``ca.pem`` to the hospitals, so that they talk
to this coordinator and nobody else, and each ``site_key.pub`` to the coordinator. Neither is secret; who swaps one on
its way could pose as the other side, so compare what ``sha256sum`` says of them by telephone.

Design note: without TLS a key proves nothing, so ``--insecure`` leaves out both; it is for trying out on one machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_dp.errors import BudgetRefusal, Refusal, UsageRefusal
from nnunet_dp.federated import process_table
from nnunet_dp.federated.notes import read_note
from nnunet_dp.federated.process_table import Process
from nnunet_dp.replacing import replacing
from nnunet_dp.workers import Progress

Say = Callable[[str], None]
SERVER, CERTIFICATES, RUNS = "server_now.json", "certificates", "runs"
EXTRA = "federated training needs flwr: pip install 'nnunet-dp[federated]'"


# ---- the coordinator ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NewServer:
    """What a server is started with.

    Attributes:
        host: address to listen on.
        port: to listen on.
        names: under which sites reach it; for a certificate that is made.
        certificate: the server's own, PEM; None makes one.
        key: of it.
        authority: certificate of who signed it.
        register: sites' public keys.
        insecure: without TLS and keys.
    """

    host: str = "127.0.0.1"
    port: int = 9092
    names: tuple[str, ...] = ()
    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None
    register: tuple[Path, ...] = ()
    insecure: bool = False

    def refuse_senseless(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageRefusal: saying which to give.
        """
        own = [part is not None for part in (self.certificate, self.key, self.authority)]
        if any(own) and not all(own):
            raise UsageRefusal("--certificate, --key and --authority go together: give all three, or none")
        if self.insecure and (any(own) or self.register or self.names):
            raise UsageRefusal("--insecure has neither certificates nor keys: leave the others out")


def run_server(folder: Path, given: NewServer, say: Say) -> None:
    """Run the server until Ctrl-C; beside a server that runs in the folder, register keys and return.

    Args:
        folder: the coordinator's.
        given: what it is started with.
        say: told where it listens and which keys it knows.

    Raises:
        UsageRefusal: for options without sense.
        Refusal: when it does not start.
    """
    given.refuse_senseless()
    if given.register and is_running(folder):
        flower, server = open_processes(folder), read_server(folder)
        _register(flower, server, given.register, say)
        return
    if is_running(folder):
        raise UsageRefusal(f"a server runs in {folder.name} already: stop it first, or register keys with --register")
    processes = open_processes(folder)
    certificates = None if given.insecure else _certificates(folder, given, say)
    with processes as flower:
        server = flower.start_superlink(given.host, given.port, certificates, authenticate=not given.insecure)
        _note_server(folder, server)
        try:
            say(f"Listening at {given.host}:{given.port}, {'WITHOUT TLS and keys' if given.insecure else 'with TLS'}; "
                "Ctrl-C ends it.")  # fmt: skip
            _register(flower, server, given.register, say)
            say(f"Next: nnunet-dp fed run {folder} --sites K --patients N --dataset-json FILE --rounds 20 --epsilon 8")
            flower.watch(say)
        finally:
            (folder / SERVER).unlink(missing_ok=True)


def _certificates(folder: Path, given: NewServer, say: Say) -> Any:
    from nnunet_dp.federated.flower_keys import Certificates, make_certificates

    if given.certificate is not None and given.key is not None and given.authority is not None:
        return Certificates(given.authority, given.certificate, given.key)
    kept = Certificates.within(folder / CERTIFICATES)
    if kept.certificate.is_file():
        return kept
    made = make_certificates(folder / CERTIFICATES, given.names)
    say(f"Made certificates for {', '.join((*given.names, 'this machine'))}. Send to every site: {made.authority}")
    return made


def _register(flower: Any, server: Any, keys: tuple[Path, ...], say: Say) -> None:
    for key in keys:
        flower.register(server, key)
        say(f"Registered {key.name}.")


@dataclass(frozen=True)
class Asked:
    """What a coordinator types beside the run's options.

    Attributes:
        sites: that take part.
        patients: over all sites; public.
        dataset_json: file of the description.
        model_dataset: DatasetXXX_Name of the model.
        device: for the public start.
        processes: that draw phantoms.
        address: of the server; None takes the one that runs in the folder.
    """

    sites: int
    patients: int
    dataset_json: Path
    model_dataset: str = "Dataset900_Federated"
    device: str = "cpu"
    processes: int = 1
    address: str | None = None


def run(folder: Path, asked: Asked, options: Any, say: Say, progress: Progress | None = None) -> Path:
    """Decide a run and follow it to its end.

    Args:
        folder: of the server that runs on this machine.
        asked: sites and model.
        options: ``new_run.RunOptions``.
        say: told everything that is going on.
        progress: told about the public start.

    Returns:
        The run's folder.

    Raises:
        UsageRefusal: for options without sense, and where no server runs.
        Refusal: when the run ended otherwise than by finishing.
    """
    made = (folder / RUNS / f"run_{secrets.token_hex(4)}").resolve()
    options.refuse_senseless(asked.sites)
    server = read_server(folder, asked.address)
    return _decide_and_follow(folder, made, asked, options, server, say, progress)


def _decide_and_follow(
    folder: Path, run_folder: Path, asked: Asked, options: Any, server: Any, say: Say, progress: Progress | None
) -> Path:
    from nnunet_dp.federated.new_run import CONFIG, Sites, find_plans, make_run
    from nnunet_dp.federated.new_survey import plans_by_survey
    from nnunet_dp.federated.simulate import device_of
    from nnunet_dp.federated.site import public_part
    from nnunet_dp.nnunet_federated import default_configuration

    try:
        described = public_part(json.loads(asked.dataset_json.read_text()))
        configuration = options.configuration or default_configuration(described)
    except (ValueError, KeyError):
        raise UsageRefusal(
            f"{asked.dataset_json.name} should be nnU-Net's dataset.json with channel_names, labels and file_ending"
        ) from None
    facts = Sites(asked.sites, asked.patients, "patient", options.delta)
    if options.fingerprint_share is None:
        found = find_plans(options, described)
    else:
        found = plans_by_survey(
            run_folder, asked, options, described, facts, tuple(options.weights),
            partial(follow, folder, run_folder, server, say),
        )  # fmt: skip
    make_run(
        folder=run_folder,
        options=options,
        dataset_json=described,
        configuration=configuration,
        sites=facts,
        found=found,
        model_dataset=asked.model_dataset,
        starts=folder.resolve(),
        device=device_of(asked.device),
        processes=asked.processes,
        names=tuple(options.weights),
        say=say,
        progress=progress,
    )
    follow(folder, run_folder, server, say, run_folder / CONFIG, run_folder)
    return run_folder


def resume(folder: Path, run_folder: Path, address: str | None, say: Say, progress: Progress | None = None) -> Path:
    """Go on with a run, from its survey or after its last round.

    Raises:
        UsageRefusal: for a folder without a run, and where no server runs.
    """
    from nnunet_dp.federated.new_run import CONFIG
    from nnunet_dp.federated.new_survey import BEGUN, read_begun

    run_folder, server = run_folder.resolve(), read_server(folder, address)
    if (run_folder / BEGUN).is_file() and not (run_folder / CONFIG).is_file():
        asked, options = read_begun(run_folder, Asked)
        return _decide_and_follow(folder, run_folder, asked, options, server, say, progress)
    if not (run_folder / CONFIG).is_file():
        raise UsageRefusal(f"{run_folder.name} should be the folder of a run, found no {CONFIG}: see FOLDER/{RUNS}")
    follow(folder, run_folder, server, say, run_folder / CONFIG, run_folder)
    return run_folder


def follow(folder: Path, run_folder: Path, server: Any, say: Say, config: Path, place: Path) -> None:
    """Submit a run, or its survey, and follow it; Ctrl-C stops it at the server, too.

    A run whose coordinator still works, after its command was killed, say, is followed without another.

    Args:
        folder: of the server.
        run_folder: of the run.
        server: that runs.
        say: told what it says.
        config: what is submitted.
        place: where its coordinator works.

    Raises:
        Refusal: when it ended otherwise than by finishing.
    """
    from nnunet_dp.federated.flower_environment import flwr
    from nnunet_dp.federated.flower_runs import at_work

    flower, again = open_processes(folder), f"`nnunet-dp fed run {folder} --resume {run_folder}` goes on"
    with told_at_ctrl_c(say, again):
        submitted = at_work(place.resolve()) or flower.submit(server, config, place)
        try:
            end = flower.wait(submitted, say)
        except BaseException:
            flwr(server, "stop", submitted.run_id)
            raise
    if end.exit_code:
        raise ended_early(end, again)


@contextmanager
def told_at_ctrl_c(say: Say, again: str) -> Iterator[None]:
    """Say how to go on with a run that is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted; {again}")
        raise


def ended_early(end: Any, again: str) -> Refusal:
    """The coordinator's own refusal, with its exit code and how to go on."""
    kind = next((kind for kind in (UsageRefusal, BudgetRefusal) if kind.exit_code == end.exit_code), Refusal)
    return kind(f"the run ended early: {end.message}; {again}")


# ---- the server that runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Noted:
    """For commands typed beside it: how to reach the server, and which process runs it."""

    address: str
    authority: Path | None
    process: Process


def _note_server(folder: Path, server: Any) -> None:
    authority = str(server.authority) if server.authority else None
    content = {"address": server.address, "authority": authority, "process": vars(Process.of(os.getpid()))}
    with replacing(folder / SERVER) as stream:
        stream.write(json.dumps(content, indent=1).encode())


def is_running(folder: Path) -> bool:
    """Whether ``run_server`` runs in this folder of this machine."""
    file = folder / SERVER
    return file.is_file() and process_table.is_running(read_note(file, _Noted).process)


def read_server(folder: Path, address: str | None = None) -> Any:
    """The server that runs in a folder of this machine.

    Raises:
        UsageRefusal: where none runs, or it is another than the named one.
    """
    if not is_running(folder):
        raise UsageRefusal(f"no server runs in {folder.name} on this machine: start `nnunet-dp fed server {folder}`")
    from nnunet_dp.federated.flower_environment import Server

    known = read_note(folder / SERVER, _Noted)
    if address not in (None, known.address):
        raise UsageRefusal(f"the server in {folder.name} is at {known.address}, found --server {address}")
    return Server(known.address, known.authority, (folder / "server").resolve())


def open_processes(folder: Path) -> Any:
    """Flower's processes of a folder; a refusal where the extra is not installed."""
    refuse_without_flower()
    from nnunet_dp.federated.flower_processes import FlowerProcesses

    return FlowerProcesses(folder)


def refuse_without_flower() -> None:
    """Refuse where the extra is not installed.

    Raises:
        UsageRefusal: with the command that installs it.
    """
    if importlib.util.find_spec("flwr") is None:
        raise UsageRefusal(EXTRA)
