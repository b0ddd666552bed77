"""Promises of the core that mutation testing found unpinned (`make mutation`, docs/mutation.md), one per test."""

from __future__ import annotations

import math
from typing import Any

import pytest

from extproc.admission.alarms import Alarms
from extproc.admission.controller import CACHED_AT_MOST
from extproc.admission.endpoint import KV_SHARE
from extproc.admission.fairness import MAX_TENANTS, FairShare
from extproc.admission.health import SATURATED_S
from extproc.admission.limit import FAST_S, START, TARGET_S, AdaptiveLimit
from extproc.admission.load import Load
from extproc.admission.outcome import Outcome
from extproc.admission.pace import ENOUGH, HORIZON_S, LEAST_BUSY_S, LEAST_SHARE, Pace
from extproc.admission.prefill import FASTER, FIRST_SPEED, SLOWER, TOLERANCE
from extproc.admission.queue import GUARD, WINDOW
from extproc.admission.ticket import State, Ticket
from extproc.admission.tokens import FIRST_GUESS, FIRST_PROMPT, MEMORY, MOST_OFF, PROMPTS, TokenEstimate
from extproc.admission.values import Answer, Binding, Policy, Request
from extproc.errors import TransitionError

from .test_prefill import counting, sent
from .test_rules import CLASSES, Desk, elephants, follow, in_use, one, slow

GUESS = int(FIRST_GUESS)


def shared(*specs: Any, **policy: Any) -> Desk:
    """A desk whose pool has a second member, which is down: so nobody has a home, and all wait in one line."""
    desk = Desk(*specs, one("down"), **policy)
    desk.set_up("down", is_up=False)
    return desk


# ---- what people read


def test_an_illegal_transition_says_what_was_tried_with_whom() -> None:
    desk = Desk(one("a"))
    leased, waits = desk.ask("first"), desk.ask("second")
    for event, ticket, message in [
        (desk.core.offer, waits, "<Ticket second waiting> can't be offered: it is waiting, not new"),
        (desk.core.release, waits, "<Ticket second waiting> can't be released: it is waiting, not leased"),
        (desk.core.cancel, leased, "<Ticket first leased at a> can't be cancelled: it is leased, not waiting"),
    ]:
        with pytest.raises(TransitionError) as caught:
            event(ticket, desk.now)
        assert str(caught.value) == message


def test_who_is_placed_nowhere_has_no_home_and_nobody_before_him() -> None:
    desk = Desk(one("a", models=frozenset({"m"})))
    desk.ask(model="m")
    stranger = desk.ask(model="unknown")
    assert (desk.outcome(stranger), stranger.position, stranger.home) == (Outcome.UNKNOWN_MODEL, 0, None)


def test_a_position_counts_who_waits_in_the_class_or_above() -> None:
    desk = Desk(one("a"))
    names = ("std", "std", "batch", "urgent", "std", "batch")
    assert [desk.ask(request_class=name).position for name in names] == [0, 0, 1, 0, 2, 4]


# ---- fairness


def test_a_request_that_left_costs_its_tenant_nothing() -> None:
    desk = Desk(one())
    first = desk.ask("0", tenant="holder")
    gone = [desk.ask("gone", tenant="t", prompt_tokens=5000) for _ in range(2)]
    for ticket in gone:
        desk.cancel(ticket)
    for number in range(3):
        desk.ask(f"o{number}", tenant="o")
    desk.ask("t", tenant="t")
    assert desk.serve_one_by_one(first) == ["o0", "t", "o1", "o2"]


def test_a_refund_takes_no_more_than_what_was_charged() -> None:
    desk = Desk(one())
    first = desk.ask("0", tenant="holder")
    desk.ask("t0", tenant="t", prompt_tokens=1000)
    desk.cancel(desk.ask("gone", tenant="t", prompt_tokens=100))
    desk.ask("t1", tenant="t")
    for number in range(5):
        desk.ask(f"o{number}", tenant="o")
    assert desk.serve_one_by_one(first) == ["t0", "o0", "o1", "o2", "o3", "t1", "o4"]


def test_a_longer_answer_costs_what_it_is_longer_on_top_of_what_was_charged() -> None:
    desk = Desk(one())
    first = desk.ask("t0", tenant="t")
    second, _ = desk.ask("t1", tenant="t"), desk.ask("t2", tenant="t")
    desk.release(first, Answer.OK, output_tokens=GUESS + 1)
    desk.ask("late", tenant="t")
    for number in range(4):
        desk.ask(f"o{number}", tenant="o")
    assert desk.serve_one_by_one(second) == ["o0", "t2", "o1", "o2", "late", "o3"]


