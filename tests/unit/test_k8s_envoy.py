"""What k8s/ says to Envoys, ours and those of Istio and Envoy Gateway: taken by Envoy, and what check wants."""

from __future__ import annotations

import pytest
import yaml

from extproc.config import parse_config
from extproc.envoy.advice import advice
from extproc.envoy.bootstrap import render
from extproc.envoy.check import check_envoy
from extproc.envoy.skeleton import EnvoyOptions
from tests.e2e.kit.envoy import validate
from tests.unit.k8s import kinds
from tests.unit.k8s.rendering import (
    GENERATE,
    K8S,
    ROOT,
    Document,
    containers,
    gateway,
    one,
    rendered,
    sidecar_config,
    variables,
)

__all__ = ["rendered"]  # a fixture


@pytest.mark.parametrize("parts", [("base",), ("overlays/gateway", "discovery")], ids="+".join)
def test_envoy_and_check_take_the_bootstrap_in_the_configmap(rendered, parts, tmp_path):
    documents = rendered(*parts)
    config = sidecar_config(documents, variables(containers(gateway(documents))["extproc"]))
    text = one(documents, "ConfigMap", "extproc-envoy")["data"]["envoy.yaml"]
    assert text == GENERATE["bootstrap_of_pod"](config), "run `make envoy-files`"
    (tmp_path / "envoy.yaml").write_text(text)
    assert check_envoy(config, tmp_path / "envoy.yaml") == []
    (tmp_path / "clusters.yaml").write_text('version_info: "1"\nresources: []\n')
    there = text.replace("/run/extproc/", f"{tmp_path}/")
    good, said = validate(there, tmp_path)
    assert good, said


def test_what_is_written_from_elsewhere_is_current():
    bootstrap = GENERATE["mesh_bootstrap"]()
    for path, document in (
        ("overlays/istio/envoyfilter.yaml", GENERATE["envoy_filter"](bootstrap)),
        ("overlays/envoy-gateway/envoypatchpolicy.yaml", GENERATE["envoy_patch_policy"](bootstrap)),
        ("overlays/inference-pool-istio/envoyfilter.yaml", GENERATE["lean_picker_filter"]()),
        ("components/monitoring/prometheusrule.yaml", GENERATE["prometheus_rule"]()),
    ):
        assert yaml.safe_load((K8S / path).read_text()) == document, f"{path}: run `make envoy-files`"
    dashboard = "components/monitoring/dashboard.json"
    assert (K8S / dashboard).read_text() == (ROOT / "observability/dashboard.json").read_text(), (
        "run `make envoy-files`"
    )


# A gateway's own bootstrap, as the two projects make it, cut down to what our patches meet.
_ROUTER = {
    "name": "envoy.filters.http.router",
    "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
}


def _manager(name: str, filters: list[Document], host: Document) -> Document:
    return {
        "name": name,
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3."
            "HttpConnectionManager",
            "stat_prefix": "gateway",
            "route_config": {"name": "routes", "virtual_hosts": [host]},
            "http_filters": [*filters, _ROUTER],
        },
    }


def _bootstrap(listener: Document, clusters: list[Document]) -> Document:
    listener = {"address": {"socket_address": {"address": "0.0.0.0", "port_value": 8080}}, **listener}
    return {"static_resources": {"listeners": [listener], "clusters": clusters}}


def _start_cluster(name: str) -> Document:
    return {"name": name, "type": "STATIC", "connect_timeout": "1s", "load_assignment": {"cluster_name": name}}


