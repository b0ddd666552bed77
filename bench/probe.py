"""What `first_byte_probe` costs on real Envoy, and what it gains in simulation: `make bench-probe`.

    python -m bench.probe cost     # two minutes: probe off and on take turns, so that a noisy machine hurts both
    python -m bench.probe gain     # two minutes: the prompt limit released by nothing, by counters, by the probe

Cost: a plain upstream sends the head at once and the chunks later; the first chunk carries the time at which it was
written, so its delay is that of Envoy and the sidecar alone. CPU is that of the two processes, from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from extproc.simulate.plan import Plan, run
from tests.e2e.kit.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

FIRST_S = 0.02
"""From the head to the first chunk."""
GAP_S = 0.02
"""Between writes of a paced answer."""
CLIENTS = 32
LOADS = ("paced", "burst")
PER_S = {10: 150, 1000: 15}
WRITES = {10: 10, 1000: 100}
"""Writes of a paced answer, by chunks: long answers go out ten chunks at a time, so that the upstream keeps up."""
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


# ---- the upstream, in a process of its own


class _Answering(asyncio.Protocol):
    """Answers `POST /?CHUNKS-paced` and `POST /?CHUNKS-burst` on a connection, one request after the other."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if b"\r\n\r\n{}" in self._buffer:
            target = self._buffer.split(b" ", 2)[1].partition(b"?")[2]
            self._buffer = b""
            chunks, _, pace = target.decode().partition("-")
            self._write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            if pace == "burst":
                self._chunks(int(chunks), 1, 0)
            else:
                self._loop.call_later(FIRST_S, self._chunks, int(chunks), WRITES[int(chunks)], 0)

    def _chunks(self, chunks: int, writes: int, done: int) -> None:
        first = b"" if done else _chunk(b"data: %020d\n\n" % time.monotonic_ns())
        last = b"0\r\n\r\n" if done == writes - 1 else b""
        self._write(first + _chunk(b'data: {"token": "word"}\n\n') * (chunks // writes - (not done)) + last)
        if not last:
            self._loop.call_later(GAP_S, self._chunks, chunks, writes, done + 1)

    def _write(self, data: bytes) -> None:
        if data and not self._transport.is_closing():
            self._transport.write(data)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _serve(pipe: Connection) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Answering(loop), "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.to_thread(pipe.recv)

    uvloop.run(serve())


# ---- the clients


class _Asking(asyncio.Protocol):
    """One kept connection. The future of a request is the delay of its first chunk, once the answer is over."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[float] | None = None
        self._head = b""
        self._tail = b""
        self._delay_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def ask(self, request: bytes) -> asyncio.Future[float]:
        self._answer = asyncio.get_running_loop().create_future()
        self._head, self._tail, self._delay_s = b"", b"", -1.0
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        if self._delay_s < 0:
            self._head += data
            at = self._head.find(b"data: ")
            if at >= 0 and len(self._head) >= at + 26:
                if b" 200 " not in self._head[:20]:
                    raise SystemExit(f"not 200: {self._head[:200]!r}")
                self._delay_s = (time.monotonic_ns() - int(self._head[at + 6 : at + 26])) / 1e9
        self._tail = (self._tail + data)[-7:]
        if self._tail.endswith(b"\r\n0\r\n\r\n") and self._answer is not None and self._delay_s >= 0:
            self._answer.set_result(self._delay_s)
            self._answer = None

    def connection_lost(self, _: Exception | None) -> None:
        if self._answer is not None:
            self._answer.set_exception(ConnectionError(f"cut after {self._head[:80]!r}"))


class _Clients:
    """Connections to one Envoy, reused."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.partition(":")
        self._port = int(port)
        self._idle: list[_Asking] = []

    async def ask(self, what: str) -> float:
        request = f"POST /v1/chat/completions?{what} HTTP/1.1\r\nhost: bench\r\ncontent-length: 2\r\n\r\n{{}}".encode()
        if self._idle:
            connection = self._idle.pop()
        else:
            _, connection = await asyncio.get_running_loop().create_connection(_Asking, self._host, self._port)
        delay_s = await connection.ask(request)
        self._idle.append(connection)
        return delay_s

    async def open_loop(self, what: str, per_s: float, seconds: float) -> list[float]:
        """Ask at a steady rate; the delays of the first chunks."""
        began, asked = asyncio.get_running_loop().time(), []
        for number in range(int(per_s * seconds)):
            await asyncio.sleep(began + number / per_s - asyncio.get_running_loop().time())
            asked.append(asyncio.create_task(self.ask(what)))
        return list(await asyncio.gather(*asked))

    async def closed_loop(self, what: str, clients: int, seconds: float) -> int:
        """Ask again and again from so many clients; the number of answers."""
        until, done = time.monotonic() + seconds, 0

        async def one() -> None:
            nonlocal done
            while time.monotonic() < until:
                await self.ask(what)
                done += 1

        await asyncio.gather(*(one() for _ in range(clients)))
        return done


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, all threads, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


@dataclass
class Seen:
    """What one setting showed with one kind of answer."""

    delays_s: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    requests: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOADS, 0))
    sidecar_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOADS, 0.0))
    envoy_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOADS, 0.0))

    @contextlib.contextmanager
    def counting(self, load: str, stack: Stack) -> Iterator[None]:
        """Add up what the sidecar and Envoy use meanwhile."""
        pids = stack.sidecar.child.pid, stack.envoy.child.pid
        before = [cpu_s(pid) for pid in pids]
        yield
        after = [cpu_s(pid) for pid in pids]
        self.sidecar_s[load] += after[0] - before[0]
        self.envoy_s[load] += after[1] - before[1]


