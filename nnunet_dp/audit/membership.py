"""Membership inference: does a trained segmentation model tell who was in its training?

A pool of phantom patients (one slice through a hippocampus each); for each model every one of them is in by a fair coin
of its own, and an empty slot otherwise. Every training begins from one public start, learnt from other phantoms. The
attacker has the model, the patient's image and reference, and scores how well they go together:

======================  =============================================================================================
attack                  score
======================  =============================================================================================
loss                    minus nnU-Net's loss
loss_class_K            soft Dice of the class
boundary                minus cross-entropy at voxels of the reference's boundary
lira                    log-likelihood ratio of the loss under models with and without the patient (few shadows)
labels                  Dice of the predicted labels, as a released segmentation would show it
labels_fixed            the same after refinement by fixed rules: the largest component of each class
labels_exact            after rules from the members' masks without noise (not private)
labels_private          after rules that the run learnt privately (DP-Morph)
======================  =============================================================================================

LiRA (Carlini et al. 2022, arXiv:2112.03570): for each target the other models of the setting are the shadows, with one
variance for all patients, as they ask for where shadows are few. All models of a setting together are one mechanism in
which each coin moves one model; the one-run bound of ``statistics`` therefore holds for all coins together.

Intervals of rates and of the AUC treat the pairs (model, patient) as independent; the patients of one model share it,
so that these intervals are too narrow rather than too wide. The bound of epsilon makes no such assumption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from dp_accounting.dp_event import ComposedDpEvent, DpEvent, SelfComposedDpEvent
from scipy import ndimage, stats
from torch import Tensor, nn
from torch.nn import functional

from nnunet_dp import shape_votes
from nnunet_dp.accounting import PrivacyBudget, calibrate, gaussian_mu
from nnunet_dp.attacker import true_positive_rate
from nnunet_dp.audit import statistics
from nnunet_dp.audit.builds import CLASSES, ballot
from nnunet_dp.audit.statistics import OneRun
from nnunet_dp.batched_gradients import Batched
from nnunet_dp.charges import epsilon_of, events_of
from nnunet_dp.clipping import AutoS
from nnunet_dp.dpsgd import Execution, PrivacyPlan, PrivateTraining, Schedule
from nnunet_dp.gradients import Record
from nnunet_dp.ledger import Ledger, LedgerEntry
from nnunet_dp.mechanisms import SubsampledGaussian
from nnunet_dp.morphology import KeepLargest, Morphology
from nnunet_dp.nnunet_audit import dice_and_cross_entropy, small_network
from nnunet_dp.phantoms import KINDS, Patient
from nnunet_dp.planning import MORPHOLOGY_SHARE
from nnunet_dp.refinement import refine
from nnunet_dp.run import LEDGER
from nnunet_dp.shape_votes import Ballot, questions_for
from nnunet_dp.workers import Progress, in_order

SPACING_MM = (1.0, 1.0)
SHAPE = (16, 28, 24)  # voxels of a phantom, of which one slice is taken
PUBLIC_PATIENTS = 24
FALSE_POSITIVE_RATES = (0.01, 0.05)
BOOTSTRAPS = 500
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Attacked:
    """What is trained and attacked; part of the protocol.

    Attributes:
        patients: in the pool.
        models: trained of each setting.
        steps: of a private training, full batch.
        learning_rate: of it at epsilon 8, in units of the bound; smaller claims, whose noise is larger, take
            proportionally shorter steps.
        start_iterations: of the public start.
        iterations: of the training without privacy, which is meant to remember its patients.
        batch: patients of such an iteration.
        features: of each stage of the network.
        guessed: share of the patients that the one-run bound guesses about, the extremes of each model.
        delta: of the private settings.
        confidence: of every interval and bound.
    """

    patients: int = 64
    models: int = 8
    steps: int = 30
    learning_rate: float = 0.3
    start_iterations: int = 150
    iterations: int = 400
    batch: int = 8
    features: tuple[int, ...] = (8, 16)
    guessed: float = 0.25
    delta: float = 1e-5
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Refuse fewer models than LiRA can work with."""
        if self.models < 3 or self.patients < 8:
            raise statistics.UsageRefusal(
                f"membership inference needs at least 3 models and 8 patients, found {self.models} and {self.patients}"
            )


@dataclass(frozen=True)
class Model:
    """One trained model as the attacker sees it.

    Attributes:
        included: [patients], the coins.
        scores: attack -> [patients].
        charges: lines of its ledger; none without privacy.
    """

    included: npt.NDArray[np.bool_] = field(repr=False)
    scores: dict[str, Array] = field(repr=False)
    charges: tuple[LedgerEntry, ...] = field(repr=False)