def test_an_istio_gateway_with_our_envoyfilter_is_what_check_wants(rendered, tmp_path):
    documents = rendered("overlays/istio")
    start = "outbound|80||extproc-unsteered.llm.svc.cluster.local"
    host = {
        "name": "*:80",
        "domains": ["*"],
        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": start, "timeout": "0s"}}],
    }
    manager = _manager("envoy.filters.network.http_connection_manager", [], host)
    before = _bootstrap({"name": "0.0.0.0_80", "filter_chains": [{"filters": [manager]}]}, [_start_cluster(start)])
    after = kinds.istio(before, one(documents, "EnvoyFilter"))
    path = tmp_path / "istio.yaml"
    path.write_text(yaml.safe_dump(after))
    good, said = validate(path.read_text(), tmp_path)
    assert good, said
    assert check_envoy(sidecar_config(documents), path) == []
    assert not [
        word for word in advice(sidecar_config(documents), path) if "no buffer filter" in word or "local_reply" in word
    ]
    _answers_as_the_plain_envoy_does(
        after["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    )


def test_an_envoy_gateway_with_our_policies_is_what_check_wants(rendered, tmp_path):
    documents = rendered("overlays/envoy-gateway")
    extension = one(documents, "EnvoyExtensionPolicy")["spec"]["extProc"][0]
    client = one(documents, "ClientTrafficPolicy")["spec"]
    config = sidecar_config(documents)
    assert extension["messageTimeout"] == f"{config.longest_budget_s + 20:g}s"
    assert extension["failOpen"] is True
    name = "envoy.filters.http.ext_proc/envoyextensionpolicy/llm/extproc/extproc/0"
    # What Envoy Gateway's translator makes of the policies, by its own golden files.
    ours = {
        "name": name,
        "disabled": True,
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
            "failure_mode_allow": extension["failOpen"],
            "message_timeout": extension["messageTimeout"],
            "grpc_service": {"envoy_grpc": {"cluster_name": "envoyextensionpolicy/llm/extproc/0"}, "timeout": "10s"},
            "processing_mode": {"response_trailer_mode": "SKIP"},
        },
    }
    rules = one(documents, "HTTPRoute")["spec"]["rules"]
    routes, clusters = [], []
    for index, rule in enumerate(rules):
        cluster = f"httproute/llm/extproc/rule/{index}"
        headers = [
            {"name": match["name"], "string_match": {"exact": match["value"]}}
            for match in rule.get("matches", [{}])[0].get("headers", [])
        ]
        routes.append(
            {
                "match": {"prefix": "/", "headers": headers},
                "route": {"cluster": cluster, "timeout": rule["timeouts"]["request"]},
                "typed_per_filter_config": {
                    name: {
                        "@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig",
                        "config": {},
                    }
                },
            }
        )
        clusters.append(_start_cluster(cluster))
    buffer = one(documents, "BackendTrafficPolicy")["spec"]["requestBuffer"]
    buffering = {
        "name": "envoy.filters.http.buffer",
        "disabled": True,
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer",
            "max_request_bytes": 1 << 20,
        },
    }
    assert buffer == {"limit": client["connection"]["bufferLimit"]}
    for route in routes:
        route["typed_per_filter_config"][buffering["name"]] = {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.BufferPerRoute",
            "buffer": {"max_request_bytes": 32 << 20},
        }
    manager = _manager(
        "llm/extproc/http", [buffering, ours], {"name": "llm/extproc/http/*", "domains": ["*"], "routes": routes}
    )
    manager["typed_config"] |= {
        "stream_idle_timeout": client["timeout"]["http"]["streamIdleTimeout"],
        "early_header_mutation_extensions": [
            {
                "name": "early",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3."
                    "HeaderMutation",
                    "mutations": [{"remove": header} for header in client["headers"]["earlyRequestHeaders"]["remove"]],
                },
            }
        ],
    }
    listener = {
        "name": "llm/extproc/http",
        "per_connection_buffer_limit_bytes": 32 << 20,
        "default_filter_chain": {"filters": [manager]},
    }
    kinds.envoy_gateway(listener, clusters, one(documents, "EnvoyPatchPolicy"))
    path = tmp_path / "gateway.yaml"
    path.write_text(yaml.safe_dump(_bootstrap(listener, clusters)))
    good, said = validate(path.read_text(), tmp_path)
    assert good, said
    assert not [word for word in advice(config, path) if "no buffer filter" in word or "local_reply" in word]
    _answers_as_the_plain_envoy_does(listener["default_filter_chain"]["filters"][0]["typed_config"])
    # `check` knows one way to route (cluster_header) and one to buffer; here: a rule per endpoint, and the listener.
    others = [problem for problem in check_envoy(config, path) if not _said_otherwise(problem)]
    assert others == []
    assert client["connection"]["bufferLimit"] == "32Mi"
    header = config.headers.cluster
    backends = {document["metadata"]["name"]: document for document in documents if document["kind"] == "Backend"}
    for endpoint in config.endpoints:
        (rule,) = [
            rule
            for rule in rules
            if rule.get("matches") == [{"headers": [{"name": header, "value": endpoint.cluster or endpoint.name}]}]
        ]
        fqdn = backends[rule["backendRefs"][0]["name"]]["spec"]["endpoints"][0]["fqdn"]
        assert f"{fqdn['hostname']}:{fqdn['port']}" == endpoint.address
        assert rule["filters"][0]["requestHeaderModifier"]["remove"] == [header]
    assert "matches" not in rules[-1]
    assert backends[rules[-1]["backendRefs"][0]["name"]]["spec"]["endpoints"][0]["fqdn"]["hostname"].endswith(
        ".invalid"
    )


def _answers_as_the_plain_envoy_does(manager: Document) -> None:
    plain = yaml.safe_load((ROOT / "envoy/sidecar.yaml").read_text())
    (listener,) = plain["static_resources"]["listeners"]
    its = listener["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["local_reply_config"] == its["local_reply_config"]


def _said_otherwise(problem: str) -> bool:
    return any(
        words in problem
        for words in ("no route has cluster_header", "request_body_buffer_limit", "the cluster of endpoints[")
    )


def test_tls_by_variables_is_what_the_file_for_envoys_side_says(rendered):
    documents = rendered("standalone", "tls")
    container = containers(one(documents, "Deployment"))["extproc"]
    config = sidecar_config(documents, variables(container))
    assert config.tls is not None
    assert not config.allow_insecure_listen
    envoy_side = parse_config((K8S / "components/tls/envoy-side.yaml").read_text(), "envoy-side.yaml", {})
    assert envoy_side.tls is not None
    assert envoy_side.tls.envoy is not None
    assert envoy_side.model_copy(update={"tls": envoy_side.tls.model_copy(update={"envoy": None})}) == config
    (mount,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "tls"]
    files = [config.tls.cert_file, config.tls.key_file, config.tls.client_ca_file]
    assert files == [f"{mount}/{name}" for name in ("tls.crt", "tls.key", "ca.crt")]  # cert-manager's names
    server = one(documents, "Certificate", "extproc-server")["spec"]
    assert server["dnsNames"] == [envoy_side.tls.envoy.server_name]
    pod = one(documents, "Deployment")["spec"]["template"]["spec"]
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "tls"]
    assert volume["secret"]["secretName"] == server["secretName"]
    assert "transport_socket" in render(envoy_side, EnvoyOptions(sidecars=("10.0.0.7:50051",)))
