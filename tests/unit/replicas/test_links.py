"""Streams between sidecars over real sockets: what is sent arrives, and no stranger gets past the door."""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct

import pytest
import uvloop

from extproc.replicas import links
from extproc.replicas import messages as m
from extproc.replicas.links import TcpNetwork
from extproc.replicas.log import SidecarLog
from extproc.replicas.wire import MOST_BYTES, frames, read
from tests.e2e.kit.processes import PATIENCE_S, free_port

HELLO = m.Hello(1, "pool", m.Member("one", "127.0.0.1:1", 1), m.Purpose.FOLLOW, 0, 1, frozenset())


class Door:
    """Stands where a replica stands: keeps what guests say."""

    def __init__(self) -> None:
        self.said: list[m.Message] = []
        self.gone = 0
        self.links: list[m.Link] = []

    def accept(self, link: m.Link) -> Door:
        self.links.append(link)
        return self

    def receive(self, message: m.Message) -> None:
        self.said.append(message)

    def closed(self) -> None:
        self.gone += 1


async def until(condition) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - it may be anything
            await asyncio.sleep(0.002)


async def opened(door: Door) -> tuple[TcpNetwork, str]:
    network = TcpNetwork(asyncio.get_running_loop(), SidecarLog(m.Member("me", "here:1", 1)))
    address = f"127.0.0.1:{free_port()}"
    await network.listen(address, door)
    return network, address


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_what_one_side_sends_the_other_receives_in_order_and_an_end_is_told_once(new_loop):
    async def run() -> None:
        door = Door()
        network, address = await opened(door)
        heard: list[m.Message] = []
        ended: list[int] = []
        link = network.dial(address, heard.append, lambda: ended.append(1))
        link.send(HELLO)
        for number in range(3000):
            link.send(m.Beat(number))
        await until(lambda: len(door.said) == 3001)
        assert door.said == [HELLO, *(m.Beat(number) for number in range(3000))]
        door.links[0].send(m.Leave())
        door.links[0].close()
        await until(lambda: ended)
        assert heard == [m.Leave()]
        assert ended == [1]
        assert door.gone == 0  # who ends a stream himself is not told
        await network.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())


def test_what_cant_be_sent_is_given_back_and_told_once_and_what_was_said_with_it_arrives(caplog):
    broken = [m.Offer(number, m.Asked("r", 0.0, model="\ud800")) for number in (1, 2)]

    async def run() -> None:
        door = Door()
        network, address = await opened(door)
        link = network.dial(address, lambda _: None, lambda: None)
        bounced: list[m.Message] = []
        link.bounced = bounced.append
        for message in (HELLO, *broken, m.Beat(1)):
            link.send(message)
        await until(lambda: len(door.said) == 2)
        assert door.said == [HELLO, m.Beat(1)]
        assert bounced == broken
        link.close()
        await network.close()

    asyncio.run(run())
    (record,) = caplog.records
    assert re.search(r"a message to the sidecar at 127.0.0.1:\d+ \(Offer\) can't be sent", record.message)


def test_a_sidecar_that_is_not_there_is_told_as_an_end():
    async def run() -> None:
        network = TcpNetwork(asyncio.get_running_loop())
        ended: list[int] = []
        network.dial(f"127.0.0.1:{free_port()}", lambda _: None, lambda: ended.append(1)).send(HELLO)
        assert not ended  # never before `dial` returns
        await until(lambda: ended)
        await network.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", MOST_BYTES + 1),
        struct.pack(">I", 5) + b"\xff\xff\xff\xff\xff",
    ],
    ids=["http", "too long", "nonsense"],
)
def test_a_strangers_bytes_end_his_stream_and_reach_nobody_and_the_log_says_from_where_they_came(data, caplog):
    async def run() -> None:
        door = Door()
        network, address = await opened(door)
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        async with asyncio.timeout(PATIENCE_S):
            try:
                assert await reader.read() == b""
            except ConnectionResetError:
                pass
        assert door.said == []
        (line,) = caplog.messages
        assert f"me at here:1: the stream with a guest from {writer.get_extra_info('sockname')[0]}" in line
        writer.close()
        await network.close()

    asyncio.run(run())


@pytest.mark.parametrize("frame", [b"", b"\x0a\x05\xfa\x06\x02hi"], ids=["nothing", "a kind that we don't know"])
def test_a_stranger_who_says_only_what_we_leave_out_is_ended_as_one_who_says_nothing(frame, monkeypatch):
    monkeypatch.setattr(links, "HELLO_S", 0.1)
    assert read(frame) == []

    async def run() -> None:
        door = Door()
        network, address = await opened(door)
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(struct.pack(">I", len(frame)) + frame)
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        assert door.said == []
        writer.close()
        await network.close()

    asyncio.run(run())


def test_a_frame_may_come_in_any_pieces():
    async def run() -> None:
        door = Door()
        network, address = await opened(door)
        host, _, port = address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        for byte in frames([HELLO, m.Beat(1)]):
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        await until(lambda: len(door.said) == 2)
        assert door.said == [HELLO, m.Beat(1)]
        writer.close()
        await until(lambda: door.gone == 1)
        await network.close()

    asyncio.run(run())
