"""Metrics by OTLP over HTTP, for who has no Prometheus. Imported only if `otlp_metrics` is on; needs the extra `otel`.

The same families as at /metrics, one made in each turn of the loop, put into OpenTelemetry's form and sent by a thread
of their own: a collector that hangs holds up nobody. Where to, how often and as which service is OpenTelemetry's own
business: OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_METRIC_EXPORT_INTERVAL (ms), OTEL_SERVICE_NAME.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from extproc import __version__
from extproc.observe.genai import NAMES
from extproc.observe.traces import resource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.sdk.metrics.export import MetricExporter
    from prometheus_client.metrics_core import Metric as Family
    from prometheus_client.samples import Sample

log = logging.getLogger("extproc.otlp")

INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"
INTERVAL_MS = 60_000
"""As OpenTelemetry says where nobody else does."""
STOP_S = 2.0
"""How long the last values may take to go out."""
CUMULATIVE = AggregationTemporality.CUMULATIVE


class OtlpMetrics:
    """Sends what `collect` yields, now and then."""

    def __init__(self, collect: Callable[[], Iterable[Family]], exporter: MetricExporter | None = None) -> None:
        """Send to `exporter`; None: by OTLP over HTTP to where the environment says."""
        self._collect = collect
        self._exporter = exporter or OTLPMetricExporter()
        self._resource = resource()
        self._scope = InstrumentationScope("extproc", __version__)
        self._began_ns = time.time_ns()
        self._sent: asyncio.Event | None = None

    async def run(self) -> None:
        """Send again and again. While one send hangs, the next ones are left out."""
        while True:
            await asyncio.sleep(_interval_s())
            if self._sent is None or self._sent.is_set():
                self._sent = await self._send()

    async def stop(self) -> None:
        """Send the last values, for STOP_S at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await (await self._send()).wait()

    async def _send(self) -> asyncio.Event:
        loop, sent, families = asyncio.get_running_loop(), asyncio.Event(), []
        for family in self._collect():
            families.append(family)
            await asyncio.sleep(0)  # of 500 endpoints all at once take 20 ms

        def send() -> None:
            try:
                self._exporter.export(self.data(families))
            except Exception:
                log.exception("metrics were not sent: please report it")
            finally:
                with contextlib.suppress(RuntimeError):  # too late: the loop is closed
                    loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=send, daemon=True, name="metrics").start()
        return sent

    def data(self, families: Iterable[Family]) -> MetricsData:
        """Return families of Prometheus in OpenTelemetry's form."""
        now_ns = time.time_ns()
        metrics = [metric for family in families if (metric := self._metric(family, now_ns)) is not None]
        scope = ScopeMetrics(self._scope, metrics, "")
        return MetricsData([ResourceMetrics(self._resource, [scope], "")])

    def _metric(self, family: Family, now_ns: int) -> Metric | None:
        samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        if not samples:
            return None
        unit = "s" if family.name.endswith("_seconds") else "By" if family.name.endswith("_bytes") else "1"
        data: Gauge | Histogram | Sum
        if family.type == "histogram":
            data = Histogram(self._histograms(samples, now_ns), CUMULATIVE)
        else:
            points = [
                NumberDataPoint(_attributes(sample.labels), self._began_ns, now_ns, sample.value) for sample in samples
            ]
            data = Sum(points, CUMULATIVE, is_monotonic=True) if family.type == "counter" else Gauge(points)
        name = NAMES.get(family.name) or (f"{family.name}_info" if family.type == "info" else family.name)
        return Metric(name, family.documentation, unit, data)

    def _histograms(self, samples: Iterable[Sample], now_ns: int) -> list[HistogramDataPoint]:
        points: dict[tuple[tuple[str, str], ...], _Series] = {}
        for sample in samples:
            labels = {name: value for name, value in sample.labels.items() if name != "le"}
            series = points.setdefault(tuple(labels.items()), _Series())
            if sample.name.endswith("_bucket"):
                series.bounds.append(float(sample.labels["le"]))
                series.cumulative.append(int(sample.value))
            elif sample.name.endswith("_sum"):
                series.total = sample.value
        return [
            HistogramDataPoint(
                attributes=_attributes(dict(labels)),
                start_time_unix_nano=self._began_ns,
                time_unix_nano=now_ns,
                count=series.cumulative[-1],
                sum=series.total,
                bucket_counts=[
                    upper - lower for lower, upper in zip([0, *series.cumulative], series.cumulative, strict=False)
                ],
                explicit_bounds=series.bounds[:-1],  # the last is +Inf
                min=None,  # type: ignore[arg-type]  # nobody knows: absent on the wire
                max=None,  # type: ignore[arg-type]
            )
            for labels, series in points.items()
        ]


class _Series:
    """One histogram's samples, as they stand on a page."""

    def __init__(self) -> None:
        self.bounds: list[float] = []
        self.cumulative: list[int] = []
        self.total = 0.0


def _attributes(labels: dict[str, str]) -> dict[str, str]:
    """Return labels as attributes; what is empty is absent."""
    return {NAMES.get(name, name): value for name, value in labels.items() if value}


def _interval_s() -> float:
    said = os.environ.get(INTERVAL, "")
    return max(int(said) if said.isascii() and said.isdigit() else INTERVAL_MS, 10) / 1000
