"""The survey before a run: the coordinator asks every site for its noised fingerprint and adds them up, once.

    sites come -> query -> fingerprint -> sum of the votes on disk -> plans (``nnunet_fingerprint.plans_from``)

It knows no engine, as ``coordinator`` knows none. A site that declines ends the survey, unless the run may begin
without it; nothing was spent by sites that were not asked, and what others released is sent again for nothing as long
as the run's identifier is the same.

Formal guarantee:
    What is added are releases that the sites' ledgers were charged for; the sum is post-processing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from pydantic import Field, ValidationError

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.federated.aggregation import Rejection, fault_of_claim, fault_of_header, parse
from nnunet_dp.federated.enrolment import Enrolment, Message, Transport, explained
from nnunet_dp.federated.protocol import LARGEST_SHARE, Code, FingerprintRequest, Frozen, Hex, Mode, Reply, SiteName
from nnunet_dp.federated.run_config import Agreement, Claim
from nnunet_dp.fingerprint import Ballot, deviation_of, mechanism_for
from nnunet_dp.replacing import replacing

CONFIG, RESULT = "survey.json", "fingerprint.json"
VOTES = "votes"
Say = Callable[[str], None]


class SurveyConfig(Agreement):
    """What is asked of all sites before plans are made.

    Attributes:
        run: that the plans will be for.
        mode: of the run.
        epsilon: of the run, per site.
        delta: at most; None leaves it to the sites.
        share: of mu^2, for the fingerprint.
        numbers: that each site releases (``Ballot.size``).
    """

    run: Hex
    mode: Mode
    epsilon: float = Field(gt=0)
    delta: float | None = Field(default=None, gt=0, lt=1)
    share: float = Field(gt=0, le=LARGEST_SHARE)
    numbers: int = Field(gt=0)


class SurveyResult(Frozen):
    """What came back, added up.

    Attributes:
        votes: sum over the sites.
        sites: that were heard.
        claims: what each release cost by itself, by the site's name; none without a guarantee.
    """

    votes: tuple[float, ...]
    sites: tuple[SiteName, ...]
    claims: dict[SiteName, Claim]

    def deviation(self, ballot: Ballot, epsilon: float, share: float) -> float:
        """Standard deviation of the noise on each sum; 0 without a guarantee."""
        budgets = (PrivacyBudget(epsilon=epsilon, delta=claim.delta) for claim in self.claims.values())
        each = (deviation_of(ballot, mechanism_for(budget, share).noise_multiplier) for budget in budgets)
        return sum(deviation**2 for deviation in each) ** 0.5


class Survey:
    """Asks and adds.

    Args:
        config: of the survey.
        transport: to the sites.
        folder: gets the result.
        say: told who answered.
    """

    def __init__(self, config: SurveyConfig, transport: Transport, folder: Path, say: Say = print) -> None:
        self._config, self._folder = config, Path(folder)
        self._asking = _Asking(config, transport, say)

    def run(self) -> SurveyResult:
        """Everything that was released, added up and written.

        Raises:
            Refusal: when too few sites came or one declined.
        """
        self._asking.begin(self._config.needed)
        heard = self._asking.heard
        private = self._config.mode.private
        result = SurveyResult(
            votes=tuple(np.sum([heard[name][1] for name in sorted(heard)], axis=0).tolist()),
            sites=tuple(sorted(heard)),
            claims={name: _claim(reply) for name, (reply, _) in heard.items()} if private else {},
        )
        with replacing(self._folder / RESULT) as stream:
            stream.write(result.model_dump_json(indent=1).encode())
        return result


def _claim(reply: Reply) -> Claim:
    """``fault_of_claim`` has looked that all of it is there."""
    return Claim.model_validate({"epsilon": reply.epsilon, "delta": reply.delta, "unit": reply.unit})


class _Asking(Enrolment):
    """Enrolment whose preparation is the fingerprint."""

    doing = "fingerprint: {names} measure their images"
    done = "fingerprint of: {names}"

    def __init__(self, config: SurveyConfig, transport: Transport, say: Say) -> None:
        super().__init__(config, config.run, transport, say)
        self._survey = config
        self.heard: dict[str, tuple[Reply, np.ndarray]] = {}

    def _prepare(self, names: Mapping[str, str], timeout_s: float) -> None:
        config, began = self._survey, time.monotonic()
        request = FingerprintRequest(
            run=config.run,
            mode=config.mode,
            epsilon=config.epsilon,
            delta=config.delta,
            share=config.share,
            dataset_json=config.dataset_json,
        ).model_dump_json()
        replies = self.exchange("fingerprint", {node: (request, {}) for node in names}, timeout_s)
        for node, name in names.items():
            found = self._judged(replies.get(node), name, time.monotonic() - began)
            if isinstance(found, str):
                final = found == explained(Code.settings_refuse)
                self._decline(node, f"{name} sent no fingerprint: {found}", final)
            else:
                self.heard[name] = found
                self._enter(node, name)

    def _judged(self, message: Message | None, name: str, seconds: float) -> tuple[Reply, np.ndarray] | str:
        """The reply and its votes, or what is wrong."""
        if message is None:
            return f"no reply after {seconds:.0f} s"
        reply = parse(message[0])
        if isinstance(reply, Rejection):
            return reply.value
        fault = fault_of_header(reply, self._survey.run, None, name)
        if fault is None and reply.code is not Code.ok:
            return explained(reply.code)
        fault = fault or (fault_of_claim(reply) if self._survey.mode.private else None)
        fault = fault or self._fault_of_votes(message[1])
        return fault.value if fault else (reply, np.asarray(message[1][VOTES], np.float64))

    def _fault_of_votes(self, arrays: Mapping[str, np.ndarray]) -> Rejection | None:
        if set(arrays) != {VOTES}:
            return Rejection.names
        votes = arrays[VOTES]
        if votes.shape != (self._survey.numbers,):
            return Rejection.shape
        if votes.dtype != np.float64:
            return Rejection.dtype
        return None if np.isfinite(votes).all() else Rejection.not_finite


def read_survey(file: Path) -> SurveyConfig:
    """A survey's configuration.

    Raises:
        UsageRefusal: for a file that is none.
    """
    try:
        return SurveyConfig.model_validate(json.loads(Path(file).read_text()))
    except (OSError, ValueError, ValidationError) as error:
        raise UsageRefusal(f"{Path(file).name} should be a survey's configuration ({type(error).__name__})") from None


def read_result(folder: Path) -> SurveyResult:
    """What a survey came to.

    Raises:
        Refusal: where it did not end.
    """
    try:
        return SurveyResult.model_validate_json((folder / RESULT).read_text())
    except (OSError, ValidationError) as error:
        raise Refusal(f"{RESULT} should be in {folder.name}, found none that reads ({type(error).__name__})") from None
