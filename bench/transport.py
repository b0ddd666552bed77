"""What the sidecar costs behind real Envoy: `make bench-transport`, about 10 minutes.

One run for all contenders: Envoy alone; Envoy with a native C++ ext_proc server that decides nothing; with a server
that decides nothing on each of our transports; with the whole sidecar (classes, tenants, limits, telemetry of two
endpoints every second, metrics) on each. All have the bootstrap that `extproc envoy-config` renders, one worker, a unix
socket to the server (or TCP where the name says so), and nginx behind them. They take turns, each for a few seconds;
figures are medians of the turns.

    python -m bench.transport [speed] [few] [hold] [tokens] [--turns 4] [--seconds 4] [--only NAME ...]

speed   requests/s with 64 clients, CPU of server and Envoy per request, latency with 1 client and at half load
few     the same at 30 requests/s, as LLM servers have them: there caches are cold, and scrapes are shared by few
hold    memory per held request, the time from room for all to the last answer, and what others notice meanwhile
tokens  CPU per request of the sidecar when the answer streams 100 and 10,000 tokens
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import selectors
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from extproc.commands.cli import experiments
from tests.e2e.kit.envoy import Envoy
from tests.e2e.kit.processes import Child, run, tcp_open, wait_until
from tests.e2e.kit.stack import Sidecar, local

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "build/native/noop"
CLIENTS = 64
PACED, PACED_S = 30, 10.0
"""Requests/s of few requests, and for how long."""
IDLE_S = 3.0
NO_UVLOOP = (
    "import sys; sys.modules['uvloop'] = None; from extproc.commands.cli import main; sys.exit(main(sys.argv[1:]))"
)
METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="sim"} 0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="sim"} 0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{model_name="sim"} 0.1
# TYPE vllm:generation_tokens counter
vllm:generation_tokens_total{model_name="sim"} 1000
"""
NGINX = """\
daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/nginx.log crit;
worker_rlimit_nofile 20000;
events {{ worker_connections 19000; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 1000;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
  server {{
    listen {one} backlog=4096; listen {two} backlog=4096;
    location / {{ return 200 "ok"; }}
    location = /hold {{ proxy_pass http://{silent}; proxy_read_timeout 600s; }}
    location = /metrics {{ alias {directory}/metrics; default_type text/plain; }}
  }}
}}
"""
SCRIPT = """\
local body = '{"model": "sim", "messages": [{"role": "user", "content": "' .. string.rep("word ", 200) .. '"}]}'
local requests = {}
function init(_)
  for number = 1, 16 do
    requests[number] = wrk.format("POST", "/v1/chat/completions", {
      ["content-type"] = "application/json", ["x-model"] = "sim", ["authorization"] = "Bearer 0123456789abcdef",
      ["x-tenant-id"] = "tenant-" .. number % 5, ["x-request-class"] = number % 4 == 0 and "interactive" or "batch",
    }, body)
  end
end
local next_one = 0
function request()
  next_one = next_one % 16 + 1
  return requests[next_one]
end
local pause = PAUSE_MS
if pause > 0 then
  function delay() return math.random(0, 2 * pause) end
end
"""


@dataclass
class Contender:
    """One way to serve; `argv`: the server's command, None: no server, "sidecar": ours, with the sidecar's config."""

    name: str
    argv: Sequence[str] | None = None
    transport: str | None = None
    uvloop: bool = True
    listen: str = "unix"
    python: str = sys.executable


def contenders(compiled: str | None = None, *, again: bool = False) -> list[Contender]:
    """Return all, in the order of the table; `compiled`: a Python that has a compiled wheel installed.

    `again`: the native server a second time. What is between those two is noise.
    """
    noop = [sys.executable, "-m", "bench.noop"]
    switched = experiments("completion_queue", "unix:")
    return [
        Contender("Envoy alone"),
        Contender("native no-op", [str(NATIVE)]),
        *([Contender("native no-op, again", [str(NATIVE)])] if again else []),
        Contender("no-op, grpc.aio + protobuf objects", noop, "protobuf"),
        Contender("no-op, asyncio", noop, "asyncio"),
        Contender("no-op, completion_queue", ["env", f"GRPC_EXPERIMENTS={switched}", *noop], "completion_queue"),
        Contender("sidecar, asyncio without uvloop", None, "asyncio", uvloop=False),
        Contender("sidecar, asyncio", None, "asyncio"),
        Contender("sidecar, completion_queue over TCP", None, "completion_queue", listen="tcp"),
        Contender("sidecar, completion_queue", None, "completion_queue"),
        *([Contender("sidecar, compiled", None, "completion_queue", python=compiled)] if compiled else []),
    ]


