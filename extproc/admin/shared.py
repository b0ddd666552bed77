"""A page that many ask for: made once at a time, for all who asked before it was begun."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Shared:
    """Pages of one kind. A page is made in short turns, and sixty at once would make sixty times as long ones."""

    def __init__(self) -> None:
        """Begin with none."""
        self._turn = asyncio.Lock()
        self._begun = 0
        self._latest: tuple[int, object, bytes] = (0, None, b"")  # its number, what was asked, and the page

    async def page(self, make: Callable[[], Awaitable[bytes]], asked: object = None) -> bytes:
        """Return a page that was begun after this call; `asked`: what tells pages of this kind apart."""
        before = self._begun
        async with self._turn:
            number, what, page = self._latest
            if number <= before or what != asked:
                self._begun = number = self._begun + 1
                page = await make()  # if its client leaves meanwhile, the next one makes its own
                self._latest = number, asked, page
            return page
