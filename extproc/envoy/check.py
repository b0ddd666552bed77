"""Cross-checks an Envoy bootstrap against a configuration: settings that silently lose, cut or misroute held requests.

Each rule is one function that yields problems: where, what is wrong and why, and what would be right. What Envoy 1.40
does was measured; `extproc envoy-config` prints a bootstrap that passes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from extproc.durations import parse_duration
from extproc.envoy import cluster_rules, ways
from extproc.envoy.skeleton import IDLE_S, MARGIN_S
from extproc.envoy.view import Spot, View, read_numbers, read_parts, told_if_misshapen, views, what_else
from extproc.errors import ConfigError
from extproc.stream import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from extproc.config import Config

_TYPE = "type.googleapis.com/envoy.extensions."
_SSE_TO_METADATA = "envoy.filters.http.sse_to_metadata"
_EARLY_MUTATION = _TYPE + "http.early_header_mutation.header_mutation.v3.HeaderMutation"
DEFAULT_MESSAGE_TIMEOUT_S = 0.2
DEFAULT_IDLE_S = 300.0
DEFAULT_ROUTE_TIMEOUT_S = 15.0
DEFAULT_BODY_LIMIT = 1 << 20
DEFAULT_RETRIES = 1
DEFAULT_BACK_OFF_S = 1.0
"""The first back-off of a gRPC service's retry_policy; a route's is 25 ms."""
FEW_RETRIES = 10
"""Ten last some 4 s with the rendered back-off (2.5 to 5.5 s measured)."""
MOST_COUNTED = 100_000
"""Retries whose waits are added up: who wants no end to them writes the greatest number that Envoy takes."""
SHORT_ANSWER_S = 60.0
"""Long answers take minutes."""
RESTART_S = 3.0
"""How long a sidecar may be away while it is restarted."""


_NO_FILTER = (
    "has no envoy.filters.http.ext_proc filter that could hold requests; `extproc envoy-config` prints one; more is "
    "looked at once it is there"
)


def check_envoy(config: Config, path: Path) -> list[str]:
    """Return what in the bootstrap at `path` does not fit `config`. Raises ConfigError if it can't be read."""
    spots = read_bootstrap(path)
    with told_if_misshapen(path):
        found = list(views(config, spots))
        if not found and not any("lds_config" in spot.node for spot in spots):
            return [_NO_FILTER]
        problems = [problem for view in found for rule in _RULES for problem in rule(view)]
        return list(dict.fromkeys([*problems, *ways.other_ways(config, spots)]))


def could_not_look(config: Config, path: Path) -> list[str]:
    """Return what of the bootstrap at `path` no rule could judge. Raises ConfigError if it can't be read."""
    spots = read_bootstrap(path)
    with told_if_misshapen(path):
        return list(dict.fromkeys(ways.unseen(config, spots)))


def read_bootstrap(path: Path) -> list[Spot]:
    """Return all parts of the bootstrap at `path`. Raises ConfigError if it can't be read."""
    data, spots = read_parts(path)
    reason = what_else(data)
    if reason is None and isinstance(data, list):
        reason = "it is a list"
    if reason is None and not {"static_resources", "dynamic_resources"} & data.keys():
        reason = "it has neither static_resources nor dynamic_resources"
    if reason is not None:
        raise ConfigError(str(path), [f"is no Envoy bootstrap: {reason}; `extproc envoy-config` prints one"])
    problems = read_numbers(spots)
    if problems:
        raise ConfigError(str(path), problems)
    return spots


# ---- rules: time


def _message_timeout(view: View) -> Iterator[str]:
    seconds = view.filter.seconds("message_timeout", DEFAULT_MESSAGE_TIMEOUT_S)
    if seconds <= view.longest_s:
        yield (
            f"{view.filter.path}.message_timeout: {seconds:g}s is not above the longest budget, {view.longest_s:g}s: "
            f"Envoy gives up on requests that wait; {view.longest_s + MARGIN_S:g}s would be right"
        )


def _idle_timeouts(view: View) -> Iterator[str]:
    right = f"held time counts against it (504); {max(IDLE_S, view.longest_s + 60):g}s would be right"
    seconds = view.manager.seconds("stream_idle_timeout", DEFAULT_IDLE_S)
    if 0 < seconds <= view.longest_s:
        yield f"{view.manager.path}.stream_idle_timeout: {seconds:g}s is not above the longest budget: {right}"
    for route in view.routes:
        idle = parse_duration(str(route.get("route", "idle_timeout") or "0s")) or 0.0
        if 0 < idle <= view.longest_s:
            yield f"{route.path}.route.idle_timeout: {idle:g}s is not above the longest budget: {right}"


