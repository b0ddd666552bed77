"""The sidecar's life, top down: build, start, run, drain. The composition root: nothing else knows all parts."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING

from extproc.admin.http import Admin
from extproc.admission.controller import Controller
from extproc.admission.rehearsal import Rehearsal
from extproc.ages import Ages
from extproc.gate import Gate
from extproc.observe.metrics import Metrics
from extproc.server import Server
from extproc.session import Desk

if TYPE_CHECKING:
    from extproc.config import Config

log = logging.getLogger("extproc.app")

POLL_S = 0.05
HEALTH_SEEN_S = 1.0
"""How long Envoy is given to notice that we want no new requests (its health check interval in our config)."""


class App:
    """One sidecar."""

    def __init__(self, config: Config, loop: asyncio.AbstractEventLoop) -> None:
        """Build all parts of a sidecar that will run on `loop`."""
        self.config = config
        controller = Rehearsal(config.policy()) if config.dry_run else Controller(config.policy())
        self.metrics = Metrics(controller, lambda: self.desk.streams)
        self.gate = Gate(controller, loop, [self.metrics])
        self.desk = Desk(self.gate, config.header_names(), Ages(config.longest_budget_s))
        for spec in config.endpoint_specs():
            self.desk.put_cluster(spec.name, spec.cluster)
            self.gate.put_endpoint(spec)
        self.server = Server(self.desk, config.listen, reflect=config.reflection)
        self.admin = Admin(config.admin, self.gate, self.metrics)

    async def start(self) -> None:
        """Bind and serve. Raises StartError, with nothing left running."""
        await self.admin.start()
        try:
            await self.server.start()
        except BaseException:
            await self.admin.stop()
            raise
        self.admin.ready = True
        config = self.config
        log.info(
            "serving ext_proc at %s, admin at http://%s, %d endpoints, queue %s",
            config.listen,
            config.admin,
            len(config.endpoints),
            "on" if config.enable_queue else "off",
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain. A second signal cuts the drain short."""
        await self.start()
        loop = asyncio.get_running_loop()
        stop, hurry = asyncio.Event(), asyncio.Event()

        def on_signal() -> None:
            (hurry if stop.is_set() else stop).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        await stop.wait()
        await self.drain(hurry)

    async def drain(self, hurry: asyncio.Event) -> None:
        """Take no new requests; place or refuse those that wait; let answers run out; all within drain_timeout."""
        self.admin.ready = False
        await self.server.refuse_new()
        grace_s = self.config.drain_timeout
        deadline = self.gate.now() + grace_s
        controller = self.gate.controller
        log.info("draining: %d waiting, %d streams, at most %gs", controller.waiting, self.desk.streams, grace_s)
        seen = self.gate.now() + min(HEALTH_SEEN_S, grace_s / 2)
        while not hurry.is_set() and self.gate.now() < deadline - min(1.0, grace_s / 4):
            if controller.waiting == 0 and self.gate.now() >= seen:
                break
            await asyncio.sleep(POLL_S)
        self.gate.drain()
        await asyncio.sleep(POLL_S)  # lets the refusals go out before the port closes
        await self.server.stop(0 if hurry.is_set() else max(deadline - self.gate.now(), POLL_S))
        await self.admin.stop()
        log.info("stopped")
