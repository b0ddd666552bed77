"""The loop on a completion queue is a full asyncio loop, and its server does what a gRPC client may expect."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import pytest
from grpc._cython import cygrpc

import extproc.transport.completion.server
from extproc.errors import ProtocolError
from extproc.stream import wire
from extproc.transport.aio import Server as AsyncioServer
from extproc.transport.aio import _Writer
from extproc.transport.completion import loop as loop_module
from extproc.transport.completion.loop import CompletionLoop, make_loop
from extproc.transport.completion.server import Server, Stream
from extproc.transport.listener import Listener

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
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(20)

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


@pytest.fixture(params=["completion_queue", "asyncio"])
def server(request, monkeypatch):
    """One per transport: what a client sees must not differ."""
    monkeypatch.setattr(extproc.transport.completion.server, "Session", Chatter)
    monkeypatch.setattr("extproc.transport.aio.Session", Chatter)
    if request.param == "asyncio":
        with serving(AsyncioServer, asyncio.new_event_loop()) as running:
            yield running
    else:
        made = make_loop()
        assert made is not None
        with serving(Server, made) as running:
            yield running


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Talk:
    """The client's side of one stream."""

    def __init__(self, server: Serving) -> None:
        self._wake = threading.Semaphore(0)
        self._queue: list[bytes | None] = []
        self.call = server.call(self._messages(), timeout=20)

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


def test_replies_come_in_order_also_when_thousands_are_sent_at_once(server):
    talk = Talk(server)
    talk.say(b"many 3000")
    talk.say(b"echo x")
    talk.say(None)
    assert [*talk.call] == [*(str(number).encode() for number in range(3000)), b"x"]
    assert talk.call.code() is grpc.StatusCode.OK
    assert server.log == ["end"]


def test_a_client_that_takes_no_replies_is_read_no_further_until_it_does_and_its_end_is_noticed(server):
    """As long as a message is under way to the server, the next one is not taken from the talk's queue.

    There are more than sockets (33 MB a direction with Linux' largest `tcp_rmem`) and gRPC's windows can ever hold.
    """
    size, count = 100_000, 2000
    message = b"echo " + b"x" * size
    for leaves in (False, True):
        talk = Talk(server)
        for _ in range(count):
            talk.say(message)
        talk.say(None)
        left = 0
        while left != len(talk._queue):  # until all stands still
            left = len(talk._queue)
            time.sleep(0.5)
        assert left > count / 4
        if leaves:
            talk.call.cancel()
            wait_for(lambda: server.log == ["end"] * 2)
        else:
            assert [len(reply) for reply in talk.call] == [size] * count
            wait_for(lambda: server.log == ["end"])


def test_a_reply_may_come_later_and_one_for_a_stream_that_is_over_is_dropped(server):
    talk = Talk(server)
    talk.say(b"late 0.05")
    assert next(talk.call) == b"late"
    talk.leave()
    wait_for(lambda: server.log)
    time.sleep(0.1)
    other = Talk(server)
    other.say(b"echo still there")
    assert next(other.call) == b"still there"
    other.leave()
    wait_for(lambda: server.log == ["end", "end"])


def test_a_handler_that_wants_no_more_ends_the_stream_after_its_last_reply(server):
    talk = Talk(server)
    talk.say(b"over")
    assert [*talk.call] == [b"last"]
    assert server.log == ["end"]
    talk.say(None)


def test_a_protocol_error_is_the_streams_status(server):
    talk = Talk(server)
    talk.say(b"wrong")
    with pytest.raises(grpc.RpcError):
        list(talk.call)
    assert talk.call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert talk.call.details() == "that was wrong"
    wait_for(lambda: server.log == ["end"])
    talk.say(None)


@pytest.mark.parametrize("where", ["bug", "bug in end"])
def test_a_bug_in_one_stream_costs_the_others_nothing(server, where, caplog):
    other = Talk(server)
    other.say(b"echo 1")
    assert next(other.call) == b"1"
    talk = Talk(server)
    if where == "bug in end":
        server.log.append(where)
        talk.say(b"over")
    else:
        talk.say(b"bug")
    with contextlib.suppress(grpc.RpcError):
        list(talk.call)
    wait_for(lambda: "end" in server.log)
    server.log[:] = [entry for entry in server.log if entry == "end"]
    other.say(b"echo 2")
    assert next(other.call) == b"2"
    other.say(None)
    assert [*other.call] == []
    wait_for(lambda: server.log == ["end", "end"])
    talk.say(None)


