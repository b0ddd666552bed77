"""The admin port: who may ask, what is shown, and connections that come to nothing."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from extproc import tasks
from extproc.admin import connections, state, walks
from extproc.admin.history import FAILING_STEPS, STEP_S
from extproc.admin.http import Admin
from extproc.admin.state import FileState
from extproc.admission.load import Load
from extproc.admission.tenants import TenantRule, TenantRules
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, Policy, Request
from extproc.commands.top import lines
from tests.e2e.kit.processes import PATIENCE_S
from tests.unit.admin_room import CLASSES, Room, event, served, until

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def test_what_is_no_http_is_answered_and_fills_no_log_and_a_bug_of_ours_is_told(monkeypatch, caplog):
    async def scenario() -> None:
        async with served(room) as client:
            for said in (
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"GET / HTTP/1.1\r\nhost\r\n\r\n",
                b"\x16\x03\x01\x00\x05\r\n\r\n",
            ):
                reader, writer = await asyncio.open_connection("127.0.0.1", room.admin.port)
                writer.write(said)
                assert (await reader.read(12)).startswith(b"HTTP/1.0 400")
                writer.close()
            assert caplog.text == ""
            monkeypatch.setattr(room.admin, "snapshot", None)
            async with client.get("/queues") as answer:
                assert answer.status == 500
            assert "Error handling request" in caplog.text

    room = Room()
    asyncio.run(scenario())


def test_queues_lists_as_many_as_asked_for_up_to_a_bound():
    room = Room()
    room.offer(700)

    async def ask() -> None:
        async with served(room) as client:
            for query, count in (("", state.WAITING_LISTED), ("?limit=0", 0), ("?limit=3", 3), ("?limit=500", 500)):
                async with client.get(f"/queues{query}") as answer:
                    page = await answer.json()
                    assert len(page["running"]) == min(count, 1)
                    assert (len(page["waiting"]), page["waiting_total"]) == (count, 699)
            for wrong in ("501", "-1", "x", "", "٣", "9" * 30, "0" * 9 + "900", "0" * 5000):
                async with client.get("/queues", params={"limit": wrong}) as answer:
                    assert answer.status == 400, wrong
                    assert "limit: must be a number from 0 to 500" in await answer.text()

    asyncio.run(ask())


def test_queues_lists_those_that_run_the_oldest_first_wherever_they_run():
    room = Room(endpoints=2, limit=2)
    tickets = []
    for number in range(4):
        tickets += room.offer(1, id=f"r{number}", tenant="acme")
        room.clock.now += 1
    listed = asyncio.run(room.admin.snapshot(3))["running"]
    assert [row["id"] for row in listed] == [f"r{number}" for number in range(3)]
    assert {row["endpoint"] for row in listed} == {"vllm-0", "vllm-1"}
    assert listed[0] | {"endpoint": ""} == {
        "id": "r0",
        "model": None,
        "class": "default",
        "tenant": "acme",
        "endpoint": "",
        "for_s": 4.0,
        "answered": False,
    }


def test_queues_lists_a_request_that_runs_long_although_it_was_adopted_last():
    room = Room(endpoints=2, limit=300)
    room.clock.now = 1000.0
    room.offer(500)
    for age_s in (5.0, 600.0, 30.0):
        ticket = Ticket(Request(f"{age_s:.0f}", room.clock.now - age_s))
        room.gate.controller.adopt(ticket, "vllm-0", room.clock.now, held_s=age_s)
    room.clock.now += 1.0
    listed = asyncio.run(room.admin.snapshot(200))["running"]
    assert [row["id"] for row in listed[:3]] == ["600", "30", "5"]
    assert len(listed) == 200
    assert {row["for_s"] for row in listed[3:]} == {1.0}


def test_of_a_line_that_is_too_long_only_the_first_are_looked_at_and_the_view_says_so(monkeypatch):
    monkeypatch.setattr(walks, "MOST_SCANNED", 1000)
    room = Room()
    room.offer(walks.MOST_SCANNED + walks.TURN + 1, tenant="t")  # the first runs
    view = room.view()
    assert (view["waiting_total"], view["scanned_all"]) == (1500, False)
    assert [row["waiting"] for row in view["tenants"]] == [1000]


def test_what_a_client_sent_is_shortened():
    room = Room()
    room.offer(2, id="i" * 60_000, model="m" * 60_000, tenant="t" * 60_000)
    (row,) = room.queues()["waiting"]
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
    endpoints["vllm-2"].health._look()
    endpoints["vllm-3"].health.on_trial = True
    room.gate.remove_endpoints(["vllm-4"])
    room.gate.set_up("vllm-5", is_up=None)
    room.gate.observe("vllm-6", Load(asleep=True))
    rows = {row["name"]: row for row in room.queues()["endpoints"]}
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
    for shown in (room.view(), room.queues()):
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
                        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
            assert len(room.admin.connections) == 1
            for one in (silent[1], half[1], writer):
                one.close()

    asyncio.run(wait())


def test_a_bug_in_one_sample_is_told_and_does_not_end_the_sampling(monkeypatch, caplog):
    monkeypatch.setattr(tasks, "RESTART_S", 0.0)
    room = Room()
    kept, taken = tasks.Tasks(), []
    room.admin = Admin("127.0.0.1:0", room.gate, room.metrics, tasks=kept)

    samples = room.admin.viewer.samples

    def fail_once() -> Iterator[None]:
        taken.append(1)
        if len(taken) == 1:
            raise ZeroDivisionError
        return samples()

    monkeypatch.setattr(room.admin.viewer, "samples", fail_once)

    async def main() -> None:
        async with served(room):
            await until(lambda: len(taken) == 2)

    asyncio.run(main())
    assert kept.restarts == {"admin history": 1}
    assert "admin history failed and begins again" in caplog.text


def test_the_view_top_and_queues_name_the_few_tenants_with_most_in_flight_or_refused() -> None:
    room = Room(limit=2)
    rules = TenantRules({"acme": TenantRule(max_in_flight=9)}, TenantRule(max_in_flight=12), apart=False)
    room.gate.set_policy(replace(room.gate.controller.policy, tenants=rules))
    assert room.view()["tenants"] == []
    for tenant, count in {"acme": 2, "evil": 14, "a": 1, "b": 1, "c": 1, "d": 1}.items():
        room.offer(count, id=f"of-{tenant}", tenant=tenant)
    evil, acme, *rest = room.view()["tenants"]
    assert evil == {
        "tenant": "evil",
        "in_flight": 12,
        "waiting": 12,
        "running": 0,
        "max_in_flight": 12,
        "shared": True,
        "refused": 2,
    }
    assert acme == {
        "tenant": "acme",
        "in_flight": 2,
        "waiting": 0,
        "running": 2,
        "max_in_flight": 9,
        "shared": False,
        "refused": 0,
    }
    assert len(rest) == 3, "five are told"
    assert room.queues()["tenants"] == room.view()["tenants"]
    (told,) = (line for line in lines(room.view(), 200, 60) if line.startswith("TENANTS"))
    first = "TENANTS   evil 12 of 12 shared (12 wait, 0 run, 2 refused)  acme 2 of 9 (0 wait, 2 run)"
    assert told.startswith(first)


def test_an_endpoint_that_serves_some_and_fails_others_is_told_with_how_many_and_how_for_two_minutes() -> None:
    """Found on call: an engine that answered every third request with 500 stood as `up` beside the good ones."""
    room = Room(endpoints=2)
    counts = {Answer.FAILED: 0, Answer.ERROR: 0, Answer.REFUSED: 9}
    room.metrics.bad_answers = lambda: {"vllm-0": counts, "vllm-1": {Answer.FAILED: 1, Answer.ERROR: 0}}
    counts[Answer.ERROR], counts[Answer.REFUSED] = 1, 99
    assert not any("failed_lately" in one for one in room.view()["endpoints"]), "one alone, and clients' mistakes"
    counts[Answer.ERROR], counts[Answer.FAILED] = 15, 2
    first, second = room.view()["endpoints"]
    assert (first["failed_lately"], "failed_lately" in second) == ({"failed": 2, "error": 15}, False)
    assert room.queues()["endpoints"][0]["failed_lately"] == first["failed_lately"]
    (told,) = (line for line in lines(room.view(), 200, 60) if line.startswith("vllm-0"))
    assert "up, FAILED 15 5xx + 2 unanswered" in told
    for _ in range(FAILING_STEPS):
        room.clock.now += STEP_S
        room.admin.viewer.sample()
    assert not any("failed_lately" in one for one in room.view()["endpoints"]), "what was is forgotten"


def test_counts_of_failed_requests_that_begin_anew_are_not_below_none() -> None:
    room = Room()
    counts = {Answer.FAILED: 40, Answer.ERROR: 0}
    room.metrics.bad_answers = lambda: {"vllm-0": counts}
    room.admin.viewer.sample()
    counts[Answer.FAILED] = 3  # it was taken out, and put back
    assert room.view()["endpoints"][0]["failed_lately"] == {"failed": 3}


def test_where_no_request_names_a_tenant_none_is_told() -> None:
    room = Room(limit=2)
    room.offer(4)
    assert room.view()["tenants"] == []
    assert not any(line.startswith("TENANTS") for line in lines(room.view(), 200, 60))
