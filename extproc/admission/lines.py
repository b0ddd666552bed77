"""Joining a line, leaving it, changing over: whoever waits stands in exactly one, at the place that its key says.

Each pool has a shared line, and one for each member that somebody calls home. A move may make room for others, which
the dispatch pass then looks at: see `Books.freed` and `Books.arrive`.
"""

from __future__ import annotations

from heapq import heappush
from math import inf
from typing import TYPE_CHECKING, TypeVar

from extproc.admission.alarms import NEVER, Alarms
from extproc.admission.fairness import OUTPUT_WEIGHT
from extproc.admission.guard import seniority
from extproc.admission.lanes import comes
from extproc.admission.queue import WINDOW, Queue
from extproc.admission.tenants import GUARANTEED
from extproc.admission.transitions import LEFT, NEW, WAITING

if TYPE_CHECKING:
    from extproc.admission.books import Books
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.estimate import TokenEstimate
    from extproc.admission.pool import Pool
    from extproc.admission.ticket import Key, Ticket

SURPRISE = 4.0
"""Who waits is estimated anew where so many times too much was booked: each reading moves all estimates a little."""

T = TypeVar("T")


class Left:
    """A line that was given up: see settling.py.

    Attributes:
        pool: whose it was.
        at_home: of those at home at one endpoint, not the shared one.
        may_move: who stands there may belong to another pool.
        renumbers: who stands there gets a new place in the order.
        is_charged: their tenants were charged for the old ones.
        is_new: all came since, and stand as they came.
        looked_to: up to there it is known whose turn is when; None: nothing of it is.
        is_looked_at: it is known of all.
    """

    __slots__ = ("at_home", "is_charged", "is_looked_at", "is_new", "looked_to", "may_move", "pool", "renumbers")

    def __init__(self, pool: Pool, at_home: bool) -> None:
        """Give a line up. (No dataclass: compiled, it would look for `Pool` before that is there, and crash.)"""
        self.pool = pool
        self.at_home = at_home
        self.may_move = False
        self.renumbers = False
        self.is_charged = True
        self.is_new = False
        self.looked_to: Key | None = None
        self.is_looked_at = False

    @property
    def is_in_order(self) -> bool:
        """Whether those who stand there are settled as they stand."""
        return not self.may_move and (self.is_new or not self.renumbers)


class Looked:
    """Those who are to wait in one pool, of lines that were given up and are settled by class and arrival.

    Attributes:
        heap: each one's class and number, a number in this heap, and the line where it stands, or stood.
        queues: these lines.
    """

    __slots__ = ("_count", "heap", "queues")

    def __init__(self) -> None:
        """Start with nobody."""
        self.heap: list[tuple[int, int, int, Ticket, Queue]] = []
        self.queues: dict[Queue, None] = {}
        self._count = 0

    def add(self, ticket: Ticket, queue: Queue) -> None:
        """Note one that stands in `queue`; it may have been noted where it stood before."""
        self._count += 1
        heappush(self.heap, (ticket.key[0], ticket.key[2], self._count, ticket, queue))
        self.queues[queue] = None


