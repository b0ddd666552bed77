"""Telemetry end to end: a simulated engine's load is read right, and losing telemetry never stops dispatch."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from .kit.clients import complete_many
from .kit.processes import Child, wait_until
from .kit.upstream import Upstream, behave

FAST = {"scrape_interval": "50ms", "scrape_timeout": "30s", "max_running_requests": "adaptive"}
HOT = 'vllm:num_requests_running{engine="0"} 5\nvllm:kv_cache_usage_perc{engine="0"} 0.99\n'
BODY = json.dumps({"model": "sim", "stream": True, "max_tokens": 60, "messages": [{"role": "user", "content": "hi"}]})


@pytest.fixture
def engine(tmp_path):
    """One simulated engine with two slots, and its address."""
    command = [sys.executable, "-m", "extproc", "engine", "--preset", "demo", "--port", "0", "--max-num-seqs", "2"]
    child = Child(command, tmp_path / "engine.log")
    child.start()
    try:
        yield child.wait_line(r"listening on http://(\S+)").group(1)
    finally:
        child.stop()


def headers(number: int) -> dict[str, str]:
    return {"x-test-id": f"r-{number}"}


def test_a_simulated_engines_running_waiting_and_kv_use_are_what_queues_and_metrics_say(stack, engine):
    here = stack(upstreams=(), endpoints={"e": {"address": engine}}, config=FAST)
    idle = {"running": 0.0, "waiting": 0.0, "kv_usage": 0.0, "tokens_per_s": 0.0}
    wait_until(lambda: idle.items() <= here.endpoint("e")["load"].items())
    assert here.endpoint("e")["load"]["context_tokens"] > 1000
    assert here.endpoint("e")["kv_capacity_tokens"] > 1000
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(complete_many, here.url, 5, headers, body=BODY.encode())
        seen = wait_until(
            lambda: (load := here.endpoint("e")["load"])["waiting"] == 3.0 and load["tokens_per_s"] > 0 and load, 5.0
        )
        assert seen["running"] == 2.0
        assert 0 < seen["kv_usage"] < 1
        samples = here.sidecar.metrics()
        assert samples['extproc_endpoint_load{endpoint="e",signal="running"}'] == 2.0
        assert samples['extproc_telemetry_age_seconds{endpoint="e"}'] < 2.0
        assert {answer.status for answer in answers.result()} == {200}
    assert not any("extproc_scrape_errors_total{" in name for name in here.sidecar.metrics())


def test_a_sidecar_that_loses_telemetry_serves_by_its_own_books_says_so_and_takes_it_up_again(stack):
    with Upstream("telemetry") as telemetry:
        telemetry.metrics = HOT
        here = stack(
            upstreams=("a",),
            endpoints={"a": {"metrics_url": f"http://{telemetry.address}/metrics"}},
            config={**FAST, "telemetry_stale_after": "3s"},
        )
        wait_until(lambda: here.endpoint("a")["load"].get("kv_usage") == 0.99)
        with ThreadPoolExecutor(2) as pool:
            block = {"x-test-id": "block", **dict([behave(hold="head")])}
            blocker = pool.submit(complete_many, here.url, 1, lambda _: block)
            here.wait_in_flight("a", 1)
            held = pool.submit(complete_many, here.url, 8, headers)
            here.wait_waiting(8)  # a full KV cache gets one request at a time
            telemetry.down()
            answers = held.result()  # and a dead exporter does not keep it closed
            here.upstreams["a"].release("block")
            assert blocker.result()[0].status == 200
        assert {answer.status for answer in answers} == {200}
        assert all(answer.end_s > 2 for answer in answers)
        row = here.endpoint("a")
        assert row["load"] == {}
        assert row["telemetry_age_s"] >= 3
        assert row["telemetry_silent"] == "connect"
        assert here.sidecar.metrics()['extproc_scrape_errors_total{endpoint="a",reason="connect"}'] >= 1
        assert {answer.status for answer in complete_many(here.url, 20, headers)} == {200}

        wait_until(lambda: "telemetry of a is stale" in here.sidecar.child.output())
        telemetry.metrics = HOT.replace("0.99", "0.5")
        telemetry.up()
        wait_until(lambda: here.endpoint("a")["load"].get("kv_usage") == 0.5)
        assert "telemetry_silent" not in here.endpoint("a")
        log = here.sidecar.child.output()
        assert log.count("telemetry of a is stale") == 1
        assert log.count("telemetry of a is back") == 1
