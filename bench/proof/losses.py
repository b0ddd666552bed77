"""Where ours does not help, from runs: in short for the first screen of the page, in full for its details."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from bench.proof import shapes_page
from bench.proof.words import SAME, average, pick, plain, share
from extproc.simulate.studies.experiments import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.proof.words import Key, Row
    from extproc.simulate.studies.figures import Figures


def short(found: dict[Key, Figures], missed: Sequence[str], kinds: Sequence[Row]) -> list[str]:
    """Return what a reader must know first: light load, what was expected in vain, who is as good, what is lost."""
    ramp = {load: both for (name, load), both in _rivals(found).items() if name == "ramp"}
    parts = [f"- {load:.0%} load: {one}." for load, both in ramp.items() for one in _gain(*both)]
    if missed:
        parts.append(f"- **Missed:** {'; '.join(missed)}. [How much there is to be had](benchmarks-ceiling.md).")
    parts += shapes_page.as_good(kinds)
    fewer = [f"{one} at {load:.0%} load" for load, both in ramp.items() for one in _tokens(*both)]
    fewer += shapes_page.tokens(kinds)
    parts += [f"- Fewer output tokens: {'; '.join(fewer)}."] if fewer else []
    return [*parts, *_one_class_pays(found), *_cost(found)]


def full(found: dict[Key, Figures], rows: Sequence[Row]) -> list[str]:
    """Return all of it: every experiment, class, and simulated preset."""
    parts = ["## Where it does not help", ""]
    for (name, load), (ours, others) in _rivals(found).items():
        where = f"- Real, {_title(name)}, {load:.0%}"
        told = [*_gain(ours, others), *(text for _, text in _classes(ours, others))]
        told += [f"fewer output tokens, {one}" for one in _tokens(ours, others)] if name == "ramp" else []
        parts += [f"{where}: {one}." for one in told]
    for preset in dict.fromkeys(row["preset"] for row in rows):
        parts += _simulated(preset, pick(rows, kind="sweep", preset=preset))
    return [*parts, *_cost(found), ""]


def _rivals(found: dict[Key, Figures]) -> dict[tuple[str, float], tuple[Figures, list[Figures]]]:
    groups: dict[tuple[str, float], dict[str, Figures]] = defaultdict(dict)
    for (name, load, who), one in found.items():
        groups[name, load][who] = one
    played = {}
    for key, group in groups.items():
        others = [one for who, one in group.items() if not who.startswith("ours")]
        if "ours" in group and others:
            played[key] = (group["ours"], others)
    return played


def _title(name: str) -> str:
    return BY_NAME[name].short if name in BY_NAME else "conversations"


def _gain(ours: Figures, others: Sequence[Figures]) -> list[str]:
    best = max(others, key=lambda one: one.all.goodput)
    gain = ours.all.goodput - best.all.goodput
    if gain >= SAME:
        return []
    word = "is worse" if gain < -SAME else "gains nothing"
    return [f"{word}, {share(ours.all.goodput)} against {_whose(best, 'all')}"]


def _tokens(ours: Figures, others: Sequence[Figures]) -> list[str]:
    most = max(others, key=lambda one: one.tokens_per_s)
    lost = 1 - ours.tokens_per_s / most.tokens_per_s if most.tokens_per_s else 0.0
    return [f"{lost:.0%} than {plain(most.contender)}"] if lost > SAME else []


def _classes(ours: Figures, others: Sequence[Figures]) -> list[tuple[float, str]]:
    """Return by how much each class that pays does better elsewhere, and the words for it."""
    found = []
    for line in ours.lines[:-1] if len(ours.lines) > 2 else ():
        winner = max(others, key=lambda one: one.of_class((line.klass,)).goodput)
        lost = winner.of_class((line.klass,)).goodput - line.goodput
        if lost > 2 * SAME:
            text = f"the class {line.klass} pays, {share(line.goodput)} against {_whose(winner, line.klass)}"
            found.append((lost, text))
    return found


def _one_class_pays(found: dict[Key, Figures]) -> list[str]:
    """Say where a class pays most, and how often one does."""
    paying = [
        (lost, f"{_title(name)}, {load:.0%} load: {text}")
        for (name, load), (ours, others) in _rivals(found).items()
        for lost, text in _classes(ours, others)
    ]
    if not paying:
        return []
    others = f"; {len(paying) - 1} more like it [in detail](benchmarks-details.md)" if len(paying) > 1 else ""
    worst = max(paying)[1]
    return [f"- {worst[0].upper()}{worst[1:]}{others}."]


def _whose(one: Figures, klass: str) -> str:
    return f"{share(one.of_class((klass,)).goodput)} of {plain(one.contender)}"


def _simulated(preset: str, rows: Sequence[Row]) -> list[str]:
    parts = []
    for name, load in dict.fromkeys((row["experiment"], row["load"]) for row in rows):
        if name in ("limits", "telemetry"):
            continue
        here = pick(rows, experiment=name, load=load)
        others = {row["contender"]: average(here, row["contender"]) for row in here}
        others = {who: value for who, value in others.items() if not who.startswith("ours")}
        best = max(others, key=others.__getitem__)
        ours = average(here, "ours")
        if ours < 1.1 * others[best]:
            words = f"{share(ours)} against {share(others[best])} of {plain(best)}, {ours / others[best]:.2f} times"
            parts.append(f"- Simulated {preset}, {_title(name)}, {load:.0%}: {words}.")
    return parts


def _cost(found: dict[Key, Figures]) -> list[str]:
    ours, least = found.get(("ramp", 0.7, "ours")), found.get(("ramp", 0.7, "least_request"))
    if ours is None or least is None:
        return []
    sidecar, envoy = ours.cpu_ms.get("sidecar", 0.0), ours.cpu_ms.get("front", 0.0)
    alone = least.cpu_ms.get("front", 0.0)
    text = f"- CPU a request at 70% load: Envoy {alone:.1f} ms alone, {envoy:.1f} ms with the sidecar, which takes"
    return [f"{text} {sidecar:.1f} ms itself (few share its start)."]
