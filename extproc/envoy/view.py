"""What the rules of `extproc check --envoy` look at: parts of an Envoy bootstrap and their paths."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

import yaml

from extproc.config import Config, split_address
from extproc.config.read import YAML_ERRORS, one_line
from extproc.config.types import shown
from extproc.durations import parse_duration
from extproc.envoy import dump, fallback
from extproc.envoy.upstreams import ANY_CLUSTER, UNQUEUED_CLUSTER
from extproc.errors import ConfigError
from extproc.files import read_text

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping
    from pathlib import Path

EXT_PROC = "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor"
DYNAMIC = {"rds": "RDS", "scoped_routes": "SRDS"}
"""Where a connection manager gets routes that are not in the bootstrap."""

_NUMBERS = frozenset(
    (
        *("num_retries", "max_requests", "max_connections", "max_pending_requests", "max_retries"),
        *("max_outbound_control_frames", "port_value"),
    )
)
"""Fields that rules compare."""
_DURATIONS = frozenset(
    (
        *("message_timeout", "stream_idle_timeout", "idle_timeout", "request_timeout", "timeout"),
        *("per_try_timeout", "per_try_idle_timeout", "base_interval", "max_interval"),
    )
)
"""Times that rules compare."""
_NAME = re.compile(r"\[[^]]*\]")
"""In a path: the number of a part, or its name, which may be any words."""
_FREE = re.compile(r"metadata|filter_context|\.value\b|\.typed_struct")
"""In the path of what is a free structure: its keys are no fields of Envoy's."""
_CLUSTER = ("grpc_service", "envoy_grpc", "cluster_name")
_LISTED = re.compile(r"(^|\.)clusters\[[^]]*\]$")
_DURATION = re.compile(r"\d+(\.\d{1,9})?s")
_TOP = {"static_resources", "dynamic_resources", "configs"}

Address = tuple[str, int]
"""Host and port, or `unix:PATH` and 0."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A part of the bootstrap and its path."""

    path: str
    node: dict[str, Any]

    def get(self, *keys: str) -> Any:
        """Return what is under `keys`, or None."""
        node: Any = self.node
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def seconds(self, key: str, default: float) -> float:
        """Return the duration under `key`."""
        value = self.node.get(key)
        seconds = parse_duration(str(value)) if value is not None else None
        return default if seconds is None else seconds

    def each(self, *keys: str) -> list[Spot]:
        """Return the parts in the list under `keys`."""
        found = self.get(*keys)
        path = ".".join((self.path, *keys))
        parts = enumerate(found if isinstance(found, list) else [])
        return [Spot(f"{path}[{index}]", part) for index, part in parts if isinstance(part, dict)]


@dataclass(frozen=True, slots=True)
class View:
    """The parts that rules look at. `filter` is the typed_config of the ext_proc filter in `listed`."""

    config: Config
    manager: Spot
    listed: Spot
    filter: Spot
    hosts: list[Spot]
    routes: list[Spot]
    clusters: dict[str, Spot]
    static_routes: bool
    static_clusters: bool

    @property
    def longest_s(self) -> float:
        return self.config.longest_budget_s

    @property
    def steered(self) -> list[Spot]:
        header = self.config.headers.cluster
        return [
            route
            for route in self.routes
            if route.get("route", "cluster_header") == header and not fallback.is_route(route.get("match") or {})
        ]

    def filters_of_ours(self) -> list[Spot]:
        """Return the filters of its manager that ask the same cluster, itself among them."""
        name, found = self.filter.get(*_CLUSTER), self.manager.each("http_filters")
        return [listed for listed in found if holds(listed) and listed.get("typed_config", *_CLUSTER) == name]

    @property
    def sidecar_cluster(self) -> Spot | None:
        return self.clusters.get(str(self.filter.get(*_CLUSTER)))


