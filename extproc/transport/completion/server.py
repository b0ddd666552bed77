"""The ext_proc server on a completion queue. Has the interface and the settings of `transport/aio.py`."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from grpc._cython import cygrpc

from extproc.stream import wire
from extproc.stream.session import Session
from extproc.transport.aio import OPTIONS, RESETS, SERVICES, server_options
from extproc.transport.completion.services import Health, Reflection
from extproc.transport.completion.stream import Stream, refuse

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.stream.reception import Reception
    from extproc.transport.completion.loop import CompletionLoop
    from extproc.transport.completion.stream import Handler
    from extproc.transport.listener import Listener

log = logging.getLogger("extproc.server")

ACCEPTING = 256
"""Calls that core may hand over before we asked for more; what comes above waits in core, without limit (OPTIONS)."""
FORCED_S = 5.0
"""How long a cut connection may take to go away."""


class Server:
    """An ext_proc server on one address, and if asked one for probes alone on another."""

    def __init__(
        self,
        reception: Reception,
        listener: Listener,
        loop: CompletionLoop,
        *,
        reflect: bool = False,
        bodies: bool = False,
        probes: Listener | None = None,
    ) -> None:
        """Prepare to serve `reception` at what `listener` binds, on `loop`, and health alone at what `probes` does.

        `bodies`: we are sent those of requests.
        """
        self._listener = listener
        self._probes = probes
        self._health = Health()
        self.port = 0
        methods: dict[bytes, Any] = {
            f"/{wire.SERVICE}/{wire.METHOD}".encode(): partial(Session, reception),
            **self._health.methods(),
        }
        if reflect:
            methods |= Reflection.methods((wire.SERVICE, Health.NAME))
        self._door = _Door(loop, methods, server_options(bodies=bodies))
        self._side_door = _Door(loop, self._health.methods(), OPTIONS)

    async def start(self) -> None:
        """Bind and serve. Raises StartError if an address can't be had."""
        self.port = self._door.bind(self._listener)
        if self._probes is not None:
            self._side_door.bind(self._probes)
            self._side_door.open()
        self._door.open()
        self._health.put(SERVICES, serving=True)
        log.info("transport completion_queue: in use, grpcio %s", grpc.__version__)

    async def refuse_new(self) -> None:
        """Tell Envoy and Kubernetes to send new requests elsewhere; liveness stays."""
        self._health.put([name for name in SERVICES if name != "liveness"], serving=False)

    async def stop(self, grace_s: float) -> None:
        """Close the port at once, let streams end for `grace_s`, then cut them."""
        await self._door.close(grace_s)
        await self._side_door.close(0)
        self._listener.close()


class _Door:
    """One port, and the methods of the calls that are let in there."""

    def __init__(self, loop: CompletionLoop, methods: dict[bytes, Any], options: tuple[tuple[str, int], ...]) -> None:
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
