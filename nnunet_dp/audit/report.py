"""What people read of an audit: one HTML file that needs nothing else, and plots beside the JSON.

============  ====================================================================================
audit.json    everything, with the curves
audit.html    tables, plots inside
canaries.png  epsilon step by step: the ledger's line, and what the canaries show at least
roc.png       hits against false alarms of every attack, on logarithmic axes
============  ====================================================================================
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from nnunet_dp.replacing import replacing

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>nnunet-dp audit</title>
<style>body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em}td,th{padding:.2em .6em;
text-align:right;border-bottom:1px solid #ccc}td:first-child,th:first-child{text-align:left}img{max-width:100%}
.note{background:#eee;padding:.6em}</style></head><body>
<h1>Audit on phantoms</h1>
<p class="note">{{ note }}</p>
<p>Refuted claims, at {{ percent(refuted_confidence) }} confidence for all bounds together:
{{ refuted | length or "none" }}{% for one in refuted %}<br>{{ one }}{% endfor %}</p>
<p>Protocol (SHA-256, taken before the run): <code>{{ protocol_sha256 }}</code></p>
<h2>Canaries in a real training</h2>
<table><tr><th>claimed</th><th>ledger</th><th>at least, if Gaussian</th><th>at least, any mechanism</th>
<th>at least, one run</th><th>noise, measured / planned</th></tr>
{% for run in canaries %}<tr><td>epsilon {{ run.epsilon }}</td><td>{{ run.ledger_epsilon[-1] | three }}</td>
<td>{{ run.empirical_epsilon_gaussian[-1] | three }}</td><td>{{ run.empirical_epsilon_any_mechanism[-1] | three }}</td>
<td>{{ run.empirical_epsilon_one_run | three }}</td><td>{{ run.measured_over_planned_noise | min | three }} to
{{ run.measured_over_planned_noise | max | three }}</td></tr>{% endfor %}</table>
<p>Bounds at {{ percent(canaries[0].confidence) }} confidence each.</p>
<img alt="epsilon step by step" src="data:image/png;base64,{{ plots.canaries }}">
<h2>Membership inference</h2>
{% for setting in membership %}<h3>{{ setting.setting }}</h3>
<p>{{ setting.models }} models, {{ setting.patients }} patients in the pool; Dice of members
{{ setting.members_dice | three }}, of others {{ setting.others_dice | three }}{% if setting.epsilon is not none %};
the ledger says epsilon {{ setting.epsilon | three }} at delta {{ setting.delta }}; no attack can reach more than
{% for rate, most in setting.true_positive_rate_at_most.items() %}{{ percent(most) }} hits at
{{ percent(rate | float) }} false alarms{{ "" if loop.last else ", " }}{% endfor %}{% endif %}.</p>
<table><tr><th>attack</th><th>AUC</th><th>interval</th>{% for at in setting.attacks[0].at %}<th>hits at
{{ percent(at.false_positive_rate) }}</th><th>interval</th>{% endfor %}<th>epsilon at least</th></tr>
{% for attack in setting.attacks %}<tr><td>{{ attack.attack }}</td><td>{{ attack.auc | three }}</td>
<td>{{ attack.auc_interval | range_ }}</td>{% for at in attack.at %}<td>{{ percent(at.true_positive_rate) }}</td>
<td>{{ percent(at.interval[0]) }} to
{{ percent(at.interval[1]) }}</td>{% endfor %}<td>{{ attack.epsilon_at_least | three }}</td></tr>{% endfor %}</table>
{% for one in setting.refined_against_unrefined %}<p>{{ one.refined }} against labels: AUC
{{ "%+.3f" | format(one.auc_gain) }} ({{ one.interval | range_ }})</p>{% endfor %}{% endfor %}
<img alt="receiver operating characteristics" src="data:image/png;base64,{{ plots.roc }}">
<p>Intervals: Clopper-Pearson for hits, DeLong for the AUC, bootstrap over patients for differences. Patients of one
model share it, which these intervals do not know; the bound of epsilon (Steinke et al. 2023) does.</p>
<h2>Gradient inversion</h2>
<table><tr><th>one step's release</th><th>correlation with the patient's image</th><th>with another patient's</th></tr>
{% for one in reconstruction %}<tr><td>{{ one.setting }}</td><td>{{ one.own_mean | three }}
({{ [one.own | min, one.own | max] | range_ }})</td><td>{{ one.other_mean | three }}
({{ [one.other | min, one.other | max] | range_ }})</td></tr>{% endfor %}</table>
<p>Means over {{ reconstruction[0].own | length }} patients, smallest and largest in brackets.</p>
<h2>Protocol</h2><pre>{{ protocol_text }}</pre></body></html>
"""


