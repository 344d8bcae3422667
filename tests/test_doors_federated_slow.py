"""The commands of docs/federated.md, typed in subprocesses, with Flower's own processes on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from doors import LEDGER, _command, read_lines, segmentations, wait_until

from nnunet_dp.federated import deployment
from nnunet_dp.federated.process_table import Process, is_running
from nnunet_dp.federated.split import Dealing, split_dataset
from nnunet_dp.phantoms import write_dataset

pytestmark = pytest.mark.slow
SMALL = ("--phantom-shape", "32,32", "--features", "4,8,8")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """nnU-Net's folders in the environment, and Dataset004 with eight patients."""
    for part in ("raw", "preprocessed", "results"):
        (tmp_path / part).mkdir()
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(__file__).parent.parent / "trainers"))
    write_dataset(tmp_path / "raw", "lesion", 8, 3, dataset_id=4, shape=(32, 32), test_patients=2)
    return tmp_path


def typed(place: Path, *arguments: object, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        _command("nnunet-dp", arguments), env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=place, text=True,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == exit_code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def console(place: Path) -> str:
    """What the commands in the background said so far."""
    return (place / "console.txt").read_text()


@contextmanager
def running(place: Path, *arguments: object, exit_code: int = 130) -> Iterator[subprocess.Popen[str]]:
    """A command that runs until Ctrl-C, which is what ends it; one that has ended by then has another exit code."""
    with (place / "console.txt").open("a") as stream:
        process = subprocess.Popen(
            _command("nnunet-dp", arguments), env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=place, text=True,
            stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(120) == exit_code, console(place)[-3000:]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def processes_of(folder: Path) -> list[str]:
    """Command lines of the processes whose environment names the folder, as that of every process of Flower's does."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(folder).encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


def coordinator_of(run: Path) -> Process:
    return Process(**json.loads((run / "server_app.json").read_text())["process"])


def charges(place: Path) -> list[int]:
    """Lines in the ledgers of both sites."""
    ledgers = [place.glob(f"preprocessed/Dataset{number}_*/{LEDGER}") for number in (301, 302)]
    return [sum(len(read_lines(file)) for file in files) for files in ledgers]


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


# ---- one machine -------------------------------------------------------------------------------------------------


def test_split_simulate_status_and_predict_as_typed(place, tmp_path):
    raw = place / "raw" / "Dataset004_PhantomLesion"
    typed(place, "fed", "split", "-d", 4, "--sites", 2, "--first-id", 301)
    start = ("--start-iterations", 2, "--start-images", 3)
    asked = ("--datasets", 301, 302, "--mode", "adp-fl", "--rounds", 2, "--epsilon", 8, *SMALL, *start)
    done = typed(place, "fed", "simulate", *asked, "--folder", place / "run", "--json")
    told = result_of(done)
    assert [(site["rounds"], site["recounted"]) for site in told["sites"]] == [(2, True), (2, True)]
    assert max(site["epsilon_spent"] for site in told["sites"]) <= 8.0
    assert len([line for line in done.stderr.splitlines() if line.startswith("round ")]) == 2
    assert "phantom" in told["inputs"]["plans"] and "plans_from_raw_fingerprint" not in told["not_covered"]
    status = json.loads(typed(place, "fed", "status", place / "run", "--json").stdout)
    assert status == told
    model = Path(told["model_folder"])
    trainer, plans, configuration = model.name.split("__")
    chosen = ("-d", 301, "-c", configuration, "-f", "all", "-tr", trainer, "-p", plans)
    where = ("-i", raw / "imagesTs", "-o", tmp_path / "out", "-device", "cpu", "-npp", 1, "-nps", 1)
    predicted = subprocess.run(_command("nnUNetv2_predict", (*chosen, *where)), capture_output=True, text=True)
    assert predicted.returncode == 0, predicted.stderr[-3000:]
    assert segmentations(tmp_path / "out").keys() == segmentations(raw / "labelsTs").keys()


def test_ctrl_c_stops_a_simulation_at_once_and_says_how_to_go_on(place):
    split_dataset("4", Dealing("random", 2), 301)
    run, asked = place / "run", ("--datasets", 301, 302, "--rounds", 2, "--epsilon", 8, *SMALL, "--no-start")
    with running(place, "fed", "simulate", *asked, "--folder", run) as process:
        wait_until(lambda: "round 1/2" in console(place), process)  # the second is asked for, nobody charged for it yet
        assert len(processes_of(run)) >= 6
        interrupted = time.monotonic()
    assert time.monotonic() - interrupted < 30 and not processes_of(run)
    assert console(place).count(f"`nnunet-dp fed simulate --resume --folder {run}` goes on") == 1
    told = result_of(typed(place, "fed", "simulate", "--resume", "--folder", run, "--json"))
    assert told["complete"] and [(site["rounds"], site["recounted"]) for site in told["sites"]] == [(2, True)] * 2
    assert charges(place) == [2, 2]


# ---- several machines --------------------------------------------------------------------------------------------


@contextmanager
def hospitals(place: Path) -> Iterator[tuple[object, ...]]:
    """A server and two hospitals that take part, with TLS and keys; yields what starts a small run, but its rounds."""
    from nnunet_dp.federated.flower_environment import free_port

    split_dataset("4", Dealing("random", 2), 301)
    address, keys = f"127.0.0.1:{free_port()}", []
    for name, number in (("north", 301), ("south", 302)):
        typed(place, "fed", "init-site", name, "--name", name, "-d", number, "--max-epsilon", 8)
        keys += ["--register", f"{name}/site_key.pub"]
    with ExitStack() as stack:
        server = stack.enter_context(running(place, "fed", "server", "run", "--port", address.split(":")[1], *keys))
        wait_until(lambda: console(place).count("Registered") == 2, server)
        for name in ("north", "south"):
            shutil.copy(place / "run" / "certificates" / "ca.pem", place / name)
            stack.enter_context(running(place, "fed", "site", name, "--server", address))
        described = place / "raw" / "Dataset004_PhantomLesion" / "dataset.json"
        asked = ("--sites", 2, "--patients", 8, "--dataset-json", described, "--epsilon", 8)
        yield ("fed", "run", "run", *asked, *SMALL, "--no-start")


def test_two_hospitals_and_a_coordinator_with_tls_and_keys_as_typed(place):
    with hospitals(place) as asked:
        told = result_of(typed(place, *asked, "--rounds", 1, "--json"))
    assert [site["name"] for site in told["sites"]] == ["north", "south"] and told["complete"]
    assert max(site["epsilon_spent"] for site in told["sites"]) <= 8.0
    assert Path(told["model_folder"]).parent.name == "Dataset900_Federated"
    assert not (place / "run" / deployment.SERVER).exists()


def test_a_run_whose_coordinator_was_killed_goes_on_and_charges_every_round_once(place):
    with hospitals(place) as asked:
        with running(place, *asked, "--rounds", 2, exit_code=1) as process:
            wait_until(lambda: max(charges(place)) == 2, process)  # a site trains in the second round
            (run,) = (place / "run" / deployment.RUNS).iterdir()
            os.kill(coordinator_of(run).pid, signal.SIGKILL)
            process.wait(60)
        assert console(place).count(f"--resume {run}` goes on") == 1 and "round 2/2" not in console(place)
        told = result_of(typed(place, "fed", "run", "run", "--resume", run, "--json"))
    assert told["complete"] and [site["rounds"] for site in told["sites"]] == [2, 2]
    assert charges(place) == [2, 2] and max(site["epsilon_spent"] for site in told["sites"]) <= 8.0


def test_a_run_whose_command_was_killed_goes_on_and_is_followed_again(place):
    with hospitals(place) as asked:
        with running(place, *asked, "--rounds", 5, exit_code=-signal.SIGKILL) as process:
            wait_until(lambda: "round 1/5" in console(place), process)
            process.kill()
            process.wait(60)
        (run,) = (place / "run" / deployment.RUNS).iterdir()
        coordinator = coordinator_of(run)
        assert is_running(coordinator), "it is the server's, not the command's"
        done = typed(place, "fed", "run", "run", "--resume", run, "--json")
        assert coordinator_of(run) == coordinator
    told = result_of(done)
    assert told["complete"] and [site["rounds"] for site in told["sites"]] == [5, 5] and charges(place) == [5, 5]
    assert "round 5/5" in done.stderr and "round 1/5" not in done.stderr


def test_plans_from_the_sites_own_images_are_charged_and_gone_on_with_after_ctrl_c(place):
    for number in (301, 302):
        write_dataset(place / "raw", "lesion", 40, number, dataset_id=number, shape=(40, 56))
    small = ("--delta", 1e-3, "--no-start", "--features", "4,8,8")
    asked = ("--datasets", 301, 302, "--rounds", 1, *small, "--fingerprint")
    refused = typed(place, "fed", "simulate", *asked, "--epsilon", 1, exit_code=2)
    assert "patients or more to be heard" in refused.stderr
    with running(place, "fed", "simulate", *asked, "--epsilon", 20, "--folder", "run") as begun:
        wait_until(lambda: max(charges(place)) > 0, begun)
    assert f"--resume --folder {place / 'run'}" in console(place)
    told = result_of(typed(place, "fed", "simulate", "--resume", "--folder", place / "run", "--json"))
    assert "noised fingerprint of 2 sites" in told["inputs"]["plans"]
    assert all(site["epsilon_spent"] == site["epsilon_dataset_total"] <= 20 for site in told["sites"])
    for file in place.glob(f"preprocessed/Dataset30?_*/{LEDGER}"):  # a release that Ctrl-C lost stays charged
        assert [line["purpose"] for line in read_lines(file)][-2:] == ["fingerprint", "training"]
    plans = json.loads((Path(told["model_folder"]) / "plans.json").read_text())
    assert plans["original_median_shape_after_transp"] == pytest.approx([1, 40, 56], rel=0.12)
