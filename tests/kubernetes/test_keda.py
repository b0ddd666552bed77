"""KEDA's own operator on a real API server: our manifest and our queue bring a pool from 0 to an engine, and back to 0.

Real are the operator, the API server, Prometheus and the sidecar; the test speaks for Envoy, and names an engine where
a kubelet would have started one. How many beyond the first is reckoned by Kubernetes' own autoscaler, from the
HorizontalPodAutoscaler that KEDA makes.
"""

from __future__ import annotations

import json
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest
import trustme
import yaml

from extproc._pb import ext_proc_pb2 as pb
from tests.conftest import tool
from tests.e2e.kit.certificates import secret
from tests.e2e.kit.extproc_raw import RawChannel
from tests.e2e.kit.processes import Child, free_port, http_get, http_ok, wait_until
from tests.e2e.kit.stack import Sidecar, local
from tests.unit.k8s.rendering import K8S

from .cluster import ADMIN, KEDA, shipped
from .conftest import OPERATOR
from .test_watches import VLLM

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .cluster import Cluster

OBJECTS = "/apis/keda.sh/v1alpha1/namespaces/{}/scaledobjects"
DEPLOYMENT = "/apis/apps/v1/namespaces/{}/deployments"
SCALER = "/apis/autoscaling/v2/namespaces/{}/horizontalpodautoscalers/keda-hpa-vllm"
POLL_S, COOLDOWN_S = 1, 3
_NAMED = pb.HeaderMap(headers=[pb.HeaderValue(key="x-model", raw_value=b"asleep")])
ASKS = pb.ProcessingRequest(request_headers=pb.HttpHeaders(headers=_NAMED)).SerializeToString()
"""What Envoy says of a request for the model that sleeps."""


