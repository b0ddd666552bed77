"""Who an endpoint is, on real Envoy: each row is something that a cluster said, and which servers got requests."""

from __future__ import annotations

from typing import Any

import pytest

from .kit.clients import complete_many
from .kit.kube_api import KubeApi, slice_of
from .kit.processes import wait_until
from .kit.upstream import Upstream

HERE = "127.0.0.1"


@pytest.fixture
def found(stack, tmp_path):
    """Start a stack whose endpoints come from an API server that knows one slice."""

    def start(api: KubeApi, **source: Any) -> Any:
        kubernetes = {"service": "vllm", "namespace": "ml", "api": api.url, "max_running_requests": 4, **source}
        return stack(
            config={
                "envoy_clusters_file": str(tmp_path / "clusters.yaml"),
                "discovery": [{"kubernetes": kubernetes}],
                "allowed_addresses": ["127.0.0.0/8"],
            },
            upstreams=(),
        )

    return start


def names(here: Any) -> set[str]:
    return {endpoint["name"] for endpoint in here.sidecar.queues()["endpoints"]}


def ask(here: Any, number: int, **headers: str) -> set[int]:
    answers = complete_many(here.url, number, lambda index: {"x-test-id": f"r-{index}", **headers})
    return {answer.status for answer in answers}


def test_both_ports_of_a_data_parallel_pod_get_requests(found):
    with KubeApi() as api, Upstream("a") as a, Upstream("b") as b:
        api.put(slice_of("s", {"pod": HERE}))
        here = found(api, ports=[a.port, b.port])
        assert names(here) == {f"pod-{a.port}", f"pod-{b.port}"}
        assert ask(here, 32) == {200}
        assert len(a.records()) + len(b.records()) == 32
        assert min(len(a.records()), len(b.records())) >= 10


def test_a_pod_that_is_published_though_it_does_not_serve_gets_nothing(found):
    with KubeApi() as api, Upstream("a") as a, Upstream("b") as b:
        api.put(slice_of("s-a", {"good": HERE}, port=a.port))
        loading = slice_of("s-b", {"loading": HERE}, port=b.port)
        loading["endpoints"][0]["conditions"] = {"ready": True, "serving": False, "terminating": False}
        api.put(loading)
        here = found(api)
        assert ask(here, 20) == {200}
        assert (len(a.records()), len(b.records())) == (20, 0)


def test_a_malformed_endpoint_keeps_no_good_one_out_and_one_with_our_clusters_name_gets_its_own_requests(found):
    with KubeApi() as api, Upstream("a") as a:
        slice_ = slice_of("s", {"unsteered": HERE}, port=a.port)
        slice_["endpoints"] += [{"addresses": ["no host!"]}, {"addresses": 7}, "none"]
        api.put(slice_)
        here = found(api)
        assert names(here) == {"unsteered"}
        assert ask(here, 8) == {200}
        assert len(a.records()) == 8
        assert here.sidecar.metrics()["extproc_discovery_left_out_total"] == 3.0


def test_what_discovery_may_not_bring_gets_no_request(stack, tmp_path):
    with KubeApi() as api, Upstream("a") as a:
        api.put(slice_of("s", {"near": HERE}, port=a.port))
        config = {
            "envoy_clusters_file": str(tmp_path / "clusters.yaml"),
            "discovery": [{"kubernetes": {"service": "vllm", "namespace": "ml", "api": api.url}}],
            "classes": [{"name": "default", "budget": "200ms"}],
        }
        here = stack(config=config, upstreams=())
        wait_until(lambda: here.sidecar.metrics()["extproc_discovery_left_out_total"] == 1.0)
        assert ask(here, 1) == {503}
        assert a.records() == []
