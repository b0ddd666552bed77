"""An InferencePool over real HTTP: which pods are endpoints, what a change does, and what objectives are worth."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import pytest

from extproc.config import InferencePoolConfig, KubernetesConfig
from extproc.endpoints.discovery.inference_pool import InferencePool
from extproc.endpoints.discovery.kubernetes import Kubernetes

from .kit.clients import complete_many
from .kit.kube_api import (
    LLM_D_OBJECTIVES,
    OBJECTIVES,
    PODS,
    POOLS,
    KubeApi,
    api,
    objective_of,
    pod_of,
    pool_of,
    quick,
    slice_of,
)
from .kit.picking import Picking
from .kit.processes import PATIENCE_S, wait_until
from .kit.watcher import Watcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extproc.config import EndpointConfig
    from extproc.endpoints.discovery.source import Source

__all__ = ["api", "quick"]  # fixtures

VLLM = {"app": "vllm"}
COUNTED = re.compile(r'extproc_requests_total\{(?=.*class="batch").*outcome="dispatched"')


def watch_pool(api: KubeApi, **config: Any) -> Watcher:
    keys = {"name": "vllm", "namespace": "ml", "api": api.url, "token_file": "/none", **config}
    return Watcher(InferencePool, **keys)


def test_only_pods_of_the_pool_that_are_ready_and_stay_are_endpoints(api):
    api.put(pool_of("vllm", VLLM), POOLS)
    api.put(pool_of("other", {"app": "other"}), POOLS)
    api.put(pod_of("a", "10.0.0.1", VLLM), PODS)
    api.put(pod_of("cold", "10.0.0.2", VLLM, ready="False"), PODS)
    api.put(pod_of("going", "10.0.0.3", VLLM, deletionTimestamp="2026-01-01T00:00:00Z"), PODS)
    api.put(pod_of("new", None, VLLM), PODS)
    api.put(pod_of("b", "10.0.0.5", {"app": "other"}), PODS)
    api.put(pod_of("v6", "fd00::1", VLLM), PODS)
    with watch_pool(api) as watcher:
        watcher.sees(a="10.0.0.1:8000", v6="[fd00::1]:8000")
        api.put(pod_of("cold", "10.0.0.2", VLLM), PODS)
        watcher.sees(a="10.0.0.1:8000", cold="10.0.0.2:8000", v6="[fd00::1]:8000")
        api.put(pod_of("a", "10.0.0.1", VLLM, ready="Unknown"), PODS)
        watcher.sees(cold="10.0.0.2:8000", v6="[fd00::1]:8000")
        assert watcher.left_out == 0


def test_each_target_port_is_an_endpoint_and_an_annotation_takes_ports_out(api):
    api.put(pool_of("vllm", VLLM, ports=(8000, 8001)), POOLS)
    api.put(pod_of("a", "10.0.0.1", VLLM), PODS)
    llm_d, old = "llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports"
    api.put(pod_of("b", "10.0.0.2", VLLM, annotations={llm_d: " 8001, 9999,none", old: "8000"}), PODS)
    api.put(pod_of("c", "10.0.0.3", VLLM, annotations={old: "8000"}), PODS)
    api.put(pod_of("d", "10.0.0.4", VLLM, annotations={llm_d: ""}), PODS)
    with watch_pool(api) as watcher:
        watcher.sees(
            a_rank_0="10.0.0.1:8000", a_rank_1="10.0.0.1:8001", b_rank_1="10.0.0.2:8001", c_rank_0="10.0.0.3:8000"
        )


def test_a_pod_that_is_ready_no_more_takes_all_its_ports_with_it(api):
    """Ranks of one engine fail together, and by one request's 503 none of them could be told from a full one."""
    api.put(pool_of("vllm", VLLM, ports=(8000, 8001)), POOLS)
    api.put(pod_of("a", "10.0.0.1", VLLM), PODS)
    api.put(pod_of("b", "10.0.0.2", VLLM), PODS)
    ranks = {"b_rank_0": "10.0.0.2:8000", "b_rank_1": "10.0.0.2:8001"}
    with watch_pool(api) as watcher:
        watcher.sees(a_rank_0="10.0.0.1:8000", a_rank_1="10.0.0.1:8001", **ranks)
        api.put(pod_of("a", "10.0.0.1", VLLM, ready="False"), PODS)
        watcher.sees(**ranks)


