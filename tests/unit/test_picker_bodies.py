"""How gateways tell an endpoint picker of bodies, as plays (picker_stage.py); and the model that stands in one."""

from __future__ import annotations

import logging
import sys
import tracemalloc

import pytest

from extproc.admission.values import Policy, RequestClass
from extproc.observe.stories import Stories
from extproc.stream import bodies, wire
from extproc.stream.session import KEPT_BYTES
from extproc.stream.silence import CROWDED_S, READING_S
from tests.unit.picker_stage import (
    BUFFERED,
    DUPLEX,
    LEAN,
    MODE,
    A,
    B,
    Gateway,
    message,
    opening,
    spoken,
    told,
)

# ---- the ways of telling bodies


def test_full_duplex_every_piece_goes_back_as_it_came_and_the_last_one_of_the_answer_gives_the_lease_back():
    gateway = Gateway(A)
    stream = gateway.stream()
    stream.play(
        "> opening", f"< pick {A}",
        "> request_body ab", "< request_body ab",
        "> request_body cd|", "< request_body cd|",
        "> response_headers 200", "< response_headers",
        "> response_body 1", "< response_body 1",
        "> response_body 2", "< response_body 2",
        opening=opening(DUPLEX),
    )  # fmt: skip
    assert gateway.in_flight() == {"a": 1}
    stream.play("> response_body |", "< response_body |")
    assert gateway.in_flight() == {"a": 0}
    stream.session.end()
    assert gateway.in_flight() == {"a": 0}


def test_full_duplex_trailers_end_an_answer_too_and_so_does_a_head_without_a_body():
    gateway = Gateway(A, limit=2)
    for last in ("response_trailers", "response_headers 204|"):
        stream = gateway.stream()
        stream.play("> opening", f"< pick {A}", opening=opening(DUPLEX, body=False))
        if last == "response_trailers":
            stream.play("> response_headers 200", "< response_headers", "> response_body 1", "< response_body 1")
        assert gateway.in_flight() == {"a": 1}
        stream.play(f"> {last}", f"< {last.partition(' ')[0]}")
        assert gateway.in_flight() == {"a": 0}


def test_a_held_requests_body_is_answered_after_its_headers_in_order_and_its_trailers_last():
    gateway = Gateway(A)
    first, held = gateway.stream(), gateway.stream()
    first.play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    held.play("> opening", "> request_body ab", "> request_body cd", "> request_trailers", opening=opening(DUPLEX))
    first.session.end()
    assert list(map(spoken, held.said)) == [f"pick {A}", "request_body ab", "request_body cd", "request_trailers"]


def test_a_held_body_beyond_the_window_is_left_unread_until_its_request_is_picked_where_resets_tell_of_the_end():
    gateway = Gateway(A)
    first = gateway.stream()
    first.play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    for resets in (True, False):
        held = gateway.stream(resets=resets)
        held.play("> opening", f"> request_body {'x' * KEPT_BYTES}", opening=opening(DUPLEX))
        assert held.session.paused is resets
        held.session.end()
    held = gateway.stream(resets=True)
    held.play("> opening", f"> request_body {'x' * KEPT_BYTES}", opening=opening(DUPLEX))
    first.session.end()
    assert not held.session.paused


def test_of_a_body_that_is_longer_than_what_is_kept_nothing_is_taken_before_its_request_is_picked():
    """Envoy sends up to 1 MiB of a body as one piece: whoever reads one has it all."""
    gateway = Gateway(A)
    first = gateway.stream()
    first.play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    held = []
    for length, paused in ((KEPT_BYTES + 1, True), (KEPT_BYTES, False)):
        held.append(gateway.stream(resets=True))
        held[-1].play("> opening", opening=opening(DUPLEX, content_length=str(length)))
        assert held[-1].session.paused is paused
    first.session.end()
    assert not held[0].session.paused
    held[0].play("> request_body ab|", "< request_body ab|")


