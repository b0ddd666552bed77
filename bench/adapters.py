"""What is it worth to send a request where its LoRA adapter is loaded, and nothing else? For docs/endpoints.md.

    python -m bench.adapters              # about two minutes on one core

Four simulated engines with eight slots; the n-th adapter is asked for 1/n as often as the first; a step waits for each
adapter that it loads. The shipped core, and the same where nobody is known to have an adapter.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from extproc.admission.adapters import Adapters
from extproc.engine.params import PRESETS
from extproc.simulate.plan import Plan, run
from extproc.simulate.workload import Workload

if TYPE_CHECKING:
    from extproc.admission.endpoint import Endpoint

SHAPES = ("a100-8b", "h100-32b")
SLOTS = 8
NAMES = (8, 16, 32)
TO_LOAD_S = (0.1, 0.5)
LOADS = (0.7, 1.0)
SEEDS = (31, 32, 33)


def nobody(_: Adapters, _model: str | None) -> dict[Endpoint, None]:
    """Return that nobody has it."""
    return {}


def main() -> int:
    """Print the table."""
    print(
        f"goodput without and with, {SLOTS} slots, 60 s, seeds {SEEDS}; load 100 %: what they would do without adapters"
    )
    has = Adapters.having
    for preset in SHAPES:
        for names in NAMES:
            for load_s in TO_LOAD_S:
                cells = []
                engine = replace(PRESETS[preset], max_loras=SLOTS, lora_load_s=load_s)
                for load in LOADS:
                    traffic = Workload(adapters=names)
                    plan = Plan(preset, 4, ("ours",), (), (load,), SEEDS, 60.0, workload=traffic, engine=engine)
                    for Adapters.having in (nobody, has):  # type: ignore[method-assign]
                        (figures,) = run(plan)
                        cells.append(f"{figures.all.goodput:.3f}")
                print(f"{preset:10s}{names:4d} adapters, {load_s:.1f} s to load one:", *cells, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
