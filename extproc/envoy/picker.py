"""Renders the Envoy bootstrap for `dialect: endpoint-picker`: one cluster of all endpoints, and a pick by address.

For an Envoy of your own, without a control plane. It is lean: two messages a request, and no body comes through us.
Endpoints that the file lists are hosts of the cluster, and next choices are tried. Where some are discovered, Envoy
goes to whatever address we name, so it need not know them; it tries no other then.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from extproc.durations import format_duration
from extproc.envoy.filters import request_fields
from extproc.envoy.skeleton import IDLE_S, MARGIN_S, Skeleton, sidecar_address, sidecar_cluster, socket_address
from extproc.errors import ConfigError
from extproc.stream import wire

if TYPE_CHECKING:
    from extproc.config import Config
    from extproc.envoy.skeleton import EnvoyOptions

CLUSTER = "extproc_endpoints"
_LB = "type.googleapis.com/envoy.extensions.load_balancing_policies."
_WHY = {
    "stream_idle_timeout": "Held time counts against it.",
    "early_header_mutation_extensions": """\
A client that names its own destination is not heard, whatever becomes of the sidecar.""",
    "buffer": "A request waits, and takes a slot, when all of it is here.",
    "skip_envoy_headers": "Without x-envoy-internal and x-forwarded-for, which tell us nothing and cost us both CPU.",
    "retry_policy": "Held requests are sent again to a restarted sidecar: a crash costs no client an error.",
    "failure_mode_allow": """\
Answers that run survive a sidecar's death; what nobody picked for finds no host, so 503.""",
    "processing_mode": """\
No bodies. Trailers SEND keeps the stream open until the answer ends: that gives the lease back.""",
}
"""Above which key of the skeleton what is said."""
_LOG = {
    "time": "%START_TIME%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "path": "%PATH(NQ:ORIG_OR_PATH)%",
    "code": "%RESPONSE_CODE%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "upstream": "%UPSTREAM_HOST%",
    "queue": f"%DYNAMIC_METADATA({wire.NAMESPACE})%",
}


def render(config: Config, options: EnvoyOptions) -> str:
    """Return an Envoy bootstrap, as YAML with comments. Raises ConfigError for what it can't say."""
    _require_what_it_can_say(config, options)
    sidecar = (options.sidecars or (config.listen,))[0]
    header = json.dumps(wire.PICK_HEADER)
    timing = (wire.SERVER_TIMING,) if config.server_timing else ()
    # By their beginnings: Envoy refuses an expression that names them all (RE2 program size).
    written = (*wire.REFUSAL_HEADERS, *timing, "x-gateway-.*", "x-llm-d-.*", "x-slo-.*")
    here = f"      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {sidecar_address(sidecar)}}}}}]}}]\n"
    return Skeleton(
        title=f"`extproc envoy-config --dialect endpoint-picker` for Envoy 1.37 and later. Sidecar at {sidecar}.",
        options=options,
        why=_WHY,
        removed=(header, "strip-destination"),
        idle=format_duration(IDLE_S),
        log=_LOG,
        routes=f"""\
              - match: {{prefix: /}}
{_route(config.picker.fallbacks)}\
                request_headers_to_remove: [{header}]
""",
        filters=request_fields(config),
        filters_behind="",
        message_timeout=format_duration(config.longest_budget_s + MARGIN_S),
        response_attributes="response.code_details",
        written="|".join(written),
        read=sorted(config.header_names().wanted()),
        received=f"{wire.PICK_NAMESPACE}, {wire.NAMESPACE}",
        forwarded=f"{wire.PICK_NAMESPACE}, {wire.FIELDS_NAMESPACE}" if config.request_fields else wire.PICK_NAMESPACE,
        clusters=_endpoints(header, config, options) + sidecar_cluster((sidecar,), here, {}),
    ).render()