def write_report(report: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write JSON, HTML and plots into a folder; what -> file.

    Args:
        report: of ``phantom_audit.run_audit``.
        folder: made if it does not exist; older files of the same names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = {"canaries": plot_canaries(report["canaries"]), "roc": plot_roc(report["membership"])}
    contents = {
        "audit.json": (json.dumps(report, indent=1) + "\n").encode(),
        "audit.html": page(report, plots).encode(),
        **{f"{name}.png": content for name, content in plots.items()},
    }
    for name, content in contents.items():
        with replacing(folder / name) as stream:
            stream.write(content)
    return {name: str(folder / name) for name in contents}


def page(report: Mapping[str, Any], plots: Mapping[str, bytes]) -> str:
    """The HTML, plots inside."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["three"] = _three
    environment.filters["range_"] = lambda pair: f"{_three(pair[0])} to {_three(pair[1])}"
    environment.globals["percent"] = lambda share: f"{100 * share:.3g} %"
    encoded = {name: base64.b64encode(content).decode() for name, content in plots.items()}
    text = json.dumps(report["protocol"], indent=1)
    return environment.from_string(_PAGE).render(**report, plots=encoded, protocol_text=text)


def _three(value: float) -> str:
    return f"{value:.3g}"


def plot_canaries(runs: Any) -> bytes:
    """Epsilon step by step, PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(runs), 3.6), layout="tight")
    for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        steps = range(1, run["steps"] + 1)
        axes.plot(steps, run["ledger_epsilon"], label="ledger (upper bound)")
        axes.plot(steps, run["empirical_epsilon_gaussian"], "o-", label="canaries, at least (Gaussian)")
        axes.plot(steps, run["empirical_epsilon_any_mechanism"], "s--", label="canaries, at least (any mechanism)")
        axes.set(xlabel="steps", ylabel=f"epsilon at delta {run['delta']:g}", title=f"claimed {run['epsilon']:g}")
        axes.set_ylim(0, None)
        axes.legend(fontsize="small")
    return _png(figure)


def plot_roc(settings: Any) -> bytes:
    """Hits against false alarms, PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(settings), 4.2), layout="tight")
    for axes, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True):
        for attack in setting["attacks"]:
            axes.step(*attack["roc"], where="post", label=f"{attack['attack']} ({attack['auc']:.2f})")
        axes.plot([1e-3, 1], [1e-3, 1], color="grey", linewidth=0.7)
        for rate, most in setting["true_positive_rate_at_most"].items():
            axes.plot(float(rate), most, "kv")
        axes.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1.05), title=setting["setting"])
        axes.set(xlabel="false alarms", ylabel="hits (triangles: the most that the ledger allows)")
        axes.legend(fontsize="x-small", title="attack (AUC)")
    return _png(figure)


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The report in a few lines, label and text."""
    rows = []
    for run in report["canaries"]:
        least = run["empirical_epsilon_gaussian"][-1], run["empirical_epsilon_one_run"]
        text = f"ledger {run['ledger_epsilon'][-1]:.3g}; at least {least[0]:.3g} (Gaussian), {least[1]:.3g} (one run)"
        noise = run["measured_over_planned_noise"]
        text += f"; noise {min(noise):.3g} to {max(noise):.3g} of the plan's"
        rows.append((f"canaries, epsilon {run['epsilon']:g}", text))
    for setting in report["membership"]:
        best = max(setting["attacks"], key=lambda attack: attack["auc"])
        least = max(attack["epsilon_at_least"] for attack in setting["attacks"])
        text = f"best AUC {best['auc']:.3f} ({best['attack']}); epsilon at least {least:.3g}"
        rows.append((f"membership, {setting['setting']}", text))
    for one in report["reconstruction"]:
        text = f"correlation with the patient's image {one['own_mean']:.2f}, with another's {one['other_mean']:.2f}"
        rows.append((f"inversion, {one['setting']}", text))
    refuted = "; ".join(report["refuted"]) or "none"
    return [*rows, ("refuted claims", refuted), ("protocol", report["protocol_sha256"]), ("note", report["note"])]
