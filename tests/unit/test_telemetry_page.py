"""Metrics pages: each engine's figures are found, what can't be believed is unknown, and garbage is one reason."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from extproc.endpoints.telemetry.engines import DCGM, ENGINES, engines_for
from extproc.endpoints.telemetry.lines import sample
from extproc.endpoints.telemetry.page import MOST_BYTES, MOST_SERIES, MOST_WANTED_BYTES, Reader, read_page
from extproc.endpoints.telemetry.readings import Readings, Reason

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 12.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 3.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 900.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 0.4321
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="auto",cpu_offload_gb="0",enable_prefix_caching="True",\
engine="0",kv_cache_size_tokens="432000",num_cpu_blocks="None",num_gpu_blocks="27000",swap_space="4"} 1.0
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 7.0
# TYPE vllm:num_preemptions_created gauge
vllm:num_preemptions_created{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 1.784e+09
vllm:prompt_tokens_total{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 1.282888e+06
vllm:generation_tokens_total{engine="0",model_name="meta-llama/Llama-3.1-8B-Instruct"} 33700.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="m"} 0.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 55.0
"""
VLLM_TWO_ENGINES = """\
vllm:num_requests_running{engine="0",model_name="m"} 12.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.6
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.2
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="1000"} 1.0
"""
GPUS = """\
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-1",device="nvidia0",modelName="H100",Hostname="node-7"} 80
DCGM_FI_DEV_GPU_UTIL{gpu="1",UUID="GPU-2",device="nvidia1",modelName="H100",Hostname="node-7"} 40
DCGM_FI_DEV_GPU_UTIL{gpu="2",UUID="GPU-3",device="nvidia2",modelName="H100",Hostname="node-7"} 0
"""


def readings(page: str, engine: str = "auto") -> Readings:
    found = read_page(page.encode(), engines_for(engine))
    assert isinstance(found, Readings), found
    return found


def gauges(page: str, engine: str = "auto") -> tuple[object, ...]:
    found = readings(page, engine)
    return (found.engine, found.running, found.waiting, found.kv_usage, found.kv_capacity_tokens)


def test_another_engine_than_the_configured_one_is_no_reading():
    assert read_page(VLLM.encode(), engines_for("sglang")) is Reason.NO_METRICS
    assert read_page(VLLM.encode(), engines_for("none")) is Reason.NO_METRICS


def test_what_is_added_to_a_gauge_of_requests_tells_nothing_where_that_gauge_is_missing():
    also = "sglang:num_decode_transfer_queue_reqs 2\n"
    assert readings(also).running is None
    assert readings(also + "sglang:num_running_reqs 3\n").running == 5


def test_a_page_with_more_wanted_lines_than_an_engine_has_is_not_kept():
    """Else each of thousands of endpoints could have us keep 128 KB."""
    reader = Reader(ENGINES)
    for count, kept in ((10, 10), (1000, 10)):
        page = "".join(f'tgi_queue_size{{a="{number}"}} 1\n' for number in range(count)).encode()
        list(reader.read(page))
        assert len(reader._lines) == kept


def test_gpu_use_is_the_mean_of_the_gpus_whose_labels_match_and_the_profiling_field_comes_first():
    def gpu(page: str, *labels: tuple[str, str]) -> float | Reason | None:
        found = read_page(page.encode(), (DCGM,), labels)
        return found.gpu_usage if isinstance(found, Readings) else found

    assert gpu(GPUS) == pytest.approx(0.4)
    assert gpu(GPUS, ("gpu", "0")) == pytest.approx(0.8)
    assert gpu(GPUS, ("gpu", "0"), ("Hostname", "node-8")) is Reason.NO_METRICS
    assert gpu(GPUS + 'DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="0"} 0.33\n') == pytest.approx(0.33)
    assert gpu('DCGM_FI_DEV_GPU_UTIL{gpu="0"} 250\n') is None


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "-1", "-0.5", "1e300", "9e999", "1" * 400])
def test_a_value_that_cant_be_is_unknown_and_the_rest_of_the_page_counts(value):
    page = (
        f"vllm:num_requests_running {value}\nvllm:num_requests_waiting 2\nvllm:kv_cache_usage_perc {value}\n"
        f"vllm:num_preemptions_total {value}\n"
        f'vllm:cache_config_info{{kv_cache_size_tokens="{value}"}} 1\n'
    )
    found = readings(page)
    assert (found.running, found.waiting, found.kv_usage) == (None, 2.0, None)
    assert (found.preemptions, found.kv_capacity_tokens) == (None, None)


