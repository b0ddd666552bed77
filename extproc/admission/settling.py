"""What touches all who wait: another order, pools that split or join, an endpoint that is gone, the first that is up.

No event may take as long as all of them do. So the lines that it touches are given up whole, and who stands there is
settled anew: in the pool that serves its model now, in its home's line or the shared one, at the place that the rules
give it, with its budget. A piece of them at once, which is all of them unless they are very many; the rest in ticks
that are due at once.

The highest class goes first: an endpoint that comes up may be full after the first piece. Those of a class are settled
in the order of their places. Who may belong elsewhere, or gets a new place, is settled as it came, so that a tenant's
requests stay in the order of their arrival; for that all of these are looked at before, many at once. Pools take turns,
so that nobody waits for a place where there is room until those of a long line have theirs.

Till its turn comes nobody is sent anywhere from a line that was given up; who waits there is counted, may leave, and
is refused when its budget is over, as anywhere.
"""

from __future__ import annotations

from heapq import heappop, merge
from itertools import islice
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING

from extproc.admission.lanes import comes, lane_of
from extproc.admission.lines import Looked, placed, refund
from extproc.admission.queue import Queue

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from extproc.admission.books import Books
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.lines import Left, Lines
    from extproc.admission.pool import Pool
    from extproc.admission.ticket import Ticket

PIECE = 250
"""How many are settled in one event: two milliseconds' worth."""
LOOKS = 3
"""So many times a piece are looked at in one event."""
LOOKED_S = 1.0
"""For so long; then twice as many, and so on. A change of pools begins it anew, and many in a row must let it end."""
GOING = 4
"""Who is dispatched costs so many times as much: as much fewer are a piece where there is room, or all are let go."""


