"""What no request waits for shares a part of each turn of the event loop: pages that are read, or made, and garbage.

Each alone is cut into pieces of a millisecond or less. In one turn they would add up: three pages that are made for
people, twenty of engines that have come, and a look for garbage were seven.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

Piece = TypeVar("Piece")

ALL = 9
"""Shares in a turn: a tenth of a millisecond each, or a little more. A piece of a page takes them all."""


class Turns:
    """Gives shares of the loop's turns away, in the order in which they are asked for."""

    __slots__ = ("_free", "_waiting")

    def __init__(self) -> None:
        """Begin with a free turn."""
        self._free = ALL
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, shares: int = ALL) -> None:
        """Go on in this turn, or in the next that has so many `shares` free."""
        waits = self._wait(shares)
        if waits is not None:
            await waits

    def soon(self, call: Callable[[], None]) -> None:
        """Call in this turn, or in the next that is free."""
        waits = self._wait(ALL)
        if waits is None:
            call()
        else:
            waits.add_done_callback(lambda _: call())

    async def each(self, pieces: Iterable[Piece]) -> AsyncIterator[Piece]:
        """Walk `pieces`, each made in a turn of its own."""
        walk = iter(pieces)
        while True:
            await self.take()
            try:
                piece = next(walk)
            except StopIteration:
                return
            yield piece

    def _wait(self, shares: int) -> asyncio.Future[None] | None:
        """Take shares of this turn, or return what ends when they are had in another one."""
        loop = asyncio.get_running_loop()
        if self._free == ALL:
            loop.call_soon(self._next)
        if shares <= self._free and not self._waiting:
            self._free -= shares
            return None
        waits = loop.create_future()
        self._waiting.append((shares, waits))
        return waits

    def _next(self) -> None:
        self._free = ALL
        while self._waiting and self._waiting[0][0] <= self._free:
            shares, waits = self._waiting.popleft()
            if not waits.done():  # else who asked is gone
                waits.set_result(None)
                self._free -= shares
        if self._free < ALL:
            asyncio.get_running_loop().call_soon(self._next)
