"""How good a network is on held-out cases: predicted by nnU-Net's own predictor, measured case by case."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

HeldOut = tuple[str, list[Path], Path]  # case, its images, its labels


def held_out(raw: Path) -> list[HeldOut]:
    """The test cases of a raw dataset that has labels of them."""
    ending = json.loads((raw / "dataset.json").read_text())["file_ending"]
    found = [(file.name.removesuffix(ending), file) for file in sorted((raw / "labelsTs").iterdir())]
    return [(case, sorted((raw / "imagesTs").glob(f"{case}_????{ending}")), file) for case, file in found]


class Judge:
    """A network with the plans that it was made from.

    Args:
        plans: nnU-Net's.
        configuration: of the plans.
        dataset_json: labels or regions, channels, file ending.
        network: as ``planned_network`` builds it; its deep supervision is turned off.
    """

    def __init__(
        self, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any], network: Any
    ) -> None:
        import torch
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        network.decoder.deep_supervision = False
        manager = PlansManager(dict(plans))
        predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), verbose=False, allow_tqdm=False)
        predictor.manual_initialization(
            network, manager, manager.get_configuration(configuration), [network.state_dict()],
            {**dataset_json, "numTraining": 1}, "benchmark", None,
        )  # fmt: skip
        self._segment, self._reader = predictor.predict_single_npy_array, manager.image_reader_writer_class()
        named = dataset_json["labels"].items()
        self._structures = [value for name, value in named if name not in ("background", "ignore")]

    def scores(self, cases: Iterable[HeldOut]) -> dict[str, Any]:
        """Mean Dice and HD95 (mm) over cases, each the mean over structures, and every case's Dice."""
        from nnunet_dp.segmentation_metrics import segmentation_metrics

        dice, hd95 = {}, []
        for case, images, labels in cases:
            image, properties = self._reader.read_images([str(file) for file in images])
            truth = self._reader.read_seg(str(labels))[0][0]
            guess = np.asarray(self._segment(image, properties)).reshape(truth.shape)
            spacing = properties["spacing"][-truth.ndim :]
            found = [
                segmentation_metrics(np.isin(truth, values), np.isin(guess, values), spacing, 1.0)
                for values in self._structures
            ]
            dice[case] = float(np.nanmean([metrics.dice for metrics in found]))
            hd95.append(float(np.nanmean([metrics.hd95 for metrics in found])))
        return {"dice": float(np.nanmean([*dice.values()])), "hd95": float(np.nanmean(hd95)), "dice_of_each_case": dice}