class Settling:
    """Those who are yet to be settled: see `Lines.left`."""

    __slots__ = ("_books", "_lines")

    def __init__(self, books: Books, lines: Lines) -> None:
        """Settle who waits in `lines`."""
        self._books = books
        self._lines = lines

    # ---- what touches many

    def reorder(self) -> None:
        """Follow other rules of order: all who wait get new places, and tenants begin anew."""
        self._lines.renumbered.clear()
        self._lines.is_known = False
        self._renumber(self._books.pools, begin_anew=True)

    def resettle(self, pools: Iterable[Pool]) -> None:
        """Follow a change of pools: who waits in these may belong to another now."""
        left = self._lines.left
        self._lines.renumbered.clear()
        self._lines.turns.clear()
        self._lines.is_known = False
        for line in left.values():  # where these belong is to be found out again
            line.looked_to, line.is_looked_at = None, False
        for pool in pools:
            self._give_up(pool)
            for queue in pool.left:
                left[queue].may_move = True

    def evict(self, pool: Pool, home: Endpoint) -> None:
        """Follow an endpoint that is gone: who is at home there may go anywhere."""
        queue = pool.homes.pop(home, None)
        if queue is not None:
            self._lines.give_up(queue, pool, at_home=True)

    def follow_service(self, pool: Pool) -> None:
        """Note that the first endpoint of `pool` is up, or the last one is not: budgets are others then."""
        is_served = pool.usable > 0
        if is_served is not pool.is_served:
            pool.is_served = is_served
            if pool.waiting_total:
                if is_served:
                    pool.pace.backlog_began(self._books.now)  # what nobody served says nothing of those who do
                self._give_up(pool)

    def let_all_go(self) -> None:
        """Follow the queue that is switched off: who waits goes somewhere, or is refused."""
        for pool in self._books.pools:
            self._give_up(pool)

    def _renumber(self, pools: Iterable[Pool], *, begin_anew: bool) -> None:
        """Have who waits in `pools` get a new place; if tenants `begin_anew`, no earlier place is charged."""
        for pool in pools:
            self._give_up(pool)
            for queue in pool.left:
                line = self._lines.left[queue]
                line.renumbers = True
                line.is_charged &= not begin_anew
            if begin_anew:
                for share in pool.shares.values():
                    share.begin_anew()
            if pool.left:
                self._lines.renumbered[pool] = None

    def _give_up(self, pool: Pool) -> None:
        """Give all lines of `pool` up."""
        for home, queue in list(pool.homes.items()):
            self._lines.give_up(queue, pool, at_home=True)
            del pool.homes[home]
        if pool.shared:
            self._lines.give_up(pool.shared, pool, at_home=False)
            pool.shared = Queue()

    # ---- piece by piece

    def run(self) -> None:
        """Settle a piece if lines were given up in this event, or a tick is for that."""
        if self._books.settles:
            self._books.settles = False
            self._go_on()

    def _go_on(self) -> None:
        """Look at some of those who are to be settled as they came, or, once all are, settle the next piece."""
        if self._look():
            self._settle(self._next())
        self._books.pools.forget_left()

    def wake(self, ticket: Ticket) -> None:
        """Give one that is yet to be settled its budget before the old one ends it; settle it if that is over, too."""
        if placed(ticket.queue).is_left:
            pool = self._pool_of(ticket)
            if ticket.is_served is not pool.is_served:
                self._budget_anew(ticket, is_served=pool.is_served)
            if self._books.now >= ticket.wait_until:
                self._settle({ticket: pool})

    def _look(self) -> bool:
        """Find out whose turn is when, of some where that is not known; tell whether a piece may be settled, too.

        So it is once it is known of all, and few were left to look at; or many more than at first are by now.
        """
        books, lines = self._books, self._lines
        if lines.is_known:
            return True
        times = 1 + int((books.now - lines.left_since) / LOOKED_S)
        looked, most = 0, LOOKS * PIECE * times
        while unknown := [(queue, line) for queue, line in lines.left.items() if not line.is_in_order]:
            unknown = [(queue, line) for queue, line in unknown if not line.is_looked_at]
            for queue, line in unknown:
                if looked >= most:
                    return False
                looked += self._look_at(queue, line, most - looked)
            if not unknown and not self._meet():
                break
        lines.is_known = True
        return looked <= PIECE or times > 1

    def _look_at(self, queue: Queue, line: Left, most: int) -> int:
        """Look at up to `most` more who stand in a line; return how many there were."""
        tickets, turns = queue.behind(line.looked_to, most), self._lines.turns
        for ticket in tickets:
            pool = self._pool_of(ticket) if line.may_move else line.pool
            looked = turns.get(pool)
            if looked is None:
                looked = turns[pool] = Looked()
            looked.add(ticket, queue)
        if len(tickets) < most:
            line.is_looked_at = True
        else:
            line.looked_to = tickets[-1].key
        return len(tickets)

    def _meet(self) -> bool:
        """Have who waits where others come to get new places, too; tell whether there is anybody.

        Tags of two pools can't be compared. If all get new places in one piece, they are refunded first.
        """
        lines = self._lines
        left, renumbered = lines.left, lines.renumbered
        gaining = [
            pool
            for pool, looked in lines.turns.items()
            if pool not in renumbered and any(queue in left and left[queue].pool is not pool for queue in looked.queues)
        ]
        met = [pool for pool in gaining if pool.waiting_total]
        there = [queue for pool in met for queue in pool.queues() if not queue.is_left]
        self._renumber(met, begin_anew=sum(map(len, (*left, *there))) > PIECE)
        renumbered.update(dict.fromkeys(gaining))
        return bool(met)

    def _next(self) -> dict[Ticket, Pool]:
        """Return who is settled next, and where each is to wait: of each pool the first ones."""
        lines = self._lines
        left, turns = lines.left, lines.turns
        pools = dict.fromkeys(islice(turns, PIECE))  # of very many these alone are looked at
        for line in left.values():
            if len(pools) >= PIECE:
                break
            if line.is_in_order:
                pools[line.pool] = None
        most = max(PIECE - (GOING - 1) * self._room(pools), PIECE // GOING, 1)
        each = most if sum(map(len, left)) <= most else max(most // len(pools), 1)
        piece: dict[Ticket, Pool] = {}
        for pool in islice(pools, most):
            queues = [queue for queue in pool.left if left[queue].is_in_order]
            looked = turns.pop(pool, None)
            for ticket in _firsts(queues, [] if looked is None else looked.heap, each):
                piece[ticket] = pool
            if looked is not None and looked.heap:
                turns[pool] = looked  # the others first, next time
        return piece

    def _room(self, pools: Iterable[Pool]) -> int:
        """Return about how many of a piece may be dispatched: all, as far as the emptiest ones and those freed tell."""
        if not self._books.policy.enable_queue:
            return PIECE
        room = sum(max(one.limit.value - one.held, 1) for one in self._books.freed if one.closed_by is None)
        for pool in pools:
            if room >= PIECE:
                break
            one = pool.emptiest()
            if one is not None:
                room += max(one.limit.value - one.held, 1)
        return room

    def _pool_of(self, ticket: Ticket) -> Pool:
        pools, request = self._books.pools, ticket.request
        pool = pools.find(request.model, request.allowed)
        if pool is None and request.allowed is not None:  # nobody stood in the line of its set: it may be forgotten
            pools.know_subset(request.model, request.allowed, is_awaited=True)
            pool = pools.find(request.model, request.allowed)
        return lane_of(pool or pools.any_model, ticket.request_class)

    def _settle(self, targets: dict[Ticket, Pool]) -> None:
        """Have some join lines of the pools they belong to, as they came."""
        lines = self._lines
        leaving: list[tuple[Ticket, Left]] = []
        for ticket in sorted(targets, key=_number):
            pool, queue = placed(ticket.pool), placed(ticket.queue)
            line = lines.left[queue]
            lines.leave_left(ticket, pool, queue)
            if line.renumbers or targets[ticket] is not pool:
                refund(ticket)  # all first, so that nobody pays twice
            leaving.append((ticket, line))
        for ticket, line in leaving:
            pool = targets[ticket]
            if pool is not line.pool:
                self._move(ticket, line.pool, pool)
            if pool is not line.pool or line.renumbers:
                lines.renumber(ticket, pool)
            self._line_of(ticket, pool, line).add(ticket)
            if ticket.is_served is not pool.is_served:
                self._budget_anew(ticket, is_served=pool.is_served)
            lines.set_alarm(ticket, pool)
            if not self._books.policy.enable_queue:
                self._books.arrive(ticket)
        for pool in dict.fromkeys(targets.values()):
            self._books.free(pool.open)

    def _move(self, ticket: Ticket, before: Pool, pool: Pool) -> None:
        """Count one who waits in another pool."""
        before.note_waiting(ticket.request_class.priority, -1)
        if pool is not pool.base and not pool.waiting_total:
            comes(pool, ticket)
        pool.note_waiting(ticket.request_class.priority, 1)
        if pool.waiting_total == 1:
            pool.pace.backlog_began(self._books.now)
        ticket.pool = pool

    def _line_of(self, ticket: Ticket, pool: Pool, line: Left) -> Queue:
        """Return its home's line for one who stood in such a one and may still wait for it; else the shared one."""
        home = ticket.home
        if not line.at_home or home is None or ticket.patience_until <= self._books.now:
            return pool.shared
        if not home.available or pool not in home.pools or not home.missing.leads(ticket.request.model):
            return pool.shared
        return pool.queue_of(home)

    def _budget_anew(self, ticket: Ticket, *, is_served: bool) -> None:
        """Change the budget of one who waits: its class's begins when there is somebody to wait for."""
        ticket.is_served = is_served
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
        ticket.wait_until = until


def _firsts(queues: list[Queue], heap: list[tuple[int, int, int, Ticket, Queue]], most: int) -> Iterator[Ticket]:
    """Walk the first of those who stand in order in `queues`, and take those out of `heap` that are before them."""
    stand = merge(*queues, key=_place)
    upcoming = next(stand, None)
    for _ in range(most):
        if heap and (upcoming is None or (heap[0][0], inf, heap[0][1]) < upcoming.key):
            _, _, _, ticket, queue = heappop(heap)
            if ticket.queue is queue:  # it has not left
                yield ticket
        elif upcoming is not None:
            yield upcoming
            upcoming = next(stand, None)
        else:
            return


_place = attrgetter("key")


def _number(ticket: Ticket) -> int:
    return ticket.key[2]
