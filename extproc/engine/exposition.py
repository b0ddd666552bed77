"""What the simulated engine tells about its load: the /metrics page with vLLM 0.32's names, and the ORCA header."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from extproc.engine.realtime import Drive, Histogram

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
LABELS: Final = ("engine", "model_name")


class MetricsPage:
    """Renders the page from the live counters of a drive: nothing is counted twice."""

    def __init__(self, drive: Drive, model: str) -> None:
        self._drive = drive
        self._values = ["0", model]
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self) -> bytes:
        """The page, in the text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing to check for duplicates: prometheus_client asks."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics now: prometheus_client asks."""
        drive, engine = self._drive, self._drive.engine
        yield self._gauge("vllm:num_requests_running", "Requests in the batch.", engine.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests waiting to be admitted.", engine.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0..1.", engine.kv_usage)
        yield self._cache_config()
        if engine.params.max_loras:
            yield self._adapters()
        yield self._counter("vllm:prompt_tokens", "Prompt tokens.", engine.prompt_tokens_total)
        yield self._counter("vllm:generation_tokens", "Generated tokens.", engine.generation_tokens_total)
        yield self._counter("vllm:num_preemptions", "Preemptions.", engine.preemptions_total)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", engine.prefix_queries_total)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found.", engine.prefix_hits_total)
        yield self._finished()
        yield self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", drive.ttft)
        yield self._histogram("vllm:inter_token_latency_seconds", "Token to token.", drive.inter_token)
        yield self._histogram("vllm:request_time_per_output_token_seconds", "Mean per request.", drive.per_output_token)
        yield self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", drive.end_to_end)
        yield self._gauge("sim_step_lag_seconds", "Worst delay of a step behind the model.", drive.lag_max_s)
        yield self._counter("sim_wasted_tokens", "Computed for aborted requests.", engine.wasted_tokens_total)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._values, value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._values, histogram.buckets(), histogram.sum)
        return family

    def _finished(self) -> Metric:
        """By reason; aborted ones are not successes, and vLLM 0.32 was seen to leave its `abort` at 0 as well."""
        family = CounterMetricFamily("vllm:request_success", "Finished requests.", labels=(*LABELS, "finished_reason"))
        for reason, count in self._drive.finished.items():
            family.add_metric([*self._values, reason], count)
        return family

    def _cache_config(self) -> Metric:
        params = self._drive.engine.params
        labels = {
            "engine": "0",
            "block_size": str(params.block_size),
            "cache_dtype": "auto",
            "enable_prefix_caching": str(params.prefix_caching),
            "kv_cache_size_tokens": str(params.kv_tokens),
            "num_gpu_blocks": str(params.num_gpu_blocks),
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        return family

    def _adapters(self) -> Metric:
        """Which adapters run and wait now: of vLLM's lines, one for each that ever did, the newest."""
        running, waiting = self._drive.engine.adapters
        labels = {
            "max_lora": str(self._drive.engine.params.max_loras),
            "running_lora_adapters": ",".join(running),
            "waiting_lora_adapters": ",".join(waiting),
        }
        family = GaugeMetricFamily("vllm:lora_requests_info", "LoRA adapters in use.", labels=list(labels))
        family.add_metric(list(labels.values()), time.time())
        return family


def orca_header(drive: Drive, form: str) -> str | None:
    """The value of `endpoint-load-metrics` in the asked form, TEXT or JSON in any case; None for others, like vLLM."""
    load = {
        "num_requests_waiting": float(drive.engine.waiting),
        "kv_cache_usage_perc": float(drive.engine.kv_usage),
    }
    match form.strip().upper():
        case "TEXT":
            return "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in load.items())
        case "JSON":
            return "JSON " + json.dumps({"named_metrics": load})
        case _:
            return None
