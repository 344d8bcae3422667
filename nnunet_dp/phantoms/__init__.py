"""Phantoms: random anatomy-like images with labels, for defaults, tests and public pre-training.

A phantom dataset is public: it is made of random numbers and published anatomy, so nothing that is tuned or
trained on it spends any privacy budget. `write_dataset` writes it the way the real thing arrives: 3D kinds
as a Medical Segmentation Decathlon task (`nnUNetv2_convert_MSD_dataset` takes it from there), 2D kinds and
kinds with regions in nnU-Net's raw layout; in both, `patients.csv` says which cases belong to which patient.

===========  ==================================================================  =========  ======================
hippocampus  head and tail in T1-weighted MRI                                    3D         Task301, 2 classes
heart        right ventricle, myocardium, left ventricle in short-axis cine MRI  3D         Task303, 3 classes
ct_kidney    kidney and tumour in computed tomography                            3D         Task304, 2 classes
lesion       pigmented skin lesion in dermoscopy                                 2D, RGB    Dataset302, 1 class
layers       layers of the macula in optical coherence tomography                2D, grey   Dataset305, 7 classes
mpmri        glioblastoma in T1, T1 with contrast agent, T2 and FLAIR            3D         Dataset306, 3 regions
===========  ==================================================================  =========  ======================

    >>> import tempfile
    >>> folder = write_dataset(Path(tempfile.mkdtemp()), "lesion", patients=2, seed=1, shape=(32, 32))
    >>> folder.name, (folder / "patients.csv").read_text().splitlines()[0]
    ('Dataset302_PhantomLesion', 'case,patient')

The pieces: `anatomy` holds what all kinds share, each kind is one file with a `KIND`. To add one, write the
file and append it to `KINDS`.

Design note: the files of a patient depend on (kind, seed, index, shape) only. The index counts training and
test patients apart, so more patients of either sort change nothing in those that were there; only the
*numbers* of the test cases follow those of the training cases. ITK writes gzip headers without time and
name: equal images, equal bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_dp.errors import UsageRefusal

from . import ct_kidney, heart, hippocampus, layers, lesion, mpmri
from .anatomy import Kind, Patient, Scan, Shape

__all__ = ["KINDS", "Kind", "Patient", "Scan", "write_dataset"]

KINDS: Mapping[str, Kind] = MappingProxyType(
    {kind.name: kind for kind in (m.KIND for m in (hippocampus, heart, ct_kidney, lesion, layers, mpmri))}
)

Case = tuple[str, Patient, int]  # name, whose, which of the patient's


def write_dataset(
    out: Path,
    kind: str,
    patients: int,
    seed: int,
    *,
    dataset_id: int | None = None,
    cases_per_patient: tuple[int, int] | None = None,
    shape: tuple[int, ...] | None = None,
    test_patients: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a phantom dataset.

    Args:
        out: Folder that receives the dataset's folder; made if it does not exist.
        kind: One of `KINDS`.
        patients: Number of training patients, >= 1.
        seed: Seed, >= 0; the same arguments give the same bytes.
        dataset_id: Number of the dataset, 1 to 999; default: that of the kind.
        cases_per_patient: (lowest, highest) number of cases a patient has; default: that of the kind.
        shape: Voxels of every image; default: realistic sizes, which vary between the cases of some kinds.
        test_patients: Further, held-out patients, written to `imagesTs` and `labelsTs` and listed in
            `patients_test.csv` (nnU-Net trains on none of them, so `patients.csv` does not name them).
        progress: Called with (cases written, cases in all) after each case.

    Returns:
        The dataset's folder, `out/TaskXXX_Name` (3D) or `out/DatasetXXX_Name` (2D, or with regions). It
            appears when it is complete.

    Raises:
        UsageRefusal: An argument is out of range (a ValueError); the message says what is possible.
        FileExistsError: The dataset's folder exists already.
    """
    chosen = _checked_kind(kind, shape)
    low, high = _checked_counts(patients, test_patients, seed, cases_per_patient or chosen.cases_per_patient)
    folder = _new_folder(Path(out), chosen, dataset_id)
    training = _cases(chosen, seed, patients, (low, high), held_out=False, first_number=1)
    test = _cases(chosen, seed, test_patients, (low, high), held_out=True, first_number=len(training) + 1)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    try:
        _write_all(partial, chosen, training, test, shape, progress)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


