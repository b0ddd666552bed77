"""Five shapes of engine under synthetic and recorded traffic, simulated: every rival searched for each, ours untouched.

    python -m bench.proof.shapes --out build/shapes.json       # an hour on one core
    python -m bench.proof.shapes --only 'a100-8b*' --loads 120 # some of it

A rival's settings are searched for each row on seeds 51 to 53; then all play seeds 71 to 75. Azure's traffic is a fit
of the recorded hours (matrix/traffic.py); with `--traces FOLDER` it is the hours themselves, each cut into five,
and rivals are searched on two of the five.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from extproc.simulate.studies import search
from extproc.simulate.studies.commit import commit
from extproc.simulate.studies.matrix.cells import stage
from extproc.simulate.studies.matrix.contest import play
from extproc.simulate.studies.matrix.traffic import TRAFFIC, Traffic, with_traces
from extproc.simulate.workload import Klass, Lengths, Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extproc.simulate.studies.matrix.cells import Stage

SEEDS = (71, 72, 73, 74, 75)
LOADS = (80, 120)
ALWAYS = ("least_request",)
LONG = Traffic(
    Workload(
        classes=(Klass("long", 0, 1.0, Lengths(16_000, 0.6), Lengths(300, 0.7), 8.0, 0.1, 60.0),),
        context_tokens=120_000,
    )
)
"""Long documents: prompts of 16,000 tokens, a first token within 8 s (assumed)."""
KINDS = TRAFFIC | {"long": LONG}
SHAPES = {
    "a100-8b-profiled": "8B on an A100",
    "h100-32b-profiled": "32B on an H100",
    "h100x4-70b": "70B on four H100",
    "llama-cpp": "four slots, like llama.cpp",
    "h100-8b": "8B on an H100, long contexts",
}
"""Presets of `extproc engine` with constants fitted to published kernel times, but for llama-cpp's, assumed."""
ROWS = (
    *(("a100-8b-profiled", traffic) for traffic in ("standing", "prefix", "azure-conv", "azure-code")),
    *(("h100-32b-profiled", traffic) for traffic in ("standing", "prefix", "azure-conv")),
    *(("h100x4-70b", traffic) for traffic in ("standing", "azure-conv", "azure-code")),
    *(("llama-cpp", traffic) for traffic in ("standing", "azure-conv")),
    ("h100-8b", "long"),
)


@dataclass(frozen=True, slots=True)
class Share:
    """What one contender made of a row, seed by seed: `goodput` 0..1, `refused` 0..1, output tokens per second."""

    text: str
    tried: int
    goodput: tuple[float, ...]
    refused: tuple[float, ...]
    tokens_per_s: tuple[float, ...]

    @property
    def middle(self) -> float:
        """Return the mean goodput over the seeds."""
        return mean(self.goodput)

    @property
    def spread(self) -> float:
        """Return the standard deviation of goodput between seeds; 0.0 of one."""
        return stdev(self.goodput) if len(self.goodput) > 1 else 0.0


def parts(scene: Stage) -> list[Stage]:
    """Return a stage seed by seed; a recorded hour is the same for all seeds, so it is cut into as many parts."""
    if scene.traffic.trace is None:
        return [replace(scene, demands={seed: demands}) for seed, demands in scene.demands.items()]
    each_s = scene.duration_s / len(scene.demands)
    cut = []
    for number, (seed, hour) in enumerate(scene.demands.items()):
        begin_s = number * each_s
        some = [replace(one, at=one.at - begin_s) for one in hour if begin_s <= one.at < begin_s + each_s]
        cut.append(replace(scene, demands={seed: some}, duration_s=each_s))
    return cut


def judged(text: str, scenes: Sequence[Stage], tried: int = 1) -> Share:
    """Play a contender on each of `scenes`."""
    scores = [play(text, scene) for scene in scenes]
    return Share(
        text,
        tried,
        tuple(round(score.goodput, 4) for score in scores),
        tuple(round(score.refused, 4) for score in scores),
        tuple(round(score.tokens_per_s, 1) for score in scores),
    )


def row(task: tuple[str, str, int], traces: Path | None = None) -> dict[str, Any]:
    """Search the rivals of a row, play all. Returns what `page` reads."""
    engine, kind, load = task
    began = time.monotonic()
    known = with_traces(traces) | {"long": LONG} if traces else KINDS
    traffic = known[kind]
    scenes = parts(stage(engine, traffic, load, SEEDS))
    # A recorded hour has no second one to search on: rivals are given two parts of it, and so know some of the future.
    trying = parts(stage(engine, traffic, load, search.SEEDS)) if traffic.trace is None else scenes[1::2]
    first = trying[0]

    def score(text: str) -> float:
        return mean(play(text, scene).goodput for scene in trying)

    rivals = [search.best(rival, first.natural_limit, search.waits(first.classes), score) for rival in search.SEARCHED]
    shares = [judged(name, scenes) for name in ALWAYS]
    shares += [judged(found.text, scenes, found.tried) for found in rivals]
    shares.append(judged(traffic.ours, scenes))
    took_s = round(time.monotonic() - began, 1)
    known_by = {"engine": engine, "traffic": kind, "load": load, "took_s": took_s}
    of = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": commit()}
    return known_by | of | {"shares": [*map(asdict, shares)]}


def tasks(patterns: Sequence[str], loads: Sequence[int]) -> list[tuple[str, str, int]]:
    """Return the rows whose `engine/traffic` is called like one of `patterns`, at each load."""
    names = [(engine, kind) for engine, kind in ROWS if any(fnmatchcase(f"{engine}/{kind}", one) for one in patterns)]
    return [(engine, kind, load) for engine, kind in names for load in loads]


def main() -> int:
    """Run what the flags say; writes a JSON list of rows."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.proof.shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of engine/traffic (all)")
    parser.add_argument("--loads", type=int, nargs="+", default=LOADS, help="percent (80 120)")
    parser.add_argument("--traces", type=Path, help="a folder with azure_conv.csv and azure_code.csv")
    parser.add_argument("--out", type=Path, default=Path("build/shapes.json"), help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    flags = parser.parse_args()
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with multiprocessing.get_context("spawn").Pool(flags.workers) as pool:
        for one in pool.imap(partial(row, traces=flags.traces), tasks(flags.only, flags.loads)):
            rows.append(one)
            flags.out.write_text(json.dumps(rows, indent=1))
            best = {share["text"]: round(mean(share["goodput"]), 3) for share in one["shares"]}
            print(f"{one['engine']}/{one['traffic']}@{one['load']}, {one['took_s']:.0f} s: {best}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
