"""The admission core: events in, decisions out. What follows from an event is in the rooms beside.

Rules of the core:
* No I/O, no clock, no randomness, no logging. The driver passes `now`; the same events give the same decisions.
* An event that made room, or lets somebody go elsewhere, ends in the same dispatch pass; each returns the decisions
  that the driver must deliver.
* Reserve at pick: the lease exists before the driver hears of the decision.
* After each event: no lease beyond a limit, and no endpoint with room for a request that may go there, unless a tick
  is due at once that goes on.

One class in four layers, each with its kind of events: here those of a request, and time; in `sharing.py` what other
sidecars say; in `administration.py` endpoints and rules; in `frame.py` what every event has. (See docs/map.md.)

The rooms, each with what it may change: `transitions.py` what a request can become; `lines.py` who waits where;
`guard.py` how often one may be passed over; `placing.py` the dispatch pass; `refusing.py` who may not wait;
`fleet.py` what follows when an endpoint changes; `answers.py` and `hearing.py` what answers and endpoints tell;
`views.py` what others ask; `books.py` what they all share.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Final

from extproc.admission.events import (
    Answered,
    Cancelled,
    FirstToken,
    Moved,
    Offered,
    Released,
    Sent,
    Ticked,
    Woken,
)
from extproc.admission.frame import misstep
from extproc.admission.lanes import lane_of
from extproc.admission.lines import placed
from extproc.admission.outcome import Outcome
from extproc.admission.placing import DUE_AT_ONCE
from extproc.admission.sharing import Sharing
from extproc.admission.transitions import DONE, LEASED, LEFT, MUST_BE, WAITING
from extproc.admission.values import Answer, Dispatch

if TYPE_CHECKING:
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Decision

_OK: Final = Answer.OK
ASKED_BEFORE_S: Final = 2.0
"""Who is so old when offered was asked for before: a sidecar that died, or led, had it in its books, or it is a second
try. What was held there is no demand that comes."""


class Controller(Sharing):
    """Queues, leases and limits of all endpoints.

    Every public method that takes `now` (seconds, monotonic) is an event and returns the decisions that follow from
    it, each for a ticket that was offered earlier or in this event.
    """

    __slots__ = ()

    def offer(self, ticket: Ticket, now: float) -> list[Decision]:  # noqa: C901 - each request pays for a call
        """Take a new request in. It is dispatched or refused at once, or it waits."""
        if ticket.state is not MUST_BE["offered"]:  # `_begin`, without a call
            raise misstep(ticket, "offered")
        books, lines, placing = self._books, self._lines, self._placing
        books.now = now
        if self._watchers:
            self._event = Offered(now, ticket)
        request = ticket.request
        ticket.request_class = klass = books.class_of(request)
        whole = self._refusing.screened(ticket)
        if whole is None:
            return self._end()
        if books.tenants.are_ruled:
            books.tenants.comes(ticket)
        ticket.pool = pool = whole if klass.weight is None else lane_of(whole, klass)
        lines.budget(ticket, pool)
        ticket.position = pool.ahead_of(klass.priority) if pool.waiting_total else 0
        self._tokens.estimate(ticket, pool.longest, pool.members)
        if now - request.arrived < ASKED_BEFORE_S:
            pool.asked += 1
            pool.asked_prompts += ticket.prompt_tokens
            pool.asked_outputs += ticket.output_tokens
        lines.number(ticket, pool)
        pool.pace.arrived(klass.priority, now, request.arrived)
        ticket.home = home = placing.home_of(ticket, pool)
        if home is not None and home.available:
            lines.patience(ticket)
        else:
            home = None
        if pool.open or not books.policy.enable_queue:  # else `place_for` has nowhere to look
            target = placing.place_for(ticket, pool, home)
            if target is not None:
                placing.lease(ticket, target)
                return self._end()
        if lines.left:
            lines.join(ticket, pool, lines.behind(ticket, pool, home))
        else:
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
        if ticket.state is not MUST_BE["released"]:
            raise misstep(ticket, "released")
        self._books.now = now
        if self._watchers:
            self._event = Released(now, ticket, answer)
        endpoint, pool = ticket.endpoint, ticket.pool
        assert endpoint is not None and pool is not None  # noqa: PT018, S101 - a lease has both
        ticket.state, ticket.ended_at, ticket.answer = DONE, now, answer
        endpoint.release(ticket, now, answer is _OK, pool.waiting_total > 0)
        if answer is _OK and pool.waiting_total and endpoint.held >= 1.5 * endpoint.limit.value:
            pool.pace.dispatched(now)  # far above a lowered limit: one was served, and nobody takes its place
        try:
            self._answers.ended(ticket, endpoint, pool, answer)
        finally:  # a fault in that leaves no room kept and nothing in its tenant's account
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
            picked.release(ticket, now, served=False)
            if served is None:
                ticket.state = DONE
                self._lines.count_out(ticket)
            else:
                ticket.endpoint = served
                served.lease(ticket, now)
                self._fleet.found(ticket)
                self._fleet.changed(served)
            self._fleet.forget_if_gone(picked)
            self._fleet.changed(picked)
        self._fleet.let_go(ticket)
        return self._end()

    # ---- time

    def tick(self, now: float) -> list[Decision]:
        """Let time pass: budgets, patience and ejections end. Needed at `next_deadline()`, harmless at any time.

        Of those whose time is over in one moment, as after a burst, DUE_AT_ONCE are looked at: tick again for the rest.
        """
        self._begin(now).goes_on = False
        if self._watchers:
            self._event = Ticked(now)
        for ticket in islice(self._lines.alarms.due(now), DUE_AT_ONCE):
            self._settling.wake(ticket)
            if now >= ticket.wait_until:
                self._refusing.expire(ticket)
            else:
                self._lines.go_anywhere(ticket)
                self._lines.set_alarm(ticket, placed(ticket.pool))
        self._fleet.pass_time(now)
        self._books.pools.every.tenants.forget_some()
        self._books.settles = bool(self._lines.left)
        return self._end()

    def wake(self, now: float) -> list[Decision]:
        """Note that the process was stopped until now: how fast requests left meanwhile says nothing of the engines."""
        self._begin(now)
        if self._watchers:
            self._event = Woken(now)
        for pool in self.pools():
            pool.pace.forget_drain(now)
        return self._end()

    def next_deadline(self) -> float | None:
        """Return when `tick` is due next, never before the last event; None: nothing is due."""
        if self._lines.left:
            return self._books.now
        due, waits_until, changes_at = self._fleet.due_at, self._lines.alarms.next(), self._fleet.changes.next()
        if waits_until is not None and (due is None or waits_until < due):
            due = waits_until
        if changes_at is not None and (due is None or changes_at < due):
            due = changes_at
        if due is None:
            return None
        now = self._books.now
        return due if due > now else now
