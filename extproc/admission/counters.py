"""Whether an engine's counters are believed: what they say of an answer, held against what its peers' say of theirs.

Requests of one pool go where there is room, so answers are about as long everywhere. Counters by which they are many
times longer or shorter than in the pool's mean are wrong: they count twice, in other units, or not at all. Of two
engines that differ so, nobody knows which; then neither is believed. Who is not believed goes by its gauges and by how
long its answers take, as an engine without counters does: it is never closed for that, and believed again as soon as
it says what the others say.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

FAR = 3.0
"""An engine's mean answer may be so many times longer or shorter than the pool's ..."""
NEAR = 2.5
"""... and must come as near as this to be believed again."""
MEMORY = 100.0
"""About so many of the last answers make an engine's mean; of the pool's, for each of its engines."""
ENOUGH = 30.0
"""Answers of an engine that say something."""


class Usual:
    """How long answers are in one pool, by all its engines' counters: their geometric mean, so one counts as one."""

    __slots__ = ("log_tokens",)

    def __init__(self) -> None:
        """Start knowing nothing."""
        self.log_tokens: float | None = None

    def follow(self, log_tokens: float, answers: float, engines: int) -> None:
        """Follow the mean of an engine that has just finished `answers`."""
        if self.log_tokens is None:
            self.log_tokens = log_tokens
        else:
            self.log_tokens += min(answers / (MEMORY * max(engines, 1)), 0.5) * (log_tokens - self.log_tokens)


class Counters:
    """What one engine's counters say of an answer.

    Attributes:
        doubted: whether they are not believed.
    """

    __slots__ = ("_answers", "_tokens", "doubted")

    def __init__(self) -> None:
        """Start believing."""
        self._answers = 0.0
        self._tokens = 0.0
        self.doubted = False

    def follow(self, tokens: int, answers: int, pools: Iterable[tuple[Usual, int]]) -> None:
        """Follow `answers` that have finished and `tokens` counted since; `pools`: what is usual, among how many."""
        self._answers = min(self._answers + answers, MEMORY)
        self._tokens += min(answers / self._answers, 1.0) * (tokens / answers - self._tokens)
        if self._answers < ENOUGH:
            return
        log_tokens, far = math.log(max(self._tokens, 1.0)), 0.0
        for usual, engines in pools:
            usual.follow(log_tokens, answers, engines)
            far = max(far, abs(log_tokens - (usual.log_tokens or 0.0)))
        self.doubted = far > math.log(NEAR if self.doubted else FAR)
