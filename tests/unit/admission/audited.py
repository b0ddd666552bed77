"""A core every event of which is checked: against the books beside it, and against what a decision may be.

The account of who waits and who holds what is kept in here; `audit.py` compares it with the core's.
"""

from __future__ import annotations

import contextlib
from math import ceil
from operator import attrgetter
from typing import TYPE_CHECKING

from extproc.admission.laws import LAWS
from extproc.admission.outcome import Outcome
from extproc.admission.queue import WINDOW
from extproc.admission.refusing import RETRY_AFTER_MAX_S
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Decision, Dispatch, EndpointSpec, Policy, Reject, Request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.load import Load

from .audit import Audit, Books, BrokenError, may_take, require

GUARD = LAWS.guard.passes

TICKS_AT_ONE_TIME = 8
"""More ticks than this at one and the same time mean that `next_deadline` makes no progress. Of 300 budgets that end 50
do in each."""


class Audited(Audit):
    """The core's events by name. Each is told the core and our books, and checked."""

    # ---- events

    def offer(self, request: Request) -> Ticket:
        ticket = Ticket(request)
        self._begin()
        self.offered += 1
        self.waiting[ticket] = None
        self.epochs[ticket] = self.epoch
        self._end(self.core.offer(ticket, self.now), offered=ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        self._begin()
        self._forget(ticket)
        self.outcomes[Outcome.CANCELLED] += 1
        self._end(self.core.cancel(ticket, self.now))

    def release(self, ticket: Ticket, answer: Answer = Answer.UNKNOWN) -> None:
        self._begin()
        books = self.leased.pop(ticket)
        del books.leases[ticket]
        self._end(self.core.release(ticket, self.now, answer))

    def adopt(self, request: Request, name: str, *, begun: bool = False) -> Ticket:
        """A lease comes that another sidecar's core gave: limits have no say."""
        ticket = Ticket(request)
        self._begin()
        books = self.books.get(name)
        if books is not None:
            books.leases[ticket] = None
            self.leased[ticket] = books
            self.runs_at[ticket] = books.spec.address if books.present else ""
        self._end(self.core.adopt(ticket, name, self.now, begun=begun))
        return ticket

    def move(self, ticket: Ticket, name: str) -> None:
        """Another endpoint answered than the one picked."""
        self._begin()
        before, after = self.leased.get(ticket), self.books.get(name)
        if after is None:
            self.leased.pop(ticket, None)
        if after is not before and before is not None:
            del before.leases[ticket]
            if after is not None:
                after.leases[ticket] = None
                self.leased[ticket] = after
                self.runs_at[ticket] = after.spec.address if after.present else ""
        self._end(self.core.move(ticket, name, self.now))

    def disown(self, ticket: Ticket) -> None:
        """A lease is left to telemetry."""
        self._begin()
        books = self.leased.pop(ticket)
        del books.leases[ticket]
        if books.foreign is not None:
            books.foreign += ticket.sequences
        self._end(self.core.disown(ticket, self.now))

    def withdraw(self, ticket: Ticket) -> None:
        """A waiting request is taken back, and may be offered again."""
        self._begin()
        self._forget(ticket)
        self.offered -= 1
        self._end(self.core.withdraw(ticket, self.now))
        require(ticket.state is State.NEW, ticket, "was taken back")

    def offer_again(self, ticket: Ticket) -> None:
        self._begin()
        self.offered += 1
        self.waiting[ticket] = None
        self.epochs[ticket] = self.epoch
        self._end(self.core.offer(ticket, self.now), offered=ticket)

    def set_quota(self, name: str, quota: int | None) -> None:
        self._begin()
        self._end(self.core.set_quota(name, quota, self.now))

    def answered(self, ticket: Ticket) -> None:
        self._begin()
        self._end(self.core.answered(ticket, self.now))

    def first_token(self, ticket: Ticket) -> None:
        self._begin()
        self._end(self.core.first_token(ticket, self.now))

    def know_models(self, *models: str, expects_any: bool = False) -> None:
        self._begin()
        self._end(self.core.know_models(models, self.now, expects_any=expects_any))

    def put(self, *specs: EndpointSpec) -> None:
        self._begin()
        for spec in specs:
            books = self.books.setdefault(spec.name, Books(spec))
            if books.spec.address != spec.address:
                self._depart(books)
            books.spec, books.present = spec, True
            if spec.address and self.at.get(spec.address) is not books:
                self._arrive(books)
        self._end(self.core.put_endpoints(specs, self.now))

    def remove(self, name: str) -> None:
        self._begin()
        if name in self.books:
            self._depart(self.books[name])
            self.books[name].present = False
        self._end(self.core.remove_endpoints([name], self.now))

    def _depart(self, books: Books) -> None:
        if self.at.get(books.spec.address) is books:
            del self.at[books.spec.address]
            for ticket in books.leases:
                self.runs_at[ticket] = self.runs_at.get(ticket) or books.spec.address

    def _arrive(self, books: Books) -> None:
        """An address has one endpoint, and that one counts what runs there."""
        address = books.spec.address
        if (before := self.at.get(address)) is not None:
            self._depart(before)
            before.present = False
        self.at[address] = books
        self.runs_at = {ticket: at for ticket, at in self.runs_at.items() if ticket in self.leased}
        for ticket in [ticket for ticket, at in self.runs_at.items() if at == address]:
            holder = self.leased[ticket]
            if holder is not books:
                del holder.leases[ticket]
                books.leases[ticket] = None
                self.leased[ticket] = books
        self._bury()

    def set_up(self, name: str, *, is_up: bool | None) -> None:
        self._begin()
        self._end(self.core.set_up(name, self.now, is_up=is_up))

    def observe(self, name: str, load: Load) -> None:
        self._begin()
        self._expect_foreign(name, load)
        self._end(self.core.observe(name, load, self.now))

    def report(self, name: str, load: Load) -> None:
        """What an answer says of its endpoint's load: nothing but the gate and the KV figure may move."""
        self._begin()
        endpoint = self.core.endpoints.get(name)
        before = None if endpoint is None else _counted(endpoint)
        self._end(self.core.report(name, load, self.now))
        require(endpoint is None or before == _counted(endpoint), "a report moved what it knows nothing of:", endpoint)

    def _expect_foreign(self, name: str, load: Load) -> None:
        books = self.books.get(name)
        if books is None or load.running is None:
            return
        there = int(load.running + (load.waiting or 0))
        known = there - books.sequences if books.foreign is None else min(books.foreign, there)
        books.foreign, books.shown = max(known, 0), (books.shown[1], max(there - books.sequences, 0))

    def set_policy(self, policy: Policy) -> None:
        self._begin()
        self.epoch += 1
        self._end(self.core.set_policy(policy, self.now))

    def drain(self) -> None:
        self._begin()
        self._end(self.core.drain(self.now))
        require(not self.waiting, "waiting after a drain:", self.waiting)

    def wake(self) -> None:
        self._begin()
        self._end(self.core.wake(self.now))

    def tick(self) -> None:
        self._begin()
        self._end(self.core.tick(self.now))

    def advance(self, seconds: float, *, late: bool = False) -> None:
        """Let time pass, with every tick on time; `late`: the driver slept, and there is one tick at the end."""
        until = self.now + seconds
        while not late and (due := self.core.next_deadline()) is not None and due <= until:
            self.now = due
            self._settle()
        self.now = until
        self._settle()

    def _settle(self) -> None:
        self.tick()
        most = TICKS_AT_ONE_TIME + 3 * len(self.waiting)  # who is settled is looked at before, some are settled twice
        idle = 0
        while (due := self.core.next_deadline()) is not None and due <= self.now:
            waiting = len(self.waiting)
            self.tick()
            most -= 1
            is_left = any(ticket.queue is not None and ticket.queue.is_left for ticket in self.waiting)
            idle += not is_left and len(self.waiting) == waiting
            if idle >= TICKS_AT_ONE_TIME or most <= 0:
                raise BrokenError(f"ticks at {self.now!r} lead nowhere: next_deadline is still {due!r}")
        for ticket in self.waiting if self.always else ():
            require(ticket.wait_until > self.now, ticket, "waits past its budget")

    @contextlib.contextmanager
    def checked_at_its_end(self) -> Iterator[None]:
        """For very many events that only lead up to something: all is checked once, when they are over."""
        self.always = False
        yield
        self.always = True
        self.check()

    # ---- what each event must do

    def _begin(self) -> None:
        self.events += 1
        if self.always:
            self._before = {ticket: (ticket.queue, ticket.passed_over) for ticket in self.waiting}

    def _end(self, decisions: list[Decision], offered: Ticket | None = None) -> None:
        self._bury()
        for decision in decisions:
            ticket = decision.ticket
            require(ticket in self.waiting, "a second outcome, or one that nobody asked for:", decision)
            self.outcomes[decision.outcome] += 1
            if isinstance(decision, Dispatch):
                self._dispatched(decision)
            else:
                self._rejected(decision, offered)
        self.peak = max(self.peak, len(self.waiting))
        require(len(self.waiting) == self.core.waiting, self.core.waiting, "wait, by our books", len(self.waiting))
        require(self.offered == len(self.waiting) + self.outcomes.total(), "outcomes lost:", self.outcomes)
        if offered in self.waiting:
            require(offered.state is State.WAITING, offered, "has no decision and does not wait")
            require(self.core.policy.enable_queue and not self.core.draining, offered, "must not be held")
        due = self.core.next_deadline()
        require(due is None or due >= self.now, "next deadline", due, "is before now", self.now)
        if self.always:
            self.check()

    def _dispatched(self, decision: Dispatch) -> None:
        ticket, books = decision.ticket, self.books.get(decision.endpoint)
        endpoint = ticket.endpoint
        require(ticket.state is State.LEASED, ticket, "was dispatched")
        require(books is not None and books.present, "dispatch to", decision.endpoint, "which is not there")
        assert books is not None
        assert endpoint is not None
        require(endpoint.name == decision.endpoint, endpoint, "is not", decision.endpoint)
        models = books.spec.models
        require(not models or ticket.request.model in (None, *models), ticket, "sent to", models)
        allowed = ticket.request.allowed
        require(allowed is None or decision.endpoint in allowed, ticket, "was not allowed to", decision.endpoint)
        moved = ticket.home is not None and ticket.home.name != decision.endpoint
        require((decision.outcome is Outcome.REROUTED) == moved, decision)
        require(decision.wait_s == max(self.now - ticket.request.arrived, 0.0), decision)
        if self.core.policy.enable_queue:
            require(endpoint.available, "dispatch to", endpoint)
            require(self.fits(books, endpoint, ticket), ticket, "does not fit", endpoint, books)
        if self.always and self.core.policy.enable_queue:
            self._in_order(ticket, books, endpoint)
        self._forget(ticket)
        books.leases[ticket] = None
        self.leased[ticket] = books
        self.runs_at[ticket] = books.spec.address

    def _in_order(self, ticket: Ticket, books: Books, endpoint: Endpoint) -> None:
        """Nobody who stood before `ticket` all the time, and who fits as well, is left behind."""
        stood = [u for u, (queue, _) in self._before.items() if u.queue is queue and u in self.waiting]
        line = [u for u in stood if u.pool is ticket.pool and may_take(u, endpoint)]
        line = sorted(line, key=attrgetter("key"))[:WINDOW]
        if len({u.pool.base for u in (*self._before, ticket) if u.pool and endpoint in u.pool.members}) > 1:
            self._guards_first(ticket, books, endpoint)
            # Who of other tenants is before depends on turns.
            line = [u for u in line if u.tenant == ticket.tenant and not ticket.is_guard]
        for other in line:
            if other.key > ticket.key or other is ticket:
                return
            require(not self.fits(books, endpoint, other), ticket, "passed", other, "at", endpoint)
            if other.queue is not other.pool.shared or len(other.pool.members) == 1:  # else room is kept elsewhere
                require(self._before[other][1] < GUARD, ticket, "passed the guarded", other)

    def _guards_first(self, ticket: Ticket, books: Books, endpoint: Endpoint) -> None:
        """Where pools meet nobody passes guards that fit, whatever the turns are, if it came after all of them."""
        if ticket.is_guard or ticket not in self._before:
            return
        guards = []
        for pool in {u.pool: None for u in self._before if u in self.waiting and u.pool and u.pool is not ticket.pool}:
            line = [u for u in self.waiting if u.pool is pool and endpoint in pool.members and may_take(u, endpoint)]
            window = sorted(line, key=attrgetter("key"))[:WINDOW]
            guards += [u for u in window if u in self._before and self._before[u][1] >= GUARD]
        place = (ticket.key[0], ticket.key[2])
        if guards and all((u.key[0], u.key[2]) < place and self.fits(books, endpoint, u) for u in guards):
            heirs = [u for u in self.waiting if u.pool is ticket.pool and u.is_guard]
            require(bool(heirs), ticket, "passed those with room kept for them:", guards)

    def _rejected(self, decision: Reject, offered: Ticket | None) -> None:
        ticket, policy, outcome = decision.ticket, self.core.policy, decision.outcome
        require(ticket.state is State.LEFT, ticket, "was refused")
        match outcome:
            case Outcome.UNKNOWN_MODEL:
                listed = [books.spec.models for books in self.books.values() if books.present]
                require(all(listed) and not any(ticket.request.model in models for models in listed), decision)
                require(decision.retry_after_s is None, decision)
            case Outcome.NONE_ALLOWED:
                allowed = ticket.request.allowed or frozenset()
                there = [name for name, books in self.books.items() if books.present and name in allowed]
                listed = [books.spec.models for books in self.books.values() if books.present]
                anyone = ticket.request.model is None and all(listed)
                serving = [n for n in there if anyone or ticket.request.model in (self.books[n].spec.models or {None})]
                serving += [n for n in there if not self.books[n].spec.models]
                require(not serving, decision, "and it may go to", serving)
            case Outcome.MODEL_MISSING:
                listed = [books.spec.models for books in self.books.values() if books.present]
                require(ticket.request.model is None and all(listed) and len(set(listed)) > 1, decision)
            case Outcome.QUEUE_FULL:
                require(len(self.waiting) > policy.max_queued_requests, decision, len(self.waiting))
                lowest = min(u.request_class.priority for u in self.waiting)
                require(ticket.request_class.priority == lowest, decision, "is not of the lowest class")
            case Outcome.BUDGET_PREDICTED:
                require(ticket is offered and policy.shed, decision)
            case Outcome.TENANT_LIMIT:
                tenant, rule = policy.tenants.who(ticket.request.tenant)
                others = [one for one in (*self.waiting, *self.leased) if one is not ticket]
                count = sum(policy.tenants.who(one.request.tenant)[0] == tenant for one in others)
                require(rule.max_in_flight is not None and count >= rule.max_in_flight, decision, count, "in flight")
            case Outcome.DRAINING:
                require(self.core.draining, decision)
            case Outcome.BUDGET_EXPIRED:
                require(self.now >= ticket.wait_until, decision, "before", ticket.wait_until)
            case Outcome.NO_ENDPOINT:
                require(self.now >= ticket.wait_until or not policy.enable_queue, decision)
            case _:
                raise BrokenError(f"refused as {outcome}")
        retry = decision.retry_after_s
        most = max(RETRY_AFTER_MAX_S, ceil(policy.no_endpoint_budget_s or 0.0))
        require(retry is None or 1 <= retry <= most, decision)
        self._forget(ticket)

    def _forget(self, ticket: Ticket) -> None:
        del self.waiting[ticket]
        del self.epochs[ticket]

    def _bury(self) -> None:
        """Forget who is gone, holds nothing, and keeps nothing for anybody."""
        gone = [name for name, books in self.books.items() if not books.present and not books.leases]
        kept = self.kept()[0] if gone else {}
        for name in gone:
            if not kept.get(name):
                del self.books[name]


def _counted(endpoint: Endpoint) -> tuple[object, ...]:
    """What only a look at the endpoint's page may change."""
    reading, prefill, kv, steps = endpoint.reading, endpoint.prefill, endpoint.kv, endpoint.steps
    told = (reading.page, reading.page_at, endpoint.strangers.takes, endpoint.sees_first_tokens, endpoint.produced)
    learned = (kv.real, kv.trust, prefill.fresh, steps.base_s, steps.sequence_s, steps.prompt_s, steps.tpot_s)
    return (*told, *learned, endpoint.limit, endpoint.limit.value, prefill.limit, prefill.counts)
