"""An ordered line of waiting tickets, and its window. It knows order, and nothing of endpoints' books."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from sortedcontainers import SortedList

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from extproc.admission.ticket import Key, Ticket

WINDOW = 32
"""How many requests at the head of a line are looked at for one that fits (group dispatch by first fit)."""


class Queue:
    """Tickets in the order of their keys: class, then fairness tag, then arrival. All operations are O(log n)."""

    __slots__ = ("_line", "_tickets", "depth", "guards")

    def __init__(self) -> None:
        """Make an empty line."""
        self._line: SortedList = SortedList()  # keys alone: flat tuples compare twice as fast as pairs with a ticket
        self._tickets: dict[int, Ticket] = {}  # by the sequence number in the key
        self.depth: dict[str, int] = {}  # tickets in the line by the name of their class
        self.guards = 0  # tickets in the line that keep room for themselves: see guard.py

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

    def pieces(self, most: int) -> Iterator[list[Ticket]]:
        """Walk the tickets in order, `most` at a time, with pauses in which the line may change.

        No list of all is made, that collections of garbage would walk, too.
        """
        some = self.behind(None, most)
        while some:
            yield some
            some = self.behind(some[-1].key, most)

    def behind(self, key: Key | None, most: int) -> list[Ticket]:
        """Return up to `most` tickets that stand behind a place, in order; None: from the front."""
        keys = self._line if key is None else self._line.islice(self._line.bisect_right(key))
        return [self._tickets[one[2]] for one in islice(keys, most)]

    def add(self, ticket: Ticket) -> None:
        """Put `ticket` at the place of its key."""
        key = ticket.key
        self._line.add(key)
        self._tickets[key[2]] = ticket
        ticket.queue = self
        name = ticket.request_class.name
        self.depth[name] = self.depth.get(name, 0) + 1
        if ticket.is_guard:
            self.guards += 1

    def remove(self, ticket: Ticket) -> None:
        """Take `ticket` out, wherever it stands."""
        key = ticket.key
        self._line.remove(key)
        del self._tickets[key[2]]
        ticket.queue = None
        self.depth[ticket.request_class.name] -= 1
        if ticket.is_guard:
            self.guards -= 1

    def renew(self) -> None:
        """Put everybody at the place of his key: all keys are others now, but for their sequence numbers."""
        self._line = SortedList(ticket.key for ticket in self._tickets.values())

    def first(self) -> Ticket:
        """Return the ticket that goes first. The line must not be empty."""
        return self._tickets[self._line[0][2]]

    def peek(self) -> Ticket | None:
        """Return the ticket that goes first; None: nobody waits."""
        return self._tickets[self._line[0][2]] if self._tickets else None

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

    def behind_window(self) -> Ticket | None:
        """Return the first ticket behind the window; None if nobody is there."""
        return self._tickets[self._line[WINDOW][2]] if len(self._line) > WINDOW else None

    def first_keys(self) -> Iterator[Key]:
        """Walk the places of the first WINDOW tickets in order."""
        return islice(self._line, WINDOW)

    def at(self, key: Key) -> Ticket:
        """Return the ticket that stands at a place."""
        return self._tickets[key[2]]

    def rank(self, ticket: Ticket) -> int:
        """Count the tickets before `ticket`."""
        rank: int = self._line.bisect_left(ticket.key)
        return rank
