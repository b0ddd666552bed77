"""An admin port that is taken: who holds it, and the wait for a sidecar that is about to leave it to us."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from typing import TYPE_CHECKING

import aiohttp

from extproc.config import split_address
from extproc.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logging.getLogger("extproc.admin")

DRAINING = "not ready: draining\n"
"""What /readyz says from SIGTERM on; "draining" is what a successor looks for."""
ASK_S = 2.0
AGAIN_S = 0.05
LEFT_S = 5.0
"""How long the kernel may keep an address at which nobody answers any more."""


async def taken_over(address: str, bind: Callable[[], Awaitable[asyncio.Server]]) -> asyncio.Server:
    """Return what `bind` gives, waiting for as long as a sidecar that drains holds `address`; it is the last thing
    that it gives up. Raises StartError, which says who holds it, for anybody else."""
    loop = asyncio.get_running_loop()
    is_told, left_at = False, None
    while True:
        try:
            return await bind()
        except OSError as error:
            problem = f"admin: can't bind {address}: {os.strerror(error.errno or 0)}"
            if error.errno != errno.EADDRINUSE:
                raise StartError(problem) from None
            who = await _holder(address)
            if who == _DRAINS and not is_told:
                log.warning("admin: %s is held by %s: waiting for its end", address, who)
                is_told = True
            if who == _NOBODY and left_at is None:
                left_at = loop.time()
            if who not in (_DRAINS, _NOBODY) or (left_at is not None and loop.time() - left_at > LEFT_S):
                raise StartError(f"{problem}; it is held by {who}") from None
        await asyncio.sleep(AGAIN_S)


_DRAINS = "a sidecar that drains"
_NOBODY = "somebody who does not listen there"


async def _holder(address: str) -> str:
    """Return who answers at `address`, in words."""
    host, port = split_address(address)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/readyz"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ASK_S)) as client,
            client.get(url, allow_redirects=False) as answer,
        ):
            said = (await answer.content.read(200)).decode(errors="replace")
    except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError, ConnectionError):
        return _NOBODY  # it ended between the two
    except TimeoutError:
        return "a process that does not answer (a sidecar that hangs ends by `kill -9`; nothing held is lost)"
    except (aiohttp.ClientError, OSError, ValueError):
        return "another program"
    if said.startswith("not ready") and "draining" in said:
        return _DRAINS
    if said.startswith(("ready", "not ready")):
        return "a sidecar that is running: end it with SIGTERM, and it hands over what it holds (`hand_over`)"
    return "another program"
