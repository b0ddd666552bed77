"""How answers slow down as more run at once: what our own books tell of an engine that says nothing of its tokens.

Each way in which an engine may behave is a hypothesis: an answer beside `b` others takes its time alone times
(1 + c x min(b, n)) x max(b / n, 1). The `c` is what each sequence adds to a step of a batch; from `n` on, more of them
only wait inside. Answers have all lengths, so one says little, but many tell the hypotheses apart: by how much their
times, divided by what each says of them, still differ. What should run is what the hypotheses allow, each as much as it
is likely. Doubt counts for more: what is not tried is not learned, and too few refuse what could be served.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from extproc.admission.laws import LAWS

if TYPE_CHECKING:
    from extproc.admission.laws import AnswerLaw

SHARES = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
"""What each sequence may add to an answer's time, as a share of that alone, in an engine that runs all of them ..."""
SLOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
SLOT_SHARES = (0.0, 0.04)
"""... and in one that runs so many; together these are as likely as those."""
EVERY = 4
"""So many answers between two looks at what should run."""

_HYPOTHESES = (
    *((share, math.inf) for share in SHARES),
    *((share, float(slots)) for slots in SLOTS for share in SLOT_SHARES),
)
_LIKELY = tuple(1.0 if slots == math.inf else len(SHARES) / (len(SLOTS) * len(SLOT_SHARES)) for _, slots in _HYPOTHESES)


@lru_cache(maxsize=1024)
def _slower(beside: float) -> tuple[float, ...]:
    """Return by how much an answer beside so many is slower than alone, its logarithm, by each hypothesis."""
    return tuple(
        math.log((1.0 + share * min(beside, slots)) * max(beside / slots, 1.0)) for share, slots in _HYPOTHESES
    )


class Slowdown:
    """What answers of one endpoint say.

    Attributes:
        law: the constants.
        most: how many requests at once keep answers as fast as one may want.
    """

    __slots__ = ("_count", "_looked", "_squares", "_sums", "law", "most")

    def __init__(self, law: AnswerLaw = LAWS.answers) -> None:
        """Start knowing nothing: anything is possible."""
        self.law = law
        self._count = 0.0  # of answers; all three sums weighted by age
        self._sums = [0.0] * len(_HYPOTHESES)  # of the logarithms of times alone, by hypothesis
        self._squares = [0.0] * len(_HYPOTHESES)
        self._looked = 0
        self.most = math.inf

    def learn(self, took_s: float, beside: float) -> None:
        """Follow an answer that took `took_s`, with `beside` requests at the endpoint in the mean, it among them."""
        took, kept = math.log(max(took_s, 1e-3)), 1.0 - 1.0 / self.law.memory
        if self._count:
            mean = self._sums[0] / self._count  # by the first hypothesis none is slower than alone
            took = min(max(took, mean - self.law.farthest), mean + self.law.farthest)
        self._count = self._count * kept + 1.0
        alone = [took - slower for slower in _slower(round(2.0 * beside) / 2.0)]
        self._sums = [total * kept + one for total, one in zip(self._sums, alone, strict=True)]
        self._squares = [total * kept + one * one for total, one in zip(self._squares, alone, strict=True)]
        self._looked = (self._looked + 1) % EVERY
        if not self._looked:
            self.most = self._look()

    def speed(self, few: float, many: float) -> float:
        """Return what the engine does with `few` requests at once, as a share of what it does with `many`."""
        if few >= many:
            return 1.0
        chances, fewer, more = self._chances(), _slower(round(2.0 * few) / 2.0), _slower(round(2.0 * many) / 2.0)
        faster = (chance * math.exp(b - a) for chance, a, b in zip(chances, fewer, more, strict=True))
        return min(few / many * sum(faster) / sum(chances), 1.0)

    def _chances(self) -> list[float]:
        """Return how likely each hypothesis is."""
        if not self._count:
            return list(_LIKELY)
        unexplained = [
            square - total * total / self._count for square, total in zip(self._squares, self._sums, strict=True)
        ]
        least, doubt = min(unexplained), 2.0 * self.law.noise**2
        return [likely * math.exp((least - one) / doubt) for likely, one in zip(_LIKELY, unexplained, strict=True)]

    def _look(self) -> float:
        """Return the least that will do: more would be right by a chance of `hope` at the most."""
        chances = self._chances()
        more = self.law.hope * sum(chances)
        allowed = [
            _allowed(self.law, *how, math.exp(total / self._count))
            for how, total in zip(_HYPOTHESES, self._sums, strict=True)
        ]
        ranked = sorted(zip(allowed, chances, strict=True), reverse=True)
        for most, chance in ranked:
            more -= chance
            if more <= 0.0:
                return most
        return ranked[-1][0]  # by rounding alone


def _allowed(law: AnswerLaw, share: float, slots: float, alone_s: float) -> float:
    """Return how many should run if a hypothesis is true, and an answer alone takes `alone_s`."""
    longest = max(law.enough, min(law.most, law.long_s / alone_s))
    return min((longest - 1.0) / share if share else math.inf, slots)
