"""Folders of predictions, as nnU-Net writes them: what is refined, what is kept, and nnU-Net's own postprocessing."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing, load_postprocess_save
from skimage import io

from nnunet_dp import refined_folder
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.morphology import (
    FILE,
    Closing,
    FillHoles,
    KeepLargest,
    Morphology,
    Opening,
    RemoveSmall,
    classes_from,
    read_morphology,
)
from nnunet_dp.nnunet_files import SegmentationFiles
from nnunet_dp.refined_folder import PICKLE, refine_folder, write_pickle
from nnunet_dp.refinement import refine

LABELS = {"background": 0, "front": 1, "back": 2}
GEOMETRY = {
    "spacing": (0.7, 0.9, 2.5),
    "origin": (-31.5, 12.25, 400.0),
    "direction": (0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0),
}


def rules(*operations, ending=".nii.gz", labels=None, kind="fixed", **description) -> Morphology:
    known = classes_from({"labels": labels or LABELS, "file_ending": ending, **description})
    classes = tuple(rule.model_copy(update={"operations": tuple(operations)}) for rule in known.classes)
    return known.model_copy(update={"classes": classes, "kind": kind})


def prediction(seed: int, shape=(10, 30, 24)) -> np.ndarray:
    """Two boxes, one with a hole, and specks of both labels."""
    image = np.zeros(shape, np.uint8)
    image[..., 4:14, 4:12], image[..., 4:14, 14:20] = 1, 2
    image[..., 8:10, 7:9] = 0
    specks = np.random.default_rng(seed).random(shape) < 0.01
    image[specks & (image == 0)] = 1 + seed % 2
    return image


def write_volume(image: np.ndarray, file: Path, **geometry) -> None:
    volume = sitk.GetImageFromArray(image)
    volume.SetSpacing(geometry["spacing"])
    volume.SetOrigin(geometry["origin"])
    volume.SetDirection(geometry["direction"])
    sitk.WriteImage(volume, str(file))


def description(folder: Path, ending: str, reader: str, **more) -> None:
    told = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ending, **more}
    (folder / "dataset.json").write_text(json.dumps(told))
    (folder / "plans.json").write_text(json.dumps({"image_reader_writer": reader}))


@pytest.fixture
def volumes(tmp_path) -> Path:
    folder = tmp_path / "volumes"
    folder.mkdir()
    for seed in range(3):
        write_volume(prediction(seed), folder / f"tube_{seed}.nii.gz", **GEOMETRY)
    description(folder, ".nii.gz", "SimpleITKIO")
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(3):
        io.imsave(folder / f"mole_{seed}.png", prediction(seed, (30, 24)), check_contrast=False)
    description(folder, ".png", "NaturalImage2DIO")
    return folder


def voxels(file: Path) -> np.ndarray:
    return io.imread(file) if file.suffix == ".png" else sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


RULES = rules(KeepLargest(), FillHoles())

# ---- files -------------------------------------------------------------------------------------------------------


def test_every_volume_is_refined_with_its_own_spacing(volumes, tmp_path):
    opening = rules(Opening(radius_mm=1.3), RemoveSmall(below_mm3=20.0))
    write_volume(prediction(0), volumes / "fine.nii.gz", **GEOMETRY | {"spacing": (0.3, 0.3, 0.4)})
    assert refine_folder(volumes, tmp_path / "out", opening) == 4
    results = []
    for file in sorted(volumes.glob("*.nii.gz")):
        spacing_mm = sitk.ReadImage(str(file)).GetSpacing()[::-1]
        results.append(voxels(tmp_path / "out" / file.name))
        assert np.array_equal(results[-1], refine(voxels(file), opening, spacing_mm))
        assert not np.array_equal(results[-1], voxels(file))
    assert not np.array_equal(results[0], results[1])  # fine and tube_0 hold the same voxels


def test_spacing_origin_and_direction_of_a_volume_are_kept(volumes, tmp_path):
    refine_folder(volumes, tmp_path / "out", RULES)
    for file in volumes.glob("*.nii.gz"):
        before, after = (sitk.ReadImage(str(folder / file.name)) for folder in (volumes, tmp_path / "out"))
        assert after.GetSpacing() == pytest.approx(before.GetSpacing())
        assert after.GetOrigin() == pytest.approx(before.GetOrigin())
        assert after.GetDirection() == pytest.approx(before.GetDirection())
        assert (after.GetSize(), after.GetPixelID()) == (before.GetSize(), sitk.sitkUInt8)


def test_pictures_are_refined_in_the_plane(pictures, tmp_path):
    opening = rules(Opening(radius_mm=1.0), FillHoles(), ending=".png")
    assert refine_folder(pictures, tmp_path / "out", opening) == 3
    for file in pictures.glob("*.png"):
        refined = voxels(tmp_path / "out" / file.name)
        assert np.array_equal(refined, refine(voxels(file), opening, (1.0, 1.0)))
        assert refined.dtype == np.uint8 and (refined == 1).any() and (refined == 2).any()


def test_labels_above_255_come_through_whole(volumes, tmp_path):
    wide = prediction(0).astype(np.uint16)
    wide[wide == 2] = 300
    labels = {"background": 0, "front": 1, "back": 300}
    write_volume(wide, volumes / "wide.nii.gz", **GEOMETRY)
    description(volumes, ".nii.gz", "SimpleITKIO", labels=labels)
    refine_folder(volumes, tmp_path / "out", rules(KeepLargest(), labels=labels), only=["wide.nii.gz"])
    assert set(np.unique(voxels(tmp_path / "out" / "wide.nii.gz"))) == {0, 1, 300}


def test_voxels_of_the_ignore_label_come_through(volumes, tmp_path):
    labels = LABELS | {"ignore": 3}
    image = prediction(0)
    image[0, :3] = 3
    write_volume(image, volumes / "ignoring.nii.gz", **GEOMETRY)
    description(volumes, ".nii.gz", "SimpleITKIO", labels=labels)
    refine_folder(volumes, tmp_path / "out", rules(KeepLargest(), FillHoles(), labels=labels))
    assert np.array_equal(voxels(tmp_path / "out" / "ignoring.nii.gz") == 3, image == 3)


# ---- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["volumes", "pictures"])
def test_a_folder_can_be_refined_in_place_and_twice_is_once(kind, tmp_path, request):
    folder = request.getfixturevalue(kind)
    chosen = rules(Opening(radius_mm=1.0), *RULES.classes[0].operations)
    refine_folder(folder, tmp_path / "elsewhere", chosen)
    refine_folder(folder, folder, chosen)
    once = content(folder)
    assert once == content(tmp_path / "elsewhere")
    refine_folder(folder, folder, chosen)
    images = [name for name in once if name.endswith((".png", ".nii.gz"))]
    assert len(images) == 3 and set(content(folder)) == set(once)
    assert all(np.array_equal(voxels(folder / n), voxels(tmp_path / "elsewhere" / n)) for n in images)


def test_the_target_gets_description_plans_and_rules_and_no_debris(volumes, tmp_path):
    refine_folder(volumes, tmp_path / "new" / "out", RULES)
    expected = {f"tube_{seed}.nii.gz" for seed in range(3)} | {"dataset.json", "plans.json", FILE}
    assert set(content(tmp_path / "new" / "out")) == expected
    assert read_morphology(tmp_path / "new" / "out" / FILE) == RULES
    again = refine_folder(tmp_path / "new" / "out", tmp_path / "third", RULES)
    assert again == 3


def test_two_processes_do_what_one_does_and_tell_their_progress(volumes, tmp_path):
    told = []
    refine_folder(volumes, tmp_path / "one", RULES)
    refine_folder(volumes, tmp_path / "two", RULES, processes=2, progress=lambda *found: told.append(found))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_only_the_named_files_are_touched(volumes):
    before = content(volumes)
    assert refine_folder(volumes, volumes, RULES, only=["tube_1.nii.gz", "elsewhere.nii.gz"]) == 1
    after = content(volumes)
    assert {name for name in before if before[name] != after[name]} == {"tube_1.nii.gz"}


def test_a_folder_without_a_description_is_refused_and_one_can_be_named(volumes, tmp_path):
    shutil.move(volumes / "dataset.json", tmp_path / "elsewhere.json")
    with pytest.raises(UsageRefusal, match="--dataset-json"):
        refine_folder(volumes, tmp_path / "out", RULES)
    assert not (tmp_path / "out").exists()
    assert refine_folder(volumes, tmp_path / "out", RULES, dataset_json=tmp_path / "elsewhere.json") == 3
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"] == LABELS


def test_predictions_without_plans_are_read_by_their_file_ending(volumes, pictures, tmp_path):
    for folder in (volumes, pictures):
        (folder / "plans.json").unlink()
        assert refine_folder(folder, tmp_path / folder.name / "out", RULES) == 3


def test_a_folder_without_predictions_is_refused(volumes, tmp_path):
    for file in volumes.glob("*.nii.gz"):
        file.unlink()
    with pytest.raises(UsageRefusal, match=r"no predictions that end in \.nii\.gz"):
        refine_folder(volumes, tmp_path / "out", RULES)


@pytest.mark.parametrize(
    "foreign",
    [
        rules(labels={"background": 0, "front": 1}),
        rules(labels={"background": 0, "front": 1, "back": 3}),
        rules(labels={"background": 0, "back": 2, "front": 1}),
        rules(labels={"background": 0, "whole": [1, 2], "core": [2]}, regions_class_order=[1, 2]),
    ],
)
def test_rules_for_other_classes_are_refused_before_a_file_is_touched(volumes, foreign):
    before = content(volumes)
    with pytest.raises(UsageRefusal, match=r"the dataset has front \[1\], back \[2\]; the rules speak of"):
        refine_folder(volumes, volumes, foreign)
    assert content(volumes) == before


def test_rules_learnt_without_noise_are_refused_before_a_file_is_written(volumes, tmp_path):
    with pytest.raises(UsageRefusal, match="without noise"):
        refine_folder(volumes, tmp_path / "out", rules(KeepLargest(), kind="not_private"))
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_the_old_prediction_and_no_debris(volumes, monkeypatch):
    before = content(volumes)

    def full_disk(self, segmentation, file, properties):
        file.write_bytes(b"half a volu")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SegmentationFiles, "write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        refine_folder(volumes, volumes, RULES)
    assert content(volumes) == before


# ---- nnU-Net's own form ------------------------------------------------------------------------------------------


def loaded(folder: Path):
    return pickle.loads((folder / PICKLE).read_bytes())


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])  # nnU-Net's readers give float32
@pytest.mark.parametrize("spacing_mm", [(2.5, 0.9, 0.7), None])
def test_nnunets_own_function_does_what_refine_does(tmp_path, dtype, spacing_mm):
    chosen = rules(KeepLargest(), FillHoles()) if spacing_mm is None else rules(Opening(radius_mm=1.3), KeepLargest())
    assert write_pickle(chosen, tmp_path, spacing_mm) == ()
    found = apply_postprocessing(prediction(0).astype(dtype), *loaded(tmp_path))
    assert np.array_equal(found, refine(prediction(0), chosen, spacing_mm or (1.0, 1.0, 1.0)))
    assert not np.array_equal(found, prediction(0))


def test_nnunets_own_function_takes_pictures_with_a_leading_axis(tmp_path):
    write_pickle(RULES, tmp_path, None)
    image = prediction(0, (30, 24))
    for shape in ((30, 24), (1, 30, 24)):
        found = apply_postprocessing(image.reshape(shape), *loaded(tmp_path))
        assert np.array_equal(found, refine(image, RULES, (1.0, 1.0)).reshape(shape))


@pytest.mark.parametrize("kind", ["volumes", "pictures"])
def test_the_pickle_refines_nnunets_own_files_in_nnunets_own_hands(kind, tmp_path, request):
    folder = request.getfixturevalue(kind)
    write_pickle(RULES, tmp_path, None)
    reader = SegmentationFiles(json.loads((folder / "dataset.json").read_text()))._io
    file = next(file for file in sorted(folder.iterdir()) if file.suffix in (".png", ".gz"))
    load_postprocess_save(str(file), str(tmp_path / file.name), reader, *loaded(tmp_path))
    assert np.array_equal(voxels(tmp_path / file.name), refine(voxels(file), RULES, (1.0,) * voxels(file).ndim))


def test_a_fresh_process_that_knows_only_nnunet_can_use_the_pickle(tmp_path):
    write_pickle(rules(Opening(radius_mm=1.3)), tmp_path, (2.5, 0.9, 0.7))
    np.save(tmp_path / "in.npy", prediction(1))
    script = (
        "import numpy as np\n"
        "from batchgenerators.utilities.file_and_folder_operations import load_pickle\n"
        "from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing\n"
        f"np.save('out.npy', apply_postprocessing(np.load('in.npy'), *load_pickle('{PICKLE}')))\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
    assert np.array_equal(
        np.load(tmp_path / "out.npy"), refine(prediction(1), rules(Opening(radius_mm=1.3)), (2.5, 0.9, 0.7))
    )


def test_where_spacings_differ_what_is_measured_in_millimetres_is_dropped_and_named(tmp_path):
    chosen = rules(
        Opening(radius_mm=1.0), Opening(inscribed_share=0.2), Closing(radius_mm=1.0), FillHoles(largest_mm3=5.0),
        RemoveSmall(below_mm3=5.0), RemoveSmall(below_share=0.5), FillHoles(), KeepLargest(),
    )  # fmt: skip
    dropped = write_pickle(chosen, tmp_path, None)
    operations = ("opening", "opening", "closing", "fill_holes", "remove_small")
    assert dropped == tuple(f"{operation} of {name}" for name in ("front", "back") for operation in operations)
    _, (arguments,) = loaded(tmp_path)
    kept = Morphology.model_validate_json(arguments["rules"])
    assert all(rule.operations == chosen.classes[0].operations[-3:] for rule in kept.classes)


def test_the_pickle_holds_rules_and_no_array_or_path(tmp_path):
    write_pickle(RULES, tmp_path, (1.0, 1.0, 1.0))
    (function,), (arguments,) = loaded(tmp_path)
    assert function is refined_folder.refine_in_nnunet
    assert arguments == {"rules": arguments["rules"], "spacing_mm": (1.0, 1.0, 1.0)}
    assert str(tmp_path).encode() not in (tmp_path / PICKLE).read_bytes()
