"""A scripted inference server on a real socket: it does what header `x-behaviour` says, and remembers what it saw.

One port speaks HTTP/1.1 and HTTP/2 (prior knowledge): the first bytes of a connection tell which. The header's value
comes from `behave()`; without it the answer is a plain 200. `GET /metrics`, and `GET /health` and `GET /v1/models` that
did not come through Envoy, are answered apart and are never in the records nor in `peak`: a sidecar may ask beside.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from .http1 import Headers, header
from .loops import close
from .processes import PATIENCE_S, free_port, wait_until
from .upstream_wire import Connection

if TYPE_CHECKING:
    from collections.abc import Callable

BEHAVIOUR_HEADER = "x-behaviour"
ID_HEADER = "x-test-id"

_HOLD_LIMIT_S = 300.0  # a held answer that no test releases is cut, so that nothing can hang for ever
_PIECE_BYTES = 64 * 1024


KINDS = ("ok", "sse", "empty", "trailers", "rst", "fin")


@dataclasses.dataclass(frozen=True, slots=True)
class Behaviour:
    """How one request is answered.

    kind      ok: content-length body of `size` bytes · sse: `events` events and [DONE], chunked over HTTP/1.1 ·
              empty: 204 · trailers: as sse, then trailers (HTTP/2 only) · rst, fin: as sse, but after `events`
              events the stream is reset (TCP RST over HTTP/1.1, RST_STREAM over HTTP/2) or the connection closed;
              `events=0` means before the head
    status    of the answer; 200 unless told (kind ok)
    wait_s    silence before the head
    gap_s     silence between events
    hold      "head": wait for `release(id)` before the head; "body": after the first event, or after half of an ok
              body; "events": for `release(id.number)` after each event
    fail      that many attempts of this request id are reset before the head; the next one goes as told
    refuse    the same, said as "not begun" (REFUSED_STREAM; HTTP/2 only)
    at        the name of the upstream that behaves so; the others answer ok
    reply     one more header of the answer (kinds ok and with events): `name: value`
    """

    kind: str = "ok"
    status: int = 200
    size: int = 100
    events: int = 3
    gap_s: float = 0.0
    wait_s: float = 0.0
    hold: str = ""
    fail: int = 0
    refuse: int = 0
    at: str = ""
    reply: str = ""

    @property
    def reply_headers(self) -> Headers:
        name, colon, value = self.reply.partition(":")
        return [(name.strip(), value.strip())] if colon else []

    @classmethod
    def parse(cls, text: str) -> Behaviour:
        kind, *pairs = text.split(";")
        if kind not in KINDS:
            raise ValueError(f"no behaviour {kind!r}; there are {', '.join(KINDS)}")
        types: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
        kinds = {field.name: types[str(field.type)] for field in dataclasses.fields(cls)}
        return cls(kind, **{key: kinds[key](value) for key, _, value in (pair.partition("=") for pair in pairs)})


def behave(kind: str = "ok", **how: float | str) -> tuple[str, str]:
    """The header that orders a behaviour: `behave("sse", events=5, hold="body")`. Fields as in `Behaviour`."""
    value = ";".join([kind, *(f"{key}={value}" for key, value in how.items())])
    Behaviour.parse(value)
    return BEHAVIOUR_HEADER, value


def sse_event(number: int) -> bytes:
    """The bytes of event `number` (from 0) of an sse answer."""
    return b'data: {"n": %d}\n\n' % number


SSE_DONE = b"data: [DONE]\n\n"


@dataclasses.dataclass(slots=True)
class Received:
    """One request as it reached the upstream. Times are `time.monotonic()`."""

    request_id: str
    protocol: str
    method: str
    path: str
    headers: Headers
    arrived_at: float
    attempt: int
    body_bytes: int = 0
    body_sha1: str = ""
    body_complete: bool = False
    finished: bool = False  # the whole answer was written
    cut: bool = False  # we ended it early, as told
    aborted: bool = False  # the peer ended it early
    ended_at: float | None = None

    @property
    def open(self) -> bool:
        return self.ended_at is None


class _Wire(Protocol):
    """One request's way back, over either protocol."""

    async def head(self, status: int, headers: Headers) -> None: ...
    async def data(self, data: bytes) -> None: ...
    async def end(self, trailers: Headers) -> None: ...
    async def reset(self, *, as_not_begun: bool = False) -> None: ...
    async def close(self) -> None: ...


