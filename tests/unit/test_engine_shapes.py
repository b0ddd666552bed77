"""The simulated engine without HTTP: request bodies in, events out, histograms, flags."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.engine.openai import Answer, Ask, BadRequest, read_ask
from extproc.engine.params import A100_8B, DEMO
from extproc.engine.realtime import Histogram
from extproc.engine.server import EngineServerConfig, add_arguments, from_arguments
from extproc.errors import ConfigError


def test_one_chunk_is_the_same_bytes_as_its_tokens_one_by_one_would_say() -> None:
    asked = Ask("text", "sim", 1, 6, "length", stream=True, include_usage=False, priority=0, session=None)
    answer = Answer(asked, "id")

    def text(data: bytes) -> str:
        lines = [line for line in data.decode().split("\n\n") if line and "[DONE]" not in line]
        return "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines)

    assert text(answer.chunk(0, 6)) == "".join(text(answer.chunk(at, at + 1)) for at in range(6))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.dictionaries(
    st.sampled_from(["model", "messages", "prompt", "max_tokens", "n", "stream", "stream_options", "priority", "user"]),
    JSON | st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": JSON}), max_size=2),
)


@settings(deadline=None)
@given(
    FIELDS.map(lambda fields: json.dumps(fields).encode()) | st.binary(max_size=30), st.sampled_from(["chat", "text"])
)
def test_any_body_is_a_valid_request_or_a_bad_one_and_nothing_else(body: bytes, kind: Any) -> None:
    try:
        asked = read_ask(kind, body, {}, ("sim",), 100, any_model=True)
    except BadRequest as error:
        status = error.status
    else:
        status = 200 if 2 <= asked.prompt_tokens + asked.output_tokens <= 100 else 0
    assert status in {200, 400}


def test_too_many_prompts_are_told_as_what_they_are_and_not_as_too_many_answers_of_each() -> None:
    body = json.dumps({"prompt": ["hi"] * 1025}).encode()
    with pytest.raises(BadRequest, match=r"`prompt` must be a list of at most 1024 prompts, got 1025\."):
        read_ask("text", body, {}, ("sim",), 100, any_model=True)


def test_a_histogram_cumulates_and_counts_weights() -> None:
    histogram = Histogram((1, 2))
    histogram.observe(1.0, 3)
    histogram.observe(9.0)
    assert histogram.buckets() == [("1.0", 3.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert histogram.sum == 12.0


def parsed(*flags: str) -> EngineServerConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(flags))


def test_flags_override_the_preset_they_name_and_nothing_else() -> None:
    config = parsed("--preset", "a100-8b", "--max-num-seqs", "7", "--no-prefix-caching", "--speed", "0.5")
    assert config.params == dataclasses.replace(A100_8B, max_num_seqs=7, prefix_caching=False, speed=0.5)
    assert parsed().params == DEMO
    assert parsed("--model", "a", "--model", "b", "--any-model").models == ("a", "b")


@pytest.mark.parametrize(("flags", "names"), [(["--speed", "0"], "speed"), (["--port", "70000"], "port")])
def test_an_impossible_flag_is_a_config_error_that_names_it(flags: list[str], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        parsed(*flags)
