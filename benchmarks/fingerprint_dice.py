"""What the plans of a private fingerprint cost in Dice: short trainings with them and with the raw fingerprint's.

    python benchmarks/fingerprint.py      -d 311 --epsilon 8 --draws 50 --write 50      plans of 160 patients
    python benchmarks/fingerprint_dice.py -d 311 --train 321 --seeds 0 1 2              on 40 others, judged on 12

The plans kept for ``-d`` are taken over by the dataset ``--train`` (phantoms or other public data), preprocessed by
nnU-Net's own command, and their networks trained without privacy: AdamW, ``--iterations`` batches of two patches,
mirrored at random. Plans that decide the same training (spacing, patch, strides, CT window) are trained once. A seed
draws weights and patches, so runs of one seed pair up. One row a run is added to WORK/fingerprint_dice.jsonl; what
stands there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from fingerprint import essence, windows_of
from judging import Judge, held_out
from torch import Tensor

from nnunet_dp import nnunet
from nnunet_dp.federated.raw_dataset import nnunet_folder, raw_folder
from nnunet_dp.nnunet_fingerprint import ct_channels
from nnunet_dp.nnunet_start import planned_loss, planned_network
from nnunet_dp.plans import write_json
from nnunet_dp.public_start import LabelledImage, crop, learn
from nnunet_dp.sections import PublicStart

RAW = "nnUNetPlansRaw"


@dataclass(frozen=True)
class Patches:
    """Random patches of preprocessed images, mirrored at random; a source of batches for ``learn``."""

    images: Sequence[LabelledImage]
    patch_size: tuple[int, ...]

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images float32 [size, channels, *patch], labels int64 [size, *patch]."""
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        crops = [crop(self.images[rng.integers(len(self.images))], self.patch_size, rng) for _ in range(size)]
        images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*crops, strict=True))
        axes = [axis for axis in range(-len(self.patch_size), 0) if rng.random() < 0.5]
        return images.flip(axes).float(), labels.flip(axes).long()


def plans_by_training(
    source: str, configuration: str, windows: tuple[int, ...], epsilon: float
) -> dict[str, list[str]]:
    """Names of the plans that were kept for a dataset and a budget, by what they make of a training."""
    folder, found = nnunet_folder("preprocessed") / raw_folder(source).name, {}
    for file in [folder / f"{RAW}.json", *sorted(folder.glob(f"nnUNetPlansEps{epsilon:g}Draw*.json"))]:
        content = json.loads(file.read_text())
        key = json.dumps([essence(content, configuration), windows_of(content, windows)])
        found.setdefault(key, []).append(file.stem)
    return found


