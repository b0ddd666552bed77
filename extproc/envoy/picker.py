"""Renders the Envoy bootstrap for `dialect: endpoint-picker`: one cluster of all endpoints, and a pick by address.

For an Envoy of your own, without a control plane. It is lean: two messages a request, and no body comes through us.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from extproc.durations import format_duration
from extproc.envoy.bootstrap import BODY_LIMIT, EXT_PROC_CLUSTER, IDLE_S, MARGIN_S, sidecar_address, socket_address
from extproc.errors import ConfigError
from extproc.stream import wire

if TYPE_CHECKING:
    from extproc.config import Config
    from extproc.envoy.bootstrap import EnvoyOptions

CLUSTER = "extproc_endpoints"
_LB = "type.googleapis.com/envoy.extensions.load_balancing_policies."


def render(config: Config, options: EnvoyOptions) -> str:
    """Return an Envoy bootstrap, as YAML with comments. Raises ConfigError for what it can't say."""
    problems = []
    if config.sources:
        problems.append("discovery: this bootstrap lists the endpoints; a control plane's Envoy knows them by itself")
    if config.tls is not None:
        problems.append("tls: leave it out for an Envoy of your own, at a unix socket or on loopback")
    if options.unqueued:
        problems.append("--unqueued: is for dialect: cluster-header")
    if problems:
        raise ConfigError("configuration", problems)
    sidecar = (options.sidecars or (config.listen,))[0]
    header = json.dumps(wire.PICK_HEADER)
    timing = (wire.SERVER_TIMING,) if config.server_timing else ()
    # By their beginnings: Envoy refuses an expression that names them all (RE2 program size).
    written = (*wire.REFUSAL_HEADERS, *timing, "x-gateway-.*", "x-llm-d-.*", "x-slo-.*")
    kind = "http2_protocol_options" if options.upstream_protocol == "h2" else "http_protocol_options"
    hosts = "".join(f"        - endpoint: {{address: {socket_address(one.address)}}}\n" for one in config.endpoints)
    read = "".join(
        f"                  - {{exact: {json.dumps(name)}}}\n" for name in sorted(config.header_names().wanted())
    )
    served, lb = json.dumps(wire.PICK_HEADER + "-served"), _LB
    return f"""\
# Written by `extproc envoy-config --dialect endpoint-picker` for Envoy 1.37 and later. Sidecar at {sidecar}.
admin:
  address: {socket_address(options.admin)}
static_resources:
  listeners:
  - name: ingress
    address: {socket_address(options.http)}
    # A client that vanishes without a packet is noticed by TCP keepalive alone; else its request is held and then run.
    tcp_keepalive: {{keepalive_time: 30, keepalive_interval: 10, keepalive_probes: 3}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          generate_request_id: true
          # Held time counts against it.
          stream_idle_timeout: {format_duration(IDLE_S)}
          request_timeout: 0s
          # A client that names its own destination is not heard, whatever becomes of the sidecar.
          early_header_mutation_extensions:
          - name: strip-destination
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation
              mutations:
              - remove: {header}
{_log(options)}\
          route_config:
            name: main
            virtual_hosts:
            - name: all
              domains: ["*"]
              request_body_buffer_limit: {BODY_LIMIT}
              routes:
              - match: {{prefix: /}}
                # No retry: it would go where no lease is.
                route: {{cluster: {CLUSTER}, timeout: 0s}}
                request_headers_to_remove: [{header}]
          http_filters:
          # A request waits, and takes a slot, when all of it is here.
          - name: envoy.filters.http.buffer
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer
              max_request_bytes: {BODY_LIMIT}
          - name: envoy.filters.http.ext_proc
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              grpc_service:
                envoy_grpc: {{cluster_name: {EXT_PROC_CLUSTER}}}
                timeout: 0s
                # Held requests are sent again to a restarted sidecar: a crash costs no client an error.
                retry_policy:
                  retry_on: connect-failure,reset,unavailable,cancelled
                  num_retries: 30
                  retry_back_off: {{base_interval: 0.2s, max_interval: 1s}}
              # Answers that run survive a sidecar's death; what nobody picked for finds no host, so 503.
              failure_mode_allow: true
              message_timeout: {format_duration(config.longest_budget_s + MARGIN_S)}
              # No bodies. Trailers SEND keeps the stream open until the answer ends: that gives the lease back.
              processing_mode:
                request_header_mode: SEND
                response_header_mode: SEND
                request_body_mode: NONE
                response_body_mode: NONE
                request_trailer_mode: SKIP
                response_trailer_mode: SEND
              request_attributes: [request.time, request.id]
              response_attributes: [response.code_details]
              mutation_rules:
                disallow_all: true
                allow_expression: {{regex: {json.dumps("|".join(written))}}}
              forward_rules:
                allowed_headers:
                  patterns:
{read}\
              metadata_options:
                receiving_namespaces: {{untyped: [{wire.PICK_NAMESPACE}, {wire.NAMESPACE}]}}
                forwarding_namespaces: {{untyped: [{wire.PICK_NAMESPACE}]}}
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}

  clusters:
  - name: {CLUSTER}
    type: STATIC
    connect_timeout: 2s
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
    circuit_breakers:
      thresholds: [{{max_connections: 100000, max_requests: 100000, max_pending_requests: 100000}}]
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        common_http_protocol_options: {{idle_timeout: {format_duration(config.upstream_idle_timeout)}}}
        explicit_http_config: {{{kind}: {{}}}}
  - name: {EXT_PROC_CLUSTER}
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: {EXT_PROC_CLUSTER}
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {sidecar_address(sidecar)}}}}}]}}]
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options:
            max_concurrent_streams: 1024
            max_outbound_control_frames: 100000
            max_outbound_frames: 200000
            connection_keepalive: {{interval: 5s, timeout: 3s}}
    circuit_breakers:
      thresholds:
      - {{max_connections: 1000, max_requests: 100000, max_pending_requests: 100000, max_retries: 100000}}
"""


def _log(options: EnvoyOptions) -> str:
    if options.access_log is None:
        return ""
    return f"""\
          access_log:
          - name: file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: {json.dumps(options.access_log)}
              log_format:
                json_format:
                  time: "%START_TIME%"
                  request_id: "%REQ(X-REQUEST-ID)%"
                  path: "%PATH(NQ:ORIG_OR_PATH)%"
                  code: "%RESPONSE_CODE%"
                  details: "%RESPONSE_CODE_DETAILS%"
                  upstream: "%UPSTREAM_HOST%"
                  queue: "%DYNAMIC_METADATA({wire.NAMESPACE})%"
"""
