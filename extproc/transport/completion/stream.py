"""One gRPC stream on a completion queue: what core is asked for, and what it answers. Compiled in compiled wheels."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, Protocol

from grpc._cython import cygrpc

from extproc.errors import ProtocolError
from extproc.stream.session import Session
from extproc.transport.completion.services import StatusError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("extproc.server")

_RECEIVE: Final = cygrpc.ReceiveMessageOperation
_SEND: Final = cygrpc.SendMessageOperation
_HEADERS: Final = cygrpc.SendInitialMetadataOperation(None, 0)
_OVER: Final = cygrpc.ReceiveCloseOnServerOperation(0)
_OK: Final = cygrpc.SendStatusFromServerOperation(None, cygrpc.StatusCode.ok, b"", 0)
"""Three that say the same for every call, and are asked nothing when they are done: these serve all calls."""


def _failed(code: Any, why: bytes) -> Any:
    return cygrpc.SendStatusFromServerOperation(None, code, why, 0)


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
        self._status: Any = None  # what ends the stream, once all else is out
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

    def _start(self, operations: list[Any], then: Callable[[Any], None]) -> None:
        error = self._call.start_server_batch(operations, then)
        if error != 0:
            raise RuntimeError(f"gRPC refused {operations} with {error}")

    def _watch(self) -> None:
        """Be told when the stream is over."""
        if not self._watched:
            self._watched = True
            self._start([_OVER], self._closed)

    def _go_on(self) -> None:
        """Start what can be started: the next reply, with the last one the status or the wait for another message."""
        if self._writing:  # `_written` or `_exchanged` comes back here
            return
        pending, status = self._pending, self._status
        sends = pending or status is not None
        operations: list[Any] = []
        asks = self._asking and len(pending) <= 1 and self._handler is not None
        if asks:
            self._asking = False
            operations.append(_RECEIVE(0))
        if sends:
            self._writing = True
            if not self._begun:
                self._begun = True
                operations.append(_HEADERS)
            if pending:
                operations.append(_SEND(pending.pop(0), 0))
            if status is not None and not pending:
                operations.append(status)
                self._status = None
                if not self._watched:
                    self._watched = True
                    operations.append(_OVER)
                self._start(operations, _nothing)  # whether it is out or not: nothing more will be
            else:
                self._start(operations, self._exchanged if asks else self._written)
        elif asks:
            self._start(operations, self._received)

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
            self._end(_failed(cygrpc.StatusCode.invalid_argument, str(error).encode()))
        except StatusError as error:
            self._end(_failed(error.code, str(error).encode()))
        except Exception:  # one stream's bug must not cost the others
            log.exception("a message could not be dealt with: please report it")
            self._end(_failed(cygrpc.StatusCode.internal, b"a bug in the sidecar; its log has more"))
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

    def _end(self, status: Any) -> None:
        """Tell the handler, once, that it is over, and the client if it is still there to hear a `status`."""
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
        self._end(_failed(cygrpc.StatusCode.deadline_exceeded, b"a stream begins with the headers of a request"))

    def _closed(self, _: Any) -> None:
        """All is over, from either side; mostly we know already, but not of a reset."""
        self._pending.clear()
        self._end(None)


def refuse(call: Any) -> None:
    """End a call of a method that we don't have."""
    status = _failed(cygrpc.StatusCode.unimplemented, b"Method not found!")
    call.start_server_batch((_OVER,), _nothing)
    call.start_server_batch((_HEADERS, status), _nothing)


def _nothing(_: Any) -> None:
    pass
