"""Writes docs/benchmarks.md, which is short, and docs/benchmarks-details.md with all else, and their plots, from runs.

The front is at most three screens of 1280 by 800: the answer, one table and where ours does not help on the first,
then one picture and a line for each of the pages behind it.

Every figure is computed here, none is typed; sentences that judge are made from comparisons, so a run with other
results writes another page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from bench.proof import gateways_page, losses, peers_page, shapes_page, tables, words
from bench.proof.pictures import draw
from bench.proof.words import SAME, average, collect, label, pick, plain, share, table
from extproc.simulate.contenders import BEST_FIXED
from extproc.simulate.studies import settings
from extproc.simulate.studies.experiments import BY_NAME
from extproc.simulate.studies.figures import LAG_MAX_S, LAG_P99_S, STEP_LAG_S, ratio

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.proof.words import Key, Row
    from extproc.simulate.studies.figures import Figures, Run

HEAD = """\
# Does a queue in front help?

{answer}

Goodput: the share of ALL requests that met the objectives of their class; what was refused, abandoned or failed missed.
± is the standard deviation between {seeds} seeds. Real Envoy {envoy}, HAProxy {haproxy}, sockets and time; simulated
engines: read ratios, not rates. Every rival has the best settings that a search found for it, ours its defaults.
"""
SCEPTIC = """\
## Don't believe it

- `make bench-quick` (4 minutes): one seed, prints its own table and how noisy your machine was.
- Put your own router beside them: [benchmarks-yours.md](benchmarks-yours.md), ten minutes.
- [benchmarks-details.md](benchmarks-details.md): every class, percentile and experiment, how it was measured, what each
  rival was set to and what else was tried. [Hundreds of cells](benchmarks-matrix.md), simulated.
- **Not in it: GPUs.** `make bench-gpu` is for who has one (PyTorch, 8 minutes, no network); it has not run on one yet.
  What a real vLLM says, on a CPU: [vllm.md](vllm.md).
- {noise}
- Written by `make bench`; don't edit. {made}
"""
FRONT = ("least_request", "circuit_breaker", "tuned_engine", "haproxy", "ours")
"""Who is in the table of the front, beside contenders of one's own; the details have all."""
DETAILS = """\
# The benchmark in detail

Written by `make bench` with [benchmarks.md](benchmarks.md), which has the answer; don't edit.
"""
VIRTUAL = """\
## On a virtual clock

The same core and engines without Envoy (`extproc simulate`, and a model of HAProxy): {seconds:g} s of arrivals, of
which the first {warm:g} s don't count, the same seeds. For a second engine, for longer runs, and for sweeps that
would take hours. A100-8B is bound by compute, H100-32B by its KV cache. Empty: not run.
"""
CHECKED = """\
### Does the simulator say the same?

The ramp's real runs beside the same requests on the virtual clock: {apart:.3f} apart in the mean of {count} pairs,
at most {most:.2f} ({who} at {load:.0%}). Real sockets, real scrapes, real HAProxy and a sidecar that shares two
cores with all else are in the first figure and not in the second.
"""
METHOD = """\
- **Open loop.** Requests are sent at their planned time, whatever came of the others, and times count from the
  plan. Poisson arrivals for {end:g} s from an empty system, of which the first {warm:g} s don't count. At {cut:g} s
  what still answers is cut off and judged by its tokens so far; who has no token by then has missed. Load 100 % is
  what the engines finish per second when there is always another request.
- **The same for all.** Seeds {seeds}. All contenders of an experiment, load and seed get the same requests at the
  same moments and run at the same time, each with engines and a front of its own: what the machine does to one it
  does to all. Up to {stacks:g} busy stacks of three engines at once. The sender, alone, may run before all others.
  Nothing was tuned on these seeds.
- **Output tokens** per second: those of each answer, spread evenly from its first to its last token.
- **Not sped up.** The sidecar's time constants are seconds, so engines run at the speed of their preset, H100-32B:
  three per stack, four where one fails. A body has 4 characters per token of its prompt as estimated, which is off
  by 20 % (sigma).
- **Contenders.** Round robin and least request: Envoy with active health checks, and another host after a failed
  connect. Circuit breaker: least request and `max_requests` of 12 per engine. Tuned, no queue: least request over all
  hosts, vLLM's priority scheduling, `max_num_seqs` 12, 503 from the engine above 13. HAProxy: `leastconn`, `maxconn`
  12, priority class by header, `timeout queue` 1.6 s, `abortonclose`, health checks; 12 and 1.6 s were the best of
  all that was tried on seeds 51 to 53 (below). Original: `binding: bound`, 10 requests, 10 s, a scrape every 30 s,
  gauges only, nobody refused. Ours: `enable_queue: true` and the classes with their budgets (TTFT objective less 0.4
  s); not a number that describes the engine. For A100-8B the rivals' number is 96 (and 14 more for the tuned stack's
  own queue), for conversations 6 and 56: each the best found on those seeds.
- HAProxy has one `timeout queue` for all classes, as Debian's 2.6 wants it. From 3.4 on each class can have its own:
  measured, with a real search, in [benchmarks-peers.md](benchmarks-peers.md). The numbers of HAProxy here, and of the
  tuned stack, are the best in the simulator, not of real sweeps.
- **Not in it:** GPUs, networks, retries after a refusal, several sidecars ([replicas.md](replicas.md)); `smg` and
  `vllm-router` have a page of their own, [benchmarks-peers.md](benchmarks-peers.md) (`make bench-peers`).
"""


