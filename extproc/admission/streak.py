"""Whether an endpoint's refusals in a row tell anything: held against what its peers did. This is all of the measure.

No status code is looked up in a list. Two questions are asked of so many in a row:

- Are they usual? By what was refused before, at all times: a client's bad requests are over at once, and so go to the
  emptiest, one after the other. What the others did meanwhile says little of those.
- Would they come to an endpoint that is as its peers are? By what these did since the first of them.

`health.py` asks them of an endpoint as a whole, `missing.py` the second one of each of its models.
"""

from __future__ import annotations

from math import exp, lgamma
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from extproc.admission.laws import HealthLaw

USUAL_S: Final = 10.0
"""So far back one looks for what a pool refuses all the time, up to twice as far."""


class Counts(NamedTuple):
    """What a tally said at some time."""

    served: int
    led: int
    refused: int


NONE: Final = Counts(0, 0, 0)


class Tally:
    """What became of the requests of one pool, of one model, or of those that one endpoint refused of either.

    Attributes:
        served: answers that were good.
        led: those of them whose client had them go where they went. Refusals of such are not counted.
        refused: answers that were not good.
    """

    __slots__ = ("_before", "_begin", "_span", "led", "refused", "served")

    def __init__(self) -> None:
        """Start without any."""
        self.served = self.led = self.refused = 0
        self._span = 0  # which span of USUAL_S the last refusal came in
        self._begin = self._before = NONE  # what was counted when that began, and the one before it

    def counts(self) -> Counts:
        """Return all three numbers."""
        return Counts(self.served, self.led, self.refused)

    def a_while_ago(self, now: float) -> Counts:
        """Return what they were a while ago, the refused ones exactly. To be asked before any refusal is counted."""
        span = int(now / USUAL_S)
        if span != self._span:
            self._before = self._begin if span == self._span + 1 else self.counts()
            self._begin, self._span = self.counts(), span
        return self._before

    def is_recent(self, now: float) -> bool:
        """Tell whether a refusal of that while is in it."""
        return int(now / USUAL_S) <= self._span + 1


class Streak:
    """Refusals in a row by one endpoint, of the requests of one pool or model. A good answer ends them.

    Attributes:
        tally: of the pool or model.
        own: what this endpoint refused of it, at any time.
        count: in a row.
    """

    __slots__ = ("_before", "_first", "_own_before", "count", "own", "tally")

    def __init__(self, tally: Tally) -> None:
        """Start without any, beside what `tally` says of all endpoints."""
        self.tally = tally
        self.own = Tally()
        self.count = 0
        self._first = NONE  # the tally as the first of them came,
        self._before = self._own_before = NONE  # and a while before; what of that was this endpoint's

    def add(self, now: float) -> None:
        """Count one more, in the tally, too."""
        before, own_before = self.tally.a_while_ago(now), self.own.a_while_ago(now)
        if not self.count:
            self._first, self._before, self._own_before = self.tally.counts(), before, own_before
        self.count += 1
        self.own.refused += 1
        self.tally.refused += 1

    def end(self) -> None:
        """Begin anew with the next one."""
        self.count = 0

    def is_usual(self, law: HealthLaw) -> bool:
        """Tell whether so many in a row are no news, by the share that is refused all the time.

        Its own refusals before count as far as the others refused as many. A few are taken as served that nobody saw:
        the first refusals are news.
        """
        own = self.own.refused - self._own_before.refused
        served, refused = self._peers(self._before, own)
        refused += min(own - self.count, refused)
        usual: float = (refused / (refused + served + law.few)) ** self.count
        return usual > law.chance

    def chance(self, *, is_own_fault: bool = False) -> float:
        """Return the chance that one who is as its peers are refuses so many in a row, by what these did meanwhile.

        `is_own_fault`: no request can be to blame. Else of a few good answers of theirs little follows, however many it
        refused: one client's bad requests may all have come here. (Laplace's rule of succession, for all together.)
        """
        if is_own_fault:
            served = self.tally.served - self._first.served
            refused = self.tally.refused - self._first.refused - self.count
            power: float = ((refused + 1) / (refused + served + 2)) ** self.count
            return power
        served, refused = self._peers(self._first, self.count)
        answers = served + refused
        return exp(
            lgamma(refused + self.count + 1)
            - lgamma(refused + 1)
            - lgamma(answers + self.count + 2)
            + lgamma(answers + 2)
        )

    def _peers(self, since: Counts, own: int) -> tuple[int, int]:
        """Return what was served and what the others refused `since` then, as far as requests that fail compare to it.

        `own`: refusals that are this endpoint's. Where the others refuse any, a good answer to one that was led there
        is left out: it shows that it works for those who go there by themselves, and bad requests that nobody leads
        may all have come here.
        """
        tally = self.tally
        served, refused = tally.served - since.served, tally.refused - since.refused - own
        return served - (tally.led - since.led) if refused else served, refused
