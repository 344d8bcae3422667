"""Self-configuration: a budget and public facts in, schedule, noise and network size out.

nnU-Net lets the dataset configure the method; here the budget does too. Every rule below is a pure function of the
budget and of facts that are public under the zero-out relation: the number of patients in the dataset, the plans'
patch size and topology. None looks at the data, the fold or the hardware.

The reasoning. Noise on the mean gradient has norm r = (sigma / B) sqrt(d) in units of the clipping bound, with B the
expected batch and d the number of trainable parameters; at full batch sigma = sqrt(T) / mu, where mu is the
Gaussian-DP parameter that the budget buys. So

- few parameters: d enters r by its square root, so width is capped by the number of patients (``parameter_limit``);
- few steps: noise accumulates as T while distance to travel is fixed; T follows mu N / sqrt(d) (``steps``);
- near-full batch: r does not depend on q as long as sigma stays near 1 or above, so q = 1 unless the number of patches
  to process would pass a public limit (``sampling_probability``);
- a public start: what phantoms teach need not be learnt through noise (``public_start``), and few steps remain;
- normalised gradients carry no information in their length late in training: no momentum, and a weight average over the
  last steps instead of a long tail at a small learning rate;
- a private fingerprint, where the plans follow one, was charged before (``fingerprint``); the noise of the training is
  calibrated with it, too;
- what refinement learns from the masks (``shape_votes``) is one full-batch Gaussian beside the training. Its share of
  the budget is a share of mu^2, in which full-batch Gaussians add (``morphology``); the training's noise is calibrated
  with it, so that both together cost the target.

Design note: from random weights, steps, learning rates, width and depth were set to reproduce a prototype's schedules
for Hippocampus, which had been judged on that dataset's held-out cases. Its figure in docs/results.md is therefore not
free of that choice. Steps and learning rates after a public start were chosen on phantoms (docs/accuracy.md); width and
depth are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dp_accounting.dp_event import ComposedDpEvent, DpEvent, SelfComposedDpEvent

from nnunet_dp.accounting import PrivacyBudget, calibrate, gaussian_mu
from nnunet_dp.clipping import RULE_NAMES
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.mechanisms import SubsampledGaussian
from nnunet_dp.phantoms.matching import resemble
from nnunet_dp.sections import (
    ByHand,
    Compute,
    ConfigurationPlan,
    FingerprintPlan,
    MorphologyPlan,
    NetworkPlan,
    PublicStart,
    RulePlan,
)
from nnunet_dp.shape_votes import audible

TRAINING_SHARE = 0.8  # four of five folds: the public share of patients that train in one run
PATCH_LIMIT: dict[str, int] = {"full": 120_000, "small": 10_000}
STEP_LIMIT: dict[str, int] = {"full": 300, "small": 60}
FEWEST_STEPS = 10
START_IMAGES = 400  # phantoms; each is randomised anew whenever it is used
START_ITERATIONS: dict[str, int] = {"full": 3000, "small": 1500}
MORPHOLOGY_SHARE = 0.04  # of mu^2: two percent more noise on the training


def parameter_limit(patients: int) -> int:
    """Most trainable parameters for that many patients: 3000 a patient, between 0.4 and 1 million."""
    return max(400_000, min(1_000_000, 3_000 * patients))


def stages(patch_size: tuple[int, ...], strides: list[list[int]]) -> int:
    """Number of leading stages whose feature map still has an edge of at least 10 voxels; at least three.

    Deeper stages see the whole patch already and hold most of the parameters. nnU-Net's deep supervision gives its last
    output no weight, so two stages would leave it without any.
    """
    edges = [float(edge) for edge in patch_size]
    count = 0
    for stride in strides:
        edges = [edge / step for edge, step in zip(edges, stride, strict=True)]
        if max(edges) < 10 and count >= 3:
            break
        count += 1
    return count


def features(limit: int, count: Callable[[tuple[int, ...]], int], depth: int) -> tuple[int, ...]:
    """Features per stage: 16 doubled at each stage, capped as high as the parameter limit allows.

    Args:
        limit: most parameters allowed.
        count: number of parameters of the network with these features per stage.
        depth: number of stages.
    """
    for cap in (320, 256, 128, 64, 32, 16, 8):
        chosen = tuple(min(cap, 16 * 2**stage) for stage in range(depth))
        if count(chosen) <= limit:
            return chosen
    return chosen


def signal_to_noise(budget: PrivacyBudget, training_patients: float, parameters: int) -> float:
    """How far the network travels at most over how far noise moves it, mu N / sqrt(d), however many steps it takes.

    At full batch T steps of noise sigma = sqrt(T) / mu on a sum over N patients move d parameters by noise of norm
    learning rate x T sqrt(d) / (mu N), and by a signal of at most learning rate x T.
    """
    return gaussian_mu(budget) * training_patients / math.sqrt(parameters)


def steps(budget: PrivacyBudget, patients: int, parameters: int, compute: Compute, start: bool = False) -> int:
    """Number of releases: 230 times the signal to noise, or 60 times its root after a start that resembles the data.

    From random weights the constant reproduces the best known schedule for 136 patients and 0.34 million parameters:
    about 100 steps at epsilon 8, 40 at epsilon 3. A public start from phantoms of the same organ leaves less to learn:
    on shifted hippocampus phantoms 10 to 20 steps at epsilon 1 and 30 to 40 at epsilon 8 did as well as any. One from
    mere shapes does not: 99 steps at epsilon 8 gave Dice 0.79 where 40 gave 0.61 (docs/accuracy.md).
    """
    signal = signal_to_noise(budget, TRAINING_SHARE * patients, parameters)
    wanted = round(60 * math.sqrt(signal)) if start else round(230 * signal)
    return max(FEWEST_STEPS, min(STEP_LIMIT[compute], wanted))


def sampling_probability(patients: int, step_count: int, patches: int, compute: Compute) -> float:
    """Full batch, unless that many patches would pass the limit; never fewer than about 64 expected patients."""
    training = TRAINING_SHARE * patients
    q = PATCH_LIMIT[compute] / (training * step_count * patches)
    q = max(q, min(1.0, 64 / training))
    return 1.0 if q >= 0.5 else float(f"{q:.4g}")


def patches_per_patient(patch_size: tuple[int, ...], image_shape: tuple[int, ...]) -> int:
    """Patches averaged before the clip: one, or up to 8 where a 2D patch is a slice of a volume.

    The average costs no privacy and takes out the noise between a patient's slices; a 3D patch covers enough by itself.
    """
    return min(8, image_shape[0]) if len(patch_size) == 2 and len(image_shape) == 3 else 1


def learning_rate(step_count: int, signal: float | None = None) -> float:
    """Of the first step, in units of the clip rule's bound.

    Args:
        step_count: planned steps.
        signal: signal to noise, after a public start from phantoms that resemble the dataset; else None.

    From random weights between 0.3 and 1, growing as the root of the steps. After a public start the noise must not
    drown what is there: learning rate x T / signal, the norm of all noise but for the schedule's factor, is kept at
    40, about the norm of the weights of a network of 0.34 million parameters.
    """
    rate = math.sqrt(step_count / 100) if signal is None else 40 * signal / step_count
    return float(f"{min(1.0, max(0.3 if signal is None else 0.01, rate)):.3g}")


def clip_rules(rate: float) -> dict[str, RulePlan]:
    """Constants of all rules; rates are in units of each rule's bound, so one learning rate serves all."""
    constants: dict[str, dict[str, float]] = {
        "flat": {"bound": 0.1},
        "auto_s": {"bound": 1.0, "regulariser": 0.01},
        "auto_v": {"bound": 1.0},
        "nsgd": {"bound": 1.0, "regulariser": 0.01},
        "psac": {"bound": 1.0, "regulariser": 0.1},
        "quantile": {"bound": 0.1, "target_quantile": 0.5, "learning_rate": 0.2},
        "per_layer": {"bound": 0.1},
    }
    return {name: RulePlan(constants=constants[name], learning_rate=rate) for name in RULE_NAMES}


