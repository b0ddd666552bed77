"""When a prompt counts as computed: seen, counted or predicted."""

from __future__ import annotations

import pytest

from extproc.admission.prefill import FIRST_SPEED, LEAST_SPEED, MOST_SPEED, Prefill
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Request

WORK = 800
LASTS = WORK / FIRST_SPEED


def sent(prefill: Prefill, now: float, work: int = WORK) -> Ticket:
    ticket = Ticket(Request("r", now))
    ticket.work_tokens = ticket.prompt_tokens = work
    ticket.state = State.LEASED
    prefill.add(ticket, now)
    return ticket


def counting() -> Prefill:
    prefill = Prefill()
    prefill.observe(0, 1.0, 0.0)
    return prefill


def test_nothing_is_predicted_before_the_engines_count_was_seen() -> None:
    prefill = Prefill()
    ticket = sent(prefill, 0.0)
    assert prefill.next_change() is None
    assert not prefill.pass_time(1e9)
    prefill.done(ticket, 1.0)
    assert (prefill.tokens, ticket.prompt_pending) == (0, False)


def test_prompts_are_predicted_one_after_the_other_at_the_engines_pace() -> None:
    prefill = counting()
    first, second = sent(prefill, 0.0), sent(prefill, 0.0)
    assert prefill.next_change() == pytest.approx(LASTS)
    assert prefill.pass_time(LASTS)
    assert (first.prompt_pending, second.prompt_pending, prefill.tokens) == (False, True, WORK)
    assert prefill.next_change() == pytest.approx(2 * LASTS)
    assert prefill.pass_time(10.0)
    assert prefill.tokens == 0


def test_the_engines_count_comes_before_the_prediction() -> None:
    prefill = counting()
    first, second = sent(prefill, 0.999), sent(prefill, 0.999)
    prefill.observe(1, 1.0, 1.0)
    assert (first.prompt_pending, second.prompt_pending) == (False, True)


def test_an_answer_that_is_over_tells_of_all_prompts_before_it() -> None:
    prefill = counting()
    older, over, newer = sent(prefill, 0.99), sent(prefill, 0.99), sent(prefill, 0.99)
    prefill.pass_time(0.99 + 2.5 * LASTS)
    over.state = State.DONE
    prefill.observe(0, 1.0, 1.3)
    assert prefill.tokens == WORK
    assert (older.prompt_pending, newer.prompt_pending) == (False, True)


def test_a_client_that_left_before_its_first_token_says_nothing_of_others() -> None:
    prefill = counting()
    older, gone = sent(prefill, 0.0), sent(prefill, 0.0)
    prefill.done(gone, 0.01)
    gone.state = State.DONE
    prefill.observe(0, 1.0, 0.02)
    assert older.prompt_pending


def test_an_engine_that_is_faster_than_thought_is_sent_more_and_a_slower_one_less() -> None:
    fast, slow = counting(), counting()
    for second in range(1, 40):
        for prefill, counted in ((fast, 100), (slow, 1)):
            for number in range(100):
                prefill.pass_time(second - 1 + number / 100)
                sent(prefill, second - 1 + number / 100)
            prefill.pass_time(float(second))
            prefill.observe(counted, 1.0, float(second))
    assert FIRST_SPEED < fast._speed <= MOST_SPEED
    assert LEAST_SPEED <= slow._speed < FIRST_SPEED


def test_where_others_use_the_engine_too_shares_of_first_tokens_add_up() -> None:
    prefill = counting()
    tickets = [sent(prefill, 0.999) for _ in range(3)]
    prefill.observe(0.5, 0.0, 0.999)
    assert all(ticket.prompt_pending for ticket in tickets)
    prefill.observe(0.5, 0.0, 0.999)
    assert [ticket.prompt_pending for ticket in tickets] == [False, True, True]


def test_a_silent_counter_ends_the_prediction_and_keeps_nothing() -> None:
    prefill = counting()
    sent(prefill, 0.0)
    prefill.forget()
    assert prefill.next_change() is None
    assert not prefill._uncounted
