"""The gate of a sidecar that shares endpoints with others: to sessions a gate like any, whoever decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.outcome import Outcome
from extproc.admission.ticket import State
from extproc.admission.values import Answer, Dispatch, Reject
from extproc.replicas.forwarded import Forwarded
from extproc.stream.gate import BURST, Gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from extproc.admission.controller import Controller
    from extproc.admission.load import Load
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Decision, EndpointSpec, Policy
    from extproc.replicas.replica import Replica
    from extproc.stream.gate import Loop, Observer, Timer


class _OwnOnly:
    """Tells an observer of our own requests alone: others' sidecars tell of theirs."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def decided(self, decision: Decision) -> None:
        if not isinstance(decision.ticket, Forwarded):
            self._observer.decided(decision)

    def cancelled(self, ticket: Ticket, wait_s: float) -> None:
        if not isinstance(ticket, Forwarded):
            self._observer.cancelled(ticket, wait_s)


class _Homes:
    """Has the sidecar that would lead next know where our own clients' sessions are served: nobody else sees them."""

    def __init__(self, gate: SharedGate) -> None:
        self._gate = gate

    def decided(self, decision: Decision) -> None:
        leading = self._gate.replica.leading
        if leading is not None and isinstance(decision, Dispatch):
            leading.tell_home(decision.ticket)

    def cancelled(self, ticket: Ticket, wait_s: float) -> None:
        pass


