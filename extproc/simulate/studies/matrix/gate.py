"""The slice of the matrix that `make test` plays, and what it is held against.

`gate.json` beside this file has, for each cell, the rivals at their best, ours at its best fixed limit among them, and
what ours made at its defaults when it was recorded. A cell fails when ours falls more than `SLACK` below that, when it
misses a criterion of contest.judge that it did not miss then, and when it no longer misses one that it is listed for:
the list stays true. After a change of policy:

    python -m bench.matrix --gate             # what holds, what doesn't
    python -m bench.matrix --gate --record    # hold ours against this from now on; the rivals stay as they are
    python -m bench.matrix --gate --record --fresh    # after a change of the simulator: the rivals too (20 minutes)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extproc.simulate.studies.matrix import contest
from extproc.simulate.studies.matrix.cells import Cell, cell, stage
from extproc.simulate.studies.matrix.contest import Score, Verdict, judge
from extproc.simulate.studies.matrix.traffic import TRAFFIC

FILE = Path(__file__).with_name("gate.json")
FURTHER = FILE.with_name("further.json")
"""Cells of chosen.py beyond the gate that were played once, in the same form; no test plays them. The page has both."""
FURTHER_PLAYED = "rivals and fixed limits at 0dccd1b, ours at 6570672; the others were recorded then, too"
SEEDS = (1, 2)
SLACK = 0.02
"""How far the goodput of a cell may fall without a word."""


def names() -> list[str]:
    """Return the cells of the gate: each kind of engine, page and traffic, where load decides."""
    cells = [f"step{step}/seqs{seqs}/kv430k/vllm/standing@80" for step in (9, 30, 60, 90, 120) for seqs in (4, 32, 256)]
    cells += [f"step{step}/seqs{seqs}/kv200k/vllm/standing@120" for step in (9, 30, 60, 90, 120) for seqs in (8, 256)]
    cells += [f"step{step}/seqs256/kv24k/vllm/standing@{load}" for step in (9, 60, 120) for load in (50, 100)]
    cells += [
        f"{engine}/{page}/standing@{load}"
        for engine in ("step9/seqs256/kv430k", "step30/seqs8/kv200k", "step90/seqs32/kv24k", "llama-cpp")
        for page in ("vllm+batch", "gauges", "none")
        for load in (80, 120)
    ]
    cells += [f"a100-8b/{page}/{traffic}@80" for page in ("gauges", "none") for traffic in ("azure-conv", "unstreamed")]
    cells += [f"a100-8b/vllm/{traffic}@{load}" for traffic in TRAFFIC for load in (80, 120)]
    cells += [f"h100-32b/vllm/{traffic}@80" for traffic in ("standing", "prefix", "images", "rag", "chunked", "blink")]
    cells += [f"h100-8b/vllm/{traffic}@100" for traffic in ("azure-conv", "azure-code", "images")]
    cells += ["h100-32b/vllm/standing@120", "h100x4-70b/vllm/standing@120", "h100-32b-profiled/vllm/standing@120"]
    return list(dict.fromkeys(cells))


@dataclass(frozen=True, slots=True)
class Record:
    """What a cell is held against: the rivals, ours when it was recorded, and the criteria it missed then."""

    rivals: tuple[Score, ...]
    ours: Score | None
    misses: tuple[str, ...]


def read(file: Path = FILE) -> dict[str, Record]:
    """Read `gate.json`, or another file of that form."""
    entries: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return {
        name: Record(
            tuple(Score(**score) for score in entry["rivals"]),
            Score(**entry["ours"]) if entry["ours"] else None,
            tuple(entry["misses"]),
        )
        for name, entry in entries.items()
    }


def duels() -> dict[str, dict[str, dict[str, object]]]:
    """Return the rivals' scores by duel and rival, as a run of cells remembers them."""
    found: dict[str, dict[str, dict[str, object]]] = {}
    for name, record in read().items():
        for score in record.rivals:
            rival = score.text.partition(",")[0]
            who = {"circuit_breaker": "breaker", "ours": contest.fixed_on(cell(name).page)}.get(rival, rival)
            found.setdefault(cell(name).duel, {})[who] = contest.as_row(score)
    return found


def rows(records: dict[str, Record]) -> list[dict[str, object]]:
    """Return what is recorded as rows for the page."""
    found: list[dict[str, object]] = []
    for name, record in records.items():
        if record.ours is not None:
            verdict = judge(record.ours, record.rivals, cell(name).load)
            scores = {"ours": record.ours} | {score.text: score for score in record.rivals}
            row = {"cell": name, "scores": {who: contest.as_row(score) for who, score in scores.items()}}
            found.append(row | {"ratio": verdict.ratio, "problems": list(verdict.problems)})
    return found


def write(records: dict[str, Record], file: Path = FILE) -> None:
    """Write `gate.json`, or another file of that form, a cell after the other."""
    entries = {
        name: {
            "ours": contest.as_row(record.ours) if record.ours else None,
            "misses": list(record.misses),
            "rivals": [contest.as_row(score) for score in record.rivals],
        }
        for name, record in records.items()
    }
    file.write_text(json.dumps(entries, indent=1) + "\n")


def play(one: Cell) -> Score:
    """Play ours at its defaults."""
    page, says_batch = one.tells
    scene = stage(one.engine, TRAFFIC[one.traffic], one.load, SEEDS)
    return contest.play(TRAFFIC[one.traffic].ours, scene, page, says_batch=says_batch)


def complaints(name: str, score: Score, record: Record) -> list[str]:
    """Return why a cell fails its gate; nothing if it holds."""
    found = judge(score, record.rivals, cell(name).load)
    wrong = []
    if record.ours is not None and score.goodput < record.ours.goodput - SLACK:
        wrong.append(f"goodput fell from {record.ours.goodput:.3f} to {score.goodput:.3f}")
    new = [problem for problem in found.problems if problem.partition(" ")[0] not in record.misses]
    wrong += new
    healed = [miss for miss in record.misses if miss not in missed(found)]
    if healed:
        wrong.append(f"no longer misses {', '.join(healed)}: record it (python -m bench.matrix --gate --record)")
    return wrong


def missed(verdict: Verdict) -> tuple[str, ...]:
    """Return which criteria a verdict says are missed: goodput, refuses, tokens."""
    return tuple(problem.partition(" ")[0] for problem in verdict.problems)