def _is_sidecars(record: Received) -> bool:
    """Tell whether a sidecar asks, not a client: Envoy gives every request an id."""
    through_envoy = header(record.headers, "x-request-id") is not None
    return record.path == "/metrics" or (record.path in ("/health", "/v1/models") and not through_envoy)


class Upstream:
    """The server, in its own thread while `with` lasts. All methods may be called from the test's thread."""

    def __init__(self, name: str = "upstream", port: int | None = None) -> None:
        self.name = name
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.metrics: str | None = None  # the page that /metrics answers; None: a vLLM page with the true numbers
        self.scrapes = 0
        self.peak = 0  # most requests that were open at once
        self._records: list[Received] = []
        self._attempts: dict[str, int] = {}
        self._open = 0
        self._releases: dict[str, asyncio.Event] = {}
        self.connections: set[Connection] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: asyncio.Server | None = None
        self.is_shut = False
        self._stopping: asyncio.Event | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"upstream-{name}", daemon=True)

    def __repr__(self) -> str:
        return f"<Upstream {self.name} {self.address}: {self._open} open of {len(self._records)}>"

    def __enter__(self) -> Upstream:
        self._thread.start()
        if not self._started.wait(PATIENCE_S):
            raise AssertionError(f"{self!r} does not listen")
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):  # the loop ended by an error of its own
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            raise AssertionError(f"{self!r} does not end")

    # What a test asks and orders

    def records(self) -> list[Received]:
        """Every request that arrived, in order, retries included."""
        return list(self._records)

    def seen(self, request_id: str) -> list[Received]:
        """Every attempt of this request that arrived: [] means that it never reached this backend."""
        return [record for record in self.records() if record.request_id == request_id]

    def wait_for(self, request_id: str, timeout_s: float = PATIENCE_S) -> Received:
        """The latest attempt of this request, once one has arrived."""
        return wait_until(lambda: self.seen(request_id), timeout_s, f"{request_id} reaches {self.name}")[-1]

    def wait_ended(self, request_id: str, timeout_s: float = PATIENCE_S) -> Received:
        """The latest attempt of this request, once it is finished, cut or aborted."""
        record = self.wait_for(request_id, timeout_s)
        wait_until(lambda: not record.open, timeout_s, f"{request_id} ends at {self.name}")
        return record

    def release(self, request_id: str) -> None:
        """Let a held answer go on; also before it arrives."""
        self._call(lambda: self._gate(request_id).set())

    def open_requests(self) -> int:
        """Requests being received or answered now."""
        return self._open

    def clear(self) -> None:
        """Forget what was recorded (open requests go on)."""
        self._records.clear()
        self.peak = self._open

    def down(self) -> None:
        """Stop listening and reset every connection: connection refused from now on."""
        self._wait(self._shut())

    def up(self) -> None:
        """Listen again, at the same port."""
        self._wait(self._listen())

    # Inside the thread

    def _call(self, work: Callable[[], None]) -> None:
        if self._loop is None:
            raise AssertionError(f"{self!r} is not started")
        self._loop.call_soon_threadsafe(work)

    def _wait(self, work: Any) -> None:
        if self._loop is None:
            raise AssertionError(f"{self!r} is not started")
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        await self._listen()
        self._started.set()
        await self._stopping.wait()
        await self._shut()

    async def _listen(self) -> None:
        self.is_shut = False
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(
                lambda: Connection(self), "127.0.0.1", self.port, backlog=1024, reuse_address=True
            )

    async def _shut(self) -> None:
        self.is_shut = True
        if self._server is not None:
            await close(self._server)
            self._server = None
        ending = list(self.connections)
        for connection in ending:
            connection.reset()
        await asyncio.gather(*(connection.gone.wait() for connection in ending))

    def _gate(self, request_id: str) -> asyncio.Event:
        return self._releases.setdefault(request_id, asyncio.Event())

    def begin(self, protocol: str, method: str, path: str, headers: Headers) -> Received:
        """Record a request whose head has arrived."""
        request_id = header(headers, ID_HEADER) or ""
        attempt = self._attempts[request_id] = self._attempts.get(request_id, 0) + 1
        record = Received(request_id, protocol, method, path, headers, time.monotonic(), attempt)
        if _is_sidecars(record):
            self.scrapes += path == "/metrics"
        else:
            self._records.append(record)
            self._open += 1
            self.peak = max(self.peak, self._open)
        return record

    def close(self, record: Received, how: str) -> None:
        """Note the end of a request, the first time only: how = finished, cut, aborted."""
        if not record.open:
            return
        setattr(record, how, True)
        record.ended_at = time.monotonic()
        if not _is_sidecars(record):
            self._open -= 1

    async def answer(self, record: Received, wire: _Wire) -> None:
        """Play the behaviour that the request asks for."""
        if _is_sidecars(record):
            shown = self.metrics if self.metrics is not None else self._metrics_page()
            page = (shown if record.path == "/metrics" else '{"object": "list", "data": []}').encode()
            await wire.head(200, [("content-type", "text/plain"), ("content-length", str(len(page)))])
            await wire.data(page)
            await wire.end([])
            self.close(record, "finished")
            return
        how = Behaviour.parse(header(record.headers, BEHAVIOUR_HEADER) or "ok")
        if how.at not in ("", self.name):
            how = Behaviour()
        if how.wait_s:
            await asyncio.sleep(how.wait_s)
        if how.hold == "head":
            await self._held(record.request_id)
        if record.attempt <= how.refuse:
            self.close(record, "cut")
            await wire.reset(as_not_begun=True)
            return
        if record.attempt <= how.fail:
            how = Behaviour("rst", events=0)
        if how.kind == "ok":
            await self._answer_whole(record, how, wire)
        elif how.kind == "empty":
            await wire.head(204, [])
        elif not await self._answer_events(record, how, wire):
            return
        trailers = [("x-trailer", "here"), ("x-test-id", record.request_id)] if how.kind == "trailers" else []
        await wire.end(trailers)
        self.close(record, "finished")

    async def _answer_whole(self, record: Received, how: Behaviour, wire: _Wire) -> None:
        headers = [("content-type", "text/plain"), ("content-length", str(how.size)), *how.reply_headers]
        await wire.head(how.status, headers)
        half = how.size // 2 if how.hold == "body" else 0
        for start in range(0, half, _PIECE_BYTES):
            await wire.data(b"x" * min(_PIECE_BYTES, half - start))
        if how.hold == "body":
            await self._held(record.request_id)
        for start in range(half, how.size, _PIECE_BYTES):
            await wire.data(b"x" * min(_PIECE_BYTES, how.size - start))

    async def _answer_events(self, record: Received, how: Behaviour, wire: _Wire) -> bool:
        """Whether the answer is to be ended well (False: it was cut)."""
        if how.events or how.kind in ("sse", "trailers"):
            headers = [("content-type", "text/event-stream"), ("cache-control", "no-cache"), *how.reply_headers]
            await wire.head(how.status, headers)
        for number in range(how.events):
            if number and how.gap_s:
                await asyncio.sleep(how.gap_s)
            await wire.data(sse_event(number))
            if number == 0 and how.hold == "body":
                await self._held(record.request_id)
            elif how.hold == "events":
                await self._held(f"{record.request_id}.{number}")
        if how.kind in ("rst", "fin"):
            self.close(record, "cut")
            await (wire.reset() if how.kind == "rst" else wire.close())
            return False
        await wire.data(SSE_DONE)
        return True

    async def _held(self, name: str) -> None:
        async with asyncio.timeout(_HOLD_LIMIT_S):
            await self._gate(name).wait()

    def _metrics_page(self) -> str:
        label = f'{{engine="0",model_name="{self.name}"}}'
        gauges = {"num_requests_running": self._open, "num_requests_waiting": 0, "kv_cache_usage_perc": 0.0}
        return "".join(f"# TYPE vllm:{name} gauge\nvllm:{name}{label} {value}\n" for name, value in gauges.items())
