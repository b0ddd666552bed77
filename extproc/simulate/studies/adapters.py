"""What is it worth to send a request where its LoRA adapter is loaded, and nothing else? For docs/endpoints.md.

    python -m bench.adapters              # about two minutes on one core

Four simulated engines with eight slots; the n-th adapter is asked for 1/n as often as the first; a step waits for each
adapter that it loads. The shipped core, and the same with `adapter_affinity: false`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from extproc.engine.params import PRESETS
from extproc.simulate.plan import Plan, run
from extproc.simulate.workload import Workload

SHAPES = ("a100-8b", "h100-32b")
SLOTS = 8
NAMES = (8, 16, 32)
TO_LOAD_S = (0.1, 0.5)
LOADS = (0.7, 1.0)
SEEDS = (31, 32, 33)
CONTENDERS = ("ours,adapter_affinity=false", "ours")


def main() -> int:
    """Print the table."""
    print(
        f"goodput without and with, {SLOTS} slots, 60 s, seeds {SEEDS}; load 100 %: what they would do without adapters"
    )
    for preset in SHAPES:
        for names in NAMES:
            for load_s in TO_LOAD_S:
                cells = []
                engine = replace(PRESETS[preset], max_loras=SLOTS, lora_load_s=load_s)
                for load in LOADS:
                    traffic = Workload(adapters=names)
                    plan = Plan(preset, 4, CONTENDERS, (), (load,), SEEDS, 60.0, workload=traffic, engine=engine)
                    cells += [f"{figures.all.goodput:.3f}" for figures in run(plan)]
                print(f"{preset:10s}{names:4d} adapters, {load_s:.1f} s to load one:", *cells, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
