"""One heap for every deadline of a kind, so that a driver needs one timer whatever the number of those who wait."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NEVER = -1.0
_SLACK = 256


class Sleeper(Protocol):
    """Somebody who wants to be woken; `alarm` is ours to write."""

    alarm: float


T = TypeVar("T", bound=Sleeper)


class Alarms(Generic[T]):
    """At most one alarm each. Those that were moved, or are wanted no more, are dropped lazily, in O(1) on average."""

    __slots__ = ("_heap", "_sequence", "_still_waits")

    def __init__(self, still_waits: Callable[[T], bool] | None = None) -> None:
        """Start with none; `still_waits` tells whether somebody wants to be woken at all; None: everybody does."""
        self._heap: list[tuple[float, int, T]] = []
        self._sequence = 0
        self._still_waits = still_waits

    def __len__(self) -> int:
        """Count the alarms that are kept, dead ones included."""
        return len(self._heap)

    def set(self, item: T, at: float, live: int) -> None:
        """Wake `item` at `at` in place of any earlier wish. `live`: how many may be waiting, which bounds the heap."""
        if item.alarm == at:
            return  # it is set: a second entry would live as long
        item.alarm = at
        self._sequence += 1
        heappush(self._heap, (at, self._sequence, item))
        if len(self._heap) > 2 * live + _SLACK:
            heap = self._heap
            heap[:] = [entry for entry in heap if self._is_live(entry)]
            heapify(heap)

    def next(self) -> float | None:
        """Return when the next alarm is due."""
        heap = self._heap
        while heap and not self._is_live(heap[0]):
            heappop(heap)
        return heap[0][0] if heap else None

    def due(self, now: float) -> Iterator[T]:
        """Take out, one by one, those whose alarm has come."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            entry = heappop(heap)
            if self._is_live(entry):
                entry[2].alarm = NEVER
                yield entry[2]

    def _is_live(self, entry: tuple[float, int, T]) -> bool:
        return entry[2].alarm == entry[0] and (self._still_waits is None or self._still_waits(entry[2]))