def test_a_tenant_with_nothing_waiting_is_not_held_to_the_place_of_a_request_that_left() -> None:
    desk = Desk(one())
    first = desk.ask("t0", tenant="t")
    second = desk.ask("t1", tenant="t", prompt_tokens=5000)
    desk.cancel(desk.ask("gone", tenant="t"))
    desk.release(first, Answer.OK, output_tokens=0)
    desk.release(second, Answer.OK, output_tokens=0)
    holder = desk.ask("holder", tenant="holder")
    desk.ask("o0", tenant="o", prompt_tokens=4900)
    desk.ask("o1", tenant="o")
    desk.ask("late", tenant="t")
    assert desk.serve_one_by_one(holder) == ["o0", "late", "o1"]


def test_a_tenant_with_something_waiting_is_held_to_its_order() -> None:
    share = FairShare()
    first, *_, last = [share.tag("t", 100.0) for _ in range(2)]
    share.served("t", first)
    share.correct("t", -150.0)
    assert share.tag("t", 100.0) >= last


def test_the_tenant_that_asked_longest_ago_is_forgotten_first() -> None:
    share = FairShare()
    for number in range(MAX_TENANTS):
        share.tag(f"t{number}", 100.0)
    share.tag("t0", 100.0)
    share.tag("newcomer", 100.0)
    assert [share.tag(name, 1.0) for name in ("t0", "newcomer", "t1")] == [200.0, 100.0, 0.0]


def test_a_token_of_output_costs_twice_one_of_input() -> None:
    desk = Desk(one())
    first = desk.ask("0", tenant="holder")
    for number in range(4):
        desk.ask(f"in{number}", tenant="in", prompt_tokens=100, max_output_tokens=0)
    for number in range(3):
        desk.ask(f"out{number}", tenant="out", max_output_tokens=75)
    assert desk.serve_one_by_one(first) == ["in0", "out0", "in1", "out1", "in2", "in3", "out2"]


# ---- limits to the last token


def test_kv_tokens_may_fill_their_share_exactly() -> None:
    desk = Desk(one("a", 100, kv_capacity_tokens=10_000))
    share = int(KV_SHARE * 10_000)
    desk.ask(prompt_tokens=share - 2 * GUESS)
    assert in_use([desk.ask(), desk.ask()]) == [True, False]


@pytest.mark.parametrize("how", ["less than estimated", "unknown", "stale"])
def test_only_what_the_engine_uses_beyond_our_estimate_takes_room(how: str) -> None:
    desk = Desk(one("a", 100, kv_capacity_tokens=10_000))
    desk.ask(prompt_tokens=int(KV_SHARE * 10_000) - 2 * GUESS)
    desk.observe("a", Load(kv_usage=0.94))
    match how:
        case "less than estimated":
            desk.observe("a", Load(kv_usage=0.01))
        case "unknown":
            desk.observe("a", Load())
        case "stale":
            desk.advance(10.0)
    assert in_use([desk.ask(), desk.ask()]) == [True, False]


def test_prompt_tokens_in_the_making_may_fill_the_limit_exactly() -> None:
    desk = Desk(one("a", 100), first_byte_probe=True)
    tiny, big = desk.ask(prompt_tokens=1), desk.ask(prompt_tokens=5000)
    for limit in (big.work_tokens, big.work_tokens + 1):
        assert in_use([tiny, big]) == [True, False]
        desk.set_policy(Policy(classes=CLASSES, shed=False, first_byte_probe=True, max_prompt_tokens=limit))
    assert in_use([tiny, big]) == [True, True]


# ---- caches: sessions and turnover


def test_of_a_sessions_prompt_only_what_is_new_has_to_be_computed_at_its_home() -> None:
    desk = Desk(one("a", 10), one("b", 10))
    first = desk.ask(session="s", prompt_tokens=1000)
    more = desk.ask(session="s", prompt_tokens=2000)
    same = desk.ask(session="s", prompt_tokens=1000)
    assert first.endpoint is more.endpoint is same.endpoint
    assert first.work_tokens == first.prompt_tokens
    assert more.work_tokens == more.prompt_tokens - (first.prompt_tokens + first.output_tokens)
    assert same.work_tokens == same.prompt_tokens - int(CACHED_AT_MOST * same.prompt_tokens), "the guess may be wrong"
    for request in ({"session": "other"}, {}):
        stranger = desk.ask(home=first.endpoint and first.endpoint.name, prompt_tokens=1000, **request)
        assert stranger.work_tokens == stranger.prompt_tokens


