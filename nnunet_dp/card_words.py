"""The privacy card in plain words: what an identifier of the card means, for somebody who does not read code.

>>> not_covered_in_words("choosing_between_models_by_their_validation_results")[:44]
'Choosing between several models by how well '
>>> percent(0.3051)
'30.6 %'

What is not in these tables (a word of a later version) is shown as it stands, with blanks for underscores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from nnunet_dp.card import MIXED_UNIT, NOISE_SOURCE, Card, CardCharge, upwards
from nnunet_dp.sections import DECLARED_WEIGHTS, RAW_FINGERPRINT

_NOT_COVERED: Mapping[str, str] = {
    RAW_FINGERPRINT: (
        "The plans (patch size, voxel spacing, preprocessing) were made from the original images. What they tell "
        "about those images is not counted: the guarantee is that of the training, given the plans."
    ),
    "validation_results_logs_and_everything_else_in_the_model_folder": (
        "Whatever else the training left on the machine: logs, validation results, predictions, states. They describe"
        " patients without protection and must stay where they are."
    ),
    "floating_point_gaussian_from_a_non_cryptographic_generator": (
        "Attacks on the arithmetic of the noise: it is drawn with ordinary computer numbers, by a generator that is "
        "not a cryptographic one."
    ),
    "choosing_between_models_by_their_validation_results": (
        "Choosing between several models by how well they did on private validation data."
    ),
    "copies_of_the_dataset_under_another_id_and_their_ledgers": (
        "Trainings on a copy of the same data under another dataset number. They have a ledger of their own, and "
        "their costs come on top."
    ),
    "models_trained_without_privacy_on_the_same_patients": (
        "Models that were trained on the same patients without privacy."
    ),
    "whether_all_cases_could_be_read_before_the_training": (
        "That every image could be read. A training does not begin when one is damaged, so that it was held says that"
        " none was."
    ),
    DECLARED_WEIGHTS: (
        "The weights that the training began from. Somebody declared them public; if they were learnt from the same "
        "patients, the guarantee does not count that."
    ),
    "runs_without_guarantee_on_this_dataset": (
        "Other runs on this dataset that had no guarantee at all (for comparison)."
    ),
    "charges_for_the_same_patient_at_other_sites": (
        "A patient who is known to several sites: that patient's costs at all of them add up."
    ),
    "when_and_whether_a_site_replies": "When a site answered, and whether it did.",
    "whether_a_sites_images_could_be_measured_and_preprocessed": (
        "That a site's images could be measured and preprocessed."
    ),
}
_COVERED: Mapping[str, str] = {
    "training of the network weights": "The weights of the network: everything that they tell about one record.",
    "refinement rules learnt in the run (morphology.json)": (
        "The refinement rules that the training learnt from the reference segmentations (morphology.json)."
    ),
    "the plans, which follow a noised fingerprint": (
        "The plans (patch size, voxel spacing, preprocessing), which follow noised measurements of the images."
    ),
    "weights of the model, which are means of what the sites released": (
        "The weights of the network, which are means of what the sites released."
    ),
}
_PURPOSES: Mapping[str, str] = {
    "training": "Training of the network: one release for each step",
    "morphology": "Vote on refinement rules: one release",
    "fingerprint": "Measurements of the images, for the plans",
    "threshold": "Count that the clipping threshold follows",
}
_RULES: Mapping[str, str] = {
    "flat": "Flat clipping: a record's gradient that is longer than the bound is shortened to it.",
    "auto_s": "Automatic clipping (Auto-S): every record's gradient is scaled to nearly the bound.",
    "auto_v": "Automatic clipping (Auto-V): every record's gradient is scaled to the bound.",
    "nsgd": "Normalised gradients (NSGD): every record's gradient is scaled to a length below 1.",
    "psac": "Per-sample adaptive clipping (PSAC): every record's gradient is scaled to at most the bound.",
    "quantile": (
        "Adaptive clipping: as flat, with a bound that follows a noised count of the records below it. The count is "
        "paid for with the step. The bounds of the single steps are not part of the release."
    ),
    "per_layer": "Flat clipping of each layer by itself; together the layers stay within the bound.",
}
_SAMPLERS: Mapping[str | None, str] = {
    "poisson": (
        "Poisson sampling: each record takes part in a step by an independent draw, with the probability in the table "
        "above. The accountant assumes just that, and the training does just that."
    ),
    "full batch": "Full batch: every record takes part in every step. No sampling is claimed.",
    None: "Known to the sites, which reported only what they spent.",
}
_NOISE: Mapping[str, str] = {
    NOISE_SOURCE: (
        "Drawn by PyTorch's generators, keyed anew for every release by the operating system's entropy. They are not "
        "cryptographic."
    ),
}


def not_covered_in_words(identifier: str) -> str:
    """A sentence."""
    return _NOT_COVERED.get(identifier, _as_it_stands(identifier))


def not_covered_rows(identifiers: Iterable[str]) -> list[tuple[str, str]]:
    """For a table: a row for each, the first of them labelled."""
    rows = [("", not_covered_in_words(identifier)) for identifier in identifiers]
    return [("NOT covered", rows[0][1]), *rows[1:]] if rows else []


def covered_in_words(identifier: str) -> str:
    """A sentence."""
    return _COVERED.get(identifier, _as_it_stands(identifier))


def purpose_in_words(charge: CardCharge) -> str:
    """What a row of charges was for."""
    return _PURPOSES.get(charge.purpose, _as_it_stands(charge.purpose))


def mechanism_in_words(charge: CardCharge) -> str:
    """The mechanism and its noise."""
    if charge.mechanism == "pure_dp":
        return f"selection of epsilon {charge.epsilon:.4g} each"
    name = {"gaussian": "Gaussian noise", "laplace": "Laplace noise"}[charge.mechanism]
    return f"{name}, {charge.noise_multiplier:.4g} times the bound"


def participation_in_words(charge: CardCharge) -> str:
    """Who takes part in each of the releases."""
    q = charge.sampling_probability
    return "everybody" if q == 1 else f"each with probability {q:.4g}"


def rule_in_words(name: str) -> str:
    """What a clip rule does to one record's gradient."""
    return _RULES.get(name, _as_it_stands(name))


