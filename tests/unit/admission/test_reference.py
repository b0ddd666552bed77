"""The core against a reference that fits on a page: lists, no heaps, no cleverness. Both decide the same, in order.

The reference knows: fixed limits, strict classes, FIFO in a class, homes with patience, reroutes, budgets, cancels,
endpoints that go down and come back. It looks at all that waits after every event and at every deadline.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.admission.controller import Controller
from extproc.admission.outcome import Outcome
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Dispatch, EndpointSpec, Policy, Request, RequestClass

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


class Reference:
    """Walks all that waits in order; whoever finds room goes to the emptiest endpoint, longest unpicked first."""

    def __init__(self) -> None:
        self.now, self.picks = 0.0, len(LIMITS)
        self.waiting: list[Waiter] = []
        self.holders: dict[str, list[str]] = {name: [] for name in LIMITS}
        self.picked = {name: turn for turn, name in enumerate(LIMITS, 1)}
        self.down: set[str] = set()
        self.decided: list[tuple[str, str, str | None]] = []

    def offer(self, name: str, klass: str, home: str | None) -> None:
        patient = self.now + PATIENCE_S if home is not None and home not in self.down else self.now
        rank = (-PRIORITY[klass], int(name))
        self.waiting.append(Waiter(name, rank, home, patient, self.now + BUDGET[klass]))
        self.assign()

    def assign(self) -> None:
        self.waiting.sort(key=lambda waiter: waiter.rank)
        for waiter in list(self.waiting):
            if waiter.home in self.down:
                waiter.patient_until = self.now  # and it stays free when its home returns
            free = [e for e in LIMITS if e not in self.down and len(self.holders[e]) < LIMITS[e]]
            if self.now < waiter.patient_until:
                free = [e for e in free if e == waiter.home]
            if free:
                endpoint = min(free, key=lambda e: (len(self.holders[e]) / LIMITS[e], self.picked[e]))
                self.picks += 1
                self.picked[endpoint] = self.picks
                self.holders[endpoint].append(waiter.id)
                self.waiting.remove(waiter)
                moved = waiter.home not in (None, endpoint)
                self.decided.append((waiter.id, "rerouted" if moved else "dispatched", endpoint))

    def until(self, then: float) -> None:
        while dues := [t for w in self.waiting for t in (w.patient_until, w.until) if self.now < t <= then]:
            self.now = min(dues)
            for waiter in [waiter for waiter in self.waiting if waiter.until <= self.now]:
                self.waiting.remove(waiter)
                outcome = "no_endpoint" if len(self.down) == len(LIMITS) else "budget_expired"
                self.decided.append((waiter.id, outcome, None))
            self.assign()
        self.now = then


class Core:
    """The real thing behind the same four doors."""

    def __init__(self) -> None:
        self.now = 0.0
        self.core = Controller(Policy(classes=CLASSES, patience_s=PATIENCE_S, shed=False, fair=False))
        self.tickets: dict[str, Ticket] = {}
        self.decided: list[tuple[str, str, str | None]] = []
        for name, limit in LIMITS.items():
            self.core.put_endpoint(EndpointSpec(name, max_running_requests=limit), self.now)
            self.core.set_up(name, self.now, is_up=True)
        # One pick each: no two endpoints are equal then, so the order of ties is not at stake.
        for name in LIMITS:
            self.core.offer(ticket := Ticket(Request("warm-up", self.now, home=name)), self.now)
            self.core.release(ticket, self.now)

    def note(self, decisions: list) -> None:
        for decision in decisions:
            endpoint = decision.endpoint if isinstance(decision, Dispatch) else None
            self.decided.append((decision.ticket.request.id, decision.outcome.value, endpoint))

    def until(self, then: float) -> None:
        while (due := self.core.next_deadline()) is not None and due <= then:
            self.now = due
            self.note(self.core.tick(due))
        self.now = then


EVENTS = st.one_of(
    st.tuples(st.just("offer"), st.sampled_from(sorted(PRIORITY)), st.sampled_from((None, None, *LIMITS))),
    st.tuples(st.just("offer"), st.sampled_from(sorted(PRIORITY)), st.sampled_from((None, None, *LIMITS))),
    st.tuples(st.just("release"), st.integers(0, 20), st.none()),
    st.tuples(st.just("cancel"), st.integers(0, 20), st.none()),
    st.tuples(st.just("wait"), st.sampled_from((0.0, 0.1, 0.5, 1.0, 3.0)), st.none()),
    st.tuples(st.just("turn"), st.sampled_from(sorted(LIMITS)), st.none()),
)


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
        model.down ^= {argument}
        model.assign()
        real.note(core.set_up(argument, real.now, is_up=argument not in model.down))


@given(st.lists(EVENTS, min_size=5, max_size=80))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_core_decides_what_a_page_of_lists_decides(events: list[tuple]) -> None:
    model, real = Reference(), Core()
    for number, event in enumerate(events, 1):
        apply(event, number, model, real)
        assert real.decided == model.decided, event
        assert {w.id for w in model.waiting} == {n for n, t in real.tickets.items() if t.state is State.WAITING}
    assert {outcome for _, outcome, _ in real.decided} <= {outcome.value for outcome in Outcome}
