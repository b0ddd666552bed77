"""Requests that Envoy replays to a restarted sidecar come back in random order; the gate puts them right."""

from __future__ import annotations

import heapq
import itertools
import logging
import random
from typing import TYPE_CHECKING

import pytest

from extproc.admission.controller import Controller
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request, RequestClass
from extproc.stream.by_age import LET_GO_IN_A_TURN
from extproc.stream.gate import BURST, Gate
from extproc.stream.replays import GATHER_S, QUIET_S, REPLAYED_S, REPLAYS_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.values import Decision


CAME_BACK = (
    "request(s) came back, held for a sidecar that is gone or was stopped, or were slow to upload; the oldest was"
)


class Loop:
    """A loop whose time stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 50.0
        self._timers: list[tuple[float, int, list[Callable[[], None]]]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.call_at(self.now, callback)

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        timer = Timer([callback])
        heapq.heappush(self._timers, (when, next(self._numbers), timer.callbacks))
        return timer

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, _, callbacks = heapq.heappop(self._timers)
            for callback in callbacks:
                callback()
        self.now = end

    def turn(self, seconds: float) -> None:
        """Move to what is due first in the next `seconds`, and let only that happen."""
        if self._timers[0][0] <= self.now + seconds:
            self.now, _, callbacks = heapq.heappop(self._timers)
            for callback in callbacks:
                callback()


class Timer:
    def __init__(self, callbacks: list[Callable[[], None]]) -> None:
        self.callbacks = callbacks

    def cancel(self) -> None:
        self.callbacks.clear()


class Room:
    """A gate with one endpoint of so many slots, and who was sent there, in order."""

    def __init__(self, slots: int = 1, *, enable_queue: bool = True) -> None:
        self.loop = Loop()
        self.sent: list[str] = []
        self.cancelled_ids: list[str] = []
        policy = Policy(classes=(RequestClass("default", 0, 30.0),), enable_queue=enable_queue)
        self.gate = Gate(Controller(policy), self.loop, [self])
        self.gate.put_endpoint(EndpointSpec("a", max_running_requests=slots))
        self.gate.expect_replays()

    def decided(self, decision) -> None:
        self.sent.append(decision.ticket.request.id)

    def cancelled(self, ticket, wait_s) -> None:
        self.cancelled_ids.append(ticket.request.id)

    def offer(self, name: str, age_s: float = 0.0) -> Ticket:
        ticket = Ticket(Request(name, self.loop.now - age_s))
        self.gate.offer(ticket)
        return ticket

    def run_dry(self, *tickets: Ticket) -> None:
        for _ in tickets:
            for ticket in tickets:
                if ticket.state is State.LEASED:
                    self.gate.close(ticket, Answer.OK)


def test_replayed_requests_go_in_the_order_in_which_they_came_to_envoy():
    room = Room()
    tickets = [room.offer(f"r{age}", age) for age in (3, 5, 2, 4)]
    assert room.sent == []
    room.loop.advance(GATHER_S)
    room.run_dry(*tickets)
    assert room.sent == ["r5", "r4", "r3", "r2"]


def test_the_log_says_once_how_many_came_back_and_how_old_the_oldest_is(caplog):
    caplog.set_level(logging.INFO, "extproc.queue")
    room = Room()
    for number in range(2 * LET_GO_IN_A_TURN + 9):
        room.offer(f"r{number}", 3 + number / 1000)
    room.offer("new")
    room.gate.close(room.offer("left", 4))
    room.loop.advance(2 * REPLAYS_S)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"210 {CAME_BACK} 4.0 s old"]


def test_how_old_the_oldest_was_is_told_by_the_clocks_as_they_are_known_in_the_end(caplog):
    """Where Envoy's clock is behind ours, the first ones seem older than they are."""
    caplog.set_level(logging.INFO, "extproc.queue")
    room, offsets_s = Room(), [0.0]
    room.gate.expect_replays(lambda: offsets_s[-1])
    room.offer("first", 14.0)
    offsets_s.append(10.0)
    room.offer("second", 3.0)
    room.loop.advance(2 * REPLAYS_S)
    assert [record.getMessage() for record in caplog.records] == [f"2 {CAME_BACK} 4.0 s old"]


