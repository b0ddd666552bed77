"""Renders the Envoy bootstrap that fits a configuration. `envoy/*.yaml` are written from here too.

Every setting that differs from Envoy's default is there because something was measured on Envoy 1.40; the comments in
the output say what. Text, not a data structure, so that those comments reach the person who merges it into their own.
What it has in common with the picker's is in skeleton.py.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from extproc.durations import format_duration
from extproc.envoy import fallback
from extproc.envoy.filters import FORMS, JSON_FIELDS, PROBE, first_byte_probe, request_fields
from extproc.envoy.sidecar_tls import sidecar_tls
from extproc.envoy.skeleton import (
    BUFFER,
    FILTERS,
    IDLE_S,
    MARGIN_S,
    Skeleton,
    lines,
    other_host,
    quoted,
    sidecar_address,
    sidecar_cluster,
)
from extproc.envoy.upstreams import (
    ANY_CLUSTER,
    UNQUEUED_CLUSTER,
    UNSTEERED_CLUSTER,
    any_cluster,
    endpoint_cluster,
    unsteered_cluster,
)
from extproc.stream import wire
from extproc.stream.again import UPSTREAM

if TYPE_CHECKING:
    from collections.abc import Mapping

    from extproc.config import Config
    from extproc.envoy.skeleton import EnvoyOptions

BYPASS = "extproc.bypass"
"""Envoy's runtime key: how many in a hundred requests go past the queue."""
_RUNTIME = """\
# Keys that POST /runtime_modify sets at the admin port, until Envoy ends: the route that is a bypass asks for one.
layered_runtime: {layers: [{name: admin, admin_layer: {}}]}
"""
_UNSTEERED = f"%DYNAMIC_METADATA({wire.UNSTEERED_NAMESPACE}:outcome)%"
_WHY = {
    "stream_idle_timeout": """\
Held time counts against it (504, flag SI). Above message_timeout and above an engine's longest silence.""",
    "request_timeout": """\
Leave request_timeout and max_stream_duration unset: both count held time, and end requests that wait.""",
    "early_header_mutation_extensions": """\
The routing header is ours: a client's own is dropped before any route is chosen. A header_mutation filter
would be too late, the route is cached by then.""",
    "request_body_buffer_limit": """\
Above the default of 1 MiB, a client that leaves while its bigger HTTP/1.1 body is held goes unnoticed,
and its request is run for nobody. Costs up to this much memory per held request.""",
    "buffer": """\
A request waits, and takes a slot, when all of it is here: a body that stalls costs nobody a slot. Above the
size the answer is 413.""",
    "skip_envoy_headers": "Without x-envoy-internal and x-forwarded-for, which tell us nothing and cost us both CPU.",
    "retry_policy": "Held requests are sent again to a restarted or second sidecar: a crash costs no client an error.",
    "failure_mode_allow": """\
true: answers that run survive a sidecar's death. New requests then take the second route.""",
    "processing_mode": "Trailers SEND keeps the stream open until the answer ends: that end gives the lease back.",
    "mutation_rules": """\
The sidecar may write the routing header, and the headers of its refusals: the rules apply to those too.""",
    "forward_rules": "... and sees these headers and nothing else: no authorization, no cookies.",
    "max_outbound_control_frames": """\
Envoy resets each stream that ends. At 1,000 unsent resets its flood guard closes the connection and all
that is held on it: many releases in one moment do that.""",
    "connection_keepalive": """\
A hung sidecar is noticed in 8 s: until then heads of answers wait for it. Our server allows pings this
often; one with gRPC's defaults would close the connection.""",
    "circuit_breakers": """\
Every held and every running request counts here. By default the 1,025th would get a 500 or go un-steered.""",
}
"""Above which key of the skeleton what is said."""


