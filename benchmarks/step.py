"""What a private step costs: each gradient engine, and Opacus, against nnU-Net's own step, in one run.

    python benchmarks/step.py --device cpu --shape hippocampus [--repeats 3] [--json]
    python benchmarks/step.py --device cuda --shape 3d128|2d512|hippocampus

    nnunet       nnU-Net's step without privacy: one batch, clip_grad_norm_, SGD with Nesterov momentum
    accumulated  the same with one patch in a pass: kinder to the caches of a CPU
    one          a private step, ledger and noise included, by engine one: one patient at a time
    two          the same by engine two, with the chunk that a timing on random data chose
    opacus       Opacus' hooks with flat clipping, no noise; repaired for these networks (modules registered twice,
                 LeakyReLU in place, heads without a gradient), never compiled

Same network, loss, precision and batch of random patches, one patch a patient; compiled where nnU-Net compiles (CUDA).
bfloat16 where the device is fast at it, for all: nnU-Net itself trains in float32 on a CPU, and slower.
Ways take turns, and the best of the repeats counts: what else runs on the machine disturbs all of them alike. Memory is
the peak during a step: all of the device's on CUDA, resident memory beyond what was there before the step on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_dp import nnunet
from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.batched_gradients import Batched
from nnunet_dp.clipping import make_rule
from nnunet_dp.dpsgd import Execution, PrivacyPlan, PrivateTraining, Schedule
from nnunet_dp.engine_choice import EngineBudget, Timed
from nnunet_dp.gradients import Engine, Record, one_at_a_time
from nnunet_dp.ledger import Ledger
from nnunet_dp.weight_gradients import choices


class Shape(NamedTuple):
    """A network and its batch."""

    patch: tuple[int, ...]
    features: tuple[int, ...]
    batch: int


SHAPES = {
    "3d128": Shape((128,) * 3, (32, 64, 128, 256, 320, 320), 2),
    "2d512": Shape((512,) * 2, (32, 64, 128, 256, 512, 512, 512, 512), 12),
    "hippocampus": Shape((40, 56, 40), (16, 32, 64), 128),
}
CPU_BATCH = 16
OPACUS_BATCH_ON_CPU = 4  # patients in one pass: its columns of 16 do not fit 16 GB
Step = Callable[[], None]


# ---- one network, loss and batch for all -------------------------------------------------------------------------


def network(shape: Shape, inplace: bool = True) -> Any:
    dimension, stages = len(shape.patch), len(shape.features)
    arguments = {
        "n_stages": stages,
        "features_per_stage": list(shape.features),
        "conv_op": f"torch.nn.modules.conv.Conv{dimension}d",
        "kernel_sizes": [[3] * dimension] * stages,
        "strides": [[1] * dimension, *[[2] * dimension] * (stages - 1)],
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimension}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": inplace},
    }
    imports = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    torch.manual_seed(0)
    return get_network_from_plans(name, arguments, imports, 1, 3, deep_supervision=True)


def loss(shape: Shape, compiled: bool) -> Any:
    """nnU-Net's Dice + CE with deep supervision; as there, the Dice is compiled where the network is."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    single = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    if compiled:
        single.dc = torch.compile(single.dc)
    weights = [0.5**level for level in range(len(shape.features) - 1)]
    weights[-1] = 0.0
    return DeepSupervisionWrapper(single, [weight / sum(weights) for weight in weights])


def records(shape: Shape, batch: int, device: torch.device) -> list[Record]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(batch):
        target = torch.randint(0, 3, (1, 1, *shape.patch), generator=generator)
        levels = [target[(..., *[slice(None, None, 2**k)] * len(shape.patch))] for k in range(len(shape.features) - 1)]
        data = torch.randn(1, 1, *shape.patch, generator=generator)
        found.append(Record(data.to(device), [level.contiguous().to(device) for level in levels]))
    return found


def joined(patients: list[Record]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    targets = zip(*(record.target for record in patients), strict=True)
    return torch.cat([record.data for record in patients]), [torch.cat(level) for level in targets]


# ---- the ways ----------------------------------------------------------------------------------------------------


def nnunet_way(net: Any, criterion: Any, patients: list[Record], autocast: Any, physical: int) -> Step:
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)
    batches = [joined(patients[start : start + physical]) for start in range(0, len(patients), physical)]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for data, target in batches:
            with autocast():
                value = criterion(net(data), target) / len(batches)
            value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 12)
        optimizer.step()

    return step


def private_way(net: Any, criterion: Any, patients: list[Record], autocast: Any, engine: Engine, folder: Path) -> Step:
    folder.mkdir()
    budget = PrivacyBudget(epsilon=8, delta=1e-4)
    plan = PrivacyPlan(budget, 100, 1.0, 10.0, len(patients), make_rule("auto_s", {"bound": 1.0}))
    ledger = Ledger(folder / "ledger.jsonl", "benchmark", "0" * 64, folder / "copy.jsonl")
    execution = Execution(patients[0].data.device, engine, autocast)
    training = PrivateTraining(net, criterion, plan, Schedule(0.01), execution, ledger)
    return lambda: training.advance(lambda step, drawn: [patients[slot] for slot in drawn])