def morphology(budget: PrivacyBudget, share: float, patients: int, classes: int) -> MorphologyPlan | None:
    """The release that a share of the budget buys: mu_m = sqrt(share) mu; None where not one question is audible.

    Args:
        budget: target.
        share: of mu^2.
        patients: units in the whole dataset.
        classes: foreground classes or regions.

    Raises:
        UsageRefusal: for a share outside [0, 0.5].
    """
    if not 0 <= share <= 0.5:
        raise UsageRefusal(f"morphology's share of the budget should lie in [0, 0.5], found {share:g}: 0.04 is usual")
    noise = 1 / (math.sqrt(share) * gaussian_mu(budget)) if share else math.inf
    if not audible(int(TRAINING_SHARE * patients), noise, classes):
        return None
    return MorphologyPlan(share=share, noise_multiplier=noise)


def public_start(kinds: tuple[str, ...], patch_size: tuple[int, ...], compute: Compute) -> PublicStart:
    """What to learn from phantoms: batches of about 200 000 voxels, 2 to 16 patches, as many as half an hour allows.

    A voxel of a batch costs about 1.3 microseconds on two cores with 16 features (Hippocampus), so 1.2e9 of them stay
    below half an hour; 3000 iterations are enough, fewer than 300 are not worth while.
    """
    voxels = math.prod(patch_size)
    batch = max(2, min(16, round(200_000 / voxels)))
    iterations = max(300, min(START_ITERATIONS[compute], round(1.2e9 / (batch * voxels))))
    return PublicStart(kinds=kinds, images=START_IMAGES, iterations=iterations, batch=batch, learning_rate=2e-3)


