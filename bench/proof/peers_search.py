"""The peers at their best: every setting of an open grid on real processes, the best of them again on other seeds.

    python -m bench.proof.peers_search                # a dozen rounds, 17 minutes; writes peers.json beside this
    python -m bench.proof.peers_search --more         # what of the grid is not in it yet; --finals: of the finals

Nobody has modelled these routers, so that their grids are played for real, at 120 % load: the whole grid on one seed
with short runs, then the FINAL best of each on two more. What has the best mean of the three seeds wins. The seeds are
those of HAProxy's search, which no page is made of. HAProxy's waits by class are searched where `HAPROXY=` is a 3.4.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from bench.proof import fronts, peers
from bench.proof.stacks import run_round
from extproc.simulate.report import goodput
from extproc.simulate.studies.commit import commit
from extproc.simulate.studies.experiments import WITH_PEERS, Cell, Times
from extproc.simulate.studies.search import SEEDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FILE = Path(__file__).with_name("peers.json")
LOAD = 1.2
TIMES = Times(8.0, 38.0, 52.0)
FINAL = 7
ROUND = 21
"""Stacks at once, as in the benchmark."""


def _grid(name: str, **values: Sequence[str]) -> Iterator[str]:
    for some in itertools.product(*values.values()):
        yield ",".join([name, *(f"{key}={value}" for key, value in zip(values, some, strict=True))])


GRIDS: dict[str, tuple[str, ...]] = {
    "smg": (
        *_grid(
            "smg",
            limit=("10", "12", "14", "17"),
            waits=("1:1:1", "1:2:2", "1:2:5", "1:2:15", "2:2:2"),
            policy=("power_of_two", "least_load"),
            engine=("plain", "priority"),
        ),
        *_grid(
            "smg", limit=("20",), waits=("1:1:1", "1:2:15"), policy=("power_of_two", "least_load"), engine=("priority",)
        ),
        *_grid("smg", limit=("12", "14"), waits=("1:5:15", "2:2:15"), policy=("power_of_two",), engine=("priority",)),
        *_grid("smg", scheduler=("false",), limit=("12", "17"), waits=("1:1:1", "2:2:2"), engine=("plain", "priority")),
        *_grid("smg", scheduler=("false",), limit=("200",), waits=("1:1:1",), engine=("tuned",), retries=("1", "5")),
    ),
    "vllm_router": (
        *_grid(
            "vllm_router",
            limit=("16", "24", "64"),
            tokens=("20000", "24000", "28000"),
            order=("mru", "fcfs"),
            gain=("false", "true"),
            engine=("plain", "priority"),
        ),
        *_grid(
            "vllm_router",
            limit=("12", "16"),
            tokens=("16000", "18000"),
            order=("mru",),
            gain=("false", "true"),
            engine=("priority",),
        ),
        *_grid(
            "vllm_router", limit=("16",), tokens=("16000", "18000"), order=("fcfs",), gain=("true",), engine=("plain",)
        ),
        *_grid("vllm_router", binding=("reasoning_token_balance",), tokens=("20000", "24000", "28000")),
        *_grid("vllm_router", programs=("false",), engine=("tuned",), breaker=("false",), retries=("1", "5")),
    ),
    "haproxy": (
        *_grid("haproxy", limit=("10", "12"), queue=("600ms:1600ms:30000ms", "980ms:1600ms:14600ms")),
        *_grid(
            "haproxy",
            limit=("10", "12", "14", "16"),
            queue=(
                "1600ms",
                *map(":".join, itertools.product(("300ms", "600ms"), ("1600ms",), ("1600ms", "4833ms", "14600ms"))),
                "600ms:600ms:600ms",
            ),
        ),
    ),
}
"""The knobs that hold or bind a request: how many at once (requests, or tokens of KV cache), how long each class may
wait, who goes first, how an engine is chosen, and how its engines' own queue is ordered."""


def goodputs(texts: Sequence[str], seed: int) -> dict[str, float]:
    """Play contenders at once on the same requests; their goodputs. A run that was rejected is left out."""
    cell = Cell(replace(WITH_PEERS, contenders=tuple(texts), loads=(LOAD,)), LOAD, seed)
    runs, busy = run_round([cell], TIMES)
    bad = [run for run in runs if run.problem()]
    print(f"seed {seed}: {len(runs)} stacks, {busy:.0%} of the cores busy, {len(bad)} rejected", flush=True)
    for run in bad:
        print(f"  REJECTED {run.contender}: {run.problem()}", flush=True)
    return {run.contender: round(goodput(run.counted), 4) for run in runs if not run.problem()}


