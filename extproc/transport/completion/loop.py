"""An asyncio event loop that waits on a gRPC completion queue: what gRPC has to tell and what sockets have to tell
is all dealt with in one thread, and no request crosses from one thread to another.

The completion queue is grpcio's own, from `grpc._cython.cygrpc`, which is private. So `make_loop` tries out everything
that is used of it before anybody depends on it (docs/adr/0006).
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import selectors
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVarTuple

import grpc
from grpc._cython import cygrpc

from extproc.transport.completion.events import WAKE, Events

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextvars import Context

log = logging.getLogger("extproc.completion")

Args = TypeVarTuple("Args")

TESTED = ((1, 82), (1, 86))
"""grpcio versions that the driver is tested with: from, and below."""
PROBE_S = 5.0
"""How long the self-test may take before it counts as failed; it takes some milliseconds."""
HEARTBEAT_S = 1.0
"""`poll` waits by the wall clock; so long, at most, is a timer late when somebody sets that clock back."""
BATCH = 16
"""Events dealt with before everybody else has a turn: one or two milliseconds, when all begin a request."""

FILES = 10
"""Files that are dealt with in one turn: after a moment without a processor, hundreds have something to tell."""


class UnusableError(Exception):
    """This grpcio is not what the driver was written for."""


class CompletionLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop, but what it waits on is `queue`; the tag of an event is called with the event."""

    time = staticmethod(time.monotonic)  # asyncio's own, without a call of Python's around it

    def __init__(self, queue: Any, waker: Any) -> None:
        """Wait on `queue`; `waker`: a call whose batches end up there (`make_loop` makes both)."""
        self.queue = queue
        self.at_close: list[Callable[[], None]] = []
        """What must be done before the queue can close: a server on it would keep it open for ever."""
        self._wait = _Selector(queue, waker)
        super().__init__(self._wait)

    def close(self) -> None:
        """Close whatever is left on the queue, then the loop."""
        while self.at_close:
            self.at_close.pop()()
        super().close()

    def call_soon(
        self, callback: Callable[[*Args], object], *args: *Args, context: Context | None = None
    ) -> asyncio.Handle:
        """Call in the next turn, which is now due."""
        self._wait.events.until = 0
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Args], object], *args: *Args, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Call at a moment, which may be before whatever is waited for."""
        self._wait.events.until = 0
        return super().call_at(when, callback, *args, context=context)


def make_loop() -> CompletionLoop | None:
    """Make a loop on a completion queue, or say in the log why that can't be had, and return None."""
    version = tuple(int(part) for part in grpc.__version__.split(".")[:2] if part.isdigit())
    if not TESTED[0] <= version < TESTED[1]:
        why = f"tested with grpcio {_dotted(TESTED[0])} to below {_dotted(TESTED[1])}, this is {grpc.__version__}"
    else:
        try:
            queue = cygrpc.CompletionQueue()
            return CompletionLoop(queue, _probe(queue))
        except Exception as error:  # whatever it is, there is another way to serve
            why = f"grpcio {grpc.__version__} failed the self-test: {type(error).__name__}: {error}"
    log.warning("transport completion_queue: not usable, serving on grpc.aio instead, which costs more CPU: %s", why)
    return None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


