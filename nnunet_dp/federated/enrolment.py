"""Who takes part in a run: nodes of the engine become sites, by name.

    a node comes -> query (who are you, do datasets and versions fit?) -> prepare (the run's plans) -> it is asked

A site that comes back may be another node with the same name: it is asked again who it is and whether it has prepared
the plans, which costs it nothing. What a node says once and for all (other labels, settings that refuse) is not asked
again; silence and ``failed`` are, as often as a round is. A site whose budget is spent drops out, as it would in a
round: that is nobody's mistake, and the run begins without it where enough are left.

Design note: ``busy`` means that the site works on an earlier message of this run, one of a coordinator that died, say.
It is waited for, within the time that the message has; what it did meanwhile it sends then, without a new charge.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from nnunet_dp.errors import BudgetRefusal, Refusal
from nnunet_dp.federated.aggregation import DROPS_OUT, Rejection, fault_of_header, parse
from nnunet_dp.federated.protocol import Arrays, Code, Kind, PrepareRequest, QueryRequest, Reply
from nnunet_dp.federated.run_config import Agreement, RunConfig

Message = tuple[str, Arrays]
QUERY_TIMEOUT_S = 600.0
FINAL = (Code.settings_refuse, Code.version_mismatch, Code.plans_mismatch, Code.malformed)
"""Answers that asking again would not change."""
ADVICE = {
    Code.budget_spent: "its dataset's budget has no room for a step of this run",
    Code.settings_refuse: "the terms ask for more than its own settings allow",
    Code.version_mismatch: "it speaks another version of the protocol",
    Code.plans_mismatch: "the run's plans do not fit its dataset, or it has prepared others",
    Code.ledger_refuses: "its ledger has to be restored first",
    Code.busy: "it still works on an earlier message",
}


class Transport(Protocol):
    """Carries messages to sites; nodes are the engine's own names."""

    def sites(self, minimum: int, timeout_s: float) -> list[str]:
        """Nodes that are there, as soon as there are ``minimum``, or after ``timeout_s``."""
        ...

    def exchange(self, kind: Kind, messages: Mapping[str, Message], timeout_s: float) -> Mapping[str, Message]:
        """Replies by node; a node without one in time is missing."""
        ...


