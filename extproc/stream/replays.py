"""Requests that Envoy held for a sidecar that died come to the next one in random order: put right here.

Envoy looks for a sidecar once a second, so all that it replays comes within about a second of the first of it. What
comes in that time is gathered, then offered in the order in which it came to Envoy.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.ticket import Ticket

REPLAYS_S = 10.0
"""How long after a start requests may come that Envoy held for a sidecar that died: it looks for us once a second."""
REPLAYED_S = 0.5
"""A request this old when it comes was held before: Envoy needs milliseconds to show us a new one."""
GATHER_S = 1.1
"""From the first replayed request to the last: the longest back-off of Envoy's retries in our bootstrap is 1 s."""

_arrival = attrgetter("request.arrived")


class Replays:
    """What is kept back for a moment after a start. Without a replayed request that is nothing."""

    def __init__(self, call_at: Callable[[float, Callable[[], None]], object], ended: Callable[[], None]) -> None:
        """Call `ended` through `call_at` when a gathering is over."""
        self._call_at = call_at
        self._ended = ended
        self._until = 0.0
        self._gathered: dict[Ticket, None] = {}  # replayed requests, and what came between them

    def expect(self, now: float) -> None:
        """Expect replays from now on, for a while."""
        self._until = now + REPLAYS_S

    def are_expected(self, now: float) -> bool:
        """Tell whether a request that comes at `now` may have been replayed to us, or must stand behind one."""
        return now < self._until

    def gather(self, ticket: Ticket, now: float) -> bool:
        """Keep `ticket` back if requests are being replayed to us; tell whether."""
        if not self._gathered:
            if now - ticket.request.arrived < REPLAYED_S:
                return False
            self._until = now + GATHER_S
            self._call_at(self._until, self._ended)
        self._gathered[ticket] = None
        return True

    def forget(self, ticket: Ticket) -> bool:
        """Drop a request whose client left; tell whether it was kept back."""
        kept = ticket in self._gathered
        if kept:
            del self._gathered[ticket]
        return kept

    def stop(self) -> list[Ticket]:
        """Expect no more; return what was kept back, in the order in which it came to Envoy."""
        self._until = 0.0
        gathered, self._gathered = self._gathered, {}
        return sorted(gathered, key=_arrival)
