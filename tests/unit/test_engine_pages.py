"""What each engine's page means: one table from the corpus to `Load`. A page that was ever read wrongly becomes a row.

The pages are in tests/corpus/pages, written here in the form of each engine and version; each names its source.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from extproc.admission.load import Load
from extproc.endpoints.telemetry.engines import ENGINES, engines_for
from extproc.endpoints.telemetry.facts import Facts, paths, read_facts
from extproc.endpoints.telemetry.page import Reader, read_page
from extproc.endpoints.telemetry.rates import Rates
from extproc.endpoints.telemetry.readings import Counter, Readings, Reason

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = Path(__file__).parents[1] / "corpus" / "pages"

_VLLM = Load(
    running=12.0,
    waiting=3.0,
    kv_usage=0.4321,
    kv_capacity_tokens=432_000,
    tokens_per_s=33_700.0,
    preemptions=7,
    prompt_tokens=1_282_888,
    cached_tokens=641_000,
    first_tokens=55,
    output_tokens=33_700,
    asleep=False,
)
_RANKED = Load(
    running=6.0, waiting=1.0, kv_usage=0.4, kv_capacity_tokens=50_000, tokens_per_s=800.0
)  # one scheduler, however often it is on the page

TABLE: dict[str, tuple[str, Load]] = {
    "vllm-0.32": ("vllm", _VLLM),
    "vllm-0.32-lora": ("vllm", replace(_VLLM, adapters=("law", "med"), waiting_adapters=(), adapter_slots=2)),
    "vllm-0.32-asleep": ("vllm", replace(_VLLM, running=0.0, waiting=0.0, asleep=True)),
    "vllm-0.7-v0": (
        "vllm",
        Load(
            running=1.0,
            waiting=0.0,
            kv_usage=0.25,
            kv_capacity_tokens=387_008,
            tokens_per_s=70.0,
            prompt_tokens=500,
            output_tokens=70,
        ),
    ),
    "vllm-data-parallel-2": (  # the fullest rank brakes
        "vllm",
        Load(
            running=16.0,
            waiting=3.0,
            kv_usage=0.99,
            kv_capacity_tokens=32_000,
            tokens_per_s=300.0,
            prompt_tokens=3000,
            first_tokens=30,
            output_tokens=300,
            asleep=False,
        ),
    ),
    "ray-serve-colon": ("vllm", _VLLM),
    "ray-serve": ("vllm", _VLLM),
    "nim-vllm": ("vllm", replace(_VLLM, max_running=1024)),
    "dynamo-worker": ("vllm", _VLLM),
    "triton-vllm-backend": (
        "vllm",
        Load(
            running=5.0,
            waiting=1.0,
            kv_usage=0.5,
            tokens_per_s=160.0,
            preemptions=2,
            prompt_tokens=1000,
            first_tokens=17,
            output_tokens=160,
        ),
    ),
    "nim-1": (
        "nim",
        Load(running=6.0, waiting=1.0, kv_usage=0.75, tokens_per_s=997.0, output_tokens=997, max_running=2048),
    ),
    "lmdeploy": ("lmdeploy", Load(running=8.0, waiting=2.0, kv_usage=0.6, tokens_per_s=512.0, output_tokens=512)),
    "dynamo-frontend": (
        "dynamo",
        Load(running=12.0, tokens_per_s=2000.0, output_tokens=2000, context_tokens=40_960),
    ),
    # Counters of SGLang, TGI, TensorRT-LLM and llama.cpp that rise at a request's end, or leave out cached tokens,
    # are not taken for what the core would make of them.
    "sglang-0.5.3": (
        "sglang",
        Load(running=5.0, waiting=2.0, kv_usage=0.28, kv_capacity_tokens=64_000, tokens_per_s=86.5, output_tokens=337),
    ),
    "sglang-underscore": (
        "sglang",
        Load(
            running=5.0,
            waiting=2.0,
            kv_usage=0.28,
            kv_capacity_tokens=64_000,
            tokens_per_s=500.0,
            preemptions=4,
            cached_tokens=1500,
        ),
    ),
    "sglang-priority": ("sglang", Load(running=10.0, waiting=6.0, kv_usage=0.5, kv_capacity_tokens=100_000)),
    "sglang-cp8": ("sglang", _RANKED),
    "sglang-pp4": ("sglang", _RANKED),
    "sglang-tp8": ("sglang", _RANKED),
    "sglang-dp2-tp2": (
        "sglang",
        Load(running=8.0, waiting=2.0, kv_usage=0.95, kv_capacity_tokens=100_000, tokens_per_s=200.0),
    ),
    "sglang-decode": (
        "sglang",
        Load(running=22.0, waiting=3.0, kv_usage=0.6, kv_capacity_tokens=200_000, tokens_per_s=900.0),
    ),
    "tgi-3": ("tgi", Load(running=8.0, waiting=5.0, output_tokens=8123)),
    "trtllm-serve": (
        "trtllm",
        Load(running=3.0, waiting=1.0, kv_usage=0.62, kv_capacity_tokens=171_456, output_tokens=200),
    ),
    "triton-trtllm": (
        "triton",
        Load(running=6.0, waiting=2.0, kv_usage=0.4875, kv_capacity_tokens=399_296, max_running=512),
    ),
    "llamacpp": ("llamacpp", Load(running=4.0, waiting=1.0, output_tokens=4400)),
    "llamacpp-underscore": ("llamacpp", Load(running=4.0, waiting=1.0, output_tokens=4400)),
    "llamacpp-old": ("llamacpp", Load(running=4.0, waiting=1.0, kv_usage=0.37, output_tokens=4400)),
}
OTHERS = {"two-engines"}  # tests of their own, below


def page(name: str) -> bytes:
    return (PAGES / f"{name}.txt").read_bytes()


def load(body: bytes, engine: str) -> tuple[str, Load]:
    """Return whose page it is, and its load, all counters having been 0 a second before."""
    now = read_page(body, engines_for(engine))
    assert isinstance(now, Readings), now
    counters = {name: value for name, value in now._asdict().items() if isinstance(value, Counter)}
    rates = Rates(10.0)
    zeros = {name: Counter(one.series, [0.0] * len(one.series)) for name, one in counters.items()}
    rates.load(now._replace(**zeros), 0.0)
    return now.engine, rates.load(now, 1.0)


@pytest.mark.parametrize("name", TABLE)
def test_a_page_of_the_corpus_means_this_load_whether_the_engine_is_configured_or_not(name):
    engine, expected = TABLE[name]
    assert load(page(name), "auto") == (engine, expected)
    assert load(page(name), engine) == (engine, expected)


QUOTED = 'a"\\b'
"""The value of a label, as the configuration has it; a page says it escaped."""


@pytest.mark.parametrize("labels", [(), (("own", QUOTED),)], ids=["no labels", "labels"])
def test_the_lines_of_adapters_that_ran_once_are_neither_counted_nor_read_however_many_or_wrong_they_are(labels):
    """vLLM's page keeps a line for each combination that ever ran: 800 of them hid how much runs and waits."""
    own = 'own="a\\"\\\\b",' if labels else ""
    lora = "vllm:lora_requests_info{"
    text = page("vllm-0.32-lora").decode().replace("{", "{" + own)
    old = "".join(
        f'{lora}{own}max_lora="9",running_lora_adapters="client-{n}-support,client-{n + 1}-support"}} {1.7e9 + n} 17\n'
        for n in range(2000)
    )
    wrong = f'{lora}{own}running_lora_adapters="{"a" * 20_000}"}} 1\n{lora}{own}}} NaN\n{lora} 1\n{lora}}}\n'
    others = lora + 'own="other",running_lora_adapters="other"} 9e12\n' if labels else ""
    for body in (text + old + wrong + others, others + wrong + old + text):
        now = read_page(body.encode(), engines_for("vllm"), labels)
        assert isinstance(now, Readings)
        assert (now.running, now.waiting, now.adapters, now.adapter_slots) == (12.0, 3.0, ("law", "med"), 2)
        assert now.waiting_adapters == ()
        assert now.preemptions is not None


