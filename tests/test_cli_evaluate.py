"""``nnunet-dp evaluate`` on real folders: what it prints, what it never prints, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from label_folders import cube, draw_folders, save, write_labels, write_patients

from nnunet_dp.cli import main

METRICS = ("dice", "hd95", "nsd", "assd")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path]:
    """References, predictions, worse predictions of 4 cases; tests do not write into them."""
    return draw_folders(tmp_path_factory.mktemp("folders"), fault=0.2, cases=4)


@pytest.fixture
def evaluate(capsys):
    """Run the command: exit code, stdout, stderr; no case or patient may be named in either."""

    def run(reference: Path, predictions: Path, *options: object) -> tuple[int, str, str]:
        code = main(["evaluate", "-r", str(reference), "-p", str(predictions), *map(str, options)])
        out, err = capsys.readouterr()
        assert not any(private in out + err for private in ("case_0", "anna", "secret"))
        return code, out, err

    return run


def test_json_is_one_object_on_stdout_with_metrics_per_class_and_their_mean(evaluate, folders):
    code, out, _ = evaluate(*folders[:2], "--json")
    found = json.loads(out)
    assert code == 0 and found["cases"] == 4 and list(found["per_class"]) == ["1", "2"]
    for one in (*found["per_class"].values(), found["mean"]):
        assert all(low <= one[name] <= high for name, (low, high) in one["intervals"].items())
        assert set(one["intervals"]) == set(METRICS)
    assert "compare" not in found and "difference" not in found


def test_compare_adds_the_other_folder_and_the_paired_difference(evaluate, folders):
    code, out, _ = evaluate(*folders[:2], "--compare", folders[2], "--json")
    found = json.loads(out)
    assert code == 0
    for name in METRICS:
        both = found["mean"][name] - found["compare"]["mean"][name]
        assert found["difference"]["mean"][name] == pytest.approx(both)
    assert found["difference"]["per_class"]["1"]["intervals"]["dice"][0] > 0


def test_the_table_says_the_same_as_the_json(evaluate, folders):
    options = ("--compare", folders[2])
    found = json.loads(evaluate(*folders[:2], *options, "--json")[1])
    code, out, _ = evaluate(*folders[:2], *options)
    rows = dict(line.split("  ", 1) for line in out.splitlines())
    assert code == 0
    for label, one in {"1": found["per_class"]["1"], "compare: mean": found["compare"]["mean"]}.items():
        assert f"dice {one['dice']:.4f} [" in rows[label] and f"hd95 {one['hd95']:.3f} [" in rows[label]
    assert f"dice {found['difference']['mean']['dice']:+.4f} [" in rows["difference: mean"]


def test_progress_goes_to_stderr_by_count(evaluate, folders):
    _, out, err = evaluate(*folders[:2], "--json")
    assert err.splitlines() == [f"Comparing: {done} of 4" for done in range(1, 5)] and "Comparing" not in out


def test_a_tolerance_names_classes_and_patients_are_taken_from_their_options(evaluate, folders, tmp_path):
    table = write_patients(tmp_path, {f"case_{case:02}": f"anna{case % 2}" for case in range(4)})
    labels = write_labels(tmp_path / "labels.json", {"front": 1, "back": 2})
    code, out, _ = evaluate(*folders[:2], "-d", labels, "--tolerance", 0.5, "--patients", table, "--json")
    found = json.loads(out)
    assert code == 0 and (found["tolerance_mm"], found["patients"], found["unit"]) == (0.5, 2, "patient")
    assert [one["name"] for one in found["per_class"].values()] == ["front", "back"]


def test_a_reference_without_a_prediction_is_counted_and_ends_well(evaluate, tmp_path):
    reference, predictions, _ = draw_folders(tmp_path, cases=2)
    save(reference, "secret", cube())
    code, out, _ = evaluate(reference, predictions)
    assert code == 0 and "2; 1 only in the reference, left out" in out


def test_a_prediction_without_a_reference_is_wrong_usage_by_count(evaluate, tmp_path):
    reference, predictions, _ = draw_folders(tmp_path, cases=2)
    save(predictions, "secret", cube())
    code, out, err = evaluate(reference, predictions)
    assert (code, out) == (2, "") and "1 of 3 have none" in err and len(err.splitlines()) == 1


def test_a_prediction_on_another_grid_is_wrong_usage_by_position(evaluate, tmp_path):
    save(tmp_path / "ref", "secret", cube())
    save(tmp_path / "pred", "secret", cube(shape=(8, 9, 11)))
    code, out, err = evaluate(tmp_path / "ref", tmp_path / "pred", "--json")
    assert (code, out) == (2, "") and "case 1 of 1 by name" in err


@pytest.mark.parametrize(
    "options",
    [
        ("--tolerance", "-1"),
        ("--tolerance", "nan"),
        ("--tolerance", "wide"),
        ("-np", "0"),
        ("--compare", "absent"),
        ("-d", "absent.json"),
        ("--patients", "absent.csv"),
        ("--no-such-option",),
    ],
)
def test_options_that_make_no_sense_are_wrong_usage(evaluate, folders, options):
    code, out, err = evaluate(*folders[:2], *options)
    assert (code, out) == (2, "") and err


def test_folders_that_are_not_there_or_not_named_are_wrong_usage(evaluate, folders, tmp_path):
    assert evaluate(folders[0], tmp_path / "absent")[0] == evaluate(tmp_path / "absent", folders[1])[0] == 2
    assert main(["evaluate", "-r", str(folders[0])]) == 2


def test_help_teaches_by_an_example(capsys):
    assert main(["evaluate", "--help"]) == 0
    assert "Example:" in capsys.readouterr().out


def test_the_command_runs_as_a_program(folders):
    command = [sys.executable, "-m", "nnunet_dp", "evaluate", "-r", folders[0], "-p", folders[0], "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mean"]["dice"] == 1 and "case_0" not in done.stdout + done.stderr
