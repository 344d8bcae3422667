"""What coordinator and sites say to each other: one JSON header and named arrays each way, all of it closed.

A message is ``(kind, header, arrays)``; kind is ``query``, ``fingerprint``,
``prepare`` or ``train``; the header is the JSON of one of
the requests below. A reply is ``(header, arrays)`` with the JSON of a ``Reply``. A site never says anything else: no
counts, no losses, no texts, no Dice, no names of cases. What went wrong is one word of ``Code``; the reason is in the
site's own log.

    query         -> the site's declared name, its dataset.json's public part, versions
    fingerprint   budget and share -> the site's noised votes on spacing, size and intensities (optional)
    prepare       plans, dataset description and terms -> preprocessed, and the plans' hash
    train         terms, round and global weights -> the site's weights after its local steps

>>> terms = Terms(run="0a", mode="adp-fl", epsilon=8.0, rounds=20, plans_sha256="0" * 64, configuration="2d")
>>> terms.steps, terms.private, terms.rule
(20, True, 'quantile')
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

VERSION = 1
LARGEST_SHARE = 0.5
LARGEST_DELTA = 0.01  # of a site's claim: a chance of one in a hundred that nothing holds promises nothing
Arrays = Mapping[str, np.ndarray]
Kind = Literal["query", "fingerprint", "prepare", "train"]
KINDS: tuple[Kind, ...] = ("query", "fingerprint", "prepare", "train")

Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]+$", max_length=64)]
SiteName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,39}$")]
"""A site's public name; it becomes part of file names and of progress lines."""


class Mode(str, enum.Enum):
    """How sites train and what that guarantees."""

    fedavg = "fedavg"  # no privacy, for comparison
    dp_fedavg = "dp-fedavg"  # a fixed clipping bound
    adp_fl = "adp-fl"  # a bound that follows a privately counted percentile, noise scaled to it
    paper = "paper"  # the published way: a raw percentile of private norms; no guarantee

    @property
    def private(self) -> bool:
        """Whether it has a guarantee."""
        return self in (Mode.dp_fedavg, Mode.adp_fl)


class Code(str, enum.Enum):
    """Everything a site can say about how it went."""

    ok = "ok"
    budget_spent = "budget_spent"  # no further step fits: the site drops out, politely
    settings_refuse = "settings_refuse"  # the terms ask for more than the site's own settings allow
    version_mismatch = "version_mismatch"
    plans_mismatch = "plans_mismatch"  # not the plans this site has prepared
    not_prepared = "not_prepared"
    ledger_refuses = "ledger_refuses"
    busy = "busy"  # another message of this run is being worked on
    malformed = "malformed"  # the message itself was not understood
    failed = "failed"


class Frozen(BaseModel):
    """Immutable, closed, and without infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_enum_values=False)


class Terms(Frozen):
    """What a run asks of every site; public, the same for all, fixed before the first round.

    Attributes:
        run: identifier, hex.
        mode: see ``Mode``.
        epsilon: at most this for each site's patients, from this run.
        delta: at most this; None leaves it to the site's settings.
        rounds: rounds planned.
        local_steps: private steps of each site in each round.
        configuration: nnU-Net's name of it.
        plans_sha256: of the plans that all sites confirmed.
        sampling_probability: Poisson inclusion probability of each patient and step; 1 is the full batch.
        noise: of the gradient; ``laplace`` needs a true L1 clip and the full batch.
        percentile: of the norms that the threshold follows (adp-fl, paper).
        bound: fixed clipping bound (dp-fedavg), or the first threshold (adp-fl).
        learning_rate: of the first step, in units of the bound; plain SGD's own in ``fedavg``.
        momentum: of SGD; its state stays at the site between rounds.
        decay_power: of the polynomial decay over all planned steps.
    """

    protocol: Literal[1] = VERSION
    run: Hex
    mode: Mode
    epsilon: float = Field(gt=0)
    delta: float | None = Field(default=None, gt=0, lt=1)
    rounds: int = Field(gt=0, le=10_000)
    local_steps: int = Field(default=1, gt=0, le=10_000)
    configuration: str
    plans_sha256: Hex
    sampling_probability: float = Field(default=1.0, gt=0, le=1)
    noise: Literal["gaussian", "laplace"] = "gaussian"
    percentile: float = Field(default=50.0, gt=0, lt=100)
    bound: float = Field(default=1.0, ge=1e-6, le=1e8)  # far from where a product with it would underflow
    learning_rate: float = Field(default=0.3, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    decay_power: float = Field(default=0.9, ge=0)

    @model_validator(mode="after")
    def _refuse_what_has_no_price(self) -> Terms:
        if self.noise == "laplace" and self.sampling_probability < 1:
            raise ValueError("laplace noise should come with sampling probability 1: the full batch")
        return self

    @property
    def steps(self) -> int:
        """Private steps that every site's noise is calibrated for."""
        return self.rounds * self.local_steps

    @property
    def private(self) -> bool:
        """Whether the mode has a guarantee."""
        return self.mode.private

    @property
    def rule(self) -> str:
        """Clip rule of the private modes, by its name in ``clipping``; L1 ones for Laplace noise."""
        name = "quantile" if self.mode is Mode.adp_fl else "flat"
        return f"{name}_l1" if self.noise == "laplace" else name


