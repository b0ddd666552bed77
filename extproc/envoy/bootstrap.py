"""Renders the Envoy bootstrap that fits a configuration. `envoy/*.yaml` are written from here too.

Every setting that differs from Envoy's default is there because something was measured on Envoy 1.40; the comments in
the output say what. Text, not a data structure, so that those comments reach the person who merges it into their own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from extproc.config import split_address
from extproc.durations import format_duration
from extproc.errors import ConfigError
from extproc.stream import wire
from extproc.stream.again import UPSTREAM
from extproc.stream.request import MAX_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from extproc.config import Config, HealthCheckConfig, TlsEnvoyConfig

MARGIN_S = 20.0
"""message_timeout above the longest budget: Envoy must never give up before we do."""
IDLE_S = 3700.0
"""stream_idle_timeout; held time counts against it, and so does the silence before a first token."""
BODY_LIMIT = 32 << 20
EXT_PROC_CLUSTER = "extproc_queue"
UNSTEERED_CLUSTER = "unsteered"
ANY_CLUSTER = "extproc_any_endpoint"
"""In a clusters file: all endpoints at once, for requests that no sidecar steered."""


@dataclass(frozen=True, slots=True)
class EnvoyOptions:
    """What the bootstrap needs beyond the sidecar's configuration.

    Attributes:
        http: host:port of Envoy's listener.
        admin: host:port of Envoy's admin interface.
        access_log: path of a JSON access log; None: no log.
        upstream_protocol: what the endpoints speak, "h1" or "h2" (prior knowledge).
        fail_open: what happens while no sidecar answers: True: requests go to any endpoint; False: they get 503.
        sidecars: where Envoy finds sidecars, as in `listen`; none: where the configuration says that this one listens.
        unqueued: exact paths that go past the queue, to any endpoint: for probes, which must not get its refusals.
    """

    http: str = "127.0.0.1:8080"
    admin: str = "127.0.0.1:9901"
    access_log: str | None = "/dev/stdout"
    upstream_protocol: str = "h1"
    fail_open: bool = False
    sidecars: tuple[str, ...] = ()
    unqueued: tuple[str, ...] = ()


def render(config: Config, options: EnvoyOptions) -> str:
    """Return an Envoy bootstrap, as YAML with comments."""
    endpoints = [(endpoint.cluster or endpoint.name, endpoint.address) for endpoint in config.endpoints]
    addresses = [address for _, address in endpoints]
    count = f"{len(endpoints)} and the found" if config.sources else len(endpoints)
    in_file = config.envoy_clusters_file is not None
    unsteered = ANY_CLUSTER if in_file and options.fail_open else UNSTEERED_CLUSTER
    clusters = [] if unsteered == ANY_CLUSTER else [_unsteered_cluster(addresses, config, options)]
    any_endpoint = unsteered if options.fail_open else ANY_CLUSTER
    if options.unqueued and not options.fail_open and not in_file:
        clusters.append(
            _any_cluster(
                ANY_CLUSTER, addresses, config.health_check, options.upstream_protocol, config.upstream_idle_timeout
            )
        )
    late = in_file and (options.fail_open or bool(options.unqueued))
    if not in_file:
        clusters += [
            _endpoint_cluster(cluster, address, options.upstream_protocol, config) for cluster, address in endpoints
        ]
    clusters += [
        _endpoint_cluster(one.name, one.address, options.upstream_protocol, config, may_retry=False)
        for one in config.overflow_clusters
        if one.address is not None
    ]
    names = config.header_names()
    wanted = sorted(name for name in names.wanted() if name != names.cluster)
    written = wire.written(names.cluster, server_timing=config.server_timing, second_try=names.again)
    header = json.dumps(names.cluster)
    message_timeout = format_duration(config.longest_budget_s + MARGIN_S)
    sidecars = options.sidecars or (config.listen,)
    return f"""\
