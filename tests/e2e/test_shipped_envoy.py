"""The files in envoy/, as they are but for their ports, in front of a sidecar that lives and one that is dead."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from .kit.clients import Completion, H1Request, complete_many
from .kit.envoy import give_up_soon
from .kit.processes import wait_until
from .kit.shipped import Shipped
from .kit.upstream import behave

LONG = os.environ.get("EXTPROC_LONG") == "1"
"""Set by `make faults`."""
CONFIG = {"max_running_requests": 1, "drain_timeout": "200ms"}


def headers(number: int) -> dict[str, str]:
    return {"x-test-id": f"r-{number}"}


@pytest.mark.parametrize("name", ["sidecar.yaml", "fail-open.yaml"])
def test_a_burst_through_a_shipped_file_is_queued_and_served(tmp_path, name):
    with Shipped(tmp_path, name, config=CONFIG) as here:
        answers = complete_many(here.url, 30, headers)
        assert {answer.status for answer in answers} == {200}
        assert all(upstream.peak == 1 for upstream in here.upstreams.values())


def test_without_a_sidecar_the_fail_closed_file_refuses_and_the_fail_open_file_serves_from_any_endpoint(tmp_path):
    """Both at once; as shipped, Envoy asks for the sidecar for 10 to 20 seconds, and so it does under `make faults`."""
    edit = str if LONG else give_up_soon
    for name in ("closed", "open"):
        (tmp_path / name).mkdir()
    with (
        Shipped(tmp_path / "closed", "sidecar.yaml", config=CONFIG, edit=edit) as closed,
        Shipped(tmp_path / "open", "fail-open.yaml", config=CONFIG, edit=edit) as opened,
        ThreadPoolExecutor(1) as pool,
    ):
        for here in (closed, opened):
            here.kill()
        refused = pool.submit(complete_many, closed.url, 3, headers)
        served = complete_many(opened.url, 10, headers)
        assert {answer.status for answer in served} == {200}
        assert sorted(opened.reached()) == sorted(f"r-{number}" for number in range(10))
        assert {answer.status for answer in refused.result()} == {503}
        assert {answer.headers["x-extproc-outcome"] for answer in refused.result()} == {"unsteered"}
        assert {cause(answer) for answer in refused.result()} == {("no_sidecar", "UH")}
        code, message = call(closed.address)
        assert (code, message[-17:]) == (grpc.StatusCode.UNAVAILABLE, " (no_sidecar, UH)")
        assert closed.reached() == []


def test_what_envoy_itself_answers_for_a_server_is_an_openai_error_that_says_whose_fault_it_is(tmp_path):
    with Shipped(tmp_path, config=CONFIG) as here:

        def ask(kind: str, **how: float) -> Completion:
            (answer,) = complete_many(here.url, 1, lambda _: dict([behave(kind, **how)]))
            assert answer.headers["content-type"] == "application/json"
            return answer

        broken = ask("fin", events=0)
        assert (broken.status, cause(broken)) == (503, ("server_broke_off", "UC"))
        assert json.loads(broken.body)["error"]["request_id"] == broken.headers["x-request-id"]
        its_own = complete_many(here.url, 1, lambda _: dict([behave("ok", status=503)]))[0]
        assert (its_own.status, len(its_own.body)) == (503, 100), "a server's own error is left alone"
        for upstream in here.upstreams.values():
            upstream.__exit__()
        assert cause(ask("ok"))[0] == "server_unreachable"
        sentence = "The inference server took no connection. (server_unreachable, URX,UF)"
        assert call(here.address) == (grpc.StatusCode.UNAVAILABLE, sentence)

        def counted(kind: str) -> float:
            metrics = here.sidecar.metrics()
            return sum(
                metrics[f'extproc_bad_answers_total{{answer="{kind}",endpoint="{one}"}}'] for one in here.upstreams
            )

        wait_until(lambda: (counted("broke_off"), counted("failed")) == (1, 2), message="gRPC's with it")
        address = next(iter(here.upstreams.values())).address
        here.sidecar.write_config(endpoints=[{"name": "unknown-to-envoy", "address": address}])
        here.sidecar.child.signal(signal.SIGHUP)
        wait_until(lambda: [one["name"] for one in here.sidecar.queues()["endpoints"]] == ["unknown-to-envoy"])
        assert cause(ask("ok")) == ("no_cluster", "NC")
        code, message = call(here.address)
        assert (code, message[-17:]) == (grpc.StatusCode.UNAVAILABLE, " (no_cluster, NC)")
        wait_until(lambda: "Envoy has no cluster" in here.sidecar.child.output())
        said = here.sidecar.child.output().splitlines()
        told = [line for line in said if "extproc.session" in line and "Envoy has no cluster" in line]
        assert len(told) == 1, "two requests found it out, and the log says it once a minute"
        assert "endpoint unknown-to-envoy: no_cluster: Envoy has no cluster unknown-to-envoy" in told[0]


def call(address: str) -> tuple[grpc.StatusCode, str]:
    """What a gRPC client reads when its call fails."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        with pytest.raises(grpc.RpcError) as failed:
            channel.unary_unary("/vllm.grpc.engine.VllmEngine/Generate")(b"\0", timeout=30)
        return failed.value.code(), failed.value.details()


def cause(answer: Completion) -> tuple[str, str]:
    error = json.loads(answer.body)["error"]
    assert error.keys() == {"message", "type", "param", "code", "flags", "request_id"}
    return error["code"], error["flags"]


def test_a_request_id_that_is_no_utf8_does_not_let_a_client_past_the_queue(tmp_path):
    """As a string of protobuf's it would not parse, and fail-open would let it through."""
    with Shipped(tmp_path, "fail-open.yaml", config=CONFIG) as here, ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            complete_many, here.url, 2, lambda n: {"x-test-id": f"b-{n}", **dict([behave(hold="head")])}
        )
        wait_until(lambda: sum(one["in_flight"] for one in here.sidecar.queues()["endpoints"]) == 2)
        with H1Request(here.address, headers=[("x-test-id", "odd"), ("x-request-id", "\xff")], body=b"{}") as odd:
            odd.send()
            wait_until(lambda: here.sidecar.queues()["waiting_total"] == 1, message="it waits like everybody")
            assert all(upstream.peak <= 1 for upstream in here.upstreams.values())
            here.release("b-0")
            here.release("b-1")
            assert odd.read_head() == 200
        assert {answer.status for answer in running.result()} == {200}
