"""The endpoints that can serve some models, and the lines of requests that wait for them."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import islice
from typing import TYPE_CHECKING, Final

from extproc.admission.counters import Usual
from extproc.admission.fairness import Memory
from extproc.admission.guard import Guard
from extproc.admission.held import HeldBy
from extproc.admission.laws import LAWS
from extproc.admission.pace import Pace
from extproc.admission.queue import Queue
from extproc.admission.streak import Tally

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.fairness import FairShare
    from extproc.admission.laws import Laws
    from extproc.admission.ticket import Ticket


GLANCE = 8
"""Endpoints that are looked at for a next choice."""
SLACK: Final = 64
"""Entries out of date that a heap may have beside as many as there are true ones."""


class Pool:
    """The endpoints that serve the same models, and their queues.

    Attributes:
        members: its endpoints, in the order they came.
        names: how many models it is for; "any model" counts as one. 0: a lane, a gateway's choice, or all endpoints
            where they serve different models: nobody is judged by these. `Pools` keeps it.
        usable: how many of them may be sent requests at all. The controller keeps it.
        is_served: whether there were any, when budgets were last looked at: see `Lines.follow_service`.
        open: those of them that have room for some request; a full one costs nothing. The controller keeps it, by
            `list_open` and `close`. Whose room the pass is yet to hand out may be missing.
        closed_last: of the members that may be used, the one whose room ended last: what it lacks is what the line
            waits for.
        shared: requests that any member may take.
        homes: for each member that somebody waits for, the requests at home there.
        left: its lines that were given up, see settling.py.
        guard: how often who waits may be passed over, and room that is kept for who was.
        shares: fairness between tenants, by priority.
        waiting, waiting_total: how many wait in all its lines, by priority and together.
        asked, asked_prompts, asked_outputs: requests that came, since the start, and their tokens as estimated then.
        pace: how fast requests leave and arrive.
        laws: the constants of what is judged of it.
        tally: how its requests were answered.
        usual: how long its answers are, by all its engines' counters.
        longest: the longest prompt and answer together that a member takes; None: nobody says.
        base, lanes: see lanes.py: the pool that this is a lane of, else itself; its own lanes, by class.
        turn, turns: what this lane was promised; for each priority, up to where the lanes were served.
        is_part: a gateway's choice among those who serve a model.
    """

    __slots__ = (
        "_by_cache",
        "_by_room",
        "_turn",
        "asked",
        "asked_outputs",
        "asked_prompts",
        "base",
        "closed_last",
        "guard",
        "homes",
        "is_part",
        "is_served",
        "lanes",
        "laws",
        "left",
        "longest",
        "members",
        "names",
        "open",
        "pace",
        "shared",
        "shares",
        "tally",
        "tenants",
        "turn",
        "turns",
        "usable",
        "usual",
        "waiting",
        "waiting_total",
    )

    def __init__(self, tenants: Memory | None = None, laws: Laws = LAWS) -> None:
        """Make an empty pool; `tenants`: the memory that it has in common with others."""
        self.laws = laws
        self.tenants = tenants if tenants is not None else Memory()
        self.members: list[Endpoint] = []
        self.names = 0
        self.usable = 0
        self.is_served = False
        self.open: dict[Endpoint, None] = {}
        self._by_room: list[tuple[tuple[float, int], int, Endpoint]] = []  # a heap; entries may be out of date
        self._by_cache: list[tuple[float, int, Endpoint]] | None = None  # likewise, once somebody found a cache full
        self._turn = 0  # the member that was last sent something that takes no slot
        self.closed_last: Endpoint | None = None
        self.shared = Queue()
        self.homes: dict[Endpoint, Queue] = {}
        self.left: list[Queue] = []
        self.guard = Guard(self, laws.guard)
        self.shares: dict[int, FairShare] = {}
        self.waiting: dict[int, int] = {}
        self.waiting_total = 0
        self.asked = self.asked_prompts = self.asked_outputs = 0
        self.pace = Pace(laws.pace)
        self.tally = Tally()
        self.usual = Usual()
        self.longest: int | None = None
        self.base: Pool = self
        self.lanes: dict[str, Pool] = {}
        self.turn = 0.0
        self.turns: dict[int, float] = {}
        self.is_part = False

    def obey(self, laws: Laws) -> None:
        """Follow changed constants; what was learned, and who became a guard, stays."""
        self.laws = laws
        self.pace.law, self.guard.law = laws.pace, laws.guard

    def share(self, priority: int) -> FairShare:
        """Return the tenants' fair shares at `priority`."""
        share = self.shares.get(priority)
        if share is None:
            share = self.shares[priority] = self.tenants.share()
        return share

    def queue_of(self, home: Endpoint) -> Queue:
        """Return the line of those at home at `home`."""
        queue = self.homes.get(home)
        if queue is None:
            queue = self.homes[home] = Queue()
        return queue

    def note_waiting(self, priority: int, change: int) -> None:
        """Count one more (+1) or one less (-1) of `priority`."""
        self.waiting[priority] = count = self.waiting.get(priority, 0) + change
        if not count:
            del self.waiting[priority]  # the policy may have no class of it any more
        self.waiting_total += change

    def ahead_of(self, priority: int) -> int:
        """Count those waiting with `priority` or more."""
        ahead = 0
        for its, count in self.waiting.items():
            if its >= priority:
                ahead += count
        return ahead

    def present(self) -> Iterator[Endpoint]:
        """Walk the members that the config has, whether they are up or not."""
        return (endpoint for endpoint in self.members if not endpoint.removed)

    def held_by(self, ticket: Ticket) -> HeldBy:
        """Return what keeps `ticket` waiting here, in one look: at its home, or at one open or lately open member."""
        if ticket.queue is not self.shared:
            endpoint = ticket.home
        else:
            endpoint = next(iter(self.open)) if self.open else self.closed_last
        if endpoint is None:
            endpoint = next(iter(self.members), None)
        if endpoint is None:
            return HeldBy.DOWN
        return endpoint.closed_by or endpoint.lacks(ticket) or HeldBy.GUARD

    def next_in_turn(self, *, doubtful: bool) -> Endpoint | None:
        """Return an available member, each in its turn; if there is none and `doubtful`, one that is not."""
        members, count = self.members, len(self.members)
        for offset in range(1, count + 1):
            turn = (self._turn + offset) % count
            if members[turn].available:
                self._turn = turn
                return members[turn]
        return next(self.present(), None) if doubtful else None

    def backlog_of(self, endpoint: Endpoint) -> float:
        """Return how full `endpoint` is with those at home there counted in."""
        home = self.homes.get(endpoint)
        return (endpoint.held + (len(home) if home is not None else 0)) / endpoint.limit.value

    def list_open(self, endpoint: Endpoint) -> Endpoint | None:
        """Note how much room an endpoint has. Return the one whose room was kept until now, if there is one."""
        self.open[endpoint] = None
        heappush(self._by_room, (endpoint.crowding, endpoint.listing, endpoint))
        if len(self._by_room) > 2 * len(self.open) + SLACK:
            self._by_room = [entry for entry in self._by_room if entry[2].listing == entry[1]]  # no call for each
            heapify(self._by_room)
        if self._by_cache is not None:
            heappush(self._by_cache, (-endpoint.cache_room, endpoint.listing, endpoint))
            if len(self._by_cache) > 2 * len(self.open) + SLACK:
                self._by_cache = None
        return None if self.guard.emptiest is None else self.guard.room_changed()

    def close(self, endpoint: Endpoint, was_open: bool) -> Endpoint | None:
        """Note that an endpoint has no room, and whether it had any. Return the same."""
        if not endpoint.counted:
            if self.closed_last is endpoint:
                self.closed_last = next((other for other in self.members if other.available), None)
        elif was_open:
            self.closed_last = endpoint
        if self.open.pop(endpoint, self) is self or self.guard.emptiest is None:
            return None
        return self.guard.room_changed()

    def emptiest(self) -> Endpoint | None:
        """Return the open member with the most room; of equal ones the one that was picked longest ago."""
        by_room = self._by_room
        while by_room:
            if _is_true(by_room[0]):
                return by_room[0][2]
            heappop(by_room)
        return None

    def next_best(self, ticket: Ticket, picked: Endpoint, most: int) -> list[Endpoint]:
        """Return up to `most` members beside `picked` that have a slot to spare for `ticket`, the emptiest first.

        A glance at a few of them, however many there are. The heap's first are near the emptiest; where these entries
        are out of date, others of the open ones are known to have room as well.
        """
        roomy = dict.fromkeys(entry[2] for entry in self._by_room[:GLANCE] if _is_true(entry))
        roomy.update(dict.fromkeys(islice(self.open, GLANCE)))
        found = [one for one in roomy if one is not picked and one.spares_for(ticket)]
        return sorted(found, key=lambda one: one.crowding)[:most]

    def has_cache_for(self, ticket: Ticket, besides: Endpoint) -> bool:
        """Tell whether the KV cache of another open member may have room for `ticket`; not all are looked at."""
        by_cache = self._by_cache
        if by_cache is None:
            by_cache = self._by_cache = [(-one.cache_room, one.listing, one) for one in self.open]
            heapify(by_cache)
        most = self._roomiest(by_cache)
        if most is not None and most[2] is besides:
            heappop(by_cache)
            second = self._roomiest(by_cache)
            heappush(by_cache, most)
            most = second
        return most is not None and -most[0] >= ticket.kv_tokens

    def _roomiest(self, by_cache: list[tuple[float, int, Endpoint]]) -> tuple[float, int, Endpoint] | None:
        while by_cache and not _is_true(by_cache[0]):
            heappop(by_cache)
        return by_cache[0] if by_cache else None

    def enter(self, endpoint: Endpoint) -> None:
        """Let an endpoint in."""
        self.members.append(endpoint)
        endpoint.pools.append(self)

    def with_lanes(self) -> tuple[Pool, ...]:
        """Return this pool and its lanes."""
        return (self, *self.lanes.values())

    def part(self, members: Sequence[Endpoint] | None = None) -> Pool:
        """Return a new pool of the same endpoints, or of these `members`, where nobody waits."""
        part = Pool(self.tenants, self.laws)
        part.longest = self.longest
        if members is None:
            for endpoint in self.members:
                part.enter(endpoint)
            part.usable, part.is_served, part.closed_last = self.usable, self.is_served, self.closed_last
            part.open = dict(self.open)
            part._by_room = list(self._by_room)
            return part
        for endpoint in members:
            part.enter(endpoint)
            part.usable += endpoint.counted
            if endpoint.listing:
                part.list_open(endpoint)
        part.is_served = part.usable > 0
        return part

    def leave(self) -> None:
        """Be no pool of its endpoints any more; nobody waits here, or who does is about to move."""
        for endpoint in self.members:
            endpoint.pools.remove(self)
        self.members = []
        self.forget_endpoints()

    def forget_endpoints(self) -> None:
        """Start over: those that remain are about to be put back. Who waits stays."""
        self.open.clear()
        self._by_room = []
        self._by_cache = None
        for endpoint in self.members:
            endpoint.counted = False
        self.members = []
        self.names = self.usable = 0
        self.closed_last = None
        self.guard.forget_endpoints()

    def queues(self) -> Iterator[Queue]:
        """Walk all its lines."""
        yield self.shared
        yield from self.homes.values()
        yield from self.left


def _is_true(entry: tuple[object, int, Endpoint]) -> bool:
    return entry[2].listing == entry[1]
