"""What telemetry costs: `python -m bench.scrape parse` and `... scrape [--endpoints 200] [--seconds 10]`.

`parse` times readers on a 314-line page like vLLM's, and the worst pages' longest step. `scrape` runs the scraper with
the core behind it, against real HTTP servers in another process, and prints CPU of this process and loop delay.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import itertools
import multiprocessing
import statistics
import time
import timeit
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from extproc.admission.controller import Controller
from extproc.admission.values import EndpointSpec, Policy
from extproc.endpoints.telemetry.engines import ENGINES, engines_for
from extproc.endpoints.telemetry.page import MOST_BYTES, Reader, read_page
from extproc.endpoints.telemetry.scraper import Scraper
from extproc.endpoints.telemetry.target import Target
from extproc.garbage import Garbage
from extproc.stream.gate import Gate

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from extproc.admission.load import Load

LINES = 314
"""Counted in the page of a live vLLM 0.32."""
BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)


def vllm_page(served: int = 0) -> bytes:
    """Make a page like vLLM's: gauges, counters, a long info line, and histograms for the rest.

    `served`: requests by which its numbers have gone on.
    """
    common = 'engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"'
    lines: list[str] = []

    def add(name: str, kind: str, value: float, labels: str = common) -> None:
        lines.extend((f"# HELP {name} What {name} means.", f"# TYPE {name} {kind}", f"{name}{{{labels}}} {value}"))

    for name, value in (("num_requests_running", 12.0), ("num_requests_waiting", 3.0), ("kv_cache_usage_perc", 0.43)):
        add(f"vllm:{name}", "gauge", value)
    for name in ("prompt_tokens", "generation_tokens", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits"):
        add(f"vllm:{name}_total", "counter", 95_000.0 + 1_000 * served)
        add(f"vllm:{name}_created", "gauge", 1.784e9)
    sizes = 'block_size="16",num_gpu_blocks="27000",kv_cache_size_tokens="432000"'
    rest = ",".join(f'setting_{number}="None"' for number in range(20))
    add("vllm:cache_config_info", "gauge", 1.0, f"{common},{sizes},{rest}")
    number = 0
    while len(lines) < LINES:
        name, number = f"vllm:histogram_{number}_seconds", number + 1
        lines.extend((f"# HELP {name} Histogram.", f"# TYPE {name} histogram"))
        lines.extend(f'{name}_bucket{{{common},le="{bound}"}} {95.0 + served}' for bound in BUCKETS)
        lines.extend(f"{name}_{part}{{{common}}} {95.0 + served}" for part in ("count", "sum"))
    return ("\n".join(lines[:LINES]) + "\n").encode()


def measure_parse() -> str:
    """Time the readers on a common page, and the longest step on the worst ones."""
    page = vllm_page()
    text = page.decode()
    names = tuple(name for engine in engines_for("vllm") for name in engine.metrics())
    wanted = "\n".join(line for line in text.split("\n") if line.startswith(names))

    def per_call_us(work: object, calls: int) -> float:
        assert callable(work)
        return min(timeit.repeat(work, number=calls, repeat=5)) / calls * 1e6

    reader = Reader(ENGINES)
    out = [f"page: {len(page)} bytes, {LINES} lines"]
    for name, work, calls in (
        ("prometheus_client, whole page", lambda: list(text_string_to_metric_families(text)), 20),
        ("prometheus_client, wanted lines", lambda: list(text_string_to_metric_families(wanted)), 200),
        ("read_page, engine vllm", lambda: read_page(page, engines_for("vllm")), 200),
        ("read_page, engine auto", lambda: read_page(page, ENGINES), 200),
        ("the same endpoint's next page, engine auto", lambda: next(reader.read(page), None), 200),
    ):
        out.append(f"{name}: {per_call_us(work, calls):.0f} us")
    labels = ",".join(f'a{number}=""' for number in range(1600))
    worst = {
        "1 MiB of newlines": b"\n" * MOST_BYTES,
        "1 MiB of almost-names": (b"vllm:num_requests_runnin\n" * 50_000)[:MOST_BYTES],
        "14,400 labels": "".join(
            f'vllm:cache_config_info{{e="{n}",block_size="1",num_gpu_blocks="1",{labels}}} 1\n' for n in range(9)
        ).encode(),
        "1,024 series": b"".join(b'vllm:num_requests_running{e="%d"} 1\n' % n for n in range(1024)),
    }
    for name, body in worst.items():
        steps = [_steps_ms(body) for _ in range(5)]
        out.append(f"{name}: longest step {min(map(max, steps)):.1f} ms, all {min(map(sum, steps)):.1f} ms")
    return "\n".join(out)


def _steps_ms(body: bytes) -> list[float]:
    steps, took = Reader(ENGINES).read(body), []
    while True:
        began = time.thread_time()
        ended = next(steps, "end") == "end"
        took.append((time.thread_time() - began) * 1e3)
        if ended:
            return took


class _Server(asyncio.Protocol):
    """As cheap as can be: the bench reads the client's CPU."""

    def __init__(self, answers: list[bytes]) -> None:
        self._answers = itertools.cycle(answers)
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while b"\r\n\r\n" in self._buffer:
            self._buffer = self._buffer.partition(b"\r\n\r\n")[2]
            assert isinstance(self._transport, asyncio.WriteTransport)
            self._transport.write(next(self._answers))