TRIED = """\
Each searched over the whole grid, simulated at 90, 120 and 150 % load on seeds 51 to 53, one setting for all loads; the
figure is its mean goodput. `python -m bench.proof.settings`; all that was tried: simulate/studies/settings.json.
"""


@dataclass(frozen=True, slots=True)
class Written:
    """What came of it: the expectations, whether each held, and the texts of the two pages."""

    expectations: list[tuple[bool, str]]
    text: str
    details: str


def noise(runs: Sequence[Run]) -> str:
    """Return how late the sender and the engines were, in one line: what the machine adds to every figure."""
    lags, worst, steps = zip(*((*run.lag, run.step_lag_s) for run in runs), strict=True) if runs else ((0,), (0,), (0,))
    bad = sum(bool(run.problem()) for run in runs)
    late = " / ".join(f"{max(values) * 1000:.0f}" for values in (lags, worst, steps))
    return (
        f"The machine: sender late by p99 / most, an engine's step by most, of the worst run: {late} ms; "
        f"{bad} of {len(runs)} runs rejected for that."
    )


def write(runs: Sequence[Run], rows: Sequence[Row], facts: Row, docs: Path) -> Written:
    """Write the page and its plots under `docs`."""
    found = collect(runs)
    pictures = docs / "benchmarks"
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.svg"):
        old.unlink()
    drawn = draw(found, rows)
    for name, svg in drawn.items():
        (pictures / f"{name}.svg").write_text(svg)
    expectations = [*expected(found), *simulated(rows)]
    kinds = shapes_page.rows(docs)
    missed = [sentence for holds, sentence in expectations if not holds]
    front = [*_head(found, facts, docs), *tables.ramp(found, among=FRONT, by_class=False)]
    front += ["## Where it does not help", "", *losses.short(found, missed, kinds), ""]
    front += [*_picture("ramp", "Goodput over load", drawn), *_elsewhere(found, kinds, docs)]
    front += [SCEPTIC.format(noise=noise(runs), made=words.made(runs, facts, rows))]
    details = [DETAILS, *_classes(), *_answer(found, expectations), *_why(rows), "", *words.pieced(facts)]
    details += [*_ramp(found, drawn), *_others(found, drawn), *_virtual(found, rows, facts, drawn)]
    details += [*losses.full(found, rows), *_method(runs, facts), "", *_tried()]
    details += shapes_page.settings(kinds)
    texts = {"benchmarks.md": front, "benchmarks-details.md": details}
    for name, parts in texts.items():
        (docs / name).write_text("\n".join(parts).rstrip() + "\n")
    return Written(expectations, *((docs / name).read_text() for name in texts))


def expected(found: dict[Key, Figures]) -> list[tuple[bool, str]]:
    """Return what was expected of the ramp, and whether it held."""
    checks = []
    for other, factor in (("least_request", 2.5), ("tuned_engine", 1.1), ("haproxy", 1.1)):
        ours, theirs = found.get(("ramp", 1.2, "ours")), found.get(("ramp", 1.2, other))
        if ours is not None and theirs is not None:
            mine, other_one = ours.all.goodput, theirs.all.goodput
            times = mine / other_one if other_one else math.inf
            text = f"120 % load: {share(mine)} against {share(other_one)} of {plain(other)}, {times:.2f} times"
            checks.append((times >= factor, f"{text} ({factor:g} expected)"))
    ours = found.get(("ramp", 0.7, "ours"))
    others = [one for key, one in found.items() if key[:2] == ("ramp", 0.7) and key[2] != "ours"]
    if ours is not None and others:
        best = max(others, key=lambda one: one.all.goodput)
        text = f"70 % load: {share(ours.all.goodput)} against {share(best.all.goodput)} of {plain(best.contender)}"
        holds = ours.all.goodput >= best.all.goodput - SAME
        checks.append((holds, f"{text}, the best other (no worse expected)"))
    return checks