def render(config: Config, options: EnvoyOptions) -> str:
    """Return an Envoy bootstrap, as YAML with comments."""
    count = f"{len(config.endpoints)} and the found" if config.sources else len(config.endpoints)
    names = config.header_names()
    written = wire.written(names.cluster, server_timing=config.server_timing, second_try=names.again)
    header = json.dumps(names.cluster)
    sidecars = options.sidecars or (config.listen,)
    longest = f"Default 200 ms. Above the longest budget ({config.longest_budget_s:g}s); at most 3600s."
    hosts = lines(8, [f"- {{endpoint: {{address: {sidecar_address(address)}}}}}" for address in sidecars])
    queue = sidecar_cluster(
        sidecars,
        f"      endpoints:\n      - lb_endpoints:\n{hosts}",
        _WHY,
        more=_sidecar_health(sidecars),
        tls=sidecar_tls(config),
    )
    return Skeleton(
        title=f"`extproc envoy-config` for Envoy 1.40. Sidecar at {', '.join(sidecars)}; {count} endpoint(s).",
        options=options,
        why={**_WHY, "message_timeout": longest},
        removed=(header, "strip-routing-header"),
        idle=format_duration(IDLE_S),
        log=_log(config),
        routes=_routes(header, config, options),
        filters=request_fields(config),
        filters_behind=f"""\
{fallback.steering(config) if options.fail_open else ""}\
{first_byte_probe(config)}\
          - name: envoy.filters.http.set_metadata
            typed_config:
              "@type": {FILTERS}set_metadata.v3.Config
              metadata: [{{metadata_namespace: {wire.UNSTEERED_NAMESPACE}, value: {{outcome: unsteered}}}}]
""",
        message_timeout=format_duration(config.longest_budget_s + MARGIN_S),
        response_attributes=", ".join(_attributes(config)),
        written="|".join(map(_regex, written)),
        read=sorted(name for name in names.wanted() if name != names.cluster),
        received=", ".join(_received(config)),
        forwarded=wire.FIELDS_NAMESPACE if config.request_fields else "",
        clusters=queue + _clusters(config, options),
        after_admin=_RUNTIME + _dynamic(config) + "\n",
        codec="          codec_type: AUTO\n",
        retries=_other_host(sidecars),
        mode_override="              allow_mode_override: false\n",
        manager=_upgrades(config),
        before_hosts=_late_cluster(config),
    ).render()


def _unsteered_to(config: Config, options: EnvoyOptions) -> str:
    """Return the cluster of requests that no sidecar steered."""
    return ANY_CLUSTER if config.envoy_clusters_file is not None and options.fail_open else UNSTEERED_CLUSTER


def _unsteered_route(config: Config, options: EnvoyOptions) -> str:
    """Return where requests go that no sidecar steered: while failing closed the cluster is empty, and nobody else."""
    return f"""\
                route:
                  cluster: {_unsteered_to(config, options)}
                  timeout: 0s
{fallback.ELSEWHERE if options.fail_open else ""}"""


def _clusters(config: Config, options: EnvoyOptions) -> str:
    endpoints = [(endpoint.cluster or endpoint.name, endpoint.address) for endpoint in config.endpoints]
    addresses = [address for _, address in endpoints]
    in_file, protocol = config.envoy_clusters_file is not None, options.upstream_protocol
    clusters = []
    if _unsteered_to(config, options) != ANY_CLUSTER:
        clusters.append(unsteered_cluster(fallback.others(config), config, options))
        clusters += [
            any_cluster(one.cluster, one.addresses, protocol, config)
            for one in (fallback.by_model(config) if options.fail_open else ())
        ]
    if not in_file:
        clusters += [endpoint_cluster(cluster, address, protocol, config) for cluster, address in endpoints]
    clusters += [
        endpoint_cluster(one.name, one.address, protocol, config, may_retry=False)
        for one in config.overflow_clusters
        if one.address is not None
    ]
    at_once = (*(() if options.fail_open else (ANY_CLUSTER,)), *((UNQUEUED_CLUSTER,) if options.unqueued else ()))
    clusters += [any_cluster(name, addresses, protocol, config) for name in (() if in_file else at_once)]
    return "".join(clusters)


