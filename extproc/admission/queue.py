"""An ordered line of waiting tickets. It knows order and the first-fit rule, and nothing of endpoints' books."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from sortedcontainers import SortedList

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from extproc.admission.ticket import Ticket

WINDOW = 32
"""How many requests at the head of a line are looked at for one that fits (group dispatch by first fit)."""

GUARD = 64
"""How often a request may be passed over by later ones that fit; after that room is kept for it, at one endpoint."""


class Queue:
    """Tickets in the order of their keys: class, then fairness tag, then arrival. All operations are O(log n)."""

    __slots__ = ("_line", "_tickets", "depth", "exhausted")

    def __init__(self) -> None:
        """Make an empty line."""
        self._line: SortedList = SortedList()  # keys alone: flat tuples compare twice as fast as pairs with a ticket
        self._tickets: dict[int, Ticket] = {}  # by the sequence number in the key
        self.depth: dict[str, int] = {}  # tickets in the line by the name of their class
        self.exhausted = 0  # tickets in the line that were passed over GUARD times

    def __len__(self) -> int:
        """Count the waiting tickets."""
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        """Walk the tickets in order."""
        tickets = self._tickets
        return (tickets[key[2]] for key in self._line)

    def unordered(self) -> Iterable[Ticket]:
        """Walk the tickets in no order that means anything: a third of the time of walking them in theirs."""
        return self._tickets.values()

    def add(self, ticket: Ticket) -> None:
        """Put `ticket` at the place of its key."""
        key = ticket.key
        self._line.add(key)
        self._tickets[key[2]] = ticket
        ticket.queue = self
        name = ticket.request_class.name
        self.depth[name] = self.depth.get(name, 0) + 1
        if ticket.passed_over >= GUARD:
            self.exhausted += 1

    def remove(self, ticket: Ticket) -> None:
        """Take `ticket` out, wherever it stands."""
        key = ticket.key
        self._line.remove(key)
        del self._tickets[key[2]]
        ticket.queue = None
        self.depth[ticket.request_class.name] -= 1
        if ticket.passed_over >= GUARD:
            self.exhausted -= 1

    def first(self) -> Ticket:
        """Return the ticket that goes first. The line must not be empty."""
        return self._tickets[self._line[0][2]]

    def last(self) -> Ticket:
        """Return the ticket that goes last. The line must not be empty."""
        return self._tickets[self._line[-1][2]]

    def window(self) -> Iterator[Ticket]:
        """Walk the first WINDOW tickets in order."""
        tickets = self._tickets
        return (tickets[key[2]] for key in islice(self._line, WINDOW))

    def in_window(self, ticket: Ticket) -> bool:
        """Tell whether `ticket` is among the first WINDOW, or would be if it stood here."""
        in_window: bool = len(self._tickets) < WINDOW or ticket.key <= self._line[WINDOW - 1]
        return in_window

    def entrant(self) -> Ticket | None:
        """Return the ticket that came into the window when one before it went; None if nobody did."""
        return self._tickets[self._line[WINDOW - 1][2]] if len(self._tickets) >= WINDOW else None

    def has_guard_after_window(self) -> bool:
        """Tell whether the first ticket behind the window was passed over GUARD times: it may just have left it."""
        return len(self._line) > WINDOW and self._tickets[self._line[WINDOW][2]].passed_over >= GUARD

    def rank(self, ticket: Ticket) -> int:
        """Count the tickets before `ticket`."""
        rank: int = self._line.bisect_left(ticket.key)
        return rank

    def pass_over_before(self, ticket: Ticket, *, same_pool: bool) -> None:
        """Note that `ticket` goes although the tickets before it in the window stay.

        Fairness tags of two pools can't be compared: between pools class and arrival tell who is before.
        """
        place, seniority = ticket.key, (ticket.key[0], ticket.key[2])
        for key in islice(self._line, WINDOW):
            if same_pool:
                if key >= place:
                    return
            elif (key[0], key[2]) >= seniority:
                continue
            other = self._tickets[key[2]]
            other.passed_over += 1
            if other.passed_over == GUARD:
                self.exhausted += 1
