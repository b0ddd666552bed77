"""The admin port: metrics, health, the queues as JSON, the live page. Read-only."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from extproc.config import split_address
from extproc.errors import StartError
from extproc.observe.metrics import SHARED, known_signals

if TYPE_CHECKING:
    from extproc.admission.ticket import Ticket
    from extproc.gate import Gate
    from extproc.observe.metrics import Metrics

MOST_WAITING = 200
"""Waiting requests listed in full by /queues; the counts are always of all."""
_PAGE = Path(__file__).with_name("page.html")


class Admin:
    """The admin HTTP server."""

    def __init__(self, address: str, gate: Gate, metrics: Metrics) -> None:
        """Prepare to serve at `address`, host:port."""
        self._address = address
        self._gate = gate
        self._metrics = metrics
        self._runner: web.AppRunner | None = None
        self.ready = False
        self.port = 0

    async def start(self) -> None:
        """Bind and serve. Raises StartError if the address can't be had."""
        app = web.Application()
        app.router.add_get("/", self._page)
        app.router.add_get("/metrics", self._prometheus)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/queues", self._queues)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        host, port = split_address(self._address)
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            raise StartError(f"admin: can't bind {self._address}: {error.strerror}") from None
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop serving."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _page(self, _: web.Request) -> web.StreamResponse:
        return web.FileResponse(_PAGE, headers={"content-type": "text/html; charset=utf-8"})

    async def _prometheus(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        if self.ready:
            return web.Response(text="ready\n")
        return web.Response(status=503, text="not ready: starting or draining\n")

    async def _queues(self, _: web.Request) -> web.Response:
        return web.json_response(self.snapshot())

    def snapshot(self) -> dict[str, object]:
        """Return the state of all queues as plain values."""
        controller, now = self._gate.controller, self._gate.now()
        at_home: dict[str, int] = {}
        for pool in controller.pools():
            for home, queue in pool.homes.items():
                at_home[home.name] = at_home.get(home.name, 0) + len(queue)
        by_class = {klass.name: 0 for klass in controller.policy.classes}
        for pool in controller.pools():
            for klass, count in pool.waiting.items():
                by_class[klass.name] = by_class.get(klass.name, 0) + count
        return {
            "enable_queue": controller.policy.enable_queue,
            "draining": controller.draining or not self.ready,
            "endpoints": [
                {
                    "name": endpoint.name,
                    "cluster": endpoint.spec.cluster,
                    "models": sorted(endpoint.spec.models),
                    "up": endpoint.available,
                    "in_flight": len(endpoint.leases),
                    "limit": endpoint.limit.value,
                    "kv_tokens": endpoint.kv_tokens,
                    "kv_capacity_tokens": endpoint.kv_capacity,
                    "waiting": at_home.get(endpoint.name, 0),
                    "dispatched": endpoint.dispatched,
                    "load": known_signals(endpoint.load),
                    **self._age_of(endpoint.name),
                }
                for endpoint in controller.endpoints.values()
            ],
            "waiting_total": controller.waiting,
            "waiting_by_class": by_class,
            "waiting": [_row(ticket, now) for ticket in islice(controller.waiting_tickets(), MOST_WAITING)],
            "outcomes": self._outcomes(),
        }

    def _age_of(self, name: str) -> dict[str, float]:
        age_s = self._metrics.age_s(name)
        return {} if age_s is None else {"telemetry_age_s": round(age_s, 3)}

    def _outcomes(self) -> dict[str, int]:
        totals: dict[str, int] = {}
        for (outcome, _), count in self._metrics.outcomes.items():
            totals[outcome.value] = totals.get(outcome.value, 0) + count
        return totals


def _row(ticket: Ticket, now: float) -> dict[str, object]:
    pool = ticket.pool
    shared = pool is None or ticket.queue is pool.shared
    return {
        "id": ticket.request.id,
        "model": ticket.request.model,
        "class": ticket.request_class.name,
        "age_s": round(now - ticket.request.arrived, 3),
        "budget_left_s": round(ticket.wait_until - now, 3),
        "home": ticket.home.name if ticket.home is not None else None,
        "queue": SHARED if shared or ticket.home is None else ticket.home.name,
        "position": ticket.position,
    }
