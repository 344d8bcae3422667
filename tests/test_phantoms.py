"""Phantoms: what is written is what nnU-Net takes, the same every time, and shaped like anatomy."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from skimage import io

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.phantoms import KINDS, Patient, write_dataset
from nnunet_dp.phantoms.anatomy import (
    bias_field,
    coordinates,
    coverage,
    ellipsoid,
    rician,
    smooth_noise,
    tube,
)

SMALL = {**{name: kind.smallest_shape for name, kind in KINDS.items()}, "hippocampus": (20, 24, 20), "lesion": (48, 48)}
VERIFY = """
import sys
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
if __name__ == "__main__":
    verify_dataset_integrity(sys.argv[1], num_processes=1)
"""


def files(folder: Path, under: str = "") -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / under).rglob("*"))
        if path.is_file()
    }


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def run_nnunet(arguments: list[str], root: Path) -> None:
    folders = {name: str(root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in folders.values():
        Path(folder).mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **folders}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.fixture(scope="module", params=sorted(KINDS))
def dataset(request, tmp_path_factory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp(request.param)
    return request.param, write_dataset(out, request.param, 4, 5, shape=SMALL[request.param], test_patients=2)


def test_nnunet_converts_and_verifies_the_decathlon_task(tmp_path):
    task = write_dataset(tmp_path, "hippocampus", 2, 5, shape=SMALL["hippocampus"], test_patients=1)
    convert = "from nnunetv2.dataset_conversion.convert_MSD_dataset import entry_point; entry_point()"
    run_nnunet(["-c", convert, "-i", str(task), "-np", "1"], tmp_path)
    raw = tmp_path / "nnUNet_raw" / "Dataset301_PhantomHippocampus"
    assert len(list((raw / "imagesTs").iterdir())) == len(rows(task / "patients_test.csv"))
    (tmp_path / "verify.py").write_text(VERIFY)
    run_nnunet([str(tmp_path / "verify.py"), str(raw)], tmp_path)


@pytest.mark.parametrize("kind", sorted(name for name, kind in KINDS.items() if not kind.decathlon))
def test_nnunet_verifies_the_raw_dataset(kind, tmp_path):
    folder = write_dataset(tmp_path, kind, 2, 5, shape=SMALL[kind])
    (tmp_path / "verify.py").write_text(VERIFY)
    run_nnunet([str(tmp_path / "verify.py"), str(folder)], tmp_path)


def test_the_same_arguments_give_the_same_bytes(dataset, tmp_path):
    kind, folder = dataset
    again = write_dataset(tmp_path, kind, 4, 5, shape=SMALL[kind], test_patients=2)
    assert files(again) == files(folder)


def test_another_seed_gives_other_images(dataset, tmp_path):
    kind, folder = dataset
    other = files(write_dataset(tmp_path, kind, 4, 6, shape=SMALL[kind]), "imagesTr")
    assert not set(other.values()) & set(files(folder, "imagesTr").values())


def test_more_patients_leave_the_first_ones_as_they_are(dataset, tmp_path):
    kind, folder = dataset
    larger = write_dataset(tmp_path, kind, 6, 5, shape=SMALL[kind])
    for part in ("imagesTr", "labelsTr"):
        assert files(folder, part).items() < files(larger, part).items()
    first = (folder / "patients.csv").read_text()
    assert (larger / "patients.csv").read_text().startswith(first)


def test_held_out_patients_stay_the_same_and_never_become_training_patients(dataset, tmp_path):
    kind, folder = dataset
    larger = write_dataset(tmp_path, kind, 6, 5, shape=SMALL[kind], test_patients=3)
    held_out = set(files(folder, "imagesTs").values())
    assert held_out < set(files(larger, "imagesTs").values())
    assert not held_out & set(files(larger, "imagesTr").values())


def test_the_order_of_drawing_does_not_matter(dataset):
    kind, _ = dataset
    patient = Patient(kind, 5, 3)
    alone = KINDS[kind].render(patient, 1, SMALL[kind])
    KINDS[kind].render(patient, 0, SMALL[kind])
    again = KINDS[kind].render(patient, 1, SMALL[kind])
    np.testing.assert_array_equal(alone.image, again.image)
    np.testing.assert_array_equal(alone.segmentation, again.segmentation)


def test_patients_csv_gives_each_training_case_one_patient(dataset):
    kind, folder = dataset
    table = rows(folder / "patients.csv")
    assert list(table[0]) == ["case", "patient"]
    names = [path.name.split(".")[0] for path in sorted((folder / "labelsTr").iterdir())]
    assert [row["case"] for row in table] == names
    assert len({row["patient"] for row in table}) == 4
    assert (len(table) > 4) == (KINDS[kind].cases_per_patient[1] > 1)


def test_cases_are_named_as_in_the_decathlon_and_listed_in_dataset_json(dataset):
    kind, folder = dataset
    description = json.loads((folder / "dataset.json").read_text())
    assert description["numTraining"] == len(rows(folder / "patients.csv"))
    assert rows(folder / "patients.csv")[0]["case"] == f"{kind}_001"
    for entry in description.get("training", []):
        assert (folder / entry["image"]).is_file() and (folder / entry["label"]).is_file()
    assert len(description.get("test", ())) in (0, len(rows(folder / "patients_test.csv")))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("size", ["smallest", "realistic"])
def test_every_case_holds_every_class(kind, size):
    shape = KINDS[kind].smallest_shape if size == "smallest" else None
    for index in range(20 if size == "smallest" else 12):
        scan = KINDS[kind].render(Patient(kind, 9, index), index % 2, shape)
        assert tuple(np.unique(scan.segmentation)) == KINDS[kind].label_values
        assert scan.image.shape == (len(KINDS[kind].channel_names), *scan.segmentation.shape)
        assert np.isfinite(scan.image).all() and scan.image.dtype == np.float32


def test_each_kind_has_a_number_and_a_title_of_its_own():
    for field in ("dataset_id", "title", "name"):
        assert len({getattr(kind, field) for kind in KINDS.values()}) == len(KINDS)
    assert all(kind.label_values == tuple(range(len(kind.label_values))) for kind in KINDS.values())


def test_kinds_with_regions_are_written_one_file_a_channel_with_regions_in_dataset_json(tmp_path):
    folder = write_dataset(tmp_path, "mpmri", 1, 5, shape=SMALL["mpmri"], cases_per_patient=(1, 1), test_patients=1)
    assert folder.name == "Dataset306_PhantomGlioma"
    description = json.loads((folder / "dataset.json").read_text())
    assert description["labels"] == {
        "background": 0, "whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing tumour": 3
    }  # fmt: skip
    assert description["regions_class_order"] == [1, 2, 3]
    for part, name in (("Tr", "mpmri_001"), ("Ts", "mpmri_002")):
        channels = [path.name for path in sorted((folder / f"images{part}").iterdir())]
        assert channels == [f"{name}_{number:04d}.nii.gz" for number in range(4)]
        assert [path.name for path in (folder / f"labels{part}").iterdir()] == [f"{name}.nii.gz"]


def test_each_channel_file_holds_its_channel(tmp_path):
    folder = write_dataset(tmp_path, "mpmri", 1, 5, shape=SMALL["mpmri"])
    expected = KINDS["mpmri"].render(Patient("mpmri", 5, 0), 0, SMALL["mpmri"])
    for number, channel in enumerate(expected.image):
        image = sitk.ReadImage(folder / "imagesTr" / f"mpmri_001_{number:04d}.nii.gz")
        assert image.GetSpacing() == expected.spacing_mm
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image).transpose(), channel)


def test_grey_png_files_have_two_axes_and_hold_the_scan(tmp_path):
    folder = write_dataset(tmp_path, "layers", 1, 5, shape=SMALL["layers"])
    expected = KINDS["layers"].render(Patient("layers", 5, 0), 0, SMALL["layers"])
    image = io.imread(folder / "imagesTr" / "layers_001_0000.png")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected.image[0])
    np.testing.assert_array_equal(io.imread(folder / "labelsTr" / "layers_001.png"), expected.segmentation)


def test_png_files_are_rgb_images_and_labels_of_zero_and_one(tmp_path):
    folder = write_dataset(tmp_path, "lesion", 2, 5, shape=SMALL["lesion"])
    for label in (folder / "labelsTr").iterdir():
        assert set(np.unique(io.imread(label))) == {0, 1}
        image = io.imread(folder / "imagesTr" / f"{label.stem}_0000.png")
        assert image.shape == (*SMALL["lesion"], 3) and image.dtype == np.uint8


def test_nifti_files_keep_axes_spacing_and_voxels(tmp_path):
    folder = write_dataset(tmp_path, "hippocampus", 1, 5, shape=SMALL["hippocampus"])
    image = sitk.ReadImage(folder / "imagesTr" / "hippocampus_001.nii.gz")
    expected = KINDS["hippocampus"].render(Patient("hippocampus", 5, 0), 0, SMALL["hippocampus"])
    assert image.GetSpacing() == expected.spacing_mm
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).transpose(), expected.image[0])


def test_hippocampi_measure_what_anatomists_report():
    counts = [
        np.bincount(KINDS["hippocampus"].render(Patient("hippocampus", 1, i), 0, None).segmentation.ravel())
        for i in range(30)
    ]
    volume_ml = np.array([count[1:].sum() for count in counts]) / 1000
    anterior = np.array([count[1] / count[1:].sum() for count in counts])
    assert 3.0 < volume_ml.mean() < 3.9 and volume_ml.min() > 1.8 and volume_ml.max() < 5.5
    assert 0.4 < anterior.mean() < 0.6 and anterior.min() > 0.2 and anterior.max() < 0.8


def test_the_two_cases_of_a_patient_are_more_alike_than_those_of_two_patients():
    def labels(index: int, case: int) -> np.ndarray:
        return (
            KINDS["hippocampus"].render(Patient("hippocampus", 1, index), case, (35, 50, 36)).segmentation > 0
        )

    def dice(one: np.ndarray, other: np.ndarray) -> float:
        return 2 * (one & other).sum() / (one.sum() + other.sum())

    left, right = [labels(i, 0) for i in range(12)], [labels(i, 1) for i in range(12)]
    within = np.mean([dice(left[i], right[i]) for i in range(12)])
    between = np.mean([dice(left[i], right[i - 1]) for i in range(12)])
    assert between + 0.03 < within < 0.95


def test_grey_matter_of_the_hippocampus_is_darker_than_white_matter():
    for index in range(6):
        scan = KINDS["hippocampus"].render(Patient("hippocampus", 1, index), 0, None)
        white, fluid = np.percentile(scan.image, [90, 1])
        inside = np.median(scan.image[0][scan.segmentation > 0])
        assert fluid < 0.8 * inside and inside < 0.85 * white


def test_lesions_differ_from_the_skin_around_them():
    differences = []
    for index in range(20):
        scan = KINDS["lesion"].render(Patient("lesion", 1, index), 0, None)
        inside = scan.segmentation > 0
        differences.append(np.median(scan.image[:, ~inside]) - np.median(scan.image[:, inside]))
        assert 0.005 < inside.mean() < 0.75
    assert np.median(differences) > 15


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "toe"}, "hippocampus, layers, lesion"),
        ({"patients": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
        ({"dataset_id": 1000}, "between 1 and 999"),
        ({"shape": (8, 8, 8)}, "at least"),
        ({"shape": (32, 32)}, "3 axes"),
        ({"cases_per_patient": (2, 1)}, "lowest <= highest"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(changes, words, tmp_path):
    with pytest.raises(UsageRefusal, match=words):
        write_dataset(tmp_path, **{"kind": "hippocampus", "patients": 1, "seed": 1, **changes})
    assert not list(tmp_path.iterdir())


def test_an_existing_dataset_is_not_overwritten(tmp_path):
    folder = write_dataset(tmp_path, "lesion", 1, 1, shape=SMALL["lesion"])
    before = files(folder)
    with pytest.raises(FileExistsError, match="rm -r"):
        write_dataset(tmp_path, "lesion", 1, 2, shape=SMALL["lesion"])
    assert files(folder) == before


def test_an_interrupted_run_leaves_no_dataset(tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, "lesion", 2, 1, shape=SMALL["lesion"], progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_progress_counts_every_case_once(tmp_path):
    seen: list[tuple[int, int]] = []
    write_dataset(
        tmp_path,
        "lesion",
        2,
        1,
        shape=SMALL["lesion"],
        cases_per_patient=(2, 2),
        test_patients=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 6) for done in range(1, 7)]


def test_smooth_noise_has_unit_variance_and_is_smooth():
    rng = np.random.default_rng(1)
    field = np.stack([smooth_noise(rng, (40, 40), 1.0, 8.0) for _ in range(200)])
    assert abs(field.var() - 1) < 0.1
    assert np.diff(field, axis=1).std() < 0.25


def test_distances_to_a_ball_are_exact():
    points = coordinates((21, 21, 21), 0.5)
    exact = np.linalg.norm(points, axis=0) - 3
    np.testing.assert_allclose(ellipsoid(points, (0, 0, 0), (3, 3, 3)), exact, atol=1e-3)
    np.testing.assert_allclose(tube(points, [(0, 0, 0)], [3]), exact, atol=1e-3)


def test_partial_volume_keeps_the_volume():
    points = coordinates((31, 31, 31), 1.0)
    volume = coverage(ellipsoid(points, (0.3, 0.1, 0.2), (9, 7, 5)), 1.0).sum()
    assert volume == pytest.approx(4 / 3 * np.pi * 9 * 7 * 5, rel=0.02)


def test_the_bias_field_spans_its_strength():
    field = bias_field(np.random.default_rng(1), (30, 30, 30), 1.0, 0.4)
    assert field.max() - field.min() == pytest.approx(0.4, rel=1e-3)


def test_noise_is_rician_and_not_gaussian():
    rng = np.random.default_rng(1)
    background = rician(rng, np.zeros((100, 100)), 2.0)
    assert background.min() >= 0
    assert background.mean() == pytest.approx(2.0 * np.sqrt(np.pi / 2), rel=0.03)  # Rayleigh
