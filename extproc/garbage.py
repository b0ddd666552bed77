"""When Python looks for garbage that reference counts don't free: in moments when little is held.

A full collection walks all objects that live. With 10,000 requests waiting that takes 50 to 90 ms, in which nobody is
answered, and by Python's own rule it came several times a minute; one of what has lived for a little took up to 10 ms,
while pages are made for 500 endpoints. What ends here ends by reference counts alone: a served request leaves no cycle
behind (`make bench-memory` counts), so that both may wait.

What is new is looked through all the time, and by the clock besides. Python does it once 700 objects more were made
than freed; where each reading of a page replaces the one before, that says nothing of how many are new: 27,000 were
found, which took 4 to 7 ms in one go.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

FEW = 200
"""Streams whose objects are looked through in a millisecond or two."""
EARLIEST_S = 60.0
"""Not sooner after the last one is everything looked through."""
NEW_S = 0.05
"""So often what is new is looked through, whatever Python counts: with 500 endpoints 1,500 objects, a third of a
millisecond, and four times that where caches are cold."""
LATEST_S = 3600.0
"""So long after the last one it is done whoever waits."""
NEVER = 1 << 30


def _now(call: Callable[[], None]) -> None:
    call()


def _look_at_new() -> None:
    gc.collect(0)


class Loop(Protocol):
    """What is used of an event loop."""

    def time(self) -> float:
        """Return seconds."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> object:
        """Call back after some seconds."""


class Garbage:
    """Decides when everything is looked through."""

    def __init__(
        self, streams: Callable[[], int], loop: Loop, soon: Callable[[Callable[[], None]], None] = _now
    ) -> None:
        """Ask `streams` how many are open; `loop` has the time, and comes again; `soon` calls in a free turn of it."""
        self._streams = streams
        self._loop = loop
        self._soon = soon
        self._last = loop.time()

    def begin(self) -> None:
        """Look through everything now, never again through what is left, and from now on only when `look` says so.

        Call it once: what is new is looked through by the clock from now on.
        """
        gc.collect()
        gc.freeze()
        gc.set_threshold(gc.get_threshold()[0], NEVER, NEVER)
        self._last = self._loop.time()
        self._loop.call_later(NEW_S, self._look_at_new)

    def look(self) -> None:
        """Look through what came since then, if it is due and the moment is good; to be called now and then."""
        since_s = self._loop.time() - self._last
        if since_s >= LATEST_S or (since_s >= EARLIEST_S and self._streams() <= FEW):
            gc.collect()
            self._last = self._loop.time()

    def _look_at_new(self) -> None:
        self._loop.call_later(NEW_S, self._look_at_new)
        self._soon(_look_at_new)
