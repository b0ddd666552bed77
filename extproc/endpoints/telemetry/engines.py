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
        labels: labels that a sample must carry to count, each with the values that do.
        in_label: the number is the value of this label (an `_info` metric), not the sample's.
        scale: what to multiply with; 0.01 for a percentage.
    """

    name: str
    labels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    in_label: str | None = None
    scale: float = 1.0


Names = tuple[Metric, ...]
"""Alternatives: the first that is on the page counts."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A number in a JSON page that an engine serves beside its metrics; asked rarely.

    Attributes:
        path: of the page, at the server's own address.
        keys: the way to the number; `*` stands for each item of a list.
        is_sum: of several numbers the sum counts (a limit per rank), else the greatest.
    """

    path: str
    keys: tuple[str, ...]
    is_sum: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Engine:
    """One kind of server. Compared by identity: it is a key of caches.

    Attributes:
        name: as the config's `engine` says it.
        path: where it serves its page, unless `metrics_url` says otherwise.
        running, waiting: gauges of requests; several series (data parallel ranks) are summed.
        also_running, also_waiting: gauges of requests that `running` and `waiting` leave out, added to them.
        kv_usage: share 0..1; of several series the fullest counts.
        gpu_usage: share 0..1; several series are averaged.
        kv_capacity: alternatives, each a product of metrics that is made per series and then summed.
        max_running: gauge of the most requests that run at once; several series are summed.
        context_tokens: gauge of the longest context; of several series the greatest counts.
        adapters: gauge whose labels name the LoRA adapters that run, and how many fit; its value is the time of that.
        awake: gauge that is 1 while the engine serves, 0 while it sleeps.
        preemptions: counter.
        prompt_tokens: counter that rises when a prompt has been computed, cached parts included. The core tells by
            it whose first token came: one that rises at the end of a request, or leaves out cached tokens, is wrong.
        cached_tokens: counter of prompt tokens that the prefix cache had.
        first_tokens: counter of answers that began; one that rises at the end of a request is wrong here too.
        output_tokens: counter of generated tokens; may rise at the end of a request.
        decoded_tokens: counter of generated tokens that rises token by token: only such a one gives a rate.
        tokens_per_s: gauge, used where there is no `decoded_tokens`.
        totals: labels that split a total which stands beside its parts: with an empty value, or without the label.
        ranks: labels that end in `_rank` tell views of one scheduler apart, except these, which count schedulers.
        asked: what else to ask for `max_running` and for `context_tokens`; the first page that tells counts.
    """

    name: str
    path: str = "/metrics"
    running: Names = ()
    also_running: tuple[Names, ...] = ()
    waiting: Names = ()
    also_waiting: tuple[Names, ...] = ()
    kv_usage: Names = ()
    gpu_usage: Names = ()
    kv_capacity: tuple[Names, ...] = ()
    max_running: Names = ()
    context_tokens: Names = ()
    awake: Names = ()
    adapters: Names = ()
    preemptions: Names = ()
    prompt_tokens: Names = ()
    cached_tokens: Names = ()
    first_tokens: Names = ()
    output_tokens: Names = ()
    decoded_tokens: Names = ()
    tokens_per_s: Names = ()
    totals: tuple[str, ...] = ()
    ranks: frozenset[str] = frozenset({"dp_rank"})
    asked: tuple[tuple[Fact, ...], tuple[Fact, ...]] = ((), ())

    def metrics(self) -> frozenset[str]:
        """Return the names of all samples that this row reads."""
        plain = (self.running, self.waiting, self.kv_usage, self.gpu_usage, self.preemptions, self.prompt_tokens)
        more = (self.first_tokens, self.cached_tokens, self.output_tokens, self.decoded_tokens, self.tokens_per_s)
        own = (self.max_running, self.context_tokens, self.awake, self.adapters)
        lists = (*self.also_running, *self.also_waiting, *self.kv_capacity)
        return frozenset(metric.name for names in (*plain, *more, *own, *lists) for metric in names)

    @property
    def tells_room(self) -> bool:
        """Whether its page has a token rate, or the engine says how many it runs at once: a limit can be learned."""
        return bool(self.decoded_tokens or self.tokens_per_s or self.max_running or (self.asked and self.asked[0]))

    def loads(self) -> frozenset[str]:
        """Return the names that show that a page is this engine's, and not only that a number of it came along."""
        return frozenset(metric.name for names in (self.running, self.waiting) for metric in names)


