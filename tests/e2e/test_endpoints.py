"""Endpoints that come and go under live traffic: clusters that Envoy learns, and discovery."""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest
import yaml

from tests.conftest import tool

from .kit.awake import awake, lost_s
from .kit.clients import complete_many
from .kit.commands import envoy_config
from .kit.envoy import Envoy, give_up_soon
from .kit.kube_api import KubeApi, slice_of
from .kit.processes import Child, http_get, http_ok, wait_until
from .kit.stack import local
from .kit.upstream import Upstream, behave

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .kit.stack import Stack
from .kit.traffic import Traffic, header, hold, listed, names, reached, reload

ROOT = Path(__file__).parents[2]
SOON_S = 0.8
STALL_S = 0.3
"""Who looks so late may see what comes a second later."""

# ---- clusters that Envoy learns


@pytest.fixture
def dynamic(stack, tmp_path):
    """Start stacks whose Envoy follows a clusters file that the sidecar writes."""

    def start(config: dict[str, Any] | None = None, **how: Any) -> Stack:
        file = tmp_path / "clusters.yaml"
        return stack(config={"envoy_clusters_file": str(file), "max_running_requests": 4, **(config or {})}, **how)

    return start


@contextlib.contextmanager
def more_upstreams(here: Stack, *added: str) -> Iterator[None]:
    with contextlib.ExitStack() as running:
        for name in added:
            here.upstreams[name] = running.enter_context(Upstream(name))
        yield


def test_endpoints_added_removed_and_replaced_under_load_cost_no_client_an_error(dynamic):
    here = dynamic(upstreams=("a",))
    with more_upstreams(here, "b", "c"):
        with Traffic(here) as traffic:
            reload(here, endpoints=listed(here, "a", "b"))  # added
            reached(here, "b")
            reload(here, endpoints=listed(here, "b"))  # removed, and its server goes as soon as it is idle
            wait_until(lambda: names(here) == {"b"})
            here.upstreams["a"].down()
            traffic.more()
            reload(here, endpoints=[{"name": "b", "address": here.upstreams["c"].address}])  # the same name, moved
            reached(here, "c")
            wait_until(lambda: here.upstreams["b"].open_requests() == 0)
            here.upstreams["b"].down()
            here.upstreams["a"].up()
            reload(here, endpoints=listed(here, "a"))  # all replaced at once
            reached(here, "a")
            traffic.more()
        traffic.check()
        assert here.endpoint("a")["cluster"] == "a"


def test_what_waits_goes_to_a_new_endpoint_only_when_envoy_knows_it(dynamic):
    here = dynamic({"max_running_requests": 1, "max_queue_wait_time": "0s"}, upstreams=("a",))
    with more_upstreams(here, "b"), ThreadPoolExecutor(2) as pool:
        running = pool.submit(complete_many, here.url, 1, hold("run"))
        here.wait_in_flight("a", 1)
        waiting = pool.submit(complete_many, here.url, 12, header("wait"))
        here.wait_waiting(12)
        reload(here, endpoints=[*listed(here, "a"), *listed(here, "b", max_running_requests=12)])
        assert [answer.status for answer in waiting.result()] == [200] * 12
        here.upstreams["a"].release("run-0")
        assert running.result()[0].status == 200
    assert here.upstreams["b"].records()


def test_a_replaced_endpoints_old_cluster_stays_until_its_leases_are_back(dynamic):
    here = dynamic(upstreams=("a",))
    with more_upstreams(here, "b"), ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete_many, here.url, 1, hold("old"))
        here.upstreams["a"].wait_for("old-0")
        reload(here, endpoints=[{"name": "a", "address": here.upstreams["b"].address}])
        moved = f"a@{here.upstreams['b'].address}"
        wait_until(lambda: here.endpoint("a")["cluster"] == moved and here.endpoint("a")["state"] == "unknown")
        assert here.endpoint("a")["in_flight"] == 1
        assert complete_many(here.url, 1, header("new"))[0].status == 200
        assert here.upstreams["b"].seen("new-0")
        assert {"a", moved} <= clusters(here)
        here.upstreams["a"].release("old-0")
        assert running.result()[0].status == 200
        wait_until(lambda: "a" not in clusters(here), message="the old cluster goes, 2 s after its last lease")
        assert moved in clusters(here)


