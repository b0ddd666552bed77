"""Drives the admission core in real time: the clock, one timer, and decisions carried to those who wait for them.

Everything runs in one thread, that of the loop given. No future, task or timer per request: a ticket's `deliver` is a
plain call.
"""

from __future__ import annotations

import logging
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final, Protocol

from extproc.admission.looks import Looks
from extproc.admission.ticket import State
from extproc.admission.values import UNREACHED, Answer, Reject
from extproc.stream.replays import Replays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from extproc.admission.controller import Controller
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.load import Load
    from extproc.admission.outcome import Outcome
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Decision, EndpointSpec, Policy

log = logging.getLogger("extproc.gate")

_LEASED: Final = State.LEASED
_WAITING: Final = State.WAITING
_UNKNOWN: Final = Answer.UNKNOWN

BURST, BURST_S = 20, 0.005
"""Decisions that are delivered in one go, and how long after them the next ones are, if an event led to more: 4,000 a
second. Faster, Envoy's worker does nothing but connect to servers: of 10,000 told in half a second nobody was answered
for 3 s, and no token of any other answer passed. It also resets each stream that ends: more than 1,000 resets at once
look to its HTTP/2 flood guard like an attack (max_outbound_control_frames), and it closes the whole connection."""


class Timer(Protocol):
    """A timer that can be called off."""

    def cancel(self) -> None:
        """Call it off."""


