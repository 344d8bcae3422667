"""What a class is comes from the first dataset.json there is, and is what nnU-Net and refinement take it for."""

from __future__ import annotations

import numpy as np
import pytest
from label_folders import cube, write_labels
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.label_scheme import LabelScheme, find_scheme, scheme_from
from nnunet_dp.morphology import classes_from

DATASETS = [
    {"labels": {"background": 0, "front": 1, "back": 2}},
    {"labels": {"background": 0, "lesion": 1, "ignore": 2}},
    {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3}, "regions_class_order": [1, 2, 3]},
    {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]},
]


@pytest.mark.parametrize("dataset_json", DATASETS)
def test_a_class_is_what_refinement_takes_it_for(dataset_json):
    mine, theirs = scheme_from(dataset_json, ""), classes_from(dataset_json)
    assert [(one.name, one.labels) for one in mine.classes] == [(rule.name, rule.labels) for rule in theirs.classes]
    assert mine.ignore_label == theirs.ignore_label


@pytest.mark.parametrize("dataset_json", DATASETS)
def test_a_class_is_what_nnunet_takes_it_for(dataset_json):
    scheme = scheme_from(dataset_json, "")
    nnunet = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    foreground = nnunet.foreground_regions if nnunet.has_regions else nnunet.foreground_labels
    expected = [tuple(np.atleast_1d(each).tolist()) for each in foreground]
    assert [one.labels for one in scheme.classes] == expected and scheme.ignore_label == nnunet.ignore_label


def test_classes_are_called_by_integers_and_regions_by_names():
    assert [one.key for one in scheme_from(DATASETS[0], "").classes] == ["1", "2"]
    assert [one.key for one in scheme_from(DATASETS[2], "").classes] == ["whole", "core", "tip"]


def test_a_list_of_one_label_makes_no_regions():
    assert scheme_from({"labels": {"background": 0, "lesion": [1]}}, "").classes[0].key == "1"


def test_dataset_json_is_taken_by_option_then_from_predictions_then_from_beside_references(tmp_path):
    predictions, reference = tmp_path / "pred", tmp_path / "ref"
    predictions.mkdir()

    def first_name(given=None) -> str:
        return find_scheme(given, predictions, reference).classes[0].name

    assert find_scheme(None, predictions, reference).classes is None
    write_labels(tmp_path / "dataset.json", {"beside": 1, "b": 2})
    assert first_name() == "beside"
    write_labels(predictions / "dataset.json", {"in predictions": 1, "b": 2})
    assert first_name() == "in predictions"
    assert first_name(write_labels(tmp_path / "d.json", {"given": 1, "b": 2})) == "given"


def test_the_file_ending_is_read_along(tmp_path):
    file = write_labels(tmp_path / "d.json", {"a": 1}, file_ending=".mha")
    assert find_scheme(file, tmp_path, tmp_path).file_ending == ".mha"


@pytest.mark.parametrize(
    "content",
    [
        '{"labels": {"0": "background", "1": "lesion"}}',
        '{"labels": {"background": 0, "nothing": []}}',
        '{"labels": [0, 1]}',
        "[]",
        "no JSON",
        None,
    ],
)
def test_a_dataset_json_of_another_form_is_refused(content, tmp_path):
    file = tmp_path / "d.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageRefusal, match="-d FILE"):
        find_scheme(file, tmp_path, tmp_path)


def test_labels_that_dataset_json_does_not_know_are_refused_by_count():
    with pytest.raises(UsageRefusal, match="found 2 others"):
        scheme_from(DATASETS[1], "").labels_of_classes([cube(), cube(label=3), cube(label=4), cube(label=2)])


def test_without_a_dataset_json_every_integer_but_0_is_a_class():
    assert LabelScheme("").labels_of_classes([cube(label=7), cube(label=3)]) == [(3,), (7,)]
