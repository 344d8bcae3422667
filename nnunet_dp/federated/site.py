"""A site: one message in, one reply out, under the site's own settings and its own ledger.

    query         declared name, public part of dataset.json, versions; imports neither torch nor nnU-Net
    fingerprint   noised votes on spacing, size and intensities, charged first (``site_fingerprint``)
    prepare       plans are admitted (a closed list), the budget is looked at, the site's cases are preprocessed
    train         the site's own private plan, its ledger, its local steps (``site_round``)

``handle`` never raises. What went wrong is one word of ``Code``; the reason goes to ``federated_log.txt`` in the
dataset's results folder, which never leaves the site.

Formal guarantee:
    A reply is a function of the request, of the site's settings, of public facts about its dataset (its description,
    the unit's name, the size of delta), of whether its images could be measured, and preprocessed with each of at most
    ``max_plans`` plans, of whether its ledger has room for a run's first step (the charges in it are public numbers),
    and of releases that its ledger was charged for first; in the modes without a guarantee, which the site's settings
    must allow, of its data. How long a reply takes is not part of it.

Design note: Flower starts a process per message and may send one twice. Nothing lives in memory; whoever comes while
another message is worked on is told ``busy``.
"""

from __future__ import annotations

import json
import re
import traceback
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from nnunet_dp import __version__
from nnunet_dp.errors import BudgetRefusal, Refusal
from nnunet_dp.federated.protocol import (
    VERSION,
    Arrays,
    Code,
    FingerprintRequest,
    Frozen,
    Mode,
    PrepareRequest,
    QueryRequest,
    Reply,
    TrainRequest,
    arrays_sha256,
)
from nnunet_dp.federated.site_settings import SiteSettings
from nnunet_dp.federated.site_store import Declined, Store

_PUBLIC = (
    "channel_names", "modality", "labels", "regions_class_order", "file_ending", "overwrite_image_reader_writer",
)  # fmt: skip
_AGREED = ("labels", "regions_class_order")
Request = TypeVar("Request", bound=Frozen)
Answer = tuple[dict[str, Any], dict[str, np.ndarray]]


def handle(kind: str, header: str, arrays: Arrays, settings: SiteSettings) -> tuple[str, dict[str, np.ndarray]]:
    """Answer one message.

    Args:
        kind: one of ``protocol.KINDS``.
        header: JSON of the kind's request.
        arrays: global weights of ``train``; empty otherwise.
        settings: the site's own.

    Returns:
        JSON of a ``Reply``, and the site's weights where it trained.
    """
    try:
        fields, sent = _answer(kind, header, arrays, settings)
        reply = Reply(code=Code.ok, site=settings.name, **fields)
    except Exception as error:
        code = _code_of(error)
        _log(settings, kind, code, error)
        more = error.fields if isinstance(error, Declined) else {}
        reply, sent = Reply(code=code, site=settings.name, **_echo(header), **more), {}
    return reply.model_dump_json(exclude_none=True), sent


def _answer(kind: str, header: str, arrays: Arrays, settings: SiteSettings) -> Answer:
    if kind == "query":
        return _query(_read(QueryRequest, header), settings)
    if kind == "fingerprint":
        return _fingerprint(_read(FingerprintRequest, header), settings)
    if kind == "prepare":
        return _prepare(_read(PrepareRequest, header), settings)
    if kind == "train":
        return _train(_read(TrainRequest, header), arrays, settings)
    raise Declined(Code.malformed, "the kind of message is unknown")


def _read(request: type[Request], header: str) -> Request:
    try:
        content = json.loads(header)
    except ValueError:
        raise Declined(Code.malformed, "the header is not JSON") from None
    if isinstance(content, dict) and content.get("protocol", VERSION) != VERSION:
        raise Declined(Code.version_mismatch, f"protocol {content['protocol']!r:.20}, this site speaks {VERSION}")
    try:
        return request.model_validate_json(header)
    except ValidationError as error:
        where = ", ".join(".".join(map(str, part["loc"])) for part in error.errors())
        raise Declined(Code.malformed, f"wrong fields of the header: {where}") from None


# ---- the three kinds ---------------------------------------------------------------------------------------------


def _query(request: QueryRequest, settings: SiteSettings) -> Answer:
    versions = {"nnunet_dp": __version__, "nnunetv2": version("nnunetv2")}
    description = public_part(Store.of(settings).dataset_json())
    return {"run": request.run, "dataset_json": description, "versions": versions}, {}


def _fingerprint(request: FingerprintRequest, settings: SiteSettings) -> Answer:
    store = Store.of(settings)
    _refuse_settings(request.mode, request.epsilon, settings)
    refuse_other_description(store.dataset_json(), request.dataset_json)
    with store.held(), settings.as_environment():
        from nnunet_dp.federated.site_fingerprint import release_fingerprint

        return release_fingerprint(request, settings, store)