class Lines:
    """Who waits where, and until when.

    Attributes:
        alarms: when each of those who wait must be looked at: its patience, or its budget, ends.
        left: lines that were given up: who stands there is yet to be settled.
        left_since: since when there are any, or were last.
        is_known: whose turn is when was found out of all who stand there; not of a line that was given up since.
        turns: of those who stand there, by the pool where each is to wait: see `Looked`.
        renumbered: pools whose places are given in the order of arrival since the last change, till all are settled.
    """

    __slots__ = ("_books", "_sequence", "alarms", "is_known", "left", "left_since", "renumbered", "turns")

    def __init__(self, books: Books) -> None:
        """Start with nobody waiting."""
        self._books = books
        self._sequence = 0
        self.alarms: Alarms[Ticket] = Alarms()
        self.left: dict[Queue, Left] = {}
        self.left_since = 0.0
        self.is_known = False
        self.turns: dict[Pool, Looked] = {}
        books.pools.awaited = self.turns
        self.renumbered: dict[Pool, None] = {}

    # ---- places in the order

    def number(self, ticket: Ticket, pool: Pool) -> None:
        """Give a request that comes its place: class, then its tenant's tag, then arrival.

        While others in its pool are yet to get new ones it stands behind all of its class: see `behind`.
        """
        if pool is not pool.base and not pool.waiting_total:
            comes(pool, ticket)
        self._sequence += 1
        tag = inf if self.left and self._is_renumbered(pool) and not ticket.is_favoured else self._tag(ticket, pool)
        ticket.key = (-ticket.request_class.priority, tag, self._sequence)

    def renumber(self, ticket: Ticket, pool: Pool) -> None:
        """Give one who waits another place."""
        ticket.key = (ticket.key[0], self._tag(ticket, pool), ticket.key[2])

    def _is_renumbered(self, pool: Pool) -> bool:
        return pool in self.renumbered or any(self.left[queue].renumbers for queue in pool.left)

    def _tag(self, ticket: Ticket, pool: Pool) -> float:
        """Return the request's place inside its class."""
        policy = self._books.policy
        tag = 0.0
        if policy.short_first:
            tag = float(ticket.prompt_tokens)
        elif policy.fair:
            weight = 1.0 if ticket.account is None else ticket.account.rule.weight
            ticket.charge = (ticket.prompt_tokens + OUTPUT_WEIGHT * ticket.output_tokens) / weight
            ticket.flow = flow = pool.share(ticket.request_class.priority).charge(ticket.tenant, ticket.charge)
            tag = flow.tag
        return GUARANTEED if ticket.is_favoured else tag

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
        if queue.is_left:
            self._leave_left(ticket, pool, queue)
        else:
            kept = pool.guard.kept_by(ticket, queue) if ticket.is_guard else None
            if kept is not None:
                self._books.freed[kept] = None
            if shifts:
                self._move_up(pool, queue)
        if queue is not pool.shared and not queue and not queue.is_left and ticket.home is not None:
            del pool.homes[ticket.home]
        pool.note_waiting(ticket.request_class.priority, -1)
        self._books.waiting -= 1
        self.alarms.one_went(self._books.waiting)

    def _move_up(self, pool: Pool, queue: Queue) -> None:
        """Note that one in the window of `queue` went: who is in it now may go somewhere."""
        entrant = queue.entrant()
        if entrant is not None:
            self._books.arrive(entrant)
        if pool.homes:  # an endpoint looks at its home's line and the shared one as one: others may have moved up
            self._books.free({endpoint: None for endpoint in pool.open if endpoint in pool.homes})

    def leave(self, ticket: Ticket) -> None:
        """End a wait without a dispatch."""
        pool = placed(ticket.pool)
        self.quit(ticket, pool, placed(ticket.queue))
        ticket.state, ticket.alarm_number = LEFT, 0
        refund(ticket)
        self.count_out(ticket)

    def count_out(self, ticket: Ticket) -> None:
        """Note that a request neither waits nor runs any more: another of its tenant's may be guaranteed now."""
        following = self._books.tenants.goes(ticket)
        if following is not None:
            pool, queue = placed(following.pool), placed(following.queue)
            if queue.is_left:
                queue = self._apart(following, pool, queue)
            else:
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
        if queue is not pool.shared and not queue.is_left:
            self.quit(ticket, pool, queue)
            self.join(ticket, pool, pool.shared)
            self._books.free(pool.open)

    def give_up(self, queue: Queue, pool: Pool, *, at_home: bool) -> None:
        """Have those in a line of `pool` settled anew: see settling.py."""
        if not self.left:
            self.left_since = self._books.now
        queue.is_left = True
        pool.left.append(queue)
        self.left[queue] = Left(pool, at_home)
        self.is_known = False
        self._books.settles = True

    def behind(self, ticket: Ticket, pool: Pool, home: Endpoint | None) -> Queue:
        """Return the line for one that comes while others of its pool are yet to be settled.

        If these get new places, it stands with them, and gets its own when they have theirs.
        """
        if ticket.key[1] != inf:
            return pool.shared if home is None else pool.queue_of(home)
        at_home = home is not None
        for queue in pool.left:
            line = self.left[queue]
            if line.is_new and not line.may_move and line.at_home is at_home:
                return queue
        queue = Queue()
        self.give_up(queue, pool, at_home=at_home)
        self.left[queue].is_new = self.left[queue].renumbers = True
        return queue

    def _apart(self, ticket: Ticket, pool: Pool, queue: Queue) -> Queue:
        """Take one out of a line that was given up; return a line for it alone, where it is looked at again."""
        line, apart = self.left[queue], Queue()
        self.give_up(apart, pool, at_home=line.at_home)
        self.left[apart].may_move, self.left[apart].renumbers = line.may_move, line.renumbers
        self.leave_left(ticket, pool, queue)
        return apart

    def leave_left(self, ticket: Ticket, pool: Pool, queue: Queue) -> None:
        """Take a ticket out of a line that was given up."""
        queue.remove(ticket)
        self._leave_left(ticket, pool, queue)

    def _leave_left(self, ticket: Ticket, pool: Pool, queue: Queue) -> None:
        if not self.left[queue].is_charged:
            ticket.charge = ticket.flow = None
        if not queue:
            pool.left.remove(queue)
            del self.left[queue]
            if not self.left:  # the last one
                self.turns.clear()
                self.renumbered.clear()

    # ---- until when

    def budget(self, ticket: Ticket, pool: Pool) -> None:
        """Note how long a request that comes may wait: its own budget or its class's, longer while nobody serves it."""
        ticket.is_served = pool.is_served
        request, budget_s = ticket.request, ticket.request_class.budget_s
        alone_s = self._books.policy.no_endpoint_budget_s
        if alone_s is not None:
            age_s = self._books.now - request.arrived
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

    def set_alarm(self, ticket: Ticket, pool: Pool) -> None:
        """Have one who waits in `pool` looked at when its patience or its budget ends."""
        at = ticket.wait_until
        if ticket.queue is not pool.shared and not placed(ticket.queue).is_left:
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


def refund(ticket: Ticket) -> None:
    """Give its tenant back what a request that was not served was charged."""
    if ticket.charge is not None and ticket.flow is not None:
        ticket.flow.left(ticket.charge)
        ticket.charge = ticket.flow = None


def placed(part: T | None) -> T:
    """Return what a WAITING or LEASED ticket always has: its pool, its queue while it waits, its endpoint's lease."""
    assert part is not None  # noqa: S101 - the core's own invariant
    return part


def _excess(ticket: Ticket) -> tuple[float, int]:
    return (placed(ticket.pool).waiting_total / (ticket.request_class.weight or 1.0), ticket.key[2])