def attack_settings(
    epsilons: Sequence[float | None], sizes: Attacked, seed: int, processes: int = 1, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Train and attack all models of each setting.

    Args:
        epsilons: of the settings; None is a training without privacy, on which the attacks must succeed.
        sizes: what is trained.
        seed: of coins, phantoms and initial weights.
        processes: that train side by side.
        progress: told (models trained, models in all).

    Returns:
        For each setting plain JSON: attacks with AUC, rates and bounds, and the curves for a plot.
    """
    items = [_Item(epsilon, sizes, seed, number) for epsilon in epsilons for number in range(sizes.models)]
    models = list(in_order(_trained, items, processes, progress, one_thread))
    return [
        _setting(epsilon, models[place * sizes.models : (place + 1) * sizes.models], sizes, seed)
        for place, epsilon in enumerate(epsilons)
    ]


# ---- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    epsilon: float | None
    sizes: Attacked
    seed: int
    number: int


def one_thread() -> None:
    """Small networks lose by threads."""
    torch.set_num_threads(1)


def _trained(item: _Item) -> Model:
    one_thread()
    sizes = item.sizes
    rng = np.random.default_rng([item.seed, item.number, int(1000 * (item.epsilon or 0))])
    included = rng.random(sizes.patients) < 0.5
    pool = [phantom_slice(item.seed, index) for index in range(sizes.patients)]
    network = small_network(1, CLASSES + 1, item.seed, sizes.features)
    network.load_state_dict(_public_start(item.seed, sizes))
    votes = [_votes(pool[index]) for index in np.flatnonzero(included)]
    with TemporaryDirectory() as folder:
        if item.epsilon is None:
            members = [pool[index] for index in np.flatnonzero(included)]
            _train_without_privacy(network, members, sizes.iterations, sizes.batch, rng)
            private, charges = None, ()
        else:
            plan = private_plan(item.epsilon, sizes)
            ledger = Ledger(Path(folder) / LEDGER, f"audit/{item.number}", plan.digest())
            private = _learnt(plan, votes, ledger)
            _train_privately(network, pool, included, plan, sizes, ledger)
            charges = ledger.own_entries
    rules = {"labels_fixed": _keep_largest(), "labels_exact": shape_votes.without_noise(ballot(), votes, "not_private")}
    rules |= {"labels_private": private} if private else {}
    return Model(included, _scores(network, pool, rules), charges)


@lru_cache(maxsize=512)
def phantom_slice(seed: int, index: int, held_out: bool = False) -> Record:
    """A slice of a phantom hippocampus: image float32 [1, 1, rows, columns], standardised, and its labels.

    The slice with the most of the rarer class.
    """
    scan = KINDS["hippocampus"].render(Patient("hippocampus", seed, index, held_out), 0, SHAPE)
    middle = int(np.argmax([min(np.sum(plane == 1), np.sum(plane == 2)) for plane in scan.segmentation]))
    image, labels = scan.image[0][middle].astype(np.float32), scan.segmentation[middle].astype(np.int64)
    image = (image - image.mean()) / (image.std() + 1e-6)
    return Record(torch.from_numpy(image)[None, None], torch.from_numpy(labels)[None, None])


def _votes(record: Record) -> Array:
    return ballot().votes([(record.target[0, 0].numpy().astype(np.uint8), SPACING_MM)])


@lru_cache(maxsize=4)
def _public_start(seed: int, sizes: Attacked) -> dict[str, Tensor]:
    """Weights learnt from phantoms that are in nobody's pool; the same for all models."""
    network = small_network(1, CLASSES + 1, seed, sizes.features)
    others = [phantom_slice(seed, index, held_out=True) for index in range(PUBLIC_PATIENTS)]
    _train_without_privacy(network, others, sizes.start_iterations, sizes.batch, np.random.default_rng(seed))
    return network.state_dict()


def _train_without_privacy(
    network: nn.Module, members: list[Record], iterations: int, batch: int, rng: np.random.Generator
) -> None:
    loss, optimizer = dice_and_cross_entropy(), torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(iterations):
        chosen = [members[place] for place in rng.choice(len(members), min(batch, len(members)), replace=False)]
        optimizer.zero_grad()
        output = network(torch.cat([record.data for record in chosen]))
        loss(output, torch.cat([record.target for record in chosen])).backward()
        optimizer.step()


def private_plan(epsilon: float, sizes: Attacked) -> PrivacyPlan:
    """A full-batch plan with the planner's share for the vote; training and vote together cost epsilon at most."""
    budget = PrivacyBudget(epsilon=epsilon, delta=sizes.delta, unit="phantom")
    morphology = SubsampledGaussian(1 / (gaussian_mu(budget) * MORPHOLOGY_SHARE**0.5))

    def schedule(noise_multiplier: float) -> DpEvent:
        steps = SelfComposedDpEvent(SubsampledGaussian(noise_multiplier).event, sizes.steps)
        return ComposedDpEvent([steps, morphology.event])

    noise = calibrate(schedule, budget)
    return PrivacyPlan(budget, sizes.steps, 1.0, noise, sizes.patients, AutoS(1.0), morphology.noise_multiplier)


def _learnt(plan: PrivacyPlan, votes: Iterable[Array], ledger: Ledger) -> Morphology | None:
    """What the run's vote allows; None where the noise leaves no question audible."""
    mechanism = plan.morphology
    assert mechanism is not None
    asked = questions_for(plan.units, mechanism.noise_multiplier, CLASSES, SPACING_MM)
    if not asked:
        return None
    some = Ballot(ballot().classes, asked)
    columns = [*range(len(asked)), -1]
    return shape_votes.learn(some, mechanism, [one[:, columns] for one in votes], ledger)


def _train_privately(
    network: nn.Module,
    pool: list[Record],
    included: npt.NDArray[np.bool_],
    plan: PrivacyPlan,
    sizes: Attacked,
    ledger: Ledger,
) -> None:
    """The project's own training; slots whose coin fell the other way are empty."""
    learning_rate = sizes.learning_rate * min(1.0, plan.budget.epsilon / 8)
    schedule, execution = Schedule(learning_rate), Execution(engine=Batched(8))
    training = PrivateTraining(network, dice_and_cross_entropy(), plan, schedule, execution, ledger)
    while not training.finished:
        training.advance(lambda _, drawn: [pool[slot] for slot in drawn if included[slot]])
    network.load_state_dict(training.averaged_weights())


def _keep_largest() -> Morphology:
    known = ballot()
    return known.rules([(KeepLargest(least_kept=0.3),)] * len(known.classes), "fixed")


# ---- scores --------------------------------------------------------------------------------------------------------


def _scores(network: nn.Module, pool: list[Record], rules: dict[str, Morphology]) -> dict[str, Array]:
    """Attack -> score of each patient."""
    loss = dice_and_cross_entropy()
    rows = [_scores_of_one(network, record, loss, rules) for record in pool]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def _scores_of_one(
    network: nn.Module, record: Record, loss: Callable[[Any, Any], Tensor], rules: dict[str, Morphology]
) -> dict[str, float]:
    logits = network(record.data)
    labels = record.target[0, 0]
    likely = functional.softmax(logits, 1)[0]
    scores = {"loss": -float(loss(logits, record.target))}
    for number in range(1, CLASSES + 1):
        scores[f"loss_class_{number}"] = _soft_dice(likely[number], labels == number)
    edge = torch.from_numpy(_boundary(labels.numpy()))
    each = functional.cross_entropy(logits, record.target[:, 0], reduction="none")[0]
    scores["boundary"] = -float(each[edge].mean()) if bool(edge.any()) else -float(each.mean())
    predicted, reference = logits.argmax(1)[0].numpy().astype(np.uint8), labels.numpy()
    scores["labels"] = _mean_dice(predicted, reference)
    for name, rule in rules.items():
        scores[name] = _mean_dice(refine(predicted, rule, SPACING_MM), reference)
    return scores


def _soft_dice(likely: Tensor, present: Tensor) -> float:
    overlap, total = float((likely * present).sum()), float(likely.sum() + present.sum())
    return (2 * overlap + 1e-5) / (total + 1e-5)


def _boundary(labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Voxels with a neighbour of another label."""
    return ndimage.maximum_filter(labels, 3) != ndimage.minimum_filter(labels, 3)


def _mean_dice(predicted: npt.NDArray[Any], reference: npt.NDArray[Any]) -> float:
    """Mean Dice of the classes that are in either; 1 where none is."""
    found = []
    for number in range(1, CLASSES + 1):
        total = np.count_nonzero(predicted == number) + np.count_nonzero(reference == number)
        if total:
            found.append(2 * np.count_nonzero((predicted == number) & (reference == number)) / total)
    return float(np.mean(found)) if found else 1.0


def lira(losses: Array, included: npt.NDArray[np.bool_]) -> Array:
    """Log-likelihood ratios [models, patients] of losses [models, patients], every model attacked by the others.

    The loss is turned into a confidence exp(-1 - loss) and its logit, which is nearly Gaussian over models; nnU-Net's
    loss, cross-entropy minus Dice, begins at -1.
    """
    logits = _logit(np.exp(-1 - losses))
    found = np.zeros_like(logits)
    for target in range(len(logits)):
        others = np.arange(len(logits)) != target
        shadow, inside = logits[others], included[others]
        means = [_means(shadow, chosen) for chosen in (inside, ~inside)]
        deviations = [
            max(1e-3, float((shadow - mean)[chosen].std()))
            for mean, chosen in zip(means, (inside, ~inside), strict=True)
        ]
        there, absent = (
            stats.norm.logpdf(logits[target], mean, deviation)
            for mean, deviation in zip(means, deviations, strict=True)
        )
        found[target] = there - absent
    return found


def _logit(confidence: Array) -> Array:
    kept = np.clip(confidence, 1e-6, 1 - 1e-6)
    return np.log(kept / (1 - kept))


def _means(values: Array, chosen: npt.NDArray[np.bool_]) -> Array:
    """Mean over the chosen models for each patient; over all patients' where a patient was never chosen."""
    number = chosen.sum(0)
    overall = values[chosen].mean() if chosen.any() else values.mean()
    return np.where(number > 0, (values * chosen).sum(0) / np.maximum(number, 1), overall)


# ---- figures -------------------------------------------------------------------------------------------------------


def _setting(epsilon: float | None, models: Sequence[Model], sizes: Attacked, seed: int) -> dict[str, Any]:
    included = np.array([model.included for model in models])
    scores = {name: np.array([model.scores[name] for model in models]) for name in _common_names(models)}
    scores["lira"] = lira(-scores["loss"], included)
    attacks = [_attack(name, values, included, sizes) for name, values in scores.items()]
    spent = [epsilon_of(model.charges, sizes.delta) for model in models]
    compared = [_compared(name, scores, included, seed) for name in scores if name.startswith("labels_")]
    bounds = {} if epsilon is None else {
        f"{rate:g}": true_positive_rate(events_of(models[0].charges), rate) for rate in FALSE_POSITIVE_RATES
    }  # fmt: skip
    return {
        "setting": "without privacy" if epsilon is None else f"epsilon {epsilon:g}",
        "epsilon": None if epsilon is None else max(spent),
        "delta": None if epsilon is None else sizes.delta,
        "models": len(models),
        "patients": sizes.patients,
        "members_dice": float(scores["labels"][included].mean()),
        "others_dice": float(scores["labels"][~included].mean()),
        "true_positive_rate_at_most": bounds,
        "attacks": attacks,
        "refined_against_unrefined": compared,
    }


def _common_names(models: Sequence[Model]) -> list[str]:
    return [name for name in models[0].scores if all(name in model.scores for model in models)]


def _attack(name: str, scores: Array, included: npt.NDArray[np.bool_], sizes: Attacked) -> dict[str, Any]:
    flat, truth = scores.ravel(), included.ravel()
    runs = [statistics.guess_extremes(own, coins, sizes.guessed) for own, coins in zip(scores, included, strict=True)]
    together = OneRun(*(sum(getattr(run, part) for run in runs) for part in ("canaries", "guesses", "right")))
    curve = statistics.roc(flat, truth)
    return {
        "attack": name,
        "auc": statistics.auc(flat, truth),
        "auc_interval": list(statistics.auc_interval(flat, truth, sizes.confidence)),
        "at": [_rate(flat, truth, rate, sizes.confidence) for rate in FALSE_POSITIVE_RATES],
        "guesses": asdict(together),
        "epsilon_at_least": statistics.epsilon_from_one_run(together, sizes.delta, sizes.confidence),
        "roc": [curve.false_positive_rate.round(5).tolist(), curve.true_positive_rate.round(5).tolist()],
    }


def _rate(scores: Array, truth: npt.NDArray[np.bool_], rate: float, confidence: float) -> dict[str, Any]:
    counts = statistics.counts_at_rate(scores, truth, rate)
    return {
        "false_positive_rate": rate,
        "true_positive_rate": counts.hits / counts.members,
        "interval": list(statistics.clopper_pearson(counts.hits, counts.members, confidence)),
        **asdict(counts),
    }


def _compared(name: str, scores: dict[str, Array], included: npt.NDArray[np.bool_], seed: int) -> dict[str, Any]:
    """AUC after refinement minus before, with a bootstrap interval over patients (columns), which keeps pairs."""
    before, after, rng = scores["labels"], scores[name], np.random.default_rng(seed)

    def gain(columns: npt.NDArray[np.intp]) -> float:
        truth = included[:, columns].ravel()
        areas = [statistics.auc(values[:, columns].ravel(), truth) for values in (after, before)]
        return areas[0] - areas[1]

    everybody = np.arange(included.shape[1])
    drawn = [gain(rng.choice(everybody, len(everybody))) for _ in range(BOOTSTRAPS)]
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return {"refined": name, "auc_gain": gain(everybody), "interval": [low, high], "confidence": 0.95}