def test_of_a_sessions_prompt_nothing_is_cached_elsewhere() -> None:
    desk = Desk(one("a", 10), one("b", 10))
    first = desk.ask(session="s", prompt_tokens=1000)
    assert first.endpoint is not None
    desk.set_up(first.endpoint.name, is_up=False)
    moved = desk.ask(session="s", prompt_tokens=1000)
    assert (moved.endpoint is not first.endpoint, moved.work_tokens) == (True, 1000)


def test_a_session_whose_cache_was_overwritten_has_no_home_any_more() -> None:
    desk = Desk(*(one(name, 1000, kv_capacity_tokens=10 * GUESS) for name in "ab"))

    def serve(count: int) -> None:
        for _ in range(count):
            desk.release(desk.ask(home="a"))

    serve(25)  # what came before the session does not count
    desk.release(desk.ask(home="a", session="s"))
    serve(10)
    assert desk.core._sessions.recall("s") is desk.endpoint("a")
    serve(1)
    assert desk.core._sessions.recall("s") is None


# ---- estimates


def test_prompts_are_as_long_as_engines_count_them() -> None:
    desk = Desk(one("a", 10_000))
    for _ in range(3000):
        desk.release(desk.ask(prompt_tokens=100))
        desk.observe("a", Load(prompt_tokens=300, first_tokens=1))
    assert desk.ask(prompt_tokens=100).prompt_tokens == pytest.approx(300, rel=0.02)


@pytest.mark.parametrize(
    "load", [Load(prompt_tokens=9000, first_tokens=0), Load(prompt_tokens=9000), Load(first_tokens=9)]
)
def test_half_a_reading_says_nothing_of_prompts(load: Load) -> None:
    desk = Desk(one("a", 10))
    desk.observe("a", load)
    assert desk.ask(prompt_tokens=1000).prompt_tokens == 1000


def test_one_prompt_says_little_of_the_next_and_thousands_say_all() -> None:
    estimate = TokenEstimate()
    estimate.learn_prompts(3 * int(FIRST_PROMPT), 1)
    assert 1.0 < estimate.scale < 1.02
    estimate = TokenEstimate()
    estimate.learn_prompts(PROMPTS * 3 * int(FIRST_PROMPT), PROMPTS)
    before = 0.5 * PROMPTS / math.e
    assert estimate.scale == pytest.approx((before + 3 * PROMPTS) / (before + PROMPTS), rel=0.001)
    estimate.learn_prompts(10 * PROMPTS * 3 * int(FIRST_PROMPT), 10 * PROMPTS)
    assert estimate.scale == pytest.approx(3.0, rel=0.001)


@pytest.mark.parametrize(("counted", "scale"), [(100.0, MOST_OFF), (0.01, 1 / MOST_OFF)])
def test_the_correction_of_prompts_is_bounded(counted: float, scale: float) -> None:
    estimate = TokenEstimate()
    estimate.learn_prompts(int(counted * FIRST_PROMPT) * 5000, 5000)
    assert estimate.scale == scale


def test_one_answer_says_little_of_the_next_and_many_say_half() -> None:
    few, many = (Ticket(Request("r", 0.0)) for _ in range(2))
    estimate = TokenEstimate()
    estimate.learn(GUESS + 10 * MEMORY, 1)
    estimate.estimate(few)
    assert few.output_tokens == GUESS + 10
    estimate = TokenEstimate()
    estimate.learn(1000 * 3 * GUESS, 1000)
    estimate.estimate(many)
    assert many.output_tokens == 2 * GUESS


def test_a_reading_is_shared_by_all_answers_that_finished_since_the_one_before() -> None:
    desk = Desk(one("a", 100))
    for ticket in desk.fill(20):
        desk.release(ticket)
    desk.observe("a", Load(output_tokens=20 * GUESS))
    assert desk.ask().output_tokens == GUESS


# ---- the adaptive limit


