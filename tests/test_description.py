"""dataset.json: labels that are no integers are refused in words, wherever the file is read."""

import json

import pytest

from nnunet_dp.description import known_labels, read_description
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.label_scheme import find_scheme
from nnunet_dp.morphology import classes_from

REST = {"channel_names": {"0": "MR"}, "file_ending": ".nii.gz"}
NO_INTEGERS = [float("inf"), float("-inf"), float("nan"), 0.7, [1, 2.5], [], "one", None, {"a": 1}, [[1]]]


def _written(folder, labels):
    file = folder / "dataset.json"
    file.write_text(json.dumps({**REST, "labels": labels}))
    return file


@pytest.mark.parametrize("label", NO_INTEGERS, ids=str)
@pytest.mark.parametrize("name", ["background", "tumour"])
def test_a_label_that_is_no_integer_is_refused(tmp_path, name, label):
    file = _written(tmp_path, {"background": 0, "tumour": 1, "organ": 2} | {name: label})
    with pytest.raises(UsageRefusal, match="labels"):
        read_description(file)
    with pytest.raises(UsageRefusal, match="labels"):
        find_scheme(file, tmp_path, tmp_path)


@pytest.mark.parametrize("label", [float("inf"), float("nan"), 0.7, [1]], ids=str)
def test_regions_are_painted_in_an_order_of_integers(label):
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    assert classes_from({"labels": labels, "regions_class_order": [1, 2]}).regions
    with pytest.raises((TypeError, ValueError)):
        classes_from({"labels": labels, "regions_class_order": [1, label]})


def test_integers_of_any_spelling_are_read_as_nnunet_reads_them(tmp_path):
    file = _written(tmp_path, {"background": 0, "whole": [1, 2], "core": "2", "rim": 3.0, "ignore": 4})
    assert known_labels(read_description(file)) == {0, 1, 2, 3, 4}
    scheme = find_scheme(file, tmp_path, tmp_path)
    assert scheme.ignore_label == 4
    assert [one.labels for one in scheme.classes] == [(1, 2), (2,), (3,)]