def _routes(header: str, config: Config, options: EnvoyOptions) -> str:
    """Return the routes; `header` is the one that we steer by, as YAML writes it."""
    any_endpoint = _unsteered_to(config, options) if options.fail_open else ANY_CLUSTER
    outcome = f"""\
                response_headers_to_add:
                # Only what came past our filter, as the last filter notes: not what Envoy itself refused before (413).
                - {{header: {{key: x-extproc-outcome, value: "{_UNSTEERED}"}}}}
"""
    return f"""\
{_unqueued_routes(config, options)}\
{fallback.route(config, outcome) if options.fail_open else ""}\
              # Steered: reached only after the sidecar has set the header and cleared the route cache.
              - match:
                  prefix: /
                  headers: [{{name: {header}, present_match: true}}]
                route:
                  cluster_header: {header}
                  cluster_not_found_response_code: SERVICE_UNAVAILABLE
                  timeout: 0s
                  # What no engine has begun to read; plain "reset" would run again what one may still compute.
                  retry_policy:
                    retry_on: "connect-failure,refused-stream,reset-before-request"
                    num_retries: 1
{_second_priority(config)}                request_headers_to_remove: [{header}]
{_upgrade_route(config, options)}\
{_bypass_route(any_endpoint, config, outcome)}\
              # Not steered: no sidecar answered. {_unsteered_comment(config, options)}
              # It must be a route, not a direct_response: with that, the buffer limit above does not hold.
              - match: {{prefix: /}}
{_unsteered_route(config, options)}\
{outcome}"""


def _other_host(sidecars: tuple[str, ...]) -> str:
    if len(sidecars) == 1:
        return ""
    return f"""\
                  # Not to the one that just went away.
{other_host(18, attempts=5)}"""


def _sidecar_health(sidecars: tuple[str, ...]) -> str:
    if len(sidecars) == 1:  # a single one is never left out: where else should requests go
        return ""
    return f"""\
    # A draining sidecar says NOT_SERVING and gets no new requests. Without traffic, the default is a check a minute.
    health_checks:
    - interval: 0.5s
      no_traffic_interval: 0.5s
      timeout: 1s
      unhealthy_threshold: 1
      healthy_threshold: 1
      grpc_health_check: {{service_name: {json.dumps(wire.SERVICE)}}}
"""


def _regex(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter == "-" else f"\\{letter}" for letter in name)


def _received(config: Config) -> tuple[str, ...]:
    return (wire.NAMESPACE, *((wire.NUMBER_NAMESPACE,) if config.first_byte_probe else ()))


def _upgrades(config: Config) -> str:
    if not config.upgrades:
        return ""
    return """\
          # WebSockets: each holds its slot for as long as it is open.
          upgrade_configs: [{upgrade_type: websocket}]
"""


def _upgrade_route(config: Config, options: EnvoyOptions) -> str:
    if not config.upgrades:
        return ""
    names = [BUFFER, *((FORMS, JSON_FIELDS) if config.request_fields else ())]
    off = '{"@type": type.googleapis.com/envoy.config.route.v3.FilterConfig, disabled: true}'
    return f"""\
              # A WebSocket on arrival: its "body" ends when it closes, so nothing may wait for all of it.
              - match:
                  prefix: /
                  headers: [{{name: upgrade, present_match: true}}]
{_unsteered_route(config, options)}\
                typed_per_filter_config:
{lines(18, [f"{name}: {off}" for name in names])}\
                response_headers_to_add:
                - {{header: {{key: x-extproc-outcome, value: "{_UNSTEERED}"}}}}
"""


def _unsteered_comment(config: Config, options: EnvoyOptions) -> str:
    if options.fail_open and fallback.by_model(config):
        return "Fail open: what names no model of a server here."
    if options.fail_open:
        return "Fail open: any endpoint takes it, up to their circuit breaker."
    return "Fail closed: the cluster is empty, so 503."


