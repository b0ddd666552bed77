"""Playing many cells, in several processes: what one process does, and handing it out."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from extproc.simulate.studies.matrix import contest, gate
from extproc.simulate.studies.matrix.cells import cell as named
from extproc.simulate.studies.matrix.cells import stage
from extproc.simulate.studies.matrix.contest import FIXED, RIVALS, Score, as_row, judge
from extproc.simulate.studies.matrix.traffic import TRAFFIC, with_traces

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from extproc.simulate.studies.matrix.cells import Cell

Row = dict[str, object]


def play_duel(
    task: tuple[list[Cell], tuple[str, ...], tuple[int, ...], Path | None, dict[str, Row], float],
) -> list[Row]:
    """Play the cells that differ by their page only: rivals once, ours for each. None if time is up."""
    cells, contenders, seeds, traces, known, ends = task
    if time.monotonic() >= ends:
        return []
    first = cells[0]
    traffic = (with_traces(traces) if traces else TRAFFIC)[first.traffic]
    began = time.monotonic()
    scene = stage(first.engine, traffic, first.load, seeds)
    scores: dict[str, Score] = {}
    for name in contenders:
        if name in RIVALS:
            scores[name] = Score(**known[name]) if name in known else contest.rival(name, scene)  # type: ignore[arg-type]
    rows: list[Row] = []
    for cell in cells:
        page, says_batch = cell.tells
        here = dict(scores)
        for name in contenders:
            if name == FIXED:
                score = known.get(contest.fixed_on(cell.page))
                here[name] = Score(**score) if score else contest.fixed(scene, page, says_batch=says_batch)  # type: ignore[arg-type]
            elif name not in RIVALS:
                text = traffic.ours if name == "ours" else name
                here[name] = contest.play(text, scene, page, says_batch=says_batch)
        mine = next((name for name in contenders if name.startswith("ours") and name != FIXED), None)
        others = [score for name, score in here.items() if name in (*RIVALS, FIXED)]
        row: Row = {"cell": cell.name, "rate": round(scene.rate, 3), "scores": {n: as_row(s) for n, s in here.items()}}
        if mine and others:
            verdict = judge(here[mine], others, cell.load)
            row |= {"ratio": round(verdict.ratio, 4), "problems": list(verdict.problems)}
        rows.append(row)
    rows[0]["took_s"] = round(time.monotonic() - began, 2)
    return rows


def duels(cells: list[Cell]) -> list[list[Cell]]:
    """Put cells together that differ by their page only."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.duel].append(cell)
    return list(groups.values())


def run(
    cells: list[Cell],
    contenders: tuple[str, ...],
    seeds: tuple[int, ...],
    workers: int = 1,
    traces: Path | None = None,
    known: dict[str, dict[str, Row]] | None = None,
    ends: float = math.inf,
) -> Iterator[Row]:
    """Play cells and yield their rows; begin none after `ends`, on the monotonic clock."""
    known = known or {}
    tasks = [(some, contenders, seeds, traces, known.get(some[0].duel, {}), ends) for some in duels(cells)]
    if workers == 1:
        for task in tasks:
            yield from play_duel(task)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for rows in pool.imap(play_duel, tasks):
            yield from rows


def play_gate(task: tuple[str, gate.Record | None]) -> tuple[str, gate.Record, list[str]]:
    """Play a cell of the gate; return what could be recorded of it, and its complaints."""
    name, record = task
    one = named(name)
    scene = stage(one.engine, TRAFFIC[one.traffic], one.load, gate.SEEDS)
    if record is None:
        record = gate.Record(tuple(contest.rival(other, scene) for other in RIVALS), None, ())
    if not any(other.text.startswith("ours,") for other in record.rivals):
        page, says_batch = one.tells
        record = replace(record, rivals=(*record.rivals, contest.fixed(scene, page, says_batch=says_batch)))
    score = gate.play(one)
    wrong = gate.complaints(name, score, record)
    verdict = judge(score, record.rivals, one.load)
    return name, gate.Record(record.rivals, score, gate.missed(verdict)), wrong
