"""The manifests in k8s/: they render, their schemas take them, and names that must meet do.

No cluster here: a real API server is asked by `make test-kubernetes`; what only a cluster can tell is listed in
docs/kubernetes.md.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from extproc.config import parse_config
from tests.conftest import TOOL_MISSING
from tests.e2e.kit.processes import run
from tests.unit.k8s import kinds
from tests.unit.k8s.rendering import (
    COMBINATIONS,
    K8S,
    KUBERNETES,
    MESH,
    PLAIN,
    POOL,
    ROOT,
    Document,
    containers,
    gateway,
    one,
    pod_monitors,
    rendered,
    sidecar_config,
    variables,
)

__all__ = ["rendered"]  # a fixture


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
    monitor = pod_monitors()[0]
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
    documents = list(yaml.load_all(done.stdout, yaml.CSafeLoader))
    assert sidecar_config(documents).max_running_requests == 7
    assert containers(gateway(documents))["extproc"]["image"] == "registry.example/extproc-queue:0.1.0"
    assert {document["metadata"]["namespace"] for document in documents} == {"llm"}
    bindings = [document for document in documents if document["kind"] == "RoleBinding"]
    assert {subject["namespace"] for binding in bindings for subject in binding["subjects"]} == {"llm"}


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
    numbers = {
        deployment["metadata"]["name"]: {
            port["containerPort"] for each in containers(deployment).values() for port in each.get("ports", [])
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
                assert {port["port"] for port in rule["ports"]} <= numbers[name]
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


@pytest.mark.parametrize("parts", COMBINATIONS, ids="+".join)
def test_no_policy_names_a_port_and_no_service_one_of_a_native_sidecar(rendered, parts):
    """Several CNIs did not look for a name among initContainers, nor did Services before Kubernetes 1.32."""
    documents = rendered(*parts)
    policies = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    rules = [rule for spec in policies for way in ("ingress", "egress") for rule in spec.get(way, [])]
    assert [port for rule in rules for port in rule["ports"] if not isinstance(port["port"], int)] == []
    early = {
        port["name"]
        for document in documents
        if document["kind"] == "Deployment"
        for each in document["spec"]["template"]["spec"].get("initContainers", [])
        for port in each.get("ports", [])
    }
    services = [document["spec"] for document in documents if document["kind"] == "Service"]
    assert early & {port.get("targetPort") for spec in services for port in spec["ports"]} == set()


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
    granted = {"discovery", *PLAIN, *POOL}
    assert seen == sum(len(granted & set(parts)) - ("single" in parts) for parts in COMBINATIONS)


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
    assert rule["ports"] == prometheus["ports"] == [{"port": port["containerPort"]}]
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


def test_discovery_has_one_more_right_and_looks_where_the_token_is(rendered):
    documents = rendered("overlays/gateway", "discovery")
    role = one(documents, "Role", "extproc-discovery")
    said = re.search(r"apiVersion: rbac[^`]+", (ROOT / "docs/endpoints.md").read_text())
    assert said is not None
    assert role["rules"] == yaml.safe_load(said[0])["rules"]
    assert role["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]}
    ]
    binding = one(documents, "RoleBinding", "extproc-discovery")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"][0]["name"] == one(documents, "ServiceAccount")["metadata"]["name"]
    found = sidecar_config(documents, variables(containers(gateway(documents))["extproc"])).discovery
    assert [source.dns for source in found] == [None]
    source = found[0].kubernetes
    assert source is not None
    assert_token_is_the_sidecars(documents, source.token_file, source.ca_file)


def assert_token_is_the_sidecars(documents: list[Document], token_file: str, ca_file: str) -> None:
    """Its container has it, where it is looked for, and no other."""
    assert one(documents, "ServiceAccount")["automountServiceAccountToken"] is False
    (volume,) = [one for one in gateway(documents)["spec"]["template"]["spec"]["volumes"] if "projected" in one]
    files = {path for part in volume["projected"]["sources"] for path in re.findall(r"'path': '([^']+)'", str(part))}
    where = {
        name: [mount["mountPath"] for mount in each["volumeMounts"] if mount["name"] == volume["name"]]
        for name, each in containers(gateway(documents)).items()
    }
    assert where == {"extproc": [str(Path(token_file).parent)], "envoy": []}
    assert {Path(token_file).name, Path(ca_file).name, "namespace"} == files


def test_a_single_gateway_has_no_token_no_rights_and_nobody_beside_it(rendered):
    documents = rendered("overlays/gateway", "single")
    assert gateway(documents)["spec"]["replicas"] == 1
    assert not [document for document in documents if document["kind"] in ("Role", "RoleBinding")]
    text = json.dumps([gateway(documents), one(documents, "NetworkPolicy", "extproc-gateway")])
    assert not [word for word in ("serviceAccountToken", "serviceaccount", "50061", "6443", "POD_IP") if word in text]
    sidecar = containers(gateway(documents))["extproc"]
    assert [port["name"] for port in sidecar["ports"]] == ["admin"]
    assert sidecar_config(documents, variables(sidecar)).replicas is None


def test_several_gateways_find_each_other_by_leases_and_nobody_else_gets_to_their_port(rendered):
    documents = rendered("base")
    deployment = gateway(documents)
    assert deployment["spec"]["replicas"] >= 2
    assert one(documents, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    sidecar = containers(deployment)["extproc"]
    replicas = sidecar_config(documents, variables(sidecar)).replicas
    assert replicas is not None
    assert replicas.kubernetes_lease is not None
    (port,) = [port["containerPort"] for port in sidecar["ports"] if port["name"] == "replicas"]
    assert (replicas.listen, replicas.reached_at) == (f"0.0.0.0:{port}", f"10.9.8.7:{port}")
    policy = one(documents, "NetworkPolicy", "extproc-gateway")["spec"]
    peers = [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "extproc-gateway"}}}]
    assert {"from": peers, "ports": [{"port": port}]} in policy["ingress"]
    assert {"to": peers, "ports": [{"port": port}]} in policy["egress"]
    assert one(documents, "Role", "extproc-replicas")["rules"] == [
        {
            "apiGroups": ["coordination.k8s.io"],
            "resources": ["leases"],
            "verbs": ["get", "list", "create", "patch", "delete"],
        }
    ]
    lease = replicas.kubernetes_lease
    assert_token_is_the_sidecars(documents, lease.token_file, lease.ca_file)


def test_a_file_of_yours_makes_no_strangers_of_the_gateways(rendered):
    """Who others are is in a variable: a file that says nothing of it, or has another pool, changes nothing."""
    environ = variables(containers(gateway(rendered("base")))["extproc"])
    config = parse_config("replicas: {pool: other, listen: '127.0.0.1:1', valkey: {url: 'valkey://a'}}", "x", environ)
    assert config.replicas == sidecar_config(rendered("base"), environ).replicas


def test_gateways_are_scaled_by_envoys_work_and_one_goes_only_when_the_one_before_has_drained(rendered):
    documents = rendered("overlays/gateway", "gateway-autoscaling")
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
