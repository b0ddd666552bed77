"""When Python looks for garbage that reference counts don't free: in moments when little is held.

A full collection walks all objects that live. With 10,000 requests waiting that takes 50 to 90 ms, in which nobody is
answered, and by Python's own rule it came several times a minute; one of what has lived for a little took up to 10 ms,
while pages are made for 500 endpoints. What ends here ends by reference counts alone: a served request leaves no cycle
behind (`make bench-memory` counts), so that both may wait. Only what is new is looked through all the time.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

FEW = 200
"""Streams whose objects are looked through in a millisecond or two."""
DUE = 100
"""Collections of what is new, after which Python itself would look through everything."""
LATEST_S = 3600.0
"""So long after the last one it is done whoever waits."""
NEVER = 1 << 30


class Garbage:
    """Decides when everything is looked through."""

    def __init__(self, streams: Callable[[], int], clock: Callable[[], float]) -> None:
        """Ask `streams` how many are open; `clock` returns seconds."""
        self._streams = streams
        self._clock = clock
        self._last = clock()

    def begin(self) -> None:
        """Look through everything now, never again through what is left, and from now on only when `look` says so."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(gc.get_threshold()[0], NEVER, NEVER)
        self._last = self._clock()

    def look(self) -> None:
        """Look through what came since then, if it is due and the moment is good; to be called now and then."""
        if gc.get_count()[1] < DUE:
            return
        if self._streams() <= FEW or self._clock() - self._last >= LATEST_S:
            gc.collect()
            self._last = self._clock()
