"""Requests that Envoy held for a sidecar that died come to the next one in random order: put right here.

Envoy looks for a sidecar once a second, so all that it replays comes within about a second of the first of it. What
comes then is gathered, and offered in the order in which it came to Envoy, as soon as no more replays come. Replayed is
what came to Envoy before we began: a request that is old because its upload was slow is not.
"""

from __future__ import annotations

import logging
from math import inf
from typing import TYPE_CHECKING, Protocol

from extproc.stream.by_age import LET_GO_IN_A_TURN, ByAge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from extproc.admission.ticket import Ticket

log = logging.getLogger("extproc.queue")

REPLAYS_S = 10.0
"""How long after a start requests may come that Envoy held for a sidecar that died: it looks for us once a second."""
REPLAYED_S = 0.5
"""A request this old when it comes was held before: Envoy needs milliseconds to show us a new one."""
GATHER_S = 1.1
"""From the first replayed request to the last: the longest back-off of Envoy's retries in our bootstrap is 1 s."""
QUIET_S = 0.5
"""Without another replayed request for so long, there are no more."""


class Loop(Protocol):
    """What is needed of an event loop."""

    def time(self) -> float:
        """Return monotonic seconds."""

    def call_at(self, when: float, callback: Callable[[], None]) -> object:
        """Call once at `when`."""


class Replays:
    """What is kept back for a moment after a start. Without a replayed request that is nothing.

    Attributes:
        until: a request that comes before may have been replayed to us, or must stand behind one.
    """

    def __init__(self, loop: Loop, ended: Callable[[], None]) -> None:
        """Call `ended` when a gathering is over."""
        self._loop = loop
        self._ended = ended
        self._clock_offset_s: Callable[[], float] = float  # nobody measures it: 0
        self._began = self.until = 0.0
        self._expected_until = 0.0  # what `until` is again when all that was gathered is let go
        self._over = 0.0  # when the gathering under way ends
        self._gathered = ByAge()
        self._offsets_s: dict[Ticket, float] = {}  # of the clocks, as known when each came
        self._came_back, self._oldest_s = 0, -inf  # how many were sent again, and the age of the oldest by its stamp

    def expect(self, clock_offset_s: Callable[[], float]) -> None:
        """Expect replays from now on, for a while; `clock_offset_s`: what stamps of requests are off by."""
        self._began = self._loop.time()
        self.until = self._began + REPLAYS_S
        self._clock_offset_s = clock_offset_s

    def gather(self, ticket: Ticket, now: float) -> bool:
        """Keep `ticket` back if requests are being replayed to us; tell whether."""
        arrived = ticket.request.arrived
        if arrived < self._began and now - arrived >= REPLAYED_S:
            if not self._gathered:
                self.until = min(self.until, now + GATHER_S)
                self._loop.call_at(min(now + QUIET_S, self.until), self._look)
            self._over = min(now + QUIET_S, self.until)
            self._came_back += 1
            self._oldest_s = max(self._oldest_s, now - arrived + self._clock_offset_s())
        elif not self._gathered:
            return False
        self._offsets_s[ticket] = offset_s = self._clock_offset_s()
        self._gathered.add(ticket, arrived - offset_s)  # together they may show that the clocks differ
        return True

    def forget(self, ticket: Ticket) -> bool:
        """Drop a request whose client left; tell whether it was kept back."""
        self._offsets_s.pop(ticket, None)
        return self._gathered.discard(ticket)

    def expect_no_more(self) -> None:
        """Keep nothing back once all that was is let go."""
        self._expected_until = 0.0
        if self.until < inf:
            self.until = 0.0

    def __len__(self) -> int:
        """Return how many are kept back."""
        return len(self._gathered)

    def take(self, most: int = LET_GO_IN_A_TURN) -> Iterator[Ticket]:
        """Let go up to so many of what was kept back, one by one, in the order in which it came to Envoy.

        As long as some are left, whoever comes joins them.
        """
        offset_s, now = self._clock_offset_s(), self._loop.time()
        if self.until < inf:
            self._expected_until, self.until = self.until, inf
        try:
            for _ in range(most):
                ticket = self._gathered.pop()
                if ticket is None:
                    return
                request = ticket.request
                request.arrived = min(request.arrived + offset_s - self._offsets_s.pop(ticket), now)
                yield ticket
        finally:
            if not self._gathered:
                self.until = self._expected_until
                self._tell()

    def _tell(self) -> None:
        """Say how many came back, if any did."""
        if self._came_back:
            log.info(
                "%d request(s) came back, held for a sidecar that is gone or was stopped, or were slow to upload; "
                "the oldest was %.1f s old",
                self._came_back,
                max(self._oldest_s - self._clock_offset_s(), 0.0),
                extra={"about": {"came_back": self._came_back}},
            )
            self._came_back, self._oldest_s = 0, -inf

    def _look(self) -> None:
        """End the gathering, if no more has come for a while."""
        if not self._gathered:
            self._tell()  # all have left
        elif self._loop.time() >= self._over:
            self._ended()
        else:
            self._loop.call_at(self._over, self._look)
