"""What people read: the plan as a table, the banner of a training.

Wherever an epsilon is printed, its delta and its unit stand beside it, and what is not covered is said as plainly
as what is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.card_words import not_covered_rows
from nnunet_dp.charges import LedgerEntry, epsilon_of
from nnunet_dp.sections import FingerprintPlan, MorphologyPlan, PrivacySection, covered, not_covered

CASE_NOTE = (
    "no patients.csv says whose case each case is, so the unit is one case; a patient with several cases is protected "
    "less: give --patients FILE"
)


def describe(section: PrivacySection, configuration: str, units: int | None) -> list[tuple[str, str]]:
    """The plan in words: for the trainers' banner and for the planner's table."""
    budget, plan = section.budget, section.configurations[configuration]
    patches = plan.patches_per_patient
    batch = f"{plan.sampling_probability:g} of the fold's training units (1: all of them, each step)"
    if units is not None:
        batch = f"{plan.sampling_probability * units:g} = {plan.sampling_probability:g} x {units} slots"
    return [
        ("guarantee", f"epsilon {budget.epsilon:g} at delta {budget.delta:g} per {budget.unit}"),
        ("relation", f"{budget.relation}; {section.patients} units in the dataset; {section.accountant}"),
        ("steps", f"{plan.steps} (schedule {plan.compute}); patches of a unit averaged in a step: {patches}"),
        ("expected batch", batch),
        ("noise multiplier", f"{plan.noise_multiplier:.4g}"),
        ("morphology", _learning(plan.morphology)),
        ("plans from", _source(section, plan.fingerprint)),
        ("network", f"{list(plan.network.features_per_stage)} features, {plan.network.parameters} parameters"),
        ("public start", plan.start.describe() if plan.start else "none: random weights"),
        *([("SET BY HAND", f"{', '.join(plan.by_hand)} (noise calibrated to the target)")] if plan.by_hand else []),
        ("covers", "; ".join(covered(section, configuration))),
        *not_covered_rows(not_covered(section, configuration)),
        *([("NOTE", CASE_NOTE)] if budget.unit == "case" else []),
    ]


def _learning(plan: MorphologyPlan | None) -> str:
    if plan is None:
        return "nothing is learnt for refinement (not wanted, or too few patients): all of the budget to the training"
    return f"{plan.share:.0%} of the budget (as mu^2) for one release, noise multiplier {plan.noise_multiplier:.4g}"


def _source(section: PrivacySection, fingerprint: FingerprintPlan | None) -> str:
    if fingerprint is not None:
        return f"a noised fingerprint, noise multiplier {fingerprint.noise_multiplier:.4g}, charged before the training"
    return section.public_plans or "nnU-Net's fingerprint of the raw images, which the guarantee does NOT cover"


def banner(
    section: PrivacySection, configuration: str, units: int, clip_rule: str, precision: str, spent: float, total: float
) -> str:
    """What a training says before its first step.

    Args:
        section: the private plan.
        configuration: nnU-Net configuration.
        units: public number of training slots.
        clip_rule: its name.
        precision: of the forward pass.
        spent: epsilon of this run so far.
        total: epsilon of all runs on the dataset so far.
    """
    augmentation = section.configurations[configuration].augmentation
    lines = [
        ("clip rule", clip_rule),
        *describe(section, configuration, units),
        ("arithmetic", f"forward in {precision}; norms, clip, sum and noise in float32 or better"),
        ("changed", f"batch_dice off (it couples patients); augmentation {augmentation}; no checkpoint_best"),
        ("charged so far", f"epsilon {spent:.4g} per {section.budget.unit} by this run, {total:.4g} by all runs"),
        ("LOCAL ONLY", "this folder and any zip of it: the guarantee covers the weights in checkpoint_final.pth"),
        ("another budget", "nnunet-dp plan -d DATASET -c CONFIGURATION --epsilon E, then train with -p"),
    ]
    return "\n".join(["", "private training with nnunet_dp", *(f"  {label:<17} {text}" for label, text in lines), ""])


def curve_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Several budgets side by side, a line each; ``rows`` are ``PlanReport.as_dict()``."""
    first = rows[0]
    parameters = first["network"]["parameters"]
    lines = [
        f"per {first['unit']} of {first['patients']}, delta {first['delta']:g}, {parameters} parameters",
        "epsilon  steps  noise multiplier  signal/noise  attacker at 1 % / 5 % false positives  verdict",
    ]
    for row in rows:
        gains = f"{row['true_positive_rate_at_0.01']:.1%} / {row['true_positive_rate_at_0.05']:.1%}"
        lines.append(
            f"{row['epsilon']:>7g}  {row['steps']:>5}  {row['noise_multiplier']:>16.4g}  "
            f"{row['signal_to_noise']:>12.2g}  {gains:>38}  {row['verdict']}"
        )
    return lines


def plot_curve(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw what several budgets buy (signal to noise) and what they cost (an attacker's gain)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="tight")
    bought = figure.subplots()
    paid = bought.twinx()
    epsilons = [row["epsilon"] for row in rows]
    bought.plot(epsilons, [row["signal_to_noise"] for row in rows], "o-", label="signal to noise (left)")
    for alpha, style in ((0.01, "s--"), (0.05, "^:")):
        gains = [row[f"true_positive_rate_at_{alpha:g}"] for row in rows]
        paid.plot(epsilons, gains, style, color="tab:red", label=f"attacker at {alpha:.0%} false positives (right)")
    for row in rows:
        place = row["epsilon"], row["signal_to_noise"]
        bought.annotate(row["verdict"], place, xytext=(-4, 6), textcoords="offset points", ha="right")
    bought.set(xlabel=f"epsilon per {rows[0]['unit']}", ylabel="signal to noise", xscale="log", ylim=(0, None))
    bought.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    bought.minorticks_off()
    paid.set(ylabel="true positives of the best membership test", ylim=(0, 1))
    figure.legend(loc="upper left", bbox_to_anchor=(0.12, 0.95), fontsize="small")
    FigureCanvasAgg(figure).print_png(str(file))


def plot_spending(entries: Sequence[LedgerEntry], budget: PrivacyBudget, file: Path) -> None:
    """Draw epsilon against the number of releases of one run, with its target; a function of the ledger only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = sorted({round(len(entries) * share / 20) for share in range(21)})
    figure = Figure(figsize=(6, 4), layout="tight")
    axes = figure.subplots()
    axes.plot(counts, [epsilon_of(entries[:count], budget.delta) for count in counts], label="spent")
    axes.axhline(budget.epsilon, linestyle="--", color="grey", label="target")
    axes.set(xlabel="releases charged", ylabel=f"epsilon at delta {budget.delta:g} per {budget.unit}", ylim=(0, None))
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(file))
