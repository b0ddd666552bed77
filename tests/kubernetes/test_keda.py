"""KEDA and Kubernetes' autoscaler on a real API server: our manifest and our queue bring a pool from 0 to N, and back.

Real are KEDA's operator and its server of metrics, the API server, the controller of HorizontalPodAutoscalers,
Prometheus and the sidecar; the test speaks for Envoy, and names an engine where a kubelet would have started one. The
autoscaler asks KEDA's server itself: a cluster's API server, which would pass that on, is left out.
"""

from __future__ import annotations

import contextlib
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

from .cluster import ADMIN, KEDA, MERGE, shipped
from .conftest import ADAPTER, OPERATOR
from .test_watches import VLLM

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
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
    """The operator and its server of metrics, running."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster = cluster
        self._metrics, service = local(), f"127.0.0.1:{free_port()}"
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
            f"--metrics-service-bind-address={service}",
        ]
        environment = {"POD_NAMESPACE": "keda", "KEDA_CLUSTER_OBJECT_NAMESPACE": "keda", "WATCH_NAMESPACE": ""}
        self.child = Child(argv, folder / "keda.log", env=environment, name="keda-operator")
        self.child.start()
        self.child.wait_ready(lambda: http_ok(probe, "/readyz"), timeout_s=60.0)
        known = [f"--{which}-kubeconfig={folder}/kubeconfig" for which in ("lister", "authentication", "authorization")]
        argv = [
            *(ADAPTER, *known, "--authentication-skip-lookup", f"--kubeconfig={folder}/kubeconfig"),
            *(f"--secure-port={cluster.metrics_port}", "--bind-address=127.0.0.1", f"--cert-dir={folder}"),
            *(f"--tls-cert-file={folder}/tls.crt", f"--tls-private-key-file={folder}/tls.key"),
            *(f"--port={free_port()}", f"--metrics-service-address={service}"),
            "--metrics-service-grpc-authority=localhost",
        ]
        self.adapter = Child(argv, folder / "adapter.log", env=environment, name="keda-adapter")
        self.adapter.start()

    def stop(self) -> None:
        """Stop both."""
        self.adapter.stop()
        self.child.stop()

    def told(self, namespace: str) -> float | None:
        """What its server of metrics answers the autoscaler for the pool there; None: nothing yet."""
        path = f"/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/s0-prometheus"
        query = "labelSelector=scaledobject.keda.sh%2Fname%3Dvllm"
        try:
            status, answer = self._cluster.call("GET", f"{path}?{query}", port=self._cluster.metrics_port)
        except OSError:
            return None
        if status != 200:
            return None
        value = str(answer["items"][0]["value"])
        return float(value[:-1]) / 1000.0 if value.endswith("m") else float(value)

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
        running.stop()


def put_deployment(cluster: Cluster, namespace: str) -> None:
    container: dict[str, Any] = {"name": "engine", "image": "none", "ports": [{"containerPort": 8000}]}
    template = {"metadata": {"labels": VLLM}, "spec": {"containers": [container]}}
    spec = {"replicas": 0, "selector": {"matchLabels": VLLM}, "template": template}
    cluster.do("POST", DEPLOYMENT.format(namespace), {"metadata": {"name": "vllm"}, "spec": spec})


def replicas(cluster: Cluster, namespace: str) -> int:
    return int(cluster.do("GET", f"{DEPLOYMENT.format(namespace)}/vllm")["spec"]["replicas"])


def scraped(folder: Path, sidecar: Sidecar, listen: str) -> Child:
    """A Prometheus that looks at the sidecar often, and is asked at `listen`."""
    scrape = {"job_name": "extproc", "static_configs": [{"targets": [sidecar.admin]}]}
    written = {"global": {"scrape_interval": "200ms"}, "scrape_configs": [scrape]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(written))
    argv = [tool("prometheus", "prometheus"), f"--config.file={folder}/prometheus.yml"]
    argv += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={listen}"]
    return Child(argv, folder / "prometheus.log")


def wait_scraped(child: Child, listen: str) -> None:
    """Wait until it has seen the sidecar: before, no answer is an error, and wakes a pool."""
    child.wait_ready(lambda: http_ok(listen, "/-/ready"))
    query = "/api/v1/query?query=extproc_build_info"
    wait_until(lambda: json.loads(http_get(listen, query)[1])["data"]["result"], 10.0)


def put_object(cluster: Cluster, namespace: str, prometheus: str) -> None:
    """Our manifest, for a pool that may have none, looked at often."""
    scaled = yaml.safe_load((K8S / "components/autoscaling/scaledobject.yaml").read_text())
    scaled["spec"] |= {"minReplicaCount": 0, "pollingInterval": POLL_S, "cooldownPeriod": COOLDOWN_S}
    scaled["spec"]["triggers"][0]["metadata"]["serverAddress"] = f"http://{prometheus}"
    cluster.do("POST", OBJECTS.format(namespace), scaled)


@contextlib.contextmanager
def scaled(
    cluster: Cluster, namespace: str, folder: Path, config: Mapping[str, object]
) -> Iterator[tuple[Sidecar, RawChannel]]:
    """A pool of none there that is scaled by the queue of a sidecar with this `config`; and a channel to that."""
    listen = local()
    put_deployment(cluster, namespace)
    with (
        Sidecar(config, folder) as sidecar,
        RawChannel(sidecar.listen) as envoy,
        scraped(folder, sidecar, listen) as child,
    ):
        wait_scraped(child, listen)
        put_object(cluster, namespace, listen)
        yield sidecar, envoy


def test_keda_wakes_a_pool_of_none_for_what_waits_and_lets_it_sleep_when_nothing_does(cluster, keda, tmp_path):
    namespace = cluster.namespace()
    config = {
        "enable_queue": True,
        "default_model": "asleep",
        "classes": [{"name": "default", "budget": "20s"}],
        "no_endpoint_budget": "90s",
    }

    def is_active() -> str | None:
        conditions = cluster.do("GET", f"{OBJECTS.format(namespace)}/vllm").get("status", {}).get("conditions", [])
        return next((one["status"] for one in conditions if one["type"] == "Active"), None)

    with scaled(cluster, namespace, tmp_path, config) as (sidecar, envoy):
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


def test_kubernetes_own_autoscaler_has_as_many_engines_as_our_queue_wants_and_takes_them_back(cluster, keda, tmp_path):
    """Twelve to an engine: 5 that wait want one, 50 want five, of which our manifest adds two at a time."""
    namespace = cluster.namespace()
    config = {"enable_queue": True, "default_model": "asleep", "no_endpoint_budget": "200s"}

    def behave(**rules: object) -> None:
        """Change how fast the autoscaler may act: at once, and by `rules`."""
        now = {name: {"stabilizationWindowSeconds": 0, **rules} for name in ("scaleUp", "scaleDown")}
        advanced = {"advanced": {"horizontalPodAutoscalerConfig": {"behavior": now}}}
        cluster.do("PATCH", f"{OBJECTS.format(namespace)}/vllm", {"spec": advanced}, MERGE)

    with scaled(cluster, namespace, tmp_path, config) as (_, envoy):
        behave()
        wait_until(lambda: keda.told(namespace) == 0.0, 30.0, "nobody waits")
        assert replicas(cluster, namespace) == 0
        streams = []
        for waiting, engines in ((5, 1), (50, 3)):
            while len(streams) < waiting:
                streams.append(envoy.open(deadline_s=190.0))
                streams[-1].send(ASKS)
            wait_until(lambda waiting=waiting: keda.told(namespace) == waiting, 20.0, f"{waiting} wait")
            wait_until(lambda engines=engines: replicas(cluster, namespace) == engines, 30.0, f"{engines} engines")
        status = cluster.do("GET", SCALER.format(namespace))["status"]
        (limited,) = (one for one in status["conditions"] if one["type"] == "ScalingLimited")
        assert (status["desiredReplicas"], limited["reason"]) == (3, "ScaleUpLimit"), "two more in three minutes"
        behave(policies=[{"type": "Pods", "value": 8, "periodSeconds": 1}])
        wait_until(lambda: replicas(cluster, namespace) == 5, 30.0, "50 by 12, rounded up")
        for stream in streams[5:]:
            stream.cancel()
        wait_until(lambda: replicas(cluster, namespace) == 1, 30.0, "five need one")
        for stream in streams[:5]:
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
