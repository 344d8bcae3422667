"""What a round costs besides training: ours and a bare Flower FedAvg of the same model, one after the other.

    python benchmarks/federated_overhead.py --work WORK --sites 2 --rounds 6

Both run on loopback, a SuperLink and a SuperNode for each site, Flower's usual process for each message.

    ours    nnunet-dp fed simulate on small phantoms: seconds of a round less the slowest site's training, by its log
    bare    flwr.serverapp.strategy.FedAvg; its client loads the arrays into tensors and sends others back, untrained

Bytes are what passed the loopback interface, heartbeats and Flower's own hops from process to process included; nothing
else should use it meanwhile. The first round of each is left out: it starts processes that stay.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

FIRST_ID = 501
MANIFEST = """
[project]
name = "bare"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "benchmark"

[tool.flwr.app.components]
serverapp = "bare:server"
clientapp = "bare:client"

[tool.flwr.app.config]
weights = ""
rows = ""
rounds = 1
sites = 1
"""
APP = """
import json, random, time
from flwr.app import ArrayRecord, MetricRecord, RecordDict, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    state = message.content["arrays"].to_torch_state_dict()
    state = {name: tensor + 0.01 * random.random() for name, tensor in state.items()}  # else nothing is sent
    content = RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)

@server.main()
def main(grid, context):
    from safetensors.torch import load_file
    given = context.run_config
    def told(number, arrays):
        with open(given["rows"], "a") as rows:
            rows.write(json.dumps({"round": number, "time": time.time()}) + "\\n")
    sites = given["sites"]
    FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites).start(
        grid=grid, initial_arrays=ArrayRecord(load_file(given["weights"])), num_rounds=given["rounds"],
        evaluate_fn=told,
    )
"""


def loopback_bytes() -> int:
    """Received by the loopback interface since the machine was started."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def followed(rows: Path, rounds: int, running: subprocess.Popen[bytes]) -> list[tuple[float, int]]:
    """Time and bytes when each round was over."""
    seen: list[tuple[float, int]] = []
    while len(seen) < rounds and running.poll() is None:
        found = len(rows.read_text().splitlines()) if rows.is_file() else 0
        seen += [(time.time(), loopback_bytes())] * (found - len(seen))
        time.sleep(0.05)
    return seen


def ours(options: argparse.Namespace, environment: dict[str, str]) -> tuple[list[float], list[float], float]:
    """Seconds of each round besides training, seconds of training, bytes of a round."""
    from nnunet_dp.federated.coordinator import PROGRESS
    from nnunet_dp.phantoms import write_dataset

    datasets = [str(FIRST_ID + k) for k in range(options.sites)]
    for number, dataset in enumerate(datasets):
        raw = options.work / "raw"
        if not list(raw.glob(f"Dataset{dataset}_*")):
            write_dataset(raw, "lesion", 6, 40 + number, dataset_id=int(dataset), shape=(48, 48))
    run = options.work / "run"
    line = [sys.executable, "-W", "ignore", "-m", "nnunet_dp", "fed", "simulate", "--datasets", *datasets]
    line += ["--rounds", str(options.rounds), "--no-start", "--phantom", "lesion", "--phantom-shape", "48,48"]
    with (options.work / "ours.log").open("wb") as log:
        started = subprocess.Popen([*line, "--folder", str(run)], env=environment, stdout=log, stderr=log)
        seen = followed(run / PROGRESS, options.rounds, started)
        if started.wait():
            raise SystemExit(f"the simulation should end well, see {options.work / 'ours.log'}")
    rounds = [json.loads(text)["seconds"] for text in (run / PROGRESS).read_text().splitlines()]
    training = [0.0] * options.rounds
    for log_file in (options.work / "results").rglob("federated_log.txt"):
        for number, seconds in re.findall(r"round (\d+): \d+ steps in ([\d.]+) s", log_file.read_text()):
            training[int(number)] = max(training[int(number)], float(seconds))
    besides = [whole - trained for whole, trained in zip(rounds, training, strict=True)]
    return besides[1:], training[1:], (seen[-1][1] - seen[0][1]) / (options.rounds - 1)


def bare(options: argparse.Namespace, environment: dict[str, str]) -> tuple[list[float], float]:
    """Seconds of each round, bytes of a round."""
    from nnunet_dp.federated.flower_environment import CONNECTION, Server, answers, free_port, write_connection

    home, rows = options.work / "bare_home", options.work / "bare_rows.jsonl"
    app = options.work / "bare_app"
    for folder in (home, app):
        folder.mkdir(exist_ok=True)
    (app / "pyproject.toml").write_text(MANIFEST)
    (app / "bare.py").write_text(APP)
    commands, port = Path(sys.executable).parent, free_port()
    environment = environment | {"FLWR_HOME": str(home)}
    server = Server(f"127.0.0.1:{port}", home=home)
    started: list[subprocess.Popen[bytes]] = []
    log = (options.work / "bare.log").open("wb")

    def start(*line: str) -> None:
        started.append(subprocess.Popen([str(commands / line[0]), *line[1:]], env=environment, stdout=log, stderr=log))

    try:
        start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        while not answers(server):
            time.sleep(0.2)
        write_connection(server)
        for _ in range(options.sites):
            start(
                "flower-supernode", "--insecure", "--superlink", server.address,
                "--host", "127.0.0.1", "--port", str(free_port()),
            )  # fmt: skip
        config = {
            "weights": str(options.work / "run" / "initial_weights.safetensors"), "rows": str(rows),
            "rounds": options.rounds, "sites": options.sites,
        }  # fmt: skip
        told = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        line = [str(commands / "flwr"), "run", str(app), CONNECTION, "--run-config", told]
        subprocess.run(line, env=environment, check=True, stdout=log, stderr=log)
        seen = followed(rows, options.rounds + 1, started[0])[1:]  # FedAvg judges before the first round, too
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(30)
        log.close()
    times = [json.loads(text)["time"] for text in rows.read_text().splitlines()][1:]
    seconds = [after - before for before, after in pairwise(times)]
    return seconds, (seen[-1][1] - seen[0][1]) / (options.rounds - 1)


def told(seconds: list[float]) -> str:
    return f"{mean(seconds):.2f} ± {stdev(seconds):.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True)
    environment = {
        **os.environ, **{f"nnUNet_{part}": str(options.work / part) for part in ("raw", "preprocessed", "results")},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "OMP_NUM_THREADS": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    }  # fmt: skip
    besides, training, our_bytes = ours(options, environment)
    plain, plain_bytes = bare(options, environment)
    size = (options.work / "run" / "initial_weights.safetensors").stat().st_size
    print(f"model {size / 1e6:.2f} MB, {options.sites} sites, {options.rounds - 1} rounds each")
    print(f"ours   {told(besides)} a round besides training ({told(training)}), {our_bytes / 1e6:.2f} MB")
    print(f"bare   {told(plain)} a round, {plain_bytes / 1e6:.2f} MB")
    print(f"ratio  {mean(besides) / mean(plain):.2f} in seconds, {our_bytes / plain_bytes:.2f} in bytes")


if __name__ == "__main__":
    main()