def test_one_unbelievable_series_makes_a_sum_or_a_mean_unknown_never_smaller():
    page = VLLM_TWO_ENGINES.replace("} 4.0", "} NaN").replace("} 0.2", "} -1")
    found = readings(page)
    assert (found.running, found.waiting, found.kv_usage) == (None, 3.0, None)


def test_a_percentage_where_a_share_belongs_is_unknown_and_a_rounding_error_is_full():
    assert readings("vllm:kv_cache_usage_perc 43.2\n").kv_usage is None
    assert readings("vllm:kv_cache_usage_perc 1.0000001\n").kv_usage == 1.0


def test_of_an_identical_series_the_last_sample_counts_whatever_the_order_of_labels():
    page = 'vllm:num_requests_running{a="1",b="2"} 5\nvllm:num_requests_running{b="2",a="1",} 6 1718000000000\n'
    assert readings(page).running == 6.0


def test_without_sizes_that_are_numbers_the_capacity_is_unknown():
    assert readings('vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1\n').kv_capacity_tokens is None
    assert readings('vllm:cache_config_info{block_size="16",num_gpu_blocks="0"} 1\n').kv_capacity_tokens is None
    assert readings("trtllm_kv_cache_tokens_per_block 32\n").kv_capacity_tokens is None
    two = 'trtllm_kv_cache_tokens_per_block{r="0"} 32\ntrtllm_kv_cache_max_blocks{r="1"} 10\n'
    assert readings(two).kv_capacity_tokens is None


def test_line_ends_comments_spaces_timestamps_and_escapes_are_read_as_the_format_says():
    assert gauges(VLLM.replace("\n", "\r\n")) == gauges(VLLM)
    assert gauges(VLLM.rstrip("\n")) == gauges(VLLM)
    odd = (
        'vllm:num_requests_running {a="}{\\"\\\\\\n,=",\tb = "ü" }\t7 -5 \n'
        'vllm:num_requests_waiting 1 # {trace="x"} 1\n'
        '# vllm:num_requests_waiting{a="b"} 9\n vllm:num_requests_waiting{c="d"} 9\n'
    )
    found = readings(odd)
    assert (found.running, found.waiting) == (7.0, 1.0)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", Reason.NO_METRICS),
        (b"<!doctype html><html><body><h1>Sign in</h1>\n" * 100, Reason.NO_METRICS),
        (b'[{"iter": 1, "numActiveRequests": 2}]', Reason.NO_METRICS),
        (bytes(range(256)) * 1000, Reason.NO_METRICS),
        (b"\x1f\x8b\x08" + bytes(1000), Reason.NO_METRICS),
        (b"some_other_metric 1\n", Reason.NO_METRICS),
        (b"vllm:num_requests_running\n", Reason.NO_METRICS),
        (b"vllm:num_requests_running ", Reason.MALFORMED),
        (b"vllm:num_requests_running{ 1\n", Reason.MALFORMED),
        (b'vllm:num_requests_running{a="1} 1\n', Reason.MALFORMED),
        (b'vllm:num_requests_running{a="1",a="2"} 1\n', Reason.MALFORMED),
        (b"vllm:num_requests_running{a=1} 1\n", Reason.MALFORMED),
        (b"vllm:num_requests_running twelve\n", Reason.MALFORMED),
        (b"vllm:num_requests_running 1_000\n", Reason.MALFORMED),
        (b"vllm:num_requests_running 0x10\n", Reason.MALFORMED),
        (b'vllm:num_requests_running{a="\xff"} 1\n', Reason.MALFORMED),
        (b"vllm:num_requests_running" + b"{" * 500_000 + b"\n", Reason.TOO_BIG),
        (b'vllm:num_requests_running{a="' + b"x" * 20_000 + b'"} 1\n', Reason.MALFORMED),
        (b"x" * (MOST_BYTES + 1), Reason.TOO_BIG),
        (
            b"".join(b'vllm:num_requests_running{r="%d"} 1\n' % n for n in range(MOST_SERIES + 1)),
            Reason.TOO_MANY_SERIES,
        ),
    ],
)
def test_what_is_no_page_is_one_reason(body, reason):
    assert read_page(body, ENGINES) is reason


