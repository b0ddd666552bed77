"""By what clients send already: which requests belong together, and who is asking."""

from __future__ import annotations

import pytest

from extproc.config import parse_config
from extproc.errors import ConfigError
from extproc.stream.ages import Ages
from extproc.stream.request import MAX_SEQUENCES, Headers, Requests
from extproc.stream.wire import Incoming, Kind

HEADERS = Headers(session=("x-session-id", "x-session-affinity", "x-chat"))


def read(fields: dict[str, str | float | bool] | None = None, **headers: str):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Requests(HEADERS, Ages(30.0)).read(Incoming(Kind.REQUEST_HEADERS, named, fields=fields or {}), 0.0, {})


@pytest.mark.parametrize(
    ("fields", "headers", "session"),
    [
        ({}, {"x_session_affinity": "a"}, "a"),
        ({}, {"x_chat": "c", "x_session_affinity": "a"}, "a"),
        ({}, {"x_session_id": "", "x_chat": "c"}, "c"),
        ({"prompt_cache_key": "k"}, {}, "k"),
        ({"prompt_cache_key": "k"}, {"x_chat": "c"}, "c"),
        ({"prompt_cache_key": 7.0}, {}, None),
        ({"user": "u"}, {}, None),
    ],
)
def test_a_session_is_what_the_first_of_its_headers_says_and_else_the_prompt_cache_key(fields, headers, session):
    assert read(fields, **headers).session == session


@pytest.mark.parametrize(
    ("fields", "headers", "tenant"),
    [
        ({"safety_identifier": "s", "user": "u"}, {}, "s"),
        ({"user": "u"}, {}, "u"),
        ({"safety_identifier": "s"}, {"x_tenant_id": "t"}, "t"),
        ({"safety_identifier": True, "user": "u"}, {}, "u"),
        ({"prompt_cache_key": "k"}, {}, ""),
    ],
)
def test_a_tenant_is_what_its_header_says_and_else_the_safety_identifier(fields, headers, tenant):
    assert read(fields, **headers).tenant == tenant


@pytest.mark.parametrize(
    ("fields", "sequences"),
    [
        ({}, 1),
        ({"n": 8.0}, 8),
        ({"best_of": 4.0}, 4),
        ({"n": 2.0, "best_of": 4.0}, 4),
        ({"n": 0.0, "best_of": -1.0}, 1),
        ({"n": "8", "best_of": 1000.0}, MAX_SEQUENCES),
        ({"prompts": 5.0}, 5),
        ({"prompts": 5.0, "n": 3.0}, 15),
        ({"prompts": 128.0, "n": 1e6}, MAX_SEQUENCES),
    ],
)
def test_a_request_is_as_many_sequences_as_the_engine_writes_for_it(fields, sequences):
    assert read(fields).sequences == sequences


def test_one_header_or_several_may_carry_a_session():
    def names(text: str) -> tuple[str, ...]:
        return parse_config(text, "file", {}).header_names().session

    assert names("") == ("x-session-id", "x-session-affinity")
    assert names("headers: {session: X-Chat}") == ("x-chat",)
    assert names("headers: {session: [x-chat, x-thread]}") == ("x-chat", "x-thread")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{session: []}", "headers.session: must be one header, or 1 to 8 different ones, not a list"),
        ("{session: [x-a, x-a]}", "headers.session: must be one header, or 1 to 8 different ones, not a list"),
        ("{session: [x-a, 7]}", "headers.session: must be the name of an HTTP header, like x-model, not 7"),
        ("{session: [x-a, x-model]}", "headers: 'x-model' is used for two things"),
    ],
)
def test_odd_lists_of_headers_are_named(text, problem):
    with pytest.raises(ConfigError, match=problem.replace("[", r"\[")):
        parse_config(f"headers: {text}", "file", {})
