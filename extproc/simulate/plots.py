"""Two kinds of plots as SVG text: curves, and groups of bars. No dependency, the same bytes from the same data.

Colours hold for a contender on all plots. White ground, so that they read in a dark browser too.
"""

from __future__ import annotations

from html import escape
from math import isnan, log2
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, TOP, LEFT, BOTTOM = 860, 240, 34, 52, 64
COLOURS = {
    "round_robin": "#bdbdbd",
    "least_request": "#737373",
    "circuit_breaker": "#e6ab02",
    "tuned_engine": "#d95f02",
    "haproxy": "#7570b3",
    "original": "#a6761d",
    "ours": "#1b7837",
}
NAMES = {
    "round_robin": "round robin",
    "least_request": "least request",
    "circuit_breaker": "circuit breaker",
    "tuned_engine": "tuned, no queue",
    "haproxy": "HAProxy",
    "original": "original design",
}
"""As the tables call them, but short: a legend is one line."""
OTHER = ("#1f78b4", "#e7298a", "#66a61e", "#b15928", "#444444")

Point = tuple[float, float, float]
"""x, y, and the spread of y (nan: unknown)."""


def colour(name: str, number: int = 0) -> str:
    """Return the colour of a contender, or one for the `number`th of something else."""
    return COLOURS.get(name, OTHER[number % len(OTHER)])


def curves(title: str, lines: Mapping[str, Sequence[Point]], *, x_label: str, log_x: bool = False) -> str:
    """Draw y (0..1) over x, a line for each name, with spread as whiskers."""
    xs = sorted({x for points in lines.values() for x, _, _ in points})
    place = log2 if log_x else float
    low, high = place(xs[0]), place(xs[-1])
    span = WIDTH - LEFT - 60

    def at(x: float) -> float:
        return LEFT + 30 + (place(x) - low) / max(high - low, 1e-9) * span

    parts = [_axis(1.0)]
    for number, (name, points) in enumerate(lines.items()):
        shade = colour(name, number)
        path = " ".join(f"{at(x):.1f},{_y(y, 1.0):.1f}" for x, y, _ in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{shade}" stroke-width="2.5"/>')
        for x, y, spread in points:
            parts.append(f'<circle cx="{at(x):.1f}" cy="{_y(y, 1.0):.1f}" r="3.5" fill="{shade}"/>')
            parts.append(_whisker(at(x), y, spread, 1.0, shade))
    parts += [_text(at(x), TOP + HEIGHT + 16, f"{x:g}" if log_x else f"{x:.0%}") for x in xs]
    parts.append(_text(LEFT + 30 + span / 2, TOP + HEIGHT + 32, x_label))
    return _svg(title, parts, list(lines))


def bars(title: str, groups: Mapping[str, Mapping[str, tuple[float, float]]], *, top: float = 1.0) -> str:
    """Draw a group of bars for each name in `groups`: a bar per contender, (value, spread)."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    wide = (WIDTH - LEFT - 10) / max(len(groups), 1)
    bar = (wide - 14) / max(len(names), 1)
    parts = [_axis(top)]
    for place, (label, group) in enumerate(groups.items()):
        x0 = LEFT + 8 + place * wide
        for number, name in enumerate(names):
            value, spread = group.get(name, (float("nan"), float("nan")))
            if isnan(value):
                continue
            y, shade = _y(min(value, top), top), colour(name, number)
            x = x0 + number * bar
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar - 1.5:.1f}" height="{TOP + HEIGHT - y:.1f}" '
                f'fill="{shade}"><title>{escape(f"{label}, {name}: {value:.3g}")}</title></rect>'
            )
            parts.append(_whisker(x + bar / 2, value, spread, top, "#000"))
        parts.append(_text(x0 + (wide - 14) / 2, TOP + HEIGHT + 16, label))
    return _svg(title, parts, names)


def _y(value: float, top: float) -> float:
    return TOP + HEIGHT * (1 - value / top)


def _whisker(x: float, value: float, spread: float, top: float, shade: str) -> str:
    if isnan(spread) or isnan(value):
        return ""
    low, high = (_y(min(max(value + sign * spread, 0.0), top), top) for sign in (-1, 1))
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{shade}" stroke-width="1.2"/>'


def _axis(top: float) -> str:
    lines = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share * top, top)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        lines.append(_text(LEFT - 6, y + 4, f"{share * top:.3g}", anchor="end"))
    return "".join(lines)


def _text(x: float, y: float, text: str, *, anchor: str = "middle", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#222" '
        f'font-family="system-ui, sans-serif">{escape(text)}</text>'
    )


def _svg(title: str, parts: Sequence[str], names: Sequence[str]) -> str:
    tall = TOP + HEIGHT + BOTTOM
    legend, x = [], float(LEFT)
    for number, name in enumerate(names):
        text = NAMES.get(name, name)
        legend.append(f'<rect x="{x:.0f}" y="{tall - 20}" width="11" height="11" fill="{colour(name, number)}"/>')
        legend.append(_text(x + 15, tall - 10, text, anchor="start"))
        x += 30 + 7 * len(text)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 10} {tall}" width="{WIDTH + 10}" role="img" '
        f'aria-label="{escape(title)}"><rect width="100%" height="100%" fill="#fff"/>'
        f"{_text(LEFT, 20, title, anchor='start', size=14)}{''.join(parts)}{''.join(legend)}</svg>\n"
    )