def opacus_way(net: Any, criterion: Any, patients: list[Record], autocast: Any, physical: int) -> Step:
    from opacus import GradSampleModule

    class Repaired(GradSampleModule):
        """Hooks each module once, under however many names it is registered."""

        def iterate_submodules(self, module):
            return {id(found): found for found in super().iterate_submodules(module)}.values()

    hooked = Repaired(net, loss_reduction="mean")
    batches = [joined(patients[start : start + physical]) for start in range(0, len(patients), physical)]
    optimizer = torch.optim.SGD(net.parameters(), 0.01)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        sums = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
        for data, target in batches:
            with autocast():
                value = criterion(hooked(data), target)
            value.backward()
            found = {n: p.grad_sample for n, p in net.named_parameters() if getattr(p, "grad_sample", None) is not None}
            norms = torch.stack([g.flatten(1).float().norm(dim=1) for g in found.values()]).norm(dim=0)
            factors = (1.0 / (norms + 1e-6)).clamp(max=1.0)
            for name, gradient in found.items():
                sums[name] += torch.einsum("p,p...->...", factors, gradient.float())
            for parameter in net.parameters():
                parameter.grad_sample = None
        for name, parameter in net.named_parameters():
            parameter.grad = sums[name] / len(patients)
        optimizer.step()

    return step


# ---- the measurement ---------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(step: Step, device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - began


def resident(field: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_mib(step: Step, device: torch.device) -> float:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what other ways have freed goes back to the kernel
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def measure(name: str, device: torch.device, repeats: int, ways: list[str], batch: int | None) -> dict[str, Any]:
    shape = SHAPES[name]
    batch = batch or (CPU_BATCH if name == "hippocampus" and device.type == "cpu" else shape.batch)
    compiled = device.type == "cuda"  # as nnU-Net itself decides
    criterion, patients = loss(shape, compiled), records(shape, batch, device)
    autocast = partial(nnunet.autocast, device)
    original, said = network(shape).to(device), []

    def fresh() -> Any:
        net = copy.deepcopy(original)
        return torch.compile(net) if compiled else net

    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Step] = {}
        for way in ways:
            place = Path(folder) / way
            if way == "nnunet":
                steps[way] = nnunet_way(fresh(), criterion, patients, autocast, batch)
            elif way == "accumulated":
                steps[way] = nnunet_way(fresh(), criterion, patients, autocast, 1)
            elif way == "one":
                steps[way] = private_way(fresh(), criterion, patients, autocast, one_at_a_time, place)
            elif way == "two":
                net = fresh()
                engine = chosen(net, criterion, patients, autocast, said)
                steps[way] = private_way(net, criterion, patients, autocast, engine, place)
            else:
                net = network(shape, inplace=False).to(device)
                physical = OPACUS_BATCH_ON_CPU if device.type == "cpu" else batch
                steps[way] = opacus_way(net, loss(shape, False), patients, autocast, physical)
        seconds, memory = turns(steps, device, repeats)
    rows = {
        way: {
            "seconds_per_step": round(seconds[way], 4),
            "ratio_time": round(seconds[way] / seconds["nnunet"], 3),
            "memory_mib": round(memory[way], 1),
            "ratio_memory": round(memory[way] / memory["nnunet"], 3),
        }
        for way in steps
    }
    about = described(name, device, batch, repeats, compiled)
    return {**about, "engine_chosen": said, "weight_gradients": choices(), "ways": rows}


def chosen(net: Any, criterion: Any, patients: list[Record], autocast: Any, said: list[str]) -> Engine:
    """Engine two with the chunk that the timing likes best; with 2 patients where it prefers engine one."""
    engine = Timed(EngineBudget(1e9, len(patients)), said.append)
    engine(net, criterion, patients[:1], make_rule("auto_s", {"bound": 1.0}), autocast)
    return engine.chosen if isinstance(engine.chosen, Batched) else Batched(2, said.append)


def turns(steps: dict[str, Step], device: torch.device, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    memory = {}
    for way, step in steps.items():
        step()  # compilers, caches of algorithms
        memory[way] = peak_mib(step, device)
        print(f"{way}: warm", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(repeats):
        for way, step in steps.items():
            seconds[way].append(timed(step, device))
    return {way: min(found) for way, found in seconds.items()}, memory


def described(name: str, device: torch.device, batch: int, repeats: int, compiled: bool) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "shape": name,
        "batch": batch,
        "device": torch.cuda.get_device_name() if cuda else f"{processor()}, {torch.get_num_threads()} threads",
        "precision": "bfloat16" if nnunet.fast_bfloat16(device) else "float32",
        "compiled": compiled,
        "repeats": repeats,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "load_average": round(os.getloadavg()[0], 2),
        "busy": os.getloadavg()[0] > (os.cpu_count() or 1) + 0.5,
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(found: dict[str, Any]) -> str:
    lines = [f"{key:<18} {value}" for key, value in found.items() if key != "ways"]
    lines.append(f"\n{'way':<12} {'seconds':>9} {'ratio_time':>11} {'MiB':>9} {'ratio_memory':>13}")
    for way, row in found["ways"].items():
        numbers = row["seconds_per_step"], row["ratio_time"], row["memory_mib"], row["ratio_memory"]
        lines.append("{:<12} {:>9} {:>11} {:>9} {:>13}".format(way, *numbers))
    if found["busy"]:
        lines.append("warning: other work was running on this machine; times are not to be relied on")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="hippocampus")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, help="patients, in place of the shape's")
    parser.add_argument("--ways", default="nnunet,accumulated,one,two,opacus")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ways = [way for way in options.ways.split(",") if way != "nnunet"]
    if "opacus" in ways:
        try:
            import opacus  # noqa: F401
        except ImportError:
            ways.remove("opacus")
    found = measure(options.shape, torch.device(options.device), options.repeats, ["nnunet", *ways], options.batch)
    print(json.dumps(found) if options.json else table(found))


if __name__ == "__main__":
    main()
