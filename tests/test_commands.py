"""Every command of ``nnunet-dp``, found by walking the app: help, example, JSON; docs/commands.md is current."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import pytest
import typer

from nnunet_dp.cli import app, main

CHECKOUT = Path(__file__).resolve().parent.parent
WITHOUT_FACTS = {"link", "env", "phantom", "predict", "morph apply", "fed init-site", "fed site", "fed server"}
"""Commands whose output is a file, a line for the shell or a log: they have no --json."""


def walk(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """(name as typed, command), groups included, the app itself left out."""
    if name:
        yield name, command
    for sub, below in getattr(command, "commands", {}).items():
        yield from walk(below, f"{name} {sub}".strip())


COMMANDS = dict(walk(typer.main.get_command(app)))
LEAVES = [name for name, command in COMMANDS.items() if not hasattr(command, "commands")]


def test_the_walk_finds_commands_of_every_kind():
    assert {"plan", "doctor", "morph", "morph learn", "fed", "fed simulate"} <= set(COMMANDS) and len(LEAVES) > 20


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_teaches_by_an_example_that_can_be_typed(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.strip() == "Example:")
    assert f"nnunet-dp {name}" in " ".join(lines[begin + 1 : begin + 4])


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_that_yields_facts_has_json(name):
    options = {word for parameter in COMMANDS[name].params for word in parameter.opts}
    assert ("--json" in options) == (name not in WITHOUT_FACTS)


@pytest.mark.parametrize("name", LEAVES)
def test_an_option_that_does_not_exist_is_wrong_usage(name, capsys):
    if name == "predict":
        pytest.skip("hands all options on to nnUNetv2_predict")
    assert main([*name.split(), "--no-such-option"]) == 2
    said = capsys.readouterr().err
    assert "Error" in said and "Traceback" not in said


def test_docs_commands_is_what_the_script_writes():
    script = CHECKOUT / "setup_scripts" / "write_commands.py"
    done = subprocess.run([sys.executable, str(script), "--print"], capture_output=True, text=True, check=True)
    written = (CHECKOUT / "docs" / "commands.md").read_text()
    assert done.stdout == written, "type: python setup_scripts/write_commands.py"


def test_ctrl_c_ends_with_130_one_line_and_what_to_type(tmp_path):
    """As a terminal sends it: to the command and to all of its processes."""
    drawing = ["phantom", str(tmp_path), "--kind", "hippocampus", "--patients", "60", "--seed", "1"]
    command = [sys.executable, "-m", "nnunet_dp", *drawing]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job's children begin deaf to it
    with subprocess.Popen(command, start_new_session=True, preexec_fn=heard, text=True, **pipes) as process:
        assert process.stderr is not None
        begun = process.stderr.readline()
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert begun.startswith("Drawing cases") and process.returncode == 130
    assert "Traceback" not in said and said.splitlines()[-1].startswith("nnunet-dp: interrupted")
    assert "type the same command again" in said
