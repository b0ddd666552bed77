"""Requests that are kept back for a moment, and let go by age, some in each turn of the loop."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import chain, islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extproc.admission.ticket import Ticket

LET_GO_IN_A_TURN = 100
"""Requests that are let go in one turn of the loop: a millisecond or two of the core. 2,000 at once took 28 ms. One by
one: what follows from one may end another's wait, and a fault at one must not take others with it."""
PLACED_IN_A_TURN = 1000
"""Requests of many that came in one moment whose places by age are found in one turn, before anybody is let go."""


class ByAge:
    """Requests kept back."""

    __slots__ = ("_added", "_heap", "_kept", "_placed")

    def __init__(self) -> None:
        """Begin with nobody."""
        self._placed: dict[Ticket, None] = {}
        self._heap: list[tuple[float, int, Ticket]] = []  # of these; some may be gone
        self._added = 0
        self._kept: list[dict[Ticket, None]] = [self._placed]  # and who came in one moment, and has no place yet

    def __len__(self) -> int:
        """Return how many there are."""
        return sum(map(len, self._kept))

    def __bool__(self) -> bool:
        """Tell whether there are any. Compiled, what may also be None is true without it."""
        return any(self._kept)

    def __iter__(self) -> Iterator[Ticket]:
        """Walk them, in no order."""
        return chain.from_iterable(self._kept)

    def add(self, ticket: Ticket, came: float) -> None:
        """Keep one back, that came at this time."""
        self._placed[ticket] = None
        self._added += 1
        heappush(self._heap, (came, self._added, ticket))

    def add_all(self, tickets: dict[Ticket, None]) -> None:
        """Keep many back in one moment. What holds them is ours from now on: nobody copies it."""
        if tickets:
            self._kept.append(tickets)

    def discard(self, ticket: Ticket) -> bool:
        """Forget one; tell whether it was there."""
        for tickets in self._kept:
            if ticket in tickets:
                del tickets[ticket]
                if not self._placed:
                    self._heap.clear()
                return True
        return False

    def pop(self) -> Ticket | None:
        """Let go the oldest. None: there is nobody, or some are without a place still, after this turn's share."""
        self._place_some()
        while self._heap and len(self._kept) == 1:
            ticket = heappop(self._heap)[2]
            if self.discard(ticket):
                return ticket
        return None

    def _place_some(self) -> None:
        most = PLACED_IN_A_TURN
        while len(self._kept) > 1 and most:
            tickets = self._kept[-1]
            some = list(islice(tickets, most))
            for ticket in some:
                del tickets[ticket]
                self.add(ticket, ticket.request.arrived)
            if not tickets:
                self._kept.pop()
            most -= len(some)