def simulated(rows: Sequence[Row]) -> list[tuple[bool, str]]:
    """Return what was expected at 120 %, for the preset that has no real runs, and whether it held."""
    checks = []
    for preset in dict.fromkeys(row["preset"] for row in rows):
        here = pick(rows, kind="sweep", preset=preset, experiment="ramp", load=1.2)
        if preset == BY_NAME["ramp"].preset or not here:
            continue
        ours = average(here, "ours")
        for other, factor in (("least_request", 2.5), ("tuned_engine", 1.1), ("haproxy", 1.1)):
            theirs = average(here, other)
            text = f"{preset}, simulated, 120 % load: {share(ours)} against {share(theirs)} of {plain(other)}"
            checks.append((ours >= factor * theirs, f"{text}, {ours / theirs:.2f} times ({factor:g} expected)"))
    return checks


def _why(rows: Sequence[Row]) -> list[str]:
    """Say what of the distance to HAProxy is the limit: ours with HAProxy's own number."""
    parts = []
    for preset in dict.fromkeys(row["preset"] for row in rows):
        here = pick(rows, kind="sweep", preset=preset, experiment="limits", load=1.2)
        limit = BEST_FIXED[preset]
        fixed, theirs = (average(here, f"{who}={limit}") for who in ("ours,max_running_requests", "haproxy,limit"))
        if not math.isnan(fixed + theirs):
            parts.append(
                f"- What the number is worth: HAProxy with the best fixed limit for {preset}, {limit}, has "
                f"{share(theirs)} at 120 % (simulated), ours with that same number {share(fixed)}, ours without any "
                f"{share(average(here, 'ours'))}."
            )
    return parts


def _head(found: dict[Key, Figures], facts: Row, docs: Path) -> list[str]:
    versions = facts["versions"]
    text = HEAD.format(
        answer=" ".join([*_verdict(found), *peers_page.best(docs)]),
        seeds=len(facts["seeds"]),
        envoy=versions.get("Envoy", "unknown"),
        haproxy=versions.get("HAProxy", "(not installed: left out)").partition("-")[0],
    )
    return [text]


def _verdict(found: dict[Key, Figures]) -> list[str]:
    """Return the answer in a sentence or two: against the best other, at the ramp's loads around 100 %."""
    told = []
    for load in (1.2, 0.7):
        ours = found.get(("ramp", load, "ours"))
        others = [one for key, one in found.items() if key[:2] == ("ramp", load) and not key[2].startswith("ours")]
        if ours is None or not others:
            continue
        best = max(others, key=lambda one: one.all.goodput)
        gain = ours.all.goodput - best.all.goodput
        verdict = "Yes" if gain >= 0.05 else "A little" if gain >= SAME else "It is worse" if gain < -SAME else "No"
        figures = f"{share(ours.all.goodput)} against {share(best.all.goodput)} of {plain(best.contender)}"
        told.append(f"**{verdict}** at {load:.0%} load: {figures}, the best other.")
    return told


def _elsewhere(found: dict[Key, Figures], kinds: Sequence[Row], docs: Path) -> list[str]:
    """Return a line for each question that has a page of its own, and the ramp seed by seed."""
    parts = ["## And elsewhere?", "", *_paired(found), *peers_page.short(docs), *shapes_page.summary(kinds)]
    return [*parts, *gateways_page.short(docs), ""]


def _classes() -> list[str]:
    rows = [
        [k.name, f"{k.share:.0%}", f"{k.ttft_s:g} s", f"{k.tpot_s * 1000:g} ms", f"{k.patience_s:g} s"]
        for k in BY_NAME["ramp"].workload.classes
    ]
    return ["The standing mix:", "", *table(["class", "of requests", "TTFT", "TPOT", "client leaves after"], rows)]


def _tried() -> list[str]:
    """Say what the rivals of the real runs were set to, and out of what."""
    parts = ["## What the rivals are set to", "", TRIED]
    lines = []
    for preset, rivals in settings.recorded().items():
        for rival, found in rivals.items():
            scores = sorted(found["tried"].items(), key=lambda item: -item[1])
            best = ", ".join(f"{text.partition(',')[2]} {share(value)}" for text, value in scores[:3])
            lines.append([preset, label(rival), found["won"].partition(",")[2], str(len(scores)), best])
    return [*parts, *table(["engine", "", "best settings", "tried", "the first three"], lines)]


