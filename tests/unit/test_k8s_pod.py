"""A pod's probes, its memory and its end: the base, run here with real Envoy."""

from __future__ import annotations

import json
import re
import threading
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.e2e.kit.processes import http_get, http_ok, wait_until
from tests.unit.k8s.pod import Pod
from tests.unit.k8s.rendering import (
    containers,
    gateway,
    one,
    pod_monitors,
    rendered,
    sidecar_config,
    variables,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["rendered"]  # a fixture


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
    mine, envoys = (monitor["spec"]["podMetricsEndpoints"][0] for monitor in pod_monitors())
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
            statuses.append(pod.ask(budget="6s")[0])

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
        asking.join(timeout=60)
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
