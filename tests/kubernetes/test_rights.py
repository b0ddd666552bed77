"""What our accounts may do with the Roles in k8s/: our watches and Leases, and nothing else; members by real Leases."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from extproc.config import LeaseConfig
from extproc.endpoints.discovery import watch
from extproc.endpoints.discovery.inference_pool import InferencePool
from extproc.endpoints.discovery.kubernetes import Kubernetes
from extproc.replicas.messages import Member
from extproc.replicas.stores import StoreError
from extproc.replicas.stores.lease import LeaseStore
from tests.e2e.kit.loops import run
from tests.e2e.kit.processes import wait_until
from tests.e2e.kit.watcher import Watcher
from tests.unit.k8s.rendering import K8S

from .cluster import DEFINITIONS, LLM_D_OBJECTIVE, shipped
from .test_watches import VLLM, put_pool, put_service

if TYPE_CHECKING:
    from pathlib import Path

    from .cluster import Cluster, Document

RBAC = "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/{}"
FILES = {
    "discovery": "components/discovery/rbac.yaml",
    "replicas": "base/rbac.yaml",
    "inference-pool": "overlays/inference-pool/rbac.yaml",
}
REFUSED = (
    ("GET", "/api/v1/namespaces/{}/secrets"),
    ("GET", "/api/v1/namespaces/{}/configmaps"),
    ("GET", "/api/v1/namespaces/{}/services"),
    ("GET", "/api/v1/namespaces/{}/pods/a"),
    ("GET", "/api/v1/namespaces/{}/pods/a/log"),
    ("DELETE", "/api/v1/namespaces/{}/pods/a"),
    ("GET", "/api/v1/pods"),
    ("GET", "/api/v1/namespaces/default/pods"),
    ("GET", "/api/v1/nodes"),
    ("GET", "/apis/discovery.k8s.io/v1/endpointslices"),
    ("GET", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"),
    ("GET", "/apis/coordination.k8s.io/v1/namespaces/default/leases"),
    ("GET", "/apis/inference.networking.k8s.io/v1/namespaces/default/inferencepools"),
    ("GET", "/apis/apps/v1/namespaces/{}/deployments"),
    ("GET", "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles"),
)


@pytest.fixture(scope="module", autouse=True)
def definitions(cluster: Cluster) -> None:
    """The kinds of the Inference Gateway."""
    cluster.install(*(one for module, files in DEFINITIONS[:2] for one in shipped(module, files)), LLM_D_OBJECTIVE)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watch, "BACKOFF_S", (0.05, 0.5))


@pytest.fixture
def namespace(cluster: Cluster) -> str:
    return cluster.namespace()


def keys(cluster: Cluster, namespace: str, account: str, folder: Path) -> dict[str, Any]:
    """What a configuration says of the API server, for an account of a pod."""
    (folder / "token").write_text(cluster.token(namespace, account))
    files = {"token_file": str(folder / "token"), "ca_file": str(cluster.ca_file)}
    return {"namespace": namespace, "api": cluster.url, **files}


def grant(cluster: Cluster, namespace: str, component: str) -> tuple[str, list[Document]]:
    """Apply the Role and RoleBinding of a component; return the account that it names, and the rules."""
    role, binding = yaml.safe_load_all((K8S / FILES[component]).read_text())
    (subject,) = binding["subjects"]
    binding["subjects"] = [{**subject, "namespace": namespace}]  # as kustomize writes it, where `namespace:` is said
    cluster.do("POST", RBAC.format(namespace, "roles"), role)
    cluster.do("POST", RBAC.format(namespace, "rolebindings"), binding)
    return subject["name"], role["rules"]


@pytest.mark.parametrize("component", FILES)
def test_an_account_with_our_role_may_do_what_the_role_says_and_nothing_else(cluster, namespace, component):
    account, rules = grant(cluster, namespace, component)
    token, nobodys = (cluster.token(namespace, name) for name in (account, "nobody"))
    granted = [rule for rule in _rules(cluster, namespace, token) if rule not in _rules(cluster, namespace, nobodys)]
    assert granted == sorted(map(_flat, rules))
    for method, path in REFUSED:
        status, _ = cluster.call(method, path.format(namespace), token=token)
        assert status == 403, (method, path)


def _rules(cluster: Cluster, namespace: str, token: str) -> list[list[list[str]]]:
    """What the API server itself says that an account may do in a namespace."""
    asked = {"kind": "SelfSubjectRulesReview", "spec": {"namespace": namespace}}
    review = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
    body = {"apiVersion": "authorization.k8s.io/v1", **asked}
    status, answer = cluster.call("POST", review, body, token=token)
    assert status == 201, answer
    return sorted(map(_flat, answer["status"]["resourceRules"]))


def _flat(rule: Document) -> list[list[str]]:
    return [sorted(rule.get(key) or []) for key in ("apiGroups", "resources", "verbs", "resourceNames")]


def test_our_role_is_enough_to_follow_a_service_and_without_it_nothing_is_seen(cluster, namespace, tmp_path, caplog):
    put_service(cluster, namespace)
    cluster.put_pod(namespace, "a", "10.7.0.1", labels=VLLM)
    with Watcher(Kubernetes, service="vllm", **keys(cluster, namespace, "extproc-gateway", tmp_path)) as watcher:
        wait_until(lambda: "403 Forbidden" in caplog.text)
        assert not watcher.reports
        grant(cluster, namespace, "discovery")
        watcher.sees(a="10.7.0.1:8000")
        caplog.set_level(logging.DEBUG)
        caplog.clear()
        cluster.put_pod(namespace, "b", "10.7.0.2", labels=VLLM)
        watcher.sees(a="10.7.0.1:8000", b="10.7.0.2:8000")
        assert "403" not in caplog.text, "listed again and again, for want of a watch"


def test_our_role_is_enough_to_follow_an_inference_pool(cluster, namespace, tmp_path):
    put_pool(cluster, namespace, VLLM, 8000)
    cluster.put_pod(namespace, "a", "10.8.0.1", labels=VLLM)
    account, _ = grant(cluster, namespace, "inference-pool")
    with Watcher(InferencePool, name="vllm", **keys(cluster, namespace, account, tmp_path)) as watcher:
        watcher.sees(a="10.8.0.1:8000")
        wait_until(lambda: watcher.priorities[-1:] == [{}])


def test_a_token_that_is_none_is_refused_and_takes_nothing_away(cluster, namespace, tmp_path, caplog):
    put_service(cluster, namespace)
    cluster.put_pod(namespace, "a", "10.9.0.1", labels=VLLM)
    account, _ = grant(cluster, namespace, "discovery")
    found = keys(cluster, namespace, account, tmp_path)
    with Watcher(Kubernetes, service="vllm", **found) as watcher:
        watcher.sees(a="10.9.0.1:8000")
        (tmp_path / "token").write_text("none")
        cluster.kill()
        cluster.start()
        wait_until(lambda: "401 Unauthorized" in caplog.text)
        assert watcher.reports[-1] == {"a": "10.9.0.1:8000"}


def test_sidecars_find_each_other_by_leases_with_our_role_and_one_that_left_is_no_member(cluster, namespace, tmp_path):
    account, _ = grant(cluster, namespace, "replicas")
    config = LeaseConfig.model_validate(keys(cluster, namespace, account, tmp_path))
    one, two = Member("pod-a", "10.0.0.1:50061", 0), Member("pod-b", "10.0.0.2:50061", 0)

    async def story() -> None:
        stores = {me: LeaseStore(config, "default", {}) for me in (one, two)}
        try:
            await stores[one].beat(one)
            found = await stores[two].beat(two)
            assert {(member.id, member.address) for member in found} == {one[:2], two[:2]}
            assert all(member.joined > 0 for member in found), "by the API server's clock"
            await stores[two].leave(two)
            left = [member for member in await stores[one].beat(one) if member.address]
            assert [member.id for member in left] == ["pod-a"]
        finally:
            for store in stores.values():
                await store.close()

    run(story())


def test_leases_without_the_role_are_an_error_that_says_so(cluster, namespace, tmp_path):
    config = LeaseConfig.model_validate(keys(cluster, namespace, "nobody", tmp_path))

    async def story() -> None:
        store = LeaseStore(config, "default", {})
        try:
            with pytest.raises(StoreError, match="403 Forbidden"):
                await store.beat(Member("pod-a", "10.0.0.1:50061", 0))
        finally:
            await store.close()

    run(story())
