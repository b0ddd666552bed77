"""Requests that are kept back for a moment, and let go by age, some in each turn of the loop."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from extproc.admission.ticket import Ticket

LET_GO_IN_A_TURN = 100
"""Requests that are let go in one turn of the loop: a millisecond or two of the core. 2,000 at once took 28 ms. One by
one: what follows from one may end another's wait, and a fault at one must not take others with it."""

_arrival = attrgetter("request.arrived")


class ByAge:
    """Requests kept back. Who comes while they are let go stands behind those whose order is found."""

    __slots__ = ("_due", "_kept")

    def __init__(self) -> None:
        """Begin with nobody."""
        self._kept: dict[Ticket, None] = {}
        self._due: list[Ticket] = []  # the oldest last; some may be gone

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._kept)

    def __bool__(self) -> bool:
        """Tell whether there are any. Compiled, what may also be None is true without it."""
        return bool(self._kept)

    def __iter__(self) -> Iterator[Ticket]:
        """Walk them, in no order."""
        return iter(self._kept)

    def add(self, ticket: Ticket) -> None:
        """Keep one back."""
        self._kept[ticket] = None

    def add_all(self, tickets: Iterable[Ticket]) -> None:
        """Keep many back in one moment."""
        self._kept.update(dict.fromkeys(tickets))

    def discard(self, ticket: Ticket) -> bool:
        """Forget one; tell whether it was there."""
        if ticket not in self._kept:
            return False
        del self._kept[ticket]
        return True

    def pop(self) -> Ticket:
        """Let go the oldest. There must be one."""
        while True:
            if not self._due:
                self._due = sorted(self._kept, key=_arrival, reverse=True)
            ticket = self._due.pop()
            if self.discard(ticket):
                return ticket
