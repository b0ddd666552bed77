"""From counters to what happened since the reading before; and load reports in response headers."""

from __future__ import annotations

import base64
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.admission.load import Load
from extproc.endpoints.telemetry.engines import ENGINES
from extproc.endpoints.telemetry.orca import parse_orca
from extproc.endpoints.telemetry.page import read_page
from extproc.endpoints.telemetry.rates import Rates
from extproc.endpoints.telemetry.readings import Readings


def vllm(tokens: str, *, running: float = 4, prompts: float = 0, preemptions: float = 0, engine: int = 0) -> str:
    label = f'{{engine="{engine}"}}'
    return (
        f"vllm:num_requests_running{label} {running}\nvllm:generation_tokens_total{label} {tokens}\n"
        f"vllm:prompt_tokens_total{label} {prompts}\nvllm:num_preemptions_total{label} {preemptions}\n"
    )


def read(page: str) -> Readings:
    found = read_page(page.encode(), ENGINES)
    assert isinstance(found, Readings)
    return found


def test_the_first_reading_has_gauges_and_no_differences():
    load = Rates(10.0).load(read(vllm("1000")), 100.0)
    assert load == Load(running=4.0)


def test_differences_and_the_token_rate_are_since_the_reading_before():
    rates = Rates(10.0)
    rates.load(read(vllm("1000", prompts=50, preemptions=1)), 100.0)
    load = rates.load(read(vllm("1200", prompts=80, preemptions=3)), 102.0)
    assert (load.output_tokens, load.prompt_tokens, load.preemptions) == (200, 30, 2)
    assert load.tokens_per_s == 100.0


def test_a_counter_that_was_reset_gives_an_unknown_difference_once_and_never_a_negative_one():
    rates = Rates(10.0)
    rates.load(read(vllm("1000", prompts=50)), 100.0)
    after = rates.load(read(vllm("10", prompts=60)), 101.0)
    assert (after.output_tokens, after.tokens_per_s, after.prompt_tokens) == (None, None, 10)
    assert rates.load(read(vllm("30", prompts=60)), 102.0).output_tokens == 20


def test_pages_of_several_servers_in_turn_give_no_differences_as_long_as_they_do():
    """What a balancer shows of one by one is no rate: millions of tokens in a second, where one ran for a week."""
    rates, pages = Rates(10.0), [vllm("9000000"), vllm("1000")]
    rises = [rates.load(read(pages[second % 2]), float(second)).output_tokens for second in range(40)]
    assert set(rises[8:]) == {None}
    rises = [rates.load(read(vllm(str(1000 + second))), float(second)).output_tokens for second in range(40, 80)]
    assert rises[-1] == 1


def test_one_of_two_engines_that_was_reset_does_not_hide_behind_the_other():
    rates = Rates(10.0)
    rates.load(read(vllm("1000") + vllm("1000", engine=1)), 100.0)
    assert rates.load(read(vllm("10") + vllm("9000", engine=1)), 101.0).output_tokens is None


def test_an_engine_rank_that_comes_or_goes_gives_no_difference():
    rates = Rates(10.0)
    rates.load(read(vllm("1000")), 100.0)
    assert rates.load(read(vllm("1010") + vllm("5000", engine=1)), 101.0).output_tokens is None
    assert rates.load(read(vllm("1020")), 102.0).output_tokens is None
    assert rates.load(read(vllm("1030")), 103.0).output_tokens == 10


def test_two_engine_ranks_that_change_places_on_the_page_give_the_same_difference():
    rates, ranks = Rates(10.0), [vllm("1000"), vllm("5000", engine=1)]
    rates.load(read("".join(ranks)), 100.0)
    ranks = [vllm("5001", engine=1), vllm("1010")]
    assert rates.load(read("".join(ranks)), 101.0).output_tokens == 11


def test_a_nan_between_two_readings_makes_both_differences_unknown():
    rates = Rates(10.0)
    rates.load(read(vllm("1000")), 100.0)
    assert rates.load(read(vllm("NaN")), 101.0).output_tokens is None
    assert rates.load(read(vllm("1020")), 102.0).output_tokens is None
    assert rates.load(read(vllm("1030")), 103.0).output_tokens == 10


