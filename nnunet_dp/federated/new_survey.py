"""Plans from the sites' own fingerprint: what a coordinator asks for, and what becomes of the answer.

    folder/begun.json                   what was typed; written first, so that a run can go on from its survey
    folder/survey/survey.json           what sites are asked (``survey.SurveyConfig``)
    folder/survey/fingerprint.json      sum of what they released

Whether anything would be heard is decided by public numbers, before anybody is asked.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.federated import survey
from nnunet_dp.federated.new_run import RunOptions, Surveyed
from nnunet_dp.federated.notes import read_note
from nnunet_dp.fingerprint import deviation_of, estimates, fewest_patients, is_audible, mechanism_for
from nnunet_dp.nnunet_federated import PublicPlans, Sites
from nnunet_dp.nnunet_fingerprint import ballot_for, plans_from
from nnunet_dp.replacing import replacing

SURVEY, BEGUN = "survey", "begun.json"
Asked = TypeVar("Asked")
Ask = Callable[[Path, Path], None]
"""Runs the survey whose configuration is given, in the folder given, to its end."""


def plans_by_survey(
    folder: Path,
    asked: Any,
    options: RunOptions,
    dataset_json: Mapping[str, Any],
    sites: Sites,
    names: Sequence[str],
    ask: Ask,
) -> Surveyed:
    """nnU-Net's plans for the sites' fingerprint.

    Args:
        folder: of the run; a survey that was begun or finished there is gone on with.
        asked: what was typed beside the options (``simulate.Simulation``, ``deployment.Asked``).
        options: of the run.
        dataset_json: public description of the sites' datasets.
        sites: public facts about them.
        names: of the sites, where only they may take part.
        ask: runs a survey.

    Raises:
        UsageRefusal: where noise would drown the answer.
        Refusal: where a survey ended otherwise than by finishing, or its answer drowned all the same.
    """
    place = folder / SURVEY
    if not (place / survey.CONFIG).is_file():
        config = _new_survey(options, dataset_json, sites, names)
        place.mkdir(parents=True, exist_ok=True)
        _write_begun(folder, asked, options)
        with replacing(place / survey.CONFIG) as stream:
            stream.write(config.model_dump_json(indent=1).encode())
    config = survey.read_survey(place / survey.CONFIG)
    if not (place / survey.RESULT).is_file():
        ask(place / survey.CONFIG, place)
    result = survey.read_result(place)
    return Surveyed(_plans(config, result, sites), config.run, result.claims)


def _new_survey(
    options: RunOptions, dataset_json: Mapping[str, Any], sites: Sites, names: Sequence[str]
) -> survey.SurveyConfig:
    assert options.fingerprint_share is not None
    ballot, budget, share = ballot_for(dataset_json), sites.budget(options.epsilon), options.fingerprint_share
    if options.schedule.mode.private:
        deviation = deviation_of(ballot, mechanism_for(budget, share).noise_multiplier, sites.number)
        if not is_audible(ballot, sites.units, deviation):
            raise UsageRefusal(
                f"a fingerprint for {share:g} of the budget of epsilon {options.epsilon:g} at {sites.number} sites "
                f"should have about {fewest_patients(ballot, deviation)} patients or more to be heard above its noise, "
                f"found {sites.units}: leave --fingerprint out, plans from phantoms cost nothing"
            )
    return survey.SurveyConfig(
        run=secrets.token_hex(8),
        mode=options.schedule.mode,
        epsilon=options.epsilon,
        delta=options.delta,
        share=share,
        numbers=ballot.size,
        dataset_json=dict(dataset_json),
        sites=sites.number,
        allowed_sites=tuple(names),
        minimum_replies=options.replies_of(sites.number),
        go_on_without=options.go_on_without,
        wait_for_sites_s=options.wait_for_sites_s,
        prepare_timeout_s=options.prepare_timeout_s,
        retries=options.retries,
    )


def _plans(config: survey.SurveyConfig, result: survey.SurveyResult, sites: Sites) -> PublicPlans:
    ballot = ballot_for(config.dataset_json)
    deviation = result.deviation(ballot, config.epsilon, config.share)
    heard = len(result.sites)
    patients = max(1, round(sites.units * heard / sites.number))
    found = estimates(ballot, np.asarray(result.votes), patients, deviation)
    plans = plans_from(found, config.dataset_json, sites.units)
    if not config.mode.private:
        return PublicPlans(plans, f"exact statistics of the images of {heard} sites", False)
    spent = max(claim.epsilon for claim in result.claims.values())
    source = f"a noised fingerprint of {heard} sites, charged to them: epsilon {spent:.3g} by itself"
    return PublicPlans(plans, source, True)


# ---- what was typed ----------------------------------------------------------------------------------------------


def _write_begun(folder: Path, asked: Any, options: RunOptions) -> None:
    """Keep what was typed, until the run's configuration says it all."""
    parts = (TypeAdapter(type(part)).dump_python(part, mode="json") for part in (asked, options))
    with replacing(folder / BEGUN) as stream:
        stream.write(json.dumps(list(parts), indent=1).encode())


def read_begun(folder: Path, kind: type[Asked]) -> tuple[Asked, RunOptions]:
    """What was typed for the run in this folder."""
    return read_note(folder / BEGUN, tuple[kind, RunOptions])
