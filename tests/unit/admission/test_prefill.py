"""When a prompt counts as computed: seen, counted or predicted."""

from __future__ import annotations

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.prefill import LEAST_FRESH, LEAST_TOKEN_S, MOST_TOKEN_S, Prefill
from extproc.admission.steps import StepCost
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Request

LAW = LAWS.prompts

WORK = 800
PROMPT_S, STEP_S = 1e-4, 0.03


def costs(prompt_s: float = PROMPT_S, base_s: float = STEP_S) -> StepCost:
    known = StepCost()
    known.base_s, known.sequence_s, known.prompt_s = base_s, 0.0, prompt_s
    return known


TOKEN_S = LAW.caution * (PROMPT_S + STEP_S / LAW.chunk)
"""What a prompt token is predicted to take: its own cost, its part of the steps, and some caution."""
LASTS = WORK * TOKEN_S


def waits(pending: int) -> float:
    """How long a prompt waits for the end of the step in progress, with `pending` tokens under way, itself included."""
    return (STEP_S + min(pending, LAW.chunk) * TOKEN_S) / 2


def sent(prefill: Prefill, now: float, work: int = WORK) -> Ticket:
    ticket = Ticket(Request("r", now))
    ticket.work_tokens = ticket.prompt_tokens = work
    ticket.state, ticket.leased_at = State.LEASED, now
    prefill.add(ticket, now)
    return ticket


def count(prefill: Prefill, counted: float, elapsed_s: float, now: float) -> list[Ticket]:
    return prefill.observe(counted, elapsed_s, now, costs(), 0.0)


def counting(known: StepCost | None = None) -> Prefill:
    prefill = Prefill()
    prefill.observe(0, 1.0, 0.0, costs() if known is None else known, 0.0)
    return prefill


def probed() -> Prefill:
    prefill = Prefill()
    prefill.probed = True
    return prefill


# ---- predicted


def test_nothing_is_predicted_before_the_engines_count_was_seen() -> None:
    prefill = Prefill()
    ticket = sent(prefill, 0.0)
    assert prefill.next_change() is None
    assert not prefill.pass_time(1e9)
    prefill.over(ticket, 1.0, served=True)
    assert (prefill.tokens, prefill.prompts, ticket.prompt_pending) == (0, 0, False)


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
    assert behind((little - 5,), 1.0)._slack == LAW.caution
    assert behind((little + 5,), 1.0)._slack == LAW.caution * LAW.slower


def test_an_engine_that_stays_behind_is_predicted_to_be_slower_up_to_a_bound_and_recovers() -> None:
    prefill = counting()
    for second in range(1, 100):
        for _ in range(20):
            sent(prefill, float(second), 4000)
        prefill.pass_time(1e9)
        count(prefill, 0, 1.0, second + 1.0)
    assert prefill._slack == LAW.most_caution
    count(prefill, 1e9, 1.0, 200.0)
    assert prefill._slack == LAW.most_caution * LAW.calmer
    for second in range(300):
        count(prefill, 0, 1.0, 201.0 + second)
    assert prefill._slack == LAW.caution


def test_a_count_that_many_others_share_says_nothing_of_how_fast_the_engine_is() -> None:
    prefill = counting()
    for _ in range(20):
        sent(prefill, 0.0, 4000)
    prefill.pass_time(1e9)
    prefill.observe(0.1, 1.0, 1.0, costs(), 0.0, alone=False)
    assert prefill._slack == LAW.caution
    prefill.observe(0.1, 1.0, 2.0, costs(), 0.0)
    assert prefill._slack == LAW.caution * LAW.slower


def test_what_is_still_predicted_to_be_under_way_is_not_behind() -> None:
    prefill = counting()
    for _ in range(100):
        sent(prefill, 0.0, 4000)
    count(prefill, 0, 0.1, 0.1)
    assert prefill._slack == LAW.caution


# ---- seen


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
    assert (ticket.work_tokens, prefill.tokens, prefill.prompts) == (prefill.work_of(ticket), ticket.work_tokens, 1000)
    assert ticket.work_tokens == pytest.approx(250, abs=6)
    prefill.over(ticket, 1.0, served=True)
    assert (prefill.tokens, prefill.prompts) == (0, 0)


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
