"""How much of an engine's KV cache so many prompts would take, learned from how full it was with fewer or more.

What prompts begin with in common is in the cache once, however many run. So an engine that runs few requests shows
little of what sharing will save when it is full. Two figures tell it:

    tokens in use = once + each x tokens of the prompts booked + half of the answers booked

A line through the readings of the last minutes gives both. The core's own figure (`admission/kv.py`, one factor) won't
do: it follows the moment, and after pressure it is a guess on the safe side.
"""

from __future__ import annotations

import math
from typing import Final

MEMORY_S: Final = 120.0
"""What a reading before that showed weighs less than a third."""
DOUBT: Final = 1.0
"""As many readings say that nothing is there once: a line through one point has any slope."""
LEAST_EACH: Final = 1 / 32
"""No prompt is all shared."""


class Filling:
    """The line of one engine. Sums of readings, weighted by age: count, prompts, in use, and their products."""

    __slots__ = ("_at", "_count", "_products", "_prompts", "_squares", "_used")

    def __init__(self) -> None:
        """Know nothing: a prompt takes what it has tokens."""
        self._at = -math.inf
        self._count = self._prompts = self._used = self._squares = self._products = 0.0

    def learn(self, now: float, capacity: int, usage: float, prompts: int, outputs: int) -> None:
        """Follow a reading: `usage` of `capacity` tokens, by `prompts` that are computed, and half of `outputs`.

        `prompts`: so many that the reading says something of them (`KvLaw.enough`). The same reading again: no-op.
        """
        if now <= self._at:
            return
        kept = math.exp((self._at - now) / MEMORY_S)
        x = prompts / capacity
        y = min(max(usage - outputs / 2 / capacity, 0.0), x)  # beyond it is somebody else's
        self._at = now
        self._count = self._count * kept + 1.0
        self._prompts = self._prompts * kept + x
        self._used = self._used * kept + y
        self._squares = self._squares * kept + x * x
        self._products = self._products * kept + x * y

    def line(self, capacity: int) -> tuple[float, float]:
        """Return the tokens that are there `once`, and what `each` token of a prompt takes beside."""
        if not self._squares:
            return 0.0, 1.0
        count, prompts = self._count + DOUBT, self._prompts
        width = count * self._squares - prompts * prompts  # above 0: DOUBT is
        each = min(max((count * self._products - prompts * self._used) / width, LEAST_EACH), 1.0)
        once = max((self._used - each * prompts) / count, 0.0)
        if not once:
            each = min(max(self._products / self._squares, LEAST_EACH), 1.0)
        return once * capacity, each