def test_a_page_tells_which_adapters_wait_and_one_without_that_label_tells_nothing_of_them():
    lora = 'vllm:lora_requests_info{max_lora="1",running_lora_adapters="law"'
    for more, told in ((',waiting_lora_adapters="med, law,"', ("law", "med")), ("", None)):
        now = read_page(page("vllm-0.32-lora") + f"{lora}{more}}} 9e12\n".encode(), engines_for("vllm"))
        assert isinstance(now, Readings)
        assert (now.adapters, now.waiting_adapters) == (("law",), told)


def test_a_newest_line_of_adapters_that_cannot_be_read_leaves_the_rest_of_the_page():
    long = 'vllm:lora_requests_info{max_lora="2",running_lora_adapters="' + "a" * 20_000 + '"} 9e12\n'
    now = read_page(page("vllm-0.32-lora") + long.encode(), engines_for("vllm"))
    assert isinstance(now, Readings)
    assert (now.running, now.waiting, now.adapters, now.adapter_slots) == (12.0, 3.0, None, None)


def test_every_page_of_the_corpus_has_a_row_and_names_its_source():
    assert {path.stem for path in PAGES.glob("*.txt")} == TABLE.keys() | OTHERS
    sources = {path.stem: path.read_text().partition("\n")[0] for path in PAGES.glob("*.txt")}
    assert [name for name, line in sources.items() if not re.match(r"# source: \S*/\S|# source: a live ", line)] == []
    assert {engine.name for engine in ENGINES} == {engine for engine, _ in TABLE.values()}