class _Watch:
    """A loop whose clock has the replica notice, before anything is decided, that the process was stopped."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.look: Callable[[], None] = lambda: None

    def time(self) -> float:
        self.look()
        return self._loop.time()

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        return self._loop.call_at(when, callback)

    def call_soon(self, callback: Callable[[], None]) -> object:
        return self._loop.call_soon(callback)


class SharedGate(Gate):
    """Decides by its own core while this sidecar leads, and passes everything on while it follows."""

    replica: Replica

    def __init__(self, controller: Controller, loop: Loop, observers: Iterable[Observer] = ()) -> None:
        """Drive `controller` on `loop`; a `Replica` made with this gate must begin before requests come."""
        self._watch = _Watch(loop)
        super().__init__(controller, self._watch, map(_OwnOnly, (*observers, _Homes(self))))
        controller.is_shared = True

    def watch(self) -> None:
        """Have every look at the clock notice whether the process was stopped."""
        self._watch.look = self.replica.look

    @property
    def waiting(self) -> int:
        """How many requests wait here, ours and, if we lead, those of others."""
        return super().waiting + self.replica.waiting

    # ---- for the roles: events of our own core

    def do(self, event: Callable[[float], list[Decision]]) -> None:
        """Carry out an event of the core that only sidecars among others have."""
        self._settle(event(self.now()))

    def carry(self, decision: Decision) -> None:
        """Deliver a decision that another sidecar's core made."""
        self._settle([decision])

    def offer_here(self, ticket: Ticket) -> None:
        """Have our own core decide."""
        self.do(lambda now: self.controller.offer(ticket, now))

    def close_here(self, ticket: Ticket, answer: Answer) -> None:
        """End a request in our own core."""
        endpoint, leading = ticket.endpoint, self.replica.leading
        super().close(ticket, answer)
        if leading is not None and endpoint is not None:
            leading.quotas.released(endpoint.name)

    # ---- as any gate

    def offer(self, ticket: Ticket) -> None:
        """Take a request in; whoever leads decides."""
        now = self.now()
        if self._left:
            return
        ticket.request_class = self.controller.class_of(ticket.request)  # it may leave before it is decided
        if now < self._replays.until and self.controller.policy.enable_queue and self._replays.gather(ticket, now):
            return
        self._place(ticket)

    def _place(self, ticket: Ticket) -> None:
        """Give a request its place, wherever that is."""
        if self.controller.draining and not self.replica.decides:
            ticket.state = State.LEFT
            self.carry(Reject(ticket, Outcome.DRAINING, 0.0, 1))
        elif not self.replica.offer(ticket):
            self.offer_here(ticket)

    def close(self, ticket: Ticket, answer: Answer = Answer.UNKNOWN) -> None:
        """Note that a request is over."""
        if self._left:
            return
        now = self.now()
        waited = self.replica.close(ticket, answer)
        if waited:
            self._tell_cancelled(ticket, now)
        else:
            self.close_here(ticket, answer)

    def first_token(self, ticket: Ticket) -> None:
        """Note that the answer began."""
        super().first_token(ticket)
        if self.replica.following is not None:
            self.replica.following.first_token(ticket)

    def answered(self, ticket: Ticket) -> None:
        """Note that an answer began well."""
        super().answered(ticket)
        if self.replica.following is not None:
            self.replica.following.answered(ticket)

    def move(self, ticket: Ticket, endpoint: str) -> None:
        """Note that another endpoint answers than the one picked, in our own books and in those of who leads."""
        if ticket.state is State.LEASED:
            super().move(ticket, endpoint)
            if self.replica.following is not None:
                self.replica.following.move(ticket, endpoint)

    def report(self, ticket: Ticket, load: Load) -> None:
        """Follow what an answer's headers say of its endpoint's load; who leads is told."""
        if self.replica.decides:
            super().report(ticket, load)
        elif self.replica.following is not None:
            self.replica.following.report(ticket, load)

    def set_policy(self, policy: Policy) -> None:
        """Replace our own rules; those that count are the leader's."""
        super().set_policy(policy)
        self.replica.names_changed()

    def put_endpoints(self, specs: Iterable[EndpointSpec]) -> None:
        """Add or change endpoints in one moment."""
        news = tuple(specs)
        super().put_endpoints(news)
        for spec in news:
            if spec.awaits_check:
                self.replica.bad_answers.pop(spec.name, None)
        self._tell_names()

    def set_up(self, name: str, *, is_up: bool | None) -> None:
        """Follow an endpoint's health checks; None: nothing is known, as of another server at another address."""
        super().set_up(name, is_up=is_up)
        if is_up is None:
            self.replica.bad_answers.pop(name, None)

    def remove_endpoints(self, names: Iterable[str]) -> None:
        """Send nothing more to endpoints that go in one moment."""
        gone = tuple(names)
        super().remove_endpoints(gone)
        if self.replica.leading is not None:
            self.replica.leading.looks.forget(gone)
        for name in gone:
            self.replica.bad_answers.pop(name, None)
        self._tell_names()

    def _tell_names(self) -> None:
        if self.replica.leading is not None:
            self.replica.leading.look_at_names()
        self.replica.names_changed()

    def observe(self, name: str, load: Load, asked_at: float | None = None) -> None:
        """Follow an endpoint's telemetry, if we lead: who follows goes by the leader's decisions."""
        looked_at = self.now()
        at = looked_at if asked_at is None else asked_at
        leading, endpoint = self.replica.leading, self.controller.endpoints.get(name)
        if leading is not None and endpoint is not None:
            untold, unsent = self._untold(endpoint), leading.looks.unsent_of_all
            leading.quotas.before_reading(name)
            self.do(lambda now: self.controller.observe(name, load, now, untold + unsent(endpoint, load, at, now)))
            leading.quotas.after_reading(name)

    def _refuse_some(self) -> bool:
        """Refuse what waits here but not in our own core, too: also what came from there since the last turn."""
        others_wait = super()._refuse_some()
        given_up = self.replica.give_up(BURST)
        for ticket in given_up:
            ticket.state = State.LEFT
            ticket.request_class = self.controller.class_of(ticket.request)
            wait_s = max(self.now() - ticket.request.arrived, 0.0)
            self.carry(Reject(ticket, Outcome.DRAINING, wait_s, 1))
        return others_wait or bool(given_up)

    def leave(self) -> None:
        """Decide nothing more, and say goodbye to the others."""
        super().leave()
        self.replica.end()
