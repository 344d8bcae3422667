"""The command ``nnunet-dp``: parses, calls one function of the core, prints; nothing is decided here.

=========  ===============================================  =====================================
command    calls                                            prints
=========  ===============================================  =====================================
link       :func:`nnunet_dp.link.link`, ``unlink``          where the shim lies
env        :func:`nnunet_dp.link.external_trainer_export`   one line for the shell
phantom    :func:`nnunet_dp.phantoms.write_dataset`         the folder and what to type next
plan       :func:`nnunet_dp.nnunet_planning.plan_dataset`   the plan as a table or as JSON
pretrain   :func:`nnunet_dp.nnunet_start.pretrain`          the public start's file and recipe
status     :func:`nnunet_dp.status.read_status`             what was spent, as a table or as JSON
morph      :mod:`nnunet_dp.learning`, ``refined_folder``    the rules, or how many files were refined
predict    :func:`nnunet_dp.prediction.predict`             nnU-Net's output, and what was refined
evaluate   :func:`nnunet_dp.evaluation.evaluate_folders`    metrics with intervals
export     :mod:`nnunet_dp.cli_share`                       the archive, its claim and what to type next
verify     :mod:`nnunet_dp.cli_share`                       what an archive holds, and its faults
card       :mod:`nnunet_dp.cli_share`                       the privacy card's files and claim
doctor     :mod:`nnunet_dp.cli_doctor`                      what would keep a training from running
diagnose   :mod:`nnunet_dp.cli_diagnose`                    patients' gradients, looked at
audit      :mod:`nnunet_dp.cli_audit`                       what attacks on the project's own training come to
fed        :mod:`nnunet_dp.cli_fed`                         what a federated run does and comes to
=========  ===============================================  =====================================

Exit codes: 0 ok, 1 a check failed, 2 usage, 3 the budget refuses, 130 interrupted. Expected errors are one
line on stderr; ``nnunet-dp --debug COMMAND`` shows the traceback. Tracebacks never show the values of local
variables, which may be private. The core is imported inside the commands, so that ``--help`` answers at once.

Example:
    >>> main(["--version"])
    nnunet-dp 0.1.0
    0
"""

import enum
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nnunet_dp import TRAINER_NAMES, __version__
from nnunet_dp.cli_audit import audit
from nnunet_dp.cli_diagnose import diagnose
from nnunet_dp.cli_doctor import doctor
from nnunet_dp.cli_fed import fed
from nnunet_dp.cli_share import share
from nnunet_dp.console import AsJson, parse_shape, progress_bar, show
from nnunet_dp.errors import Refusal, UsageRefusal

_WORKFLOW = """Patient-level differentially private training for nnU-Net v2.

\b
  nnunet-dp link                                           once: nnU-Net finds the trainers
  nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres          as always
  nnunet-dp plan -d 4 -c 3d_fullres --epsilon 8            the privacy plan
  nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerDP_AutoS -p nnUNetPlansDP_eps8
  nnunet-dp predict -d 4 -c 3d_fullres -f 0 -tr nnUNetTrainerDP_AutoS -p nnUNetPlansDP_eps8 -i IMAGES -o OUT

predict is nnUNetv2_predict followed by DP-Morph, the refinement that the training learnt within its budget.
Then `nnunet-dp status FOLD_FOLDER` tells what was spent. No data at hand? `nnunet-dp phantom` makes some.
"""

