"""An endpoint's books: its leases, its limits, and whether it has room. Only the core changes them.

What its telemetry changes in them stands in `telemetry.py`.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from extproc.admission.alarms import NEVER
from extproc.admission.counters import Counters
from extproc.admission.deferred import Deferred
from extproc.admission.health import Health
from extproc.admission.held import HeldBy
from extproc.admission.kv import KvBooks
from extproc.admission.limit import AdaptiveLimit, FixedLimit
from extproc.admission.missing import Missing
from extproc.admission.prefill import Prefill
from extproc.admission.reading import Foreign, Reading
from extproc.admission.steps import StepCost

if TYPE_CHECKING:
    from extproc.admission.fairness import Turns
    from extproc.admission.limit import Limit
    from extproc.admission.load import Load
    from extproc.admission.pool import Pool
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import EndpointSpec, Policy

KEPT_PARTS = 8
"""Of an endpoint's slots, and of its cache, one in so many at most is kept for requests that are leased elsewhere."""
CLOSED = 1e6
"""The pressure of an endpoint whose telemetry says that it is full: all others go before it."""
_DOWN, _HOT, _PART, _LIMIT = HeldBy.DOWN, HeldBy.HOT, HeldBy.PART, HeldBy.LIMIT
_KV, _PROMPTS = HeldBy.KV, HeldBy.PROMPTS
"""Bound once: a member looked up on its Enum costs four times a global, and these are asked for in every dispatch."""


