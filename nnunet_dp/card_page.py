"""The privacy card for people: one page of HTML, and a README for a model hub; both are functions of the card.

    privacy_card.json  ->  privacy_card.html   claim, attack, prices, curves, what is covered and what is not
                       ->  README.md           the same in brief, with a model hub's metadata

The page is one file without scripts: nothing is loaded from anywhere, and its policy forbids it. Names that users give
(dataset, labels, channels) are escaped wherever they stand.

Formal guarantee:
    Both are functions of the card and of ``Described``: the same values give the same bytes, on every machine and with
    every version of the drawing and accounting libraries. So ``verify`` renders them again and compares.

Design note: in the README every value that a template prints is escaped by the environment itself (``finalize``), as
jinja's autoescape does it in the page: a template cannot forget it.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Mapping
from typing import Annotated, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import StringConstraints

from nnunet_dp import card_words
from nnunet_dp.card import Card, CardCharge
from nnunet_dp.card_drawings import attack_chart, line_chart
from nnunet_dp.charges import TRAINING
from nnunet_dp.dpsgd import Schedule
from nnunet_dp.inference_plans import DatasetDescription, DatasetName, Released
from nnunet_dp.released_model import PAGE, README, STOCK_TRAINER

MARKED = (0.01, 0.05)  # false-positive rates that are put into words
_HUB_TEXT = re.compile(r"^[-+#=]|[\\`*_{}\[\]!|~$<>&@^]|(?<=\bwww)\.")


class Described(Released):
    """What a page says of a model besides its card.

    Attributes:
        dataset: DatasetXXX_Name.
        model: TRAINER__PLANS__CONFIGURATION.
        description: channels and labels.
    """

    dataset: DatasetName
    model: Annotated[str, StringConstraints(max_length=300, pattern=r"^\w+__[A-Za-z0-9_.\-]+__[A-Za-z0-9_.\-]+$")]
    description: DatasetDescription

    @property
    def is_stock(self) -> bool:
        """Whether plain nnU-Net predicts with it."""
        return self.model.startswith(f"{STOCK_TRAINER}__")


def predict_command(card: Card, dataset: str, model: str) -> str:
    """What to type where a model TRAINER__PLANS__CONFIGURATION was installed."""
    trainer, plans, configuration = model.split("__")
    folds = " ".join(row.fold for row in card.folds)
    named = f"-d {dataset} -c {configuration} -f {folds} -tr {trainer} -p {plans}"
    return f"nnUNetv2_predict {named} -i IMAGES -o OUT"


def rendered(card: Card, described: Described) -> dict[str, bytes]:
    """The page and the README, by their names in a model's folder."""
    values = _values(card, described)
    return {
        PAGE: _page_environment().get_template("privacy_card.html").render(values).encode(),
        README: _hub_environment().get_template("hub_readme.md").render(values).encode(),
    }


@functools.cache
def _page_environment() -> Environment:
    return Environment(autoescape=True, **_strict())


@functools.cache
def _hub_environment() -> Environment:
    return Environment(autoescape=False, finalize=_hub_escaped, **_strict())  # finalize escapes


def _strict() -> dict[str, Any]:
    loader = PackageLoader("nnunet_dp")
    return {
        "loader": loader, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True,
        "keep_trailing_newline": True,
    }  # fmt: skip


def _hub_escaped(value: object) -> str:
    """Text for Markdown that can begin neither markup nor HTML."""
    if isinstance(value, Markup):
        return str(value)
    return _HUB_TEXT.sub(lambda found: html.escape(found[0]) if found[0] in "<>&" else f"\\{found[0]}", str(value))


# ---- what the templates are given --------------------------------------------------------------------------------


def _values(card: Card, described: Described) -> Mapping[str, Any]:
    return {
        "card": card,
        "described": described,
        "labels": list(described.description.labels),
        "structures": [name for name in described.description.labels if name not in ("background", "ignore")],
        "channels": list(described.description.channel_names.values()),
        "unit": card_words.noun(card.unit),
        "words": card_words,
        "prices": _prices(card),
        "marked": [(point, _hits(card, point)) for point in MARKED if _hits(card, point)],
        "attack_chart": attack_chart(card.figures.attack, MARKED, "Hits of the best attack over its false alarms"),
        "curves": _curves(card),
        "predict_command": Markup(predict_command(card, described.dataset, described.model)),
    }


def _hits(card: Card, rate: float) -> float | None:
    found = [row.true_positive_rate for row in card.figures.attack if row.false_positive_rate == rate]
    return found[0] if found else None


def _prices(card: Card) -> list[dict[str, Any]]:
    """One row for each kind of release: what it was for, what it cost by itself, and how long its bar is."""
    listed: list[tuple[int | None, CardCharge]] = [(None, row) for row in card.charges]
    listed += [(site.site, row) for site in card.sites for row in site.charges]
    longest = max([card.epsilon, *card.figures.prices])
    return [
        {"site": site, "charge": row, "price": price, "share": f"{100 * price / longest:.2f}"}
        for (site, row), price in zip(listed, card.figures.prices, strict=False)
    ]


def _curves(card: Card) -> list[dict[str, Any]]:
    """Functions of schedule, ledger and paid releases over the training; what a card does not hold is left out."""
    found = (_epsilon_spent(card), _noise(card), _thresholds(card), _learning_rate(card))
    return [curve for curve in found if curve is not None]


def _epsilon_spent(card: Card) -> dict[str, Any] | None:
    points = [(float(point.releases), point.epsilon) for point in card.figures.course]
    whose = " Of the site that spent most." if card.sites else ""
    text = f"Composed anew after each number of training steps; it begins with everything else that was paid.{whose}"
    return _curve("Epsilon spent", text, [points], "epsilon", "training steps charged") if points else None


def _noise(card: Card) -> dict[str, Any] | None:
    """The noise multiplier over the charged steps, where all of them had noise of one kind."""
    rows = [row for row in card.charges if row.purpose == TRAINING and row.noise_multiplier is not None]
    if len(rows) != 1:
        return None
    points = [(0.0, rows[0].noise_multiplier or 0.0), (float(rows[0].count), rows[0].noise_multiplier or 0.0)]
    text = "As charged: standard deviation of the noise over the bound of one contribution, the same at every step."
    return _curve("Noise", text, [points], "noise multiplier", "training steps charged")


def _thresholds(card: Card) -> dict[str, Any] | None:
    lines = [[(float(n), bound) for n, bound in enumerate(site.thresholds, 1)] for site in card.sites]
    text = "Bound of one record's contribution after each round, a line for each site: noised and paid for."
    known = [line for line in lines if line]
    return _curve("Clipping threshold", text, known, "threshold", "rounds") if known else None


def _learning_rate(card: Card) -> dict[str, Any] | None:
    if card.training is None:
        return None
    told = card.training
    schedule = Schedule(told.learning_rate, told.decay_power)
    points = [(told.steps * k / 32, schedule.learning_rate_at(k, 32)) for k in range(33)]
    text = "As planned before the first step."
    return _curve("Learning rate", text, [points], "learning rate", "steps of one fold")


def _curve(
    title: str, text: str, lines: list[list[tuple[float, float]]], y_label: str, x_label: str
) -> dict[str, Any]:
    return {"title": title, "text": text, "svg": line_chart(lines[0], x_label, y_label, title, lines[1:])}
