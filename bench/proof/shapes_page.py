"""What the pages say of other kinds of engine, from the rows that shapes.py wrote: docs/benchmarks/shapes.json.

python -m bench.proof.shapes_page      # docs/benchmarks-shapes.md, from that file
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

from bench.proof import words
from extproc.simulate.studies.commit import UNKNOWN
from extproc.simulate.studies.shapes import SHAPES

if TYPE_CHECKING:
    from collections.abc import Sequence

Row = dict[str, Any]
FILE = "benchmarks/shapes.json"
LOST = 0.05
"""From which share of its output tokens on a loss is told."""
TRAFFIC = {
    "standing": "the standing mix",
    "prefix": "... + a system prompt of 3,000",
    "azure-conv": "Azure, conversation",
    "azure-code": "Azure, code",
    "long": "prompts of 16,000",
}
HEAD = """\
## Other engines, other traffic

Simulated, the engines' constants fitted to published kernel times, {seeds} seeds; the rivals searched anew for every
row (`python -m bench.proof.shapes`, {dates}). Ours does not know the engine.
"""


ALONE = """\
# Other engines, recorded traffic

Written by `python -m bench.proof.shapes_page`; don't edit. Share of ALL requests that met their objectives, simulated
(`extproc simulate`'s engines, the real core). Bold: the best, and what is within .01 of it. Azure's traffic is the
recorded hour of 2023 of each service, cut into five parts, arrivals as recorded and scaled to the load; get
`azure_conv.csv` and `azure_code.csv` from
[AzurePublicDataset](https://github.com/Azure/AzurePublicDataset) (CC-BY 4.0; Patel et al., Splitwise, ISCA 2024).
Mooncake's, BurstGPT's and ServeGen's forms are read as well: [simulate.md](simulate.md).
"""


def main() -> int:
    """Write the page."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    kinds = rows(docs)
    losing = ["## Where it does not help", "", *losses(kinds), ""]
    parts = [ALONE, *table(kinds), *losing, "## What the rivals were set to", "", *settings(kinds)]
    (docs / "benchmarks-shapes.md").write_text("\n".join(parts).rstrip() + "\n")
    return 0


def rows(docs: Path) -> list[Row]:
    """Return what was played; nothing if the file is not there."""
    path = docs / FILE
    return json.loads(path.read_text()) if path.exists() else []


def name(share: Row) -> str:
    """Return a contender without its settings."""
    return str(share["text"]).partition(",")[0]


def middle(share: Row) -> float:
    """Return its goodput, 0..1."""
    return mean(share["goodput"])


def best_rival(row: Row) -> Row:
    """Return the strongest of a row but ours."""
    return max((one for one in row["shares"] if name(one) != "ours"), key=middle)


def ours(row: Row) -> Row:
    """Return ours."""
    return next(one for one in row["shares"] if name(one) == "ours")


def table(kinds: Sequence[Row]) -> list[str]:
    """Return goodput of all in every row."""
    if not kinds:
        return []
    names = [name(one) for one in kinds[0]["shares"]]
    lines = []
    for row in kinds:
        shares = {name(one): one for one in row["shares"]}
        top = max(map(middle, shares.values()))
        cells = [_cell(shares[who], top) for who in names]
        lines.append([SHAPES[row["engine"]], TRAFFIC[row["traffic"]], f"{row['load']}%", *cells])
    seeds = len(kinds[0]["shares"][0]["goodput"])
    dates = " and ".join(sorted({f"{row['date']}, {row.get('commit', UNKNOWN)}" for row in kinds}))
    return [
        HEAD.format(seeds=seeds, dates=dates),
        *words.table(["engine", "traffic", "load", *map(words.label, names)], lines),
    ]


def _cell(share: Row, top: float) -> str:
    text = f"{words.share(middle(share), 2)}{_spread(share['goodput'])}"
    return f"**{text}**" if middle(share) >= top - words.SAME else text


def _spread(values: Sequence[float]) -> str:
    return words.plus_minus(stdev(values)) if len(values) > 1 else ""


def losses(kinds: Sequence[Row]) -> list[str]:
    """Return the rows where a rival with its number is better, or as good under overload; and tokens that were lost."""
    parts = []
    for row in kinds:
        mine, best = ours(row), best_rival(row)
        gain = middle(mine) - middle(best)
        where = f"{SHAPES[row['engine']]}, {TRAFFIC[row['traffic']]}, {row['load']}%"
        if gain < -words.SAME or (gain < words.SAME and row["load"] > 100):
            word = "is worse" if gain < -words.SAME else "gains nothing"
            rival = f"{words.plain(name(best))} ({best['text'].partition(',')[2] or 'no settings'})"
            figures = f"{words.share(middle(mine))} against {words.share(middle(best))} of {rival}"
            parts.append(f"- Simulated, {where}: {word}, {figures}.")
        most = max(row["shares"], key=_tokens_per_s)
        lost = 1 - _tokens_per_s(mine) / _tokens_per_s(most)
        if lost > LOST:
            parts.append(f"- Simulated, {where}: {lost:.0%} fewer output tokens than {words.plain(name(most))}.")
    return parts


def as_good(kinds: Sequence[Row]) -> list[str]:
    """Return one line: where a rival with its number is as good under overload, or better."""
    found: dict[str, list[str]] = defaultdict(list)
    rivals: dict[str, None] = {}
    for row in kinds:
        mine, best = ours(row), best_rival(row)
        if middle(mine) - middle(best) < words.SAME and row["load"] > 100:
            rivals[words.plain(name(best))] = None
            figures = f"{words.share(middle(mine), 2)} and {words.share(middle(best), 2)}"
            found[SHAPES[row["engine"]]].append(f"{TRAFFIC[row['traffic']]} {figures}")
    told = "; ".join(f"{engine} ({', '.join(some)})" for engine, some in found.items())
    return [f"- As good with the right number, overloaded, simulated, {' or '.join(rivals)}: {told}."] if told else []


def tokens(kinds: Sequence[Row]) -> list[str]:
    """Say how many output tokens are lost at most, and in how many rows they are many."""
    lost = []
    for row in kinds:
        mine, most = ours(row), max(row["shares"], key=_tokens_per_s)
        share = 1 - _tokens_per_s(mine) / _tokens_per_s(most)
        if share > LOST:
            where = f"{SHAPES[row['engine']]}, {TRAFFIC[row['traffic']]}, {row['load']}%"
            lost.append((share, f"{share:.0%} than {words.plain(name(most))} simulated ({where})"))
    often = f"over {LOST:.0%} in {len(lost)} of [{len(kinds)} rows](benchmarks-shapes.md)"
    return [f"up to {max(lost)[1]}, {often}"] if lost else []


def _tokens_per_s(share: Row) -> float:
    return mean(share["tokens_per_s"])


def summary(kinds: Sequence[Row]) -> list[str]:
    """Return one line: how ours fares over all rows."""
    if not kinds:
        return []
    top = sum(middle(ours(row)) >= middle(best_rival(row)) - words.SAME for row in kinds)
    over = [row for row in kinds if row["load"] > 100]
    times = sorted(middle(ours(row)) / middle(best_rival(row)) for row in over)
    text = (
        f"- {len({row['engine'] for row in kinds})} engines, standing, recorded and long traffic, simulated: ours is "
    )
    text += f"the best or within {words.share(words.SAME, 2)} of it in {top} of {len(kinds)} rows"
    if times:
        text += (
            f"; overloaded, {times[0]:.2f} to {times[-1]:.2f} times the best rival, {median(times):.2f} in the middle"
        )
    return [f"{text}. [All rows](benchmarks-shapes.md), the rivals searched anew for each."]


def settings(kinds: Sequence[Row]) -> list[str]:
    """Return which settings won in every row, and out of how many."""
    if not kinds:
        return []
    lines = [
        [
            SHAPES[row["engine"]],
            TRAFFIC[row["traffic"]],
            f"{row['load']}%",
            *(f"{one['text'].partition(',')[2]}; tried {one['tried']}" for one in row["shares"] if one["tried"] > 1),
        ]
        for row in kinds
    ]
    names = [words.label(name(one)) for one in kinds[0]["shares"] if one["tried"] > 1]
    return ["The same for the other engines:", "", *words.table(["engine", "traffic", "load", *names], lines)]


if __name__ == "__main__":
    sys.exit(main())
