"""The longest turn of a real sidecar's event loop: `make bench-turns` (a minute).

500 endpoints with pages like vLLM's, each scraped every second; 10,000 requests that wait, held on real streams; some
end every second and others come; `/metrics`, `/queues` and the live page asked every second. A turn is all that the
loop's thread does from one look at its files to the next, gRPC's share included, in CPU time: nobody else's work counts
in it. Besides the longest turns this prints what ran longest in them, and full collections of garbage.

The machine disturbs such times, too: caches go cold, and others' interrupts count as ours. So a loop that does the same
half a millisecond of work in each of its turns runs beside it: how much longer its longest turn is than its usual one
shows what of the figures is noise.

The parts run in processes of their own: `serve` is the sidecar with a watch on its loop, `hold` the client.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import http.client
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.scrape import serve_pages
from tests.e2e.kit.processes import Child, http_get, http_ok, wait_until
from tests.e2e.kit.stack import Sidecar

MOST_MS = 5.0
"""The longest turn that is called good."""
SHOWN, SHOWN_MS = 12, 0.2
"""Parts of turns that are told: so many, of so long or more."""
NOISE_PAUSE_S, NOISE_STEPS = 0.01, 8_000
"""The loop beside it: how long it sleeps between two turns, and how much it does in each."""


class _Waits:
    """The loop's completion queue. An event is dealt with from one wait to the next, or to the end of a `select`.

    Each wait but the first of a `select` tells that a turn is over.
    """

    def __init__(self, queue: Any, watch: Watch) -> None:
        self._queue = queue
        self._watch = watch
        self._tag: Any = None
        self.is_first = True

    def poll(self, deadline: float | None = None) -> Any:
        self.dealt()
        if deadline != 0 and not self.is_first:  # 0: others are due, and come when the queue is empty
            self._watch.over()
        self.is_first = False
        event = self._queue.poll(deadline)
        self._tag, self._began = event.tag, self._watch.began()
        return event

    def dealt(self) -> None:
        """Note that the event that came last is dealt with."""
        if self._tag is not None:
            self._watch.ran(getattr(self._tag, "__qualname__", "a file's wake-up"), self._began)
            self._tag = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


class Watch:
    """What the turns of a loop took, since it was last asked."""

    def __init__(self) -> None:
        self.forget()
        gc.callbacks.append(self._collected)

    def forget(self) -> None:
        """Begin anew."""
        self.turns_ms: list[float] = []
        self.longest: dict[str, float] = {}
        self.within: deque[tuple[float, dict[str, tuple[float, int]]]] = deque(maxlen=10_000)
        self.parts: dict[str, tuple[float, int]] = {}
        self.collections_ms: list[tuple[int, float]] = []
        self._at = time.thread_time()
        self._at_collection = self.collecting_ms = 0.0

    def watch(self, loop: Any) -> None:
        """Watch this loop: its looks at files, gRPC's events, and each callback."""
        look = loop._selector.select
        waits = _Waits(getattr(loop._selector, "_queue", None), self)
        if hasattr(loop, "queue"):  # a CompletionLoop: gRPC is not imported before it is prepared
            loop._selector._queue = waits

        def select(timeout: float | None = None) -> object:
            self.over()
            waits.is_first = True
            found = look(timeout)
            waits.dealt()
            return found

        loop._selector.select = select
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            began = self.began()
            run(handle)
            self.ran(handle, began)

        asyncio.Handle._run = timed  # type: ignore[method-assign]

    def began(self) -> float:
        """Return when a part of a turn begins."""
        self.collecting_ms = 0.0
        return time.thread_time()

    def ran(self, what: asyncio.Handle | str, began: float) -> None:
        """Note a part of a turn that is over: a callback, or a gRPC event."""
        took_ms = (time.thread_time() - began) * 1e3
        if took_ms > SHOWN_MS:
            name = what if isinstance(what, str) else _name(what)
            self._add(name, took_ms)
            if self.collecting_ms > SHOWN_MS:
                self._add("garbage", self.collecting_ms)
            self.longest[name] = max(took_ms, self.longest.get(name, 0.0))

    def over(self) -> None:
        """Note that a turn is over."""
        now = time.thread_time()
        took_ms = (now - self._at) * 1e3
        self._at = now
        self.turns_ms.append(took_ms)
        if took_ms > MOST_MS / 2:
            self.within.append((took_ms, self.parts))
        self.parts = {}

    def _add(self, name: str, took_ms: float) -> None:
        before_ms, times = self.parts.get(name, (0.0, 0))
        self.parts[name] = before_ms + took_ms, times + 1

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._at_collection = time.thread_time()
        else:
            took_ms = (time.thread_time() - self._at_collection) * 1e3
            self.collecting_ms += took_ms
            self.collections_ms.append((info["generation"], took_ms))

    def told(self) -> dict[str, object]:
        """Return what was seen."""
        turns = sorted(self.turns_ms)
        return {
            "turns": len(turns),
            "cpu_s": sum(turns) / 1e3,
            "longest_ms": turns[-5:][::-1],
            "p999_ms": turns[int(0.999 * (len(turns) - 1))],
            "long": sum(turn > MOST_MS for turn in turns),
            "parts": sorted(self.longest.items(), key=lambda part: -part[1])[:SHOWN],
            "within": sorted(self.within, key=lambda turn: -turn[0])[:5],
            "full": sorted((took for generation, took in self.collections_ms if generation == 2), reverse=True)[:3],
            "young": max((took for generation, took in self.collections_ms if generation < 2), default=0.0),
        }


