"""Endpoints and members from a real API server: what the imitation in tests/e2e/kit/kube_api.py takes for granted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from extproc.endpoints.discovery import watch
from extproc.endpoints.discovery.inference_pool import InferencePool
from extproc.endpoints.discovery.kubernetes import Kubernetes
from extproc.endpoints.discovery.watch import Watch
from extproc.kubernetes import ApiServer
from tests.e2e.kit.kube_api import objective_of, pool_of, slice_of
from tests.e2e.kit.processes import wait_until
from tests.e2e.kit.watcher import Watcher

from .cluster import ADMIN, LLM_D_OBJECTIVE, MERGE, shipped
from .cluster import DEFINITIONS as SHIPPED

if TYPE_CHECKING:
    from pathlib import Path

    from .cluster import Cluster

VLLM = {"app": "vllm"}
POOL = "/apis/inference.networking.k8s.io/v1/namespaces/{}/inferencepools"
OBJECTIVE = "/apis/inference.networking.x-k8s.io/v1alpha2/namespaces/{}/inferenceobjectives"
LLM_D = "/apis/llm-d.ai/v1alpha2/namespaces/{}/inferenceobjectives"


@pytest.fixture(scope="module", autouse=True)
def definitions(cluster: Cluster) -> None:
    """The kinds of the Inference Gateway."""
    cluster.install(*(one for module, files in SHIPPED[:2] for one in shipped(module, files)), LLM_D_OBJECTIVE)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watch, "BACKOFF_S", (0.05, 0.5))


@pytest.fixture
def keys(cluster: Cluster, tmp_path: Path) -> dict[str, Any]:
    """What a configuration says of the API server and a new namespace, for an administrator."""
    (tmp_path / "token").write_text(ADMIN)
    files = {"token_file": str(tmp_path / "token"), "ca_file": str(cluster.ca_file)}
    return {"namespace": cluster.namespace(), "api": cluster.url, **files}


def put_service(cluster: Cluster, namespace: str) -> None:
    spec = {"clusterIP": "None", "selector": VLLM, "ports": [{"name": "http", "port": 8000}]}
    cluster.do("POST", f"/api/v1/namespaces/{namespace}/services", {"metadata": {"name": "vllm"}, "spec": spec})


def put_pool(cluster: Cluster, namespace: str, labels: dict[str, str], *ports: int) -> None:
    item = pool_of("vllm", labels, ports)
    item["spec"]["endpointPickerRef"] = {"name": "extproc", "port": {"number": 9002}}
    cluster.do("POST", POOL.format(namespace), {**of("inference.networking.k8s.io/v1", "InferencePool"), **item})


def of(version: str, kind: str) -> dict[str, str]:
    return {"apiVersion": version, "kind": kind}


def test_the_slices_that_the_controller_makes_of_a_services_ready_pods_are_followed(cluster, keys):
    namespace = keys["namespace"]
    put_service(cluster, namespace)
    cluster.put_pod(namespace, "a", "10.1.0.1", labels=VLLM)
    cluster.put_pod(namespace, "cold", "10.1.0.2", ready=False, labels=VLLM)
    cluster.put_pod(namespace, "stranger", "10.1.0.3", labels={"app": "other"})
    with Watcher(Kubernetes, service="vllm", port="http", **keys) as watcher:
        watcher.sees(a="10.1.0.1:8000")
        cluster.put_pod(namespace, "cold", "10.1.0.2")
        watcher.sees(a="10.1.0.1:8000", cold="10.1.0.2:8000")
        cluster.put_pod(namespace, "a", "10.1.0.1", ready=False)
        watcher.sees(cold="10.1.0.2:8000")
        cluster.do("DELETE", f"/api/v1/namespaces/{namespace}/pods/cold?gracePeriodSeconds=0")
        watcher.sees()


def test_an_inference_pool_its_pods_and_objectives_are_followed(cluster, keys):
    namespace = keys["namespace"]
    put_pool(cluster, namespace, VLLM, 8000, 8001)
    active = {"llm-d.ai/active-ports": "8001"}
    cluster.put_pod(namespace, "a", "10.2.0.1", labels=VLLM)
    cluster.put_pod(namespace, "b", "10.2.0.2", labels=VLLM, annotations=active)
    cluster.put_pod(namespace, "cold", "10.2.0.3", ready=False, labels=VLLM)
    old = {**of("inference.networking.x-k8s.io/v1alpha2", "InferenceObjective"), **objective_of("chat", "vllm", 5)}
    new = {**of("llm-d.ai/v1alpha2", "InferenceObjective"), **objective_of("chat", "vllm", 7)}
    cluster.do("POST", OBJECTIVE.format(namespace), old)
    with Watcher(InferencePool, name="vllm", **keys) as watcher:
        watcher.sees(a_rank_0="10.2.0.1:8000", a_rank_1="10.2.0.1:8001", b_rank_1="10.2.0.2:8001")
        wait_until(lambda: watcher.priorities[-1:] == [{"chat": 5}])
        cluster.do("POST", LLM_D.format(namespace), new)
        wait_until(lambda: watcher.priorities[-1:] == [{"chat": 7}])
        cluster.do("DELETE", f"/api/v1/namespaces/{namespace}/pods/a")  # no kubelet ends it: it terminates for ever
        watcher.sees(b_rank_1="10.2.0.2:8001")
        pool = f"{POOL.format(namespace)}/vllm"
        cluster.do("PATCH", pool, {"spec": {"targetPorts": [{"number": 8001}]}}, MERGE)
        watcher.sees(b="10.2.0.2:8001")
        cluster.do("DELETE", pool)
        watcher.sees()


def test_a_pod_whose_label_changes_leaves_a_watch_by_label(cluster, keys):
    namespace = keys["namespace"]
    put_pool(cluster, namespace, VLLM, 8000)
    cluster.put_pod(namespace, "a", "10.3.0.1", labels=VLLM)
    with Watcher(InferencePool, name="vllm", **keys) as watcher:
        watcher.sees(a="10.3.0.1:8000")
        pod = f"/api/v1/namespaces/{namespace}/pods/a"
        cluster.do("PATCH", pod, {"metadata": {"labels": {"app": "debugged"}}}, MERGE)
        watcher.sees()


def test_a_watch_that_the_server_ends_goes_on_without_a_list(cluster, keys, monkeypatch):
    monkeypatch.setattr(watch, "WATCH_S", 1)
    lists = counted(monkeypatch, "_list")
    watches = counted(monkeypatch, "_watch")
    put_service(cluster, keys["namespace"])
    cluster.put_pod(keys["namespace"], "a", "10.4.0.1", labels=VLLM)
    with Watcher(Kubernetes, service="vllm", **keys) as watcher:
        watcher.sees(a="10.4.0.1:8000")
        wait_until(lambda: len(watches) >= 3, 10.0)
        cluster.put_pod(keys["namespace"], "b", "10.4.0.2", labels=VLLM)
        watcher.sees(a="10.4.0.1:8000", b="10.4.0.2:8000")
    assert len(lists) == 1


@pytest.fixture
def gone(monkeypatch) -> list[Exception]:
    """How often the server said that a version is too old."""
    said: list[Exception] = []

    class Gone(watch.GoneError):
        def __init__(self) -> None:
            said.append(self)

    monkeypatch.setattr(watch, "GoneError", Gone)
    return said


def test_a_server_that_dies_takes_nothing_away_and_when_it_is_back_our_version_is_too_old(
    cluster, keys, monkeypatch, gone
):
    """A server that starts knows only what is newest: whoever asks from an older version gets a 410."""
    monkeypatch.setattr(watch, "LIST_AFTER", 10**9)  # else a server that is away so long is asked for everything anyway
    lists = counted(monkeypatch, "_list")
    namespace = keys["namespace"]
    put_service(cluster, namespace)
    cluster.put_pod(namespace, "a", "10.5.0.1", labels=VLLM)
    with Watcher(Kubernetes, service="vllm", **keys) as watcher:
        watcher.sees(a="10.5.0.1:8000")
        assert not gone
        before = len(watcher.reports)
        for number in range(3):  # the version rises, and a watch of slices does not hear of it
            item = {"metadata": {"name": f"c{number}"}}
            cluster.do("POST", f"/api/v1/namespaces/{namespace}/configmaps", item)
        cluster.kill()
        assert watcher.reports[-1] == {"a": "10.5.0.1:8000"}
        cluster.start()
        cluster.put_pod(namespace, "b", "10.5.0.2", labels=VLLM)
        watcher.sees(a="10.5.0.1:8000", b="10.5.0.2:8000")
        assert {} not in watcher.reports[before:]
    assert gone
    assert len(lists) == 2


def test_a_list_that_is_compacted_away_between_two_pages_is_read_whole_all_the_same(cluster, keys, monkeypatch, gone):
    monkeypatch.setattr(watch, "PAGE", 1)
    slices = f"/apis/discovery.k8s.io/v1/namespaces/{keys['namespace']}/endpointslices"

    def put_slice(number: int) -> None:
        item = slice_of(f"s{number}", {f"p{number}": f"10.6.0.{number}"})
        cluster.do("POST", slices, {**of("discovery.k8s.io/v1", "EndpointSlice"), **item})

    for number in range(1, 4):
        put_slice(number)
    real, asked = ApiServer.headers, []

    def headers(self: ApiServer, method: str) -> dict[str, str]:
        asked.append(self)
        if len(asked) == 2:
            put_slice(4)
            cluster.compact()
        return real(self, method)

    monkeypatch.setattr(ApiServer, "headers", headers)
    with Watcher(Kubernetes, service="vllm", **keys) as watcher:
        watcher.sees(**{f"p{number}": f"10.6.0.{number}:8000" for number in range(1, 5)})
        assert len(watcher.reports) == 1
    assert gone


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """The versions known at each call of a method of Watch."""
    calls: list[str] = []
    real = getattr(Watch, name)

    def call(self: Watch[Any], *arguments: Any) -> Any:
        calls.append(self.version)
        return real(self, *arguments)

    monkeypatch.setattr(Watch, name, call)
    return calls
