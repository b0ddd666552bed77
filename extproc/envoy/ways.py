"""Rules of `extproc check --envoy` about where requests go: past the queue, to another server, to no sidecar.

With an ext_proc filter Envoy chooses a route twice: on arrival, when the routing header is not there (it is stripped
from clients), and after the sidecar has set it. A held request must find a route that follows the header the second
time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from extproc.envoy.view import (
    DYNAMIC,
    Address,
    Spot,
    View,
    clusters_of,
    dormant,
    engine_clusters,
    hosts_of,
    is_local,
    parse,
    same,
    targets,
    views,
    written,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extproc.config import Config

_PATHS = ("prefix", "path", "path_separated_prefix", "safe_regex")
_ANY_PATH = (".*", "/.*", "^.*$", "^/.*$")
_SAFE_RETRIES = {"connect-failure", "refused-stream", "reset-before-request"}
"""An engine has not begun yet."""
_OFF = "typed_per_filter_config with ExtProcPerRoute {disabled: true}"


# ---- rules: routes


def order_of_routes(view: View) -> Iterator[str]:
    """Held requests must not find another route before the steered one."""
    header = view.config.headers.cluster
    if not any(_follows(route, header) for route in view.routes):
        return  # said already
    for host in view.hosts:
        before: list[Spot] = []
        for route in host.each("routes"):
            if _follows(route, header):
                before.append(route)
                continue
            passed_by = _off(view, host, route) is not None or _only_without(route, header)
            if not passed_by and not any(_covers(one, route, header) for one in before):
                names = targets(route)
                engine = set(names) & engine_clusters(view.config, view.clusters)
                yield (
                    f"{route.path}: a held request goes to {', '.join(names) or 'what this route says'} and not to the "
                    f"endpoint whose slot it has{': no limit holds' if engine else ''}; below the route with "
                    f"cluster_header: {header}, and no wider than that, would be right, or {_OFF} for what needs no queue"
                )


def switched_off(view: View) -> Iterator[str]:
    """Only exact paths may go past the queue to an engine."""
    header, engines = view.config.headers.cluster, engine_clusters(view.config, view.clusters)
    said = set()
    for host in view.hosts:
        routes = host.each("routes")
        steered = [route for route in routes if _follows(route, header)]
        on_arrival = [route for route in routes if not _needs(route, header)]
        for route in routes:
            place = _off(view, host, route)
            if place is None or place in said or dormant(route):
                continue
            exact = route.get("match", "path") is not None
            past = not exact and bool(engines & set(targets(route)))
            first = any(
                next((one for one in on_arrival if one is route or _covers(one, held, header)), None) is route
                and (route is held or _covers(route, held, header))
                for held in steered
            )
            if past or first:
                said.add(place)
                yield (
                    f"{place}: switches the filter off where requests of "
                    f"{'engines' if past else 'the steered route'} arrive: they go past the queue, and no limit holds; "
                    "leave it on, but for exact paths (match: {path: /health})"
                )


def retry_policy(view: View, route: Spot) -> tuple[str, Spot]:
    """Return which `retry_policy` holds for a route, and the path of what has it: its own, or its host's."""
    return _retry_policy(next(host for host in view.hosts if route.path.startswith(f"{host.path}.")), route)


def _retry_policy(host: Spot, route: Spot) -> tuple[str, Spot]:
    own = route.get("route", "retry_policy")
    path, policy = (f"{route.path}.route", own) if own else (host.path, host.get("retry_policy"))
    return path, Spot(path, policy or {})


def retries(view: View) -> Iterator[str]:
    """One lease, one run at the engine."""
    header = view.config.headers.cluster
    for host in view.hosts:
        for route in host.each("routes"):
            if not _follows(route, header):
                continue
            path, policy = _retry_policy(host, route)
            reasons = [reason.strip() for reason in str(policy.get("retry_on") or "").split(",") if reason.strip()]
            unsafe = [reason for reason in reasons if reason not in _SAFE_RETRIES]
            if unsafe:
                yield (
                    f"{path}.retry_policy.retry_on: {','.join(unsafe)}: one slot, several runs at the engine, which may "
                    "still be at the first one; connect-failure alone would be right, and here: at the steered route"
                )


def mirrors(view: View) -> Iterator[str]:
    """No copy of a request runs at an engine: nobody counts it."""
    engines = engine_clusters(view.config, view.clusters)
    for spot in (*view.hosts, *(Spot(f"{route.path}.route", route.get("route") or {}) for route in view.routes)):
        for copy in spot.each("request_mirror_policies"):
            if copy.get("cluster") in engines:
                yield (
                    f"{copy.path}: copies requests to {copy.get('cluster')} past the queue, above its limit; a cluster of "
                    "no endpoint would be right"
                )


