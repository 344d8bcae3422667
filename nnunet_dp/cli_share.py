"""The commands ``nnunet-dp card``, ``export`` and ``verify``: what leaves of a model; as ``cli``, to which they belong.

=======  =============================================  ==============================================
command  calls                                          prints
=======  =============================================  ==============================================
card     :func:`nnunet_dp.card_folder.write_card`       the privacy card's files and claim
export   :func:`nnunet_dp.export.export_model`          the archive, its claim and what to type next
verify   :func:`nnunet_dp.verify.verify`                what an archive holds, and its faults
=======  =============================================  ==============================================
"""
# ruff: noqa: D301 (click reads the control character \\b in help texts: no reflow)

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nnunet_dp.console import AsJson, show
from nnunet_dp.errors import UsageRefusal

share = typer.Typer(rich_markup_mode=None)
_Model = Annotated[
    Path, typer.Option("-m", "--model", exists=True, file_okay=False, help="The model's folder, with its folds.")
]
_Further = Annotated[list[str] | None, typer.Argument(hidden=True, metavar="[FOLDS]...")]


@share.command("card")
def card_command(
    model: _Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", file_okay=False, help="Folder to write to; it is made.")
    ] = Path("privacy_card"),
    fold: Annotated[
        list[str] | None, typer.Option("-f", "--fold", help="Folds to count together, such as -f 0 1. Default: all.")
    ] = None,
    further: _Further = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that differ.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the privacy card of a model: one page for people, JSON for programs, a README for a model hub.

    Epsilon is counted again from the dataset's ledger, for all folds together. privacy_card.html is one file that loads
    nothing and prints well; privacy_card.json holds the same numbers. They name no case, time, path or machine, so
    they may be shown to anybody. `nnunet-dp export` puts all three into its archive.

    \b
    Example:
      nnunet-dp card -m $nnUNet_results/Dataset004_Hippocampus/MODEL
      nnunet-dp card -m $nnUNet_results/Dataset004_Hippocampus/MODEL -f 0 1 -o card --json
    """
    from nnunet_dp.card_folder import write_card

    show(write_card(model, output, _folds(fold, further), overwrite), as_json)


@share.command("export")
def export_command(
    model: _Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The archive to write, such as model.zip.")],
    fold: Annotated[
        list[str] | None, typer.Option("-f", "--fold", help="Folds to export, such as -f 0 1. Default: all.")
    ] = None,
    further: _Further = None,
    stock: Annotated[bool, typer.Option("--stock", help="For plain nnU-Net, without this package.")] = False,
    dataset: Annotated[
        str | None, typer.Option("--as", help="DatasetXXX_Name in the archive. Default: the model's.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an archive that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write what may be shared of a private model: weights, what prediction needs, and the privacy card.

    Epsilon is counted again from the dataset's ledger, for all exported folds together. Nothing else of the model's
    folder is in the archive: no fingerprint, case names, splits, logs, validation results or states, no times and no
    paths. It installs with nnUNetv2_install_pretrained_model_from_zip, under plans of its own name.

    \b
    Example:
      nnunet-dp export -m $nnUNet_results/Dataset004_Hippocampus/MODEL -o model.zip
      nnunet-dp export -m $nnUNet_results/Dataset004_Hippocampus/MODEL -o model.zip -f 0 1 --stock
      nnunet-dp verify model.zip
    """
    from nnunet_dp.export import export_model

    show(export_model(model, output, _folds(fold, further), stock, dataset, overwrite), as_json)


@share.command("verify")
def verify_command(
    archive: Annotated[Path, typer.Argument(help="An archive, such as model.zip.")],
    as_json: AsJson = False,
) -> None:
    """List everything in an exported model and fail (exit code 1) on anything that is not declared.

    Hashes, the card's schema and the recount of its charges are checked, too. No code from the archive runs: type it
    before nnUNetv2_predict, which trusts what it loads. It is no signature: who can write the archive can write the
    card.

    \b
    Example:
      nnunet-dp verify model.zip
      nnunet-dp verify model.zip --json
    """
    from nnunet_dp.verify import verify

    found = verify(archive)
    show(found, as_json)
    if not found.ok:
        raise typer.Exit(1)


def _folds(named: Sequence[str] | None, further: Sequence[str] | None) -> list[str]:
    """Folds as people type them: -f 0 1, -f 0,1 or -f 0 -f 1."""
    if further and not named:
        raise UsageRefusal(f"folds should be named after -f, found {' '.join(further)}; type for instance -f 0 1")
    return [part for text in (*(named or ()), *(further or ())) for part in text.replace(",", " ").split()]
