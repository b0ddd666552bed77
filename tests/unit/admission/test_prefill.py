"""When a prompt counts as computed: counted or predicted (seen: test_first_bytes.py); and how many may be under way."""

from __future__ import annotations

import pytest

from extproc.admission.prefill import LEAST_FRESH, Prefill
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Request

from .prompts import LASTS, LAW, PROMPT_S, STEP_S, TOKEN_S, WORK, costs, count, counting, sent, waits

# ---- predicted


def test_nothing_is_predicted_before_the_engines_count_was_seen() -> None:
    prefill = Prefill()
    ticket = sent(prefill, 0.0)
    assert prefill.next_change() is None
    assert not prefill.pass_time(1e9)
    prefill.over(ticket, 1.0, served=True)
    assert (prefill.tokens, prefill.pending_tokens(), ticket.prompt_pending) == (0, (0, 0), False)


def test_prompts_are_predicted_one_after_the_other_at_the_engines_costs() -> None:
    prefill = counting()
    first, second = sent(prefill, 0.0), sent(prefill, 0.0)
    due = LASTS + waits(WORK)
    assert prefill.next_change() == pytest.approx(due)
    assert not prefill.pass_time(0.99 * due)
    assert prefill.pass_time(1.001 * due)
    assert (first.prompt_pending, second.prompt_pending, prefill.tokens) == (False, True, WORK)
    assert prefill.next_change() == pytest.approx(2 * LASTS + waits(2 * WORK))
    assert prefill.pass_time(10.0)
    assert prefill.tokens == 0


def test_a_prompt_that_comes_in_the_middle_of_a_step_waits_for_the_end_of_that() -> None:
    """Half of one, in the mean: also where its own work is nothing."""
    prefill = counting(costs(base_s=0.2))
    sent(prefill, 5.0, 0)
    assert prefill.next_change() == pytest.approx(5.0 + 0.2 / 2)


def test_a_long_prompt_takes_no_more_of_a_step_than_a_chunk() -> None:
    prefill = counting()
    sent(prefill, 0.0, 50_000)
    assert prefill.next_change() == pytest.approx(50_000 * TOKEN_S + waits(LAW.chunk))


def test_running_sequences_make_the_steps_of_prompts_longer() -> None:
    known, dues = costs(), []
    known.sequence_s = 0.001
    for running in (0.0, 100.0):
        prefill = Prefill()
        prefill.observe(0, 1.0, 0.0, known, running)
        sent(prefill, 0.0)
        dues.append(prefill.next_change())
    assert dues[1] - dues[0] == pytest.approx(0.1 / 2 + 1.5 * WORK * LAW.caution * 0.1 / LAW.chunk)


def test_after_a_pause_a_prompt_begins_when_it_comes() -> None:
    prefill = counting()
    sent(prefill, 0.0)
    prefill.pass_time(10.0)
    sent(prefill, 10.0)
    assert prefill.next_change() == pytest.approx(10.0 + LASTS + waits(WORK))


# ---- counted


def test_the_engines_count_comes_before_the_prediction() -> None:
    prefill = counting()
    first, second = sent(prefill, 0.999), sent(prefill, 0.999)
    assert count(prefill, 1, 1.0, 1.0) == [first]
    assert (first.prompt_pending, second.prompt_pending) == (False, True)


def test_a_count_says_nothing_of_prompts_that_it_was_not_there_for() -> None:
    """The first reading counts what came before anybody looked."""
    prefill = Prefill()
    sent(prefill, 0.0)
    assert count(prefill, 9, 1.0, 1.0) == []


def test_an_answer_that_is_over_tells_of_all_prompts_before_it() -> None:
    prefill = counting()
    older, over, newer = sent(prefill, 0.99), sent(prefill, 0.99), sent(prefill, 0.99)
    prefill.over(over, 1.0, served=True)
    over.state = State.DONE
    assert count(prefill, 0, 1.0, 1.0) == [older, over]
    assert prefill.tokens == WORK
    assert (older.prompt_pending, newer.prompt_pending) == (False, True)


