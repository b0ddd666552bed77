"""Every manifest of k8s/ is taken by a real API server, with the real definitions of the custom kinds where they ship.

A dry run on the server: defaults, validation, unknown keys and admission, as for an apply, and nothing is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.unit.k8s.rendering import COMBINATIONS, rendered

from .cluster import APPLY, DEFINITIONS, shipped, stand_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from .cluster import Cluster, Document

__all__ = ["rendered"]  # a fixture

NAMESPACE = "llm"
NOT_SHIPPED = (
    stand_in("networking.gke.io", "GCPBackendPolicy", "gcpbackendpolicies", "v1"),
    stand_in("networking.gke.io", "HealthCheckPolicy", "healthcheckpolicies", "v1"),
    stand_in("monitoring.coreos.com", "PodMonitor", "podmonitors", "v1"),
    stand_in("monitoring.coreos.com", "PrometheusRule", "prometheusrules", "v1"),
)


@pytest.fixture(scope="module", autouse=True)
def definitions(cluster: Cluster, rendered: Callable[..., list[Document]]) -> None:
    """The custom kinds of the manifests, and the namespace that they are for."""
    wanted = {document["kind"] for parts in COMBINATIONS for document in rendered(*parts)}
    there = [*(one for module, files in DEFINITIONS for one in shipped(module, files)), *NOT_SHIPPED]
    cluster.install(*(one for one in there if one["spec"]["names"]["kind"] in wanted))
    cluster.do("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})


def dry_run(cluster: Cluster, document: Document) -> tuple[int, object]:
    path = cluster.path_of(document, document["metadata"].get("namespace", NAMESPACE))
    query = "dryRun=All&fieldManager=tests&fieldValidation=Strict"
    return cluster.call("PATCH", f"{path}?{query}", document, kind=APPLY)


def test_the_server_takes_every_manifest(cluster, rendered):
    taken: list[Document] = []
    for parts in COMBINATIONS:
        for document in rendered(*parts):
            if document not in taken:
                status, answer = dry_run(cluster, document)
                assert status in (200, 201), (parts, document["kind"], document["metadata"]["name"], answer)
                taken.append(document)
    assert {"Deployment", "NetworkPolicy", "RoleBinding", "EnvoyFilter", "ScaledObject", "Certificate"} <= {
        document["kind"] for document in taken
    }


def test_the_server_refuses_a_key_that_does_not_exist_and_a_value_that_is_none(cluster, rendered):
    (deployment,) = [one for one in rendered("standalone") if one["kind"] == "Deployment"]
    deployment["spec"]["replica"] = 1
    status, answer = dry_run(cluster, deployment)
    assert (status >= 400, "spec.replica:" in str(answer)) == (True, True), answer
    (scaled,) = [one for one in rendered("overlays/gateway", "autoscaling") if one["kind"] == "ScaledObject"]
    scaled["spec"]["maxReplicaCount"] = "many"
    status, answer = dry_run(cluster, scaled)
    assert (status >= 400, "maxReplicaCount" in str(answer)) == (True, True), answer
