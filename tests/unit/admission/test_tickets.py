"""Tickets: illegal transitions, deadlines, memory, what people read."""

from __future__ import annotations

import gc

import pytest

from extproc.admission.alarms import NEVER, Alarms
from extproc.admission.outcome import Outcome
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Policy, Request, RequestClass
from extproc.errors import TransitionError

from .desk import Desk, one


def test_illegal_transitions_raise_and_change_nothing() -> None:
    desk = Desk(one("a", 1))
    leased, waits = desk.fill(2)
    new, done = Ticket(Request("new", desk.now)), None
    core, before = desk.core, repr(desk.core)
    for event, ticket in [
        (core.cancel, new), (core.release, new),
        (core.offer, waits), (core.release, waits),
        (core.offer, leased), (core.cancel, leased),
    ]:  # fmt: skip
        with pytest.raises(TransitionError, match=r"can't be \w+: it is"):
            event(ticket, desk.now + 1.0)
    assert (repr(core), core._books.now) == (before, desk.now)
    desk.check()
    desk.release(leased)
    done = leased
    desk.cancel(desk.ask())
    for event in (core.offer, core.cancel, core.release):
        with pytest.raises(TransitionError):
            event(done, desk.now)


def test_the_next_deadline_is_never_before_now() -> None:
    desk = Desk(one("a", 1))
    desk.ask()
    desk.ask(budget_s=0.5)
    desk.now += 5.0
    desk.fill(1)
    assert desk.core.next_deadline() == desk.now


def test_nothing_is_due_when_nothing_waits() -> None:
    desk = Desk(one("a", 1))
    held = desk.ask()
    desk.cancel(desk.ask())
    desk.release(held)
    assert desk.core.next_deadline() is None


def test_reloading_classes_again_and_again_leaves_no_counters_behind() -> None:
    desk = Desk(one("a", 1))
    desk.ask()
    for number in range(50):
        desk.set_policy(Policy(classes=(RequestClass("std", 0, 30.0 + number),), shed=False))
        desk.cancel(desk.ask())
    assert not desk.core._books.pools.any_model.waiting


def test_a_ticket_that_ended_is_kept_nowhere_once_its_alarm_is_over() -> None:
    desk = Desk(one("a", 1), one("b", 1))
    core = desk.core
    for end in ("release", "cancel", "refuse", "expire", "evict"):
        holders = [Ticket(Request("holder", desk.now)) for _ in range(2)]
        ticket = Ticket(Request("watched", desk.now, session="s", tenant="t", home="a", budget_s=2.0))
        for each in (*holders, ticket):
            core.offer(each, desk.now)
        match end:
            case "release":
                core.release(holders[0], desk.now, Answer.OK)
                core.release(holders.pop(1), desk.now)
                core.tick(desk.now + 1.0)
                core.release(ticket, desk.now)
                holders.clear()
            case "cancel":
                core.cancel(ticket, desk.now)
            case "refuse":
                core.set_policy(Policy(max_queued_requests=0), desk.now)
                core.offer(extra := Ticket(Request("extra", desk.now)), desk.now)
                assert extra.state is State.LEFT
                core.cancel(ticket, desk.now)
                core.set_policy(Policy(), desk.now)
            case "evict":
                core.set_up("a", desk.now, is_up=False)
                core.cancel(ticket, desk.now)
                core.set_up("a", desk.now, is_up=True)
        desk.now += 60.0
        core.tick(desk.now)
        core.next_deadline()
        for holder in holders:
            core.release(holder, desk.now)
        assert ticket.state in (State.DONE, State.LEFT), end
        gc.collect()
        kept = [referrer for referrer in gc.get_referrers(ticket) if referrer is not globals()]
        assert not [k for k in kept if not _is_frame(k)], end


def _is_frame(thing: object) -> bool:
    return type(thing).__name__ == "frame"


def test_alarms_of_those_who_left_are_bounded() -> None:
    desk = Desk(one("a", 1))
    desk.ask()
    for _ in range(2000):  # not through the desk: it asks for the next deadline, which drops dead alarms too
        desk.core.offer(ticket := Ticket(Request("r", desk.now)), desk.now)
        desk.core.cancel(ticket, desk.now)
    assert len(desk.core._lines.alarms) <= 300


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


def test_alarms_that_are_set_again_and_again_are_bounded_by_twice_those_who_wait() -> None:
    alarms, ticket = Alarms(), Ticket(Request("r", 0.0))
    ticket.state = State.WAITING
    for number in range(10_000):
        alarms.set(ticket, float(number), 1000)
        assert len(alarms) <= 2 * 1000 + 256
    looks = [alarms.next() for _ in range(300)]  # each drops some of the dead ones before it
    assert looks == sorted(looks)
    assert looks[-1] == 9999.0