# ---- what may be asked for -----------------------------------------------------------------------


def _checked_kind(name: str, shape: Shape | None) -> Kind:
    """The kind of that name, or a refusal that lists them."""
    if name not in KINDS:
        raise UsageRefusal(
            f"kind should be one of {', '.join(sorted(KINDS))}; found {name!r}. Type one of these."
        )
    kind = KINDS[name]
    least = kind.smallest_shape
    if shape is not None and (len(shape) != len(least) or np.any(np.less(shape, least))):
        raise UsageRefusal(
            f"shape of kind {name} should have {len(least)} axes of at least {least} voxels; "
            f"found {tuple(shape)}. Give a larger shape, or none for the realistic one."
        )
    return kind


def _checked_counts(patients: int, test_patients: int, seed: int, cases: tuple[int, int]) -> tuple[int, int]:
    """The numbers of cases per patient, or a refusal about the first number out of range."""
    if patients < 1:
        raise UsageRefusal(f"patients should be at least 1; found {patients}. Ask for one patient or more.")
    if test_patients < 0 or seed < 0:
        raise UsageRefusal(
            f"test_patients and seed should be at least 0; found {test_patients} and {seed}. Type 0 or more."
        )
    low, high = cases
    if not 1 <= low <= high:
        raise UsageRefusal(
            f"cases_per_patient should be (lowest, highest) with 1 <= lowest <= highest; found {cases}. "
            f"Give such a pair, or none for the default."
        )
    return low, high


def _new_folder(out: Path, kind: Kind, dataset_id: int | None) -> Path:
    """Where the dataset will lie; nothing may be there yet."""
    number = kind.dataset_id if dataset_id is None else dataset_id
    if not 1 <= number <= 999:
        raise UsageRefusal(
            f"dataset_id should be between 1 and 999; found {number}. Give such a number, or none for "
            f"{kind.dataset_id}."
        )
    folder = out / f"{'Task' if kind.decathlon else 'Dataset'}{number:03d}_{kind.title}"
    if folder.exists():
        raise FileExistsError(
            f"The dataset's folder should not exist yet; found {folder}. Remove it (rm -r '{folder}'), "
            f"or choose another output folder or another dataset id."
        )
    return folder


# ---- writing -------------------------------------------------------------------------------------


def _cases(
    kind: Kind, seed: int, patients: int, limits: tuple[int, int], held_out: bool, first_number: int
) -> list[Case]:
    """Names and streams of all cases, numbered through as in the Decathlon: hippocampus_001."""
    cases: list[Case] = []
    for index in range(patients):
        patient = Patient(kind.name, seed, index, held_out)
        for case in range(patient.number_of_cases(*limits)):
            cases.append((f"{kind.name}_{first_number + len(cases):03d}", patient, case))
    return cases


