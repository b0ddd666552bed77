"""An ordered line of waiting tickets, and its window. It knows order, and nothing of endpoints' books.

A sorted list in blocks, as that of `sortedcontainers`, and for what is done here at a third of its time: nearly all who
leave are the first of their line. Places alone stand in it: they compare twice as fast as pairs with a ticket.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from itertools import chain, islice, takewhile
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extproc.admission.ticket import Key, Ticket

WINDOW: Final = 32
"""How many requests at the head of a line are looked at for one that fits (group dispatch by first fit)."""
BLOCK = 256
"""Places in one block at the most: one that is full becomes two halves."""


class Queue:
    """Tickets in the order of their keys: class, then fairness tag, then arrival.

    Coming and going cost O(log n), but for the blocks' own list, which is 128 times shorter than the line.

    Attributes:
        tickets: by the sequence number in their key, in no order that means anything.
        head: the one that goes first; None: nobody waits.
        depth: how many there are, by the name of their class.
        guards: how many keep room for themselves: see guard.py.
        is_left: it was given up: who stands here is settled anew, and till then nobody is sent anywhere.
    """

    __slots__ = ("_blocks", "_starts", "depth", "guards", "head", "is_left", "tickets")

    def __init__(self) -> None:
        """Make an empty line."""
        self._blocks: list[list[Key]] = [[]]  # in order; none is empty, but the only one
        self._starts: list[Key] = []  # where each begins but the first: all before stand in earlier ones
        self.tickets: dict[int, Ticket] = {}
        self.head: Ticket | None = None
        self.depth: dict[str, int] = {}
        self.guards = 0
        self.is_left = False

    def __len__(self) -> int:
        """Count the waiting tickets."""
        return len(self.tickets)

    def __iter__(self) -> Iterator[Ticket]:
        """Walk the tickets in order."""
        tickets = self.tickets
        return (tickets[key[2]] for key in chain.from_iterable(self._blocks))

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
        return [self.tickets[one[2]] for one in islice(self.keys_behind(key), most)]

    def keys_behind(self, key: Key | None = None) -> Iterator[Key]:
        """Walk the places behind one, in order; None: from the front."""
        if key is None:
            return chain.from_iterable(self._blocks)
        place = bisect_right(self._starts, key)
        keys = chain.from_iterable(islice(self._blocks, place, None))
        return islice(keys, bisect_right(self._blocks[place], key), None)

    def add(self, ticket: Ticket) -> None:
        """Put `ticket` at the place of its key."""
        key = ticket.key
        place = bisect_right(self._starts, key)
        block = self._blocks[place]
        insort(block, key)
        if len(block) > BLOCK:
            half = block[BLOCK // 2 :]
            del block[BLOCK // 2 :]
            self._blocks.insert(place + 1, half)
            self._starts.insert(place, half[0])
        self.tickets[key[2]] = ticket
        if not place and block[0] is key:
            self.head = ticket
        ticket.queue = self
        name = ticket.request_class.name
        self.depth[name] = self.depth.get(name, 0) + 1
        if ticket.is_guard:
            self.guards += 1

    def remove(self, ticket: Ticket) -> None:
        """Take `ticket` out, wherever it stands."""
        key, place, blocks = ticket.key, 0, self._blocks
        del self.tickets[key[2]]
        if ticket is self.head:
            block = blocks[0]
            del block[0]
        else:
            place = bisect_right(self._starts, key)
            block = blocks[place]
            del block[bisect_left(block, key)]
        if not block and self._starts:  # the one before it, or else the next, is now for its places
            del blocks[place], self._starts[max(place - 1, 0)]
        if ticket is self.head:
            first = blocks[0]
            self.head = self.tickets[first[0][2]] if first else None
        ticket.queue = None
        self.depth[ticket.request_class.name] -= 1
        if ticket.is_guard:
            self.guards -= 1

    def last(self) -> Ticket:
        """Return the ticket that goes last. The line must not be empty."""
        return self.tickets[self._blocks[-1][-1][2]]

    def window(self) -> Iterator[Ticket]:
        """Walk the first WINDOW tickets in order."""
        tickets = self.tickets
        return (tickets[key[2]] for key in self.first_keys())

    def in_window(self, ticket: Ticket) -> bool:
        """Tell whether `ticket` is among the first WINDOW, or would be if it stood here."""
        return len(self.tickets) < WINDOW or ticket.key <= self._key(WINDOW - 1)

    def entrant(self) -> Ticket | None:
        """Return the ticket that came into the window when one before it went; None if nobody did."""
        return self.tickets[self._key(WINDOW - 1)[2]] if len(self.tickets) >= WINDOW else None

    def behind_window(self) -> Ticket | None:
        """Return the first ticket behind the window; None if nobody is there."""
        return self.tickets[self._key(WINDOW)[2]] if len(self.tickets) > WINDOW else None

    def _key(self, place: int) -> Key:
        first = self._blocks[0]
        return first[place] if place < len(first) else next(islice(chain.from_iterable(self._blocks), place, None))

    def first_keys(self) -> Iterator[Key]:
        """Walk the places of the first WINDOW tickets in order."""
        return islice(chain.from_iterable(self._blocks), WINDOW)

    def before(self, key: Key) -> list[Ticket]:
        """Return the tickets of the window that stand before a place, in order."""
        return [self.tickets[one[2]] for one in takewhile(key.__gt__, self.first_keys())]

    def rank(self, ticket: Ticket) -> int:
        """Count the tickets before `ticket`."""
        place = bisect_right(self._starts, ticket.key)
        return sum(map(len, self._blocks[:place])) + bisect_left(self._blocks[place], ticket.key)
