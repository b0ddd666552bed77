"""The tables of the page, as lines of Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bench.proof.words import (
    CLASSES,
    LABELS,
    average,
    label,
    milliseconds,
    pick,
    plus_minus,
    seconds,
    share,
    table,
)
from bench.proof.words import by_class as classes
from extproc.simulate.studies.experiments import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from bench.proof.words import Key, Row
    from extproc.simulate.studies.figures import Figures

NOTES = {
    "slow": "A queue binds nothing to the slow engine before it has room.",
    "dies": "What ran on the engine is lost for all. Ours has no active health check by default: failures tell it.",
    "noisy": "HAProxy and Envoy know no tenants; ours gives each a fair share inside its class.",
    "abandoned": "Work for who left: tokens computed for clients that were gone. For who missed: in answers too late.",
    "one_class": "No header names a class or a tenant. HAProxy's `timeout queue` is this class' budget.",
    "bursts": "Twice the mean rate for 20 s, two thirds for 60 s, at random: few bursts fall into a run of a minute, "
    "so the spread is wide; the longer simulated runs say more.",
    "stale": "Ours alone; in the ramp its metrics are read every second.",
}
SWEPT = ("limits", "telemetry", "sessions")
"""Experiments on the virtual clock that have tables of their own."""


def ramp(found: dict[Key, Figures], *, among: Sequence[str] = (), by_class: bool = True) -> list[str]:
    """Return goodput over load; with `by_class`, also that of each class. Of our own contenders only those `among`."""
    loads = sorted({key[1] for key in found if key[0] == "ramp"})
    rows = []
    for who in dict.fromkeys([*LABELS, *(key[2] for key in found if key[0] == "ramp")]):
        if among and who in LABELS and who not in among:
            continue
        some = [found.get(("ramp", load, who)) for load in loads]
        if any(some):
            cells = ["" if one is None else goodput(one) + (f" ({classes(one)})" if by_class else "") for one in some]
            rows.append([label(who), *cells])
    return table(["", *(f"{load:.0%}" for load in loads)], rows)


def goodput(one: Figures) -> str:
    """Return goodput and its spread."""
    return f"{share(one.all.goodput)}{plus_minus(one.spread)}"


def details(some: Iterable[Figures]) -> list[str]:
    """Return all figures of every class."""
    head = ("", "class", "goodput", "refused", "left or failed", "TTFT p50 / p95 / p99 s", "TPOT p50 / p95 / p99 ms")
    rows = []
    for one in some:
        classes = sorted(one.lines[:-1], key=lambda line: CLASSES.index(line.klass))
        for line in (one.all, *classes):
            common = ["", "", ""]
            if line is one.all:
                jain = "" if math.isnan(one.fairness) else f"{one.fairness:.2f}"
                common = [f"{one.tokens_per_s:.0f}", f"{one.wasted_left:.1%} / {one.wasted_missed:.1%}", jain]
            rows.append(
                [
                    label(one.contender) if line is one.all else "",
                    line.klass,
                    share(line.goodput),
                    f"{line.refused:.1%}",
                    f"{line.abandoned + line.failed:.1%}",
                    seconds(line.ttft),
                    milliseconds(line.tpot),
                    *common,
                ]
            )
    return table([*head, "tok/s", "work for who left / missed", "Jain"], rows)


def experiment(name: str, some: Sequence[Figures]) -> list[str]:
    """Return one table of one experiment at one load."""
    own = {"noisy": ["the other tenants", "the noisy one"], "abandoned": ["work for who left", "for who missed"]}
    head = ["", "goodput", "int/std/batch", "TTFT p50 / p95 / p99 s, first class", "TPOT p95 ms", "refused"]
    rows = []
    for one in some:
        first = one.of_class(CLASSES)
        cells = [
            label(one.contender),
            goodput(one),
            classes(one),
            seconds(first.ttft),
            milliseconds(first.tpot[1:2]),
            f"{one.all.refused:.1%}",
            f"{one.all.abandoned:.1%}",
            f"{one.all.failed:.1%}",
        ]
        if name == "noisy":
            cells += [share(one.victims), share(one.loud)]
        if name == "abandoned":
            cells += [f"{one.wasted_left:.1%}", f"{one.wasted_missed:.1%}"]
        rows.append(cells)
    return table([*head, "left", "failed", *own.get(name, [])], rows)


# ---- on the virtual clock


def again(rows: Sequence[Row]) -> list[str]:
    """Return the real experiments, longer and simulated."""
    lines = []
    for name, load in dict.fromkeys((row["experiment"], row["load"]) for row in rows):
        if name not in SWEPT:
            here = pick(rows, experiment=name, load=load)
            key = "victims" if name == "noisy" else "goodput"
            title = {"ramp": f"ramp, {load:.0%}", "noisy": "noisy tenant: goodput of the others"}
            cells = [share(average(here, who, key)) for who in LABELS]
            lines.append([title.get(name, BY_NAME[name].title), *cells])
    return table(["", *LABELS.values()], lines)


def sessions(rows: Sequence[Row]) -> list[str]:
    """Return conversations."""
    here = pick(rows, experiment="sessions")
    names = list(dict.fromkeys(row["contender"] for row in here))
    lines = [
        [f"{load:.0%}", *(share(average(pick(here, load=load), who)) for who in names)]
        for load in dict.fromkeys(row["load"] for row in here)
    ]
    return table(["conversations", *map(label, names)], lines)


def limits(rows: Sequence[Row]) -> list[str]:
    """Return fixed limits."""
    here = pick(rows, experiment="limits")
    sizes = list(dict.fromkeys(row["contender"].partition("=")[2] for row in here if "=" in row["contender"]))
    lines = []
    for load in dict.fromkeys(row["load"] for row in here):
        some = pick(here, load=load)
        for who, key in (("HAProxy", "haproxy,limit="), ("ours", "ours,max_running_requests=")):
            cells = [share(average(some, key + size)) for size in sizes]
            lines.append([f"{who}, {load:.0%}", *cells, share(average(some, "ours")) if who == "ours" else ""])
    return table(["requests per engine", *sizes, "adaptive"], lines)


def telemetry(rows: Sequence[Row]) -> list[str]:
    """Return stale metrics."""
    here = pick(rows, experiment="telemetry")
    periods = list(dict.fromkeys(row["contender"].partition("scrape_interval=")[2] for row in here))
    lines = []
    for load in dict.fromkeys(row["load"] for row in here):
        some = pick(here, load=load)
        for who, key in (("ours", "ours,"), ("ours, gauges only", "ours,own_books=false,")):
            cells = [share(average(some, f"{key}scrape_interval={period}")) for period in periods]
            lines.append([f"{who}, {load:.0%}", *cells])
    return table(["metrics read every", *periods], lines)


Pair = tuple[float, str, float, float]
"""Load, contender, real goodput, simulated goodput."""


def pairs(found: dict[Key, Figures], rows: Sequence[Row]) -> list[Pair]:
    """Return real goodputs beside those of the same requests on the virtual clock."""
    found_pairs = []
    for (name, load, who), real in found.items():
        here = [row for row in pick(rows, kind="check", experiment=name, load=load) if row["seed"] in real.seeds]
        simulated = average(here, who)
        if not math.isnan(simulated):
            found_pairs.append((load, who, real.all.goodput, simulated))
    return found_pairs


def compared(lines: Sequence[Pair]) -> list[str]:
    """Return such pairs as a table."""
    loads = sorted({load for load, _, _, _ in lines})
    cells = {(who, load): f"{share(real)} / {share(simulated)}" for load, who, real, simulated in lines}
    known = [who for who in LABELS if any(name == who for name, _ in cells)]
    return table(
        ["real / simulated", *(f"{load:.0%}" for load in loads)],
        [[label(who), *(cells.get((who, load), "") for load in loads)] for who in known],
    )
