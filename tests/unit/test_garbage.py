"""Everything is looked through for garbage only when little is held, or after an hour; what is new all the time."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest

from extproc.garbage import EARLIEST_S, FEW, LATEST_S, NEW_S, Garbage

if TYPE_CHECKING:
    from collections.abc import Callable


class Sidecar:
    """So many streams, on a clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.streams = 10_000
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.garbage = Garbage(lambda: self.streams, self)
        self.garbage.begin()

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self.timers.append((self.now + delay, callback))

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self.timers and self.timers[0][0] <= until:
            self.now, callback = self.timers.pop(0)
            callback()
        self.now = until


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def sidecar():
    before = gc.get_threshold()
    try:
        yield Sidecar()
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def old_cycle() -> weakref.ref[Cycle]:
    """Leave a cycle behind that collections of what is young no longer see."""
    cycle = Cycle()
    gc.collect(0)
    return weakref.ref(cycle)


def test_nothing_is_looked_through_while_thousands_wait_and_everything_once_few_do(sidecar):
    left = old_cycle()
    sidecar.now = EARLIEST_S
    sidecar.garbage.look()
    assert left() is not None
    sidecar.streams = FEW
    sidecar.garbage.look()
    assert left() is None


def test_after_an_hour_it_is_done_whoever_waits(sidecar):
    left = old_cycle()
    sidecar.now = LATEST_S
    sidecar.garbage.look()
    assert left() is None
    left = old_cycle()
    sidecar.now += LATEST_S / 2
    sidecar.garbage.look()
    assert left() is not None, "the hour begins anew"


def test_it_is_not_done_again_within_a_minute_however_few_wait(sidecar):
    sidecar.streams, left = 0, old_cycle()
    sidecar.now = EARLIEST_S - 1
    sidecar.garbage.look()
    assert left() is not None


def test_what_is_new_is_looked_through_by_the_clock_where_as_much_is_freed_as_made(sidecar):
    sidecar.pass_time(NEW_S)
    readings = [[number] for number in range(20_000)]
    sidecar.pass_time(NEW_S)
    for turn in range(5):
        for number in range(20_000):
            readings[number] = [turn]  # one made, one freed: Python's own count stands still
        assert len(gc.get_objects(0)) > 10_000
        sidecar.pass_time(NEW_S)
        assert len(gc.get_objects(0)) < 1_000


def test_what_is_new_is_looked_through_in_a_turn_of_its_own():
    before, later = gc.get_threshold(), []
    sidecar = Sidecar()
    sidecar.garbage = Garbage(lambda: 0, sidecar, later.append)
    try:
        sidecar.timers.clear()
        sidecar.garbage.begin()
        kept = [[] for _ in range(500)]
        sidecar.pass_time(NEW_S)
        assert len(gc.get_objects(0)) >= len(kept)
        (look,) = later
        look()
        assert len(gc.get_objects(0)) < len(kept)
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def test_python_does_none_by_itself_any_more(sidecar):
    left = old_cycle()
    kept = [[] for _ in range(200_000)]
    assert left() is not None, len(kept)
    sidecar.streams, sidecar.now = 0, EARLIEST_S
    sidecar.garbage.look()
    assert left() is None