class Loop(Protocol):
    """What the gate needs of an event loop; asyncio's has it."""

    def time(self) -> float:
        """Return monotonic seconds."""

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call once at `when`."""

    def call_soon(self, callback: Callable[[], None]) -> object:
        """Call in the next turn of the loop."""


class Observer(Protocol):
    """Somebody who is told what was decided: metrics, logs, traces."""

    def decided(self, decision: Decision) -> None:
        """Note a dispatch or a refusal."""

    def cancelled(self, ticket: Ticket, wait_s: float) -> None:
        """Note that a client left while it waited."""


class Gate:
    """The core with a clock. Every method is an event of the core; decisions reach tickets by themselves.

    Attributes:
        now: the clock's time, in seconds. A call of the loop's own: every request asks several times.
    """

    def __init__(self, controller: Controller, loop: Loop, observers: Iterable[Observer] = ()) -> None:
        """Drive `controller` on `loop`, and tell `observers`."""
        self.controller = controller
        self.now: Callable[[], float] = loop.time
        self._loop = loop
        self._observers = tuple(observers)
        self._outbox: list[tuple[int, int, Decision]] = []  # a heap: higher classes are told first
        self._decided = 0
        self._flushing = False
        self._timer: Timer | None = None
        self._timer_at = 0.0
        self._replays = Replays(loop, self._let_go)
        self._looks = Looks()
        self._lets_go = False  # what was gathered, some in each turn of the loop
        self._left = False

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call once, in so many seconds."""
        self._loop.call_at(self.now() + delay_s, callback)

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self.controller.waiting

    @property
    def undelivered(self) -> int:
        """How many decisions wait for their turn to be told, or to be made by a drain."""
        to_refuse = self.waiting + len(self._replays) if self.controller.draining else 0
        return len(self._outbox) + to_refuse

    # ---- requests

    def offer(self, ticket: Ticket) -> None:
        """Take a request in. Its decision may be delivered before this returns."""
        now = self.now()
        if now < self._replays.until and self.controller.policy.enable_queue:
            ticket.request_class = self.controller.class_of(ticket.request)  # it may leave before it is offered
            if self._replays.gather(ticket, now):
                return
        self._settle(self.controller.offer(ticket, now))

    def send(self, ticket: Ticket) -> None:
        """Let a request that takes no slot go at once."""
        self._settle(self.controller.send(ticket, self.now()))

    def refuse(self, ticket: Ticket, outcome: Outcome) -> None:
        """Refuse a new request about which the core is not asked."""
        ticket.state = State.LEFT
        ticket.request_class = self.controller.class_of(ticket.request)
        wait_s = max(self.now() - ticket.request.arrived, 0.0)
        self._settle([Reject(ticket, outcome, wait_s, 1)])

    def expect_replays(self, clock_offset_s: Callable[[], float] = float) -> None:
        """Put requests that Envoy replays to us from now on back into the order in which they came to Envoy.

        `clock_offset_s`: how far times of arrival are off, as far as is known when it is asked.
        """
        self._replays.expect(clock_offset_s)

    def wake(self) -> None:
        """Note that this process was stopped for a while."""
        self._settle(self.controller.wake(self.now()))

    def first_token(self, ticket: Ticket) -> None:
        """Note that the answer began."""
        self._settle(self.controller.first_token(ticket, self.now()))

    def answered(self, ticket: Ticket) -> None:
        """Note that an answer began well."""
        endpoint = ticket.endpoint
        if endpoint is not None:
            is_news = endpoint.health.is_doubted
            decisions = self.controller.answered(ticket, self.now())
            if is_news:  # else nothing follows from it
                self._settle(decisions)

    def move(self, ticket: Ticket, endpoint: str) -> None:
        """Note that another endpoint answers than the one picked; the name of one that we don't know ends the lease."""
        if ticket.state is _LEASED:
            self._settle(self.controller.move(ticket, endpoint, self.now()))

    def report(self, ticket: Ticket, load: Load) -> None:
        """Follow what an answer's headers say of its endpoint's load."""
        if ticket.endpoint is not None:
            self._settle(self.controller.report(ticket.endpoint.name, load, self.now()))

    def close(self, ticket: Ticket, answer: Answer = _UNKNOWN) -> None:
        """Note that a request is over, in whatever state it is. To be called exactly once for each offered ticket."""
        if self._left:
            return
        now = self.now()
        if ticket.state is _LEASED:
            self._settle(self.controller.release(ticket, now, answer))
        elif ticket.state is _WAITING:
            decisions = self.controller.cancel(ticket, now)
            self._tell_cancelled(ticket, now)
            self._settle(decisions)
        elif self._replays.forget(ticket):
            self._tell_cancelled(ticket, now)

    # ---- endpoints and rules

    def put_endpoint(self, spec: EndpointSpec) -> None:
        """Add or change one endpoint."""
        self.put_endpoints((spec,))

    def put_endpoints(self, specs: Iterable[EndpointSpec]) -> None:
        """Add or change endpoints in one moment."""
        self._settle(self.controller.put_endpoints(specs, self.now()))

    def know_models(self, models: Iterable[str], *, expects_any: bool = False) -> None:
        """Let requests for these models wait, even while nobody serves them; `expects_any`: for any model."""
        self._settle(self.controller.know_models(models, self.now(), expects_any=expects_any))

    def remove_endpoints(self, names: Iterable[str]) -> None:
        """Send nothing more to endpoints that go in one moment."""
        gone = tuple(names)
        self._looks.forget(gone)
        self._settle(self.controller.remove_endpoints(gone, self.now()))

    def set_up(self, name: str, *, is_up: bool | None) -> None:
        """Follow an endpoint's health checks; None: nothing is known."""
        self._settle(self.controller.set_up(name, self.now(), is_up=is_up))

    def heard_at(self, name: str) -> float | None:
        """Return when an endpoint last showed by its answers, or by tokens on its page, that it works."""
        endpoint = self.controller.endpoints.get(name)
        return None if endpoint is None else endpoint.health.heard_at

    def is_unreached(self, name: str) -> bool:
        """Tell whether the latest request at an endpoint found no connection or lost it, and none was answered since.

        Not with the queue off: nobody waits for it there, and a request may as well look whether it is back.
        """
        endpoint = self.controller.endpoints.get(name)
        is_held = self.controller.policy.enable_queue
        return is_held and endpoint is not None and endpoint.health.refused_by in UNREACHED

    def observe(self, name: str, load: Load, asked_at: float | None = None) -> None:
        """Follow an endpoint's telemetry, which was asked for at `asked_at`, or now."""
        now, endpoint = self.now(), self.controller.endpoints.get(name)
        at = now if asked_at is None else asked_at
        unsent = 0 if endpoint is None else self._looks.unsent(endpoint, load, at, now) + self._untold(endpoint)
        self._settle(self.controller.observe(name, load, now, unsent))

    def _untold(self, endpoint: Endpoint) -> int:
        """Return how many sequences are leased to `endpoint` by decisions that wait for their turn to be told."""
        if not self._outbox:
            return 0
        return sum(ticket.sequences for ticket in endpoint.leases if ticket.deliver is not None)

    def set_policy(self, policy: Policy) -> None:
        """Replace the rules."""
        self._settle(self.controller.set_policy(policy, self.now()))

    def stop_gathering(self) -> None:
        """Expect no more replays: what was gathered takes its place in the queue from now on."""
        self._replays.expect_no_more()
        if not self._lets_go:
            self._let_go()

    def _let_go(self) -> None:
        """Give what was gathered its place, some of it now, and as much in each turn of the loop that follows."""
        is_refused = self.controller.draining
        try:
            for ticket in self._replays.take(BURST) if is_refused else self._replays.take():
                self._place(ticket)
        finally:
            self._lets_go = bool(self._replays)
            if self._lets_go:
                self._loop.call_soon(self._let_go)

    def _place(self, ticket: Ticket) -> None:
        """Give a request its place in the queue."""
        self._settle(self.controller.offer(ticket, self.now()))

    def drain(self) -> None:
        """Refuse what waits, and what would have to."""
        self.stop_gathering()
        self._drain_some()

    def _drain_some(self) -> None:
        """Refuse as many of those who wait as are told in one turn, and come again in the next."""
        if self._refuse_some():
            self._loop.call_soon(self._drain_some)

    def _refuse_some(self) -> bool:
        """Refuse so many; tell whether others wait."""
        self._settle(self.controller.drain(self.now(), BURST))
        return self.controller.waiting > 0

    def leave(self) -> None:
        """Decide nothing more: streams are about to be cut, and the room of their leases is not free."""
        self._left = True

    # ---- driving

    def _tell_cancelled(self, ticket: Ticket, now: float) -> None:
        for observer in self._observers:
            observer.cancelled(ticket, now - ticket.request.arrived)

    def _settle(self, decisions: list[Decision]) -> None:
        """Carry out what an event led to."""
        if self._left:
            return
        if len(decisions) == 1:  # it waits for nobody's turn: those in the outbox have their places already
            self._tell(decisions[0])
        elif decisions:
            for decision in decisions:
                self._decided += 1
                heappush(self._outbox, (-decision.ticket.request_class.priority, self._decided, decision))
            if not self._flushing:
                self._flush()
        due = self.controller.next_deadline()
        if due is not None and (self._timer is None or due < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._timer_at = self._loop.call_at(due, self._tick), due

    def _flush(self) -> None:
        outbox, told = self._outbox, 0
        self._flushing = True  # what follows from telling one joins the others
        try:
            while outbox and told < BURST:
                told += 1
                self._tell(heappop(outbox)[2])
        finally:
            self._flushing = bool(outbox)
            if outbox:
                self.call_later(BURST_S, self._flush)

    def _tell(self, decision: Decision) -> None:
        for observer in self._observers:
            observer.decided(decision)
        ticket = decision.ticket
        deliver, ticket.deliver = ticket.deliver, None  # it is told once, and may then be forgotten
        if deliver is not None:
            try:
                deliver(decision)
            except Exception:  # the others must still be told
                log.exception("a decision could not be delivered: please report it")

    def _tick(self) -> None:
        self._timer = None
        self._settle(self.controller.tick(self.now()))
