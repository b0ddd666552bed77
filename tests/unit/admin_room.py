"""An admin port that really listens, in front of a core on a clock of the test's."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import aiohttp

from extproc.admin.http import Admin
from extproc.admission.controller import Controller
from extproc.admission.ticket import Ticket
from extproc.admission.values import EndpointSpec, Policy, Request, RequestClass
from extproc.observe.metrics import Metrics
from extproc.observe.stories import Stories
from extproc.stream.gate import Gate
from tests.e2e.kit.processes import PATIENCE_S

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

    def queues(self):
        return asyncio.run(self.admin.snapshot())


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
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - it comes over sockets
            await asyncio.sleep(0.005)


async def event(response: aiohttp.ClientResponse) -> dict:
    """Read the next view."""
    async with asyncio.timeout(PATIENCE_S):
        async for line in response.content:
            if line.startswith(b"data: "):
                return json.loads(line[6:])
    raise AssertionError("the stream ended")