def holds(listed: Spot) -> bool:
    """Tell whether an HTTP filter is an ext_proc that can hold requests."""
    own = listed.get("typed_config") or {}
    return own.get("@type") == EXT_PROC and not own.get("observability_mode")


def walk(node: Any, where: str = "") -> Iterator[Spot]:
    """Yield all parts of a bootstrap, the outer ones first."""
    if isinstance(node, dict):
        yield Spot(where, node)
        for key, value in node.items():
            yield from walk(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from walk(value, f"{where}[{index}]")


def _loaded(text: str) -> Any:
    """Return what YAML or JSON says; a dump of megabytes is JSON, and takes YAML's parser minutes."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def read_parts(path: Path) -> tuple[Any, list[Spot]]:
    """Return what the YAML or JSON at `path` says, and all its parts. Raises ConfigError if it is neither.

    A config dump is told as a bootstrap that holds all that the dump has; its listeners and clusters go by their names.
    """
    try:
        data = _loaded(read_text(path))
        if not dump.is_dump(data):
            return data, list(walk(data))  # one that is a part of itself has no end
    except YAML_ERRORS as error:
        raise ConfigError(str(path), ["is no valid YAML: " + one_line(error)]) from None
    with told_if_misshapen(path):
        data = dump.as_bootstrap(data)
        return data, [Spot(dump.named(spot.path, data), spot.node) for spot in walk(data)]


@contextlib.contextmanager
def told_if_misshapen(path: Path) -> Generator[None, None, None]:
    """Say it of a file that has text where Envoy wants a map, and the like: Envoy would not take it either."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        problem = f"is not shaped like an Envoy bootstrap: `envoy --mode validate -c {path}` says where"
        raise ConfigError(str(path), [problem]) from error


def read_numbers(spots: list[Spot]) -> list[str]:
    """Return a problem for each number, and each time, that is none to Envoy.

    Text that Envoy reads as a number becomes one, and what is null is as if it were not there.
    """
    problems = []
    for spot in (spot for spot in spots if not _FREE.search(_NAME.sub("", spot.path))):
        for key in _NUMBERS & spot.node.keys():
            value = spot.node[key]
            if value is None:
                del spot.node[key]
            elif isinstance(value, str) and value.isascii() and value.isdigit():
                spot.node[key] = int(value)
            elif not isinstance(value, int) or isinstance(value, bool):
                problems.append(f"{spot.path}.{key}: must be a whole number, not {shown(value)}")
        for key in _DURATIONS & spot.node.keys():
            value = spot.node[key]
            if not isinstance(value, (str, dict, type(None))) or (
                isinstance(value, str) and not _DURATION.fullmatch(value)
            ):
                problems.append(
                    f"{spot.path}.{key}: must be a duration as Envoy reads it, like 60s, not {shown(value)}"
                )
    return sorted(problems)


def what_else(data: Any) -> str | None:
    """Say what a file is that is surely neither a bootstrap nor a dump; None: it may be one."""
    if data is None:
        return "it is empty"
    if not isinstance(data, (dict, list)):
        return f"it is the text {shown(data)}" if isinstance(data, str) else f"it is {shown(data)}"
    if isinstance(data, dict) and not _TOP & data.keys():
        for key in data:
            if key in Config.model_fields and key != "admin":
                return f"with {key!r} it looks like a configuration of the sidecar"
    return None


def clusters_of(spots: list[Spot]) -> dict[str, Spot]:
    """Return the clusters by name."""
    found = (spot for spot in spots if _LISTED.search(spot.path))
    return {str(spot.node.get("name")): spot for spot in found if ".weighted_clusters." not in spot.path}


def views(config: Config, spots: list[Spot]) -> Iterator[View]:
    """Yield each ext_proc filter that can hold requests, with what belongs to it."""
    clusters = clusters_of(spots)
    for manager in (spot for spot in spots if "http_filters" in spot.node):
        inside = [spot for spot in spots if spot.path.startswith(manager.path + ".")]
        for listed in manager.each("http_filters"):
            if holds(listed):
                yield View(
                    config,
                    manager,
                    listed,
                    Spot(f"{listed.path}.typed_config", listed.get("typed_config")),
                    hosts=[other for other in inside if "virtual_hosts[" in other.path.rsplit(".", 1)[-1]],
                    routes=[other for other in inside if "match" in other.node and "routes[" in other.path],
                    clusters=clusters,
                    static_routes=not any(key in manager.node for key in DYNAMIC),
                    static_clusters=not any("cds_config" in other.node for other in spots),
                )


def hosts_of(cluster: Spot) -> list[Address] | None:
    """Return a cluster's addresses as they are written; None if they are not in the bootstrap."""
    if cluster.get("type") in ("EDS", "ORIGINAL_DST") or cluster.get("load_assignment") is None:
        return None
    found: list[Address] = []
    for spot in walk(cluster.get("load_assignment")):
        if isinstance(spot.get("endpoint", "address"), dict):
            pipe = spot.get("endpoint", "address", "pipe", "path")
            socket = spot.get("endpoint", "address", "socket_address") or {}
            host, port = str(socket.get("address")).lower(), socket.get("port_value")
            found.append((host, port if isinstance(port, int) else 0) if pipe is None else (f"unix:{pipe}", 0))
    return found


def parse(address: str) -> Address:
    """Return `host:port` or `unix:PATH` of the configuration in the form of `hosts_of`."""
    return (address, 0) if address.startswith("unix:") else split_address(address)


def written(address: Address) -> str:
    """Return an address as a person writes it."""
    host, port = address
    return host if host.startswith("unix:") else f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def ip_of(host: str) -> IPv4Address | IPv6Address | None:
    """Return what `host` is as an address; None for names, and for `localhost`, which is one of several."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def is_local(address: Address) -> bool:
    """Tell whether only this machine can be meant: a unix socket, loopback, or all addresses of this machine."""
    ip = ip_of(address[0])
    local_ip = ip is not None and (ip.is_loopback or ip.is_unspecified)
    return address[0].startswith("unix:") or address[0] == "localhost" or local_ip


def same(one: Address, other: Address) -> bool | None:
    """Tell whether two addresses are one server; None if only who resolves the names could tell."""
    if one == other:
        return True
    if one[1] != other[1] or one[0].startswith("unix:") or other[0].startswith("unix:"):
        return False
    ips = ip_of(one[0]), ip_of(other[0])
    if None not in ips:
        return ips[0] == ips[1]
    for name, ip in ((one[0], ips[1]), (other[0], ips[0])):
        if name == "localhost" and ip is not None:
            return ip.is_loopback
    return None


def engine_clusters(config: Config, clusters: Mapping[str, Spot]) -> set[str]:
    """Return the names of clusters that lead to endpoints: their own, and any with an endpoint's address."""
    addresses = [parse(endpoint.address) for endpoint in config.endpoints]
    by_address = {
        name
        for name, cluster in clusters.items()
        if any(same(host, address) for host in hosts_of(cluster) or [] for address in addresses)
    }
    return (
        by_address
        | {endpoint.cluster or endpoint.name for endpoint in config.endpoints}
        | {ANY_CLUSTER, UNQUEUED_CLUSTER}
    )


def targets(route: Spot) -> list[str]:
    """Return the clusters that a route names; none for a redirect, a direct_response and cluster_header."""
    names = [
        route.get("route", "cluster"),
        *(one.get("name") for one in route.each("route", "weighted_clusters", "clusters")),
    ]
    return [str(name) for name in names if name is not None]


def dormant(route: Spot) -> bool:
    """Tell whether a route takes nothing until somebody says so at Envoy's admin port, like our bypass."""
    fraction = route.get("match", "runtime_fraction") or {}
    return bool(fraction.get("runtime_key")) and not (fraction.get("default_value") or {}).get("numerator")
