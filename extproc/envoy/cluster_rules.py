"""Rules of the bootstrap check about clusters: the sidecar's, the endpoints', and what comes back through them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from extproc.admission.limit import CEILING
from extproc.durations import parse_duration
from extproc.envoy.view import hosts_of, parse, same
from extproc.stream.again import UPSTREAM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extproc.envoy.view import View

_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
DEFAULT_BREAKER = 1024
MANY = 10_000
"""Requests held or running at once that Envoy should not stand in the way of."""


def ext_proc_cluster(view: View) -> Iterator[str]:
    """Yield what makes the sidecar's cluster lose requests: breakers, no HTTP/2, the flood guard."""
    cluster = view.sidecar_cluster
    if cluster is None:
        if view.static_clusters:
            name = view.filter.get("grpc_service", "envoy_grpc", "cluster_name")
            yield f"{view.filter.path}.grpc_service.envoy_grpc.cluster_name: there is no cluster {name!r}"
        return
    thresholds = (cluster.get("circuit_breakers", "thresholds") or [{}])[0]
    for key, default in (
        ("max_requests", DEFAULT_BREAKER),
        ("max_pending_requests", DEFAULT_BREAKER),
        ("max_retries", 3),
    ):
        if thresholds.get(key, default) < MANY:
            yield (
                f"{cluster.path}.circuit_breakers.thresholds[0].{key}: {thresholds.get(key, default)}: each held and each "
                f"running request counts, those above get 500 or go un-steered; {10 * MANY} would be right"
            )
    for check in cluster.each("health_checks"):
        if check.get("http_health_check") is not None:
            yield (
                f"{check.path}: the sidecar speaks gRPC there, and so fails a check by HTTP, alive or not; "
                "grpc_health_check: {} would be right"
            )
    options = cluster.get("typed_extension_protocol_options", _HTTP_OPTIONS) or {}
    http2 = (options.get("explicit_http_config") or options.get("auto_config") or {}).get("http2_protocol_options")
    if http2 is None:
        http2 = cluster.get("http2_protocol_options")  # where it was in older versions
    if http2 is None:
        yield (
            f"{cluster.path}.typed_extension_protocol_options: no http2_protocol_options: Envoy speaks HTTP/1.1 there, gRPC "
            "needs HTTP/2, and no request reaches the sidecar; explicit_http_config: {http2_protocol_options: "
            f"{{max_outbound_control_frames: {10 * MANY}}}}} would be right"
        )
    elif http2.get("max_outbound_control_frames", 1000) < MANY:
        yield (
            f"{cluster.path}.typed_extension_protocol_options: http2_protocol_options.max_outbound_control_frames: 1000 "
            f"streams that end in one moment close the connection with all that is held on it; {10 * MANY} would be right"
        )


def sidecar_tls(view: View) -> Iterator[str]:
    """Yield where Envoy and the sidecar would not agree on TLS, or believe anybody."""
    cluster = view.sidecar_cluster
    if cluster is None:
        return  # said already
    path, tls = f"{cluster.path}.transport_socket", view.config.tls
    if (cluster.get("transport_socket") is not None) is (tls is None):
        speaks = "plain text" if tls is None else "TLS"
        right = "remove it, or set tls" if tls is None else "what `extproc envoy-config` prints there would be right"
        yield f"{path}: the sidecar speaks {speaks} and Envoy would not: no request reaches it; {right}"
        return
    if tls is None:
        return
    context = cluster.get("transport_socket", "typed_config", "common_tls_context") or {}
    shown = any(key.startswith("tls_certificate") or key == "custom_tls_certificate_selector" for key in context)
    if tls.client_ca_file is not None and not shown:
        yield (
            f"{path}.typed_config.common_tls_context: lacks a certificate to show, and tls.client_ca_file asks for one; "
            "tls_certificate_sds_secret_configs would be right"
        )
    if not any("validation_context" in key for key in context):
        yield (
            f"{path}.typed_config.common_tls_context: lacks a validation context: Envoy believes whoever answers; "
            "combined_validation_context with the CA and the sidecar's name would be right"
        )
    elif "match_typed_subject_alt_names" not in str(context) and not context.get(
        "validation_context_sds_secret_config"
    ):
        yield (
            f"{path}.typed_config.common_tls_context: lacks match_typed_subject_alt_names: anyone with a certificate of "
            "that CA can be the sidecar; the DNS name in the sidecar's certificate would be right"
        )
    if "h2" not in (context.get("alpn_protocols") or []):
        yield (
            f"{path}.typed_config.common_tls_context.alpn_protocols: lacks h2, and gRPC servers refuse such a handshake; "
            "[h2] would be right"
        )