def _require_what_it_can_say(config: Config, options: EnvoyOptions) -> None:
    problems = []
    if config.sources and config.picker.fallbacks:
        problems.append(
            "picker.fallbacks: an Envoy that knows discovered endpoints by our pick alone tries one address; leave it "
            "out, or list the endpoints"
        )
    if config.picker.read_model and not config.request_fields:
        problems.append(
            "picker.read_model: is for gateways that send bodies; this Envoy sends none: request_fields: true, with "
            "which it reads the model itself, would be right"
        )
    if config.tls is not None:
        problems.append("tls: leave it out for an Envoy of your own, at a unix socket or on loopback")
    if options.unqueued:
        problems.append("--unqueued: is for dialect: cluster-header")
    if problems:
        raise ConfigError("configuration", problems)


def _endpoints(header: str, config: Config, options: EnvoyOptions) -> str:
    """Return the cluster of all endpoints; `header` names the pick, as YAML writes it."""
    kind = "http2_protocol_options" if options.upstream_protocol == "h2" else "http_protocol_options"
    return f"""\
  - name: {CLUSTER}
    connect_timeout: 2s
{_addressed(header) if config.sources else _listed(header, config)}\
    circuit_breakers:
      thresholds:
      - {{max_connections: 100000, max_requests: 100000, max_pending_requests: 100000, max_retries: 100000}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        common_http_protocol_options: {{idle_timeout: {format_duration(config.upstream_idle_timeout)}}}
        explicit_http_config: {{{kind}: {{}}}}
"""


def _route(retries: int) -> str:
    if not retries:
        return f"""\
                # No retry: it would go where no lease is.
                route: {{cluster: {CLUSTER}, timeout: 0s}}
"""
    return f"""\
                # Next choices, if the picked server takes no connection: then it has begun nothing.
                route:
                  cluster: {CLUSTER}
                  timeout: 0s
                  retry_policy: {{retry_on: connect-failure, num_retries: {retries}}}
"""


def _addressed(header: str) -> str:
    """Return what makes a cluster of whatever address we pick."""
    return f"""\
    type: ORIGINAL_DST
    lb_policy: CLUSTER_PROVIDED
    # By metadata, which no client can write; a request that nobody picked for has none, and gets 503.
    original_dst_lb_config:
      metadata_key: {{key: {wire.PICK_NAMESPACE}, path: [{{key: {header}}}]}}
"""


def _listed(header: str, config: Config) -> str:
    """Return what makes a cluster of the endpoints that the file lists, of which the picked one alone is used."""
    hosts = "".join(f"        - endpoint: {{address: {socket_address(one.address)}}}\n" for one in config.endpoints)
    served, lb = json.dumps(wire.PICK_HEADER + "-served"), _LB
    return f"""\
    type: STATIC
    load_assignment:
      cluster_name: {CLUSTER}
      endpoints:
      - lb_endpoints:{"" if hosts else " []"}
{hosts}\
    load_balancing_policy:
      policies:
      - typed_extension_config:
          name: envoy.load_balancing_policies.override_host
          typed_config:
            "@type": {lb}override_host.v3.OverrideHost
            # By metadata, which no client can write.
            override_host_sources:
            - metadata: {{key: {wire.PICK_NAMESPACE}, path: [{{key: {header}}}]}}
            selected_host_key: {{key: {wire.PICK_NAMESPACE}, path: [{{key: {served}}}]}}
            # Nobody, not somebody: a host that is not here is 503. By default Envoy would choose any, uncounted.
            fallback_policy:
              policies:
              - typed_extension_config:
                  name: nobody
                  typed_config:
                    "@type": {lb}subset.v3.Subset
                    fallback_policy: NO_FALLBACK
                    subset_selectors: [{{keys: [nobody]}}]
                    subset_lb_policy:
                      policies:
                      - typed_extension_config:
                          name: any
                          typed_config:
                            "@type": {lb}round_robin.v3.RoundRobin
"""
