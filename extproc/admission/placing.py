"""The dispatch pass: what an event freed, it hands to the request that should have it.

Reserve at pick: the lease exists before anybody hears of the decision. After a pass no endpoint has room for a request
that may go there, and no limit is exceeded. One that finds very much to do goes on in ticks that are due at once: till
then nobody takes the room of endpoints that it has not looked at.
"""

from __future__ import annotations

from heapq import heapify, heapreplace
from typing import TYPE_CHECKING, Final

from extproc.admission.books import MANY
from extproc.admission.guard import goes_by_turns, most_room, seniority
from extproc.admission.lanes import first_of, served
from extproc.admission.lines import placed
from extproc.admission.outcome import Outcome
from extproc.admission.sessions import Sessions
from extproc.admission.transitions import LEASED, WAITING
from extproc.admission.values import Binding, Dispatch

if TYPE_CHECKING:
    from extproc.admission.books import Books
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.fleet import Fleet
    from extproc.admission.lines import Lines
    from extproc.admission.pool import Pool
    from extproc.admission.refusing import Refusing
    from extproc.admission.ticket import Ticket

_DISPATCHED: Final = Outcome.DISPATCHED
_REROUTED: Final = Outcome.REROUTED
_BOUND: Final = Binding.BOUND

DUE_AT_ONCE: Final = 50
"""Waits that end in one event, and as many in its pass: two milliseconds' worth, so that ten thousand stop nobody."""
CACHED_AT_MOST: Final = 7 / 8
"""Share of a prompt that is taken as cached at its session's home: the guess may be wrong."""