def clusters(here: Stack) -> set[str]:
    """The clusters that Envoy has."""
    return {line.split("::")[0] for line in here.envoy.get("/clusters").splitlines()}


def test_with_envoys_admin_address_a_new_endpoint_is_used_as_soon_as_envoy_has_it(dynamic):
    admin = local()

    def edit(bootstrap: dict[str, Any]) -> None:
        bootstrap["admin"]["address"]["socket_address"]["port_value"] = int(admin.rsplit(":", 1)[1])

    here = dynamic({"envoy_admin": admin}, upstreams=("a",), edit=edit)
    with more_upstreams(here, "b", "c", "d"), Traffic(here) as traffic:
        for new in "bcd":
            reload(here, endpoints=listed(here, "a", new))
            began = awake()
            wait_until(lambda new=new: new in names(here))
            took_s = awake() - began
            reached(here, new)
            if took_s < SOON_S:
                break
        else:
            pytest.fail(f"none of three was used within {SOON_S} s: without Envoy's admin address it is 1 s")
    traffic.check()


def test_a_restarted_sidecar_knows_what_envoy_knows(dynamic):
    here = dynamic(upstreams=("a",))
    with more_upstreams(here, "b"):
        here.sidecar.child.stop()
        here.sidecar.write_config(endpoints=listed(here, "a", "b"))
        before_s = lost_s()
        here.sidecar.start()
        first = names(here)
        if lost_s() - before_s < STALL_S:
            assert first == {"a"}, "it is known; b must wait until Envoy has had time to see it"
        wait_until(lambda: names(here) == {"a", "b"})
        answers = complete_many(here.url, 12, header("after"))
        assert {answer.status for answer in answers} == {200}
        assert here.upstreams["b"].records()


def test_without_a_sidecar_the_fail_open_bootstrap_serves_from_the_clusters_file(dynamic, tmp_path):
    here = dynamic({"health_check": {"interval": "100ms"}}, upstreams=("a", "b"))
    http = local()
    addresses = ("--http", http, "--envoy-admin", local(), "--access-log", "none")
    bootstrap = give_up_soon(envoy_config("--config", here.sidecar.path, "--fail-open", *addresses))
    here.sidecar.child.stop()
    here.upstreams["a"].down()
    with Envoy(bootstrap, tmp_path, name="open") as envoy:
        healthy = "cluster.extproc_any_endpoint.membership_healthy"
        wait_until(lambda: envoy.stats(healthy)[healthy] == 1, message="Envoy's own checks see one of two")
        here.upstreams["a"].up()
        wait_until(lambda: envoy.stats(healthy)[healthy] == 2, message="without any traffic, it sees that one is back")
        here.upstreams["a"].down()
        wait_until(lambda: envoy.stats(healthy)[healthy] == 1)
        answers = complete_many(f"http://{http}/v1/chat/completions", 10, header("open"))
    assert {answer.status for answer in answers} == {200}
    assert {answer.headers["x-extproc-outcome"] for answer in answers} == {"unsteered"}


# ---- sources


def test_pods_that_come_and_go_in_kubernetes_cost_no_client_an_error(dynamic, tmp_path):
    with KubeApi() as api, Upstream("a") as a, Upstream("b") as b:
        api.put(slice_of("s-a", {"pod-a": "127.0.0.1"}, port=a.port))
        source = {"service": "vllm", "namespace": "ml", "api": api.url, "max_running_requests": 3}
        here = dynamic({"discovery": [{"kubernetes": source}], "allowed_addresses": ["127.0.0.0/8"]}, upstreams=())
        assert names(here) == {"pod-a"}  # seen before the sidecar was ready
        assert here.endpoint("pod-a")["limit"] == 3
        with Traffic(here) as traffic:
            api.put(slice_of("s-b", {"pod-b": "127.0.0.1"}, port=b.port))
            wait_until(lambda: names(here) == {"pod-a", "pod-b"})
            api.drop()
            gone = slice_of("s-a", {"pod-a": "127.0.0.1"}, port=a.port)
            gone["endpoints"][0]["conditions"] = {"ready": False, "serving": True, "terminating": True}
            api.put(gone)
            wait_until(lambda: names(here) == {"pod-b"})
            a.down()
            traffic.more()
            api.down()  # the API server is away: all stays as it is
            traffic.more()
        traffic.check()
        assert len(b.records()) > 30


