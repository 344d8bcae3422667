"""The commands ``nnunet-dp fed``: parse, call one function, print; as ``cli``, to which they belong.

=========  ==================================================  ==========================================
command    calls                                               prints
=========  ==================================================  ==========================================
split      :func:`nnunet_dp.federated.split.split_dataset`     a line for each new dataset
init-site  :func:`nnunet_dp.federated.hospital.init_site`      what to send, what to type next
site       :func:`nnunet_dp.federated.hospital.run_site`       what becomes of its process
server     :func:`nnunet_dp.federated.deployment.run_server`   where it listens, which keys it knows
run        :func:`nnunet_dp.federated.deployment.run`          the coordinator's lines, then the summary
simulate   :func:`nnunet_dp.federated.simulate.simulate`       the same
status     :func:`nnunet_dp.federated.summary.read_summary`    the summary
=========  ==================================================  ==========================================

What goes on is said on stderr; stdout holds the result, with ``--json`` as one line, the last.
"""
# ruff: noqa: D301 (click reads the control character \\b in help texts: no reflow)

import enum
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnunet_dp.console import show_lines, whole_numbers
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.workers import in_tenths

if TYPE_CHECKING:
    from nnunet_dp.federated.new_run import RunOptions

fed = typer.Typer(
    help="""Federated private training: hospitals keep their data, a coordinator averages what they release.

    On one machine: split a dataset, simulate. In earnest: each hospital runs init-site and site, a coordinator runs
    server and run. Needs the extra: pip install 'nnunet-dp[federated]'.

    \b
    Example:
      nnunet-dp fed split -d 4 --sites 4 --first-id 301
      nnunet-dp fed simulate --datasets 301 302 303 304 --mode adp-fl --rounds 20 --epsilon 8
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)


class By(str, enum.Enum):
    """Ways to deal patients out."""

    random = "random"
    column = "column"
    dirichlet = "dirichlet"


class ModeName(str, enum.Enum):
    """As ``protocol.Mode``, which would import pydantic for ``--help``."""

    adp_fl = "adp-fl"
    dp_fedavg = "dp-fedavg"
    fedavg = "fedavg"
    paper = "paper"


class Noise(str, enum.Enum):
    """Of the gradient."""

    gaussian = "gaussian"
    laplace = "laplace"


class Device(str, enum.Enum):
    """Where sites train."""

    cpu = "cpu"
    cuda = "cuda"


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, as the last line, instead of a table.")]
Mode = Annotated[ModeName, typer.Option(help="adp-fl, dp-fedavg; no guarantee, for comparison: fedavg, paper.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds: the sites train, the coordinator averages.")]
Epsilon = Annotated[float, typer.Option(help="At most this for each site's patients, from this run.")]
Delta = Annotated[float | None, typer.Option(help="At most this; default: each site's own, by its size.")]
LocalSteps = Annotated[int, typer.Option(min=1, help="Private steps of each site in each round.")]
Configuration = Annotated[
    str | None, typer.Option("-c", "--configuration", help="Default: 2d for pictures, 3d_fullres for volumes.")
]
PlansFrom = Annotated[
    str | None, typer.Option("--plans-from", help="DATASET or DATASET:PLANS on this machine, whose plans are taken.")
]
NoOverlap = Annotated[
    bool, typer.Option("--no-patient-overlap", help="Declare: none of the sites' patients is in that dataset.")
]
Phantom = Annotated[str | None, typer.Option(help="Kind that public plans are made from. Default: what resembles.")]
PhantomShape = Annotated[str | None, typer.Option(help="Voxels of these phantoms, such as 80,80: a public fact.")]
NoiseOption = Annotated[Noise, typer.Option(help="laplace clips the L1 norm, at the full batch.")]
Percentile = Annotated[float, typer.Option(help="Of the patients' norms, which the threshold follows (adp-fl).")]
Bound = Annotated[
    float | None, typer.Option(min=1e-6, max=1e8, help="Clipping bound, or its first value (adp-fl).")
]
Rate = Annotated[float | None, typer.Option("--learning-rate", help="Of the first step. Default: a rule's.")]
Momentum = Annotated[float | None, typer.Option(help="Of SGD, kept at the sites. Default: 0; fedavg: 0.99.")]
Probability = Annotated[float, typer.Option("--sampling-probability", help="Of each patient and step; 1 is all.")]
Weights = Annotated[str | None, typer.Option(help="Public weights in the mean, such as north=1,south=2.")]
MinimumReplies = Annotated[int | None, typer.Option(min=1, help="With which a round counts. Default: a majority.")]
RoundTimeout = Annotated[float, typer.Option(min=1, help="Seconds that a round waits for a site.")]
PrepareTimeout = Annotated[float, typer.Option(min=1, help="Seconds that preprocessing may take.")]
Retries = Annotated[int, typer.Option(min=0, help="Of a round with too few replies.")]
WaitForSites = Annotated[float, typer.Option(min=1, help="Seconds that the run waits for its sites to come.")]
GoOnWithout = Annotated[bool, typer.Option("--go-on-without", help="Begin without sites that decline to prepare.")]
ClientLevel = Annotated[
    str | None, typer.Option(help="EPSILON,DELTA,BOUND: noise for whole sites, beside their patients' guarantee.")
]
Fingerprint = Annotated[
    bool, typer.Option("--fingerprint", help="Plans from a noised fingerprint of the sites' images, charged to them.")
]
FingerprintShare = Annotated[float, typer.Option(help="Of the budget (of mu^2), for --fingerprint.")]
NoStart = Annotated[bool, typer.Option("--no-start", help="No public start: random weights.")]
StartIterations = Annotated[int | None, typer.Option(min=1, help="Of the public start. Default: the plan's.")]
StartImages = Annotated[int | None, typer.Option(min=1, help="Phantoms drawn for it. Default: the plan's.")]
Features = Annotated[str | None, typer.Option(help="Of each stage, such as 16,32,64. Default: a rule's.")]
Seed = Annotated[int, typer.Option(min=0, help="Of random weights.")]
Output = Annotated[str | None, typer.Option("-o", "--output", help="Name of the model's plans.")]


# ---- one machine -------------------------------------------------------------------------------------------------


@fed.command("split")
def split_command(
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="Dataset id or name, with raw data.")],
    first_id: Annotated[int, typer.Option(min=1, max=999, help="Number of the first site's dataset.")],
    sites: Annotated[int | None, typer.Option(help="How many; with --by column: as many as it has values.")] = None,
    by: Annotated[By, typer.Option(help="How patients are dealt out.")] = By.random,
    column: Annotated[str | None, typer.Option(help="Of patients.csv, such as the scanner; for --by column.")] = None,
    alpha: Annotated[float, typer.Option(help="For --by dirichlet: the smaller, the more sites differ.")] = 0.5,
    seed: Annotated[int, typer.Option(help="The same gives the same sites.")] = 0,
    fold: Annotated[int | None, typer.Option(min=0, help="Only the training patients of this fold.")] = None,
    patients: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="CSV of case,patient. Default: the dataset's.")
    ] = None,
    patient_column: Annotated[str | None, typer.Option(help="Its column that names the unit.")] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copies, not hard links: for images that will change.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make site datasets from one dataset, by patient, to try federated training.

    All cases of a patient go to one site. dirichlet makes sites that differ in size and in how much foreground their
    patients have. With --fold F the validation patients of splits_final.json stay out, to judge the model by. Images
    are hard links, so nothing is copied: whoever writes into one changes the original, too (--copy does not).

    \b
    Example:
      nnunet-dp fed split -d 4 --sites 4 --first-id 301
      nnunet-dp fed split -d 4 --by column --column scanner --first-id 301 --fold 0
    """
    from nnunet_dp.federated.split import Dealing, split_dataset
    from nnunet_dp.report import CASE_NOTE

    dealing = Dealing(by.value, sites, column, alpha, seed)
    made = split_dataset(dataset, dealing, first_id, fold, patients, patient_column, links=not copy)
    if as_json:
        typer.echo(json.dumps({"sites": [site.as_dict() for site in made]}))
        return
    for site in made:
        value = f", {column} {site.value}" if site.value else ""
        typer.echo(f"{site.folder.name}: {site.units} {site.unit}s, {site.cases} cases{value}")
    if any(site.unit == "case" for site in made):
        typer.echo(f"NOTE: {CASE_NOTE}")
    numbers = " ".join(str(first_id + number) for number in range(len(made)))
    typer.echo(f"Next: nnunet-dp fed simulate --datasets {numbers} --mode adp-fl --rounds 20 --epsilon 8")


@fed.command("simulate")
def simulate_command(
    context: typer.Context,
    datasets: Annotated[
        list[str] | None, typer.Option("--datasets", help="Ids or names of the sites' datasets.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="[DATASETS]...")] = None,
    mode: Mode = ModeName.adp_fl,
    rounds: Rounds = 20,
    epsilon: Epsilon = 8.0,
    delta: Delta = None,
    local_steps: LocalSteps = 1,
    configuration: Configuration = None,
    plans: Annotated[str | None, typer.Option("-p", "--plans", help="Of the first dataset; may be private.")] = None,
    plans_from: PlansFrom = None,
    no_patient_overlap: NoOverlap = False,
    fingerprint: Fingerprint = False,
    fingerprint_share: FingerprintShare = 0.1,
    phantom: Phantom = None,
    phantom_shape: PhantomShape = None,
    noise: NoiseOption = Noise.gaussian,
    percentile: Percentile = 50.0,
    bound: Bound = None,
    learning_rate: Rate = None,
    momentum: Momentum = None,
    sampling_probability: Probability = 1.0,
    weights: Weights = None,
    minimum_replies: MinimumReplies = None,
    round_timeout: RoundTimeout = 3600.0,
    prepare_timeout: PrepareTimeout = 21_600.0,
    retries: Retries = 2,
    wait_for_sites: WaitForSites = 600.0,
    go_on_without: GoOnWithout = False,
    client_level: ClientLevel = None,
    no_start: NoStart = False,
    start_iterations: StartIterations = None,
    start_images: StartImages = None,
    features: Features = None,
    seed: Seed = 0,
    output: Output = None,
    model_dataset: Annotated[str | None, typer.Option(help="DatasetXXX_Name of the model. Default: the first.")] = None,
    max_epsilon: Annotated[float, typer.Option(help="Of each site's settings: all runs on its dataset.")] = 1000.0,
    folder: Annotated[Path | None, typer.Option(file_okay=False, help="The coordinator's. Default: a new one.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --folder.")] = False,
    device: Annotated[Device, typer.Option("--device", "-device", help="Where sites train.")] = Device.cpu,
    processes: Annotated[int, typer.Option("-np", min=1, help="Of each site, beside its training.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Run a whole federation on this machine: sites, coordinator and server, on loopback, stopped again at the end.

    Without -p and --plans-from the plans are public: made by nnU-Net on phantoms that resemble the dataset; with
    --fingerprint they follow noised statistics of the sites' images, for a tenth of the budget. The model
    begins from a public start on phantoms, as after `nnunet-dp plan` (--no-start: random weights), and is an ordinary
    nnU-Net model. A line is said for each round; Ctrl-C stops everything, --resume --folder FOLDER goes on.

    \b
    Example:
      nnunet-dp fed simulate --datasets 301 302 303 304 --mode adp-fl --rounds 20 --epsilon 8
      nnunet-dp fed simulate --datasets 301 302 --mode fedavg --rounds 50 --local-steps 5 --json
    """
    from nnunet_dp.federated import simulate as simulation

    if resume:
        if folder is None:
            raise UsageRefusal("--resume needs the run's folder and nothing else: --resume --folder FOLDER")
        _refuse_beside_resume(context, "folder", "resume", "as_json")
        _show_summary(simulation.resume(folder.resolve(), _say, in_tenths(_say, "public start")), as_json)
        return
    asked = simulation.Simulation(
        datasets=(*(datasets or ()), *(more or ())),
        folder=folder,
        model_dataset=model_dataset,
        max_epsilon=max_epsilon,
        device=device.value,
        processes=processes,
    )
    options = _run_options(locals())
    _show_summary(simulation.simulate(asked, options, _say, in_tenths(_say, "public start")), as_json)


@fed.command("status")
def status_command(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Of a federated run, or of its model.")],
    as_json: AsJson = False,
) -> None:
    """Tell what a federated run has spent at each site, counted again where a site's ledger lies on this machine.

    The run's epsilon is the largest of its sites'. Costs add for a patient known to several sites.

    \b
    Example:
      nnunet-dp fed status $nnUNet_results/Dataset301_HippocampusSite1/MODEL --json
    """
    _show_summary(folder, as_json)


# ---- several machines --------------------------------------------------------------------------------------------


@fed.command("init-site")
def init_site_command(
    folder: Annotated[Path, typer.Argument(file_okay=False, help="New folder for settings and keys.")],
    name: Annotated[str, typer.Option(help="Public name of the site.")],
    dataset: Annotated[str, typer.Option("-d", "--dataset", help="The site's own dataset, id or name.")],
    max_epsilon: Annotated[float, typer.Option(help="Most that its patients may ever spend, over all runs.")],
    delta: Annotated[float | None, typer.Option(help="Of that epsilon. Default: by the number of patients.")] = None,
    device: Annotated[Device, typer.Option("--device", "-device", help="Where to train.")] = Device.cpu,
    processes: Annotated[int, typer.Option("-np", min=1, help="Beside the training.")] = 1,
) -> None:
    """Prepare this hospital for taking part: its settings, which no coordinator can raise, and its key pair.

    \b
    Example:
      nnunet-dp fed init-site north --name north -d 301 --max-epsilon 8
    """
    from nnunet_dp.federated.hospital import NewSite, init_site

    site = NewSite(name, dataset, max_epsilon, delta, device.value, processes)
    typer.echo("\n".join(init_site(folder, site)))


@fed.command("site")
def site_command(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="As init-site made it.")],
    server: Annotated[str, typer.Option(help="HOST:PORT of the coordinator's server.")],
    root_certificate: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The coordinator's ca.pem. Default: FOLDER/ca.pem."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without TLS and key: only for trying out on one machine.")
    ] = False,
) -> None:
    """Take part with this hospital's dataset until Ctrl-C; reconnects by itself.

    \b
    Example:
      nnunet-dp fed site north --server coordinator.example:9092 --root-certificate ca.pem
    """
    from nnunet_dp.federated.hospital import run_site

    run_site(folder, server, root_certificate, insecure, _say)


@fed.command("server")
def server_command(
    folder: Annotated[Path, typer.Argument(file_okay=False, help="The coordinator's; made where absent.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="To listen on.")] = 9092,
    name: Annotated[
        list[str] | None, typer.Option(help="Under which sites reach it: goes into its new certificate.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The server's, PEM; with --key and --authority.")
    ] = None,
    key: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Of that certificate.")] = None,
    authority: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Certificate of who signed it.")
    ] = None,
    register: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="A site's public key; as often as wanted.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without TLS and keys: only for trying out on one machine.")
    ] = False,
) -> None:
    """Run the server that sites connect to, until Ctrl-C. With TLS; only registered keys are let in.

    The first start makes a certificate in FOLDER/certificates; send its ca.pem to the sites. While a server runs in
    FOLDER the same command with --register lets another site in and ends.

    \b
    Example:
      nnunet-dp fed server run --host 0.0.0.0 --name coordinator.example --register north.pub --register south.pub
    """
    from nnunet_dp.federated.deployment import NewServer, run_server

    given = NewServer(host, port, tuple(name or ()), certificate, key, authority, tuple(register or ()), insecure)
    run_server(folder, given, _say)


@fed.command("run")
def run_command(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Of the server, on its machine.")],
    sites: Annotated[int | None, typer.Option(min=1, help="That take part. Required, but with --resume.")] = None,
    patients: Annotated[
        int | None, typer.Option(min=1, help="Over all sites: a public number, rounded as you like. Required, too.")
    ] = None,
    dataset_json: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Description: channels, labels, file ending. Required, too."),
    ] = None,
    mode: Mode = ModeName.adp_fl,
    rounds: Rounds = 20,
    epsilon: Epsilon = 8.0,
    delta: Delta = None,
    local_steps: LocalSteps = 1,
    configuration: Configuration = None,
    plans_from: PlansFrom = None,
    no_patient_overlap: NoOverlap = False,
    fingerprint: Fingerprint = False,
    fingerprint_share: FingerprintShare = 0.1,
    phantom: Phantom = None,
    phantom_shape: PhantomShape = None,
    noise: NoiseOption = Noise.gaussian,
    percentile: Percentile = 50.0,
    bound: Bound = None,
    learning_rate: Rate = None,
    momentum: Momentum = None,
    sampling_probability: Probability = 1.0,
    weights: Weights = None,
    minimum_replies: MinimumReplies = None,
    round_timeout: RoundTimeout = 3600.0,
    prepare_timeout: PrepareTimeout = 21_600.0,
    retries: Retries = 2,
    wait_for_sites: WaitForSites = 600.0,
    go_on_without: GoOnWithout = False,
    client_level: ClientLevel = None,
    no_start: NoStart = False,
    start_iterations: StartIterations = None,
    start_images: StartImages = None,
    features: Features = None,
    seed: Seed = 0,
    output: Output = None,
    model_dataset: Annotated[str, typer.Option(help="DatasetXXX_Name of the model.")] = "Dataset900_Federated",
    server: Annotated[str | None, typer.Option(help="HOST:PORT. Default: as the server in FOLDER wrote.")] = None,
    resume: Annotated[Path | None, typer.Option(file_okay=False, help="Go on with the run in this folder.")] = None,
    device: Annotated[Device, typer.Option("--device", "-device", help="For the public start.")] = Device.cpu,
    processes: Annotated[int, typer.Option("-np", min=1, help="That draw phantoms.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Coordinate a run over the sites that are connected to this machine's server, and follow it.

    Reads no patient: plans come from phantoms (or a public dataset, or with --fingerprint from what sites release for
    it), sizes from what is typed. Ctrl-C stops the run; --resume RUN_FOLDER goes on with it.

    \b
    Example:
      nnunet-dp fed run run --sites 2 --patients 200 --dataset-json dataset.json --rounds 20 --epsilon 8
    """
    from nnunet_dp.federated import deployment

    if resume is not None:
        _refuse_beside_resume(context, "folder", "resume", "server", "as_json")
        _show_summary(deployment.resume(folder, resume, server, _say, in_tenths(_say, "public start")), as_json)
        return
    if sites is None or patients is None or dataset_json is None:
        raise UsageRefusal(
            "a new run should have --sites, --patients and --dataset-json: see `nnunet-dp fed run --help`; or --resume "
            "RUN_FOLDER"
        )
    asked = deployment.Asked(sites, patients, dataset_json, model_dataset, device.value, processes, server)
    options = _run_options(locals() | {"plans": None})
    _show_summary(deployment.run(folder, asked, options, _say, in_tenths(_say, "public start")), as_json)


# ---- what the commands share -------------------------------------------------------------------------------------


def _refuse_beside_resume(context: typer.Context, *allowed: str) -> None:
    """A run goes on as it was decided: an option that would be ignored is refused."""
    from click.core import ParameterSource

    typed = [
        parameter.opts[0] if parameter.opts[0].startswith("-") else "datasets"
        for parameter in context.command.params
        if parameter.name is not None and parameter.name not in allowed
        and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]  # fmt: skip
    if typed:
        raise UsageRefusal(
            f"--resume goes on with a run as it was decided, found {', '.join(typed)} beside it: leave that out, or "
            "begin a new run without --resume"
        )


def _run_options(given: Mapping[str, Any]) -> "RunOptions":
    """The options that `simulate` and `run` have in common, by their names there."""
    from nnunet_dp.federated.new_run import Mode as RunMode
    from nnunet_dp.federated.new_run import RunOptions, Schedule

    schedule = Schedule(
        mode=RunMode(given["mode"].value),
        rounds=given["rounds"],
        local_steps=given["local_steps"],
        sampling_probability=given["sampling_probability"],
        noise=given["noise"].value,
        learning_rate=given["learning_rate"],
        momentum=given["momentum"],
        bound=given["bound"],
        start=not given["no_start"],
        start_iterations=given["start_iterations"],
        start_images=given["start_images"],
        features=whole_numbers(given["features"], "--features", "16,32,64"),
    )
    return RunOptions(
        schedule=schedule,
        epsilon=given["epsilon"],
        delta=given["delta"],
        configuration=given["configuration"],
        percentile=given["percentile"],
        plans=given["plans"],
        plans_from=given["plans_from"],
        no_patient_overlap=given["no_patient_overlap"],
        phantom=given["phantom"],
        phantom_shape=whole_numbers(given["phantom_shape"], "--phantom-shape", "80,80"),
        weights=_weights(given["weights"]),
        minimum_replies=given["minimum_replies"],
        round_timeout_s=given["round_timeout"],
        prepare_timeout_s=given["prepare_timeout"],
        retries=given["retries"],
        wait_for_sites_s=given["wait_for_sites"],
        go_on_without=given["go_on_without"],
        client_level=_client_level(given["client_level"]),
        output=given["output"],
        seed=given["seed"],
        fingerprint_share=given["fingerprint_share"] if given["fingerprint"] else None,
    )


def _weights(text: str | None) -> dict[str, float]:
    """From words such as north=1,south=2."""
    try:
        pairs = [part.partition("=") for part in (text or "").split(",") if part]
        return {name.strip(): float(value) for name, _, value in pairs}
    except ValueError:
        raise UsageRefusal(f"--weights should be names and numbers, found {text!r}; type: north=1,south=2") from None


def _client_level(text: str | None) -> tuple[float, float, float] | None:
    try:
        epsilon, delta, bound = map(float, (text or "0,0,0").split(","))
    except ValueError:
        raise UsageRefusal(f"--client-level should be three numbers, found {text!r}; type: 8,1e-2,0.5") from None
    return (epsilon, delta, bound) if text else None


def _say(line: str) -> None:
    typer.echo(line, err=True)
    sys.stderr.flush()


def _show_summary(folder: Path, as_json: bool) -> None:
    from nnunet_dp.federated.summary import read_summary

    summary = read_summary(folder)
    if as_json:
        typer.echo(json.dumps(summary.as_dict()))
        return
    show_lines(summary.lines())
    if summary.complete and summary.model_folder:
        typer.echo(f"Next: {_predict_command(summary.model_folder)}")


def _predict_command(model: Path) -> str:
    """Plain nnU-Net's, or ours once somebody placed rules that it can refine by."""
    trainer, plans, configuration = model.name.split("__")
    command = "nnunet-dp predict" if (model / "morphology.json").is_file() else "nnUNetv2_predict"
    return f"{command} -d {model.parent.name} -c {configuration} -f all -tr {trainer} -p {plans} -i IMAGES -o OUT"