def taken_over(name: str, source: str, train: str, configuration: str, features: int) -> dict[str, Any]:
    """The plans for the other dataset, with a network of few features, and its images preprocessed by them."""
    folder = nnunet_folder("preprocessed") / raw_folder(train).name
    content = json.loads((nnunet_folder("preprocessed") / raw_folder(source).name / f"{name}.json").read_text())
    content["dataset_name"] = folder.name
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_bytes((raw_folder(train) / "dataset.json").read_bytes())
    write_json(content, folder / f"{name}.json")
    identifier = content["configurations"][configuration]["data_identifier"]
    if not (folder / f"{identifier}.done").is_file():
        subprocess.run(
            ["nnUNetv2_preprocess", "-d", train, "-plans_name", name, "-c", configuration, "-np", "1"],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        (folder / f"{identifier}.done").touch()
    network = content["configurations"][configuration]["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [min(features * 2**stage, 128) for stage in range(network["n_stages"])]
    return content


def preprocessed(plans: Mapping[str, Any], configuration: str) -> list[LabelledImage]:
    """All images that nnU-Net preprocessed."""
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    identifier = plans["configurations"][configuration]["data_identifier"]
    folder = str(nnunet_folder("preprocessed") / plans["dataset_name"] / identifier)
    dataset = infer_dataset_class(folder)(folder)
    cases = [dataset.load_case(case)[:2] for case in sorted(dataset.identifiers)]
    return [LabelledImage(np.asarray(image[:]), np.maximum(np.asarray(labels[:])[0], 0)) for image, labels in cases]


def trained(plans: dict[str, Any], o: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One short training, judged on the dataset's test cases."""
    description = json.loads((raw_folder(o.train) / "dataset.json").read_text())
    torch.manual_seed(seed)
    network = planned_network(plans, o.configuration, description)
    recipe = PublicStart(
        kinds=("shapes",), images=1, iterations=o.iterations, batch=2, learning_rate=2e-3, seed=seed
    )  # fmt: skip
    patches: Any = Patches(
        preprocessed(plans, o.configuration), tuple(plans["configurations"][o.configuration]["patch_size"])
    )
    loss, device = planned_loss(plans, o.configuration, description), torch.device("cpu")
    weights = learn(network, loss, patches, recipe, device, partial(nnunet.autocast, device))
    final = copy.deepcopy(network)
    final.load_state_dict(weights)
    return Judge(plans, o.configuration, description, final).scores(held_out(raw_folder(o.train)))


def rows(work: Path) -> list[dict[str, Any]]:
    file = work / "fingerprint_dice.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def summary(found: Sequence[Mapping[str, Any]]) -> None:
    """Difference to the raw plans of the same seed: mean over seeds, 95 % interval; draws that have such plans."""
    print("| dataset | plans | draws | patch | Dice | over the raw plans |")
    print("|---|---|---|---|---|---|")
    by = {(row["train"], row["plans"], row["seed"]): row for row in found}
    for train, plans in dict.fromkeys((row["train"], row["plans"]) for row in found):
        mine = {seed: row for (t, p, seed), row in by.items() if (t, p) == (train, plans)}
        told = [row["dice"] for row in mine.values()]
        pairs = [row["dice"] - by[train, RAW, s]["dice"] for s, row in mine.items() if (train, RAW, s) in by]
        over = "" if plans == RAW or not pairs else f"{mean(pairs):+.4f}"
        if over and len(pairs) > 1:
            from scipy.stats import t

            over += f" ± {float(t.ppf(0.975, len(pairs) - 1)) * stdev(pairs) / math.sqrt(len(pairs)):.4f}"
        any_row = next(iter(mine.values()))
        spread = f"{mean(told):.4f}" + (f" ± {stdev(told):.4f}" if len(told) > 1 else "")
        print(f"| {train} | {plans} | {len(any_row['same'])} | {any_row['patch']} | {spread} | {over} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("-d", "--dataset", help="whose fingerprints were drawn")
    parser.add_argument("--train", help="dataset to train on and judge by")
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("--epsilon", type=float, default=8.0, help="of the fingerprint's whole budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--features", type=int, default=8, help="of the first stage; doubled at each, at most 128")
    parser.add_argument("--most", type=int, default=5, help="different plans besides the raw ones, commonest first")
    parser.add_argument("--summary", action="store_true", help="only print the table")
    o = parser.parse_args()
    torch.set_num_threads(1)
    o.work.mkdir(parents=True, exist_ok=True)
    if not o.summary:
        measure(o)
    summary(rows(o.work))


def measure(o: argparse.Namespace) -> None:
    description = json.loads((raw_folder(o.train) / "dataset.json").read_text())
    known = plans_by_training(o.dataset, o.configuration, ct_channels(description), o.epsilon)
    usual = sorted(known.values(), key=lambda same: (RAW not in same, -len(same)))[: 1 + o.most]
    done = {(row["train"], row["plans"], row["seed"]) for row in rows(o.work)}
    for seed in o.seeds:
        for same in usual:
            if (o.train, same[0], seed) in done:
                continue
            began = time.time()
            plans = taken_over(same[0], o.dataset, o.train, o.configuration, o.features)
            row = {"train": o.train, "plans": same[0], "same": same, "seed": seed, "iterations": o.iterations}
            row |= {"patch": plans["configurations"][o.configuration]["patch_size"], "features": o.features}
            row |= trained(plans, o, seed) | {"seconds": round(time.time() - began)}
            with (o.work / "fingerprint_dice.jsonl").open("a") as table:
                table.write(json.dumps(row) + "\n")
            print(f"{o.train} {same[0]} seed {seed}: Dice {row['dice']:.4f}  {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