def _name(handle: Any) -> str:
    """Say what ran: of a task, where it has come to."""
    callback = handle._callback
    task = getattr(callback, "__self__", None)
    if not isinstance(task, asyncio.Task):
        return str(getattr(callback, "__qualname__", callback)).partition("(")[0]
    names, found = [], task.get_coro()
    while found is not None and hasattr(found, "cr_code"):
        line = f":{found.cr_frame.f_lineno}" if found.cr_frame is not None else ""
        names.append(f"{found.cr_code.co_qualname}{line}")
        found = found.cr_await
    return " > ".join(names[-2:]) or str(task)


def serve(config_path: Path, report: Path) -> int:
    """Serve, and add what was seen to `report` at each SIGUSR1."""
    from extproc.commands.cli import prepare_grpc, run_loop
    from extproc.commands.descriptors import raise_limit
    from extproc.config import load_config

    config = load_config(config_path)
    raise_limit()
    prepare_grpc(config.transport, config.listen)
    watch = Watch()

    async def life() -> int:
        from extproc.app import App

        loop = asyncio.get_running_loop()
        watch.watch(loop)

        def tell() -> None:
            with report.open("a") as out:
                out.write(json.dumps(watch.told()) + "\n")
            loop.call_soon(watch.forget)

        loop.add_signal_handler(signal.SIGUSR1, tell)
        await App(config, loop, config_path).run()
        tell()  # what its end took
        return 0

    return run_loop(life(), config.transport)


async def hold(address: str, count: int, most_running: int, per_s: float) -> None:
    """Hold `count` streams, with up to `most_running` more under way; end some each second and begin as many."""
    import grpc

    from bench.messages import message
    from extproc.stream import wire

    plain = {"method": "POST", "path": "/v1/chat/completions", "content_type": "application/json"}
    plain |= {"content_length": "812", "x_model": "sim", "user_agent": "x", "accept": "*/*"}
    answered = message("response_headers", status="200", content_type="text/event-stream")
    running: deque[asyncio.Event] = deque()
    streams: set[asyncio.Task[None]] = set()

    async with grpc.aio.insecure_channel(address) as channel:
        method = channel.stream_stream(f"/{wire.SERVICE}/{wire.METHOD}")

        async def stream(number: int) -> None:
            over = asyncio.Event()
            call = method()
            begun = message("request_headers", **plain, x_request_id=f"r-{number}", x_tenant_id=f"t-{number % 50}")
            await call.write(begun)
            await call.read()
            running.append(over)
            await over.wait()
            await call.write(answered)
            await call.read()
            await call.done_writing()
            await call.read()

        def begin(number: int) -> None:
            task = asyncio.create_task(stream(number))
            streams.add(task)
            task.add_done_callback(streams.discard)

        number = 0
        for number in range(count + most_running):
            begin(number)
            if number % 50 == 0:
                await asyncio.sleep(0.02)
        print("held", flush=True)
        while True:
            await asyncio.sleep(1 / per_s)
            number += 1
            begin(number)
            if running:
                running.popleft().set()


