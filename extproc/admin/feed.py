"""Server-sent events: one view a second, written once, for all who look. Nobody looks: nothing is computed."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from aiohttp import web

from extproc.admin.text import send, written

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from extproc.turns import Turns

log = logging.getLogger("extproc.admin")

TICK_S = 1.0
MOST_SUBSCRIBERS = 16
GAP_S = 0.004
"""Between two subscribers: all at once they would write a megabyte in one turn of the loop."""
WRITE_S = 5.0
"""A subscriber that takes nothing for so long is dropped."""


AGAIN = b"retry: 1000\n\n"
"""Milliseconds after which a browser that lost us tries again."""


class Feed:
    """Sends what `view` returns to subscribers.

    A slow subscriber misses views, it never delays the others: there is one latest view and no queue.
    """

    def __init__(self, view: Callable[[], Awaitable[dict[str, Any]]], turns: Turns) -> None:
        """Call `view` once a second while there are subscribers; write and send what it returns in `turns`."""
        self._view = view
        self._turns = turns
        self._latest = b""
        self._news: set[asyncio.Event] = set()
        self._ticking: asyncio.Task[None] | None = None
        self._closed = False

    def __len__(self) -> int:
        """Count the subscribers."""
        return len(self._news)

    async def subscribe(self, request: web.Request) -> web.StreamResponse:
        """Answer GET /events until the client or the server leaves."""
        if len(self) >= MOST_SUBSCRIBERS or self._closed:
            text = f"{MOST_SUBSCRIBERS} pages are open already, which is the most: close one\n"
            return web.Response(status=503, text=text, headers={"retry-after": "5"})
        news = asyncio.Event()
        self._news.add(news)
        try:
            response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
            await response.prepare(request)
            await response.write(AGAIN)
            if self._ticking is None or self._ticking.done():
                self._latest = b""
                self._ticking = asyncio.create_task(self._tick(), name="admin page")
            elif self._latest:
                news.set()
            while True:
                await news.wait()
                news.clear()
                if self._closed or not self._latest:
                    return response
                async with asyncio.timeout(WRITE_S):
                    await send(response, self._latest, self._turns)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        except ConnectionError:
            pass
        finally:
            self._news.discard(news)
        return response

    async def close(self) -> None:
        """End all streams and accept no more."""
        self._closed = True
        self._tell()
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)

    async def _tick(self) -> None:
        try:
            while self._news:
                view = await self._view()
                self._latest = b"".join((b"data: ", await written(view, self._turns), b"\n\n"))
                for news in list(self._news):
                    news.set()
                    await asyncio.sleep(GAP_S)
                await asyncio.sleep(TICK_S)
        except Exception:
            log.exception("the live page's view could not be made: please report it")
            self._latest = b""
            self._tell()  # the streams end, and the pages say that they have no connection

    def _tell(self) -> None:
        for news in self._news:
            news.set()