def test_what_a_client_sent_that_left_while_it_waited_is_not_remembered_with_its_request():
    gateway = Gateway(A)
    stories = Stories(gateway.gate.controller, gateway.clock.time)
    gateway.gate._observers = (stories,)
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    piece = message(f"request_body {'x' * (1 << 20)}")
    tracemalloc.start()
    try:
        for _ in range(20):
            held = gateway.stream()
            held.play("> opening", "> piece", opening=opening(DUPLEX), piece=piece)
            held.session.end()
        del held
        assert tracemalloc.get_traced_memory()[0] < 4 << 20
    finally:
        tracemalloc.stop()
    assert len(gateway.gate.controller.endpoints["a"].leases) == 1


def test_what_all_held_requests_keep_together_is_bounded_and_comes_free_with_each_end():
    gateway = Gateway(A)
    gateway.reception.kept = bodies.Allowance(3 * KEPT_BYTES)
    first = gateway.stream()
    first.play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    piece = f"> request_body {'x' * KEPT_BYTES}"
    held = [gateway.stream() for _ in range(3)]
    for stream in held:
        stream.play("> opening", piece, opening=opening(DUPLEX))
    assert held[2].session.paused
    held[0].session.end()
    assert not held[2].session.paused
    first.session.end()
    assert len(held[1].said) == 2
    held[2].session.receive(message("response_headers 504"))
    assert gateway.reception.kept.used_bytes == 0


def test_a_refused_request_keeps_nothing_of_its_body():
    gateway = Gateway(A, policy=Policy(classes=(RequestClass("default", 0, 2.0),)))
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    held = gateway.stream()
    held.play("> opening", "> request_body ab", opening=opening(DUPLEX))
    gateway.clock.advance(2.1)
    assert spoken(held.said[0]) == "refuse 429"
    assert gateway.reception.kept.used_bytes == 0


def test_a_body_that_is_here_whole_is_no_reason_not_to_listen():
    gateway = Gateway(A)
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX))
    held = gateway.stream(resets=True)
    held.play("> opening", f"> request_body {'x' * KEPT_BYTES}|", opening=opening(DUPLEX))
    assert not held.session.paused


def test_buffered_a_pick_asks_for_no_bodies_and_where_they_come_all_the_same_they_just_go_on():
    stream = Gateway(A).stream()
    stream.play(
        "> opening", f"< pick {A} lean",
        "> request_body abcd|", "< request_body",
        "> response_headers 200", "< response_headers",
        "> response_body 1234|", "< response_body",
        opening=opening(BUFFERED),
    )  # fmt: skip


def test_buffered_the_whole_answer_in_one_piece_gives_the_lease_back():
    gateway = Gateway(A)
    gateway.stream().play(
        *("> opening", f"< pick {A} lean", "> response_headers 200", "< response_headers"),
        *("> response_body 1234|", "< response_body"),
        opening=opening(BUFFERED, body=False),
    )
    assert gateway.in_flight() == {"a": 0}


@pytest.mark.parametrize(
    ("modes", "echoes"),
    [((MODE.NONE, MODE.FULL_DUPLEX_STREAMED), "response"), ((MODE.FULL_DUPLEX_STREAMED, MODE.NONE), "request")],
)
def test_one_body_alone_may_be_full_duplex_and_then_no_other_mode_is_asked_for(modes, echoes):
    stream = Gateway(A).stream()
    stream.play("> opening", f"< pick {A}", opening=opening(modes))
    stream.play(f"> {echoes}_body x", f"< {echoes}_body x")


def test_without_bodies_two_messages_are_all():
    gateway = Gateway(A)
    stream = gateway.stream()
    stream.play("> opening", f"< pick {A}", "> response_headers 200", "< response_headers", opening=opening(LEAN))
    assert gateway.in_flight() == {"a": 1}
    stream.session.end()
    assert gateway.in_flight() == {"a": 0}


# ---- the model in a body


def test_the_model_is_read_from_a_body_if_asked_and_a_header_wins_without_a_look():
    gateway = Gateway(A, B, models={"a": {"m1"}, "b": {"m2"}}, read_model=True)
    stream = gateway.stream()
    stream.play("> opening", '> request_body {"stream": true, "mod', opening=opening(DUPLEX))
    rest = 'el": "m2", "messages": [{"role": "user", "content": "What is it that looks for me?'
    stream.play(f"> request_body {rest}", f"< pick {B}",
                '< request_body {"stream": true, "mod', f"< request_body {rest}")  # fmt: skip
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX, x_model="m1"))


