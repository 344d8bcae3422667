"""Before and after refinement, as a picture: for phantoms only, real patients' images stay where they are.

    python benchmarks/dp_morph_picture.py --out docs/dp_morph.png FOLD_FOLDER...

Each FOLD_FOLDER holds a private training on a phantom dataset with nnU-Net's validation. The held-out case whose
prediction changes most is shown in its fullest slice: reference, prediction, refined by the rules of all questions.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from nnunet_dp.morphology import Morphology, classes_from
from nnunet_dp.nnunet import configuration_spacing
from nnunet_dp.nnunet_files import SegmentationFiles
from nnunet_dp.refinement import refine
from nnunet_dp.shape_votes import Answer, Ballot, decide, questions

COLOURS = ListedColormap(["#f4f4f4", "#1b6ca8", "#e07b39", "#5aa469"])


def all_rules(description: dict, spacing: tuple[float, ...]) -> Morphology:
    """Every question answered by yes."""
    known = classes_from(description)
    ballot = Ballot(known.classes, questions(spacing))
    yes = [Answer(question.name, 1.0, 1.0, True) for question in ballot.questions]
    return known.with_operations(decide(ballot, [yes] * len(known.classes)))


def triple(fold: Path) -> tuple[list[np.ndarray], str]:
    """Reference, prediction and refined prediction of one case, cut to one slice."""
    plans, description = (json.loads((fold.parent / name).read_text()) for name in ("plans.json", "dataset.json"))
    if "Phantom" not in plans["dataset_name"]:
        raise SystemExit("pictures are drawn of phantoms only")
    files = SegmentationFiles(description, plans)
    rules = all_rules(description, configuration_spacing(plans, fold.parent.name.rsplit("__", 1)[-1]))
    references = Path(os.environ["nnUNet_preprocessed"]) / plans["dataset_name"] / "gt_segmentations"
    found = []
    for file in sorted((fold / "validation").glob("*" + description["file_ending"])):
        predicted, spacing, _ = files.read(file)
        refined = refine(predicted, rules, spacing)
        found.append((np.count_nonzero(predicted != refined), file.name, predicted, refined))
    _, name, predicted, refined = max(found, key=lambda item: item[0])
    truth = files.read(references / name)[0]
    axis = int(np.argmin(truth.shape))
    changed = (predicted != refined) | (truth > 0)
    index = int(np.argmax(changed.sum(axis=tuple(a for a in range(3) if a != axis))))
    title = f"{plans['dataset_name'][11:]}, epsilon {plans['differential_privacy']['budget']['epsilon']:g}"
    return [image.take(index, axis) for image in (truth, predicted, refined)], title


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folds", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    figure = Figure(figsize=(7.5, 2.6 * len(arguments.folds)), layout="tight")
    axes = figure.subplots(len(arguments.folds), 3, squeeze=False)
    for row, fold in zip(axes, arguments.folds, strict=True):
        images, title = triple(fold)
        for cell, image, name in zip(row, images, ("reference", "private prediction", "after DP-Morph"), strict=True):
            cell.imshow(image, cmap=COLOURS, vmin=0, vmax=3, interpolation="nearest")
            cell.set(title=name, xticks=[], yticks=[])
        row[0].set_ylabel(title)
    FigureCanvasAgg(figure).print_png(str(arguments.out), metadata={"Software": None})


if __name__ == "__main__":
    main()
