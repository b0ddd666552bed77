"""Everything is looked through for garbage only when little is held, or after an hour."""

from __future__ import annotations

import gc
import weakref

import pytest

from extproc.garbage import DUE, FEW, LATEST_S, Garbage


class Sidecar:
    """So many streams, on a clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.streams = 10_000
        self.garbage = Garbage(lambda: self.streams, lambda: self.now)
        self.garbage.begin()


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
    """Leave a cycle behind that collections of what is young no longer see, and make a full one due."""
    cycle = Cycle()
    for _ in range(DUE):
        gc.collect(0)
    return weakref.ref(cycle)


def test_nothing_is_looked_through_while_thousands_wait_and_everything_once_few_do(sidecar):
    left = old_cycle()
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


def test_python_does_none_by_itself_any_more(sidecar):
    left = old_cycle()
    kept = [[] for _ in range(200_000)]
    assert left() is not None, len(kept)
    sidecar.streams = 0
    sidecar.garbage.look()
    assert left() is None
