"""How often a private fingerprint plans as the raw one does: one draw of noise after the other, on one dataset.

    python benchmarks/fingerprint.py -d 4 --epsilon 8 3 --delta 1e-4 --draws 50
    python benchmarks/fingerprint.py -d 117 -c 2d --patients-file cases.csv --patient-column privacy_unit --epsilon 1

The images are measured once; every draw noises the same votes by the share of the budget that ``nnunet-dp fingerprint``
takes, and runs nnU-Net's planner. Plans are compared in all that decides a training: spacing, patch size, topology,
axes, normalisation; CT windows, which no two draws share, are printed as mean and deviation over the draws.

``--write K`` keeps the raw fingerprint's plans and those of the first K draws beside the dataset's own, so that cheap
trainings can judge them: ``nnUNetv2_preprocess -plans_name NAME``, ``benchmarks/accuracy.py -p NAME``.

Nothing is charged: this is for public data and phantoms. nnU-Net's three folders must be set.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.errors import Refusal
from nnunet_dp.federated.raw_dataset import nnunet_folder, raw_folder, read_raw
from nnunet_dp.fingerprint import SHARE, deviation_of, estimates, fewest_patients, is_audible, mechanism_for
from nnunet_dp.nnunet_fingerprint import ballot_for, ct_channels, measure, plans_from
from nnunet_dp.plans import write_json

WINDOW = ("percentile_00_5", "percentile_99_5", "mean", "std")


def essence(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """All of a configuration that decides a training, but CT windows."""
    chosen = plans["configurations"][configuration]
    told = {name: chosen[name] for name in ("spacing", "patch_size", "normalization_schemes", "use_mask_for_norm")}
    told["strides"] = chosen["architecture"]["arch_kwargs"]["strides"]
    return told | {"axes": plans["transpose_forward"], "spacing": [round(edge, 2) for edge in told["spacing"]]}


def windows_of(plans: Mapping[str, Any], channels: tuple[int, ...]) -> list[list[float]]:
    """What CT is clipped to and scaled by [channels, 4], HU."""
    properties = plans["foreground_intensity_properties_per_channel"]
    return [[properties[str(channel)][name] for name in WINDOW] for channel in channels]


def raw_plans(dataset: Path, dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """nnU-Net's own plans of the images as they are."""
    import contextlib
    import io
    import tempfile

    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    from nnunet_dp.nnunet_public_plans import nnunet_folders_in

    with tempfile.TemporaryDirectory() as place, nnunet_folders_in(Path(place)):
        (Path(place) / "raw" / dataset.name).symlink_to(dataset)
        with contextlib.redirect_stdout(io.StringIO()):
            extractor = DatasetFingerprintExtractor(dataset.name, 1)
            extractor.show_progress_bar = False
            extractor.run()
            plans = ExperimentPlanner(dataset.name).plan_experiment()
    return json.loads(json.dumps(plans))


def keep(plans: Mapping[str, Any], dataset: str, name: str) -> None:
    """Put plans into the dataset's preprocessed folder under a name of their own."""
    content = json.loads(json.dumps(plans).replace(plans["plans_name"], name)) | {"dataset_name": dataset}
    folder = nnunet_folder("preprocessed") / dataset
    folder.mkdir(parents=True, exist_ok=True)
    write_json(content, folder / f"{name}.json")
    write_json(json.loads((raw_folder(dataset) / "dataset.json").read_text()), folder / "dataset.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", required=True)
    parser.add_argument("-c", "--configuration", default="3d_fullres")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0])
    parser.add_argument("--delta", type=float, default=1e-4)
    parser.add_argument("--share", type=float, default=SHARE)
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--patients-file", type=Path)
    parser.add_argument("--patient-column")
    parser.add_argument("--write", type=int, default=0, help="keep plans of so many draws, for benchmarks/accuracy.py")
    o = parser.parse_args()
    raw = raw_folder(o.dataset)
    description = json.loads((raw / "dataset.json").read_text())
    ballot, windows = ballot_for(description), ct_channels(description)
    patients = read_raw(raw, o.patients_file, o.patient_column).patients
    values = measure(raw)
    votes = sum(ballot.votes([values[case] for case in mine]) for mine in patients.cases_of(values).values())
    plans = raw_plans(raw, description)
    reference = essence(plans, o.configuration)
    if o.write:
        keep(plans, raw.name, "nnUNetPlansRaw")
    print(f"{raw.name}: {patients.number} {patients.unit}s, {len(values)} cases; raw fingerprint: {reference}")
    print(*(f"  window {window}" for window in np.round(windows_of(plans, windows))))
    for epsilon in o.epsilon:
        mechanism = mechanism_for(PrivacyBudget(epsilon=epsilon, delta=o.delta), o.share)
        deviation = deviation_of(ballot, mechanism.noise_multiplier)
        found, drawn = Counter(), []
        for draw in range(o.draws):
            noised = votes + np.random.default_rng(draw).normal(0, deviation, votes.shape)
            try:
                told = plans_from(estimates(ballot, noised, patients.number, deviation), description, len(values))
            except Refusal:
                found["refused"] += 1
                continue
            drawn.append(windows_of(told, windows))
            if draw < o.write:
                keep(told, raw.name, f"nnUNetPlansEps{epsilon:g}Draw{draw}")
            mine = essence(told, o.configuration)
            other = {name: mine[name] for name in mine if mine[name] != reference[name]}
            found[json.dumps(other) if other else "as the raw one"] += 1
        least, audible = fewest_patients(ballot, deviation), is_audible(ballot, patients.number, deviation)
        choice = "private" if audible else f"public plans instead: {least} are needed"
        print(f"epsilon {epsilon:g}: noise of {deviation:.1f} patients ({choice})")
        for text, count in found.most_common():
            print(f"  {count} of {o.draws}  {text}", flush=True)
        if windows and drawn:
            print(f"  windows {np.mean(drawn, 0).round().tolist()} +- {np.std(drawn, 0, ddof=1).round(1).tolist()}")


if __name__ == "__main__":
    main()
