"""The scraper over real sockets: whatever an endpoint sends is one counted error, and nothing else suffers."""

from __future__ import annotations

import asyncio
import logging

import pytest
import uvloop

from extproc.admission.controller import Controller
from extproc.admission.load import Load
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import EndpointSpec, Policy, Request
from extproc.endpoints.telemetry.connection import Connection
from extproc.endpoints.telemetry.page import MOST_BYTES
from extproc.endpoints.telemetry.scraper import Scraper
from extproc.endpoints.telemetry.target import Target
from extproc.stream.gate import Gate
from tests.e2e.kit.processes import PATIENCE_S, free_port
from tests.unit.pages import GOOD, HOSTILE, Pages, Wire, until


def test_everything_hostile_is_one_counted_error_no_reading_and_dispatch_goes_on():
    async def main() -> None:
        loop = asyncio.get_running_loop()
        gate = Gate(Controller(Policy()), loop)
        async with Pages() as pages, Wire() as wire:
            for name in HOSTILE:
                gate.put_endpoint(EndpointSpec(name, max_running_requests=4))
                port = free_port()
                url = f"http://127.0.0.1:{port}/" if name == "refused" else pages.url(name)
                wire.scraper.put(Target(name, url))
            wire.scraper.put(Target("fine", pages.url("good")))
            dispatched = 0
            deadline = loop.time() + PATIENCE_S
            while (len(wire.errors()) < len(HOSTILE) or not wire.seen) and loop.time() < deadline:
                ticket = Ticket(Request(id="r", arrived=gate.now()))
                gate.offer(ticket)
                assert ticket.state is State.LEASED
                gate.close(ticket)
                dispatched += 1
                await asyncio.sleep(0.005)
            assert dispatched > 5
            assert wire.errors() == {name: {reason: 1} for name, reason in HOSTILE.items()}
            assert [name for name, _ in wire.seen] == ["fine"]
            assert all(wire.scraper.age_s(name) is None for name in HOSTILE)
            assert pages.hits["loop"] == 4  # three redirects of one server are followed
            assert pages.hits["good"] == 1  # the redirect to it was not followed

    asyncio.run(main())


def test_no_more_than_a_mebibyte_and_what_the_sockets_buffer_is_read_of_an_endless_page():
    async def main() -> None:
        async with Pages() as pages, Wire(timeout_s=5.0) as wire:
            wire.scraper.put(Target("line", pages.url("line")))
            await until(wire.errors)
            assert wire.errors() == {"line": {"too_big": 1}}
            assert pages.sent_bytes < MOST_BYTES + 8 * 1024 * 1024

    asyncio.run(main())


def test_an_endpoint_that_serves_other_models_is_read_on_by_their_names():
    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02) as wire:
            pages.page = b'vllm:num_requests_running{model_name="a"} 3\nsglang:num_running_reqs{model_name="b"} 7\n'
            wire.scraper.put(Target("e", pages.url("good"), own=frozenset({"a"})))
            await until(lambda: wire.seen)
            before = asyncio.all_tasks()
            wire.scraper.put(Target("e", pages.url("good"), own=frozenset({"b"})))
            assert asyncio.all_tasks() == before, "its scrapes begin anew"
            await until(lambda: wire.seen[-1][1].running == 7.0)
            assert wire.seen[0][1].running == 3.0

    asyncio.run(main())


def test_a_good_page_becomes_load_again_and_again_over_one_connection_without_cookies():
    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02) as wire:
            wire.scraper.put(Target("a", pages.url("good")))
            await until(lambda: len(wire.seen) >= 3)
            assert wire.seen[0] == ("a", Load(running=3.0, waiting=1.0))
            age_s = wire.scraper.age_s("a")
            assert age_s is not None
            assert 0 <= age_s < PATIENCE_S
            assert wire.errors() == {}
            assert pages.hits["good"] >= 3
            assert not any("cookie" in head.lower() for head in pages.heads)
            assert all("accept-encoding: identity" in head.lower() for head in pages.heads)
            assert len(pages._connections) == 1

    asyncio.run(main())


def test_it_works_on_uvloop_as_well():
    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02) as wire:
            for name in ("good", "endless", "gone", "announced"):
                wire.scraper.put(Target(name, pages.url(name if name != "endless" else "line")))
            await until(lambda: len(wire.seen) >= 3 and len(wire.errors()) == 3)
            errors = {name: set(why) for name, why in wire.errors().items()}
            assert errors == {"endless": {"too_big"}, "gone": {"protocol"}, "announced": {"too_big"}}

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("form", ["crlf", "interim", "chunked", "until_closed"])
def test_a_page_may_come_in_any_form_of_http(form):
    async def main() -> None:
        async with Pages() as pages, Wire() as wire:
            wire.scraper.put(Target("a", pages.url(form)))
            await until(lambda: wire.seen or wire.errors())
            assert wire.seen == [("a", Load(running=3.0, waiting=1.0))]

    asyncio.run(main())


