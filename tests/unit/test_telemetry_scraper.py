"""The scraper over real sockets: whatever an endpoint sends is one counted error, and nothing else suffers."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable

import pytest
import trustme
import uvloop

from extproc.admission.controller import Controller
from extproc.admission.load import Load
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import EndpointSpec, Policy, Request
from extproc.app import App
from extproc.config import Config, parse_config
from extproc.endpoints.access import Access
from extproc.endpoints.telemetry import facts
from extproc.endpoints.telemetry.engines import ENGINES
from extproc.endpoints.telemetry.page import MOST_BYTES
from extproc.endpoints.telemetry.scraper import Scraper
from extproc.endpoints.telemetry.target import Target
from extproc.errors import ConfigError
from extproc.stream.gate import Gate

GOOD = b'vllm:num_requests_running{engine="0"} 3\nvllm:num_requests_waiting{engine="0"} 1\n'
GPUS = b'DCGM_FI_DEV_GPU_UTIL{gpu="0"} 80\nDCGM_FI_DEV_GPU_UTIL{gpu="1"} 20\n'
PATIENCE_S = 5.0


class Pages:
    """A server that answers each path in its own bad way, and counts what it did."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.hits: dict[str, int] = {}
        self.heads: list[str] = []
        self.sent_bytes = 0
        self.page = GOOD
        self.token = ""
        self.opened = 0
        self.closes_old_ones = False
        self.forged = b""  # said behind each good page, when nobody asks
        self.behind = b""  # said with each good page, in one piece
        self.models: bytes | None = b'{"data": [{"max_model_len": 4096}]}'  # None: it hangs
        self.address = ""
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Pages:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def url(self, path: str) -> str:
        return f"http://{self.address}/{path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.opened += 1
        is_old = False
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                path = head.split(" ")[1].removeprefix("/")
                if is_old and self.closes_old_ones:
                    break
                self.hits[path] = self.hits.get(path, 0) + 1
                answer: Callable[[asyncio.StreamWriter], Awaitable[None]] = getattr(self, f"_{path.replace('/', '_')}")
                await answer(writer)
                if path != "good":
                    break
                is_old = True
                if self.forged:
                    await asyncio.sleep(0.005)  # what is tested: it comes when nobody waits
                    writer.write(self.forged)
        writer.close()
        self._connections.discard(task)

    async def _send(self, writer: asyncio.StreamWriter, body: bytes, *lines: str, status: str = "200 OK") -> None:
        fields = "".join(f"{line}\r\n" for line in (*lines, f"content-length: {len(body)}"))
        await self._write(writer, f"HTTP/1.1 {status}\r\n{fields}\r\n".encode() + body)

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await writer.drain()
        self.sent_bytes += len(data)

    async def _endless(self, writer: asyncio.StreamWriter, piece: bytes, *, pause_s: float = 0.0) -> None:
        """Send without a length, until the peer goes away."""
        await self._write(writer, b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n")
        while not writer.is_closing():
            await self._write(writer, piece)
            await asyncio.sleep(pause_s)

    async def _good(self, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 200 OK\r\nset-cookie: a=b\r\ncontent-length: {len(self.page)}\r\n\r\n"
        await self._write(writer, head.encode() + self.page + self.behind)

    async def _gpus(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, GPUS)

    async def _v1_models(self, writer: asyncio.StreamWriter) -> None:
        if self.models is None:
            await asyncio.sleep(60)
        else:
            await self._send(writer, self.models)

    async def _crlf(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, GOOD.replace(b"\n", b"\r\n"))

    async def _interim(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 103 Early Hints\r\nlocation: /x\r\ncontent-length: 9\r\n\r\n")
        await self._send(writer, GOOD)

    async def _chunked(self, writer: asyncio.StreamWriter) -> None:
        pieces = b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in GOOD.splitlines(keepends=True))
        await self._write(writer, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n")

    async def _until_closed(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.0 200 OK\r\n\r\n" + GOOD)

    async def _two_lengths(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, GOOD, "content-length: 3")

    async def _smuggled(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, GOOD, "transfer-encoding: chunked")

    async def _upgrade(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n")

    async def _many_interim(self, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            await self._write(writer, b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n" * 100)

    async def _head(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 200 OK\r\n")
        while not writer.is_closing():
            await self._write(writer, b"x: " + b"y" * 60_000 + b"\r\n")

    async def _chunk_lines(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            await self._write(writer, b"1\r\nv\r\n" * 1000)

    async def _hang(self, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def _drip(self, writer: asyncio.StreamWriter) -> None:
        await self._endless(writer, b"v", pause_s=0.01)

    async def _drip_head(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 200 OK\r\n")
        while not writer.is_closing():
            await self._write(writer, b"x: y\r\n")
            await asyncio.sleep(0.02)

    async def _loop(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, b"", "location: /loop", status="302 Found")

    async def _away(self, writer: asyncio.StreamWriter) -> None:
        there = self.address.replace("127.0.0.1", "localhost")
        await self._send(writer, b"", f"location: http://{there}/good", status="307 Temporary Redirect")

    async def _moved(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, b"", "location: /good", status="307 Temporary Redirect")

    async def _locked(self, writer: asyncio.StreamWriter) -> None:
        known = {f"authorization: bearer {self.token}", "x-key: s3cret"}
        if known <= {line.lower() for line in self.heads[-1].split("\r\n")}:
            await self._send(writer, self.page)
        else:
            await self._send(writer, b"", status="401 Unauthorized")

    async def _bomb(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, gzip.compress(bytes(5 * 1024 * 1024)), "content-encoding: gzip")

    async def _line(self, writer: asyncio.StreamWriter) -> None:
        await self._endless(writer, b"x" * 65_536)

    async def _announced(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 200 OK\r\ncontent-length: 20000000\r\n\r\n")
        await asyncio.sleep(60)

    async def _series(self, writer: asyncio.StreamWriter) -> None:
        await self._endless(writer, b"".join(b'vllm:num_requests_running{r="%d"} 1\n' % n for n in range(2000)))

    async def _many(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, b"".join(b'vllm:num_requests_running{r="%d"} 1\n' % n for n in range(2000)))

    async def _html(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, b"<!doctype html><title>Sign in</title>", "content-type: text/html")

    async def _binary(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, bytes(range(256)) * 100)

    async def _malformed(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, b"vllm:num_requests_running{ 3\n")

    async def _broken(self, writer: asyncio.StreamWriter) -> None:
        await self._send(writer, b"oops", status="500 Internal Server Error")

    async def _cut(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + GOOD)

    async def _noise(self, writer: asyncio.StreamWriter) -> None:
        await self._write(writer, b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

    async def _gone(self, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()


HOSTILE = {
    "hang": "timeout",
    "drip": "timeout",
    "drip_head": "timeout",
    "loop": "redirect",
    "away": "redirect",
    "bomb": "encoding",
    "line": "too_big",
    "announced": "too_big",
    "series": "too_big",
    "many": "too_many_series",
    "html": "no_metrics",
    "binary": "no_metrics",
    "malformed": "malformed",
    "broken": "status",
    "cut": "protocol",
    "noise": "protocol",
    "gone": "protocol",
    "two_lengths": "protocol",
    "smuggled": "protocol",
    "upgrade": "protocol",
    "many_interim": "protocol",
    "head": "protocol",
    "chunk_lines": "too_big",
    "refused": "connect",
}


class Wire:
    """A scraper under test, and what it told."""

    def __init__(self, *, interval_s: float = 60.0, timeout_s: float = 1.0, stale_after_s: float = 100.0) -> None:
        loop = asyncio.get_running_loop()
        self.scraper = Scraper(interval_s=interval_s, timeout_s=timeout_s, stale_after_s=stale_after_s, loop=loop)
        self.seen: list[tuple[str, Load]] = []

    def observe(self, name: str, load: Load) -> None:
        self.seen.append((name, load))

    async def __aenter__(self) -> Wire:
        await self.scraper.start(self.observe)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.scraper.stop()

    def errors(self) -> dict[str, dict[str, int]]:
        found: dict[str, dict[str, int]] = {}
        for name, reason, count in self.scraper.errors():
            found.setdefault(name, {})[reason] = count
        return found


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - conditions of all kinds, none with an event
            await asyncio.sleep(0.002)


def refusing_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_everything_hostile_is_one_counted_error_no_reading_and_dispatch_goes_on():
    async def main() -> None:
        loop = asyncio.get_running_loop()
        gate = Gate(Controller(Policy()), loop)
        async with Pages() as pages, Wire() as wire:
            for name in HOSTILE:
                gate.put_endpoint(EndpointSpec(name, max_running_requests=4))
                port = refusing_port()
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


def test_a_good_page_becomes_load_again_and_again_over_one_connection_without_cookies():
    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02) as wire:
            wire.scraper.put(Target("a", pages.url("good")))
            await until(lambda: len(wire.seen) >= 3)
            assert wire.seen[0] == ("a", Load(running=3.0, waiting=1.0))
            age_s = wire.scraper.age_s("a")
            assert age_s is not None
            assert 0 <= age_s < 1
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
            await until(lambda: wire.seen)
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

        def observe(name: str, load: Load) -> None:
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
        async with Pages() as pages, Wire(interval_s=0.01, stale_after_s=0.1) as wire:
            wire.scraper.put(Target("a", pages.url("good")))
            await until(lambda: wire.seen)
            assert caplog.messages == []
            pages.page = b"<html>"
            await until(lambda: caplog.messages)
            errors = wire.errors()["a"]["no_metrics"]
            await until(lambda: wire.errors()["a"]["no_metrics"] > errors + 3)
            age_s = wire.scraper.age_s("a")
            assert age_s is not None
            assert age_s > 0.1
            assert len(caplog.messages) == 1
            pages.page = GOOD
            await until(lambda: len(caplog.messages) > 1)
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


# ---- the configuration


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "file", {})
    return caught.value.problems


def test_the_configuration_says_what_is_scraped_and_how_load_is_judged():
    config = parse_config(
        """
        scrape_interval: 250ms
        telemetry_stale_after: 4s
        max_gpu_perc: 90
        gpu_utilization_perc: 97
        endpoints:
        - {name: a, address: '10.0.0.1:8000', models: [llama]}
        - {name: b, address: '[::1]:8000', engine: trtllm}
        - {name: c, address: 'c:1', engine: triton, metrics_url: 'http://c:8002/metrics',
           gpu_metrics_url: 'http://node:9400/metrics', gpu_metrics_labels: {gpu: '0', Hostname: n}}
        """,
        "file",
        {"EXTPROC_SCRAPE_TIMEOUT": "100ms"},
    )
    assert (config.scrape_interval, config.scrape_timeout) == (0.25, 0.1)
    policy = config.policy()
    assert (policy.max_kv_usage, policy.max_gpu_usage, policy.stale_after_s) == (0.9, 0.97, 4.0)
    assert config.scrape_targets() == [
        Target(
            "a",
            "http://10.0.0.1:8000/metrics",
            own=frozenset({"10.0.0.1:8000", "llama"}),
            base="http://10.0.0.1:8000",
        ),
        Target(
            "b",
            "http://[::1]:8000/prometheus/metrics",
            "trtllm",
            own=frozenset({"[::1]:8000"}),
            base="http://[::1]:8000",
        ),
        Target(
            "c",
            "http://c:8002/metrics",
            "triton",
            "http://node:9400/metrics",
            (("Hostname", "n"), ("gpu", "0")),
            own=frozenset({"c:1"}),
            base="http://c:1",
        ),
    ]


def test_the_defaults_are_those_of_the_contract():
    config = Config()
    assert (config.scrape_interval, config.scrape_timeout, config.telemetry_stale_after) == (1.0, 0.5, 10.0)
    assert (config.policy().max_kv_usage, config.policy().max_gpu_usage) == (0.95, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scrape_timeout: 0s", "scrape_timeout: must be longer than 0s"),
        ("telemetry_stale_after: 0", "telemetry_stale_after: must be longer than 0s"),
        ("scrape_interval: -1s", "scrape_interval: must be a duration"),
        ("max_gpu_perc: 0", "max_gpu_perc: must be 1 or more"),
        ("max_gpu_perc: 101", "max_gpu_perc: must be 100 or less"),
        ("gpu_utilization_perc: 90", "gpu_utilization_perc: needs gpu_metrics_url"),
        ("endpoints: [{name: a, address: 'h:1', engine: vlm}]", "endpoints[0].engine: must be 'auto', 'vllm'"),
        ("endpoints: [{name: a, address: 'h:1', metrics_url: h}]", "endpoints[0].metrics_url: must be a URL"),
        (
            "endpoints: [{name: a, address: 'h:1', gpu_metrics_labels: {gpu: 0}}]",
            "gpu_metrics_labels.gpu: must be text",
        ),
    ],
)
def test_a_wrong_key_is_named(text, words):
    (problem,) = problems(text)
    assert words in problem


@pytest.mark.parametrize("name", ["auto", "none", *(engine.name for engine in ENGINES)])
def test_every_row_of_the_table_is_a_word_of_the_configuration(name):
    text = f"endpoints: [{{name: a, address: 'h:1', engine: {name}}}]"
    assert parse_config(text, "file", {}).endpoints[0].engine == name


# ---- what people see


async def shown() -> tuple[list[dict[str, object]], dict[tuple[str, ...], float]]:
    """Run a sidecar with a good endpoint and a bad one; return its /queues rows and its /metrics samples."""
    async with Pages() as pages:
        endpoints = [
            {"name": name, "address": pages.address, "metrics_url": pages.url(path)}
            for name, path in (("a", "good"), ("b", "broken"))
        ]
        here = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "drain_timeout": 0.0}
        app = App(Config.model_validate({**here, "endpoints": endpoints}), asyncio.get_running_loop())
        await app.start()
        try:
            await until(lambda: app.scraper.age_s("a") is not None and list(app.scraper.errors()))
            samples = {
                (sample.name, *sample.labels.values()): sample.value
                for family in app.metrics.collect()
                for sample in family.samples
            }
            rows = app.admin.snapshot()["endpoints"]
            assert isinstance(rows, list)
            return rows, samples
        finally:
            await app.drain(asyncio.Event())


def test_queues_and_metrics_show_load_and_age_and_leave_out_what_is_unknown():
    (first, second), samples = asyncio.run(shown())
    assert first["load"] == {"running": 3.0, "waiting": 1.0, "context_tokens": 4096.0}
    assert 0 <= first["telemetry_age_s"] < PATIENCE_S
    assert second["load"] == {}
    assert "telemetry_age_s" not in second
    assert samples["extproc_endpoint_load", "a", "running"] == 3.0
    assert samples["extproc_endpoint_load", "a", "waiting"] == 1.0
    assert ("extproc_endpoint_load", "a", "kv_usage") not in samples
    assert samples["extproc_telemetry_age_seconds", "a"] < PATIENCE_S
    assert ("extproc_telemetry_age_seconds", "b") not in samples
    assert samples["extproc_scrape_errors_total", "b", "status"] >= 1


# ---- what an engine says of itself


def test_an_engine_is_asked_for_its_limits_before_its_first_load_is_told_and_then_once_a_minute():
    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02) as wire:
            wire.scraper.put(Target("a", pages.url("good"), base=f"http://{pages.address}"))
            await until(lambda: len(wire.seen) >= 5)
        assert all(load.context_tokens == 4096 for _, load in wire.seen)
        assert pages.hits["v1/models"] == 1

    asyncio.run(main())


def test_an_engine_that_does_not_say_its_limits_is_scraped_all_the_same():
    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02, timeout_s=0.2) as wire:
            pages.models = None
            wire.scraper.put(Target("a", pages.url("good"), base=f"http://{pages.address}"))
            await until(lambda: len(wire.seen) >= 3)
            assert wire.errors() == {}
        assert all((load.running, load.context_tokens) == (3.0, None) for _, load in wire.seen)

    asyncio.run(main())


def test_limits_that_cant_be_had_now_stay_and_those_that_are_gone_go(monkeypatch):
    monkeypatch.setattr(facts, "EVERY_S", 0.0)

    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02, timeout_s=0.1) as wire:
            wire.scraper.put(Target("a", pages.url("good"), base=f"http://{pages.address}"))
            await until(lambda: pages.hits.get("v1/models", 0) >= 2)
            pages.models = b'{"data": [{"max_model_len": 8192}]}'
            await until(lambda: wire.seen[-1][1].context_tokens == 8192)
            pages.models, asked, seen = None, pages.hits["v1/models"], len(wire.seen)
            await until(lambda: pages.hits["v1/models"] >= asked + 3 and len(wire.seen) >= seen + 3)
            assert wire.seen[-1][1].context_tokens == 8192
            pages.models = b'{"data": []}'
            await until(lambda: wire.seen[-1][1].context_tokens is None)

    asyncio.run(main())


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
        async with Pages() as pages, Wire(interval_s=0.3) as wire:
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


# ---- pages behind a lock


def server_tls(ca: trustme.CA, name: str = "127.0.0.1") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name).configure_cert(context)
    return context


def test_a_page_behind_a_private_ca_is_read_by_who_was_told_that_ca_and_by_nobody_else(tmp_path):
    ca, other = trustme.CA(), trustme.CA()
    right, wrong = tmp_path / "right.pem", tmp_path / "wrong.pem"
    ca.cert_pem.write_to_path(str(right))
    other.cert_pem.write_to_path(str(wrong))

    async def main() -> None:
        async with (
            Pages(server_tls(ca)) as pages,
            Pages(server_tls(ca, "elsewhere.test")) as misnamed,
            Wire(interval_s=0.03) as wire,
        ):
            for name, page, file in (
                ("fine", pages, right),
                ("stranger", pages, wrong),
                ("system", pages, None),
                ("misnamed", misnamed, right),
            ):
                access = Access((), None, None if file is None else str(file))
                wire.scraper.put(Target(name, f"https://{page.address}/good", access=access))
            await until(lambda: len(wire.errors()) == 3 and len(wire.seen) >= 2)
            assert {name: set(why) for name, why in wire.errors().items()} == {
                "stranger": {"connect"},
                "system": {"connect"},
                "misnamed": {"connect"},
            }
            assert {name for name, _ in wire.seen} == {"fine"}
            assert misnamed.heads == []  # no word, so no secret, before the name was right
            wrong.with_suffix(".new").write_bytes(right.read_bytes())
            wrong.with_suffix(".new").replace(wrong)
            await until(lambda: "stranger" in {name for name, _ in wire.seen})  # a CA that changed is taken up

    asyncio.run(main())


def test_a_page_behind_headers_and_a_token_is_read_and_a_token_that_changed_is_taken_up(tmp_path):
    token = tmp_path / "token"
    token.write_text("first\n")

    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02) as wire:
            pages.token = "first"  # noqa: S105
            access = Access((("x-key", "s3cret"),), str(token))
            wire.scraper.put(Target("a", pages.url("locked"), access=access))
            await until(lambda: len(wire.seen) >= 2)
            assert wire.errors() == {}
            pages.token = "second"  # noqa: S105
            await until(lambda: wire.errors() == {"a": {"status": wire.errors().get("a", {}).get("status", 0)}})
            token.with_name("new").write_text("second")
            token.with_name("new").replace(token)
            seen = len(wire.seen)
            await until(lambda: len(wire.seen) >= seen + 2)

    asyncio.run(main())


def test_a_token_that_cant_be_read_is_an_error_of_its_own_and_a_fifo_there_holds_nothing_up(tmp_path):
    os.mkfifo(tmp_path / "fifo")

    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02) as wire:
            for name in ("missing", "fifo"):
                wire.scraper.put(Target(name, pages.url("locked"), access=Access((), str(tmp_path / name))))
            wire.scraper.put(Target("fine", pages.url("good")))
            await until(lambda: len(wire.errors()) == 2 and len(wire.seen) >= 2)
            assert {name: set(reasons) for name, reasons in wire.errors().items()} == {
                "missing": {"credentials"},
                "fifo": {"credentials"},
            }
            assert "locked" not in pages.hits

    asyncio.run(main())


def test_a_redirect_on_the_same_server_is_followed_and_no_secret_goes_to_another(tmp_path):
    async def main() -> None:
        async with Pages() as pages, Wire() as wire:
            access = Access((("x-key", "s3cret"),))
            wire.scraper.put(Target("moved", pages.url("moved"), access=access))
            await until(lambda: wire.seen)
            assert wire.seen[0][1].running == 3.0
            wire.scraper.put(Target("away", pages.url("away"), access=access))
            await until(wire.errors)
            assert wire.errors() == {"away": {"redirect": 1}}
            assert pages.hits["good"] == 1
            elsewhere = f"http://{pages.address.replace('127.0.0.1', 'localhost')}"
            wire.scraper.put(Target("asked", pages.url("good"), base=elsewhere, access=access))
            await until(lambda: "v1/models" in pages.hits)
            assert "x-key" not in next(head for head in pages.heads if "/v1/models" in head).lower()

    asyncio.run(main())


SECRETS = """
scrape_interval: 1s
health_check: {headers: {x-probe: hush-probe}}
endpoints:
- {name: a, address: '10.0.0.1:8000', metrics_headers: {X-Key: hush-key}, metrics_ca_file: /ca.pem}
"""


def test_secrets_in_the_configuration_are_in_no_text_of_it_and_in_no_error():
    config = parse_config(SECRETS, "file", {})
    (target,) = config.scrape_targets()
    assert target.access == Access((("x-key", "hush-key"),), None, "/ca.pem")
    assert target.url == "https://10.0.0.1:8000/metrics"
    assert config.health_check is not None
    assert config.health_check.access().headers == (("x-probe", "hush-probe"),)
    assert "hush" not in repr(config) + str(config) + repr(target) + config.model_dump_json()
    for wrong in ("{X-Key: [hush]}", "{host: hush}", "hush", "{X-Key: 'hush\u00e9'}", "{'hush key\u00e9': a}"):
        with pytest.raises(ConfigError) as caught:
            parse_config(SECRETS.replace("{X-Key: hush-key}", wrong), "file", {})
        assert "endpoints[0].metrics_headers" in str(caught.value)
        assert "hush" not in str(caught.value) or "hush key" in str(caught.value)  # a name is no secret