# Written by `extproc envoy-config` for Envoy 1.40. Sidecar at {", ".join(sidecars)}; {count} endpoint(s).
admin:
  address: {socket_address(options.admin)}
{_dynamic(config)}
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
          codec_type: AUTO
          generate_request_id: true
          # Held time counts against it (504, flag SI). Above message_timeout and above an engine's longest silence.
          stream_idle_timeout: {format_duration(IDLE_S)}
          # Leave request_timeout and max_stream_duration unset: both count held time, and end requests that wait.
          request_timeout: 0s
          # The routing header is ours: a client's own is dropped before any route is chosen. A header_mutation filter
          # would be too late, the route is cached by then.
          early_header_mutation_extensions:
          - name: strip-routing-header
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation
              mutations:
              - remove: {header}
{_access_log(config, options)}\
          route_config:
            name: main
{_late_cluster(late)}\
            virtual_hosts:
            - name: all
              domains: ["*"]
              # Above the default of 1 MiB, a client that leaves while its bigger HTTP/1.1 body is held goes unnoticed,
              # and its request is run for nobody. Costs up to this much memory per held request.
              request_body_buffer_limit: {BODY_LIMIT}
              routes:
{_unqueued_routes(any_endpoint, config, options)}\
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
{_upgrade_route(config, unsteered)}              # Not steered: no sidecar answered. {_unsteered_comment(options)}
              # It must be a route, not a direct_response: with that, the buffer limit above does not hold.
              - match: {{prefix: /}}
                route: {{cluster: {unsteered}, timeout: 0s}}
                response_headers_to_add:
                # Only what came past our filter, as the last filter notes: not what Envoy itself refused before (413).
                - {{header: {{key: x-extproc-outcome, value: "{_UNSTEERED}"}}}}
{_upgrades(config)}\
          http_filters:
          # A request waits, and takes a slot, when all of it is here: a body that stalls costs nobody a slot. Above the
          # size the answer is 413.
          - name: {_BUFFER}
            typed_config:
              "@type": {_FILTERS}buffer.v3.Buffer
              max_request_bytes: {BODY_LIMIT}
{_request_fields(config)}\
          - name: envoy.filters.http.ext_proc
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              grpc_service:
                envoy_grpc: {{cluster_name: {EXT_PROC_CLUSTER}}}
                timeout: 0s
                # Held requests are sent again to a restarted or second sidecar: a crash costs no client an error.
                retry_policy:
                  retry_on: connect-failure,reset,unavailable,cancelled
                  num_retries: 30
                  retry_back_off: {{base_interval: 0.2s, max_interval: 1s}}
{_other_host(sidecars)}\
              # true: answers that run survive a sidecar's death. New requests then take the second route.
              failure_mode_allow: true
              # Default 200 ms. Above the longest budget ({config.longest_budget_s:g}s); at most 3600s.
              message_timeout: {message_timeout}
              # Trailers SEND keeps the stream open until the answer ends: that end gives the lease back.
              processing_mode:
                request_header_mode: SEND
                response_header_mode: SEND
                request_body_mode: NONE
                response_body_mode: NONE
                request_trailer_mode: SKIP
                response_trailer_mode: SEND
              allow_mode_override: false
              request_attributes: [request.time, request.id]
              response_attributes: [{", ".join(_attributes(config))}]
              # The sidecar may write the routing header, and the headers of its refusals: the rules apply to those too.
              mutation_rules:
                disallow_all: true
                allow_expression: {{regex: {json.dumps("|".join(map(_regex, written)))}}}
              # ... and sees these headers and nothing else: no authorization, no cookies.
              forward_rules:
                allowed_headers:
                  patterns:
{_lines(18, [f"- {{exact: {json.dumps(name)}}}" for name in wanted])}\
              metadata_options:
                receiving_namespaces: {{untyped: [{", ".join(_received(config))}]}}
{_forward_fields(config)}\
{_first_byte_probe(config)}\
          - name: envoy.filters.http.set_metadata
            typed_config:
              "@type": {_FILTERS}set_metadata.v3.Config
              metadata: [{{metadata_namespace: {wire.UNSTEERED_NAMESPACE}, value: {{outcome: unsteered}}}}]
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}

  clusters:
  - name: {EXT_PROC_CLUSTER}
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: {EXT_PROC_CLUSTER}
      endpoints:
      - lb_endpoints:
{_lines(8, [f"- {{endpoint: {{address: {sidecar_address(address)}}}}}" for address in sidecars])}\
{_sidecar_health(sidecars)}\
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          http2_protocol_options:
            max_concurrent_streams: 1024
            # Envoy resets each stream that ends. At 1,000 unsent resets its flood guard closes the connection and all
            # that is held on it: many releases in one moment do that.
            max_outbound_control_frames: 100000
            max_outbound_frames: 200000
            # A hung sidecar is noticed in 8 s: until then heads of answers wait for it. Our server allows pings this
            # often; one with gRPC's defaults would close the connection.
            connection_keepalive: {{interval: 5s, timeout: 3s}}
{_sidecar_tls(config)}\
    # Every held and every running request counts here. By default the 1,025th would get a 500 or go un-steered.
    circuit_breakers:
      thresholds:
      - {{max_connections: 1000, max_requests: 100000, max_pending_requests: 100000, max_retries: 100000}}
{"".join(clusters)}"""


def render_clusters(routes: Mapping[str, str], addresses: Iterable[str], version: int, config: Config) -> str:
    """Return the file that Envoy follows: `routes` are cluster -> address; `addresses` share a cluster."""
    clusters = [
        _endpoint_cluster(cluster, address, config.upstream_protocol, config) for cluster, address in routes.items()
    ]
    clusters.append(
        _any_cluster(
            ANY_CLUSTER, sorted(addresses), config.health_check, config.upstream_protocol, config.upstream_idle_timeout
        )
    )
    kind = '    "@type": type.googleapis.com/envoy.config.cluster.v3.Cluster\n'
    named = (cluster.partition("\n") for cluster in clusters)
    return f"""\
