"""What a person on call is told: metrics, access log, server-timing, log lines, spans. On real Envoy, real sockets."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml

from tests.conftest import tool

from .kit.clients import H1Request, complete_many
from .kit.otlp import Collector, attributes
from .kit.processes import PATIENCE_S, Child, http_get, http_ok, tcp_open, wait_until
from .kit.stack import Sidecar, Stack, local
from .kit.upstream import behave

ROOT = Path(__file__).parents[2]
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
CLASSES = [{"name": "default", "budget": "20s"}, {"name": "now", "budget": "0s"}]


REAL_COLLECTOR = os.environ.get("EXTPROC_COLLECTOR", "")
"""OpenTelemetry's own, which `make test-collector` builds."""


@pytest.fixture(scope="module")
def collector():
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def otlp_url(collector, tmp_path_factory):
    """Where the sidecar sends: to the collector of the tests, or through a real one."""
    if not REAL_COLLECTOR:
        yield collector.url
        return
    folder, listen = tmp_path_factory.mktemp("collector"), local()
    pipeline = {"receivers": ["otlp"], "exporters": ["otlp_http"]}
    written = {
        "receivers": {"otlp": {"protocols": {"http": {"endpoint": listen}}}},
        "exporters": {"otlp_http": {"endpoint": collector.url, "compression": "none"}},
        "service": {
            "pipelines": {"traces": pipeline, "metrics": pipeline},
            "telemetry": {"metrics": {"level": "none"}},
        },
    }
    (folder / "collector.yaml").write_text(yaml.safe_dump(written))
    with Child([REAL_COLLECTOR, f"--config={folder}/collector.yaml"], folder / "log", name="collector") as child:
        child.wait_ready(lambda: tcp_open(listen))
        yield f"http://{listen}"