def _either(*names: str) -> Names:
    return tuple(Metric(name) for name in names)


_CONTEXT = (Fact("/v1/models", ("data", "*", "max_model_len")),)
"""vLLM (entrypoints/openai: ModelCard) and SGLang (http_server.py) say it there, others may."""


# ---- vLLM, and what serves it under other names

_VLLM_PREFIXES = ("vllm:", "ray_vllm:", "ray_vllm_")
"""Ray puts its own prefix in front and, in newer versions, an underscore for the colon (vllm's ray_wrappers.py)."""


def _vllm(*names: str, labels: tuple[tuple[str, tuple[str, ...]], ...] = (), in_label: str | None = None) -> Names:
    return tuple(Metric(prefix + name, labels, in_label) for name in names for prefix in _VLLM_PREFIXES)


def _vllm_counter(*names: str) -> Names:
    """Return the names of counters: Ray has them with and without `_total`."""
    return tuple(
        Metric(prefix + name + suffix)
        for name in names
        for prefix in _VLLM_PREFIXES
        for suffix in (("_total",) if prefix == "vllm:" else ("_total", ""))
    )


def _vllm_sizes(prefix: str) -> tuple[Names, ...]:
    info = f"{prefix}cache_config_info"
    return (
        (Metric(info, in_label="kv_cache_size_tokens"),),
        (Metric(info, in_label="block_size"), Metric(info, in_label="num_gpu_blocks")),
    )


# ---- SGLang


def _sglang(*names: str, labels: tuple[tuple[str, tuple[str, ...]], ...] = ()) -> Names:
    """Return the names with both prefixes: `sglang:` and, in newer versions, `sglang_`."""
    return tuple(Metric(prefix + name, labels) for name in names for prefix in ("sglang:", "sglang_"))


def _sglang_sizes(prefix: str) -> tuple[Names, ...]:
    """Return SGLang's KV size: a gauge; gauges of pages (0.5.12 on); labels of an info metric (before)."""
    info = prefix + "cache_config_info"
    return (
        (Metric(prefix + "max_total_num_tokens"),),
        (Metric(prefix + "page_size"), Metric(prefix + "num_pages")),
        (Metric(info, in_label="page_size"), Metric(info, in_label="num_pages")),
    )


_SGLANG_MOST = ("internal_states", "*", "effective_max_running_requests_per_dp")


# ---- others


def _triton(kind: str) -> Metric:
    return Metric("nv_trt_llm_request_metrics", (("request_type", (kind,)),))


def _triton_kv(kind: str) -> Metric:
    return Metric("nv_trt_llm_kv_cache_block_metrics", (("kv_cache_block_type", (kind,)),))


def _llamacpp(name: str) -> Names:
    return _either(f"llamacpp:{name}", f"llamacpp_{name}")


