"""Envoy as the control planes of Inference Gateways set it up: the parts that an endpoint picker meets.

Read from their sources (Istio 1.31, Envoy AI Gateway 1.1, the llm-d router's standalone chart 0.10); no control plane
runs here, so what each of them adds around these parts is not shown by the tests that use this.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .envoy import Envoy
from .stack import local

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_EXTENSIONS = "type.googleapis.com/envoy.extensions."
_HTTP2 = {
    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": _EXTENSIONS + "upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
}
HEADER = "x-gateway-destination-endpoint"
EPP = "picker"

DUPLEX = {
    "request_header_mode": "SEND",
    "response_header_mode": "SEND",
    "request_body_mode": "FULL_DUPLEX_STREAMED",
    "response_body_mode": "FULL_DUPLEX_STREAMED",
    "request_trailer_mode": "SEND",
    "response_trailer_mode": "SEND",
}
BUFFERED = {**DUPLEX, "request_body_mode": "BUFFERED", "response_body_mode": "BUFFERED"}
LEAN = {
    "request_header_mode": "SEND",
    "response_header_mode": "SEND",
    "request_body_mode": "NONE",
    "response_body_mode": "NONE",
    "request_trailer_mode": "SKIP",
    "response_trailer_mode": "SEND",
}
READING = {**LEAN, "request_body_mode": "BUFFERED"}
"""Requests alone, each as one message: an EnvoyFilter for `picker.read_model`, where no mode may be overridden."""
KINDS = ("istio", "istio-lean", "llm-d", "ai-gateway", "ai-gateway-buffered")


def bootstrap(
    kind: str,
    http: str,
    picker: str,
    endpoints: Sequence[str],
    access_log: Path,
    *,
    retries: int = 0,
    fail_open: bool = False,
    selected_host: bool = True,
    subset: Sequence[str] = (),
    buffer_bytes: int | None = None,
    idle_s: float = 0,
    tls: bool = False,
    message_timeout: str = "",
    refuses: bool = False,
    may_override: bool = True,
) -> dict[str, Any]:
    """Return the bootstrap of a gateway of this kind, whose picker is at `picker`, with `tls` if it has that.

    `may_override`: a mode that the picker asks for is followed, where bodies are buffered;
    `selected_host`: it tells who served (not on Envoy 1.36); `subset`: the addresses that it allows; `refuses`: a
    filter before ext_proc answers each request, as one that authorizes might.
    """
    by_metadata = kind.startswith("istio")
    mode = {"istio-lean": LEAN, "istio-reading": READING, "ai-gateway-buffered": BUFFERED}.get(kind, DUPLEX)
    spaces = {"untyped": ["envoy.lb", *(["envoy.lb.subset_hint"] if subset else [])]}
    service = {"envoy_grpc": {"cluster_name": EPP}}
    off = dict.fromkeys(("request_header_mode", "response_header_mode"), "SKIP")
    ext_proc: dict[str, Any] = {
        "@type": _EXTENSIONS + "filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": service,
        "processing_mode": off if by_metadata else mode,
        "message_timeout": message_timeout or ("1000s" if by_metadata else "300s"),
        "allow_mode_override": kind == "ai-gateway-buffered" and may_override,
    }
    if by_metadata:
        ext_proc["metadata_options"] = {"forwarding_namespaces": spaces, "receiving_namespaces": spaces}
    elif kind == "llm-d":
        ext_proc["failure_mode_allow"] = fail_open
    overrides = {"grpc_service": service, "processing_mode": mode, "failure_mode_allow": fail_open}
    per_route = {"@type": _EXTENSIONS + "filters.http.ext_proc.v3.ExtProcPerRoute", "overrides": overrides}
    route: dict[str, Any] = {
        "match": {"prefix": "/"},
        "route": {"cluster": "pool", "timeout": "0s"},
    }
    if by_metadata:
        route["typed_per_filter_config"] = {"envoy.filters.http.ext_proc": per_route}
    if retries:
        route["route"]["retry_policy"] = {
            "retry_on": "connect-failure,refused-stream,unavailable,cancelled",
            "num_retries": retries,
        }
    manager: dict[str, Any] = {
        "@type": _EXTENSIONS + "filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "stream_idle_timeout": f"{idle_s}s",
        "access_log": [_access_log(access_log)],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            *([_refusal()] if refuses else []),
            *([_subset(subset)] if subset else []),
            {"name": "envoy.filters.http.ext_proc", "typed_config": ext_proc},
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": _EXTENSIONS + "filters.http.router.v3.Router"},
            },
        ],
    }
    listener: dict[str, Any] = {
        "name": "ingress",
        "address": _socket(http),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    if not kind.startswith("istio"):  # Envoy Gateway's default of 32 KiB; more is ClientTrafficPolicy's bufferLimit
        buffer_bytes = buffer_bytes or 32 << 10
    if buffer_bytes is not None:
        listener["per_connection_buffer_limit_bytes"] = buffer_bytes
    return {
        "admin": {"address": _socket(local())},
        "static_resources": {
            "listeners": [listener],
            "clusters": [
                _pool(endpoints, by_metadata=by_metadata, selected_host=selected_host),
                {
                    "name": EPP,
                    "type": "STATIC",
                    "connect_timeout": "1s",
                    "load_assignment": _assignment(EPP, [picker]),
                    "typed_extension_protocol_options": _HTTP2,
                    **({"transport_socket": _tls()} if tls else {}),
                },
            ],
        },
    }


def two_pools(one: dict[str, Any], other: dict[str, Any], weights: tuple[int, int]) -> dict[str, Any]:
    """Return the bootstrap `one` with the pool of `other` beside its own, on one route by weight.

    Which picker is asked stands with each of the weighted clusters: the way that Envoy has for it, read off no control
    plane.
    """
    clusters = one["static_resources"]["clusters"]
    weighted = []
    for number, (bootstrap, weight) in enumerate(zip((one, other), weights, strict=True)):
        route = _manager_of(bootstrap)["route_config"]["virtual_hosts"][0]["routes"][0]
        config = route.pop("typed_per_filter_config")
        for cluster in bootstrap["static_resources"]["clusters"]:
            cluster["name"] += f"-{number}"
        config["envoy.filters.http.ext_proc"]["overrides"]["grpc_service"] = {
            "envoy_grpc": {"cluster_name": f"{EPP}-{number}"}
        }
        weighted.append({"name": f"pool-{number}", "weight": weight, "typed_per_filter_config": config})
    clusters += other["static_resources"]["clusters"]
    manager = _manager_of(one)
    route = manager["route_config"]["virtual_hosts"][0]["routes"][0]
    route["route"] = {"weighted_clusters": {"clusters": weighted}, "timeout": "0s"}
    for listed in manager["http_filters"]:
        if listed["name"] == "envoy.filters.http.ext_proc":
            listed["typed_config"]["grpc_service"] = {"envoy_grpc": {"cluster_name": f"{EPP}-0"}}
    return one


def _manager_of(bootstrap: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0][
        "typed_config"
    ]
    return found


def gateway(kind: str, picker: str, endpoints: Sequence[str], directory: Path, **how: Any) -> tuple[str, Envoy]:
    """Return where clients send to, and an Envoy of this kind, not started yet. `binary`: which Envoy."""
    http = local()
    binary = how.pop("binary", None)
    name = f"{kind}-{http.rpartition(':')[2]}"
    built = bootstrap(kind, http, picker, endpoints, directory / f"{name}.access", **how)
    return http, Envoy(json.dumps(built), directory, name=name, binary=binary)


def _socket(address: str) -> dict[str, Any]:
    if address.startswith("unix:"):
        return {"pipe": {"path": address.removeprefix("unix:")}}
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def _assignment(name: str, addresses: Sequence[str]) -> Mapping[str, Any]:
    hosts = [{"endpoint": {"address": _socket(address)}} for address in addresses]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": hosts}]}


def _pool(endpoints: Sequence[str], *, by_metadata: bool, selected_host: bool) -> Mapping[str, Any]:
    if not by_metadata:
        by_header = {"use_http_header": True, "http_header_name": HEADER}
        cluster = {"type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "original_dst_lb_config": by_header}
        return {"name": "pool", "connect_timeout": "1s", **cluster}
    served = {"key": "envoy.lb", "path": [{"key": HEADER + "-served"}]}
    override: dict[str, Any] = {
        "@type": _EXTENSIONS + "load_balancing_policies.override_host.v3.OverrideHost",
        "override_host_sources": [{"metadata": {"key": "envoy.lb", "path": [{"key": HEADER}]}}],
        **({"selected_host_key": served} if selected_host else {}),
        "fallback_policy": {"policies": [_policy("round_robin.v3.RoundRobin")]},
    }
    return {
        "name": "pool",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": _assignment("pool", endpoints),
        "load_balancing_policy": {
            "policies": [{"typed_extension_config": {"name": "override", "typed_config": override}}]
        },
    }


def _policy(name: str) -> Mapping[str, Any]:
    config = {"@type": f"{_EXTENSIONS}load_balancing_policies.{name}"}
    return {"typed_extension_config": {"name": "policy", "typed_config": config}}


def _subset(addresses: Sequence[str]) -> Mapping[str, Any]:
    """What some gateway's own filter would do: put the addresses that it allows into metadata."""
    spaces = [
        {
            "metadata_namespace": "envoy.lb.subset_hint",
            "value": {HEADER + "-subset": list(addresses)},
        }
    ]
    config = {"@type": _EXTENSIONS + "filters.http.set_metadata.v3.Config", "metadata": spaces}
    return {"name": "envoy.filters.http.set_metadata", "typed_config": config}


def _refusal() -> Mapping[str, Any]:
    abort = {"http_status": 403, "percentage": {"numerator": 100}}
    config = {"@type": _EXTENSIONS + "filters.http.fault.v3.HTTPFault", "abort": abort}
    return {"name": "envoy.filters.http.fault", "typed_config": config}


def _tls() -> Mapping[str, Any]:
    """As Envoy AI Gateway: always TLS, and the certificate is not looked at."""
    context = {"alpn_protocols": ["h2"]}
    config = {"@type": _EXTENSIONS + "transport_sockets.tls.v3.UpstreamTlsContext", "common_tls_context": context}
    return {"name": "envoy.transport_sockets.tls", "typed_config": config}


def _access_log(path: Path) -> Mapping[str, Any]:
    fields = {
        "id": "%REQ(X-TEST-ID)%",
        "code": "%RESPONSE_CODE%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "upstream": "%UPSTREAM_HOST%",
        "picked": f"%REQ({HEADER})%",
    }
    config = {
        "@type": _EXTENSIONS + "access_loggers.file.v3.FileAccessLog",
        "path": str(path),
        "log_format": {"json_format": fields},
    }
    return {"name": "file", "typed_config": config}