def _write_all(
    folder: Path,
    kind: Kind,
    training: list[Case],
    test: list[Case],
    shape: Shape | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Images and labels, then the small files that describe them."""
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / part).mkdir(parents=True)
    for done, (name, patient, case) in enumerate(training + test, start=1):
        _write_case(folder, "Ts" if patient.held_out else "Tr", name, kind, kind.render(patient, case, shape))
        if progress is not None:
            progress(done, len(training) + len(test))
    _write_patients(folder / "patients.csv", training)
    if test:
        _write_patients(folder / "patients_test.csv", test)
    description = _decathlon(kind, training, test) if kind.decathlon else _raw(kind, training)
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _write_case(folder: Path, part: str, name: str, kind: Kind, scan: Scan) -> None:
    """One image and its labels, in the layout of the kind."""
    images = _volumes(kind, scan) if kind.dimensions == 3 else {"_0000": _picture(scan)}
    labels = _volume(scan.segmentation, scan.spacing_mm) if kind.dimensions == 3 else _plane(scan.segmentation)
    for suffix, image in images.items():
        _write_file(image, folder / f"images{part}" / f"{name}{suffix}{kind.file_ending}")
    _write_file(labels, folder / f"labels{part}" / f"{name}{kind.file_ending}")


def _write_file(image: sitk.Image, path: Path) -> None:
    """Volumes are compressed by ITK's gzip, pictures as PNG always are."""
    sitk.WriteImage(image, str(path), useCompression=path.suffix == ".gz")


def _volumes(kind: Kind, scan: Scan) -> dict[str, sitk.Image]:
    """End of the file name -> volume: one file in the Decathlon (4D for several channels), else one a channel."""
    channels = [_volume(np.rint(channel).astype(np.int16), scan.spacing_mm) for channel in scan.image]
    if not kind.decathlon:
        return {f"_{number:04d}": channel for number, channel in enumerate(channels)}
    return {"": channels[0] if len(channels) == 1 else sitk.JoinSeries(channels)}


def _picture(scan: Scan) -> sitk.Image:
    """A grey or RGB picture: nnU-Net's NaturalImage2DIO takes two axes for grey, and a third one of 3 for RGB."""
    bytes_of = scan.image.clip(0, 255).astype(np.uint8)
    if len(bytes_of) == 1:
        return _plane(bytes_of[0])
    return sitk.GetImageFromArray(np.moveaxis(bytes_of, 0, -1), isVector=True)


def _plane(pixels: np.ndarray) -> sitk.Image:
    """An ITK image of one value a pixel, [rows, columns]."""
    return sitk.GetImageFromArray(pixels)


def _volume(voxels: np.ndarray, spacing_mm: tuple[float, ...]) -> sitk.Image:
    """An ITK image of an array [x, y, z] whose axes run right, forward and up."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.transpose()))
    image.SetSpacing(spacing_mm)
    # ITK counts left, back and up as positive.
    image.SetDirection((-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
    return image


def _write_patients(path: Path, cases: list[Case]) -> None:
    """The table case,patient; training patients are P0001, P0002, ..., held-out ones T0001, ..."""
    rows = [f"{name},{'T' if patient.held_out else 'P'}{patient.index + 1:04d}" for name, patient, _ in cases]
    path.write_text("\n".join(["case,patient", *rows]) + "\n", encoding="utf-8")


def _decathlon(kind: Kind, training: list[Case], test: list[Case]) -> dict[str, Any]:
    """dataset.json of a Decathlon task; the converter needs modality, training, test and labels by number."""
    return {
        **_common(kind, training),
        "release": "1.0",
        "tensorImageSize": "3D" if len(kind.channel_names) == 1 else "4D",
        "modality": {str(number): name for number, name in enumerate(kind.channel_names)},
        "labels": {str(value): name for name, value in kind.labels.items()},
        "numTest": len(test),
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name, *_ in training
        ],
        "test": [f"./imagesTs/{name}.nii.gz" for name, *_ in test],
    }


def _raw(kind: Kind, training: list[Case]) -> dict[str, Any]:
    """dataset.json of nnU-Net's raw layout."""
    order = kind.regions_class_order
    return {
        **_common(kind, training),
        "channel_names": {str(number): name for number, name in enumerate(kind.channel_names)},
        "labels": dict(kind.labels),
        **({} if order is None else {"regions_class_order": list(order)}),
        "file_ending": kind.file_ending,
        "overwrite_image_reader_writer": "SimpleITKIO" if kind.dimensions == 3 else "NaturalImage2DIO",
    }


def _common(kind: Kind, training: list[Case]) -> dict[str, Any]:
    """What both forms of dataset.json say."""
    return {
        "name": kind.title,
        "description": kind.description,
        "reference": "nnunet_dp.phantoms: random numbers and published anatomy, no patient's data",
        "licence": "CC0-1.0",
        "numTraining": len(training),
    }
