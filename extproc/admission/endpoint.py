"""An endpoint's books, and what changes them: leases, time, the rules. Only the core does. The questions: `room.py`.

What its telemetry changes in them stands in `telemetry.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.alarms import NEVER
from extproc.admission.counters import Counters
from extproc.admission.deferred import Deferred
from extproc.admission.held import HeldBy
from extproc.admission.limit import AdaptiveLimit
from extproc.admission.missing import Missing
from extproc.admission.room import Room, limit_of
from extproc.admission.servers import Servers
from extproc.admission.steps import StepCost
from extproc.admission.values import FULL_CACHE

if TYPE_CHECKING:
    from extproc.admission.fairness import Turns
    from extproc.admission.load import Load
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import EndpointSpec, Policy


class Endpoint(Room):
    """One inference server. Whether it has room, and what of it decides that: `Room`.

    Attributes:
        name: its name.
        missing: the models that it is left out for.
        deferred: how many of its requests wait there for the slot of an adapter.
        dispatched, answered: requests that were sent there since the start, and those of them that were answered well.
        counters: whether its counters are believed.
        servers: how many servers its address stands for.
        steps: what the engine's steps cost, by its counters.
        unkept: tokens of all prompts that were sent before `keeps_tokens`.
        held_since: since when whatever came free here was taken at once, or suited nobody; None: there is room.
        limit_since: since when its limit has been set by what it says; None: since the start.
        expected, written: tokens of all its answers, as estimated for those that ended and as its counters, while they
            are believed, told of them.
    """

    __slots__ = (
        "alarm",
        "alarm_number",
        "answered",
        "closed_by",
        "completed",
        "counted",
        "counters",
        "crowding",
        "deferred",
        "dispatched",
        "expected",
        "held_since",
        "limit_since",
        "listing",
        "missing",
        "name",
        "picked",
        "produced",
        "servers",
        "spec",
        "steps",
        "turns",
        "unkept",
        "written",
    )

    def __init__(self, spec: EndpointSpec, policy: Policy) -> None:
        """Make an idle endpoint that is up."""
        super().__init__(spec, policy)
        self.name = spec.name
        self.spec = spec
        self.turns: dict[int, Turns] = {}  # by priority; where requests of several pools have met
        self.closed_by: HeldBy | None = HeldBy.DOWN  # `held_by()` when that was asked last; None: it has room
        self.listing = 0  # which of all listings put it on its pools' lists of open endpoints; 0: it is on none
        self.counted = False  # among its pools' usable ones
        self.missing = Missing(policy.laws.health)
        self.dispatched = self.answered = 0
        self.completed = 0  # leases that ended since the mean of output tokens was fed last
        self.produced = 0  # output tokens that telemetry reported since then
        self.expected = self.written = 0
        self.held_since: float | None = None
        self.limit_since: float | None = None
        self.picked = 0  # when it was picked last, in picks: equal endpoints take turns
        self.crowding = (0.0, 0)  # its pressure and `picked` when that was asked last: the least has the most room
        self.alarm = NEVER  # the one alarm that is set for it
        self.alarm_number = 0
        self.counters = Counters(policy.laws.counters)
        self.servers = Servers()
        self.steps = StepCost(policy.laws.steps)
        self.deferred = Deferred()
        self.unkept = 0
        self.size_cache()
        self.apply(policy)

    def respec(self, spec: EndpointSpec, policy: Policy) -> None:
        """Take over a changed `spec`; leases stay, and a lowered limit lets them finish."""
        if spec.max_running_requests != self.spec.max_running_requests:
            self.limit = limit_of(spec, policy)
        if spec.address != self.spec.address and self.servers.count > 1:
            self.servers = Servers(self.answered)
            self.forget_servers()
        self.spec = spec
        self.size_cache()
        self._see_who_chose(policy)

    def forget_servers(self) -> None:
        """Forget what pages said as those of another number of servers."""
        self.steps = StepCost(self.steps.law)
        self.limit.forget_batch()
        self.reading.capacity = None

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
        self._see_who_chose(policy)
        self.look_for_first_tokens(policy)

    def _see_who_chose(self, policy: Policy) -> None:
        """Note whether a person chose any number that may hold requests back from it; what others let in is over."""
        chosen = self.spec.max_running_requests, self.spec.kv_capacity_tokens, policy.max_prompt_tokens
        thresholds = policy.max_gpu_usage, policy.max_kv_usage
        self.is_learned = chosen == (None, None, None) and thresholds == (None, FULL_CACHE)
        self.strangers.lets = 0  # until its next page
        if not self.is_learned:
            self.strangers.takes = self.strangers.count

    # ---- who waits

    def turns_at(self, priority: int) -> Turns:
        """Return the tenants' turns here at `priority`, a key's."""
        turns = self.turns.get(priority)
        if turns is None:
            turns = self.turns[priority] = self.pools[0].tenants.turns()
        return turns

    # ---- leases

    def lease(self, ticket: Ticket, now: float) -> None:
        """Put `ticket` in the books."""
        if not self.leases:
            self.health.wakes(now, None if self.reading.page is None else self.reading.page_at)
        self.leases[ticket] = None
        self.sequences += ticket.sequences
        ticket.leased_at = now
        ticket.beside = self.sequences + self.strangers.takes
        if not self.health.is_well:
            self.health.leased(now, self.sequences)
        if self.keeps_tokens:
            self.kv.add(ticket)
            self.prefill.add(ticket, now, held_back=ticket.request.model in self.deferred.adapters)
        else:
            ticket.prompt_pending = True
            self.unkept += ticket.work_tokens
        self.dispatched += 1

    def adopt(self, ticket: Ticket, now: float, held_s: float, *, begun: bool) -> None:
        """Put a lease in the books that was given elsewhere `held_s` ago. `begun`: its first token has come."""
        self.lease(ticket, now)
        ticket.leased_at = now - held_s
        if begun:
            self.keep_tokens()
            self.prefill.was_computed(ticket)

    def release(self, ticket: Ticket, now: float, served: bool, wanted: bool = False) -> None:
        """Take `ticket` out of the books. `served`: its answer came whole; `wanted`: others waited then."""
        if served:
            self.answered += 1
            self.health.heard_at = now
            if self.limit.blind:
                self._learn_of(ticket, now, wanted=wanted)
        del self.leases[ticket]
        self.sequences -= ticket.sequences
        if self.keeps_tokens:
            self.kv.remove(ticket)
            self.prefill.over(ticket, now, served=served)
            if self.deferred.turns:
                self.deferred.ended(ticket, served=served)
        if not self.leases and self.reading.page is None and self.reading.report is not None:
            self.kv.compare(None)  # no page, and no answer that could bring better news
            self.closed_until = None

    def keep(self, sequences: int, tokens: int) -> None:
        """Keep room for what is leased elsewhere and may come; less than 0: no more."""
        self.reserved += sequences
        self.kv.promised += tokens

    def has_evicted(self, before: int) -> bool:
        """Tell whether what it cached at the turnover `before` is gone: more came since than the cache holds."""
        return self.kv.capacity is not None and self.kv.turnover - before > self.kv.capacity

    def _learn_of(self, ticket: Ticket, now: float, *, wanted: bool) -> None:
        """Have a blind limit follow how long an answer took."""
        limit, held = self.limit, self.held
        why = limit.why
        limit.learn(now - ticket.leased_at, (ticket.beside + held) / 2, wanted=wanted and held >= limit.value)
        if limit.why != why:
            self.limit_since = now

    def rebook(self, ticket: Ticket, prompt_tokens: int) -> None:
        """Correct what a leased `ticket` has booked for its prompt, once the engine has counted it."""
        self.kv.prompts += prompt_tokens - ticket.prompt_tokens
        ticket.book(prompt_tokens)

    def take_over(self, ticket: Ticket, other: Endpoint, now: float) -> None:
        """Put a lease in the books that is in `other`'s: this is the server that runs it."""
        begun = other.keeps_tokens and not ticket.prompt_pending
        other.take_out(ticket, now)
        ticket.endpoint = self
        self.adopt(ticket, now, now - ticket.leased_at, begun=begun)

    def take_out(self, ticket: Ticket, now: float) -> None:
        """Take `ticket` out of the books: somebody else counts it."""
        del self.leases[ticket]
        self.sequences -= ticket.sequences
        if self.keeps_tokens:
            self.kv.remove(ticket)
            self.prefill.over(ticket, now, served=False)

    def disown(self, ticket: Ticket, now: float) -> None:
        """Take `ticket` out of the books, although its engine may still run it: from now on telemetry counts it."""
        self.take_out(ticket, now)
        page = self.reading.page
        if page is not None and page.running is not None:  # else nothing would ever tell that it is over
            self.strangers.add(ticket.sequences, self.limit.value, now)

    def meet_again(self) -> None:
        """Look at the next telemetry as at the first: others' requests may have come."""
        self.strangers.meet_again()

    def first_token(self, ticket: Ticket, now: float) -> None:
        """Note that the engine has computed the prompt of `ticket`."""
        self.keep_tokens()
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

    def is_heard(self, now: float) -> bool:
        """Tell whether there is a process: an answer runs that began well, or it or its page was heard just now."""
        heard_at, page = self.health.heard_at, self.reading.page
        since = now - self.health.law.quiet_s
        if (heard_at is not None and heard_at >= since) or (page is not None and self.reading.page_at >= since):
            return True
        return any(ticket.is_answered for ticket in self.leases)

    # ---- what the endpoint says of itself

    def keep_tokens(self) -> None:
        """Keep books of tokens from now on, of what runs already, too."""
        if not self.keeps_tokens:
            self.keeps_tokens = True
            for ticket in self.leases:
                self.kv.add(ticket)
                self.prefill.add(ticket, ticket.leased_at)
            self.prefill.follow(self.dispatched, self.unkept)

    @property
    def foreign(self) -> int:
        """How many requests it runs that were sent before we knew it."""
        return self.strangers.count

    @property
    def known(self) -> Load | None:
        """The last report over the last page; None: nothing is known, or all is stale."""
        return self.reading.known

    def size_cache(self) -> None:
        """Take the size of the KV cache from the config, else from the page, whose word lasts, else from a report."""
        report = self.reading.report
        reported = report.kv_capacity_tokens if report is not None else None
        self.kv.capacity = self.spec.kv_capacity_tokens or self.reading.capacity or reported or None
        if self.kv.capacity is not None:
            self.keep_tokens()

    def look_for_first_tokens(self, policy: Policy) -> None:
        """Note whether the policy or its page lets us see when first tokens come."""
        page = self.reading.page
        if policy.first_byte_probe:
            self.keep_tokens()
        self.prefill.probed = policy.first_byte_probe
        self.sees_first_tokens = policy.first_byte_probe or (page is not None and page.first_tokens is not None)

    # ---- time

    def next_change(self) -> float | None:
        """Return when time alone changes whether it has room."""
        soonest, health = self.closed_until, self.health
        if self.keeps_tokens:
            at = self.prefill.next_change()
            if at is not None and (soonest is None or at < soonest):
                soonest = at
        if not health.is_well:
            at = health.next_change()
            if at is not None and (soonest is None or at < soonest):
                soonest = at
        at = self.missing.until
        return at if at is not None and (soonest is None or at < soonest) else soonest

    def pass_time(self, now: float) -> bool:
        """Open gates and end ejections whose time is over; tell whether it serves more models than before."""
        self.prefill.pass_time(now)
        if self.closed_until is not None and now >= self.closed_until:
            self.closed_until = None
        health = self.health
        health.pass_time(now)
        if health.breaker is not None and health.breaker.most >= self.limit.value:
            health.forget_breaker()
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
