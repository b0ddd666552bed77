"""An ordered line of waiting tickets. It knows order and the first-fit rule, and nothing of endpoints' books."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from sortedcontainers import SortedList

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extproc.admission.ticket import Ticket

WINDOW = 32
"""How many requests at the head of a line are looked at for one that fits (group dispatch by first fit)."""

GUARD = 64
"""How often a request may be passed over by later ones that fit; after that nobody passes it."""


class Queue:
    """Tickets in the order of their keys: class, then fairness tag, then arrival. All operations are O(log n)."""

    __slots__ = ("_line", "depth", "exhausted")

    def __init__(self) -> None:
        """Make an empty line."""
        self._line: SortedList = SortedList()
        self.depth: dict[str, int] = {}  # tickets in the line by the name of their class
        self.exhausted = 0  # tickets in the line that were passed over GUARD times

    def __len__(self) -> int:
        """Count the waiting tickets."""
        return len(self._line)

    def __iter__(self) -> Iterator[Ticket]:
        """Walk the tickets in order."""
        return (ticket for _, ticket in self._line)

    def add(self, ticket: Ticket) -> None:
        """Put `ticket` at the place of its key."""
        self._line.add((ticket.key, ticket))
        ticket.queue = self
        name = ticket.request_class.name
        self.depth[name] = self.depth.get(name, 0) + 1
        if ticket.passed_over >= GUARD:
            self.exhausted += 1

    def remove(self, ticket: Ticket) -> None:
        """Take `ticket` out, wherever it stands."""
        self._line.remove((ticket.key, ticket))
        ticket.queue = None
        self.depth[ticket.request_class.name] -= 1
        if ticket.passed_over >= GUARD:
            self.exhausted -= 1

    def last(self) -> Ticket:
        """Return the ticket that goes last. The line must not be empty."""
        ticket: Ticket = self._line[-1][1]
        return ticket

    def window(self) -> Iterator[Ticket]:
        """Walk the first WINDOW tickets in order."""
        return (ticket for _, ticket in islice(self._line, WINDOW))

    def in_window(self, ticket: Ticket) -> bool:
        """Tell whether `ticket` is among the first WINDOW."""
        line = self._line
        return len(line) <= WINDOW or ticket.key <= line[WINDOW - 1][0]

    def entrant(self) -> Ticket | None:
        """Return the ticket that came into the window when one before it went; None if nobody did."""
        line = self._line
        ticket: Ticket | None = line[WINDOW - 1][1] if len(line) >= WINDOW else None
        return ticket

    def rank(self, ticket: Ticket) -> int:
        """Count the tickets before `ticket`."""
        rank: int = self._line.bisect_left((ticket.key,))
        return rank

    def pass_over_before(self, ticket: Ticket) -> None:
        """Note that `ticket` goes although the tickets before it in the window stay."""
        for key, other in islice(self._line, WINDOW):
            if key >= ticket.key:
                return
            other.passed_over += 1
            if other.passed_over == GUARD:
                self.exhausted += 1