@pytest.mark.parametrize(
    ("load", "said", "factor"),
    [
        (Load(running=10.0), {}, 1.0),
        (Load(tokens_per_s=10.0), {}, 1.0),
        (Load(running=10.0, tokens_per_s=0.0), {}, 1.0),
        (Load(running=1.0, tokens_per_s=1.0), {}, 0.85),
        (Load(preemptions=1), {"elapsed_s": 0.5}, 0.9**0.5),
        (slow(0.04), {"wanted": True, "elapsed_s": 0.5}, 1.5**0.5),
        (Load(running=100 * TARGET_S, tokens_per_s=100.0), {"in_flight": 1}, 1.0),
        (Load(running=100 * FAST_S, tokens_per_s=100.0), {"wanted": True}, 1.1),
    ],
)
def test_the_adaptive_limit_follows_its_law_at_the_edges(load: Load, said: dict[str, Any], factor: float) -> None:
    assert follow(AdaptiveLimit(), load, **said) == int(START * factor)


def test_an_endpoints_limit_is_steered_by_what_passed_between_two_readings() -> None:
    desk = Desk(one("a", None))
    desk.ask()
    desk.observe("a", slow(0.5))
    assert desk.endpoint("a").limit.value == int(START * 0.85), "the first counts as a second"
    desk.advance(0.5)
    desk.observe("a", slow(0.5))
    assert desk.endpoint("a").limit.value == int(START * 0.85**1.5)


def test_an_endpoints_limit_stays_at_what_is_right_for_those_in_flight() -> None:
    desk = Desk(one("a", None))
    desk.fill(START)
    desk.observe("a", slow(0.09))
    assert desk.endpoint("a").limit.value == int(START * TARGET_S / 0.09)


def test_a_limit_that_is_reached_does_not_grow_while_nobody_waits() -> None:
    desk = Desk(one("a", None))
    desk.fill(START)
    desk.observe("a", slow(0.02))
    assert desk.endpoint("a").limit.value == START


@pytest.mark.parametrize(
    ("capacity", "usage", "factor"), [(10_000, 0.5, 1.0), (10_000, None, 0.9), (None, 0.5, 0.9), (None, None, 0.9)]
)
def test_preemptions_are_a_reason_for_fewer_requests_unless_kv_tokens_are_counted(
    capacity: int | None, usage: float | None, factor: float
) -> None:
    desk = Desk(one("a", None, kv_capacity_tokens=capacity))
    desk.observe("a", Load(kv_usage=usage, preemptions=1))
    assert desk.endpoint("a").limit.value == int(START * factor)


# ---- telemetry


def test_a_kv_capacity_that_a_person_chose_comes_before_what_telemetry_tells() -> None:
    desk = Desk(one("a", kv_capacity_tokens=1000))
    desk.observe("a", Load(kv_capacity_tokens=2000))
    assert desk.endpoint("a").kv_capacity == 1000
    desk.put(one("a", kv_capacity_tokens=3000))
    assert desk.endpoint("a").kv_capacity == 3000
    desk.put(one("a"))
    assert desk.endpoint("a").kv_capacity == 2000


def test_a_reading_that_lacks_the_kv_capacity_leaves_it_known() -> None:
    desk = Desk(one("a"))
    desk.observe("a", Load(kv_capacity_tokens=2000))
    desk.observe("a", Load(running=1.0))
    assert desk.endpoint("a").kv_capacity == 2000


def test_readings_become_stale_one_by_one_and_wake_nobody_before() -> None:
    desk = Desk(one("never read"), one("a"), one("b"))
    began = desk.now
    desk.observe("a", Load(running=1.0))
    assert desk.core.next_deadline() == began + 10.0
    desk.advance(4.0)
    desk.observe("b", Load(running=1.0))
    assert desk.core.next_deadline() == began + 10.0
    desk.advance(6.0)
    assert (desk.endpoint("a").load, desk.endpoint("b").load is None) == (None, False)
    assert desk.core.next_deadline() == began + 14.0
    desk.advance(4.0)
    assert desk.endpoint("b").load is None


def test_a_reload_forgets_no_fresh_telemetry() -> None:
    desk = Desk(one("a"))
    desk.observe("a", Load(running=1.0))
    desk.advance(1.0)
    desk.set_policy(Policy(classes=CLASSES, stale_after_s=20.0))
    assert desk.endpoint("a").load is not None
    assert desk.core.next_deadline() == desk.now + 19.0


@pytest.mark.parametrize(
    ("leases", "load"),
    [(1, Load(kv_usage=1.0, running=0.0)), (0, Load(kv_usage=1.0, running=5.0)), (0, Load(kv_usage=1.0))],
)
def test_a_full_cache_closes_an_endpoint_unless_it_is_known_to_be_idle(leases: int, load: Load) -> None:
    desk = Desk(one("a", 10))
    desk.fill(leases)
    desk.observe("a", load)
    assert desk.ask().state is State.WAITING


