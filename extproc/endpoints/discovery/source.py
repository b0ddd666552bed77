"""What a source of endpoints is, and the tasks that run the sources of a configuration."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import TYPE_CHECKING, Protocol

from extproc.endpoints.discovery.dns import Dns
from extproc.endpoints.discovery.kubernetes import Kubernetes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.config import DiscoveryConfig, EndpointConfig

log = logging.getLogger("extproc.discovery")

RESTART_S = 5.0
MOST = 1000
"""Endpoints taken from one source: labels of metrics and Envoy clusters come from them."""


class Source(Protocol):
    """Somebody who sees endpoints."""

    async def run(self, report: Callable[[Sequence[EndpointConfig]], None]) -> None:
        """Look for ever. Report all endpoints seen, each time that they may have changed; never on a failure."""


class Sources:
    """The running sources of a configuration."""

    def __init__(self, report: Callable[[str, Sequence[EndpointConfig] | None], None]) -> None:
        """Report as `report(source, endpoints)`; None: the source is gone, and with it what it saw."""
        self._report = report
        self.left_out = 0
        """Items seen that make no endpoint."""
        self._running: dict[str, tuple[DiscoveryConfig, asyncio.Task[None]]] = {}
        self._first: dict[str, asyncio.Event] = {}

    def configure(self, wanted: Sequence[DiscoveryConfig]) -> None:
        """Run these sources. A changed one keeps what was seen until it has seen something itself."""
        named: dict[str, DiscoveryConfig] = {}
        for config in wanted:
            name = _name_of(config)
            while name in named:
                name += "+"
            named[name] = config
        for name in [name for name in self._running if name not in named]:
            self._running.pop(name)[1].cancel()
            self._report(name, None)
        for name, config in named.items():
            known = self._running.get(name)
            if known is not None and known[0] == config:
                continue
            if known is not None:
                known[1].cancel()
            first = self._first.setdefault(name, asyncio.Event())
            task = asyncio.get_running_loop().create_task(
                self._run(name, _source_of(config, self._leave_out), first), name=name
            )
            self._running[name] = (config, task)

    def _leave_out(self, number: int) -> None:
        self.left_out += number

    async def wait_first(self, timeout_s: float) -> None:
        """Wait until each source has seen something, but not for ever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for name in list(self._running):
                    await self._first[name].wait()
        for name in self._running:
            if not self._first[name].is_set():
                log.warning("%s: nothing seen in %gs; serving without it until it is", name, timeout_s)

    async def stop(self) -> None:
        """End all sources; what they saw stays."""
        tasks = [task for _, task in self._running.values()]
        self._running.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, name: str, source: Source, first: asyncio.Event) -> None:
        def report(endpoints: Sequence[EndpointConfig]) -> None:
            if len(endpoints) > MOST:
                log.error("%s: sees %d endpoints; only the first %d are used", name, len(endpoints), MOST)
            self._report(name, endpoints[:MOST])
            first.set()

        while True:
            try:
                await source.run(report)
            except Exception:  # a bug in here must not end discovery for ever
                log.exception("%s: failed; starting again", name)
            await asyncio.sleep(RESTART_S * random.uniform(0.5, 1.5))  # noqa: S311 - spreads load, hides nothing


def _source_of(config: DiscoveryConfig, leave_out: Callable[[int], None]) -> Source:
    if config.dns is not None:
        return Dns(config.dns)
    assert config.kubernetes is not None  # noqa: S101 - the config was checked
    return Kubernetes(config.kubernetes, leave_out=leave_out)


def _name_of(config: DiscoveryConfig) -> str:
    if config.dns is not None:
        ports = [config.dns.port] if config.dns.ports is None else config.dns.ports
        return f"dns {config.dns.name}:{','.join(map(str, ports))}"
    found = config.kubernetes
    return f"kubernetes {found.namespace or ''}/{found.service or found.selector}" if found is not None else ""
