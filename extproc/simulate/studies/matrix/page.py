"""The page of the matrix: what a run of many cells says, as Markdown. A pure function of its rows."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING, Any

from extproc.simulate.studies.matrix import gate
from extproc.simulate.studies.matrix.cells import cell
from extproc.simulate.studies.matrix.chosen import REASONS, chosen, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from extproc.simulate.studies.matrix.cells import Cell

Row = dict[str, Any]

INTRODUCTION = """# The policy matrix: engines, pages, traffic and loads beside those of the other pages

Written by `{command}`; seeds {seeds}. Simulated: [simulate.md](simulate.md) says what the engines are and what is left
out. Do not edit: the next run overwrites it. Which of all 2,148 cells are played, and why: `studies/matrix/chosen.py`.

**{good} of {cells} cells meet all three criteria; in {near} the defaults have at least .97 of the goodput of the best
rival.** The criteria: goodput at least .97 of the best rival's; up to 80 % load at most 1 % refused where least request
serves 99 % in time; output tokens per second at least .95 of the most that any contender makes.

Rivals, each at the best of its settings for the cell and these seeds: least request; the same with a breaker; HAProxy
with a queue by class (`maxconn` and `timeout queue`); an engine tuned by hand (priorities, `max_num_seqs`, 503 above
1.15 times that); ours with a fixed limit. The grid stands in `studies/matrix/contest.py`; how objectives follow the
engine, in `studies/matrix/cells.py`.
"""


def render(rows: Sequence[Row], seeds: Sequence[int], command: str, unplayed: Sequence[str] = ()) -> str:
    """Return the page. `unplayed`: names of cells for which time was too short."""
    good = sum(not row["problems"] for row in rows)
    behind = sum(row["ratio"] < 0.97 for row in rows)
    parts = [
        INTRODUCTION.format(
            command=command,
            seeds=", ".join(map(str, seeds)),
            good=good,
            cells=len(rows),
            near=len(rows) - behind,
        ),
        *_table("traffic", rows, lambda one: one.traffic),
        *_table("load, %", rows, lambda one: str(one.load)),
        *_table("page", rows, lambda one: one.page),
        *_table("engine", rows, lambda one: one.engine),
        "## Cells that miss",
        "",
        "| cell | ours | best rival | ratio | what is missed | why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: row["ratio"]):
        if row["problems"]:
            strongest = _strongest(row)
            rival = f"{strongest['goodput']:.3f} {strongest['text'].replace(',', ' ')}"
            ours = f"{row['scores']['ours']['goodput']:.3f}"
            what, why = "; ".join(row["problems"]), _number(row["cell"]) or "not examined"
            parts.append(f"| {row['cell']} | {ours} | {rival} | {row['ratio']:.2f} | {what} | {why} |")
    used = sorted({number for row in rows if row["problems"] and (number := _number(row["cell"]))})
    parts += ["", *(f"{number}. {_flat(list(REASONS.values())[number - 1])}" for number in used)]
    if unplayed:
        groups: dict[str, int] = defaultdict(int)
        for one in map(cell, unplayed):
            groups[f"`{one.engine}/{one.page}/...@{one.load}`"] += 1
        names = ", ".join(f"{count} of {name}" for name, count in groups.items())
        parts += [
            "",
            "## Not played",
            "",
            f"{len(unplayed)} cells of `make bench-matrix` are not on this page: {names}.",
        ]
    return "\n".join(parts) + "\n"


def of_records(held: dict[str, gate.Record], played: dict[str, gate.Record]) -> str:
    """Return the page of what the gate holds, and of further cells that were played once."""
    further = {name: one for name, one in played.items() if name not in held}
    both = held | further
    unplayed = [name for name in chosen() if name not in both]
    text = render(gate.rows(both), gate.SEEDS, "python -m bench.matrix --gate --page", unplayed)
    when = (
        f"{len(further)} of these cells stand in `extproc/simulate/studies/matrix/further.json`: {gate.FURTHER_PLAYED}."
    )
    return text.replace("## Cells that miss", f"{when}\n\n## Cells that miss", 1)


def _flat(text: str) -> str:
    return " ".join(text.split())


def _number(name: str) -> int | None:
    """Return which of the reasons is this cell's."""
    why = reason(name)
    return None if why is None else list(REASONS.values()).index(why) + 1


def _strongest(row: Row) -> Row:
    others: Iterable[Row] = (
        score
        for name, score in row["scores"].items()
        if name != "ours" and (not name.startswith("ours,") or "max_running" in name)
    )
    return max(others, key=lambda score: score["goodput"])


def _table(title: str, rows: Sequence[Row], of: Callable[[Cell], str]) -> list[str]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[of(cell(row["cell"]))].append(row)
    if len(groups) < 2:
        return []
    lines = [
        f"| {title} | cells | meet all | goodput, median: ours | least request | best rival | ratio, least | in |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, some in groups.items():
        worst = min(some, key=lambda row: row["ratio"])
        ours, calm = (median(row["scores"][who]["goodput"] for row in some) for who in ("ours", "least_request"))
        best = median(_strongest(row)["goodput"] for row in some)
        meet = sum(not row["problems"] for row in some)
        lines.append(
            f"| {name} | {len(some)} | {meet} | {ours:.3f} | {calm:.3f} | {best:.3f} | {worst['ratio']:.2f} |"
            f" {worst['cell']} |"
        )
    return [*lines, ""]
