"""Write docs/commands.md from the commands themselves: ``python setup_scripts/write_commands.py [--print]``."""

import enum
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from nnunet_dp.cli import app

FILE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
HEAD = """# Commands

Written by `python setup_scripts/write_commands.py` from the commands' own help; a test compares.

Exit codes: 0 ok, 1 a check failed, 2 wrong usage, 3 the budget refuses, 130 interrupted by Ctrl-C. Errors are one line
on stderr: what should be, what was found, what to type. `nnunet-dp --debug COMMAND` shows the traceback instead.
"""


def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name as typed, command), the app itself left out."""
    for sub, below in sorted(getattr(command, "commands", {}).items()):
        yield f"{name} {sub}", below
        yield from walk(below, f"{name} {sub}")


def section(name: str, command: Any) -> str:
    """One command: its help, its example, its options."""
    text, _, example = inspect.cleandoc(command.help or "").replace("\b", "").partition("Example:")
    parts = [f"## {name}", text.strip(), f"```sh\n{inspect.cleandoc(example).strip()}\n```"]
    rows = [row(parameter) for parameter in command.params if parameter.name != "help"]
    rows = [found for found in rows if found]
    if rows:
        parts.append("| option | meaning |\n|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts)


def row(parameter: Any) -> str:
    """One line of the table; hidden parameters have none."""
    if getattr(parameter, "hidden", False):
        return ""
    argument = parameter.param_type_name == "argument"
    words = parameter.name.upper() if argument else ", ".join(f"`{word}`" for word in parameter.opts)
    default = parameter.default.value if isinstance(parameter.default, enum.Enum) else parameter.default
    note = " Required." if parameter.required else ""
    if isinstance(default, (str, int, float)) and not isinstance(default, bool):
        note = f" Default: {default}."
    return f"| {words} | {(parameter.help or '').strip()}{note} |".replace("  ", " ")


def document() -> str:
    """The whole file."""
    sections = [section(name, command) for name, command in walk(typer.main.get_command(app), "nnunet-dp")]
    return "\n\n".join([HEAD.strip(), *sections]) + "\n"


if __name__ == "__main__":
    if "--print" in sys.argv[1:]:
        sys.stdout.write(document())
    else:
        FILE.write_text(document())
