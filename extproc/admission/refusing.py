"""Who may wait, and for how long: refusals at once, at the end of a budget, and when the queue is full."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from extproc.admission.held import HeldBy
from extproc.admission.lines import placed
from extproc.admission.outcome import Outcome
from extproc.admission.transitions import LEFT
from extproc.admission.values import Reject

if TYPE_CHECKING:
    from extproc.admission.books import Books
    from extproc.admission.estimate import TokenEstimate
    from extproc.admission.lines import Lines
    from extproc.admission.pool import Pool
    from extproc.admission.ticket import Ticket

RETRY_AFTER_MAX_S = 60
_BY_SIZE = (HeldBy.KV, HeldBy.PROMPTS)


class Refusing:
    """Refusals of those who wait, or would have to.

    Attributes:
        draining: nothing waits any more.
    """

    __slots__ = ("_books", "_lines", "_tokens", "draining")

    def __init__(self, books: Books, lines: Lines, tokens: TokenEstimate) -> None:
        """Refuse who waits in `lines`, and tell `tokens` of whom its guess had refused."""
        self._books = books
        self._lines = lines
        self._tokens = tokens
        self.draining = False

    def screened(self, ticket: Ticket) -> Pool | None:
        """Return the pool of a new request; None: it can neither be served nor wait, whatever room there is."""
        books, request = self._books, ticket.request
        if request.allowed is not None:
            books.pools.know_subset(request.model, request.allowed)
        pool = books.pools.find(request.model, request.allowed)
        if pool is None:
            self.turn_away(ticket, Outcome.UNKNOWN_MODEL)
        elif request.allowed is not None and not pool.members and not self._may_come(request.model, request.allowed):
            self.turn_away(ticket, Outcome.NONE_ALLOWED)
        elif request.model is None and books.pools.misses_model:
            if self.draining:  # no body is read for its model any more: it may well name one
                self.turn_away(ticket, Outcome.DRAINING, 1)
            else:
                self.turn_away(ticket, Outcome.MODEL_MISSING)
        elif (
            books.tenants.are_ruled
            and books.policy.enable_queue
            and (crowd := books.tenants.crowd_of(ticket)) is not None
        ):
            ticket.state = LEFT
            books.decisions.append(Reject(ticket, Outcome.TENANT_LIMIT, 0.0, 1, crowd))
        else:
            return pool
        return None

    def _may_come(self, model: str | None, allowed: frozenset[str]) -> bool:
        """Tell whether one that is allowed is there, and may come to serve `model`, which nobody does yet."""
        endpoints = self._books.endpoints
        if not self._books.pools.is_awaited(model):
            return False
        return any(name in endpoints and not endpoints[name].removed for name in allowed)

    def turn_away(self, ticket: Ticket, outcome: Outcome, retry_after_s: int | None = None) -> None:
        """Refuse a request that waited nowhere."""
        ticket.state = LEFT
        self._books.decisions.append(Reject(ticket, outcome, 0.0, retry_after_s))

    def may_wait(self, ticket: Ticket, pool: Pool) -> None:
        """Decide whether a request that found no room may wait for it."""
        books, policy = self._books, self._books.policy
        ticket.waited_for = pool.held_by(ticket)
        if self.draining:
            self.refuse(ticket, Outcome.DRAINING)
        elif not policy.enable_queue:
            self.refuse(ticket, Outcome.NO_ENDPOINT)
        elif books.now >= ticket.wait_until:
            if ticket.wait_until > ticket.request.arrived:
                ticket.waited_for = None  # it came too late: whatever has no room now did not hold it
            self.expire(ticket)
        elif policy.shed and self._is_doomed(ticket, pool):
            self.refuse(ticket, Outcome.BUDGET_PREDICTED)
        else:
            if pool.waiting_total == 1:
                pool.pace.backlog_began(books.now)
            self._lines.set_alarm(ticket, pool)
            if books.waiting > policy.max_queued_requests:
                self.refuse(self._lines.last_of_all(), Outcome.QUEUE_FULL)

    def expire(self, ticket: Ticket) -> None:
        """Refuse a request whose budget is over."""
        self.refuse(ticket, Outcome.BUDGET_EXPIRED if placed(ticket.pool).usable else Outcome.NO_ENDPOINT)

    def refuse(self, ticket: Ticket, outcome: Outcome) -> None:
        """End a wait by a refusal, with the time that those before it will take as Retry-After.

        Where nobody is up, with what is left of the time that one is given to come; else as long as this one waited for
        nobody: sooner, it would only wait as long again. So it is where the pace is not known yet and a wait ran out.
        """
        books, pool = self._books, placed(ticket.pool)
        wait_s = max(books.now - ticket.request.arrived, 0.0)
        alone_s = books.policy.no_endpoint_budget_s
        if outcome is Outcome.NO_ENDPOINT and not pool.usable:
            left_s = 0.0 if alone_s is None else alone_s - wait_s
            retry_s = left_s if left_s > 0.0 else min(wait_s if alone_s is None else alone_s, RETRY_AFTER_MAX_S)
        else:
            drain = pool.pace.drain_rate()
            if drain is not None:
                retry_s = pool.ahead_of(ticket.request_class.priority) / drain
            else:
                waited = outcome is Outcome.BUDGET_EXPIRED and ticket.waited_for is not None
                retry_s = round(wait_s) if waited else 0.0  # its deadline, seen a moment later
            retry_s = min(retry_s, RETRY_AFTER_MAX_S)
        if ticket.waited_for in _BY_SIZE:
            self._tokens.doubt(ticket)
        self._lines.leave(ticket)
        books.decisions.append(Reject(ticket, outcome, wait_s, max(math.ceil(retry_s), 1)))

    def _is_doomed(self, ticket: Ticket, pool: Pool) -> bool:
        """Predict whether `ticket` would wait much longer than its budget."""
        now = self._books.now
        budget_s = pool.pace.law.sure * (ticket.wait_until - now)
        priority = ticket.request_class.priority
        ticket.predicted_s = wait_s = pool.pace.wait_s(ticket.position, priority, now)
        if wait_s is None or wait_s <= budget_s or not pool.usable or self._lines.left:  # its place is yet to come
            return False
        # `position` counts a noisy tenant's whole backlog; fairness may put this one before it. Now look closely.
        ahead = sum(queue.rank(ticket) for queue in pool.queues())
        ticket.predicted_s = exact_s = pool.pace.wait_s(ahead, priority, now)
        return exact_s is not None and exact_s > budget_s