@pytest.mark.parametrize(
    ("engine", "own", "running"),
    [
        ("vllm", frozenset(), 9.0),
        ("sglang", frozenset(), 2.0),
        ("auto", frozenset({"10.0.0.9:30000"}), 2.0),
        ("auto", frozenset({"10.0.0.7:1", "qwen"}), 2.0),
        ("auto", frozenset({"10.0.0.8:8000", "some-alias"}), 9.0),
    ],
)
def test_of_two_engines_on_a_page_it_is_the_configured_one_or_the_one_whose_lines_name_the_endpoint(
    engine, own, running
):
    found = read_page(page("two-engines"), engines_for(engine), own=own)
    assert isinstance(found, Readings)
    assert found.running == running


def test_where_nothing_says_whose_lines_they_are_none_are_believed():
    assert read_page(page("two-engines"), ENGINES, own=frozenset({"elsewhere:1"})) is Reason.SEVERAL_ENGINES


def test_one_unknown_view_of_a_scheduler_makes_its_figure_unknown():
    body = page("sglang-tp8").replace(b'tp_rank="3"} 6.0', b'tp_rank="3"} NaN')
    found = read_page(body, ENGINES)
    assert isinstance(found, Readings)
    assert (found.running, found.waiting) == (None, 1.0)


def test_a_priority_without_a_total_beside_it_counts():
    body = b'sglang:num_running_reqs{priority="0"} 7\nsglang:num_running_reqs{priority="5"} 3\n'
    found = read_page(body, ENGINES)
    assert isinstance(found, Readings)
    assert found.running == 10.0


# ---- what engines say of themselves, in JSON

