"""The waits of the last minutes, each as it was: percentiles of them are exact, not read off buckets.

A window of single waits and no sketch: LLM requests are few (tens a second are many), so a few thousand numbers are all
there is to say, and they need no library, no error bound and no merging.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WINDOW_S = 300.0
MOST = 8192
"""Waits kept of a class: of more requests than 27 a second the window is shorter than WINDOW_S."""


class Waits:
    """The latest waits of one class."""

    __slots__ = ("_waits",)

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._waits: deque[tuple[float, float]] = deque(maxlen=MOST)

    def note(self, at: float, wait_s: float) -> None:
        """Remember a request that was dispatched at `at` after `wait_s`."""
        self._waits.append((at, wait_s))

    def since(self, at: float) -> list[float]:
        """Return the waits that ended at `at` or later, shortest first, and forget nothing."""
        recent = []
        for ended, wait_s in reversed(self._waits):
            if ended < at:
                break
            recent.append(wait_s)
        recent.sort()
        return recent


def percentile(waits: Sequence[float], share: float) -> float | None:
    """Return the least of the sorted `waits` that `share` of them don't exceed (nearest rank); None: there is none."""
    return waits[max(math.ceil(share * len(waits)) - 1, 0)] if waits else None
