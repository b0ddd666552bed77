"""How many engines a trace needs: the fewest with which every class meets its objectives.

The trace is played as it was recorded against more and more engines, then the gap is halved. That more engines do no
worse is taken for granted; with one seed a number next to the edge may be off by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from extproc.simulate.plan import recorded_load, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.simulate.plan import Plan
    from extproc.simulate.report import Figures


@dataclass(frozen=True, slots=True)
class Sizing:
    """What was found.

    Attributes:
        engines: the fewest that are enough; None: not even the most that were tried.
        tried: figures by number of engines.
        stable: how many would be enough on average: what the trace asks for, over what one engine can do.
    """

    engines: int | None
    tried: dict[int, Figures]
    stable: float


def fewest(
    plan: Plan, share: float, most: int, workers: int = 1, progress: Callable[[int, Figures], None] | None = None
) -> Sizing:
    """Find the fewest engines with which `share` of each class's requests meet their objectives.

    `plan`: its trace and its first contender; its number of engines is not looked at. `progress` hears each number
    that was tried.
    """
    tried: dict[int, Figures] = {}

    def are_enough(engines: int) -> bool:
        if engines not in tried:
            asked = replace(plan, engines=engines, contenders=plan.contenders[:1], loads=())
            (tried[engines],) = run(asked, workers)
            if progress is not None:
                progress(engines, tried[engines])
        return all(line.goodput >= share for line in tried[engines].lines if line.arrivals)

    stable = recorded_load(replace(plan, engines=1, loads=()))
    too_few, engines = 0, min(max(math.ceil(stable), 1), most)
    while not are_enough(engines):
        too_few = engines
        if engines == most:
            return Sizing(None, tried, stable)
        engines = min(2 * engines, most)
    while engines - too_few > 1:
        middle = (engines + too_few) // 2
        if are_enough(middle):
            engines = middle
        else:
            too_few = middle
    return Sizing(engines, tried, stable)
