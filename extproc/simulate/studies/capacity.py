"""Is the capacity gauge right? `extproc_engines_needed` held against simulated engines whose most is known.

    python -m bench.capacity              # about two minutes on one core

First what the gauge says of the last minute, over what the same requests take of engines that always have another one.
Then beside it `simulate --engines auto`: the fewest engines with which a trace meets its objectives. Time is
virtual: how fast the machine is does not matter. Exits 1 where a mean is off by more than 15 %.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from extproc.engine.params import PRESETS
from extproc.observe.capacity import WINDOW_S, Answer, Capacity
from extproc.simulate.contenders import Core, contender
from extproc.simulate.fronts import Group
from extproc.simulate.plan import Plan
from extproc.simulate.sizing import fewest
from extproc.simulate.studies.matrix.traffic import TRAFFIC
from extproc.simulate.workload import Workload
from extproc.simulate.world import World, saturation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extproc.admission.load import Load
    from extproc.engine.params import EngineParams
    from extproc.simulate.fronts import Verdict
    from extproc.simulate.workload import Demand

SHAPES = ("a100-8b", "h100-8b", "h100-32b", "h100x4-70b")
MIXES = ("standing", "azure-conv", "prefix")
SEEDS = (1, 2, 3)
LOADS = (0.6, 0.8, 1.0, 1.2)
ENGINES = (1, 2)
LINES = (("a100-8b", 4), ("h100-32b", 4), ("demo", 4))
"""Engines and their `max_running_requests`, before which a line grows: its clients wait as long as it takes."""
LINE_LOADS = (1.2, 2.0, 4.0)
PATIENT = Workload(
    classes=tuple(replace(klass, ttft_s=3000.0, patience_s=3000.0) for klass in TRAFFIC["standing"].workload.classes)
)
RIGHT = 0.15
SIZED_MIXES = ("standing", "azure-conv")
SIZED_FOR = (1.6, 3.6)
"""How many engines' work the traces have in the mean."""
MEET = 0.9
TRACE_S = 600.0
MOST_ENGINES = 64
SETTLED_S = 60.0
"""From here on the gauge is looked at: a mean of the last minute, by engines that have told for a while."""
LEAST_S, MOST_S, REQUESTS = 140.0, 400.0, 600
"""A run has about so many requests, and lasts so long."""


class Watched(Core):
    """The core, and how full its engines are said to be, every second."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.now = 0.0
        self.capacity = Capacity(self.controller, lambda: self.now)
        self.capacity.sample(0.0)
        self.said: list[tuple[float, Answer]] = []

    def observe(self, engine: int, load: Load, now: float) -> list[Verdict]:
        verdicts = super().observe(engine, load, now)
        self.now = now
        if engine == 0:
            self.capacity.sample(now)
            self.said += ((now, answer) for answer in self.capacity.answers().values())
        return verdicts


def play(
    preset: str,
    engines: int,
    workload: Workload,
    demands: Sequence[Demand],
    duration_s: float,
    limit: int | None = None,
) -> list[tuple[float, Answer]]:
    """Return what the gauge said, and when, until the end of the arrivals. `limit`: `max_running_requests`."""
    groups = [Group(PRESETS[preset], engines)]
    who = contender("ours" if limit is None else f"ours,max_running_requests={limit}", preset, workload.classes)
    world = World(groups, who, 1)
    world.front = front = Watched(groups, who.setting)
    world.run(demands, duration_s)
    return [(at, answer) for at, answer in front.said if at <= duration_s]


def needed(preset: str, demands: Sequence[Demand], begin_s: float, end_s: float, limit: int | None = None) -> float:
    """Return how many engines it takes to make what came between the two, when they always have another request."""
    came = [demand for demand in demands if begin_s < demand.at <= end_s]
    return len(came) / (end_s - begin_s) / saturation(_limited(preset, limit), 1, came * (2000 // len(came) + 1))


def _limited(preset: str, limit: int | None) -> EngineParams:
    params = PRESETS[preset]
    return params if limit is None else replace(params, max_num_seqs=min(limit, params.max_num_seqs))


@cache
def most(preset: str, workload: Workload, limit: int | None = None) -> float:
    """Return the requests per second that one engine can do of this mix."""
    return saturation(_limited(preset, limit), 1, replace(workload, process="poisson").demands(10.0, 300.0, 0))


def ratio(preset: str, engines: int, workload: Workload, load: float, seed: int, limit: int | None = None) -> float:
    """Return what the gauge says at the end of a run, over what is right."""
    rate = load * engines * most(preset, workload, limit)
    duration_s = min(max(LEAST_S, REQUESTS / rate), MOST_S)
    demands = workload.demands(rate, duration_s, seed)
    at, answer = play(preset, engines, workload, demands, duration_s, limit)[-1]
    return answer.engines / needed(preset, demands, at - WINDOW_S, at, limit)


def write(demands: Sequence[Demand], path: Path) -> None:
    """Write a trace as `simulate --trace` reads it."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("time", "prompt_tokens", "output_tokens", "class"))
        rows.writerows((f"{one.at:.3f}", one.prompt, one.output, one.klass.name) for one in demands)


