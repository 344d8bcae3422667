"""``nnunet-dp diagnose`` as it is typed: phantoms are public; a dataset is stamped, not charged and left as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from doors import Workplace, lesion

from nnunet_dp.cli import main

PLANS = "nnUNetPlansDP_look"
QUICK = ("--moments", 2, "--measure", 4, "-np", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Ten patients, a plan of three steps."""
    found = lesion(tmp_path_factory.getbasetemp())
    found.plan("--epsilon", 8, "--delta", 1e-3, "--compute", "small", "--set", "steps=3", "-o", PLANS)
    return found


def files_below(*folders: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_dataset_is_looked_at_stamped_and_left_as_it_was(place, tmp_path):
    before = files_below(place.preprocessed, place.root / "results")
    given = ("-d", place.number, "-c", "2d", "-p", PLANS, "--rule", "quantile", *QUICK)
    told = place.run("nnunet-dp", "diagnose", *given, "-o", tmp_path / "look")
    after = files_below(place.preprocessed, place.root / "results")
    assert {file: after.get(file) for file in before} == before  # the ledger, where another test left one, among them
    assert {file.suffix for file in set(after) - set(before)} <= {".npy"}  # nnU-Net's own unpacking
    assert "NOT PRIVATE" in told and "held at" in told
    assert sorted(file.name for file in (tmp_path / "look").iterdir()) == [
        "NOT_PRIVATE_diagnosis.json", "NOT_PRIVATE_diagnosis.png",
    ]  # fmt: skip
    found = json.loads((tmp_path / "look" / "NOT_PRIVATE_diagnosis.json").read_text())
    assert found["stamp"].startswith("NOT PRIVATE") and not found["public"]
    assert [moment["step"] for moment in found["moments"]] == [0, 3]
    assert all(len(moment["norms"]) == 4 == found["measured"] for moment in found["moments"])
    assert found["moments"][0]["norms"] != found["moments"][1]["norms"]
    assert all(0 < share < 1 for share in found["moments"][0]["foreground"])


def test_phantoms_are_public_and_need_no_folders(place, tmp_path):
    given = ("--phantom", "lesion", "--patients", 5, "--shape", "32,32", "--set", "steps=2", *QUICK)
    printed = place.run("nnunet-dp", "diagnose", *given, "-o", tmp_path, "--json", nnUNet_raw="", nnUNet_results="")
    found = json.loads(printed.splitlines()[-1])
    assert found["public"] and found["dataset"] == "phantoms lesion" and found["steps"] == 2
    assert {Path(file).name for file in found["files"]} == {"diagnosis.json", "diagnosis.png"}
    rules = found["moments"][-1]["rules"]
    assert set(rules) >= {"flat", "auto_s", "psac", "quantile"}
    assert all(0 < clipped["cosine"] <= 1.0001 for clipped in rules.values())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "--phantom KIND"),
        (("--phantom", "lesion", "-d", "312"), "leave -d"),
        (("-d", "312", "-c", "2d", "-p", "nnUNetPlans"), "plans without privacy"),
        (("-d", "312", "-c", "2d", "-p", "nnUNetPlansDP_none"), "has no plans"),
        (("-d", "312", "-c", "2d", "-p", PLANS, "--rule", "median"), "--rule should be one of"),
        (("--phantom", "dragon"), "kind should be one of"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(given, words, place, tmp_path, monkeypatch, capsys):
    for part in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{part}", str(place.root / part))
    assert main(["diagnose", *given, "-o", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())
