"""The prompt limit: how many prompt tokens may wait for their first token at an endpoint."""

from __future__ import annotations

import pytest

from extproc.admission.load import Load
from extproc.admission.prefill import Prefill
from extproc.admission.steps import StepCost
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Policy, Request

from .desk import CLASSES, Desk, in_use, one


def test_prompt_tokens_in_the_making_are_limited_while_first_tokens_are_seen() -> None:
    desk = Desk(one("a", 100), first_byte_probe=True)
    tickets = desk.fill(6, prompt_tokens=1500)
    assert sum(in_use(tickets)) == 2
    desk.first_token(tickets[0])
    assert sum(in_use(tickets)) == 3
    desk.first_token(tickets[0])
    assert sum(in_use(tickets)) == 3, "a repeated first token makes no more room"


def test_prompt_tokens_are_not_limited_while_nothing_sees_first_tokens() -> None:
    desk = Desk(one("a", 100))
    assert all(in_use(desk.fill(10, prompt_tokens=3000)))


def test_a_prompt_above_the_limit_goes_alone() -> None:
    desk = Desk(one("a", 100), first_byte_probe=True)
    small = desk.ask(prompt_tokens=10)
    giant = desk.ask(prompt_tokens=9000)
    assert in_use([small, giant]) == [True, False]
    desk.first_token(small)
    assert giant.state is State.LEASED


def test_the_engines_count_of_first_tokens_marks_the_oldest_prompts_as_computed() -> None:
    desk = Desk(one("a", 100))
    desk.observe("a", Load(first_tokens=0))
    tickets = desk.fill(6, prompt_tokens=1300)
    assert sum(in_use(tickets)) == 3
    desk.observe("a", Load(first_tokens=0))
    assert sum(in_use(tickets)) == 3
    desk.observe("a", Load(first_tokens=1))
    assert sum(in_use(tickets)) == 4


def test_three_long_prompts_may_be_under_way_where_all_prompts_are_long() -> None:
    desk = Desk(one("a", 100))
    desk.observe("a", Load(first_tokens=0))
    tickets = desk.fill(6, prompt_tokens=8000)
    assert sum(in_use(tickets)) == 1
    desk.observe("a", Load(first_tokens=0))
    assert sum(in_use(tickets)) == 3


@pytest.mark.parametrize("how", ["reload", "telemetry"])
def test_the_prompt_limit_is_lifted_when_nothing_sees_first_tokens_any_more(how: str) -> None:
    desk = Desk(one("a", 100), first_byte_probe=how == "reload")
    if how != "reload":
        desk.observe("a", Load(first_tokens=0))
    tickets = desk.fill(5, prompt_tokens=3000)
    assert sum(in_use(tickets)) == 1
    if how == "reload":
        desk.set_policy(Policy(classes=CLASSES, shed=False))
    else:
        desk.observe("a", Load(running=1.0))
    assert all(in_use(tickets))


def test_the_prompt_limit_works_from_the_reload_that_brings_a_probe() -> None:
    desk = Desk(one("a", 100))
    desk.set_policy(Policy(classes=CLASSES, shed=False, first_byte_probe=True))
    assert sum(in_use(desk.fill(5, prompt_tokens=3000))) == 1


@pytest.mark.parametrize("how", ["page", "reload", "first token", "adopted"])
def test_prompts_that_were_sent_before_anything_told_of_them_are_under_way(how: str) -> None:
    desk = Desk(one("a", 100))
    first, *others = desk.fill(4, prompt_tokens=3000)
    match how:
        case "page":
            desk.observe("a", Load(first_tokens=0, running=4.0))
        case "reload":
            desk.set_policy(Policy(classes=CLASSES, shed=False, first_byte_probe=True))
        case "first token":
            desk.first_token(first)
            assert not first.prompt_pending
        case "adopted":
            began = desk.adopt(Request("b", desk.now, prompt_tokens=3000), "a", begun=True)
            assert not began.prompt_pending
    pending = [ticket for ticket in (first, *others) if ticket.prompt_pending]
    assert desk.endpoint("a").prefill.tokens == sum(ticket.work_tokens for ticket in pending)


