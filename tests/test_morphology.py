"""morphology.json: written and read unchanged, mistakes named by their field, and the classes that nnU-Net knows."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from pydantic import ValidationError

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.morphology import (
    ClassRefinement,
    Closing,
    FillHoles,
    KeepLargest,
    Morphology,
    Opening,
    RemoveSmall,
    agreed,
    classes_from,
    read_morphology,
    write_morphology,
)

OPERATIONS = (
    Opening(radius_mm=1.5, least_kept=0.9),
    Opening(inscribed_share=0.2),
    Closing(radius_mm=0.1),
    Closing(inscribed_share=1.0),
    FillHoles(),
    FillHoles(largest_mm3=20.0),
    RemoveSmall(below_share=0.5),
    RemoveSmall(below_mm3=3.0),
    KeepLargest(),
)
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "edge": [3], "ignore": 4}
operation_lists = st.lists(st.sampled_from(OPERATIONS), max_size=4).map(tuple)


def rules(first=(), second=(), **changes) -> Morphology:
    classes = (
        ClassRefinement(name="front", labels=(1,), writes=1, operations=tuple(first)),
        ClassRefinement(name="back", labels=(2,), writes=2, operations=tuple(second)),
    )
    return Morphology(**{"kind": "fixed", "classes": classes} | changes)


def refusal_of(content, folder) -> str:
    file = folder / "morphology.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageRefusal) as caught:
        read_morphology(file)
    return str(caught.value)


# ---- the file ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(operation_lists, operation_lists, st.sampled_from([None, 3]), st.sampled_from(["private", "fixed", "per_image"]))
def test_what_is_written_is_read_back_unchanged(tmp_path_factory, first, second, ignore_label, kind):
    file = tmp_path_factory.mktemp("model") / "morphology.json"
    written = rules(first, second, ignore_label=ignore_label, kind=kind, provenance={"ledger_sequence": 3})
    write_morphology(written, file)
    assert read_morphology(file) == written
    assert [item.name for item in file.parent.iterdir()] == ["morphology.json"]


def test_the_file_says_version_units_and_per_class_the_operations_in_order(tmp_path):
    write_morphology(rules([KeepLargest(), Opening(radius_mm=1.0)]), tmp_path / "m.json")
    content = json.loads((tmp_path / "m.json").read_text())
    assert (content["version"], content["units"], content["kind"]) == (1, "mm", "fixed")
    front = [operation["operation"] for operation in content["classes"][0]["operations"]]
    assert front == ["keep_largest", "opening"]
    assert content["classes"][0]["operations"][1]["radius_mm"] == 1.0


def with_operation(**operation):
    content = json.loads(rules().model_dump_json())
    content["classes"][0]["operations"] = [operation]
    return content


@pytest.mark.parametrize(
    ("operation", "field"),
    [
        ({"operation": "sharpen"}, "classes.0.operations.0"),
        ({"operation": "opening"}, "radius_mm or inscribed_share"),
        ({"operation": "opening", "radius_mm": 1, "inscribed_share": 0.5}, "radius_mm or inscribed_share"),
        ({"operation": "opening", "radius_mm": -1}, "radius_mm"),
        ({"operation": "opening", "radius_mm": 0}, "radius_mm"),
        ({"operation": "closing", "radius_mm": 1, "least_kept": 0.9}, "least_kept"),
        ({"operation": "opening", "radius_mm": 1, "least_kept": 1.1}, "least_kept"),
        ({"operation": "opening", "radius_vox": 1}, "radius_vox"),
        ({"operation": "remove_small"}, "below_share or below_mm3"),
        ({"operation": "remove_small", "below_share": 1.5}, "below_share"),
        ({"operation": "fill_holes", "largest_mm3": 0}, "largest_mm3"),
        ({"operation": "keep_largest", "number": 2}, "number"),
    ],
)
def test_a_wrong_operation_is_refused_by_the_name_of_its_field(tmp_path, operation, field):
    message = refusal_of(with_operation(**operation), tmp_path)
    assert field in message and "classes.0.operations.0" in message


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": 2}, "version"),
        ({"units": "voxels"}, "units"),
        ({"kind": "guessed"}, "kind"),
        ({"classes": [{"name": "a", "labels": [], "writes": 1}]}, "classes.0.labels"),
        ({"classes": [{"name": "a", "labels": [1]}]}, "classes.0.writes"),
        ({"classes": [{"name": "a", "labels": [0], "writes": 0}]}, "background"),
        ({"classes": [{"name": "a", "labels": [7], "writes": 7}], "ignore_label": 7}, "ignore label"),
        ({"classes": [{"name": n, "labels": [1], "writes": 1} for n in "ab"]}, "each label belongs to one class"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_file_is_refused_by_the_name_of_its_field(tmp_path, change, field):
    assert field in refusal_of(json.loads(rules().model_dump_json()) | change, tmp_path)


@pytest.mark.parametrize("radius", ["NaN", "Infinity"])
def test_a_radius_that_is_no_number_is_refused(tmp_path, radius):
    text = json.dumps(with_operation(operation="opening", radius_mm=1.0)).replace("1.0", radius)
    assert "radius_mm" in refusal_of(text, tmp_path)


def test_a_file_that_is_no_json_and_a_missing_one_are_refused_with_what_to_do(tmp_path):
    assert "is not a morphology file" in refusal_of("radius: 3", tmp_path)
    with pytest.raises(UsageRefusal, match="nnunet-dp morph learn"):
        read_morphology(tmp_path / "absent.json")


def test_rules_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        rules().classes[0].writes = 3


# ---- the classes of a dataset ------------------------------------------------------------------------------------


def dataset_json(labels, order=None):
    return {"labels": labels} | ({} if order is None else {"regions_class_order": order})


def test_each_label_of_an_ordinary_dataset_is_a_class():
    found = classes_from(dataset_json({"background": 0, "b": 2, "a": 1, "ignore": 3}))
    assert [(rule.name, rule.labels, rule.writes) for rule in found.classes] == [("b", (2,), 2), ("a", (1,), 1)]
    assert (found.regions, found.ignore_label) == (False, 3)
    assert all(rule.operations == () for rule in found.classes)


def test_regions_are_painted_as_their_class_order_says():
    found = classes_from(dataset_json(REGIONS, [1, 2, 3]))
    assert [(rule.labels, rule.writes) for rule in found.classes] == [((1, 2, 3), 1), ((2, 3), 2), ((3,), 3)]
    assert (found.regions, found.ignore_label) == (True, 4)


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ({"background": 0, "b": 2, "a": 1}, None),
        ({"background": 0, "a": 1, "b": 2, "ignore": 3}, None),
        (REGIONS, [1, 2, 3]),
        ({"background": 0, "organ": [1, 2], "lesion": 2}, [1, 2]),
        ({"background": 0, "organ": [1, 2], "lesion": [2]}, [1, 2]),
        ({"background": 0, "a": [1], "b": [2]}, None),  # lists of one label make no regions in nnU-Net
    ],
)
def test_regions_labels_and_ignore_label_are_those_of_nnunet(labels, order):
    theirs, ours = LabelManager(labels, order), classes_from(dataset_json(labels, order))
    assert (ours.regions, ours.ignore_label) == (theirs.has_regions, theirs.ignore_label)
    if theirs.has_regions:
        expected = [region if isinstance(region, tuple) else (region,) for region in theirs.foreground_regions]
        assert [rule.labels for rule in ours.classes] == expected
        assert [rule.writes for rule in ours.classes] == order
    else:
        assert sorted(rule.writes for rule in ours.classes) == theirs.foreground_labels


@pytest.mark.parametrize("order", [None, [1, 2], [1, 2, 3, 4]])
def test_regions_without_a_fitting_class_order_are_refused(order):
    with pytest.raises(UsageRefusal, match="3 regions and a regions_class_order of"):
        classes_from(dataset_json(REGIONS, order))


# ---- several folds -----------------------------------------------------------------------------------------------


def test_folds_keep_the_operations_that_all_of_them_have_in_the_order_of_the_first():
    folds = [
        rules([Opening(radius_mm=1.0), KeepLargest(), FillHoles()], [KeepLargest()]),
        rules([FillHoles(), KeepLargest()], []),
        rules([Opening(radius_mm=2.0), KeepLargest(), FillHoles()], [KeepLargest()]),
    ]
    assert [rule.operations for rule in agreed(folds).classes] == [(KeepLargest(), FillHoles()), ()]


@settings(max_examples=60, deadline=None)
@given(st.lists(operation_lists, min_size=1, max_size=4))
def test_an_operation_is_agreed_on_only_if_every_fold_has_it(lists):
    found = agreed([rules(one) for one in lists]).classes[0].operations
    assert set(found) == set.intersection(*map(set, lists))


def test_two_openings_of_different_radius_agree_on_none():
    found = agreed([rules([Opening(radius_mm=radius)]) for radius in (1.0, 2.0)])
    assert found.classes[0].operations == ()


def test_agreement_keeps_every_folds_provenance_and_one_fold_is_itself():
    folds = [rules([KeepLargest()], provenance={"ledger_sequence": line}) for line in (1, 101)]
    assert agreed(folds).provenance == {"agreement_of": [{"ledger_sequence": 1}, {"ledger_sequence": 101}]}
    assert agreed(folds[:1]) == folds[0]


@pytest.mark.parametrize("change", [{"kind": "private"}, {"ignore_label": 3}, {"regions": True}])
def test_folds_of_other_kinds_or_classes_are_not_joined(change):
    with pytest.raises(UsageRefusal, match="cannot be joined"):
        agreed([rules(), rules(**change)])


def test_without_operations_only_the_classes_are_left():
    bare = rules([KeepLargest()], [FillHoles()], provenance={"a": 1}).without_operations()
    assert bare == rules()
