"""The command line: what it passes on, what it prints, how it ends."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from nnunet_dp import TRAINER_NAMES, __version__
from nnunet_dp.cli import main
from nnunet_dp.errors import BudgetRefusal, Refusal, UsageRefusal
from nnunet_dp.sections import ByHand

PLAN = ["plan", "-d", "4", "-c", "3d_fullres", "--epsilon", "8"]


def stub(monkeypatch: pytest.MonkeyPatch, module: str, function: str, answer):
    """Replaces one function of the core, returns the list of (args, kwargs) it is called with."""
    calls = []

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        if isinstance(answer, BaseException):
            raise answer
        return answer(*args, **kwargs) if callable(answer) else answer

    replacement = ModuleType(module)
    setattr(replacement, function, record)
    monkeypatch.setitem(sys.modules, module, replacement)
    return calls


def stub_plan(monkeypatch: pytest.MonkeyPatch, changed: bool, name: str = "P"):
    """``plan`` without planning: the calls of ``plan_dataset``."""
    stub(monkeypatch, "nnunet_dp.nnunet_start", "forecast", "12 min")
    return stub(monkeypatch, "nnunet_dp.nnunet_planning", "plan_dataset", report(plans_name=name, changed=changed))


def report(**more):
    values = {"epsilon_target": 8.0}
    lines = [("Epsilon", "8"), ("Unit", "patient")]
    return SimpleNamespace(as_dict=lambda: values, lines=lambda: lines, **more)


def test_help_shows_the_workflow_in_four_lines(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    steps = ["nnunet-dp link", "nnUNetv2_plan_and_preprocess", "nnunet-dp plan", "nnUNetv2_train"]
    lines = [line.strip() for line in text.splitlines()]
    first = next(row for row, line in enumerate(lines) if line.startswith(steps[0]))
    assert all(lines[first + row].startswith(step) for row, step in enumerate(steps))


@pytest.mark.parametrize("command", ["link", "env", "phantom", "plan", "pretrain", "status"])
def test_every_command_teaches_by_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert "Example:" in capsys.readouterr().out


def test_help_imports_neither_torch_nor_nnunet():
    program = (
        "import sys; from nnunet_dp.cli import main; main(['plan', '--help'])\n"
        "sys.exit(bool({'torch', 'nnunetv2', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_the_module_and_the_console_script_are_the_same_command():
    script = Path(sys.executable).with_name("nnunet-dp")
    for command in ([sys.executable, "-m", "nnunet_dp"], [str(script)]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"nnunet-dp {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["plan"], ["unheard-of"], [*PLAN, "--compute", "huge"], [*PLAN, "--epsilon", "much"]]
)
def test_wrong_usage_ends_with_two(arguments, capsys):
    assert main(arguments) == 2
    assert "Error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Refusal("a check failed"), 1),
        (UsageRefusal("epsilon should be positive"), 2),
        (BudgetRefusal("nothing is left"), 3),
        (ValueError("a wrong value"), 1),
        (FileNotFoundError(2, "No such file", "plans.json"), 1),
    ],
)
def test_an_expected_error_is_one_line_and_a_code(error, code, monkeypatch, capsys):
    stub(monkeypatch, "nnunet_dp.nnunet_planning", "plan_dataset", error)
    assert main(PLAN) == code
    captured = capsys.readouterr()
    assert captured.err == f"nnunet-dp: {error}\n"
    assert not captured.out


def test_debug_shows_the_traceback(monkeypatch):
    stub(monkeypatch, "nnunet_dp.nnunet_planning", "plan_dataset", Refusal("a check failed"))
    with pytest.raises(Refusal, match="a check failed"):
        main(["--debug", *PLAN])


def test_a_fault_of_the_program_is_not_swallowed(monkeypatch):
    stub(monkeypatch, "nnunet_dp.nnunet_planning", "plan_dataset", ZeroDivisionError("a fault"))
    with pytest.raises(ZeroDivisionError):
        main(PLAN)


def test_an_interruption_ends_with_130_and_without_a_traceback(monkeypatch, capsys):
    stub(monkeypatch, "nnunet_dp.nnunet_planning", "plan_dataset", KeyboardInterrupt())
    assert main(PLAN) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_plan_passes_everything_on(monkeypatch, tmp_path, capsys):
    table = tmp_path / "people.csv"
    table.write_text("case,person\n")
    calls = stub_plan(monkeypatch, changed=True, name="Mine")
    options = ["--delta", "1e-4", "--patients", str(table), "--patient-column", "person", "-p", "ResEnc"]
    options += ["-o", "Mine", "--compute", "small", "--public-weights", str(table), "--overwrite"]
    options += ["--morphology-share", "0.1", "--no-start", "--set", "steps=50", "--set", "momentum=0.5"]
    assert main([*PLAN, *options]) == 0
    assert calls[0][0] == ("4", "3d_fullres", 8.0)
    assert calls[0][1] == {
        "delta": 1e-4,
        "public_start": False,
        "by_hand": ByHand(steps=50, momentum=0.5),
        "patients_file": table,
        "patient_column": "person",
        "plans": "ResEnc",
        "output": "Mine",
        "compute": "small",
        "public_weights": table,
        "morphology_share": 0.1,
        "overwrite": True,
    }
    assert "nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerDP_AutoS -p Mine" in capsys.readouterr().out


def test_plan_chooses_nothing_by_itself(monkeypatch, capsys):
    calls = stub_plan(monkeypatch, changed=False)
    assert main(PLAN) == 0
    absent = dict.fromkeys(["delta", "patients_file", "patient_column", "output", "public_weights"])
    defaults = {**absent, "plans": "nnUNetPlans", "compute": "full", "morphology_share": 0.04, "overwrite": False}
    defaults |= {"public_start": True, "by_hand": ByHand()}
    assert calls[0] == (("4", "3d_fullres", 8.0), defaults)
    printed = capsys.readouterr().out
    assert "Nothing changed" in printed and "On this machine: 12 min" in printed


@pytest.mark.parametrize("budgets", [["--epsilon", "8", "--curve", "1,3"], []])
def test_plan_wants_one_budget_or_a_curve(budgets, capsys):
    assert main([*PLAN[:5], *budgets]) == 2
    assert "--curve" in capsys.readouterr().err


def test_a_curve_of_words_is_refused(capsys):
    assert main([*PLAN[:5], "--curve", "small,large"]) == 2
    assert "--curve 1,3,8,20" in capsys.readouterr().err


def test_no_morph_gives_all_to_the_training_and_contradicts_a_share(monkeypatch, capsys):
    calls = stub_plan(monkeypatch, changed=True)
    assert main([*PLAN, "--no-morph"]) == 0
    assert calls[0][1]["morphology_share"] == 0
    assert main([*PLAN, "--no-morph", "--morphology-share", "0.1"]) == 2
    assert "contradict" in capsys.readouterr().err and len(calls) == 1


def test_predict_hands_nnunets_flags_on_as_they_are_and_keeps_its_own(monkeypatch, tmp_path, capsys):
    calls = stub(monkeypatch, "nnunet_dp.prediction", "predict", "Refined 3 predictions.")
    rules = tmp_path / "morphology.json"
    rules.touch()
    theirs = ["-d", "4", "-f", "0", "1", "-i", "in", "-o", "out", "-device", "cpu", "--disable_tta", "-p", "P"]
    named = ["--morphology", str(rules)]
    for ours, refining, chosen in (([], True, None), (["--no-morph"], False, None), (named, True, rules)):
        assert main(["predict", *ours, *theirs]) == 0
        assert calls[-1][0][:3] == (theirs, refining, chosen)
    assert capsys.readouterr().out.count("Refined 3 predictions.") == 3


def test_json_is_one_object_and_nothing_else(monkeypatch, tmp_path, capsys):
    stub(monkeypatch, "nnunet_dp.nnunet_planning", "plan_dataset", report(plans_name="P", changed=True))
    stub(monkeypatch, "nnunet_dp.status", "read_status", report())
    for arguments in ([*PLAN, "--json"], ["status", str(tmp_path), "--json"]):
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out) == {"epsilon_target": 8.0}


def test_status_is_a_table_of_labels_and_values(monkeypatch, tmp_path, capsys):
    calls = stub(monkeypatch, "nnunet_dp.status", "read_status", report())
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "Epsilon  8\nUnit     patient\n"
    assert calls == [((tmp_path,), {})]


def test_status_of_a_folder_that_is_not_there_is_wrong_usage(tmp_path):
    assert main(["status", str(tmp_path / "absent")]) == 2


@pytest.mark.parametrize(
    ("name", "next_step"),
    [("Task301_Phantom", "nnUNetv2_convert_MSD_dataset -i"), ("Dataset017_Lesion", "preprocess -d 17 -c 2d")],
)
def test_phantom_reports_progress_and_what_to_type_next(name, next_step, monkeypatch, tmp_path, capsys):
    calls = []

    def draw(out, kind, patients, seed, *, progress, **more):
        calls.append(((out, kind, patients, seed), more))
        for done in range(patients):
            progress(done + 1, patients)
        return out / name

    monkeypatch.setattr("nnunet_dp.phantoms.write_dataset", draw)
    arguments = ["phantom", str(tmp_path), "--kind", "lesion", "--patients", "40", "--seed", "7"]
    assert main([*arguments, "--id", "17", "--test-patients", "2", "--shape", "20,24,20"]) == 0
    captured = capsys.readouterr()
    assert next_step in captured.out
    assert captured.err.splitlines()[0] == "Drawing cases: 4 of 40" and len(captured.err.splitlines()) == 10
    assert calls[0][0] == (tmp_path, "lesion", 40, 7)
    assert calls[0][1] == {"dataset_id": 17, "shape": (20, 24, 20), "test_patients": 2}


@pytest.mark.parametrize("shape", ["20,x,20", "0,4", "", "20,,20", "-1,2"])
def test_a_shape_that_is_not_numbers_is_wrong_usage(shape, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("nnunet_dp.phantoms.write_dataset", lambda *_, **__: tmp_path)
    arguments = ["phantom", str(tmp_path), "--kind", "lesion", "--patients", "4", "--seed", "7"]
    assert main([*arguments, f"--shape={shape}"]) == 2
    assert "--shape 20,24,20" in capsys.readouterr().err


def test_link_and_its_removal_say_what_they_did(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("nnunet_dp.link._trainer_folder", lambda: tmp_path)
    assert main(["link"]) == 0
    printed = capsys.readouterr().out
    assert TRAINER_NAMES[-1] in printed and str(tmp_path / "nnunet_dp_link.py") in printed
    assert main(["link", "--remove"]) == 0
    assert capsys.readouterr().out == "Removed the link.\n"
    assert main(["link", "--remove"]) == 0
    assert capsys.readouterr().out == "There was no link to remove.\n"
