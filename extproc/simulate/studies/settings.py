"""What the real rivals are set to, and what else was tried: the whole grid over the ramp's overload, simulated.

    python -m bench.proof.settings     # writes settings.json, beside this file: every setting that was played (minutes)

One setting holds for all loads, as an operator's would. Searched on seeds 51 to 53, which no page is made of.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from extproc.simulate.report import goodput
from extproc.simulate.studies import search, virtual
from extproc.simulate.studies.experiments import BY_NAME, Cell, Times
from extproc.simulate.studies.matrix.cells import by_kv, by_pace, params

FILE = Path(__file__).with_name("settings.json")
PRESETS = ("h100-32b", "a100-8b")
LOADS = (0.9, 1.2, 1.5)
TIMES = Times(60.0, 300.0, math.inf)


def natural(preset: str) -> int:
    """Return how many of the ramp's requests such an engine can run at once within its objectives."""
    workload = BY_NAME["ramp"].workload
    demands = workload.demands(10.0, 300.0, 0)
    return max(min(by_pace(params(preset), demands), by_kv(params(preset), demands)), 1)


def score(task: tuple[str, str]) -> float:
    """Return a contender's goodput, 0..1: the mean over loads and seeds."""
    preset, text = task
    ramp = replace(BY_NAME["ramp"], preset=preset)
    runs = [virtual.play(Cell(ramp, load, seed), text, TIMES) for load in LOADS for seed in search.SEEDS]
    return mean(goodput(run.counted) for run in runs)


def searched(pool: Any, preset: str) -> dict[str, Any]:
    """Play every setting of every rival; return for each what won, and all that was tried."""
    classes = BY_NAME["ramp"].workload.classes
    found = {}
    for rival in search.SEARCHED:
        texts = search.grid(rival, natural(preset), search.waits(classes))
        scores = dict(zip(texts, pool.map(score, [(preset, text) for text in texts], chunksize=1), strict=True))
        won = search.best(rival, natural(preset), search.waits(classes), scores.__getitem__)
        found[rival] = {"won": won.text, "tried": {text: round(value, 4) for text, value in scores.items()}}
        print(f"{preset}: {won.text} has {won.goodput:.3f}, the best of {won.tried}", flush=True)
    return found


def main() -> int:
    """Search, and write the file."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        found = {preset: searched(pool, preset) for preset in PRESETS}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def recorded() -> dict[str, Any]:
    """Return what the last search found: preset -> rival -> `won`, `tried`."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


if __name__ == "__main__":
    sys.exit(main())