@pytest.mark.parametrize("asked", [False, True])
def test_an_alarm_that_went_and_came_back_is_due_after_those_that_were_set_meanwhile(asked: bool) -> None:
    """Who asks for the next alarm changes nothing: a recording that runs again asks at other moments."""
    alarms, first, second = Alarms(), Ticket(Request("first", 0.0)), Ticket(Request("second", 0.0))
    alarms.set(first, 2.0, 2)
    alarms.set(first, 9.0, 2)
    assert not asked or alarms.next() == 9.0
    alarms.set(second, 2.0, 2)
    alarms.set(first, 2.0, 2)
    assert list(alarms.due(2.0)) == [second, first]


def test_an_alarm_that_was_called_off_can_be_set_for_the_same_moment_again() -> None:
    alarms: Alarms[Ticket] = Alarms()
    ticket = Ticket(Request("r", 0.0))
    alarms.set(ticket, 1.0, 1)
    ticket.alarm_number = 0
    assert alarms.next() is None
    alarms.set(ticket, 1.0, 1)
    assert list(alarms.due(1.0)) == [ticket]
    alarms.set(ticket, 1.0, 1)
    assert list(alarms.due(1.0)) == [ticket]


class Sleeper:
    """One who wants to be woken, and counts the looks at it."""

    alarm, number = NEVER, 0

    def __init__(self, looked_at: list[Sleeper]) -> None:
        self.looked_at = looked_at

    @property
    def alarm_number(self) -> int:
        self.looked_at.append(self)
        return self.number

    @alarm_number.setter
    def alarm_number(self, number: int) -> None:
        self.number = number


def test_who_asks_for_the_next_alarm_looks_at_some_of_those_that_went_unused_and_gets_none_too_late() -> None:
    looked_at: list[Sleeper] = []
    alarms: Alarms[Sleeper] = Alarms()
    sleepers = [Sleeper(looked_at) for _ in range(1000)]
    for number, sleeper in enumerate(sleepers):
        alarms.set(sleeper, float(number), 1000)
    for sleeper in sleepers[:900]:
        sleeper.number = 0
    at = 0.0
    while at < 900.0:
        looked_at.clear()
        before, at = at, alarms.next() or 0.0
        assert before <= at <= 900.0
        assert len(looked_at) <= 20
    assert next(alarms.due(900.0)) is sleepers[900]


def test_those_that_are_due_come_however_many_before_them_went_unused() -> None:
    alarms: Alarms[Sleeper] = Alarms()
    sleepers = [Sleeper([]) for _ in range(1000)]
    for sleeper in sleepers:
        alarms.set(sleeper, 1.0, 1000)
    for sleeper in sleepers[:-1]:
        sleeper.number = 0
    assert list(alarms.due(1.0)) == sleepers[-1:]


def test_no_alarm_has_to_look_at_all_others_to_drop_those_that_are_wanted_no_more() -> None:
    looked_at: list[Sleeper] = []
    alarms: Alarms[Sleeper] = Alarms()
    sleepers = [Sleeper(looked_at) for _ in range(4000)]
    for number, sleeper in enumerate(sleepers):
        looked_at.clear()
        alarms.set(sleeper, 1.0 + number % 1000, 500)
        assert len(looked_at) <= 64
        sleepers[number // 2].alarm_number = 0
    assert len(alarms) <= 2.25 * 2000
    due = [(one.alarm, one) for one in sleepers if one.number]
    assert list(alarms.due(999.0)) == [one for at, one in sorted(due, key=lambda one: one[0]) if at <= 999.0]


def test_who_came_later_than_now_by_another_clock_has_not_waited() -> None:
    desk = Desk(one("a", 1))
    ticket = desk.ask("from the future", arrived=desk.now + 5.0)
    assert desk.decided[ticket].wait_s == 0.0


def test_of_a_request_that_never_waited_there_is_nothing_to_ask() -> None:
    desk = Desk(one("a", 1))
    new, sent = Ticket(Request("new", desk.now)), Ticket(Request("sent", desk.now))
    desk.core.send(sent, desk.now)
    assert (new.why(), sent.why()) == ({}, {})


def test_what_people_ask_of_a_wait_is_told_to_the_millisecond() -> None:
    desk = Desk(one("a", 1))
    desk.ask()
    waits = desk.ask(budget_s=1.23456)
    waits.predicted_s = 0.98765
    assert waits.why() == {"budget_s": 1.235, "predicted_wait_s": 0.988, "waited_for": "limit"}
