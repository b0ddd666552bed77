"""Writes the page of `make bench-peers`: every figure of a run in it is computed here, none is typed."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from statistics import mean
from typing import TYPE_CHECKING, Any

from bench.proof import peers_search, tables, words
from bench.proof.peers import PINS
from bench.proof.words import CLASSES, PEER_LABELS, SAME, by_class, collect, label, seconds, share, table
from extproc.simulate.studies.commit import UNKNOWN
from extproc.simulate.studies.figures import ratio

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.proof.words import Row
    from extproc.simulate.studies.figures import Figures, Run

HEAD = """\
# Against routers from PyPI

Written by `make bench-peers`; don't edit. It installs {pins} into `.venv-peers` (300 MB, the first time only) and runs
them beside HAProxy, Envoy's least request and ours in the overload ramp of [benchmarks.md](benchmarks.md), three
engines of the preset h100-32b each: the same seeds, requests, moments and rejection of late runs. About five minutes
on a machine at rest. Neither router is a dependency of anything else. Each rival ran as we had set it by hand (its name
alone), and as an open search of short runs set it; it is judged by the better, which the first table has. Ours has its
defaults.

Run: {called} on {machine}; {versions}. {all} real runs, {rejected} rejected and left out.
"""
ABOUT = """\
## What each does

**smg** has a queue per class in front of all engines and binds late (`--priority-scheduler-enabled`; a request's class
is the header `x-smg-priority`). Its capacity is *not* `--max-concurrent-requests`: it is the sum of the workers'
`max_running_requests`, and 64 for a worker that says nothing. vLLM says nothing, so the benchmark sets the label of
every worker by `PATCH /workers/{id}` before the first request. Waits are whole seconds. It takes an engine for vLLM if
`GET /version` answers, and passes hardly a header on, so the engine hears a request's true lengths in `vllm_xargs` of
the body: a trap for everybody who benchmarks with headers.

**vllm-router**'s plain limit is no queue: `--max-concurrent-requests` gives a slot back when an answer *begins*, and
refills by time (its issues 247 and 280), so it lets an overload pass. What it has since is *program scheduling*, made
for agents: `--enable-program-scheduling`, a capacity in KV tokens per engine, requests held at the router, priorities
in the body. Each request here is a program of one step, with the priority of its class. It takes somebody who knows the
engine's KV capacity, and it can't refuse before it must: a held request is *forced* in at its deadline, which can't be
later than the queue's timeout, so clients leave before that here.

**HAProxy** without settings is what benchmarks.md has, with one `timeout queue` for all classes. From 3.4 on each class
can have its own (`http-request set-timeout queue`). No stable Debian has a 3.4, nor has PyPI, npm or crates; Debian
experimental has 3.4.7, which ran here with its own libraries: `HAPROXY=FILE make bench-peers`.

`smg` and `vllm-router` without settings are what we had found by hand before, SETTINGS of bench/proof/peers.py.

Not tried: cache-aware routing of either router (every request here is alone), splitting prefill from decode, several
replicas of either, more than one HAProxy thread.
"""
SEARCH = """\
## What was searched

`python -m bench.proof.peers_search` ({date}): the settings of the grid on real processes at {load:.0%} load, seed
{first}, {short:.0f} s of arrivals, the best {final} of each then on seeds {others}; the best mean of the three seeds
wins. *Tried* says of how many in the grid. One short run of each favours luck, so the finals are shown whole. {calls}

