"""Envoy's clusters of the endpoints: one for each, one of all for what nobody steered, and the file that has them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from extproc.durations import format_duration
from extproc.envoy.skeleton import has_ip, lines, socket_address

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from extproc.config import Config, HealthCheckConfig
    from extproc.envoy.skeleton import EnvoyOptions

UNSTEERED_CLUSTER = "unsteered"
ANY_CLUSTER = "extproc_any_endpoint"
"""All endpoints at once, for requests that no sidecar steered: behind the bypass, and in a clusters file."""
UNQUEUED_CLUSTER = "extproc_unqueued"
"""The same, for paths that go past the queue as they should: no alert counts them as unsteered."""


def render_clusters(routes: Mapping[str, str], addresses: Iterable[str], version: int, config: Config) -> str:
    """Return the file that Envoy follows: `routes` are cluster -> address; `addresses` share a cluster."""
    clusters = [
        endpoint_cluster(cluster, address, config.upstream_protocol, config) for cluster, address in routes.items()
    ]
    hosts = sorted(addresses)
    clusters += [any_cluster(name, hosts, config.upstream_protocol, config) for name in (ANY_CLUSTER, UNQUEUED_CLUSTER)]
    kind = '    "@type": type.googleapis.com/envoy.config.cluster.v3.Cluster\n'
    named = (cluster.partition("\n") for cluster in clusters)
    return f"""\
# Written by extproc, whenever an endpoint comes or goes. Envoy follows it: cds_config of its bootstrap.
version_info: "{version}"
resources:
{"".join(name + newline + kind + rest for name, newline, rest in named)}"""


def unsteered_cluster(addresses: list[str], config: Config, options: EnvoyOptions) -> str:
    """Return the cluster of requests that no sidecar steered: empty, so that they get 503, unless it fails open."""
    if options.fail_open:
        return any_cluster(UNSTEERED_CLUSTER, addresses, options.upstream_protocol, config)
    return f"""\
  - name: {UNSTEERED_CLUSTER}
    type: STATIC
    connect_timeout: 1s
    load_assignment: {{cluster_name: {UNSTEERED_CLUSTER}}}
"""


def any_cluster(name: str, addresses: Sequence[str], protocol: str, config: Config) -> str:
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
{lines(8, [f"- {_lb_endpoint(address)}" for address in addresses])}\
    # Its own breaker: without a queue, what the engines can't take is refused here. Each that goes to another endpoint
    # counts among retries until it is answered; by default 3 may.
    circuit_breakers:
      thresholds: [{{max_connections: 1000, max_requests: {64 * max(len(addresses), 1)}, max_retries: 100000}}]
    # Who takes no connection is left out for 5 s, as long as another one is left. What a server answers counts nothing.
    outlier_detection:
      split_external_local_origin_errors: true
      consecutive_local_origin_failure: 3
      enforcing_consecutive_5xx: 0
      enforcing_consecutive_gateway_failure: 0
      enforcing_success_rate: 0
      enforcing_local_origin_success_rate: 0
      interval: 1s
      base_ejection_time: 5s
      max_ejection_time: 5s
      max_ejection_percent: 100
    common_lb_config: {{healthy_panic_threshold: {{value: 1}}}}
{_health(config.health_check, protocol)}\
{_protocol(protocol, config.upstream_idle_timeout)}"""


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


def endpoint_cluster(cluster: str, address: str, protocol: str, config: Config, *, may_retry: bool = True) -> str:
    """Return an endpoint\'s own cluster: one host, since the sidecar chooses. `may_retry`: with its second priority."""
    name, again, idle_s = json.dumps(cluster), config.second_try, config.upstream_idle_timeout
    back = ""
    if again is not None and may_retry:
        back = f"      - {{priority: 1, lb_endpoints: [{_lb_endpoint(again)}]}}\n"
    return f"""\
  - name: {name}
    type: {"STATIC" if has_ip(address) else "STRICT_DNS"}
    connect_timeout: 2s
    load_assignment:
      cluster_name: {name}
      endpoints:
      - {{lb_endpoints: [{_lb_endpoint(address)}]}}
{back}    # The sidecar's limits decide; Envoy's defaults of 1024, and of 3 that are sent again, must not.
    circuit_breakers:
      thresholds:
      - {{max_connections: 100000, max_requests: 100000, max_pending_requests: 100000, max_retries: 100000}}
{_protocol(protocol, idle_s)}"""


def _lb_endpoint(address: str) -> str:
    return f"{{endpoint: {{address: {socket_address(address)}}}}}"