def sized(preset: str, workload: Workload, mean: float, folder: Path) -> tuple[int, float, float | None]:
    """Return the fewest engines for a trace of `mean` engines' work; and the gauge's mean and peak."""
    demands = workload.demands(mean * most(preset, workload), TRACE_S, SEEDS[0])
    trace = folder / f"{preset}-{mean}-{len(demands)}.csv"  # a name of its own: a plan's trace is read once
    write(demands, trace)
    plan = Plan(preset, contenders=("ours",), loads=(), workload=workload, trace=trace)
    enough = fewest(plan, MEET, MOST_ENGINES).engines or MOST_ENGINES
    said = play(preset, enough, workload, demands, TRACE_S)
    return enough, fmean(answer.engines for at, answer in said if at >= SETTLED_S), said[-1][1].peak


def main() -> int:
    """Print both tables."""
    wrong = 0
    print("gauge over truth, the last minute of a run: mean (least to most) of 1 and 2 engines and seeds", *SEEDS)
    print(f"{'shape':12s}{'mix':12s}", *(f"{load:18.0%}" for load in LOADS), "  within 15 %")
    for preset in SHAPES:
        for mix in MIXES:
            workload, cells, near = TRAFFIC[mix].workload, [], []
            for load in LOADS:
                ratios = [ratio(preset, engines, workload, load, seed) for engines in ENGINES for seed in SEEDS]
                near += [abs(one - 1.0) <= RIGHT for one in ratios]
                cells.append(f"{fmean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
                wrong += abs(fmean(ratios) - 1.0) > RIGHT
            print(f"{preset:12s}{mix:12s}", *cells, f"  {sum(near)} of {len(near)}", flush=True)
    print("\nthe same where a line grows: a fixed limit, and clients who wait")
    print(f"{'shape':12s}{'limit':>6s}      ", *(f"{load:18.0%}" for load in LINE_LOADS))
    for preset, limit in LINES:
        cells = []
        for load in LINE_LOADS:
            ratios = [ratio(preset, engines, PATIENT, load, seed, limit) for engines in ENGINES for seed in SEEDS]
            cells.append(f"{fmean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
            wrong += abs(fmean(ratios) - 1.0) > RIGHT
        print(f"{preset:12s}{limit:6d}      ", *cells, flush=True)
    print(f"\nthe fewest engines for {MEET:.0%} of each class (`simulate --engines auto`), and the gauge before them")
    print(f"{'shape':12s}{'mix':12s}{'work':>6s}{'auto':>6s}{'gauge, mean':>13s}{'peak':>7s}")
    with tempfile.TemporaryDirectory() as folder:
        for preset in SHAPES:
            for mix in SIZED_MIXES:
                for mean in SIZED_FOR:
                    auto, now, peak = sized(preset, TRAFFIC[mix].workload, mean, Path(folder))
                    print(f"{preset:12s}{mix:12s}{mean:6.1f}{auto:6d}{now:13.2f}{peak or 0.0:7.2f}", flush=True)
                    wrong += abs(auto - now) > 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