@pytest.mark.parametrize(
    ("answers", "ask"),
    [(MODE.BUFFERED, "ask BUFFERED"), (MODE.NONE, "ask BUFFERED"), (MODE.FULL_DUPLEX_STREAMED, "ask")],
)
def test_a_gateway_that_buffers_is_asked_for_the_body_and_the_pick_is_the_answer_to_it(answers, ask):
    gateway = Gateway(A, B, models={"a": {"m1"}, "b": {"m2"}}, read_model=True)
    stream = gateway.stream()
    spoofed = opening((MODE.BUFFERED, answers), **{wire.PICK_HEADER: A})
    stream.play("> opening", f"< {ask}", '> request_body {"model": "m2"}|', f"< pick {B} in body", opening=spoofed)
    assert gateway.in_flight() == {"a": 0, "b": 1}
    stream.play("> request_trailers", "< request_trailers", "> response_headers 200", "< response_headers")
    stream.session.end()
    assert gateway.in_flight() == {"a": 0, "b": 0}
    gateway.stream().play("> opening", f"< pick {A}{' lean' if 'B' in ask else ''}",
                          opening=opening((MODE.BUFFERED, answers), x_model="m1"))  # fmt: skip


def test_a_buffered_request_waits_with_its_body_here_and_a_refusal_is_the_answer_to_that():
    gateway = Gateway(A, models={"a": {"m"}}, read_model=True)
    gateway.stream().play("> opening", f"< pick {A} lean", opening=opening(BUFFERED, x_model="m"))
    held, refused = gateway.stream(), gateway.stream()
    held.play("> opening", "< ask BUFFERED", '> request_body {"model": "m"}|', opening=opening(BUFFERED))
    assert gateway.gate.waiting == 1
    refused.play("> opening", "< ask BUFFERED", '> request_body {"model": "n"}|', "< refuse 404",
                 opening=opening(BUFFERED))  # fmt: skip
    held.session.end()
    assert gateway.gate.waiting == 0


def test_a_buffered_body_without_a_model_is_offered_as_it_is_and_may_come_with_trailers():
    gateway = Gateway(A, read_model=True)
    stream = gateway.stream()
    stream.play("> opening", "< ask BUFFERED", "> request_body {}", f"< pick {A} in body", "> request_trailers",
                "< request_trailers", opening=opening(BUFFERED))  # fmt: skip


def test_what_has_trailers_and_no_body_is_refused_where_a_body_was_asked_for_and_takes_no_slot():
    """Its headers are answered already: nothing else could keep it from going where no pick sent it."""
    gateway = Gateway(A, read_model=True)
    stream = gateway.stream()
    stream.play("> opening", "< ask BUFFERED", "> request_trailers", "< refuse 400", opening=opening(BUFFERED))
    assert gateway.in_flight() == {"a": 0}


def test_what_envoy_answers_by_itself_while_its_body_was_asked_for_just_goes_on():
    gateway = Gateway(A, read_model=True)
    stream = gateway.stream()
    stream.play("> opening", "< ask BUFFERED", "> response_headers 413|", "< response_headers",
                opening=opening(BUFFERED))  # fmt: skip


def test_a_buffered_body_may_take_its_time_and_is_served_in_a_drain_too_if_there_is_room():
    """Nothing is held meanwhile but the stream; and a pick can be told as the answer to a body alone."""
    gateway = Gateway(A, read_model=True)
    one, other = gateway.stream(), gateway.stream()
    for stream in (one, other):
        stream.play("> opening", "< ask BUFFERED", opening=opening(BUFFERED))
    gateway.clock.advance(10 * READING_S)
    gateway.reception.drain()
    assert [len(stream.said) for stream in (one, other)] == [1, 1]
    one.play("> request_body {}|", f"< pick {A} in body")
    other.play("> request_body {}|", "< refuse 503")


