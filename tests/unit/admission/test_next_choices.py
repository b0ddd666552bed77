"""Where a gateway may go instead of the endpoint that was picked: a slot is reserved there, no limit is passed."""

from __future__ import annotations

import random

import pytest

from extproc.admission.controller import Controller
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request, RequestClass

CLASSES = (RequestClass("std", 0, 30.0),)
LIMIT = 3


class Pick:
    """A core whose gateway goes to any of the choices that a request was given, and tells so when an answer begins."""

    def __init__(self, count: int, limit: int = LIMIT, most: int = 2) -> None:
        self.core, self.now = Controller(Policy(classes=CLASSES, shed=False, next_choices=most)), 0.0
        self.limit = limit
        for number in range(count):
            self.core.put_endpoint(EndpointSpec(f"e{number}", f"e{number}", max_running_requests=limit), 0.0)
            self.core.set_up(f"e{number}", now=0.0, is_up=True)

    def ask(self, **request: object) -> Ticket:
        ticket = Ticket(Request("r", self.now, **request))
        self.core.offer(ticket, self.now)
        return ticket

    def reserved(self) -> int:
        return sum(one.reserved for one in self.core.endpoints.values())


def test_a_request_that_waits_goes_before_what_could_be_reserved():
    pick = Pick(2, limit=2)
    running = [pick.ask() for _ in range(4)]
    waits = [pick.ask() for _ in range(2)]
    for ticket in running:
        pick.core.release(ticket, 1.0)
    assert [ticket.state for ticket in waits] == [State.LEASED] * 2
    assert waits[0].choices == ()


def test_nothing_is_reserved_of_what_a_request_of_several_sequences_waits_for():
    pick = Pick(2, limit=4)
    pick.ask()
    pick.ask()
    wide = pick.ask(sequences=4)
    passing = pick.ask()
    assert (wide.state, passing.state) == (State.WAITING, State.LEASED)
    assert passing.choices == ()


def test_a_next_choice_whose_last_slot_it_would_be_is_none():
    pick = Pick(2, limit=2)
    first, second = pick.ask(), pick.ask()
    assert [one.name for one in first.choices] == ["e1"]
    assert second.choices == ()
    assert [pick.ask().state for _ in range(2)] == [State.LEASED, State.WAITING], "one slot is the first one's"
    pick.core.release(first, 1.0)
    assert pick.core.waiting == 0


def test_what_an_endpoint_had_reserved_that_goes_and_comes_back_is_not_counted_twice():
    pick = Pick(2)
    ticket = pick.ask()
    pick.core.remove_endpoints(["e1"], 1.0)
    pick.core.put_endpoint(EndpointSpec("e1", "e1", max_running_requests=LIMIT), 2.0)
    pick.core.release(ticket, 3.0)
    assert pick.reserved() == 0


def test_what_an_endpoint_had_reserved_that_goes_and_comes_back_is_still_kept_there():
    pick = Pick(2)
    ticket = pick.ask(home="e0")
    assert [one.name for one in ticket.choices] == ["e1"]
    pick.core.remove_endpoints(["e1"], 1.0)
    pick.core.put_endpoint(EndpointSpec("e1", "e1", max_running_requests=LIMIT), 2.0)
    pick.core.set_up("e1", 2.0, is_up=True)
    for _ in range(LIMIT):
        pick.ask(home="e1")
    pick.core.move(ticket, "e1", 3.0)
    assert len(pick.core.endpoints["e1"].leases) == LIMIT


def test_an_endpoint_that_is_gone_is_forgotten_once_nothing_is_reserved_there():
    pick = Pick(2)
    ticket = pick.ask()
    (other,) = ticket.choices
    pick.core.remove_endpoints([other.name], 1.0)
    pick.core.release(ticket, 2.0)
    assert other.name not in pick.core.endpoints


def test_who_answers_from_a_next_choice_that_goes_holds_its_slot_there_to_the_end():
    pick = Pick(2)
    ticket = pick.ask(home="e0")
    pick.core.remove_endpoints(["e1"], 1.0)
    pick.core.move(ticket, "e1", 2.0)
    assert list(pick.core.endpoints["e1"].leases) == [ticket]
    pick.core.release(ticket, 3.0)
    assert list(pick.core.endpoints) == ["e0"]


@pytest.mark.parametrize("seed", range(4))
def test_wherever_gateways_go_along_their_lists_no_endpoint_ever_runs_more_than_its_limit(seed):
    """What really runs where is counted here: from the pick on, each may be at any of its choices."""
    draw, pick = random.Random(seed), Pick(5)
    begun: dict[Ticket, None] = {}
    unsure: list[Ticket] = []
    waiting: list[Ticket] = []
    moved = 0
    for step in range(4000):
        pick.now += 0.01
        if step % 50 == 0:
            crowd = draw.randrange(2, 20)
        if draw.random() < 0.6 and len(begun) + len(unsure) + len(waiting) < crowd:
            waiting.append(pick.ask(sequences=draw.choice((1, 1, 1, 2))))
        elif unsure and draw.random() < 0.5:
            ticket = unsure.pop(draw.randrange(len(unsure)))
            served = draw.choice((ticket.endpoint, ticket.endpoint, *ticket.choices))
            moved += served is not ticket.endpoint
            pick.core.move(ticket, served.name, pick.now)
            pick.core.answered(ticket, pick.now)
            begun[ticket] = None
        elif begun or unsure:
            ticket = draw.choice([*begun, *unsure])
            begun.pop(ticket, None)
            unsure = [one for one in unsure if one is not ticket]
            pick.core.release(ticket, pick.now, draw.choice((Answer.OK, Answer.UNKNOWN)))
        unsure += [ticket for ticket in waiting if ticket.state is State.LEASED]
        waiting = [ticket for ticket in waiting if ticket.state is State.WAITING]
        for name, endpoint in pick.core.endpoints.items():
            may_run = [one for one in (*begun, *unsure) if endpoint in (one.endpoint, *one.choices)]
            assert sum(one.sequences for one in may_run) <= LIMIT, name
            assert endpoint.reserved == sum(one.sequences for one in may_run if one.endpoint is not endpoint)
    assert moved > 50
    for ticket in (*begun, *unsure):
        pick.core.release(ticket, pick.now)
    assert pick.reserved() == 0


def test_no_full_endpoint_is_a_next_choice_while_another_has_room_however_often_rooms_changed():
    """The heap of rooms holds entries out of date: behind those that it names first, there is somebody with room."""
    count, limit = 40, 4
    pick, draw = Pick(count, limit, most=1), random.Random(1)
    held: list[Ticket] = []
    for number in range(1500):
        pick.now += 0.01
        ticket = pick.ask()
        held.append(ticket)
        spare = [one for one in pick.core.endpoints.values() if one is not ticket.endpoint and one.spares_for(ticket)]
        assert ticket.choices or len(spare) < 8, f"pick {number}: nobody is listed while {len(spare)} have room"
        pick.core.move(ticket, ticket.endpoint.name, pick.now)
        while len(held) > 0.6 * count * limit:
            pick.core.release(held.pop(draw.randrange(len(held))), pick.now)
