"""What several commands share of the console: progress, facts as lines or ``--json``, values that are typed as text."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from nnunet_dp.errors import UsageRefusal
from nnunet_dp.workers import Progress, is_tenth

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """Voxels along each axis from ``--shape 20,24,20``; None stays None."""
    return whole_numbers(text, "--shape", "20,24,20")


def whole_numbers(text: str | None, option: str, example: str) -> tuple[int, ...] | None:
    """Numbers above 0 from text such as the example; None stays None.

    Raises:
        UsageRefusal: naming the option.
    """
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UsageRefusal(f"{option} should be whole numbers above 0, found {text!r}; type: {option} {example}")
    return tuple(int(part) for part in parts)


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar where someone watches, otherwise a plain line at every tenth; both on stderr."""
    if not sys.stderr.isatty():
        yield lambda done, total: _plain_line(title, done, total)
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_line(title: str, done: int, total: int) -> None:
    if is_tenth(done, total):
        typer.echo(f"{title}: {done} of {total}", err=True)


def show(report: Any, as_json: bool) -> None:
    """Prints a report: label and value side by side, never wrapped, so that paths can be copied."""
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    show_lines(report.lines())


def show_lines(lines: Sequence[tuple[str, str]]) -> None:
    """Label and value side by side."""
    width = max((len(label) for label, _ in lines), default=0)
    for label, value in lines:
        typer.echo(f"{label:<{width}}  {value}")
