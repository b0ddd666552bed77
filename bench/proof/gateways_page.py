"""Writes the page of `make bench-replicas`: every figure in it is computed here, none is typed."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from statistics import mean
from typing import TYPE_CHECKING, Any

from bench.proof import gateways, words
from bench.proof.gateways import FAULT_AT_S
from bench.proof.tables import goodput as with_spread
from bench.proof.words import by_class, collect, seconds, share, table
from extproc.simulate.report import goodput
from extproc.simulate.studies.commit import UNKNOWN
from extproc.simulate.studies.experiments import BY_NAME, SEVERAL
from extproc.simulate.studies.figures import ratio

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.proof.words import Key, Row
    from extproc.simulate.studies.figures import Figures, Run

FILE = "benchmarks/gateways.json"
"""Under docs/: what the front page says of it."""
AFTER_S = 15.0
"""How long after a fault goodput is told apart."""
HEAD = """\
# Several gateways: what they lose, and what forwarding costs

Written by `make bench-replicas`; don't edit. Run: {called} on {machine}; {versions}.

The method is that of
[benchmarks.md](benchmarks.md): real Envoy, simulated engines in real time, the same seeded requests for all; here each
request goes to one of the gateways at random. Every gateway is an Envoy with a sidecar of its own; where they share, a
real {store} tells who is alive. {all} runs, {rejected} rejected and left out. How it works: [replicas.md](replicas.md).
"""
FORWARDING = """\
Sidecars' processes on loopback, without Envoy (`python -m bench.replicas`), the leader with a core of its own, all
followers on the other. It is what `replicas` adds: a request's offer, decision and release, and at the leader the
admission core. One leader carried {most:,.0f} requests a second. Of {of}.
"""
SAYS = {
    "gateways": """\
Three engines of the preset h100-32b, {load} load, limits learned.
""",
    "gateways_faults": """\
The same engines and requests, other runs. The leader is killed {at:.0f} s after the start and is back {restart:.0f} s
later; the store is killed at the same moment and is back, empty, {gone:.0f} s later. Requests count that arrive from
{begin:.0f} to {end:.0f} s. *After the fault*, for all rows: goodput of what arrived in the {after:.0f} s from then.
""",
    "gateways_fixed": """\