def _whole_request_timeouts(view: View) -> Iterator[str]:
    if view.manager.seconds("request_timeout", 0.0) > 0:
        yield (
            f"{view.manager.path}.request_timeout: a held request without a body is answered 504 after it, one with a "
            "big body 408; leave it unset"
        )
    if view.manager.get("common_http_protocol_options", "max_stream_duration") is not None:
        yield (
            f"{view.manager.path}.common_http_protocol_options.max_stream_duration: held time counts against it (504); "
            "leave it unset"
        )
    for route in view.routes:
        if route.get("route", "max_stream_duration") is not None:
            yield f"{route.path}.route.max_stream_duration: held time counts against it (504); leave it unset"


def _answer_timeout(view: View) -> Iterator[str]:
    for route in view.steered:
        timeout = route.get("route", "timeout")
        seconds = DEFAULT_ROUTE_TIMEOUT_S if timeout is None else parse_duration(str(timeout))
        if seconds is not None and 0 < seconds <= SHORT_ANSWER_S:
            yield (
                f"{route.path}.route.timeout: {seconds:g}s from dispatch to the end of the answer cuts long answers; "
                "0s (no limit) would be right"
            )
        path, policy = ways.retry_policy(view, route)
        for key in ("per_try_timeout", "per_try_idle_timeout"):
            seconds = policy.seconds(key, 0.0)
            if 0 < seconds <= SHORT_ANSWER_S:
                yield (
                    f"{path}.retry_policy.{key}: {seconds:g}s: an answer that {'takes' if 'idle' not in key else 'pauses'} "
                    "longer, its first token too, is cut (504); leave it unset"
                )


# ---- rules: the filter


def _modes(view: View) -> Iterator[str]:
    mode = view.filter.get("processing_mode") or {}
    path = f"{view.filter.path}.processing_mode"
    if mode.get("request_header_mode", "SEND") == "SKIP":
        yield f"{path}.request_header_mode: SKIP leaves nothing to hold; SEND would be right"
    if mode.get("response_trailer_mode") != "SEND":
        yield (
            f"{path}.response_trailer_mode: must be SEND: else the stream ends before the answer does, and its slot is "
            "given to the next request too early"
        )
    for key in ("request_body_mode", "response_body_mode"):
        if mode.get(key, "NONE") != "NONE":
            yield f"{path}.{key}: {mode[key]} sends bodies through the sidecar; NONE would be right"


def _answers(view: View) -> Iterator[str]:
    twins = view.filters_of_ours()
    if len(twins) > 1 and view.listed.path == twins[-1].path:
        yield (
            f"{view.listed.path}: is the second envoy.filters.http.ext_proc that holds: each request is queued twice and takes "
            "two slots; one would be right"
        )
    if view.filter.get("disable_clear_route_cache") or view.filter.get("route_cache_action") == "RETAIN":
        key = "route_cache_action" if "route_cache_action" in view.filter.node else "disable_clear_route_cache"
        yield (
            f"{view.filter.path}.{key}: {view.filter.get(key)}: Envoy keeps the route that it took before we chose, so "
            "nothing follows our decisions; leave it unset"
        )
    if view.filter.get("disable_immediate_response"):
        yield f"{view.filter.path}.disable_immediate_response: turns our 429s into 500s; leave it unset"
    rules = view.filter.get("mutation_rules") or {}
    allowed = (rules.get("allow_expression") or {}).get("regex", "")
    again = view.config.second_try is not None
    wanted = wire.written(view.config.headers.cluster, server_timing=view.config.server_timing, second_try=again)
    if rules.get("disallow_all"):
        missing = [name for name in wanted if not _matches(allowed, name)]
        if missing:
            yield (
                f"{view.filter.path}.mutation_rules: drops {', '.join(missing)} without a word; an allow_expression "
                f"of {'|'.join(wanted)!r} would be right"
            )
    spaces = view.filter.get("metadata_options", "receiving_namespaces", "untyped") or []
    if view.config.first_byte_probe and wire.NUMBER_NAMESPACE not in spaces:
        yield (
            f"{view.filter.path}.metadata_options.receiving_namespaces.untyped: lacks {wire.NUMBER_NAMESPACE}: the "
            "first-byte probe can't tell whose answer begins"
        )
    if wire.NAMESPACE not in spaces:
        yield (
            f"{view.filter.path}.metadata_options.receiving_namespaces.untyped: lacks {wire.NAMESPACE}: the access log "
            "can't say why a request waited"
        )


