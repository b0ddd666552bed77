"""Metrics in OpenTelemetry's form and words: nothing is lost, no client's fancy is a label."""

from __future__ import annotations

import asyncio
import threading

import pytest
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily

from extproc.admission.outcome import Outcome
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, Reject, Request
from extproc.observe.genai import BUCKETS_S, GenAi
from extproc.observe.otlp import OtlpMetrics


class Recorder(MetricExporter):
    """An exporter that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.came = []

    def export(self, metrics_data, timeout_millis=10_000, **kwargs):
        self.came.append(metrics_data)
        return MetricExportResult.SUCCESS

    def force_flush(self, timeout_millis=10_000):
        return True

    def shutdown(self, timeout_millis=30_000, **kwargs):
        pass


def families():
    counter = CounterMetricFamily("extproc_requests", "Requests.", labels=["class"])
    counter.add_metric(["a"], 3)
    gauge = GaugeMetricFamily("process_resident_memory_bytes", "Memory.", value=7.5)
    waits = HistogramMetricFamily("extproc_queue_wait_seconds", "Waits.", labels=["class"])
    waits.add_metric(["a"], [("0.1", 1.0), ("1.0", 1.0), ("+Inf", 4.0)], 6.0)
    waits.add_metric(["b"], [("0.1", 0.0), ("1.0", 2.0), ("+Inf", 2.0)], 1.0)
    return [counter, gauge, waits, InfoMetricFamily("extproc_build", "What.", value={"version": "1"})]


def sent(found) -> dict:
    (resource,) = found.resource_metrics
    (scope,) = resource.scope_metrics
    return {metric.name: metric for metric in scope.metrics}


def test_each_kind_of_family_has_its_form():
    metrics = sent(OtlpMetrics(families, Recorder()).data(families()))
    assert {name: (type(one.data).__name__, one.unit) for name, one in metrics.items()} == {
        "extproc_requests": ("Sum", "1"),
        "process_resident_memory_bytes": ("Gauge", "By"),
        "extproc_queue_wait_seconds": ("Histogram", "s"),
        "extproc_build_info": ("Gauge", "1"),
    }
    (point,) = metrics["extproc_requests"].data.data_points
    assert (point.value, dict(point.attributes)) == (3, {"class": "a"})
    a, b = metrics["extproc_queue_wait_seconds"].data.data_points
    assert (list(a.bucket_counts), list(a.explicit_bounds), a.count, a.sum) == ([1, 0, 3], [0.1, 1.0], 4, 6.0)
    assert (list(b.bucket_counts), b.count, dict(b.attributes)) == ([0, 2, 0], 2, {"class": "b"})


def test_a_stop_sends_the_last_values():
    recorder = Recorder()

    async def stop() -> None:
        await OtlpMetrics(families, recorder).stop()

    asyncio.run(stop())
    assert "extproc_requests" in sent(recorder.came[0])


def test_the_loop_turns_between_two_families():
    turns = 0

    async def stop() -> None:
        def count() -> None:
            nonlocal turns
            turns += 1
            loop.call_soon(count)

        def seen():
            for family in families():
                before.append(turns)
                yield family

        loop = asyncio.get_running_loop()
        count()
        await OtlpMetrics(seen, Recorder()).stop()

    before: list[int] = []
    asyncio.run(stop())
    assert len(before) > 1
    assert len(set(before)) == len(before), "one family in a turn"


def test_a_collector_that_hangs_keeps_neither_the_loop_nor_the_exit(monkeypatch):
    class Hanging(Recorder):
        def export(self, metrics_data, timeout_millis=10_000, **kwargs):
            self.came.append(metrics_data)
            hold.wait()

    hold = threading.Event()
    monkeypatch.setattr("extproc.observe.otlp.STOP_S", 0.05)

    async def go() -> int:
        intervals, fifth = iter(range(5)), asyncio.Event()

        def interval_s() -> float:
            if next(intervals, None) is None:
                fifth.set()
            return 0.0

        monkeypatch.setattr("extproc.observe.otlp._interval_s", interval_s)
        metrics = OtlpMetrics(families, recorder)
        running = asyncio.create_task(metrics.run())
        await fifth.wait()
        before = len(recorder.came)
        running.cancel()
        await metrics.stop()
        return before

    recorder = Hanging()
    try:
        assert asyncio.run(go()) == 1, "one at a time"
    finally:
        hold.set()


class Clocked:
    """A GenAi with a clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.genai = GenAi(lambda: self.now, {"llama"}.__contains__)

    def counted(self) -> dict[tuple[str, ...], tuple[float, float]]:
        """Number and sum, by operation, model and error."""
        (family,) = self.genai.collect()
        sums = {tuple(s.labels.values()): s.value for s in family.samples if s.name.endswith("_sum")}
        counts = {tuple(s.labels.values()): s.value for s in family.samples if s.name.endswith("_count")}
        return {key: (counts[key], total) for key, total in sums.items()}


@pytest.mark.parametrize("model", ["llama", None, "made-up-by-a-client"])
def test_a_model_is_a_label_only_if_the_configuration_or_an_endpoint_names_it(model):
    world = Clocked()
    world.now = 2.0
    world.genai.finished(Ticket(Request("1", 0.5, model=model, operation="chat")), Answer.OK)
    assert world.counted() == {("chat", "llama" if model == "llama" else "", ""): (1, 1.5)}


def test_what_went_wrong_is_the_type_of_the_error():
    world = Clocked()
    ticket = Ticket(Request("1", 0.0))
    world.genai.finished(ticket, Answer.ERROR)
    world.genai.decided(Reject(ticket, Outcome.BUDGET_EXPIRED, 0.0, 1))
    world.genai.cancelled(ticket, 0.0)
    assert {error for _, _, error in world.counted()} == {"error", "budget_expired", "cancelled"}


def test_a_duration_falls_into_the_bucket_that_ends_at_it():
    world = Clocked()
    world.now = BUCKETS_S[3]
    world.genai.finished(Ticket(Request("1", 0.0)), Answer.OK)
    (family,) = world.genai.collect()
    counts = {s.labels["le"]: s.value for s in family.samples if s.name.endswith("_bucket")}
    assert [counts[str(bound)] for bound in BUCKETS_S[2:5]] == [0, 1, 1]
