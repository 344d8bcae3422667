"""``nnunet-dp predict``: nnU-Net's own arguments, the rules of the folds that predict, the cases of this call alone."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from label_folders import save
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from nnunet_dp import nnunet, prediction
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.learning import place, rules_of
from nnunet_dp.morphology import FILE, FillHoles, KeepLargest, Morphology, Opening, classes_from, write_morphology
from nnunet_dp.prediction import predict
from nnunet_dp.refinement import refine

LABELS = {"background": 0, "front": 1, "back": 2}
DATASET_JSON = {"channel_names": {"0": "CT", "1": "PET"}, "labels": LABELS, "file_ending": ".nii.gz"}
SPACING = (2.5, 0.9, 0.7)
CASES = ("tube_0", "tube_1", "tube_2")


def rules(*operations, kind="fixed", **provenance) -> Morphology:
    known = classes_from(DATASET_JSON)
    classes = tuple(rule.model_copy(update={"operations": operations}) for rule in known.classes)
    return known.model_copy(update={"classes": classes, "kind": kind, "provenance": provenance})


def operations(morphology: Morphology | None) -> set[tuple]:
    assert morphology is not None
    return {rule.operations for rule in morphology.classes}


def ragged(seed: int) -> np.ndarray:
    """Two boxes, one with a hole, and specks of both labels."""
    image = np.zeros((10, 30, 24), np.uint8)
    image[..., 4:14, 4:12], image[..., 4:14, 14:20] = 1, 2
    image[2:8, 8:10, 7:9] = 0
    specks = np.random.default_rng(seed).random(image.shape) < 0.01
    image[specks & (image == 0)] = 1 + seed % 2
    return image


def voxels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def learnt(model: Path, fold: str, *operations, kind="private") -> None:
    folder = model / f"fold_{fold}"
    folder.mkdir(exist_ok=True)
    write_morphology(rules(*operations, kind=kind, ledger_run=f"{model.name}/{folder.name}/1"), folder / FILE)


@pytest.fixture
def predictions(tmp_path) -> Path:
    """What nnU-Net would write."""
    folder = tmp_path / "predictions"
    for seed, case in enumerate(CASES):
        save(folder, case, ragged(seed), SPACING)
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    (folder / "plans.json").write_text(json.dumps({"image_reader_writer": "SimpleITKIO"}))
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    """Two channels of each case, of which only the names count here."""
    folder = tmp_path / "images"
    folder.mkdir()
    for case in CASES:
        for channel in range(2):
            (folder / f"{case}_{channel:04}.nii.gz").touch()
    return folder


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "nnUNetTrainerDP_AutoS__P__3d_fullres"
    for fold in range(3):
        (folder / f"fold_{fold}").mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    monkeypatch.setattr(nnunet, "model_folder", lambda *found: folder)
    return folder


@pytest.fixture
def calls(predictions, monkeypatch) -> list[list[str]]:
    """Stands in for nnU-Net's command, whose own run is a door test; what it was called with."""
    made: list[list[str]] = []

    def copy(arguments):
        made.append(arguments)
        if "-o" in arguments:
            shutil.copytree(predictions, arguments[arguments.index("-o") + 1], dirs_exist_ok=True)

    monkeypatch.setattr(nnunet, "predict", copy)
    return made


@pytest.fixture
def given(images, tmp_path, model, calls) -> list[str]:
    """Arguments of a call, whose output folder is ``out``."""
    chosen = ["-d", "4", "-c", "3d_fullres", "-tr", "nnUNetTrainerDP_AutoS", "-p", "P", "-f", "0", "-device", "cpu"]
    return [*chosen, "-nps", "1", "-i", str(images), "-o", str(tmp_path / "out")]


# ---- the call ----------------------------------------------------------------------------------------------------


def test_predict_hands_its_arguments_on_and_refines_the_output(given, calls, model, predictions, tmp_path):
    place(model, rules(KeepLargest(), FillHoles()))
    arguments, told = [*given, "--disable_tta"], []
    said = predict(arguments, refining=True, progress=lambda *found: told.append(found))
    assert calls == [arguments] and "Refined 3 predictions" in said and "fixed" in said
    assert told == [(1, 3), (2, 3), (3, 3)]
    before = voxels(predictions / "tube_0.nii.gz")
    after = voxels(tmp_path / "out" / "tube_0.nii.gz")
    assert np.array_equal(after, refine(before, rules(KeepLargest(), FillHoles()), SPACING))
    assert not np.array_equal(after, before)


