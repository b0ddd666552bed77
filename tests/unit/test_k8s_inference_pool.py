"""The overlays of an InferencePool: names that must meet, rights, and what each gateway needs of its picker."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.e2e.kit.gateways import LEAN
from tests.unit.k8s.rendering import POOL, ROOT, containers, one, rendered, sidecar_config, variables

__all__ = ["rendered"]  # a fixture

WITH_TLS = ("overlays/inference-pool-agentgateway", "overlays/inference-pool-envoy-ai-gateway")


@pytest.mark.parametrize("overlay", POOL)
def test_the_pool_the_service_the_port_and_the_configuration_name_each_other(rendered, overlay):
    documents = rendered(overlay)
    pool, service, deployment = (one(documents, kind) for kind in ("InferencePool", "Service", "Deployment"))
    container = containers(deployment)["extproc"]
    config = sidecar_config(documents, variables(container))
    assert config.picks
    assert config.inference_pool is not None
    assert config.inference_pool.name == pool["metadata"]["name"]
    (port,) = service["spec"]["ports"]
    reference = pool["spec"]["endpointPickerRef"]
    assert (reference["name"], reference["port"]["number"]) == (service["metadata"]["name"], port["port"])
    (listened,) = [one["containerPort"] for one in container["ports"] if one["name"] == port["targetPort"]]
    assert config.listen == f"0.0.0.0:{listened}"
    (backend,) = one(documents, "HTTPRoute")["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])
    engines = {"podSelector": pool["spec"]["selector"]}
    ports = [{"port": target["number"]} for target in pool["spec"]["targetPorts"]]
    assert {"to": [engines], "ports": ports} in one(documents, "NetworkPolicy")["spec"]["egress"]


@pytest.mark.parametrize("overlay", POOL)
def test_a_picker_that_stops_is_given_the_time_that_its_drain_may_take(rendered, overlay):
    documents = rendered(overlay)
    pod = one(documents, "Deployment")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= sidecar_config(documents).drain_timeout + 5
    assert one(documents, "Deployment")["spec"]["replicas"] == 1, "two would each fill the pool"


def test_the_picker_has_a_token_and_the_rights_that_the_documents_name(rendered):
    documents = rendered("overlays/inference-pool")
    (said,) = re.findall(r"apiVersion: rbac[^`]+inferencepools[^`]+", (ROOT / "docs/endpoints.md").read_text())
    role, binding = one(documents, "Role"), one(documents, "RoleBinding")
    assert role["rules"] == yaml.safe_load(said)["rules"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    deployment = one(documents, "Deployment")
    assert binding["subjects"][0]["name"] == deployment["spec"]["template"]["spec"]["serviceAccountName"]
    container = containers(deployment)["extproc"]
    pool = sidecar_config(documents).inference_pool
    assert pool is not None
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["api-token"] == str(Path(pool.token_file).parent) == str(Path(pool.ca_file).parent)


@pytest.mark.parametrize("overlay", POOL)
def test_gateways_that_speak_tls_to_a_picker_find_tls_and_are_asked_for_no_certificate(rendered, overlay):
    documents = rendered(overlay)
    deployment = one(documents, "Deployment")
    container = containers(deployment)["extproc"]
    tls = sidecar_config(documents, variables(container)).tls
    if overlay not in WITH_TLS:
        assert tls is None
        return
    assert tls is not None
    assert tls.client_ca_file is None
    volumes = {volume["name"]: volume for volume in deployment["spec"]["template"]["spec"]["volumes"]}
    secret = one(documents, "Certificate")["spec"]["secretName"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "tls"]
    assert volumes["tls"]["secret"]["secretName"] == secret
    assert {Path(tls.cert_file).parent, Path(tls.key_file).parent} == {Path(mount["mountPath"])}


def test_istios_route_is_told_to_send_no_bodies_by_the_mode_that_real_envoys_are_tested_with(rendered):
    documents = rendered("overlays/inference-pool-istio")
    (patch,) = one(documents, "EnvoyFilter")["spec"]["configPatches"]
    overrides = patch["patch"]["value"]["typed_per_filter_config"]["envoy.filters.http.ext_proc"]["overrides"]
    assert overrides["processing_mode"] == LEAN
    service, route = one(documents, "Service"), one(documents, "HTTPRoute")
    namespace, port = service["metadata"]["namespace"], service["spec"]["ports"][0]["port"]
    host = f"{service['metadata']['name']}.{namespace}.svc.cluster.local"
    assert overrides["grpc_service"]["envoy_grpc"]["cluster_name"] == f"outbound|{port}||{host}"
    assert (
        patch["match"]["routeConfiguration"]["vhost"]["route"]["name"] == f"{namespace}.{route['metadata']['name']}.0"
    )


def test_the_ai_gateway_may_be_told_to_send_no_more_of_a_body_and_takes_big_ones(rendered):
    documents = rendered("overlays/inference-pool-envoy-ai-gateway")
    annotations = one(documents, "InferencePool")["metadata"]["annotations"]
    assert annotations["aigateway.envoyproxy.io/processing-body-mode"] == "buffered"
    assert annotations["aigateway.envoyproxy.io/allow-mode-override"] == "true"
    assert one(documents, "ClientTrafficPolicy")["spec"]["connection"]["bufferLimit"] == "32Mi"
