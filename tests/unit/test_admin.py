"""The admin port: who may ask, what is shown, what it costs while many or nobody look; and how `top` draws it."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import aiohttp
import pytest

from extproc.admin import connections, state
from extproc.admin import feed as feeds
from extproc.admin.feed import MOST_SUBSCRIBERS, Feed
from extproc.admin.history import SAMPLES, STEP_S
from extproc.admin.http import Admin
from extproc.admin.state import FileState
from extproc.admission.controller import Controller
from extproc.admission.load import Load
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request, RequestClass
from extproc.commands.cli import main
from extproc.commands.top import line, lines, plain
from extproc.observe.metrics import Metrics
from extproc.observe.recording import Recording
from extproc.observe.stories import Stories
from extproc.observe.waits import MOST, Waits, percentile
from extproc.stream.gate import Gate

CLASSES = (RequestClass("default", 0, 60.0), RequestClass("high", 5, 60.0))


class Clock:
    """A loop for the gate whose time a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def time(self) -> float:
        return self.now

    def call_at(self, when, callback):
        return self

    def call_soon(self, callback):
        callback()

    def cancel(self) -> None:
        pass


class Room:
    """A sidecar's core with an admin port, on a clock that stands."""

    def __init__(self, *, endpoints: int = 1, limit: int = 1) -> None:
        self.clock = Clock()
        controller = Controller(Policy(classes=CLASSES, max_queued_requests=20_000, shed=False))
        self.metrics = Metrics(controller, lambda: 0, clock=self.clock.time)
        self.stories = Stories(controller, self.clock.time)
        self.gate = Gate(controller, self.clock, [self.metrics, self.stories])
        for number in range(endpoints):
            self.gate.put_endpoint(EndpointSpec(f"vllm-{number}", max_running_requests=limit))
            self.gate.set_up(f"vllm-{number}", is_up=True)
        self.admin = Admin("127.0.0.1:0", self.gate, self.metrics, stories=self.stories)
        self.admin.ready = True

    def offer(self, count: int = 1, **how: object) -> list[Ticket]:
        tickets = []
        for number in range(count):
            tickets.append(Ticket(Request(**{"id": f"id-{number}", "arrived": self.clock.now, **how})))
            self.gate.offer(tickets[-1])
        return tickets

    def view(self):
        return asyncio.run(self.admin.view())


@asynccontextmanager
async def served(room: Room):
    """Serve, and give a client to ask with."""
    await room.admin.start()
    base = f"http://127.0.0.1:{room.admin.port}"
    try:
        async with aiohttp.ClientSession(base, connector=aiohttp.TCPConnector(limit=0, force_close=True)) as client:
            yield client
    finally:
        await room.admin.stop()


