"""What refinement does to the predictions of trained private models: none, fixed, oracle, private, per image.

    python benchmarks/dp_morph.py --out OUT FOLD_FOLDER...

Each FOLD_FOLDER holds a finished private training with nnU-Net's validation of its held-out cases (``validation/``) and
the rules it learnt (``morphology.json``); the references are the dataset's, in nnUNet_preprocessed. Folders of one
dataset and epsilon are repeats. Writes OUT/checkpoints.json first (SHA-256 of each checkpoint and rule file), then
OUT/results.json (every case, every variant) and OUT/table.md. A model that is measured already is not measured again.
Held-out masks are read here for judging and for the rows called not private and oracle only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dp.bootstrap import paired_bootstrap
from nnunet_dp.free_rules import per_image
from nnunet_dp.learning import ReferenceFacts, reference_facts, votes_of
from nnunet_dp.morphology import (
    Closing,
    FillHoles,
    KeepLargest,
    Morphology,
    Opening,
    classes_from,
    read_morphology,
)
from nnunet_dp.nnunet import find_splits, patients_of_plan
from nnunet_dp.nnunet_files import SegmentationFiles
from nnunet_dp.plans import read_section
from nnunet_dp.refinement import refine
from nnunet_dp.segmentation_metrics import segmentation_metrics
from nnunet_dp.shape_votes import Ballot, questions, without_noise
from nnunet_dp.splits import fold_slots
from nnunet_dp.workers import in_order

METRICS = ("dice", "hd95", "nsd")
DRAWS = 5000


def fixed_menu(edge: float) -> dict[str, tuple]:
    """The fixed rules of the comparison; k voxels across is a ball of radius (k - 1) / 2 edges."""
    menu: dict[str, tuple] = {"fixed: largest component": (KeepLargest(),)}
    for k in (3, 5, 7):
        opening, closing = Opening(radius_mm=(k - 1) / 2 * edge), Closing(radius_mm=(k - 1) / 2 * edge)
        menu[f"fixed: opening k={k}"] = (opening,)
        menu[f"fixed: closing k={k}"] = (closing,)
        menu[f"fixed: opening and closing k={k}"] = (opening, closing)
        menu[f"fixed: opening k={k}, largest component"] = (opening, KeepLargest())
    menu["fixed: largest component, holes"] = (KeepLargest(), FillHoles())
    return menu


@dataclass(frozen=True)
class Judged:
    """A trained fold: where its predictions and references lie, and what is public about both.

    Attributes:
        fold: folder of the trained fold, with ``validation/`` and ``morphology.json``.
        facts: of the references that refinement learns from.
        epsilon: of the training's budget.
        held_out: case to unit, of the cases that the fold was not trained on.
        references: folder of their masks.
        description: nnU-Net's dataset.json.
    """

    fold: Path
    facts: ReferenceFacts
    epsilon: float
    held_out: dict[str, str]
    references: Path
    description: dict[str, Any]

    @property
    def unrefined(self) -> Morphology:
        """The dataset's classes without any operation."""
        return classes_from(self.description)

    def fixed(self, operations: tuple) -> Morphology:
        """The same operations for every class."""
        return self.unrefined.with_operations([operations] * len(self.unrefined.classes))

    def learnt(self) -> Morphology:
        """What the run's private vote allowed; nothing, where too few could be heard and none was taken."""
        file = self.fold / "morphology.json"
        return read_morphology(file) if file.is_file() else self.unrefined


def judged(fold: Path) -> Judged:
    """The fold in a model folder of nnUNet_results, its dataset in nnUNet_preprocessed."""
    model = fold.parent
    plans, description = (json.loads((model / name).read_text()) for name in ("plans.json", "dataset.json"))
    section, configuration = read_section(plans), model.name.rsplit("__", 1)[-1]
    assert section is not None  # a private trainer wrote them
    folder = Path(os.environ["nnUNet_preprocessed"]) / plans["dataset_name"]
    patients = patients_of_plan(folder, section)
    slots, held_out = fold_slots(find_splits(folder, patients), int(fold.name[5:]), patients)
    facts = reference_facts(folder, slots, plans, description, configuration, 1)
    whose = {case: patients.case_to_patient[case] for case in held_out}
    return Judged(fold, facts, section.budget.epsilon, whose, folder / "gt_segmentations", description)