@pytest.fixture(scope="module")
def here(module_stack, otlp_url):
    """Everything that can be switched on is on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", otlp_url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        patch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
        on = {"server_timing": True, "log_format": "json", "tracing": True, "otlp_metrics": True}
        config = {**on, "classes": CLASSES, "scrape_interval": "50ms"}
        yield module_stack(upstreams=("a", "b"), config=config)


@pytest.fixture(scope="module")
def story(here):
    """One request runs at each endpoint, one is held until a slot is free, one is refused; what the last two saw."""
    running = [
        H1Request(here.address, headers=[("x-test-id", f"first-{number}"), behave(hold="head")]).send()
        for number in range(2)
    ]
    here._wait(lambda page: sum(one["in_flight"] for one in page["endpoints"]) == 2, PATIENCE_S, "both endpoints busy")
    # A client's x-request-id is kept: our Envoys take themselves for no edge (no use_remote_address).
    trace = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(complete_many, here.url, 1, lambda _: {**labels("held"), **trace, **timed()})
        here.wait_waiting(1)
        (refused,) = complete_many(here.url, 1, lambda _: {**labels("refused"), **trace, "x-request-class": "now"})
        for number in range(2):
            for upstream in here.upstreams.values():
                upstream.release(f"first-{number}")
        (answered,) = held.result()
    for request in running:
        assert request.read_head() == 200
        request.read_all()
        with request:
            pass
    here.wait_idle()
    return answered, refused


def labels(name: str) -> dict[str, str]:
    return {"x-test-id": name, "x-request-id": f"id-of-{name}"}


def timed() -> dict[str, str]:
    return dict([behave(reply="server-timing: cache")])


def log_lines(here: Stack) -> list[dict]:
    return [json.loads(line) for line in here.sidecar.child.lines()]


def wait_line(here: Stack, **wanted: object) -> dict:
    def look():
        return [line for line in log_lines(here) if wanted.items() <= line.items()]

    return wait_until(look, message=f"a log line with {wanted}")[0]


# ---- why did my request wait?


def test_the_access_log_line_of_a_held_request_says_how_long_it_waited_for_whom(here, story):
    line = here.envoy.wait_access_log(lambda entry: entry["code"] == 200 and "waited_for" in entry["queue"])
    queue = line["queue"]
    assert (queue["outcome"], queue["class"], queue["position"]) == ("dispatched", "default", 0)
    assert queue["endpoint"] in ("a", "b")
    assert queue["endpoint"] == line["cluster"]
    assert 0 < queue["wait_ms"] <= line["duration_ms"] + 1
    assert queue["waited_for"] == "limit"
    here.envoy.wait_access_log(lambda entry: entry["code"] == 200 and "waited_for" not in entry["queue"])


def test_the_access_log_line_of_a_refused_request_says_why(here, story):
    line = here.envoy.wait_access_log(lambda entry: entry["code"] == 429)
    assert line["details"] == "extproc_budget_expired"
    assert line["queue"]["outcome"] == "budget_expired"
    assert line["queue"]["class"] == "now"
    assert "endpoint" not in line["queue"]


def test_what_held_a_refused_request_and_its_budget_stand_alike_in_its_body_its_log_line_and_its_metadata(here, story):
    error = json.loads(story[1].body)["error"]
    line = wait_line(here, outcome="budget_expired")
    metadata = here.envoy.wait_access_log(lambda entry: entry["code"] == 429)["queue"]
    for told in (error, line, metadata):
        assert (told["waited_for"], told["budget_s"]) == ("limit", 0)
    assert error["code"] == "budget_expired"
    assert error["request_id"] == line["request_id"] == labels("refused")["x-request-id"], "so it can be asked for"
    assert story[1].headers["x-request-id"] == line["request_id"], "and OpenAI's clients show it"
    assert error["wait_s"] == line["wait_s"] == pytest.approx(metadata["wait_ms"] / 1000, abs=0.001)


def test_server_timing_tells_the_client_and_an_engines_own_stays(here, story):
    answered, refused = story
    with H1Request(here.address, headers=[("x-test-id", "both"), behave(reply="server-timing: cache")]) as request:
        assert request.send().read_head() == 200
        found = [value for name, value in request.headers if name == "server-timing"]
    assert [value.split(";")[0] for value in ",".join(found).split(",")] == ["cache", "queue"]
    assert re.fullmatch(r"queue;dur=\d+\.\d", refused.headers["server-timing"])
    assert float(re.search(r"queue;dur=([\d.]+)", answered.headers["server-timing"])[1]) > 0


def test_the_log_is_json_with_a_line_for_the_refusal_and_none_for_what_went_well(here, story):
    line = wait_line(here, outcome="budget_expired")
    assert line["class"] == "now"
    assert line["logger"] == "extproc.queue"
    assert line["level"] == "info"
    assert line["request_id"]
    assert "held by limit" in line["message"]
    assert not [entry for entry in log_lines(here) if entry.get("outcome") == "dispatched"]


# ---- spans


def test_the_wait_is_a_span_of_the_requests_own_trace(here, story, collector):
    spans = wait_until(
        lambda: [span for span in collector.spans if span.trace_id.hex() == TRACE][1:] and collector.spans
    )
    ours = {attributes(span)["extproc.outcome"]: span for span in spans if span.trace_id.hex() == TRACE}
    held, refused = ours["dispatched"], ours["budget_expired"]
    assert held.parent_span_id.hex() == refused.parent_span_id.hex() == PARENT
    told = attributes(held)
    assert told["extproc.class"] == "default"
    assert told["extproc.endpoint"] in ("a", "b")
    assert told["extproc.waited_for"] == "limit"
    assert told["gen_ai.operation.name"] == "chat"
    assert attributes(refused)["error.type"] == "budget_expired"
    assert "error.type" not in told
    lasted_ms = (held.end_time_unix_nano - held.start_time_unix_nano) / 1e6
    assert lasted_ms == pytest.approx(told["extproc.wait_ms"], abs=0.2)
    assert lasted_ms > 0
    assert refused.status.code == refused.status.STATUS_CODE_ERROR
    assert collector.services == {"extproc"}


def test_a_parent_that_is_not_sampled_makes_no_span_and_a_broken_one_harms_nobody(here, collector):
    quiet = "1" * 32
    parents = [f"00-{quiet}-{PARENT}-00", "garbage", "00-" + "0" * 32 + f"-{PARENT}-01", f"00-{TRACE}-{PARENT}-01"]
    answers = complete_many(here.url, 4, lambda n: {"x-test-id": f"parent-{n}", "traceparent": parents[n]})
    assert [answer.status for answer in answers] == [200] * 4
    before = len(collector.spans)
    last = complete_many(here.url, 1, lambda _: {"x-test-id": "last", "traceparent": f"00-{'2' * 32}-{PARENT}-01"})
    assert last[0].status == 200
    wait_until(lambda: [span for span in collector.spans if span.trace_id.hex() == "2" * 32])
    assert len(collector.spans) > before
    assert not [span for span in collector.spans if span.trace_id.hex() == quiet]


@pytest.mark.parametrize("key", ["tracing", "otlp_metrics"])
def test_without_the_extra_it_is_a_clear_error_and_off_it_is_not_even_imported(tmp_path, key):
    file = tmp_path / "sidecar.yaml"
    file.write_text(yaml.safe_dump({key: True, "listen": local(), "admin": local()}))
    blocked = (
        "import sys; sys.modules['opentelemetry.sdk.trace'] = None; "
        "from extproc.commands.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked, "serve", "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
    )
    assert done.returncode == 1
    assert "`pip install 'opentelemetry-sdk<2,>=1.45' 'opentelemetry-exporter-otlp-proto-http<2,>=1.45'`" in done.stderr
    assert "Traceback" not in done.stderr
    quiet = (
        "import asyncio, sys; from extproc.app import App; from extproc.config import Config\n"
        "async def main(): App(Config(), asyncio.get_running_loop())\n"
        "asyncio.run(main()); sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", quiet], capture_output=True, timeout=2 * PATIENCE_S).returncode == 0


# ---- metrics


def test_metrics_come_by_otlp_as_they_stand_on_the_page(here, story, collector):
    def both():
        page, came = here.sidecar.metrics(), dict(collector.metrics)
        if "gen_ai.server.request.duration" not in came:
            return None
        sent = {
            attributes(point)["outcome"]: getattr(point, point.WhichOneof("value"))
            for point in came["extproc_requests"].sum.data_points
            if attributes(point)["class"] == "default"
        }
        (dispatched,) = [
            value for name, value in page.items() if 'outcome="dispatched"' in name and 'class="default"' in name
        ]
        return came if sent["dispatched"] == dispatched else None

    came = wait_until(both, message="the page and what was sent agree")
    assert came["extproc_requests"].sum.is_monotonic
    assert {attributes(point)["endpoint"] for point in came["extproc_inflight_requests"].gauge.data_points} == {
        "a",
        "b",
    }
    waits = came["extproc_queue_wait_seconds"]
    assert waits.unit == "s"
    (point,) = waits.histogram.data_points
    assert sum(point.bucket_counts) == point.count
    assert len(point.bucket_counts) == len(point.explicit_bounds) + 1
    lasted = {
        attributes(point).get("error.type"): point
        for point in came["gen_ai.server.request.duration"].histogram.data_points
    }
    assert lasted["budget_expired"].count == 1
    assert attributes(lasted[None]) == {"gen_ai.operation.name": "chat"}
    assert lasted[None].sum >= point.sum, "a request lasts at least as long as it waited"


def test_promtool_finds_nothing_to_say_about_a_live_page(here, story, promtool):
    page = http_get(here.sidecar.admin, "/metrics")[1]
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True)
    assert (done.returncode, done.stdout.decode() + done.stderr.decode()) == (0, "")


def test_a_real_prometheus_scrapes_the_page_and_answers_the_alerts_and_every_panel(here, story, tmp_path):
    """Grafana is in no package index here; its panels are queries, and these are asked as it would ask them."""
    prometheus = tool("prometheus", "prometheus")
    scrape = {"job_name": "extproc", "static_configs": [{"targets": [here.sidecar.admin]}]}
    written = {
        "global": {"scrape_interval": "100ms", "evaluation_interval": "100ms"},
        "rule_files": [str(ROOT / "observability/alerts.yaml")],
        "scrape_configs": [scrape],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(written))
    listen = local()
    argv = [prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with Child([*argv, f"--web.listen-address={listen}"], tmp_path / "prometheus.log") as child:

        def ask(what: str) -> Any:
            status, body = http_get(listen, what)
            answer = json.loads(body)
            assert (status, answer["status"]) == (200, "success"), (what, body)
            return answer["data"]

        def query(expression: str) -> list[Any]:
            return ask(f"/api/v1/query?{urlencode({'query': expression})}")["result"]

        child.wait_ready(lambda: http_ok(listen, "/-/ready"))
        wait_until(lambda: query('count_over_time(up{job="extproc"}[10s]) > 3'), message="four scrapes that went well")
        (target,) = ask("/api/v1/targets")["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")
        (refused,) = query('extproc_requests_total{outcome="budget_expired"}')
        assert refused["value"][1] == "1"
        rules = [rule for group in ask("/api/v1/rules")["groups"] for rule in group["rules"]]
        assert {rule["health"] for rule in rules} <= {"ok", "unknown"}, "unknown: not evaluated yet"
        assert len(rules) > 10
        empty = [
            panel["title"]
            for panel in json.loads((ROOT / "observability/dashboard.json").read_text())["panels"]
            for target in panel.get("targets", [])
            if not query(target["expr"].replace("$__rate_interval", "5s").replace("$instance", ".*"))
        ]
    nothing_happened = {
        *("Passed the queue by", "Rerouted, and clients that left", "What holds the next request"),
        *(
            "Tokens per second",
            "Failed scrapes",
            "Who leads, and with how many",
            "No good answers, by endpoint and kind",
        ),
        *("Requests of others, and where configurations differ", "Age of the leader and of the store"),
        *("Load, of what the engines that are up can do", "Engines that the traffic needs"),  # untold
        *("In flight, by tenant", "Refused over its cap, by tenant", "Pace, against peers"),  # no tenants, and idle
        *("Endpoints that get nothing, by reason", "No token for"),  # all do
    }
    assert set(empty) <= nothing_happened


def test_values_that_the_configuration_does_not_know_are_counted(here, story):
    def ignored():
        return {
            name: value for name, value in here.sidecar.metrics().items() if name.startswith("extproc_ignored_values")
        }

    before = ignored()
    complete_many(here.url, 1, lambda _: {"x-request-class": "platinum", "x-queue-budget": "soon"})
    rose = {name for name, value in ignored().items() if value > before[name]}
    assert rose == {f'extproc_ignored_values_total{{header="{name}"}}' for name in ("class", "budget")}
    assert "platinum" not in http_get(here.sidecar.admin, "/metrics")[1].decode()


def test_a_refused_reload_shows_until_it_is_mended(tmp_path):
    config = {"listen": local(), "admin": local()}
    with Sidecar(config, tmp_path) as sidecar:

        def refused() -> float:
            return sidecar.metrics()["extproc_config_refused"]

        assert refused() == 0
        sidecar.write_config(max_queued_requests=-1)
        sidecar.child.signal(signal.SIGHUP)
        wait_until(lambda: refused() == 1)
        sidecar.write_config(max_queued_requests=7)
        sidecar.child.signal(signal.SIGHUP)
        wait_until(lambda: refused() == 0)
        assert sidecar.metrics()["extproc_queue_limit"] == 7


def test_envoy_exports_what_the_alerts_ask_it_and_counts_what_nobody_steered(here, story):
    names = json.loads((ROOT / "observability/envoy-metrics.json").read_text())
    page = here.envoy.get("/stats/prometheus")
    exported = set(re.findall(r"^([a-z_0-9]+)(?:\{| )", page, re.MULTILINE))
    assert set(names) <= exported


def test_a_collector_that_is_not_there_harms_nobody_and_envoy_counts_what_nobody_steered(tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{local()}")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")

    def impatient(bootstrap) -> None:
        manager = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        steering = next(one for one in manager["http_filters"] if one["name"].endswith("ext_proc"))
        steering["typed_config"]["grpc_service"]["retry_policy"]["num_retries"] = 0

    with Stack(tmp_path, config={"tracing": True, "max_running_requests": 8}, edit=impatient) as stack:
        answers = complete_many(stack.url, 20, lambda n: {"x-test-id": f"r-{n}"})
        assert {answer.status for answer in answers} == {200}
        wait_until(lambda: "opentelemetry" in stack.sidecar.child.output(), message="the log says that nobody listens")
        stack.sidecar.child.signal(signal.SIGTERM)
        assert stack.sidecar.child.wait_exit() == 0
        (answer,) = complete_many(stack.url, 1, lambda _: {})
        assert answer.headers["x-extproc-outcome"] == "unsteered"
        page = stack.envoy.get("/stats/prometheus")
        assert re.search(
            r'^envoy_cluster_upstream_rq_completed\{envoy_cluster_name="unsteered"\} 1$', page, re.MULTILINE
        )
        assert re.search(r"^envoy_http_ext_proc_failure_mode_allowed\{.*\} 1$", page, re.MULTILINE)
