"""A diagnosis for people: lines, one picture, one JSON file; stamped where its patients are real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_dp.replacing import replacing

if TYPE_CHECKING:
    from nnunet_dp.nnunet_diagnosis import Diagnosis, Moment

STAMP = "NOT PRIVATE: single patients' gradients. Do not release."
PREFIX = "NOT_PRIVATE_"


def write_report(diagnosis: Diagnosis, folder: Path) -> list[Path]:
    """``diagnosis.json`` and ``diagnosis.png``, their names stamped where patients are real; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "" if diagnosis.public else PREFIX
    files = [folder / f"{prefix}diagnosis.json", folder / f"{prefix}diagnosis.png"]
    with replacing(files[0]) as stream:
        stream.write(json.dumps(diagnosis.as_dict(), indent=1).encode())
    plot(diagnosis, files[1])
    return files


def lines(diagnosis: Diagnosis) -> list[str]:
    """What was seen, a line a moment, then what each rule made of it in the end."""
    told = [] if diagnosis.public else [STAMP]
    told += [
        f"{diagnosis.dataset}: {diagnosis.measured} of {diagnosis.patients} {_units(diagnosis)} measured, trained with "
        f"{diagnosis.rule} for {diagnosis.steps} steps of epsilon {diagnosis.epsilon:g} (weights thrown away)",
        "",
        f"{'step':>6}  {'norm: 5 %':>9} {'median':>8} {'95 %':>8}  {'cosine with the others':>22}  "
        f"{'smallest / largest third':>24}  {'rank correlation of norm and cosine':>35}",
        *(_line(moment) for moment in diagnosis.moments),
        "",
        f"at step {diagnosis.moments[-1].step}:  {'rule':<10} {'shortened':>9} {'cosine with the true mean':>26} "
        f"{'signal / noise':>15}",
    ]
    for name, clipped in diagnosis.moments[-1].rules.items():
        told.append(
            f"{'':<{10 + len(str(diagnosis.moments[-1].step))}} {name:<10} {clipped.shortened:>9.0%} "
            f"{clipped.cosine:>26.3f} {clipped.signal_to_noise:>15.3g}"
        )
    return [*told, "", _verdict(diagnosis)]


def _line(moment: Moment) -> str:
    low, median, high = np.quantile(moment.geometry.norms, (0.05, 0.5, 0.95))
    seen = moment.geometry.disagreement()
    thirds = f"{seen.smallest_third:.3f} / {seen.largest_third:.3f}"
    rank = f"{seen.rank_correlation:+.2f} (p {seen.p_value:.1g})"
    cosine = f"{np.mean(moment.geometry.cosines):.3f}"
    return f"{moment.step:>6}  {low:>9.3g} {median:>8.3g} {high:>8.3g}  {cosine:>22}  {thirds:>24}  {rank:>35}"


def _units(diagnosis: Diagnosis) -> str:
    """More than one of them, without a remark such as "(inferred)"."""
    return f"{diagnosis.unit.partition(' (')[0]}s"


def _verdict(diagnosis: Diagnosis) -> str:
    """Whether PSAC's assumption held, at how many of the moments."""
    signs = [moment.geometry.disagreement() for moment in diagnosis.moments]
    rising = sum(seen.rank_correlation > 0 and seen.p_value < 0.05 for seen in signs)
    falling = sum(seen.rank_correlation < 0 and seen.p_value < 0.05 for seen in signs)
    return (
        f"PSAC's assumption, that {_units(diagnosis)} with small gradients point elsewhere than the others, held at "
        f"{rising} of {len(signs)} moments (rank correlation above 0, p < 0.05); the contrary held at {falling}."
    )


def plot(diagnosis: Diagnosis, file: Path) -> None:
    """Six panels: norms, angles, foreground, what rules make of the sum, signal to noise, layers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9), layout="constrained")
    panels = figure.subplots(2, 3)
    _norms(panels[0, 0], diagnosis)
    _scatter(panels[0, 1], diagnosis, "cosines", "cosine with the mean of the others")
    _scatter(panels[0, 2], diagnosis, "foreground", "share of foreground in the patches")
    _rules(panels[1, 0], diagnosis, "cosine", "cosine of clipped and true mean")
    _rules(panels[1, 1], diagnosis, "signal_to_noise", "signal / noise of a step")
    _layers(panels[1, 2], diagnosis)
    title = f"{diagnosis.dataset}: gradients of {diagnosis.measured} {_units(diagnosis)}, trained with {diagnosis.rule}"
    figure.suptitle(title if diagnosis.public else f"{title}\n{STAMP}", color="black" if diagnosis.public else "red")
    FigureCanvasAgg(figure).print_png(str(file))


def _norms(axes: Any, diagnosis: Diagnosis) -> None:
    steps = [moment.step for moment in diagnosis.moments]
    axes.boxplot([moment.geometry.norms for moment in diagnosis.moments], tick_labels=steps, whis=(5, 95))
    axes.set(yscale="log", xlabel="step", ylabel="norm of a gradient", title="box: quartiles, whiskers: 5 to 95 %")


def _scatter(axes: Any, diagnosis: Diagnosis, against: str, label: str) -> None:
    shown = dict.fromkeys((0, len(diagnosis.moments) // 2, len(diagnosis.moments) - 1))
    for place, marker in zip(shown, "ox^", strict=False):
        moment = diagnosis.moments[place]
        axes.plot(
            moment.geometry.norms, getattr(moment.geometry, against), marker, alpha=0.6, label=f"step {moment.step}"
        )
    axes.set(xscale="log", xlabel="norm of a gradient", ylabel=label)
    axes.legend(fontsize="small")


def _rules(axes: Any, diagnosis: Diagnosis, what: str, label: str) -> None:
    steps = [moment.step for moment in diagnosis.moments]
    for name in diagnosis.moments[0].rules:
        values = [getattr(moment.rules[name], what) for moment in diagnosis.moments]
        axes.plot(steps, values, "o-", label=name, lw=2.5 if name == diagnosis.rule else 1)
    axes.set(xlabel="step", ylabel=label, yscale="log" if what == "signal_to_noise" else "linear")
    axes.legend(fontsize="small")


def _layers(axes: Any, diagnosis: Diagnosis) -> None:
    for moment in dict.fromkeys((diagnosis.moments[0], diagnosis.moments[-1])):
        values = [value or np.nan for value in moment.rules[diagnosis.rule].of_layers.values()]  # heads without a loss
        axes.plot(values, range(len(values)), ".-", label=f"step {moment.step}")
    names = [name for name, _ in diagnosis.moments[0].geometry.layers]
    shown = range(0, len(names), max(1, len(names) // 24))
    axes.set_yticks(list(shown), [_short(names[k]) for k in shown], fontsize=6)
    axes.invert_yaxis()
    axes.axvline(1, color="grey", lw=0.5)
    axes.set(xscale="log", xlabel="signal / noise of a step", title="layer by layer, from the input")
    axes.legend(fontsize="small")


def _short(name: str) -> str:
    dropped = ("stages", "convs", "all_modules", "conv_blocks")
    return ".".join(part for part in name.split(".") if part not in dropped)