def make_noise_seen(seconds: float) -> dict[str, float]:
    """Return the usual and the longest turn of a loop that does the same in each, in ms of CPU."""
    took_ms = []

    async def turn_on() -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.thread_time()
            sum(number * number for number in range(NOISE_STEPS))
            took_ms.append((time.thread_time() - began) * 1e3)
            await asyncio.sleep(NOISE_PAUSE_S)

    before = _stolen_s()
    asyncio.run(turn_on())
    took_ms.sort()
    usual, p999 = (took_ms[int(share * len(took_ms))] for share in (0.5, 0.999))
    return {"usual": usual, "p999": p999, "longest": took_ms[-1], "host took": (_stolen_s() - before) * 1e3}


def _stolen_s() -> float:
    """Return for how long the host has run something else on our processors: in CPU times that is ours."""
    return int(Path("/proc/stat").read_text().split()[8]) / os.sysconf("SC_CLK_TCK")


class Readers(threading.Thread):
    """Asks for pages every second, and reads the live page, as Prometheus and people do."""

    def __init__(self, admin: str) -> None:
        super().__init__(daemon=True)
        self.admin = admin
        self.over = threading.Event()
        self.asked = 0
        self.sizes: dict[str, int] = {}

    def run(self) -> None:
        """Ask until it is over."""
        threading.Thread(target=self._events, daemon=True).start()
        while not self.over.wait(1.0):
            for path in ("/metrics", "/queues"):
                try:
                    status, body = http_get(self.admin, path, 10)
                except OSError:
                    if self.over.is_set():  # and the sidecar ends
                        return
                    raise
                assert status == 200, path
                self.sizes[path] = len(body)
            self.asked += 1

    def _events(self) -> None:
        host, _, port = self.admin.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port))
        connection.request("GET", "/events")
        answer = connection.getresponse()
        with contextlib.suppress(OSError):
            while not self.over.is_set():
                self.sizes["/events"] = self.sizes.get("/events", 0) + len(answer.read1(1 << 20))