def plan_configuration(
    budget: PrivacyBudget,
    patients: int,
    patch_size: tuple[int, ...],
    strides: list[list[int]],
    count_parameters: Callable[[tuple[int, ...]], int],
    compute: Compute,
    image_shape: tuple[int, ...] = (),
    morphology_share: float = MORPHOLOGY_SHARE,
    classes: int = 1,
    phantom_kinds: tuple[str, ...] = (),
    by_hand: ByHand = ByHand(),  # noqa: B008 (frozen)
    fingerprint: FingerprintPlan | None = None,
) -> ConfigurationPlan:
    """The private training of one configuration, calibrated to the budget.

    Args:
        budget: target.
        patients: units in the whole dataset.
        patch_size: voxels, from the source plans.
        strides: of each stage, from the source plans.
        count_parameters: parameters of the network with given features per stage.
        compute: ``full``, or ``small`` for a schedule that a processor without a GPU finishes sooner.
        image_shape: median image of the source plans, first axis first; empty or 1 there for 2D images.
        morphology_share: of mu^2, for what refinement learns; 0 gives all to the training.
        classes: foreground classes or regions.
        phantom_kinds: that resemble the dataset, for the public start; none for random weights.
        by_hand: what the user set in place of a rule.
        fingerprint: that was charged for these plans; the training gets what it left.

    Raises:
        UsageRefusal: for settings that this network cannot have.
    """
    own = by_hand.instead_of
    depth = stages(patch_size, strides)
    shape = own("features_per_stage", None) or features(parameter_limit(patients), count_parameters, depth)
    if len(shape) > len(strides):
        raise UsageRefusal(f"features_per_stage should name at most {len(strides)} stages, found {len(shape)}")
    parameters = count_parameters(shape)
    near = resemble(phantom_kinds)  # after shapes the way is as long as from random weights
    signal = signal_to_noise(budget, TRAINING_SHARE * patients, parameters) if near else None
    step_count = own("steps", steps(budget, patients, parameters, compute, near))
    patches = own("patches_per_patient", patches_per_patient(patch_size, image_shape))
    q = own("sampling_probability", sampling_probability(patients, step_count, patches, compute))
    refinement = morphology(budget, morphology_share, patients, classes)
    noise = calibrate(lambda z: _composed(z, q, step_count, refinement, fingerprint), budget)
    return ConfigurationPlan(
        steps=step_count,
        sampling_probability=q,
        noise_multiplier=noise,
        patches_per_patient=patches,
        augmentation=own("augmentation", "none"),
        average_share=own("average_share", 0.1),
        momentum=own("momentum", 0.0),
        decay_power=own("decay_power", 0.9),
        network=NetworkPlan(features_per_stage=shape, parameters=parameters),
        compute=compute,
        clip_rules=clip_rules(own("learning_rate", learning_rate(step_count, signal))),
        morphology=refinement,
        start=public_start(phantom_kinds, patch_size, compute) if phantom_kinds else None,
        by_hand=by_hand.names,
        fingerprint=fingerprint,
    )


def _composed(
    noise_multiplier: float,
    q: float,
    count: int,
    refinement: MorphologyPlan | None,
    fingerprint: FingerprintPlan | None = None,
) -> DpEvent:
    training = SelfComposedDpEvent(SubsampledGaussian(noise_multiplier, q).event, count)
    beside = [SubsampledGaussian(refinement.noise_multiplier).event] if refinement else []
    beside += [fingerprint.charge.event] if fingerprint else []
    return ComposedDpEvent([training, *beside]) if beside else training