async def until(condition) -> None:
    """Wait for `condition`."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it comes over sockets
            await asyncio.sleep(0.005)


async def event(response: aiohttp.ClientResponse) -> dict:
    """Read the next view."""
    async with asyncio.timeout(10):
        async for line in response.content:
            if line.startswith(b"data: "):
                return json.loads(line[6:])
    raise AssertionError("the stream ended")


# ---- who may ask


def test_only_hosts_that_no_dns_server_can_make_up_are_answered():
    async def ask() -> None:
        async with served(Room()) as client:
            for host in ("127.0.0.1:1", "localhost", "LocalHost:9902", "[::1]:9902", "10.1.2.3", "a.localhost:1"):
                async with client.get("/queues", headers={"host": host}) as answer:
                    assert answer.status == 200, host
            for host in ("evil.example", "localhost.evil.example:9902", "127.0.0.1.nip.io", "[evil]", "notlocalhost"):
                for path in ("/", "/queues", "/events", "/metrics"):
                    async with client.get(path, headers={"host": host}) as answer:
                        assert answer.status == 403, host

    asyncio.run(ask())


def test_pages_of_other_sites_get_nothing_and_a_link_from_there_works():
    async def ask() -> None:
        async with served(Room()) as client:
            for site, mode, status in (
                ("cross-site", "no-cors", 403),
                ("same-site", "cors", 403),
                ("cross-site", "navigate", 200),
                ("same-origin", "cors", 200),
                ("none", "navigate", 200),
            ):
                async with client.get("/queues", headers={"sec-fetch-site": site, "sec-fetch-mode": mode}) as answer:
                    assert answer.status == status, (site, mode)

    asyncio.run(ask())


def test_everything_is_read_only_and_carries_a_strict_policy():
    async def ask() -> None:
        async with served(Room()) as client:
            for path in ("/", "/page.js", "/page.css", "/events", "/queues", "/metrics", "/healthz", "/readyz"):
                for method in ("POST", "PUT", "DELETE", "PATCH"):
                    async with client.request(method, path) as answer:
                        assert answer.status == 405, (method, path)
                async with client.get(path) as answer:
                    assert answer.status == 200
                    policy = answer.headers["content-security-policy"]
                    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
                    assert "unsafe" not in policy
                    assert answer.headers["x-content-type-options"] == "nosniff"
                    if path in ("/", "/page.js", "/page.css"):
                        text = await answer.text()
                        assert "innerHTML" not in text
                        assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")  # nobody else is asked
                        assert "https://" not in text

    asyncio.run(ask())


# ---- what is shown


def test_queues_lists_as_many_as_asked_for_up_to_a_bound():
    room = Room()
    room.offer(700)

    async def ask() -> None:
        async with served(room) as client:
            for query, count in (("", state.WAITING_LISTED), ("?limit=0", 0), ("?limit=3", 3), ("?limit=500", 500)):
                async with client.get(f"/queues{query}") as answer:
                    page = await answer.json()
                    assert (len(page["waiting"]), page["waiting_total"]) == (count, 699)
            for wrong in ("501", "-1", "x", "", "٣", "9" * 30):
                async with client.get("/queues", params={"limit": wrong}) as answer:
                    assert answer.status == 400, wrong
                    assert "limit: must be a number from 0 to 500" in await answer.text()

    asyncio.run(ask())


def test_what_a_client_sent_is_shortened():
    room = Room()
    room.offer(2, id="i" * 60_000, model="m" * 60_000, tenant="t" * 60_000)
    (row,) = room.admin.snapshot()["waiting"]
    assert {len(row[key]) for key in ("id", "model", "tenant")} == {state.MOST_CHARACTERS}
    assert len(json.dumps(room.view())) < 10_000


def test_the_view_counts_all_tells_some_apart_and_lets_the_loop_turn():
    room = Room(endpoints=200)
    room.offer(200)
    room.offer(6000, request_class="default")
    room.clock.now += 5
    room.offer(3999, request_class="high")
    room.offer(1, request_class="high", arrived=room.clock.now - 3)  # a replayed one comes late and is the oldest
    room.clock.now += 1
    turns = 0

    async def look():
        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        try:
            return await room.admin.view()
        finally:
            counting.cancel()

    view = asyncio.run(look())
    assert turns > 20
    assert (view["waiting_total"], view["scanned_all"], len(view["endpoints"])) == (10_000, True, 200)
    assert [(one["name"], one["waiting"], one["oldest_s"]) for one in view["classes"]] == [
        ("high", 4000, 4.0),
        ("default", 6000, 6.0),
    ]
    assert {len(one["bars"]) for one in view["classes"]} == {state.MOST_BARS}
    assert view["classes"][1]["bars"][0][1] == 0.1  # 6 of 60 s
    assert {row["age_s"] for row in view["waiting"]} == {6.0}  # the oldest of all
    assert len(view["waiting"]) == state.ROWS
    assert len(json.dumps(view)) < 150_000


def test_an_endpoints_state_is_a_word():
    room = Room(endpoints=8)
    tickets = room.offer(8)
    endpoints = room.gate.controller.endpoints
    endpoints["vllm-7"].health.is_failing = True
    room.gate.set_up("vllm-1", is_up=False)
    endpoints["vllm-2"].health.ejected_until = room.clock.now + 4
    endpoints["vllm-3"].health.on_trial = True
    room.gate.remove_endpoint("vllm-4")
    room.gate.set_up("vllm-5", is_up=None)
    room.gate.observe("vllm-6", Load(asleep=True))
    rows = {row["name"]: row for row in room.admin.snapshot()["endpoints"]}
    states = ["up", "down", "ejected", "on trial", "removed", "unknown", "asleep", "failing"]
    assert [rows[f"vllm-{n}"]["state"] for n in range(8)] == states
    assert [rows[f"vllm-{n}"]["up"] for n in range(8)] == [True, False, False, True, False, False, False, False]
    assert rows["vllm-2"]["ejected_for_s"] == 4
    assert "ejected_for_s" not in rows["vllm-0"]
    assert any("EJECTED, back in 4 s" in line for line in lines(room.view()))
    assert all(ticket.endpoint for ticket in tickets)


def test_a_former_class_that_empties_while_the_view_is_made_is_left_out():
    room = Room()
    (_, last) = room.offer(2, request_class="high")
    room.gate.set_policy(Policy(classes=CLASSES[:1]))

    async def look():
        viewing = asyncio.create_task(room.admin.view())
        await asyncio.sleep(0)
        room.gate.close(last)
        return await viewing

    assert [one["name"] for one in asyncio.run(look())["classes"]] == ["default"]


def test_a_file_that_is_not_in_use_shows_everywhere():
    room = Room()
    assert (room.view()["config_refused"], room.view()["restart_needed"]) == (False, [])
    assert not any("CONFIGURATION" in line or "RESTART" in line for line in lines(room.view()))
    room.admin = Admin("127.0.0.1:0", room.gate, room.metrics, lambda: FileState(True, ("listen", "admin")))
    for shown in (room.view(), room.admin.snapshot()):
        assert (shown["config_refused"], shown["restart_needed"]) == (True, ["listen", "admin"])
    drawn = lines(room.view(), 80, 24)
    assert drawn[1] == "CONFIGURATION REFUSED at its last change: the old one is in use, see the log"
    assert drawn[2] == "RESTART NEEDED to change listen, admin"
    assert len(lines(room.view(), 80, 8)) <= 8


# ---- connections


def test_idle_connections_can_neither_use_up_descriptors_nor_lock_anybody_out(caplog):
    async def flood() -> None:
        room = Room()
        async with served(room) as client:
            page = await client.get("/events")
            await event(page)
            idle = [await asyncio.open_connection("127.0.0.1", room.admin.port) for _ in range(3 * connections.MOST)]
            async with client.get("/readyz") as answer:
                assert answer.status == 200
            assert len(room.admin.connections) <= connections.MOST
            assert (await event(page))["enable_queue"], "who is being answered stays"
            await until(lambda: sum(reader.exception() is not None or reader.at_eof() for reader, _ in idle) >= 200)
            for _, writer in idle:
                writer.close()
            page.close()

    asyncio.run(flood())
    assert [record.getMessage() for record in caplog.records] == [
        f"more than {connections.MOST} connections to the admin port: the oldest idle ones are closed"
    ]


def test_a_connection_that_asks_nothing_is_closed_and_one_that_asks_stays(monkeypatch):
    monkeypatch.setattr(connections, "SPEAK_S", 0.1)

    async def wait() -> None:
        room = Room()
        async with served(room):
            silent, half = [await asyncio.open_connection("127.0.0.1", room.admin.port) for _ in range(2)]
            half[1].write(b"GET /readyz HTTP/1.1\r\nhost: local")
            speaking, writer = await asyncio.open_connection("127.0.0.1", room.admin.port)
            for _ in range(2):
                writer.write(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n")
                assert (await speaking.readline()).startswith(b"HTTP/1.1 200")
                await speaking.readuntil(b"ready\n")
                for reader, _ in (silent, half):
                    with suppress(ConnectionError):
                        assert await asyncio.wait_for(reader.read(), 10) == b""
            assert len(room.admin.connections) == 1
            for one in (silent[1], half[1], writer):
                one.close()

    asyncio.run(wait())


# ---- history


def test_percentiles_are_waits_that_somebody_had_and_no_more_than_the_share_exceeds():
    assert percentile([], 0.95) is None
    assert percentile([7.0], 0.5) == 7.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 0.95) == 95.0
    assert percentile([float(n) for n in range(1, 101)], 1.0) == 100.0


def test_waits_between_two_far_buckets_are_shown_as_they_were():
    room = Room(limit=40)
    running = room.offer(40)
    waiting = room.offer(20)
    for ticket in running[:20]:  # 20 leave after 13.1 s; the next buckets are 10 and 15
        room.clock.now = 113.1
        room.gate.close(ticket, Answer.OK)
    del waiting
    (default,) = (one for one in room.view()["classes"] if one["name"] == "default")
    assert (default["p50_s"], default["p95_s"]) == (0.0, 13.1)


def test_of_more_waits_than_it_keeps_the_window_remembers_the_latest():
    waits = Waits()
    for number in range(MOST + 10):
        waits.note(float(number), 1.0 if number < 10 else 2.0)
    assert waits.since(0.0) == [2.0] * MOST
    assert waits.since(MOST + 8.0) == [2.0, 2.0]


def test_curves_rates_and_percentiles_forget_after_five_minutes():
    room = Room()
    history = room.admin.viewer.history
    (first,) = room.offer()
    waited = room.offer(3)
    room.clock.now += 4
    for ticket in (first, *waited):  # each release lets the next one go
        room.gate.close(ticket, Answer.OK)
    room.admin.viewer.sample()
    view = room.view()
    (default,) = (one for one in view["classes"] if one["name"] == "default")
    assert (default["p50_s"], default["p95_s"]) == (4.0, 4.0), "0, 4, 4 and 4"
    assert default["history"]["waiting"] == [0]
    assert view["outcomes"][0] == {
        "outcome": "dispatched",
        "words": "Sent",
        "status": None,
        "total": 4,
        "per_s": 1.0,
    }
    room.offer(6)
    for _ in range(SAMPLES + 1):
        room.clock.now += STEP_S
        room.admin.viewer.sample()
    view = room.view()
    (default,) = (one for one in view["classes"] if one["name"] == "default")
    assert (default["p50_s"], default["p95_s"]) == (None, None)
    assert default["history"]["waiting"] == [5] * SAMPLES
    assert history.rates(room.clock.now)["dispatched"] == 0
    assert view["outcomes"][0]["total"] == 5


# ---- events


def test_a_view_is_made_once_a_tick_for_all_and_never_while_nobody_looks(monkeypatch):
    monkeypatch.setattr(feeds, "TICK_S", 0.05)

    async def ask() -> None:
        room = Room()
        made = 0

        async def view():
            nonlocal made
            made += 1
            return {"number": made}

        room.admin.feed = Feed(view)
        async with served(room) as client:
            assert made == 0
            streams = [await client.get("/events") for _ in range(5)]
            assert streams[0].content_type == "text/event-stream"
            seen = [[(await event(stream))["number"] for _ in range(3)] for stream in streams]
            assert all(numbers == sorted(set(numbers)) for numbers in seen)
            assert made < 15  # not five times three
            for stream in streams:
                stream.close()
            await until(lambda: len(room.admin.feed) == 0)
            ticking = room.admin.feed._ticking
            await until(ticking.done)
            before = made
            async with client.get("/queues"):
                pass
            assert made == before

    asyncio.run(ask())


def test_subscribers_are_bounded_and_a_place_that_is_left_is_free_again(monkeypatch):
    monkeypatch.setattr(feeds, "TICK_S", 0.02)

    async def ask() -> None:
        room = Room()
        async with served(room) as client:
            streams = [await client.get("/events") for _ in range(MOST_SUBSCRIBERS)]
            async with client.get("/events") as answer:
                assert (answer.status, answer.headers["retry-after"]) == (503, "5")
            streams.pop().close()
            await until(lambda: len(room.admin.feed) == MOST_SUBSCRIBERS - 1)
            async with client.get("/events") as answer:
                assert answer.status == 200
                assert (await event(answer))["enable_queue"] is True
            for stream in streams:
                stream.close()

    asyncio.run(ask())


def test_a_subscriber_that_reads_nothing_is_dropped_and_delays_nobody(monkeypatch):
    monkeypatch.setattr(feeds, "TICK_S", 0.01)
    monkeypatch.setattr(feeds, "WRITE_S", 0.5)

    async def ask() -> None:
        room = Room()

        async def view():
            return {"filler": "x" * 500_000}

        room.admin.feed = Feed(view)
        async with served(room) as client:
            _, stuck = await asyncio.open_connection("127.0.0.1", room.admin.port, limit=1024)
            stuck.write(b"GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await until(lambda: len(room.admin.feed) == 1)
            async with client.get("/events") as good:
                seen = 0
                async with asyncio.timeout(20):
                    async for line in good.content.iter_any():
                        seen += len(line)
                        if len(room.admin.feed) == 1 and seen > 2_000_000:
                            break
            stuck.close()

    asyncio.run(ask())


def test_open_pages_do_not_hold_up_the_end():
    async def ask() -> None:
        room = Room()
        await room.admin.start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{room.admin.port}") as client:
            stream = await client.get("/events")
            await event(stream)
            async with asyncio.timeout(1.5):  # an open answer would be waited for longer
                await room.admin.stop()
            assert await stream.content.read() is not None  # ended, not cut
            assert len(room.admin.feed) == 0

    asyncio.run(ask())


# ---- top


def test_top_puts_what_is_wrong_first_and_keeps_to_its_terminal():
    room = Room(endpoints=200)
    room.gate.set_up("vllm-150", is_up=False)
    room.offer(230)
    drawn = lines(room.view(), 80, 23)
    assert len(drawn) <= 23
    assert max(map(len, drawn)) <= 80
    assert drawn[2].startswith("vllm-150  DOWN")
    assert any(line.startswith("and 1") and line.endswith(" more") for line in drawn)
    assert any(line.startswith("OUTCOMES  dispatched 199") for line in drawn)


def test_top_and_the_view_say_which_limit_holds_each_endpoint_and_each_request():
    room = Room(endpoints=2)
    room.gate.put_endpoint(EndpointSpec("vllm-1", max_running_requests=9))
    room.offer(5)
    assert [one["held_by"] for one in room.view()["endpoints"]] == ["limit", None]
    room.gate.set_up("vllm-1", is_up=False)
    room.offer(1)
    view = room.view()
    assert [one["held_by"] for one in view["endpoints"]] == ["limit", "down"]
    assert [one.get("held_for_s") for one in view["endpoints"]] == [0.0, 0.0]
    assert [one["held_by"] for one in view["waiting"]] == ["limit"]
    assert set(view["limits"]) >= {"limit", "down", "prompts", "kv"}
    drawn = lines(view, 200, 40)
    assert drawn[1].split()[:4] == ["ENDPOINT", "STATE", "HELD", "BY"]
    assert drawn[2].split()[:5] == ["vllm-0", "up", "limit", "<1", "ms"]
    assert room.admin.snapshot()["endpoints"] == [{**one, "models": one["models"]} for one in view["endpoints"]]
    assert room.admin.snapshot()["waiting"] == view["waiting"]


@pytest.mark.parametrize("width", [60, 80])
def test_on_a_narrow_terminal_top_leaves_columns_out_and_cuts_none(width):
    room = Room(endpoints=3, limit=8)
    room.offer(30)
    drawn = lines(room.view(), width, 24)
    assert not [row for row in drawn if row.endswith("~")]
    head = drawn[1].split()
    assert head[:4] == ["ENDPOINT", "STATE", "HELD", "BY"]
    assert "SENT" in head
    assert any(row.startswith("LONGEST WAITING") for row in drawn)


def test_top_makes_what_clients_sent_harmless():
    evil = "\x1b]0;owned\x07\x1b[2J\r\n\u202e\u200b界e\u0301"
    room = Room()
    room.offer(2, id=evil, tenant=evil, model=evil)
    text = "\n".join(lines(room.view(), 200, 40))
    assert all(one == "\n" or one.isprintable() for one in text)
    assert "?]0;owned??[2J" in text
    assert plain(evil) == "?]0;owned??[2J?????e?"


def test_in_a_log_the_state_is_one_short_line_that_names_what_is_wrong():
    room = Room(endpoints=3, limit=4)
    room.offer(15)
    assert line(room.view()) == "   0s  running 12/12  waiting   3"
    room.gate.set_up("vllm-1", is_up=False)
    assert line(room.view()) == "   0s  running  12/8  waiting   3  2 of 3 endpoints up"
    room.gate.controller._books.policy = replace(room.gate.controller.policy, enable_queue=False)
    assert line(room.view()).startswith("   0s  running  12/8  waiting   3  queue off  2 of 3")


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
        assert await asyncio.to_thread(main, ["why", "id-0", "--admin", admin]) == 3

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
            for seconds in ("0", "601", "x", "-1"):
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


def test_a_compiled_core_says_how_it_can_be_recorded(monkeypatch):
    monkeypatch.setattr("extproc.admin.http.is_compiled", lambda: True)

    async def scenario() -> None:
        async with served(Room()) as client, client.get("/debug/recording") as response:
            assert response.status == 501
            assert "EXTPROC_PURE=1" in await response.text()

    asyncio.run(scenario())