def test_a_model_at_zero_replicas_waits_for_its_first_pod_longer_than_its_class_may_wait(dynamic):
    with KubeApi() as api, Upstream("pod") as pod:
        source = {"service": "vllm", "namespace": "ml", "api": api.url, "models": ["asleep"]}
        config = {"discovery": [{"kubernetes": source}], "allowed_addresses": ["127.0.0.0/8"]}
        budgets = {"classes": [{"name": "default", "budget": "200ms"}], "no_endpoint_budget": "20s"}
        here = dynamic({**config, **budgets}, upstreams=("a",), endpoints={"a": {"models": ["awake"]}})
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(complete_many, here.url, 3, header("first", **{"x-model": "asleep"}))
            here.wait_waiting(3)
            (hasty,) = complete_many(here.url, 1, header("hasty", **{"x-model": "asleep", "x-queue-budget": "300ms"}))
            assert (hasty.status, hasty.headers["retry-after"]) == (503, "20")
            (wrong,) = complete_many(here.url, 1, header("wrong", **{"x-model": "nobody's"}))
            assert wrong.status == 404
            api.put(slice_of("s", {"pod": "127.0.0.1"}, port=pod.port))
            assert [(answer.status, answer.head_s > 0.3) for answer in waiting.result()] == [(200, True)] * 3
        assert len(pod.records()) == 3


def test_what_the_scaler_asks_prometheus_wakes_a_pool_of_none_and_lets_it_sleep_again(dynamic, tmp_path):
    """KEDA itself needs a cluster; its query, from the manifest, is asked of a real Prometheus as KEDA asks it."""
    prometheus = tool("prometheus", "prometheus")
    scaled = yaml.safe_load((ROOT / "k8s/components/autoscaling/scaledobject.yaml").read_text())
    wanted = urlencode({"query": scaled["spec"]["triggers"][0]["metadata"]["query"]})
    listen, held = local(), dict([behave("ok", hold="head")])
    with KubeApi() as api, Upstream("pod") as pod:
        source = {"service": "vllm", "namespace": "ml", "api": api.url, "models": ["asleep"]}
        here = dynamic(
            {
                "discovery": [{"kubernetes": source}],
                "allowed_addresses": ["127.0.0.0/8"],
                "classes": [{"name": "default", "budget": "200ms"}],
                "no_endpoint_budget": "30s",
            },
            upstreams=(),
        )
        scrape = {"job_name": "extproc", "static_configs": [{"targets": [here.sidecar.admin]}]}
        written = {"global": {"scrape_interval": "100ms"}, "scrape_configs": [scrape]}
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(written))
        argv = [prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        with (
            Child([*argv, f"--web.listen-address={listen}"], tmp_path / "prometheus.log") as child,
            ThreadPoolExecutor(1) as pool,
        ):

            def work() -> list[float]:
                answer = json.loads(http_get(listen, f"/api/v1/query?{wanted}")[1])
                return [float(one["value"][1]) for one in answer["data"]["result"]]

            child.wait_ready(lambda: http_ok(listen, "/-/ready"))
            wait_until(lambda: work() == [0.0], message="no engine, nobody waits: 0, and an answer")
            waiting = pool.submit(complete_many, here.url, 3, header("first", **{"x-model": "asleep"}, **held))
            wait_until(lambda: work() == [3.0], message="what waits for the first engine")
            api.put(slice_of("s", {"pod": "127.0.0.1"}, port=pod.port))
            wait_until(lambda: pod.open_requests() == 3)
            wait_until(lambda: work() == [3.0], message="what runs there")
            for number in range(3):
                pod.release(f"first-{number}")
            assert [answer.status for answer in waiting.result()] == [200] * 3
            wait_until(lambda: work() == [0.0], message="it may sleep again")


def test_addresses_of_a_name_are_endpoints(dynamic):
    with Upstream("a") as a:
        source = {"name": "127.0.0.1", "port": a.port, "interval": "50ms", "models": ["sim"]}
        here = dynamic({"discovery": [{"dns": source}], "allowed_addresses": ["127.0.0.0/8"]}, upstreams=())
        assert names(here) == {a.address}
        assert complete_many(here.url, 1, header("one", **{"x-model": "sim"}))[0].status == 200
        assert complete_many(here.url, 1, header("two", **{"x-model": "other"}))[0].status == 404
        reload(here, discovery=[])
        wait_until(lambda: names(here) == set())