def other_ways(config: Config, spots: list[Spot]) -> Iterator[str]:
    """No connection manager without the filter may lead to engines."""
    header, engines = config.headers.cluster, engine_clusters(config, clusters_of(spots))
    with_filter = {view.manager.path for view in views(config, spots)}
    for manager in (spot for spot in spots if "http_filters" in spot.node and spot.path not in with_filter):
        for host in manager.each("route_config", "virtual_hosts"):
            for route in host.each("routes"):
                names = [name for name in targets(route) if name in engines and route.get("match", "path") is None]
                if route.get("route", "cluster_header") == header:
                    names = [f"the cluster that the client names in {header}"]
                if names:
                    yield (
                        f"{route.path}: goes to {', '.join(names)} without an envoy.filters.http.ext_proc in "
                        f"{manager.path}.http_filters: past the queue, so no limit holds; the same filter there, or no "
                        "such route, would be right"
                    )


def _needs(route: Spot, header: str) -> bool:
    """Tell whether a route is taken only by requests with the routing header."""
    return any(
        matcher.get("name") == header
        and matcher.node.get("present_match") is not False
        and not matcher.get("invert_match")
        and not matcher.get("treat_missing_header_as_empty")
        for matcher in route.each("match", "headers")
    )


def _only_without(route: Spot, header: str) -> bool:
    """Tell whether a route is never taken by requests with the routing header."""
    matchers = [matcher for matcher in route.each("match", "headers") if matcher.get("name") == header]
    return any((one.node.get("present_match") is False) is not bool(one.get("invert_match")) for one in matchers)


def _follows(route: Spot, header: str) -> bool:
    """Tell whether a route is where the sidecar's decisions lead: by cluster_header, or one route for each value."""
    return route.get("route", "cluster_header") == header or _needs(route, header)


def _covers(wide: Spot, narrow: Spot, header: str) -> bool:
    """Tell whether all requests of one route would be taken by the other, were the routing header right."""
    ours, theirs = wide.get("match") or {}, narrow.get("match") or {}
    for key, value in ours.items():
        if key == "headers":
            others = theirs.get("headers") or []
            if any(one not in others for one in value if one.get("name") != header):
                return False
        elif key not in (*_PATHS, "case_sensitive") and theirs.get(key) != value:
            return False
    prefix = ours.get("prefix")
    if prefix in ("", "/") or (ours.get("safe_regex") or {}).get("regex") in _ANY_PATH:
        return True
    if any(key in ours and ours[key] == theirs.get(key) for key in _PATHS):
        return True
    start = theirs.get("prefix") or theirs.get("path") or theirs.get("path_separated_prefix")
    if start is None:
        return False
    if prefix is not None:
        return str(start).startswith(prefix)
    separated = ours.get("path_separated_prefix")
    return separated is not None and (f"{start}/" if "prefix" not in theirs else str(start)).startswith(f"{separated}/")


def _off(view: View, host: Spot, route: Spot) -> str | None:
    """Return what switches the filter off on a route: its path; None if nothing does. The innermost setting counts."""
    name = str(view.listed.get("name"))
    for path, where in (
        (route.path, route.node),
        (host.path, host.node),
        (f"{view.manager.path}.route_config", view.manager.get("route_config") or {}),
    ):
        settings: dict[str, Any] = where.get("typed_per_filter_config") or {}
        if name in settings:
            setting = settings[name] or {}
            off = setting.get("disabled") or (setting.get("config") or {}).get("disabled")  # FilterConfig may wrap it
            return f"{path}.typed_per_filter_config[{name}].disabled" if off else None
    return f"{view.listed.path}.disabled" if view.listed.get("disabled") else None


# ---- rules: addresses


def endpoint_hosts(view: View) -> Iterator[str]:
    """An endpoint's cluster must lead to that endpoint, and nowhere else."""
    for index, cluster, address, hosts in _endpoints(view):
        path = f"{cluster.path}.load_assignment"
        if len(hosts) != 1:
            yield (
                f"{path}: {len(hosts)} hosts ({', '.join(map(written, hosts)) or 'none'}), and Envoy chooses among them: "
                f"the limit of endpoints[{index}] holds for none; {written(address)} alone would be right, and an "
                "endpoint with a cluster for each other"
            )
        elif same(hosts[0], address) is False or _another(view, index, hosts[0]):
            yield (
                f"{path}: leads to {written(hosts[0])}, and endpoints[{index}].address is {written(address)}: one server is "
                f"counted and another gets the requests; {written(address)} would be right"
            )


