"""Budgets: how long a request may wait."""

from __future__ import annotations

from random import Random

import pytest

from extproc.admission.outcome import Outcome
from extproc.admission.placing import DUE_AT_ONCE
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Request

from .desk import BATCH, Desk, one


def test_a_request_is_refused_when_its_budget_is_over_and_not_before() -> None:
    desk = Desk(one())
    desk.ask()
    late = desk.ask(request_class="urgent")
    desk.advance(1.999)
    assert desk.outcome(late) is None
    desk.advance(0.001)
    assert desk.outcome(late) is Outcome.BUDGET_EXPIRED
    assert desk.decided[late].wait_s == pytest.approx(2.0)


def test_of_many_whose_budgets_end_in_one_moment_some_are_refused_in_each_event_and_none_is_forgotten() -> None:
    """Ten thousand in one would stop everybody for a tenth of a second."""
    core = Desk(one(), max_queued_requests=1000).core
    waiting = [Ticket(Request(str(number), 100.0)) for number in range(1 + 3 * DUE_AT_ONCE + 1)][1:]
    for ticket in (Ticket(Request("r", 100.0)), *waiting):
        core.offer(ticket, 100.0)
    over = waiting[0].wait_until
    while core.next_deadline() < over:  # their patience with their home's line
        assert core.tick(over - 0.001) == []
    refused = []
    while core.waiting:
        refused.append(core.tick(over))
        assert not core.waiting or core.next_deadline() == over, "it is due again at once"
    assert [len(some) for some in refused] == [DUE_AT_ONCE, DUE_AT_ONCE, DUE_AT_ONCE, 1]
    assert [one.ticket for some in refused for one in some] == waiting
    assert core.next_deadline() != over


def test_who_is_gone_before_it_is_looked_at_is_kept_nowhere_while_very_many_budgets_end() -> None:
    core = Desk(
        one("a", 64, kv_capacity_tokens=64_000), max_queued_requests=5000, short_first=True, patience_s=0.0
    ).core
    sizes = Random(1)
    waiting = [Ticket(Request(str(n), 100.0, prompt_tokens=sizes.randrange(100, 9000))) for n in range(3000)]
    for ticket in waiting:
        core.offer(ticket, 100.0)
    held = [ticket for ticket in waiting if ticket.state is State.LEASED]
    over = max(ticket.wait_until for ticket in waiting)
    while core.waiting:
        refused = core.release(held.pop(), over) if held else core.tick(over)
        assert len(refused) <= 2 * DUE_AT_ONCE
        assert len(core._books.arrived) <= 2 * DUE_AT_ONCE
        assert len(core._lines.alarms) <= 2 * core.waiting + 400
    assert not core._books.arrived


@pytest.mark.parametrize("many", [DUE_AT_ONCE - 1, DUE_AT_ONCE, DUE_AT_ONCE + 50, 2 * DUE_AT_ONCE])
def test_of_many_whose_budgets_are_over_none_gets_the_room_that_opens_in_that_moment(many: int) -> None:
    """Older ones were refused in the same event, since only so many are; who comes after them gets it, and at once."""
    desk = Desk(one("a", 64), max_queued_requests=1000)
    running = desk.fill(64)
    late = [desk.ask(f"late{number}") for number in range(many)]
    desk.advance(10.0)
    fresh = desk.ask("fresh")
    desk.advance(late[0].wait_until - desk.now - 0.01)
    desk.now = late[0].wait_until + 0.01
    desk.release(running[0])  # before any tick
    assert not any(desk.where(ticket) for ticket in late)
    while (due := desk.core.next_deadline()) is not None and due <= desk.now:
        desk.advance(0.0)
    assert {desk.outcome(ticket) for ticket in late} == {Outcome.BUDGET_EXPIRED}
    assert desk.where(fresh) == "a"


def test_a_request_may_ask_for_a_shorter_wait() -> None:
    desk = Desk(one())
    desk.ask()
    hasty = desk.ask(budget_s=0.5)
    desk.advance(0.5)
    assert desk.outcome(hasty) is Outcome.BUDGET_EXPIRED


def test_the_budget_of_its_class_is_the_most_that_a_request_can_ask_for() -> None:
    desk = Desk(one())
    desk.ask()
    greedy = desk.ask(request_class="urgent", budget_s=1e6)
    assert greedy.wait_until - desk.now == greedy.request_class.budget_s < BATCH.budget_s


def test_a_budget_of_zero_means_now_or_never() -> None:
    desk = Desk(one())
    assert desk.outcome(desk.ask(budget_s=0.0)) is Outcome.DISPATCHED
    assert desk.outcome(desk.ask(budget_s=0.0)) is Outcome.BUDGET_EXPIRED


def test_a_replayed_request_keeps_its_age() -> None:
    desk = Desk(one())
    holder = desk.ask()
    replayed = desk.ask(arrived=desk.now - 20.0)
    spent = desk.ask(arrived=desk.now - 31.0)
    assert desk.outcome(spent) is Outcome.BUDGET_EXPIRED
    desk.advance(9.0)
    desk.release(holder)
    assert desk.decided[replayed].wait_s == pytest.approx(29.0)


def test_a_replayed_request_whose_budget_is_over_is_taken_if_there_is_room() -> None:
    desk = Desk(one())
    assert desk.outcome(desk.ask(arrived=desk.now - 31.0)) is Outcome.DISPATCHED


def test_a_request_expires_as_no_endpoint_if_none_lives() -> None:
    desk = Desk(one())
    desk.set_up("a", is_up=False)
    orphan = desk.ask()
    desk.advance(30.0)
    assert desk.outcome(orphan) is Outcome.NO_ENDPOINT


def test_a_request_waits_for_an_endpoint_to_return() -> None:
    desk = Desk(one())
    desk.set_up("a", is_up=False)
    orphan = desk.ask()
    desk.advance(10.0)
    desk.set_up("a", is_up=True)
    assert desk.where(orphan) == "a"