class Watched:
    """A sidecar whose loop is watched, and servers with pages behind it."""

    def __init__(self, endpoints: int, transport: str, running: contextlib.ExitStack, **changes: Any) -> None:
        """Start them, with changed keys; `running` ends them."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        pages = context.Process(target=serve_pages, args=(endpoints, theirs), daemon=True)
        pages.start()
        running.callback(pages.kill)
        self._running = running
        self.directory = Path(running.enter_context(tempfile.TemporaryDirectory()))
        self._report, self._lines = self.directory / "report", 0
        self.endpoints = [
            {"name": f"engine-{port}", "address": f"127.0.0.1:{port}", "models": ["sim"]} for port in ours.recv()
        ]
        config = {
            "enable_queue": True,
            "transport": transport,
            "scrape_interval": "1s",
            "scrape_timeout": "900ms",
            "max_running_requests": 1,
            "max_queued_requests": 100_000,
            "shed": False,
            "tenant_fairness": True,
            "drain_timeout": "200ms",
            "classes": [{"name": "default", "budget": "600s"}, {"name": "interactive", "priority": 10}],
            "endpoints": self.endpoints,
            **changes,
        }
        self.limit = int(config["max_running_requests"])
        self.sidecar = sidecar = Sidecar(config, self.directory)
        sidecar.write_config()
        sidecar.child.argv = [sys.executable, "-m", "bench.turns", "--serve", str(sidecar.path), str(self._report)]
        self._child = running.enter_context(sidecar.child)
        self._child.wait_ready(lambda: http_ok(sidecar.admin, "/readyz"), timeout_s=60, what="/readyz")
        self.starting = self.seen()

    def fill(self, waiting: int, per_s: float) -> None:
        """Hold requests until so many wait; from then on so many come and go each second."""
        argv = [sys.executable, "-m", "bench.turns", "--hold", self.sidecar.listen]
        argv += [str(waiting), str(self.limit * len(self.endpoints)), str(per_s)]
        client = self._running.enter_context(Child(argv, self.directory / "client.log", name="client"))
        client.wait_line("held", timeout_s=300)
        while self.sidecar.queues()["waiting_total"] < waiting:
            time.sleep(1)

    def reload(self, **changes: Any) -> None:
        """Have it take over changed keys, and return when it has."""
        name = 'extproc_config_reloads_total{result="success"}'
        before = self.sidecar.metrics()[name]
        self.sidecar.write_config(**changes)
        self._child.signal(signal.SIGHUP)
        wait_until(lambda: self.sidecar.metrics()[name] > before, 60)

    def end(self) -> None:
        """Send SIGTERM; what is seen next is what its end took."""
        self._child.signal(signal.SIGTERM)

    def seen(self, *, ends: bool = False) -> dict[str, Any]:
        """Return what was seen since this was asked last, or when it has ended."""
        if not ends:
            self._child.signal(signal.SIGUSR1)
        self._lines += 1
        told = wait_until(
            lambda: (self._report.read_text() if self._report.exists() else "").splitlines()[self._lines - 1 :], 60
        )
        found: dict[str, Any] = json.loads(told[0])
        return found

    def show(self, what: str, seconds: float, told: dict[str, Any] | None = None) -> dict[str, Any]:
        """Print what was seen in the last `seconds`, or `told`, and return it."""
        told = self.seen() if told is None else told
        longest = ", ".join(f"{turn:.1f}" for turn in told["longest_ms"])
        full = ", ".join(f"{took:.1f}" for took in told["full"]) or "none"
        share = 100 * told["cpu_s"] / seconds
        print(f"\n{what}: {told['turns']} turns, {share:.0f} % of a core; longest {longest} ms;", end=" ")
        print(f"p99.9 {told['p999_ms']:.2f} ms; {told['long']} over {MOST_MS:g} ms;", end=" ")
        print(f"garbage: full {full} ms, young {told['young']:.1f} ms")
        for name, took in told["parts"]:
            print(f"    {took:7.2f} ms  {name}")
        for took, parts in told["within"]:
            inside = ", ".join(
                f"{name} {part:.1f} ({times})"
                for name, (part, times) in sorted(parts.items(), key=lambda one: -one[1][0])
            )
            print(f"    a turn of {took:.1f} ms: {inside}")
        return told


def measure(endpoints: int, waiting: int, seconds: float, per_s: float, transport: str) -> bool:
    """Run all parts, print what was seen, and tell whether no turn was too long."""
    with contextlib.ExitStack() as running:
        watched = Watched(endpoints, transport, running)
        began = time.monotonic()
        time.sleep(3)
        watched.show(f"{endpoints} endpoints scraped, nobody waits", time.monotonic() - began)
        began = time.monotonic()
        watched.fill(waiting, per_s)
        watched.show(f"{waiting} came", time.monotonic() - began)
        readers = Readers(watched.sidecar.admin)
        readers.start()
        time.sleep(3)
        watched.seen()
        began = time.monotonic()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as beside:
            noise = beside.submit(make_noise_seen, seconds).result()
        told = watched.show(f"{waiting} wait, {per_s:g} a second come and go, pages asked", time.monotonic() - began)
        readers.over.set()
        print(f"  asked {readers.asked} times: {readers.sizes}")
        figures = ", ".join(f"{name} {took_ms:.2f}" for name, took_ms in noise.items())
        print(f"  a loop beside it that always does the same: {figures} ms, which is the machine's noise")
        return bool(told["longest_ms"][0] <= MOST_MS)


def measure_reloads(endpoints: int, waiting: int, transport: str) -> None:
    """Print how long reloads that change all endpoints, or all who wait, stop the loop: the longest turn of each."""
    with contextlib.ExitStack() as running:
        watched = Watched(endpoints, transport, running)
        if waiting:
            watched.fill(waiting, 1.0)
        few, listed = watched.endpoints[: endpoints // 100], watched.endpoints
        adapted = [{**one, "models": ["sim", f"adapter-{number}"]} for number, one in enumerate(listed)]
        for what, changes in (
            ("a key that no endpoint has", {"drain_timeout": "300ms"}),
            ("other models of all", {"endpoints": [{**one, "models": ["sim", "other"]} for one in listed]}),
            ("a model of its own for each", {"endpoints": adapted}),
            ("the models as before", {"endpoints": listed}),
            ("other limits of all", {"max_running_requests": 2}),
            ("the limits as before", {"max_running_requests": 1}),
            ("another order of who waits", {"tenant_fairness": False}),
            (f"all but {len(few)} go", {"endpoints": few}),
            (f"{endpoints - len(few)} come", {"endpoints": listed}),
        ):
            time.sleep(2)
            watched.seen()
            began = time.monotonic()
            watched.reload(**changes)
            watched.show(f"{endpoints} endpoints, {waiting} wait: {what}", time.monotonic() - began)


def measure_ends(endpoints: int, waiting: int, transport: str) -> None:
    """Print the longest turns of a start, and of an end."""
    for hand_over in (True, False):  # who waits is left to a successor, or refused
        with contextlib.ExitStack() as running:
            began = time.monotonic()
            changes = {"max_running_requests": 2, "drain_timeout": "5s", "hand_over": hand_over}
            watched = Watched(endpoints, transport, running, **changes)
            watched.show(f"a start with {endpoints} endpoints", time.monotonic() - began, watched.starting)
            watched.fill(waiting, 1.0)
            watched.seen()
            began = time.monotonic()
            watched.end()
            told = watched.seen(ends=True)
            what = f"an end with {waiting} waiting and {2 * endpoints} running, {'left' if hand_over else 'refused'}"
            watched.show(what, time.monotonic() - began, told)


def measure_reading(endpoints: int) -> None:
    """Print how late a timer of 2 ms is while a thread reads a file, by Python's own interval and by ours."""
    from extproc.commands.cli import SWITCH_S
    from extproc.config import load_config

    async def lateness_ms(path: Path) -> list[float]:
        late_ms, reading = [], asyncio.ensure_future(asyncio.to_thread(load_config, path, {}))
        while not reading.done():
            began = time.perf_counter()
            await asyncio.sleep(0.002)
            late_ms.append((time.perf_counter() - began) * 1e3 - 2.0)
        return sorted(late_ms)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.yaml"
        listed = [
            {"name": f"e{one}", "address": f"127.0.0.1:{1024 + one}", "models": ["sim"]} for one in range(endpoints)
        ]
        path.write_text(json.dumps({"endpoints": listed}))
        for interval_s in (0.005, SWITCH_S) * 3:
            sys.setswitchinterval(interval_s)
            late_ms = asyncio.run(lateness_ms(path))
            print(
                f"switching after {interval_s * 1e3:g} ms: late by {late_ms[len(late_ms) // 2]:.2f} ms, at most",
                end=" ",
            )
            print(f"{late_ms[-1]:.2f}, {len(late_ms)} times")


