"""The file through which Envoy learns of endpoints' clusters, and how we learn that it has.

Envoy follows the file by inotify and knows a cluster of an IP address 2 ms after the rename (measured on 1.40), one of
a host name when its first DNS answer is there. Until then a request steered to it gets 503, flag NC.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import yaml

from extproc.endpoints.names import address_of
from extproc.envoy.bootstrap import render_clusters

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from extproc.config import Config

log = logging.getLogger("extproc.discovery.clusters")

SETTLE_S = 1.0
"""Without a word from Envoy: how long after the write it is taken to know."""
GIVE_UP_S = 10.0
"""With an admin address that doesn't answer: the same."""
ASK_S = 1.0
_VERSION = re.compile(r'^cluster_manager\.cds\.version_text: "(\d+)"$', re.MULTILINE)
_WARMING = re.compile(r"^cluster_manager\.warming_clusters: (\d+)$", re.MULTILINE)


class ClustersFile:
    """One clusters file, replaced whole by a rename."""

    def __init__(self, path: str) -> None:
        """Write to `path`, an absolute one."""
        self._path = Path(path)
        self._version = 0

    def read(self) -> dict[str, str] | None:
        """Return what a sidecar before us wrote, cluster -> address; None: there is no file."""
        try:
            resources = yaml.safe_load(self._path.read_text(encoding="utf-8"))["resources"]
            hosts = [
                (resource["name"], endpoint["endpoint"]["address"]["socket_address"])
                for resource in resources
                for endpoint in resource["load_assignment"]["endpoints"][0]["lb_endpoints"]
                if resource.get("lb_policy") is None
            ]
            return {name: address_of(host["address"], host["port_value"]) for name, host in hosts}
        except FileNotFoundError:
            return None
        except (OSError, yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
            log.warning("%s can't be read (%r); writing it anew", self._path, error)
            return {}

    def write(self, routes: Mapping[str, str], addresses: Iterable[str], config: Config) -> int:
        """Write `routes`, cluster -> address, and return the version of this write. Raises OSError."""
        self._version = max(self._version + 1, int(time.time() * 1000))  # rises over restarts too
        fresh = self._path.with_name(f".{self._path.name}.new")
        fresh.write_text(render_clusters(routes, addresses, self._version, config), encoding="utf-8")
        fresh.chmod(0o644)  # Envoy may run as somebody else
        fresh.replace(self._path)
        return self._version


class EnvoyAdmin:
    """Asks one Envoy which version of the clusters file it follows."""

    def __init__(self, address: str) -> None:
        """Ask at `address`, host:port."""
        self._url = f"http://{address}/stats"

    async def version(self) -> int | None:
        """Return the version whose clusters all can be used; None: no answer, or some still warm up."""
        query = {"filter": r"^cluster_manager\.(cds\.version_text|warming_clusters)$"}
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ASK_S)) as client,
                client.get(self._url, params=query) as response,
            ):
                page = await response.text()
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
            return None
        version, warming = _VERSION.search(page), _WARMING.search(page)
        if version is None or warming is None or warming[1] != "0":
            return None
        return int(version[1])
