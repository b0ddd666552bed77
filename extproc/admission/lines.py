"""Joining a line, leaving it, changing over: whoever waits stands in exactly one, at the place that its key says.

Each pool has a shared line, and one for each member that somebody calls home. A move may make room for others, which
the dispatch pass then looks at: see `Books.freed` and `Books.arrive`.
"""

from __future__ import annotations

from collections import deque
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING, TypeVar

from extproc.admission.alarms import NEVER, Alarms
from extproc.admission.fairness import OUTPUT_WEIGHT
from extproc.admission.guard import seniority
from extproc.admission.lanes import comes, lane_of
from extproc.admission.queue import WINDOW
from extproc.admission.tenants import GUARANTEED, weight_of
from extproc.admission.transitions import LEFT, NEW, WAITING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from extproc.admission.books import Books
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.estimate import TokenEstimate
    from extproc.admission.pool import Pool
    from extproc.admission.queue import Queue
    from extproc.admission.ticket import Ticket

RENUMBERED = 250
"""New places given in one event, when the rules of order changed: a millisecond's worth."""
SURPRISE = 4.0
"""Who waits is estimated anew where so many times too much was booked: each reading moves all estimates a little."""

T = TypeVar("T")
_place = attrgetter("key")


class Lines:
    """Who waits where, and until when.

    Attributes:
        alarms: when each of those who wait must be looked at: its patience, or its budget, ends.
        misplaced: the numbers of those who wait at places of earlier rules, as they came; and of who came after them.
    """

    __slots__ = ("_books", "_sequence", "_unplaced", "alarms", "misplaced")

    def __init__(self, books: Books) -> None:
        """Start with nobody waiting."""
        self._books = books
        self._sequence = 0
        self.alarms: Alarms[Ticket] = Alarms()
        self.misplaced: deque[int] = deque()
        self._unplaced: dict[int, Ticket] = {}  # the tickets: numbers alone are sorted in a quarter of the time

    # ---- places in the order

    def number(self, ticket: Ticket, pool: Pool) -> None:
        """Give a request that comes its place: class, then its tenant's tag, then arrival.

        While others wait at places of earlier rules it stands behind all of its class till its turn to be placed comes.
        """
        if pool is not pool.base and not pool.waiting_total:
            comes(pool, ticket)
        self._sequence += 1
        if self.misplaced:
            tag = GUARANTEED if ticket.is_favoured else inf
            self.misplaced.append(self._sequence)
            self._unplaced[self._sequence] = ticket
        else:
            tag = self._tag(ticket, pool)
        ticket.key = (-ticket.request_class.priority, tag, self._sequence)

    def _renumber(self, ticket: Ticket, pool: Pool) -> None:
        ticket.key = (ticket.key[0], self._tag(ticket, pool), ticket.key[2])

    def _tag(self, ticket: Ticket, pool: Pool) -> float:
        """Return the request's place inside its class."""
        policy = self._books.policy
        tag = 0.0
        if policy.short_first:
            tag = float(ticket.prompt_tokens)
        elif policy.fair:
            ticket.charge = (ticket.prompt_tokens + OUTPUT_WEIGHT * ticket.output_tokens) / weight_of(ticket)
            tag = pool.share(ticket.request_class.priority).tag(ticket.tenant, ticket.charge)
        return GUARANTEED if ticket.is_favoured else tag

    def reorder(self) -> None:
        """Give all who wait new places, as they came: the rules of order changed, and tags can't be compared.

        Of more than RENUMBERED so many with each `go_on`; till then the others stand by their old places.
        """
        self._unplaced.clear()
        self._misplace(self._books.pools)
        if len(self.misplaced) <= RENUMBERED:
            self.go_on()

    def _misplace(self, pools: Iterable[Pool]) -> None:
        """Have all who wait in `pools` placed anew by `go_on`. Tenants begin anew: no earlier place is charged."""
        pools = list(pools)
        for pool in pools:
            for share in pool.shares.values():
                share.begin_anew()
        waiting = _waiting_in(pools)
        for ticket in waiting.values():
            ticket.charge = None
        self._unplaced |= waiting
        self.misplaced = deque(sorted(self._unplaced))

    def go_on(self) -> bool:
        """Give the next of those who wait at old places new ones; tell whether there are more."""
        misplaced, unplaced = self.misplaced, self._unplaced
        numbers = [misplaced.popleft() for _ in range(min(RENUMBERED, len(misplaced)))]
        some = [(unplaced.pop(number), number) for number in numbers]
        self._place_anew([ticket for ticket, number in some if ticket.state is WAITING and ticket.key[2] == number])
        return bool(misplaced)

    def _place_anew(self, tickets: Sequence[Ticket]) -> None:
        """Give `tickets`, who wait, new places: all are refunded first, so that nobody pays twice."""
        waiting = [(ticket, placed(ticket.pool), placed(ticket.queue)) for ticket in tickets]
        for ticket, pool, queue in waiting:
            queue.remove(ticket)
            refund(ticket, pool)
        for ticket, pool, queue in waiting:
            self._renumber(ticket, pool)
            queue.add(ticket)
        for pool in dict.fromkeys(pool for _, pool, _ in waiting):
            self._books.free(pool.open)

    def renew(self, endpoint: Endpoint, tokens: TokenEstimate) -> None:
        """Estimate the prompts of those anew who may be next at `endpoint`.

        Places stay: what a tenant is charged was settled when its request came.
        """
        for pool in endpoint.pools:
            for queue in (pool.shared, pool.homes.get(endpoint)):
                for ticket in queue.window() if queue else ():
                    prompt = tokens.prompt_of(ticket, pool.longest)
                    if SURPRISE * prompt < ticket.prompt_tokens:
                        ticket.book(prompt)
                        ticket.work_tokens = prompt
                        self._books.free(pool.open)

    # ---- coming and going

    def join(self, ticket: Ticket, pool: Pool, queue: Queue) -> None:
        """Let a request wait in `queue`, a line of its `pool`."""
        ticket.state = WAITING
        queue.add(ticket)
        if queue.guards and pool.guard.may_be_pushed_out(queue):
            self._books.free(pool.open)
        pool.note_waiting(ticket.request_class.priority, 1)
        self._books.waiting += 1

    def quit(self, ticket: Ticket, pool: Pool, queue: Queue) -> None:
        """Take a ticket out of its line, and note who may go somewhere now because of that."""
        shifts = pool.open and pool.waiting_total > WINDOW and queue.in_window(ticket)
        queue.remove(ticket)
        if ticket.is_guard:
            self._books.free(pool.open)
        elif shifts:
            entrant = queue.entrant()
            if entrant is not None:
                self._books.arrive(entrant)
            if pool.homes:  # an endpoint looks at its home's line and the shared one as one: others may have moved up
                self._books.free({endpoint: None for endpoint in pool.open if endpoint in pool.homes})
        if queue is not pool.shared and not queue and ticket.home is not None:
            del pool.homes[ticket.home]
        pool.note_waiting(ticket.request_class.priority, -1)
        self._books.waiting -= 1

    def leave(self, ticket: Ticket) -> None:
        """End a wait without a dispatch."""
        pool = placed(ticket.pool)
        self.quit(ticket, pool, placed(ticket.queue))
        ticket.state, ticket.alarm_number = LEFT, 0
        refund(ticket, pool)
        self.count_out(ticket)

    def count_out(self, ticket: Ticket) -> None:
        """Note that a request neither waits nor runs any more: another of its tenant's may be guaranteed now."""
        following = self._books.tenants.goes(ticket)
        if following is not None:
            pool, queue = placed(following.pool), placed(following.queue)
            queue.remove(following)
            following.key = (following.key[0], GUARANTEED, following.key[2])
            queue.add(following)
            if pool.guard.may_be_pushed_out(queue):
                self._books.free(pool.open)
            self._books.arrive(following)

    def take_back(self, ticket: Ticket) -> None:
        """End a wait as if it had never begun: the request is new again."""
        self.leave(ticket)
        ticket.state, ticket.alarm, ticket.home = NEW, NEVER, None
        ticket.passed_over, ticket.is_guard = 0, False
        ticket.tenant = ticket.request.tenant

    # ---- changing over

    def go_anywhere(self, ticket: Ticket) -> None:
        """Move a request from its home's line to the shared one; its place in the order stays."""
        pool, queue = placed(ticket.pool), placed(ticket.queue)
        if queue is not pool.shared:
            self.quit(ticket, pool, queue)
            self.join(ticket, pool, pool.shared)
            self._books.free(pool.open)

    def evict(self, pool: Pool, home: Endpoint) -> None:
        """Let those at home at an endpoint that is gone go anywhere."""
        queue = pool.homes.get(home)
        for ticket in list(queue or ()):
            self.go_anywhere(ticket)
            self.set_alarm(ticket, pool)

    def resettle(self, pools: Iterable[Pool]) -> None:
        """Move who waits in `pools` to the pool that serves its model now."""
        known = self._books.pools
        moving: dict[Ticket, Pool] = {}
        for pool in pools:
            for queue in pool.queues():
                for ticket in queue.tickets.values():
                    whole = known.find(ticket.request.model, ticket.request.allowed) or known.any_model
                    target = lane_of(whole, ticket.request_class)
                    if target is not pool:
                        moving[ticket] = target
        for ticket in sorted(moving, key=_place):
            self._move(ticket, moving[ticket])
        gained = dict.fromkeys(moving.values())  # tags of two pools can't be compared
        if self.misplaced and gained:
            self._misplace(gained)
            return
        for pool in gained:
            waiting = _waiting_in([pool])
            self._place_anew([waiting[number] for number in sorted(waiting)])

    # ---- until when

    def budget(self, ticket: Ticket, pool: Pool) -> None:
        """Note how long a request that comes may wait: its own budget or its class's, longer while nobody serves it."""
        request, budget_s, age_s = (
            ticket.request,
            ticket.request_class.budget_s,
            self._books.now - ticket.request.arrived,
        )
        alone_s = self._books.policy.no_endpoint_budget_s
        if alone_s is not None:
            if not pool.is_served:
                budget_s = max(budget_s, alone_s)
            elif age_s > budget_s:  # Envoy sends it again to a new sidecar: it waited for an endpoint that is here now
                budget_s += min(age_s, alone_s)
        if request.budget_s is not None and request.budget_s < budget_s:
            budget_s = request.budget_s
        ticket.wait_until = request.arrived + budget_s

    def patience(self, ticket: Ticket) -> None:
        """Note how long a request that comes may wait for its home.

        At least half of its budget is left for any endpoint: else it would be refused while others have room.
        """
        now, patience_s = self._books.now, self._books.policy.patience_s
        half_s = (ticket.wait_until - now) / 2
        ticket.patience_until = now + (patience_s if patience_s < half_s else half_s)

    def follow_service(self, pool: Pool) -> None:
        """Note that the first endpoint of `pool` is up, or the last one is not: budgets are others then."""
        is_served = pool.usable > 0
        if is_served is pool.is_served:
            return
        pool.is_served = is_served
        if pool.waiting_total:
            if is_served:
                pool.pace.backlog_began(self._books.now)  # what nobody served says nothing of those who do
            for queue in pool.queues():
                for ticket in queue.tickets.values():
                    self._budget_anew(ticket, is_served=is_served)

    def _budget_anew(self, ticket: Ticket, *, is_served: bool) -> None:
        """Change the budget of one who waits: its class's begins when there is somebody to wait for."""
        alone_s = self._books.policy.no_endpoint_budget_s
        if alone_s is None:
            return
        request = ticket.request
        most = request.arrived + alone_s
        if is_served:
            until = min(self._books.now, most) + ticket.request_class.budget_s
        else:
            until = max(ticket.wait_until, most)
        if request.budget_s is not None:
            until = min(until, request.arrived + request.budget_s)
        if until != ticket.wait_until:
            ticket.wait_until = until
            self.set_alarm(ticket, placed(ticket.pool))

    def _move(self, ticket: Ticket, pool: Pool) -> None:
        before, queue, home = placed(ticket.pool), placed(ticket.queue), ticket.home
        self.quit(ticket, before, queue)
        refund(ticket, before)
        ticket.pool = pool
        if pool is not pool.base and not pool.waiting_total:
            comes(pool, ticket)
        self._renumber(ticket, pool)
        stays = home is not None and queue is not before.shared and pool in home.pools
        self.join(ticket, pool, pool.queue_of(home) if home is not None and stays else pool.shared)
        if pool.waiting_total == 1:
            pool.pace.backlog_began(self._books.now)
        if before.is_served is not pool.is_served:
            self._budget_anew(ticket, is_served=pool.is_served)
        self.set_alarm(ticket, pool)
        self._books.free(pool.open)

    def set_alarm(self, ticket: Ticket, pool: Pool) -> None:
        """Have one who waits in `pool` looked at when its patience or its budget ends."""
        at = ticket.wait_until
        if ticket.queue is not pool.shared:
            at = min(at, ticket.patience_until)
        self.alarms.set(ticket, at, self._books.waiting)

    def last_of_all(self) -> Ticket:
        """Return the waiting request that goes last: of the lowest class, the one that came last. One must wait.

        Of weighted classes of that priority, the one which has the most waiting for its weight.
        """
        lines = (queue for pool in self._books.pools for queue in pool.queues() if queue)
        lasts = [queue.last() for queue in lines]
        last = max(lasts, key=seniority)
        if last.request_class.weight is None:
            return last
        return max((one for one in lasts if one.key[0] == last.key[0]), key=_excess)


def refund(ticket: Ticket, pool: Pool) -> None:
    """Give its tenant back what a request that was not served was charged."""
    if ticket.charge is not None:
        pool.shares[ticket.request_class.priority].left(ticket.tenant, ticket.charge)
        ticket.charge = None


def placed(part: T | None) -> T:
    """Return what a WAITING or LEASED ticket always has: its pool, its queue while it waits, its endpoint's lease."""
    assert part is not None  # noqa: S101 - the core's own invariant
    return part


def _excess(ticket: Ticket) -> tuple[float, int]:
    return (placed(ticket.pool).waiting_total / (ticket.request_class.weight or 1.0), ticket.key[2])


def _waiting_in(pools: Iterable[Pool]) -> dict[int, Ticket]:
    """Return who waits in `pools`, by number."""
    waiting: dict[int, Ticket] = {}
    for pool in pools:
        for queue in pool.queues():
            waiting.update(queue.tickets)
    return waiting
