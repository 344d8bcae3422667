"""A new run's folder: what a coordinator decides before anybody is asked anything.

    folder/config.json                     the run's configuration (``run_config.RunConfig``)
    folder/initial_weights.safetensors     weights of round 0
    folder/public_starts/                  the public start, where one was made here

All of it follows from public facts: how many sites and patients, a dataset.json, plans (from phantoms by default), the
options given. The same folder is what ``coordinator`` resumes in.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.numpy import save_file

from nnunet_dp.accounting import LARGEST_EPSILON
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.federated.protocol import LARGEST_SHARE, Mode, Terms
from nnunet_dp.federated.run_config import Claim
from nnunet_dp.nnunet_federated import (
    PublicPlans,
    RunPlan,
    Schedule,
    Sites,
    federated_model_folder,
    initial_weights,
    model_plans_name,
    named_plans,
    plan_run,
    plans_from_phantoms,
)
from nnunet_dp.plans import write_json
from nnunet_dp.sections import NOT_COVERED, RAW_FINGERPRINT
from nnunet_dp.workers import Progress

CONFIG, WEIGHTS = "config.json", "initial_weights.safetensors"
Say = Callable[[str], None]
LEFT_TO_SITES = (
    "charges_for_the_same_patient_at_other_sites",
    "when_and_whether_a_site_replies",
    "whether_a_sites_images_could_be_measured_and_preprocessed",
)


@dataclass(frozen=True)
class RunOptions:
    """What the coordinator was asked for.

    Attributes:
        schedule: mode, rounds and what is set by hand.
        epsilon: of each site's patients, from this run.
        delta: at most; None leaves it to the sites.
        configuration: nnU-Net's name; None follows the dataset's description.
        percentile: that the threshold follows.
        plans: name of the plans in the first dataset's preprocessed folder; None takes public ones.
        plans_from: DATASET or DATASET:PLANS, whose plans are taken.
        no_patient_overlap: declared: no site's patient is in that dataset, so its plans are public.
        phantom: kind that public plans are made from; None takes the one that resembles the description.
        phantom_shape: voxels of these phantoms; None is realistic.
        weights: of the sites in the mean; None is equal.
        minimum_replies: with which a round counts; None is a majority.
        round_timeout_s: seconds.
        prepare_timeout_s: seconds.
        retries: of a round with too few replies.
        wait_for_sites_s: seconds, for the sites to come.
        go_on_without: whether the run may begin without a site that declined to prepare.
        client_level: epsilon, delta and bound of a second guarantee, for whole sites.
        fingerprint_share: of mu^2, for a fingerprint of the sites' own images; None takes plans that cost nothing.
        output: name of the model's plans; None follows mode, budget and run.
        seed: of random weights.
    """

    schedule: Schedule
    epsilon: float = 8.0
    delta: float | None = None
    configuration: str | None = None
    percentile: float = 50.0
    plans: str | None = None
    plans_from: str | None = None
    no_patient_overlap: bool = False
    phantom: str | None = None
    phantom_shape: tuple[int, ...] | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    minimum_replies: int | None = None
    round_timeout_s: float = 3600.0
    prepare_timeout_s: float = 21_600.0
    retries: int = 2
    wait_for_sites_s: float = 600.0
    go_on_without: bool = False
    client_level: tuple[float, float, float] | None = None
    output: str | None = None
    seed: int = 0
    fingerprint_share: float | None = None

    def refuse_senseless(self, sites: int) -> None:
        """Refuse options that mean nothing or contradict each other.

        Args:
            sites: expected.

        Raises:
            UsageRefusal: saying which to give.
        """
        if not 0 < self.epsilon <= LARGEST_EPSILON:
            raise UsageRefusal(f"--epsilon should lie in (0, {LARGEST_EPSILON:g}], found {self.epsilon:g}: 8 is usual")
        if sites < 1:
            raise UsageRefusal("a run should have at least one site")
        if not 1 <= self.replies_of(sites) <= sites:
            raise UsageRefusal(f"--minimum-replies should lie in 1..{sites}, found {self.minimum_replies}")
        if self.plans is not None and self.plans_from is not None:
            raise UsageRefusal("-p and --plans-from exclude each other: give one of them")
        if self.fingerprint_share is not None and (self.plans or self.plans_from or self.phantom):
            raise UsageRefusal("--fingerprint makes plans from the sites' images: leave -p, --plans-from, --phantom")
        share = self.fingerprint_share
        if share is not None and not 0 < share <= LARGEST_SHARE:
            raise UsageRefusal(f"--fingerprint-share should lie in (0, {LARGEST_SHARE}], found {share:g}: 0.1 is usual")
        if self.no_patient_overlap and self.plans_from is None:
            raise UsageRefusal("--no-patient-overlap is about the dataset of --plans-from: give that, too, or neither")
        if any(not 0 < weight < float("inf") for weight in self.weights.values()):
            raise UsageRefusal("--weights should be above 0: for instance --weights north=1,south=2")
        wrong = self.output is not None and (not self.output or "__" in self.output or "/" in self.output)
        if wrong:
            raise UsageRefusal(f"-o should be a name without folder and double underscore, found {self.output!r}")

    def replies_of(self, sites: int) -> int:
        """Replies with which a round counts."""
        return sites // 2 + 1 if self.minimum_replies is None else self.minimum_replies


def find_plans(options: RunOptions, dataset_json: Mapping[str, Any], datasets: Sequence[str] = ()) -> PublicPlans:
    """The plans that a run begins from.

    Args:
        options: of the run.
        dataset_json: public description of the sites' datasets.
        datasets: the sites' own, where they lie on this machine; ``-p`` is looked for at the first.

    Raises:
        UsageRefusal: where there are none.
    """
    if options.plans_from is not None:
        dataset, _, name = options.plans_from.partition(":")
        found = named_plans(dataset, name or "nnUNetPlans")
        declared = ", declared: no patient overlaps" if options.no_patient_overlap else ""
        return PublicPlans(found.plans, found.source + declared, options.no_patient_overlap)
    if options.plans is not None:
        if not datasets:
            raise UsageRefusal("-p names plans of a site's dataset on this machine: give --plans-from DATASET:PLANS")
        return named_plans(datasets[0], options.plans)
    return plans_from_phantoms(dataset_json, options.phantom, shape=options.phantom_shape)


@dataclass(frozen=True)
class Surveyed:
    """What a survey of the sites came to.

    Attributes:
        plans: that follow their fingerprint.
        run: identifier that it was charged to.
        claims: what each site spent on it.
    """

    plans: PublicPlans
    run: str
    claims: Mapping[str, Claim]


@dataclass(frozen=True)
class NewRun:
    """A run that can be submitted.

    Attributes:
        folder: the coordinator's.
        run: identifier.
        model_folder: where the final model will lie.
    """

    folder: Path
    run: str
    model_folder: Path

    @property
    def config(self) -> Path:
        """File of the configuration."""
        return self.folder / CONFIG


def make_run(
    folder: Path,
    options: RunOptions,
    dataset_json: Mapping[str, Any],
    configuration: str,
    sites: Sites,
    found: PublicPlans | Surveyed,
    model_dataset: str,
    starts: Path,
    device: torch.device,
    processes: int = 1,
    names: Sequence[str] = (),
    say: Say = lambda text: None,
    progress: Progress | None = None,
) -> NewRun:
    """Decide a run and write its folder.

    Args:
        folder: the coordinator's; made where absent.
        options: of the run.
        dataset_json: public description of the sites' datasets.
        configuration: nnU-Net's name.
        sites: public facts about them.
        found: plans to begin from.
        model_dataset: DatasetXXX_Name, under which nnU-Net will know the model.
        starts: folder that keeps public starts.
        device: where a public start is made.
        processes: that draw phantoms.
        names: of the sites, where only they may take part.
        say: told what is going on.
        progress: told about the public start.

    Raises:
        UsageRefusal: for options without sense, and a model that exists.
    """
    options.refuse_senseless(sites.number)
    run, claims = secrets.token_hex(8), {}
    if isinstance(found, Surveyed):
        found, run, claims = found.plans, found.run, found.claims
    schedule = options.schedule
    plan = plan_run(found.plans, configuration, dataset_json, sites, options.epsilon, schedule)
    name = options.output or model_plans_name(schedule.mode, options.epsilon, run)
    model = federated_model_folder(model_dataset, schedule.mode, name, configuration)
    if (model / "fold_all").exists():
        raise UsageRefusal(f"{model.name} exists already below {model_dataset}: name another with -o, or move it away")
    terms = _terms(run, options, configuration, plan.sha256, plan.bound, plan.learning_rate, plan.momentum)
    say(f"plans {plan.plans['plans_name']} from {found.source}: {plan.parameters:,} parameters")
    weights, provenance = initial_weights(plan, starts, device, processes, options.seed, say, progress)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS)
    public = {"inputs": _inputs(found, provenance), "not_covered": not_covered(found)}
    public |= {"surveyed": {name: claim.model_dump() for name, claim in claims.items()}}
    write_json(_config(options, terms, plan, folder, sites.number, model, names) | public, folder / CONFIG)
    return NewRun(folder, run, model)


def _terms(
    run: str, options: RunOptions, configuration: str, sha256: str, bound: float, rate: float, momentum: float
) -> Terms:
    schedule = options.schedule
    try:
        return Terms(
            run=run,
            mode=schedule.mode,
            epsilon=options.epsilon,
            delta=options.delta,
            rounds=schedule.rounds,
            local_steps=schedule.local_steps,
            configuration=configuration,
            plans_sha256=sha256,
            sampling_probability=schedule.sampling_probability,
            noise=schedule.noise,  # pyright: ignore (validated)
            percentile=options.percentile,
            bound=bound,
            learning_rate=rate,
            momentum=momentum,
        )
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, part['loc']))} {part['msg']}".strip() for part in error.errors())
        raise UsageRefusal(f"the run's terms should be possible, found: {wrong}") from None


def _inputs(found: PublicPlans, provenance: Mapping[str, Any]) -> dict[str, str]:
    """What plans and first weights are a function of, in words."""
    caution = "" if found.public else "; they may come from private images, by nnU-Net's fingerprint"
    return {"plans": found.source + caution, "first weights": ", ".join(f"{k} {v}" for k, v in provenance.items())}


def not_covered(found: PublicPlans) -> tuple[str, ...]:
    """What the guarantee of a run leaves out; plans that are public are no longer among it."""
    left = [what for what in NOT_COVERED if not (found.public and what == RAW_FINGERPRINT)]
    return (*left, *LEFT_TO_SITES)


def _config(
    options: RunOptions,
    terms: Terms,
    plan: RunPlan,
    folder: Path,
    sites: int,
    model: Path,
    names: Sequence[str],
) -> dict[str, Any]:
    from nnunet_dp.federated.run_config import RunConfig

    given = {
        "terms": terms.model_dump(mode="json"),
        "plans": plan.plans,
        "dataset_json": plan.dataset_json,
        "initial_weights": str(folder / WEIGHTS),
        "sites": sites,
        "weights": dict(options.weights),
        "allowed_sites": list(names),
        "minimum_replies": options.replies_of(sites),
        "go_on_without": options.go_on_without,
        "wait_for_sites_s": options.wait_for_sites_s,
        "round_timeout_s": options.round_timeout_s,
        "prepare_timeout_s": options.prepare_timeout_s,
        "retries": options.retries,
        "client_level": _client_level(options),
        "model_folder": str(model),
    }
    try:
        return RunConfig.model_validate(given).model_dump(mode="json")
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, part['loc']))} {part['msg']}".strip() for part in error.errors())
        raise UsageRefusal(f"the run should be possible, found: {wrong}") from None


def _client_level(options: RunOptions) -> dict[str, float] | None:
    if options.client_level is None:
        return None
    return dict(zip(("epsilon", "delta", "bound"), options.client_level, strict=True))


__all__ = ["CONFIG", "Mode", "NewRun", "RunOptions", "Schedule", "Sites", "find_plans", "make_run"]