def test_long_prompts_that_were_sent_before_anything_told_of_them_raise_the_limit_too() -> None:
    early, late = Desk(one("a", 100)), Desk(one("a", 100))
    early.observe("a", Load(first_tokens=0))
    for desk in (early, late):
        for _ in range(10):
            desk.release(desk.ask(prompt_tokens=20_000))
        desk.observe("a", Load(first_tokens=0, running=0.0))
    assert late.endpoint("a").prefill.limit == early.endpoint("a").prefill.limit > 20_000


def test_a_first_token_of_a_finished_request_is_ignored() -> None:
    desk = Desk(one("a", 1), first_byte_probe=True)
    ticket = desk.ask(prompt_tokens=10)
    desk.release(ticket)
    desk.first_token(ticket)
    assert desk.endpoint("a").prefill.tokens == 0


def test_prompt_tokens_in_the_making_may_fill_the_limit_exactly() -> None:
    desk = Desk(one("a", 100), first_byte_probe=True)
    tiny, big = desk.ask(prompt_tokens=1), desk.ask(prompt_tokens=5000)
    for limit in (big.work_tokens, big.work_tokens + 1):
        assert in_use([tiny, big]) == [True, False]
        desk.set_policy(Policy(classes=CLASSES, shed=False, first_byte_probe=True, max_prompt_tokens=limit))
    assert in_use([tiny, big]) == [True, True]


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


def test_answers_that_run_out_for_somebody_else_take_no_share_of_the_first_tokens() -> None:
    """Theirs came long ago. What is counted too little would be awaited for ever, and the engine be taken as slow."""
    desk = Desk(one("a", 100))
    desk.observe("a", Load(first_tokens=0, running=2.0, waiting=0.0))
    tickets = desk.fill(8, prompt_tokens=100)
    desk.observe("a", Load(first_tokens=8, running=10.0, waiting=0.0))
    assert desk.endpoint("a").foreign == 2
    assert [ticket.prompt_pending for ticket in tickets] == [False] * 8


def test_a_prompt_that_is_predicted_to_be_computed_makes_room_for_the_next_one() -> None:
    desk = Desk(one("a", 100))
    desk.observe("a", Load(first_tokens=0))
    tickets = desk.fill(3, prompt_tokens=2000)
    due = desk.endpoint("a").prefill.next_change()
    assert due is not None
    lasts = due - desk.now
    assert lasts > 0.0
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


def test_a_prompt_that_is_counted_before_its_first_byte_is_seen_is_booked_anew_beside_the_others() -> None:
    desk = Desk(one("a", 8, kv_capacity_tokens=200_000), first_byte_probe=True)
    desk.observe("a", Load(first_tokens=0, running=0.0, waiting=0.0))
    counted, other = desk.fill(2, prompt_tokens=900)
    desk.advance(0.1)
    desk.observe("a", Load(first_tokens=1, prompt_tokens=300, running=2.0, waiting=0.0))
    assert counted.prompt_pending
    assert counted.prompt_tokens < other.prompt_tokens == 900
    assert desk.endpoint("a").prefill.pending_tokens()[0] == counted.prompt_tokens + 900
    assert desk.endpoint("a").kv.prompts == counted.prompt_tokens + 900


@pytest.mark.parametrize("running", [None, 0.0, 50.0])
def test_a_prompt_is_predicted_by_what_runs_where_the_page_says_so(running: float | None) -> None:
    desk, prefill, other = Desk(one("a", 100)), Prefill(), Ticket(Request("r", 0.0))
    desk.observe("a", Load(first_tokens=0, running=running))
    ticket = desk.ask(prompt_tokens=1000)
    prefill.observe(0, 1.0, 0.0, StepCost(), running or 0.0)
    other.book(1000)
    other.work_tokens = 1000
    prefill.add(other, 0.0)
    assert ticket.computed_at - desk.now == pytest.approx(other.computed_at)
