"""An endpoint's limit of requests, fixed or adaptive, as the core keeps it."""

from __future__ import annotations

from math import inf

import pytest

from extproc.admission.limit import DEFAULT_LAW, AdaptiveLimit
from extproc.admission.load import Load
from extproc.admission.slowdown import EVERY, Slowdown
from extproc.admission.ticket import State
from extproc.admission.values import Answer, RequestClass

from .desk import Desk, in_use, one, slow


def test_an_endpoint_gets_no_more_requests_than_its_limit() -> None:
    desk = Desk(one("a", 3))
    assert in_use(desk.fill(5)) == [True] * 3 + [False] * 2


def test_lowering_a_limit_lets_leases_finish() -> None:
    desk = Desk(one("a", 4))
    tickets = desk.fill(6)
    desk.put(one("a", 2))
    assert sum(in_use(tickets)) == 4
    desk.release(tickets[0])
    desk.release(tickets[1])
    assert sum(in_use(tickets)) == 2
    desk.release(tickets[2])
    assert tickets[4].state is State.LEASED


def test_an_unchanged_spec_keeps_what_the_adaptive_limit_learnt() -> None:
    desk = Desk(one("a", None))
    desk.observe("a", Load(preemptions=1))
    learnt = desk.endpoint("a").limit.value
    desk.put(one("a", None, kv_capacity_tokens=5))
    assert desk.endpoint("a").limit.value == learnt < DEFAULT_LAW.start


def test_the_limit_grows_only_while_it_holds_somebody_back() -> None:
    desk = Desk(one("a", None))
    desk.ask()
    desk.observe("a", slow(0.02))
    assert desk.endpoint("a").limit.value == DEFAULT_LAW.start
    desk.fill(DEFAULT_LAW.start)
    desk.advance(1.0)
    desk.observe("a", slow(0.02))
    assert desk.endpoint("a").limit.value == int(DEFAULT_LAW.leap * DEFAULT_LAW.start)
    assert not desk.waiting


def test_an_endpoints_limit_is_steered_by_what_passed_between_two_readings() -> None:
    desk = Desk(one("a", None))
    desk.ask()
    desk.observe("a", slow(0.5))
    assert desk.endpoint("a").limit.value == int(DEFAULT_LAW.start * 0.85), "the first counts as a second"
    desk.advance(0.5)
    desk.observe("a", slow(0.5))
    assert desk.endpoint("a").limit.value == int(DEFAULT_LAW.start * 0.85**1.5)


def test_an_endpoints_limit_stays_at_what_is_right_for_those_in_flight() -> None:
    desk = Desk(one("a", None))
    desk.fill(DEFAULT_LAW.start)
    desk.observe("a", slow(0.09))
    assert desk.endpoint("a").limit.value == int(DEFAULT_LAW.start * DEFAULT_LAW.tpot_s / 0.09)


def test_a_limit_that_is_reached_does_not_grow_while_nobody_waits() -> None:
    desk = Desk(one("a", None))
    desk.fill(DEFAULT_LAW.start)
    desk.observe("a", slow(0.02))
    assert desk.endpoint("a").limit.value == DEFAULT_LAW.start


@pytest.mark.parametrize(
    ("capacity", "usage", "factor"), [(10_000, 0.5, 1.0), (10_000, None, 0.9), (None, 0.5, 0.9), (None, None, 0.9)]
)
def test_preemptions_are_a_reason_for_fewer_requests_unless_kv_tokens_are_counted(
    capacity: int | None, usage: float | None, factor: float
) -> None:
    desk = Desk(one("a", None, kv_capacity_tokens=capacity))
    desk.observe("a", Load(kv_usage=usage, preemptions=1))
    assert desk.endpoint("a").limit.value == int(DEFAULT_LAW.start * factor)


# ---- requests that are several sequences


def test_a_request_takes_as_much_of_the_limit_as_it_is_sequences_for_the_engine() -> None:
    desk = Desk(one("a", 8))
    first, second, third = desk.ask(sequences=5), desk.ask(sequences=4), desk.ask(sequences=3)
    assert in_use([first, second, third]) == [True, False, True]
    desk.release(first)
    assert second.state is State.LEASED
    desk.release(second)
    desk.release(third)
    assert desk.endpoint("a").sequences == 0


