"""Play cells of the matrix and print one line each.

python -m bench.matrix --cells a100-8b/vllm/standing@120 'step90/*/standing@80' --seeds 1 2
python -m bench.matrix --cells llama-cpp/vllm/standing@120 --contender ours ours,first_byte_probe=true haproxy
python -m bench.matrix --gate             # the cells that `make test` plays, against what is recorded of them
python -m bench.matrix                    # those of chosen.py: `make bench-matrix`
python -m bench.matrix --cells '*'        # all 2,148: a night
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shlex
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

from extproc.simulate.studies.matrix import contest, gate, page
from extproc.simulate.studies.matrix.cells import everything, matching
from extproc.simulate.studies.matrix.chosen import chosen
from extproc.simulate.studies.matrix.contest import FIXED, RIVALS
from extproc.simulate.studies.matrix.runs import Row, play_gate, run

OUT = Path("build/matrix")
SEEDS = (1, 2)


def line(row: Row) -> str:
    """Return a row for people: goodput of each, refused where it is not 0, tokens per second."""
    parts = [f"{row['cell']:<46}"]
    scores: dict[str, Row] = row["scores"]  # type: ignore[assignment]
    for name, score in scores.items():
        own = str(score["text"]).partition(",")[2]
        setting = f" ({own})" if own and "," not in name else ""
        refused = f" ref {score['refused']:.0%}" if float(str(score["refused"])) >= 0.005 else ""
        parts.append(f"{name} {score['goodput']:.3f}{refused} {score['tokens_per_s']:.0f}t/s{setting}")
    if "ratio" in row:
        problems = "; ".join(map(str, row["problems"])) if row["problems"] else "ok"  # type: ignore[call-overload]
        parts.append(f"=> {row['ratio']:.2f} {problems}")
    return " | ".join(parts)


def remembered(seeds: tuple[int, ...]) -> tuple[Path, dict[str, dict[str, Row]]]:
    """Return the rivals' scores of earlier runs with these seeds, by duel, and where they are kept.

    The gate has played its cells with its seeds already.
    """
    path = OUT / f"rivals-{'-'.join(map(str, seeds))}.json"
    known: dict[str, dict[str, Row]] = gate.duels() if seeds == gate.SEEDS else {}
    for duel, scores in (json.loads(path.read_text()) if path.exists() else {}).items():
        known.setdefault(duel, {}).update(scores)
    return path, known


def pass_gate(names: list[str], workers: int, *, record: bool, fresh: bool, to: Path | None) -> int:
    """Play cells of the gate, print them, write them down if asked to, and a page of all `to` a file."""
    known = gate.read()
    tasks = [(name, None if fresh else known.get(name)) for name in names]
    new: dict[str, gate.Record] = {}
    failed = 0
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for name, now, wrong in pool.imap(play_gate, tasks):
            assert now.ours is not None
            before = known[name].ours if name in known else None
            was = "new" if before is None else f"{now.ours.goodput - before.goodput:+.3f}"
            best = contest.best(now.rivals)
            listed = f" misses {', '.join(now.misses)}" if now.misses else ""
            print(
                f"{name:<46} ours {now.ours.goodput:.3f} ({was}) best rival {best.goodput:.3f} ({best.text})"
                f"{listed}{' | FAIL ' + '; '.join(wrong) if wrong else ''}",
                flush=True,
            )
            new[name] = now
            failed += bool(wrong)
    misses = sum(bool(one.misses) for one in new.values())
    print(f"{len(new)} cells: {failed} fail against the record, {misses} miss a criterion")
    both = known | new
    if record:
        gate.write({name: both[name] for name in gate.names() if name in both})
    if to is not None:
        to.write_text(page.of_records(both, gate.read(gate.FURTHER)))
    return 0 if record or not failed else 1


def main() -> int:
    """Do as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="names, or patterns over all (those of chosen.py)")
    parser.add_argument("--contender", nargs="+", default=["ours", *RIVALS, FIXED], metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--traces", type=Path, metavar="DIR", help="Azure's recorded CSVs instead of their fits")
    parser.add_argument("--fresh", action="store_true", help=f"play rivals again; else what {OUT} remembers holds")
    parser.add_argument("--gate", action="store_true", help="play what `make test` plays")
    parser.add_argument("--record", action="store_true", help="with --gate: hold ours against this from now on")
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write a Markdown page of the run")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many; the page says so")
    parser.add_argument("--list", action="store_true", help="print the names of all cells")
    flags = parser.parse_args()
    if flags.list:
        print(*(cell.name for cell in everything()), sep="\n")
        return 0
    if flags.gate:
        wanted = [name for name in gate.names() if any(fnmatchcase(name, like) for like in flags.cells or ["*"])]
        return pass_gate(wanted, flags.workers, record=flags.record, fresh=flags.fresh, to=flags.page)
    try:
        cells = matching(flags.cells or chosen())
    except ValueError as error:
        parser.error(str(error))
    seeds, began = tuple(flags.seeds), time.monotonic()
    path, known = remembered(seeds)
    if flags.fresh or flags.traces:
        known = {}
    by_duel = {cell.name: cell.duel for cell in cells}
    rows = []
    ends = began + 60.0 * flags.minutes
    for row in run(cells, tuple(flags.contender), seeds, flags.workers, flags.traces, known, ends):
        rows.append(row)
        print(line(row), flush=True)
        scores: dict[str, Row] = row["scores"]  # type: ignore[assignment]
        known.setdefault(by_duel[str(row["cell"])], {}).update({n: s for n, s in scores.items() if n in RIVALS})
    OUT.mkdir(parents=True, exist_ok=True)
    if not flags.traces:
        path.write_text(json.dumps(known, indent=0))
    (OUT / ("last.json" if flags.cells else "all.json")).write_text(json.dumps(rows, indent=1))
    if flags.page is not None:
        command = "python -m bench.matrix " + shlex.join(arg for arg in sys.argv[1:])
        played = {row["cell"] for row in rows}
        unplayed = [one.name for one in cells if one.name not in played]
        flags.page.write_text(page.render(rows, seeds, command, unplayed))
    missed = sum(bool(row.get("problems")) for row in rows)
    print(f"{len(rows)} cells in {time.monotonic() - began:.0f} s; {missed} miss")
    return 0


if __name__ == "__main__":
    sys.exit(main())
