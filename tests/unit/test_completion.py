"""The loop on a completion queue is a full asyncio loop, and its server does what a gRPC client may expect."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Any

import grpc
import pytest

import extproc.transport.completion.door
import extproc.transport.completion.server
from extproc.transport.aio import Server as AsyncioServer
from extproc.transport.aio import _Writer
from extproc.transport.completion.loop import make_loop
from extproc.transport.completion.server import Server
from extproc.transport.listener import Listener
from tests.e2e.kit.processes import PATIENCE_S
from tests.unit.completion_stage import METHOD, Chatter, Talk, loop, serving, wait_for
from tests.unit.endpoint_lists import until

__all__ = ["loop"]  # a fixture


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


def test_replies_come_in_order_also_when_thousands_are_sent_at_once(server):
    talk = Talk(server)
    talk.say(b"many 3000")
    talk.say(b"echo x")
    talk.say(None)
    assert [*talk.call] == [*(str(number).encode() for number in range(3000)), b"x"]
    assert talk.call.code() is grpc.StatusCode.OK
    wait_for(lambda: server.log == ["end"])


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
    wait_for(lambda: server.log == ["end"])
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
    take = loop._wait.events._poll

    def poll(until: float | None) -> Any:
        event = take(until)
        operations = getattr(event, "batch_operations", None)
        if operations:
            batches.append([type(one).__name__.removesuffix("Operation") for one in operations])
        return event

    loop._wait.events._poll = poll
    monkeypatch.setattr(extproc.transport.completion.server, "Session", Chatter)
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
        channel.unary_unary("/nobody/Knows")(b"", timeout=PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_stop_closes_the_port_at_once_lets_streams_end_and_cuts_what_stays(server):
    ends, stays = Talk(server), Talk(server)
    for talk in (ends, stays):
        talk.say(b"echo hi")
        assert next(talk.call) == b"hi"
    stopping = threading.Thread(target=server.stop, args=(4.0,))
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
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()
    wait_for(lambda: server.log == ["end", "end"])
    stays.say(None)


def test_a_server_whose_streams_stay_although_they_were_cut_stops_all_the_same(loop, monkeypatch, caplog):
    monkeypatch.setattr(extproc.transport.completion.server, "Session", Chatter)
    monkeypatch.setattr(extproc.transport.completion.door, "FORCED_S", 0.0)
    log: list[str] = []
    server = Server(log, Listener("127.0.0.1:0"), loop)  # type: ignore[arg-type]
    loop.run_until_complete(server.start())
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.stream_stream(METHOD)(iter([b"pause"]), timeout=PATIENCE_S)
        loop.run_until_complete(until(lambda: log))
        loop.run_until_complete(server.stop(0))
        assert "are not all gone after 0s" in caplog.text
        loop.close()
        call.cancel()


def test_a_loop_that_closes_with_a_server_on_it_and_a_stream_open_does_not_hang(loop, monkeypatch):
    monkeypatch.setattr(extproc.transport.completion.server, "Session", Chatter)
    log: list[str] = []
    server = Server(log, Listener("127.0.0.1:0"), loop)  # type: ignore[arg-type]
    loop.run_until_complete(server.start())
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.stream_stream(METHOD)(iter([b"pause"]), timeout=PATIENCE_S)
        loop.run_until_complete(until(lambda: log))
        loop.close()
        call.cancel()


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