class Placing:
    """Which request goes to which endpoint.

    Attributes:
        sessions: where each session was served last.
    """

    __slots__ = ("_books", "_fleet", "_in_doubt", "_lines", "_picks", "_refusing", "sessions")

    def __init__(self, books: Books, lines: Lines, fleet: Fleet, refusing: Refusing) -> None:
        """Place those who wait in `lines` at the endpoints of `fleet`; have `refusing` end the waits that are over."""
        self._books = books
        self._lines = lines
        self._fleet = fleet
        self._refusing = refusing
        self._picks = 0
        self._in_doubt: dict[Pool, list[tuple[float, int, int, Endpoint]]] = {}  # see `_least_doubtful`
        self.sessions = Sessions()

    def run(self) -> None:  # noqa: C901 - each request pays for a call
        """Hand every room that this event made to the request that should have it.

        Only what changed is looked at: endpoints that may have gained room, and tickets that may go somewhere new.
        Whatever else waits did not fit before this event, and so does not fit now.

        Whose turn comes when its budget is over is refused, though its alarm is yet to come: many may be due at once,
        or the driver late. After DUE_AT_ONCE waits that end the rest is left to the next tick, which is due at once.
        """
        books = self._books
        if books.goes_on:
            self._fleet.go_on()
            return
        freed, arrived, has_leased, missed, over = books.freed, books.arrived, False, 0, 0
        if len(freed) > 1:
            self._fleet.measure(freed)
        while (freed or arrived) and over < DUE_AT_ONCE:
            if not books.waiting:  # nobody waits: nobody takes room, and endpoints need not be put in order
                for endpoint in freed:
                    self._fleet.leave(endpoint, False)
                freed.clear()
                arrived.clear()
            elif books.has_freed_many:
                books.has_freed_many = False
                self._leave_hopeless()
            elif freed:
                endpoint = min(freed, key=most_room) if len(freed) > 1 else next(iter(freed))
                best = _best_for(endpoint) if endpoint.closed_by is None else None
                if best is None:
                    del freed[endpoint]
                    self._fleet.leave(endpoint, endpoint.is_waited_for)
                    missed += 1
                    if has_leased and missed >= MANY:  # after a lease or some others may be hopeless, too
                        books.has_freed_many = len(freed) > MANY
                        has_leased, missed = False, 0
                else:
                    over += 1
                    has_leased |= self._dispatch(best, endpoint)
            else:
                over += self._dispatch_arrived(books.next_arrived())
        if self._in_doubt:
            self._in_doubt.clear()
        if freed or arrived:
            books.forget_gone(2 * DUE_AT_ONCE)  # as many as ever come in one event: else they would add up
            books.goes_on = True
            self._fleet.go_on()

    def _leave_hopeless(self) -> None:
        """Leave those of many endpoints that have no room for anybody at the head of their lines."""
        freed = self._books.freed
        least: dict[Pool, list[Ticket]] = {}
        for endpoint in list(freed):
            for pool in endpoint.pools:
                if not pool.waiting_total:
                    continue
                if pool not in least:
                    least[pool] = _undemanding(pool)
                if endpoint in pool.homes or any(endpoint.lacks(ticket) is None for ticket in least[pool]):
                    break
            else:
                del freed[endpoint]
                self._fleet.leave(endpoint, endpoint.is_waited_for)

    def _dispatch_arrived(self, ticket: Ticket) -> bool:
        """Dispatch one that may go somewhere new, if it can, or refuse it; tell whether its wait is over."""
        if ticket.state is not WAITING or placed(ticket.queue).is_left:
            return False
        pool = placed(ticket.pool)
        home = None if ticket.queue is pool.shared else ticket.home
        if home is None and not pool.open and not self._books.policy.enable_queue:
            target = self._least_doubtful(pool)
        else:
            target = self.place_for(ticket, pool, home)
        if target is None and not self._books.policy.enable_queue:
            self._refusing.refuse(ticket, Outcome.NO_ENDPOINT)
            return True
        if target is not None:
            self._dispatch(ticket, target)
        return target is not None

    def _least_doubtful(self, pool: Pool) -> Endpoint | None:
        """Return the one that `place_for` would, with the queue off, where nobody is open.

        One pass asks so for many, and only makes endpoints fuller: a heap of all serves for each of them.
        """
        heap = self._in_doubt.get(pool)
        if heap is None:
            here = enumerate(pool.present())
            heap = self._in_doubt[pool] = [(one.pressure(), one.picked, number, one) for number, one in here]
            heapify(heap)
        while heap:
            _, _, number, least = heap[0]
            place = (least.pressure(), least.picked, number, least)
            if heap[0] == place:
                return least
            heapreplace(heap, place)
        return None

    def _dispatch(self, ticket: Ticket, endpoint: Endpoint) -> bool:
        """Dispatch one whose turn has come, or refuse it if it waited until its budget was over; tell which."""
        if ticket.wait_until <= self._books.now and ticket.alarm_number:
            self._refusing.expire(ticket)
            return False
        self.lease(ticket, endpoint)
        if endpoint.closed_by is not None:  # as after most leases: it is full again
            self._books.freed.pop(endpoint, None)
        return True

    def place_for(self, ticket: Ticket, pool: Pool, home: Endpoint | None) -> Endpoint | None:
        """Return the endpoint with the most room among those that `ticket` may take now: `home` alone, or any.

        Of any, one that has its LoRA adapter loaded goes first, as long as it is not half full, or not twice as full as
        the emptiest where the adapter would have to wait.
        """
        queue = pool.shared if home is None else pool.homes.get(home)
        enable_queue = self._books.policy.enable_queue
        if enable_queue and not (pool.open and (queue is None or queue.in_window(ticket))):
            return None
        if home is not None:
            return home if home.closed_by is None and home.lacks(ticket) is None and not self._yields(home) else None
        best = self._having_adapter(ticket, pool) if self._books.adapters.by_name else None
        if best is not None:
            return best
        best = pool.emptiest()
        if best is not None:
            if best.lacks(ticket) is None and not self._yields(best):
                return best
            if best.kv.capacity is not None and enable_queue and not pool.has_cache_for(ticket, best):
                return None
        best = None
        for endpoint in pool.open:
            if (
                (best is None or endpoint.crowding < best.crowding)
                and endpoint.lacks(ticket) is None
                and not self._yields(endpoint)
            ):
                best = endpoint
        if best is None and not enable_queue:
            doubtful = pool.present()  # nothing is held: better one of these
            best = min(doubtful, key=lambda one: (one.pressure(), one.picked), default=None)
        return best

    def _having_adapter(self, ticket: Ticket, pool: Pool) -> Endpoint | None:
        """Return the emptiest endpoint that has its LoRA adapter loaded, room for it, and more to spare.

        Less to spare where the emptiest of all would have it wait for a slot.
        """
        loaded = self._books.adapters.having(ticket.request.model)
        policy = self._books.policy
        if not (loaded and policy.adapter_affinity):
            return None
        law = policy.laws.adapters
        most, emptiest = law.below, pool.emptiest()
        page = None if emptiest is None else emptiest.reading.page
        if emptiest is not None and page is not None and page.has_all_adapters:
            most = max(law.below, law.times * emptiest.crowding[0])
        spare = (one for one in loaded if one in pool.open and one.crowding[0] < most)
        best = min(spare, key=most_room, default=None)
        return best if best is not None and best.lacks(ticket) is None and not self._yields(best) else None

    def _yields(self, endpoint: Endpoint) -> bool:
        """Leave an endpoint where a guard keeps room to the pass, which finds who is next in order; tell whether.

        So it does where it is not through.
        """
        books = self._books
        if not books.waiting or not books.policy.enable_queue:
            return False
        if endpoint in books.freed:
            return True
        for pool in endpoint.pools:
            if pool.guard.keeps(endpoint):
                books.freed[endpoint] = None
                return True
        return False

    def lease(self, ticket: Ticket, endpoint: Endpoint) -> None:  # noqa: C901 - each request pays for a call
        """Dispatch one: from here on the slot is taken."""
        books, pool = self._books, ticket.pool
        assert pool is not None  # noqa: S101 - as of all who were offered
        now, request = books.now, ticket.request
        ticket.state = LEASED
        ticket.endpoint = endpoint
        if request.session is not None:
            cached, most = self.sessions.cached(request.session, endpoint), int(CACHED_AT_MOST * ticket.prompt_tokens)
            ticket.work_tokens = ticket.prompt_tokens - (cached if cached < most else most)
        endpoint.lease(ticket, now)
        self._picks += 1
        endpoint.picked = self._picks
        self._fleet.follow(endpoint)
        if ticket.queue is not None:
            self._lines.quit(ticket, pool, ticket.queue)
            ticket.alarm_number = 0
            if ticket.account is not None:
                ticket.account.drop(ticket)
        if books.waiting:
            if len(endpoint.pools) == 1:
                pool.guard.passes(ticket, endpoint)
            else:
                _goes_where_pools_meet(ticket, endpoint)
        if pool is not pool.base:
            served(pool, ticket)
        if ticket.flow is not None:
            ticket.flow.served(ticket.key[1])
        if pool.waiting_total or ticket.alarm:
            pool.pace.dispatched(now)
        if request.session is not None:
            self.remember(request.session, ticket, endpoint)
        moved = ticket.home is not None and ticket.home.name != endpoint.name  # it may have gone and come back
        outcome = _REROUTED if moved else _DISPATCHED
        wait_s = now - request.arrived
        if books.policy.next_choices:
            self._fleet.reserve(ticket, pool.next_best(ticket, endpoint, books.policy.next_choices))
        books.decisions.append(Dispatch(ticket, outcome, endpoint.name, wait_s if wait_s > 0.0 else 0.0))

    def remember(self, session: str, ticket: Ticket, endpoint: Endpoint) -> None:
        """Note where a session is served."""
        self.sessions.remember(session, endpoint, ticket.kv_tokens, self._books.policy.session_memory, ticket.leased_at)

    def home_of(self, ticket: Ticket, pool: Pool) -> Endpoint | None:
        """Return the endpoint it prefers: the one named upstream, its session's last one, the pool's only one."""
        request, policy = ticket.request, self._books.policy
        if request.home is not None:
            home = self._books.endpoints.get(request.home)
            if home is not None and pool in home.pools and home.missing.leads(request.model):
                return home
        if request.session is not None and policy.session_affinity:
            home = self.sessions.recall(request.session)
            if home is not None and pool in home.pools and home.missing.leads(request.model):
                return home
        if len(pool.members) == 1:
            return pool.members[0]
        if policy.binding is _BOUND:
            up = [endpoint for endpoint in pool.members if endpoint.available]
            return min(up, key=pool.backlog_of, default=None)
        return None


