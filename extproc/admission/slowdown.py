"""How answers slow down as more run at once: what our own books tell of an engine that says nothing of its tokens.

An answer takes `alone_s + each_s x requests beside it`, in the mean. A Kalman filter follows the two from how long
answers took and how many ran. From them comes the most that should run: the time an answer may take is bounded by what
the engine could do alone, since nobody said what is wanted.
"""

from __future__ import annotations

import math

FIRST = (4.0, 0.2)
"""Seconds of an answer alone, and for each one beside it, before anything was seen; by how much that may be off."""
FIRST_OFF = (4.0, 0.2)
DRIFT = (0.005, 0.0005)
"""How far each may move with an answer."""
LEAST = (0.02, 1e-4)
NOISE = 0.8
"""By how much one answer is off the mean of its kind, as a share of it: answers have all lengths."""
LONG_S = 12.0
"""200 tokens at 60 ms: as slow as an answer should become ..."""
MOST, ENOUGH = 5.0, 3.0
"""... but at the most so many times what it takes alone (more gains little throughput), and always this much."""
HOPE = 1.0
"""Standard deviations of doubt that are read in favour of more."""


class Slowdown:
    """The two times of one endpoint.

    Attributes:
        alone_s: seconds that an answer takes alone.
        each_s: seconds that each request beside it adds.
    """

    __slots__ = ("_spread", "alone_s", "each_s")

    def __init__(self) -> None:
        """Start with a guess."""
        self.alone_s, self.each_s = FIRST
        self._spread = [FIRST_OFF[0] ** 2, 0.0, FIRST_OFF[1] ** 2]  # of the first, of both, of the second

    def learn(self, took_s: float, beside: float) -> None:
        """Follow an answer that took `took_s`, with `beside` requests at the endpoint in the mean."""
        first, both, second = self._spread
        first += DRIFT[0] ** 2
        second += DRIFT[1] ** 2
        expected = self.alone_s + self.each_s * beside
        took_s = min(took_s, 4.0 * expected)  # one endless answer says little
        on_alone, on_each = first + both * beside, both + second * beside
        total = on_alone + on_each * beside + (NOISE * expected) ** 2
        missing = (took_s - expected) / total
        self.alone_s = max(self.alone_s + on_alone * missing, LEAST[0])
        self.each_s = max(self.each_s + on_each * missing, LEAST[1])
        self._spread = [first - on_alone**2 / total, both - on_alone * on_each / total, second - on_each**2 / total]

    @property
    def most(self) -> float:
        """Return how many requests at once keep answers as fast as one may want.

        Doubt counts for more: what is not tried is not learned, and too few refuse what could be served.
        """
        first, _, second = self._spread
        alone_s = self.alone_s + HOPE * math.sqrt(max(first, 0.0))
        each_s = max(self.each_s - HOPE * math.sqrt(max(second, 0.0)), self.each_s / 4)
        longest_s = max(ENOUGH * alone_s, min(MOST * alone_s, LONG_S))
        return (longest_s - alone_s) / each_s