def test_gpu_use_comes_from_its_own_page_and_that_page_failing_leaves_the_rest():
    async def main() -> None:
        async with Pages() as pages, Wire() as wire:
            gpu0 = (("gpu", "0"),)
            wire.scraper.put(Target("both", pages.url("good"), gpu_url=pages.url("gpus"), gpu_labels=gpu0))
            wire.scraper.put(Target("no-gpu", pages.url("good"), gpu_url=pages.url("broken")))
            wire.scraper.put(Target("only-gpu", pages.url("hang"), engine="none", gpu_url=pages.url("gpus")))
            wire.scraper.put(Target("nothing", pages.url("hang"), engine="none"))
            await until(lambda: len(wire.seen) == 3)
            loads = dict(wire.seen)
            assert loads["both"] == Load(running=3.0, waiting=1.0, gpu_usage=0.8)
            assert loads["no-gpu"] == Load(running=3.0, waiting=1.0)
            assert loads["only-gpu"] == Load(gpu_usage=0.5)
            assert wire.errors() == {"no-gpu": {"status": 1}}
            assert "hang" not in pages.hits

    asyncio.run(main())


def test_endpoints_come_change_and_go_while_it_runs():
    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.01) as wire:
            wire.scraper.put(Target("a", pages.url("broken")))
            await until(lambda: wire.errors().get("a"))
            wire.scraper.put(Target("a", pages.url("good")))
            assert wire.scraper.silence("a") == "status", "so it is until its other page was looked at"
            await until(lambda: wire.seen)
            assert wire.scraper.silence("a") is None
            before = pages.hits["broken"]
            wire.scraper.put(Target("a", pages.url("good")))  # unchanged
            wire.scraper.put(Target("b", pages.url("broken")))
            await until(lambda: wire.errors().get("b"))
            wire.scraper.remove("a")
            wire.scraper.remove("never-was-there")
            seen, hits = len(wire.seen), pages.hits["broken"]
            assert hits > before
            await until(lambda: pages.hits["broken"] > hits + 2)
            assert len(wire.seen) == seen
            assert "a" not in wire.errors()
            assert wire.scraper.age_s("a") is None

    asyncio.run(main())


class Nowhere(asyncio.Transport):
    """Takes everything and sends nothing."""

    def write(self, data: bytes) -> None:
        pass


def test_the_deadline_of_a_page_that_came_is_none_of_the_next_one_on_its_connection():
    async def main() -> None:
        loop = asyncio.get_running_loop()
        connection = Connection(loop, lambda _: None)
        connection.connection_made(Nowhere())
        now = loop.time()
        first = connection.ask(b"", 100, now)
        connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")
        second = connection.ask(b"", 100, now + PATIENCE_S)
        await asyncio.wait([loop.create_future()], timeout=0)  # whose timer is due after that of the first
        assert (first.done(), second.done()) == (True, False)

    asyncio.run(main())


def test_an_endpoint_put_again_unchanged_is_not_scraped_out_of_turn():
    async def main() -> None:
        async with Pages() as pages, Wire() as wire:
            for name in ("a", "a", "b"):
                wire.scraper.put(Target(name, pages.url("good")))
                await until(lambda name=name: wire.scraper.age_s(name) is not None)
            assert [name for name, _ in wire.seen] == ["a", "b"]
            wire.scraper.put(Target("a", pages.url("good")))
            wire.scraper.put(Target("c", pages.url("good")))
            await until(lambda: wire.scraper.age_s("c") is not None)
            assert [name for name, _ in wire.seen] == ["a", "b", "c"]

    asyncio.run(main())


def test_an_observer_that_raises_is_counted_and_scraping_goes_on(caplog):
    async def main() -> None:
        loop = asyncio.get_running_loop()
        scraper = Scraper(interval_s=0.01, timeout_s=1.0, stale_after_s=10.0, loop=loop)
        calls = []

        def observe(_name: str, load: Load, _asked_at: float) -> None:
            calls.append(load)
            raise RuntimeError("a bug")

        async with Pages() as pages:
            scraper.put(Target("a", pages.url("good")))
            await scraper.start(observe)
            await until(lambda: len(calls) >= 3)
            await scraper.stop()
        assert next(scraper.errors())[:2] == ("a", "internal")

    asyncio.run(main())
    assert "a bug" in caplog.text


