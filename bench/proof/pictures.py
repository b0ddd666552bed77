"""Which plots the page has: from figures to SVG."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

from bench.proof.words import CLASSES, LABELS, average, deviation, pick
from extproc.simulate import plots
from extproc.simulate.studies.experiments import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.proof.words import Key, Row
    from extproc.simulate.studies.figures import Figures

NOT_IN_BARS = ("ramp", "stale")


def draw(found: dict[Key, Figures], rows: Sequence[Row]) -> dict[str, str]:
    """Return all plots: name -> SVG."""
    drawn = {}
    ramp = {who: points for who in LABELS if len(points := _over_load(found, who)) > 1}
    if ramp:
        drawn["ramp"] = plots.curves("Goodput over load, real Envoy, H100-32B", ramp, x_label="load")
    classes = _classes(found, 1.2)
    if classes:
        drawn["classes"] = plots.bars("Goodput by class at 120 % load, real Envoy", classes)
    names = [name for name in BY_NAME if name not in NOT_IN_BARS]
    others = {BY_NAME[name].short: group for name in names if (group := _group(found, name))}
    if others:
        drawn["experiments"] = plots.bars("Goodput when something is wrong, real Envoy", others)
    for preset in dict.fromkeys(row["preset"] for row in rows):
        some = pick(rows, kind="sweep", preset=preset, experiment="limits", load=1.2)
        if some:
            title = f"A fixed limit per engine at 120 % load, {preset}, simulated; ours adapts"
            drawn[f"limits-{preset}"] = plots.curves(title, _limits(some), x_label="requests per engine", log_x=True)
    return drawn


def _over_load(found: dict[Key, Figures], who: str) -> list[plots.Point]:
    return [
        (load, one.all.goodput, one.spread)
        for (name, load, contender), one in found.items()
        if name == "ramp" and contender == who
    ]


def _classes(found: dict[Key, Figures], load: float) -> dict[str, dict[str, tuple[float, float]]]:
    groups: dict[str, dict[str, tuple[float, float]]] = {klass: {} for klass in (*CLASSES, "all")}
    for (name, at, who), one in found.items():
        if (name, at) == ("ramp", load):
            for line in one.lines:
                groups[line.klass][who] = (line.goodput, one.spread if line is one.all else math.nan)
    return {klass: group for klass, group in groups.items() if group}


def _group(found: dict[Key, Figures], wanted: str) -> dict[str, tuple[float, float]]:
    return {who: (one.all.goodput, one.spread) for (name, _, who), one in found.items() if name == wanted}


def _limits(rows: Sequence[Row]) -> dict[str, list[plots.Point]]:
    lines: dict[str, list[plots.Point]] = defaultdict(list)
    adaptive = average(rows, "ours")
    for name in dict.fromkeys(row["contender"] for row in rows):
        who, _, limit = name.partition(",")
        if limit:
            x = float(limit.partition("=")[2])
            lines["haproxy" if who == "haproxy" else "ours, fixed"].append(
                (x, average(rows, name), deviation(rows, name))
            )
            if who == "ours":
                lines["ours"].append((x, adaptive, math.nan))
    return lines
