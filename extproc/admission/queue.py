"""An ordered line of waiting tickets, and its window. It knows order, and nothing of endpoints' books.

A sorted list in blocks, as that of `sortedcontainers`, and for what is done here at a third of its time: nearly all who
leave are the first of their line.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from itertools import chain, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extproc.admission.ticket import Key, Ticket

WINDOW: Final = 32
"""How many requests at the head of a line are looked at for one that fits (group dispatch by first fit)."""
Entry = tuple[int, float, int, "Ticket"]
"""A key, and whose it is: no two are alike, so tickets are never compared."""
BLOCK = 256
"""Places in one block at the most: one that is full becomes two halves."""


class Queue:
    """Tickets in the order of their keys: class, then fairness tag, then arrival.

    Coming and going cost O(log n), but for the blocks' own list, which is 128 times shorter than the line.

    Attributes:
        head: the one that goes first; None: nobody waits.
        depth: how many there are, by the name of their class.
        guards: how many keep room for themselves: see guard.py.
        is_left: it was given up: who stands here is settled anew, and till then nobody is sent anywhere.
    """

    __slots__ = ("_blocks", "_count", "_starts", "depth", "guards", "head", "is_left")

    def __init__(self) -> None:
        """Make an empty line."""
        self._blocks: list[list[Entry]] = [[]]  # in order; none is empty, but the only one
        self._starts: list[Key] = []  # where each begins but the first: all before stand in earlier ones
        self._count = 0
        self.head: Ticket | None = None
        self.depth: dict[str, int] = {}
        self.guards = 0
        self.is_left = False

    def __len__(self) -> int:
        """Count the waiting tickets."""
        return self._count

    def __iter__(self) -> Iterator[Ticket]:
        """Walk the tickets in order."""
        return map(_ticket, chain.from_iterable(self._blocks))

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
        if key is None:
            return list(islice(self, most))
        place = bisect_right(self._starts, key)
        entries = chain.from_iterable(islice(self._blocks, place, None))
        first = bisect_left(self._blocks[place], (key[0], key[1], key[2] + 1))
        return list(map(_ticket, islice(entries, first, first + most)))

    def add(self, ticket: Ticket) -> None:
        """Put `ticket` at the place of its key."""
        key = ticket.key
        place = bisect_right(self._starts, key)
        block = self._blocks[place]
        insort(block, (key[0], key[1], key[2], ticket))
        if len(block) > BLOCK:
            half = block[BLOCK // 2 :]
            del block[BLOCK // 2 :]
            self._blocks.insert(place + 1, half)
            self._starts.insert(place, half[0][:3])
        if not place and block[0][3] is ticket:
            self.head = ticket
        self._count += 1
        ticket.queue = self
        name = ticket.request_class.name
        self.depth[name] = self.depth.get(name, 0) + 1
        if ticket.is_guard:
            self.guards += 1

    def remove(self, ticket: Ticket) -> None:
        """Take `ticket` out, wherever it stands.

        Raises:
            KeyError: it does not stand here.
        """
        place, blocks = 0, self._blocks
        if ticket is self.head:
            block = blocks[0]
            del block[0]
        else:
            place = bisect_right(self._starts, ticket.key)
            block = blocks[place]
            at = bisect_left(block, ticket.key)
            if at == len(block) or block[at][3] is not ticket:
                raise KeyError(ticket)
            del block[at]
        if not block and self._starts:  # the one before it, or else the next, is now for its places
            del blocks[place], self._starts[max(place - 1, 0)]
        first = blocks[0]
        self.head = first[0][3] if first else None
        self._count -= 1
        ticket.queue = None
        self.depth[ticket.request_class.name] -= 1
        if ticket.is_guard:
            self.guards -= 1

    def last(self) -> Ticket:
        """Return the ticket that goes last. The line must not be empty."""
        return self._blocks[-1][-1][3]

    def window(self) -> Iterator[Ticket]:
        """Walk the first WINDOW tickets in order."""
        return map(_ticket, islice(chain.from_iterable(self._blocks), WINDOW))

    def in_window(self, ticket: Ticket) -> bool:
        """Tell whether `ticket` is among the first WINDOW, or would be if it stood here."""
        return self._count < WINDOW or ticket.key <= self._at(WINDOW - 1).key

    def entrant(self) -> Ticket | None:
        """Return the ticket that came into the window when one before it went; None if nobody did."""
        return self._at(WINDOW - 1) if self._count >= WINDOW else None

    def behind_window(self) -> Ticket | None:
        """Return the first ticket behind the window; None if nobody is there."""
        return self._at(WINDOW) if self._count > WINDOW else None

    def _at(self, place: int) -> Ticket:
        first = self._blocks[0]
        return first[place][3] if place < len(first) else next(islice(self, place, None))

    def rank(self, ticket: Ticket) -> int:
        """Count the tickets before `ticket`."""
        place = bisect_right(self._starts, ticket.key)
        return sum(map(len, self._blocks[:place])) + bisect_left(self._blocks[place], ticket.key)


_ticket = itemgetter(3)