def serve_pages(count: int, out: Connection) -> None:
    """Listen on `count` ports, send them through `out`, serve until killed."""
    head = b"HTTP/1.1 200 OK\r\ndate: Fri, 07 Aug 2026 10:00:00 GMT\r\nserver: uvicorn\r\n"
    head += b"content-type: text/plain; version=0.0.4; charset=utf-8\r\ncontent-length: "
    pages = (vllm_page(served) for served in range(100))  # numbers go on, and get longer
    answers = [head + b"%d\r\n\r\n" % len(page) + page for page in pages]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(lambda: _Server(answers), "127.0.0.1", 0) for _ in range(count)]
        out.send([server.sockets[0].getsockname()[1] for server in servers])
        await asyncio.Event().wait()

    asyncio.run(main())


async def measure_scrape(ports: list[int], interval_s: float, seconds: float) -> str:
    """Scrape all `ports` for some seconds after a warm-up; return CPU, rate and loop delay."""
    loop = asyncio.get_running_loop()
    gate = Gate(Controller(Policy()), loop)
    scraper = Scraper(interval_s=interval_s, timeout_s=0.5, stale_after_s=10.0, loop=loop)
    for port in ports:
        gate.put_endpoint(EndpointSpec(f"engine-{port}"))
        scraper.put(Target(f"engine-{port}", f"http://127.0.0.1:{port}/metrics"))
    scrapes = 0

    def observe(name: str, load: Load, asked_at: float) -> None:
        nonlocal scrapes
        scrapes += 1
        gate.observe(name, load, asked_at)

    Garbage(lambda: 0, loop).begin()  # as the sidecar has it
    alone, _ = await _watch_loop(3.0)
    await scraper.start(observe)
    await asyncio.sleep(2 * interval_s + 1)
    scrapes = 0
    share, delays = await _watch_loop(seconds)
    errors = list(scraper.errors())
    await scraper.stop()
    net = share - alone
    return (
        f"{len(ports)} endpoints every {interval_s:g}s: {scrapes / seconds:.0f} scrapes/s, {100 * net:.1f} % of a core "
        f"({1e6 * net * seconds / max(scrapes, 1):.0f} us a scrape), watching excluded ({100 * alone:.1f} %), "
        f"errors {errors}\n"
        f"loop delay: median {statistics.median(delays):.2f} ms, p99 {delays[int(0.99 * len(delays))]:.2f} ms, "
        f"worst {delays[-1]:.2f} ms"
    )


async def _watch_loop(seconds: float) -> tuple[float, list[float]]:
    """Return the share of a core that this process takes, and the loop's delays in ms, sorted."""
    cpu, began, delays = time.process_time(), time.monotonic(), []
    while time.monotonic() - began < seconds:
        at = time.perf_counter()
        await asyncio.sleep(0.01)
        delays.append((time.perf_counter() - at - 0.01) * 1e3)
    return (time.process_time() - cpu) / (time.monotonic() - began), sorted(delays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("what", choices=["parse", "scrape"])
    parser.add_argument("--endpoints", type=int, default=200)
    parser.add_argument("--interval", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    arguments = parser.parse_args()
    if arguments.what == "parse":
        print(measure_parse())
        return
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve_pages, args=(arguments.endpoints, theirs), daemon=True)
    server.start()
    try:
        ports = ours.recv()
        factory = importlib.import_module("uvloop").new_event_loop if arguments.loop == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            print(runner.run(measure_scrape(ports, arguments.interval, arguments.seconds)))
    finally:
        server.kill()
        server.join()


if __name__ == "__main__":
    main()
