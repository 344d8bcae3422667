"""A hospital's side of a deployment: its settings and key pair, and taking part with its dataset.

    init_site   FOLDER/site.toml, FOLDER/site_key, FOLDER/site_key.pub
    run_site    connects and answers, until Ctrl-C

``ca.pem`` comes from the coordinator, ``site_key.pub`` goes there (``deployment``); everything else stays.

>>> NewSite("north", "301", 8.0).text().splitlines()[2].split("#")[0].strip()
'name = "north"'
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.federated.deployment import EXTRA, Say, open_processes
from nnunet_dp.federated.raw_dataset import raw_folder
from nnunet_dp.federated.site_settings import SiteSettings, read_settings
from nnunet_dp.replacing import replacing

SETTINGS, KEY, AUTHORITY = "site.toml", "site_key", "ca.pem"
_SETTINGS = """\
# This site's settings for `nnunet-dp fed site`. No coordinator can change or raise what stands here.

name = {name}              # public: it stands in the coordinator's progress lines
dataset = {dataset}        # nnU-Net's id or name; its patients.csv says which cases belong to one patient

# Most that this dataset's patients may ever spend, over every run that its ledger knows. A run that asks for more is
# declined; a run that would bring the total above it ends early for this site.
max_epsilon = {max_epsilon}
{delta}
# Where nnU-Net's folders are; without these lines the environment says.
# raw = "..."
# preprocessed = "..."
# results = "..."

device = {device}
processes = {processes}    # beside the training: they load patients, and preprocess

# Most plans that coordinators may have this dataset preprocessed with, ever.
max_plans = 5

# Modes without any privacy guarantee (fedavg, paper) are declined. Only for data that need no protection:
# allow_no_guarantee = true
"""
_OWN_DELTA = "\n# Of that epsilon; below 1 / number of patients.\ndelta = {delta}\n"
_RULED_DELTA = "\n# Of that epsilon; left out, it follows the number N of patients, 1 / (10 N).\n# delta = 1e-5\n"


@dataclass(frozen=True)
class NewSite:
    """What a hospital decides at first; see ``SiteSettings``."""

    name: str
    dataset: str
    max_epsilon: float
    delta: float | None = None
    device: str = "cpu"
    processes: int = 1

    def text(self) -> str:
        """The settings file, with an explanation of each line."""
        delta = _RULED_DELTA if self.delta is None else _OWN_DELTA.format(delta=self.delta)
        quoted = {key: json.dumps(getattr(self, key)) for key in ("name", "dataset", "device")}
        return _SETTINGS.format(
            **quoted, max_epsilon=float(self.max_epsilon), delta=delta, processes=self.processes
        )


def init_site(folder: Path, site: NewSite) -> list[str]:
    """Write a hospital's settings and key pair.

    Args:
        folder: new, or without settings.
        site: what it decides.

    Returns:
        Lines for people: what to send, what to type next.

    Raises:
        UsageRefusal: for impossible settings, and where settings or keys exist.
    """
    file = folder / SETTINGS
    if any((folder / name).exists() for name in (SETTINGS, KEY, f"{KEY}.pub")):
        raise UsageRefusal(f"{folder.name} holds settings or a key already: edit {SETTINGS}, or name another folder")
    _refuse_impossible(site, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(file) as stream:
        stream.write(site.text().encode())
    lines = [f"Wrote {file}: read it, and complete it.", *_missing_dataset(site.dataset)]
    public = _make_key(folder)
    if public is None:
        return [*lines, f"No key pair: {EXTRA}, then `nnunet-dp fed init-site` into another folder."]
    return [
        *lines,
        f"Send to the coordinator: {public} (public). Keep to yourself: {folder / KEY}",
        f"Get from the coordinator: {AUTHORITY}, to be put into {folder}, and the server's address.",
        f"Next: nnunet-dp fed site {folder} --server HOST:PORT",
    ]


def _refuse_impossible(site: NewSite, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as trial:
        (Path(trial) / SETTINGS).write_text(site.text())
        settings = read_settings(Path(trial) / SETTINGS)
    if settings.name != site.name:
        raise UsageRefusal(f"{folder.name}: the settings should hold what was given")


def _missing_dataset(dataset: str) -> list[str]:
    """A note where the dataset is not there yet, which otherwise shows only when a coordinator asks."""
    try:
        raw_folder(dataset)
    except UsageRefusal as refusal:
        return [f"NOTE: {refusal}. Add it, or set raw and dataset in {SETTINGS}, before `nnunet-dp fed site`."]
    return []


def _make_key(folder: Path) -> Path | None:
    try:
        from nnunet_dp.federated.flower_keys import make_key_pair  # cryptography comes with the extra
    except ImportError:
        return None
    return make_key_pair(folder / KEY)


def run_site(folder: Path, address: str, root_certificate: Path | None, insecure: bool, say: Say) -> None:
    """Connect a hospital's dataset to a server until Ctrl-C.

    Args:
        folder: as ``init_site`` made it.
        address: HOST:PORT.
        root_certificate: that the server is checked with; None takes the one in the folder.
        insecure: without TLS and key.
        say: told what becomes of the process.

    Raises:
        UsageRefusal: before it starts, for settings, certificate or key that are missing.
    """
    settings = read_settings(folder / SETTINGS)
    _refuse_address(address)
    authority = root_certificate or (folder / AUTHORITY if (folder / AUTHORITY).is_file() else None)
    if insecure == (authority is not None):
        raise UsageRefusal(
            "the server should be checked with the coordinator's ca.pem: --root-certificate FILE, or FOLDER/ca.pem; "
            "--insecure instead is only for trying out on one machine"
        )
    key = None if insecure else folder / KEY
    if key is not None and not key.is_file():
        raise UsageRefusal(
            f"{folder.name} should hold the key {KEY}, found none: put it back from a backup, or make another one with "
            f"`nnunet-dp fed init-site NEW_FOLDER --name {settings.name} -d {settings.dataset} --max-epsilon "
            f"{settings.max_epsilon:g}`, and have the coordinator register that; the dataset's ledger stays as it is"
        )
    processes = open_processes(folder / "flower")
    from nnunet_dp.federated.flower_environment import Server

    with processes as flower:
        flower.start_supernode(settings.name, folder / SETTINGS, Server(address, authority), key)
        say(f"{settings.name} offers {settings.dataset_name()} to {address}, at most epsilon "
            f"{settings.max_epsilon:g} in all; Ctrl-C ends it. What it does: {_log_of(settings)}. Connection: "
            f"{flower.started[0].log}, which repeats `retrying` where no server answers")  # fmt: skip
        flower.watch(say)


def _log_of(settings: SiteSettings) -> Path:
    return settings.folder("results") / settings.dataset_name() / "federated_log.txt"


def _refuse_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageRefusal(f"--server should be HOST:PORT, found {address!r}; type: --server coordinator.example:9092")