class _Selector(selectors.BaseSelector):
    """Waits on the completion queue. For asyncio's files (sockets, signals) a thread waits, and wakes the queue.

    That thread does nothing else. An epoll file is itself a file that can be waited on, so it needs no list of files.

    The queue's events are dealt with in here, one by one. While nothing else is due, a turn of asyncio's would find
    nothing to do: they were a twentieth of a request's CPU.
    """

    def __init__(self, queue: Any, waker: Any) -> None:
        self._queue = queue
        self._waker = waker
        self.events = Events(queue)
        self._files = selectors.DefaultSelector()
        self._parked = False  # the thread waits until the files have been dealt with
        self._due: list[tuple[selectors.SelectorKey, int]] = []  # files that had something to tell and had no turn yet
        self._go_on = threading.Semaphore(0)
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="files", daemon=True)
        self._thread.start()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._files.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._files.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._files.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._files.get_map()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self._due:
            timeout = 0
        elif self._parked:
            self._parked = False
            self._go_on.release()
        self.events.until = None if timeout is None else time.time() + timeout if timeout > 0 else 0
        if self.events.take(BATCH):
            self._parked = True
        return self._some_files() if self._parked else []

    def _some_files(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Return files that have something to tell, FILES at most; the others have the turns that follow."""
        if not self._due:
            found = self._files.select(0)
            self._due = found[FILES:]
            return found[:FILES]
        some, self._due = self._due[:FILES], self._due[FILES:]
        there = self._files.get_map()
        return [one for one in some if there.get(one[0].fd) is one[0]]  # else it was closed, or another file is there

    def close(self) -> None:
        self._closed = True
        readable, writable = os.pipe()
        os.close(writable)
        self._files.register(readable, selectors.EVENT_READ)  # at its end, so it is ready: the thread wakes
        self._go_on.release()
        self._thread.join()
        os.close(readable)
        self._files.close()
        self._queue.shutdown()
        while self._queue.poll().completion_type != cygrpc.CompletionType.queue_shutdown:
            pass

    def _watch(self) -> None:
        files = select.poll()
        files.register(self._files.fileno(), select.POLLIN)
        while True:
            files.poll(HEARTBEAT_S * 1000)
            if self._closed:
                return
            self._waker.start_server_batch((), WAKE)
            self._go_on.acquire()


def _probe(queue: Any) -> Any:
    """Serve one call to ourselves with every part of cygrpc that is used here, and return that call.

    It is over, but good for one thing: an empty batch on it puts its tag into the queue at once, from any thread.
    """
    server = cygrpc.Server((), False)
    server.register_completion_queue(queue)
    port = server.add_http2_port(b"127.0.0.1:0", None)
    if not port:
        raise UnusableError("can't bind a port on 127.0.0.1")
    server.start()
    deadline = time.time() + PROBE_S
    seen: dict[str, Any] = {}

    def wait_for(*tags: str) -> None:
        while not all(tag in seen for tag in tags):
            event = queue.poll(deadline)
            if event.tag is None:
                raise UnusableError(f"no {', '.join(tag for tag in tags if tag not in seen)} within {PROBE_S:g} s")
            seen[event.tag] = event

    server.request_call(queue, queue, "call")
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            answer = channel.unary_unary("/probe/Probe").future(b"ping", timeout=PROBE_S)
            wait_for("call")
            if not seen["call"].success or seen["call"].call_details.method != b"/probe/Probe":
                raise UnusableError("an accepted call without its method")
            call = seen["call"].call
            _start(call, (cygrpc.ReceiveCloseOnServerOperation(0),), "close")
            _start(call, (cygrpc.ReceiveMessageOperation(0),), "message")
            wait_for("message")
            if seen["message"].batch_operations[0].message() != b"ping":
                raise UnusableError("a message that differs from the one sent")
            replies = (cygrpc.SendInitialMetadataOperation(None, 0), cygrpc.SendMessageOperation(b"pong", 0))
            status = cygrpc.SendStatusFromServerOperation(None, cygrpc.StatusCode.ok, b"", 0)
            _start(call, (*replies, status), "sent")
            wait_for("sent", "close")
            if seen["close"].batch_operations[0].cancelled() or answer.result() != b"pong":
                raise UnusableError("an answer that differs from the one sent")
    finally:
        server.shutdown(queue, "shutdown")
        if not {"sent", "close"} <= seen.keys():  # else gRPC may tell stderr of a cut that our client still heard
            server.cancel_all_calls()
        wait_for("shutdown")
        server.destroy()
    _start(call, (), "woken")
    wait_for("woken")
    return call


def _start(call: Any, operations: tuple[Any, ...], tag: str) -> None:
    error = call.start_server_batch(operations, tag)
    if error != 0:
        raise UnusableError(f"a batch of operations was refused with {error}")
