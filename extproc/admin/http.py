"""The admin port: metrics, health, the queues as JSON, the live page. Read-only.

A browser on this machine may be made to ask us by a page from anywhere, so that a name of the outside world that
resolves to loopback (DNS rebinding) and requests from other sites are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CONTENT_TYPE_LATEST

from extproc.admin.connections import IDLE_S, Connections
from extproc.admin.feed import Feed
from extproc.admin.history import STEP_S
from extproc.admin.predecessor import DRAINING, taken_over
from extproc.admin.shared import Shared
from extproc.admin.state import MOST_WAITING, WAITING_LISTED, FileState, Viewer, merged
from extproc.admin.text import PIECE_BYTES, send, written
from extproc.config import split_address
from extproc.observe.recording import Recorder
from extproc.observe.stories import MOST as MOST_STORIES
from extproc.observe.stories import Stories
from extproc.tasks import Tasks
from extproc.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.typedefs import Handler

    from extproc.admin.state import Others
    from extproc.observe.capacity import Capacity
    from extproc.observe.metrics import Metrics
    from extproc.observe.paces import Paces
    from extproc.observe.served import Served
    from extproc.stream.gate import Gate

_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
MOST_DIGITS = 9
MOST_RECORDED_S = 600
MOST_WAITING_RECORDED = 10_000
"""Requests that wait when a recording begins: all are copied at once, half a second in which nobody is answered."""
STOP_S = 2.0
"""How long an answer under way may take at the end."""


class Admin:
    """The admin HTTP server."""

    def __init__(
        self,
        address: str,
        gate: Gate,
        metrics: Metrics,
        file_state: Callable[[], FileState] = FileState,
        others: Others | None = None,
        stories: Stories | None = None,
        capacity: Capacity | None = None,
        tasks: Tasks | None = None,
        paces: Paces | None = None,
        turns: Turns | None = None,
        served: Served | None = None,
    ) -> None:
        """Prepare to serve at `address`, host:port; `file_state` tells of the configuration file, `others` of other
        sidecars that share our endpoints, if any, `stories` what happened to requests, `capacity` how many engines
        they need, `paces` which of them are slow, `served` which models have none; `tasks` counts how often the
        sampling began again; what takes long is done in `turns`."""
        self._address = address
        self._gate = gate
        self._metrics = metrics
        self._stories = stories if stories is not None else Stories(gate.controller, gate.now)
        self._turns = turns = Turns() if turns is None else turns
        self._records = False
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._tasks = tasks if tasks is not None else Tasks()
        self._sampling: asyncio.Task[None] | None = None
        self._files = {
            path: (Path(__file__).with_name(name).read_bytes(), kind) for path, (name, kind) in _FILES.items()
        }
        self._others = others
        self._metrics_page, self._queues_page = Shared(), Shared()
        self.viewer = Viewer(gate, metrics, file_state, others, capacity, self._stories, paces, served, turns=turns)
        self.feed = Feed(self.view, turns)
        self.ready = False
        self.drains = False
        self.port = 0

    async def start(self) -> None:
        """Bind and serve, once a predecessor that drains has left. Raises StartError if the address can't be had."""
        host, port = split_address(self._address)
        loop = asyncio.get_running_loop()
        self.connections = Connections(self._speak, loop)
        guards = [_only_local] if _is_loopback(host) else []
        app = web.Application(middlewares=[self.connections.note, *guards])
        app.on_response_prepare.append(_add_headers)
        for path in self._files:
            app.router.add_get(path, self._file)
        app.router.add_get("/events", self.feed.subscribe, allow_head=False)
        app.router.add_get("/metrics", self._prometheus)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/queues", self._queues)
        app.router.add_get("/debug/requests/{id}", self._story)
        app.router.add_get("/debug/recording", self._recording, allow_head=False)
        self._runner = web.AppRunner(
            app,
            logger=_log,
            access_log=None,
            shutdown_timeout=STOP_S,
            keepalive_timeout=IDLE_S,
            handler_cancellation=True,
        )
        await self._runner.setup()
        self._server = await taken_over(self._address, lambda: loop.create_server(self.connections, host, port))
        self.port = self._server.sockets[0].getsockname()[1]
        self._sampling = self._tasks.keep("admin history", "admin history", self._sample)

    async def stop(self) -> None:
        """Stop serving."""
        if self._sampling is not None:
            self._sampling.cancel()
            await asyncio.gather(self._sampling, return_exceptions=True)
        if self._server is not None:
            self._server.close()
        await self.feed.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def snapshot(self, limit: int = WAITING_LISTED) -> dict[str, Any]:
        """Return the state of all queues as plain values, as /queues has it."""
        return await self.viewer.queues(ready=self.ready, limit=limit)

    async def view(self) -> dict[str, Any]:
        """Return what the live page and `extproc top` show."""
        own = await self.viewer.view(ready=self.ready)
        return own if self._others is None else self._merged(own, await self._others.whole("view", WAITING_LISTED))

    def _merged(self, own: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
        return merged(own, whole, self.viewer.refused()) if whole else own

    async def describe(self, what: str, limit: int) -> dict[str, Any]:
        """Return what we show ourselves, for a sidecar whose requests we decide, too."""
        return await self.viewer.view(ready=self.ready) if what == "view" else await self.snapshot(limit)

    def _speak(self) -> asyncio.Protocol:
        """Return aiohttp's side of a new connection."""
        server = self._runner.server if self._runner is not None else None
        assert server is not None  # noqa: S101 - the runner is set up before anybody can connect
        return server()

    async def _sample(self) -> None:
        while True:
            async for _ in self._turns.each(self.viewer.samples()):
                pass
            await asyncio.sleep(STEP_S)

    async def _file(self, request: web.Request) -> web.Response:
        body, kind = self._files[request.path]
        return web.Response(body=body, content_type=kind, charset="utf-8")

    async def _prometheus(self, request: web.Request) -> web.StreamResponse:
        body = await self._metrics_page.page(self._write_metrics)
        return await self._answer(request, body, CONTENT_TYPE_LATEST)

    async def _answer(self, request: web.Request, body: bytes, content_type: str) -> web.StreamResponse:
        """Answer with a page that may be long, sent in turns of the loop."""
        if request.method == "HEAD" or len(body) <= PIECE_BYTES:
            return web.Response(body=body, headers={"content-type": content_type})
        response = web.StreamResponse(headers={"content-type": content_type})
        response.content_length = len(body)
        await response.prepare(request)
        await send(response, body, self._turns)
        await response.write_eof()
        return response

    async def _write_metrics(self) -> bytes:
        return b"".join([piece async for piece in self._turns.each(self._metrics.pieces())])

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        if self.ready:
            return web.Response(text="ready\n")
        return web.Response(status=503, text=DRAINING if self.drains else "not ready: starting\n")

    async def _queues(self, request: web.Request) -> web.StreamResponse:
        limit = _number(request.query.get("limit", str(WAITING_LISTED)), 0, MOST_WAITING)
        if limit is None:
            text = f"limit: must be a number from 0 to {MOST_WAITING}: how many requests to list, waiting and running\n"
            return web.Response(status=400, text=text)
        body = await self._queues_page.page(lambda: self._write_queues(limit), limit)
        return await self._answer(request, body, "application/json; charset=utf-8")

    async def _write_queues(self, limit: int) -> bytes:
        whole = {} if self._others is None else await self._others.whole("queues", limit)
        return await written(self._merged(await self.snapshot(limit), whole), self._turns)

    async def _story(self, request: web.Request) -> web.Response:
        asked = request.match_info["id"]
        lines = self._stories.tell(asked, time.time())
        if lines is None:
            text = f"No request {asked!r} waits, nor was among the last {MOST_STORIES} that were decided here.\n"
            if self._others is not None:
                text += "Another sidecar may have taken it in: ask the one that it came through.\n"
            return web.Response(status=404, text=text)
        return web.Response(text="\n".join([*lines, ""]))

    async def _recording(self, request: web.Request) -> web.Response:
        seconds = _number(request.query.get("seconds", "30"), 1, MOST_RECORDED_S)
        if seconds is None:
            text = f"seconds: must be a number from 1 to {MOST_RECORDED_S}: how long to record\n"
            return web.Response(status=400, text=text)
        if self._records:
            return web.Response(status=409, text="A recording is under way already.\n")
        if self._gate.waiting > MOST_WAITING_RECORDED:
            text = f"{self._gate.waiting} requests wait: to copy over {MOST_WAITING_RECORDED} would stop us too long.\n"
            return web.Response(status=503, text=text)
        core, full = self._gate.controller, asyncio.Event()
        recorder = Recorder(core, full.set)
        core.watch(recorder.happened)
        self._records = True
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(full.wait(), seconds)
        finally:
            core.unwatch(recorder.happened)
            self._records = False
        return web.Response(text=recorder.text(), content_type="application/x-ndjson")


def _number(asked: str, least: int, most: int) -> int | None:
    """Return the whole number that somebody asked for; None: it is none, or not within these bounds."""
    number = int(asked) if asked.isascii() and asked.isdigit() and len(asked) <= MOST_DIGITS else -1
    return number if least <= number <= most else None


class _Spoken(logging.Filter):
    """Keeps out of the log what is no HTTP: whoever scans ports, or takes ours for another, would fill it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line is about something else."""
        return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


_log = logging.getLogger("extproc.admin.http")
_log.addFilter(_Spoken())


@web.middleware
async def _only_local(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what a page of another site may have caused; for a server on loopback."""
    host = request.headers.get("host", "")
    if host and not _is_local_name(host):
        text = "This port answers to an IP address or localhost as host alone, for fear of DNS rebinding.\n"
        return web.Response(status=403, text=text)
    strange = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
    if strange and request.headers.get("sec-fetch-mode") != "navigate":
        return web.Response(status=403, text="This port answers no requests from pages of other sites.\n")
    return await handler(request)


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"


def _is_local_name(host: str) -> bool:
    """Tell whether no DNS server can have made up the host of a Host header: an address, or a name of this machine."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    with contextlib.suppress(ValueError):
        return bool(ip_address(name))
    return name.lower() == "localhost" or name.lower().endswith(".localhost")
