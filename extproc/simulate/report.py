"""What came of it: figures per contender and load, as a text table and as one HTML file without scripts.

Pure functions of runs. Goodput counts ALL arrivals: a refused, abandoned or failed request missed its objectives.
Latency percentiles are of the requests that were answered, so read them beside the refusals.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from math import isnan
from statistics import mean, stdev
from typing import TYPE_CHECKING, Protocol

from extproc.simulate import plots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from extproc.simulate.workload import Klass
    from extproc.simulate.world import Run

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Line:
    """One class of one contender, or all classes together (`klass` is "all"). Times in seconds, shares 0..1."""

    klass: str
    arrivals: int
    goodput: float
    refused: float
    abandoned: float
    failed: float
    ttft: tuple[float, float, float]  # p50, p95, p99
    tpot: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender at one load, all seeds together.

    Attributes:
        spread: standard deviation of goodput between seeds; nan with one seed.
        tokens_per_s: output tokens of all engines while requests arrived.
        wasted: tokens computed for clients that left, as a share of the output tokens.
        fairness: Jain's index of the tenants' goodputs; 1 is equal.
        hits: share of prompt tokens found in prefix caches.
        time_to_refusal: p50 and p95 of how long a refused client had waited.
    """

    contender: str
    load: float
    seeds: int
    lines: tuple[Line, ...]
    spread: float
    tokens_per_s: float
    wasted: float
    fairness: float
    hits: float
    preemptions: int
    time_to_refusal: tuple[float, float]

    @property
    def all(self) -> Line:
        """Return the line of all classes together."""
        return self.lines[-1]

    def of(self, klass: str) -> Line:
        """Return the line of a class."""
        return next(line for line in self.lines if line.klass == klass)


def figures(runs: Sequence[Run]) -> Figures:
    """Put the runs of one contender at one load together."""
    records = [record for run in runs for record in run.records]
    seconds = sum(run.duration_s for run in runs)
    generated = sum(run.generated for run in runs)
    each = [goodput(run.records) for run in runs]
    refusals = [r.ended_s for r in records if r.outcome not in ("finished", "abandoned", "failed")]
    return Figures(
        contender=runs[0].contender,
        load=runs[0].load,
        seeds=len(runs),
        lines=(
            *(line(name, [record for record in records if record.klass == name]) for name in runs[0].classes),
            line("all", records),
        ),
        spread=stdev(each) if len(each) > 1 else NAN,
        tokens_per_s=generated / seconds if seconds else NAN,
        wasted=sum(run.wasted for run in runs) / generated if generated else 0.0,
        fairness=jain(
            [
                goodput(r for r in records if r.tenant == tenant)
                for tenant in dict.fromkeys(record.tenant for record in records)
            ]
        ),
        hits=mean(run.hits for run in runs),
        preemptions=sum(run.preemptions for run in runs),
        time_to_refusal=(percentile(refusals, 0.5), percentile(refusals, 0.95)),
    )


class Judged(Protocol):
    """One request that is over, or was cut off; simulated or real."""

    @property
    def outcome(self) -> str:
        """finished, running (when it was cut off), abandoned, failed; anything else is a refusal."""

    @property
    def met(self) -> bool:
        """Whether it met both objectives."""

    @property
    def ttft_s(self) -> float | None:
        """Until its first token."""

    @property
    def tpot_s(self) -> float | None:
        """For each token after that."""


def goodput(records: Iterable[Judged]) -> float:
    """Return the share of requests that met both objectives; nan of none."""
    met = [record.met for record in records]
    return sum(met) / len(met) if met else NAN


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value that `share` of the values don't exceed; nan of none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else NAN


def jain(values: Iterable[float]) -> float:
    """Return Jain's fairness index: 1 when all are equal, 1/n when one has everything."""
    shares = list(values)
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else NAN


def line(klass: str, records: Sequence[Judged]) -> Line:
    """Return the figures of some requests."""
    count = max(len(records), 1)
    refused = sum(r.outcome not in ("finished", "running", "abandoned", "failed") for r in records)
    ttft = [record.ttft_s for record in records if record.ttft_s is not None]
    tpot = [record.tpot_s for record in records if record.tpot_s is not None]
    return Line(
        klass=klass,
        arrivals=len(records),
        goodput=goodput(records),
        refused=refused / count,
        abandoned=sum(r.outcome == "abandoned" for r in records) / count,
        failed=sum(r.outcome == "failed" for r in records) / count,
        ttft=(percentile(ttft, 0.5), percentile(ttft, 0.95), percentile(ttft, 0.99)),
        tpot=(percentile(tpot, 0.5), percentile(tpot, 0.95), percentile(tpot, 0.99)),
    )


# ---- text


def objectives(klass: Klass) -> str:
    """Return what requests of a class are judged by, in a sentence."""
    return (
        f"{klass.name}: judged by a first token in {klass.ttft_s:g} s and {klass.tpot_s * 1000:g} ms a token after it; "
        f"its budget in our queue is {klass.budget_s:g} s, and its clients leave after {klass.patience_s:g} s"
    )


HEADINGS = (
    *("contender", "class", "requests", "goodput", "refused", "left"),
    *("TTFT p50", "p95", "p99 s", "TPOT p50", "p95", "p99 ms", "tok/s", "wasted", "fair"),
)


