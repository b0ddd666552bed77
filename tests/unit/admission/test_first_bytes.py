"""A first byte that is seen: it ends a prompt, and where nothing else tells it teaches what one takes."""

from __future__ import annotations

import pytest

from extproc.admission.prefill import LEAST_TOKEN_S, MOST_TOKEN_S, Prefill

from .prompts import LAW, WORK, costs, count, counting, probed, sent


def test_a_first_byte_that_is_seen_ends_a_prompt_at_once_and_once() -> None:
    prefill = probed()
    first, second = sent(prefill, 0.0), sent(prefill, 0.0)
    for _ in range(2):
        prefill.computed(first, 0.05)
    assert (prefill.tokens, first.prompt_pending, second.prompt_pending) == (WORK, False, True)
    assert first.computed_at == 0.05


def test_a_first_byte_tells_that_prompts_sent_long_before_are_computed_too_where_nothing_else_does() -> None:
    """The answers that don't stream among them would hold room for prompts until patience is over."""
    prefill = probed()
    predicted_s = LAW.patience * 1.5 * WORK * LAW.first_token_s
    tickets = [sent(prefill, at) for at in (0.0, 0.6 * predicted_s, 0.6 * predicted_s)]
    prefill.computed(tickets[1], 0.7 * predicted_s)
    assert [ticket.prompt_pending for ticket in tickets] == [False, False, True]
    assert [ticket.computed_at for ticket in tickets[:2]] == [0.7 * predicted_s] * 2
    assert prefill.tokens == WORK


def test_the_end_of_an_answer_whose_first_byte_was_not_seen_teaches_nothing() -> None:
    prefill = probed()
    limit = prefill.limit
    old, new = sent(prefill, 0.0), sent(prefill, 100.0)
    prefill.computed(new, 100.5)
    assert not old.prompt_pending
    prefill.over(old, 200.0, served=True)
    assert prefill.limit == limit
    assert not prefill.tokens


def test_short_prompts_that_overtake_say_nothing_of_long_ones_sent_shortly_before() -> None:
    """Not all engines take prompts in order: by little ones of theirs clients could have any number sent."""
    prefill = probed()
    long = sent(prefill, 0.0, 3000)
    for number in range(10):
        prefill.computed(sent(prefill, 0.02 * number, 8), 0.02 * number + 0.015)
    assert (long.prompt_pending, prefill.tokens) == (True, 3000)


def test_first_bytes_that_come_soon_allow_more_prompts_under_way() -> None:
    prefill = probed()
    for number in range(200):
        streamed(prefill, 10.0 * number, 0.01, 5.0)
    assert prefill.limit == pytest.approx(LAW.ahead_s / 1e-5, rel=2 * (LAW.nudge - 1))


def test_an_answer_that_does_not_stream_has_its_prompt_computed_after_a_while() -> None:
    """Its first byte comes at its end, a minute later: its prompt must not hold others up for so long."""
    prefill = probed()
    sent(prefill, 0.0, 100)
    assert prefill.next_change() == pytest.approx(LAW.patience * 1.5 * 100 * LAW.first_token_s)
    assert prefill.pass_time(1.0)
    huge = sent(prefill, 1.0, 1_000_000)
    assert prefill.next_change() == 1.0 + LAW.patience_s
    prefill.pass_time(1.0 + LAW.patience_s)
    assert (prefill.tokens, huge.prompt_pending) == (0, False)


def streamed(prefill: Prefill, now: float, took_s: float, answer_s: float) -> None:
    ticket = sent(prefill, now, 1000)
    prefill.computed(ticket, now + took_s)
    prefill.over(ticket, now + took_s + answer_s, served=True)


@pytest.mark.parametrize("prompt_s", [2e-5, 5e-4])
def test_where_nothing_else_tells_first_bytes_teach_what_a_prompt_token_takes(prompt_s: float) -> None:
    prefill = probed()
    for number in range(200):
        streamed(prefill, 10.0 * number, 1000 * prompt_s, 5.0)
    assert prefill._token_s == pytest.approx(prompt_s, rel=2 * (LAW.nudge - 1))


def test_the_first_byte_of_an_answer_that_does_not_stream_teaches_nothing() -> None:
    prefill = probed()
    streamed(prefill, 0.0, 0.1, 0.001)
    assert prefill._token_s == LAW.first_token_s


def burst(prefill: Prefill, now: float, works: tuple[int, ...], took_s: float, gap_s: float) -> float:
    """Have an engine compute prompts in one step; return when their answers are over."""
    tickets = [sent(prefill, now, work) for work in works]
    for number, ticket in enumerate(tickets):
        prefill.computed(ticket, now + took_s + gap_s * number)
    for ticket in tickets:
        prefill.over(ticket, now + 5.0, served=True)
    return now + 5.0