class Site:
    """A contender with its Envoy, running."""

    def __init__(self, address: str, envoy: Envoy, server: Child | None, sidecar: Sidecar | None) -> None:
        self.address = address
        self.envoy = envoy
        self.server = server
        self.sidecar = sidecar


@contextlib.contextmanager
def upstreams(directory: Path) -> Iterator[list[str]]:
    """Run nginx; give the addresses of two endpoints."""
    ports = [local(), local()]
    (directory / "metrics").write_text(METRICS)
    config = directory / "nginx.conf"
    command = ["nginx", "-p", str(directory), "-e", str(directory / "nginx.log"), "-c", str(config)]
    with contextlib.ExitStack() as running:
        host, port = running.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()  # says nothing, ever
        config.write_text(NGINX.format(directory=directory, one=ports[0], two=ports[1], silent=f"{host}:{port}"))
        nginx = running.enter_context(Child(command, directory / "nginx.out", name="nginx"))
        nginx.wait_ready(lambda: tcp_open(ports[0]), what="nginx")
        yield ports


@contextlib.contextmanager
def streamer(directory: Path) -> Iterator[str]:
    """Run a server that streams tokens; give its address."""
    with Child([sys.executable, "-m", "bench.streamer"], Path(tempfile.mkdtemp(dir=directory)) / "log") as server:
        yield server.wait_line(r"listening on (\S+)").group(1)


@contextlib.contextmanager
def site(
    contender: Contender, directory: Path, addresses: Sequence[str], report: Path | None = None, **keys: Any
) -> Iterator[Site]:
    """Run a contender in front of these endpoints; `keys` go over the sidecar's config.

    `report`: where a sidecar tells what it holds, all of its memory being malloc's (tests/e2e/kit/inspected.py).
    """
    directory = Path(tempfile.mkdtemp(dir=directory))
    config: dict[str, Any] = {
        "listen": local() if contender.listen == "tcp" else f"unix:{directory}/sock",
        "enable_queue": True,
        "max_running_requests": 256,
        "scrape_interval": "1s",
        "tenant_fairness": True,
        "drain_timeout": "200ms",
        "classes": [{"name": "batch"}, {"name": "interactive", "priority": 10}],
        "endpoints": [
            {"name": f"e{number}", "address": address, "models": ["sim"]} for number, address in enumerate(addresses)
        ],
        **({"transport": contender.transport} if contender.transport in ("asyncio", "completion_queue") else {}),
        **keys,
    }
    sidecar = Sidecar(config, directory, env=None if report is None else {"PYTHONMALLOC": "malloc"})
    sidecar.write_config()
    with contextlib.ExitStack() as running:
        server = None
        if report is not None:
            sidecar.child.argv = [sys.executable, "-m", "tests.e2e.kit.inspected", str(sidecar.path), str(report)]
        if contender.argv is not None:
            transport = [contender.transport] if contender.transport else []
            command = [*contender.argv, config["listen"], "e0", *transport]
            server = running.enter_context(Child(command, directory / "server.log", cwd=ROOT))
            server.wait_line("serving")
        elif contender.transport is not None:
            if contender.python != sys.executable:
                sidecar.child.argv[:1] = [contender.python, "-P"]  # -P: not the sources in this folder
            if not contender.uvloop:
                sidecar.child.argv[1:3] = ["-c", NO_UVLOOP]
            server = running.enter_context(sidecar).child
        http = local()
        bootstrap = yaml.safe_load(sidecar.envoy_config(http, local(), directory / "access", "h1"))
        manager = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        del manager["access_log"]
        if contender.name == "Envoy alone":
            del manager["http_filters"][:-1]
            manager["route_config"]["virtual_hosts"][0]["routes"] = [
                {"match": {"prefix": "/"}, "route": {"cluster": "e0"}}
            ]
        envoy = running.enter_context(Envoy(yaml.safe_dump(bootstrap), directory))
        yield Site(http, envoy, server, sidecar if contender.transport and contender.argv is None else None)