def test_what_an_answer_that_is_over_told_is_not_waited_for_in_the_count() -> None:
    prefill = counting()
    _, over, newer = (sent(prefill, 0.99) for _ in range(3))
    prefill.over(over, 1.0, served=True)
    over.state = State.DONE
    count(prefill, 0, 1.0, 1.0)
    assert count(prefill, 1, 0.0, 1.0) == [newer]
    assert not newer.prompt_pending


def test_a_client_that_left_before_its_first_token_says_nothing_of_others() -> None:
    prefill = counting()
    older, gone = sent(prefill, 0.0), sent(prefill, 0.0)
    prefill.over(gone, 0.01, served=False)
    gone.state = State.DONE
    count(prefill, 0, 0.02, 0.02)
    assert older.prompt_pending


def test_where_others_use_the_engine_too_shares_of_first_tokens_add_up() -> None:
    prefill = counting()
    tickets = [sent(prefill, 0.999) for _ in range(3)]
    count(prefill, 0.5, 0.0, 0.999)
    assert all(ticket.prompt_pending for ticket in tickets)
    count(prefill, 0.5, 0.0, 0.999)
    assert [ticket.prompt_pending for ticket in tickets] == [False, True, True]


def test_parts_of_first_tokens_are_counted_once() -> None:
    prefill = counting()
    tickets = [sent(prefill, 0.999) for _ in range(3)]
    count(prefill, 1.5, 0.0, 0.999)
    count(prefill, 0.5, 0.0, 0.999)
    assert [ticket.prompt_pending for ticket in tickets] == [False, False, True]


def test_a_silent_counter_ends_the_prediction_and_keeps_nothing() -> None:
    prefill = counting()
    sent(prefill, 0.0)
    prefill.forget()
    assert prefill.next_change() is None
    assert not prefill._uncounted


@pytest.mark.parametrize(
    ("limit_s", "prompt_s"),
    [(LAW.chunks * LAW.chunk, 1e-3), (int(LAW.ahead_s / (LAW.caution * (1e-6 + STEP_S / LAW.chunk))), 1e-6)],
)
def test_as_much_may_be_under_way_as_a_moment_computes_and_never_less_than_a_few_chunks(
    limit_s: int, prompt_s: float
) -> None:
    assert Prefill().limit == LAW.chunks * LAW.chunk
    assert counting(costs(prompt_s)).limit == limit_s >= LAW.chunks * LAW.chunk


# ---- how far the count may be behind


def behind(works: tuple[int, ...], elapsed_s: float) -> Prefill:
    """All these were predicted to be computed, and the engine counted none of them."""
    prefill = counting()
    for work in works:
        sent(prefill, 0.0, work)
    prefill.pass_time(1e9)
    assert prefill.tokens == 0
    count(prefill, 0, elapsed_s, elapsed_s)
    return prefill


def test_an_engine_that_is_a_little_behind_the_prediction_is_not_slower() -> None:
    little = int(LAW.tolerance * 1.0 / (PROMPT_S + STEP_S / LAW.chunk))
    assert behind((little - 5,), 1.0)._caution == LAW.caution
    assert behind((little + 5,), 1.0)._caution == LAW.caution * LAW.slower


def test_an_engine_that_stays_behind_is_predicted_to_be_slower_up_to_a_bound_and_recovers() -> None:
    prefill = counting()
    for second in range(1, 100):
        for _ in range(20):
            sent(prefill, float(second), 4000)
        prefill.pass_time(1e9)
        count(prefill, 0, 1.0, second + 1.0)
    assert prefill._caution == LAW.most_caution
    count(prefill, 1e9, 1.0, 200.0)
    assert prefill._caution == LAW.most_caution * LAW.calmer
    for second in range(300):
        count(prefill, 0, 1.0, 201.0 + second)
    assert prefill._caution == LAW.caution


