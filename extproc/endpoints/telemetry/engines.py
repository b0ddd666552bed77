"""The engines: which metric names tell what. A new one is a row of `ENGINES` and a word for the config's `engine`.

Only names and labels live here; how a page is read is in page.py. Where the names come from, and which of them were
seen on a live server, is in docs/telemetry.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """Where a number stands on a page.

    Attributes:
        name: name of the samples.
        labels: labels that a sample must carry to count.
        in_label: the number is the value of this label (an `_info` metric), not the sample's.
        scale: what to multiply with; 0.01 for a percentage.
    """

    name: str
    labels: tuple[tuple[str, str], ...] = ()
    in_label: str | None = None
    scale: float = 1.0


Names = tuple[Metric, ...]
"""Alternatives: the first that is on the page counts."""


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """One kind of server. Compared by identity: it is a key of caches.

    Attributes:
        name: as the config's `engine` says it.
        path: where it serves its page, unless `metrics_url` says otherwise.
        running, waiting: gauges of requests; several series (data parallel ranks) are summed.
        kv_usage, gpu_usage: shares 0..1; several series are averaged.
        kv_capacity: alternatives, each a product of metrics that is made per series and then summed.
        preemptions: counter.
        prompt_tokens: counter that rises when a prompt has been computed, cached parts included. The core tells by
            it whose first token came: one that rises at the end of a request, or leaves out cached tokens, is wrong.
        first_tokens: counter of answers that began; one that rises at the end of a request is wrong here too.
        output_tokens: counter of generated tokens; may rise at the end of a request.
        decoded_tokens: counter of generated tokens that rises token by token: only such a one gives a rate.
        tokens_per_s: gauge, used where there is no `decoded_tokens`.
    """

    name: str
    path: str = "/metrics"
    running: Names = ()
    waiting: Names = ()
    kv_usage: Names = ()
    gpu_usage: Names = ()
    kv_capacity: tuple[Names, ...] = ()
    preemptions: Names = ()
    prompt_tokens: Names = ()
    first_tokens: Names = ()
    output_tokens: Names = ()
    decoded_tokens: Names = ()
    tokens_per_s: Names = ()

    def metrics(self) -> frozenset[str]:
        """Return the names of all samples that this row reads."""
        plain = (self.running, self.waiting, self.kv_usage, self.gpu_usage, self.preemptions, self.prompt_tokens)
        more = (self.first_tokens, self.output_tokens, self.decoded_tokens, self.tokens_per_s, *self.kv_capacity)
        return frozenset(metric.name for names in (*plain, *more) for metric in names)


def _either(*names: str) -> Names:
    return tuple(Metric(name) for name in names)


def _sglang(*names: str) -> Names:
    """Return the names with both prefixes: `sglang:` and, in newer versions, `sglang_`."""
    return tuple(Metric(prefix + name) for name in names for prefix in ("sglang:", "sglang_"))


def _sglang_sizes(prefix: str) -> tuple[Names, ...]:
    """Return SGLang's KV size: a gauge; gauges of pages (0.5.12 on); labels of an info metric (before)."""
    info = prefix + "cache_config_info"
    return (
        (Metric(prefix + "max_total_num_tokens"),),
        (Metric(prefix + "page_size"), Metric(prefix + "num_pages")),
        (Metric(info, in_label="page_size"), Metric(info, in_label="num_pages")),
    )


def _triton(kind: str) -> Metric:
    return Metric("nv_trt_llm_request_metrics", (("request_type", kind),))


def _triton_kv(kind: str) -> Metric:
    return Metric("nv_trt_llm_kv_cache_block_metrics", (("kv_cache_block_type", kind),))


_VLLM_SIZES = "vllm:cache_config_info"

ENGINES: tuple[Engine, ...] = (
    Engine(
        "vllm",
        running=_either("vllm:num_requests_running"),
        waiting=_either("vllm:num_requests_waiting"),
        kv_usage=_either("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
        kv_capacity=(
            (Metric(_VLLM_SIZES, in_label="kv_cache_size_tokens"),),
            (Metric(_VLLM_SIZES, in_label="block_size"), Metric(_VLLM_SIZES, in_label="num_gpu_blocks")),
        ),
        preemptions=_either("vllm:num_preemptions_total"),
        prompt_tokens=_either("vllm:prompt_tokens_total"),
        first_tokens=_either("vllm:time_to_first_token_seconds_count"),
        output_tokens=_either("vllm:generation_tokens_total"),
        decoded_tokens=_either("vllm:generation_tokens_total"),
    ),
    Engine(
        "sglang",
        running=_sglang("num_running_reqs"),
        waiting=_sglang("num_queue_reqs"),
        kv_usage=_sglang("token_usage"),
        kv_capacity=(*_sglang_sizes("sglang:"), *_sglang_sizes("sglang_")),
        preemptions=_sglang("num_retracted_requests_total", "num_retracted_reqs_total"),
        output_tokens=_sglang("generation_tokens_total"),
        decoded_tokens=tuple(
            Metric(prefix + "realtime_tokens_total", (("mode", "decode"),)) for prefix in ("sglang:", "sglang_")
        ),
        tokens_per_s=_sglang("gen_throughput"),
    ),
    Engine(
        "tgi",
        running=_either("tgi_batch_current_size"),
        waiting=_either("tgi_queue_size"),
        output_tokens=_either("tgi_request_generated_tokens_sum"),
    ),
    Engine(
        "trtllm",
        path="/prometheus/metrics",
        running=_either("trtllm_num_requests_running"),
        waiting=_either("trtllm_num_requests_waiting"),
        kv_usage=_either("trtllm_kv_cache_utilization"),
        kv_capacity=((Metric("trtllm_kv_cache_tokens_per_block"), Metric("trtllm_kv_cache_max_blocks")),),
        output_tokens=_either("trtllm_generation_tokens_total"),
    ),
    Engine(
        "triton",
        running=(_triton("scheduled"), _triton("active")),
        waiting=(_triton("waiting"),),
        kv_usage=(_triton_kv("fraction"),),
        kv_capacity=((_triton_kv("tokens_per"), _triton_kv("max")),),
    ),
    Engine(
        "llamacpp",
        running=_either("llamacpp:requests_processing"),
        waiting=_either("llamacpp:requests_deferred"),
        kv_usage=_either("llamacpp:kv_cache_usage_ratio"),
        output_tokens=_either("llamacpp:tokens_predicted_total"),
    ),
)

DCGM = Engine(
    "dcgm",
    gpu_usage=(Metric("DCGM_FI_PROF_GR_ENGINE_ACTIVE"), Metric("DCGM_FI_DEV_GPU_UTIL", scale=0.01)),
)
"""NVIDIA's exporter, for `gpu_metrics_url`. The profiling field also works under MIG."""


def engines_for(name: str) -> tuple[Engine, ...]:
    """Return the rows to look for: all for `auto`, none for `none`. Raises KeyError for a name without a row."""
    if name == "auto":
        return ENGINES
    if name == "none":
        return ()
    return (_BY_NAME[name],)


def metrics_path(name: str) -> str:
    """Return where a server of the engine called `name` has its page."""
    return _BY_NAME[name].path if name in _BY_NAME else "/metrics"


_BY_NAME = {engine.name: engine for engine in ENGINES}