@pytest.mark.parametrize(
    ("leases", "load", "computed"),
    [
        (2, Load(first_tokens=2, running=2.0, waiting=2.0), 1),
        (2, Load(first_tokens=2, running=0.0, waiting=4.0), 1),
        (2, Load(first_tokens=2, running=4.0, waiting=0.0), 1),
        (2, Load(first_tokens=2, running=4.0), 1),
        (2, Load(first_tokens=2, waiting=4.0), 1),
        (3, Load(first_tokens=1, running=1.0), 1),
        (3, Load(first_tokens=2), 2),
    ],
)
def test_of_the_engines_first_tokens_our_share_is_ours(leases: int, load: Load, computed: int) -> None:
    desk = Desk(one("a", 100))
    desk.observe("a", Load(first_tokens=0))
    tickets = desk.fill(leases, prompt_tokens=1000)
    desk.observe("a", load)
    assert [ticket.prompt_pending for ticket in tickets] == [False] * computed + [True] * (leases - computed)


def test_a_prompt_that_is_predicted_to_be_computed_makes_room_for_the_next_one() -> None:
    desk = Desk(one("a", 100))
    desk.observe("a", Load(first_tokens=0))
    tickets = desk.fill(3, prompt_tokens=1600)
    lasts = 1600 / FIRST_SPEED
    desk.advance(0.99 * lasts)
    assert in_use(tickets) == [True, True, False]
    desk.advance(0.02 * lasts)
    assert in_use(tickets) == [True, True, True]


def test_a_reload_leaves_the_prompt_limit_to_the_engines_count_of_first_tokens() -> None:
    desk = Desk(one("a", 100))
    desk.observe("a", Load(first_tokens=0))
    desk.set_policy(Policy(classes=CLASSES, shed=False))
    assert in_use(desk.fill(3, prompt_tokens=1500)) == [True, True, False]


def test_a_reload_makes_no_prompt_limit_of_telemetry_that_counts_no_first_tokens() -> None:
    desk = Desk(one("a", 100))
    desk.observe("a", Load(running=1.0))
    desk.set_policy(Policy(classes=CLASSES, shed=False))
    assert in_use(desk.fill(3, prompt_tokens=1500)) == [True, True, True]


def test_an_endpoint_counts_all_that_was_ever_sent_to_it() -> None:
    desk = Desk(one("a", 2))
    assert desk.endpoint("a").dispatched == 0
    for ticket in desk.fill(3)[:2]:
        desk.release(ticket)
    assert desk.endpoint("a").dispatched == 3


# ---- the pace of prompts


def test_an_engine_that_computed_more_than_predicted_is_faster_by_that() -> None:
    prefill = counting()
    for _ in range(2):
        sent(prefill, 0.0)
    prefill.observe(1, 0.5, 0.5)
    assert prefill._speed == pytest.approx(FIRST_SPEED * (1 + 800 / (0.5 * FIRST_SPEED)))
    assert 1 + 800 / (0.5 * FIRST_SPEED) < FASTER


def test_an_engine_that_had_nothing_to_do_meanwhile_shows_no_pace() -> None:
    prefill = counting()
    for _ in range(2):
        sent(prefill, 0.9)
    prefill.observe(1, 1.0, 1.0)
    assert prefill._speed == FIRST_SPEED


@pytest.mark.parametrize(("works", "elapsed_s", "predicted_s"), [((800, 2000), 1.0, 1.0), ((800,) * 4, 1.0, 0.2)])
def test_an_engine_is_not_slower_that_is_a_little_behind_the_prediction(
    works: tuple[int, ...], elapsed_s: float, predicted_s: float
) -> None:
    prefill = counting()
    for work in works:
        sent(prefill, 0.0, work)
    prefill.pass_time(predicted_s)
    assert sum(works) - prefill.tokens - works[0] <= TOLERANCE * elapsed_s * FIRST_SPEED
    prefill.observe(0, elapsed_s, 1.0)
    assert prefill._speed == FIRST_SPEED


def test_an_engine_is_slower_that_is_far_behind_the_prediction() -> None:
    prefill = counting()
    for _ in range(4):
        sent(prefill, 0.0)
    prefill.pass_time(0.4)
    prefill.observe(0, 0.4, 0.4)
    assert prefill._speed == SLOWER * FIRST_SPEED


