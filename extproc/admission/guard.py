"""The pass-over guard, all of it: how often a request may be passed by others that fit, and what happens then.

First fit lets a request past those before it that have no room. Without a bound small requests would keep a big one
waiting for ever. So:

* Only the first WINDOW of a line are looked at, and only those of them that are passed count it.
* Who was passed GUARD times becomes a guard: room is kept for it from then on, at one endpoint, and nobody is sent
  there before it does.
* That endpoint is its home; for those in the shared line it is the emptiest open one. It gets emptier while nobody
  else is sent there, so it stays the emptiest until the guard fits, and the other endpoints need not wait.
* Between pools class, then the tenants' turns at the endpoint, then arrival tell who is passed: fairness tags of two
  pools can't be compared. Who became a guard is before all that came later, of whatever pool. Between two lanes of one
  pool turns do (lanes.py): only the first of a lane whose turn it was has been passed.
* Room that is kept for nobody any more is handed on: a guard may leave, be pushed out of the window, or find another
  endpoint emptier.
"""

from __future__ import annotations

from heapq import merge
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING

from extproc.admission.queue import WINDOW
from extproc.admission.tenants import GUARANTEED

if TYPE_CHECKING:
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.pool import Pool
    from extproc.admission.queue import Queue
    from extproc.admission.ticket import Ticket

GUARD = 64
"""How often a request may be passed over by later ones that fit."""

_place = attrgetter("key")
most_room = attrgetter("crowding")


def seniority(ticket: Ticket) -> tuple[int, int]:
    """Order tickets of different pools: by class, then by arrival."""
    return (ticket.key[0], ticket.key[2])


def place_at(ticket: Ticket, endpoint: Endpoint) -> tuple[int, float, int]:
    """Order tickets of different pools at `endpoint`: by class, by their tenants' turns there, by arrival."""
    priority, _, arrival = ticket.key
    turns = endpoint.turns.get(priority)
    if turns is None or ticket.charge is None:
        return (priority, 0.0, arrival)
    return (priority, GUARANTEED if ticket.is_favoured else turns.of(ticket.tenant), arrival)


class Guard:
    """The guard rule of one pool: of its shared line, and of the lines of those at home at a member."""

    __slots__ = ("_emptiest", "_pool")

    def __init__(self, pool: Pool) -> None:
        """Guard the lines of `pool`."""
        self._pool = pool
        self._emptiest: Endpoint | None = None  # not looked for since the last change

    def keeps(self, endpoint: Endpoint) -> bool:
        """Tell whether a guard keeps the room of `endpoint` for itself."""
        home = self._pool.homes.get(endpoint)
        return (home is not None and home.guards > 0) or (self._pool.shared.guards > 0 and self._is_emptiest(endpoint))

    def best_for(self, endpoint: Endpoint) -> tuple[Ticket | None, Ticket | None]:
        """Return the first ticket in order that fits `endpoint`, an open one; or else the guard that ended the search.

        WINDOW of them are looked at.
        """
        home, shared = self._pool.homes.get(endpoint), self._pool.shared
        if home is None:
            if not shared:
                return None, None
            first = shared.first()
            if endpoint.lacks(first) is None:
                return first, None
            line = shared.window()
        else:
            line = merge(home.window(), shared.window(), key=_place)
        cache_room = endpoint.cache_room
        for ticket in islice(line, WINDOW):
            if ticket.kv_tokens <= cache_room and endpoint.lacks(ticket) is None:
                return ticket, None
            if ticket.is_guard and (ticket.queue is home or self._is_emptiest(endpoint)):
                return None, ticket
        return None, None

    def passes(self, ticket: Ticket, endpoint: Endpoint) -> None:
        """Note that `ticket`, of this pool or another, goes to `endpoint` although some before it stay."""
        pool, other = self._pool, ticket.pool
        lines = [pool.shared, pool.homes[endpoint]] if endpoint in pool.homes else [pool.shared]
        for queue in lines:
            if other is None or other is pool or other.base is not pool.base or pool.base in (pool, other):
                _pass_over(queue, ticket, endpoint, same_pool=other is pool)
            elif queue and (queue.first().key[0] < ticket.key[0] or pool.turn < other.turn):
                _count(queue, queue.first())  # it was this lane's turn, and its first did not fit

    def room_changed(self) -> Endpoint | None:
        """Note that a member has more or less room, or none. Return the one whose room was kept until now, if any."""
        kept, self._emptiest = self._emptiest, None
        return kept if self._pool.shared.guards else None

    def forget_endpoints(self) -> None:
        """Start over: the members are about to change."""
        self._emptiest = None

    def may_be_pushed_out(self, queue: Queue) -> bool:
        """Tell whether somebody who joined `queue` may have pushed a guard out of the window: it keeps no room then."""
        return queue.guards > 0 and (bool(self._pool.homes) or _has_guard_after_window(queue))

    def _is_emptiest(self, endpoint: Endpoint) -> bool:
        """Tell whether no other open endpoint has more room."""
        if self._emptiest is None:
            self._emptiest = self._pool.emptiest()
        return self._emptiest is endpoint


def _pass_over(queue: Queue, ticket: Ticket, endpoint: Endpoint, *, same_pool: bool) -> None:
    """Count it for those in the window of `queue` who are before `ticket`, which goes to `endpoint`."""
    place, before = ticket.key, place_at(ticket, endpoint)
    for key in queue.first_keys():
        if same_pool:
            if key >= place:
                return
        elif place_at(queue.at(key), endpoint) >= before:
            continue
        _count(queue, queue.at(key))


def _count(queue: Queue, ticket: Ticket) -> None:
    ticket.passed_over += 1
    if ticket.passed_over == GUARD:
        ticket.is_guard = True
        queue.guards += 1


def _has_guard_after_window(queue: Queue) -> bool:
    """Tell whether the first ticket behind the window is a guard: it may just have left it."""
    behind = queue.behind_window()
    return behind is not None and behind.is_guard
