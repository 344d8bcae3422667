"""The coordinator of a run: round after round, and what remains when it ends.

    sites come -> query -> prepare -> (train -> mean -> state on disk) x rounds -> model

It knows no engine: a ``Transport`` carries messages; ``enrolment`` knows who takes part, ``progress`` has the words.
What it writes goes to the run's folder:

    server_state.safetensors   after each round; a coordinator that died goes on there
    progress.jsonl             a line for each round
    federated_result.json      in the end

Formal guarantee:
    Nothing is computed from the sites' data here but means of what they released, with weights that were fixed before
    (and, with ``client_level``, a second noise).

Design note: a round that ends with too few replies is asked for again with the same weights: sites that had trained
send what they have, uncharged. What sites said they spent is kept even where their weights could not be used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from nnunet_dp.errors import BudgetRefusal, Refusal, UsageRefusal
from nnunet_dp.federated.aggregation import (
    DROPS_OUT,
    Rejection,
    Shapes,
    fault_of_claim,
    fault_of_header,
    fault_of_weights,
    parse,
    shapes_of,
    weighted_mean,
)
from nnunet_dp.federated.alone import alone_in
from nnunet_dp.federated.client_level import ClientLevelMean
from nnunet_dp.federated.enrolment import Message, Preparation, Transport
from nnunet_dp.federated.progress import Result, result_of, round_line, round_row
from nnunet_dp.federated.protocol import Arrays, Code, Reply, TrainRequest, arrays_sha256
from nnunet_dp.federated.run_config import RunConfig
from nnunet_dp.federated.server_state import ServerState, SiteRecord, digest, read_state, write_state
from nnunet_dp.replacing import replacing

PROGRESS, RESULT = "progress.jsonl", "federated_result.json"
Say = Callable[[str], None]
WriteModel = Callable[[RunConfig, Arrays, Mapping[str, Any], int], None]


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
        self._say, self._write_model = say, write_model
        self._enrolment = Preparation(config, transport, say)
        self._client_level: ClientLevelMean | None = None

    def run(self) -> Result:
        """All rounds that are left, then the model.

        Raises:
            Refusal: when the run cannot begin, another coordinator works in the folder, or a round had too few
                replies; what was finished is on disk, and the model of the last finished round is written.
        """
        with alone_in(self.folder, "coordinator"):
            return self._run()

    def _run(self) -> Result:
        state = self._open()
        began, first = time.monotonic(), state.round
        if not self._is_over(state):
            self._enrolment.begin(self._needed(state))
        ended: Refusal | None = None
        while not self._is_over(state) and ended is None:
            started = time.monotonic()
            state, told, ended = self._round(state)
            write_state(state, self.folder)
            if ended is None:
                left = (time.monotonic() - began) / max(1, state.round - first) * (self.terms.rounds - state.round)
                self._report(state, told, time.monotonic() - started, left)
        result = self._finish(state, complete=ended is None)
        if ended is not None and not isinstance(ended, BudgetRefusal):
            raise type(ended)(f"{ended}. {self._kept(state)}")
        return result

    # ---- beginning -------------------------------------------------------------------------------------------------

    def _open(self) -> ServerState:
        state = read_state(self.folder, self.terms)
        if state is not None:
            self._refuse_other_agreement(state)
            self._say(f"going on with run {self.terms.run} after round {state.round} of {self.terms.rounds}")
        else:
            weights = load_file(self.config.initial_weights)
            surveyed = {
                name: SiteRecord(epsilon=claim.epsilon, delta=claim.delta, unit=claim.unit)
                for name, claim in self.config.surveyed.items()
            }
            state = ServerState(digest(self.terms), 0, weights, weights, surveyed, self.config.agreed)
            write_state(state, self.folder)
        if self.config.client_level:
            self._client_level = ClientLevelMean(
                self.config.client_level, self.terms.rounds, self.config.sites, self.folder, self.terms.run
            )
            self._client_level.refuse_lost(state.round, state.ledger)
        return state

    def _refuse_other_agreement(self, state: ServerState) -> None:
        if state.agreed not in ("", self.config.agreed):
            raise UsageRefusal(
                f"the run in {self.folder.name} should go on with the number of sites, weights and client-level budget "
                "that it began with, found others: restore its config.json, or start a new run in another --folder"
            )

    # ---- one round -------------------------------------------------------------------------------------------------

    def _round(self, state: ServerState) -> tuple[ServerState, dict[str, str], Refusal | None]:
        """The next state, what happened to the sites whose weights were not used, and why the run ends, if it does.

        The round does not advance when the last site's budget is spent, or the run ends.
        """
        tries, missing, told = 1 + self.config.retries, "", {}
        for attempt in range(tries):
            used, state, told = self._ask(state)
            if self._everybody_left(state):
                return state, told, None
            if len(used) >= self._needed(state):
                try:
                    return self._advanced(state, used), told, None
                except Refusal as refusal:  # of the client-level budget or ledger
                    return state, told, refusal
            missing = "; ".join(f"{site}: {why}" for site, why in sorted(told.items())) or "nobody is there"
            needed = f"{len(used)} replies, {self._needed(state)} needed ({missing})"
            self._say(f"round {state.round + 1}: {needed}; try {attempt + 1} of {tries}")
        return state, told, Refusal(f"round {state.round + 1} had too few replies in {tries} tries ({missing})")

    def _ask(self, state: ServerState) -> tuple[dict[str, Arrays], ServerState, dict[str, str]]:
        """Weights that can be used, the state with what sites told of themselves, and why others cannot."""
        self._enrolment.look_around(self._needed(state))
        state, names = self._without_dropped_out(state), self._enrolment.names
        asked = {node: name for node, name in names.items() if not self._record(state, name).dropped_out}
        request = TrainRequest(
            terms=self.terms, round=state.round, weights_sha256=arrays_sha256(state.weights)
        ).model_dump_json()
        messages = {node: (request, state.weights) for node in asked}
        replies = self._enrolment.exchange("train", messages, self.config.round_timeout_s)
        self._enrolment.silent = set(asked) - set(replies)
        used: dict[str, Arrays] = {}
        records, told = dict(state.sites), {}
        for node, name in asked.items():
            reply, fault = self._judged(replies.get(node), name, state.round, shapes_of(state.weights))
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
        """A believable reply, and why its weights cannot be used, if they cannot.

        What a site says it spent is believed even where its weights are rejected: they were released all the same.
        """
        if message is None:
            return None, "no reply in time"
        reply = parse(message[0])
        if isinstance(reply, Rejection):
            return None, f"rejected: {reply.value}"
        fault = fault_of_header(reply, self.terms.run, round, name)
        if fault is None and reply.code is not Code.ok:
            return reply, reply.code.value
        believed = reply if fault is None else None
        fault = fault or (fault_of_claim(reply) if self.terms.private else None)
        fault = fault or fault_of_weights(message[1], expected)
        return believed, f"rejected: {fault.value}" if fault else None

    def _advanced(self, state: ServerState, used: Mapping[str, Arrays]) -> ServerState:
        head = None
        if self._client_level is not None:
            weights = self._client_level.next_weights(state.weights, used, state.round)
            head = self._client_level.head
        else:
            weights = weighted_mean(used, {site: self.config.weight_of(site) for site in used})
        window = 1 - 1 / max(2.0, self.config.average_share * self.terms.rounds)
        old = min(state.round / (state.round + 1), window)  # as ``dpsgd.Schedule.average_decay``, over rounds
        average = {
            name: (old * state.average[name].astype(np.float64) + (1 - old) * weights[name]).astype(np.float32)
            for name in weights
        }
        sites = {name: replace(r, rounds=r.rounds + (name in used)) for name, r in state.sites.items()}
        return replace(state, round=state.round + 1, weights=weights, average=average, sites=sites, ledger=head)

    # ---- who is left, what is said ---------------------------------------------------------------------------------

    def _record(self, state: ServerState, name: str) -> SiteRecord:
        return state.sites.get(name, SiteRecord())

    def _without_dropped_out(self, state: ServerState) -> ServerState:
        """The state that knows which sites had no budget left for the run's first step."""
        gone = {name: replace(self._record(state, name), dropped_out=True) for name in self._enrolment.dropped_out}
        return replace(state, sites={**state.sites, **gone})

    def _is_over(self, state: ServerState) -> bool:
        return state.round >= self.terms.rounds or self._everybody_left(state)

    def _everybody_left(self, state: ServerState) -> bool:
        gone = sum(record.dropped_out for record in state.sites.values())
        return gone > 0 and gone >= max(len(self._enrolment.names), len(state.sites))

    def _needed(self, state: ServerState) -> int:
        """Replies with which a round counts now: sites whose budget is spent are not waited for."""
        gone = sum(record.dropped_out for record in state.sites.values())
        return max(1, min(self.config.needed, self.config.sites - gone))

    def _report(self, state: ServerState, told: Mapping[str, str], seconds: float, seconds_left: float) -> None:
        self._say(round_line(self.config, state, told, seconds, seconds_left))
        with (self.folder / PROGRESS).open("a", encoding="utf-8") as stream:
            stream.write(round_row(state, told, seconds) + "\n")

    def _kept(self, state: ServerState) -> str:
        if state.round == 0:
            return "No round was finished"
        return f"The model of round {state.round} is in {Path(self.config.model_folder).name}; --resume goes on"

    # ---- end -------------------------------------------------------------------------------------------------------

    def _finish(self, state: ServerState, complete: bool) -> Result:
        result = result_of(self.config, state, complete, self._client_level.claim if self._client_level else None)
        if state.round > 0:
            self._write_model(self.config, state.average, result.as_dict(), state.round * self.terms.local_steps)
        with replacing(self.folder / RESULT) as stream:
            stream.write(json.dumps(result.as_dict(), indent=1).encode())
        return result


__all__ = ["PROGRESS", "RESULT", "Coordinator", "Result", "Transport", "write_nnunet_model"]