def _what_we_see(view: View) -> Iterator[str]:
    rules = view.filter.get("forward_rules") or {}
    allowed = (rules.get("allowed_headers") or {}).get("patterns")
    wanted = view.config.header_names().wanted() - {view.config.headers.cluster}
    if not allowed:
        yield (
            f"{view.filter.path}.forward_rules.allowed_headers: without it every header goes to the sidecar, authorization "
            f"and cookies too; exact patterns for {', '.join(sorted(wanted))} would be right"
        )
    else:
        missing = sorted(name for name in wanted if not _is_among(allowed, name))
        if missing:
            yield f"{view.filter.path}.forward_rules.allowed_headers: lacks {', '.join(missing)}, which we read"
    kept_back = (rules.get("disallowed_headers") or {}).get("patterns") or []
    missing = sorted(name for name in wanted if _is_among(kept_back, name))
    if missing:
        yield f"{view.filter.path}.forward_rules.disallowed_headers: keeps back {', '.join(missing)}, which we read"
    if "request.time" not in (view.filter.get("request_attributes") or []):
        yield (
            f"{view.filter.path}.request_attributes: lacks request.time: a request that is replayed to a restarted "
            "sidecar starts its wait anew"
        )


def _failure_mode(view: View) -> Iterator[str]:
    if not view.filter.get("failure_mode_allow"):
        yield (
            f"{view.filter.path}.failure_mode_allow: false cuts every running answer when the sidecar dies; true, and a "
            "last route to a cluster of your choice (empty: 503), would be right"
        )
    yield from _replays(
        f"{view.filter.path}.grpc_service.retry_policy", view.filter.get("grpc_service", "retry_policy")
    )


def _replays(path: str, retry: dict[str, Any] | None) -> Iterator[str]:
    if retry is None or "reset" not in str(retry.get("retry_on", "")):
        yield (
            f"{path}: without retry_on connect-failure,reset,unavailable,cancelled held requests fail when the sidecar "
            "restarts, instead of being replayed to it"
        )
        return
    tries = retry.get("num_retries", DEFAULT_RETRIES)
    if tries < FEW_RETRIES:
        yield (
            f"{path}.num_retries: {tries}{'' if 'num_retries' in retry else ', the default,'} is used up before a "
            "restarted sidecar is back, and held requests get 503; 30 would be right"
        )
        return
    # Envoy waits a random part of each interval: half of it on average. The intervals double up to the longest.
    back_off = Spot("", retry.get("retry_back_off") or {})
    interval_s = back_off.seconds("base_interval", DEFAULT_BACK_OFF_S)
    longest_s = back_off.seconds("max_interval", 10 * interval_s)
    counted = range(min(tries, MOST_COUNTED))
    patience_s = sum(min(interval_s * 2.0 ** min(number, 30), longest_s) / 2 for number in counted)
    if patience_s < RESTART_S:
        yield (
            f"{path}.retry_back_off: {tries} retries are used up after some {patience_s:.1g}s, before a restarted sidecar "
            "is back, and held requests get 503; {base_interval: 0.2s, max_interval: 1s} would be right"
        )


# ---- rules: routes


def _routing(view: View) -> Iterator[str]:
    header = view.config.headers.cluster
    if view.static_routes and not view.steered:
        yield (
            f"{view.manager.path}.route_config: no route has cluster_header: {header}: nothing follows our decisions; "
            "clear_route_cache and that route are how a request gets to its endpoint"
        )
    strip = [
        mutation
        for extension in view.manager.get("early_header_mutation_extensions") or []
        if (extension.get("typed_config") or {}).get("@type") == _EARLY_MUTATION
        for mutation in extension["typed_config"].get("mutations") or []
    ]
    if not any(_removes(mutation, header) for mutation in strip):
        yield (
            f"{view.manager.path}.early_header_mutation_extensions: must remove {header}: else a client that sends it "
            "chooses its cluster when we don't answer; a header_mutation filter is too late"
        )


def _unsteered(view: View) -> Iterator[str]:
    for route in view.routes:
        if "direct_response" in route.node and route.get("match", "prefix") == "/":
            yield (
                f"{route.path}.direct_response: while a request is held on it the body limit is not applied, and a "
                "client that leaves goes unnoticed; a route to an empty cluster would be right"
            )


def _body_limit(view: View) -> Iterator[str]:
    for host in view.hosts:
        limit = host.node.get("request_body_buffer_limit", DEFAULT_BODY_LIMIT)
        if isinstance(limit, int) and limit <= DEFAULT_BODY_LIMIT:
            yield (
                f"{host.path}.request_body_buffer_limit: a client that leaves while its bigger HTTP/1.1 body is held goes "
                "unnoticed, and its request is run for nobody; 33554432 would be right"
            )


# ---- rules: features


