"""Counters that lie: flagged, not believed, and no reason to close an endpoint."""

from __future__ import annotations

import math

import pytest

from extproc.admission.counters import Counters, Usual
from extproc.admission.laws import LAWS
from extproc.admission.limit import AdaptiveLimit
from extproc.admission.load import Load
from extproc.admission.values import Answer, EndpointSpec

from .desk import GUESS, Desk


def serve(desk: Desk, rounds: int, **tokens: int) -> None:
    """Answers at each endpoint, which then counts so many tokens for each."""
    for _ in range(rounds):
        tickets = desk.fill(3 * len(tokens))
        desk.advance(1.0)
        ended = dict.fromkeys(tokens, 0)
        for ticket in tickets:
            where = desk.where(ticket)
            assert where is not None
            ended[where] += 1
            desk.release(ticket, Answer.OK)
        for name, each in tokens.items():
            made = each * ended[name]
            desk.observe(name, Load(running=3.0, waiting=0.0, tokens_per_s=float(made), output_tokens=made))


def doubted(desk: Desk) -> set[str]:
    return {name for name, endpoint in desk.core.endpoints.items() if endpoint.counters.doubted}


@pytest.mark.parametrize("lie", [20, 20_000, 0], ids=["a tenth", "hundredfold", "stuck"])
def test_an_engine_whose_counters_are_far_from_its_peers_is_not_believed(lie: int) -> None:
    desk = Desk(*(EndpointSpec(name) for name in "abcd"))
    serve(desk, 50, a=200, b=200, c=200, d=lie)
    assert doubted(desk) == {"d"}
    limit = desk.endpoint("d").limit
    assert isinstance(limit, AdaptiveLimit)
    assert limit.blind, "its answers' times make its limit"
    assert limit.value >= limit.law.floor
    assert 100 < desk.ask().output_tokens < 600, "what it taught before is bounded"


def test_answers_that_ended_while_no_page_was_read_are_not_held_against_the_first_counts() -> None:
    """Who has followed another sidecar has answers, and pages only when it leads: it took them for four times as short
    as they were, believed no engine's counters for a minute, and forgot what steps cost."""
    desk = Desk(*(EndpointSpec(name) for name in "ab"))
    for _ in range(100):
        for ticket in desk.fill(6):
            desk.release(ticket, Answer.OK)
    for name in "ab":
        desk.observe(name, Load(running=0.0, waiting=0.0))
    serve(desk, 20, a=GUESS, b=GUESS)
    assert doubted(desk) == set()
    assert desk.endpoint("a").steps.readings > 0
    assert desk.ask().output_tokens == pytest.approx(GUESS, rel=0.1)


def test_what_counters_taught_of_steps_goes_when_they_are_doubted_and_not_before() -> None:
    desk = Desk(*(EndpointSpec(name) for name in "abcd"))
    serve(desk, 3, a=200, b=200, c=200, d=20_000)
    assert doubted(desk) == set()
    assert desk.endpoint("d").steps.readings > 0
    serve(desk, 50, a=200, b=200, c=200, d=20_000)
    assert {name: desk.endpoint(name).steps.readings > 0 for name in "ad"} == {"a": True, "d": False}


def test_of_two_that_differ_neither_is_believed_and_both_go_on_serving() -> None:
    desk = Desk(*(EndpointSpec(name) for name in "ab"))
    serve(desk, 50, a=200, b=20_000)
    assert doubted(desk) == {"a", "b"}
    assert {desk.where(ticket) for ticket in desk.fill(2)} == {"a", "b"}


def test_who_says_what_the_others_say_is_believed_again() -> None:
    desk = Desk(*(EndpointSpec(name) for name in "ab"))
    serve(desk, 50, a=200, b=20_000)
    serve(desk, 200, a=200, b=200)
    assert doubted(desk) == set()


def test_answers_that_differ_by_what_is_asked_of_each_are_no_reason_for_doubt() -> None:
    desk = Desk(*(EndpointSpec(name) for name in "abc"))
    serve(desk, 100, a=100, b=200, c=400)
    assert doubted(desk) == set()


@pytest.mark.parametrize("length", [0, 3000], ids=["of embeddings", "that thinks"])
def test_a_model_whose_answers_are_of_another_length_is_no_reason_for_doubt(length: int) -> None:
    """Its engines were held against all others, too: none of their counters was believed."""
    desk = Desk(*(EndpointSpec(name, models=frozenset({model})) for name, model in zip("abcd", "xxyy", strict=True)))
    lengths = {"a": 200, "b": 200, "c": length, "d": length}
    for _ in range(50):
        ended = dict.fromkeys(lengths, 0)
        tickets = [desk.ask(model=model) for model in "xxxyyy"]
        desk.advance(1.0)
        for ticket in tickets:
            ended[desk.where(ticket) or ""] += 1
            desk.release(ticket, Answer.OK)
        for name, each in lengths.items():
            made = each * ended[name]
            desk.observe(name, Load(running=3.0, waiting=0.0, tokens_per_s=float(made), output_tokens=made))
    assert doubted(desk) == set()


def test_an_engine_alone_is_believed_whatever_it_says() -> None:
    desk = Desk(EndpointSpec("a"))
    serve(desk, 50, a=20_000)
    assert doubted(desk) == set()


def test_connections_that_fail_say_nothing_of_how_long_answers_are() -> None:
    desk = Desk(*(EndpointSpec(name) for name in "ab"))
    serve(desk, 30, a=200, b=200)
    before = desk.core._tokens._mean
    for ticket in desk.fill(30):
        desk.release(ticket, Answer.FAILED)
    for name in "ab":
        desk.observe(name, Load(running=0.0, waiting=0.0, tokens_per_s=0.0, output_tokens=0))
    assert doubted(desk) == set()
    assert desk.core._tokens._mean == before


def test_a_few_answers_are_no_reason_for_doubt_and_one_more_is() -> None:
    counters, usual = Counters(), Usual()
    usual.follow(math.log(200.0), answers=1, engines=2, memory=LAWS.counters.memory)
    few = int(LAWS.counters.enough) - 1
    counters.follow(20_000 * few, few, usual, 2)
    assert (counters.doubted, usual.log_tokens) == (False, math.log(200.0))
    counters.follow(20_000, 1, usual, 2)
    assert counters.doubted


def test_a_reading_of_more_answers_than_are_remembered_is_what_is_known_then() -> None:
    counters, usual = Counters(), Usual()
    counters.follow(200 * 1000, 1000, usual, 2)
    assert usual.log_tokens == pytest.approx(math.log(200.0))
    counters.follow(300 * 1000, 1000, usual, 2)
    assert usual.log_tokens == pytest.approx((math.log(200.0) + math.log(300.0)) / 2)


def test_what_is_usual_in_a_pool_follows_each_of_its_engines_by_its_share() -> None:
    alone, shared = Usual(), Usual()
    for usual, engines in ((alone, 1), (shared, 2)):
        usual.follow(0.0, answers=1, engines=engines, memory=100)
        usual.follow(1.0, answers=10, engines=engines, memory=100)
    assert (alone.log_tokens, shared.log_tokens) == (pytest.approx(0.1), pytest.approx(0.05))