def endpoint_clusters(view: View) -> Iterator[str]:
    """Yield clusters of endpoints that are missing, or take fewer requests than the limit."""
    for index, endpoint in enumerate(view.config.endpoints):
        name = endpoint.cluster or endpoint.name
        cluster = view.clusters.get(name)
        if cluster is None and not view.static_clusters:
            continue  # it comes by CDS
        if cluster is None:
            yield f"static_resources.clusters: there is no {name!r}, the cluster of endpoints[{index}]: its requests get 503"
            continue
        limit = view.config.spec_of(endpoint).max_running_requests or CEILING
        thresholds = (cluster.get("circuit_breakers", "thresholds") or [{}])[0]
        http2 = "http2_protocol_options" in str(cluster.get("typed_extension_protocol_options"))
        for key in ("max_requests",) if http2 else ("max_requests", "max_connections"):
            if (most := thresholds.get(key, DEFAULT_BREAKER)) < limit:
                what = "get 503" if key == "max_requests" else "wait in Envoy, in no order"
                yield (
                    f"{cluster.path}.circuit_breakers.thresholds[0].{key}: {most} is below the limit of "
                    f"endpoints[{index}], {limit}: those above {what}; {10 * MANY} would be right"
                )


def overflow_clusters(view: View) -> Iterator[str]:
    """Yield clusters of last resort that are missing."""
    for index, one in enumerate(view.config.overflow_clusters):
        if view.static_clusters and one.name not in view.clusters:
            yield (
                f"static_resources.clusters: there is no {one.name!r}, overflow_clusters[{index}]: what is sent there "
                "gets 503"
            )


def second_try(view: View) -> Iterator[str]:
    """Yield what a request would need to come back, and has not."""
    again = view.config.second_try
    if again is None:
        return
    for route in view.steered:
        if not route.get("route", "retry_policy", "retry_priority"):
            yield (
                f"{route.path}.route.retry_policy: second_try needs retry_priority previous_priorities, "
                "update_frequency 1: else what can't be connected to is tried at the same server again"
            )
    if UPSTREAM not in (view.filter.get("response_attributes") or []):
        yield f"{view.filter.path}.response_attributes: lacks {UPSTREAM}, by which second_try sees whose an answer is"
    for endpoint in view.config.endpoints:
        cluster = view.clusters.get(endpoint.cluster or endpoint.name)
        if cluster is None:
            continue
        hosts = hosts_of(cluster)
        if hosts is not None and not any(same(host, parse(again)) for host in hosts):
            yield (
                f"{cluster.path}.load_assignment.endpoints: lacks {again} with priority 1, where second_try takes what "
                "can't be connected to"
            )
        elif (cluster.get("circuit_breakers", "thresholds") or [{}])[0].get("max_retries", 3) < MANY:
            yield (
                f"{cluster.path}.circuit_breakers.thresholds[0].max_retries: each request that came back counts there "
                f"until it is answered, so more get 503; {10 * MANY} would be right"
            )


def idle_connections(view: View) -> Iterator[str]:
    """Yield clusters that keep idle connections for longer than servers do."""
    wanted_s = view.config.upstream_idle_timeout
    for endpoint in view.config.endpoints:
        cluster = view.clusters.get(endpoint.cluster or endpoint.name)
        if cluster is None:
            continue
        options: dict[str, Any] = next(iter((cluster.get("typed_extension_protocol_options") or {}).values()), {})
        told = (options.get("common_http_protocol_options") or {}).get("idle_timeout")
        idle_s = parse_duration(str(told or ""))
        if idle_s is None or not 0 < idle_s <= wanted_s:
            yield (
                f"{cluster.path}: an idle connection is kept for {told or '1h'}, and most servers close theirs after 5 s: "
                "a request that meets that gets a 503; HttpProtocolOptions with common_http_protocol_options: "
                f"{{idle_timeout: {wanted_s:g}s}} would be right"
            )
