"""What a running Envoy has (`curl 'ADMIN/config_dump?include_eds'`), in the shape of a bootstrap that holds all of it.

Listeners, clusters, routes and hosts that came by LDS, CDS, RDS and EDS stand where they would in a file, so that the
rules of `extproc check --envoy` look at them; what the dump lacks stays as it is, to be told as not looked at.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_PLACE = re.compile(r"^static_resources\.(listeners|clusters)\[(\d+)\]")


def is_dump(data: Any) -> bool:
    """Tell whether `data` is a config dump: Envoy's own, or what `istioctl proxy-config all -o json` prints."""
    return isinstance(data, dict) and isinstance(data.get("configs"), list)


def as_bootstrap(data: dict[str, Any]) -> dict[str, Any]:
    """Return the same as one bootstrap. Raises AttributeError, KeyError or TypeError where it is misshapen."""
    parts = [part for part in data["configs"] if isinstance(part, dict)]
    found: dict[str, Any] = next((part["bootstrap"] for part in parts if "bootstrap" in part), {})
    routes = {one["name"]: one for one in _each(parts, "route_config") if "name" in one}
    hosts = {one["cluster_name"]: one for one in _each(parts, "endpoint_config") if "cluster_name" in one}
    listeners, clusters = [*_each(parts, "listener")], [*_each(parts, "cluster")]
    for listener in listeners:
        _bring_routes(listener, routes)
    for cluster in clusters:
        if cluster.get("type") == "EDS":
            by = (cluster.get("eds_cluster_config") or {}).get("service_name") or cluster.get("name")
            if by in hosts:
                cluster |= {"type": "STATIC", "load_assignment": hosts[by]}
    rest = {key: value for key, value in found.items() if key != "dynamic_resources"}
    static = {**(found.get("static_resources") or {}), "listeners": listeners, "clusters": clusters}
    return rest | {"static_resources": static}


def named(path: str, whole: dict[str, Any]) -> str:
    """Return a path in `whole`, with names in place of numbers: in what is running nothing has a number."""

    def name(match: re.Match[str]) -> str:
        node = whole["static_resources"][match[1]][int(match[2])]
        return f"{match[1]}[{node.get('name') or match[2]}]"

    return _PLACE.sub(name, path)


def _each(parts: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """Yield all of a kind that are in use: `static_Ks` and `dynamic_Ks` as they are named for each kind."""
    for part in parts:
        for key, entries in part.items():
            if key.startswith(("static_", "dynamic_")) and "warming" not in key and isinstance(entries, list):
                for entry in entries:
                    state = entry.get("active_state", entry)
                    if isinstance(state.get(kind), dict):
                        yield state[kind]


def _bring_routes(node: Any, routes: dict[str, dict[str, Any]]) -> None:
    """Put the routes that its connection managers get by RDS where they would stand in a file."""
    if isinstance(node, dict):
        by = node.get("rds")
        if isinstance(by, dict) and by.get("route_config_name") in routes:
            del node["rds"]
            node["route_config"] = routes[by["route_config_name"]]
        for part in node.values():
            _bring_routes(part, routes)
    elif isinstance(node, list):
        for part in node:
            _bring_routes(part, routes)