def test_of_a_buffered_body_no_more_is_looked_at_than_where_a_model_may_stand_and_none_is_remembered():
    gateway = Gateway(A, read_model=True)
    late = gateway.stream()
    long = message('request_body {"messages": "' + "x" * (8 << 20) + '", "model": "m"}|')
    late.session.receive(opening(BUFFERED))
    tracemalloc.start()
    late.session.receive(long)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert spoken(late.said[1]) == f"pick {A} in body"
    assert gateway.gate.controller.endpoints["a"].sequences == 1
    assert kept < 200_000
    assert peak < len(long) + 1_000_000


def test_where_envoy_reads_bodies_itself_none_is_asked_for_and_none_is_missed(caplog):
    gateway = Gateway(A, B, models={"a": {"m1"}, "b": {"m2"}}, limit=3, read_model=True, fields_namespace="fields")
    for modes, lean in ((BUFFERED, " lean"), (LEAN, "")):
        named = told(opening(modes), "fields", "model", "m2", as_list=False)
        gateway.stream().play("> opening", f"< pick {B}{lean}", opening=named)
    gateway.stream().play("> opening", "< refuse 400", opening=opening(LEAN))
    assert caplog.records == []


@pytest.mark.parametrize("modes", [LEAN, (MODE.STREAMED, MODE.NONE), (MODE.BUFFERED_PARTIAL, MODE.NONE)])
def test_where_no_body_comes_before_a_pick_the_log_says_once_that_no_model_is_read(modes, caplog):
    gateway = Gateway(A, limit=3, read_model=True)
    with caplog.at_level(logging.WARNING, "extproc"):
        gateway.stream().play("> opening", f"< pick {A}", opening=opening(LEAN, x_model="m"))
        gateway.stream().session.receive(opening(modes, body=False))
        assert caplog.records == []
        for _ in range(2):
            gateway.stream().session.receive(opening(modes))
    assert [record.message.partition(":")[0] for record in caplog.records] == ["picker.read_model"]


def test_a_body_that_names_no_model_is_offered_when_it_ends_or_is_too_long_to_look_on():
    gateway = Gateway(A, limit=3, read_model=True)
    gateway.stream().play("> opening", "> request_body {}|", f"< pick {A}", "< request_body {}|",
                          opening=opening(DUPLEX))  # fmt: skip
    long = '{"messages": "' + "x" * bodies.MODEL_WITHIN
    gateway.stream().play("> opening", f"> request_body {long}", f"< pick {A}", f"< request_body {long}",
                          opening=opening(DUPLEX))  # fmt: skip


def test_a_body_that_does_not_come_is_waited_for_only_so_long():
    gateway = Gateway(A, read_model=True)
    stream = gateway.stream()
    stream.play("> opening", "> request_body {", opening=opening(DUPLEX))
    gateway.clock.advance(READING_S - 0.1)
    assert stream.said == []
    gateway.clock.advance(0.2)
    assert list(map(spoken, stream.said)) == [f"pick {A}", "request_body {"]
    stream.play('> request_body "model": "m"}|', '< request_body "model": "m"}|')


def test_of_too_many_bodies_that_do_not_come_the_oldest_has_had_its_time(monkeypatch):
    gateway = Gateway(A, read_model=True)
    gateway.reception.reading._most = 2
    streams = [gateway.stream() for _ in range(3)]
    for stream in streams:
        stream.session.receive(opening(DUPLEX))
    gateway.clock.advance(CROWDED_S - 0.1)
    assert [stream.said for stream in streams] == [[], [], []], "many come in one moment on a good day, too"
    gateway.clock.advance(0.2)
    assert [list(map(spoken, stream.said)) for stream in streams] == [[f"pick {A}"], [], []]
    for stream in streams:
        stream.session.end()
    assert not gateway.reception.reading._began


def test_a_drain_waits_for_no_body():
    gateway = Gateway(A, read_model=True)
    gateway.stream().play("> opening", f"< pick {A}", opening=opening(DUPLEX, x_model="m"))
    read = gateway.stream()
    read.session.receive(opening(DUPLEX))
    read.session.receive(message('request_body {"model": "m"}'))
    gateway.clock.advance(0.1)
    before = gateway.stream()
    before.play("> opening", opening=opening(DUPLEX))
    gateway.reception.drain()
    assert list(map(spoken, before.said)) == ["refuse 503"]
    gateway.stream().play("> opening", "< refuse 503", opening=opening(DUPLEX))


