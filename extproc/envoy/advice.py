"""What an Envoy bootstrap that works leaves people without: told by `extproc check --envoy` as warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.envoy import fallback
from extproc.envoy.check import read_bootstrap
from extproc.envoy.upstreams import ANY_CLUSTER
from extproc.envoy.view import dormant, hosts_of, parse, same, targets, told_if_misshapen, views
from extproc.stream import wire

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from extproc.config import Config
    from extproc.envoy.view import Spot, View


def advice(config: Config, path: Path) -> list[str]:
    """Return what is missing in the bootstrap at `path`. Raises ConfigError if it can't be read."""
    spots = read_bootstrap(path)
    with told_if_misshapen(path):
        return list(dict.fromkeys(line for view in views(config, spots) for line in _words(view)))


def _words(view: View) -> Iterator[str]:
    yield from _access_log(view)
    yield from _own_errors(view)
    yield from _bodies(view)
    yield from _forms(view)
    yield from _any_server(view)


def _access_log(view: View) -> Iterator[str]:
    logs = view.manager.each("access_log")
    if not logs:
        yield f"{view.manager.path}.access_log: there is none: nothing says later why a request waited or was refused"
    elif wire.NAMESPACE not in "".join(_dynamic_metadata(str(log.node)) for log in logs):
        yield (
            f"{view.manager.path}.access_log: has no queue data, which says why a request waited; "
            f"%DYNAMIC_METADATA({wire.NAMESPACE})% in its format would be right"
        )


def _own_errors(view: View) -> Iterator[str]:
    if view.manager.get("local_reply_config") is None:
        yield (
            f"{view.manager.path}.local_reply_config: there is none: where no sidecar or no server answers, clients "
            'read Envoy\'s own text ("no healthy upstream"), which is no OpenAI error and says not whose fault it is; '
            "what `extproc envoy-config` prints would be right"
        )


def _types(view: View) -> tuple[str, str]:
    """Return the types of the HTTP filters before ours, and of all."""
    filters = [spot.get("typed_config") or {} for spot in view.manager.each("http_filters")]
    ours = filters.index(view.filter.node) if view.filter.node in filters else len(filters)
    return (
        " ".join(str(one.get("@type", "")) for one in filters[:ours]),
        " ".join(str(one.get("@type", "")) for one in filters),
    )


def _bodies(view: View) -> Iterator[str]:
    if "filters.http.buffer." not in _types(view)[0]:
        yield (
            f"{view.manager.path}.http_filters: no buffer filter stands before ext_proc: a request is asked about when "
            "its head is here, and one whose body stalls keeps a slot; envoy.filters.http.buffer, as the first, would "
            "be right"
        )


def _forms(view: View) -> Iterator[str]:
    """Say which models stay unknown. What reads them may be anything that writes metadata: so no problem."""
    if view.config.request_fields and "filters.http.lua." not in _types(view)[0]:
        yield (
            f"{view.manager.path}.http_filters: request_fields is on, and no lua filter reads the model of forms "
            "(audio/transcriptions): they get 400 where endpoints list models; what `extproc envoy-config` prints "
            "would be right"
        )


def _any_server(view: View) -> Iterator[str]:
    """Say where what no sidecar steered goes to servers of which some lack its model."""
    header, models = view.config.headers.cluster, view.config.headers.model
    for host in view.hosts:
        for route in host.each("routes"):
            matched = {one.get("name"): "string_match" in one.node for one in route.each("match", "headers")}
            if matched.get(header) or any(name in matched for name in models):
                break  # models are told apart, here
            if header not in matched and route.get("match", "path") is None and not dormant(route):
                yield from (f"{route.path}: {words}" for name in targets(route) if (words := _mixed(view, name)))


def _mixed(view: View, name: str) -> str | None:
    cluster = view.clusters.get(name)
    if cluster is None:
        return fallback.any_server(view.config) if name == ANY_CLUSTER else None
    if len(_models_at(view, cluster)) < 2:
        return None
    return (
        f"while no sidecar answers, requests go to any server of {name}, and these list different models: one that "
        "lacks a request's answers 404, which clients take for good; the route and the filter that `extproc "
        "envoy-config --fail-open` prints would be right"
    )


def _models_at(view: View, cluster: Spot) -> set[frozenset[str]]:
    hosts = hosts_of(cluster) or []
    return {
        frozenset(one.models)
        for one in view.config.endpoints
        if any(same(host, parse(one.address)) is True for host in hosts)
    }


def _dynamic_metadata(log: str) -> str:
    """Return what of a log's format is about dynamic metadata."""
    return "".join(piece.partition(")")[0] for piece in log.split("DYNAMIC_METADATA(")[1:])
