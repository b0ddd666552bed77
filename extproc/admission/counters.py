"""Whether an engine's counters are believed: what they say of an answer, held against what its peers' say of theirs.

Requests for one model go where there is room, so answers are about as long at all who serve it. Counters by which they
are many times longer or shorter than in these engines' mean are wrong: they count twice, in other units, or not at all.
Of two engines that differ so, nobody knows which; then neither is believed. Who is not believed goes by its gauges and
by how long its answers take, as an engine without counters does: it is never closed for that, and believed again as
soon as it says what the others say.
"""

from __future__ import annotations

import math

from extproc.admission.laws import LAWS, CounterLaw


class Usual:
    """How long answers are in one pool, by all its engines' counters: their geometric mean, so one counts as one."""

    __slots__ = ("log_tokens",)

    def __init__(self) -> None:
        """Start knowing nothing."""
        self.log_tokens: float | None = None

    def follow(self, log_tokens: float, answers: float, engines: int, memory: float) -> float:
        """Follow the mean of an engine that has just finished `answers`, and return what is usual then.

        `memory`: how many of each engine are remembered.
        """
        if self.log_tokens is None:
            self.log_tokens = log_tokens
        else:
            self.log_tokens += min(answers / (memory * max(engines, 1)), 0.5) * (log_tokens - self.log_tokens)
        return self.log_tokens


class Counters:
    """What one engine's counters say of an answer.

    Attributes:
        law: what makes them doubtful.
        doubted: whether they are not believed.
    """

    __slots__ = ("_answers", "_tokens", "doubted", "law")

    def __init__(self, law: CounterLaw = LAWS.counters) -> None:
        """Start believing."""
        self.law = law
        self._answers = 0.0
        self._tokens = 0.0
        self.doubted = False

    def follow(self, tokens: int, answers: int, usual: Usual, engines: int) -> None:
        """Follow `answers` that have finished and `tokens` counted since; what is `usual` among how many `engines`."""
        law = self.law
        self._answers = min(self._answers + answers, law.memory)
        self._tokens += min(answers / self._answers, 1.0) * (tokens / answers - self._tokens)
        if self._answers < law.enough:
            return
        log_tokens = math.log(max(self._tokens, 1.0))
        far = abs(log_tokens - usual.follow(log_tokens, answers, engines, law.memory))
        self.doubted = far > math.log(law.near if self.doubted else law.far)
