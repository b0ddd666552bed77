"""The files in envoy/, as they are but for their ports, in front of a sidecar that lives and one that is dead."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from .kit.clients import H1Request, complete_many
from .kit.envoy import Envoy
from .kit.processes import free_port, wait_until
from .kit.stack import Sidecar
from .kit.upstream import Upstream, behave

ROOT = Path(__file__).parents[2]
PORTS = {8080: "http", 9901: "envoy", 50051: "listen", 8001: "vllm-a", 8002: "vllm-b"}


@pytest.fixture
def shipped(tmp_path):
    """Start what a user starts: a shipped Envoy file, examples/sidecar.yaml, two servers; only ports differ."""
    with Upstream("vllm-a") as a, Upstream("vllm-b") as b:
        ports = {name: free_port() for name in PORTS.values()}
        ports |= {"vllm-a": int(a.address.rsplit(":", 1)[1]), "vllm-b": int(b.address.rsplit(":", 1)[1])}
        config = yaml.safe_load((ROOT / "examples/sidecar.yaml").read_text())
        for endpoint in config["endpoints"]:
            endpoint["address"] = f"127.0.0.1:{ports[endpoint['name']]}"
        config |= {"listen": f"127.0.0.1:{ports['listen']}", "admin": f"127.0.0.1:{free_port()}"}
        config |= {"max_running_requests": 1, "drain_timeout": "200ms"}

        def start(name: str) -> tuple[str, Sidecar, dict[str, Upstream], Envoy]:
            text = (ROOT / "envoy" / name).read_text()
            for port, what in PORTS.items():
                assert f"port_value: {port}}}" in text
                text = text.replace(f"port_value: {port}}}", f"port_value: {ports[what]}}}")
            text = text.replace("/dev/stdout", str(tmp_path / "access.log"))
            sidecar = Sidecar(config, tmp_path)
            return (
                f"http://127.0.0.1:{ports['http']}/v1/chat/completions",
                sidecar,
                {"a": a, "b": b},
                Envoy(text, tmp_path),
            )

        yield start


def headers(number: int) -> dict[str, str]:
    return {"x-test-id": f"r-{number}"}


@pytest.mark.parametrize("name", ["sidecar.yaml", "fail-open.yaml"])
def test_a_burst_through_a_shipped_file_is_queued_and_served(shipped, name):
    url, sidecar, upstreams, envoy = shipped(name)
    with sidecar, envoy:
        answers = complete_many(url, 30, headers)
        assert {answer.status for answer in answers} == {200}
        assert all(upstream.peak == 1 for upstream in upstreams.values())


def test_without_a_sidecar_the_fail_closed_file_refuses_and_sends_nothing_anywhere(shipped):
    url, _, upstreams, envoy = shipped("sidecar.yaml")
    with envoy:
        (answer,) = complete_many(url, 1, headers)
        assert answer.status == 503
        assert answer.headers["x-extproc-outcome"] == "unsteered"
        assert not any(upstream.records() for upstream in upstreams.values())


def test_without_a_sidecar_the_fail_open_file_serves_from_any_endpoint(shipped):
    url, _, upstreams, envoy = shipped("fail-open.yaml")
    with envoy:
        answers = complete_many(url, 10, headers)
        assert {answer.status for answer in answers} == {200}
        assert sum(len(upstream.records()) for upstream in upstreams.values()) == 10


def test_a_sidecar_that_is_killed_and_restarted_costs_held_requests_nothing(shipped):
    """Envoy replays held headers to the restarted sidecar: ENVOY.md section 7."""
    url, sidecar, upstreams, envoy = shipped("sidecar.yaml")
    with sidecar, envoy, ThreadPoolExecutor(2) as pool:
        running = pool.submit(
            complete_many, url, 2, lambda n: {"x-test-id": f"b-{n}", **dict([behave("sse", hold="body")])}
        )
        wait_until(lambda: sum(one["in_flight"] for one in sidecar.queues()["endpoints"]) == 2)
        held = pool.submit(complete_many, url, 20, headers)
        wait_until(lambda: sidecar.queues()["waiting_total"] == 20)
        sidecar.child.signal(9)
        assert sidecar.child.wait_exit() == -9
        sidecar.child.stop()  # reaps it
        for number in range(2):
            for upstream in upstreams.values():
                upstream.release(f"b-{number}")
        sidecar.start()
        assert [answer.status for answer in running.result()] == [200, 200]
        assert not any(answer.error for answer in running.result())
        assert [answer.status for answer in held.result()] == [200] * 20
        reached = [record.request_id for upstream in upstreams.values() for record in upstream.records()]
        assert len(reached) == len(set(reached)) == 22


def test_a_request_id_that_is_no_utf8_does_not_let_a_client_past_the_queue(shipped):
    """It is the attribute request.id; as a protobuf string it would not parse, and fail-open would let it through."""
    url, sidecar, upstreams, envoy = shipped("fail-open.yaml")
    address = url.split("/")[2]
    with sidecar, envoy, ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete_many, url, 2, lambda n: {"x-test-id": f"b-{n}", **dict([behave(hold="head")])})
        wait_until(lambda: sum(one["in_flight"] for one in sidecar.queues()["endpoints"]) == 2)
        with H1Request(address, headers=[("x-test-id", "odd"), ("x-request-id", "\xff")], body=b"{}") as odd:
            odd.send()
            wait_until(lambda: sidecar.queues()["waiting_total"] == 1, message="it waits like everybody")
            assert all(upstream.peak == 1 for upstream in upstreams.values())
            for upstream in upstreams.values():
                upstream.release("b-0")
                upstream.release("b-1")
            assert odd.read_head() == 200
        assert {answer.status for answer in running.result()} == {200}