# No pretty exceptions: they print local variables, and those may be private.
app = typer.Typer(
    name="nnunet-dp",
    help=_WORKFLOW,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@dataclass
class _Settings:
    debug: bool = False


class Compute(str, enum.Enum):
    """How long a schedule the plan may ask for."""

    full = "full"
    small = "small"


INTERRUPTED = 130  # as shells say it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: What follows the program's name; None takes them from the shell.

    Returns:
        The exit code for the shell.
    """
    settings = _Settings()
    try:
        app(args=arguments, prog_name="nnunet-dp", obj=settings)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer's own
            return _interrupted()
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return _interrupted()
    except (Refusal, ValueError, OSError) as error:
        if settings.debug:
            raise
        typer.echo(f"nnunet-dp: {_one_line(error)}", err=True)
        return error.exit_code if isinstance(error, Refusal) else Refusal.exit_code
    return 0


def _interrupted() -> int:
    typer.echo(
        "nnunet-dp: interrupted. What was charged stays charged, and no file is half written. To go on, type the same "
        "command again (`fed simulate` and `fed run`: with --resume)",
        err=True,
    )
    return INTERRUPTED


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nnunet-dp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an expected error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    context.obj.debug = debug


@app.command("link")
def link_command(
    remove: Annotated[bool, typer.Option("--remove", help="Take the link away again.")] = False,
) -> None:
    """Make the trainers visible to nnUNetv2_train and nnUNetv2_predict.

    Writes one small module into the installed nnunetv2. It answers only to the names of these trainers and
    disturbs no other. Needed once per environment; where the environment is read-only see `nnunet-dp env`.

    \b
    Example:
      nnunet-dp link
      nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerDP_AutoS
    """
    from nnunet_dp.link import link, unlink

    if remove:
        typer.echo("Removed the link." if unlink() else "There was no link to remove.")
        return
    typer.echo(f"nnU-Net now finds {', '.join(TRAINER_NAMES)}.\nThe link is {link()}")


@app.command("env")
def env_command() -> None:
    """Print the shell line that makes the trainers visible without writing anything.

    For installations that are read-only (containers, clusters): nnU-Net looks into the folders named by
    nnUNet_extTrainer. A value that is already set is kept and added to.

    \b
    Example:
      eval "$(nnunet-dp env)"
    """
    from nnunet_dp.link import external_trainer_export

    typer.echo(external_trainer_export(os.environ))


@app.command("phantom")
def phantom_command(
    out: Annotated[Path, typer.Argument(help="Folder in which the dataset's own folder is made.")],
    kind: Annotated[
        str, typer.Option(help="hippocampus, heart, ct_kidney or mpmri (3D), lesion or layers (2D).")
    ],
    patients: Annotated[int, typer.Option(min=1, help="Training patients; some have several cases.")],
    seed: Annotated[int, typer.Option(help="The same seed draws the same data.")],
    dataset_id: Annotated[int | None, typer.Option("--id", min=1, max=999, help="nnU-Net's dataset number.")] = None,
    test_patients: Annotated[int, typer.Option(min=0, help="Further patients, held out for testing.")] = 0,
    shape: Annotated[str | None, typer.Option(help="Voxels along each axis, such as 20,24,20.")] = None,
) -> None:
    """Draw an artificial dataset: public, so it costs no privacy.

    3D kinds are written as the Medical Segmentation Decathlon lays them out (TaskXXX_Name), 2D kinds and kinds
    with regions as nnU-Net's raw data (DatasetXXX_Name); patients.csv says which cases belong to one patient.

    \b
    Example:
      nnunet-dp phantom data --kind hippocampus --patients 40 --seed 1 --id 301
    """
    from nnunet_dp.phantoms import KINDS, write_dataset
    from nnunet_dp.phantoms.handover import commands

    voxels = parse_shape(shape)
    with progress_bar("Drawing cases") as progress:
        folder = write_dataset(
            out,
            kind,
            patients,
            seed,
            dataset_id=dataset_id,
            shape=voxels,
            test_patients=test_patients,
            progress=progress,
        )
    lines = commands(folder, len(KINDS[kind].smallest_shape), os.environ)
    typer.echo("\n".join([f"Wrote {folder}", "Next:", *(f"  {line}" for line in lines)]))


@app.command("fingerprint")
def fingerprint_command(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Dataset id or name, with raw data.")],
    epsilon: Annotated[float, typer.Option(help="The whole budget, of fingerprint and training together.")] = 8.0,
    delta: Annotated[
        float | None, typer.Option(help="Default: 1/(10 patients) as a power of ten, at most 1e-5.")
    ] = None,
    share: Annotated[float, typer.Option(help="Share of the budget (of mu^2) for the fingerprint.")] = 0.1,
    patients: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="CSV of case,patient. Default: the raw data's own."),
    ] = None,
    patient_column: Annotated[str | None, typer.Option(help="Column that names the unit. Default: patient.")] = None,
    phantom: Annotated[str | None, typer.Option(help="Public plans from this kind of phantoms instead.")] = None,
    phantom_shape: Annotated[str | None, typer.Option(help="Voxels of these phantoms: a public fact.")] = None,
    from_dataset: Annotated[str | None, typer.Option(help="Public plans of this dataset instead.")] = None,
    from_plans: Annotated[str, typer.Option(help="Which of its plans.")] = "nnUNetPlans",
    no_patient_overlap: Annotated[
        bool, typer.Option("--no-patient-overlap", help="Declare: none of my patients is in that dataset.")
    ] = False,
    processes: Annotated[int, typer.Option("-np", min=1, help="Processes that read images.")] = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what was made before.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say where a dataset's plans come from, so that plans and patch sizes tell nothing that was not paid for.

    By itself it makes nnU-Net's dataset_fingerprint.json from noised statistics of the images (spacing, size, CT
    window), charged to the dataset's ledger; nnUNetv2_plan_experiment then plans as always, and `nnunet-dp plan`
    gives the training what is left of the budget. Where noise would drown everything, it says from how many patients
    or which epsilon on it would not, and makes public plans from phantoms, which cost nothing.

    \b
    Example:
      nnunet-dp fingerprint -d 4 --epsilon 8
      nnunet-dp fingerprint -d 4 --phantom hippocampus
      nnunet-dp fingerprint -d 4 --from-dataset 301 --no-patient-overlap
    """
    from nnunet_dp import nnunet_dataset_fingerprint as fingerprints

    if (from_dataset is not None) != no_patient_overlap or (from_dataset and phantom):
        raise UsageRefusal(
            "--from-dataset goes with --no-patient-overlap, your declaration that none of your patients is in it, and "
            "without --phantom"
        )
    if from_dataset is not None:
        made = fingerprints.from_dataset(dataset, from_dataset, from_plans, overwrite)
    elif phantom is not None:
        made = fingerprints.from_phantoms(dataset, phantom, parse_shape(phantom_shape), overwrite=overwrite)
    else:
        asked = fingerprints.Asked(
            dataset, epsilon, delta, share, patients, patient_column, processes, overwrite
        )  # fmt: skip
        with progress_bar("Measuring cases") as progress:
            made = fingerprints.fingerprint_dataset(asked, progress, partial(typer.echo, err=True))
    if as_json:
        typer.echo(json.dumps(made.as_dict()))
        return
    instead = "public plans from phantoms instead, nothing was charged: " if made.how == "drowned" else ""
    typer.echo(f"{made.file.name}: {instead}{made.reason}")
    if made.how == "private":
        typer.echo(f"epsilon {made.epsilon:.4g} at delta {made.delta:g} per {made.unit} by itself, charged")
    typer.echo("Written." if made.changed else "Nothing changed: it was there already.")
    typer.echo(f"Next: {made.next_command}")


@app.command("plan")
def plan_command(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Dataset id or name.")],
    configuration: Annotated[str, typer.Option("-c", "--configuration", help="Such as 2d or 3d_fullres.")],
    epsilon: Annotated[float | None, typer.Option(help="The budget: 8 is usual, 1 is strict.")] = None,
    curve: Annotated[
        str | None, typer.Option(help="Several budgets, such as 1,3,8,20: printed and drawn; nothing is planned.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Default: 1/(10 patients) as a power of ten, at most 1e-5.")
    ] = None,
    patients: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="CSV of case,patient. Default: the raw data's own."),
    ] = None,
    patient_column: Annotated[str | None, typer.Option(help="Column that names the unit. Default: patient.")] = None,
    plans: Annotated[str, typer.Option("-p", "--plans", help="nnU-Net's plans to start from.")] = "nnUNetPlans",
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="The new plans' name. Default: <plans>DP_eps<epsilon>."),
    ] = None,
    compute: Annotated[Compute, typer.Option(help="small: a shorter schedule, and recorded.")] = Compute.full,
    public_weights: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Declare this file public for -pretrained_weights."),
    ] = None,
    morphology_share: Annotated[
        float | None,
        typer.Option(help="Share of the budget (of mu^2) for learning how to refine. Default: 0.04."),
    ] = None,
    no_morphology: Annotated[bool, typer.Option("--no-morph", help="All of the budget to the training.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="FIELD=VALUE instead of a rule, as often as wanted; the noise is recalibrated."),
    ] = None,
    no_start: Annotated[bool, typer.Option("--no-start", help="No public start: random weights.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a plan that differs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Turn a privacy budget into plans that nnUNetv2_train -p understands.

    Reads only the budget and public facts (how many patients, nnU-Net's plans), never an image. The new plans
    lie beside nnU-Net's and use the same preprocessed data. The same command again changes nothing.

    \b
    Example:
      nnunet-dp plan -d 4 -c 3d_fullres --epsilon 8
      nnunet-dp plan -d 4 -c 3d_fullres --curve 1,3,8,20
      nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerDP_AutoS -p nnUNetPlansDP_eps8
    """
    from nnunet_dp.sections import ByHand

    if (epsilon is None) == (curve is None):
        raise UsageRefusal("give one of --epsilon (one plan) and --curve (several budgets side by side)")
    options: dict[str, Any] = dict(
        delta=delta,
        patients_file=patients,
        patient_column=patient_column,
        plans=plans,
        output=output,
        compute=compute.value,
        public_weights=public_weights,
        morphology_share=_morphology_share(morphology_share, no_morphology),
        public_start=not no_start,
        by_hand=ByHand.parse(settings or ()),
        overwrite=overwrite,
    )
    if curve is not None:
        from nnunet_dp.nnunet_planning import plan_curve

        _show_curve(plan_curve(dataset, configuration, _parse_epsilons(curve), **options), as_json)
        return
    from nnunet_dp.nnunet_planning import plan_dataset

    assert epsilon is not None
    report = plan_dataset(dataset, configuration, epsilon, **options)
    show(report, as_json)
    if not as_json:
        from nnunet_dp.nnunet_start import forecast

        try:
            typer.echo(f"On this machine: {forecast(report)}")
        except RuntimeError as error:  # a card that is full, say: the plan is written all the same
            typer.echo(f"On this machine: not measured ({type(error).__name__})")
        typer.echo("Written." if report.changed else "Nothing changed: this plan was there already.")
        typer.echo(f"Next: {_train_command(dataset, configuration, report.plans_name)}")


@app.command("pretrain")
def pretrain_command(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Dataset id or name.")],
    configuration: Annotated[str, typer.Option("-c", "--configuration", help="Such as 2d or 3d_fullres.")],
    plans: Annotated[str, typer.Option("-p", "--plans", help="Private plans, as `nnunet-dp plan` named them.")],
    phantom: Annotated[
        list[str] | None, typer.Option(help="Kind to learn from; give it again for more. Default: the plan's.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Batches. Default: the plan's.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Phantoms drawn. Default: the plan's.")] = None,
    from_public: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Begin from this nnU-Net checkpoint on public data."),
    ] = None,
    no_patient_overlap: Annotated[
        bool, typer.Option("--no-patient-overlap", help="Declare: none of my patients was in that checkpoint's data.")
    ] = False,
    device: Annotated[str, typer.Option("-device", help="cuda or cpu.")] = "cuda",
    processes: Annotated[int, typer.Option("-np", min=1, help="Processes that draw phantoms.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Make the public start of a private plan: what the network learns from phantoms before the first private step.

    It reads no private data and costs no privacy. A private training makes it by itself where it is missing; this
    command makes it beforehand, or by a recipe of your own, which is written into the plan. The file lies in the
    dataset's preprocessed folder, with its recipe and SHA-256 beside it, and serves all plans with the same network.

    A checkpoint given with --from-public gives the tensors whose names and shapes the planned network has (so its
    width should be the plan's); its SHA-256 and your declaration are recorded.

    \b
    Example:
      nnunet-dp pretrain -d 4 -c 3d_fullres -p nnUNetPlansDP_eps8
      nnunet-dp pretrain -d 4 -c 3d_fullres -p nnUNetPlansDP_eps8 --phantom hippocampus --phantom shapes
    """
    import torch

    from nnunet_dp.nnunet_start import pretrain

    if (from_public is not None) != no_patient_overlap:
        raise UsageRefusal("--from-public and --no-patient-overlap go together: patients in both would not be covered")
    chosen = torch.device(device if device != "cuda" or torch.cuda.is_available() else "cpu")
    with progress_bar("Learning from phantoms") as progress:
        report = pretrain(
            dataset,
            configuration,
            plans,
            chosen,
            processes,
            kinds=tuple(phantom or ()),
            iterations=iterations,
            images=images,
            public_weights=from_public,
            progress=progress,
        )
    show(report, as_json)
    if not as_json:
        typer.echo(f"Next: {_train_command(dataset, configuration, plans)}")


@app.command("status")
def status_command(
    fold_folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="The model's fold, such as .../fold_0.")
    ],
    as_json: AsJson = False,
) -> None:
    """Tell what a training has spent, computed from its ledger. Safe while the training runs.

    Prints epsilon with its unit (the patient, or the case where nobody said which cases belong together), of
    this run and of the whole dataset, and what the claim does and does not cover.

    \b
    Example:
      nnunet-dp status $nnUNet_results/Dataset004_Hippocampus/MODEL/fold_0 --json
    """
    from nnunet_dp.status import read_status

    show(read_status(fold_folder), as_json)


morph = typer.Typer(
    help="""DP-Morph: morphology that is learnt privately per class, and applied to predictions for free.

    A private training learns its rules by itself, once, from a share of its budget that the plan reserves; they lie in
    MODEL/fold_X/morphology.json (what folds agree on: MODEL/morphology.json), and `nnunet-dp predict` applies them.

    \b
    Example:
      nnunet-dp morph apply -i predictions -o refined -m $nnUNet_results/Dataset004_Hippocampus/MODEL/morphology.json
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(morph, name="morph")
app.add_typer(fed, name="fed")
app.add_typer(doctor)
app.add_typer(diagnose)
app.add_typer(share)
app.add_typer(audit)


@morph.command("learn")
def learn_command(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Dataset id or name.")],
    configuration: Annotated[str, typer.Option("-c", "--configuration", help="Such as 2d or 3d_fullres.")],
    trainer: Annotated[str, typer.Option("-tr", "--trainer", help="As given to nnUNetv2_train.")],
    plans: Annotated[str, typer.Option("-p", "--plans", help="As given to nnUNetv2_train.")],
    fold: Annotated[str, typer.Option("-f", "--fold", help="Whose training patients are asked: 0 to 4, or all.")] = "0",
    fixed: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Free: take the rules from this morphology.json."),
    ] = None,
    from_phantom: Annotated[
        str | None, typer.Option(help="Free: rules that artificial patients of this kind support.")
    ] = None,
    per_image: Annotated[
        bool, typer.Option("--per-image", help="Free: public rules that follow each image's own prediction.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the rules that are there; alone: go back to the learnt ones.")
    ] = False,
    processes: Annotated[int, typer.Option("-np", min=1, help="Processes that read masks.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Learn how to refine this model's predictions, and write MODEL/morphology.json.

    Without a further option the reference masks of the fold's training patients are asked, once, in one noised vote.
    It is charged to the dataset's ledger before it is released and paid from the share that the model's plan reserved
    (`nnunet-dp plan`: 4 % by default). A private training has done this already; the command then says so and spends
    nothing. --fixed, --from-phantom and --per-image look at no patient and cost nothing.

    \b
    Example:
      nnunet-dp morph learn -d 4 -c 3d_fullres -f 0 -tr nnUNetTrainerDP_AutoS -p nnUNetPlansDP_eps8
      nnunet-dp morph learn -d 4 -c 3d_fullres -tr nnUNetTrainerDP_AutoS -p nnUNetPlansDP_eps8 --per-image
    """
    from nnunet_dp import learning
    from nnunet_dp.free_rules import place_free_rules
    from nnunet_dp.nnunet import model_folder, preprocessed_folder

    model = model_folder(dataset, trainer, plans, configuration)
    free = [fixed is not None, from_phantom is not None, per_image]
    if sum(free) > 1:
        raise UsageRefusal("--fixed, --from-phantom and --per-image exclude each other: give one of them")
    if any(free):
        place_free_rules(model, fixed, from_phantom, overwrite)
        said = "These rules cost nothing."
    else:
        with progress_bar("Asking training patients") as progress:
            folder = preprocessed_folder(dataset)
            said = learning.learn_for_model(model, fold, folder, processes, progress, overwrite)
    show(learning.RulesReport(model), as_json)
    if not as_json:
        typer.echo(said)
        model_words = f"-d {dataset} -c {configuration} -tr {trainer} -p {plans} -f {fold}"
        typer.echo(f"Next: nnunet-dp predict {model_words} -i IMAGES -o OUT")


@morph.command("apply")
def apply_command(
    source: Annotated[
        Path, typer.Option("-i", exists=True, file_okay=False, help="Predictions, as nnUNetv2_predict leaves them.")
    ],
    target: Annotated[Path, typer.Option("-o", help="Folder for the refined ones; may be the same.")],
    rules: Annotated[Path, typer.Option("-m", exists=True, dir_okay=False, help="A morphology.json.")],
    dataset_json: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Where the predictions have no dataset.json beside them."),
    ] = None,
    processes: Annotated[int, typer.Option("-np", min=1, help="Processes that refine side by side.")] = 2,
) -> None:
    """Refine a folder of predictions. Post-processing: it costs no privacy.

    Radii are in millimetres and each image's own spacing is used. Applying it twice changes nothing more.

    \b
    Example:
      nnunet-dp morph apply -i predictions -o refined -m $nnUNet_results/Dataset004_Hippocampus/MODEL/morphology.json
    """
    from nnunet_dp.morphology import read_morphology
    from nnunet_dp.refined_folder import refine_folder

    morphology = read_morphology(rules)
    with progress_bar("Refining") as progress:
        done = refine_folder(
            source, target, morphology, dataset_json=dataset_json, processes=processes, progress=progress
        )
    typer.echo(f"Refined {done} predictions into {target}, by {morphology.kind} rules")


@app.command(
    "predict",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]},
)
def predict_command(
    context: typer.Context,
    no_morphology: Annotated[bool, typer.Option("--no-morph", help="Do not refine: plain nnUNetv2_predict.")] = False,
    rules: Annotated[
        Path | None,
        typer.Option("--morphology", exists=True, dir_okay=False, help="Other rules than the model's."),
    ] = None,
) -> None:
    """nnUNetv2_predict, with its own flags, followed by DP-Morph.

    All flags but --no-morph and --morphology go to nnUNetv2_predict as they are (nnUNetv2_predict -h lists them). The
    predictions are then refined where they lie: by free rules in MODEL/morphology.json, else by what the folds that
    predict have learnt.

    \b
    Example:
      nnunet-dp predict -d 4 -c 3d_fullres -f 0 -tr nnUNetTrainerDP_AutoS -p nnUNetPlansDP_eps8 -i IMAGES -o OUT
    """
    from nnunet_dp.prediction import predict

    with progress_bar("Refining") as progress:
        typer.echo(predict(context.args, not no_morphology, rules, progress))


