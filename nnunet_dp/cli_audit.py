"""The command ``nnunet-dp audit``: parses, audits, prints; as ``cli``, to which it belongs.

==========  ==============================================  ==================================================
calls       :func:`nnunet_dp.audit.self_test.run_self_test`  broken builds must be caught, the correct one not
prints      a line a build, or JSON; progress and time left on stderr
exit code   0 exactly the broken builds were caught, 1 otherwise, 2 usage
==========  ==============================================  ==================================================
"""
# ruff: noqa: D301 (click reads the control character \\b in help texts: no reflow)

import json
from functools import partial
from typing import Annotated, Any

import typer

audit = typer.Typer(rich_markup_mode=None)


@audit.command("audit")
def audit_command(
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Does the audit catch broken builds, and let the correct one pass?")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of coins, phantoms and initial weights; never of noise.")] = 1,
    processes: Annotated[int, typer.Option("-np", min=1, help="Processes that work side by side.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Attack the project's own training on phantoms, and say what epsilon is at least.

    With --self-test: faults are injected into the real training, ledger and vote, and handed to the checks under
    random names beside the correct build. Exit code 1 unless exactly the broken ones are caught. An audit does not
    prove privacy.

    \b
    Example:
      nnunet-dp audit --self-test
      nnunet-dp audit --self-test --json
    """
    from nnunet_dp.audit.self_test import run_self_test
    from nnunet_dp.workers import in_tenths

    found = run_self_test(seed, processes, in_tenths(partial(typer.echo, err=True), "builds examined"))
    _print(found, as_json)
    if not found.passed:
        raise typer.Exit(1)


def _print(found: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
        return
    lines = found.lines()
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        typer.echo(f"{label:<{width}}  {value}")
