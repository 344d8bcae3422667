"""The coordinator of a run: who takes part, round after round, what remains when it ends.

    sites come -> query -> prepare -> (train -> mean -> state on disk) x rounds -> model

It knows no engine: a ``Transport`` carries messages. What it writes goes to the run's folder:

    server_state.safetensors   after each round; a coordinator that died goes on there
    progress.jsonl             a line for each round
    federated_result.json      in the end

Formal guarantee:
    Nothing is computed from the sites' data here but means of what they released, with weights that were fixed before
    (and, with ``client_level``, a second noise).

Design note: a site that comes back is another node of the engine's with the same name; it is asked again who it is and
whether it has prepared the plans, which costs it nothing. A round that ends with too few replies is asked for again
with the same weights: sites that had trained send what they have, uncharged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import load_file

from nnunet_dp.errors import BudgetRefusal, Refusal
from nnunet_dp.federated.aggregation import (
    DROPS_OUT,
    Rejection,
    Shapes,
    fault_of_header,
    fault_of_weights,
    parse,
    shapes_of,
    weighted_mean,
)
from nnunet_dp.federated.client_level import ClientLevelMean
from nnunet_dp.federated.protocol import (
    Arrays,
    Code,
    Kind,
    PrepareRequest,
    QueryRequest,
    Reply,
    TrainRequest,
    arrays_sha256,
)
from nnunet_dp.federated.run_config import RunConfig
from nnunet_dp.federated.server_state import ServerState, SiteRecord, digest, read_state, write_state
from nnunet_dp.replacing import replacing

PROGRESS, RESULT = "progress.jsonl", "federated_result.json"
SUM = "costs add for a patient known to several sites"
Message = tuple[str, Arrays]
Say = Callable[[str], None]
WriteModel = Callable[[RunConfig, Arrays, Mapping[str, Any], int], None]


class Transport(Protocol):
    """Carries messages to sites; nodes are the engine's own names."""

    def sites(self, minimum: int, timeout_s: float) -> list[str]:
        """Nodes that are there, as soon as there are ``minimum``, or after ``timeout_s``."""
        ...

    def exchange(self, kind: Kind, messages: Mapping[str, Message], timeout_s: float) -> Mapping[str, Message]:
        """Replies by node; a node without one in time is missing."""
        ...


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
        client_level: epsilon and delta per site, where asked for.
        model_folder: nnU-Net's.
        inputs: public ones, in words.
        not_covered: what the guarantee leaves out.
        complete: whether all rounds were done.
    """

    run: str
    mode: str
    guarantee: str
    epsilon: float | None
    rounds: int
    sites: tuple[dict[str, Any], ...]
    model_folder: str
    complete: bool
    client_level: dict[str, float] | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    not_covered: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return json.loads(json.dumps(asdict(self)))


def write_nnunet_model(config: RunConfig, weights: Arrays, facts: Mapping[str, Any], steps: int) -> None:
    """As an ordinary nnU-Net model folder."""
    from nnunet_dp.nnunet_federated import write_model

    terms = config.terms
    write_model(
        Path(config.model_folder), config.plans, terms.configuration, config.dataset_json, weights, facts, terms.run,
        steps,
    )  # fmt: skip


class Coordinator:
    """One run.

    Args:
        config: of the run.
        transport: to the sites.
        folder: of the run.
        say: told what is going on, line by line; public facts only.
        write_model: called once in the end, and again only after a crash.
    """

    def __init__(
        self, config: RunConfig, transport: Transport, folder: Path, say: Say = print,
        write_model: WriteModel = write_nnunet_model,
    ) -> None:  # fmt: skip
        self.config, self.terms, self.folder = config, config.terms, Path(folder)
        self._transport, self._say, self._write_model = transport, say, write_model
        self._names: dict[str, str] = {}  # of the nodes that are prepared
        self._silent: set[str] = set()  # nodes that missed their last message
        self._declined: dict[str, str] = {}  # nodes that may not take part, and why
        self._client_level: ClientLevelMean | None = None

    def run(self) -> Result:
        """All rounds that are left, then the model.

        Raises:
            Refusal: when the run cannot begin, or a round had too few replies; what was finished is on disk, and the
                model of the last finished round is written.
        """
        state = self._open()
        expected, began, first = shapes_of(state.weights), time.monotonic(), state.round
        if state.round < self.terms.rounds and not self._everybody_left(state):
            self._gather(state)
        ended: Refusal | None = None
        while state.round < self.terms.rounds and not self._everybody_left(state) and ended is None:
            started = time.monotonic()
            try:
                state, told = self._round(state, expected)
            except Refusal as refusal:
                ended = refusal
                continue
            write_state(state, self.folder)
            done = max(1, state.round - first)
            left = (time.monotonic() - began) / done * (self.terms.rounds - state.round)
            self._report(state, told, time.monotonic() - started, left)
        result = self._finish(state, complete=ended is None)
        if isinstance(ended, BudgetRefusal):
            return result
        if ended is not None:
            raise type(ended)(f"{ended}. {self._kept(state)}")
        return result

    # ---- beginning -------------------------------------------------------------------------------------------------

    def _open(self) -> ServerState:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = read_state(self.folder, self.terms)
        if state is not None:
            self._say(f"going on with run {self.terms.run} after round {state.round} of {self.terms.rounds}")
        else:
            weights = load_file(self.config.initial_weights)
            state = ServerState(digest(self.terms), 0, weights, weights)
            write_state(state, self.folder)
        if self.config.client_level:
            self._client_level = ClientLevelMean(
                self.config.client_level, self.terms.rounds, self.config.sites, self.folder, self.terms.run
            )
        return state

    def _gather(self, state: ServerState) -> None:
        """Wait for the sites, ask who they are, have them prepare."""
        needed = self._needed(state)
        nodes = self._transport.sites(self.config.sites, self.config.wait_for_sites_s)
        if len(nodes) < needed:
            raise Refusal(
                f"{self.config.sites} sites should take part, {needed} at least; found {len(nodes)} after "
                f"{self.config.wait_for_sites_s:.0f} s: start them with `nnunet-dp fed site`, then go on with --resume"
            )
        self._welcome(nodes)
        if self._declined and not self.config.go_on_without:
            why = "; ".join(self._declined.values())
            raise Refusal(f"{why}: mend that, or let the run begin without (go_on_without)")
        if len(self._names) < needed:
            raise Refusal(f"{needed} sites at least should have prepared, found {len(self._names)}")
        self._say(f"prepared: {', '.join(sorted(self._names.values()))}")

    def _welcome(self, nodes: list[str]) -> None:
        """Query and prepare nodes that are new; a known name moves to a new node only when its old one is gone."""
        fresh = [node for node in nodes if node not in self._names and node not in self._declined]
        if not fresh:
            return
        held = {name for node, name in self._names.items() if node in nodes and node not in self._silent}
        names = {node: name for node, name in self._query(fresh).items() if name not in held}
        if names and not self._names:
            self._say(f"preparing: {', '.join(sorted(names.values()))} (the first time, sites preprocess their images)")
        request = PrepareRequest(
            run=self.terms.run,
            plans=self.config.plans,
            dataset_json=self.config.dataset_json,
            configuration=self.terms.configuration,
            plans_sha256=self.terms.plans_sha256,
        ).model_dump_json()
        messages = {node: (request, {}) for node in names}
        replies = self._transport.exchange("prepare", messages, self.config.prepare_timeout_s) if messages else {}
        for node, name in names.items():
            fault = self._fault_of_preparation(replies.get(node), name)
            if fault is None:
                self._names = {other: known for other, known in self._names.items() if known != name} | {node: name}
            else:
                self._decline(node, f"{name} did not prepare: {fault}")

    def _decline(self, node: str, why: str) -> None:
        self._declined[node] = why
        self._say(why)

    def _query(self, nodes: list[str]) -> dict[str, str]:
        """Names of the nodes whose datasets and versions fit."""
        request = QueryRequest(run=self.terms.run).model_dump_json()
        replies = self._transport.exchange(
            "query", {node: (request, {}) for node in nodes}, min(600.0, self.config.prepare_timeout_s)
        )
        found: dict[str, Reply] = {}
        for node in nodes:
            reply = parse(replies[node][0]) if node in replies else Rejection.header
            if isinstance(reply, Rejection) or fault_of_header(reply, self.terms.run, None, None):
                self._decline(node, f"node {node} did not say who it is")
            elif reply.code is not Code.ok:
                self._decline(node, f"{reply.site} declines: {reply.code.value}")
            elif self.config.allowed_sites and reply.site not in self.config.allowed_sites:
                self._decline(node, f"{reply.site} is not one of the sites of this run")
            else:
                found[node] = reply
        self._refuse_doubles(found)
        for node, reply in found.items():
            different = self._difference(reply)
            if different:
                self._decline(node, f"{reply.site} differs: {different}")
        return {node: reply.site for node, reply in found.items() if node not in self._declined}

    def _refuse_doubles(self, found: Mapping[str, Reply]) -> None:
        names = [reply.site for reply in found.values()]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise Refusal(f"every site should have a name of its own, found twice: {', '.join(doubled)}")

    def _difference(self, reply: Reply) -> str | None:
        """Between a site's dataset or versions and the run's, in public words."""
        from nnunet_dp import __version__

        theirs, ours = reply.dataset_json or {}, self.config.dataset_json
        for key in ("labels", "regions_class_order"):
            if theirs.get(key) != ours.get(key):
                return f"{key} {theirs.get(key)}, this run has {ours.get(key)}"
        channels = [list((told.get("channel_names") or told.get("modality") or {}).items()) for told in (theirs, ours)]
        if channels[0] != channels[1]:
            return f"channels {channels[0]}, this run has {channels[1]}"
        version = (reply.versions or {}).get("nnunet_dp")
        return f"nnunet_dp {version}, this run has {__version__}" if version != __version__ else None

    def _fault_of_preparation(self, message: Message | None, name: str) -> str | None:
        if message is None:
            return f"no reply within {self.config.prepare_timeout_s:.0f} s"
        reply = parse(message[0])
        if isinstance(reply, Rejection):
            return reply.value
        fault = fault_of_header(reply, self.terms.run, None, name)
        if fault is not None:
            return fault.value
        if reply.code is not Code.ok:
            return reply.code.value
        return None if reply.plans_sha256 == self.terms.plans_sha256 else Code.plans_mismatch.value

    # ---- one round -------------------------------------------------------------------------------------------------

    def _round(self, state: ServerState, expected: Shapes) -> tuple[ServerState, dict[str, str]]:
        """The next state, and what happened to the sites whose weights were not used.

        The round does not advance when the last site's budget is spent.
        """
        tries, missing = 1 + self.config.retries, ""
        for attempt in range(tries):
            used, state, told = self._ask(state, expected)
            if self._everybody_left(state):
                return state, told
            if len(used) >= self._needed(state):
                return self._advanced(state, used), told
            missing = "; ".join(f"{site}: {why}" for site, why in sorted(told.items())) or "nobody is there"
            needed = f"{len(used)} replies, {self._needed(state)} needed ({missing})"
            self._say(f"round {state.round + 1}: {needed}; try {attempt + 1} of {tries}")
        raise Refusal(f"round {state.round + 1} had too few replies in {tries} tries ({missing})")

    def _ask(self, state: ServerState, expected: Shapes) -> tuple[dict[str, Arrays], ServerState, dict[str, str]]:
        """Weights that can be used, the state with what sites told of themselves, and why others cannot."""
        self._welcome(self._transport.sites(self._needed(state), min(60.0, self.config.round_timeout_s)))
        asked = {node: name for node, name in self._names.items() if not self._record(state, name).dropped_out}
        request = TrainRequest(
            terms=self.terms, round=state.round, weights_sha256=arrays_sha256(state.weights)
        ).model_dump_json()
        messages = {node: (request, state.weights) for node in asked}
        replies = self._transport.exchange("train", messages, self.config.round_timeout_s)
        self._silent = set(asked) - set(replies)
        used: dict[str, Arrays] = {}
        records, told = dict(state.sites), {}
        for node, name in asked.items():
            reply, fault = self._judged(replies.get(node), name, state.round, expected)
            if fault is not None:
                told[name] = fault
            if reply is not None:
                dropped = reply.code in DROPS_OUT
                records[name] = replace(self._record(state, name).told(reply), dropped_out=dropped)
            if reply is not None and fault is None:
                used[name] = replies[node][1]
        gone = {name for name, record in records.items() if record.dropped_out}
        told |= {name: "not there" for name in set(records) - set(asked.values()) - gone}
        return used, replace(state, sites=records), told

    def _judged(
        self, message: Message | None, name: str, round: int, expected: Shapes
    ) -> tuple[Reply | None, str | None]:
        """A believable reply, and why its weights cannot be used, if they cannot."""
        if message is None:
            return None, "no reply in time"
        reply = parse(message[0])
        if isinstance(reply, Rejection):
            return None, f"rejected: {reply.value}"
        fault = fault_of_header(reply, self.terms.run, round, name)
        if fault is None and reply.code is not Code.ok:
            return reply, reply.code.value
        fault = fault or fault_of_weights(message[1], expected)
        return (None, f"rejected: {fault.value}") if fault else (reply, None)

    def _advanced(self, state: ServerState, used: Mapping[str, Arrays]) -> ServerState:
        if self._client_level is not None:
            weights = self._client_level.next_weights(state.weights, used, state.round)
        else:
            weights = weighted_mean(used, {site: self.config.weight_of(site) for site in used})
        window = 1 - 1 / max(2.0, self.config.average_share * self.terms.rounds)
        old = min(state.round / (state.round + 1), window)  # as ``dpsgd.Schedule.average_decay``, over rounds
        average = {
            name: (old * state.average[name].astype(np.float64) + (1 - old) * weights[name]).astype(np.float32)
            for name in weights
        }
        sites = {name: replace(r, rounds=r.rounds + (name in used)) for name, r in state.sites.items()}
        return replace(state, round=state.round + 1, weights=weights, average=average, sites=sites)

    # ---- who is left, what is said ---------------------------------------------------------------------------------

    def _record(self, state: ServerState, name: str) -> SiteRecord:
        return state.sites.get(name, SiteRecord())

    def _everybody_left(self, state: ServerState) -> bool:
        gone = sum(record.dropped_out for record in state.sites.values())
        return gone > 0 and gone >= max(len(self._names), len(state.sites))

    def _needed(self, state: ServerState) -> int:
        """Replies with which a round counts now: sites whose budget is spent are not waited for."""
        gone = sum(record.dropped_out for record in state.sites.values())
        return max(1, min(self.config.needed, self.config.sites - gone))

    def _report(self, state: ServerState, told: Mapping[str, str], seconds: float, left: float) -> None:
        records = sorted(state.sites.items())
        replies = sum(1 for name, record in records if name not in told and not record.dropped_out)
        parts = [f"round {state.round}/{self.terms.rounds}", f"{replies} of {self.config.sites} sites"]
        parts += [f"missing {', '.join(f'{name} ({why})' for name, why in sorted(told.items()))}"] if told else []
        bounds = [f"{record.bound:.3g}" for _, record in records if record.bound is not None]
        parts += [f"threshold {' '.join(bounds)}"] if bounds else []
        parts += [self._spent_line(state)]
        parts += [f"{seconds:.0f} s, ETA {left / 60:.1f} min"]
        self._say("  ".join(parts))
        row = {"round": state.round, "seconds": round(seconds, 2), "missing": dict(told)}
        row |= {"sites": {name: asdict(record) for name, record in records}}
        with (self.folder / PROGRESS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def _spent_line(self, state: ServerState) -> str:
        if not self.terms.private:
            return "NO GUARANTEE"
        known = sorted((name, record.epsilon) for name, record in state.sites.items() if record.epsilon is not None)
        each = ", ".join(f"{name} {spent:.3g}" for name, spent in known)
        largest = max((spent for _, spent in known), default=0.0)
        return f"epsilon {largest:.3g} ({each}) of {self.terms.epsilon:g}"

    def _kept(self, state: ServerState) -> str:
        if state.round == 0:
            return "No round was finished"
        return f"The model of round {state.round} is in {Path(self.config.model_folder).name}; --resume goes on"

    # ---- end -------------------------------------------------------------------------------------------------------

    def _finish(self, state: ServerState, complete: bool) -> Result:
        result = self._result(state, complete)
        if state.round > 0:
            self._write_model(self.config, state.average, result.as_dict(), state.round * self.terms.local_steps)
        with replacing(self.folder / RESULT) as stream:
            stream.write(json.dumps(result.as_dict(), indent=1).encode())
        return result

    def _result(self, state: ServerState, complete: bool) -> Result:
        private, mode = self.terms.private, self.terms.mode.value
        records = sorted(state.sites.items())
        spent = [record.epsilon for _, record in records if record.epsilon is not None]
        units = ", ".join(sorted({record.unit for _, record in records if record.unit})) or "patient"
        largest = max(spent) if private and spent else None
        words = f"epsilon {largest or 0:.4g} per {units}, the largest of the sites'; {SUM}"
        asked = self.config.client_level
        return Result(
            run=self.terms.run,
            mode=mode,
            guarantee=words if private else f"no guarantee: {mode} is for comparison, do not release its weights",
            epsilon=largest,
            rounds=state.round,
            sites=tuple(
                {
                    "name": name,
                    "epsilon_spent": record.epsilon if private else None,
                    "delta": record.delta if private else None,
                    "unit": record.unit,
                    "rounds": record.rounds,
                }
                for name, record in records
            ),
            model_folder=self.config.model_folder,
            complete=complete and state.round >= self.terms.rounds,
            client_level={"epsilon": self._client_level.epsilon, "delta": asked.delta}
            if asked and self._client_level
            else None,
            inputs=self.config.inputs,
            not_covered=self.config.not_covered,
        )