def test_parts_of_first_tokens_are_counted_once() -> None:
    prefill = counting()
    tickets = [sent(prefill, 0.999) for _ in range(3)]
    prefill.observe(1.5, 0.0, 0.999)
    prefill.observe(0.5, 0.0, 0.999)
    assert [ticket.prompt_pending for ticket in tickets] == [False, False, True]


def test_what_an_answer_that_is_over_told_is_not_waited_for_in_the_count() -> None:
    prefill = counting()
    _, over, newer = (sent(prefill, 0.99) for _ in range(3))
    prefill.pass_time(0.99 + 2.5 * 800 / FIRST_SPEED)
    over.state = State.DONE
    prefill.observe(0, 1.0, 1.3)
    prefill.observe(1, 0.0, 1.3)
    assert not newer.prompt_pending


# ---- predictions and Retry-After


def known_pace() -> Pace:
    """The least that is worth believing: ENOUGH dispatches in LEAST_BUSY_S."""
    pace = Pace()
    for _ in range(ENOUGH):
        pace.dispatched(LEAST_BUSY_S)
    return pace


def test_a_rate_is_believed_from_enough_dispatches_in_enough_time() -> None:
    assert known_pace().drain_rate() == ENOUGH / LEAST_BUSY_S
    few, brief = Pace(), Pace()
    for _ in range(ENOUGH - 1):
        few.dispatched(LEAST_BUSY_S)
    for _ in range(ENOUGH):
        brief.dispatched(0.99 * LEAST_BUSY_S)
    assert (few.drain_rate(), brief.drain_rate()) == (None, None)


def test_the_drain_rate_follows_the_last_seconds() -> None:
    pace = Pace()
    for second in range(1, 101):
        pace.dispatched(float(second))
    for tenth in range(1, 101):
        pace.dispatched(100.0 + tenth / 10)
    assert pace.drain_rate() == pytest.approx(1.0 / math.e + 10.0 * (1 - 1 / math.e), rel=0.1)


def test_the_predicted_wait_is_that_of_the_last_in_a_line_that_higher_classes_slow_down() -> None:
    pace = known_pace()
    now, rate = LEAST_BUSY_S, ENOUGH / LEAST_BUSY_S
    assert pace.wait_s(5, 0, now) == pytest.approx(6 / rate)
    for _ in range(20):
        pace.arrived(5, now)
    above = 20 / HORIZON_S
    assert pace.wait_s(5, 5, now) == pytest.approx(6 / rate)
    assert pace.wait_s(5, 0, now) == pytest.approx(6 / (rate - above))
    assert pace.wait_s(5, 0, now + HORIZON_S) == pytest.approx(6 / (rate - above / math.e))
    for _ in range(20):
        pace.arrived(5, now + HORIZON_S)
    assert pace.wait_s(5, 0, now + HORIZON_S) == pytest.approx(6 / (rate - above / math.e - above))
    for _ in range(200):
        pace.arrived(5, now + HORIZON_S)
    assert pace.wait_s(5, 0, now + HORIZON_S) == pytest.approx(6 / (LEAST_SHARE * rate)), "a little is always left"


def test_retry_after_is_the_time_that_those_ahead_take() -> None:
    desk = Desk(one())
    pace = desk.core._any_model.pace
    desk.ask()
    desk.fill(40)
    for number in range(1, 200):
        pace.dispatched(desk.now + number / 4)
    assert desk.retry_after(desk.ask(budget_s=0.0)) == pytest.approx(10, abs=1)


def test_who_is_refused_on_arrival_did_not_wait() -> None:
    desk = Desk(one(models=frozenset({"m"})))
    desk.ask(model="m")
    refused = desk.ask(budget_s=0.0), desk.ask(model="unknown")
    assert [desk.outcome(ticket) for ticket in refused] == [Outcome.BUDGET_EXPIRED, Outcome.UNKNOWN_MODEL]
    assert [desk.decided[ticket].wait_s for ticket in refused] == [0.0, 0.0]


def test_a_backlog_that_came_before_its_endpoint_counts_from_its_arrival_there() -> None:
    desk = Desk()
    holder = desk.ask(model="m")
    desk.advance(5.0)
    desk.put(one("a", models=frozenset({"m"})))
    desk.fill(30, model="m")
    for _ in range(20):
        desk.advance(0.5)
        desk.release(holder)
        (holder,) = desk.leased
    assert desk.core._by_model["m"].pace.drain_rate() == pytest.approx(2.0, rel=0.15)


