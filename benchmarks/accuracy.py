"""Mean foreground Dice of private models on held-out cases, through the commands that users type; one row a call.

    python benchmarks/accuracy.py -d 4 -c 3d_fullres --epsilon 1 --delta 1e-4 -p nnUNetPlansPublic --repeats 3
    python benchmarks/accuracy.py -d 4 -c 3d_fullres --epsilon 0 --delta 1e-4 -p nnUNetPlansPublic
    python benchmarks/accuracy.py -d 4 -c 3d_fullres --epsilon inf --delta 1e-4 -p nnUNetPlansPublic --repeats 1 \
        --trainer nnUNetTrainer_10epochs --batch-size 4

Each repeat is ``nnunet-dp plan``, ``nnUNetv2_train`` of fold 0, ``nnUNetv2_predict`` of the fold's held-out cases and
``nnUNetv2_evaluate_folder``. What is finished is not done again, so the same command goes on after an interruption.
``--epsilon 0`` judges the public start by itself; other rows are compared with it case by case (95 % bootstrap over
units), once it is there. ``--recipe NAME --plan "OPTIONS"`` passes options to ``nnunet-dp plan`` (an ablation:
``--recipe no-start --plan "--no-start"``), ``--trainer`` takes another clip rule. ``--epsilon inf`` is plain nnU-Net
without privacy: one of its own trainers on the network of the default plan for epsilon 8, from random weights. The row
is added to, or replaced in, ``--json`` (default docs/results/accuracy.json). nnU-Net's three folders must be set; the
dataset's plans must be there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_dp.bootstrap import paired_bootstrap
from nnunet_dp.nnunet import (
    final_checkpoint,
    find_splits,
    model_folder,
    patients_of_plan,
    preprocessed_folder,
    public_dataset_json,
)
from nnunet_dp.nnunet_start import ensure_start
from nnunet_dp.plans import SECTION, read_section, without_patients_digest, write_json
from nnunet_dp.run import LATEST
from nnunet_dp.splits import fold_slots
from nnunet_dp.status import read_status

DRAWS = 5000


def shell(*words: object) -> None:
    """Run a command; its output goes to stderr, so that stdout is the row."""
    print("+", shlex.join(map(str, words)), file=sys.stderr, flush=True)
    subprocess.run([str(word) for word in words], check=True, stdout=sys.stderr)


class Row:
    """One line of the table: names, folders, repeats."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = preprocessed_folder(options.dataset)
        self.dataset_json = json.loads((self.folder / "dataset.json").read_text())
        self.name = self.folder.name.split("_", 1)[1]

    def plans_name(self, epsilon: float, repeat: int, recipe: str) -> str:
        mark = "" if recipe == "default" else recipe
        return f"{self.options.plans}DP_eps{epsilon:g}_s{repeat}{mark}"

    def plan(self, plans: str, epsilon: float) -> None:
        if math.isinf(epsilon):
            self._plan_without_privacy(plans)
        elif not (self.folder / f"{plans}.json").is_file():
            chosen = ("-d", self.options.dataset, "-c", self.options.configuration, "--epsilon", epsilon)
            names = ("-p", self.options.plans, "-o", plans, *shlex.split(self.options.plan))
            shell("nnunet-dp", "plan", *chosen, "--delta", self.options.delta, *names)

    def _plan_without_privacy(self, plans: str) -> None:
        """The network of the first default plan for epsilon 8, and nothing private."""
        private = self.plans_name(8, 1, "default")
        self.plan(private, 8)
        content = json.loads((self.folder / f"{private}.json").read_text()) | {"plans_name": plans}
        del content[SECTION]
        if self.options.batch_size:
            content["configurations"][self.options.configuration]["batch_size"] = self.options.batch_size
        write_json(content, self.folder / f"{plans}.json")

    def train(self, plans: str) -> Path:
        o = self.options
        model = model_folder(o.dataset, o.trainer, plans, o.configuration)
        if not (model / "fold_0" / "checkpoint_final.pth").is_file():
            going_on = ["--c"] if (model / "fold_0" / LATEST).is_file() else []
            chosen = ("-tr", o.trainer, "-p", plans, "-device", o.device)
            shell("nnUNetv2_train", o.dataset, o.configuration, 0, *chosen, *going_on)
        return model

    def start_alone(self, plans: str) -> Path:
        """A model folder whose weights are the public start: what is known without any private data."""
        o = self.options
        model = o.work / f"{self.folder.name}_{plans}_start__{o.configuration}"  # in results it would look like a run
        content = json.loads((self.folder / f"{plans}.json").read_text())
        device = torch.device(o.device)
        weights, _ = ensure_start(content, o.configuration, self.dataset_json, self.folder, device, 2, print_error)
        (model / "fold_0").mkdir(parents=True, exist_ok=True)
        write_json(without_patients_digest(content), model / "plans.json")
        write_json(public_dataset_json(self.dataset_json), model / "dataset.json")
        final = final_checkpoint(weights, o.trainer, o.configuration, 0, None, "public start", 0, 0)
        torch.save(final, model / "fold_0" / "checkpoint_final.pth")
        return model

    def judge(self, model: Path) -> dict[str, list[float]]:
        """Dice of each class on each held-out case."""
        images, references = self._held_out_images(model)
        predictions = self.options.work / (f"test_{model.name}" if self.options.test else model.name)
        ending, o = self.dataset_json["file_ending"], self.options
        if len(list(predictions.glob(f"*{ending}"))) < len(self.held_out):
            fixed = ("-f", 0, "-device", o.device, "-npp", 1, "-nps", 1)
            shell("nnUNetv2_predict_from_modelfolder", "-i", images, "-o", predictions, "-m", model, *fixed)
        summary = predictions / "summary.json"
        files = ("-djfile", model / "dataset.json", "-pfile", model / "plans.json")
        shell("nnUNetv2_evaluate_folder", references, predictions, *files, "-o", summary, "-np", 2, "--chill")
        found = json.loads(summary.read_text())["metric_per_case"]
        name = lambda case: Path(case["prediction_file"]).name[: -len(ending)]  # noqa: E731
        return {name(case): [m["Dice"] for m in case["metrics"].values()] for case in found}

    def _held_out_images(self, model: Path) -> tuple[Path, Path]:
        """Folders of the held-out images and of their references: the fold's validation cases, or the test set."""
        section = read_section(json.loads((self.folder / f"{self.plans_name(8, 1, 'default')}.json").read_text()))
        assert section is not None  # every plan of the dataset names the same units
        raw, ending = Path(os.environ["nnUNet_raw"]) / self.folder.name, self.dataset_json["file_ending"]
        self.patients = patients_of_plan(self.folder, section)
        self.unit_of_case = dict(self.patients.case_to_patient)
        if self.options.test:
            names = [file.name[: -len(ending)] for file in (raw / "labelsTs").glob(f"*{ending}")]
            self.held_out, self.unit_of_case = sorted(names), {name: name for name in names}
            return raw / "imagesTs", raw / "labelsTs"
        _, self.held_out = fold_slots(find_splits(self.folder, self.patients), 0, self.patients)
        images = self.options.work / f"held_out_{self.folder.name}"
        images.mkdir(parents=True, exist_ok=True)
        for case in self.held_out:
            for file in (raw / "imagesTr").glob(f"{case}_*"):
                if not (images / file.name).exists():
                    (images / file.name).symlink_to(file.resolve())
        return images, self.folder / "gt_segmentations"


