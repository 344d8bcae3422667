"""The command ``nnunet-dp audit``: parses, audits, prints; as ``cli``, to which it belongs.

==========  =================================================  ===================================================
calls       :func:`nnunet_dp.audit.phantom_audit.run_audit`    canaries, membership inference, inversion
            :func:`nnunet_dp.audit.self_test.run_self_test`    broken builds must be caught, the correct one not
prints      a line a finding, or JSON; progress and time left on stderr
writes      JSON, HTML and plots (not in the self-test)
exit code   0 nothing was refuted, and exactly the broken builds were caught; 1 otherwise; 2 usage
==========  =================================================  ===================================================
"""
# ruff: noqa: D301 (click reads the control character \\b in help texts: no reflow)

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nnunet_dp.console import AsJson, show_lines
from nnunet_dp.errors import UsageRefusal

audit = typer.Typer(rich_markup_mode=None)


@audit.command("audit")
def audit_command(
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Does the audit catch broken builds, and let the correct one pass?")
    ] = False,
    epsilon: Annotated[str, typer.Option(help="Claims to audit, such as 1,8.")] = "1,8",
    models: Annotated[int, typer.Option(min=3, help="Trained and attacked for each claim, and without privacy.")] = 8,
    patients: Annotated[int, typer.Option(min=8, help="Phantoms that may be members.")] = 64,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for JSON, HTML and plots.")] = Path("audit"),
    dataset: Annotated[
        str | None, typer.Option("-d", "--dataset", help="Refused: audits run on phantoms, which cost no privacy.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of coins, phantoms and initial weights; never of noise.")] = 1,
    processes: Annotated[int, typer.Option("-np", min=1, help="Processes that work side by side.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Attack the project's own training on phantoms, and say what epsilon is at least.

    Gradient canaries in a real training, membership inference on models with and without privacy, and inversion of
    one step's gradient. With --self-test: faults are injected into the real training, ledger and vote, and handed to
    the checks under random names beside the correct build; exit code 1 unless exactly the broken ones are caught. An
    audit does not prove privacy: it can only show that a claim is wrong.

    \b
    Example:
      nnunet-dp audit
      nnunet-dp audit --epsilon 1,3,8 --models 16 -o audit
      nnunet-dp audit --self-test --json
    """
    from nnunet_dp.audit.phantom_audit import refuse_private_data

    if dataset is not None:
        refuse_private_data(dataset)
    say = partial(typer.echo, err=True)
    if self_test:
        _self_test(seed, processes, say, as_json)
    else:
        _phantoms(_parse_epsilons(epsilon), (models, patients), output, seed, processes, say, as_json)


def _self_test(seed: int, processes: int, say: Callable[[str], None], as_json: bool) -> None:
    from nnunet_dp.audit.self_test import run_self_test
    from nnunet_dp.workers import in_tenths

    found = run_self_test(seed, processes, in_tenths(say, "builds examined"))
    _print(found.as_dict(), found.lines(), as_json)
    if not found.passed:
        raise typer.Exit(1)


def _phantoms(
    epsilons: list[float],
    pool: tuple[int, int],
    output: Path,
    seed: int,
    processes: int,
    say: Callable[[str], None],
    as_json: bool,
) -> None:
    from nnunet_dp.audit.membership import Attacked
    from nnunet_dp.audit.phantom_audit import run_audit
    from nnunet_dp.audit.report import lines, write_report

    report = run_audit(epsilons, Attacked(models=pool[0], patients=pool[1]), seed, processes, say)
    report["files"] = write_report(report, output)
    _print(report, [*lines(report), ("written", str(output / "audit.html"))], as_json)
    if report["refuted"]:
        raise typer.Exit(1)


def _parse_epsilons(text: str) -> list[float]:
    try:
        found = sorted({float(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not all(0 < value <= 1000 for value in found):
        raise UsageRefusal(f"--epsilon should be numbers above 0, found {text!r}; type for instance --epsilon 1,8")
    return found


def _print(report: dict[str, Any], lines: list[tuple[str, str]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    show_lines(lines)