class QueryRequest(Frozen):
    """Who are you, and what does your dataset look like?"""

    protocol: Literal[1] = VERSION
    run: Hex


class FingerprintRequest(Frozen):
    """Release your votes on the fingerprint (``nnunet_dp.fingerprint``).

    Attributes:
        run: that the plans are for; asked again, the same release is sent.
        mode: of the run; without a guarantee the votes are exact.
        epsilon: of the whole run.
        delta: at most this; None leaves it to the site's settings.
        share: of mu^2, for this release.
        dataset_json: the public part, as the coordinator understands it; compared with the site's own.
    """

    protocol: Literal[1] = VERSION
    run: Hex
    mode: Mode
    epsilon: float = Field(gt=0)
    delta: float | None = Field(default=None, gt=0, lt=1)
    share: float = Field(gt=0, le=LARGEST_SHARE)
    dataset_json: dict[str, Any]


class PrepareRequest(Frozen):
    """Preprocess with these plans.

    Attributes:
        plans: nnU-Net's plans of the run (without a private section: the site adds its own).
        dataset_json: the public part, as the coordinator understands it; compared with the site's own.
        configuration: to preprocess.
        plans_sha256: of ``plans`` as canonical JSON (``plans.json_sha256``).
        terms: of the run; a site that they ask too much of declines before it preprocesses. None asks nothing.
    """

    protocol: Literal[1] = VERSION
    run: Hex
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    plans_sha256: Hex
    terms: Terms | None = None

    @model_validator(mode="after")
    def _refuse_other_terms(self) -> PrepareRequest:
        mine = (self.run, self.configuration, self.plans_sha256)
        if self.terms and (self.terms.run, self.terms.configuration, self.terms.plans_sha256) != mine:
            raise ValueError("terms should be those of the same run, configuration and plans")
        return self


class TrainRequest(Frozen):
    """Take your local steps from these global weights (the message's arrays).

    Attributes:
        terms: of the run; must be the same in every round.
        round: 0, 1, 2, ...
        weights_sha256: of the global weights (``arrays_sha256``).
    """

    protocol: Literal[1] = VERSION
    terms: Terms
    round: int = Field(ge=0)
    weights_sha256: Hex


class Reply(Frozen):
    """Everything a site ever answers.

    Attributes:
        code: how it went.
        site: declared name.
        run: of the request.
        round: of the request; train only.
        dataset_json: the public part (``nnunet.public_dataset_json`` without numTraining); query only.
        versions: of nnunet_dp and nnunetv2; query only.
        plans_sha256: prepare and train.
        epsilon: spent by this run at this site so far, from its ledger: a function of schedule and charges only.
        delta: of that epsilon.
        unit: of that epsilon.
        bound: noised threshold after the round (adp-fl); a release.
    """

    protocol: Literal[1] = VERSION
    code: Code
    site: SiteName
    run: Hex
    round: int | None = Field(default=None, ge=0)
    dataset_json: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    plans_sha256: Hex | None = None
    epsilon: float | None = Field(default=None, ge=0)
    delta: float | None = Field(default=None, gt=0, lt=1)
    unit: str | None = Field(default=None, max_length=40)
    bound: float | None = Field(default=None, gt=0)


def arrays_sha256(arrays: Arrays) -> str:
    """Digest of named arrays: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