def test_every_way_to_leave_ends_the_handler_exactly_once(server):
    for leave in ("cancel", "half-close", "cancel unheard"):
        talk = Talk(server)
        if leave != "cancel unheard":
            talk.say(b"echo hi")
            assert next(talk.call) == b"hi"
        if leave == "half-close":
            talk.say(None)
            assert [*talk.call] == []
        else:
            if leave == "cancel unheard":
                talk.say(b"many 100000")
                next(talk.call)
            talk.leave()
    wait_for(lambda: server.log == ["end"] * 3)
    time.sleep(0.05)
    assert server.log == ["end"] * 3


@pytest.mark.parametrize("what", ["pause", "stay"])
def test_a_client_that_leaves_while_nothing_is_read_from_it_is_noticed(server, what):
    """Nothing is read while a handler wants no more for now, and once a client has said that it says no more."""
    talk = Talk(server)
    talk.say(what.encode())
    if what == "stay":
        talk.say(None)
    wait_for(lambda: server.log in (["paused"], ["half-closed"]))
    talk.leave()
    wait_for(lambda: server.log[1:] == ["end"])


def test_a_request_takes_four_batches_of_operations(loop, monkeypatch):
    """To read, to answer and read twice, and to end: each costs a turn through gRPC's core."""
    batches: list[list[str]] = []

    def start(stream: Stream, operations: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        batches.append([type(one).__name__.removesuffix("Operation") for one in operations])
        assert stream._call.start_server_batch(operations, then) == 0

    monkeypatch.setattr(extproc.transport.completion.server, "Session", Chatter)
    monkeypatch.setattr(Stream, "_start", start)
    with serving(Server, loop) as server:
        talk = Talk(server)
        for reply in (b"to this", b"and that"):
            talk.say(b"echo " + reply)
            assert next(talk.call) == reply
        talk.say(None)
        assert [*talk.call] == []
    assert batches == [
        ["ReceiveMessage"],
        ["ReceiveMessage", "SendInitialMetadata", "SendMessage"],
        ["ReceiveMessage", "SendMessage"],
        ["SendStatusFromServer", "ReceiveCloseOnServer"],
    ]


def test_an_unknown_method_is_unimplemented(server):
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/nobody/Knows")(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_stop_closes_the_port_at_once_lets_streams_end_and_cuts_what_stays(server):
    ends, stays = Talk(server), Talk(server)
    for talk in (ends, stays):
        talk.say(b"echo hi")
        assert next(talk.call) == b"hi"
    stopping = threading.Thread(target=server.stop, args=(1.5,))
    stopping.start()

    def closed() -> bool:
        with grpc.insecure_channel(server.address) as channel:
            try:
                grpc.channel_ready_future(channel).result(0.1)
            except grpc.FutureTimeoutError:
                return True
            return False

    wait_for(closed)
    assert stopping.is_alive()
    ends.say(b"echo bye")
    assert next(ends.call) == b"bye"
    ends.say(None)
    assert [*ends.call] == []
    with pytest.raises(grpc.RpcError):
        list(stays.call)
    stopping.join(10)
    assert not stopping.is_alive()
    assert server.log == ["end", "end"]
    stays.say(None)


def test_a_server_whose_streams_stay_although_they_were_cut_stops_all_the_same(loop, monkeypatch, caplog):
    monkeypatch.setattr(extproc.transport.completion.server, "Session", Chatter)
    monkeypatch.setattr(extproc.transport.completion.server, "FORCED_S", 0.0)
    server = Server([], Listener("127.0.0.1:0"), loop)  # type: ignore[arg-type]
    loop.run_until_complete(server.start())
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.stream_stream(METHOD)(iter([b"echo hi"]), timeout=10)
        loop.run_until_complete(asyncio.sleep(0.1))
        loop.run_until_complete(server.stop(0))
        assert "are not all gone after 0s" in caplog.text
        loop.close()
        call.cancel()


# ---- the loop


@pytest.fixture
def loop() -> Iterator[CompletionLoop]:
    made = make_loop()
    assert made is not None
    yield made
    made.close()


def test_timers_threads_sockets_and_signals_work_as_on_any_loop(loop):
    async def everything() -> list[str]:
        seen = []
        began = loop.time()
        await asyncio.sleep(0.02)
        assert loop.time() - began >= 0.02
        seen.append(await asyncio.to_thread(lambda: "thread"))

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"socket\n")
        seen.append((await reader.readline()).decode().strip())
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
        called = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, called.set)
        os.kill(os.getpid(), signal.SIGUSR1)
        await asyncio.wait_for(called.wait(), 5)
        loop.remove_signal_handler(signal.SIGUSR1)
        return seen

    assert loop.run_until_complete(everything()) == ["thread", "socket"]