_MODELS = {"object": "list", "data": [{"id": "m", "max_model_len": 32768}, {"id": "lora", "max_model_len": None}]}
_STATE = {"last_gen_throughput": 129.3, "effective_max_running_requests_per_dp": 48}
_PROPS = {"total_slots": 4, "chat_template": "{{ x }}", "default_generation_settings": {"n_ctx": 8192, "params": {}}}
_INFO = {"model_id": "m", "max_concurrent_requests": 128, "max_total_tokens": 4096, "max_batch_size": None}
FACTS: list[tuple[str, dict[str, object], Facts]] = [
    ("vllm", {"/v1/models": _MODELS}, Facts(None, 32768)),
    (  # http_server.py: server_info, one internal state per data parallel rank; get_server_info before
        "sglang",
        {"/server_info": {"max_running_requests": None, "internal_states": [_STATE, _STATE]}, "/v1/models": _MODELS},
        Facts(96, 32768),
    ),
    ("sglang", {"/get_server_info": {"internal_states": [_STATE]}}, Facts(48, None)),
    ("tgi", {"/info": _INFO}, Facts(128, 4096)),
    ("tgi", {"/info": _INFO | {"max_batch_size": 8}}, Facts(8, 4096)),
    ("llamacpp", {"/props": _PROPS}, Facts(4, 8192)),
    ("lmdeploy", {"/v1/models": {"object": "list", "data": [{"id": "m"}]}}, Facts()),
    ("triton", {}, Facts()),
]


@pytest.mark.parametrize(("name", "pages", "expected"), FACTS)
def test_an_engine_says_how_many_it_runs_at_once_and_how_long_a_context_it_takes(name, pages, expected):
    (engine,) = engines_for(name)
    assert pages.keys() <= set(paths(engine))
    assert read_facts(engine, {path: json.dumps(body).encode() for path, body in pages.items()}) == expected


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"<html>",
            b"[" * 100_000,
            b"null",
            b"[]",
            b'{"data": {"max_model_len": 5}}',
            b'{"data": [1, null, {}]}',
        ),
        *(b'{"data": [{"max_model_len": %s}]}' % value for value in (b"-1", b"0", b"true", b'"9"', b"NaN", b"1e999")),
        b'{"data": [{"max_model_len": 1' + b"0" * 400 + b"}]}",
        b'{"data": [{"max_model_len": Infinity}]}\xff',
    ],
)
def test_garbage_in_a_json_page_is_unknown(body):
    assert read_facts(engines_for("vllm")[0], {"/v1/models": body}) == Facts()


# ---- one page after the other


def changed(body: bytes) -> list[bytes]:
    """Pages that may follow `body` at one endpoint: other numbers, other lines, another engine, garbage."""
    lines = body.splitlines(keepends=True)
    numbers = re.sub(rb"(?m)^([^#].*[ \t])([0-9.]+)$", rb"\g<1>1\2", body)
    return [
        numbers,
        body,
        re.sub(rb"(?m)^([^#].*[ \t])[0-9.]+$", rb"\1NaN", body),
        numbers.replace(b"\n", b"\r\n"),
        re.sub(rb"(?m)^([^#].*[ \t][0-9.]+)$", rb"\1 1718000000000", numbers),
        *(b"".join(lines[:cut] + lines[cut + 1 :]) for cut in range(len(lines))),
        *(b"".join([*lines[:cut], lines[cut].replace(b'="', b'="x'), *lines[cut + 1 :]]) for cut in range(len(lines))),
        body + b"sglang:num_running_reqs 7\nvllm:num_requests_running 7\n",
        b"".join(reversed(lines)),
        b"<html>",
        body.replace(b"{", b"{{"),
        numbers,
    ]


@pytest.mark.parametrize("name", [*TABLE, *OTHERS])
def test_what_a_page_means_does_not_depend_on_the_page_before_it(name):
    own = frozenset({"qwen"})
    reader = Reader(ENGINES, (), own)
    for body in changed(page(name)):
        for following in (body, page(name)):
            assert ended(reader.read(following)) == read_page(following, ENGINES, (), own)


def ended(steps: Iterator[None]) -> Readings | Reason:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