Three engines of the preset a100-8b, {load} load, `max_running_requests: 96`. *Held*: the most that one engine ever ran
and the most that it ever queued, by its own count, together; they need not have been at one moment.
""",
}


def write(runs: Sequence[Run], forwarding: Sequence[Row], facts: Row, docs: Path) -> Path:
    """Write the page into `docs`; return where it is."""
    found = collect(runs)
    rejected = [run for run in runs if run.problem()]
    store = (gateways.STORE or "store").rpartition("/")[2]
    facts = facts | {
        "called": words.called(facts),
        "versions": words.versions(facts, without=["HAProxy"]),
        "store": {"redis-server": "Redis", "valkey-server": "Valkey"}.get(store, store),
        "all": len(runs),
        "rejected": len(rejected),
    }
    parts = [HEAD.format(**facts)]
    parts += [
        f"- rejected: {run.experiment} {run.load:.0%} #{run.seed} {run.contender}: {run.problem()}" for run in rejected
    ]
    parts += [""] if rejected else []
    parts += words.pieced(facts)
    for one in SEVERAL:
        some = {key: figures for key, figures in found.items() if key[0] == one.name}
        if some:
            load = "/".join(f"{load:.0%}" for load in one.loads)
            begin, end = facts["times"][:2]
            says = SAYS[one.name].format(
                load=load,
                at=FAULT_AT_S,
                restart=gateways.RESTART_S,
                gone=gateways.STORE_GONE_S,
                begin=begin,
                end=end,
                after=AFTER_S,
            )
            parts += [f"## {one.title}", "", says, *mixed(facts.get("pieces", ()), one.name)]
            parts += [*goodputs(some, runs), *costs(some)]
    if forwarding:
        parts += forwarded(forwarding)
    path = docs / "benchmarks-replicas.md"
    (docs / FILE).parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts).rstrip() + "\n")
    (docs / FILE).write_text(json.dumps(_front(found, runs), indent=1) + "\n")
    return path


def short(docs: Path) -> list[str]:
    """Return a line for the front page, of what `write` left in `docs`; nothing where it never ran."""
    if not (docs / FILE).exists():
        return []
    found = json.loads((docs / FILE).read_text())
    told = "; ".join(f"{who} {share(value)}" for who, value in found["goodput"].items())
    where = f"{found['load']:.0%} load, {found['seeds']} seeds, commit {' and '.join(found['commits'])}"
    return [f"- Several gateways ({where}): {told}. [With faults](benchmarks-replicas.md)."]


def _front(found: dict[Key, Figures], runs: Sequence[Run]) -> dict[str, Any]:
    """Return what `short` tells of the first experiment: learned limits, no fault."""
    first = SEVERAL[0]
    some = {key: found[key] for key in sorted((key for key in found if key[0] == first.name), key=_place)}
    return {
        "load": first.loads[0],
        "seeds": max((len(one.seeds) for one in some.values()), default=0),
        "commits": sorted({run.commit or UNKNOWN for key in some for run in _of(runs, key)}),
        "goodput": {called(who).replace("*", ""): round(one.all.goodput, 4) for (_, _, who), one in some.items()},
    }


def mixed(pieces: Sequence[Row], name: str) -> list[str]:
    """Say which seeds of a table are of which commit, and beside what they ran, where that differs."""
    seeds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for piece in pieces:
        if name in piece["experiments"]:
            seeds[piece["commit"], piece["note"]] += piece["seeds"]
    if len(seeds) < 2:
        return []
    told = [
        f"seeds {', '.join(map(str, some))} are of commit {commit}, run beside {note or 'nothing that is known'}"
        for (commit, note), some in seeds.items()
    ]
    return [f"Not all of one kind: {'; '.join(told)}.", ""]


def called(contender: str) -> str:
    """Return what a contender is called in a table."""
    among = gateways.among(contender.split(",")[1:])
    if among.count == 1:
        return "one"
    if not among.shares:
        return f"{among.count}, nothing shared"
    return (
        f"**{among.count}**"
        + {"none": "", "leader-killed": ", leader killed", "store-gone": ", store gone"}[among.fault]
    )


def _of(runs: Sequence[Run], key: Key) -> list[Run]:
    """Return the runs of a contender that count."""
    return [run for run in runs if (run.experiment, run.load, run.contender) == key and not run.problem()]


def after_fault(runs: Sequence[Run], key: Key) -> float:
    """Return the goodput of what arrived in the moment of a fault and soon after; nan of none."""
    each = [goodput(r for r in run.records if FAULT_AT_S <= r.at < FAULT_AT_S + AFTER_S) for run in _of(runs, key)]
    return mean(each) if each else math.nan


def goodputs(some: dict[Key, Figures], runs: Sequence[Run]) -> list[str]:
    """Return the table of goodput, the gateway that is alone first."""
    alone = next((one for (_, _, who), one in some.items() if called(who) == "one"), None)
    faults = any("replicas_fault" in who for _, _, who in some)
    rows = []
    for key in sorted(some, key=_place):
        one = some[key]
        held = max(run.peak_held for run in _of(runs, key))
        times = ratio(one, alone) if alone is not None else (math.nan, math.nan)
        rows.append(
            [
                called(key[2]),
                with_spread(one),
                by_class(one),
                *(share(value, 2) for value in times),
                *([share(after_fault(runs, key))] if faults else []),
                seconds(one.of_class(("int",)).ttft[:2]),
                f"{one.all.refused:.1%}",
                f"{one.all.failed:.1%}",
                str(held),
            ]
        )
    head = ["gateways", "goodput", "int/std/batch", "of one", "in the least seed"]
    head += ["after the fault"] if faults else []
    return table([*head, "TTFT p50 / p95 s, first class", "refused", "failed", "held"], rows)


def _place(key: Key) -> int:
    """Sort contenders as their experiment lists them, and what was asked for beside them last."""
    listed = BY_NAME[key[0]].contenders
    return listed.index(key[2]) if key[2] in listed else len(listed)


def costs(some: dict[Key, Figures]) -> list[str]:
    """Say what a request costs all Envoys and sidecars together."""
    told = [
        f"{called(who).replace('*', '')} {one.cpu_ms.get('front', 0.0):.1f} + {one.cpu_ms.get('sidecar', 0.0):.1f}"
        for (_, _, who), one in some.items()
    ]
    says = "CPU ms a request, all Envoys + all sidecars, their starts and idle beats in it (few requests share those)"
    return [f"{says}: {'; '.join(told)}.", ""]


def forwarded(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what forwarding costs, and what one leader carries."""
    lines = [
        [
            row["load"],
            str(row["followers"]),
            f"{row['per_s']:,.0f}",
            f"{row['p50_ms']:.2f}",
            f"{row['p99_ms']:.1f}",
            f"{row['follower_us']:.0f}",
            f"{row['leader_us']:.0f}",
            f"{row['leader_busy']:.0%}",
        ]
        for row in rows
    ]
    most = max(row["per_s"] for row in rows)
    of = " and ".join(sorted({f"{row.get('commit', UNKNOWN)}, {row.get('date', 'no date')}" for row in rows}))
    return [
        "## Forwarding",
        "",
        FORWARDING.format(most=most, of=of),
        *table(
            [
                "",
                "followers",
                "requests/s",
                "added p50 ms",
                "p99",
                "CPU µs at the follower",
                "at the leader",
                "of its core",
            ],
            lines,
        ),
    ]