def sampler_in_words(name: str | None) -> str:
    """Who takes part in a step."""
    return _SAMPLERS[name]


def noise_in_words(source: str) -> str:
    """Where noise comes from."""
    return _NOISE.get(source, source)


def setting_in_words(card: Card) -> str:
    """Who has to be trusted with what."""
    if card.sites:
        return (
            "Federated: images stay at their sites. Each site clips and adds its own noise, and only what is noised "
            "leaves it; the coordinator need not be trusted with the images."
        )
    return (
        "Central: images are read by the training alone, on the machine of whoever holds them. Noise is added there, "
        "before anything is released; whoever runs the training is trusted."
    )


def released_in_words(card: Card) -> str:
    """Which part of all that the training computed anybody gets to see."""
    if card.sites:
        return (
            "The final averaged weights. Each round's noised weights were released to the coordinator and the other "
            "sites, too, and are counted. No losses and no scores."
        )
    return (
        "The final averaged weights, the plans, and the refinement rules where there are some. No weights of earlier "
        "steps, no losses and no scores."
    )


def unit_in_words(unit: str) -> str:
    """What one record is, and what follows."""
    if unit.endswith("(inferred)"):
        return f"All data of one {noun(unit)}; which cases belong together was inferred from their names."
    if unit == MIXED_UNIT:
        return "What one record is differs between the sites, or is nothing that a word or two could name."
    if unit == "case":
        return "One case. Nobody said which cases are one patient's: a patient with several cases is protected less."
    return f"All data of one {noun(unit)}, however many cases that are."


def chance_in_words(delta: float) -> str:
    """A small probability.

    >>> chance_in_words(1e-5)
    'one in 100 000'
    """
    return f"one in {math.floor(1 / delta * (1 + 1e-9)):,}".replace(",", " ")


def noun(unit: str) -> str:
    """The unit without a remark.

    >>> noun("patient (inferred)")
    'patient'
    """
    return unit.removesuffix(" (inferred)")


def strength_in_words(card: Card) -> str:
    """The best attack at the rate that is usually looked at, in a sentence."""
    known = {point.false_positive_rate: point.true_positive_rate for point in card.figures.attack}
    return f"at 1 % false alarms at most {percent(known[0.01])} hits" if 0.01 in known else ""


def percent(share: float) -> str:
    """A share, rounded upwards to a tenth of a percent: it promises no more than the number itself."""
    return f"{min(100.0, math.ceil(share * 1000 - 1e-6) / 10):g} %"


def number(value: float | None) -> str:
    """Four digits, upwards; nothing for None."""
    return "" if value is None else upwards(value)


def _as_it_stands(identifier: str) -> str:
    return identifier.replace("_", " ")