def test_of_those_who_came_back_and_left_before_they_had_a_place_the_log_tells_too(caplog):
    caplog.set_level(logging.INFO, "extproc.queue")
    room = Room()
    room.gate.close(room.offer("left", 4))
    room.loop.advance(2 * REPLAYS_S)
    assert [record.getMessage() for record in caplog.records] == [f"1 {CAME_BACK} 4.0 s old"]


def test_without_a_replayed_request_the_log_says_nothing(caplog):
    caplog.set_level(logging.INFO, "extproc.queue")
    room = Room()
    room.offer("new")
    room.loop.advance(2 * REPLAYS_S)
    room.gate.drain()
    assert not caplog.records


def test_a_new_request_between_replayed_ones_does_not_pass_them():
    room = Room()
    tickets = [room.offer("old", 3), room.offer("new"), room.offer("older", 4)]
    room.loop.advance(GATHER_S)
    room.run_dry(*tickets)
    assert room.sent == ["older", "old", "new"]


def test_many_are_let_go_some_in_a_turn_and_who_comes_meanwhile_stands_behind_them():
    room = Room()
    ages = random.Random(1).sample(range(1000), 2 * LET_GO_IN_A_TURN + 50)
    tickets = []
    for age in ages:
        tickets.append(room.offer(f"r{age}", 9 + room.loop.now + age / 1000))
        room.loop.advance(0.99 * GATHER_S / len(ages))
    expected = [f"r{age}" for age in sorted(ages, reverse=True)]
    room.loop.turn(GATHER_S)
    assert room.gate.waiting + len(room.sent) == LET_GO_IN_A_TURN
    tickets.append(room.offer("new"))
    room.gate.close(tickets.pop(ages.index(min(ages))))
    assert room.cancelled_ids == [expected.pop()]
    room.loop.turn(0.0)
    assert room.gate.waiting + len(room.sent) == 2 * LET_GO_IN_A_TURN
    room.loop.turn(0.0)
    assert room.gate.waiting + len(room.sent) == len(tickets)
    tickets.append(room.offer("late", 9))
    assert room.gate.waiting + len(room.sent) == len(tickets)
    room.run_dry(*tickets)
    assert room.sent == [*expected, "new", "late"]


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_drain_before_or_amid_letting_many_go_forgets_nobody(turns):
    room = Room()
    tickets = [room.offer(f"r{number}", 3 + number / 1000) for number in range(3 * LET_GO_IN_A_TURN)]
    for _ in range(turns):
        room.loop.turn(GATHER_S)
    room.gate.drain()
    room.loop.advance(0.0)
    assert {ticket.state for ticket in tickets} == {State.LEASED, State.LEFT}
    assert room.offer("late", 3).state is State.LEFT


def test_a_sidecar_that_is_told_to_end_while_it_gathers_many_lets_them_go_some_in_a_turn():
    room = Room(1000)
    tickets = [room.offer(f"r{number}", 3 + number / 1000) for number in range(3 * LET_GO_IN_A_TURN)]
    for _ in range(3):  # as a drain does, a leader that resigns, and the end of all waiting
        room.gate.stop_gathering()
    assert room.gate.waiting + len(room.sent) == LET_GO_IN_A_TURN
    room.loop.advance(0.0)
    assert room.gate.waiting + len(room.sent) == len(tickets)


def test_a_drain_amid_letting_go_refuses_a_few_in_each_turn():
    room = Room()
    tickets = [room.offer(f"r{number}", 3 + number / 1000) for number in range(3 * LET_GO_IN_A_TURN)]
    room.gate.drain()
    told = [len(room.sent)]
    while len(room.sent) < len(tickets):
        room.loop.turn(0.0)
        told.append(len(room.sent) - sum(told))
    assert max(told[1:]) == BURST


