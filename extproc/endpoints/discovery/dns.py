"""DNS: every address of a name is an endpoint."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from typing import TYPE_CHECKING

from extproc.endpoints.names import address_of, name_of, of_family

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from extproc.config import DnsConfig, EndpointConfig

    Resolve = Callable[[str, int], Awaitable[list[str]]]

log = logging.getLogger("extproc.discovery.dns")


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of `host`, as host:port. Raises OSError, also if there is none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [address_of(str(address[0]), port) for _, _, _, _, address in found]


class Dns:
    """Looks a name up every `interval`."""

    def __init__(self, config: DnsConfig, lookup: Resolve = resolve) -> None:
        """Look up what `config` says, with `lookup`."""
        self._config = config
        self._lookup = lookup

    async def run(self, report: Callable[[Sequence[EndpointConfig]], None]) -> None:
        """Look for ever. A failed or empty answer is never reported: no DNS server can take all endpoints away."""
        config, failing = self._config, False
        ports = [config.port] if config.ports is None else config.ports
        while True:
            try:
                found = [address for port in ports if port for address in await self._lookup(config.name, port)]
                addresses = sorted(set(of_family(found, config.family)))
            except OSError as error:
                addresses = []
                if not failing:
                    log.warning("dns %s: can't be looked up: %s; keeping the last answer", config.name, error)
            if addresses:
                report([config.endpoint(name_of(address), address) for address in addresses])
            failing = not addresses
            await asyncio.sleep(config.interval * random.uniform(0.9, 1.1))  # noqa: S311 - keeps replicas apart