class Enrolment:
    """The nodes of one run; what they prepare is told by a subclass.

    Args:
        config: what sites are welcomed by.
        run: identifier.
        transport: to the sites.
        say: told who declined.

    Attributes:
        names: of the nodes that are prepared.
        silent: nodes that missed their last message.
        declined: nodes that do not take part, and why.
        dropped_out: names of sites whose budget was spent before they could prepare: the run begins without them.
    """

    busy_pause_s = 5.0
    meeting_pause_s = 1.0
    waiting_line_s = 15.0
    doing = "preparing: {names} (the first time, sites preprocess their images)"
    done = "prepared: {names}"

    def __init__(self, config: Agreement, run: str, transport: Transport, say: Callable[[str], None]) -> None:
        self.names: dict[str, str] = {}
        self.silent: set[str] = set()
        self.declined: dict[str, str] = {}
        self.dropped_out: set[str] = set()
        self._config, self._run, self._transport, self._say = config, run, transport, say
        self._final: set[str] = set()  # nodes that are not asked again
        self._nameless: set[str] = set()  # nodes that did not say who they are
        self._tries: Counter[str] = Counter()

    def begin(self, needed: int) -> None:
        """Wait for the sites, ask who they are, have them prepare; no site prepares unless all fit.

        Args:
            needed: sites at least.

        Raises:
            Refusal: when there are too few, two nodes have one name, or a site declined that the run may not begin
                without; with names.
            BudgetRefusal: when there are too few because budgets are spent.
        """
        config = self._config
        met = self._meet()
        self._refuse_without_the_declined(len(met))
        if len(met) < needed:
            raise Refusal(
                f"{config.sites} sites should take part, {needed} at least; found {len(met)} after "
                f"{config.wait_for_sites_s:.0f} s: start them with `nnunet-dp fed site`, then go on with --resume"
            )
        self._say(self.doing.format(names=", ".join(sorted(met.values()))))
        self._prepare(met, config.prepare_timeout_s)
        self._refuse_without_the_declined(len(met))
        if len(self.names) < needed:
            raise self._too_few(needed)
        self._say(self.done.format(names=", ".join(sorted(self.names.values()))))

    def _meet(self) -> dict[str, str]:
        """Names of the nodes that fit, as soon as all sites have come or declined, or the time for that is over.

        A node that was killed is listed until it has missed its heartbeats: it says nothing, and its site comes as
        another node. So silence counts against the run only while sites are missing.
        """
        config, met, asked = self._config, dict[str, str](), set[str]()
        end = time.monotonic() + config.wait_for_sites_s
        query_s = min(QUERY_TIMEOUT_S, config.prepare_timeout_s)
        told, told_at = -1, 0.0
        while True:
            left = max(0.0, end - time.monotonic())
            nodes = self._transport.sites(config.sites, min(self.waiting_line_s, left))
            met |= self._query([node for node in nodes if node not in asked], query_s, met)
            asked |= set(nodes)
            if len(met) + len(self._final) >= config.sites or time.monotonic() >= end:
                return met
            if len(met) != told or time.monotonic() >= told_at + self.waiting_line_s:
                told, told_at = len(met), time.monotonic()
                self._say_who_is_missing(met, end - told_at)
            time.sleep(self.meeting_pause_s)

    def _say_who_is_missing(self, met: Mapping[str, str], left_s: float) -> None:
        names = f" ({', '.join(sorted(met.values()))})" if met else ""
        self._say(
            f"waiting for sites: {len(met)} of {self._config.sites} connected{names}; for {left_s:.0f} s more"
        )

    def _refuse_without_the_declined(self, met: int) -> None:
        counted = (node for node in self.declined if node not in self._nameless or met < self._config.sites)
        why = "; ".join(self.declined[node] for node in counted)
        if why and not self._config.go_on_without:
            raise Refusal(f"{why}: mend that and go on with --resume, or let the run begin without (--go-on-without)")

    def _too_few(self, needed: int) -> Refusal:
        found = f"{needed} sites at least should have prepared, found {len(self.names)}"
        if not self.dropped_out:
            return Refusal(found)
        return BudgetRefusal(
            f"{found}; no budget is left at {', '.join(sorted(self.dropped_out))}: begin a new run without them, or "
            "ask for less with a smaller --epsilon"
        )

    def welcome(self, nodes: Sequence[str], query_s: float, prepare_s: float) -> None:
        """Query and prepare nodes that are new; a known name moves to a new node only when its old one is gone.

        Args:
            nodes: that are there.
            query_s: to wait for an answer to the query.
            prepare_s: to wait for preprocessing.
        """
        fresh = [node for node in nodes if node not in self.names and self._may_be_asked(node)]
        if not fresh:
            return
        held = {name for node, name in self.names.items() if node in nodes and node not in self.silent}
        found = self._query(fresh, query_s)
        self._prepare({node: name for node, name in found.items() if name not in held}, prepare_s)

    def _may_be_asked(self, node: str) -> bool:
        return node not in self._final and self._tries[node] <= self._config.retries

    def _decline(self, node: str, why: str, final: bool) -> None:
        self._tries[node] += 1
        self.declined[node] = why
        if final:
            self._final.add(node)
        self._say(why)

    # ---- query -----------------------------------------------------------------------------------------------------

    def _query(
        self, nodes: Sequence[str], timeout_s: float, met: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Names of the nodes whose datasets and versions fit; ``met`` before in the beginning, when names are unique.

        Raises:
            Refusal: in the beginning, for two nodes of one name.
        """
        request = QueryRequest(run=self._run).model_dump_json()
        replies = self.exchange("query", {node: (request, {}) for node in nodes}, timeout_s)
        introduced = {node: self._introduced(node, replies.get(node)) for node in nodes}
        found = {node: reply for node, reply in introduced.items() if reply is not None}
        for node in self._doubles(found, met):
            self._decline(node, f"{found.pop(node).site} is the name of two sites", final=False)
        for node, reply in list(found.items()):
            different = difference(reply, self._config.dataset_json)
            if different:
                self._decline(node, f"{found.pop(node).site} differs: {different}", final=True)
        return {node: reply.site for node, reply in found.items()}

    def _introduced(self, node: str, message: Message | None) -> Reply | None:
        """A reply that gives an admitted name."""
        reply = parse(message[0]) if message is not None else None
        if not isinstance(reply, Reply) or fault_of_header(reply, self._run, None, None):
            why = "no reply" if reply is None else "another run" if isinstance(reply, Reply) else reply.value
            self._nameless.add(node)
            self._decline(node, f"node {node} did not say who it is ({why})", final=False)
        elif reply.code is not Code.ok:
            self._decline(node, f"{reply.site} declines: {explained(reply.code)}", final=reply.code in FINAL)
        elif self._config.allowed_sites and reply.site not in self._config.allowed_sites:
            known = ", ".join(self._config.allowed_sites)
            self._decline(node, f"{reply.site} is not one of the sites of this run ({known})", final=True)
        else:
            return reply
        return None

    def _doubles(self, found: Mapping[str, Reply], met: Mapping[str, str] | None) -> list[str]:
        """Nodes that share a name."""
        often = Counter([*(reply.site for reply in found.values()), *(met or {}).values()])
        doubled = sorted(name for name, times in often.items() if times > 1)
        if doubled and met is not None:
            raise Refusal(
                f"every site should have a name of its own, found twice: {', '.join(doubled)}; give each its own "
                "`name` in its settings, then go on with --resume"
            )
        return [node for node, reply in found.items() if reply.site in doubled]

    # ---- prepare ---------------------------------------------------------------------------------------------------

    def _prepare(self, names: Mapping[str, str], timeout_s: float) -> None:
        """Ask these nodes to get ready; enter or decline each."""
        raise NotImplementedError

    def _drop_out(self, node: str, name: str, why: str) -> None:
        self.dropped_out.add(name)
        self._final.add(node)
        self._say(f"{name} drops out: {why}")

    def _enter(self, node: str, name: str) -> None:
        self._nameless.discard(node)
        self.names = {other: known for other, known in self.names.items() if known != name} | {node: name}
        self.declined.pop(node, None)
        del self._tries[node]

    # ---- messages --------------------------------------------------------------------------------------------------

    def exchange(self, kind: Kind, messages: Mapping[str, Message], timeout_s: float) -> dict[str, Message]:
        """Replies by node; a site that is busy is asked again until ``timeout_s`` is over."""
        if not messages:
            return {}
        end = time.monotonic() + timeout_s
        replies = dict(self._transport.exchange(kind, messages, timeout_s))
        while busy := [node for node, reply in replies.items() if _is_busy(reply)]:
            if time.monotonic() + self.busy_pause_s >= end:
                break
            time.sleep(self.busy_pause_s)
            again = {node: messages[node] for node in busy}
            replies |= self._transport.exchange(kind, again, max(0.0, end - time.monotonic()))
        return replies


class Preparation(Enrolment):
    """Enrolment for a run whose plans are known: sites preprocess."""

    def __init__(self, config: RunConfig, transport: Transport, say: Callable[[str], None]) -> None:
        super().__init__(config, config.terms.run, transport, say)
        self._plans, self._terms, self._round_timeout_s = config.plans, config.terms, config.round_timeout_s

    def look_around(self, minimum: int) -> None:
        """Welcome nodes that came, or came back; nobody waits longer for them than for a round."""
        limit = self._round_timeout_s
        nodes = self._transport.sites(minimum, min(60.0, limit))
        self.welcome(nodes, min(60.0, limit), min(limit, self._config.prepare_timeout_s))

    def _prepare(self, names: Mapping[str, str], timeout_s: float) -> None:
        if not names:
            return
        request = PrepareRequest(
            run=self._run,
            plans=self._plans,
            dataset_json=self._config.dataset_json,
            configuration=self._terms.configuration,
            plans_sha256=self._terms.plans_sha256,
            terms=self._terms,
        ).model_dump_json()
        replies = self.exchange("prepare", {node: (request, {}) for node in names}, timeout_s)
        for node, name in names.items():
            code = self._judged(replies.get(node), name, timeout_s)
            why = explained(code) if isinstance(code, Code) else code
            if code is Code.ok:
                self._enter(node, name)
            elif code in DROPS_OUT:
                self._drop_out(node, name, why)
            else:
                self._decline(node, f"{name} did not prepare: {why}", final=code in FINAL)

    def _judged(self, message: Message | None, name: str, timeout_s: float) -> Code | str:
        """How preparing went, or why the reply cannot be used."""
        if message is None:
            return f"no reply within {timeout_s:.0f} s"
        reply = parse(message[0])
        if isinstance(reply, Rejection):
            return reply.value
        fault = fault_of_header(reply, self._run, None, name)
        if fault is not None:
            return fault.value
        other = reply.code is Code.ok and reply.plans_sha256 != self._terms.plans_sha256
        return Code.plans_mismatch if other else reply.code


def _is_busy(message: Message) -> bool:
    reply = parse(message[0])
    return isinstance(reply, Reply) and reply.code is Code.busy


def explained(code: Code) -> str:
    """A code, and what it means for the run."""
    return f"{code.value} ({ADVICE[code]})" if code in ADVICE else code.value


# ---- what has to be alike ----------------------------------------------------------------------------------------


def difference(reply: Reply, dataset_json: Mapping[str, Any]) -> str | None:
    """Between a site's dataset or versions and the run's, in public words.

    Args:
        reply: to the query.
        dataset_json: the run's public description.

    Returns:
        The first difference; None where all fits. ``file_ending`` and nnunetv2 are compared where both sides have one.
    """
    theirs = reply.dataset_json or {}
    pairs = {key: (theirs.get(key), dataset_json.get(key)) for key in ("labels", "regions_class_order")}
    pairs["channels"] = _channels(theirs), _channels(dataset_json)
    if "file_ending" in dataset_json:
        pairs["file_ending"] = theirs.get("file_ending", dataset_json["file_ending"]), dataset_json["file_ending"]
    pairs |= _versions(reply.versions or {})
    for name, (found, expected) in pairs.items():
        if found != expected:
            return f"{name} {found!r:.200}, this run has {expected!r:.200}"
    return None


def _channels(description: Mapping[str, Any]) -> Any:
    """In their order, which nnU-Net takes from the file's."""
    found = description.get("channel_names") or description.get("modality") or {}
    return list(found.items()) if isinstance(found, Mapping) else found


def _versions(theirs: Mapping[str, str]) -> dict[str, tuple[str | None, str]]:
    from importlib.metadata import PackageNotFoundError, version

    from nnunet_dp import __version__

    pairs: dict[str, tuple[str | None, str]] = {"nnunet_dp": (theirs.get("nnunet_dp"), __version__)}
    try:
        ours = version("nnunetv2")
    except PackageNotFoundError:
        return pairs
    return {**pairs, "nnunetv2": (theirs.get("nnunetv2", ours), ours)}
