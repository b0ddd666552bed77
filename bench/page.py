"""What the live page costs the event loop: 200 endpoints, 10,000 waiting requests, the most pages open.

    python -m bench.page

Prints the longest CPU time that one turn of the loop took while views are made and sent, and what /queues takes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import sys
import time
from typing import TYPE_CHECKING

from extproc.admin.feed import MOST_SUBSCRIBERS
from extproc.admin.history import SAMPLES
from extproc.admin.http import Admin
from extproc.admission.controller import Controller
from extproc.admission.load import Load
from extproc.admission.ticket import Ticket
from extproc.admission.values import EndpointSpec, Policy, Request, RequestClass
from extproc.observe.metrics import Metrics
from extproc.stream.gate import Gate

if TYPE_CHECKING:
    from collections.abc import Callable

CLASSES = tuple(RequestClass(name, priority, 3600.0) for name, priority in (("high", 1), ("default", 0), ("low", -1)))
SECONDS = 10
READ = """
import selectors, socket, sys
chosen = selectors.DefaultSelector()
for _ in range(int(sys.argv[2])):
    page = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    page.sendall(b"GET /events HTTP/1.1\\r\\nhost: localhost\\r\\n\\r\\n")
    chosen.register(page, selectors.EVENT_READ)
while True:
    for key, _ in chosen.select():
        key.fileobj.recv(1 << 20)
"""
"""Reads as many pages as asked for, in a process of its own."""


def crowd(gate: Gate, endpoints: int, waiting: int) -> None:
    """Fill `gate`: every endpoint is full, and `waiting` requests wait."""
    chance = random.Random(1)
    for number in range(endpoints):
        gate.put_endpoint(EndpointSpec(f"vllm-{number}", max_running_requests=4))
        gate.set_up(f"vllm-{number}", is_up=True)
        gate.observe(f"vllm-{number}", Load(running=4, waiting=0, kv_usage=0.5))
    for number in range(4 * endpoints + waiting):
        request = Request(
            f"0b6f6a0e-0000-4000-8000-{number:012}",
            gate.now(),
            "llama",
            chance.choice(CLASSES).name,
            f"tenant-{number % 50}",
            session=f"s-{number % 500}",
        )
        gate.offer(Ticket(request))


async def main() -> None:
    """Measure and print."""
    loop = asyncio.get_running_loop()
    gate = Gate(Controller(Policy(classes=CLASSES, max_queued_requests=20_000, shed=False)), loop)
    crowd(gate, 200, 10_000)
    metrics = Metrics(gate.controller, lambda: 0)
    admin = Admin("127.0.0.1:0", gate, metrics)
    await admin.start()
    for _ in range(SAMPLES):
        admin.viewer.sample()
    for what, work in (("a sample of the history", admin.viewer.sample), ("/queues", admin.snapshot)):
        print(f"{what}: {_best(work):.2f} ms")
    print(f"/queues?limit=500, as JSON: {_best(lambda: json.dumps(admin.snapshot(500))):.2f} ms")
    view = await admin.view()
    text = json.dumps(view)
    print(f"a view: {len(text) / 1000:.0f} kB; written in {_best(lambda: json.dumps(view)):.2f} ms")
    gc.collect()
    gc.freeze()
    idle = await _turns(3)
    reader = await asyncio.create_subprocess_exec(sys.executable, "-c", READ, str(admin.port), str(MOST_SUBSCRIBERS))
    while len(admin.feed) < MOST_SUBSCRIBERS:  # noqa: ASYNC110 - they come over sockets
        await asyncio.sleep(0.05)
    busy = await _turns(SECONDS)
    assert len(admin.feed) == MOST_SUBSCRIBERS
    reader.kill()
    await reader.wait()
    alone = []
    for _ in range(SECONDS):
        making = asyncio.create_task(admin.view())
        alone.append(max(await _turns_until(making)))
    print(f"longest turn of the loop, idle: {max(idle):.2f} ms; while a view is made: {max(alone):.2f} ms")
    print(f"with {MOST_SUBSCRIBERS} pages open for {SECONDS} s: {max(busy):.2f} ms")
    await admin.stop()


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(20):
        began = time.thread_time()
        work()
        times.append(1000 * (time.thread_time() - began))
    return sorted(times)[10]


async def _turns(seconds: float) -> list[float]:
    return await _turns_until(asyncio.create_task(asyncio.sleep(seconds)))


async def _turns_until(task: asyncio.Task[object]) -> list[float]:
    turns = []
    before = time.thread_time()
    while not task.done():
        await asyncio.sleep(0)
        now = time.thread_time()
        turns.append(1000 * (now - before))
        before = now
    return turns


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main())