def _features(view: View) -> Iterator[str]:
    """Yield the features of the configuration that need a filter of their own, where that is not before or beside us."""
    filters = [spot.get("typed_config") or {} for spot in view.manager.each("http_filters")]
    types = [str(one.get("@type", "")).rpartition(".")[2] for one in filters]
    ours = filters.index(view.filter.node) if view.filter.node in filters else len(filters)
    path = f"{view.manager.path}.http_filters"
    if view.config.upgrades and not _upgrades(view):
        yield (
            f"{view.manager.path}.upgrade_configs: upgrades is on, and websocket is not among them: WebSockets get 403; "
            "[{upgrade_type: websocket}] would be right"
        )
    if view.config.request_fields:
        if "JsonToMetadata" not in types[:ours]:
            yield (
                f"{path}: request_fields is on, and no json_to_metadata filter stands before ext_proc: models and limits "
                "in bodies are not read; what `extproc envoy-config` prints would be right"
            )
        elif wire.FIELDS_NAMESPACE not in (
            view.filter.get("metadata_options", "forwarding_namespaces", "untyped") or []
        ):
            yield (
                f"{view.filter.path}.metadata_options.forwarding_namespaces.untyped: lacks {wire.FIELDS_NAMESPACE}, in "
                "which json_to_metadata puts what request_fields reads"
            )
    if view.config.first_byte_probe and not any(one.get("observability_mode") for one in filters):
        yield (
            f"{path}: first_byte_probe is on, and no second ext_proc filter has observability_mode: first tokens are never "
            "seen, and max_prompt_tokens lets one prompt after the other through; what `extproc envoy-config` prints "
            "would be right"
        )


def _upgrades(view: View) -> bool:
    """Tell whether WebSockets may pass, by the manager's word or a route's."""
    told = [view.manager.get("upgrade_configs"), *(route.get("route", "upgrade_configs") for route in view.routes)]
    return any(str(one.get("upgrade_type", "")).lower() == "websocket" for configs in told for one in configs or [])


def _clients_orders(view: View) -> Iterator[str]:
    if view.manager.get("internal_address_config") is not None:
        yield (
            f"{view.manager.path}.internal_address_config: from addresses that it names Envoy obeys x-envoy-retry-on and "
            "x-envoy-hedge-on-per-try-timeout: one lease, several runs at the endpoint (seen on 1.40); leave it unset, "
            "or strip x-envoy-* headers"
        )


def _dangerous(view: View) -> Iterator[str]:
    for index, http_filter in enumerate(view.manager.node["http_filters"]):
        if isinstance(http_filter, dict) and http_filter.get("name") == _SSE_TO_METADATA:
            yield (
                f"{view.manager.path}.http_filters[{index}]: sse_to_metadata crashes Envoy 1.40 when an engine sends an "
                "event whose data is a JSON scalar; remove it"
            )


_RULES: tuple[Callable[[View], Iterator[str]], ...] = (
    _message_timeout,
    _idle_timeouts,
    _whole_request_timeouts,
    _answer_timeout,
    _modes,
    _answers,
    _what_we_see,
    _failure_mode,
    _routing,
    ways.order_of_routes,
    ways.switched_off,
    ways.retries,
    ways.mirrors,
    _unsteered,
    _body_limit,
    cluster_rules.ext_proc_cluster,
    ways.sidecar_host,
    cluster_rules.sidecar_tls,
    cluster_rules.endpoint_clusters,
    cluster_rules.overflow_clusters,
    cluster_rules.second_try,
    cluster_rules.idle_connections,
    ways.endpoint_hosts,
    _features,
    _clients_orders,
    _dangerous,
)


def _is_among(patterns: list[Any], name: str) -> bool:
    """Tell whether a header's name is like one of Envoy's string matchers."""
    return any(_is_like(pattern, name) for pattern in patterns if isinstance(pattern, dict))


def _is_like(pattern: dict[str, Any], name: str) -> bool:
    ways_to_match: dict[str, Callable[[str], bool]] = {
        "exact": name.__eq__,
        "prefix": name.startswith,
        "suffix": name.endswith,
        "contains": name.__contains__,
    }
    for kind, matches in ways_to_match.items():
        if kind in pattern:
            text = str(pattern[kind])
            return matches(text.lower() if pattern.get("ignore_case") else text)
    return _matches(str((pattern.get("safe_regex") or {}).get("regex", "")), name)


def _matches(expression: str, name: str) -> bool:
    try:
        return re.fullmatch(expression, name) is not None
    except re.error:
        return False


def _removes(mutation: dict[str, Any], header: str) -> bool:
    matcher = (mutation.get("remove_on_match") or {}).get("key_matcher") or {}
    prefix = matcher.get("prefix")
    return (
        mutation.get("remove") == header or matcher.get("exact") == header or bool(prefix and header.startswith(prefix))
    )