def test_a_changed_pool_is_followed_and_a_deleted_one_has_no_endpoints(api):
    api.put(pool_of("vllm", VLLM), POOLS)
    api.put(pod_of("a", "10.0.0.1", VLLM), PODS)
    api.put(pod_of("b", "10.0.0.2", {"app": "sglang"}), PODS)
    with watch_pool(api) as watcher:
        watcher.sees(a="10.0.0.1:8000")
        api.put(pool_of("vllm", VLLM, ports=(9000,)), POOLS)
        watcher.sees(a="10.0.0.1:9000")
        api.put(pool_of("vllm", {"app": "sglang"}, ports=(9000,)), POOLS)
        watcher.sees(b="10.0.0.2:9000")
        assert {} not in watcher.reports, "a pool of whose new pods nothing is known yet keeps those of before"
        api.delete("vllm", POOLS)
        watcher.sees()
        api.put(pool_of("vllm", VLLM), POOLS)
        watcher.sees(a="10.0.0.1:8000")


def test_until_the_pods_of_a_changed_pool_are_listed_those_of_before_stay(api, caplog):
    api.put(pool_of("vllm", VLLM), POOLS)
    api.put(pod_of("a", "10.0.0.1", VLLM), PODS)
    api.put(pod_of("b", "10.0.0.2", {"app": "sglang"}), PODS)
    with watch_pool(api) as watcher:
        watcher.sees(a="10.0.0.1:8000")
        api.kinds.discard(PODS)
        api.put(pool_of("vllm", {"app": "sglang"}), POOLS)
        wait_until(lambda: "the cluster knows no v1/pods" in caplog.text)
        api.put(pool_of("vllm", {"app": "sglang"}, ports=(9000,)), POOLS)
        wait_until(lambda: watcher.source._pool.ports == (9000,))
        assert watcher.reports == [{"a": "10.0.0.1:8000"}]
        api.kinds.add(PODS)
        watcher.sees(b="10.0.0.2:9000")


def test_a_pool_that_is_not_there_yet_is_an_answer_and_a_pool_that_makes_no_sense_changes_nothing(api, caplog):
    api.put(pod_of("a", "10.0.0.1", VLLM), PODS)
    with watch_pool(api) as watcher:
        watcher.sees()
        api.put(pool_of("vllm", VLLM), POOLS)
        watcher.sees(a="10.0.0.1:8000")
        api.put(pool_of("vllm", {}, ports=(0,)), POOLS)
        wait_until(lambda: "no selector or ports" in caplog.text)
        api.put(pod_of("b", "10.0.0.2", VLLM), PODS)
        watcher.sees(a="10.0.0.1:8000", b="10.0.0.2:8000")


def test_a_cluster_without_the_kind_is_a_failure_and_takes_nothing_away(api, caplog):
    api.kinds.discard(POOLS)
    with watch_pool(api) as watcher:
        wait_until(lambda: "the cluster knows no inference.networking.k8s.io/v1/inferencepools" in caplog.text)
        assert not watcher.reports
        api.put(pool_of("vllm", VLLM), POOLS)
        api.put(pod_of("a", "10.0.0.1", VLLM), PODS)
        api.kinds.add(POOLS)
        watcher.sees(a="10.0.0.1:8000")


def test_watches_that_end_or_are_too_old_miss_nothing(api):
    api.put(pool_of("vllm", VLLM), POOLS)
    api.put(pod_of("a", "10.0.0.1", VLLM), PODS)
    with watch_pool(api, objectives=False) as watcher:
        watcher.sees(a="10.0.0.1:8000")
        api.wait_watching(2)
        api.change_unheard(pod_of("a", "10.0.0.9", VLLM), PODS)
        api.drop()
        watcher.sees(a="10.0.0.9:8000")
        api.wait_watching(2)
        api.change_unheard(pool_of("vllm", VLLM, ports=(9000,)), POOLS)
        api.drop()
        watcher.sees(a="10.0.0.9:9000")


def test_a_pod_that_changes_in_what_does_not_matter_is_no_news(api):
    api.put(pool_of("vllm", VLLM), POOLS)
    api.put(pod_of("a", "10.0.0.1", VLLM), PODS)
    with watch_pool(api) as watcher:
        watcher.sees(a="10.0.0.1:8000")
        api.put(pod_of("a", "10.0.0.1", VLLM, annotations={"seen": "now"}), PODS)
        api.put(pod_of("b", "10.0.0.2", VLLM), PODS)
        watcher.sees(a="10.0.0.1:8000", b="10.0.0.2:8000")
        assert len(watcher.reports) == 2