def test_there_is_no_rate_over_an_outage_nor_over_no_time_but_the_difference_counts():
    rates = Rates(10.0)
    rates.load(read(vllm("1000")), 100.0)
    late = rates.load(read(vllm("4000")), 111.0)
    assert (late.output_tokens, late.tokens_per_s) == (3000, None)
    again = rates.load(read(vllm("4001")), 111.0)
    assert (again.output_tokens, again.tokens_per_s) == (1, None)


def test_a_rate_gauge_is_used_only_where_no_counter_rises_token_by_token():
    gauge = "sglang:num_running_reqs 2\nsglang:gen_throughput 80\n"
    counted = gauge + 'sglang:realtime_tokens_total{mode="decode"} '
    assert Rates(10.0).load(read(gauge), 1.0).tokens_per_s == 80.0
    rates = Rates(10.0)
    assert rates.load(read(counted + "100\n"), 1.0).tokens_per_s is None
    assert rates.load(read(counted + "150\n"), 2.0).tokens_per_s == 50.0


def test_gpu_use_comes_from_the_other_page():
    assert Rates(10.0).load(read(vllm("1")), 1.0, 0.7).gpu_usage == 0.7


# ---- ORCA


def _report(entries: dict[str, float], *, cut: int = 0) -> bytes:
    """Encode a report by hand; `cut`: so many bytes that it announces are missing at its end."""
    message = b"\x09" + struct.pack("<d", 0.5)  # cpu_utilization
    for name, value in entries.items():
        entry = b"\x0a" + bytes([len(name)]) + name.encode() + b"\x11" + struct.pack("<d", value)
        message += b"\x42" + bytes([len(entry) + cut]) + entry
    return message if cut else message + b"\x18\x07"  # rps, an old integer field


VLLM_LOAD = Load(waiting=2.0, kv_usage=0.25)


@pytest.mark.parametrize(
    "value",
    [
        "TEXT named_metrics.num_requests_waiting=2.0, named_metrics.kv_cache_usage_perc=0.25",
        "text named_metrics.num_requests_waiting=2.0,named_metrics.kv_cache_usage_perc=0.25,cpu_utilization=0.5",
        'JSON {"named_metrics": {"num_requests_waiting": 2.0, "kv_cache_usage_perc": 0.25}}',
        ' json {"namedMetrics": {"num_requests_waiting": 2, "kv_cache_usage_perc": 0.25}, "cpuUtilization": 0.1} ',
    ],
)
def test_a_load_report_is_read_in_text_and_json(value):
    assert parse_orca(value) == VLLM_LOAD


def test_a_load_report_is_read_in_binary():
    message = _report({"num_requests_waiting": 2.0, "kv_cache_usage_perc": 0.25})
    assert parse_orca("BIN " + base64.b64encode(message).decode()) == VLLM_LOAD
    assert parse_orca("BIN " + base64.b64encode(message).decode().rstrip("=")) == VLLM_LOAD


def test_tritons_names_are_known_too():
    value = "TEXT named_metrics.kv_cache_utilization=0.5, named_metrics.max_token_capacity=4096"
    assert parse_orca(value) == Load(kv_usage=0.5, kv_capacity_tokens=4096)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "TEXT",
        "TEXT nonsense",
        "TEXT named_metrics.kv_cache_usage_perc=NaN",
        "TEXT named_metrics.kv_cache_usage_perc=-1",
        "TEXT named_metrics.kv_cache_usage_perc=lots",
        "TEXT cpu_utilization=0.5",
        "JSON",
        "JSON 3",
        'JSON {"named_metrics": 3}',
        'JSON {"named_metrics": {"kv_cache_usage_perc": true}}',
        "JSON " + "[" * 4000,
        "BIN !!!",
        "BIN " + base64.b64encode(b"\x42\x7f").decode(),
        "BIN " + base64.b64encode(b"\x09\x00").decode(),
        "BIN " + base64.b64encode(b"\xff" * 20).decode(),
        "XML <a/>",
        "TEXT named_metrics.num_requests_waiting=2.0" + ",a=1" * 3000,
        "BIN " + base64.b64encode(_report({"kv_cache_usage_perc": 0.25}, cut=3)).decode(),
    ],
)
def test_garbage_in_the_header_is_no_load(value):
    assert parse_orca(value) is None


@given(st.sampled_from(["TEXT ", "JSON ", "BIN ", ""]), st.text(max_size=60))
def test_no_header_value_raises(form, text):
    parse_orca(form + text)


@given(st.binary(max_size=60))
def test_no_binary_report_raises(message):
    parse_orca("BIN " + base64.b64encode(message).decode())