def test_a_count_that_many_others_share_says_nothing_of_how_fast_the_engine_is() -> None:
    prefill = counting()
    for _ in range(20):
        sent(prefill, 0.0, 4000)
    prefill.pass_time(1e9)
    prefill.observe(0.1, 1.0, 1.0, costs(), 0.0, alone=False)
    assert prefill._caution == LAW.caution
    prefill.observe(0.1, 1.0, 2.0, costs(), 0.0)
    assert prefill._caution == LAW.caution * LAW.slower


def test_what_is_still_predicted_to_be_under_way_is_not_behind() -> None:
    prefill = counting()
    for _ in range(100):
        sent(prefill, 0.0, 4000)
    count(prefill, 0, 0.1, 0.1)
    assert prefill._caution == LAW.caution


# ---- how much may be under way, and how much of it is work


def test_three_prompts_of_mean_length_may_be_under_way() -> None:
    prefill = counting()
    for second in range(100):
        sent(prefill, 10.0 * second, 8000)
        prefill.pass_time(10.0 * second + 9.0)
    count(prefill, 0, 1.0, 1000.0)
    assert prefill.limit == LAW.prompts * 8000
    for second in range(500):
        sent(prefill, 2000.0 + second, 100)
    count(prefill, 0, 1.0, 3000.0)
    assert prefill.limit == LAW.chunks * LAW.chunk, "the mean is that of the last ones"


def test_of_a_prompt_only_what_the_prefix_cache_probably_lacks_is_work() -> None:
    prefill = Prefill()
    for _ in range(60):
        prefill.found(7500, 10_000)
    assert prefill.fresh == pytest.approx(0.25, rel=0.02)
    ticket = sent(prefill, 0.0, 1000)
    assert (ticket.work_tokens, prefill.tokens) == (prefill.work_of(ticket), ticket.work_tokens)
    assert prefill.pending_tokens() == (1000, 0)
    assert ticket.work_tokens == pytest.approx(250, abs=6)
    prefill.over(ticket, 1.0, served=True)
    assert (prefill.tokens, prefill.pending_tokens()) == (0, (0, 0))


def test_a_session_that_has_more_cached_than_the_mean_keeps_that() -> None:
    prefill = Prefill()
    for _ in range(60):
        prefill.found(5000, 10_000)
    ticket = Ticket(Request("r", 0.0))
    ticket.prompt_tokens, ticket.work_tokens = 1000, 100
    assert prefill.work_of(ticket) == 100


def test_one_reading_of_hits_says_little() -> None:
    prefill = Prefill()
    prefill.found(300, 300)
    assert 0.95 < prefill.fresh < 1.0


@pytest.mark.parametrize(("cached", "prompts", "fresh"), [(10**9, 10_000, LEAST_FRESH), (-(10**9), 10_000, 1.0)])
def test_what_a_page_says_of_hits_leaves_a_prompt_some_work_and_no_more_than_it_has(
    cached: int, prompts: int, fresh: float
) -> None:
    prefill = Prefill()
    for _ in range(100):
        prefill.found(cached, prompts)
    assert prefill.fresh == pytest.approx(fresh)


def test_readings_do_not_put_off_a_prompt_that_was_counted_and_whose_answer_does_not_stream() -> None:
    """Else each reading of a busy engine predicted it anew: on steps of 90 ms half of the pool's prompts hung so."""
    prefill = counting()
    prefill.probed = True
    ticket = sent(prefill, 0.0, 20 * WORK)
    due = ticket.computed_at
    for reading in range(1, 6):
        count(prefill, 1 if reading == 1 else 0, due / 6, reading * due / 6)
        assert (ticket.computed_at, prefill.tokens) == (due, 20 * WORK)
    assert prefill.pass_time(due)
    assert prefill.tokens == 0