def test_telemetry_that_goes_stale_is_said_once_and_once_more_when_it_is_back(caplog):
    caplog.set_level(logging.WARNING, "extproc.telemetry")

    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.01, stale_after_s=3.0) as wire:
            wire.scraper.put(Target("a", pages.url("good")))
            await until(lambda: wire.seen)
            assert caplog.messages == []
            assert wire.scraper.silence("a") is None
            pages.page = b"<html>"
            await until(lambda: wire.scraper.silence("a") == "no_metrics")
            assert caplog.messages == [], "that it told nothing is known before it is stale"
            await until(lambda: caplog.messages)
            errors = wire.errors()["a"]["no_metrics"]
            await until(lambda: wire.errors()["a"]["no_metrics"] > errors + 3)
            age_s = wire.scraper.age_s("a")
            assert age_s is not None
            assert age_s > 3.0
            assert len(caplog.messages) == 1
            pages.page = GOOD
            await until(lambda: len(caplog.messages) > 1)
            assert wire.scraper.silence("a") is None
            scrapes = len(wire.seen)
            await until(lambda: len(wire.seen) > scrapes + 3)

    asyncio.run(main())
    stale, back = caplog.messages
    assert stale.startswith("telemetry of a is stale: nothing readable for")
    assert "'no_metrics'" in stale
    assert back.startswith("telemetry of a is back after")


def test_an_interval_of_zero_scrapes_nothing_and_a_slow_one_is_warned_about(caplog):
    async def main() -> None:
        async with Pages() as pages:
            async with Wire(interval_s=0.0) as wire:
                wire.scraper.put(Target("a", pages.url("good")))
                await asyncio.sleep(0)
                assert asyncio.all_tasks() == {asyncio.current_task()}
            assert caplog.messages == []
            async with Wire(interval_s=30.0, stale_after_s=10.0):
                pass

    asyncio.run(main())
    slow, stale = caplog.messages
    assert slow.startswith("scrape_interval is 30s")
    assert "telemetry_stale_after (10s)" in stale


def test_a_connection_that_the_server_closed_as_it_was_asked_again_costs_no_scrape():
    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02) as wire:
            pages.closes_old_ones = True
            wire.scraper.put(Target("a", pages.url("good")))
            await until(lambda: len(wire.seen) >= 3)
            assert wire.errors() == {}
            assert len([head for head in pages.heads if "/good" in head]) > pages.hits["good"]

    asyncio.run(main())


def test_an_idle_connection_that_says_something_is_closed_and_what_it_said_is_no_page():
    async def main() -> None:
        forged = GOOD.replace(b"} 3", b"} 9")
        async with Pages() as pages, Wire(interval_s=3.0) as wire:
            pages.forged = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(forged) + forged
            wire.scraper.put(Target("a", pages.url("good")))
            await until(lambda: len(wire.seen) >= 2)
            assert {load.running for _, load in wire.seen} == {3.0}

    asyncio.run(main())


@pytest.mark.parametrize("behind", [b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b"odd"])
def test_a_connection_that_said_more_than_its_page_is_closed_and_none_is_left_behind(behind):
    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.01) as wire:
            pages.behind = behind
            wire.scraper.put(Target("a", pages.url("good")))
            await until(lambda: len(wire.seen) >= 5)
            await until(lambda: len(pages._connections) <= 1)
            assert wire.errors() == {}

    asyncio.run(main())


def test_a_page_is_looked_at_out_of_turn_and_one_at_the_endpoints_own_address_tells_of_connections():
    async def main() -> None:
        told: list[tuple[str, bool]] = []
        async with Pages() as pages, Wire(interval_s=60.0) as wire:
            wire.scraper.is_there = lambda name, is_there: told.append((name, is_there))
            base = f"http://{pages.address}"
            wire.scraper.put(Target("own", pages.url("good"), base=base))
            wire.scraper.put(Target("other", pages.url("good"), base="http://127.0.0.1:1"))
            wire.scraper.put(Target("broken", pages.url("broken"), base=base))
            await until(lambda: len(wire.seen) == 2 and wire.errors())

            def looked() -> bool:
                wire.scraper.look("own")
                wire.scraper.look("nobody")
                return len(wire.seen) == 3

            await until(looked)
            assert wire.seen[-1][0] == "own"
        assert sorted(told) == [("broken", True), ("own", True), ("own", True)]

    asyncio.run(main())


def test_a_page_that_cannot_be_connected_to_is_looked_at_each_second_however_rarely_it_is_read():
    async def main() -> None:
        told: list[bool] = []
        async with Wire(interval_s=60.0) as wire:
            wire.scraper.is_there = lambda _, is_there: told.append(is_there)
            address = f"http://127.0.0.1:{free_port()}"
            wire.scraper.put(Target("a", f"{address}/metrics", base=address))
            await until(lambda: len(told) >= 2)
        assert set(told) == {False}

    asyncio.run(main())