def test_without_rules_it_is_refused_before_it_predicts(given, calls):
    with pytest.raises(UsageRefusal, match=r"no refinement rules of fold 0: give --no-morph.*--per-image"):
        predict(given, refining=True)
    assert calls == []


def test_a_folder_without_images_or_channels_is_refused_before_it_predicts(given, calls, model, images, tmp_path):
    place(model, rules(KeepLargest()))
    (images / "tube_1_0001.nii.gz").unlink()
    with pytest.raises(UsageRefusal, match=r"_0000\.nii\.gz and _0001\.nii\.gz of every case; 1 of 3 cases lack one"):
        predict(given, refining=True)
    for file in images.iterdir():
        file.unlink()
    (images / "notes.txt").touch()
    with pytest.raises(UsageRefusal, match=r"images named CASE_0000\.nii\.gz; found 1 other files"):
        predict(given, refining=True)
    shutil.rmtree(images)
    with pytest.raises(UsageRefusal, match="there is no such folder"):
        predict(given, refining=True)
    assert calls == []


def test_pictures_hold_all_their_channels_in_one_file(given, model, images):
    place(model, rules(KeepLargest()))
    for file in images.glob("*_0001.nii.gz"):
        file.unlink()
    assert "Refined 3 predictions" in predict(given, refining=True)


def test_without_refinement_it_needs_no_rules_and_changes_nothing(given, predictions, tmp_path):
    assert predict(given, refining=False) == "Not refined."
    assert content(tmp_path / "out") == content(predictions)


