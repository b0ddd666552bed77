"""Writes what in k8s/ follows from somewhere else: `make envoy-files`. `make check-generated` fails when they differ.

Envoy's bootstraps come from the sidecar's configurations beside them; the EnvoyFilter and the EnvoyPatchPolicy hold
parts of such a bootstrap; rules and dashboard come from observability/, as kustomize reads no file outside its root.
"""

from __future__ import annotations

import shutil
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from extproc.config import load_config
from extproc.envoy.bootstrap import render
from extproc.envoy.skeleton import EXT_PROC_CLUSTER, EnvoyOptions
from extproc.envoy.upstreams import ANY_CLUSTER, UNSTEERED_CLUSTER

if TYPE_CHECKING:
    from extproc.config import Config

K8S = Path(__file__).parent
OBSERVABILITY = K8S.parent / "observability"
HTTP = "0.0.0.0:8080"
NAMESPACE = "llm"
SIDECAR = f"extproc.{NAMESPACE}.svc.cluster.local:50051"
GATEWAY_PODS = {"istio": "ingress"}
VIRTUAL_HOST = "*:80"
HTTP_MANAGER = "envoy.filters.network.http_connection_manager"
ROUTER = "envoy.filters.http.router"
EXT_PROC = "envoy.filters.http.ext_proc"
BUFFER = "envoy.filters.http.buffer"

_WRITTEN = "# Written by k8s/generate.py (`make envoy-files`) from {source}: change that instead.\n"


def main() -> None:
    """Write all of them."""
    (K8S / "base/envoy.yaml").write_text(bootstrap_of_pod(load_config(K8S / "base/sidecar.yaml", {})))
    bootstrap = mesh_bootstrap()
    source = "standalone/sidecar.yaml"
    _write("overlays/istio/envoyfilter.yaml", source, envoy_filter(bootstrap), _FILTER_SAYS)
    _write("overlays/envoy-gateway/envoypatchpolicy.yaml", source, envoy_patch_policy(bootstrap), _PATCH_SAYS)
    path = "overlays/inference-pool-istio/envoyfilter.yaml"
    _write(path, "the way in which Istio asks a picker", lean_picker_filter(), _LEAN_SAYS)
    _write("components/monitoring/prometheusrule.yaml", "observability/alerts.yaml", prometheus_rule())
    shutil.copyfile(OBSERVABILITY / "dashboard.json", K8S / "components/monitoring/dashboard.json")


_FILTER_SAYS = """\
# What must be so in any Envoy in front of the sidecar; envoy/sidecar.yaml says why, line by line. Not here: Istio has
# its own: the access log (Telemetry API; the `extproc` dynamic metadata tells why a request waited) and the listener's
# TCP keepalive (without it a client that vanishes without a packet stays in the queue, and is run for nobody).
"""
_PATCH_SAYS = """\
# What Envoy Gateway's API can't say, in Envoy's words. The first patch replaces the filter of the EnvoyExtensionPolicy;
# without it, and that is so while this kind is not enabled, these promises are lost:
#   response_trailer_mode: SEND    the stream ends with the HEAD of an answer: the slot is given away while the engine
#                                  still works, so no limit holds. There is no point in running without this one.
#   grpc_service.retry_policy      a sidecar that restarts costs every held request (they go to the start route: 503).
#   forward_rules, mutation_rules  the sidecar sees all headers, authorization too, and may write any.
#   max_outbound_control_frames    a thousand answers that end in one moment close the connection: all held are lost.
#   connection_keepalive           a hung sidecar goes unnoticed until messageTimeout.
#   local_reply_config             Envoy's own errors are its words ("no healthy upstream"), not ours. What a
#                                  responseOverride of a BackendTrafficPolicy says is lost with it.
"""
_LEAN_SAYS = """\
# Istio sends all bodies to a picker: two messages and one for each piece, and ours must echo each. The route's own
# settings are replaced whole, so they name the picker again, as Istio calls it. The route's name is Istio's for the
# first rule of the HTTPRoute `vllm` in the namespace `llm`: NAMESPACE.HTTPROUTE.INDEX. Not tried with Istio itself.
"""


def _write(path: str, source: str, document: dict[str, Any], says: str = "") -> None:
    text = yaml.safe_dump(document, sort_keys=False, width=120)
    (K8S / path).write_text(_WRITTEN.format(source=source) + says + text)


