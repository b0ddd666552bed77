"""The admission core: events in, decisions out. Every event has its method here; what follows is in the rooms beside.

Rules of the core:
* No I/O, no clock, no randomness, no logging. The driver passes `now`; the same events give the same decisions.
* An event that made room, or lets somebody go elsewhere, ends in the same dispatch pass; each returns the decisions
  that the driver must deliver.
* Reserve at pick: the lease exists before the driver hears of the decision.
* After each event: no lease beyond a limit, and no endpoint with room for a request that may go there.

The rooms, each with what it may change: `transitions.py` what a request can become; `lines.py` who waits where;
`guard.py` how often one may be passed over; `placing.py` the dispatch pass; `refusing.py` who may not wait;
`fleet.py` what follows when an endpoint changes; `answers.py` and `hearing.py` what answers and endpoints tell;
`views.py` what others ask; `books.py` what they all share.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from extproc.admission.answers import Answers
from extproc.admission.books import Books
from extproc.admission.estimate import TokenEstimate
from extproc.admission.events import (
    Adopted,
    Answered,
    Cancelled,
    Disowned,
    Drained,
    EndpointPut,
    EndpointsRemoved,
    FirstToken,
    HealthChecked,
    HomeBelieved,
    LearntBelieved,
    ModelsKnown,
    Moved,
    Observed,
    Offered,
    PolicySet,
    QuotaSet,
    Released,
    Reported,
    Sent,
    Ticked,
    Withdrawn,
)
from extproc.admission.fleet import Fleet
from extproc.admission.hearing import Hearing
from extproc.admission.lanes import lane_of
from extproc.admission.lines import Lines, placed
from extproc.admission.outcome import Outcome
from extproc.admission.placing import Placing
from extproc.admission.refusing import Refusing
from extproc.admission.transitions import DONE, LEASED, LEFT, MUST_BE, WAITING
from extproc.admission.values import Answer, Dispatch
from extproc.admission.views import holds, others
from extproc.errors import TransitionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.estimate import Learnt
    from extproc.admission.events import Event, Watcher
    from extproc.admission.held import HeldBy
    from extproc.admission.load import Load
    from extproc.admission.pool import Pool
    from extproc.admission.sessions import Home
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Decision, EndpointSpec, Policy, Request, RequestClass

_OK = Answer.OK


class Controller:
    """Queues, leases and limits of all endpoints.

    Every public method that takes `now` (seconds, monotonic) is an event and returns the decisions that follow from
    it, each for a ticket that was offered earlier or in this event.

    Attributes:
        endpoints: by name; a removed one stays until its last lease is back.
    """

    __slots__ = (
        "_answers",
        "_books",
        "_event",
        "_fleet",
        "_hearing",
        "_lines",
        "_placing",
        "_refusing",
        "_tokens",
        "_watchers",
        "endpoints",
    )

    def __init__(self, policy: Policy) -> None:
        """Start without endpoints; `put_endpoint` brings them."""
        self._books = books = Books(policy)
        self._lines = lines = Lines(books)
        self._fleet = fleet = Fleet(books, lines)
        self._placing = Placing(books, lines, fleet)
        self._refusing = Refusing(books, lines)
        self._tokens = TokenEstimate()
        self._answers = Answers(books, fleet, self._tokens)
        self._hearing = Hearing(books, lines, fleet, self._tokens)
        self.endpoints = books.endpoints
        self._watchers: list[Watcher] = []
        self._event: Event | None = None  # the one under way, while somebody watches

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` of each event from now on, once it is over, with what was decided."""
        self._watchers.append(watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """Tell `watcher` nothing more."""
        self._watchers.remove(watcher)
        self._event = None

    # ---- events: requests

    def offer(self, ticket: Ticket, now: float) -> list[Decision]:
        """Take a new request in. It is dispatched or refused at once, or it waits."""
        books, lines, placing = self._begin(now, ticket, "offered"), self._lines, self._placing
        if self._watchers:
            self._event = Offered(now, ticket)
        request = ticket.request
        ticket.request_class = klass = books.class_of(request)
        whole = self._refusing.screened(ticket, self._fleet.pool_of(request))
        if whole is None:
            return self._end()
        books.tenants.comes(ticket)
        ticket.pool = pool = lane_of(whole, klass)
        lines.budget(ticket, pool)
        ticket.position = pool.ahead_of(klass.priority)
        self._tokens.estimate(ticket, pool.longest)
        lines.number(ticket, pool)
        pool.pace.arrived(klass.priority, now)
        ticket.home = home = placing.home_of(ticket, pool)
        if home is not None and not home.available:
            home = None
        if home is not None:
            # At least half of its budget is left for any endpoint: else it would be refused while others have room.
            ticket.patience_until = now + min(books.policy.patience_s, (ticket.wait_until - now) / 2)
        target = placing.place_for(ticket, pool, home)
        if target is not None:
            placing.lease(ticket, target)
            return self._end()
        lines.join(ticket, pool, pool.shared if home is None else pool.queue_of(home))
        if ticket.account is not None:
            books.tenants.waits(ticket)
        if books.freed:
            placing.run()
        if ticket.state is WAITING and ticket.queue is not pool.shared and ticket.patience_until <= now:
            lines.go_anywhere(ticket)  # no time to wait for its home
            placing.run()
        if ticket.state is WAITING:
            self._refusing.may_wait(ticket, pool)
        return self._end()

    def send(self, ticket: Ticket, now: float) -> list[Decision]:
        """Let a new request that asks for no tokens go at once, to an endpoint that serves its model: it takes no slot.

        To its home if that is up, else to each in turn. No limit counts it, and its end is no event.
        """
        books = self._begin(now, ticket, "sent")
        if self._watchers:
            self._event = Sent(now, ticket)
        ticket.state = LEFT
        ticket.request_class = books.class_of(ticket.request)
        pool = self._fleet.pool_of(ticket.request)
        if pool is None:
            self._refusing.turn_away(ticket, Outcome.UNKNOWN_MODEL)
            return self._end()
        target = self._placing.home_of(ticket, pool)
        if target is None or not target.available:
            target = pool.next_in_turn(doubtful=not books.policy.enable_queue)
        if target is None:
            self._refusing.turn_away(ticket, Outcome.NO_ENDPOINT, 1)
        else:
            books.decisions.append(Dispatch(ticket, Outcome.PASSED, target.name, 0.0))
        return self._end()

    def cancel(self, ticket: Ticket, now: float) -> list[Decision]:
        """Forget a waiting request whose client left."""
        self._begin(now, ticket, "cancelled")
        if self._watchers:
            self._event = Cancelled(now, ticket)
        self._lines.leave(ticket)
        return self._end()

    def first_token(self, ticket: Ticket, now: float) -> list[Decision]:
        """Note that an answer's first token came: the engine has computed the prompt. Late or repeated: no-op."""
        self._begin(now)
        if self._watchers:
            self._event = FirstToken(now, ticket)
        if ticket.state is LEASED and ticket.endpoint is not None:
            ticket.endpoint.first_token(ticket, now)
            self._answers.began(ticket)
            self._fleet.changed(ticket.endpoint)
        return self._end()

    def answered(self, ticket: Ticket, now: float) -> list[Decision]:
        """Note that an answer began well, long before it ends: a trial need not last as long as an answer."""
        self._begin(now)
        if self._watchers:
            self._event = Answered(now, ticket)
        if ticket.state is LEASED:
            self._answers.began(ticket)
        return self._end()

    def release(self, ticket: Ticket, now: float, answer: Answer = Answer.UNKNOWN) -> list[Decision]:
        """Give a lease back: the request is over. `answer` says what is known of how.

        What the answer really cost is charged to its tenant: how long it was written, at the pace of its engine.
        """
        self._begin(now, ticket, "released")
        if self._watchers:
            self._event = Released(now, ticket, answer)
        endpoint, pool = placed(ticket.endpoint), placed(ticket.pool)
        ticket.state, ticket.ended_at, ticket.answer = DONE, now, answer
        endpoint.release(ticket, now, served=answer is _OK, wanted=pool.waiting_total > 0)
        self._answers.ended(ticket, endpoint, pool, answer)
        if ticket.choices:
            self._fleet.let_go(ticket)
        if ticket.account is not None:
            self._lines.count_out(ticket)
        if endpoint.removed:
            self._fleet.forget_if_gone(endpoint)
        self._fleet.changed(endpoint)
        return self._end()

    def move(self, ticket: Ticket, name: str, now: float) -> list[Decision]:
        """Follow a gateway that tells who answers: the lease is there, limit or not; what was reserved comes free.

        The one picked, if it is another, is taken to have failed. An endpoint that we don't know ends the lease.
        """
        self._begin(now, ticket, "moved")
        if self._watchers:
            self._event = Moved(now, ticket, name)
        picked, pool, served = placed(ticket.endpoint), placed(ticket.pool), self.endpoints.get(name)
        if served is not picked:
            self._answers.ended(ticket, picked, pool, Answer.FAILED)
            picked.release(ticket, now, served=False, wanted=pool.waiting_total > 0)
            if served is None:
                ticket.state = DONE
                self._lines.count_out(ticket)
            else:
                ticket.endpoint = served
                served.lease(ticket, now)
                self._fleet.changed(served)
            self._fleet.forget_if_gone(picked)
            self._fleet.changed(picked)
        self._fleet.let_go(ticket)
        return self._end()

    # ---- events: endpoints

    def put_endpoint(self, spec: EndpointSpec, now: float) -> list[Decision]:
        """Add an endpoint, change one, or bring a removed one back with the leases it still has."""
        self._begin(now)
        if self._watchers:
            self._event = EndpointPut(now, spec)
        self._fleet.put(spec)
        return self._end()

    def know_models(self, models: Iterable[str], now: float, *, expects_any: bool = False) -> list[Decision]:
        """Note which models the configuration names: requests for them wait even while nobody serves them.

        `expects_any`: it names endpoints, or sources of them, that list no models: they may come and serve any.
        """
        books, models = self._begin(now), tuple(models)
        if self._watchers:
            self._event = ModelsKnown(now, models, expects_any)
        changes = books.pools.expects_any is not expects_any
        books.pools.expects_any = expects_any
        if books.pools.know(models) or changes:
            self._fleet.regroup()
        return self._end()

    def knows_model(self, model: str) -> bool:
        """Tell whether an endpoint or the configuration names this model."""
        return model in self._books.pools.by_model

    def remove_endpoints(self, names: Iterable[str], now: float) -> list[Decision]:
        """Send nothing more to endpoints: their leases run out, those at home there go anywhere.

        Many cost what one does. Those that are unknown, or gone: no-op.
        """
        self._begin(now)
        names = tuple(dict.fromkeys(names))
        if self._watchers:
            self._event = EndpointsRemoved(now, names)
        gone = [endpoint for name in names if (endpoint := self.endpoints.get(name)) and not endpoint.removed]
        if gone:
            self._fleet.remove(gone)
        return self._end()

    def set_up(self, name: str, now: float, *, is_up: bool | None) -> list[Decision]:
        """Follow health checks; None: nothing is known, as of a new endpoint. Unknown endpoint: no-op."""
        self._begin(now)
        if self._watchers:
            self._event = HealthChecked(now, name, is_up)
        endpoint = self.endpoints.get(name)
        if endpoint is not None and (is_up is None or endpoint.health.is_up is not is_up):
            endpoint.health.check(is_up=is_up)
            self._fleet.changed(endpoint)
        return self._end()

    def observe(self, name: str, load: Load, now: float) -> list[Decision]:
        """Follow an endpoint's telemetry. Unknown: no-op."""
        self._begin(now)
        if self._watchers:
            self._event = Observed(now, name, load)
        endpoint = self.endpoints.get(name)
        if endpoint is not None:
            self._hearing.page(endpoint, load)
        return self._end()

    def report(self, name: str, load: Load, now: float) -> list[Decision]:
        """Follow what an endpoint's answer says of its load. Unknown: no-op."""
        self._begin(now)
        if self._watchers:
            self._event = Reported(now, name, load)
        endpoint = self.endpoints.get(name)
        if endpoint is not None:
            self._hearing.report(endpoint, load)
        return self._end()

    # ---- events: everything else

    def tick(self, now: float) -> list[Decision]:
        """Let time pass: budgets, patience and ejections end. Needed at `next_deadline()`, harmless at any time."""
        self._begin(now)
        if self._watchers:
            self._event = Ticked(now)
        for ticket in self._lines.alarms.due(now):
            if now >= ticket.wait_until:
                self._refusing.expire(ticket)
            else:
                self._lines.go_anywhere(ticket)
                self._lines.set_alarm(ticket, placed(ticket.pool))
        self._fleet.pass_time(now)
        return self._end()

    def next_deadline(self) -> float | None:
        """Return when `tick` is due next, never before the last event; None: nothing is due."""
        due, now = self._fleet.stale_at, self._books.now
        for at in (self._lines.alarms.next(), self._fleet.changes.next()):
            if at is not None and (due is None or at < due):
                due = at
        return due if due is None or due > now else now

    def set_policy(self, policy: Policy, now: float) -> list[Decision]:
        """Replace the rules. Waiting requests keep the class, the place and the budget they came with."""
        books = self._begin(now)
        if self._watchers:
            self._event = PolicySet(now, policy)
        reorder = (policy.fair, policy.short_first) != (books.policy.fair, books.policy.short_first)
        lanes = books.lanes
        books.follow(policy)
        if books.lanes != lanes:
            self._fleet.regroup()
        if reorder:
            for pool in books.pools:
                self._lines.reorder(pool)
        for endpoint in self.endpoints.values():
            endpoint.apply(policy)
            self._fleet.changed(endpoint)
        self._fleet.forget_stale()
        if not policy.enable_queue:
            self._let_all_go()
        return self._end()

    def drain(self, now: float, most: int | None = None) -> list[Decision]:
        """Refuse what waits, and from now on everything that would have to.

        `most`: of those who wait, so many now; drain again while some do.
        """
        books = self._begin(now)
        if self._watchers:
            self._event = Drained(now, most)
        self._refusing.draining = True
        for ticket in list(islice(books.waiting_tickets(), most)):
            self._refusing.refuse(ticket, Outcome.DRAINING)
        return self._end()

    # ---- events: several sidecars that share endpoints

    def adopt(
        self, ticket: Ticket, name: str, now: float, *, held_s: float = 0.0, begun: bool = False
    ) -> list[Decision]:
        """Take over a lease that another sidecar's core gave `held_s` ago, whatever the limits say.

        `begun`: its first token was seen. An unknown endpoint: no-op, and the ticket stays new.
        """
        books = self._begin(now, ticket, "adopted")
        if self._watchers:
            self._event = Adopted(now, ticket, name, held_s, begun)
        endpoint = self.endpoints.get(name)
        if endpoint is not None:
            request = ticket.request
            ticket.request_class = books.class_of(request)
            books.tenants.comes(ticket)
            ticket.pool = self._fleet.pool_of(request) or books.pools.every
            self._lines.budget(ticket, ticket.pool)  # for those who are told of it
            self._tokens.estimate(ticket, ticket.pool.longest)
            ticket.state, ticket.endpoint = LEASED, endpoint
            endpoint.adopt(ticket, now, held_s, begun=begun)
            if request.session is not None:
                self._placing.remember(request.session, ticket, endpoint)
            self._fleet.changed(endpoint)
        return self._end()

    def disown(self, ticket: Ticket, now: float) -> list[Decision]:
        """Forget a lease that another sidecar holds and that we can't follow any more: it counts as foreign."""
        self._begin(now, ticket, "disowned")
        if self._watchers:
            self._event = Disowned(now, ticket)
        endpoint = placed(ticket.endpoint)
        ticket.state = DONE
        endpoint.disown(ticket, now)
        self._fleet.let_go(ticket)
        self._lines.count_out(ticket)
        self._fleet.forget_if_gone(endpoint)
        self._fleet.changed(endpoint)
        return self._end()

    def withdraw(self, ticket: Ticket, now: float) -> list[Decision]:
        """Take a waiting request back without an outcome: another sidecar's core will decide, or this one later."""
        self._begin(now, ticket, "withdrawn")
        if self._watchers:
            self._event = Withdrawn(now, ticket)
        self._lines.take_back(ticket)
        return self._end()

    def set_quota(self, name: str, quota: int | None, now: float) -> list[Decision]:
        """Hold at most `quota` sequences at an endpoint, besides its limit; None: the limit alone. Unknown: no-op."""
        self._begin(now)
        if self._watchers:
            self._event = QuotaSet(now, name, quota)
        endpoint = self.endpoints.get(name)
        if endpoint is not None and endpoint.quota != quota:
            endpoint.quota = quota
            self._fleet.changed(endpoint)
        return self._end()

    def homes(self, most: int, at: float) -> list[Home]:
        """Return where the `most` sessions that were seen last are at home, `at` this time, for another core."""
        return self._placing.sessions.homes(most, at)

    def believe_home(self, home: Home, at: float) -> None:
        """Take over where another sidecar's core served a session, as told at this time, if that is news here."""
        endpoint = self.endpoints.get(home.endpoint)
        if endpoint is not None:
            memory = self._books.policy.session_memory
            self._placing.sessions.remember(home.session, endpoint, home.tokens, memory, at - home.age_s)
        if self._watchers:
            self._tell(HomeBelieved(at, home), [])

    def learnt(self) -> list[Learnt]:
        """Return what was learned of tokens, for another sidecar's core."""
        return self._tokens.learnt()

    def believe(self, learnt: Learnt) -> None:
        """Take over what another sidecar's core learned of tokens."""
        self._tokens.believe(learnt)
        if self._watchers:
            self._tell(LearntBelieved(self._books.now, learnt), [])

    # ---- what others may look at

    @property
    def policy(self) -> Policy:
        """The rules."""
        return self._books.policy

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._books.waiting

    @property
    def draining(self) -> bool:
        """Whether nothing waits any more."""
        return self._refusing.draining

    @property
    def is_shared(self) -> bool:
        """Whether other sidecars may dispatch to the same endpoints: a new one stays closed until `set_quota`."""
        return self._fleet.is_shared

    @is_shared.setter
    def is_shared(self, is_shared: bool) -> None:
        self._fleet.is_shared = is_shared

    def others(self, request: Request, names: frozenset[str]) -> frozenset[str] | None:
        """Return who may serve a request that came back from `names`: its model's other endpoints, if one may be used.

        Else what it allows already: one that refused it is better than nobody.
        """
        return others(self._books, request, names)

    def tenants_in_flight(self) -> dict[str, int]:
        """Count what waits and runs by tenant: each that the rules name, and all others together."""
        return self._books.tenants.in_flight()

    def class_of(self, request: Request) -> RequestClass:
        """Return a request's class: the one it names, if we have it."""
        return self._books.class_of(request)

    def pools(self) -> Iterator[Pool]:
        """Walk all pools."""
        return iter(self._books.pools)

    def waiting_tickets(self) -> Iterator[Ticket]:
        """Walk everything that waits, line by line."""
        return self._books.waiting_tickets()

    def holds(self) -> dict[Endpoint, HeldBy]:
        """Return for each endpoint that would not take the next request what keeps that one from it."""
        return holds(self._books)

    def __repr__(self) -> str:
        """Show the state that tests, logs and people read."""
        return f"<Controller waiting={self.waiting} {list(self.endpoints.values())}>"

    # ---- the frame of every event

    def _begin(self, now: float, ticket: Ticket | None = None, what: str = "") -> Books:
        """Begin an event. If something happens to a request for which it is in the wrong state, nothing changes.

        Raises:
            TransitionError: `transitions.py` has no such step.
        """
        if ticket is not None and ticket.state is not MUST_BE[what]:
            state = ticket.state.name.lower()
            raise TransitionError(f"{ticket!r} can't be {what}: it is {state}, not {MUST_BE[what].name.lower()}")
        self._books.now = now
        return self._books

    def _end(self) -> list[Decision]:
        """End an event: run the dispatch pass and return all decisions that the event led to."""
        books = self._books
        if books.freed or books.arrived:
            self._placing.run()
        decisions, books.decisions = books.decisions, []
        if self._event is not None:
            event, self._event = self._event, None
            self._tell(event, decisions)
        return decisions

    def _tell(self, event: Event, decisions: list[Decision]) -> None:
        for watcher in tuple(self._watchers):
            watcher(event, decisions)

    def _let_all_go(self) -> None:
        """Empty all lines because the queue was switched off: nothing is held any more."""
        books = self._books
        for ticket in list(books.waiting_tickets()):
            self._lines.go_anywhere(ticket)
            books.arrive(ticket)
        self._placing.run()
        for ticket in list(books.waiting_tickets()):
            self._refusing.refuse(ticket, Outcome.NO_ENDPOINT)
