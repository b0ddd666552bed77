"""The rivals at their best: every setting of an open grid, on seeds of its own, and what won.

A rival gets what an operator could find out by trying: each fixed limit of `SHARES` times the number that the engine's
batch, KV cache and time per token suggest, and for HAProxy each `timeout queue` of `waits`. The whole grid is played,
nothing is climbed, so `tried` is its size. Ours is not in here: it stays at its defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from extproc.simulate.workload import Klass

SEARCHED = ("circuit_breaker", "tuned_engine", "haproxy")
SHARES = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0, 1.3, 1.7, 2.4, 3.5)
SEEDS = (51, 52, 53)


@dataclass(frozen=True, slots=True)
class Found:
    """What won.

    Attributes:
        text: the contender with its settings, as `extproc simulate --contender` reads it.
        goodput: 0..1, on the seeds of the search.
        tried: how many settings were played.
    """

    text: str
    goodput: float
    tried: int


def waits(classes: Iterable[Klass]) -> list[float]:
    """Return the queue timeouts to try, seconds: the budgets of the classes and what lies between, a quarter and a half
    of the shortest, twice the longest.
    """
    budgets = sorted({klass.budget_s for klass in classes})
    between = (math.sqrt(low * high) for low, high in pairwise(budgets))
    return sorted([budgets[0] / 4, budgets[0] / 2, *budgets, *between, budgets[-1] * 2])


def grid(rival: str, natural: int, waits_s: Iterable[float]) -> list[str]:
    """Return all settings of a rival that are tried. Raises ValueError for one that is not searched."""
    if rival not in SEARCHED:
        raise ValueError(f"{rival!r} has nothing to search; {', '.join(SEARCHED)} have")
    limits = sorted({max(round(share * natural), 1) for share in SHARES})
    if rival != "haproxy":
        return [f"{rival},limit={limit}" for limit in limits]
    waits_ms = sorted({round(wait_s * 1000) for wait_s in waits_s})
    return [f"{rival},limit={limit},queue={wait_ms}ms" for limit in limits for wait_ms in waits_ms]


def best(rival: str, natural: int, waits_s: Iterable[float], score: Callable[[str], float]) -> Found:
    """Play a rival's whole grid; `score` gives goodput, 0..1. Of equals, the smaller limit wins."""
    scores = {text: score(text) for text in grid(rival, natural, waits_s)}
    text = max(scores, key=scores.__getitem__)
    return Found(text, scores[text], len(scores))
