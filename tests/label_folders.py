"""Folders of small segmentations and the dataset.json beside them, for the tests of what measures them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

PATIENTS = 12


def save(folder: Path, case: str, labels, spacing=(3.0, 1.0, 2.0), ending=".nii.gz", dtype=np.uint8) -> Path:
    """Write one image; spacing in the order of the array's axes."""
    folder.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.asarray(labels).astype(dtype))
    if ending != ".png":
        image.SetSpacing([float(length) for length in spacing[::-1]][: image.GetDimension()])
    file = folder / f"{case}{ending}"
    sitk.WriteImage(image, str(file))
    return file


def cube(low=2, high=6, label=1, shape=(8, 9, 10)) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    labels[(slice(low, high),) * len(shape)] = label
    return labels


def write_labels(file: Path, labels: dict, **more) -> Path:
    file.write_text(json.dumps({"labels": {"background": 0, **labels}, "file_ending": ".nii.gz", **more}))
    return file


def write_patients(root: Path, rows: dict[str, str]) -> Path:
    file = root / "patients.csv"
    file.write_text("case,patient\n" + "".join(f"{case},{patient}\n" for case, patient in rows.items()))
    return file


def draw_folders(root: Path, fault: float = 0.0, cases: int = PATIENTS) -> tuple[Path, Path, Path]:
    """References of two classes; predictions with noise; the same predictions less a share of their voxels."""
    generator = np.random.default_rng(3)
    for case in range(cases):
        truth = cube(1, 4) + cube(5, 8, 2)
        noisy = np.where(generator.random(truth.shape) < 0.02 * (1 + case % 3), 0, truth)
        save(root / "ref", f"case_{case:02}", truth)
        save(root / "pred", f"case_{case:02}", noisy)
        save(root / "other", f"case_{case:02}", np.where(generator.random(truth.shape) < fault, 0, noisy))
    return root / "ref", root / "pred", root / "other"