def rules_for(model: Judged) -> dict[str, Morphology]:
    """All variants but the oracle."""
    facts, known = model.facts, model.unrefined
    variants = {"none": known}
    for name, operations in fixed_menu(min(facts.spacing_mm)).items():
        variants[name] = model.fixed(operations)
    ballot = Ballot(known.classes, questions(facts.spacing_mm), known.regions, known.ignore_label)
    votes = votes_of(ballot, facts.slots, SegmentationFiles(model.description, facts.plans), 1, None)
    variants["adaptive, without noise (not private)"] = without_noise(ballot, votes, "not_private")
    variants["per image (free)"] = per_image(model.description)
    variants["**adaptive private**"] = model.learnt()
    return variants


def measure_case(item: tuple) -> dict[str, list[list[float]]]:
    """Metrics of one case: variant -> [classes][metrics]."""
    prediction, reference, description, plans, variants = item
    files = SegmentationFiles(description, plans)
    predicted, spacing, _ = files.read(prediction)
    truth, _, _ = files.read(reference)
    axes = tuple(axis for axis, size in enumerate(truth.shape) if size == 1)
    step = [edge for edge, size in zip(spacing, truth.shape, strict=True) if size > 1]
    seen: dict[bytes, list[list[float]]] = {}
    results = {}
    for name, rules in variants.items():
        refined = refine(predicted, rules, spacing)
        key = hashlib.sha256(refined.tobytes()).digest()
        if key not in seen:
            images = (truth.squeeze(axes), refined.squeeze(axes))
            masks = [tuple(np.isin(image, rule.labels) for image in images) for rule in rules.classes]
            found = [segmentation_metrics(reference, mask, step, 1.0) for reference, mask in masks]
            seen[key] = [[float(getattr(one, metric)) for metric in METRICS] for one in found]
        results[name] = seen[key]
    return results


def measure_model(model: Judged, variants: dict[str, Morphology], processes: int) -> dict[str, Any]:
    """Every variant on every held-out case of one model."""
    ending, cases = model.description["file_ending"], sorted(model.held_out)
    work = [
        (model.fold / "validation" / (case + ending), model.references / (case + ending), model.description,
         model.facts.plans, variants)
        for case in cases
    ]  # fmt: skip
    measured = list(in_order(measure_case, work, processes))
    codes = {patient: number for number, patient in enumerate(sorted(set(model.held_out.values())))}
    return {
        "dataset": model.fold.parent.parent.name,
        "epsilon": model.epsilon,
        "classes": [rule.name for rule in model.unrefined.classes],
        "patient": [codes[model.held_out[case]] for case in cases],
        "values": {name: [case[name] for case in measured] for name in variants},
        "rules": {
            name: [[operation.operation for operation in rule.operations] for rule in rules.classes]
            for name, rules in variants.items()
        },
    }


ORACLE = "oracle per class (not private)"
RECKLESS = "oracle per class by HD95 alone (not private)"


def add_oracle(models: list[dict[str, Any]], name: str, may_hurt: bool) -> None:
    """Per class the fixed rule with the least HD95 on the held-out cases; Dice is kept, unless it may hurt."""
    fixed = [name for name in models[0]["values"] if name == "none" or name.startswith("fixed")]
    stacked = {name: np.array([model["values"][name] for model in models], float) for name in fixed}
    chosen = []
    for row in range(len(models[0]["classes"])):
        dice, hd95 = ({name: np.nanmean(values[:, :, row, m]) for name, values in stacked.items()} for m in (0, 1))
        chosen.append(min((rule for rule in fixed if may_hurt or dice[rule] >= dice["none"]), key=hd95.__getitem__))
    for model in models:
        cases = range(len(model["patient"]))
        values = model["values"]
        values[name] = [[values[rule][case][row] for row, rule in enumerate(chosen)] for case in cases]
        model["rules"][name] = [[rule] for rule in chosen]