def table(results: Sequence[Figures]) -> str:
    """Return a table, a block per load, a line per contender and class."""
    blocks = []
    for load in dict.fromkeys(result.load for result in results):
        rows: list[Sequence[str]] = [HEADINGS]
        for result in results:
            if result.load == load:
                rows += _rows(result)
        blocks.append(f"load {load:.0%} of what the engines can do\n{_align(rows)}")
    return "\n\n".join(blocks)


def _rows(result: Figures) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    several = len(result.lines) > 2
    for line in (result.all, *(result.lines[:-1] if several else ())):
        together = line is result.all
        spread = f" ±{result.spread:.3f}" if together and not isnan(result.spread) else ""
        rows.append(
            (
                result.contender if together else "",
                line.klass,
                str(line.arrivals),
                f"{line.goodput:.3f}{spread}",
                f"{line.refused:.1%}",
                f"{line.abandoned + line.failed:.1%}",
                *(_seconds(value) for value in line.ttft),
                *(_milliseconds(value) for value in line.tpot),
                f"{result.tokens_per_s:.0f}" if together else "",
                f"{result.wasted:.1%}" if together else "",
                f"{result.fairness:.2f}" if together else "",
            )
        )
    return rows


def _seconds(value: float) -> str:
    return "-" if isnan(value) else f"{value:.2f}"


def _milliseconds(value: float) -> str:
    return "-" if isnan(value) else f"{value * 1000:.0f}"


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def verdict(results: Sequence[Figures]) -> str:
    """Return a sentence per load: would ours help?"""
    sentences = []
    for load in dict.fromkeys(result.load for result in results):
        here = [result for result in results if result.load == load]
        ours = [result for result in here if result.contender.startswith("ours")]
        others = [result for result in here if not result.contender.startswith("ours")]
        if not ours or not others:
            continue
        mine, best = (max(group, key=lambda result: result.all.goodput) for group in (ours, others))
        gain = mine.all.goodput - best.all.goodput
        what = f"{mine.contender} {mine.all.goodput:.3f}, the best other ({best.contender}) {best.all.goodput:.3f}"
        if abs(gain) < 0.01:
            word = "no difference"
        else:
            word = f"{gain:+.3f}" if gain < 0 or not best.all.goodput else f"{mine.all.goodput / best.all.goodput:.2f}x"
        sentences.append(f"load {load:.0%}: goodput of {what}: {word}")
    return "\n".join(sentences)


# ---- HTML

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
td, th { padding: .2em .6em; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child, td:nth-child(2) { text-align: left; }
svg { max-width: 100%; height: auto; margin: 1em 0; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } td, th { border-color: #444; } }
"""


def page(results: Sequence[Figures], title: str, command: str, classes: Sequence[Klass] = ()) -> str:
    """Return a self-contained HTML page: the verdict, plots as inline SVG, the table, and the command."""
    loads = list(dict.fromkeys(result.load for result in results))
    plots = [_curves(results)] if len(loads) > 1 else []
    for load in loads:
        plots.append(_bars(results, load, "Goodput by class", lambda line: line.goodput))
        plots.append(_bars(results, load, "TTFT p95 by class, seconds", lambda line: line.ttft[1]))
        plots.append(_bars(results, load, "TPOT p95 by class, seconds", lambda line: line.tpot[1]))
        plots.append(_bars(results, load, "Share refused by class", lambda line: line.refused))
    tables = []
    for load in loads:
        rows = [row for result in results if result.load == load for row in _rows(result)]
        head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADINGS)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        tables.append(f"<h2>Load {load:.0%}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    sentences = "".join(f"<p>{html.escape(line)}</p>" for line in verdict(results).splitlines())
    judged = "".join(f"<p>{html.escape(objectives(klass))}</p>" for klass in classes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{sentences}
{judged}
{"".join(plots)}
{"".join(tables)}
<p>Goodput: the share of all requests that met the objectives of their class for the first token (TTFT) and the time per
output token (TPOT); a refused, abandoned or failed one did not. Percentiles are of the answered ones.
Simulated engines, calibrated by arithmetic and not on a GPU: read ratios, not absolute rates.</p>
<p>Made by <code>{html.escape(command)}</code></p>
</body></html>
"""


def _bars(results: Sequence[Figures], load: float, title: str, value: Callable[[Line], float]) -> str:
    """Draw one figure of each class: a group of bars per contender, on a scale from 0."""
    groups = {
        result.contender[:28]: {line.klass: (value(line), NAN) for line in result.lines}
        for result in results
        if result.load == load
    }
    known = [height for group in groups.values() for height, _ in group.values() if not isnan(height)]
    return plots.bars(f"{title} at {load:.0%} load", groups, top=max([*known, 1e-9]))


def _curves(results: Sequence[Figures]) -> str:
    """Draw goodput over load: a curve per contender."""
    lines: dict[str, list[plots.Point]] = {}
    for result in sorted(results, key=lambda result: result.load):
        lines.setdefault(result.contender, []).append((result.load, result.all.goodput, result.spread))
    return plots.curves("Goodput over load, all classes", lines, x_label="load")