def _prepare(request: PrepareRequest, settings: SiteSettings) -> Answer:
    from nnunet_dp.federated.site_plans import admit
    from nnunet_dp.plans import json_sha256

    store, sha256, configuration = Store.of(settings), request.plans_sha256, request.configuration
    if json_sha256(request.plans) != sha256:
        raise Declined(Code.malformed, "the plans do not have the hash that the message gives")
    new = None if store.run_record(request.run) else request.terms  # one that has begun is answered round by round
    if new is not None:
        _refuse_settings(new.mode, new.epsilon, settings)
    own = store.dataset_json()
    refuse_other_description(own, request.dataset_json)
    try:
        plans = admit(request.plans, configuration, store.dataset, f"federated_{sha256[:16]}_{configuration}")
    except Refusal as refusal:
        raise Declined(Code.plans_mismatch, str(refusal)) from None
    with store.held(), settings.as_environment():
        from nnunet_dp.federated.site_budget import refuse_spent
        from nnunet_dp.nnunet_site import find_units, preprocess, refuse_other_reading

        try:
            refuse_other_reading(plans, configuration, own)
        except Refusal as refusal:
            raise Declined(Code.plans_mismatch, str(refusal)) from None
        if new is not None:
            refuse_spent(new, settings, store)
        if not store.is_prepared(sha256, configuration):
            store.note_attempt(sha256, configuration, settings.max_plans)
            preprocess(plans, configuration, store.raw, store.preprocessed, settings.processes)
            find_units(settings, store.preprocessed)
            store.write_prepared(sha256, configuration, plans)
    return {"run": request.run, "plans_sha256": sha256}, {}


def _train(request: TrainRequest, arrays: Arrays, settings: SiteSettings) -> Answer:
    terms, store = request.terms, Store.of(settings)
    if request.round >= terms.rounds:
        raise Declined(Code.malformed, f"round {request.round} of a run of {terms.rounds}")
    _refuse_settings(terms.mode, terms.epsilon, settings)
    if arrays_sha256(arrays) != request.weights_sha256:
        raise Declined(Code.malformed, "the global weights do not have the hash that the message gives")
    store.prepared(terms.plans_sha256, terms.configuration)  # declined before anything slow is imported
    with store.held(), settings.as_environment():
        from nnunet_dp.federated.site_round import take_round

        return take_round(request, arrays, settings, store)


def _refuse_settings(mode: Mode, epsilon: float, settings: SiteSettings) -> None:
    """What a run asks beyond the site's own settings; nothing was looked at or charged yet."""
    if not mode.private and not settings.allow_no_guarantee:
        raise Declined(Code.settings_refuse, f"{mode.value} has no guarantee: allow_no_guarantee is false")
    if mode.private and epsilon > settings.max_epsilon:
        raise Declined(
            Code.settings_refuse, f"the run asks for epsilon {epsilon:g}, max_epsilon is {settings.max_epsilon:g}"
        )


# ---- what is public ----------------------------------------------------------------------------------------------


def public_part(dataset_json: dict[str, Any]) -> dict[str, Any]:
    """What a site tells of its dataset: channels, labels, regions, file ending; no name, no counts, no files."""
    return {key: dataset_json[key] for key in _PUBLIC if key in dataset_json}


def refuse_other_description(own: dict[str, Any], asked: dict[str, Any]) -> None:
    """Decline plans that were made for other channels, labels or regions.

    Raises:
        Declined: ``plans_mismatch``, naming the field.
    """
    channels = [list((d.get("channel_names") or d.get("modality") or {}).items()) for d in (own, asked)]
    different = [key for key in _AGREED if own.get(key) != asked.get(key)]
    if different or channels[0] != channels[1]:
        named = ", ".join(different or ["channel_names"])
        raise Declined(Code.plans_mismatch, f"the coordinator's dataset.json differs from this site's in {named}")


# ---- when something goes wrong -----------------------------------------------------------------------------------


def _code_of(error: Exception) -> Code:
    if isinstance(error, Declined):
        return error.code
    if isinstance(error, BudgetRefusal):
        return Code.budget_spent
    if isinstance(error, Refusal):
        from nnunet_dp.charges import LedgerError

        return Code.ledger_refuses if isinstance(error, LedgerError) else Code.failed
    return Code.failed


def _echo(header: str) -> dict[str, Any]:
    """The request's own run and round for a declined message; nothing else."""
    try:
        content = json.loads(header)
        run = (content.get("terms") or content).get("run", "0")
        number = content.get("round")
    except (ValueError, AttributeError, RecursionError):
        return {"run": "0"}
    valid = isinstance(run, str) and re.fullmatch(r"[0-9a-f]{1,64}", run) is not None
    whole = type(number) is int and number >= 0
    return {"run": run if valid else "0", "round": number if whole else None}


def _log(settings: SiteSettings, kind: str, code: Code, error: Exception) -> None:
    reason = str(error) if isinstance(error, (Declined, Refusal)) else "".join(traceback.format_exception(error))
    try:
        Store.of(settings).log(f"{kind!r:.20}: {code.value}: {reason}")
    except Exception:  # without a results folder there is nowhere to write to; the answer goes out all the same
        return