_STATS_LISTENER = """\
  # Envoy's admin interface can stop it, so it is on loopback. This much of it Prometheus and the kubelet may see.
  - name: stats
    bypass_overload_manager: true # a pod that refuses some is ready all the same
    address: {socket_address: {address: "0.0.0.0", port_value: 9903}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: stats
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {path: /stats/prometheus}
                route: {cluster: envoy_admin}
              - match: {path: /ready}
                route: {cluster: envoy_admin}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
"""
_ADMIN_CLUSTER = """\
  - name: envoy_admin
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: envoy_admin
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: "127.0.0.1", port_value: 9901}}}}]}]
"""
# 90 % of what base/deployment.yaml gives Envoy (640 MiB): the rest is for what is not heap.
_OVERLOAD = """
# Bodies are held in memory: enough big ones, and Envoy is killed, and with it all that it holds. Before that, new
# requests get a 503. Not covered: bodies that still arrive for requests taken before (reset_high_memory_stream reset
# none over HTTP/1.1). The heap may have 90 % of the memory limit of Envoy's container.
overload_manager:
  refresh_interval: 0.25s
  resource_monitors:
  - name: envoy.resource_monitors.fixed_heap
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.resource_monitors.fixed_heap.v3.FixedHeapConfig
      max_heap_size_bytes: 603979776
  actions:
  - name: envoy.overload_actions.stop_accepting_requests
    triggers: [{name: envoy.resource_monitors.fixed_heap, threshold: {value: 0.95}}]
"""


def bootstrap_of_pod(config: Config) -> str:
    """Return the bootstrap of an Envoy beside its sidecar: a listener for who looks from outside, a limit of heap."""
    text = render(config, EnvoyOptions(http=HTTP))
    for heading, more in (("  listeners:\n", _STATS_LISTENER), ("  clusters:\n", _ADMIN_CLUSTER)):
        before, found, after = text.partition(heading)
        if not found:
            raise SystemExit(f"k8s/generate.py: the bootstrap has no line {heading!r} to write after")
        text = before + heading + more + after
    return text + _OVERLOAD


def mesh_bootstrap() -> dict[str, Any]:
    """Return the bootstrap of a plain Envoy in front of the standalone sidecar."""
    config = load_config(K8S / "standalone/sidecar.yaml", {})
    bootstrap: dict[str, Any] = yaml.safe_load(render(config, EnvoyOptions(http=HTTP, sidecars=(SIDECAR,))))
    return bootstrap


def _manager(bootstrap: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0][
        "typed_config"
    ]
    return found


def _filter(bootstrap: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in _manager(bootstrap)["http_filters"] if one["name"] == name)


def envoy_filter(bootstrap: dict[str, Any]) -> dict[str, Any]:
    """Return Istio's way to say it: parts of a bootstrap, and where in Istio's own they belong."""
    manager = _manager(bootstrap)
    host = manager["route_config"]["virtual_hosts"][0]
    elsewhere = (UNSTEERED_CLUSTER, ANY_CLUSTER)  # for routes that Istio has in their place
    clusters = [one for one in bootstrap["static_resources"]["clusters"] if one["name"] not in elsewhere]
    listener = {"filterChain": {"filter": {"name": HTTP_MANAGER}}}
    before_router = {"filterChain": {"filter": {"name": HTTP_MANAGER, "subFilter": {"name": ROUTER}}}}
    virtual_host = {"vhost": {"name": VIRTUAL_HOST}}
    settings = (
        *("@type", "stream_idle_timeout", "request_timeout", "always_set_request_id_in_response"),
        *("early_header_mutation_extensions", "local_reply_config"),
    )
    merged = {"typed_config": {key: manager[key] for key in settings}}
    limit = {"request_body_buffer_limit": host["request_body_buffer_limit"]}
    steered = {"name": "extproc-steered", **host["routes"][0]}
    patches = [
        *(_patch("CLUSTER", {}, "ADD", cluster) for cluster in clusters),
        _patch("NETWORK_FILTER", {"listener": listener}, "MERGE", {"name": HTTP_MANAGER, **merged}),
        # In this order: each is put right before the router, so behind the one before.
        *(
            _patch("HTTP_FILTER", {"listener": before_router}, "INSERT_BEFORE", _filter(bootstrap, name))
            for name in (BUFFER, EXT_PROC)
        ),
        _patch("VIRTUAL_HOST", {"routeConfiguration": virtual_host}, "MERGE", limit),
        _patch("HTTP_ROUTE", {"routeConfiguration": virtual_host}, "INSERT_FIRST", steered),
    ]
    return {
        "apiVersion": "networking.istio.io/v1alpha3",
        "kind": "EnvoyFilter",
        "metadata": {"name": "extproc"},
        "spec": {"workloadSelector": {"labels": GATEWAY_PODS}, "configPatches": patches},
    }