All that was tried is in bench/proof/peers.json; a name is what
`python -m bench.proof --peers --contender NAME --loads 1.2` takes, and SETTINGS of bench/proof/peers.py says what each
key is.
"""


SAYS = """\
Goodput, in brackets interactive / standard / batch, and how many seeds. A rival's settings are those with the most
goodput at the highest load.
"""
FILE = "benchmarks/peers.json"
"""Under docs/: what the front page says of it."""


def write(runs: Sequence[Run], facts: Row, docs: Path) -> Path:
    """Write the page into `docs`; return where it is."""
    found = collect(runs)
    rejected = [run for run in runs if run.problem()]
    told = facts | {
        "pins": " and ".join(pin.replace("==", " ") for pin in PINS),
        "called": words.called(facts),
        "versions": words.versions(facts),
        "all": len(runs),
        "rejected": len(rejected),
    }
    parts = [HEAD.format(**told)]
    parts += [f"- rejected: {run.load:.0%} #{run.seed} {run.contender}: {run.problem()}" for run in rejected]
    parts += [""] if rejected else []
    parts += words.pieced(facts)
    loads = sorted({key[1] for key in found})
    groups = {load: [one for key, one in found.items() if key[1] == load] for load in loads}
    chosen = strongest(groups)
    parts += ["## The answer", "", SAYS, *answer(groups, chosen)]
    for load, some in groups.items():
        parts += compared(load, [one for one in some if one.contender in chosen])
    search = peers_search.recorded() if peers_search.FILE.exists() else {}
    parts += [*flipped(groups, chosen, search), "", *others(groups, chosen), ABOUT]
    parts += searched(search) if search else []
    for load, some in groups.items():
        parts += [f"<details><summary>All figures at {load:.0%}</summary>", "", *tables.details(some), "</details>", ""]
    path = docs / "benchmarks-peers.md"
    (docs / FILE).parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts).rstrip() + "\n")
    (docs / FILE).write_text(json.dumps(_front(groups, chosen, runs), indent=1) + "\n")
    return path


def short(docs: Path) -> list[str]:
    """Return a line for the front page, of what `write` left in `docs`; nothing where it never ran."""
    if not (docs / FILE).exists():
        return []
    found = json.loads((docs / FILE).read_text())
    scores = dict(found["goodput"])
    ours = scores.pop("ours", math.nan)
    told = ", ".join(f"{label(who)} {share(value)}" for who, value in sorted(scores.items(), key=lambda one: -one[1]))
    where = f"{found['load']:.0%} load, {found['seeds']} seeds, commit {' and '.join(found['commits'])}"
    text = f"- Routers from PyPI, a HAProxy with a wait for each class ({where}): ours {share(ours)}; {told}."
    return [f"{text} [All](benchmarks-peers.md)."]


def best(docs: Path) -> list[str]:
    """Return a sentence: the best rival of these, for who reads no further than the answer."""
    if not (docs / FILE).exists():
        return []
    found = json.loads((docs / FILE).read_text())
    rivals = {who: value for who, value in found["goodput"].items() if who != "ours"}
    if not rivals or "ours" not in found["goodput"]:
        return []
    who = max(rivals, key=rivals.__getitem__)
    text = f"[Beside routers](benchmarks-peers.md): {share(found['goodput']['ours'])} against {share(rivals[who])} of"
    return [f"{text} {label(who)} at {found['load']:.0%}."]


def strongest(groups: dict[float, list[Figures]]) -> list[str]:
    """Return of each front the settings that had most at the highest load, among those on the most of its seeds."""
    best: dict[str, Figures] = {}
    for one in groups[max(groups)] if groups else ():
        front = one.contender.partition(",")[0]
        if front not in best or _rank(one) > _rank(best[front]):
            best[front] = one
    return [one.contender for one in best.values()]


def _rank(one: Figures) -> tuple[int, float]:
    return len(one.seeds), one.all.goodput


def _front(groups: dict[float, list[Figures]], best: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    most = max(groups, default=0.0)
    some = [one for one in groups.get(most, ()) if one.contender in best]
    return {
        "load": most,
        "seeds": max((len(one.seeds) for one in some), default=0),
        "commits": sorted({run.commit or UNKNOWN for run in runs if run.load == most and run.contender in best}),
        "goodput": {one.contender.partition(",")[0]: round(one.all.goodput, 4) for one in some},
    }


def answer(groups: dict[float, list[Figures]], who: Sequence[str]) -> list[str]:
    """Return goodput of `who` at each load, and what the clients of the highest load saw."""
    most = max(groups, default=0.0)
    rows: dict[str, dict[float, Figures]] = defaultdict(dict)
    for load in sorted(groups, key=lambda load: load != most):  # the most loaded has all of them, in order
        for one in groups[load]:
            if one.contender in who:
                rows[one.contender][load] = one
    head = ["", *(f"{load:.0%}" for load in groups), f"refused at {most:.0%}", "left or failed"]
    head += ["TTFT p50 / p95 s, first class"]
    lines = []
    for name, found in rows.items():
        told = [_cell(found[load]) if load in found else "" for load in groups]
        last = found.get(most)
        if last is not None:
            told += [f"{last.all.refused:.1%}", f"{last.all.abandoned + last.all.failed:.1%}"]
            told += [seconds(last.of_class(CLASSES).ttft[:2])]
        lines.append([label(name), *told, *[""] * (len(head) - 1 - len(told))])
    return table(head, lines)


def _cell(one: Figures) -> str:
    """Return goodput, of the classes too, and on how many seeds."""
    count = len(one.seeds)
    return f"{tables.goodput(one)} ({by_class(one)}), {count} seed{'s' if count > 1 else ''}"


def others(groups: dict[float, list[Figures]], best: Sequence[str]) -> list[str]:
    """Return the same of the settings that were not the better."""
    rest = [one.contender for some in groups.values() for one in some if one.contender not in best]
    return ["The other settings that ran:", "", *answer(groups, list(dict.fromkeys(rest)))] if rest else []


def flipped(groups: dict[float, list[Figures]], best: Sequence[str], search: dict[str, Any]) -> list[str]:
    """Say which rival is better as set by hand than as the search set it, and why that can be."""
    found = {one.contender: one for one in groups[max(groups)]} if groups else {}
    parts = []
    for name, rival in search.items():
        won, hand = found.get(rival.get("won", "")), found.get(name)
        if name == "facts" or won is None or hand is None or won.contender in best:
            continue
        scores = list(rival["tried"][won.contender].values())
        apart = f"{share(hand.all.goodput)} against {share(won.all.goodput)}"
        spread = (
            f"that choice had {share(mean(scores))} in the search, but {share(min(scores))} to {share(max(scores))}"
        )
        parts.append(
            f"- {label(name)} is better here as set by hand than as the search set it, {apart}: {spread} from seed to "
            "seed, in runs of half a minute. Settings that are nearer to each other than that are told apart by luck; "
            "so both are played on these seeds, and the better one counts."
        )
    return parts


def compared(load: float, some: Sequence[Figures]) -> list[str]:
    """Say how ours does against each rival, in which class one does better, and what a request costs each front."""
    ours = next((one for one in some if one.contender == "ours"), None)
    if ours is None:
        return []
    parts = []
    for one in some:
        if one.contender.partition(",")[0] not in (*PEER_LABELS, "haproxy"):
            continue
        if not set(ours.seeds) & set(one.seeds):
            continue
        times, least = ratio(ours, one)
        text = f"- {load:.0%}: ours is {times:.2f} times {label(one.contender)} ({least:.2f} in the least seed)."
        wins = [
            f"{name} {share(theirs)} against {share(mine)}"
            for name in CLASSES
            if (theirs := one.of_class((name,)).goodput) - (mine := ours.of_class((name,)).goodput) > SAME
        ]
        parts.append(text + (f" **It does better than ours in: {', '.join(wins)}.**" if wins else ""))
    costs = [
        f"{label(one.contender)} {one.cpu_ms.get('front', 0.0) + one.cpu_ms.get('sidecar', 0.0):.1f}" for one in some
    ]
    return [*parts, f"- {load:.0%}: CPU ms a request, start and checks of the whole run in it: {', '.join(costs)}."]


def searched(found: dict[str, Any]) -> list[str]:
    """Say what was tried of each rival, what won, and what the other finalists and each value of a key had."""
    facts = found["facts"]
    first, *others = facts["seeds"]
    parts = [
        SEARCH.format(
            date=facts["date"],
            load=facts["load"],
            first=first,
            others=" and ".join(map(str, others)),
            short=facts["times"][1],
            final=peers_search.FINAL,
            calls=_calls(facts.get("pieces", ())),
        )
    ]
    lines, finals, values = [], [], []
    for name, rival in found.items():
        if name == "facts":
            continue
        tried, who = rival["tried"], f"HAProxy {facts['haproxy']}" if name == "haproxy" else label(name)
        lines.append(
            [who, f"{len(tried)} of {len(peers_search.GRIDS[name])}", f"`{rival['won']}`", share(rival["goodput"])]
        )
        some = {text: scores for text, scores in tried.items() if len(scores) > 1}
        for text in sorted(some, key=lambda one: -sum(some[one].values()) / len(some[one])):
            each = [share(some[text][str(seed)]) if str(seed) in some[text] else "rejected" for seed in facts["seeds"]]
            finals.append([f"`{text}`", *each])
        values += [[who, key, told] for key, told in _by_value(tried, str(first)).items()]
    parts += table(["", "tried", "best settings", "mean of the three seeds"], lines)
    parts += ["The finals, seed by seed:", "", *table(["", *map(str, facts["seeds"])], finals)]
    parts += [f"The best that any setting with this value had on seed {first}:", ""]
    return [*parts, *table(["", "key", "value: best (settings)"], values)]


def _calls(pieces: Sequence[Row]) -> str:
    """Say by which calls of which commits a search was played, and whether some are not on record."""
    if not pieces:
        return "By which calls is not on record."
    told = [f"`{one['command']}` of {one['commit']} ({one['began']})" for one in pieces]
    started = "--" not in pieces[0]["command"]
    before = "" if started else ", after others of the same day that are not on record"
    late = " Who came late to the finals had fewer stacks beside it, which favours it." if len(pieces) > 1 else ""
    return f"Played by {', '.join(told)}{before}.{late}"


def _by_value(tried: dict[str, dict[str, float]], seed: str) -> dict[str, str]:
    best: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for text, scores in tried.items():
        for setting in text.split(",")[1:]:
            key, _, value = setting.partition("=")
            if seed in scores:
                best[key][value].append(scores[seed])
    return {
        key: ", ".join(f"{value}: {share(max(scores))} ({len(scores)})" for value, scores in values.items())
        for key, values in best.items()
    }
