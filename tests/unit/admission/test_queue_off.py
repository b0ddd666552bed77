"""The queue switched off: endpoints are chosen, nothing is held."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission import settling
from extproc.admission.outcome import Outcome
from extproc.admission.placing import DUE_AT_ONCE
from extproc.admission.ticket import Ticket
from extproc.admission.values import Dispatch, Policy, Request

from .desk import CLASSES, Desk, in_use, let_all_go, one

if TYPE_CHECKING:
    import pytest


def test_without_a_queue_the_endpoint_with_the_fewest_in_flight_takes_each_request() -> None:
    desk = Desk(one("a", 1), one("b", 1), enable_queue=False)
    assert sorted(str(desk.where(ticket)) for ticket in desk.fill(20)) == ["a"] * 10 + ["b"] * 10


def test_without_a_queue_a_doubtful_endpoint_is_better_than_none() -> None:
    desk = Desk(one("a"), enable_queue=False)
    desk.set_up("a", is_up=False)
    decisions = desk.core.offer(Ticket(Request("r", desk.now)), desk.now)
    assert isinstance(decisions[0], Dispatch)


def test_without_a_queue_and_without_endpoints_a_request_is_refused() -> None:
    desk = Desk(enable_queue=False)
    assert desk.outcome(desk.ask()) is Outcome.NO_ENDPOINT


def test_switching_the_queue_off_lets_all_go_at_once() -> None:
    desk = Desk(one("a"), one("b"))
    tickets = desk.fill(40)
    tickets += [desk.ask(home="a") for _ in range(20)]
    desk.set_policy(Policy(classes=CLASSES, enable_queue=False))
    desk.advance(0.0)
    assert all(in_use(tickets))
    assert desk.order[:2] == ["filler0", "filler1"]


def test_switching_the_queue_off_lets_all_go_though_every_endpoint_is_down() -> None:
    desk = Desk(one("a"))
    desk.set_up("a", is_up=False)
    tickets = [Ticket(Request(str(number), desk.now)) for number in range(DUE_AT_ONCE)]
    for ticket in tickets:
        desk.core.offer(ticket, desk.now)
    decisions = desk.core.set_policy(Policy(enable_queue=False), desk.now)
    assert [decision.ticket for decision in decisions] == tickets
    assert all(in_use(tickets))


def test_switching_the_queue_off_refuses_those_for_whom_there_is_no_endpoint() -> None:
    desk = Desk()
    tickets = desk.fill(3)
    desk.set_policy(Policy(classes=CLASSES, enable_queue=False))
    assert {desk.outcome(ticket) for ticket in tickets} == {Outcome.NO_ENDPOINT}


def test_of_many_for_whom_there_is_no_endpoint_some_are_refused_in_each_event_once_the_queue_is_off() -> None:
    core = Desk(max_queued_requests=1000).core
    waiting = [Ticket(Request(str(number), 100.0)) for number in range(600)]
    for ticket in waiting:
        core.offer(ticket, 100.0)
    refused = let_all_go(core, 100.0, at_once=DUE_AT_ONCE)
    assert [one.ticket for one in refused] == waiting
    assert {one.outcome for one in refused} == {Outcome.NO_ENDPOINT}


def test_those_who_are_yet_to_go_when_the_queue_is_on_again_wait_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "PIECE", 12)
    desk = Desk(one("a", 4))
    held, waiting = desk.fill(4), desk.fill(8)
    desk.set_policy(Policy(classes=CLASSES, enable_queue=False))
    assert in_use(waiting) == [True] * 3 + [False] * 5
    desk.set_policy(Policy(classes=CLASSES))
    desk.advance(0.0)
    assert in_use(waiting) == [True] * 3 + [False] * 5
    for ticket in (*held, *waiting[:3]):
        desk.release(ticket)
    assert in_use(waiting[3:]) == [True] * 4 + [False]


def test_without_a_queue_the_emptiest_of_the_doubtful_endpoints_is_chosen() -> None:
    desk = Desk(one("a"), one("b"), enable_queue=False)
    core, now = desk.core, desk.now
    for name in "ab":
        core.set_up(name, now, is_up=False)
    tickets = [Ticket(Request("r", now)) for _ in range(6)]
    for ticket in tickets:
        core.offer(ticket, now)
    assert [len(desk.endpoint(name).leases) for name in "ab"] == [3, 3]


def test_many_who_go_at_once_to_endpoints_that_are_all_down_each_go_to_the_emptiest() -> None:
    desk = Desk(*(one(name, 5) for name in "abc"))
    desk.set_up("c", is_up=False)
    held = desk.fill(10)
    for ticket in [ticket for ticket in held if desk.where(ticket) == "a"][:3]:
        desk.release(ticket)
    for name in "ab":
        desk.set_up(name, is_up=False)
    of_b = [ticket for ticket in held if desk.where(ticket) == "b"]
    for ended in ([], of_b[:4]):  # each pass looks anew
        for ticket in ended:
            desk.release(ticket)
        waiting = desk.fill(5)
        holds = {endpoint.name: (endpoint.held, endpoint.picked) for endpoint in desk.core.endpoints.values()}
        picks = max(picked for _, picked in holds.values())
        desk.set_policy(Policy(classes=CLASSES, enable_queue=False))
        for number, ticket in enumerate(waiting, 1):
            least = min(holds, key=holds.__getitem__)
            assert desk.where(ticket) == least
            holds[least] = (holds[least][0] + 1, picks + number)
        desk.set_policy(Policy(classes=CLASSES))


def test_without_a_queue_the_emptiest_endpoint_is_chosen_again_and_again() -> None:
    desk = Desk(one("a"), one("b"), enable_queue=False)
    for ticket in desk.fill(6):
        if desk.where(ticket) == "b":
            desk.release(ticket)
    assert [desk.where(ticket) for ticket in desk.fill(3)] == ["b", "b", "b"]
