"""What a source of endpoints is, and the tasks that run the sources of a configuration."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from operator import eq
from typing import TYPE_CHECKING, Protocol

from extproc.config import DnsConfig, KubernetesConfig
from extproc.endpoints.discovery.dns import Dns
from extproc.endpoints.discovery.inference_pool import InferencePool
from extproc.endpoints.discovery.kubernetes import Kubernetes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from extproc.config import EndpointConfig, SourceConfig

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

    def __init__(
        self,
        report: Callable[[str, Sequence[EndpointConfig] | None], None],
        rank: Callable[[Mapping[str, int]], None] = lambda _priorities: None,
    ) -> None:
        """Report as `report(source, endpoints)`; None: the source is gone, and with it what it saw.

        `rank` is told the priorities of an InferencePool's objectives, by name.
        """
        self._report = report
        self._rank = rank
        self.left_out = 0
        """Items seen that make no endpoint."""
        self._running: dict[str, tuple[SourceConfig, asyncio.Task[None]]] = {}
        self._seen: dict[str, Sequence[EndpointConfig]] = {}
        self._first: dict[str, asyncio.Event] = {}

    def configure(self, wanted: Sequence[SourceConfig]) -> None:
        """Run these sources. A changed one keeps what was seen until it has seen something itself: with what is said of
        it now, if it looks where it did, since that may take until an API server is back."""
        named = self._named(wanted)
        for name in [name for name in self._running if name not in named]:
            self._running.pop(name)[1].cancel()
            self._seen.pop(name, None)
            self._report(name, None)
        for name, config in named.items():
            known = self._running.get(name)
            if known is not None and known[0] == config:
                continue
            if known is not None:
                known[1].cancel()
                if name in self._seen and _looks_alike(known[0], config):
                    self._see(name, [config.endpoint(one.name, one.address) for one in self._seen[name]])
            first = self._first.setdefault(name, asyncio.Event())
            task = asyncio.get_running_loop().create_task(
                self._run(name, _source_of(config, self._leave_out, self._rank), first), name=name
            )
            self._running[name] = (config, task)

    def _named(self, wanted: Sequence[SourceConfig]) -> dict[str, SourceConfig]:
        """Name each. One that runs already, or looks where one does, has the name of that one: what another saw, which
        may be gone from the file, is never taken for what it sees."""
        named: dict[str, SourceConfig] = {}
        rest = list(wanted)
        for is_it in (eq, _looks_alike):
            for config in tuple(rest):
                alike = [name for name, (known, _) in self._running.items() if is_it(known, config)]
                name = next((name for name in alike if name not in named), None)
                if name is not None:
                    named[name] = config
                    rest.remove(config)
        for config in rest:
            name = _name_of(config)
            while name in named:
                name += "+"
            named[name] = config
        return named

    def _see(self, name: str, endpoints: Sequence[EndpointConfig]) -> None:
        self._seen[name] = endpoints
        self._report(name, endpoints)

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
            self._see(name, endpoints[:MOST])
            first.set()

        while True:
            try:
                await source.run(report)
            except Exception:  # a bug in here must not end discovery for ever
                log.exception("%s: failed; starting again", name)
            await asyncio.sleep(RESTART_S * random.uniform(0.5, 1.5))  # noqa: S311 - spreads load, hides nothing


def _looks_alike(one: SourceConfig, other: SourceConfig) -> bool:
    """Tell whether two find the same endpoints, whatever they say of them."""
    return type(one) is type(other) and one.place == other.place


def _source_of(
    config: SourceConfig, leave_out: Callable[[int], None], rank: Callable[[Mapping[str, int]], None]
) -> Source:
    match config:
        case DnsConfig():
            return Dns(config)
        case KubernetesConfig():
            return Kubernetes(config, leave_out=leave_out)
        case _:
            return InferencePool(config, leave_out=leave_out, rank=rank)


def _name_of(config: SourceConfig) -> str:
    match config:
        case DnsConfig():
            ports = [config.port] if config.ports is None else config.ports
            return f"dns {config.name}:{','.join(map(str, ports))}"
        case KubernetesConfig():
            return f"kubernetes {config.namespace or ''}/{config.service or config.selector}"
        case _:
            return f"inference pool {config.namespace or ''}/{config.name}"