class Keda:
    """The operator, running."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._metrics = local()
        server = {"server": cluster.url, "certificate-authority": str(cluster.ca_file)}
        settings = {
            "clusters": [{"name": "c", "cluster": server}],
            "users": [{"name": "u", "user": {"token": ADMIN}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "c",
        }
        (folder / "kubeconfig").write_text(yaml.safe_dump(settings))
        probe = local()
        argv = [
            *(OPERATOR, f"--kubeconfig={folder}/kubeconfig", f"--cert-dir={folder}", "--zap-log-level=info"),
            *(f"--metrics-bind-address={self._metrics}", f"--health-probe-bind-address={probe}"),
            f"--metrics-service-bind-address=127.0.0.1:{free_port()}",
        ]
        environment = {"POD_NAMESPACE": "keda", "KEDA_CLUSTER_OBJECT_NAMESPACE": "keda", "WATCH_NAMESPACE": ""}
        self.child = Child(argv, folder / "keda.log", env=environment, name="keda-operator")
        self.child.start()
        self.child.wait_ready(lambda: http_ok(probe, "/readyz"), timeout_s=60.0)

    def work(self, namespace: str) -> float | None:
        """What it read from Prometheus last, for the pool there."""
        page = http_get(self._metrics, "/metrics")[1].decode()
        of_it = rf'^keda_scaler_metrics_value\{{[^}}]*namespace="{namespace}"[^}}]*\}} (\S+)$'
        found = re.search(of_it, page, re.MULTILINE)
        return float(found[1]) if found else None


@pytest.fixture(scope="module")
def keda(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keda]:
    """KEDA on the cluster."""
    tmp_path = tmp_path_factory.mktemp("keda")
    cluster.install(*shipped(KEDA, "config/crd/bases/*.yaml"))
    cluster.do("POST", "/api/v1/namespaces", {"metadata": {"name": "keda"}})
    for name, content in secret(trustme.CA(), "localhost").items():  # for its metrics, which nobody asks here
        (tmp_path / name).write_bytes(content)
    running = Keda(cluster, tmp_path)
    try:
        yield running
    finally:
        running.child.stop()


def put_deployment(cluster: Cluster, namespace: str) -> None:
    container: dict[str, Any] = {"name": "engine", "image": "none", "ports": [{"containerPort": 8000}]}
    template = {"metadata": {"labels": VLLM}, "spec": {"containers": [container]}}
    spec = {"replicas": 0, "selector": {"matchLabels": VLLM}, "template": template}
    cluster.do("POST", DEPLOYMENT.format(namespace), {"metadata": {"name": "vllm"}, "spec": spec})


def replicas(cluster: Cluster, namespace: str) -> int:
    return int(cluster.do("GET", f"{DEPLOYMENT.format(namespace)}/vllm")["spec"]["replicas"])


def put_object(cluster: Cluster, namespace: str, prometheus: str) -> None:
    """Our manifest, for a pool that may have none, looked at often."""
    scaled = yaml.safe_load((K8S / "components/autoscaling/scaledobject.yaml").read_text())
    scaled["spec"] |= {"minReplicaCount": 0, "pollingInterval": POLL_S, "cooldownPeriod": COOLDOWN_S}
    scaled["spec"]["triggers"][0]["metadata"]["serverAddress"] = f"http://{prometheus}"
    cluster.do("POST", OBJECTS.format(namespace), scaled)


def test_keda_wakes_a_pool_of_none_for_what_waits_and_lets_it_sleep_when_nothing_does(cluster, keda, tmp_path):
    prometheus, listen, namespace = tool("prometheus", "prometheus"), local(), cluster.namespace()
    put_deployment(cluster, namespace)
    config = {
        "enable_queue": True,
        "default_model": "asleep",
        "classes": [{"name": "default", "budget": "20s"}],
        "no_endpoint_budget": "90s",
    }

    def is_active() -> str | None:
        conditions = cluster.do("GET", f"{OBJECTS.format(namespace)}/vllm").get("status", {}).get("conditions", [])
        return next((one["status"] for one in conditions if one["type"] == "Active"), None)

    with Sidecar(config, tmp_path) as sidecar, RawChannel(sidecar.listen) as envoy:
        scrape = {"job_name": "extproc", "static_configs": [{"targets": [sidecar.admin]}]}
        written = {"global": {"scrape_interval": "200ms"}, "scrape_configs": [scrape]}
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(written))
        argv = [prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        with Child([*argv, f"--web.listen-address={listen}"], tmp_path / "prometheus.log") as child:
            child.wait_ready(lambda: http_ok(listen, "/-/ready"))
            scraped = "/api/v1/query?query=extproc_build_info"  # before: no answer is an error, and wakes a pool
            wait_until(lambda: json.loads(http_get(listen, scraped)[1])["data"]["result"], 10.0)
            put_object(cluster, namespace, listen)
            wait_until(lambda: keda.work(namespace) == 0.0, 30.0, "nobody waits: 0 work, and not no answer")
            wait_until(lambda: is_active() == "False", 10.0)
            assert replicas(cluster, namespace) == 0
            streams = [envoy.open(deadline_s=100.0) for _ in range(3)]
            for stream in streams:
                stream.send(ASKS)
            wait_until(lambda: replicas(cluster, namespace) == 1, 20.0, "the first engine is asked for")
            assert keda.work(namespace) == 3.0
            target = cluster.do("GET", SCALER.format(namespace))["spec"]
            assert (target["minReplicas"], target["maxReplicas"]) == (1, 8)
            (metric,) = target["metrics"]
            assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "12"}
            sidecar.write_config(endpoints=[{"name": "engine-0", "address": "127.0.0.1:9"}])
            sidecar.child.signal(signal.SIGHUP)
            for stream in streams:
                assert b"engine-0" in stream.read(20.0), "what waited goes to the engine that came"
            wait_until(lambda: sidecar.queues()["waiting_total"] == 0)
            assert (keda.work(namespace), replicas(cluster, namespace)) == (3.0, 1), "what runs is work too"
            for stream in streams:
                stream.cancel()
            wait_until(lambda: replicas(cluster, namespace) == 0, 30.0, "it may sleep again")


def test_while_prometheus_is_away_a_pool_that_sleeps_is_woken_and_one_engine_is_all_it_gets(cluster, keda):
    """Our `fallback` is `currentReplicas`; KEDA takes an error for work: one engine, rather than asleep and blind."""
    namespace = cluster.namespace()
    put_deployment(cluster, namespace)
    put_object(cluster, namespace, f"127.0.0.1:{free_port()}")

    def failures() -> int:
        status = cluster.do("GET", f"{OBJECTS.format(namespace)}/vllm").get("status", {})
        return int(status.get("health", {}).get("s0-prometheus", {}).get("numberOfFailures", 0))

    wait_until(lambda: replicas(cluster, namespace) == 1, 30.0, "woken")
    assert failures() > 4
    wait_until(lambda: failures() > 8, 30.0)
    assert replicas(cluster, namespace) == 1