def _answer(found: dict[Key, Figures], expectations: Sequence[tuple[bool, str]]) -> list[str]:
    missed = ": **missed**, [how much there is to be had](benchmarks-ceiling.md)"
    parts = ["What was expected of it beforehand:", ""]
    parts += [f"- {sentence}{'' if holds else missed}." for holds, sentence in expectations]
    return [*parts, *_paired(found)]


def _paired(found: dict[Key, Figures]) -> list[str]:
    ours = found.get(("ramp", 1.2, "ours"))
    if ours is None:
        return []
    told = []
    for other in ("least_request", "tuned_engine", "haproxy"):
        theirs = found.get(("ramp", 1.2, other))
        if theirs is not None:
            middle, least = ratio(ours, theirs)
            told.append(f"{middle:.2f} times {plain(other)} (the least seed {least:.2f})")
    return [f"- Seed by seed, with the same requests, at 120 %: {', '.join(told)}."]


def _picture(name: str, text: str, drawn: dict[str, str]) -> list[str]:
    return [f"![{text}](benchmarks/{name}.svg)", ""] if name in drawn else []


def _ramp(found: dict[Key, Figures], drawn: dict[str, str]) -> list[str]:
    parts = ["## Overload ramp", "", *_picture("ramp", "Goodput over load", drawn)]
    parts += [*_picture("classes", "Goodput by class", drawn), "Goodput (int/std/batch):", "", *tables.ramp(found)]
    for load in sorted({key[1] for key in found if key[0] == "ramp"}):
        some = [one for key, one in found.items() if key[:2] == ("ramp", load)]
        parts += [f"<details><summary>All figures at {load:.0%}</summary>", "", *tables.details(some), "</details>", ""]
    return parts


def _others(found: dict[Key, Figures], drawn: dict[str, str]) -> list[str]:
    parts = ["## When something is wrong", "", *_picture("experiments", "Goodput", drawn)]
    for name, experiment in BY_NAME.items():
        some = [one for key, one in found.items() if key[0] == name]
        if name != "ramp" and some:
            parts += [f"### {experiment.title}", "", tables.NOTES[name], "", *tables.experiment(name, some)]
    return parts


def _virtual(found: dict[Key, Figures], rows: Sequence[Row], facts: Row, drawn: dict[str, str]) -> list[str]:
    swept = pick(rows, kind="sweep")
    if not swept:
        return []
    parts = [VIRTUAL.format(seconds=facts["virtual_s"], warm=min(60.0, facts["virtual_s"] / 5))]
    for preset in dict.fromkeys(row["preset"] for row in swept):
        some = pick(swept, preset=preset)
        parts += [f"### {preset}", "", *tables.again(some)]
        parts += ["Load of conversations in % of what engines do without prefix caches:", "", *tables.sessions(some)]
        parts += [*_picture(f"limits-{preset}", "A fixed limit", drawn), *tables.limits(some), *tables.telemetry(some)]
    pairs = tables.pairs(found, rows)
    if pairs:
        load, who, real, simulated = max(pairs, key=lambda pair: abs(pair[2] - pair[3]))
        apart = mean(abs(one - other) for _, _, one, other in pairs)
        most = abs(real - simulated)
        parts.append(CHECKED.format(apart=apart, count=len(pairs), most=most, who=plain(who), load=load))
        parts += tables.compared(pairs)
    return parts


# ---- method


def _method(runs: Sequence[Run], facts: Row) -> list[str]:
    warm, end, cut = facts["times"]
    rejected = [run for run in runs if run.problem()]
    kept = [run for run in runs if not run.problem()]
    parts = ["## How it was measured", ""]
    if kept:
        lags = (max(run.lag[0] for run in kept), max(run.lag[1] for run in kept), max(run.step_lag_s for run in kept))
        allowed = " / ".join(f"{value * 1000:.0f}" for value in (LAG_P99_S, LAG_MAX_S, STEP_LAG_S))
        worst = " / ".join(f"{value * 1000:.0f}" for value in lags)
        parts.append(
            f"- **Rejection.** A run counts if the sender's lag (p99 / maximum) and the worst lag of an engine's "
            f"step stay under {allowed} ms, and nothing of the stack was missing. {len(runs)} real runs, "
            f"{len(rejected)} rejected and left out; the worst of those that count: {worst} ms."
        )
    parts += [f"  - rejected: {r.experiment} {r.load:.0%} #{r.seed} {r.contender}: {r.problem()}" for r in rejected]
    seeds = ", ".join(map(str, facts["seeds"]))
    parts.append(METHOD.format(warm=warm, end=end, cut=cut, seeds=seeds, stacks=facts["stacks"]).rstrip())
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts.append(
        f"- `{facts['command']}` on {facts['machine']}; {versions}. Every request of every run: build/bench/runs."
    )
    return parts
