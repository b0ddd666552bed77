"""The pass-over guard, all of it: how often a request may be passed by others that fit, and what happens then.

First fit lets a request past those before it that have no room. Without a bound small requests would keep a big one
waiting for ever. So:

* Only the first WINDOW of a line are looked at, and only those of them that are passed count it.
* Who was passed `passes` times (laws.py) becomes a guard: room is kept for it from then on, at one endpoint, and nobody
  is sent there before it does.
* That endpoint is its home; for those in the shared line it is the emptiest open one. It gets emptier while nobody
  else is sent there, so it stays the emptiest until the guard fits, and the other endpoints need not wait.
* Where several pools wait for an endpoint class, then the tenants' turns there, then arrival tell who goes and who is
  passed, inside each of them, too: fairness tags of two pools can't be compared, and a tenant whose turn is far must
  not keep those behind it from theirs. Who became a guard is before all that came later, of whatever pool; one that
  does not fit lends its place to those of its pool before it that do. Between two lanes of one pool turns of lanes
  decide (lanes.py): only the first of a lane whose turn it was has been passed.
* Room that is kept for nobody any more is handed on: a guard may leave, be pushed out of the window, or find another
  endpoint emptier.
"""

from __future__ import annotations

from heapq import merge
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING

from extproc.admission.laws import LAWS
from extproc.admission.queue import WINDOW
from extproc.admission.tenants import GUARANTEED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.laws import GuardLaw
    from extproc.admission.pool import Pool
    from extproc.admission.queue import Queue
    from extproc.admission.ticket import Key, Ticket

_place = attrgetter("key")
most_room = attrgetter("crowding")


def seniority(ticket: Ticket) -> tuple[int, int]:
    """Order tickets of different pools: by class, then by arrival."""
    return (ticket.key[0], ticket.key[2])


def place_at(ticket: Ticket, endpoint: Endpoint) -> tuple[int, float, int]:
    """Order tickets of different pools at `endpoint`: by class, by their tenants' turns there, by arrival."""
    return (ticket.key[0], turn_at(ticket, endpoint), ticket.key[2])


def turn_at(ticket: Ticket, endpoint: Endpoint) -> float:
    """Return its tenant's turn at `endpoint` among those of its class: the least goes first."""
    if ticket.is_favoured:
        return GUARANTEED
    turns = endpoint.turns.get(ticket.key[0])
    return 0.0 if turns is None or ticket.charge is None else turns.of(ticket.tenant)


def goes_by_turns(waiting: Sequence[Pool]) -> bool:
    """Tell whether pools that wait for an endpoint are several, and not lanes of one."""
    return len(waiting) > 1 and any(pool.base is not waiting[0].base for pool in waiting)