def _goes_where_pools_meet(ticket: Ticket, endpoint: Endpoint) -> None:
    """Note that `ticket` goes to `endpoint` while others wait, maybe in several pools for that one."""
    waiting = [pool for pool in endpoint.pools if pool.waiting_total]
    by_turns = goes_by_turns(waiting)
    for pool in waiting:
        pool.guard.passes_where_pools_meet(ticket, endpoint, by_turns=by_turns)
    if waiting and ticket.charge is not None:
        ticket.turns = turns = endpoint.turns_at(ticket.key[0])
        turns.served(ticket.tenant, ticket.charge)


def _undemanding(pool: Pool) -> list[Ticket]:
    """Return some of the window of the shared line: where anybody of it fits, one of these does."""
    found: list[Ticket] = []
    for ticket in sorted(pool.shared.window(), key=_prompt_tokens):
        if not any(
            other.output_tokens <= ticket.output_tokens
            and other.work_tokens <= ticket.work_tokens
            and other.sequences <= ticket.sequences
            for other in found
        ):
            found.append(ticket)
    return found


def _prompt_tokens(ticket: Ticket) -> int:
    return ticket.prompt_tokens


def _best_for(endpoint: Endpoint) -> Ticket | None:
    """Return who goes to `endpoint` next: by its pool's order; where pools meet guards first, then by turns."""
    pools = endpoint.pools
    waiting = pools if len(pools) == 1 else [pool for pool in pools if pool.waiting_total]
    if len(waiting) == 1:
        return waiting[0].guard.best_for(endpoint)[0]
    by_turns = goes_by_turns(waiting)
    found: dict[Pool, Ticket] = {}
    guard = heir = None
    for pool in waiting:
        ticket, its_guard = pool.guard.best_by_turns(endpoint) if by_turns else pool.guard.best_for(endpoint)
        if ticket is not None:
            found[pool] = ticket
        if its_guard is not None and (guard is None or seniority(its_guard) < seniority(guard)):
            guard, heir = its_guard, ticket
    if guard is None:
        firsts = list(found.values())
    else:
        firsts = []
        for pool, ticket in found.items():
            if ticket is heir or seniority(ticket) < seniority(guard):
                firsts.append(ticket)
            elif by_turns and (senior := pool.guard.best_before(guard, endpoint)) is not None:
                firsts.append(senior)
    if len(firsts) > 1:
        return first_of(firsts, endpoint)
    return firsts[0] if firsts else None
