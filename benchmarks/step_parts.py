"""Where the time of a private step goes on this machine, in one run, against the same patches without privacy.

    python benchmarks/step_parts.py [--patients 16] [--repeats 3] [--json]

Network and patch are those of nnU-Net's Hippocampus 3d_fullres plans as `nnunet-dp plan` shrinks them; images are
random. Printed: seconds per patch of the plain step (forward, backward, sum of gradients) and of the private step
(per-patient norms, clipping, noise, ledger with fsync, optimizer, average), their ratio, and the share of what is done
once a step (ledger, noise, optimizer, average).

Then each part by itself, the best of many: `gradient`, `clip` (norms, factors, sum) and `load` of one patient,
`ledger`, `noise` and `descend` (optimizer, average) of one step, and `wait`, from the draw to the first record.
`private_share` is what clip, noise and ledger take of a step of so many patients; `cpu` is time on a core, which other
work hardly moves and in which waiting for the disk does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_dp import nnunet
from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.clipping import make_rule
from nnunet_dp.dpsgd import Execution, PrivacyPlan, PrivateTraining, Schedule
from nnunet_dp.gradients import Record, _add_scaled, gradients_of, group_norms, trainable
from nnunet_dp.ledger import Ledger
from nnunet_dp.loading import PatientLoader
from nnunet_dp.mechanisms import ClippedSum, fresh_generator

PATCH = (40, 56, 40)
PART_REPEATS = 50


def network():
    arguments = {
        "n_stages": 3,
        "features_per_stage": [16, 32, 64],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3] * 3] * 3,
        "strides": [[1] * 3, [2] * 3, [2] * 3],
        "n_conv_per_stage": [2] * 3,
        "n_conv_per_stage_decoder": [2] * 2,
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    imports = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    return get_network_from_plans(name, arguments, imports, 1, 3, deep_supervision=True)


def loss():
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DeepSupervisionWrapper(DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss), [1.0, 0.0])


def records(patients):
    target = torch.randint(0, 3, (1, 1, *PATCH))
    half = target[..., ::2, ::2, ::2]
    return [Record(torch.randn(1, 1, *PATCH), [target, half]) for _ in range(patients)]


def plain_step(net, criterion, batch, autocast):
    """One gradient step of the same arithmetic without privacy, one patch at a time."""
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    optimizer.zero_grad(set_to_none=True)
    for record in batch:
        with autocast():
            output = net(record.data)
        (criterion([tensor.float() for tensor in output], record.target) / len(batch)).backward()
    optimizer.step()


def timed(function, repeats):
    function()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


# ---- each part by itself -----------------------------------------------------------------------------------------


def best(function, repeats):
    """Seconds and seconds on a core: the least of each, after one turn to warm up."""
    function()
    found = []
    for _ in range(repeats):
        began, worked = time.perf_counter(), time.process_time()
        function()
        found.append((time.perf_counter() - began, time.process_time() - worked))
    return tuple(min(column) for column in zip(*found, strict=True))


def parts(training, record, autocast, patients, repeats):
    """Seconds of each part; those of one patient count as often as there are patients."""
    net, criterion, rule = training.network, training.loss, training.rule
    names, parameters = trainable(net)
    groups = rule.groups(names)
    (gradient,) = gradients_of(net, criterion, [record], autocast)
    total = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    mechanism, ledger = training.plan.mechanism, training.ledger

    def clip():
        norms = group_norms(gradient, groups)
        _add_scaled(total, gradient, rule.factors(norms).tolist(), groups)

    receipts = iter([ledger.charge(mechanism.charge("training", 0)) for _ in range(repeats + 1)])

    def noise():
        return mechanism.release(ClippedSum(tuple(total), rule.bound), next(receipts), fresh_generator("cpu"))

    released = mechanism.release(
        ClippedSum(tuple(total), rule.bound), ledger.charge(mechanism.charge("training", 0)), fresh_generator("cpu")
    )
    found = {
        "gradient": best(lambda: list(gradients_of(net, criterion, [record], autocast)), repeats),
        "clip": best(clip, repeats),
        "ledger": best(lambda: ledger.charge(mechanism.charge("training", 0)), repeats),
        "noise": best(noise, repeats),
        "descend": best(lambda: training._descend(released), min(repeats, 20)),
    }
    own, rest = np.zeros(2), np.zeros(2)
    for name, count in {"clip": patients, "noise": 1, "ledger": 1}.items():
        own += count * np.array(found[name])
    for name, count in {"gradient": patients, "descend": 1}.items():
        rest += count * np.array(found[name])
    shares = own / (own + rest)
    return found, shares


def random_patch(cases):
    """What a source gives, without reading or augmenting anything: the price of processes and of their pipes."""
    return np.random.rand(1, 1, *PATCH).astype(np.float32), np.zeros((1, 1, *PATCH), np.int16)


def loading(patients, repeats, workers):
    """Seconds from a draw to its first record and for each patient; whether the workers stayed the same."""
    loader = PatientLoader(random_patch, [("case",)] * patients, torch.device("cpu"), workers)
    waits, seconds, seen = [], [], set()
    for step in range(repeats + 1):
        began = time.perf_counter()
        records = loader.records(step, list(range(patients)))
        next(records)
        waits.append(time.perf_counter() - began)
        assert sum(1 for _ in records) == patients - 1
        seconds.append((time.perf_counter() - began) / patients)
        seen.add(frozenset(loader._pool._processes))
    loader.close()
    return min(waits[1:]), min(seconds[1:]), len(seen) == 1


# ---- the whole step ----------------------------------------------------------------------------------------------


def measure(patients: int, repeats: int) -> dict[str, float | str | bool]:
    device = torch.device("cpu")
    net, criterion, batch = network(), loss(), records(patients)
    autocast = partial(nnunet.autocast, device)

    with tempfile.TemporaryDirectory() as folder:
        budget = PrivacyBudget(epsilon=8, delta=1e-4)
        plan = PrivacyPlan(budget, 100, 1.0, 10.0, patients, make_rule("auto_s", {"bound": 1.0}))
        ledger = Ledger(Path(folder) / "ledger.jsonl", "benchmark", "0" * 64, Path(folder) / "copy.jsonl")
        training = PrivateTraining(net, criterion, plan, Schedule(0.01), Execution(device, autocast=autocast), ledger)
        plain = timed(lambda: plain_step(net, criterion, batch, autocast), repeats)
        private = timed(lambda: training.advance(lambda step, drawn: [batch[i] for i in drawn]), repeats)
        empty = timed(lambda: training.advance(lambda step, drawn: []), repeats)
        alone, shares = parts(training, batch[0], autocast, patients, PART_REPEATS)
    wait, load, same = loading(patients, repeats, workers=1)
    by_part = {f"{name}_seconds (cpu)": f"{wall:.5f} ({cpu:.5f})" for name, (wall, cpu) in alone.items()}
    return {
        "patients": patients,
        "precision": "bfloat16" if nnunet.fast_bfloat16(device) else "float32",
        "plain_seconds_per_patch": plain / patients,
        "private_seconds_per_patch": private / patients,
        "ratio_time": private / plain,
        "share_of_ledger_noise_and_optimizer": empty / private,
        **by_part,
        "private_share (cpu)": f"{shares[0]:.4f} ({shares[1]:.4f})",
        "wait_seconds": wait,
        "load_seconds": load,
        "workers_stay_the_same": same,
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.patients, options.repeats)
    print(json.dumps(found) if options.json else "\n".join(f"{key:<38} {value}" for key, value in found.items()))


if __name__ == "__main__":
    main()
