"""One port of the server on a completion queue, and the calls that come there. Compiled in compiled wheels."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from grpc._cython import cygrpc

from extproc.transport.aio import RESETS
from extproc.transport.completion.services import Health
from extproc.transport.completion.stream import Stream, refuse

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from extproc.transport.completion.loop import CompletionLoop
    from extproc.transport.completion.stream import Handler
    from extproc.transport.listener import Listener

log = logging.getLogger("extproc.server")

ACCEPTING = 256
"""Calls that core may hand over before we asked for more; what comes above waits in core, without limit (OPTIONS)."""
FORCED_S = 5.0
"""How long a cut connection may take to go away."""


class Door:
    """One port, and the methods of the calls that are let in there."""

    def __init__(self, loop: CompletionLoop, methods: dict[bytes, Any], options: tuple[tuple[str, int], ...]) -> None:
        """Have a port on `loop`; `methods`: what opens the handler of a call, by its method; `options`: gRPC's."""
        self._loop = loop
        self._methods: dict[bytes, Callable[[Callable[[bytes], None]], Handler]] = methods
        self._options = options
        self._bound: Any = None
        self._server: Any = None
        self._stopping = False

    def bind(self, listener: Listener) -> int:
        """Take the address, and return its port. Raises StartError if it can't be had."""
        self._bound = server = cygrpc.Server(self._options, False)
        server.register_completion_queue(self._loop.queue)

        def add_port(address: str, credentials: grpc.ServerCredentials | None) -> int:
            port = int(server.add_http2_port(address.encode(), credentials and credentials._credentials))
            if port == 0:
                raise RuntimeError("gRPC's log says why")
            return port

        return listener.bind(add_port)

    def open(self) -> None:
        """Let calls in."""
        self._bound.start()
        self._server = self._bound
        self._loop.at_close.append(self._cut)
        for _ in range(ACCEPTING):
            self._accept_one()

    async def close(self, grace_s: float) -> None:
        """Let no more in, let streams end for `grace_s`, then cut them. Not open: no-op."""
        if self._server is not None and not self._stopping:
            self._stopping = True
            gone = asyncio.Event()
            self._server.shutdown(self._loop.queue, lambda _: gone.set())
            try:
                await asyncio.wait_for(gone.wait(), grace_s)
            except TimeoutError:
                self._server.cancel_all_calls()
                try:
                    await asyncio.wait_for(gone.wait(), FORCED_S)
                except TimeoutError:
                    log.warning("streams that were cut are not all gone after %gs; going on without them", FORCED_S)
            if gone.is_set():  # before, it would wait for an event that nobody takes from the queue
                self._server.destroy()
            self._loop.at_close.remove(self._cut)

    def _cut(self) -> None:
        """Stop without a loop: it closes while we serve."""
        if not self._stopping:
            self._stopping = True
            self._server.shutdown(self._loop.queue, lambda _: None)
        self._server.cancel_all_calls()

    def _accept_one(self) -> None:
        self._server.request_call(self._loop.queue, self._loop.queue, self._accepted)

    def _accepted(self, event: Any) -> None:
        if not event.success:  # the server shuts down: this is a request that was never filled
            return
        if not self._stopping:
            self._accept_one()
        method = event.call_details.method
        open_handler = self._methods.get(method)
        if open_handler is None:
            refuse(event.call)
        else:
            resets = RESETS in event.invocation_metadata
            # who watches health says no more, and stays
            Stream(event.call, open_handler, one_message=method == Health.WATCH, resets=resets)
