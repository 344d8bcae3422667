"""Plans as nnU-Net writes them, and a preprocessed dataset folder without any image: hand-made, small, public."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATASET = "Dataset004_Tubes"
DATASET_JSON = {
    "labels": {"background": 0, "front": 1, "back": 2},
    "channel_names": {"0": "MRI"},
    "numTraining": 12,
    "file_ending": ".nii.gz",
}


def architecture(dimension: int, depth: int, kind: str = "PlainConvUNet") -> dict[str, Any]:
    """nnU-Net's architecture entry: edges halved at each stage, features doubled from 32."""
    per_stage = {"PlainConvUNet": "n_conv_per_stage", "ResidualEncoderUNet": "n_blocks_per_stage"}[kind]
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": depth,
            "features_per_stage": [min(320, 32 * 2**stage) for stage in range(depth)],
            "conv_op": f"torch.nn.modules.conv.Conv{dimension}d",
            "kernel_sizes": [[3] * dimension] * depth,
            "strides": [[1] * dimension, *[[2] * dimension] * (depth - 1)],
            per_stage: [2] * depth,
            "n_conv_per_stage_decoder": [2] * (depth - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimension}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def configuration(name: str, patch_size: list[int], depth: int, kind: str = "PlainConvUNet") -> dict[str, Any]:
    """One configuration with everything that nnU-Net's managers read."""
    return {
        "data_identifier": f"nnUNetPlans_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 9,
        "patch_size": patch_size,
        "spacing": [1.0] * len(patch_size),
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": architecture(len(patch_size), depth, kind),
        "batch_dice": False,
    }


def ordinary_plans(kind: str = "PlainConvUNet") -> dict[str, Any]:
    """Plans with 2d, 3d_fullres (as for MSD Hippocampus), 3d_lowres and its cascade."""
    configurations = {
        "2d": configuration("2d", [128, 128], 6, kind),
        "3d_fullres": configuration("3d_fullres", [40, 56, 40], 4, kind),
        "3d_lowres": configuration("3d_lowres", [40, 56, 40], 4, kind),
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }


def preprocessed_dataset(base: Path, cases: int = 12) -> Path:
    """``base/preprocessed/Dataset004_Tubes``: references are empty files, for only their names count here."""
    folder = base / "preprocessed" / DATASET
    (folder / "gt_segmentations").mkdir(parents=True)
    for case in range(cases):
        (folder / "gt_segmentations" / f"tube_{case:02}.nii.gz").touch()
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    (folder / "nnUNetPlans.json").write_text(json.dumps(ordinary_plans()))
    return folder
