"""Looking into a training: it is run as planned, and at chosen moments every patient's gradient is measured.

The training is the package's own (``PrivateTraining`` on nnU-Net's network, loss and patches) with a ledger in a
temporary folder: its weights are thrown away, so nothing is released and the dataset's ledger is not charged.

**What is measured is not private**, whatever the training's epsilon: norms and angles of patients' gradients carry no
noise. On phantoms that harms nobody; of a private dataset it stays on the machine that has the data.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_dp.clipping import ClipRule
from nnunet_dp.description import read_description
from nnunet_dp.dpsgd import PrivateTraining
from nnunet_dp.errors import UsageRefusal
from nnunet_dp.gradient_geometry import Clipped, GradientGeometry
from nnunet_dp.gradients import Record, gradients_of, trainable
from nnunet_dp.ledger import Ledger
from nnunet_dp.nnunet import preprocessed_folder
from nnunet_dp.nnunet_planning import plan_dataset
from nnunet_dp.nnunet_public_plans import nnunet_folders_in, plans_of_raw_phantoms, write_raw_phantoms
from nnunet_dp.nnunet_site import SiteModel, open_model, preprocess
from nnunet_dp.nnunet_start import ensure_start
from nnunet_dp.phantoms import KINDS
from nnunet_dp.plans import configuration_plan, read_private_plans, write_json
from nnunet_dp.run import LEDGER
from nnunet_dp.sections import ByHand, ConfigurationPlan
from nnunet_dp.workers import Progress

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Moment:
    """What was seen after some steps.

    Attributes:
        step: steps taken before.
        geometry: of the measured patients' gradients.
        rules: what each clip rule makes of them, by its name.
    """

    step: int
    geometry: GradientGeometry
    rules: dict[str, Clipped]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers of single patients included, which are not private."""
        seen = self.geometry
        return {
            "step": self.step,
            "norms": seen.norms.tolist(),
            "cosines_with_the_others": seen.cosines.tolist(),
            "foreground": seen.foreground.tolist(),
            "signal": seen.signal,
            "disagreement": dataclasses.asdict(seen.disagreement()),
            "correlation_with_foreground": dict(seen.with_foreground()),
            "rules": {name: dataclasses.asdict(clipped) for name, clipped in self.rules.items()},
        }


