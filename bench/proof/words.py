"""How figures and contenders are called on the page, and the groups that its tables are made of."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from bench.proof import rival
from extproc.simulate.report import goodput
from extproc.simulate.studies.commit import UNKNOWN
from extproc.simulate.studies.experiments import BY_NAME
from extproc.simulate.studies.figures import Figures, Run, figures, waste

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CLASSES = ("int", "std", "batch")
SAME = 0.01
"""Goodputs that differ by less are called the same."""
LABELS = {
    "round_robin": "Envoy round robin",
    "least_request": "Envoy least request",
    "circuit_breaker": "... + circuit breaker",
    "tuned_engine": "tuned, no queue",
    "haproxy": "HAProxy",
    "original": "original design",
    "ours": "**ours, defaults**",
}
PEER_LABELS = {"smg": "smg", "vllm_router": "vllm-router"}
Row = dict[str, Any]
"""What the page needs of one virtual run."""
Key = tuple[str, float, str]
"""Experiment, load, contender."""


def summary(run: Run) -> Row:
    """Return the row of a virtual run."""
    counted = run.counted
    return {
        "experiment": run.experiment,
        "contender": run.contender,
        "load": run.load,
        "seed": run.seed,
        "goodput": goodput(counted),
        "by_class": {k: goodput(r for r in counted if r.klass == k) for k in dict.fromkeys(r.klass for r in counted)},
        "victims": goodput(record for record in counted if record.tenant != "tenant-1"),
        "wasted": waste([run]),
    }


def collect(runs: Iterable[Run]) -> dict[Key, Figures]:
    """Put runs together by experiment, load and contender; rejected ones are left out."""
    groups: dict[Key, list[Run]] = defaultdict(list)
    for run in runs:
        if not run.problem():
            groups[run.experiment, run.load, run.contender].append(run)
    places = {name: place for place, name in enumerate((*LABELS, *PEER_LABELS))}
    keys = sorted(groups, key=lambda key: (list(BY_NAME).index(key[0]), key[1], places.get(key[2], 99), key[2]))
    return {key: figures(groups[key]) for key in keys}


def pick(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def average(rows: Sequence[Row], contender: str, key: str = "goodput") -> float:
    """Return the mean over a contender's seeds; nan of none."""
    values = [row[key] for row in rows if row["contender"] == contender]
    return mean(values) if values else math.nan