def print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def difference(row: Row, mine: list[dict[str, list[float]]], theirs: dict[str, list[float]]) -> list[float]:
    """Mean Dice over that of the public start, and its 95 % interval over units; repeats are averaged per case."""
    cases = sorted(theirs)
    whose = row.unit_of_case
    ours = np.mean([[dice[case] for case in cases] for dice in mine], axis=0)
    values = np.stack([ours, np.array([theirs[case] for case in cases])])[..., None]
    found = paired_bootstrap(values, [whose[case] for case in cases], DRAWS, seed=0)[2]
    assert found is not None
    return [round(float(bound[-1, 0]), 4) for bound in (found.estimate, found.low, found.high)]


def measured(row: Row) -> dict[str, Any]:
    """Train and judge all repeats."""
    o = row.options
    dice, spent = [], []
    for repeat in range(1, 1 + (o.repeats if o.epsilon else 1)):
        plans = row.plans_name(o.epsilon or 8, repeat, o.recipe)
        row.plan(plans, o.epsilon or 8)
        model = row.train(plans) if o.epsilon else row.start_alone(plans)
        dice.append(row.judge(model))
        spent.append(read_status(model / "fold_0").as_dict() if o.epsilon and not math.isinf(o.epsilon) else None)
    means = [float(np.nanmean(np.nanmean(list(each.values()), axis=0))) for each in dice]
    start = o.work / f"start_{row.folder.name}_{o.plans}{'_test' if o.test else ''}.json"
    if not o.epsilon:
        start.write_text(json.dumps(dice[0]))
    known, without = spent[0] or {}, math.isinf(o.epsilon)
    return {
        "dataset": row.name,
        "epsilon_target": None if without else o.epsilon,
        "epsilon_spent": None if without else max((each["epsilon_spent"] for each in spent if each), default=0.0),
        "delta": o.delta if known else 0.0,
        "unit": known.get("unit", row.patients.unit),
        "recipe": "non-private" if without else o.recipe,
        "trainer": o.trainer,
        "held_out": "test set" if o.test else "validation cases of fold 0",
        "dice_mean": round(float(np.mean(means)), 4),
        "dice_std": round(float(np.std(means, ddof=1)), 4) if len(means) > 1 else None,
        "dice_of_each": [round(mean, 4) for mean in means],
        "repeats": len(means),
        "over_start": difference(row, dice, json.loads(start.read_text())) if o.epsilon and start.is_file() else None,
        "command": command(o),
        "machine": o.machine,
        "date": datetime.date.today().isoformat(),
    }


