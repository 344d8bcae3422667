"""How commands print facts: ``--json``, or label and value side by side."""

import json
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def show(report: Any, as_json: bool) -> None:
    """Prints a report: label and value side by side, never wrapped, so that paths can be copied."""
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    lines = report.lines()
    width = max((len(label) for label, _ in lines), default=0)
    for label, value in lines:
        typer.echo(f"{label:<{width}}  {value}")
