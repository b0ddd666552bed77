"""The core against a reference that fits on a page: lists, no heaps, no cleverness. Both decide the same, in order.

The reference knows: fixed limits, strict classes, FIFO in a class, homes with patience, reroutes, budgets, cancels,
endpoints that go down and come back, waits and Retry-After. It looks at all that waits after every event and at every
deadline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING

from extproc.admission.controller import Controller
from extproc.admission.laws import LAWS
from extproc.admission.refusing import RETRY_AFTER_MAX_S
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Dispatch, EndpointSpec, Policy, Request, RequestClass

if TYPE_CHECKING:
    from collections.abc import Iterator

ENOUGH = int(LAWS.pace.enough)
ENOUGH_SLOW = LAWS.pace.enough_slow
HORIZON_GAPS = LAWS.pace.gaps
HORIZON_S = LAWS.pace.memory_s
LEAST_BUSY_S = LAWS.pace.least_busy_s

CLASSES = (RequestClass("std", 0, 4.0), RequestClass("int", 1, 2.0), RequestClass("batch", -1, 9.0))
PRIORITY = {klass.name: klass.priority for klass in CLASSES}
BUDGET = {klass.name: klass.budget_s for klass in CLASSES}
LIMITS = {"a": 1, "b": 2, "c": 3}
PATIENCE_S = 1.0


@dataclass
class Waiter:
    id: str
    rank: tuple[int, int]
    home: str | None
    patient_until: float
    until: float
    arrived: float
    alarm: int
    """The order of those who are looked at in one moment."""
    has_waited: bool = False


Decided = tuple[str, str, str | None, float, int | None]
"""Whose, what, where, after which wait, and when to try again."""


class Drain:
    """How fast a line moves: dispatches over the seconds in which somebody waited, each weighed by its age.

    Written down as it happened. What is longer ago than a horizon weighs less than a third; the horizon is HORIZON_S,
    or HORIZON_GAPS gaps between two dispatches where these are long.
    """

    def __init__(self) -> None:
        self.marks: list[tuple[float, bool]] = [(0.0, False)]  # when a line began, or moved on: True

    def rate(self) -> float | None:
        served = busy_s = 0.0
        horizon_s = HORIZON_S
        for (before, _), (now, moves) in pairwise(self.marks):
            kept = math.exp((before - now) / horizon_s)
            served, busy_s = served * kept, busy_s * kept
            if moves:
                served, busy_s = served + 1, busy_s + now - before
                horizon_s = max(HORIZON_S, HORIZON_GAPS * busy_s / served)
        enough = ENOUGH if busy_s < HORIZON_S else ENOUGH_SLOW
        return served / busy_s if served >= enough and busy_s >= LEAST_BUSY_S else None


class Reference:
    """Walks all that waits in order; whoever finds room goes to the emptiest endpoint, longest unpicked first."""

    def __init__(self) -> None:
        self.now, self.picks, self.alarms = 0.0, len(LIMITS), 0
        self.waiting: list[Waiter] = []
        self.holders: dict[str, list[str]] = {name: [] for name in LIMITS}
        self.picked = {name: turn for turn, name in enumerate(LIMITS, 1)}
        self.down: set[str] = set()
        self.drain = Drain()
        self.decided: list[Decided] = []

    def offer(self, name: str, klass: str, home: str | None) -> None:
        patient = self.now + PATIENCE_S if home is not None and home not in self.down else self.now
        rank = (-PRIORITY[klass], int(name))
        self.alarms += 1
        waiter = Waiter(name, rank, home, patient, self.now + BUDGET[klass], self.now, self.alarms)
        self.waiting.append(waiter)
        self.assign()
        waiter.has_waited = True
        if self.waiting == [waiter]:
            self.drain.marks.append((self.now, False))

    def assign(self) -> None:
        self.waiting.sort(key=lambda waiter: waiter.rank)
        for waiter in list(self.waiting):
            if waiter.home in self.down and waiter.patient_until > self.now:
                self.lose_patience(waiter)  # and it stays free when its home returns
            free = [e for e in LIMITS if e not in self.down and len(self.holders[e]) < LIMITS[e]]
            if self.now < waiter.patient_until:
                free = [e for e in free if e == waiter.home]
            if free:
                endpoint = min(free, key=lambda e: (len(self.holders[e]) / LIMITS[e], self.picked[e]))
                self.picks += 1
                self.picked[endpoint] = self.picks
                self.holders[endpoint].append(waiter.id)
                self.waiting.remove(waiter)
                if waiter.has_waited or self.waiting:
                    self.drain.marks.append((self.now, True))
                moved = waiter.home not in (None, endpoint)
                outcome, waited_s = "rerouted" if moved else "dispatched", self.now - waiter.arrived
                self.decided.append((waiter.id, outcome, endpoint, waited_s, None))

    def turn(self, name: str) -> None:
        if len(self.down) == len(LIMITS) and self.waiting:
            self.drain.marks.append((self.now, False))  # what nobody served says nothing of those who do
        self.down ^= {name}
        self.assign()

    def lose_patience(self, waiter: Waiter) -> None:
        waiter.patient_until = self.now
        self.alarms += 1
        waiter.alarm = self.alarms

    def try_again_after(self, waiter: Waiter) -> int:
        """What those take who go before it, and it: its class and those above.

        Nobody is up, or its wait ran out before the pace was known: as long as it waited.
        """
        rate, ahead = self.drain.rate(), sum(one.rank[0] <= waiter.rank[0] for one in self.waiting)
        if len(self.down) == len(LIMITS) or rate is None:
            return max(math.ceil(min(self.now - waiter.arrived, RETRY_AFTER_MAX_S)), 1)
        return max(math.ceil(min(ahead / rate, RETRY_AFTER_MAX_S)), 1)

    def until(self, then: float) -> None:
        while dues := [t for w in self.waiting for t in (w.patient_until, w.until) if self.now < t <= then]:
            self.now = min(dues)
            for waiter in sorted(self.waiting, key=lambda waiter: waiter.alarm):
                if waiter.patient_until == self.now:
                    self.lose_patience(waiter)
                if waiter.until > self.now:
                    continue
                again_s = self.try_again_after(waiter)
                self.waiting.remove(waiter)
                outcome = "no_endpoint" if len(self.down) == len(LIMITS) else "budget_expired"
                self.decided.append((waiter.id, outcome, None, self.now - waiter.arrived, again_s))
            self.assign()
        self.now = then


class Core:
    """The real thing behind the same four doors."""

    def __init__(self) -> None:
        self.now = 0.0
        self.core = Controller(Policy(classes=CLASSES, patience_s=PATIENCE_S, shed=False, fair=False))
        self.tickets: dict[str, Ticket] = {}
        self.decided: list[Decided] = []
        for name, limit in LIMITS.items():
            self.core.put_endpoint(EndpointSpec(name, max_running_requests=limit), self.now)
            self.core.set_up(name, self.now, is_up=True)
        # One pick each: no two endpoints are equal then, so the order of ties is not at stake.
        for name in LIMITS:
            self.core.offer(ticket := Ticket(Request("warm-up", self.now, home=name)), self.now)
            self.core.release(ticket, self.now)

    def note(self, decisions: list) -> None:
        for decision in decisions:
            where, again_s = (
                (decision.endpoint, None) if isinstance(decision, Dispatch) else (None, decision.retry_after_s)
            )
            name, outcome = decision.ticket.request.id, decision.outcome.value
            self.decided.append((name, outcome, where, decision.wait_s, again_s))

    def until(self, then: float) -> None:
        while (due := self.core.next_deadline()) is not None and due <= then:
            self.now = due
            self.note(self.core.tick(due))
        self.now = then


def random_events(random: Random, count: int = 200) -> Iterator[tuple]:
    """Events in some weather: floods, droughts, calm."""
    weights = (random.choice((2, 3, 4, 5)), random.choice((1, 2, 3)), 1, 1, random.choice((0, 1)))
    for what in random.choices(("offer", "release", "cancel", "wait", "turn"), weights, k=count):
        argument: object = random.randrange(21)
        if what == "offer":
            argument = random.choice(sorted(PRIORITY))
        elif what == "wait":
            argument = random.choice((0.0, 0.1, 0.5, 1.0, 3.0))
        elif what == "turn":
            argument = random.choice(sorted(LIMITS))
        yield what, argument, random.choice((None, None, *LIMITS))


def apply(event: tuple, number: int, model: Reference, real: Core) -> None:
    what, argument, home = event
    core = real.core
    if what == "offer":
        name = str(number)
        model.offer(name, argument, home)
        ticket = real.tickets[name] = Ticket(Request(name, real.now, request_class=argument, home=home))
        real.note(core.offer(ticket, real.now))
    elif what == "release":
        held = [(endpoint, name) for endpoint, names in model.holders.items() for name in names]
        if held:
            endpoint, name = held[argument % len(held)]
            model.holders[endpoint].remove(name)
            model.assign()
            real.note(core.release(real.tickets[name], real.now))
    elif what == "cancel" and model.waiting:
        waiter = model.waiting.pop(argument % len(model.waiting))
        real.note(core.cancel(real.tickets[waiter.id], real.now))
    elif what == "wait":
        model.until(model.now + argument)
        real.until(real.now + argument)
    elif what == "turn":
        model.turn(argument)
        real.note(core.set_up(argument, real.now, is_up=argument not in model.down))


def test_the_core_decides_what_a_page_of_lists_decides() -> None:
    seen, again = set(), set()
    for seed in range(30):
        model, real = Reference(), Core()
        for number, event in enumerate(random_events(Random(seed)), 1):
            apply(event, number, model, real)
            assert real.decided == model.decided, (seed, number, event)
            waiting = {name for name, ticket in real.tickets.items() if ticket.state is State.WAITING}
            assert {waiter.id for waiter in model.waiting} == waiting
        seen |= {outcome for _, outcome, *_ in real.decided}
        again |= {again_s for *_, again_s in real.decided if again_s is not None}
    assert seen == {"dispatched", "rerouted", "budget_expired", "no_endpoint"}, "all of it came by"
    assert len(again) > 10
