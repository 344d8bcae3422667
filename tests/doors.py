"""nnU-Net as its users meet it: tiny datasets, nnU-Net's own commands in subprocesses, and an independent recount.

A ``Workplace`` is a folder with raw, preprocessed and results folders and one dataset in them; a ``Model`` is what one
``-tr``, ``-p`` and fold train there. Every command runs in a process of its own, with a copy of the installed nnunetv2
in front of it: whether trainers are found through ``nnunet-dp link`` or through ``nnUNet_extTrainer`` is decided in the
copy, and the environment of the developer stays as it is.

Design note: ``recounted_epsilon`` and ``chain_holds`` read the ledger's JSON with dp_accounting and hashlib alone. They
are the auditor who does not trust this package, and import nothing of it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

LEDGER = "privacy_ledger.jsonl"
LATEST = "checkpoint_latest.pth"
FINAL = "checkpoint_final.pth"
LONGEST_SECONDS = 600
_FOREIGN = (
    "nnUNet_extTrainer", "nnUNet_wandb_enabled", "nnUNet_compile", "nnUNet_raw", "nnUNet_preprocessed",
    "NNUNET_DP_ENGINE",
)  # fmt: skip


_RUN = """from {command.module} import {command.attr} as main

if __name__ == "__main__":  # nnU-Net's worker processes import the script again
    main()
"""


@dataclass(frozen=True)
class Workplace:
    """One user's folders with one dataset.

    Attributes:
        root: holds raw, preprocessed and results.
        dataset: nnU-Net's name, DatasetXXX_Name.
        configuration: nnU-Net's, such as 2d.
        nnunet: folder that holds the copy of nnunetv2.
        variables: further environment variables of every command.
        scripts: folder of the commands.
        through: a program that starts each command.
    """

    root: Path
    dataset: str
    configuration: str
    nnunet: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    scripts: Path = Path(sysconfig.get_path("scripts"))
    through: tuple[str, ...] = ()

    @property
    def number(self) -> str:
        """The dataset's id, as typed."""
        return str(int(self.dataset[7:10]))

    @property
    def raw(self) -> Path:
        return self.root / "raw" / self.dataset

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed" / self.dataset

    @property
    def results(self) -> Path:
        return self.root / "results" / self.dataset

    def environment(self, **variables: str) -> dict[str, str]:
        """Few processes, our own folders, the copy of nnunetv2 first."""
        inherited = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        folders = {f"nnUNet_{part}": str(self.root / part) for part in ("raw", "preprocessed", "results")}
        few = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        paths = filter(None, [str(self.nnunet), os.environ.get("PYTHONPATH", "")])
        return inherited | folders | few | {"PYTHONPATH": os.pathsep.join(paths)} | dict(self.variables) | variables

    def run(self, program: str, *arguments: object, exit_code: int = 0, **variables: str) -> str:
        """Run one of the installed commands to its end; its console output."""
        command = [*self.through, *_command(self.scripts / program, arguments)]
        done = subprocess.run(
            command, env=self.environment(**variables), cwd=self.root, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LONGEST_SECONDS,
        )  # fmt: skip
        assert done.returncode == exit_code, f"exit code {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    def preprocess(self, *options: object) -> None:
        """nnU-Net's own planning and preprocessing, with one process."""
        few = ("-c", self.configuration, "-np", 1, "-npfp", 1)
        self.run("nnUNetv2_plan_and_preprocess", "-d", self.number, *few, *options)

    def plan(
        self, *options: object, configuration: str | None = None, exit_code: int = 0, start: bool = False
    ) -> str:
        """``nnunet-dp plan``; a public start takes longer than most tests may."""
        chosen = ("-d", self.number, "-c", configuration or self.configuration, *(() if start else ("--no-start",)))
        return self.run("nnunet-dp", "plan", *chosen, *options, exit_code=exit_code)

    def charges(self) -> list[dict[str, Any]]:
        """The complete lines of the dataset's ledger; none where there is no ledger."""
        return read_lines(self.preprocessed / LEDGER)

    def edit_plans(self, plans: str, edit: Callable[[dict[str, Any]], None]) -> None:
        """Change a plans file of the preprocessed folder by hand."""
        edit_json(self.preprocessed / f"{plans}.json", edit)

    def copied_to(self, root: Path) -> Workplace:
        """The same folders somewhere else, to be spoilt."""
        for part in ("raw", "preprocessed", "results"):
            shutil.copytree(self.root / part, root / part)
        return replace(self, root=root)


