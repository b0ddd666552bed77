"""A controller with an independent set of books beside it, and what must hold between the two.

The books are fed by nothing but the events and the decisions (`audited.py`). `check` recomputes from them all that the
core keeps incrementally. Nothing here knows how the core finds its answers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from math import inf, isfinite
from operator import attrgetter
from typing import TYPE_CHECKING

from extproc.admission.controller import Controller
from extproc.admission.fairness import MAX_TENANTS
from extproc.admission.laws import LAWS
from extproc.admission.queue import WINDOW
from extproc.admission.room import KEPT_PARTS
from extproc.admission.ticket import State, Ticket

if TYPE_CHECKING:
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.outcome import Outcome
    from extproc.admission.pool import Pool
    from extproc.admission.values import EndpointSpec, Policy

GUARD = LAWS.guard.passes


class BrokenError(AssertionError):
    """An invariant does not hold."""


def require(holds: bool, *what: object) -> None:
    if not holds:
        raise BrokenError(" ".join(map(str, what)))


@dataclass
class Books:
    """What one endpoint holds, by our own count."""

    spec: EndpointSpec
    present: bool = True
    leases: dict[Ticket, None] = field(default_factory=dict)
    foreign: int | None = None  # the most that may be foreign: None before the first telemetry
    shown: tuple[int, int] = (0, 0)  # others on the page before, and on the last one

    @property
    def sequences(self) -> int:
        """What counts against its limit: a request may be several sequences for the engine."""
        return sum(ticket.request.sequences for ticket in self.leases)

    @property
    def prompts(self) -> int:
        return sum(ticket.prompt_tokens for ticket in self.leases)

    @property
    def outputs(self) -> int:
        return sum(ticket.kv_tokens - ticket.prompt_tokens for ticket in self.leases)

    def prompt_tokens(self, endpoint: Endpoint) -> int:
        """Of those leases whose first token was neither seen nor predicted: when that is, test_prefill.py tells.

        Who waits in the engine for an adapter's slot is not under way: test_deferred.py tells who is taken for it.
        """
        pending = [ticket for ticket in self.leases if ticket.prompt_pending]
        adapters, held_back = endpoint.deferred.adapters, endpoint.prefill._held_back
        begun = (ticket for ticket in pending if ticket.request.model not in adapters and ticket not in held_back)
        return sum(ticket.work_tokens for ticket in begun)


class Audit:
    """The core, our books, and what must hold between two events."""

    def __init__(self, policy: Policy, *, always: bool = True) -> None:
        """`always`: check everything after every event; otherwise whoever drives calls `check`."""
        self.core = Controller(policy)
        self.always = always
        self.now = 100.0
        self.books: dict[str, Books] = {}
        self.at: dict[str, Books] = {}  # who is there, by address
        self.runs_at: dict[Ticket, str] = {}  # by address, whoever counts it
        self.waiting: dict[Ticket, None] = {}
        self.leased: dict[Ticket, Books] = {}
        self.outcomes: Counter[Outcome] = Counter()
        self.offered = 0
        self.events = 0
        self.epochs: dict[Ticket, int] = {}  # under which policy a waiting ticket came
        self.epoch = 0
        self.peak = 0  # the most that ever waited
        self._before: dict[Ticket, tuple[object, int]] = {}  # the queue and the passes of who waited, before the event
        self._open: set[Endpoint] = set()  # at this check

    def fits(self, books: Books, endpoint: Endpoint, ticket: Ticket) -> bool:
        count, kept, more = books.sequences + endpoint.strangers.takes, endpoint.reserved, ticket.request.sequences
        lets_in = books.sequences + more <= endpoint.strangers.lets
        if self._is_full(books, endpoint) or (endpoint.quota is not None and books.sequences >= endpoint.quota):
            return False
        hot = endpoint.closed_until is not None and books.leases  # one at a time
        if hot and books.sequences >= endpoint.strangers.lets:
            return False
        kv, cache = endpoint.kv, inf if endpoint.kv.capacity is None else LAWS.kv.share * endpoint.kv.capacity
        # What requests share of their prompts is in the cache once.
        needed = (books.prompts + ticket.prompt_tokens) * kv.real + books.outputs + ticket.output_tokens + kv.excess
        if count == 0:
            if not kept or KEPT_PARTS * kept > endpoint.limit.value or KEPT_PARTS * kv.promised > cache:
                return True
            sequences, limit = ticket.request.sequences, endpoint.limit.value  # what passes a limit alone, passes it
            return not (limit - kept < sequences <= limit or needed <= cache < needed + kv.promised)
        if more > 1 and count + kept + more > endpoint.limit.value and not lets_in:
            return False
        if endpoint.quota is not None and more > 1 and books.sequences and books.sequences + more > endpoint.quota:
            return False
        if lets_in:
            return True
        if needed + kv.promised > cache:
            return False
        under_way = books.prompt_tokens(endpoint)
        if not endpoint.sees_first_tokens or under_way == 0:
            return True
        asked = self.core.policy.max_prompt_tokens
        most = endpoint.prefill.limit if asked is None else asked
        new = min(ticket.work_tokens, int(endpoint.prefill.fresh * ticket.prompt_tokens))  # the rest is cached there
        return under_way + new <= most

    def _is_kept_back(self, books: Books, endpoint: Endpoint) -> bool:
        """Whether no request at all may go to an endpoint that is up and below its limit."""
        health = endpoint.health
        hot = endpoint.closed_until is not None and books.leases  # one at a time
        if hot and books.sequences >= endpoint.strangers.lets:
            return True
        if health.breaker is not None and books.sequences >= health.breaker.most:
            return True
        return health.held_back_by is not None

    def check(self) -> None:
        """Recompute everything that the core keeps."""
        require(self.core.endpoints.keys() == self.books.keys(), self.core, self.books.keys())
        self._open = {endpoint for endpoint in self.core.endpoints.values() if self._is_open(endpoint)}
        self._check_books()
        lines: dict[Pool, list[Ticket]] = defaultdict(list)
        for ticket in self.waiting:
            require(ticket.state is State.WAITING, ticket)
            require(ticket.pool is not None and ticket.queue is not None, ticket, "waits nowhere")
            lines[ticket.pool].append(ticket)
        for pool in self.core.pools():
            self._check_pool(pool, lines.pop(pool, []))
        require(not lines, "tickets in pools that are gone:", lines)
        self._check_conservation()
        self._check_tenants()
        self._check_deadline()
        self._check_sizes()

    def kept(self) -> tuple[Counter[str], Counter[str]]:
        """How many sequences and tokens are kept for leases elsewhere whose gateway may yet come, by endpoint."""
        slots, tokens = Counter[str](), Counter[str]()
        for ticket in self.leased:
            for endpoint in ticket.choices if ticket.kept else ():
                slots[endpoint.name] += ticket.kept
                tokens[endpoint.name] += ticket.kept_tokens
        return slots, tokens

    def _check_books(self) -> None:
        slots, tokens = self.kept()
        for name, books in self.books.items():
            endpoint = self.core.endpoints[name]
            require(endpoint.leases == books.leases, endpoint, books)
            require(endpoint.sequences == books.sequences, endpoint.sequences, books.sequences)
            require(endpoint.reserved == slots[name], endpoint, "keeps", endpoint.reserved, "for", slots[name])
            require(endpoint.kv.promised == tokens[name], endpoint, endpoint.kv.promised, tokens[name])
            self._check_tokens(endpoint, books)
            require(0 <= endpoint.foreign <= (books.foreign or 0), endpoint.foreign, "foreign,", books.foreign)
            takes, most = endpoint.strangers.takes, max(endpoint.foreign, min(books.shown))
            require(endpoint.foreign <= takes <= most, takes, "take room of", endpoint.foreign, "and", books.shown)
            require(endpoint.removed is not books.present, endpoint)
            crowding = (endpoint.pressure(), endpoint.picked)
            is_closed = endpoint.closed_by is not None
            require(is_closed or endpoint.crowding == crowding, endpoint, endpoint.crowding, crowding)
            if not endpoint.removed:
                require(endpoint.closed_by is endpoint.held_by(), endpoint, endpoint.closed_by, endpoint.held_by())
                require(is_closed is (endpoint.listing == 0), endpoint, endpoint.closed_by, "listed:", endpoint.listing)
            require(all(ticket.endpoint is endpoint for ticket in books.leases), endpoint, "lent twice")
            require((endpoint.held_by() is None) == (endpoint in self._open), endpoint, "held by", endpoint.held_by())
            health = endpoint.health
            doubted = health.slow_start is not None or health.in_a_row > 0 or health.on_trial
            require(health.is_doubted is doubted, endpoint, "doubted:", health.is_doubted)
        for endpoint in self.core.endpoints.values():
            require(not (endpoint.removed and endpoint.pools), endpoint, "is gone, and has pools")
        holds = self.core.holds()
        for endpoint in self.core.endpoints.values():
            waited_for = any(may_take(t, endpoint) and endpoint in t.pool.members for t in self.waiting)
            held = waited_for or endpoint not in self._open
            require((endpoint in holds) is held, endpoint, "is held by", holds.get(endpoint))
            require(endpoint.limit.value >= 1, endpoint)
            spec = self.books[endpoint.name].spec
            chosen = spec.max_running_requests, spec.kv_capacity_tokens, self.core.policy.max_prompt_tokens
            is_learned = chosen == (None, None, None)
            require(is_learned or not endpoint.strangers.lets, endpoint, "lets in", endpoint.strangers.lets)
            takes, foreign = endpoint.strangers.takes, endpoint.foreign
            require(is_learned or takes == foreign, endpoint, takes, "take room of", foreign)

    def _check_tokens(self, endpoint: Endpoint, books: Books) -> None:
        kv, prefill = endpoint.kv, endpoint.prefill
        if not endpoint.keeps_tokens:
            asks = (kv.capacity, endpoint.reading.page, prefill.probed or None)
            require(asks == (None, None, None), endpoint, "keeps no tokens, and is asked for some:", asks)
            require((kv.prompts, kv.outputs, prefill.tokens) == (0, 0, 0), endpoint, "has some of its tokens")
            require(all(ticket.prompt_pending for ticket in books.leases), endpoint, "has computed what nobody saw")
            return
        require((kv.prompts, kv.outputs) == (books.prompts, books.outputs), kv.prompts, kv.outputs, books)
        require(0.0 < kv.real <= 1.0 and 0.0 <= kv.trust <= 1.0 and kv.excess >= 0.0, kv.real, kv.trust, kv.excess)
        under_way = books.prompt_tokens(endpoint)
        require(prefill.tokens == under_way, prefill.tokens, under_way)
        pending = [ticket for ticket in books.leases if ticket.prompt_pending]
        places = (prefill._held_back, prefill._under_way, prefill._uncounted)
        require(len({*places[0], *places[1], *places[2]}) == sum(map(len, places)), "a prompt in two places", places)
        require({*places[0], *places[1]} == set(pending), "pending, and in no place", places, pending)
        require(prefill.limit > 0 and 0.0 < prefill.fresh <= 1.0, prefill.limit, prefill.fresh)
        costs = endpoint.steps
        require(all(map(isfinite, (costs.base_s, costs.sequence_s, costs.prompt_s))), "costs of steps:", costs)

    def _check_pool(self, pool: Pool, waiting: list[Ticket]) -> None:
        in_lines = [ticket for queue in pool.queues() for ticket in queue]
        require(len(in_lines) == len(waiting) and set(in_lines) == set(waiting), pool, in_lines, waiting)
        require(pool.waiting_total == len(waiting), pool.waiting_total, len(waiting))
        require(pool.waiting == Counter(ticket.request_class.priority for ticket in waiting), pool.waiting)
        for home, queue in pool.homes.items():
            require(len(queue) > 0, "an empty line is kept for", home)
            require(home.available and home in pool.members, "a line for", home, "which is gone")
            require(all(ticket.home is home for ticket in queue), home)
        for queue in pool.queues():
            line = list(queue)
            if not line:
                require(not queue.guards and not any(queue.depth.values()), "none in it:", queue.depth, queue.guards)
                continue
            require(all(ticket.queue is queue for ticket in line), "a ticket in two lines")
            require([t.key for t in line] == sorted(t.key for t in line), "a line out of order")
            depth = {name: count for name, count in queue.depth.items() if count}
            require(depth == Counter(t.request_class.name for t in line), queue.depth)
            require(queue.guards == sum(t.passed_over >= GUARD for t in line), "guards", queue.guards)
        its = self._its_members(pool)
        members = [name for name in self.books if name in its]
        require([endpoint.name for endpoint in pool.members] == members, pool, pool.members, members)
        usable = [endpoint for endpoint in pool.members if endpoint.available]
        require(pool.usable == len(usable), pool, "usable:", pool.usable, usable)
        require(pool.is_served is bool(usable), pool, "is served:", pool.is_served, usable)
        pools = self.core._books.pools
        for ticket in waiting:
            if ticket.queue.is_left:
                continue
            due = pools.find(ticket.request.model, ticket.request.allowed) or pools.any_model
            require(pool.base is due, ticket, "waits in", pool.members, "and not in", due.members)
            is_old = self.epochs[ticket] != self.epoch
            require(is_old or ticket.wait_until <= self._latest(ticket), ticket, "may wait too long")
        ejected = [endpoint for endpoint in pool.members if endpoint.health.ejected_until is not None]
        require(usable or not ejected or pool.base.is_part, pool, "has ejected ones alone:", pool.members)
        is_open = self._open.intersection(pool.members)
        require(set(pool.open) == is_open, pool, list(pool.open), is_open)
        emptiest = min(pool.open, key=lambda one: (one.crowding, one.listing), default=None)
        require(pool.emptiest() is emptiest, pool, "takes for the emptiest", pool.emptiest(), "and not", emptiest)

    def _latest(self, ticket: Ticket) -> float:
        """The latest end of a wait: its class's budget after that for nobody being there, within the client's own."""
        most_s = ticket.request_class.budget_s + (self.core.policy.no_endpoint_budget_s or 0.0)
        own_s = inf if ticket.request.budget_s is None else ticket.request.budget_s
        return ticket.request.arrived + min(most_s, own_s) + 1e-6

    def _its_members(self, pool: Pool) -> set[str]:
        """Return who is there and belongs into a pool, by name."""
        pools = self.core._books.pools
        if pool in pools._left:  # of no models: who waits there is yet to be settled
            return set()
        pool = pool.base
        there = {name: books for name, books in self.books.items() if books.present}
        if pool is pools.every:
            return set(there)
        of_any_model = {name for name, books in there.items() if not books.spec.models}
        if pool is pools.any_model:
            return of_any_model
        models = {model for model, its in pools.by_model.items() if its is pool}
        if models:
            return set[str]().union(*(self._having(model) for model in models))
        subset = next((key for key, its in pools.subsets.items() if its is pool), None)
        if subset is None:
            return of_any_model
        model, allowed = subset
        whole = pools.find(model)
        fit = allowed & self._its_members(whole) if whole is not None else frozenset()
        return set(fit) or {
            name
            for name in allowed & there.keys()
            if model in self.core.endpoints[name].missing.models
            and (not there[name].spec.models or model in there[name].spec.models)  # it may list it no more
        }

    def _having(self, model: str) -> set[str]:
        """Return who lists `model`, or none, and is not left out for it, unless all who have it are."""
        listed = {name: books.spec.models for name, books in self.books.items() if books.present}
        having = {name for name, models in listed.items() if not models or model in models}
        return {name for name in having if model not in self.core.endpoints[name].missing.models} or having

    def _is_open(self, endpoint: Endpoint) -> bool:
        if (
            endpoint.removed
            or endpoint.health.is_up is False
            or endpoint.health.is_asleep
            or endpoint.health.ejected_until is not None
        ):
            return False
        if not self.core.policy.enable_queue:
            return True
        books = self.books[endpoint.name]
        if endpoint.quota is not None and books.sequences >= endpoint.quota:
            return False
        return not self._is_kept_back(books, endpoint) and not self._is_full(books, endpoint)

    @staticmethod
    def _is_full(books: Books, endpoint: Endpoint) -> bool:
        """Whether its limit shuts it. Who is among so many of others' that holding back is no use goes all the same."""
        held, lets = books.sequences + endpoint.strangers.takes, endpoint.strangers.lets
        return held > 0 and held + endpoint.reserved >= endpoint.limit.value and books.sequences >= lets

    def _check_conservation(self) -> None:
        """No endpoint with room while a request waits that it could take, but for those behind a guarded one."""
        for endpoint in self.core.endpoints.values():
            if endpoint not in self._open:
                continue
            books, fitting, guards = self.books[endpoint.name], [], []
            for pool in self.core.pools():
                if not pool.waiting_total or endpoint not in pool.members:
                    continue
                line = [t for t in self.waiting if t.pool is pool and may_take(t, endpoint)]
                emptiest = min(pool.open, key=lambda e: (e.pressure(), e.picked))
                for ticket in sorted(line, key=attrgetter("key"))[:WINDOW]:
                    require(ticket.waited_for is not None, ticket, "waits, and does not say for what")
                    fits = not self.core.policy.enable_queue or self.fits(books, endpoint, ticket)
                    require((endpoint.held_by(ticket) is None) == fits, ticket, endpoint, endpoint.held_by(ticket))
                    if not self.core.policy.enable_queue or self.fits(books, endpoint, ticket):
                        fitting.append(ticket)
                        break
                    if ticket.passed_over >= GUARD and (ticket.queue is not pool.shared or endpoint is emptiest):
                        guards.append(ticket)
                        break
            first_guard = min(((t.key[0], t.key[2]) for t in guards), default=None)
            for ticket in fitting:
                guarded = first_guard is not None and first_guard < (ticket.key[0], ticket.key[2])
                require(guarded or self._goes_on(), ticket, "waits, and fits", endpoint)
        has_its_turn = {ticket for _, _, ticket in self.core._books.arrived} if self._goes_on() else set()
        for ticket in self.waiting:
            is_to_go = (ticket.queue is not None and ticket.queue.is_left) or ticket in has_its_turn
            require(self.core.policy.enable_queue or is_to_go, ticket, "is held although the queue is off")

    def _check_tenants(self) -> None:
        """First come, first served for each tenant in its class, whatever left in between. Accounts are true."""
        accounts = self.core._books.tenants.accounts
        counted = [ticket for ticket in (*self.waiting, *self.leased) if ticket.account is not None]
        require({t.account.name for t in counted} == accounts.keys(), accounts.keys())
        for name, account in accounts.items():
            its = [ticket for ticket in counted if ticket.account is account]
            favoured = sum(ticket.is_favoured for ticket in its)
            require((account.in_flight, account.favoured) == (len(its), favoured), name, account.in_flight, favoured)
            require(bool(its), name, "has an empty account")
        last: dict[tuple[object, ...], tuple[int, float, int]] = {}
        for ticket in sorted(self.waiting, key=lambda t: t.key[2]):
            if self.core.policy.short_first or self.epochs[ticket] != self.epoch or ticket.queue.is_left:
                continue
            group = (ticket.pool, ticket.request_class.priority, ticket.request.tenant)
            require(last.get(group, ticket.key) <= ticket.key, ticket, "goes before its tenant's earlier request")
            last[group] = ticket.key

    def _check_deadline(self) -> None:
        due = self.core.next_deadline()
        wanted = [ticket.wait_until for ticket in self.waiting]
        settled = [t for t in self.waiting if t.queue is not None and not t.queue.is_left]
        wanted += [t.patience_until for t in settled if t.pool is not None and t.queue is not t.pool.shared]
        if len(settled) < len(self.waiting):
            wanted.append(self.now)
        for endpoint in self.core.endpoints.values():
            health = endpoint.health
            times = (
                endpoint.closed_until,
                health.full_until,
                health.ejected_until,
                health.breaker._until if health.breaker is not None and health.breaker.is_reached else None,
                health.slow_start._ends if health.had_its_few else None,
                endpoint.prefill.next_change(),
            )
            wanted += [at for at in times if at is not None]
            reading, stale_after_s = endpoint.reading, self.core.policy.stale_after_s
            if reading.page is not None:
                wanted.append(reading.page_at + stale_after_s)
            if reading.report is not None:
                wanted.append(reading.report_at + stale_after_s)
        if wanted:
            earliest = max(min(wanted), self.now)
            require(due is not None and due <= earliest, "next deadline", due, "misses", earliest)

    def _goes_on(self) -> bool:
        """Many whose budgets are over are refused some in each event: the rest is for a tick that is due now."""
        books, due = self.core._books, self.core.next_deadline()
        return bool(books.arrived or books.freed) and due is not None and due <= self.now

    def _check_sizes(self) -> None:
        core = self.core
        alarms, sessions, books = len(core._lines.alarms), len(core._placing.sessions), core._books
        require(alarms <= 2 * (self.peak + 1) + 257, "alarms:", alarms, "peak", self.peak)
        require(sessions <= max(core.policy.session_memory, self._sessions_before()), sessions)
        require(not books.decisions, "an event left decisions behind")
        lines = core._lines
        require(lines.left or not (lines.turns or lines.renumbered), "nobody is to be settled")
        require(self._goes_on() or not (books.arrived or books.freed), "an event left work behind")
        for pool in core.pools():
            require(len(pool.homes) <= len(pool.members), pool.homes)
            require(all(len(share) <= MAX_TENANTS for share in pool.shares.values()), pool.shares)
        changes = len(core._fleet.changes)
        require(changes <= 2 * len(core.endpoints) + 257, "alarms of endpoints:", changes)

    def _sessions_before(self) -> int:
        """A lowered memory takes effect when the next session is remembered."""
        return len(self.core._placing.sessions) if self.epoch else 0


def may_take(ticket: Ticket, endpoint: Endpoint) -> bool:
    assert ticket.pool is not None
    if ticket.queue is not None and ticket.queue.is_left:
        return False
    return ticket.queue is ticket.pool.shared or ticket.home is endpoint
