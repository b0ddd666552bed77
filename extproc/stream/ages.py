"""How old a request was when it reached us: Envoy stamps it (request.time), and a replay keeps the stamp.

So a request that was held by a sidecar that died keeps its age at the next one. Stamps are times of Envoy's wall clock,
which need not be ours. How far the two are apart is seen in requests that nobody held: they are milliseconds old, so
what they seem to be is the difference. Ages are believed only for a while after a start, when replays can come; else a
clock that is set would end requests that just came.
"""

from __future__ import annotations

import time
from collections import deque
from datetime import datetime
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

JUMP_S: Final = 1.0
DOUBT_S: Final = 30.0
"""How long after a jump of our clock stamps may come from the time before it."""
BELIEVED_S = 12.0
"""How long after a start ages are believed: replays come within 10 s, and wait a second to be put in order."""
FRESH_S = 0.05
"""Requests that nobody held come within so many seconds of each other's age: Envoy needs milliseconds to show one."""
RUN_S = 0.25
"""Requests that seem equally old, and come further apart than this, were not held: those would have grown older."""
STOPPED_S: Final = 5.0
"""Nobody has looked for so long: the process was stopped (SIGSTOP, a frozen machine). After 8 s Envoy hangs up."""
SAMPLE_S: Final = 0.05
"""While no age is believed, stamps only tell of Envoy's clock: one in so many seconds is read."""
REPLAYS_BEGIN_S = 2.0
"""How long after a start the first replayed request comes: Envoy looks for us once a second. They may come in one
moment, all equally old; if that happens later, it is the clock."""


class Ages:
    """Ages of requests, in seconds, never negative."""

    def __init__(
        self,
        oldest_s: float,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Believe no age above `oldest_s`, the longest that a request may wait."""
        self.oldest_s = oldest_s
        self._wall, self._monotonic = wall, monotonic
        self._own = wall() - monotonic()
        self._doubt_until = 0.0
        self._expected = self._believed_until = 0.0
        self._offset_s = 0.0
        self._looked_at = monotonic()
        self._read_at = -SAMPLE_S
        self.woke: Callable[[], None] = lambda: None  # called when this process goes on after it was stopped
        self._old: deque[tuple[float, float]] = deque(
            maxlen=64
        )  # how old requests seemed since one was fresh, and when

    def expect_replays(self) -> None:
        """Believe ages for a while from now on."""
        self._expected = self._monotonic()
        self._believed_until = self._expected + BELIEVED_S

    def wants_stamp(self) -> bool:
        """Tell whether the stamp of a request that is here now would be read: to have it costs more than to ask."""
        monotonic = self._monotonic()
        if monotonic - self._looked_at > STOPPED_S:  # this request came first
            self.look()
        return not self._believed_until <= monotonic < self._read_at + SAMPLE_S

    def age_s(self, stamp: str | None) -> float:
        """Return the age of a request stamped `stamp` (RFC 3339); 0 if it says nothing believable."""
        if not self.wants_stamp():
            return 0.0
        self._read_at = monotonic = self._monotonic()
        if not stamp:
            return 0.0
        wall = self._wall()
        try:
            seeming_s = wall - datetime.fromisoformat(stamp).timestamp()
        except (ValueError, OverflowError):
            return 0.0
        own = wall - monotonic
        if abs(own - self._own) > JUMP_S:
            self._doubt_until, self._own = monotonic + DOUBT_S, own
            self._old.clear()
        if monotonic < self._doubt_until:
            return 0.0
        self._note(seeming_s, monotonic)
        if monotonic >= self._believed_until:
            return 0.0
        return min(max(seeming_s - self._offset_s, 0.0), self.oldest_s)

    def look(self) -> None:
        """Notice that this process was stopped: Envoy may send again what we held. To be called about once a second."""
        now = self._monotonic()
        stopped_s, self._looked_at = now - self._looked_at, now
        if stopped_s > STOPPED_S:
            self.woke()

    @property
    def offset_s(self) -> float:
        """How far our clock is ahead of Envoy's, in seconds, as far as requests have shown; negative: behind it."""
        if self._old:
            least, _ = min(self._old)
            alike = [came for seeming, came in self._old if seeming - least <= FRESH_S]
            most = len(alike) >= 2 and 2 * len(alike) >= len(self._old)
            if most and (alike[-1] - alike[0] >= RUN_S or self._old[0][1] >= self._expected + REPLAYS_BEGIN_S):
                self._offset_s = least
                self._old.clear()
        return self._offset_s

    def _note(self, seeming_s: float, now: float) -> None:
        """Learn from one more request. Too young can only be the clock; too old may also be a replay, or its upload."""
        if seeming_s < self._offset_s:
            self._offset_s = seeming_s
            self._old.clear()
        elif seeming_s <= self._offset_s + FRESH_S:
            self._old.clear()
        else:
            self._old.append((seeming_s, now))
            if now - self._old[0][1] >= RUN_S:
                _ = self.offset_s