# Written by extproc, whenever an endpoint comes or goes. Envoy follows it: cds_config of its bootstrap.
version_info: "{version}"
resources:
{"".join(name + newline + kind + rest for name, newline, rest in named)}"""


def socket_address(address: str) -> str:
    """Return `HOST:PORT` as Envoy writes an address, in YAML's flow style."""
    host, port = split_address(address)
    return f"{{socket_address: {{address: {json.dumps(host)}, port_value: {port}}}}}"


def sidecar_address(listen: str) -> str:
    """Return where the sidecar listens, the same way: `unix:PATH` or `HOST:PORT`."""
    if listen.startswith("unix:"):
        return f"{{pipe: {{path: {json.dumps(listen.removeprefix('unix:'))}}}}}"
    return socket_address(listen)


def _other_host(sidecars: tuple[str, ...]) -> str:
    if len(sidecars) == 1:
        return ""
    return """\
                  # Not to the one that just went away.
                  retry_host_predicate:
                  - name: envoy.retry_host_predicates.previous_hosts
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate
                  host_selection_retry_max_attempts: 5
"""


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


_FILTERS = "type.googleapis.com/envoy.extensions.filters.http."
_PROBE = "first-byte-probe"
_BUFFER, _JSON, _FORMS = "envoy.filters.http.buffer", "envoy.filters.http.json_to_metadata", "envoy.filters.http.lua"
_UNSTEERED = f"%DYNAMIC_METADATA({wire.UNSTEERED_NAMESPACE}:outcome)%"
_TLS_TYPES = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
_CA_SECRET, _CLIENT_SECRET = "extproc_ca", "extproc_client"


def _sidecar_tls(config: Config) -> str:
    """Return how Envoy meets a sidecar with TLS. Raises ConfigError if the configuration does not tell."""
    if config.tls is None:
        return ""
    envoy = config.tls.envoy
    if envoy is None:
        problem = "tls.envoy: is needed here: with which CA, name and certificate shall Envoy meet the sidecar's tls?"
        raise ConfigError("configuration", [problem])
    name = json.dumps(envoy.server_name)
    shown = ""
    if envoy.cert_file is not None:
        shown = f"""\
          tls_certificate_sds_secret_configs:
          - name: {_CLIENT_SECRET}
            sds_config: {_followed(envoy, _CLIENT_SECRET)}
"""
    return f"""\
    # Only a certificate with this name, signed by this CA, is believed. Envoy follows the files: none of them needs a
    # restart when it is rotated. `extproc envoy-config --secrets DIR` writes the files in {envoy.secrets_directory}.
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": {_TLS_TYPES}UpstreamTlsContext
        sni: {name}
        common_tls_context:
          tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}
          alpn_protocols: [h2]
{shown}\
          combined_validation_context:
            default_validation_context:
              match_typed_subject_alt_names: [{{san_type: DNS, matcher: {{exact: {name}}}}}]
            validation_context_sds_secret_config:
              name: {_CA_SECRET}
              sds_config: {_followed(envoy, _CA_SECRET)}
"""