@pytest.mark.parametrize("arguments", [["-h"], [], ["-i", "images", "-o", "out"]])
def test_a_call_that_cannot_predict_is_left_to_nnunet(arguments, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predict(arguments, refining=True)
    assert calls == [arguments]


def test_other_rules_than_the_models_may_be_named(given, model, tmp_path):
    place(model, rules(FillHoles()))
    write_morphology(rules(KeepLargest(), kind="per_image"), tmp_path / "mine.json")
    assert "per_image rules" in predict(given, refining=True, rules=tmp_path / "mine.json")


def test_every_flag_with_a_value_in_nnunets_own_command_is_known_here():
    source = inspect.getsource(predict_from_raw_data.predict_entry_point)
    flags = re.findall(r"add_argument\(\s*'(-[a-z_]+)'", source)
    assert {"-i", "-d", "-device", "-num_parts", "-prev_stage_predictions"} <= set(flags)
    for flag in set(flags) - {"-i", "-o", "-d", "-c", "-h"}:
        known = prediction._prediction_arguments(["-i", "I", "-o", "O", "-d", "4", "-c", "2d", flag, "7"])
        assert (known.i, known.o, known.d, known.c) == ("I", "O", "4", "2d"), flag


def test_without_f_the_five_folds_of_nnunet_are_meant_and_all_is_a_fold():
    base = ["-i", "I", "-o", "O", "-d", "4", "-c", "2d"]
    assert prediction._prediction_arguments(base).f == ["0", "1", "2", "3", "4"]
    assert prediction._prediction_arguments([*base, "-f", "all"]).f == ["all"]
    assert prediction._prediction_arguments([*base, "-f", "0", "3", "-p", "P"]).f == ["0", "3"]


# ---- which cases -------------------------------------------------------------------------------------------------


def test_what_lay_in_the_folder_before_is_left_alone(given, model, tmp_path):
    place(model, rules(KeepLargest()))
    foreign = save(tmp_path / "out", "foreign", ragged(7), SPACING)
    before = foreign.read_bytes()
    assert "Refined 3 predictions" in predict(given, refining=True)
    assert foreign.read_bytes() == before


def test_a_part_of_several_leaves_alone_what_another_part_is_writing_meanwhile(
    given, model, predictions, tmp_path, monkeypatch
):
    place(model, rules(KeepLargest()))
    shutil.copytree(predictions, tmp_path / "out")
    other = tmp_path / "out" / "tube_1.nii.gz"
    monkeypatch.setattr(nnunet, "predict", lambda _: other.write_bytes(b"half a volume"))
    said = predict([*given, "-num_parts", "3", "-part_id", "0"], refining=True)
    assert "Refined 1 predictions" in said and other.read_bytes() == b"half a volume"
    refined = [case for case in CASES if voxels_differ(tmp_path / "out", predictions, case)]
    assert refined == ["tube_0", "tube_1"]  # tube_1: by the other part


def voxels_differ(one: Path, other: Path, case: str) -> bool:
    return (one / f"{case}.nii.gz").read_bytes() != (other / f"{case}.nii.gz").read_bytes()


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_parts_are_nnunets_and_together_all_cases_once(images, parts):
    cases = nnunet.input_cases(images, ".nii.gz")
    mine = [case for part in range(parts) for case in cases[part::parts]]
    assert sorted(mine) == list(CASES)
    for part in range(parts):
        theirs = create_lists_from_splitted_dataset_folder(str(images), ".nii.gz")[part::parts]
        assert [Path(files[0]).name.removesuffix("_0000.nii.gz") for files in theirs] == cases[part::parts]


def test_a_part_without_images_of_its_own_has_nothing_to_refine(given, model):
    place(model, rules(KeepLargest()))
    assert "Refined 0 predictions" in predict([*given, "-num_parts", "9", "-part_id", "8"], refining=True)


# ---- which rules -------------------------------------------------------------------------------------------------


def test_one_fold_predicts_with_its_own_rules_and_not_with_those_of_the_ensemble(given, model, tmp_path, predictions):
    learnt(model, "0", KeepLargest())
    learnt(model, "1", FillHoles())
    place(model)
    assert operations(rules_of(model, ["0"])) == {(KeepLargest(),)}
    assert "private rules" in predict(given, refining=True)
    found = voxels(tmp_path / "out" / "tube_0.nii.gz")
    assert np.array_equal(found, refine(voxels(predictions / "tube_0.nii.gz"), rules(KeepLargest()), SPACING))


def test_several_folds_predict_with_what_they_agree_on_whatever_the_others_learnt(model):
    learnt(model, "0", KeepLargest(), FillHoles())
    learnt(model, "1", FillHoles(), Opening(radius_mm=1.0))
    learnt(model, "2", Opening(radius_mm=1.0))
    place(model)
    assert operations(rules_of(model, ["0", "1"])) == {(FillHoles(),)}
    assert operations(rules_of(model, ["1", "2"])) == {(Opening(radius_mm=1.0),)}
    assert operations(rules_of(model, ["0", "1", "2"])) == {()}


def test_a_fold_that_learnt_nothing_is_not_refined_by_the_rules_of_others(given, calls, model):
    learnt(model, "0", KeepLargest())
    learnt(model, "2", KeepLargest(), kind="not_private")
    place(model)
    assert rules_of(model, ["0"]) is not None
    assert not any(rules_of(model, folds) for folds in (["0", "1"], ["1"], ["2"], ["0", "2"]))
    with pytest.raises(UsageRefusal, match="rules of fold 1, 2: "):
        predict([*given, "-f", "1", "2"], refining=True)
    assert calls == []


def test_an_unknown_model_and_an_untrained_fold_are_refused_by_what_to_type(given, calls, model):
    with pytest.raises(UsageRefusal, match="no fold 3: give -f 0 1 2"):
        predict([*given, "-f", "3"], refining=True)
    shutil.rmtree(model)
    with pytest.raises(UsageRefusal, match=r"no trained model .*: correct -d, -c, -tr"):
        predict(given, refining=True)
    assert calls == []


def test_private_rules_that_lie_only_in_the_models_folder_belong_to_no_fold(model):
    write_morphology(rules(KeepLargest(), kind="private"), model / FILE)
    assert rules_of(model, ["0"]) is None


def test_rules_without_noise_in_the_models_folder_are_never_used(model):
    write_morphology(rules(KeepLargest(), kind="not_private"), model / FILE)
    assert rules_of(model, ["0"]) is None


@pytest.mark.parametrize("kind", ["fixed", "phantom", "per_image"])
def test_free_rules_are_for_all_folds_and_go_before_what_was_learnt(model, kind):
    learnt(model, "0", KeepLargest())
    place(model, rules(FillHoles(), kind=kind))
    assert rules_of(model, ["0"]) == rules_of(model, ["3", "4"]) == rules(FillHoles(), kind=kind)
