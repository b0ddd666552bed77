"""An admin port that is taken: by a sidecar that leaves it to us, or by somebody who stays."""

from __future__ import annotations

import asyncio
import re

import pytest
from admin_room import Room, served, until

from extproc.admin.http import Admin
from extproc.errors import StartError


def second(first: Room) -> Admin:
    return Admin(f"127.0.0.1:{first.admin.port}", first.gate, first.metrics)


def test_who_starts_while_its_predecessor_drains_waits_for_its_port(caplog):
    async def play() -> None:
        first = Room()
        async with served(first):
            first.admin.ready, first.admin.drains = False, True
            admin = second(first)
            starting = asyncio.create_task(admin.start())
            await until(lambda: caplog.records)
            assert not starting.done()
        await starting
        await admin.stop()

    asyncio.run(play())
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"admin: 127\.0\.0\.1:\d+ is held by a sidecar that drains: waiting for its end", said)


@pytest.mark.parametrize("is_ready", [True, False])
def test_a_port_of_a_sidecar_that_stays_is_an_error_that_says_so(is_ready):
    async def play() -> None:
        first = Room()
        async with served(first):
            first.admin.ready = is_ready
            with pytest.raises(
                StartError, match=r"can't bind .*: Address already in use; it is held by a sidecar that is"
            ):
                await second(first).start()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("says", "holder"),
    [
        (b"", "does not answer"),
        (b"HTTP/1.1 200 OK\r\n\r\nhi", "another program"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n", "another program"),
    ],
)
def test_a_port_of_another_program_or_of_one_that_hangs_is_an_error_that_says_so(says, holder, monkeypatch):
    monkeypatch.setattr("extproc.admin.predecessor.ASK_S", 0.1)

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        if says:
            writer.close()
        writers.append(writer)

    async def play() -> None:
        other = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with other:
            room = Room()
            port = other.sockets[0].getsockname()[1]
            with pytest.raises(StartError, match=holder):
                await Admin(f"127.0.0.1:{port}", room.gate, room.metrics).start()
            for writer in writers:
                writer.close()

    writers: list[asyncio.StreamWriter] = []
    asyncio.run(play())