def cpu_s(child: Child) -> float:
    """Return the CPU seconds of all threads of a process (of those that live; ours and Envoy's all do)."""
    tasks = Path(f"/proc/{child.pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


def sleeps(child: Child) -> int:
    """Return how often the threads of a process went to sleep: each is a wake-up, and something that it was told."""
    states = [(task / "status").read_text() for task in Path(f"/proc/{child.pid}/task").iterdir()]
    return sum(int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", state, re.MULTILINE)[0]) for state in states)


def rss_kib(child: Child) -> int:
    """Return the memory of a process, in KiB."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{child.pid}/status").read_text())
    assert found is not None
    return int(found.group(1))


def wrk(address: str, directory: Path, clients: int, seconds: float, pause_ms: int = 0) -> dict[str, float]:
    """Load an Envoy; return requests, requests/s and latency in ms."""
    script = directory / f"wrk-{pause_ms}.lua"
    script.write_text(SCRIPT.replace("PAUSE_MS", str(pause_ms)))
    command = [
        "wrk",
        f"-c{clients}",
        "-t1",
        f"-d{max(1, round(seconds))}s",
        "--latency",
        "-s",
        str(script),
        f"http://{address}/",
    ]
    done = run(command, timeout_s=seconds + 30)
    if done.returncode != 0 or "Non-2xx" in done.stdout or "Socket errors" in done.stdout:
        raise SystemExit(f"wrk at {address}: {done.stdout}{done.stderr}")

    def figure(pattern: str) -> tuple[str, ...]:
        found = re.search(pattern, done.stdout)
        assert found is not None, done.stdout
        return found.groups()

    def ms(percent: int) -> float:
        value, unit = figure(rf"\s{percent}%\s+([\d.]+)(us|ms|s)\b")
        return float(value) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]

    requests = int(figure(r"(\d+) requests in")[0])
    return {"requests": requests, "rate": float(figure(r"Requests/sec:\s+([\d.]+)")[0]), "p50": ms(50), "p99": ms(99)}


def load(where: Site, directory: Path, clients: int, seconds: float, pause_ms: int = 0) -> dict[str, float]:
    """Load a contender, and add what a request cost its server and its Envoy, in µs of CPU."""
    children = [child for child in (where.server, where.envoy.child) if child is not None]
    before = [cpu_s(child) for child in children]
    figures = wrk(where.address, directory, clients, seconds, pause_ms)
    spent = [(cpu_s(child) - was) / figures["requests"] * 1e6 for child, was in zip(children, before, strict=True)]
    return {**figures, "envoy_us": spent[-1], **({"server_us": spent[0]} if len(spent) == 2 else {})}


# ---- speed


def speed(directory: Path, chosen: list[Contender], turns: int, seconds: float) -> None:
    """Compare throughput, CPU and latency."""
    busy: dict[str, list[dict[str, float]]] = {one.name: [] for one in chosen}
    idle: dict[str, list[dict[str, float]]] = {one.name: [] for one in chosen}
    half: dict[str, list[dict[str, float]]] = {one.name: [] for one in chosen}
    with contextlib.ExitStack() as running:
        addresses = running.enter_context(upstreams(directory))
        sites = {one.name: running.enter_context(site(one, directory, addresses)) for one in chosen}
        for where in sites.values():
            wrk(where.address, directory, CLIENTS, 1)  # warm: connections, caches, allocators
        for _ in range(turns):
            for name, where in sites.items():
                busy[name].append(load(where, directory, CLIENTS, seconds))
            reference = busy.get("native no-op") or busy[chosen[0].name]
            pause_ms = round(CLIENTS / (statistics.median(turn["rate"] for turn in reference) / 2) * 1000)
            for name, where in sites.items():
                idle[name].append(load(where, directory, 1, seconds / 2))
                half[name].append(load(where, directory, CLIENTS, seconds / 2, pause_ms))

    def of(turns_of: dict[str, list[dict[str, float]]], name: str, figure: str) -> float | None:
        values = [turn[figure] for turn in turns_of[name] if figure in turn]
        return statistics.median(values) if values else None

    def ratio(name: str, reference: str) -> float | None:
        """Turn by turn, so that a slow moment of the machine hurts both."""
        if reference not in busy:
            return None
        return statistics.median(
            one["rate"] / other["rate"] for one, other in zip(busy[name], busy[reference], strict=True)
        )

    print(
        f"\n## Speed: {CLIENTS} clients, medians of {turns} turns of {seconds:g} s; half load: half of the native's\n"
    )
    latencies = ("p50 ms, 1 client", "p99", "p50, half load", "p99")
    row("", "req/s", "÷ Envoy alone", "÷ native", "server µs", "Envoy µs", *latencies, "req/s then", "server µs then")
    row(*["---"] * 12)
    for name in busy:
        row(
            name,
            *(of(busy, name, "rate"), ratio(name, "Envoy alone"), ratio(name, "native no-op")),
            *(of(busy, name, "server_us"), of(busy, name, "envoy_us")),
            *(of(idle, name, "p50"), of(idle, name, "p99"), of(half, name, "p50"), of(half, name, "p99")),
            *(of(half, name, "rate"), of(half, name, "server_us")),
        )
    against_native(busy, half)


def few(directory: Path, chosen: list[Contender]) -> None:
    """Compare where few requests come, as LLM servers have them."""
    print(f"\n## A few requests: {PACED}/s from 8 clients, one turn of {PACED_S:g} s, scrapes in it\n")
    row("", "req/s", "p50 ms", "p99", "server µs", "Envoy µs")
    row(*["---"] * 6)
    with contextlib.ExitStack() as running:
        addresses = running.enter_context(upstreams(directory))
        sites = {one.name: running.enter_context(site(one, directory, addresses)) for one in chosen}
        for where in sites.values():
            wrk(where.address, directory, CLIENTS, 1)
        for name, where in sites.items():
            figures = load(where, directory, 8, PACED_S, round(8 / PACED * 1000))
            row(name, *(figures.get(key) for key in ("rate", "p50", "p99", "server_us", "envoy_us")))


def against_native(busy: dict[str, list[dict[str, float]]], half: dict[str, list[dict[str, float]]]) -> None:
    """Compare turn by turn with the server that decides nothing, and what each adds to Envoy alone at half load."""
    native, alone = "native no-op", "Envoy alone"
    if native not in busy or alone not in busy:
        return

    def added_ms(name: str) -> float:
        return statistics.median(one["p99"] - other["p99"] for one, other in zip(half[name], half[alone], strict=True))

    print("\n## Against the native server, turn by turn\n")
    row("", "req/s", "in the least turn", "server CPU", "p99 added at half load, ms", "native's")
    row(*["---"] * 6)
    for name, turns in busy.items():
        if name not in (native, alone):
            pairs = list(zip(turns, busy[native], strict=True))
            rates = [one["rate"] / other["rate"] for one, other in pairs]
            cpu = statistics.median(one["server_us"] / other["server_us"] for one, other in pairs)
            row(name, statistics.median(rates), min(rates), cpu, added_ms(name), added_ms(native))


# ---- hold


def hold(directory: Path, chosen: list[Contender], counts: Sequence[int]) -> None:
    """Hold many requests, then make room for all; meanwhile another server is asked through the same Envoy."""
    print("\n## Holding: KiB per held request (body of 1 KB), and from room for all to the last answer\n")
    row(
        "",
        "held",
        "server KiB each",
        "Envoy KiB each",
        *("a tenth is answered after ms", "half", "all"),
        *("longest pause of another answer, ms", "slowest of other requests"),
        "server CPU µs each, all in all",
        "not 200",
    )
    row(*["---"] * 11)
    for contender in chosen:
        if contender.transport is None or contender.argv is not None:
            continue
        for count in counts:
            with contextlib.ExitStack() as running:
                held = {"name": "e0", "address": running.enter_context(upstreams(directory))[0], "models": ["sim"]}
                other = {"name": "e1", "address": running.enter_context(streamer(directory)), "models": ["other"]}
                other |= {"engine": "none", "max_running_requests": 100}
                budget = [{"name": "batch", "budget": "600s"}, {"name": "interactive", "priority": 10}]
                keys = {"classes": budget, "max_running_requests": 1, "max_queued_requests": 100_000, "shed": False}
                where = running.enter_context(site(contender, directory, (), endpoints=[held, other], **keys))
                assert where.sidecar is not None
                row(contender.name, count, *_hold(where, where.sidecar, count))


def take_slot(opened: contextlib.ExitStack, address: str, sidecar: Sidecar) -> None:
    """Have the only slot taken by a request that no answer comes for."""
    host, _, port = address.rpartition(":")
    blocker = opened.enter_context(socket.create_connection((host, int(port))))
    blocker.sendall(b"POST /hold HTTP/1.1\r\nhost: bench\r\nx-model: sim\r\ncontent-length: 0\r\n\r\n")
    wait_until(lambda: sidecar.queues()["endpoints"][0]["in_flight"] == 1)


def stand_in_line(opened: contextlib.ExitStack, address: str, sidecar: Sidecar, count: int) -> list[socket.socket]:
    """Have so many more requests wait, with bodies of 1 KB; return their clients."""
    body = json.dumps({"model": "sim", "messages": [{"role": "user", "content": "word " * 200}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nx-model: sim\r\ncontent-length: {len(body)}\r\n\r\n"
    host, _, port = address.rpartition(":")
    before = sidecar.queues()["waiting_total"]
    clients = [opened.enter_context(socket.create_connection((host, int(port)))) for _ in range(count)]
    for client in clients:
        client.sendall(head.encode() + body)
    wait_until(lambda: sidecar.queues()["waiting_total"] == before + count, 120)
    return clients


def ask_other(opened: contextlib.ExitStack, address: str, path: str) -> socket.socket:
    """Ask the other server."""
    host, _, port = address.rpartition(":")
    client = opened.enter_context(socket.create_connection((host, int(port))))
    client.sendall(f"POST {path} HTTP/1.1\r\nhost: bench\r\nx-model: other\r\ncontent-length: 0\r\n\r\n".encode())
    return client


def longest_pause_ms(address: str, over: threading.Event) -> float:
    """Read an answer that has a token each 10 ms."""
    pauses_ms = []
    with contextlib.ExitStack() as opened:
        client = ask_other(opened, address, "/1000000/10")
        while not over.is_set():
            began = time.perf_counter()
            assert client.recv(1 << 16), "the answer broke off"
            pauses_ms.append((time.perf_counter() - began) * 1000)
    return max(pauses_ms[2:])  # its head, and its first token


def slowest_ms(address: str, over: threading.Event) -> float:
    """Ask for a token, one request after the other."""
    took_ms = []
    while not over.wait(0.05):
        with contextlib.ExitStack() as opened:
            began = time.perf_counter()
            assert ask_other(opened, address, "/1").recv(1 << 16).startswith(b"HTTP/1.1 200")
            took_ms.append((time.perf_counter() - began) * 1000)
    return max(took_ms)


def _hold(where: Site, sidecar: Sidecar, count: int) -> list[float]:
    over = threading.Event()
    with contextlib.ExitStack() as opened, ThreadPoolExecutor(2) as pool:
        opened.callback(over.set)
        take_slot(opened, where.address, sidecar)
        children = [child for child in (where.server, where.envoy.child) if child is not None]
        memory, cpu = [rss_kib(child) for child in children], cpu_s(children[0])
        waiting = selectors.DefaultSelector()
        for client in stand_in_line(opened, where.address, sidecar, count):
            waiting.register(client, selectors.EVENT_READ)
        time.sleep(1)
        each = [(rss_kib(child) - was) / count for child, was in zip(children, memory, strict=True)]
        others = [pool.submit(notice, where.address, over) for notice in (longest_pause_ms, slowest_ms)]
        time.sleep(0.5)
        sidecar.write_config(max_running_requests=2 * count)
        left, bad = count, 0
        began, after_ms = 0.0, []
        sidecar.child.signal(signal.SIGHUP)
        while left:
            ready = waiting.select(60)
            assert ready, f"{left} of {count} are still not answered"
            began = began or time.perf_counter()  # the first answer: that the file was read takes its own time
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                bad += not key.fileobj.recv(4096).startswith(b"HTTP/1.1 200")
                waiting.unregister(key.fileobj)
                left -= 1
                after_ms.append((time.perf_counter() - began) * 1000)
        over.set()
        noticed = [other.result() for other in others]
        time.sleep(0.5)
        answered = [after_ms[int(share * (count - 1))] for share in (0.1, 0.5, 1.0)]
        return [*each, *answered, *noticed, (cpu_s(children[0]) - cpu) / count * 1e6, bad]


# ---- tokens


def tokens(directory: Path, chosen: list[Contender], rounds: int = 3) -> None:
    """Stream short and long answers; compare what a request costs the sidecar.

    Its wake-ups tell what it does; its CPU time also tells how cold the caches are that a long answer leaves behind.
    """
    print("\n## An answer's length: CPU µs and wake-ups per request in the sidecar, one request at a time\n")
    row("", "100 tokens", "10,000 tokens", "Envoy: 100", "Envoy: 10,000", "wake-ups: 100", "wake-ups: 10,000")
    row(*["---"] * 7)
    for contender in chosen:
        if contender.transport is None or contender.argv is not None:
            continue
        with contextlib.ExitStack() as running:
            address = running.enter_context(streamer(directory))
            keys = {"scrape_interval": "60s", "endpoints": [{"name": "e0", "address": address, "engine": "none"}]}
            where = running.enter_context(site(contender, directory, [address], **keys))
            children = [child for child in (where.server, where.envoy.child) if child is not None]
            sidecar = children[0]
            spent: dict[int, list[list[float]]] = {100: [], 10_000: []}

            def read(children: Sequence[Child] = children, sidecar: Child = sidecar) -> list[float]:
                return [*(cpu_s(child) * 1e6 for child in children), sleeps(sidecar)]

            _stream(where.address, 100, 100)
            before = read()
            time.sleep(IDLE_S)
            # What goes on without any request is no cost of one, and a long answer takes its time.
            idle = [(now - was) / IDLE_S for now, was in zip(read(), before, strict=True)]
            for _ in range(rounds):
                for count, figures in spent.items():
                    before, began = read(), time.monotonic()
                    _stream(where.address, count, 100)
                    took_s = time.monotonic() - began
                    gone = [now - was for now, was in zip(read(), before, strict=True)]
                    figures.append([(figure - i * took_s) / 100 for figure, i in zip(gone, idle, strict=True)])
            columns = [
                [statistics.median(turn[which] for turn in figures) for figures in spent.values()] for which in range(3)
            ]
            row(contender.name, *(value for column in columns for value in column))


def _stream(address: str, count: int, requests: int) -> None:
    """Ask for answers of `count` tokens, one after another on one connection."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as client:
        for _ in range(requests):
            client.sendall(f"POST /{count} HTTP/1.1\r\nhost: bench\r\ncontent-length: 0\r\n\r\n".encode())
            tail = b""
            while not tail.endswith(b"0\r\n\r\n"):
                data = client.recv(1 << 20)
                assert data, "the answer broke off"
                tail = (tail + data)[-5:]


def row(*values: str | float | None) -> None:
    """Print a row of a table."""

    def text(value: str | float | None) -> str:
        if value is None:
            return "-"
        if isinstance(value, str):
            return value
        return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"

    print("|", " | ".join(map(text, values)), "|", flush=True)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["speed", "few", "hold", "tokens"], metavar="speed|few|hold|tokens")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--held", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--only", nargs="+", default=[], help="names of contenders, or parts of them")
    parser.add_argument("--compiled", metavar="PYTHON", help="one that has a compiled wheel: a further contender")
    parser.add_argument("--quick", action="store_true", help="speed, 5 turns of 2 s, against two native servers")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.parts, arguments.turns, arguments.seconds = ["speed"], 5, 2.0
        native = ["native no-op", "native no-op, again"]
        arguments.only = ["Envoy alone", *native, "sidecar, completion_queue", "sidecar, compiled"]
    everybody = contenders(arguments.compiled, again=arguments.quick)
    names = {one.name for one in everybody}
    parts_of_names = [part for part in arguments.only if part not in names]
    chosen = [
        one
        for one in everybody
        if not arguments.only or one.name in arguments.only or any(part in one.name for part in parts_of_names)
    ]
    missing = [tool for tool in ("nginx", "wrk") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(
            f"{' and '.join(missing)}: not installed (apt-get install nginx-light wrk); nothing was measured"
        )
    if not NATIVE.exists():
        print("native no-op: not built (apt-get install g++ libgrpc++-dev protobuf-compiler-grpc); left out")
        chosen = [one for one in chosen if one.argv != [str(NATIVE)]]
    parts: dict[str, Callable[[Path], None]] = {
        "speed": lambda directory: speed(directory, chosen, arguments.turns, arguments.seconds),
        "few": lambda directory: few(directory, chosen),
        "hold": lambda directory: hold(directory, chosen, arguments.held),
        "tokens": lambda directory: tokens(directory, chosen),
    }
    print(f"{os.cpu_count()} CPUs, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)  # nginx' worker is somebody else
        for part in arguments.parts:
            parts[part](Path(directory))


if __name__ == "__main__":
    main()