def _unqueued_routes(config: Config, options: EnvoyOptions) -> str:
    if not options.unqueued:
        return ""
    routes = "".join(
        f"""\
              - match: {{path: {json.dumps(path)}}}
                route:
                  cluster: {UNQUEUED_CLUSTER}
{fallback.ELSEWHERE}\
                typed_per_filter_config:
{_past_ours(config)}"""
        for path in options.unqueued
    )
    return f"""\
              # Past the queue, to any endpoint: for probes, which would else wait and be refused when all is full. The
              # sidecar does not see them, and no limit counts them. Exact paths, whatever the method.
{routes}"""


def _bypass_route(cluster: str, config: Config, outcome: str) -> str:
    return f"""\
              # Past the queue, in a hurry and without a restart: POST /runtime_modify?{BYPASS}=100 to the admin port
              # above, and =0 for back. What is held by then goes where the sidecar sends it.
              - match:
                  prefix: /
                  runtime_fraction: {{default_value: {{numerator: 0}}, runtime_key: {BYPASS}}}
                route:
                  cluster: {cluster}
                  timeout: 0s
{fallback.ELSEWHERE}                typed_per_filter_config:
{_past_ours(config)}\
{outcome}"""


def _past_ours(config: Config) -> str:
    """Return the setting of a route whose requests no sidecar is asked about."""
    names = ["envoy.filters.http.ext_proc", *([PROBE] if config.first_byte_probe else [])]
    off = f'{{"@type": {FILTERS}ext_proc.v3.ExtProcPerRoute, disabled: true}}'
    return lines(18, [f"{name}: {off}" for name in names])


def _late_cluster(config: Config) -> str:
    if config.envoy_clusters_file is None:
        return ""
    return """\
            # The cluster of requests that nobody steered comes with the clusters file, after the listener was read.
            validate_clusters: false
"""


def _dynamic(config: Config) -> str:
    if config.envoy_clusters_file is None and config.tls is None:
        return ""
    node = """
# Envoy wants a name to follow a file.
node: {id: extproc, cluster: extproc}
"""
    if config.envoy_clusters_file is None:
        return node
    return f"""\
{node}\
dynamic_resources:
  # The sidecar writes the endpoints' clusters there: start it first, Envoy wants to find the file.
  cds_config:
    path_config_source: {{path: {quoted(config.envoy_clusters_file)}}}
    resource_api_version: V3
"""


def _attributes(config: Config) -> tuple[str, ...]:
    return ("response.code_details", *((UPSTREAM,) if config.second_try is not None else ()))


def _second_priority(config: Config) -> str:
    if config.second_try is None:
        return ""
    return f"""\
                    # ... at the cluster's second priority, which leads back to the queue: see second_try.
                    retry_priority:
                      name: envoy.retry_priorities.previous_priorities
                      typed_config:
                        "@type": {_PREVIOUS_PRIORITIES}
                        update_frequency: 1
"""


_PREVIOUS_PRIORITIES = (
    "type.googleapis.com/envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig"
)


def _log(config: Config) -> Mapping[str, str]:
    """Return what the access log says."""
    in_body = {"model_in_body": f"%DYNAMIC_METADATA({wire.FIELDS_NAMESPACE}:model)%"} if config.request_fields else {}
    return {
        "time": "%START_TIME%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "method": "%REQ(:METHOD)%",
        "path": "%PATH(NQ:ORIG_OR_PATH)%",
        "model": f"%REQ({config.headers.model[0]})%",
        **in_body,
        "code": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "cluster": "%UPSTREAM_CLUSTER%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "duration_ms": "%DURATION%",
        "bytes_received": "%BYTES_RECEIVED%",
        "queue": f"%DYNAMIC_METADATA({wire.NAMESPACE})%",
    }