def test_requests_that_came_before_all_endpoints_keep_their_class() -> None:
    desk = Desk()
    names = ("batch", "std", "urgent", "std")
    tickets = [desk.ask(name, name, model="m", budget_s=60.0, tenant=str(n)) for n, name in enumerate(names)]
    desk.put(one("a", models=frozenset({"m"})))
    assert tickets[2].state is State.LEASED
    assert desk.serve_one_by_one(tickets[2]) == ["std", "std", "batch"]


def test_before_its_model_is_listed_a_request_goes_nowhere() -> None:
    desk = Desk()
    other = desk.ask(model="another")
    desk.put(one("a", 10, models=frozenset({"m"})))
    assert other.state is State.WAITING


# ---- homes


def test_half_of_its_budget_is_left_to_a_request_whose_home_has_no_room() -> None:
    desk = Desk(one("a"), one("b"), patience_s=20.0)
    desk.ask(home="a")
    guest = desk.ask(home="a", budget_s=4.0)
    desk.advance(1.99)
    assert guest.state is State.WAITING
    desk.advance(0.02)
    assert desk.where(guest) == "b"


def test_a_bound_request_waits_without_a_home_while_no_endpoint_is_up() -> None:
    desk = Desk(one("a"), one("b"), binding=Binding.BOUND)
    for name in "ab":
        desk.set_up(name, is_up=False)
    guest = desk.ask()
    assert (guest.state, guest.home) == (State.WAITING, None)


def test_without_a_queue_the_emptiest_of_the_doubtful_endpoints_is_chosen() -> None:
    desk = Desk(one("a"), one("b"), enable_queue=False)
    core, now = desk.core, desk.now
    for name in "ab":
        core.set_up(name, now, is_up=False)
    tickets = [Ticket(Request("r", now)) for _ in range(6)]
    for ticket in tickets:
        core.offer(ticket, now)
    assert [len(desk.endpoint(name).leases) for name in "ab"] == [3, 3]


def test_without_a_queue_the_emptiest_endpoint_is_chosen_again_and_again() -> None:
    desk = Desk(one("a"), one("b"), enable_queue=False)
    for ticket in desk.fill(6):
        if desk.where(ticket) == "b":
            desk.release(ticket)
    assert [desk.where(ticket) for ticket in desk.fill(3)] == ["b", "b", "b"]


@pytest.mark.parametrize(("prompt_a", "prompt_b", "limit_b", "goes_to"), [(7800, 0, 10, "b"), (1800, 0, 3, "a")])
def test_the_fullest_of_an_endpoints_limits_says_how_full_it_is(
    prompt_a: int, prompt_b: int, limit_b: int, goes_to: str
) -> None:
    desk = Desk(*(one(name, limit, kv_capacity_tokens=10_000) for name, limit in (("a", 10), ("b", limit_b))))
    for _ in range(2):
        desk.ask(home="b", prompt_tokens=prompt_b)
    desk.ask(home="a", prompt_tokens=prompt_a)
    assert desk.where(desk.ask()) == goes_to


def test_an_endpoint_whose_models_change_serves_the_new_ones_and_no_others() -> None:
    desk = Desk(one("a", 10, models=frozenset({"m"})), one("b", 10, models=frozenset({"other"})))
    desk.put(one("a", 10, models=frozenset({"n"})))
    assert desk.where(desk.ask(model="n")) == "a"
    assert desk.ask(model="m").state is State.WAITING


def test_a_full_endpoint_that_was_removed_gets_nothing_as_its_leases_run_out() -> None:
    desk = Desk(one("a", 2), one("b", 1))
    held = [desk.ask(home="a") for _ in range(2)]
    desk.ask(home="b")
    waits = desk.ask()
    desk.remove("a")
    desk.release(held[0])
    assert waits.state is State.WAITING


def test_who_asks_for_a_home_that_runs_out_goes_elsewhere_at_once() -> None:
    desk = Desk(one("a", 2), one("b", 2))
    desk.ask(home="a")
    desk.remove("a")
    assert desk.where(desk.ask(home="a")) == "b"


# ---- order and window


