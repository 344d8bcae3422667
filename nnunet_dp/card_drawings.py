"""Drawings of the privacy card: SVG of lines and words, the same bytes everywhere.

No drawing library: its version, fonts and identifiers would change the bytes, and ``verify`` compares them. Each chart
is 360 units wide, the width of a telephone, so that its letters are never shrunk.

>>> chart = line_chart([(0, 1.0), (10, 4.0)], "steps", "epsilon", "Epsilon over steps")
>>> chart.startswith("<svg"), "</script>" in chart
(True, False)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from nnunet_dp.card import AttackPoint

WIDTH, HEIGHT = 360, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 22, 14, 44
_Point = tuple[float, float]


def line_chart(
    points: Sequence[_Point], x_label: str, y_label: str, title: str, others: Sequence[Sequence[_Point]] = ()
) -> Markup:
    """A line from zero upwards.

    Args:
        points: x and y, at least one; x ascending whole steps from 0 on, y at least 0.
        x_label: below the axis.
        y_label: above the axis.
        title: for those who hear the page.
        others: further lines, thin.
    """
    everywhere = [point for line in (points, *others) for point in line]
    axes = _Axes(max(x for x, _ in everywhere), _ceiling(max(y for _, y in everywhere)))
    line = _path(axes.place(point) for point in points)
    x, y = axes.place(points[-1])
    area = f"{line}L{x:.1f} {axes.bottom}L{axes.place(points[0])[0]:.1f} {axes.bottom}Z"
    drawn = Markup('<path class="area" d="{}"/><path class="line" d="{}"/>').format(area, line)
    dot = Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(x, y)
    thin = (Markup('<path class="line thin" d="{}"/>').format(_path(map(axes.place, other))) for other in others)
    return _svg(axes.drawn(x_label, y_label), drawn + Markup("").join(thin) + dot, title)


def attack_chart(points: Sequence[AttackPoint], marked: Sequence[float], title: str) -> Markup:
    """The trade-off curve: hits over false alarms of the best attack, above the diagonal of guessing.

    Args:
        points: of the curve.
        marked: false-positive rates that get a dot.
        title: for those who hear the page.
    """
    axes = _Axes(1.0, 1.0, share=True)
    curve = [(point.false_positive_rate, point.true_positive_rate) for point in points]
    line = _path(axes.place(point) for point in [(0.0, curve[0][1]), *curve, (1.0, 1.0)])
    guess = _path(axes.place(point) for point in [(0.0, 0.0), (1.0, 1.0)])
    area = f"{line}L{_path([axes.place((0.0, 0.0))])[1:]}Z"
    drawn = Markup('<path class="area" d="{}"/><path class="guess" d="{}"/><path class="line" d="{}"/>')
    words = Markup('<text class="note" x="{:.1f}" y="{:.1f}" transform="rotate(-32 {:.1f} {:.1f})">guessing</text>')
    x, y = axes.place((0.56, 0.5))
    dots = [axes.place(point) for point in curve if point[0] in marked]
    circles = [Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(*dot) for dot in dots]
    return _svg(
        axes.drawn("false alarms", "hits"),
        drawn.format(area, guess, line) + words.format(x, y, x, y) + Markup("").join(circles),
        title,
    )


class _Axes:
    """From numbers to places in the drawing."""

    def __init__(self, x_top: float, y_top: float, share: bool = False) -> None:
        self.x_top, self.y_top, self.share = x_top, y_top, share
        self.bottom = HEIGHT - _BOTTOM

    def place(self, point: _Point) -> _Point:
        """Where a point lies."""
        x = _LEFT + point[0] / self.x_top * (WIDTH - _LEFT - _RIGHT)
        return x, self.bottom - point[1] / self.y_top * (self.bottom - _TOP)

    def drawn(self, x_label: str, y_label: str) -> Markup:
        """Grid, numbers and names."""
        parts = [self._row(self.y_top * tick / 4) for tick in range(5)]
        parts += [self._column(value) for value in self._columns()]
        parts.append(_name(x_label, (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6))
        parts.append(_name(y_label, -(_TOP + self.bottom) / 2, 14, "rotate(-90)"))
        return Markup("").join(parts)

    def _columns(self) -> list[float]:
        """Where numbers stand below the axis: at quarters, steps at whole ones."""
        quarters = [self.x_top * tick / 4 for tick in range(5)]
        return quarters if self.share else sorted({float(round(value)) for value in quarters})

    def _row(self, value: float) -> Markup:
        _, y = self.place((0.0, value))
        line = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
        words = Markup('<text text-anchor="end" x="{}" y="{:.1f}">{}</text>')
        told = words.format(_LEFT - 6, y + 4, self._told(value))
        return line.format(_LEFT, WIDTH - _RIGHT, y, y) + told

    def _column(self, value: float) -> Markup:
        x, _ = self.place((value, 0.0))
        return Markup('<text text-anchor="middle" x="{:.1f}" y="{}">{}</text>').format(
            x, self.bottom + 17, self._told(value)
        )

    def _told(self, value: float) -> str:
        return f"{100 * value:g} %" if self.share else f"{value:.4g}"


def _name(words: str, x: float, y: float, turned: str = "rotate(0)") -> Markup:
    """The name of an axis."""
    text = Markup('<text class="name" text-anchor="middle" transform="{}" x="{:.1f}" y="{}">{}</text>')
    return text.format(turned, x, y, words)


def _ceiling(value: float) -> float:
    """The next number at or above that four equal parts leave round: 1, 2, 4, 6 or 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(factor * power for factor in (1, 2, 4, 6, 8, 10) if factor * power >= value * (1 - 1e-9))


def _path(points: Iterable[_Point]) -> str:
    """Straight lines through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _svg(axes: Markup, content: Markup, title: str) -> Markup:
    frame = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>')
    return frame.format(WIDTH, HEIGHT, title, axes, content)
