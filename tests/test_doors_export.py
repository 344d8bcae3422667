"""An export as its users meet it: a training by nnU-Net, ``nnunet-dp export``, nnU-Net's own install and predict.

The training runs once. Predictions by the export, with this package and without it, are compared with the model's,
voxel for voxel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from doors import Model, Workplace, lesion, only_nnunet, private_words, segmentations, with_variable

OUR_TRAINER = """
import nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
trainers = nnunetv2.__path__[0] + "/training/nnUNetTrainer"
print(find(trainers, "nnUNetTrainerDP_AutoS", "nnunetv2.training.nnUNetTrainer"))
"""


class Shared(NamedTuple):
    model: Model
    images: Path
    predicted: Mapping[str, np.ndarray]
    folder: Path

    def export(self, name: str, *options: object, exit_code: int = 0) -> str:
        given = ("-m", self.model.folder, "-o", self.folder / name, *options)
        return self.model.place.run("nnunet-dp", "export", *given, exit_code=exit_code)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """A finished 2d model of three steps, and its predictions."""
    place = with_variable(lesion(tmp_path_factory.getbasetemp()))
    plans = "nnUNetPlansDP_export"
    options = ("--compute", "small", "--set", "steps=3", "--morphology-share", 0.3, "-o", plans)
    place.plan("--epsilon", 8, "--delta", 1e-3, *options)
    model, folder = Model(place, "nnUNetTrainerDP_AutoS", plans), tmp_path_factory.mktemp("shared")
    model.train()
    images = model.validation_images(folder / "images")
    return Shared(model, images, model.predict(images, folder / "predicted"), folder)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a virtual environment that has only nnunetv2 and what it needs."""
    return only_nnunet(tmp_path_factory.mktemp("bare") / "venv")


def elsewhere(shared: Shared, root: Path) -> Workplace:
    """Another user's folders, empty; with this package."""
    for part in ("raw", "preprocessed", "results"):
        (root / part).mkdir(parents=True)
    return replace(shared.model.place, root=root)


def without_us(shared: Shared, root: Path, bare: Path) -> Workplace:
    """Another user's folders, in an environment that never heard of this package."""
    return replace(elsewhere(shared, root), scripts=bare, variables={"PYTHONPATH": ""})


def installed_predictions(shared: Shared, place: Workplace, report: Mapping[str, str]) -> dict[str, np.ndarray]:
    """nnU-Net's own commands: install, then what the export said to type."""
    place.run("nnUNetv2_install_pretrained_model_from_zip", report["file"])
    program, *arguments = report["predict_command"].split()
    given = {"IMAGES": str(shared.images), "OUT": str(place.root / "out")}
    few = ("-device", "cpu", "-npp", 1, "-nps", 1)
    place.run(program, *(given.get(word, word) for word in arguments), *few)
    return segmentations(place.root / "out")


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_an_export_installs_and_predicts_as_the_model_does(shared, tmp_path):
    report = json.loads(shared.export("model.zip", "--json"))
    place = elsewhere(shared, tmp_path)
    assert same(installed_predictions(shared, place, report), shared.predicted) and shared.predicted
    assert "nothing undeclared was found" in place.run("nnunet-dp", "verify", report["file"])


def test_the_installed_export_refines_with_what_the_model_had_learnt(shared, tmp_path):
    report = json.loads(shared.export("refined.zip", "-f", 0, "--json"))
    place = elsewhere(shared, tmp_path)
    place.run("nnUNetv2_install_pretrained_model_from_zip", report["file"])
    _, *arguments = report["predict_command"].split()
    given = {"IMAGES": str(shared.images), "OUT": str(tmp_path / "out")}
    said = place.run("nnunet-dp", "predict", *(given.get(word, word) for word in arguments), "-device", "cpu")
    assert "(private rules)" in said


def test_the_bare_environment_has_nnunet_and_nothing_of_ours(shared, bare, tmp_path):
    place = without_us(shared, tmp_path, bare)
    assert "No module named 'nnunet_dp'" in place.run("python", "-c", "import nnunet_dp", exit_code=1)
    listed = "from importlib.metadata import distributions as d; print({one.name.lower() for one in d()})"
    found = place.run("python", "-c", listed)
    assert "'nnunetv2'" in found and "nnunet-dp" not in found and "nnunet_dp" not in found
    assert place.run("python", "-c", OUR_TRAINER).split()[-1] == "None"
    assert not (bare / "nnunet-dp").exists()


def test_a_stock_export_predicts_the_same_where_only_nnunet_is_installed(shared, bare, tmp_path):
    report = json.loads(shared.export("stock.zip", "--stock", "--json"))
    assert report["model"].startswith("nnUNetTrainer__nnUNetPlansDP_export_")
    predicted = installed_predictions(shared, without_us(shared, tmp_path, bare), report)
    assert same(predicted, shared.predicted) and shared.predicted


def test_an_export_that_needs_this_package_does_not_predict_without_it(shared, bare, tmp_path):
    report = json.loads(shared.export("ours.zip", "--json"))
    with pytest.raises(AssertionError, match="nnUNetTrainerDP_AutoS"):
        installed_predictions(shared, without_us(shared, tmp_path, bare), report)


def test_nothing_of_the_patients_or_the_machine_is_in_the_archive(shared):
    report = json.loads(shared.export("private.zip", "--json"))
    content = Path(report["file"]).read_bytes()
    place = shared.model.place
    words = [str(place.root), "fold_0/", *(line["hash"] for line in place.charges()), *private_words(place)]
    assert [word for word in words if word.encode() in content] == ["fold_0/"]  # the name of a folder in the archive


def test_the_commands_refuse_with_their_exit_codes(shared, tmp_path):
    (shared.folder / "there.zip").write_bytes(b"")
    assert "--overwrite" in shared.export("there.zip", exit_code=2)
    assert "has no fold 7" in shared.export("other.zip", "-f", 7, exit_code=2)
    assert "after -f" in shared.export("other.zip", 7, exit_code=2)
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    assert "FAULT" in shared.model.place.run("nnunet-dp", "verify", tmp_path / "bad.zip", exit_code=1)
    for command in ("export", "verify"):
        assert "Example:" in shared.model.place.run("nnunet-dp", command, "--help")