class Endpoint:
    """One inference server.

    Attributes:
        name: its name.
        leases: the tickets that hold a slot here, oldest first; how many there are is what "in flight" means.
        sequences: how many sequences they are for the engine.
        reserved: how many more may come: this is a next choice of requests that are leased elsewhere. They take room,
            and don't make it busy.
        health: whether it works, as far as checks and answers say.
        limit: how many sequences it may hold.
        deferred: how many of them wait there for the slot of an adapter.
        kv: what its KV cache has to take.
        counters: whether its counters are believed.
        steps: what the engine's steps cost, by its counters.
        prefill: the leases whose first token was not seen.
        reading: what it says of itself.
        strangers: the requests that it runs and that we don't know.
        removed: True once the config or discovery no longer has it; its leases run out.
        enforcing: False while the queue is switched off: then there is always room.
        held_since: since when whatever came free here was taken at once, or suited nobody; None: there is room.
        limit_since: since when its limit has been set by what it says; None: since the start.
        closed_until: its telemetry says that it is full: it gets one request at a time until then, or better telemetry.
        quota: the most sequences that we may hold while sidecars that we can't reach dispatch here too; None: no such.
        expected, written: tokens of all its answers, as estimated for those that ended and as its counters, while they
            are believed, told of them.
        sees_first_tokens: whether anything tells when a first token came; without it the prompt limit can't work.
    """

    __slots__ = (
        "_prompt_limit",
        "alarm",
        "closed_until",
        "completed",
        "counted",
        "counters",
        "crowding",
        "deferred",
        "dispatched",
        "enforcing",
        "expected",
        "health",
        "held_since",
        "kv",
        "leases",
        "limit",
        "limit_since",
        "listed",
        "listing",
        "missing",
        "name",
        "picked",
        "pools",
        "prefill",
        "produced",
        "quota",
        "reading",
        "removed",
        "reserved",
        "sees_first_tokens",
        "sequences",
        "spec",
        "steps",
        "strangers",
        "turns",
        "written",
    )

    def __init__(self, spec: EndpointSpec, policy: Policy) -> None:
        """Make an idle endpoint that is up."""
        self.name = spec.name
        self.spec = spec
        self.leases: dict[Ticket, None] = {}
        self.sequences = 0
        self.reserved = 0
        self.limit: Limit = _limit_of(spec, policy)
        self.pools: list[Pool] = []
        self.turns: dict[int, Turns] = {}  # by priority; where requests of several pools have met
        self.listed = False  # in its pools' lists of open endpoints
        self.listing = 0  # which of all listings was its last
        self.counted = False  # among its pools' usable ones
        self.health = Health(policy.laws.health)
        self.missing = Missing(policy.laws.health)
        self.removed = False
        self.dispatched = 0
        self.completed = 0  # leases that ended since the mean of output tokens was fed last
        self.produced = 0  # output tokens that telemetry reported since then
        self.expected = self.written = 0
        self.held_since: float | None = None
        self.limit_since: float | None = None
        self.picked = 0  # when it was picked last, in picks: equal endpoints take turns
        self.crowding = (0.0, 0)  # its pressure and `picked`, kept by the controller: the least has the most room
        self.closed_until: float | None = None
        self.alarm = NEVER  # the one alarm that is set for it
        self.quota: int | None = None
        self.reading = Reading()
        self.strangers = Foreign(policy.laws.foreign)
        self.kv = KvBooks(spec.kv_capacity_tokens, policy.laws.kv)
        self.counters = Counters(policy.laws.counters)
        self.steps = StepCost(policy.laws.steps)
        self.deferred = Deferred()
        self.prefill = Prefill(policy.laws.prompts)
        self.sees_first_tokens = False
        self.apply(policy)

    def respec(self, spec: EndpointSpec, policy: Policy) -> None:
        """Take over a changed `spec`; leases stay, and a lowered limit lets them finish."""
        if spec.max_running_requests != self.spec.max_running_requests:
            self.limit = _limit_of(spec, policy)
        self.spec = spec
        self.size_cache()

    def apply(self, policy: Policy) -> None:
        """Follow a changed policy."""
        self.enforcing = policy.enable_queue
        self._prompt_limit = policy.max_prompt_tokens
        if isinstance(self.limit, AdaptiveLimit):
            self.limit.law = policy.limit_law
            self.limit.slowdown.law = policy.laws.answers
        self.kv.law, self.counters.law = policy.laws.kv, policy.laws.counters
        self.steps.law = policy.laws.steps
        self.prefill.obey(policy.laws.prompts)
        self.health.law = self.missing.law = policy.laws.health
        self.strangers.law = policy.laws.foreign
        self.look_for_first_tokens(policy)

    # ---- room

    @property
    def available(self) -> bool:
        """Whether it may be sent anything at all."""
        health = self.health
        return not self.removed and (health.is_well or health.is_usable)

    @property
    def is_open(self) -> bool:
        """Whether it has room for a request that needs no tokens: necessary, not sufficient."""
        return self.held_by() is None

    def held_by(self, ticket: Ticket | None = None) -> HeldBy | None:
        """Return what keeps `ticket` from being dispatched here, None for one that needs no tokens; None: nothing."""
        health = self.health
        is_well = health.is_well
        if self.removed or not (is_well or health.is_usable):
            return health.shut_by or _DOWN
        if not self.enforcing:
            return None
        if self.closed_until is not None and self.leases:  # one at a time: the figure may be wrong, or never change
            return _HOT
        if not is_well:
            by = health.held_back_by
            if by is not None:
                return by
        if self.quota is not None and self.sequences >= self.quota:
            return _PART
        held = self.sequences + self.strangers.count
        if held and held + self.reserved >= self.limit.value:
            return _LIMIT
        return None if ticket is None else self.lacks(ticket)

    @property
    def is_waited_for(self) -> bool:
        """Whether anybody waits who could be served here."""
        for pool in self.pools:  # noqa: SIM110 - asked for in every dispatch: a generator takes four times as long
            if pool.waiting_total:
                return True
        return False

    @property
    def held(self) -> int:
        """How many sequences count against its limit: ours, and foreign ones."""
        return self.sequences + self.strangers.count

    @property
    def foreign(self) -> int:
        """How many requests it runs that were sent before we knew it."""
        return self.strangers.count

    def note_room(self, now: float, *, waited_for: bool) -> None:
        """Note that nobody takes the room that came free here, if any did. `waited_for`: it suits nobody who waits."""
        if not self.listed or waited_for:
            self.held_since = now if self.held_since is None else self.held_since
        else:
            self.held_since = None

    def lacks(self, ticket: Ticket) -> HeldBy | None:
        """Return which limit has no room for all of `ticket`, given that it is open; None: it fits.

        An idle endpoint takes any one request, however big.
        """
        if not self.enforcing:
            return None
        held = self.sequences + self.strangers.count
        if not held:
            return self._lacks_beside_kept(ticket) if self.reserved and not self._keeps_too_much else None
        held += self.reserved
        if ticket.sequences > 1:
            if held + ticket.sequences > self.limit.value:
                return _LIMIT
            if self.quota is not None and self.sequences and self.sequences + ticket.sequences > self.quota:
                return _PART
        if self.kv.capacity is not None and not self.kv.fits(ticket):
            return _KV
        if not self.sees_first_tokens or self.prefill.tokens <= 0:  # a prompt above the limit goes alone
            return None
        return None if self.prefill.tokens + self.prefill.work_of(ticket) <= self.prompt_limit else _PROMPTS

    def _lacks_beside_kept(self, ticket: Ticket) -> HeldBy | None:
        """Return which limit of an idle endpoint has no room for `ticket` beside what is kept here.

        A limit that it passes all by itself is none of them: nothing that is kept could hold that.
        """
        if self.limit.value - self.reserved < ticket.sequences <= self.limit.value:
            return _LIMIT
        return _KV if not self.kv.fits(ticket) and self.kv.fits(ticket, promised=0) else None

    @property
    def counts_prompts(self) -> bool:
        """Whether its page tells how many prompts it computed and what they had: a size can be learned from it."""
        page = self.reading.page
        return page is not None and page.first_tokens is not None and page.prompt_tokens is not None

    @property
    def _keeps_too_much(self) -> bool:
        """Whether its slots or its cache became fewer since room was kept here: that shuts nothing that stands idle."""
        return self.reserved * KEPT_PARTS > self.limit.value or self.kv.promised > self.kv.share / KEPT_PARTS

    @property
    def prompt_limit(self) -> int:
        """The most prompt tokens that may wait for their first token here."""
        return self._prompt_limit or self.prefill.limit

    @property
    def pressure(self) -> float:
        """How full it is: the fullest of its limits. The least pressed endpoint has the most room."""
        held = self.sequences + self.strangers.count
        if not self.enforcing:
            return float(held)
        if self.closed_until is not None:
            return CLOSED
        pressure = held / self.limit.own
        return pressure if self.kv.capacity is None else max(pressure, self.kv.pressure)

    @property
    def cache_room(self) -> float:
        """The most tokens of one request that its cache may have room for. An idle endpoint takes any."""
        return self.kv.room if self.enforcing and self.sequences + self.strangers.count else inf

    def turns_at(self, priority: int) -> Turns:
        """Return the tenants' turns here at `priority`, a key's."""
        turns = self.turns.get(priority)
        if turns is None:
            turns = self.turns[priority] = self.pools[0].tenants.turns()
        return turns

    def has_evicted(self, before: int) -> bool:
        """Tell whether what it cached at the turnover `before` is gone: more came since than the cache holds."""
        return self.kv.capacity is not None and self.kv.turnover - before > self.kv.capacity

    def spares_for(self, ticket: Ticket) -> bool:
        """Whether it may be a next choice of `ticket`, and be kept room for it: little, and nobody waits for any.

        Another slot is left free, so it stays open. Where nothing is held, nothing has to be kept.
        """
        if not self.health.is_well or self.held_by(ticket) is not None:
            return False
        if not self.enforcing:
            return True
        kept, held = self.reserved + ticket.sequences, self.sequences + self.strangers.count
        return (
            kept * KEPT_PARTS <= self.limit.value
            and held + kept + ticket.sequences <= self.limit.value
            and self.kv.promised + ticket.kv_tokens <= self.kv.share / KEPT_PARTS
            and not self.is_waited_for
        )

    def keep(self, sequences: int, tokens: int) -> None:
        """Keep room for what is leased elsewhere and may come; less than 0: no more."""
        self.reserved += sequences
        self.kv.promised += tokens

    # ---- leases

    def lease(self, ticket: Ticket, now: float) -> None:
        """Put `ticket` in the books."""
        self.leases[ticket] = None
        self.sequences += ticket.sequences
        ticket.leased_at = now
        ticket.beside = self.sequences + self.strangers.count
        if len(self.leases) == 1:
            self.health.wakes(now, None if self.reading.page is None else self.reading.page_at)
        if not self.health.is_well:
            self.health.leased(now)
        self.kv.add(ticket)
        self.prefill.add(ticket, now, held_back=ticket.request.model in self.deferred.adapters)
        self.dispatched += 1

    def adopt(self, ticket: Ticket, now: float, held_s: float, *, begun: bool) -> None:
        """Put a lease in the books that was given elsewhere `held_s` ago. `begun`: its first token has come."""
        self.lease(ticket, now)
        ticket.leased_at = now - held_s
        if begun:
            self.prefill.was_computed(ticket)

    def release(self, ticket: Ticket, now: float, *, served: bool, wanted: bool) -> None:
        """Take `ticket` out of the books. `served`: its answer came whole; `wanted`: requests wait for room here."""
        if served:
            self.health.heard_at = now
            held, limit = self.held, self.limit
            why = limit.why
            limit.learn(now - ticket.leased_at, (ticket.beside + held) / 2, wanted=wanted and held >= limit.value)
            if limit.why != why:
                self.limit_since = now
        del self.leases[ticket]
        self.sequences -= ticket.sequences
        self.kv.remove(ticket)
        self.prefill.over(ticket, now, served=served)
        if not self.leases and self.reading.page is None and self.reading.report is not None:
            self.kv.compare(None)  # no page, and no answer that could bring better news
            self.closed_until = None

    def rebook(self, ticket: Ticket, prompt_tokens: int) -> None:
        """Correct what a leased `ticket` has booked for its prompt, once the engine has counted it."""
        change = prompt_tokens - ticket.prompt_tokens
        ticket.book(prompt_tokens)
        self.kv.prompts += change
        if ticket.prompt_pending:
            self.prefill.prompts += change

    def disown(self, ticket: Ticket, now: float) -> None:
        """Take `ticket` out of the books, although its engine may still run it: from now on telemetry counts it."""
        del self.leases[ticket]
        self.sequences -= ticket.sequences
        self.kv.remove(ticket)
        self.prefill.over(ticket, now, served=False)
        page = self.reading.page
        if page is not None and page.running is not None:  # else nothing would ever tell that it is over
            self.strangers.add(ticket.sequences, self.limit.value, now)

    def meet_again(self) -> None:
        """Look at the next telemetry as at the first: others' requests may have come."""
        self.strangers.meet_again()

    def first_token(self, ticket: Ticket, now: float) -> None:
        """Note that the engine has computed the prompt of `ticket`."""
        self.prefill.computed(ticket, now)

    @staticmethod
    def writing_s(ticket: Ticket, now: float) -> float:
        """Return for how long the engine wrote at the answer of `ticket`, as far as one can tell, in seconds."""
        began = ticket.computed_at if ticket.computed_at > 0.0 else ticket.leased_at
        return now - began if now > began else 0.0

    def is_at_work(self, now: float) -> bool:
        """Tell whether the engine computes anything, as far as one can tell: a lease that it did not refuse at once."""
        oldest = next(iter(self.leases), None)
        if oldest is not None and oldest.leased_at + self.strangers.law.arrived_s <= now:
            return True
        page = self.reading.page
        return bool(self.foreign) or (page is not None and bool(page.running))

    # ---- what the endpoint says of itself

    @property
    def known(self) -> Load | None:
        """The last report over the last page; None: nothing is known, or all is stale."""
        return self.reading.known

    def size_cache(self) -> None:
        """Take the size of the KV cache from the config, else from the page, whose word lasts, else from a report."""
        report = self.reading.report
        reported = report.kv_capacity_tokens if report is not None else None
        self.kv.capacity = self.spec.kv_capacity_tokens or self.reading.capacity or reported or None

    def look_for_first_tokens(self, policy: Policy) -> None:
        """Note whether the policy or its page lets us see when first tokens come."""
        page = self.reading.page
        self.prefill.probed = policy.first_byte_probe
        self.sees_first_tokens = policy.first_byte_probe or (page is not None and page.first_tokens is not None)

    # ---- time

    def next_change(self) -> float | None:
        """Return when time alone changes whether it has room."""
        soonest, health, missing = self.closed_until, self.health, self.missing
        at = self.prefill.next_change()
        if at is not None and (soonest is None or at < soonest):
            soonest = at
        if not health.is_well:
            at = health.next_change()
            if at is not None and (soonest is None or at < soonest):
                soonest = at
        at = missing.until
        return at if at is not None and (soonest is None or at < soonest) else soonest

    def pass_time(self, now: float) -> bool:
        """Open gates and end ejections whose time is over; tell whether it serves more models than before."""
        self.prefill.pass_time(now)
        if self.closed_until is not None and now >= self.closed_until:
            self.closed_until = None
        self.health.pass_time(now)
        return self.missing.pass_time(now)

    @property
    def condition(self) -> str:
        """Whether it may be used, in a few words for people."""
        if self.removed:
            return "removed"
        if self.missing.models and self.available:
            return f"{self.health.condition}, left out for {', '.join(sorted(self.missing.models))}"
        return self.health.condition

    def __repr__(self) -> str:
        """Show the state that tests, logs and people read."""
        return f"<Endpoint {self.name} {self.condition} in_flight={len(self.leases)}/{self.limit.value}>"


def _limit_of(spec: EndpointSpec, policy: Policy) -> Limit:
    if spec.max_running_requests is None:
        return AdaptiveLimit(policy.limit_law, policy.laws.answers)
    return FixedLimit(spec.max_running_requests)