def test_a_request_of_more_sequences_than_the_limit_goes_alone() -> None:
    desk = Desk(one("a", 8))
    (holder,) = desk.fill(1)
    many = desk.ask(sequences=64)
    assert many.state is State.WAITING
    desk.release(holder)
    assert many.state is State.LEASED
    assert desk.ask().state is State.WAITING


# ---- what the engine says and shows


def test_an_endpoint_gets_no_more_than_its_engine_says_that_it_runs_at_once() -> None:
    desk = Desk(one("a", None))
    desk.observe("a", Load(running=0.0, waiting=0.0, max_running=3))
    tickets = desk.fill(6)
    assert in_use(tickets) == [True] * 3 + [False] * 3
    desk.advance(1.0)
    desk.observe("a", Load(running=3.0, waiting=0.0, tokens_per_s=300.0, max_running=5))
    assert in_use(tickets) == [True] * 5 + [False]


def test_a_queue_inside_the_engine_becomes_our_queue() -> None:
    desk = Desk(one("a", None))
    desk.observe("a", Load(running=0.0, waiting=0.0, tokens_per_s=0.0))
    tickets = desk.fill(30)
    for _ in range(DEFAULT_LAW.queued_readings):
        desk.advance(1.0)
        desk.observe("a", Load(running=6.0, waiting=10.0, tokens_per_s=300.0))
    assert desk.endpoint("a").limit.value == 6
    for ticket in tickets[:10]:
        desk.release(ticket, Answer.OK)
    assert len(desk.endpoint("a").leases) == 6


def test_an_endpoint_without_telemetry_is_sent_more_with_each_answer_and_not_without_end() -> None:
    desk = Desk(one("a", None), classes=(RequestClass("std", 0, 1e9),))
    waiting = desk.fill(100)
    for _ in range(800):
        held = list(desk.endpoint("a").leases)
        desk.advance((1.0 + 0.5 * len(held)) / len(held))  # as many at once as ever make each half a second longer
        desk.release(held[0], Answer.OK)
        desk.ask("next")
    assert len(waiting) > len(desk.endpoint("a").leases)
    assert DEFAULT_LAW.floor <= desk.endpoint("a").limit.value < 30


def test_a_failed_answer_teaches_a_blind_limit_nothing() -> None:
    desk = Desk(one("a", None))
    for ticket in desk.fill(30)[:4]:
        desk.release(ticket, Answer.FAILED)
    assert desk.endpoint("a").limit.value == DEFAULT_LAW.start


def test_answers_raise_a_blind_limit_only_while_it_is_full_and_more_wait() -> None:
    desk = Desk(one("a", None))
    limit = desk.endpoint("a").limit
    full = desk.fill(limit.value)
    assert desk.core.waiting == 0
    desk.advance(1.0)
    desk.release(full.pop(), Answer.OK)
    assert limit.value == DEFAULT_LAW.start, "nobody waits for more"
    desk.fill(2)
    assert desk.core.waiting == 1
    desk.advance(1.0)
    desk.release(full.pop(), Answer.OK)
    assert limit.value == DEFAULT_LAW.start + 1


def test_a_blind_limit_says_that_answers_set_it_up_and_down() -> None:
    limit = AdaptiveLimit()
    limit.learn(1.0, 2.0, wanted=True)
    assert (limit.value, limit.why) == (DEFAULT_LAW.start + 1, "answers")
    limit.why, limit.slowdown.most = "batch", 5.0
    limit.learn(1.0, 2.0, wanted=False)
    assert (limit.value, limit.why) == (DEFAULT_LAW.start, "answers")
    limit.start_at(5)
    limit.why = "start"
    limit.learn(1.0, 2.0, wanted=False)
    assert (limit.value, limit.why) == (5, "start")


def test_an_answer_ran_beside_as_many_as_ran_in_the_middle_between_its_begin_and_its_end() -> None:
    desk, expected = Desk(one("a", None)), Slowdown()
    for ticket in desk.fill(EVERY):
        desk.advance(1.0)
        desk.release(ticket, Answer.OK)
        expected.learn(desk.now - ticket.leased_at, (EVERY + 1) / 2)  # one more each came, one less each went
    limit = desk.endpoint("a").limit
    assert isinstance(limit, AdaptiveLimit)
    assert limit.slowdown.most == pytest.approx(expected.most)
    assert limit.slowdown.most < inf
