"""Rules that look at no patient: from a file, from phantoms, from public constants."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nnunet_dp import free_rules
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.free_rules import fixed, from_phantom, per_image, place_free_rules
from nnunet_dp.morphology import (
    FILE,
    ClassRefinement,
    KeepLargest,
    Morphology,
    Opening,
    classes_from,
    read_morphology,
    write_morphology,
)
from nnunet_dp.phantoms import KINDS
from nnunet_dp.refined_folder import PICKLE
from nnunet_dp.refinement import refine

TUBES = {"labels": {"background": 0, "front": 1, "back": 2}, "file_ending": ".nii.gz"}
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}


def rules(kind="fixed", names=("front", "back")) -> Morphology:
    classes = (
        ClassRefinement(name=names[0], labels=(1,), writes=1, operations=(KeepLargest(),)),
        ClassRefinement(name=names[1], labels=(2,), writes=2),
    )
    return Morphology(kind=kind, classes=classes)


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "nnUNetTrainerDP__nnUNetPlansDP_eps8__3d_fullres"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(TUBES))
    return folder


@pytest.fixture
def file(tmp_path) -> Path:
    write_morphology(rules(), tmp_path / "rules.json")
    return tmp_path / "rules.json"


# ---- from a file -------------------------------------------------------------------------------------------------


def test_fixed_rules_are_placed_as_they_are_with_their_pickle(model, file):
    place_free_rules(model, file, None, overwrite=False)
    assert read_morphology(model / FILE) == rules()
    assert (model / PICKLE).is_file()


@pytest.mark.parametrize("kind", ["private", "not_private"])
def test_rules_learnt_from_another_models_patients_are_refused(tmp_path, kind):
    write_morphology(rules(kind), tmp_path / "theirs.json")
    with pytest.raises(UsageRefusal, match="learnt from patients' masks"):
        fixed(tmp_path / "theirs.json", TUBES)


@pytest.mark.parametrize("dataset_json", [{"labels": {"background": 0, "front": 1}}, REGIONS])
def test_rules_for_other_classes_are_refused_naming_both(file, dataset_json):
    with pytest.raises(UsageRefusal, match=r"the dataset has .*; the rules speak of front \[1\], back \[2\]"):
        fixed(file, dataset_json)


def test_names_of_classes_may_differ_where_labels_agree(tmp_path):
    write_morphology(rules(names=("anterior", "posterior")), tmp_path / "m.json")
    assert fixed(tmp_path / "m.json", TUBES).classes[0].name == "anterior"


# ---- where they go -----------------------------------------------------------------------------------------------


def test_a_folder_without_a_model_is_refused_and_nothing_is_made(tmp_path, file):
    with pytest.raises(UsageRefusal, match="no trained model"):
        place_free_rules(tmp_path / "absent", file, None, overwrite=True)
    assert not (tmp_path / "absent").exists()


def test_rules_that_are_there_are_replaced_only_when_asked(model, file):
    place_free_rules(model, None, None, overwrite=False)
    before = (model / FILE).read_bytes()
    with pytest.raises(UsageRefusal, match="--overwrite"):
        place_free_rules(model, file, None, overwrite=False)
    assert (model / FILE).read_bytes() == before
    place_free_rules(model, None, None, overwrite=False)  # the same again changes nothing
    place_free_rules(model, file, None, overwrite=True)
    assert read_morphology(model / FILE).kind == "fixed"


def test_what_a_fold_learnt_stays_when_free_rules_are_placed(model, file):
    (model / "fold_0").mkdir()
    write_morphology(rules("private"), model / "fold_0" / FILE)
    place_free_rules(model, file, None, overwrite=True)
    assert read_morphology(model / "fold_0" / FILE).kind == "private"


# ---- from phantoms -----------------------------------------------------------------------------------------------


def of_kind(kind: str) -> dict:
    return {"labels": dict(KINDS[kind].labels), "file_ending": KINDS[kind].file_ending}


PLAIN = sorted(name for name, kind in KINDS.items() if kind.regions_class_order is None)
@pytest.mark.parametrize("kind", PLAIN)
def test_phantoms_give_the_same_rules_every_time_and_leave_phantoms_nearly_as_they_are(kind, monkeypatch):
    monkeypatch.setattr(free_rules, "PHANTOMS", 6)
    found = from_phantom(kind, of_kind(kind))
    assert found == from_phantom(kind, of_kind(kind)) and found.kind == "phantom"
    assert found.provenance == {"phantom": kind, "patients": 6}
    assert [rule.labels for rule in found.classes] == [rule.labels for rule in classes_from(of_kind(kind)).classes]
    segmentation, spacing_mm = free_rules._phantom_masks(kind, 0)[0]
    assert np.mean(refine(segmentation, found, spacing_mm) != segmentation) < 0.01


def test_an_unknown_phantom_is_refused_with_the_known_ones():
    with pytest.raises(UsageRefusal, match=r"hippocampus, .*found 'kidney'"):
        from_phantom("kidney", TUBES)


@pytest.mark.parametrize("dataset_json", [{"labels": {"background": 0, "a": 1, "b": 2, "c": 3}}, REGIONS])
def test_phantoms_with_other_labels_than_the_dataset_are_refused(dataset_json):
    with pytest.raises(UsageRefusal, match="choose another kind"):
        from_phantom("hippocampus", dataset_json)


# ---- per image ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset_json", [TUBES, REGIONS])
def test_per_image_rules_hold_no_length_of_any_dataset(dataset_json):
    found = per_image(dataset_json)
    assert found.kind == "per_image" and found.without_operations().classes == classes_from(dataset_json).classes
    lengths = [getattr(o, name, None) for rule in found.classes for o in rule.operations
               for name in ("radius_mm", "below_mm3", "largest_mm3")]  # fmt: skip
    assert set(lengths) == {None} and found.regions == ("regions_class_order" in dataset_json)


def test_per_image_rules_do_the_same_to_an_image_at_every_scale():
    generator = np.random.default_rng(2)
    image = np.zeros((40, 40), np.uint8)
    image[8:30, 8:30] = 1
    image[generator.random(image.shape) < 0.03] = 1
    small, large = (refine(image, per_image(TUBES), (edge, edge)) for edge in (0.5, 20.0))
    assert np.array_equal(small, large) and not np.array_equal(small, image)
    assert isinstance(per_image(TUBES).classes[0].operations[0], Opening)
