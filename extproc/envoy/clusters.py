"""The file through which Envoy learns of endpoints' clusters, and how we learn that it has.

Envoy follows the file by inotify and knows a cluster of an IP address 2 ms after the rename (measured on 1.40), one of
a host name when its first DNS answer is there. Until then a request steered to it gets 503, flag NC.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import yaml

from extproc.config.types import is_ours, split_address
from extproc.endpoints.names import address_of
from extproc.envoy.upstreams import render_clusters
from extproc.files import read_regular

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


MOST_BYTES = 16 << 20
_NOT_OURS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""What comes of reading a file that somebody else wrote, or half of one."""


class ClustersFile:
    """One clusters file, replaced whole by a rename."""

    def __init__(self, path: str) -> None:
        """Write to `path`, an absolute one."""
        self._path = Path(path)
        self._version = 0

    def read(self) -> dict[str, str] | None:
        """Return what a sidecar before us wrote, cluster -> address; None: there is no file."""
        try:
            resources = yaml.safe_load(read_regular(self._path, MOST_BYTES).decode())["resources"]
            hosts = [
                (resource["name"], endpoint["endpoint"]["address"]["socket_address"])
                for resource in resources
                for endpoint in resource["load_assignment"]["endpoints"][0]["lb_endpoints"]
                if resource.get("lb_policy") is None
            ]
            return dict(_route(name, host) for name, host in hosts)
        except FileNotFoundError:
            return None
        except (OSError, *_NOT_OURS) as error:
            log.warning(
                "%s is not as we write it (%s: %.200s); writing it anew", self._path, type(error).__name__, error
            )
            return {}

    def write(self, routes: Mapping[str, str], addresses: Iterable[str], config: Config) -> int:
        """Write `routes`, cluster -> address, and return the version of this write. Raises OSError."""
        self._version = max(self._version + 1, int(time.time() * 1000))  # rises over restarts too
        fresh = self._path.with_name(f".{self._path.name}.new")
        text = render_clusters(routes, addresses, self._version, config)
        try:
            mode = stat.S_IMODE(self._path.lstat().st_mode)  # whoever narrowed it meant it
        except FileNotFoundError:
            mode = 0o644  # Envoy may run as somebody else
        fresh.unlink(missing_ok=True)  # of a write that was cut off; a link there would lead elsewhere
        number = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(number, mode)
        fresh.replace(self._path)
        return self._version


def _route(name: object, host: Mapping[str, object]) -> tuple[str, str]:
    """Return a cluster and its address, as the roster names clusters. Raises what `_NOT_OURS` lists."""
    cluster, address = _word(name), address_of(_word(host["address"]), _port(host["port_value"]))
    split_address(address)
    own, at, of = cluster.partition("@")
    if (of != address) if at else is_ours(own):
        raise ValueError(f"{cluster!r:.100} is no cluster of {address}")
    return cluster, address


def _word(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} is no text")
    return value


def _port(value: object) -> int:
    if not isinstance(value, int) or not 0 < value < 65536:
        raise TypeError(f"{value!r:.100} is no port")
    return value


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