def rounds(texts: Sequence[str]) -> list[list[str]]:
    """Deal settings into rounds of about equal size, neighbours in the grid into different ones."""
    count = math.ceil(len(texts) / ROUND)
    return [list(texts[number::count]) for number in range(count)]


def finalists(tried: dict[str, dict[str, float]]) -> list[str]:
    """Return the best of a router on the first seed."""
    first = {text: scores[str(SEEDS[0])] for text, scores in tried.items() if str(SEEDS[0]) in scores}
    return sorted(first, key=lambda text: -first[text])[:FINAL]


def won(tried: dict[str, dict[str, float]]) -> tuple[str, float]:
    """Return what has the best mean among those that played all seeds, and that mean."""
    means = {text: mean(scores.values()) for text, scores in tried.items() if len(scores) == len(SEEDS)}
    text = max(means, key=means.__getitem__)
    return text, means[text]


def recorded() -> dict[str, Any]:
    """Return what the last search found: router -> `won`, `goodput`, `tried`; and `facts`."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def best(contenders: Sequence[str]) -> list[str]:
    """Return contenders, and behind them the settings that won, HAProxy's waits by class where it is a 3.4."""
    found = recorded() if FILE.exists() else {}
    names = [*peers.PEERS, *(["haproxy"] if _by_class() else [])]
    return [*contenders, *(found[name]["won"] for name in names if "won" in found.get(name, {}))]


def main() -> int:
    """Play what the flags say, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--more", action="store_true", help="what of the grid the recorded search has not played")
    parser.add_argument("--finals", action="store_true", help="what the recorded finalists have not played")
    flags = parser.parse_args()
    if os.getsid(0) != os.getpid():  # as in __main__.py: Linux shares the cores between sessions
        argv = [sys.executable, "-m", "bench.proof.peers_search", *sys.argv[1:]]
        return subprocess.run(argv, start_new_session=True, check=False).returncode
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("-10")
    peers.install()
    goes_on = FILE.exists() and (flags.more or flags.finals)
    found = recorded() if goes_on else {"facts": _facts()}
    found["facts"]["pieces"] = [*found["facts"].get("pieces", ()), _piece()]
    known = [name for name in GRIDS if name != "haproxy" or _by_class()]
    if flags.more or not flags.finals:
        for some in rounds(unplayed(found, [text for name in known for text in GRIDS[name]], SEEDS[0])):
            _enter(found, goodputs(some, SEEDS[0]), SEEDS[0])
    if flags.finals or not flags.more:
        last = [text for name in known for text in finalists(found[name]["tried"])]
        for seed in SEEDS[1:]:
            for some in rounds(unplayed(found, last, seed)):
                _enter(found, goodputs(some, seed), seed)
        for name in known:
            found[name]["won"], found[name]["goodput"] = won(found[name]["tried"])
            print(
                f"{found[name]['won']}: {found[name]['goodput']:.3f}, of {len(found[name]['tried'])} tried", flush=True
            )
        FILE.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def unplayed(found: dict[str, Any], texts: Sequence[str], seed: int) -> list[str]:
    """Return those that have no goodput on this seed yet: not played, or rejected."""
    return [text for text in texts if str(seed) not in _tried(found, text).get(text, {})]


def _tried(found: dict[str, Any], text: str) -> dict[str, dict[str, float]]:
    tried: dict[str, dict[str, float]] = found.setdefault(text.partition(",")[0], {"tried": {}})["tried"]
    return tried


def _enter(found: dict[str, Any], scores: dict[str, float], seed: int) -> None:
    for text, score in scores.items():
        _tried(found, text).setdefault(text, {})[str(seed)] = score
    FILE.write_text(json.dumps(found, indent=1) + "\n")


def _haproxy_version() -> str:
    text = subprocess.run([fronts.HAPROXY or "false", "-v"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"version (\d+\.\d+\S*)", text)
    return match.group(1) if match else ""


def _by_class() -> bool:
    major, _, minor = _haproxy_version().partition(".")
    return bool(minor) and (int(major), int(minor.partition(".")[0])) >= (3, 4)


def _piece() -> dict[str, str]:
    return {
        "began": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "commit": commit(),
        "command": " ".join(["python -m bench.proof.peers_search", *sys.argv[1:]]),
    }


def _facts() -> dict[str, Any]:
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {
        "date": date,
        "load": LOAD,
        "seeds": SEEDS,
        "times": [TIMES.warm_s, TIMES.end_s],
        "haproxy": _haproxy_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
