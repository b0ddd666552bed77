"""One heap for every deadline, so that a driver needs one timer whatever the number of waiting requests."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from extproc.admission.ticket import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extproc.admission.ticket import Ticket

_SLACK = 256


class Alarms:
    """At most one alarm per waiting ticket. Alarms of tickets that left are dropped lazily, in O(1) on average."""

    __slots__ = ("_heap", "_sequence")

    def __init__(self) -> None:
        """Start with none."""
        self._heap: list[tuple[float, int, Ticket]] = []
        self._sequence = 0

    def __len__(self) -> int:
        """Count the alarms that are kept, dead ones included."""
        return len(self._heap)

    def set(self, ticket: Ticket, at: float, live: int) -> None:
        """Wake `ticket` at `at` in place of any earlier wish. `live`: how many tickets wait, which bounds the heap."""
        if ticket.alarm == at:
            return  # it is set: a second entry would live as long
        ticket.alarm = at
        self._sequence += 1
        heappush(self._heap, (at, self._sequence, ticket))
        if len(self._heap) > 2 * live + _SLACK:
            heap = self._heap
            heap[:] = [entry for entry in heap if _is_live(entry)]
            heapify(heap)

    def next(self) -> float | None:
        """Return when the next alarm is due."""
        heap = self._heap
        while heap and not _is_live(heap[0]):
            heappop(heap)
        return heap[0][0] if heap else None

    def due(self, now: float) -> Iterator[Ticket]:
        """Take out, one by one, the tickets whose alarm has come."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            entry = heappop(heap)
            if _is_live(entry):
                yield entry[2]


def _is_live(entry: tuple[float, int, Ticket]) -> bool:
    return entry[2].state is State.WAITING and entry[2].alarm == entry[0]