def _followed(envoy: TlsEnvoyConfig, secret: str) -> str:
    path = PurePosixPath(envoy.secrets_directory) / f"{secret}.yaml"
    return f"{{path_config_source: {{path: {json.dumps(str(path))}}}, resource_api_version: V3}}"


def render_secrets(config: Config) -> dict[str, str]:
    """Return the files that tell Envoy which certificate files to follow: name -> text. They hold no secret.

    Envoy follows certificate files only if another file names them (SDS); named in the bootstrap they are read once.
    """
    envoy = None if config.tls is None else config.tls.envoy
    if envoy is None:
        raise ConfigError("configuration", ["tls.envoy: is needed to write the files that name Envoy's certificates"])
    bodies = {_CA_SECRET: f"validation_context:\n    trusted_ca: {_file(envoy.ca_file)}"}
    if envoy.cert_file is not None and envoy.key_file is not None:
        bodies[_CLIENT_SECRET] = f"""\
tls_certificate:
    certificate_chain: {_file(envoy.cert_file)}
    private_key: {_file(envoy.key_file)}"""
    return {
        f"{secret}.yaml": f"""\
# Written by `extproc envoy-config --secrets`. Envoy reads the files named here again when something is renamed in their
# directory, as Kubernetes does when a secret changes. By hand: write new files beside the old ones, and rename them.
resources:
- "@type": {_TLS_TYPES}Secret
  name: {secret}
  {body}
"""
        for secret, body in bodies.items()
    }


def _file(path: str) -> str:
    return f"{{filename: {json.dumps(path)}}}"


def _regex(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter == "-" else f"[{letter}]" for letter in name)


_FIELDS = (
    *("model", "max_tokens", "max_completion_tokens", "n", "user", "safety_identifier", "prompt_cache_key"),
    *("service_tier", "priority"),
)


def _request_fields(config: Config) -> str:
    if not config.request_fields:
        return ""
    space = wire.FIELDS_NAMESPACE
    rules = [
        f"- {{selectors: [{{key: '{key}'}}], on_present: {{metadata_namespace: {space}, key: '{key}'}}}}"
        for key in _FIELDS
    ]
    return f"""\
          # The model of a form, as for audio/transcriptions. It looks at no other body.
          - name: {_FORMS}
            typed_config:
              "@type": {_FILTERS}lua.v3.Lua
              default_source_code:
                inline_string: |
{_lines(18, _FORM_MODEL.splitlines())}\
          # Reads fields of the JSON body; a compressed one it can't.
          # Its response rules, and the sse_to_metadata filter, are left alone: in 1.40 one engine event crashes Envoy.
          - name: {_JSON}
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.json_to_metadata.v3.JsonToMetadata
              request_rules:
                # By default "application/json; charset=utf-8" would not be read.
                allow_content_types_regex: {{regex: "application/json(\\\\s*;.*)?"}}
                allow_empty_content_type: true
                rules:
{_lines(16, rules)}"""


_FORM_MODEL = f"""\
function envoy_on_request(handle)
  local kind = handle:headers():get("content-type") or ""
  if not kind:lower():find("^multipart/form%-data") then return end
  local mark = kind:match('[Bb]oundary="([^"]+)"') or kind:match("[Bb]oundary=([^;%s]+)")
  local body = mark and handle:body()
  if not body then return end
  local text = body:getBytes(0, body:length())
  mark = "--" .. mark
  local at = text:find(mark, 1, true)
  while at do
    local head_end = text:find("\\r\\n\\r\\n", at, true)
    local after = head_end and text:find("\\r\\n" .. mark, head_end + 2, true)
    if not after then return end
    local head = text:sub(at, head_end)
    if head:find(';%s*name="model"') or head:find(";%s*name=model[;\\r]") then
      local model = text:sub(head_end + 4, after - 1)
      if #model <= {MAX_NAME} then
        handle:streamInfo():dynamicMetadata():set("{wire.FIELDS_NAMESPACE}", "model", model)
      end
      return
    end
    at = after + 2
  end
end
"""


def _received(config: Config) -> tuple[str, ...]:
    return (wire.NAMESPACE, *((wire.TICKETS_NAMESPACE,) if config.first_byte_probe else ()))