@pytest.mark.parametrize("gap_s", [0.0, 2e-5])
def test_first_bytes_that_come_together_are_one_measurement_of_all_their_prompts(gap_s: float) -> None:
    """Each but the first seems to have taken microseconds."""
    prefill, now = probed(), 0.0
    for _ in range(200):
        now = burst(prefill, now, (500,) * 8, 0.4, gap_s)
    assert prefill._token_s == pytest.approx(1e-4, rel=2 * (LAW.nudge - 1))


def test_a_burst_begins_with_its_oldest_prompt_and_teaches_once() -> None:
    prefill = probed()
    late, early = (sent(prefill, at, 1000) for at in (0.19, 0.0))
    for ticket in (late, early):
        prefill.computed(ticket, 0.25)
    for ticket in (late, early):
        prefill.over(ticket, 5.0, served=True)
    assert prefill._token_s == pytest.approx(LAW.first_token_s * LAW.nudge)


def test_a_first_byte_ends_prompts_sent_with_it_whose_time_is_over() -> None:
    prefill = probed()
    older, seen = sent(prefill, 0.0), sent(prefill, 0.0)
    prefill.computed(seen, older.computed_at)
    assert prefill.tokens == 0


def test_short_prompts_do_not_teach_what_a_token_takes() -> None:
    """What they take are the engine's steps, and what comes a moment after another took no time at all."""
    prefill, now = probed(), 0.0
    for _ in range(100):
        now = burst(prefill, now, (10,) * 8, 0.03, 0.0)
        now = burst(prefill, now, (0,), 0.03, 0.0)
    assert prefill._token_s == LAW.first_token_s


def test_first_bytes_of_short_prompts_do_not_make_a_long_one_seem_quicker() -> None:
    prefill = probed()
    for second in range(100):
        now = 10.0 * second
        long, short = sent(prefill, now, 2000), sent(prefill, now + 0.18, 8)
        prefill.computed(short, now + 0.19)
        prefill.computed(long, now + 0.2)
        prefill.over(short, now + 1.0, served=True)
        prefill.over(long, now + 5.0, served=True)
    assert prefill._token_s == pytest.approx(1e-4, rel=2 * (LAW.nudge - 1))


def test_the_ends_of_answers_that_do_not_stream_do_not_make_a_prompt_seem_quicker() -> None:
    prefill = probed()
    for second in range(100):
        now = 10.0 * second
        whole, streams = sent(prefill, now - 5.0, 2000), sent(prefill, now, 2000)
        prefill.pass_time(now)
        prefill.computed(whole, now + 0.19)
        prefill.over(whole, now + 0.191, served=True)
        prefill.computed(streams, now + 0.2)
        prefill.over(streams, now + 5.0, served=True)
    assert prefill._token_s == pytest.approx(1e-4, rel=2 * (LAW.nudge - 1))


def test_first_bytes_that_come_after_their_prediction_teach_too() -> None:
    """Else what was learned of cached prompts would stay for ever: those that are not come too late to be seen."""
    prefill = probed()
    for number in range(300):
        prompt_s = 1e-5 if number < 100 else 2e-4
        ticket = sent(prefill, 10.0 * number, 1000)
        prefill.pass_time(10.0 * number + 1000 * prompt_s)
        prefill.computed(ticket, 10.0 * number + 1000 * prompt_s)
        prefill.over(ticket, 10.0 * number + 5.0, served=True)
    assert prefill._token_s == pytest.approx(2e-4, rel=2 * (LAW.nudge - 1))


@pytest.mark.parametrize(("took_s", "token_s"), [(0.0, LEAST_TOKEN_S), (3000.0, MOST_TOKEN_S)])
def test_the_pace_stays_one_of_engines_whatever_is_seen(took_s: float, token_s: float) -> None:
    prefill = probed()
    for number in range(20_000):
        ticket = sent(prefill, 1e5 * number, 1000)
        prefill.computed(ticket, ticket.leased_at + took_s)
        prefill.over(ticket, ticket.leased_at + 9e4, served=True)
    assert prefill._token_s == token_s
    sent(prefill, 3e9, 0)
    assert prefill.next_change() == pytest.approx(3e9)


@pytest.mark.parametrize("cost", [float("inf"), float("nan")])
def test_the_pace_stays_one_of_engines_whatever_its_counters_make(cost: float) -> None:
    prefill = counting(costs(cost, 0.0))
    assert LEAST_TOKEN_S <= prefill._token_s <= MOST_TOKEN_S
    sent(prefill, 1.0, 0)
    assert prefill.next_change() == pytest.approx(1.0)


def test_with_a_count_first_bytes_teach_nothing_and_end_prompts_alone() -> None:
    prefill = counting()
    prefill.probed = True
    before = prefill._token_s
    ticket = sent(prefill, 0.999)
    assert count(prefill, 1, 1.0, 1.0) == [ticket]
    assert ticket.prompt_pending, "the probe tells which, the count only how many"
    streamed(prefill, 1.0, 0.1, 5.0)
    assert prefill._token_s == before