def test_an_idle_loop_sleeps(loop):
    began, cpu = time.monotonic(), time.process_time()
    loop.run_until_complete(asyncio.sleep(0.5))
    assert time.monotonic() - began >= 0.5
    assert time.process_time() - cpu < 0.2


def test_a_loop_that_closes_with_a_server_on_it_and_a_stream_open_does_not_hang(loop, monkeypatch):
    monkeypatch.setattr(extproc.transport.completion.server, "Session", Chatter)
    server = Server([], Listener("127.0.0.1:0"), loop)  # type: ignore[arg-type]
    loop.run_until_complete(server.start())
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.stream_stream(METHOD)(iter([b"echo hi"]), timeout=10)
        loop.run_until_complete(asyncio.sleep(0.1))
        loop.close()
        call.cancel()


@pytest.mark.parametrize(
    "gone",
    [
        *("CompletionQueue", "Server", "ReceiveCloseOnServerOperation", "ReceiveMessageOperation"),
        *("SendInitialMetadataOperation", "SendMessageOperation", "SendStatusFromServerOperation", "StatusCode"),
    ],
)
def test_a_grpcio_that_lacks_something_is_noticed_at_the_start(gone, monkeypatch, caplog):
    monkeypatch.delattr(cygrpc, gone)
    with caplog.at_level(logging.WARNING):
        assert make_loop() is None
    (record,) = caplog.records
    assert gone in record.getMessage()
    assert "grpc.aio" in record.getMessage()


def test_a_grpcio_that_behaves_otherwise_is_noticed_at_the_start(monkeypatch, caplog):
    class Deaf(cygrpc.ReceiveMessageOperation):  # type: ignore[misc, name-defined]
        def message(self) -> None:
            return None

    monkeypatch.setattr(cygrpc, "ReceiveMessageOperation", Deaf)
    assert make_loop() is None
    assert "a message that differs" in caplog.text


def test_a_grpcio_that_nobody_tested_is_not_tried(monkeypatch, caplog):
    monkeypatch.setattr(loop_module, "TESTED", ((1, 0), (1, 1)))
    assert make_loop() is None
    assert "tested with grpcio 1.0 to below 1.1" in caplog.text


def test_the_self_test_is_silent(capfd):
    """A line of gRPC's own is no JSON, and looks like trouble."""
    for _ in range(200):
        made = make_loop()
        assert made is not None
        made.close()
    assert capfd.readouterr() == ("", "")


def test_reading_a_configuration_imports_no_grpc():
    """What `prepare_grpc` sets for the transport that the configuration names, gRPC reads when it is imported."""
    code = "import sys, extproc.config, extproc.commands.cli; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_on_asyncio_no_status_goes_out_beside_a_reply_however_many_were_sent_in_one_turn():
    async def run() -> None:
        may_write = asyncio.Event()
        written: list[bytes] = []

        async def write(data: bytes) -> None:
            await may_write.wait()
            written.append(data)

        writer = _Writer(write)
        writer.send(b"pick")
        writer.send(b"piece")
        rest = asyncio.create_task(writer.rest())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not rest.done()
        may_write.set()
        await rest
        assert written == [b"pick", b"piece"]

    asyncio.run(run())