def main() -> int:
    """Measure, or be one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--endpoints", type=int, default=500)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--per-s", type=float, default=50.0)
    parser.add_argument("--transport", choices=["completion_queue", "asyncio"], default="completion_queue")
    parser.add_argument("--serve", nargs=2, type=Path, metavar=("CONFIG", "REPORT"))
    parser.add_argument("--hold", nargs=4, metavar=("ADDRESS", "COUNT", "RUNNING", "PER_S"))
    parser.add_argument("--reloads", action="store_true", help="how long reloads stop the loop, and nothing else")
    parser.add_argument("--ends", action="store_true", help="the turns of a start and of an end, and nothing else")
    parser.add_argument("--reading", action="store_true", help="how late all is while a file is read, and nothing else")
    arguments = parser.parse_args()
    if arguments.reading:
        measure_reading(arguments.endpoints)
        return 0
    if arguments.serve is not None:
        return serve(*arguments.serve)
    if arguments.hold is not None:
        address, count, most_running, per_s = arguments.hold
        asyncio.run(hold(address, int(count), int(most_running), float(per_s)))
        return 0
    if arguments.reloads:
        measure_reloads(arguments.endpoints, arguments.waiting, arguments.transport)
        return 0
    if arguments.ends:
        measure_ends(arguments.endpoints, arguments.waiting, arguments.transport)
        return 0
    good = measure(arguments.endpoints, arguments.waiting, arguments.seconds, arguments.per_s, arguments.transport)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
