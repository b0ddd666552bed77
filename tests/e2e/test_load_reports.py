"""Load that comes in response headers (ORCA), on real Envoy: it closes and opens the endpoint that told it alone."""

from __future__ import annotations

import contextlib
import json
import sys

from .kit.clients import H1Request, complete_many
from .kit.processes import Child, wait_until
from .kit.upstream import behave

REPORT = "endpoint-load-metrics"
FULL = f"{REPORT}: TEXT named_metrics.kv_cache_usage_perc=0.97, named_metrics.num_requests_running=9"
COOL = f"{REPORT}: JSON " + json.dumps({"named_metrics": {"kv_cache_usage_perc": 0.25}})
COOL_BINARY = f"{REPORT}-bin: Qh4KE2t2X2NhY2hlX3VzYWdlX3BlcmMRAAAAAAAA0D8="
NO_PAGE = {"engine": "none"}


@contextlib.contextmanager
def asking(here, request_id, model, kind="ok", **how):
    """One request of this model; how it is answered goes to the upstream."""
    headers = [("x-test-id", request_id), ("x-model", model), behave(kind, **how)]
    with H1Request(here.address, headers=headers, body=b"{}") as request:
        yield request.send()


def test_a_full_kv_cache_told_by_a_header_alone_closes_the_endpoint_that_told_it_and_no_other(stack):
    here = stack(
        upstreams=("a", "b"),
        endpoints={"a": {**NO_PAGE, "models": ["m", "of-a"]}, "b": {**NO_PAGE, "models": ["m", "of-b"]}},
        config={"max_running_requests": 3},
    )
    a, b = here.upstreams.values()
    with contextlib.ExitStack() as clients:

        def ask(request_id, model, kind="ok", **how):
            return clients.enter_context(asking(here, request_id, model, kind, **how))

        ask("cool", "of-a", hold="head", reply=COOL)
        here.wait_in_flight("a", 1)
        full = ask("full", "of-a", "sse", hold="body", reply=FULL)
        assert full.read_head() == 200
        assert full.header(REPORT), "whoever asks for it gets it, the client too"
        wait_until(lambda: here.endpoint("a")["load"] == {"kv_usage": 0.97, "running": 9.0})
        samples = here.sidecar.metrics()
        assert samples['extproc_endpoint_load{endpoint="a",signal="kv_usage"}'] == 0.97
        assert samples['extproc_telemetry_age_seconds{endpoint="a"}'] < 5
        assert 'extproc_telemetry_age_seconds{endpoint="b"}' not in samples

        for number in range(3):
            ask(f"any-{number}", "m", hold="head", reply=COOL_BINARY)
        here.wait_in_flight("b", 3)  # all, though a has a slot left
        ask("waits", "of-a", hold="head")
        ask("waits-too", "m", hold="head")
        here.wait_waiting(2)
        b.release("any-0")
        wait_until(lambda: here.endpoint("b")["load"] == {"kv_usage": 0.25})
        here.wait_waiting(1)  # b opened for one more; what it says is nothing to a
        assert b.wait_for("waits-too")
        assert here.endpoint("a")["load"]["kv_usage"] == 0.97
        assert not a.seen("waits")

        a.release("cool")  # an answer of a's own, with better news
        assert a.wait_for("waits")
        assert here.endpoint("a")["load"] == {"kv_usage": 0.25}


def test_a_report_that_cant_be_read_is_a_counted_error_and_nothing_else(stack):
    here = stack(endpoints={"a": NO_PAGE}, config={"max_running_requests": 1})
    for value in ("TEXT half full", "JSON [", "BIN !", "TEXT named_metrics.kv_cache_usage_perc=97"):
        how = dict([behave("ok", reply=f"{REPORT}: {value}")])
        (answer,) = complete_many(here.url, 1, lambda number, how=how: {"x-test-id": f"r-{number}", **how})
        assert (answer.status, answer.error) == (200, "")
    here.wait_idle()
    samples = here.sidecar.metrics()
    assert samples['extproc_scrape_errors_total{endpoint="a",reason="orca"}'] == 4
    assert not any("extproc_endpoint_load{" in name for name in samples)
    assert "Traceback" not in here.sidecar.child.output()


def test_an_engine_like_vllm_reports_when_the_route_asks_it_to_and_a_filter_hides_it_from_clients(stack, tmp_path):
    """What docs/telemetry.md says to add to Envoy's configuration."""

    def edit(bootstrap):
        (chain,) = bootstrap["static_resources"]["listeners"][0]["filter_chains"]
        manager = chain["filters"][0]["typed_config"]
        route = manager["route_config"]["virtual_hosts"][0]["routes"][0]
        route["request_headers_to_add"] = [{"header": {"key": f"{REPORT}-format", "value": "TEXT"}}]
        kind = "type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation"
        hides = {"@type": kind, "mutations": {"response_mutations": [{"remove": REPORT}]}}
        manager["http_filters"].insert(0, {"name": "hide-load", "typed_config": hides})

    command = [sys.executable, "-m", "extproc", "engine", "--preset", "demo", "--port", "0"]
    with Child(command, tmp_path / "engine.log") as engine:
        address = engine.wait_line(r"listening on http://(\S+)").group(1)
        here = stack(upstreams=(), endpoints={"e": {"address": address, **NO_PAGE}}, edit=edit)
        body = {"model": "sim", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
        for stream in (True, False):
            assert here.endpoint("e")["load"] == {}, "vLLM reports only with answers that don't stream"
            whole = json.dumps({**body, "stream": stream}).encode()
            (answer,) = complete_many(here.url, 1, lambda number: {"x-test-id": f"r-{number}"}, body=whole)
            assert answer.status == 200
            assert REPORT not in answer.headers
        assert here.endpoint("e")["load"].keys() == {"waiting", "kv_usage"}