def test_who_comes_while_a_sidecar_that_is_told_to_end_lets_others_go_stands_behind_them():
    room = Room()
    tickets = [room.offer(f"r{number}", 3 + number / 1000) for number in range(2 * LET_GO_IN_A_TURN)]
    room.loop.turn(GATHER_S)
    room.gate.stop_gathering()
    tickets.append(room.offer("new"))
    room.loop.advance(0.0)
    room.run_dry(*tickets)
    assert room.sent[-1] == "new"


def test_a_fault_at_one_that_is_let_go_keeps_no_other_back(monkeypatch):
    room = Room()
    tickets = [room.offer(f"r{number}", 4 - number / 1000) for number in range(LET_GO_IN_A_TURN + 2)]
    told = room.decided

    def fails_once(decision: Decision) -> None:
        told(decision)
        if decision.ticket is tickets[0]:
            raise RuntimeError("a bug")

    monkeypatch.setattr(room, "decided", fails_once)
    with pytest.raises(RuntimeError, match="a bug"):
        room.loop.advance(GATHER_S)
    room.loop.advance(0.0)
    tickets.append(room.offer("new"))
    room.run_dry(*tickets)
    assert room.sent == [*(f"r{number}" for number in range(LET_GO_IN_A_TURN + 2)), "new"]


def test_what_the_clocks_differ_by_is_taken_off_once_though_many_are_let_go_over_turns():
    room, offsets_s = Room(), [0.0]
    room.gate.expect_replays(lambda: offsets_s[-1])
    tickets = [room.offer(f"r{number}", 3 + number / 1000) for number in range(2 * LET_GO_IN_A_TURN + 1)]
    stamps = [ticket.request.arrived for ticket in tickets]
    offsets_s.append(0.5)
    room.loop.advance(GATHER_S)
    moved_s = {round(ticket.request.arrived - stamp, 6) for ticket, stamp in zip(tickets, stamps, strict=True)}
    assert moved_s == {0.5}


def test_whose_age_was_told_before_the_clocks_were_known_to_differ_stands_where_its_true_age_puts_it():
    room, offsets_s = Room(), [0.0]
    room.gate.expect_replays(lambda: offsets_s[-1])
    tickets = [room.offer("4 s old, said to be 14", 14.0)]
    offsets_s.append(10.0)
    tickets.append(room.offer("4.5 s old", 4.5))
    room.loop.advance(GATHER_S)
    room.run_dry(*tickets)
    assert room.sent == ["4.5 s old", "4 s old, said to be 14"]


def test_one_whose_stream_ends_by_what_another_is_told_gets_no_slot():
    room = Room(slots=2)
    gone = Ticket(Request("gone", room.loop.now - 3))
    first = Ticket(Request("first", room.loop.now - 4), lambda _: room.gate.close(gone))
    for ticket in (gone, first):
        room.gate.offer(ticket)
    room.loop.advance(GATHER_S)
    assert (room.sent, room.cancelled_ids) == (["first"], ["gone"])


def test_without_a_replayed_request_nothing_is_kept_back():
    room = Room()
    room.offer("new")
    assert room.sent == ["new"]


def test_long_after_a_start_an_old_request_is_not_kept_back():
    room = Room()
    room.loop.advance(REPLAYS_S)
    room.offer("slow upload", 5)
    assert room.sent == ["slow upload"]


def test_replays_that_come_behind_a_pause_are_gathered_too():
    room = Room()
    tickets = [room.offer("first", 3)]
    room.loop.advance(QUIET_S)
    assert room.sent == ["first"]
    tickets += [room.offer("younger", 2), room.offer("older", 4)]
    room.loop.advance(GATHER_S)
    room.run_dry(*tickets)
    assert room.sent == ["first", "older", "younger"]


