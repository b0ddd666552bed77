"""A server of either transport, whose streams say what they hear, and the client's side of one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import pytest

from extproc.errors import ProtocolError
from extproc.stream import wire
from extproc.transport.completion.loop import CompletionLoop, make_loop
from extproc.transport.completion.server import Server
from extproc.transport.listener import Listener
from tests.e2e.kit.processes import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

METHOD = f"/{wire.SERVICE}/{wire.METHOD}"


class Chatter:
    """A handler that does what the message says. `log` holds what happened to all of them."""

    def __init__(self, log: list[str], send: Callable[[bytes], None]) -> None:
        self._log = log
        self._send = send
        self._ended = self._stays = False
        self.over = self.paused = False

    def receive(self, data: bytes) -> None:
        what, _, value = data.decode().partition(" ")
        match what:
            case "echo":
                self._send(value.encode())
            case "many":
                for number in range(int(value)):
                    self._send(str(number).encode())
            case "late":  # from the loop, not from within `receive`; the second when the stream may be over
                loop = asyncio.get_running_loop()
                loop.call_later(0.01, self._send, b"late")
                loop.call_later(float(value), self._send, b"too late")
            case "over":
                self._send(b"last")
                self.over = True
            case "wrong":
                self._send(b"before")
                raise ProtocolError("that was wrong")
            case "bug":
                raise ZeroDivisionError
            case "pause":
                self.paused = True
                self._log.append("paused")
            case "stay":
                self._stays = True

    def half_closed(self) -> bool:
        if self._stays:
            self._log.append("half-closed")
        return self._stays

    def end(self) -> None:
        if not self._ended:  # as a session, it may be told twice
            self._ended = True
            self._log.append("end")
            if "bug in end" in self._log:
                raise ZeroDivisionError


class Serving(NamedTuple):
    call: Callable[..., Any]
    log: list[str]
    address: str
    stop: Callable[[float], None]


@contextlib.contextmanager
def serving(server_class: Any, loop: asyncio.AbstractEventLoop) -> Iterator[Serving]:
    """Run a server with chatters on `loop`, in a thread, and a client of it here."""
    log: list[str] = []
    listener = Listener("127.0.0.1:0")
    server = server_class(log, listener, loop=loop) if server_class is Server else server_class(log, listener)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def do(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(PATIENCE_S)

    try:
        do(server.start())
        address = f"127.0.0.1:{server.port}"
        with grpc.insecure_channel(address) as channel:
            yield Serving(channel.stream_stream(METHOD), log, address, lambda grace_s: do(server.stop(grace_s)))
    finally:
        do(server.stop(0))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Talk:
    """The client's side of one stream."""

    def __init__(self, server: Serving) -> None:
        self._wake = threading.Semaphore(0)
        self._queue: list[bytes | None] = []
        self.call = server.call(self._messages(), timeout=4 * PATIENCE_S)

    def _messages(self) -> Iterator[bytes]:
        while True:
            self._wake.acquire()
            data = self._queue.pop(0)
            if data is None:
                return
            yield data

    def say(self, data: bytes | None) -> None:
        self._queue.append(data)
        self._wake.release()

    def leave(self) -> None:
        self.call.cancel()
        self.say(None)


@pytest.fixture
def loop() -> Iterator[CompletionLoop]:
    made = make_loop()
    assert made is not None
    yield made
    made.close()