def command(o: argparse.Namespace) -> str:
    """What to type for the same row; folders and machine are left to whoever types it."""
    words = ["python", "benchmarks/accuracy.py", "-d", o.dataset, "-c", o.configuration, "--epsilon", f"{o.epsilon:g}"]
    words += ["--delta", f"{o.delta:g}", "-p", o.plans, "--repeats", str(o.repeats)]
    words += ["--test"] if o.test else []
    words += ["--recipe", o.recipe] if o.recipe != "default" else []
    words += [f"--plan={o.plan}"] if o.plan else []
    words += ["--batch-size", str(o.batch_size)] if o.batch_size else []
    return shlex.join([*words, "--trainer", o.trainer])


def add(row: dict[str, Any], file: Path) -> None:
    """Put the row into the table in place of an older one of the same kind."""
    rows = json.loads(file.read_text()) if file.is_file() else []
    key = ("dataset", "epsilon_target", "delta", "recipe", "trainer", "held_out")
    rows = [other for other in rows if [other[k] for k in key] != [row[k] for k in key]]
    file.write_text(json.dumps([*rows, row], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", required=True)
    parser.add_argument("-c", "--configuration", required=True)
    parser.add_argument("--epsilon", type=float, required=True, help="0: the public start alone; inf: no privacy")
    parser.add_argument("--delta", type=float, required=True)
    parser.add_argument("-p", "--plans", default="nnUNetPlans", help="plans to start from")
    parser.add_argument("--test", action="store_true", help="judge on imagesTs, not on the fold's validation cases")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--plan", default="", help="further options of nnunet-dp plan")
    parser.add_argument("--trainer", default="nnUNetTrainerDP_AutoS")
    parser.add_argument("--batch-size", type=int, help="of --epsilon inf; the default is that of the plans")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path("accuracy_work"), help="images, predictions")
    parser.add_argument("--json", type=Path, default=Path("docs/results/accuracy.json"))
    parser.add_argument("--machine", default=f"{platform.machine()}, {os.cpu_count()} cores")
    row = measured(Row(parser.parse_args()))
    print(json.dumps(row, indent=1))
    add(row, parser.parse_args().json)


if __name__ == "__main__":
    main()
