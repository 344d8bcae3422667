"""What the coordinator remembers between rounds: one file, replaced whole after each of them.

A coordinator that dies goes on with the round after the last one in the file; sites that had trained the lost round
send the same weights again, without a new charge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.federated.protocol import Arrays, Reply, Terms
from nnunet_dp.replacing import replacing

STATE = "server_state.safetensors"
_WEIGHTS, _AVERAGE = "weights/", "average/"


@dataclass(frozen=True)
class SiteRecord:
    """What is known of a site, by its own replies.

    Attributes:
        rounds: in which its weights were used.
        epsilon: spent by this run, as it said; a function of its schedule and charges.
        delta: of it.
        unit: of it.
        bound: its noised threshold (adp-fl).
        dropped_out: whether its budget is spent.
    """

    rounds: int = 0
    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None
    bound: float | None = None
    dropped_out: bool = False

    def told(self, reply: Reply) -> SiteRecord:
        """After a reply; what it does not say stays."""
        said = {key: getattr(reply, key) for key in ("epsilon", "delta", "unit", "bound")}
        known = {key: value for key, value in said.items() if value is not None}
        if self.epsilon is not None:  # what was spent never falls, nor changes what it is counted at and per
            known |= {"epsilon": max(self.epsilon, known.get("epsilon", 0.0)), "delta": self.delta, "unit": self.unit}
        return replace(self, **known)


@dataclass(frozen=True, eq=False)
class ServerState:
    """After ``round`` finished rounds.

    Attributes:
        terms: digest of the run's.
        round: finished rounds; the next one's number.
        weights: global.
        average: of the global weights, for the model.
        sites: by name.
        agreed: digest of what else is fixed before the first round (``RunConfig.agreed``).
        ledger: sequence number and hash of the server ledger's newest line, with client-level privacy.
    """

    terms: str
    round: int
    weights: Arrays = field(repr=False)
    average: Arrays = field(repr=False)
    sites: Mapping[str, SiteRecord] = field(default_factory=dict)
    agreed: str = ""
    ledger: tuple[int, str] | None = None


def digest(terms: Terms) -> str:
    """Of everything that all sites were promised."""
    return hashlib.sha256(terms.model_dump_json().encode()).hexdigest()


def write_state(state: ServerState, folder: Path) -> None:
    """Write it whole or not at all."""
    arrays = {_WEIGHTS + name: np.ascontiguousarray(array) for name, array in state.weights.items()}
    arrays |= {_AVERAGE + name: np.ascontiguousarray(array) for name, array in state.average.items()}
    sites = {name: asdict(record) for name, record in state.sites.items()}
    facts = {"terms": state.terms, "round": state.round, "sites": sites}
    facts |= {"agreed": state.agreed, "ledger": state.ledger}
    with replacing(folder / STATE) as stream:
        stream.write(save(arrays, metadata={"state": json.dumps(facts)}))


def read_state(folder: Path, terms: Terms) -> ServerState | None:
    """The state of this run in that folder, or None where none was written.

    Raises:
        UsageRefusal: for another run's, or a damaged one.
    """
    file = folder / STATE
    if not file.is_file():
        return None
    try:
        with safe_open(file, "np") as opened:
            facts = json.loads(opened.metadata()["state"])
        arrays = load_file(file)
        sites = {name: SiteRecord(**record) for name, record in facts["sites"].items()}
        ledger = facts.get("ledger")
    except Exception as error:  # safetensors raises its own, json and dataclasses theirs
        why = f"cannot be read ({type(error).__name__})"
        raise UsageRefusal(f"{STATE} in {folder.name} {why}: start a new run") from None
    if facts["terms"] != digest(terms):
        raise UsageRefusal(
            f"{folder.name} should be new or hold this run's state, but holds another run: go on with that one with "
            "--resume, or give this one another --folder"
        )
    parts = _part(arrays, _WEIGHTS), _part(arrays, _AVERAGE)
    head = (int(ledger[0]), str(ledger[1])) if ledger else None
    return ServerState(facts["terms"], facts["round"], *parts, sites, facts.get("agreed", ""), head)


def _part(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
