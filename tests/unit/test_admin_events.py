"""The live page's stream: history and percentiles, one view a tick for all, and subscribers that are bounded."""

from __future__ import annotations

import asyncio

import aiohttp

from extproc.admin import feed as feeds
from extproc.admin import http
from extproc.admin.feed import MOST_SUBSCRIBERS, Feed
from extproc.admin.history import SAMPLES, STEP_S
from extproc.admission.outcome import Outcome
from extproc.admission.values import Answer
from extproc.commands.top import lines
from extproc.observe.waits import MOST, Waits, percentile
from extproc.turns import Turns
from tests.e2e.kit.processes import PATIENCE_S
from tests.unit.admin_room import Room, event, served, until

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


def test_the_view_tells_for_how_long_no_request_has_come():
    room = Room()

    def quiet_after(seconds: float) -> float | None:
        room.clock.now += seconds
        room.admin.viewer.sample()
        return room.view()["quiet_s"]

    assert quiet_after(STEP_S) is None
    ticket, *waits = room.offer(2)
    assert quiet_after(0.0) == 0
    assert quiet_after(100.0) == 0, "somebody waits"
    room.gate.close(ticket, Answer.OK)
    quiet_after(STEP_S)
    assert quiet_after(14.0) == 14.0
    room.gate.close(waits[0], Answer.OK)
    assert quiet_after(6.0) == 20.0, "an answer that ends is no request"
    room.offer()
    assert room.view()["quiet_s"] == 0.0


def test_every_way_to_leave_the_queue_has_words_for_people_and_the_page_and_top_show_it():
    room = Room()
    for outcome in Outcome:
        room.metrics.outcomes[outcome, "default"] = 1
    view = room.view()
    assert {one["outcome"] for one in view["outcomes"]} == {outcome.value for outcome in Outcome}
    shown = "\n".join(lines(view))
    assert [outcome.value for outcome in Outcome if f"{outcome.value} 1 (" not in shown] == []


# ---- events


def test_a_view_is_made_once_a_tick_for_all_and_never_while_nobody_looks(monkeypatch):
    monkeypatch.setattr(feeds, "TICK_S", 0.2)

    async def ask() -> None:
        room = Room()
        made = 0

        async def view():
            nonlocal made
            made += 1
            return {"number": made}

        room.admin.feed = Feed(view, Turns())
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
    monkeypatch.setattr(feeds, "WRITE_S", 3.0)

    async def ask() -> None:
        room = Room()

        async def view():
            return {"filler": "x" * 500_000}

        room.admin.feed = Feed(view, Turns())
        async with served(room) as client:
            _, stuck = await asyncio.open_connection("127.0.0.1", room.admin.port, limit=1024)
            stuck.write(b"GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await until(lambda: len(room.admin.feed) == 1)
            async with client.get("/events") as good:
                seen = 0
                async with asyncio.timeout(2 * PATIENCE_S):
                    async for line in good.content.iter_any():
                        seen += len(line)
                        if len(room.admin.feed) == 1 and seen > 2_000_000:
                            break
                    else:
                        raise AssertionError("who reads was dropped")
            stuck.close()

    asyncio.run(ask())


def test_open_pages_do_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(http, "STOP_S", 60.0)

    async def ask() -> None:
        room = Room()
        await room.admin.start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{room.admin.port}") as client:
            stream = await client.get("/events")
            await event(stream)
            async with asyncio.timeout(20):  # an open answer would be waited for longer
                await room.admin.stop()
            assert await stream.content.read() is not None  # ended, not cut
            assert len(room.admin.feed) == 0

    asyncio.run(ask())