def _upgrades(config: Config) -> str:
    if not config.upgrades:
        return ""
    return """\
          # WebSockets: each holds its slot for as long as it is open.
          upgrade_configs: [{upgrade_type: websocket}]
"""


def _upgrade_route(config: Config, cluster: str) -> str:
    if not config.upgrades:
        return ""
    names = [_BUFFER, *((_FORMS, _JSON) if config.request_fields else ())]
    off = '{"@type": type.googleapis.com/envoy.config.route.v3.FilterConfig, disabled: true}'
    return f"""\
              # A WebSocket on arrival: its "body" ends when it closes, so nothing may wait for all of it.
              - match:
                  prefix: /
                  headers: [{{name: upgrade, present_match: true}}]
                route: {{cluster: {cluster}, timeout: 0s}}
                typed_per_filter_config:
{_lines(18, [f"{name}: {off}" for name in names])}\
                response_headers_to_add:
                - {{header: {{key: x-extproc-outcome, value: "{_UNSTEERED}"}}}}
"""


def _forward_fields(config: Config) -> str:
    if not config.request_fields:
        return ""
    return f"                forwarding_namespaces: {{untyped: [{wire.FIELDS_NAMESPACE}]}}\n"


def _first_byte_probe(config: Config) -> str:
    if not config.first_byte_probe:
        return ""
    return f"""\
          # Shows the sidecar the first piece of each answer, and nothing more: the sidecar ends the stream at once.
          # failure_mode_allow: false would cut the answer when no sidecar is there.
          - name: {_PROBE}
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              stat_prefix: probe
              grpc_service: {{envoy_grpc: {{cluster_name: {EXT_PROC_CLUSTER}}}, timeout: 0s}}
              observability_mode: true
              failure_mode_allow: true
              allow_content_length_header: true
              deferred_close_timeout: 0.1s
              processing_mode:
                request_header_mode: SKIP
                response_header_mode: SKIP
                request_body_mode: NONE
                response_body_mode: STREAMED
                request_trailer_mode: SKIP
                response_trailer_mode: SKIP
              # Our own number of the request, from the answer of the filter above: no header of a client's can be it.
              metadata_options:
                forwarding_namespaces: {{untyped: [{wire.TICKETS_NAMESPACE}]}}
"""


def _lines(indent: int, lines: list[str]) -> str:
    return "".join(f"{' ' * indent}{line}\n" for line in lines)


def _unsteered_comment(options: EnvoyOptions) -> str:
    if options.fail_open:
        return "Fail open: any endpoint takes it, up to their circuit breaker."
    return "Fail closed: the cluster is empty, so 503."


def _access_log(config: Config, options: EnvoyOptions) -> str:
    if options.access_log is None:
        return ""
    in_body = f"""\
                  model_in_body: "%DYNAMIC_METADATA({wire.FIELDS_NAMESPACE}:model)%"
"""
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
                  method: "%REQ(:METHOD)%"
                  path: "%PATH(NQ:ORIG_OR_PATH)%"
                  model: "%REQ({config.headers.model[0]})%"
{in_body if config.request_fields else ""}\
                  code: "%RESPONSE_CODE%"
                  flags: "%RESPONSE_FLAGS%"
                  details: "%RESPONSE_CODE_DETAILS%"
                  cluster: "%UPSTREAM_CLUSTER%"
                  attempts: "%UPSTREAM_REQUEST_ATTEMPT_COUNT%"
                  duration_ms: "%DURATION%"
                  bytes_received: "%BYTES_RECEIVED%"
                  queue: "%DYNAMIC_METADATA({wire.NAMESPACE})%"
"""


def _lb_endpoint(address: str) -> str:
    return f"{{endpoint: {{address: {socket_address(address)}}}}}"


def _unqueued_routes(cluster: str, config: Config, options: EnvoyOptions) -> str:
    if not options.unqueued:
        return ""
    names = ["envoy.filters.http.ext_proc", *([_PROBE] if config.first_byte_probe else [])]
    off = f'{{"@type": {_FILTERS}ext_proc.v3.ExtProcPerRoute, disabled: true}}'
    routes = "".join(
        f"""\
              - match: {{path: {json.dumps(path)}}}
                route: {{cluster: {cluster}}}
                typed_per_filter_config:
{_lines(18, [f"{name}: {off}" for name in names])}"""
        for path in options.unqueued
    )
    return f"""\
              # Past the queue, to any endpoint: for probes, which would else wait and be refused when all is full. The
              # sidecar does not see them, and no limit counts them. Exact paths, whatever the method.
{routes}"""


def _late_cluster(late: bool) -> str:
    if not late:
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
    path_config_source: {{path: {json.dumps(config.envoy_clusters_file)}}}
    resource_api_version: V3
"""