def test_requests_are_gathered_once_and_not_again():
    room = Room(slots=4)
    room.offer("first", 3)
    room.loop.advance(GATHER_S)
    room.offer("late", 3)
    assert room.sent == ["first", "late"]


def test_with_the_queue_off_nothing_is_kept_back():
    room = Room(enable_queue=False)
    room.offer("old", 3)
    assert room.sent == ["old"]


def test_a_client_that_leaves_while_replays_are_gathered_is_forgotten_and_counted():
    room = Room()
    gone, here = room.offer("gone", 3), room.offer("here", 2)
    room.gate.close(gone)
    room.loop.advance(GATHER_S)
    assert room.sent == ["here"]
    assert room.cancelled_ids == ["gone"]
    room.gate.close(here)


def test_a_drain_does_not_forget_what_is_being_gathered():
    room = Room()
    first, second = room.offer("r3", 3), room.offer("r4", 4)
    room.gate.drain()
    assert room.sent == ["r4", "r3"]
    assert (second.state, first.state) == (State.LEASED, State.LEFT)
    room.loop.advance(GATHER_S)
    assert room.sent == ["r4", "r3"]


def test_a_drain_that_begins_while_requests_are_gathered_gives_them_their_places_first():
    room = Room(slots=1)
    first, second = room.offer("later", 2.0), room.offer("earlier", 3.0)
    room.gate.stop_gathering()
    assert room.sent == ["earlier"]
    assert room.gate.controller.waiting == 1
    room.run_dry(first, second)
    assert room.sent == ["earlier", "later"]


def test_who_leaves_while_it_is_gathered_is_counted_in_its_own_class():
    loop, seen = Loop(), []

    class Observer:
        def decided(self, decision) -> None:
            seen.append(decision)

        def cancelled(self, ticket, wait_s) -> None:
            seen.append(ticket.request_class.name)

    classes = (RequestClass("bronze", 0, 30.0), RequestClass("gold", 1, 30.0))
    gate = Gate(Controller(Policy(classes=classes)), loop, [Observer()])
    gate.put_endpoint(EndpointSpec("a", max_running_requests=1))
    gate.expect_replays()
    ticket = Ticket(Request("x", loop.now - 3, request_class="gold"))
    gate.offer(ticket)
    gate.close(ticket)
    assert seen == ["gold"]


def test_what_is_gathered_goes_as_soon_as_no_more_is_replayed():
    room = Room(slots=9)
    for age_s in (3, 5):
        room.offer(f"r{age_s}", age_s)
        room.loop.advance(QUIET_S / 2)
    room.offer("new")
    assert room.sent == []
    room.loop.advance(QUIET_S / 2 + 0.01)
    assert room.sent == ["r5", "r3", "new"]


def test_a_stream_of_replays_is_gathered_for_a_second_and_no_longer():
    room = Room(slots=99)
    for number in range(int(GATHER_S / 0.1)):
        room.offer(f"r{number}", 3)
        room.loop.advance(0.1)
    assert len(room.sent) + room.gate.waiting == int(GATHER_S / 0.1)


def test_a_request_that_came_to_envoy_after_our_start_is_no_replay_however_slow_its_upload_was():
    room = Room(slots=9)
    room.loop.advance(4)
    room.offer("slow upload", 3)
    room.offer("new")
    assert room.sent == ["slow upload", "new"]


def test_requests_that_only_a_clock_made_old_get_their_time_back_when_they_are_let_go():
    room, offsets = Room(slots=1), [0.0]
    room.gate.expect_replays(lambda: offsets[-1])
    tickets = [room.offer(f"r{number}", 6.0 + number / 1000) for number in range(LET_GO_IN_A_TURN + 3)]
    offsets.append(6.0)
    room.loop.advance(GATHER_S)
    ages = [room.loop.now - GATHER_S - ticket.request.arrived for ticket in tickets]
    assert all(0 <= age < REPLAYED_S for age in ages)