@pytest.mark.parametrize("kind", [InferencePool, Kubernetes])
def test_what_an_error_of_ours_kept_from_being_told_is_told_when_the_source_is_run_again(api, kind):
    api.put(pool_of("vllm", VLLM), POOLS)
    api.put(pod_of("a", "10.0.0.1", VLLM), PODS)
    api.put(slice_of("s1", {"a": "10.0.0.1"}))
    keys = {"namespace": "ml", "api": api.url, "token_file": "/none"}
    source: Source = (
        InferencePool(InferencePoolConfig.model_validate({"name": "vllm", **keys}), {})
        if kind is InferencePool
        else Kubernetes(KubernetesConfig.model_validate({"service": "vllm", **keys}), {})
    )
    told: list[str] = []

    def tell(endpoints: Sequence[EndpointConfig]) -> None:
        told.extend(endpoint.address for endpoint in endpoints)
        raise RuntimeError("a mistake of ours")

    async def main() -> None:
        for _ in range(2):
            async with asyncio.timeout(PATIENCE_S):
                with pytest.raises((RuntimeError, ExceptionGroup)):
                    await source.run(tell)

    asyncio.run(main())
    assert told == ["10.0.0.1:8000"] * 2


def test_objectives_of_both_groups_are_known_by_priority_the_newer_group_first(api):
    api.put(pool_of("vllm", VLLM), POOLS)
    api.put(objective_of("chat", "vllm", 10), OBJECTIVES)
    api.put(objective_of("batch", "vllm", -10), OBJECTIVES)
    api.put(objective_of("foreign", "other", 99), OBJECTIVES)
    api.put(objective_of("batch", "vllm", -20), LLM_D_OBJECTIVES)
    api.put(objective_of("plain", "vllm", None), LLM_D_OBJECTIVES)
    with watch_pool(api) as watcher:
        wait_until(lambda: watcher.priorities[-1:] == [{"chat": 10, "batch": -20, "plain": 0}])
        api.delete("batch", LLM_D_OBJECTIVES)
        wait_until(lambda: watcher.priorities[-1:] == [{"chat": 10, "batch": -10, "plain": 0}])


def test_a_cluster_that_knows_no_objectives_has_none_and_its_pods_are_served(api):
    api.kinds -= {OBJECTIVES, LLM_D_OBJECTIVES}
    api.put(pool_of("vllm", VLLM), POOLS)
    api.put(pod_of("a", "10.0.0.1", VLLM), PODS)
    with watch_pool(api) as watcher:
        watcher.sees(a="10.0.0.1:8000")
        wait_until(lambda: watcher.priorities[-1:] == [{}])


def test_a_gateway_is_sent_to_the_pools_pods_and_an_objective_is_a_class(api, tmp_path):
    """The whole of it: a real Envoy asks, the pods are servers of which each has a target port of its own."""
    servers = {"objectives": True, "name": "vllm", "namespace": "ml", "api": api.url, "token_file": "/none"}
    config = {
        "dialect": None,
        "endpoints": [],
        "allowed_addresses": ["127.0.0.0/8"],
        "classes": [{"name": "standard"}, {"name": "batch", "priority": -10}],
        "inference_pool": servers,
    }
    api.put(objective_of("nightly", "vllm", -20), OBJECTIVES)
    with Picking(tmp_path, config=config) as picking:
        ports = {name: int(one.address.rpartition(":")[2]) for name, one in picking.upstreams.items()}
        api.put(pool_of("vllm", VLLM, tuple(ports.values())), POOLS)
        for name, port in ports.items():
            active = {"llm-d.ai/active-ports": str(port)}
            api.put(pod_of(name, "127.0.0.1", VLLM, annotations=active), PODS)
        wait_until(lambda: {"a-rank-0", "b-rank-1"} == picking.in_flight().keys())
        url = f"http://{picking.gateway('istio')}/v1/chat/completions"
        api.wait_watching(4)  # the pool, its pods, objectives of two groups: all are listed
        answers = complete_many(url, 4, lambda _: {"x-gateway-inference-objective": "nightly"})
        assert [answer.status for answer in answers] == [200] * 4
        assert sum(value for name, value in picking.sidecar.metrics().items() if COUNTED.match(name)) == 4
        api.delete("vllm", POOLS)
        wait_until(lambda: not picking.in_flight())