ENGINES: tuple[Engine, ...] = (
    Engine(
        "vllm",  # vllm/v1/metrics/loggers.py; Triton's vLLM backend uses the same names (its src/utils/metrics.py)
        running=_vllm("num_requests_running"),
        waiting=_vllm("num_requests_waiting"),
        kv_usage=_vllm("kv_cache_usage_perc", "gpu_cache_usage_perc"),
        kv_capacity=tuple(size for prefix in _VLLM_PREFIXES for size in _vllm_sizes(prefix)),
        max_running=_either("num_request_max"),  # vLLM has none; NVIDIA's NIM adds it to vLLM's page
        awake=_vllm("engine_sleep_state", labels=(("sleep_state", ("awake",)),)),
        adapters=_vllm("lora_requests_info"),
        preemptions=_vllm_counter("num_preemptions"),
        prompt_tokens=_vllm_counter("prompt_tokens"),
        cached_tokens=_vllm_counter("prompt_tokens_cached", "prefix_cache_hits"),
        first_tokens=_vllm("time_to_first_token_seconds_count"),
        output_tokens=_vllm_counter("generation_tokens"),
        decoded_tokens=_vllm_counter("generation_tokens"),
        asked=((), _CONTEXT),
    ),
    Engine(
        "sglang",  # python/sglang/srt/observability/metrics_collector.py
        running=_sglang("num_running_reqs"),
        # With prefill and decode apart: what is on its way between them holds KV cache, and waits for nothing.
        also_running=(_sglang("num_decode_transfer_queue_reqs"), _sglang("num_prefill_inflight_queue_reqs")),
        waiting=_sglang("num_queue_reqs"),
        also_waiting=(_sglang("num_decode_prealloc_queue_reqs"), _sglang("num_prefill_prealloc_queue_reqs")),
        kv_usage=_sglang("token_usage"),
        kv_capacity=(*_sglang_sizes("sglang:"), *_sglang_sizes("sglang_")),
        preemptions=_sglang("num_retracted_requests_total", "num_retracted_reqs_total"),
        cached_tokens=_sglang("realtime_tokens_total", labels=(("mode", ("prefill_cache",)),)),
        output_tokens=_sglang("generation_tokens_total"),
        decoded_tokens=_sglang("realtime_tokens_total", labels=(("mode", ("decode",)),)),
        tokens_per_s=_sglang("gen_throughput"),
        totals=("priority",),
        asked=(
            (Fact("/server_info", _SGLANG_MOST, is_sum=True), Fact("/get_server_info", _SGLANG_MOST, is_sum=True)),
            _CONTEXT,
        ),
    ),
    Engine(
        "tgi",  # router/src/server.rs
        running=_either("tgi_batch_current_size"),
        waiting=_either("tgi_queue_size"),
        output_tokens=_either("tgi_request_generated_tokens_sum"),
        asked=(  # the second bounds what it takes at all, its queue included: no more than that can run
            (Fact("/info", ("max_batch_size",)), Fact("/info", ("max_concurrent_requests",))),
            (Fact("/info", ("max_total_tokens",)),),
        ),
    ),
    Engine(
        "trtllm",
        path="/prometheus/metrics",
        running=_either("trtllm_num_requests_running"),
        waiting=_either("trtllm_num_requests_waiting"),
        kv_usage=_either("trtllm_kv_cache_utilization"),
        kv_capacity=((Metric("trtllm_kv_cache_tokens_per_block"), Metric("trtllm_kv_cache_max_blocks")),),
        output_tokens=_either("trtllm_generation_tokens_total"),
        asked=((), _CONTEXT),
    ),
    Engine(
        "triton",
        running=(_triton("scheduled"), _triton("active")),
        waiting=(_triton("waiting"),),
        kv_usage=(_triton_kv("fraction"),),
        kv_capacity=((_triton_kv("tokens_per"), _triton_kv("max")),),
        max_running=(_triton("max"),),
    ),
    Engine(
        "llamacpp",  # tools/server
        running=_llamacpp("requests_processing"),
        waiting=_llamacpp("requests_deferred"),
        kv_usage=_llamacpp("kv_cache_usage_ratio"),
        output_tokens=_llamacpp("tokens_predicted_total"),
        asked=(
            (Fact("/props", ("total_slots",)),),
            (Fact("/props", ("default_generation_settings", "n_ctx")),),
        ),
    ),
    Engine(
        "lmdeploy",  # lmdeploy/metrics/loggers.py
        running=_either("lmdeploy:num_requests_running"),
        waiting=_either("lmdeploy:num_requests_waiting"),
        kv_usage=_either("lmdeploy:gpu_cache_usage_perc"),
        output_tokens=_either("lmdeploy:generation_tokens_total"),
        decoded_tokens=_either("lmdeploy:generation_tokens_total"),
        asked=((), _CONTEXT),
    ),
    Engine(
        "nim",  # docs.nvidia.com/nim/large-language-models, observability: NIM 1.x has names without a prefix
        path="/v1/metrics",
        running=_either("num_requests_running"),
        waiting=_either("num_requests_waiting"),
        kv_usage=_either("gpu_cache_usage_perc"),
        max_running=_either("num_request_max"),
        output_tokens=_either("generation_tokens_total"),
        decoded_tokens=_either("generation_tokens_total"),
        asked=((), _CONTEXT),
    ),
    Engine(
        # Dynamo's frontend (its docs/observability/metrics.md). `queued_requests` counts all without a first token, so
        # it tells nothing of a queue, and `model_max_num_seqs` is one worker's.
        "dynamo",
        running=_either("dynamo_frontend_inflight_requests"),
        context_tokens=_either("dynamo_frontend_model_context_length"),
        output_tokens=_either("dynamo_frontend_output_tokens_total"),
        decoded_tokens=_either("dynamo_frontend_output_tokens_total"),
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
