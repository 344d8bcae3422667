"""What a run says while it goes on, and what it came to: public facts only, with the unit beside every epsilon.

    round 3/20  4 of 4 sites  threshold 0.91 0.88 0.95 0.9  epsilon 1.21 (site_301 1.21, ...) of 8 per patient  12 s

Epsilon is what each site reported, counted from its own ledger. A site whose last upload was lost has spent more than
it could report, and never more than the terms allow; both are said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nnunet_dp.federated.run_config import RunConfig
from nnunet_dp.federated.server_state import ServerState, SiteRecord

SUM = "costs add for a patient known to several sites"
NO_GUARANTEE = "NO GUARANTEE"


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        run: identifier.
        mode: of training.
        guarantee: in words.
        epsilon: largest of the sites'; None without a guarantee.
        rounds: finished.
        sites: name, epsilon_spent, delta, unit and rounds of each.
        model_folder: nnU-Net's.
        complete: whether all rounds were done.
        client_level: claim for whole sites, where asked for (``ClientLevelMean.claim``).
        inputs: public ones, in words.
        not_covered: what the guarantee leaves out.
    """

    run: str
    mode: str
    guarantee: str
    epsilon: float | None
    rounds: int
    sites: tuple[dict[str, Any], ...]
    model_folder: str
    complete: bool
    client_level: dict[str, Any] | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    not_covered: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return json.loads(json.dumps(asdict(self)))


def result_of(config: RunConfig, state: ServerState, complete: bool, client_level: dict[str, Any] | None) -> Result:
    """The result of a run that ended after ``state``.

    Args:
        config: of the run.
        state: the last one.
        complete: whether nothing cut it short.
        client_level: claim for whole sites.
    """
    terms = config.terms
    return Result(
        run=terms.run,
        mode=terms.mode.value,
        guarantee=guarantee(config, state),
        epsilon=largest_epsilon(config, state),
        rounds=state.round,
        sites=tuple(_site(name, record, terms.private) for name, record in sorted(state.sites.items())),
        model_folder=config.model_folder,
        complete=complete and state.round >= terms.rounds,
        client_level=client_level,
        inputs=config.inputs,
        not_covered=config.not_covered,
    )


def _site(name: str, record: SiteRecord, private: bool) -> dict[str, Any]:
    spent = {"epsilon_spent": record.epsilon, "delta": record.delta}
    return {"name": name, **(spent if private else dict.fromkeys(spent)), "unit": record.unit, "rounds": record.rounds}


def largest_epsilon(config: RunConfig, state: ServerState) -> float | None:
    """Of the sites'; None without a guarantee, and before anything was spent."""
    spent = [record.epsilon for record in state.sites.values() if record.epsilon is not None]
    return max(spent) if spent and config.terms.private else None


def guarantee(config: RunConfig, state: ServerState) -> str:
    """In words."""
    mode, epsilon = config.terms.mode.value, largest_epsilon(config, state)
    if not config.terms.private:
        return f"no guarantee: {mode} is for comparison, do not release its weights"
    deltas = [record.delta for record in state.sites.values() if record.delta is not None]
    at = f" at delta {max(deltas):g}" if deltas else ""  # the largest epsilon and delta hold at every site
    bound = f"as last reported, at most {config.terms.epsilon:g} at each"
    return f"epsilon {epsilon or 0:.4g}{at} per {units_of(state)}, the largest of the sites', {bound}; {SUM}"


def units_of(state: ServerState) -> str:
    """What the sites count epsilon per."""
    return ", ".join(sorted({record.unit for record in state.sites.values() if record.unit})) or "patient"


def round_line(
    config: RunConfig, state: ServerState, told: Mapping[str, str], seconds: float, seconds_left: float
) -> str:
    """One line for one round.

    Args:
        config: of the run.
        state: after it.
        told: sites whose weights were not used, and why.
        seconds: that it took.
        seconds_left: estimate for the rest of the run.
    """
    records = sorted(state.sites.items())
    replies = sum(1 for name, record in records if name not in told and not record.dropped_out)
    parts = [f"round {state.round}/{config.terms.rounds}", f"{replies} of {config.sites} sites"]
    parts += [f"missing {', '.join(f'{name} ({why})' for name, why in sorted(told.items()))}"] if told else []
    bounds = [f"{record.bound:.3g}" for _, record in records if record.bound is not None]
    parts += [f"threshold {' '.join(bounds)}"] if bounds else []
    parts += [_spent(config, state), f"{seconds:.0f} s, ETA {seconds_left / 60:.1f} min"]
    return "  ".join(parts)


def _spent(config: RunConfig, state: ServerState) -> str:
    if not config.terms.private:
        return NO_GUARANTEE
    known = sorted((name, record.epsilon) for name, record in state.sites.items() if record.epsilon is not None)
    each = ", ".join(f"{name} {spent:.3g}" for name, spent in known)
    largest = largest_epsilon(config, state) or 0.0
    return f"epsilon {largest:.3g} ({each}) of {config.terms.epsilon:g} per {units_of(state)}"


def round_row(state: ServerState, told: Mapping[str, str], seconds: float) -> str:
    """The same as a line of JSON."""
    sites = {name: asdict(record) for name, record in sorted(state.sites.items())}
    return json.dumps({"round": state.round, "seconds": round(seconds, 2), "missing": dict(told), "sites": sites})