class Guard:
    """The guard rule of one pool: of its shared line, and of the lines of those at home at a member.

    Attributes:
        law: the constants.
        emptiest: the open member with the most room, while one in the shared line keeps it; None: not looked for.
    """

    __slots__ = ("_pool", "emptiest", "law")

    def __init__(self, pool: Pool, law: GuardLaw = LAWS.guard) -> None:
        """Guard the lines of `pool`."""
        self.law = law
        self._pool = pool
        self.emptiest: Endpoint | None = None

    def keeps(self, endpoint: Endpoint) -> bool:
        """Tell whether a guard keeps the room of `endpoint` for itself."""
        home = self._pool.homes.get(endpoint)
        return (home is not None and home.guards > 0) or (self._pool.shared.guards > 0 and self._is_emptiest(endpoint))

    def best_for(self, endpoint: Endpoint) -> tuple[Ticket | None, Ticket | None]:
        """Return the first ticket in order that fits `endpoint`, an open one, and the guard that was met, if one was.

        WINDOW are looked at.
        """
        homes, shared = self._pool.homes, self._pool.shared
        home = homes.get(endpoint) if homes else None
        if home is None:
            first = shared.head
            if first is None:
                return None, None
            if endpoint.lacks(first) is None:
                return first, None
        cache_room, is_elsewhere = endpoint.cache_room, False
        for ticket in self._line_for(endpoint):
            if ticket.kv_tokens <= cache_room and endpoint.lacks(ticket) is None:
                return ticket, None
            if ticket.is_guard:
                if ticket.queue is home:
                    return None, ticket
                if not is_elsewhere:  # of a whole window of guards asked once
                    if self._is_emptiest(endpoint):
                        return None, ticket
                    is_elsewhere = True
        return None, None

    def best_before(self, guard: Ticket, endpoint: Endpoint) -> Ticket | None:
        """Return the first by turns that fits `endpoint` of those who are senior to `guard`, another pool's."""
        before = seniority(guard)
        cache_room = endpoint.cache_room
        seniors = (ticket for ticket in self._line_for(endpoint) if seniority(ticket) < before)
        fitting = (one for one in seniors if one.kv_tokens <= cache_room and endpoint.lacks(one) is None)
        return min(fitting, key=lambda ticket: place_at(ticket, endpoint)[:2], default=None)

    def _line_for(self, endpoint: Endpoint) -> Iterator[Ticket]:
        """Walk those who are looked at for `endpoint`, in order."""
        home, shared = self._pool.homes.get(endpoint), self._pool.shared
        return shared.window() if home is None else islice(merge(home.window(), shared.window(), key=_place), WINDOW)

    def best_by_turns(self, endpoint: Endpoint) -> tuple[Ticket | None, Ticket | None]:
        """Return the same by turns there: of the highest class that fits a guard, or else whose turn is the least."""
        best, its_turn, cache_room = None, 0.0, endpoint.cache_room
        for ticket in self._line_for(endpoint):
            if best is not None and ticket.key[0] != best.key[0]:
                break
            if ticket.kv_tokens <= cache_room and endpoint.lacks(ticket) is None:
                if ticket.is_guard:
                    return ticket, ticket
                turn = turn_at(ticket, endpoint)
                if best is None or turn < its_turn:
                    best, its_turn = ticket, turn
            elif ticket.is_guard and (ticket.queue is not self._pool.shared or self._is_emptiest(endpoint)):
                return best, ticket
        return best, None

    def passes(self, ticket: Ticket, endpoint: Endpoint) -> None:
        """Note that `ticket`, of this pool, goes to `endpoint` although some stay that are before it in order."""
        homes, shared = self._pool.homes, self._pool.shared
        if shared.head is not None and shared.head.key < ticket.key:  # nearly all who go are the first of all
            self._count_before(shared, ticket.key)
        if endpoint in homes:
            self._count_before(homes[endpoint], ticket.key)

    def passes_where_pools_meet(self, ticket: Ticket, endpoint: Endpoint, *, by_turns: bool) -> None:
        """Note the same of `ticket`, of this pool or another, at an endpoint of several."""
        pool, other = self._pool, ticket.pool
        if other is pool and not by_turns:
            self.passes(ticket, endpoint)
            return
        for queue in (pool.shared, pool.homes[endpoint]) if endpoint in pool.homes else (pool.shared,):
            if other is None or other is pool or other.base is not pool.base or pool.base in (pool, other):
                self._pass_over(queue, ticket, endpoint, same_pool=other is pool)
            elif queue.head is not None and (queue.head.key[0] < ticket.key[0] or pool.turn < other.turn):
                self._count(queue, queue.head)  # it was this lane's turn, and its first did not fit

    def kept_by(self, guard: Ticket, queue: Queue) -> Endpoint | None:
        """Return whose room a guard keeps that stands in `queue`, or stood there until now; None: nobody's."""
        return self.emptiest if queue is self._pool.shared else guard.home

    def room_changed(self) -> Endpoint | None:
        """Note that a member has more or less room, or none. Return the one whose room was kept, if it is no more."""
        kept, self.emptiest = self.emptiest, self._pool.emptiest() if self._pool.shared.guards else None
        return kept if self.emptiest is not None and self.emptiest is not kept else None

    def forget_endpoints(self) -> None:
        """Start over: the members are about to change."""
        self.emptiest = None

    def may_be_pushed_out(self, queue: Queue) -> bool:
        """Tell whether somebody who joined `queue` may have pushed a guard out of the window: it keeps no room then."""
        return queue.guards > 0 and (bool(self._pool.homes) or _has_guard_after_window(queue))

    def _is_emptiest(self, endpoint: Endpoint) -> bool:
        """Tell whether no other open endpoint has more room. It may be one that is not listed yet."""
        emptiest = self.emptiest
        if emptiest is None:
            self.emptiest = emptiest = self._pool.emptiest() or endpoint
        if emptiest is endpoint:
            return True
        return (endpoint.pressure(), endpoint.picked) < emptiest.crowding

    def _pass_over(self, queue: Queue, ticket: Ticket, endpoint: Endpoint, *, same_pool: bool) -> None:
        """Count it for those in the window of `queue` who are before `ticket` by turns at `endpoint`, where it goes."""
        before = place_at(ticket, endpoint)
        for one in queue.window():
            if same_pool:
                if (one.key[0], turn_at(one, endpoint), one.key) >= (*before[:2], ticket.key):
                    continue
            elif place_at(one, endpoint) >= before:
                continue
            self._count(queue, one)

    def _count_before(self, queue: Queue, key: Key) -> None:
        """Count it for those in the window of `queue` who stand before a place."""
        for one in queue.window():
            if one.key >= key:
                return
            self._count(queue, one)

    def _count(self, queue: Queue, ticket: Ticket) -> None:
        ticket.passed_over += 1
        if ticket.passed_over >= self.law.passes and not ticket.is_guard:
            ticket.is_guard = True
            queue.guards += 1


def _has_guard_after_window(queue: Queue) -> bool:
    """Tell whether the first ticket behind the window is a guard: it may just have left it."""
    behind = queue.behind_window()
    return behind is not None and behind.is_guard
