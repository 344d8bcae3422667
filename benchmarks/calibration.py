"""How long the noise calibration takes, over steps, sampling probabilities and budgets.

    python benchmarks/calibration.py [--delta 1e-5] [--json]

Each row starts with an empty memory of the accountant, as a planning does. ``found`` is the epsilon of the calibrated
noise by ``accounting.epsilon``: never above the target, and at most 1 % below it. ``cpu`` is the time of this process
on a core, which other work on the machine hardly moves; ``seconds`` is what a user waits.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

from dp_accounting.dp_event import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

from nnunet_dp import accounting
from nnunet_dp.accounting import PrivacyBudget, calibrate, epsilon, which_accountant
from nnunet_dp.errors import Refusal

STEPS = (1, 100, 1000, 10_000, 100_000)
PROBABILITIES = (0.001, 0.01, 0.1, 1.0)
EPSILONS = (0.5, 1.0, 8.0)


def schedule(noise_multiplier: float, probability: float, steps: int) -> DpEvent:
    event: DpEvent = GaussianDpEvent(noise_multiplier)
    return SelfComposedDpEvent(PoissonSampledDpEvent(probability, event) if probability < 1 else event, steps)


def forget() -> None:
    accounting._epsilon.cache_clear()
    accounting._single.cache_clear()


def measure(steps: int, probability: float, target: float, delta: float) -> dict[str, Any]:
    forget()
    row: dict[str, Any] = {"steps": steps, "q": probability, "epsilon": target}
    began, worked = time.perf_counter(), time.process_time()
    try:
        noise = calibrate(lambda z: schedule(z, probability, steps), PrivacyBudget(epsilon=target, delta=delta))
    except Refusal as refusal:
        return row | {"seconds": 0.0, "cpu_seconds": 0.0, "refused": type(refusal).__name__}
    row |= {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
    events = [schedule(noise, probability, steps)]
    accountant = which_accountant(events, delta).rsplit(" ", 1)[1]
    return row | {"noise": noise, "epsilon_found": epsilon(events, delta), "accountant": accountant}


def rows(delta: float) -> Iterator[dict[str, Any]]:
    for probability, steps, target in product(PROBABILITIES, STEPS, EPSILONS):
        yield measure(steps, probability, target, delta)


def line(row: dict[str, Any]) -> str:
    found = "refused" if "refused" in row else "{noise:>10.4g} {epsilon_found:>8.4f} {accountant}".format(**row)
    return "{steps:>7} {q:>6} {epsilon:>5} {seconds:>8.2f} {cpu_seconds:>8.2f} ".format(**row) + found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.json:
        print(f"{'steps':>7} {'q':>6} {'eps':>5} {'seconds':>8} {'cpu':>8} {'noise':>10} {'found':>8}", flush=True)
    found = []
    for row in rows(options.delta):
        found.append(row)
        if not options.json:
            print(line(row), flush=True)
    slowest, most = (max(row[key] for row in found) for key in ("seconds", "cpu_seconds"))
    load = round(os.getloadavg()[0], 1)
    about = {"slowest_seconds": slowest, "most_cpu_seconds": most, "load_average": load, "cores": os.cpu_count()}
    summary = f"slowest {slowest:.2f} s, at most {most:.2f} s of one core; load average {load}"
    print(json.dumps({**about, "rows": found}) if options.json else summary)


if __name__ == "__main__":
    main()