def deviation(rows: Sequence[Row], contender: str) -> float:
    """Return the standard deviation of goodput between a contender's seeds; nan of less than two."""
    values = [row["goodput"] for row in rows if row["contender"] == contender]
    return stdev(values) if len(values) > 1 else math.nan


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table, with an empty line after it."""
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def called(facts: Row) -> str:
    """Say by which command, when, for how long and on which seeds all of a page ran; of several calls, how many."""
    pieces = facts.get("pieces", ())
    how = f"{len(pieces)} calls, below" if len(pieces) > 1 else f"`{_bare(facts['command'])}`"
    in_all = "" if len(pieces) < 2 else " in all" if all("took_s" in one for one in pieces) else " where known"
    seeds = ", ".join(map(str, facts["seeds"]))
    return f"{how} ({facts['date']}, {facts['duration_s'] / 60:.0f} minutes{in_all}, seeds {seeds})"


def versions(facts: Row, without: Sequence[str] = ()) -> str:
    """Say what ran; the commit not where each piece has its own."""
    left_out = {*without, *(["commit"] if len(facts.get("pieces", ())) > 1 else [])}
    return ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if name not in left_out)


def pieced(facts: Row) -> list[str]:
    """Say what was run when, by which call of which commit; nothing of a page that was made at once."""
    pieces = facts.get("pieces", ())
    if len(pieces) < 2:
        return []
    rows = [
        [
            piece["began"],
            f"{piece['took_s'] / 60:.0f}" if "took_s" in piece else "not known",
            ", ".join(piece["experiments"]).replace("_", " "),
            ", ".join(map(str, piece["seeds"])),
            piece["commit"],
            f"`{_bare(piece['command'])}`",
            piece["note"],
        ]
        for piece in pieces
    ]
    says = "It was run in pieces; contenders are compared with those of their own piece, in the same minutes."
    return [says, "", *table(["begun (UTC)", "minutes", "what", "seeds", "commit", "call", "beside it"], rows)]


def made(runs: Iterable[Run], facts: Row, rows: Sequence[Row] = ()) -> str:
    """Say when it ran, for how long, and of which commit the runs of each experiment are; `rows` are simulated."""
    unknown = facts["versions"].get("commit", UNKNOWN)
    places = list(BY_NAME)
    played: dict[tuple[str, str], dict[str, set[float]]] = defaultdict(lambda: defaultdict(set))
    for one in sorted(runs, key=lambda run: places.index(run.experiment)):
        played[one.experiment, one.commit or unknown][one.contender].add(one.load)
    names: dict[str, list[str]] = defaultdict(list)
    for (name, commit), loads in played.items():
        mixed = sum(other == name for other, _ in played) > 1
        names[commit].append(BY_NAME[name].short + (_at(loads) if mixed else ""))
    for commit in dict.fromkeys(row.get("commit") or unknown for row in rows):
        names[commit].append("all that is simulated")
    told = "; ".join(f"commit {commit}: {', '.join(some)}" for commit, some in names.items())
    pieces = len(facts.get("pieces", ()))
    how = f" In {pieces} pieces: [how each was run](benchmarks-details.md)." if pieces > 1 else ""
    return f"{facts['date']}, {facts['duration_s'] / 60:.0f} minutes; {told}.{how}"


def _at(loads: dict[str, set[float]]) -> str:
    """Say at which loads most contenders were played, and in brackets which others at which."""
    groups: dict[str, list[str]] = defaultdict(list)
    for who, some in loads.items():
        groups[", ".join(f"{load:.0%}" for load in sorted(some))].append(plain(who))
    most, *others = sorted(groups, key=lambda at: -len(groups[at]))
    told = "; ".join(f"{', '.join(groups[at])} at {at}" for at in others)
    return f" at {most}" + (f" ({told})" if told else "")


def _bare(command: str) -> str:
    """Return a call without the places where it put its files, the lock it waited for, and what a column has."""
    return re.sub(r" --((out|docs|lock) \S+|add|note .*?(?= --|$))", "", command)


def label(contender: str) -> str:
    """Return what a contender is called in a table."""
    if rival.is_own(contender):
        return rival.name_of(contender)
    return (LABELS | PEER_LABELS).get(contender, f"`{contender}`")


def plain(contender: str) -> str:
    """Return what a contender is called in a sentence."""
    known = {"tuned_engine": "the tuned stack", "haproxy": "HAProxy", "least_request": "least request"}
    return known.get(contender, label(contender) if rival.is_own(contender) else contender.replace("_", " "))


def by_class(one: Figures) -> str:
    """Return the goodputs of the classes, the most urgent first."""
    known = {line.klass: line.goodput for line in one.lines[:-1]}
    return "/".join(share(known[klass], 2) for klass in CLASSES if klass in known)


def share(value: float, digits: int = 3) -> str:
    """Return a share without its 0; nothing for nan."""
    if math.isnan(value):
        return ""
    text = f"{value:.{digits}f}"
    return text.removeprefix("0") if text.startswith("0.") else text


def plus_minus(spread: float) -> str:
    """Return the spread behind a figure; nothing for nan."""
    return "" if math.isnan(spread) else f" ±{share(spread)}"


def seconds(values: Iterable[float]) -> str:
    """Return percentiles in seconds."""
    return " / ".join("-" if math.isnan(value) else f"{value:.2f}" for value in values)


def milliseconds(values: Iterable[float]) -> str:
    """Return percentiles in milliseconds."""
    return " / ".join("-" if math.isnan(value) else f"{value * 1000:.0f}" for value in values)
