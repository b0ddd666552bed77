"""What a burst took goes back to the system: the C library keeps what was freed, however long nobody needs it.

Streams by the ten thousand cost some 16 KiB each in gRPC. When they are gone, glibc holds nearly all of it between the
pieces that are still in use, and gives it back when it is told to (malloc_trim).
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("extproc.memory")

MANY = 2000
"""Streams that make a burst: below, what they leave is not worth the look."""


class Ebb:
    """Sees the end of a burst of streams."""

    __slots__ = ("_before", "_give_back", "_most", "_streams")

    def __init__(self, streams: Callable[[], int], give_back: Callable[[], None] | None = None) -> None:
        """Look at how many `streams` there are, and `give_back` what a burst left, in a thread of its own."""
        self._streams = streams
        self._give_back = give_back or trim
        self._most = self._before = 0

    def look(self) -> None:
        """Have memory given back when MANY streams are gone, more than half of them all, and no more of them go."""
        streams, before = self._streams(), self._before
        self._before = streams
        self._most = max(self._most, streams)
        if self._most - streams < max(MANY, self._most // 2) or before - streams > MANY // 10:
            return
        self._most = streams
        asyncio.get_running_loop().run_in_executor(None, self._give_back)


def trim() -> None:
    """Give back what the C library holds of freed memory: 4 ms for each 1,000 streams that were. Not glibc: no-op."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
        log.debug("the memory of a burst was given back")
