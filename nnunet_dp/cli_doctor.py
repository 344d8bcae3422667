"""The command ``nnunet-dp doctor``: parses, examines, prints; as ``cli``, to which it belongs.

==========  ================================================  ============================================
calls       :func:`nnunet_dp.checkup.examine_machine`         versions, folders, trainers, accelerator, disk
            :class:`nnunet_dp.nnunet_checkup.DatasetCheckup`  a dataset's data, patients, plans and ledger
prints      a line for each finding, a table where someone watches, JSON
exit code   0 nothing keeps a training from running, 1 something does, 2 usage
==========  ================================================  ============================================
"""
# ruff: noqa: D301 (click reads the control character \\b in help texts: no reflow)

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from nnunet_dp.console import AsJson
from nnunet_dp.errors import UsageRefusal

if TYPE_CHECKING:
    from nnunet_dp.checkup import Checkup

doctor = typer.Typer(rich_markup_mode=None)


@doctor.command("doctor")
def doctor_command(
    dataset: Annotated[str | None, typer.Option("-d", "--dataset", help="Dataset id or name, to look at too.")] = None,
    configuration: Annotated[
        str | None, typer.Option("-c", "--configuration", help="Such as 2d or 3d_fullres: its cases, network, memory.")
    ] = None,
    plans: Annotated[str, typer.Option("-p", "--plans", help="Whose network and budget.")] = "nnUNetPlans",
    cases: Annotated[int, typer.Option(min=1, help="How many cases are opened, from the first.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Look for what would keep a private training from running here, and say what to type.

    Versions, nnU-Net's folders, trainers, disk and GPU; with -d the dataset, its patients, split and ledger; with -c
    its preprocessed cases, network and memory. Nothing is charged or changed. What it prints is for your own machine.
    Exit code 1 where there is a problem.

    \b
    Example:
      nnunet-dp doctor
      nnunet-dp doctor -d 4 -c 3d_fullres -p nnUNetPlansDP_eps8
    """
    from nnunet_dp.checkup import Checkup, examine_machine

    if configuration is not None and dataset is None:
        raise UsageRefusal("-c needs a dataset: type for instance nnunet-dp doctor -d 4 -c 3d_fullres")
    findings = list(examine_machine())
    if dataset is not None:
        from nnunet_dp.nnunet_checkup import DatasetCheckup

        findings += DatasetCheckup(dataset, configuration, plans, cases).findings()
    checkup = Checkup(tuple(findings))
    if as_json:
        typer.echo(json.dumps(checkup.as_dict(), indent=2))
    else:
        _print(checkup)
    if not checkup.ok:
        raise typer.Exit(1)


def _print(checkup: "Checkup") -> None:
    from nnunet_dp.checkup import plain_lines

    if not sys.stdout.isatty():
        typer.echo(plain_lines(checkup.findings))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "what", "found", "type this")
    for finding in checkup.findings:
        verdict = Text(finding.verdict, style="green" if finding.ok else "bold red")
        table.add_row(verdict, finding.what, Text(finding.found), Text(finding.remedy))
    Console().print(table)
