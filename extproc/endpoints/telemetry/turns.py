"""Spreads work of many tasks over turns of the event loop: what came in one moment must not be done in one."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio


class Turns:
    """Lets so many go on in one turn of the loop; the others wait for the next ones, in their order."""

    __slots__ = ("_free", "_loop", "_most", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop, most: int) -> None:
        """Let `most` go on in a turn of `loop`."""
        self._loop = loop
        self._most = self._free = most
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def one(self) -> None:
        """Go on in this turn, or wait."""
        if self._free == self._most:
            self._loop.call_soon(self._next)
        if self._free:
            self._free -= 1
            return
        waits = self._loop.create_future()
        self._waiting.append(waits)
        await waits

    def _next(self) -> None:
        self._free = self._most
        while self._free and self._waiting:
            waits = self._waiting.popleft()
            if not waits.done():  # its endpoint may be gone
                waits.set_result(None)
                self._free -= 1
        if self._free < self._most:
            self._loop.call_soon(self._next)
