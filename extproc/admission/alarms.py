"""One heap for every deadline of a kind, so that a driver needs one timer whatever the number of those who wait."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

NEVER: Final = -1.0
_SLACK: Final = 240
_EVERY: Final = 16
_AT_ONCE: Final = 64
"""Each 16th new alarm looks at 64 old entries: no event has to look at all."""
_DEAD_AT_ONCE: Final = 16
"""Dead ones that are dropped before the first alarm: of those that all went unused, some in each event."""


class Sleeper(Protocol):
    """Somebody who wants to be woken: when, and the number of the entry that says so.

    Both are ours to write, but that whoever does not want it any more sets the number to 0.
    """

    alarm: float
    alarm_number: int


T = TypeVar("T", bound=Sleeper)


class Alarms(Generic[T]):
    """At most one alarm each. Those that were moved, or are wanted no more, are dropped later, a few at a time."""

    __slots__ = ("_heap", "_old", "_sequence")

    def __init__(self) -> None:
        """Start with none."""
        self._heap: list[tuple[float, int, T]] = []
        self._old: list[tuple[float, int, T]] = []  # a heap too, with many dead ones, that moves over to the other
        self._sequence = 0

    def __len__(self) -> int:
        """Count the alarms that are kept, dead ones included."""
        return len(self._heap) + len(self._old)

    def set(self, item: T, at: float, live: int) -> None:
        """Wake `item` at `at` in place of any earlier wish. `live`: how many may be waiting, which bounds the heap."""
        if item.alarm == at and item.alarm_number:
            return  # it is set: a second entry would live as long
        item.alarm = at
        self._sequence = item.alarm_number = self._sequence + 1
        heappush(self._heap, (at, self._sequence, item))
        if self._old:
            if not self._sequence % _EVERY:
                self._move_over()
        elif len(self._heap) >= 2 * live + _SLACK:
            self._old, self._heap = self._heap, []

    def one_went(self, live: int) -> None:
        """Note that one is wanted no more, and `live` may wait: of the dead some are dropped if they are the most."""
        if self._old:
            if not live % _EVERY:
                self._move_over()
        elif len(self._heap) >= 2 * live + _SLACK:
            self._old, self._heap = self._heap, []

    def _move_over(self) -> None:
        some = self._old[-_AT_ONCE:]
        del self._old[-_AT_ONCE:]  # the last of a heap: what stays is one
        for entry in some:
            if entry[2].alarm_number == entry[1]:
                heappush(self._heap, entry)

    def next(self) -> float | None:
        """Return when the next alarm is due. Behind many dead ones: when the first of these was."""
        if not self._heap and not self._old:
            return None
        first = self._first()
        return first[0] if first is not None else None

    def due(self, now: float) -> Iterator[T]:
        """Take out, one by one, those whose alarm has come."""
        while (first := self._first()) is not None and first[0] <= now:
            if first[2].alarm_number == first[1]:
                first[2].alarm_number = 0
                yield first[2]

    def _first(self) -> tuple[float, int, T] | None:
        """Return the first alarm of both heaps; a dead one, if many of them are before it."""
        first = None
        for heap in (self._heap, self._old):
            if heap and heap[0][2].alarm_number != heap[0][1]:
                heappop(heap)
                if heap and heap[0][2].alarm_number != heap[0][1]:
                    _drop_dead(heap)
            if heap and (first is None or heap[0] < first):
                first = heap[0]
        return first


def _drop_dead(heap: list[tuple[float, int, T]]) -> None:
    """Drop those before the first that is wanted; of many some."""
    for _ in range(_DEAD_AT_ONCE):
        if not heap or heap[0][2].alarm_number == heap[0][1]:
            return
        heappop(heap)