def _unsteered_cluster(addresses: list[str], config: Config, options: EnvoyOptions) -> str:
    if options.fail_open:
        return _any_cluster(
            UNSTEERED_CLUSTER, addresses, config.health_check, options.upstream_protocol, config.upstream_idle_timeout
        )
    return f"""\
  - name: {UNSTEERED_CLUSTER}
    type: STATIC
    connect_timeout: 1s
    load_assignment: {{cluster_name: {UNSTEERED_CLUSTER}}}
"""


def _any_cluster(
    name: str, addresses: list[str], health: HealthCheckConfig | None, protocol: str, idle_s: float
) -> str:
    """Return the cluster that takes what nobody steered. It alone has health checks of Envoy's own.

    An endpoint's cluster has one host, and the sidecar chooses it: if Envoy thought it down, it would panic and send
    the request all the same, or refuse what the sidecar had just decided.
    """
    return f"""\
  - name: {name}
    type: STRICT_DNS
    connect_timeout: 1s
    lb_policy: LEAST_REQUEST
    load_assignment:
      cluster_name: {name}
      endpoints:
      - lb_endpoints:{"" if addresses else " []"}
{_lines(8, [f"- {_lb_endpoint(address)}" for address in addresses])}\
    # Its own breaker: without a queue, what the engines can't take is refused here.
    circuit_breakers: {{thresholds: [{{max_connections: 1000, max_requests: {64 * max(len(addresses), 1)}}}]}}
{_health(health, protocol)}\
{_protocol(protocol, idle_s)}"""


def _health(health: HealthCheckConfig | None, protocol: str) -> str:
    if health is None:
        return ""
    interval = format_duration(health.interval)
    return f"""\
    # The sidecar's own numbers. no_traffic_interval is 60 s by default, and no traffic is the normal case here.
    health_checks:
    - interval: {interval}
      no_traffic_interval: {interval}
      timeout: {format_duration(health.timeout)}
      unhealthy_threshold: {health.unhealthy_threshold}
      healthy_threshold: {health.healthy_threshold}
      http_health_check:
        path: {json.dumps(health.path)}
        expected_statuses: [{{start: 200, end: 300}}]
        codec_client_type: {"HTTP2" if protocol == "h2" else "HTTP1"}
"""


def _protocol(protocol: str, idle_s: float) -> str:
    kind = "http2_protocol_options" if protocol == "h2" else "http_protocol_options"
    return f"""\
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        # Below the server's own (uvicorn: 5 s): a request that meets a connection as the server closes it gets a 503.
        common_http_protocol_options: {{idle_timeout: {format_duration(idle_s)}}}
        explicit_http_config: {{{kind}: {{}}}}
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


def _endpoint_cluster(cluster: str, address: str, protocol: str, config: Config, *, may_retry: bool = True) -> str:
    name, again, idle_s = json.dumps(cluster), config.second_try, config.upstream_idle_timeout
    back, most_retries = "", ""
    if again is not None and may_retry:
        back = f"      - {{priority: 1, lb_endpoints: [{_lb_endpoint(again)}]}}\n"
        most_retries = ", max_retries: 100000"  # each that came back counts here until it is answered; 3 by default
    return f"""\
  - name: {name}
    type: {"STATIC" if _is_ip(address) else "STRICT_DNS"}
    connect_timeout: 2s
    load_assignment:
      cluster_name: {name}
      endpoints:
      - {{lb_endpoints: [{_lb_endpoint(address)}]}}
{back}    # The sidecar's limits decide; Envoy's default of 1024 must not.
    circuit_breakers:
      thresholds: [{{max_connections: 100000, max_requests: 100000, max_pending_requests: 100000{most_retries}}}]
{_protocol(protocol, idle_s)}"""


def _is_ip(address: str) -> bool:
    """Tell whether nothing has to be looked up: Envoy knows a STATIC cluster at once, a DNS one after an answer."""
    try:
        ip_address(split_address(address)[0])
    except ValueError:
        return False
    return True
