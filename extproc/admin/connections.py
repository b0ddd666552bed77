"""The admin port's connections: a bounded number, none kept that says nothing. A flood of them costs others nothing.

aiohttp bounds neither: 1,139 idle ones used up all descriptors of the process, and Envoy could not connect.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.typedefs import Handler

log = logging.getLogger("extproc.admin")

MOST = 128
"""Connections at once: 16 live pages, Prometheus, probes, and people."""
SPEAK_S = 10.0
"""A connection that has not sent a request by then is closed."""
IDLE_S = 30.0
"""One that was answered and sends no other for so long, too. Above Prometheus' usual interval of 15 s."""
TOLD_EACH_S = 60.0


class Connections:
    """A protocol factory between the listening socket and aiohttp's, which makes room for those who come.

    Of too many connections the oldest that is not being answered goes; if all are, the new one.
    """

    def __init__(self, make: Callable[[], asyncio.Protocol], loop: asyncio.AbstractEventLoop) -> None:
        """Let `make` speak with those who are let in."""
        self._make = make
        self._loop = loop
        self._open: dict[asyncio.Protocol, bool] = {}  # whether it ever sent a request; the oldest first
        self._answering: dict[asyncio.Protocol, int] = {}
        self._told_at: float | None = None

    def __len__(self) -> int:
        """Count the connections."""
        self._sweep()
        return len(self._open)

    def __call__(self) -> asyncio.Protocol:
        """Return who speaks on a connection that was just accepted."""
        if len(self._open) >= MOST:
            self._sweep()
        if len(self._open) >= MOST and not self._make_room():
            return _Refusal()
        protocol = self._make()
        self._open[protocol] = False
        self._loop.call_later(SPEAK_S, self._expect_request, protocol)
        return protocol

    @web.middleware
    async def note(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note which connections are being answered; a middleware."""
        protocol = request.protocol
        self._open[protocol] = True
        self._answering[protocol] = self._answering.get(protocol, 0) + 1
        try:
            return await handler(request)
        finally:
            self._answering[protocol] -= 1
            if not self._answering[protocol]:
                del self._answering[protocol]

    def _expect_request(self, protocol: asyncio.Protocol) -> None:
        if self._open.get(protocol) is False:
            self._close(protocol)

    def _make_room(self) -> bool:
        now = self._loop.time()
        if self._told_at is None or now - self._told_at >= TOLD_EACH_S:
            self._told_at = now
            log.warning("more than %d connections to the admin port: the oldest idle ones are closed", MOST)
        for protocol in self._open:
            if protocol not in self._answering:
                self._close(protocol)
                return True
        return False

    def _sweep(self) -> None:
        """Forget those that are closed: aiohttp tells nobody."""
        for protocol in [one for one, spoke in self._open.items() if _transport(one) is None and spoke]:
            del self._open[protocol]

    def _close(self, protocol: asyncio.Protocol) -> None:
        self._open.pop(protocol, None)
        transport = _transport(protocol)
        if transport is not None:
            transport.abort()


def _transport(protocol: asyncio.Protocol) -> asyncio.Transport | None:
    transport: asyncio.Transport | None = getattr(protocol, "transport", None)
    return transport


class _Refusal(asyncio.Protocol):
    """Speaks with nobody."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Close at once."""
        transport.close()
