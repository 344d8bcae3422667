"""What one run is, as a file: the terms for all sites, and how long the coordinator waits for whom.

>>> from nnunet_dp.federated.protocol import Terms
>>> terms = Terms(run="0a", mode="adp-fl", epsilon=8.0, rounds=20, plans_sha256="0" * 64, configuration="2d")
>>> config = RunConfig(terms=terms, plans={}, dataset_json={}, initial_weights="w", sites=4, model_folder="m")
>>> config.needed, config.weight_of("clinic_a")
(3, 1.0)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.federated.protocol import Frozen, SiteName, Terms


class ClientLevel(Frozen):
    """A whole site as the unit, protected from whoever sees the model; the coordinator itself is trusted.

    Attributes:
        epsilon: of the run, per site.
        delta: of it.
        bound: L2 bound of what one site may change in one round.
    """

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    bound: float = Field(gt=0)


class Claim(Frozen):
    """What a site says it spent.

    Attributes:
        epsilon: by itself.
        delta: of it.
        unit: of it.
    """

    epsilon: float = Field(ge=0)
    delta: float = Field(gt=0, lt=1)
    unit: str


class Agreement(Frozen):
    """By what sites are welcomed; public, the same for all.

    Attributes:
        dataset_json: public description of everybody's dataset.
        sites: expected; public, fixed.
        allowed_sites: names that may take part; empty for any.
        minimum_replies: with which a round counts; None is a majority. Sites whose budget is spent are not waited for.
        go_on_without: whether it may begin without a site that declined.
        wait_for_sites_s: for the sites to come, at the beginning.
        prepare_timeout_s: for work on all images.
        retries: where too few replied.
    """

    dataset_json: dict[str, Any]
    sites: int = Field(gt=0)
    allowed_sites: tuple[SiteName, ...] = ()
    minimum_replies: int | None = Field(default=None, gt=0)
    go_on_without: bool = False
    wait_for_sites_s: float = Field(default=600.0, ge=0)
    prepare_timeout_s: float = Field(default=21_600.0, gt=0)
    retries: int = Field(default=2, ge=0)

    @property
    def needed(self) -> int:
        """Replies with which a round counts, as long as all sites take part."""
        return self.minimum_replies or self.sites // 2 + 1


class RunConfig(Agreement):
    """A run.

    Attributes:
        terms: for every site.
        plans: as sent, for datasets described by ``dataset_json``.
        initial_weights: safetensors file of the global weights of round 0.
        weights: of each site in the mean, by name: public numbers, fixed before the first round; equal without.
        round_timeout_s: for the replies of one round.
        average_share: window of the average of the weights, as a share of the rounds.
        client_level: a second guarantee, for whole sites.
        model_folder: TRAINER__PLANS__CONFIGURATION, to be written in the end.
        surveyed: what sites spent on the fingerprint; they count even where they take no further part.
        inputs: public inputs in words, for the model's federated.json.
        not_covered: what the guarantee leaves out.
    """

    terms: Terms
    plans: dict[str, Any]
    initial_weights: str
    weights: dict[SiteName, float] = Field(default_factory=dict)
    round_timeout_s: float = Field(default=3600.0, gt=0)
    average_share: float = Field(default=0.1, gt=0, le=1)
    client_level: ClientLevel | None = None
    model_folder: str
    surveyed: dict[SiteName, Claim] = Field(default_factory=dict)
    inputs: dict[str, str] = Field(default_factory=dict)
    not_covered: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _refuse_senseless(self) -> RunConfig:
        if self.needed > self.sites:
            raise ValueError(f"minimum_replies should be at most the {self.sites} sites, found {self.needed}")
        if any(weight <= 0 for weight in self.weights.values()):
            raise ValueError("weights should be positive")
        if self.client_level and self.weights:
            raise ValueError("client_level divides by the number of sites: leave weights out")
        return self

    @property
    def agreed(self) -> str:
        """Digest of what is fixed before the first round beside the terms: how the sites' weights become the model."""
        fixed = self.model_dump(mode="json", include={"sites", "weights", "average_share", "client_level"})
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()

    def weight_of(self, site: str) -> float:
        """Its public weight."""
        return self.weights.get(site, 1.0)


def read_config(file: Path) -> RunConfig:
    """A run's configuration.

    Raises:
        UsageRefusal: for a file that is none, naming the fields.
    """
    try:
        return RunConfig.model_validate(json.loads(Path(file).read_text()))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
        raise UsageRefusal(f"{Path(file).name} should be a run's configuration, found {wrong}") from None
    except (OSError, ValueError) as error:
        raise UsageRefusal(f"{Path(file).name} should be a run's configuration ({type(error).__name__})") from None