@dataclass(frozen=True)
class Model:
    """What one trainer, one plans file and one fold train.

    Attributes:
        place: where.
        trainer: for ``-tr``.
        plans: for ``-p``.
        fold: as typed.
    """

    place: Workplace
    trainer: str
    plans: str
    fold: str = "0"

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return self.place.results / f"{self.trainer}__{self.plans}__{self.place.configuration}"

    @property
    def fold_folder(self) -> Path:
        return self.folder / f"fold_{self.fold}"

    def train(self, *options: object, exit_code: int = 0, **variables: str) -> str:
        """``nnUNetv2_train`` to its end; its console output."""
        return self.place.run("nnUNetv2_train", *self._training(options), exit_code=exit_code, **variables)

    @contextmanager
    def training(self, *options: object) -> Iterator[subprocess.Popen[str]]:
        """``nnUNetv2_train`` in the background; nothing of it is left afterwards."""
        with open(self.place.root / "console.txt", "a") as console:
            process = subprocess.Popen(
                _command(self.place.scripts / "nnUNetv2_train", self._training(options)), text=True,
                env=self.place.environment(), cwd=self.place.root, stdin=subprocess.DEVNULL, stdout=console,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def killed(self, charges: int, wait_seconds: float = 0.0, *options: object) -> tuple[int, int]:
        """Train, and die by -9 once this many further charges are in the ledger and a while has passed.

        Returns:
            How many processes the training had, and how many of them lived on for more than five seconds.
        """
        before = len(self.place.charges())
        with self.training(*options) as process:
            wait_until(lambda: len(self.place.charges()) >= before + charges, process)
            time.sleep(wait_seconds)
            assert process.poll() is None, "the training ended before it could be killed"
            had = _alive(process.pid)
            process.kill()
            process.wait()
            return had, _survivors(process.pid)

    def predict(self, images: Path, out: Path) -> dict[str, np.ndarray]:
        """``nnUNetv2_predict`` in a fresh process; the segmentations by case."""
        chosen = ("-d", self.place.number, "-c", self.place.configuration, "-f", self.fold)
        where = ("-i", images, "-o", out, "-tr", self.trainer, "-p", self.plans, "-device", "cpu")
        self.place.run("nnUNetv2_predict", *chosen, *where, "-npp", 1, "-nps", 1)
        return segmentations(out)

    def status(self) -> dict[str, Any]:
        """``nnunet-dp status --json``."""
        return json.loads(self.place.run("nnunet-dp", "status", self.fold_folder, "--json"))

    def copied_charges(self) -> list[dict[str, Any]]:
        """The run's own lines beside the weights."""
        return read_lines(self.fold_folder / LEDGER)

    def validation_images(self, out: Path) -> Path:
        """The raw images of the fold's validation cases, in a folder of their own."""
        out.mkdir()
        splits = json.loads((self.place.preprocessed / "splits_final.json").read_text())
        for case in splits[int(self.fold)]["val"]:
            for image in (self.place.raw / "imagesTr").glob(f"{case}_*"):
                shutil.copy(image, out)
        return out

    def _training(self, options: Sequence[object]) -> tuple[object, ...]:
        chosen = (self.place.number, self.place.configuration, self.fold)
        return *chosen, "-tr", self.trainer, "-p", self.plans, "-device", "cpu", *options


# ---- datasets, each prepared once per session --------------------------------------------------------------------


@functools.cache
def hippocampus_with_regions(base: Path) -> Workplace:
    """3D: twelve patients with one or two cases, a whole with a part, an ignore label, a split by hand."""
    from nnunet_dp.phantoms import write_dataset

    place = _workplace(base / "hippocampus", "Dataset311_PhantomHippocampus", "3d_fullres")
    task = write_dataset(place.root, "hippocampus", 12, 5, dataset_id=311, shape=(20, 24, 20))
    place.run("nnUNetv2_convert_MSD_dataset", "-i", task, "-np", 1)
    edit_json(place.raw / "dataset.json", _make_regions)
    for file in (place.raw / "labelsTr").iterdir():
        _ignore_a_corner(file)
    shutil.copy(task / "patients.csv", place.raw)
    (place.raw / "splits_final.json").write_text(json.dumps(_splits_by_hand(place.raw / "patients.csv")))
    place.preprocess()
    return place


@functools.cache
def lesion(base: Path) -> Workplace:
    """2D, three channels: ten patients; nnU-Net's ordinary plans, the split left to the trainer."""
    from nnunet_dp.phantoms import write_dataset

    place = _workplace(base / "lesion", "Dataset312_PhantomLesion", "2d")
    write_dataset(place.raw.parent, "lesion", 10, 3, dataset_id=312, shape=(32, 32))
    place.preprocess()
    return place


@functools.cache
def hippocampus(base: Path) -> Workplace:
    """3D, small, raw: six patients in NIfTI."""
    from nnunet_dp.phantoms import write_dataset

    place = _workplace(base / "small_hippocampus", "Dataset313_PhantomHippocampus", "3d_fullres")
    task = write_dataset(place.root, "hippocampus", 6, 5, dataset_id=313, shape=(16, 20, 16))
    place.run("nnUNetv2_convert_MSD_dataset", "-i", task, "-np", 1)
    shutil.copy(task / "patients.csv", place.raw)
    return place


def bound_by_permissions(place: Workplace) -> Workplace:
    """The same workplace for somebody who may not read and write everything; root without the capabilities for it."""
    if os.geteuid():
        return place
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("root may read and write everything, and there is no setpriv")
    return replace(place, through=(setpriv, "--bounding-set=-dac_override,-dac_read_search"))


def unlinked_nnunet(folder: Path) -> Path:
    """A copy of the installed nnunetv2 in which our trainers are not linked."""
    spec = importlib.util.find_spec("nnunetv2")
    assert spec is not None and spec.submodule_search_locations
    source = Path(next(iter(spec.submodule_search_locations)))
    shutil.copytree(source, folder / "nnunetv2", ignore=shutil.ignore_patterns("nnunet_dp_link*"))
    return folder


def only_nnunet(folder: Path) -> Path:
    """A fresh virtual environment with everything that is installed here but this package; its folder of commands.

    Distributions are links; nnunetv2 is a copy in which our trainers are not linked.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    scripts, target = (
        Path(sysconfig.get_path(which, "venv", {"base": str(folder), "platbase": str(folder)}))
        for which in ("scripts", "purelib")
    )
    unlinked_nnunet(target)
    here = {Path(sysconfig.get_path(which)) for which in ("purelib", "platlib")}
    for entry in (entry for site in here for entry in site.iterdir()):
        ours = entry.name.lower().lstrip("_").removeprefix("editable").lstrip("_.").startswith("nnunet_dp")
        if not ours and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)
    for command in distribution("nnunetv2").entry_points.select(group="console_scripts"):
        script = scripts / command.name
        script.write_text(f"#!{scripts}/python\n{_RUN.format(command=command)}")
        script.chmod(0o755)
    return scripts


def linked(place: Workplace) -> Workplace:
    """The same workplace after ``nnunet-dp link``."""
    place.run("nnunet-dp", "link")
    return place


def over_gloo(place: Workplace, folder: Path) -> Workplace:
    """The same workplace with an nnunetv2 whose ``-num_gpus`` needs no GPU: gloo for NCCL, no CUDA device is set."""
    shutil.copytree(place.nnunet, folder)
    command = folder / "nnunetv2" / "run" / "run_training.py"
    text = command.read_text()
    for theirs, ours in _GPU_ONLY.items():
        assert text.count(theirs) == 1, theirs
        text = text.replace(theirs, ours)
    command.write_text(text)
    return replace(place, nnunet=folder)


_GPU_ONLY = {
    '"nccl"': '"gloo"',
    "torch.cuda.set_device(torch.device('cuda', dist.get_rank()))": "pass",
}


def with_variable(place: Workplace, *folders: Path) -> Workplace:
    """The same workplace after ``eval "$(nnunet-dp env)"``, with other folders named before."""
    before = os.pathsep.join(map(str, folders))
    line = place.run("nnunet-dp", "env", nnUNet_extTrainer=before)
    printed = subprocess.run(["sh", "-c", line + 'printf %s "$nnUNet_extTrainer"'], capture_output=True, text=True)
    return replace(place, variables={**place.variables, "nnUNet_extTrainer": printed.stdout})


def _workplace(root: Path, dataset: str, configuration: str) -> Workplace:
    for part in ("raw", "preprocessed", "results"):
        (root / part).mkdir(parents=True)
    return Workplace(root, dataset, configuration, unlinked_nnunet(root / "site"))


def _make_regions(dataset: dict[str, Any]) -> None:
    dataset["labels"] = {"background": 0, "whole": [1, 2], "part": 2, "ignore": 3}
    dataset["regions_class_order"] = [1, 2]


def _ignore_a_corner(file: Path) -> None:
    image = sitk.ReadImage(str(file))
    labels = sitk.GetArrayFromImage(image)
    labels[:6, :6, :] = 3
    painted = sitk.GetImageFromArray(labels)
    painted.CopyInformation(image)
    sitk.WriteImage(painted, str(file))


def _splits_by_hand(patients: Path) -> list[dict[str, list[str]]]:
    """Five folds: patient k validates in fold k modulo 5."""
    rows = [line.split(",") for line in patients.read_text().split()[1:]]
    ids = sorted({patient for _, patient in rows})
    sides = [{case: ids.index(patient) % 5 == fold for case, patient in rows} for fold in range(5)]
    return [{"train": [c for c, val in side.items() if not val], "val": [c for c, val in side.items() if val]}
            for side in sides]


# ---- files -------------------------------------------------------------------------------------------------------


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a ledger that may be growing."""
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def edit_json(file: Path, edit: Callable[[Any], None]) -> None:
    """Change a JSON file by hand."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content, indent=1))


def segmentations(folder: Path) -> dict[str, np.ndarray]:
    """Every image of a folder by its file name."""
    files = sorted([*folder.glob("*.nii.gz"), *folder.glob("*.png")])
    return {file.name: sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in files}


def private_words(place: Workplace) -> list[str]:
    """Case names and patient ids: what must not be said."""
    rows = (place.raw / "patients.csv").read_text().split()[1:]
    return sorted({word for row in rows for word in row.split(",")})


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300) -> None:
    """Look again and again while the process lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the training ended with {process.returncode} before it could be observed"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def spawned(process: subprocess.Popen[str]) -> list[int]:
    """The processes that ``multiprocessing`` spawned in this one, oldest first (Linux: read from /proc)."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def _survivors(group: int, seconds: float = 5) -> int:
    """Processes of a group that are still alive after a while; zombies are not (Linux: read from /proc)."""
    end = time.monotonic() + seconds
    while (alive := _alive(group)) and time.monotonic() < end:
        time.sleep(0.1)
    return alive


def _alive(group: int) -> int:
    return sum(_is_alive_in(group, file) for file in Path("/proc").glob("[0-9]*/stat"))


def _is_alive_in(group: int, stat: Path) -> bool:
    with suppress(OSError):
        state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
        return int(of_group) == group and state not in "ZX"
    return False


def _command(program: Path, arguments: Sequence[object]) -> list[str]:
    return [str(program), *map(str, arguments)]


# ---- the auditor: dp_accounting and hashlib, nothing of ours ------------------------------------------------------


def recounted_epsilon(lines: Sequence[Mapping[str, Any]], delta: float) -> float:
    """Epsilon of Gaussian ledger lines under zero-out, as anybody would compute it."""
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    for line in lines:
        assert line["mechanism"] == "gaussian" and line["epsilon"] is None
        event, probability = GaussianDpEvent(line["noise_multiplier"]), line["sampling_probability"]
        accountant.compose(PoissonSampledDpEvent(probability, event) if probability < 1 else event, line["count"])
    return accountant.get_epsilon(delta)


def chain_holds(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each line has the hash of its content and names the line before it."""
    previous = "0" * 64
    for number, line in enumerate(lines, 1):
        content = {key: value for key, value in line.items() if key != "hash"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        hashed = hashlib.sha256(text.encode()).hexdigest()
        if (line["previous"], line["sequence"], line["hash"]) != (previous, number, hashed):
            return False
        previous = line["hash"]
    return True