@app.command("evaluate")
def evaluate_command(
    reference: Annotated[Path, typer.Option("-r", exists=True, file_okay=False, help="Reference segmentations.")],
    predictions: Annotated[Path, typer.Option("-p", exists=True, file_okay=False, help="Predictions.")],
    compare: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Other predictions of the same cases: paired differences."),
    ] = None,
    dataset_json: Annotated[
        Path | None,
        typer.Option("-d", exists=True, dir_okay=False, help="dataset.json. Default: that beside the predictions."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Of the surface Dice (NSD), in millimetres.")] = 1.0,
    patients: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="CSV of case,patient: intervals over patients, not cases."),
    ] = None,
    patient_column: Annotated[str | None, typer.Option(help="Its column that names the unit.")] = None,
    processes: Annotated[int, typer.Option("-np", min=1, help="Processes that compare side by side.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Dice, HD95, NSD and ASSD of a folder of predictions, with 95 % bootstrap intervals.

    Cases that have a reference and no prediction are counted and left out. The result describes the reference data: if
    these are private, so are the numbers.

    \b
    Example:
      nnunet-dp evaluate -r labelsTs -p refined --compare predictions --patients patients_test.csv
    """
    from nnunet_dp.evaluation import evaluate_folders

    with progress_bar("Comparing") as progress:
        found = evaluate_folders(
            reference,
            predictions,
            compare,
            dataset_json=dataset_json,
            tolerance_mm=tolerance,
            patients=patients,
            patient_column=patient_column,
            processes=processes,
            progress=progress,
        )
    show(found, as_json)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _morphology_share(share: float | None, none: bool) -> float:
    from nnunet_dp.planning import MORPHOLOGY_SHARE

    if none and share:
        raise UsageRefusal("--no-morph and --morphology-share contradict each other: give one of them")
    return 0.0 if none else MORPHOLOGY_SHARE if share is None else share


def _parse_epsilons(text: str) -> list[float]:
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise UsageRefusal(f"--curve should be numbers, found {text!r}; type for instance --curve 1,3,8,20") from None


def _show_curve(reports: list[Any], as_json: bool) -> None:
    """Several budgets: a table and a drawing beside the plans."""
    from nnunet_dp.report import curve_lines, plot_curve

    drawing = reports[0].file.with_name(f"plan_curve_{reports[0].configuration}.png")
    rows = [report.as_dict() for report in reports]
    plot_curve(rows, drawing)
    if as_json:
        typer.echo(json.dumps({"budgets": rows, "drawing": str(drawing)}, indent=2))
        return
    typer.echo("\n".join(curve_lines(rows)))
    typer.echo(f"Drawn: {drawing}")


def _train_command(dataset: str, configuration: str, plans_name: str) -> str:
    from nnunet_dp.link import is_linked

    link = "" if is_linked() or os.environ.get("nnUNet_extTrainer") else "nnunet-dp link && "
    train = f"nnUNetv2_train {dataset} {configuration} 0 -tr nnUNetTrainerDP_AutoS -p {plans_name}"
    return f"{link}{train}\n      (without -tr nnUNetTrainerDP_... nnU-Net trains these plans WITHOUT privacy)"
