"""The ext_proc server on a completion queue. Has the interface and the settings of `transport/aio.py`."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from grpc._cython import cygrpc

from extproc.errors import ProtocolError
from extproc.stream import wire
from extproc.stream.session import Session
from extproc.transport.aio import OPTIONS, RESETS, SERVICES, server_options
from extproc.transport.completion.services import Health, Reflection, StatusError

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.stream.reception import Reception
    from extproc.transport.completion.loop import CompletionLoop
    from extproc.transport.listener import Listener

log = logging.getLogger("extproc.server")

ACCEPTING = 256
"""Calls that core may hand over before we asked for more; what comes above waits in core, without limit (OPTIONS)."""
FORCED_S = 5.0
"""How long a cut connection may take to go away."""

_OK = (cygrpc.StatusCode.ok, b"")


class Handler(Protocol):
    """Who deals with the messages of one stream; `Session` is one."""

    over: bool

    @property
    def paused(self) -> bool:
        """The next message shall be left unread until a reply was sent."""

    def half_closed(self) -> bool:
        """Note that the client says no more; tell whether it still waits for what we say: else the stream is over."""

    def receive(self, data: bytes) -> None:
        """Take one message. ProtocolError and StatusError end the stream.

        Who sends a reply in here sends the next one when the next message comes; who sends none, at any time.
        """

    def end(self) -> None:
        """Note that the stream is over. Called exactly once."""


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
            _refuse(event.call)
        else:
            resets = RESETS in event.invocation_metadata
            # who watches health says no more, and stays
            Stream(event.call, open_handler, one_message=method == Health.WATCH, resets=resets)


class Stream:
    """One gRPC stream: what arrives goes to a handler, what the handler sends goes out, one message at a time.

    Core calls back, through the loop: `_received`, `_written`, `_exchanged`, `_closed`. Operations under way keep this
    object alive. The next message is asked for when all replies are on their way, and together with the last one: that
    saves a turn through core, and a client that takes no replies is not listened to.

    That the stream is over is told by the read that is under way. Only where none is, core is asked for it (`_watch`),
    and else together with the status that ends the stream: that saves a batch per request, and 0.7 KiB while it waits.
    """

    __slots__ = (
        "_asking",
        "_begun",
        "_call",
        "_handler",
        "_one_message",
        "_paused",
        "_pending",
        "_receiving",
        "_status",
        "_watched",
        "_writing",
    )

    def __init__(
        self,
        call: Any,
        open_handler: Callable[[Callable[[bytes], None]], Handler],
        *,
        one_message: bool,
        resets: bool = False,
    ) -> None:
        """Serve `call`; with `one_message` only the first is taken, and that no more come doesn't end the stream.

        `resets`: the client resets a stream that is over for it, which is seen without reading.
        """
        self._call = call
        self._one_message = one_message
        self._begun = False  # our headers are out
        self._receiving = False  # the handler is at work
        self._asking = True  # the next message is wanted, and not asked for yet
        self._paused = False  # it is not wanted before the next reply
        self._writing = False
        self._watched = False  # core was asked to tell when all is over
        self._pending: list[bytes] = []
        self._status: tuple[Any, bytes] | None = None  # what ends the stream, once all else is out
        self._handler: Handler | None = open_handler(self.send)
        if isinstance(self._handler, Session):
            self._handler.hang_up = self._hang_up
            self._handler.resets = resets
        self._go_on()

    def send(self, data: bytes) -> None:
        """Send a message after those before it. A stream that is over takes nothing."""
        if self._handler is not None:
            self._pending.append(data)
            if self._paused:
                self._paused, self._asking = False, True
            if not self._receiving:
                if self._handler.over:
                    self._end(_OK)
                else:
                    self._go_on()

    def _start(self, operations: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        error = self._call.start_server_batch(operations, then)
        if error != 0:
            raise RuntimeError(f"gRPC refused {operations} with {error}")

    def _watch(self) -> None:
        """Be told when the stream is over."""
        if not self._watched:
            self._watched = True
            self._start((cygrpc.ReceiveCloseOnServerOperation(0),), self._closed)

    def _go_on(self) -> None:
        """Start what can be started: the next reply, with the last one the status or the wait for another message."""
        if self._writing:  # `_written` or `_exchanged` comes back here
            return
        pending = self._pending
        then: Callable[[Any], None] = self._written
        sends = pending or self._status is not None
        operations: list[Any] = []
        if self._asking and len(pending) <= 1 and self._handler is not None:
            self._asking = False
            operations.append(cygrpc.ReceiveMessageOperation(0))
            then = self._exchanged if sends else self._received
        if sends:
            self._writing = True
            if not self._begun:
                self._begun = True
                operations.append(cygrpc.SendInitialMetadataOperation(None, 0))
            if pending:
                operations.append(cygrpc.SendMessageOperation(pending.pop(0), 0))
            if self._status is not None and not pending:
                operations.append(cygrpc.SendStatusFromServerOperation(None, *self._status, 0))
                self._status, then = None, _nothing  # whether it is out or not: nothing more will be
                if not self._watched:
                    self._watched = True
                    operations.append(cygrpc.ReceiveCloseOnServerOperation(0))
        if operations:
            self._start(tuple(operations), then)

    def _received(self, event: Any) -> None:
        handler = self._handler
        if handler is None:
            return
        data = event.batch_operations[0].message()
        self._receiving = True
        try:
            if data is None:  # the client sends no more
                if handler.half_closed():
                    self._watch()
                else:
                    self._end(_OK)
                return
            handler.receive(data)
            if handler.over:
                self._end(_OK)
            else:
                self._paused = handler.paused
                self._asking = not (self._one_message or self._paused)
                if not self._asking:
                    self._watch()
        except ProtocolError as error:
            self._end((cygrpc.StatusCode.invalid_argument, str(error).encode()))
        except StatusError as error:
            self._end((error.code, str(error).encode()))
        except Exception:  # one stream's bug must not cost the others
            log.exception("a message could not be dealt with: please report it")
            self._end((cygrpc.StatusCode.internal, b"a bug in the sidecar; its log has more"))
        finally:
            self._receiving = False
            self._go_on()

    def _exchanged(self, event: Any) -> None:
        """A reply is out, and the next message is here; or neither will ever be."""
        self._writing = False
        self._received(event)

    def _written(self, event: Any) -> None:
        self._writing = False
        if not event.success:  # the stream is gone, `_closed` will say so
            self._pending.clear()
            self._status = None
            self._watch()
            return
        self._go_on()

    def _end(self, status: tuple[Any, bytes] | None) -> None:
        """Tell the handler, once, that it is over, and the client if it is still there to hear a status."""
        handler, self._handler = self._handler, None
        if handler is None:
            return
        self._status = status
        try:
            handler.end()  # before anything that may take time: somebody waits for the slot
        finally:
            if not self._receiving:
                self._go_on()

    def _hang_up(self) -> None:
        self._end((cygrpc.StatusCode.deadline_exceeded, b"a stream begins with the headers of a request"))

    def _closed(self, _: Any) -> None:
        """All is over, from either side; mostly we know already, but not of a reset."""
        self._pending.clear()
        self._end(None)


def _refuse(call: Any) -> None:
    """End a call of a method that we don't have."""
    status = cygrpc.SendStatusFromServerOperation(None, cygrpc.StatusCode.unimplemented, b"Method not found!", 0)
    call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(0),), _nothing)
    call.start_server_batch((cygrpc.SendInitialMetadataOperation(None, 0), status), _nothing)


def _nothing(_: Any) -> None:
    pass
