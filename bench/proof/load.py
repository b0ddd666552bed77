"""Sends the requests of many stacks at their planned times, open loop, and notes what each client saw.

One event loop for all stacks of a round, so a late sender is late for all; how late is in every record. A request has
a connection of its own. Its body has the size that its token estimate says; headers tell the engine the true lengths.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import uvloop

from extproc.simulate.studies.figures import Record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.simulate.workload import Demand

PATH = "/v1/completions"
CHARS_PER_TOKEN = 4
_DONE = b"[DONE]"


def _tokens(stream: bytes) -> int:
    """Count output tokens: the engine's are words with a space behind each, and one event may have several of them.

    An engine that could not write for a moment sends all that it has made since in one event, so events don't say.
    """
    return stream.count(b" ") - stream.count(b", ") - stream.count(b": ")


@dataclass(slots=True)
class Target:
    """One stack: where to send, what, and until when.

    Attributes:
        tagged: requests name their class and tenant. Off: they say nothing of themselves.
        marks: headers, and fields of the body, that this stack's proxy alone understands.
    """

    address: str
    demands: Sequence[Demand]
    tagged: bool = True
    marks: Callable[[Demand], tuple[dict[str, str], dict[str, Any]]] | None = None
    records: list[Record] = field(default_factory=list)


def request(
    demand: Demand,
    address: str,
    *,
    tagged: bool,
    marks: Callable[[Demand], tuple[dict[str, str], dict[str, Any]]] | None = None,
) -> bytes:
    """Return the bytes of one HTTP/1.1 request."""
    own_headers, own_fields = marks(demand) if tagged and marks is not None else ({}, {})
    fields = {"model": "sim", "stream": True, "prompt": "", "priority": -demand.klass.priority} | own_fields
    empty = len(json.dumps(fields))
    fields["prompt"] = "x" * max(demand.estimate * CHARS_PER_TOKEN - empty, 1)
    body = json.dumps(fields).encode()
    headers = {
        "host": address,
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        "x-sim-prompt-tokens": str(demand.prompt),
        "x-sim-output-tokens": str(demand.output),
    }
    if tagged:
        headers |= {"x-request-class": demand.klass.name, "x-tenant-id": demand.tenant}
        if demand.session is not None:
            headers["x-session-id"] = demand.session
    headers |= own_headers
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {PATH} HTTP/1.1\r\n{head}\r\n".encode() + body


class Exchange(asyncio.Protocol):
    """One request and its answer. Leaves when the class' patience ends before the first token."""

    __slots__ = (
        "_begin",
        "_data",
        "_loop",
        "_over",
        "_patience",
        "_planned",
        "_record",
        "_rest",
        "demand",
        "target",
        "wire",
    )

    def __init__(self, target: Target, demand: Demand, over: Callable[[Exchange, float], None]) -> None:
        """Prepare one request; `over` hears once that it is over, and the loop's time."""
        self._loop = asyncio.get_running_loop()
        self.target = target
        self.demand = demand
        self._planned = 0.0
        self._over: Callable[[Exchange, float], None] | None = over
        self._data = request(demand, target.address, tagged=target.tagged, marks=target.marks)
        self._record = Record(0.0, demand.klass.name, demand.tenant, demand.prompt, 0)
        self._rest = b""
        self._begin = 0.0
        self._patience: asyncio.TimerHandle | None = None
        self.wire: asyncio.Transport | None = None

    def plan(self, begin: float, at: float) -> None:
        """Enter the record: to be sent `at` seconds after the loop's time `begin`."""
        self._begin = begin
        self._planned = begin + at
        self._record.at = at
        self.target.records.append(self._record)

    async def send(self) -> None:
        """Connect and send. A connection that can't be made is a failed request."""
        host, _, port = self.target.address.rpartition(":")
        self._patience = self._loop.call_at(self._planned + self.demand.klass.patience_s, self._leave)
        try:
            await self._loop.create_connection(lambda: self, host, int(port))
        except OSError:
            self._record.lag_s = self._loop.time() - self._planned
            self._end("failed", self._loop.time())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send all at once."""
        self.wire = cast("asyncio.Transport", transport)  # uvloop's own is no subclass
        if self._over is None:  # it left while it was connecting
            self.wire.abort()
            return
        self.wire.write(self._data)
        self._data = b""
        self._record.lag_s = self._loop.time() - self._planned

    def data_received(self, data: bytes) -> None:
        """Note the head, the first token, the tokens after it, and the end."""
        if self._over is None:
            return
        now = self._loop.time()
        record = self._record
        if not record.status:
            self._rest += data
            head, end, data = self._rest.partition(b"\r\n\r\n")
            if not end:
                return
            record.status = int(head[9:12])
            self._rest = b""
        if record.status != 200:
            self._end("refused", now)
            return
        tail = self._rest + data
        tokens = _tokens(tail) - _tokens(self._rest)  # a word may end in this read that began in the one before
        if tokens:
            if record.first_s is None:
                record.first_s = now - self._planned
            record.output += tokens
        if _DONE in tail:
            record.output = self.demand.output
            self._end("finished", now)
        else:
            self._rest = tail[-len(_DONE) :]

    def connection_lost(self, _error: Exception | None) -> None:
        """An answer that had not ended before is half of one."""
        self._end("failed", self._loop.time())

    def _leave(self) -> None:
        if self._record.first_s is None:
            self._end("abandoned", self._loop.time())

    def cut(self, now: float) -> None:
        """The run is over: an answer that runs is judged as it is; who waits is called abandoned, like the patient."""
        self._end("running" if self._record.first_s is not None else "abandoned", now)

    def close(self) -> None:
        """Close what the other side has not closed."""
        if self.wire is not None and not self.wire.is_closing():
            self.wire.abort()

    def _end(self, outcome: str, now: float) -> None:
        over, self._over = self._over, None
        if over is None:
            return
        record = self._record
        record.outcome = outcome
        record.end_s = now - self._planned
        record.judge(self.demand.klass)
        if self._patience is not None:
            self._patience.cancel()
        # Who has it all waits for the other side to close: leaving first would look like giving up.
        if self.wire is not None and outcome in ("abandoned", "running"):
            self.wire.abort()
        over(self, now)


class Round:
    """All stacks of one round, from the first request to the cut."""

    def __init__(self, targets: Sequence[Target], cut_s: float) -> None:
        """Send to `targets`; `cut_s` after the start, what runs is cut off."""
        self.targets = targets
        self.cut_s = cut_s
        self.begin = 0.0
        self._open: set[Exchange] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sent: list[Exchange] = []
        self._all_over = asyncio.Event()

    async def run(
        self, at: Sequence[tuple[float, Callable[[], None]]] = (), before_cut: Callable[[], None] = int
    ) -> None:
        """Play it. `at`: what else to do and when, in a thread; `before_cut` is called while answers still run."""
        loop = asyncio.get_running_loop()
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection would make the sender late, for nobody's merit
        try:
            planned = [(Exchange(target, one, self._over), one) for target in self.targets for one in target.demands]
            self.begin = loop.time() + 0.1 + len(planned) / 20_000
            for exchange, demand in planned:
                self._plan(loop, exchange, demand.at)
            for when, what in at:
                loop.call_at(self.begin + when, self._aside, loop, what)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self.begin + self.cut_s):
                    await self._all_over.wait()
            await loop.run_in_executor(None, before_cut)
            for exchange in list(self._open):
                exchange.cut(loop.time())
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=15)
            for exchange in self._sent:
                exchange.close()
            await asyncio.sleep(0.05)  # closed transports are let go in the loop's next turns
        finally:
            gc.enable()
            gc.unfreeze()

    def _plan(self, loop: asyncio.AbstractEventLoop, exchange: Exchange, at: float) -> None:
        exchange.plan(self.begin, at)
        self._open.add(exchange)
        self._sent.append(exchange)
        loop.call_at(self.begin + at, self._send, loop, exchange)

    def _send(self, loop: asyncio.AbstractEventLoop, exchange: Exchange) -> None:
        self._keep(loop.create_task(exchange.send()))

    def _aside(self, loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
        self._keep(loop.create_task(asyncio.to_thread(what)))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _over(self, exchange: Exchange, now: float) -> None:
        self._open.discard(exchange)
        then = exchange.demand.then
        at = now - self.begin + (then.at if then is not None else 0.0)
        if then is not None and at < self.cut_s:
            self._plan(asyncio.get_running_loop(), Exchange(exchange.target, then, self._over), at)
        elif not self._open:
            self._all_over.set()


def play(
    targets: Sequence[Target],
    cut_s: float,
    at: Sequence[tuple[float, Callable[[], None]]] = (),
    before_cut: Callable[[], None] = int,
) -> None:
    """Run a round to its end, on an event loop of its own."""
    uvloop.run(Round(targets, cut_s).run(at, before_cut))