def cost(rounds: int, seconds: float) -> None:
    """Measure both settings in turns and print them side by side."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    upstream = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,))
    upstream.start()
    address = f"127.0.0.1:{here.recv()}"
    seen = {(probe, chunks): Seen() for chunks in WRITES for probe in (False, True)}
    with contextlib.ExitStack() as running:
        running.callback(upstream.join, 10)
        running.callback(here.send, "stop")
        stacks = {}
        for probe in (False, True):
            directory = Path(running.enter_context(tempfile.TemporaryDirectory()))
            config = {"first_byte_probe": probe, "max_running_requests": 10_000, "max_prompt_tokens": 1_000_000}
            endpoints = {"u": {"address": address, "engine": "none"}}
            stacks[probe] = running.enter_context(Stack(directory, upstreams=(), endpoints=endpoints, config=config))

        async def measure() -> None:
            clients = {probe: _Clients(stack.address) for probe, stack in stacks.items()}
            for one in clients.values():
                await one.closed_loop("10-burst", CLIENTS, 1.0)  # caches, connections
            for _ in range(rounds):
                for (probe, chunks), figures in seen.items():
                    with figures.counting("paced", stacks[probe]):
                        delays_s = await clients[probe].open_loop(f"{chunks}-paced", PER_S[chunks], seconds)
                        await asyncio.sleep(0.2)  # what is done after the last byte belongs to the request as well
                    figures.delays_s += delays_s
                    figures.requests["paced"] += len(delays_s)
                    with figures.counting("burst", stacks[probe]):
                        done = await clients[probe].closed_loop(f"{chunks}-burst", CLIENTS, seconds / 2)
                        await asyncio.sleep(0.2)
                    figures.requests["burst"] += done
                    figures.per_s.append(done / (seconds / 2))

        uvloop.run(measure())
    print(f"{rounds} rounds of {seconds:g} s each way, load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    print("paced: a steady rate, a write each 20 ms; burst: closed loop, all chunks at once")
    print(f"{'':48}{'off':>10}{'on':>10}{'on - off':>10}")
    for chunks in WRITES:
        pair = [seen[probe, chunks] for probe in (False, True)]
        rows = {
            **{
                f"{who} CPU ms/request, {load}": [1e3 * used(one)[load] / one.requests[load] for one in pair]
                for load in LOADS
                for who, used in (("sidecar", attrgetter("sidecar_s")), ("Envoy", attrgetter("envoy_s")))
            },
            "first chunk delayed p50 ms": [1e3 * statistics.median(one.delays_s) for one in pair],
            "first chunk delayed p99 ms": [1e3 * statistics.quantiles(one.delays_s, n=100)[-1] for one in pair],
            f"requests/s, burst, {CLIENTS} clients": [statistics.median(one.per_s) for one in pair],
        }
        for what, (off, on) in rows.items():
            print(f"{f'{chunks} chunks: {what}':<50}{off:>8.2f}{on:>10.2f}{on - off:>+10.2f}")


# ---- the gain

RELEASED_BY = {
    "nothing (no prompt limit)": "ours,max_prompt_tokens=1000000",
    "counters scraped every 5 s": "ours,scrape_interval=5s",
    "counters scraped every 1 s": "ours",
    "counters scraped every 100 ms": "ours,scrape_interval=100ms",
    "the probe (scrape 1 s)": "ours,first_byte_probe=true",
    "the probe (scrape 100 ms)": "ours,first_byte_probe=true,scrape_interval=100ms",
    "nothing, engine tells gauges only": "ours,own_books=false",
    "the probe, gauges only": "ours,own_books=false,first_byte_probe=true",
}


def gain(seeds: tuple[int, ...], duration_s: float) -> None:
    """Simulate the same traffic with each way to learn of first tokens."""
    for preset in ("a100-8b", "h100-32b"):
        for load in (0.9, 1.2):
            print(f"\n{preset} at {load:.0%}, seeds {seeds}, {duration_s:g} s: goodput (int/std/batch), first token s")
            for what, contender in RELEASED_BY.items():
                (one,) = run(Plan(preset, loads=(load,), seeds=seeds, duration_s=duration_s, contenders=(contender,)))
                classes = "/".join(f"{line.goodput:.2f}" for line in one.lines[:-1])
                p50, p95, p99 = one.all.ttft
                print(f"  {what:<34}{one.all.goodput:.3f} +-{one.spread:.3f} ({classes})", end="")
                print(f"   all p50 {p50:.2f} p95 {p95:.2f} p99 {p99:.2f}, int p95 {one.of('int').ttft[1]:.2f}")


def main() -> int:
    """Measure one of the two, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "gain", "both"), nargs="?", default="both")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement (%(default)g)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[31, 32, 33])
    parser.add_argument("--duration", type=float, default=300.0, help="simulated seconds of arrivals (%(default)g)")
    flags = parser.parse_args()
    if flags.what in ("cost", "both"):
        cost(flags.rounds, flags.seconds)
    if flags.what in ("gain", "both"):
        gain(tuple(flags.seeds), flags.duration)
    return 0


if __name__ == "__main__":
    sys.exit(main())