@dataclass(frozen=True)
class Diagnosis:
    """A training looked into.

    Attributes:
        dataset: name; for phantoms their kind.
        public: whether all patients are phantoms.
        rule: clip rule it was trained with.
        steps: planned.
        unit: whose gradients.
        patients: in the dataset; of these ``measured`` were looked at.
        measured: how many.
        epsilon: of the training's plan; says nothing about this diagnosis.
        moments: in the order of the steps.
    """

    dataset: str
    public: bool
    rule: str
    steps: int
    unit: str
    patients: int
    measured: int
    epsilon: float
    moments: tuple[Moment, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; says first whether it may leave."""
        stamp = "phantoms: public" if self.public else "NOT PRIVATE: do not release"
        told = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "moments"}
        return {"stamp": stamp, **told, "moments": [moment.as_dict() for moment in self.moments]}


@dataclass(frozen=True)
class Asked:
    """How to look.

    Attributes:
        rule: clip rule to train with.
        moments: how often to measure, the first and the last step included; at least 1.
        patients: at most so many are measured, chosen at random.
        seed: of that choice and of the network's weights.
        processes: that load patients.
        device: where.
    """

    rule: str = "auto_s"
    moments: int = 5
    patients: int = 64
    seed: int = 0
    processes: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))


def diagnose(
    dataset: str,
    configuration: str,
    plans_name: str,
    asked: Asked,
    say: Say,
    progress: Progress,
    phantom: str | None = None,
) -> Diagnosis:
    """Run the planned training of all patients and look at their gradients on the way.

    Args:
        dataset: id or name.
        configuration: nnU-Net's name.
        plans_name: private plans.
        asked: how to look.
        say: told what is going on.
        progress: told after each gradient, of a step or measured.
        phantom: kind of phantoms, where the dataset holds nothing else.

    Raises:
        UsageRefusal: for unknown datasets, plans, configurations or rules.
    """
    folder = preprocessed_folder(dataset)
    plans, section = read_private_plans(folder, plans_name)
    dataset_json = read_description(folder / "dataset.json")
    planned = configuration_plan(section, configuration)
    if asked.rule not in planned.clip_rules:
        raise UsageRefusal(f"--rule should be one of {', '.join(planned.clip_rules)}; found {asked.rule!r}")
    torch.manual_seed(asked.seed)
    model = open_model(
        plans, configuration, folder, dataset_json, asked.device, asked.processes, planned.steps, say
    )  # fmt: skip
    try:
        if planned.start is not None:
            made = ensure_start(plans, configuration, dataset_json, folder, asked.device, asked.processes, say)
            model.network.load_state_dict(made[0])
        with tempfile.TemporaryDirectory(prefix="nnunet_dp_diagnose_") as place:
            plan = planned.privacy_plan(section.budget, asked.rule, model.slots)
            ledger = Ledger(Path(place) / LEDGER, secrets.token_hex(16), plan.digest())
            training = PrivateTraining(
                model.network, model.loss, plan, planned.schedule(asked.rule), model.execution, ledger
            )
            moments = tuple(_looked_at(training, model, planned, asked, progress))
    finally:
        model.close()
    return Diagnosis(
        dataset=f"phantoms {phantom}" if phantom else folder.name, public=phantom is not None,
        rule=asked.rule, steps=planned.steps, unit=section.budget.unit,
        patients=model.slots, measured=min(asked.patients, model.slots), epsilon=section.budget.epsilon,
        moments=moments,
    )  # fmt: skip


def _looked_at(
    training: PrivateTraining, model: SiteModel, planned: ConfigurationPlan, asked: Asked, progress: Progress
) -> Iterator[Moment]:
    """Measure, train to the next moment, measure, ..."""
    steps, plan = training.plan.steps, training.plan
    moments = sorted({round(share) for share in np.linspace(0, steps, max(1, asked.moments))})
    chosen = np.random.default_rng(asked.seed).permutation(model.slots)[: asked.patients].tolist()
    total = round(moments[-1] * plan.expected_batch) + len(moments) * len(chosen)
    done = itertools.count(1)
    tick = lambda *_: progress(min(next(done), total), total)  # noqa: E731
    rules: dict[str, ClipRule] = {name: rule.rule(name) for name, rule in planned.clip_rules.items()}
    for number, moment in enumerate(moments):
        while training.step < moment:
            training.advance(model.records, tick)
        geometry = measured(training, model.records(steps + number, chosen), tick)
        now = rules | {asked.rule: training.rule}  # a quantile's threshold has moved
        clipped = {r: geometry.clipped(rule, plan.noise_multiplier, plan.expected_batch) for r, rule in now.items()}
        yield Moment(moment, geometry, clipped)


def measured(
    training: PrivateTraining, records: Iterable[Record], watch: Callable[[torch.Tensor], None] = lambda loss: None
) -> GradientGeometry:
    """The geometry of these patients' gradients at the training's present weights; nothing is changed."""
    network, foreground = training.network, []

    def watched() -> Iterator[Record]:
        for record in records:
            foreground.append(_foreground(record.target))
            yield record

    gradients = gradients_of(network, training.loss, watched(), training.execution.autocast, watch)
    return GradientGeometry.of(trainable(network)[0], gradients, foreground)


def _foreground(target: Any) -> float:
    """Share of the voxels, at full resolution, that any label or region covers."""
    full = target[0] if isinstance(target, (list, tuple)) else target
    return float((full > 0).any(1).float().mean())


# ---- phantoms ----------------------------------------------------------------------------------------------------


@contextmanager
def phantom_dataset(
    kind: str, patients: int, seed: int, shape: Sequence[int] | None, epsilon: float, by_hand: ByHand, processes: int
) -> Iterator[tuple[str, str, str]]:
    """Phantoms, preprocessed and planned, in nnU-Net folders that vanish: dataset, configuration and plans' name.

    Raises:
        UsageRefusal: for an unknown kind or an impossible shape.
    """
    with tempfile.TemporaryDirectory(prefix="nnunet_dp_phantoms_") as place, nnunet_folders_in(Path(place)):
        raw = write_raw_phantoms(Path(place), kind, patients, seed, tuple(shape) if shape else None)
        configuration = "2d" if KINDS[kind].dimensions == 2 else "3d_fullres"
        plans, folder = plans_of_raw_phantoms(), Path(place) / "preprocessed" / raw.name
        preprocess(plans, configuration, raw, folder, processes)
        write_json(plans, folder / f"{plans['plans_name']}.json")
        report = plan_dataset(
            raw.name, configuration, epsilon, None, public_start=False, morphology_share=0.0, by_hand=by_hand
        )
        yield raw.name, configuration, report.plans_name