def sidecar_host(view: View) -> Iterator[str]:
    """Envoy must ask where the sidecar listens; elsewhere than on one machine nobody can tell."""
    if (asked := _strange_sidecars(view)) is not None:
        cluster, hosts, listen = asked
        if len(hosts) == 1 and is_local(hosts[0]) and is_local(listen):
            yield (
                f"{cluster.path}.load_assignment: Envoy asks {written(hosts[0])} and the sidecar listens at "
                f"{written(listen)}: no request reaches it; {written(listen)} would be right"
            )
        elif not hosts:
            yield f"{cluster.path}.load_assignment: no host: no request reaches the sidecar; {written(listen)} would be right"


def _endpoints(view: View) -> Iterator[tuple[int, Spot, Address, list[Address]]]:
    """Walk the endpoints whose hosts the bootstrap holds: index, cluster, the address that is right, the hosts.

    Without the one by which second tries come back.
    """
    again = view.config.second_try
    for index, endpoint in enumerate(view.config.endpoints):
        cluster = view.clusters.get(endpoint.cluster or endpoint.name)
        hosts = None if cluster is None else hosts_of(cluster)
        if cluster is not None and hosts is not None:
            others = [host for host in hosts if again is None or same(host, parse(again)) is not True]
            yield index, cluster, parse(endpoint.address), others


def _another(view: View, index: int, host: Address) -> bool:
    """Tell whether an address is the one of another endpoint."""
    own = view.config.endpoints[index].address
    return any(same(host, parse(one.address)) for one in view.config.endpoints if one.address != own)


def _strange_sidecars(view: View) -> tuple[Spot, list[Address], Address] | None:
    """Return cluster, hosts and `listen` if none of the hosts can be seen to be this sidecar."""
    cluster = view.sidecar_cluster
    hosts = None if cluster is None else hosts_of(cluster)
    if cluster is None or hosts is None:
        return None
    listen = parse(view.config.listen)
    everywhere = ("0.0.0.0", "::")  # whoever connects to it reaches loopback
    for host in hosts:
        if same(host, listen) or (host[1] == listen[1] and (host[0] in everywhere or listen[0] in everywhere)):
            return None
    return cluster, hosts, listen


# ---- what could not be looked at


def unseen(config: Config, spots: list[Spot]) -> Iterator[str]:
    """Yield what the bootstrap does not hold, or does not tell."""
    for spot in spots:
        if spot.path == "dynamic_resources":
            yield from _dynamic(config, spot)
        if "http_filters" in spot.node:
            for key, how in DYNAMIC.items():
                if key in spot.node:
                    yield f"could not look at: routes (they come by {how}): {spot.path}.{key}"
            if spot.get("route_config", "vhds") is not None:
                yield f"could not look at: virtual hosts (they come by VHDS): {spot.path}.route_config.vhds"
    for view in views(config, spots):
        yield from _untold_hosts(view)


def _dynamic(config: Config, resources: Spot) -> Iterator[str]:
    if "lds_config" in resources.node:
        yield f"could not look at: listeners (they come by LDS): {resources.path}.lds_config"
    followed = resources.get("cds_config", "path_config_source", "path")
    if "cds_config" in resources.node and (followed is None or followed != config.envoy_clusters_file):
        yield f"could not look at: clusters (they come by CDS): {resources.path}.cds_config"


def _untold_hosts(view: View) -> Iterator[str]:
    endpoints = view.config.endpoints
    for cluster in [view.sidecar_cluster, *(view.clusters.get(one.cluster or one.name) for one in endpoints)]:
        if cluster is not None and hosts_of(cluster) is None:
            yield f"could not look at: hosts (they are not in the file): {cluster.path}"
    for index, cluster, address, hosts in _endpoints(view):
        if len(hosts) == 1 and same(hosts[0], address) is None and not _another(view, index, hosts[0]):
            yield (
                f"could not tell: whether {written(hosts[0])} ({cluster.path}.load_assignment) is {written(address)} "
                f"(endpoints[{index}].address)"
            )
    if (asked := _strange_sidecars(view)) is not None:
        cluster, hosts, listen = asked
        if hosts and not (len(hosts) == 1 and is_local(hosts[0]) and is_local(listen)):
            yield (
                f"could not tell: whether {', '.join(map(written, hosts))} ({cluster.path}.load_assignment) leads to the "
                f"sidecar, which listens at {written(listen)}"
            )
