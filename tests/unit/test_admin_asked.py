"""What an operator asks for on the admin port: the story of a request, and a recording, one at a time."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from aiohttp import web

from extproc.admin import http, text
from extproc.admin.http import Admin
from extproc.commands.cli import main
from extproc.observe.recording import Recording
from extproc.replicas.observe import Shown
from tests.unit.admin_room import Room, served, until


def test_the_story_of_a_request_is_a_page_and_a_command(capsys):
    async def scenario() -> None:
        room = Room()
        room.offer(2)
        async with served(room) as client:
            async with client.get("/debug/requests/id-1") as response:
                assert response.status == 200
                assert "waits still, at place 1" in await response.text()
            async with client.get("/debug/requests/nobody%0a") as response:
                assert (response.status, response.content_type) == (404, "text/plain")
            async with client.get("/debug/requests/id-1", headers={"host": "evil.example"}) as response:
                assert response.status == 403
            admin = f"127.0.0.1:{room.admin.port}"
            assert await asyncio.to_thread(main, ["why", "id-0", "--admin", admin]) == 0
            assert "dispatched to vllm-0" in capsys.readouterr().out
            assert await asyncio.to_thread(main, ["why", "nobody", "--admin", admin]) == 1
            assert "No request 'nobody'" in capsys.readouterr().err
            assert await asyncio.to_thread(main, ["why", "\udcff", "--admin", admin]) == 1  # as a shell's b"\xff" comes
            assert "No request" in capsys.readouterr().err
        assert await asyncio.to_thread(main, ["why", "id-0", "--admin", admin]) == 3

    asyncio.run(scenario())


def test_why_of_no_id_says_where_one_is(capsys):
    """`why "$ID"` of a variable that is not set said `404: Not Found`."""
    with pytest.raises(SystemExit) as caught:
        main(["why", ""])
    assert caught.value.code == 2
    assert "ID: is empty: an answer's header x-request-id" in capsys.readouterr().err


@pytest.mark.parametrize("shares", [False, True], ids=["alone", "among others"])
def test_who_asks_for_an_unknown_id_is_sent_to_the_other_sidecars_where_there_are_any(shares):
    async def scenario() -> None:
        room = Room()
        replica = SimpleNamespace(bad_answers={})
        others = Shown(SimpleNamespace(replica=replica), room.gate) if shares else None
        room.admin = Admin("127.0.0.1:0", room.gate, room.metrics, others=others)
        async with served(room) as client, client.get("/debug/requests/nobody") as response:
            assert response.status == 404
            assert ("Another sidecar may have taken it in" in await response.text()) == shares

    asyncio.run(scenario())


@pytest.mark.parametrize("path", ["/metrics", "/queues"])
def test_a_long_page_is_sent_in_pieces_and_is_whole(path, monkeypatch):
    """A megabyte that was sent in one turn kept everybody waiting for four milliseconds."""
    sent: list[int] = []
    turns: list[int] = []
    write = web.StreamResponse.write
    turn = 0

    def count_turns() -> None:
        nonlocal turn
        turn += 1
        asyncio.get_running_loop().call_soon(count_turns)

    async def note(response: web.StreamResponse, piece: bytes) -> None:
        sent.append(len(piece))
        turns.append(turn)
        await write(response, piece)

    for module in (http, text):
        monkeypatch.setattr(module, "PIECE_BYTES", 500)
    monkeypatch.setattr(web.StreamResponse, "write", note)

    async def scenario() -> None:
        room = Room()
        room.offer(30)
        count_turns()
        async with served(room) as client:
            async with client.get(path) as response:
                body, kind = await response.read(), response.headers["content-type"]
            assert (response.status, len(body)) == (200, int(response.headers["content-length"]))
            async with client.head(path) as response:
                assert (response.headers["content-type"], await response.read()) == (kind, b"")
        assert body.endswith(b"}" if path == "/queues" else b"\n")
        assert sum(sent) == len(body)
        assert max(sent) == 500
        assert len(set(turns)) == len(turns), "each in a turn of its own"

    asyncio.run(scenario())


def test_a_recording_is_made_on_demand_one_at_a_time_and_runs_again():
    async def scenario() -> None:
        room = Room()
        first, _ = room.offer(2)
        controller = room.gate.controller
        async with served(room) as client:
            asked = asyncio.create_task(client.get("/debug/recording?seconds=1"))
            await until(lambda: controller._watchers)
            async with client.get("/debug/recording") as response:
                assert response.status == 409
            room.gate.close(first)
            async with await asked as response:
                lines = (await response.text()).splitlines()
            for seconds in ("0", "601", "x", "-1", "0" * 8 + "12"):
                async with client.get(f"/debug/recording?seconds={seconds}") as response:
                    assert response.status == 400
        assert not controller._watchers
        assert [json.loads(line).get("event") for line in lines[1:]] == ["Released", None]
        again = Recording(lines)
        assert list(again.run()) == [None]
        assert repr(again.core) == repr(controller)

    asyncio.run(scenario())


def test_who_asked_for_a_recording_and_left_keeps_nobody_from_another():
    async def scenario() -> None:
        room = Room()
        controller = room.gate.controller
        async with served(room) as client:
            asked = asyncio.create_task(client.get("/debug/recording?seconds=600"))
            await until(lambda: controller._watchers)
            asked.cancel()
            await until(lambda: not controller._watchers)
            async with client.get("/debug/recording?seconds=1") as response:
                assert response.status == 200

    asyncio.run(scenario())


def test_a_recording_that_could_not_begin_keeps_nobody_from_another(monkeypatch):
    async def scenario() -> None:
        room = Room()
        async with served(room) as client:
            with monkeypatch.context() as broken:
                broken.setattr("extproc.admin.http.Recorder", None)
                async with client.get("/debug/recording?seconds=1") as response:
                    assert response.status == 500
            async with client.get("/debug/recording?seconds=1") as response:
                assert response.status == 200

    asyncio.run(scenario())


def test_no_recording_begins_while_so_many_wait_that_all_would_stand_still(monkeypatch):
    monkeypatch.setattr("extproc.admin.http.MOST_WAITING_RECORDED", 2)

    async def scenario() -> None:
        room = Room()
        room.offer(4)
        async with served(room) as client, client.get("/debug/recording?seconds=1") as response:
            assert response.status == 503
            assert "3 requests wait" in await response.text()

    asyncio.run(scenario())
