"""The machine's checkup: each problem is one finding with what to type."""

import json
import shutil
from pathlib import Path

import pytest

from nnunet_dp import checkup
from nnunet_dp.checkup import Checkup, Finding, examine_machine, examined
from nnunet_dp.cli import main
from nnunet_dp.errors import Refusal


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """nnU-Net's three, and trainers that are found."""
    for part in checkup.FOLDERS:
        (tmp_path / part).mkdir()
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
    monkeypatch.setattr(checkup, "is_linked", lambda: True)
    monkeypatch.setattr(checkup, "LEAST_FREE_BYTES", 1)
    return tmp_path


def found(what: str) -> Finding:
    (finding,) = [finding for finding in examine_machine() if finding.what == what]
    return finding


def test_a_sound_machine_is_all_ok(folders, capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 11 and all(line.startswith("ok  ") for line in lines)
    assert not list((folders / "results").iterdir())


def test_a_problem_ends_with_one_and_says_what_to_type(folders, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_results")
    assert main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    (problem,) = [one for one in told["findings"] if one["what"] == "nnUNet_results"]
    assert not told["ok"] and problem["verdict"] == "problem" and problem["remedy"].startswith("export nnUNet_results=")
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "problem  nnUNet_results: not set\nremedy   export nnUNet_results=FOLDER\n" in said


def test_a_configuration_without_a_dataset_is_wrong_usage(folders, capsys):
    assert main(["doctor", "-c", "2d"]) == 2
    assert "nnunet-dp doctor -d 4" in capsys.readouterr().err


def test_a_folder_that_is_a_file_is_a_problem(folders):
    (folders / "raw").rmdir()
    (folders / "raw").write_text("")
    assert "is no folder" in found("nnUNet_raw").found


def test_a_folder_that_cannot_be_written_to_is_a_problem(folders, monkeypatch):
    def refuse(dir):
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr(checkup.tempfile, "TemporaryFile", refuse)
    assert found("nnUNet_raw").ok  # is only read
    finding = found("nnUNet_preprocessed")
    assert not finding.ok and "Read-only file system" in finding.found and str(folders) in finding.remedy


def test_trainers_that_nobody_finds_are_a_problem_and_the_variable_is_another_way(folders, monkeypatch):
    monkeypatch.setattr(checkup, "is_linked", lambda: False)
    finding = found("trainers")
    assert not finding.ok and "nnunet-dp link" in finding.remedy and 'eval "$(nnunet-dp env)"' in finding.remedy
    monkeypatch.setenv(checkup.VARIABLE, f"elsewhere:{checkup.external_trainer_path()}")
    assert found("trainers").ok


def test_a_version_that_is_not_asked_for_and_a_missing_package_are_problems(folders, monkeypatch):
    def other(name):
        if name == "torch":
            raise checkup.PackageNotFoundError
        return "3.0.0" if name == "nnunetv2" else "99"

    monkeypatch.setattr(checkup, "version", other)
    assert "3.0.0, should be" in found("nnunetv2").found and "pip install 'nnunetv2" in found("nnunetv2").remedy
    assert found("torch").found == "not installed" and found("dp-accounting").ok


def test_a_full_disk_is_a_problem(folders, monkeypatch):
    monkeypatch.setattr(checkup, "LEAST_FREE_BYTES", shutil.disk_usage(folders).total * 2)
    finding = found("disk of nnUNet_results")
    assert not finding.ok and finding.remedy.startswith("make room")


def test_an_expected_error_becomes_a_finding_and_a_fault_of_the_program_does_not():
    def refuse():
        raise Refusal("this\n and that")

    def fail():
        raise ZeroDivisionError

    assert examined("a", refuse, "type") == Finding("a", "this and that", False, "type")
    with pytest.raises(ZeroDivisionError):
        examined("a", fail, "type")


def test_a_checkup_is_ok_where_all_findings_are():
    sound, bad = Finding("a", "b"), Finding("a", "b", False)
    assert Checkup((sound, sound)).ok and not Checkup((sound, bad)).ok


def test_someone_who_watches_gets_a_table(folders, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["doctor"]) == 0
    assert "type this" in capsys.readouterr().out