def test_every_row_of_the_table_has_the_signals_that_admission_needs_most():
    assert len({engine.name for engine in ENGINES}) == len(ENGINES)
    for engine in ENGINES:
        assert engine.running, engine.name
        assert engine.waiting or engine.name == "dynamo", engine.name  # a frontend of many: it has no queue to show


LEAST_STEPS = {"newlines": 4, "almost": 3, "prefixes": 3, "wide": 5, "series": 3, "one line": 0}


def hostile() -> dict[str, bytes]:
    labels = ",".join(f'a{number}=""' for number in range(1600))
    wide = "".join(
        f'vllm:cache_config_info{{e="{number}",block_size="1",num_gpu_blocks="1",{labels}}} 1\n' for number in range(9)
    )
    series = "".join(f'vllm:num_requests_running{{e="{number}"}} 1\n' for number in range(MOST_SERIES))
    assert len(wide) < MOST_WANTED_BYTES
    return {
        "newlines": b"\n" * MOST_BYTES,
        "almost": (b"vllm:num_requests_runnin\n" * 50_000)[:MOST_BYTES],
        "prefixes": (b"\nv" * MOST_BYTES)[:MOST_BYTES],
        "wide": wide.encode(),
        "series": series.encode(),
        "one line": b"a" * MOST_BYTES,
    }


@pytest.mark.parametrize("name", hostile())
def test_a_page_is_read_in_steps_that_let_the_loop_turn(name):
    """`python -m bench.scrape parse` times the steps; here it is only that there are some, and that they end."""
    steps = sum(1 for _ in Reader(ENGINES).read(hostile()[name]))
    assert steps >= LEAST_STEPS[name]


# ---- against the reference, and against everything

_NAMES = st.sampled_from(["vllm:num_requests_running", "vllm:num_requests_waiting", "tgi_queue_size"])
_LABELS = st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True), st.text(max_size=12), max_size=4)
_VALUES = st.one_of(st.integers(0, 10**6).map(str), st.floats(0, 1e6).map(repr), st.just("NaN"))


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


@given(_NAMES, _LABELS, _VALUES)
def test_a_line_is_read_as_the_prometheus_client_reads_it(name, labels, value):
    inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
    line = f"{name}{{{inside}}} {value}" if labels else f"{name} {value}"
    if any(character in line for character in "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"):
        return  # the reference splits lines at these, the format does not
    ((_, their_labels, their_value, *_),) = next(iter(text_string_to_metric_families(line))).samples
    read = sample(f"\n{line}".encode())
    assert read is not None
    _, (our_name, our_labels), our_value = read
    assert (our_name, dict(our_labels)) == (name, their_labels)
    assert our_value == their_value or (our_value is None and value == "NaN")


_PIECES = st.sampled_from(
    [
        b"\n",
        b"vllm:num_requests_running",
        b"{",
        b"}",
        b'"',
        b"\\",
        b",",
        b"=",
        b" ",
        b"1",
        b"e",
        b"-",
        b"#",
        b"\r",
        b"\xff",
    ]
)


@given(st.one_of(st.binary(max_size=300), st.lists(_PIECES, max_size=60).map(b"".join)))
@example(b'vllm:num_requests_running{a="\\')
def test_whatever_bytes_come_the_answer_is_readings_or_a_reason(body):
    found = read_page(body, ENGINES)
    assert isinstance(found, (Readings, Reason))
    if isinstance(found, Readings):
        assert found.running is None or 0 <= found.running <= 1e6


_AMONG = st.lists(st.one_of(_PIECES, st.just(b"\nvllm:num_requests_running 1\ntgi_queue_size 2\n")), max_size=8)


@given(st.lists(_AMONG.map(b"".join), max_size=6))
@example([b"lmdeploy:gpu_cache_usage_perc 1", b"lmdeploy:gpu_cache_usage_perc 1\nvllm:lora_requests_info{} 1"])
@example([b"vllm:num_requests_running 1", b"vllm:num_requests_running 1", b'vllm:num_requests_running{a="1"} 1'])
def test_whatever_bytes_came_before_a_page_means_what_it_means_alone(bodies):
    reader = Reader(ENGINES)
    for body in bodies:
        steps = reader.read(body)
        with pytest.raises(StopIteration) as end:
            next(steps)
        assert end.value.value == read_page(body, ENGINES)
