"""Writes the page of `make bench-peers`: every figure in it is computed here, none is typed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.proof import tables
from bench.proof.figures import ratio
from bench.proof.peers import PINS
from bench.proof.words import CLASSES, PEER_LABELS, SAME, collect, label, share

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.proof.figures import Figures, Run
    from bench.proof.words import Row

HEAD = """\
# Routers from PyPI

`{command}` ({date}, {minutes:.0f} minutes, seeds {seeds}) on {machine}; {versions}. The method is that of
docs/benchmarks.md, the settings are SETTINGS in bench/proof/peers.py. {all} real runs, {rejected} rejected and left
out.
"""


def write(runs: Sequence[Run], facts: Row, docs: Path) -> Path:
    """Write the page into `docs`; return where it is."""
    found = collect(runs)
    rejected = [run for run in runs if run.problem()]
    versions = facts["versions"] | dict(pin.split("==") for pin in PINS)
    facts = facts | {
        "minutes": facts["duration_s"] / 60,
        "seeds": ", ".join(map(str, facts["seeds"])),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "all": len(runs),
        "rejected": len(rejected),
    }
    parts = [HEAD.format(**facts)]
    parts += [f"- rejected: {run.load:.0%} #{run.seed} {run.contender}: {run.problem()}" for run in rejected]
    for load in sorted({key[1] for key in found}):
        some = [one for key, one in found.items() if key[1] == load]
        parts += [f"## {load:.0%} load", "", *tables.experiment("peers", some), *compared(some), *cpu(some), ""]
        parts += ["<details><summary>All figures</summary>", "", *tables.details(some), "</details>", ""]
    path = docs / "benchmarks-peers.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts).rstrip() + "\n")
    return path


def compared(some: Sequence[Figures]) -> list[str]:
    """Say how ours does against each peer, and in which class a peer does better."""
    ours = next((one for one in some if one.contender == "ours"), None)
    if ours is None:
        return []
    parts = []
    for one in some:
        if one.contender.partition(",")[0] not in PEER_LABELS:
            continue
        times, least = ratio(ours, one)
        text = f"- Ours is {times:.2f} times {label(one.contender)} (at least {least:.2f} in every seed)."
        wins = [
            f"{name} {share(theirs)} against {share(mine)}"
            for name in CLASSES
            if (theirs := one.of_class((name,)).goodput) - (mine := ours.of_class((name,)).goodput) > SAME
        ]
        parts.append(text + (f" It does better than ours in: {', '.join(wins)}." if wins else ""))
    return [*parts, ""]


def cpu(some: Sequence[Figures]) -> list[str]:
    """Say what a request costs each front."""
    costs = [
        f"{label(one.contender)} {one.cpu_ms.get('front', 0.0) + one.cpu_ms.get('sidecar', 0.0):.1f}" for one in some
    ]
    return [f"CPU ms a request, start and checks of the whole run in it: {', '.join(costs)}."]