@pytest.mark.parametrize("patience_s", [0.0, 1.0])
def test_those_whose_budgets_end_together_are_refused_in_the_order_they_came(patience_s: float) -> None:
    desk = Desk(one(), patience_s=patience_s)
    desk.ask()
    waiting = desk.fill(5)
    desk.advance(30.0)
    assert [ticket for ticket in desk.decided if desk.outcome(ticket) is Outcome.BUDGET_EXPIRED] == waiting


def test_alarms_that_are_set_again_and_again_are_bounded_by_twice_those_who_wait() -> None:
    alarms, ticket = Alarms(), Ticket(Request("r", 0.0))
    ticket.state = State.WAITING
    for number in range(10_000):
        alarms.set(ticket, float(number), 1000)
        assert len(alarms) <= 2 * 1000 + 256
    assert alarms.next() == 9999.0


def test_bound_levels_the_lines_by_what_each_endpoint_may_hold() -> None:
    desk = Desk(one("a", 1), one("b", 3), binding=Binding.BOUND)
    assert [ticket.home and ticket.home.name for ticket in desk.fill(8)] == list("abbbabbb")


def test_who_comes_into_the_window_of_a_shared_line_is_looked_at() -> None:
    desk = shared(one("a", 1000, kv_capacity_tokens=10_000), fair=False)
    bigs = elephants(desk, WINDOW)
    mouse = desk.ask("mouse")
    assert (mouse.state, mouse.home) == (State.WAITING, None)
    desk.cancel(bigs[3])
    assert mouse.state is State.LEASED


def test_nobody_passes_a_big_one_in_a_shared_line_for_ever() -> None:
    desk = shared(one("a", 1000, kv_capacity_tokens=10_000))
    (big,) = elephants(desk)
    for _ in range(GUARD):
        desk.release(desk.ask("mouse"))
    assert (big.passed_over, desk.ask("one too many").state) == (GUARD, State.WAITING)


@pytest.mark.parametrize("how", ["none leaves", "one leaves", "their patience ends"])
def test_each_of_those_who_were_passed_over_too_often_is_a_guard(how: str) -> None:
    desk = Desk(one("a", 1000, kv_capacity_tokens=10_000), one("b", 1), patience_s=10.0)
    desk.ask("b", home="b")
    desk.ask("held", prompt_tokens=4000, home="a")
    bigs = [desk.ask("big", prompt_tokens=6000, home="a") for _ in range(2)]
    for _ in range(GUARD):
        desk.release(desk.ask("mouse", home="a"))
    if how == "one leaves":
        desk.cancel(bigs[0])
    elif how == "their patience ends":
        desk.advance(10.0)
    assert [big.passed_over for big in bigs] == [GUARD, GUARD]
    assert desk.ask("mouse", home="a").state is State.WAITING


def test_of_endpoints_that_get_room_together_the_emptiest_is_filled_first() -> None:
    desk = Desk(one("a", 10), one("b", 10), first_byte_probe=True)
    for _ in range(3):
        desk.ask(home="a", prompt_tokens=1000)
    desk.ask(home="b", prompt_tokens=3000)
    waits = desk.ask(prompt_tokens=4000)
    assert waits.state is State.WAITING
    desk.set_policy(Policy(classes=CLASSES, shed=False))
    assert desk.where(waits) == "b"


def test_who_comes_as_the_last_in_the_window_is_looked_at() -> None:
    desk = Desk(one("a", 1000, kv_capacity_tokens=10_000), fair=False)
    elephants(desk, 10)
    for _ in range(WINDOW - 1):
        desk.ask("urgent big", "urgent", prompt_tokens=6000)
    assert desk.ask("urgent mouse", "urgent").state is State.LEASED


def test_a_saturated_endpoint_stays_closed_for_that_moment() -> None:
    desk = Desk(one("a", 2))
    a, _, waits = desk.fill(3)
    desk.release(a, Answer.SATURATED)
    desk.advance(0.99 * SATURATED_S)
    assert waits.state is State.WAITING


def test_a_saturated_endpoint_that_was_closed_by_its_cache_stays_closed() -> None:
    desk = Desk(one("a", 2))
    a, _, waits = desk.fill(3)
    desk.observe("a", Load(kv_usage=1.0))
    desk.release(a, Answer.SATURATED)
    desk.advance(2 * SATURATED_S)
    assert waits.state is State.WAITING


def test_who_came_later_than_now_by_another_clock_has_not_waited() -> None:
    desk = Desk(one("a", 1))
    ticket = desk.ask("from the future", arrived=desk.now + 5.0)
    assert desk.decided[ticket].wait_s == 0.0
