"""``nnunet-dp predict``: nnU-Net predicts, then the predictions are refined where they lie.

Only the cases of this call are refined, by rules that the folds which predict have paid for (``learning.rules_of``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnunet_dp import nnunet
from nnunet_dp.description import FILE, channels, read_description
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.federated.summary import FEDERATED
from nnunet_dp.learning import rules_of
from nnunet_dp.morphology import read_morphology
from nnunet_dp.refined_folder import refine_folder
from nnunet_dp.workers import Progress


def predict(
    arguments: Sequence[str], refining: bool, rules: Path | None = None, progress: Progress | None = None
) -> str:
    """``nnUNetv2_predict`` with its own arguments, then refinement of its output, in place.

    Args:
        arguments: of ``nnUNetv2_predict``.
        refining: whether to refine.
        rules: a morphology file; None takes the model's.
        progress: told (files refined, files in all).

    Returns:
        A sentence about what was done.

    Raises:
        UsageRefusal: before predicting, when the model has no rules, or the folder no images of its channels.
    """
    known = _prediction_arguments(arguments)
    if not refining or known is None:
        nnunet.predict(list(arguments))
        return "Not refined."
    model = nnunet.model_folder(known.d, known.tr, known.p, known.c)
    _refuse_untrained(model, known.f)
    morphology = read_morphology(rules) if rules else rules_of(model, known.f)
    if morphology is None:
        raise UsageRefusal(_without_rules(model, known))
    description = read_description(model / FILE)
    ending = description["file_ending"]
    cases = _cases(Path(known.i), ending, channels(description))
    output = Path(known.o)
    nnunet.predict(list(arguments))
    mine = [case + ending for case in cases[known.part_id :: known.num_parts]]
    if not mine:
        return "Refined 0 predictions: this part has no images."
    done = refine_folder(output, output, morphology, only=mine, processes=known.nps, progress=progress)
    return f"Refined {done} predictions in {known.o} ({morphology.kind} rules)."


def _refuse_untrained(model: Path, folds: Sequence[str]) -> None:
    trained = sorted(folder.name[5:] for folder in model.glob("fold_*")) if model.is_dir() else []
    if not trained:
        raise UsageRefusal(f"there is no trained model {model.name}: correct -d, -c, -tr (as trained) and -p")
    missing = [fold for fold in folds if fold not in trained]
    if missing:
        raise UsageRefusal(f"{model.name} has no fold {', '.join(missing)}: give -f {' '.join(trained)}")


def _cases(images: Path, ending: str, channels: int) -> list[str]:
    """Names of the cases in a folder of images; refused where nnU-Net would find none, or fewer files of one.

    A picture holds all its channels in one file, so files are compared between cases, not with the channels.
    """
    if not images.is_dir():
        raise UsageRefusal(f"-i {images} should be a folder of images named CASE_0000{ending}; there is no such folder")
    found = {file.name for file in images.iterdir()}
    cases = nnunet.input_cases(images, ending)
    if not cases:
        raise UsageRefusal(f"-i {images} should hold images named CASE_0000{ending}; found {len(found)} other files")
    endings = [f"_{channel:04}{ending}" for channel in range(channels)]
    present = [one for one in endings if any(case + one in found for case in cases)] or endings[:1]
    lacking = sum(any(case + one not in found for one in present) for case in cases)
    if lacking:
        raise UsageRefusal(
            f"-i {images} should hold {' and '.join(present)} of every case; {lacking} of {len(cases)} cases lack one"
        )
    return cases


def _without_rules(model: Path, known: argparse.Namespace) -> str:
    """Why there are none, and what to type."""
    free = f"nnunet-dp morph learn -d {known.d} -c {known.c} -tr {known.tr} -p {known.p} --per-image"
    why, folds = f"has no refinement rules of fold {', '.join(known.f)}", "name the trained folds with -f, "
    if (model / FEDERATED).is_file():
        why, folds = "is a federated model and has no refinement rules: its sites paid for none", ""
    return f"{model.name} {why}: give --no-morph, {folds}or place free rules first, `{free}`"


def _prediction_arguments(arguments: Sequence[str]) -> argparse.Namespace | None:
    """What we need of ``nnUNetv2_predict``'s arguments; None where it will only print its help."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    others = ("-device", "-step_size", "-chk", "-npp", "-prev_stage_predictions")  # named, lest -device be read as -d
    for flag in ("-i", "-o", "-d", "-c", *others):
        parser.add_argument(flag)
    parser.add_argument("-f", nargs="+", default=["0", "1", "2", "3", "4"])
    parser.add_argument("-p", default="nnUNetPlans")
    parser.add_argument("-tr", default="nnUNetTrainer")
    parser.add_argument("-nps", type=int, default=2)
    parser.add_argument("-num_parts", type=int, default=1)
    parser.add_argument("-part_id", type=int, default=0)
    known, _ = parser.parse_known_args(list(arguments))
    return known if None not in (known.i, known.o, known.d, known.c) else None
