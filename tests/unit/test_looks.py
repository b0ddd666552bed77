"""What a sidecar that died left running keeps its place, however late Envoy and an engine's page are."""

from __future__ import annotations

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Request
from tests.unit.gate_room import Room

ARRIVED_S = LAWS.foreign.arrived_s
LEFT = 2


class Desk:
    """An engine of four that runs two for a sidecar that is gone, and two of ours, of which it has begun two."""

    def __init__(self) -> None:
        self.room = Room(EndpointSpec("a", max_running_requests=4))
        self.gate, self.clock = self.room.gate, self.room.clock
        self.page(LEFT)
        self.ours = [self.send(), self.send()]
        self.next = self.send()
        self.clock.advance(1.0)
        self.page(4)
        self.clock.advance(1.0)

    def page(self, running: float, *, took_s: float = 0.0) -> None:
        self.gate.observe("a", Load(running=running, waiting=0.0), self.clock.now - took_s)

    def send(self) -> Ticket:
        ticket = Ticket(Request("", self.clock.now))
        self.gate.offer(ticket)
        return ticket

    @property
    def left(self) -> int:
        """How many of theirs run, as far as we know."""
        return self.gate.controller.endpoints["a"].foreign


def test_what_has_ended_and_is_not_told_yet_is_not_taken_for_what_another_left_running():
    """Its end takes longer through Envoy than a page that was asked for in the meantime."""
    here = Desk()
    assert [one.state for one in (*here.ours, here.next)] == [State.LEASED, State.LEASED, State.WAITING]
    waiting = [here.next, here.send(), here.send()]
    for number, ended in enumerate(here.ours):
        here.page(3)
        here.clock.advance(0.8 * ARRIVED_S)
        here.gate.close(ended, Answer.OK)
        assert [one.state for one in waiting] == [State.LEASED] * (number + 1) + [State.WAITING] * (2 - number)
        here.clock.advance(1.0)
    here.page(4)
    assert (here.left, waiting[2].state) == (LEFT, State.WAITING)


@pytest.mark.parametrize(("running", "left"), [(3, 1), (2, 0), (0, 0)])
def test_what_another_left_running_gives_its_room_back_with_the_page_after_the_one_that_showed_its_end(running, left):
    here = Desk()
    here.page(running)
    assert here.left == min(LEFT, running)
    here.clock.advance(1.0)
    here.page(running)
    assert here.left == left


def test_an_end_that_came_later_than_envoy_takes_says_that_ours_was_there():
    here = Desk()
    here.page(3)
    here.clock.advance(2.0 * ARRIVED_S)
    here.gate.close(here.ours[0], Answer.OK)
    here.clock.advance(1.0)
    here.page(3)
    assert here.left == 1


def test_a_page_that_was_asked_for_long_ago_says_nothing_of_what_was_sent_since():
    here = Desk()
    waiting = [here.next, here.send(), here.send()]
    for number, ended in enumerate(here.ours):
        here.gate.close(ended, Answer.OK)
        assert [one.state for one in waiting] == [State.LEASED] * (number + 1) + [State.WAITING] * (2 - number)
        here.clock.advance(5.0 * ARRIVED_S)
        here.page(3, took_s=5.0 * ARRIVED_S)
        here.clock.advance(1.0)
    here.page(4)
    assert (here.left, waiting[2].state) == (LEFT, State.WAITING)


def test_a_page_that_was_asked_for_soon_after_another_and_came_late_does_not_say_that_all_ends_were_told():
    """This process stood still: what Envoy told in the meantime is read after the page."""
    here = Desk()
    here.page(3)
    here.clock.advance(5.0 * ARRIVED_S)
    here.page(3, took_s=4.5 * ARRIVED_S)
    here.gate.close(here.ours[0], Answer.OK)
    here.clock.advance(1.0)
    here.page(4)
    assert here.left == LEFT


@pytest.mark.parametrize("end", ["nobody else is there", "the endpoint is gone"])
def test_nothing_is_kept_of_a_page_where_others_requests_are_over_or_the_endpoint_is(end):
    here = Desk()
    assert here.gate._looks._looks
    if end == "the endpoint is gone":
        here.gate.remove_endpoints(["a"])
    else:
        here.page(0)
        here.page(0)
    assert not here.gate._looks._looks


@pytest.mark.parametrize(
    ("shown", "is_over"), [((0,) * 13, True), ((0,) * 6 + (1,) + (0,) * 6, False)], ids=["never", "now and then"]
)
def test_short_answers_of_ours_hide_for_ten_seconds_at_most_that_nobody_else_is_there(shown, is_over):
    """Around each page one of ours ends: 8 of 32 places stayed empty for a minute, and requests waited 3 s."""
    here = Desk()
    waiting = [here.next, *(here.send() for _ in shown)]
    for others in shown:
        running = [ticket for ticket in (*here.ours, *waiting) if ticket.state is State.LEASED]
        here.page(len(running) + others)
        here.clock.advance(0.5 * ARRIVED_S)
        here.gate.close(running[0], Answer.OK)
        here.clock.advance(1.0 - 0.5 * ARRIVED_S)
    assert (here.left == 0) is is_over


def test_one_of_ours_that_went_elsewhere_may_not_have_been_there_however_late_it_ended():
    here = Desk()
    here.gate.put_endpoint(EndpointSpec("b", max_running_requests=4))
    here.page(3)
    here.gate.move(here.ours[0], "b")
    here.clock.advance(2.0 * ARRIVED_S)
    here.gate.close(here.ours[0], Answer.OK)
    here.clock.advance(1.0)
    here.page(2)
    assert here.left == LEFT
