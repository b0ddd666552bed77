"""The gRPC side: sessions on grpc.aio, health, reflection, and the transport settings that holding needs."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from extproc.errors import ProtocolError
from extproc.stream import wire
from extproc.stream.session import Session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from extproc.stream.reception import Reception
    from extproc.transport.listener import Listener

log = logging.getLogger("extproc.server")

OPTIONS = (
    # Calls that Python has not accepted yet, above 1,000, are dropped at random by default: a burst would lose some.
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
    # Envoy pings every 10 s; by default the fifth ping without data gets GOAWAY and ends every held request.
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_concurrent_streams", 2**31 - 1),
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
    ("grpc.max_receive_message_length", 4 << 20),
)
BODY_OPTIONS = (
    # A body that comes as one message (BUFFERED, NGINX's): above the largest that a gateway would buffer.
    ("grpc.max_receive_message_length", 64 << 20),
    # Of a body that is left unread this much comes in, and not as much as gRPC thinks that the network could bring.
    ("grpc.http2.lookahead_bytes", 64 << 10),
    ("grpc.http2.bdp_probe", 0),
)
"""Beside OPTIONS, for gateways that send us bodies."""
RESETS = ("x-envoy-internal", "true")
"""What Envoy alone says when it opens a stream. It resets the stream when the client leaves. Asked where bodies come:
the bootstraps that we render send none, and leave this out (`skip_envoy_headers`)."""
RESET_S = 0.25
"""How long to wait for the reset that follows Envoy's end of a stream: a handler that returns before it costs 134 bytes
for good, one that is cancelled nothing (`make soak`; grpc/grpc#43360)."""
SERVICES = ("", "liveness", "readiness", wire.SERVICE)
"""Health services: the whole; the loop lives; new requests are welcome (by the probe's name and by the service's)."""


def server_options(*, bodies: bool) -> tuple[tuple[str, int], ...]:
    """Return gRPC's settings; `bodies`: we are sent those of requests."""
    return tuple({**dict(OPTIONS), **dict(BODY_OPTIONS)}.items()) if bodies else OPTIONS


class Server:
    """An ext_proc server on one address."""

    def __init__(
        self,
        reception: Reception,
        listener: Listener,
        *,
        reflect: bool = False,
        bodies: bool = False,
        probes: Listener | None = None,
    ) -> None:
        """Prepare to serve `reception` at what `listener` binds, and health alone at what `probes` does.

        `bodies`: we are sent those of requests.
        """
        self._probes = probes
        self._prober: grpc.aio.Server | None = None
        self._options = server_options(bodies=bodies)
        self._reception = reception
        self._listener = listener
        self._reflect = reflect
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Bind and serve. Raises StartError if the address can't be had."""
        server = grpc.aio.server(options=self._options)
        handler = grpc.stream_stream_rpc_method_handler(self._process)  # no serializers: a session wants bytes
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(wire.SERVICE, {wire.METHOD: handler}),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._reflect:
            names = (wire.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)

        def add_port(address: str, credentials: grpc.ServerCredentials | None) -> int:
            port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
            return int(port)

        self.port = self._listener.bind(add_port)
        if self._probes is not None:
            self._prober = prober = grpc.aio.server(options=OPTIONS)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, prober)
            self._probes.bind(lambda address, _: int(prober.add_insecure_port(address)))
            await prober.start()
        await server.start()
        self._server = server
        await self._set_health(health_pb2.HealthCheckResponse.SERVING, SERVICES)

    async def refuse_new(self) -> None:
        """Tell Envoy and Kubernetes to send new requests elsewhere; liveness stays."""
        others = [name for name in SERVICES if name != "liveness"]
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING, others)

    async def stop(self, grace_s: float) -> None:
        """Close the port at once, let streams end for `grace_s`, then cut them."""
        if self._server is not None:
            await self._server.stop(grace_s)
        if self._prober is not None:
            await self._prober.stop(0)
        self._listener.close()

    async def _set_health(self, status: int, services: tuple[str, ...] | list[str]) -> None:
        for name in services:
            await self._health.set(name, status)

    async def _process(self, _: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Serve one stream: what Envoy sends goes into a session, what the session answers goes out."""
        writer = _Writer(context.write)
        session = Session(self._reception, writer.send)
        task = asyncio.current_task()
        session.hang_up = None if task is None else task.cancel
        session.resets = RESETS in (context.invocation_metadata() or ())
        try:
            while True:
                if session.paused:
                    await writer.replied()
                message = await context.read()
                if message is grpc.aio.EOF:
                    if session.half_closed():
                        await writer.replied()
                    break
                writer.inline = True
                try:
                    session.receive(message)
                except ProtocolError as error:
                    await writer.rest()
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                finally:
                    writer.inline = False
                await writer.flush()
                if session.over:
                    break
            session.end()  # before anything that may take time: somebody waits for the slot
            await writer.rest()
            if not session.over:  # EOF: Envoy resets the stream next
                await asyncio.sleep(RESET_S)
        finally:  # EOF, a reset and a cancelled handler all mean the same: the HTTP request is over
            session.end()


class _Writer:
    """Sends a session's replies in order: by the handler while it runs, else by a task of its own."""

    __slots__ = ("_pending", "_replied", "_task", "_write", "_writing", "inline")

    def __init__(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        self._write = write
        self._pending: list[bytes] = []
        self._writing = False
        self._task: asyncio.Task[None] | None = None  # the loop itself keeps only a weak reference
        self._replied: asyncio.Future[None] | None = None  # somebody waits for the next reply
        self.inline = False  # the handler will flush

    def send(self, data: bytes) -> None:
        """Queue a reply and see to it that it goes out."""
        self._pending.append(data)
        if self._replied is not None:
            self._replied.set_result(None)
            self._replied = None
        if not self.inline and not self._writing and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self.flush())

    async def replied(self) -> None:
        """Wait for the next reply."""
        self._replied = asyncio.get_running_loop().create_future()
        await self._replied

    async def flush(self) -> None:
        """Send what is queued, unless that is happening already. A stream that is over takes nothing, and says so."""
        if self._writing:
            return
        self._writing = True
        try:
            while self._pending:
                await self._write(self._pending.pop(0))
        except (grpc.RpcError, asyncio.InvalidStateError, grpc.aio.UsageError, grpc.aio.InternalError) as error:
            self._pending.clear()
            log.debug("a reply was not sent, the stream is over: %s", error)
        finally:
            self._writing = False

    async def rest(self) -> None:
        """Wait for a write under way: the status that ends the stream may not be sent beside it."""
        if self._task is not None and not self._task.done():
            await asyncio.wait([self._task])
