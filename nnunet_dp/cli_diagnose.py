"""The command ``nnunet-dp diagnose``: parses, runs, prints; as ``cli``, to which it belongs.

==========  ========================================================================================
calls       :func:`nnunet_dp.nnunet_diagnosis.diagnose`, :func:`nnunet_dp.diagnosis_report.write_report`
prints      a line for each moment and each clip rule, JSON; progress on stderr
exit code   0 done, 2 usage
==========  ========================================================================================
"""
# ruff: noqa: D301 (click reads the control character \\b in help texts: no reflow)

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from nnunet_dp.console import parse_shape, progress_bar
from nnunet_dp.errors import UsageRefusal

STEPS = 40  # of a training on phantoms that nobody planned

diagnose = typer.Typer(rich_markup_mode=None)


@diagnose.command("diagnose")
def diagnose_command(
    phantom: Annotated[
        str | None, typer.Option(help="Kind of phantoms to look at, such as hippocampus; or give -d, -c and -p.")
    ] = None,
    dataset: Annotated[str | None, typer.Option("-d", "--dataset", help="Dataset id or name, preprocessed.")] = None,
    configuration: Annotated[str | None, typer.Option("-c", "--configuration", help="Such as 3d_fullres.")] = None,
    plans: Annotated[str | None, typer.Option("-p", "--plans", help="Private plans of that dataset.")] = None,
    rule: Annotated[str, typer.Option(help="Clip rule to train with; all are compared.")] = "auto_s",
    moments: Annotated[int, typer.Option(min=1, help="How often to measure, from first to last step.")] = 5,
    measure: Annotated[int, typer.Option(min=3, help="Patients measured, chosen at random.")] = 64,
    patients: Annotated[int, typer.Option(min=3, help="Phantom patients to draw.")] = 40,
    shape: Annotated[str | None, typer.Option(help="Voxels of a phantom, such as 24,32,24.")] = None,
    epsilon: Annotated[float, typer.Option(help="Budget of the training on phantoms.")] = 8.0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE of the phantoms' plan, as in nnunet-dp plan.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of phantoms, weights and the choice of patients.")] = 0,
    processes: Annotated[int, typer.Option("-np", min=1, help="Processes that load patients.")] = 2,
    device: Annotated[str, typer.Option("-device", help="cpu or cuda.")] = "cpu",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the report.")] = Path("diagnosis"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Look at patients' gradients during a training: lengths, angles, what clip rules make of them, noise.

    The training runs as planned, of all patients, and is thrown away; at some moments every measured patient's
    gradient is compared with the others'. Writes diagnosis.json and diagnosis.png. By itself it draws phantoms,
    which are public. With -d the patients are real: WHAT IT SHOWS IS NOT PRIVATE whatever the plan's epsilon, is
    stamped so, and has to stay on this machine; nothing is charged, because nothing may leave.

    \b
    Example:
      nnunet-dp diagnose --phantom hippocampus --patients 24 --shape 24,32,24 -o look
      nnunet-dp diagnose -d 4 -c 3d_fullres -p nnUNetPlansDP_eps8 --rule psac -o look
    """
    import torch

    from nnunet_dp import nnunet_diagnosis as diagnosis
    from nnunet_dp.diagnosis_report import lines, write_report
    from nnunet_dp.sections import ByHand

    asked = diagnosis.Asked(rule, moments, measure, seed, processes, torch.device(device))
    with progress_bar("Gradients") as progress:
        told = {"asked": asked, "say": partial(typer.echo, err=True), "progress": progress}
        if phantom is not None:
            _refuse_both(dataset, configuration, plans)
            by_hand = ByHand.parse(settings or [])
            if by_hand.steps is None:
                by_hand = by_hand.model_copy(update={"steps": STEPS})
            voxels = parse_shape(shape)
            with diagnosis.phantom_dataset(phantom, patients, seed, voxels, epsilon, by_hand, processes) as made:
                found = diagnosis.diagnose(*made, **told, phantom=phantom)
        elif dataset is None or configuration is None or plans is None:
            raise UsageRefusal(
                "either --phantom KIND should be given, or -d, -c and -p of a planned dataset: type for instance "
                "nnunet-dp diagnose --phantom hippocampus"
            )
        else:
            found = diagnosis.diagnose(dataset, configuration, plans, **told)
    files = write_report(found, output)
    if as_json:
        typer.echo(json.dumps({**found.as_dict(), "files": [str(file) for file in files]}))
    else:
        typer.echo("\n".join([*lines(found), f"Wrote {', '.join(map(str, files))}"]))


def _refuse_both(*given: str | None) -> None:
    if any(value is not None for value in given):
        raise UsageRefusal("--phantom draws its own dataset and plans: leave -d, -c and -p out, or --phantom")