def test_whose_model_was_not_read_before_a_drain_is_told_of_that_and_not_that_it_named_none():
    gateway = Gateway(A, B, limit=4, models={"a": {"m"}, "b": {"n"}}, read_model=True)
    before, asked = gateway.stream(), gateway.stream()
    before.play("> opening", '> request_body {"messages": "', opening=opening(DUPLEX))
    asked.play("> opening", "< ask BUFFERED", opening=opening(BUFFERED))
    gateway.reception.drain()
    assert list(map(spoken, before.said)) == ["refuse 503"]
    asked.play('> request_body {"model": "n"}|', f"< pick {B} in body")
    for modes in (DUPLEX, BUFFERED):
        gateway.stream().play("> opening", "< refuse 503", opening=opening(modes))


def test_a_body_in_one_byte_pieces_is_looked_at_a_few_times_and_never_beyond_where_a_model_may_stand(monkeypatch):
    looked = []
    monkeypatch.setattr(bodies, "model_in", lambda text: looked.append(len(text)))
    stream = Gateway(A, read_model=True).stream()
    stream.session.receive(opening(DUPLEX))
    piece = message("request_body x")
    for _ in range(bodies.MODEL_WITHIN - 1):
        stream.session.receive(piece)
    assert not stream.said
    stream.session.receive(message(f"request_body {'x' * (1 << 20)}"))
    assert spoken(stream.said[0]) == f"pick {A}"
    assert max(looked) == bodies.MODEL_WITHIN
    assert sum(looked) < 1.5 * bodies.MODEL_WITHIN


@pytest.mark.parametrize(
    "text",
    ['{"a":' + "[" * bodies.MODEL_WITHIN, '{"a":[' + "1," * 40_000, '{"a":[' + '"",' * 40_000,
     '{"a":[' + "[[]" * 40_000,
     '{"a":{' + '"model":1,' * 10_000, '{"a":[' + '{"model":1},' * 10_000, '"model"' * 10_000, '{"' + '\\"' * 40_000],
    ids=["deep", "numbers", "texts", "lists", "names deeper down", "names in objects", "names", "no end"],
)  # fmt: skip
def test_a_body_is_searched_in_few_calls_whatever_is_in_it(text):
    calls = []
    sys.setprofile(lambda _frame, event, _of: calls.append(event))
    try:
        bodies.model_in(text[: bodies.MODEL_WITHIN - 7].encode() + b'"model"')
    finally:
        sys.setprofile(None)
    assert len(calls) < 12_000


def test_a_model_behind_a_prompt_of_tokens_is_found():
    text = '{"prompt": [' + "12, " * 16_000 + '7], "model": "m"}'
    assert bodies.model_in(text.encode()) == "m"


def test_a_model_that_is_no_text_in_utf_8_becomes_one():
    for text in (b'{"model": "a\\ud800b"}', b'{"model": "a\xed\xa0\x80b"}'):
        (bodies.model_in(text) or "no model").encode()


@pytest.mark.parametrize(
    ("text", "model"),
    [('{"model": "m"}', "m"), ('{"messages": [{"model": "no"}], "model" :"a\\/b", "x', "a/b"), ('{"model": "cut', None),
     ('{"a": "model", "model"', None), ("[]", None), ('{"model": 5, "model": "later"}', None), ("", None),
     ('{"q": "\\"model\\": 1", "model": "m"}', "m"), ("not json", None), ("}}}{{{", None),
     ('{"model": {"name": "m"}}', None), ('{"model": ["a"]}', None), ('{"model": [], "x": "a"}', None),
     ('{"model": "model"}', "model"), ('{"x": "model", "model": "m"}', "m"), ('{"model": "a" "b"}', "a"),
     ('{"a": {"model": "no"}, "b": "}", "c": "\\\\", "model": "m"}', "m"),
     ('{"a": ' + "[" * 5000, None), ('"' + "\\" * 60_001, None)],
)  # fmt: skip
def test_only_a_top_level_model_counts_and_strange_bodies_have_none(text, model):
    assert bodies.model_in(text.encode()) == model