def lean_picker_filter() -> dict[str, Any]:
    """Return Istio's ext_proc settings for a route to an InferencePool, without bodies."""
    lean = {"request_header_mode": "SEND", "response_header_mode": "SEND", "response_trailer_mode": "SEND"}
    lean |= {"request_body_mode": "NONE", "response_body_mode": "NONE", "request_trailer_mode": "SKIP"}
    overrides = {
        "grpc_service": {"envoy_grpc": {"cluster_name": f"outbound|9002||extproc.{NAMESPACE}.svc.cluster.local"}},
        "processing_mode": lean,
        "failure_mode_allow": False,
    }
    per_route = {"@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute"}
    value = {"typed_per_filter_config": {EXT_PROC: {**per_route, "overrides": overrides}}}
    match = {"routeConfiguration": {"vhost": {"route": {"name": f"{NAMESPACE}.vllm.0"}}}}
    return {
        "apiVersion": "networking.istio.io/v1alpha3",
        "kind": "EnvoyFilter",
        "metadata": {"name": "extproc-lean"},
        "spec": {
            "workloadSelector": {"labels": {"gateway.networking.k8s.io/gateway-name": NAMESPACE}},
            "configPatches": [_patch("HTTP_ROUTE", match, "MERGE", value)],
        },
    }


def _patch(apply_to: str, match: dict[str, Any], operation: str, value: dict[str, Any]) -> dict[str, Any]:
    return {
        "applyTo": apply_to,
        "match": {"context": "GATEWAY", **deepcopy(match)},  # the same one twice would be written as an alias
        "patch": {"operation": operation, "value": value},
    }


def envoy_patch_policy(bootstrap: dict[str, Any]) -> dict[str, Any]:
    """Return Envoy Gateway's way to say it: the whole filter and the whole cluster, in place of those that it makes."""
    cluster = next(one for one in bootstrap["static_resources"]["clusters"] if one["name"] == EXT_PROC_CLUSTER)
    name = f"{EXT_PROC}/envoyextensionpolicy/{NAMESPACE}/extproc/extproc/0"
    manager = "$.default_filter_chain.filters[0].typed_config"
    json_patches = [
        {
            "type": "type.googleapis.com/envoy.config.listener.v3.Listener",
            "name": f"{NAMESPACE}/extproc/http",
            "operation": {
                "op": "replace",
                "jsonPath": f"{manager}.http_filters[?(@.name == '{name}')]",
                "path": "/typed_config",
                "value": _filter(bootstrap, EXT_PROC)["typed_config"],
            },
        },
        *(
            {
                "type": "type.googleapis.com/envoy.config.listener.v3.Listener",
                "name": f"{NAMESPACE}/extproc/http",
                "operation": {"op": "add", "jsonPath": manager, "path": f"/{key}", "value": _manager(bootstrap)[key]},
            }
            for key in ("always_set_request_id_in_response", "local_reply_config")
        ),
        {
            "type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            "name": EXT_PROC_CLUSTER,
            "operation": {"op": "add", "path": "", "value": cluster},
        },
    ]
    return {
        "apiVersion": "gateway.envoyproxy.io/v1alpha1",
        "kind": "EnvoyPatchPolicy",
        "metadata": {"name": "extproc"},
        "spec": {
            "targetRef": {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "extproc"},
            "type": "JSONPatch",
            "jsonPatches": json_patches,
        },
    }


def prometheus_rule() -> dict[str, Any]:
    """Return Prometheus' own rule file as the operator wants it."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "extproc"},
        "spec": yaml.safe_load((OBSERVABILITY / "alerts.yaml").read_text()),
    }


if __name__ == "__main__":
    main()
