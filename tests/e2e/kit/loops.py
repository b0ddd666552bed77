"""Event loops that end when their connections have: TLS says goodbye, and waits for the other side's, after `close`."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

GOODBYE_S = 30.0


def run(story: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`, which leaves a connection behind whose server is slow: a ResourceWarning, whenever found."""
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        try:
            runner.run(story)
        finally:
            let_close(runner.get_loop())


async def cut() -> None:
    """End this loop's connections that are closed but for what their other side does not take: it may never do."""
    for transport in list(asyncio.get_running_loop()._transports.values()):
        if transport.is_closing():
            transport.abort()
    await asyncio.sleep(0)


async def close(server: asyncio.Server) -> None:
    """Accept no more, and let what was accepted come to be: asyncio drops it, open, if its server is closed."""
    for listening in server.sockets:
        asyncio.get_running_loop().remove_reader(listening.fileno())
    for _ in range(3):
        await asyncio.sleep(0)
    server.close()


async def sever() -> None:
    """End all of this loop's connections, of tasks too that were cancelled before their first step."""
    for transport in list(asyncio.get_running_loop()._transports.values()):
        transport.abort()
    await asyncio.sleep(0)


def let_close(loop: asyncio.AbstractEventLoop) -> None:
    """Run `loop` until its connections are closed; one that takes longer than GOODBYE_S stays, and is warned of."""
    last = time.monotonic() + GOODBYE_S
    while len(loop._selector.get_map()) > 1 and time.monotonic() < last:  # the one left is the loop's own
        loop.run_until_complete(asyncio.sleep(0.002))
    loop.run_until_complete(asyncio.sleep(0))  # what left the selector in the last turn is closed in the next