def intervals(models: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Means over repeats, and 95 % intervals of the difference to none: patients are drawn, with all their repeats."""
    values = [np.concatenate([np.array(model["values"][one], float) for model in models]) for one in (name, "none")]
    patients = [f"{number:06}" for model in models for number in model["patient"]]
    found, base, difference = paired_bootstrap(np.stack(values), patients, DRAWS, seed=0)
    assert base is not None and difference is not None
    dice, hd95 = (METRICS.index(metric) for metric in METRICS)
    return {
        "dice": found.estimate[:-1, dice].tolist(),
        "hd95": found.estimate[:-1, hd95].tolist(),
        "dice_difference": difference.estimate[:-1, dice].tolist(),
        "dice_low": difference.low[:-1, dice].tolist(),
        "dice_high": difference.high[:-1, dice].tolist(),
        "hd95_mean": float(found.estimate[-1, hd95]),
        "hd95_less": float(1 - found.estimate[-1, hd95] / base.estimate[-1, hd95]),
        "hd95_difference": float(difference.estimate[-1, hd95]),
    }


def table(groups: dict[tuple[str, float], list[dict[str, Any]]]) -> str:
    """Markdown: a block per dataset and epsilon."""
    lines = []
    for (dataset, epsilon), models in sorted(groups.items()):
        add_oracle(models, ORACLE, may_hurt=False)
        add_oracle(models, RECKLESS, may_hurt=True)
        classes = models[0]["classes"]
        names = list(models[0]["values"])
        private = intervals(models, "**adaptive private**")
        gains = [intervals(models, name)["hd95_difference"] or float("nan") for name in (ORACLE, RECKLESS)]
        share, reckless = (private["hd95_difference"] / gain for gain in gains)
        lines += [
            f"### {dataset}, epsilon {epsilon:g}, {len(models)} repeats, {len(models[0]['patient'])} held-out cases "
            f"of {max(models[0]['patient']) + 1} units",
            "",
            f"Adaptive private: HD95 {private['hd95_less']:.0%} less, {share:.0%} of the oracle's gain ({reckless:.0%} "
            f"of that of HD95 alone); lowest end of a Dice difference {min(private['dice_low']):+.4f}.",
            "",
            "| refinement | " + " | ".join(f"Dice {c}" for c in classes) + " | "
            + " | ".join(f"HD95 {c}" for c in classes) + " | mean HD95 | less | "
            + " | ".join(f"Dice difference {c} [95 %]" for c in classes) + " |",
            "|---|" + "---|" * (3 * len(classes) + 2),
        ]  # fmt: skip
        for name in names:
            row = intervals(models, name)
            cells = [f"{v:.3f}" for v in row["dice"]] + [f"{v:.2f}" for v in row["hd95"]]
            cells += [f"{row['hd95_mean']:.2f}", f"{row['hd95_less']:.0%}"]
            cells += [
                f"{d:+.4f} [{low:+.4f}, {high:+.4f}]"
                for d, low, high in zip(row["dice_difference"], row["dice_low"], row["dice_high"], strict=True)
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        oracles = models[0]["rules"][ORACLE]
        chosen = "; ".join(f"{c}: {rule[0]}" for c, rule in zip(classes, oracles, strict=True))
        lines += ["", f"The oracle chose {chosen}. The private votes chose:", ""]
        for number, model in enumerate(models, 1):
            words = "; ".join(
                f"{c}: {', '.join(operations) or 'nothing'}"
                for c, operations in zip(classes, model["rules"]["**adaptive private**"], strict=True)
            )
            lines.append(f"- repeat {number}: {words}")
        lines.append("")
    return "\n".join(lines)


def freeze(folds: list[Path], file: Path) -> None:
    """Write the hashes of what is judged, or check them."""
    hashes = {
        f"{fold.parent.name}/{fold.name}/{name}": hashlib.sha256((fold / name).read_bytes()).hexdigest()
        for fold in folds
        for name in ("checkpoint_final.pth", "morphology.json")
    }
    known = json.loads(file.read_text()) if file.is_file() else {}
    changed = [name for name, value in hashes.items() if known.get(name, value) != value]
    if changed:
        raise SystemExit(f"changed since they were frozen: {', '.join(changed)}")
    file.write_text(json.dumps(known | hashes, indent=1) + "\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folds", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("-np", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    freeze(arguments.folds, arguments.out / "checkpoints.json")
    store = arguments.out / "results.json"
    done = json.loads(store.read_text()) if store.is_file() else {}
    for fold in arguments.folds:
        name = f"{fold.parent.parent.name}/{fold.parent.name}/{fold.name}"
        if name not in done:
            print(f"measuring {name}", flush=True)
            model = judged(fold)
            done[name] = measure_model(model, rules_for(model), arguments.np)
            store.write_text(json.dumps(done))
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for model in done.values():
        groups.setdefault((model["dataset"], model["epsilon"]), []).append(model)
    text = table(groups)
    (arguments.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
