"""An endpoint's books: its leases, its limits, and whether it has room. Only the controller changes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.alarms import NEVER
from extproc.admission.health import Health
from extproc.admission.held import HeldBy
from extproc.admission.limit import AdaptiveLimit, FixedLimit
from extproc.admission.prefill import Prefill

if TYPE_CHECKING:
    from extproc.admission.limit import Limit
    from extproc.admission.load import Load
    from extproc.admission.pool import Pool
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import EndpointSpec, Policy

KV_SHARE = 0.92
"""How much of the KV cache estimates may fill: the rest is for estimates that were too low."""

ARRIVED_S = 0.1
"""A lease as old as this has reached its engine."""
FOREIGN_S = 30.0
"""Foreign requests that don't get fewer for so long are somebody's steady traffic, not answers that run out: from then
on fewer of them are counted, since nobody who fills an engine steadily may keep us out of it for ever."""

_DOWN, _HOT, _PART, _LIMIT = HeldBy.DOWN, HeldBy.HOT, HeldBy.PART, HeldBy.LIMIT
_KV, _PROMPTS = HeldBy.KV, HeldBy.PROMPTS
"""Bound once: a member looked up on its Enum costs four times a global, and these are asked for in every dispatch."""


class Endpoint:
    """One inference server.

    Attributes:
        leases: the tickets that hold a slot here, oldest first; how many there are is what "in flight" means.
        health: whether it works, as far as checks and answers say.
        removed: True once the config or discovery no longer has it; its leases run out.
        enforcing: False while the queue is switched off: then there is always room.
        load, load_at: what its metrics page said last, and when.
        report, report_at: what the headers of an answer said last, where the page said nothing since, and when.
        foreign: requests that the engine held when its telemetry came first and that are not ours, as far as they
            still run: answers whose leases were lost when a sidecar died. They take room like leases.
        quota: the most leases that we may hold while sidecars that we can't reach dispatch here too; None: no such.
        kv_tokens: estimated KV tokens of all leases.
        prefill: the leases whose first token was not seen.
        sees_first_tokens: whether anything tells when a first token came; without it the prompt limit can't work.
    """

    __slots__ = (
        "_foreign_at",
        "_met",
        "_page_capacity",
        "alarm",
        "closed_until",
        "completed",
        "counted",
        "crowding",
        "dispatched",
        "enforcing",
        "foreign",
        "health",
        "kv_capacity",
        "kv_excess",
        "kv_tokens",
        "kv_turnover",
        "leases",
        "limit",
        "listed",
        "load",
        "load_at",
        "picked",
        "pools",
        "prefill",
        "produced",
        "prompt_limit",
        "quota",
        "removed",
        "report",
        "report_at",
        "sees_first_tokens",
        "spec",
    )

    def __init__(self, spec: EndpointSpec, policy: Policy) -> None:
        """Make an idle endpoint that is up."""
        self.spec = spec
        self.leases: dict[Ticket, None] = {}
        self.limit: Limit = _limit_of(spec)
        self.pools: list[Pool] = []
        self.listed = False  # in its pools' lists of open endpoints
        self.counted = False  # among its pools' usable ones
        self.health = Health()
        self.removed = False
        self.dispatched = 0
        self.completed = 0  # leases that ended since the mean of output tokens was fed last
        self.produced = 0  # output tokens that telemetry reported since then
        self.picked = 0  # when it was picked last, in picks: equal endpoints take turns
        self.crowding = (0.0, 0)  # its pressure and `picked`, kept by the controller: the least has the most room
        self.load: Load | None = None
        self.load_at = 0.0
        self.report: Load | None = None
        self.report_at = 0.0
        self.closed_until: float | None = None  # telemetry closed it until then, or until better telemetry
        self.alarm = NEVER  # the one alarm that is set for it
        self.foreign = 0
        self.quota: int | None = None
        self._foreign_at = 0.0  # when they became fewer last
        self._met = False  # its telemetry came at least once
        self.kv_tokens = 0
        self.kv_turnover = 0  # tokens that its cache had to take in for all leases so far
        self.kv_excess = 0.0  # what the engine's own figure was above our estimate when it was read
        self.kv_capacity = spec.kv_capacity_tokens
        self._page_capacity: int | None = None
        self.prefill = Prefill()
        self.sees_first_tokens = False
        self.apply(policy)

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens that the engine has not computed yet, as far as one can tell."""
        return self.prefill.tokens

    @property
    def name(self) -> str:
        """The endpoint's name."""
        return self.spec.name

    def respec(self, spec: EndpointSpec) -> None:
        """Take over a changed `spec`; leases stay, and a lowered limit lets them finish."""
        if spec.max_running_requests != self.spec.max_running_requests:
            self.limit = _limit_of(spec)
        self.spec = spec
        self._size_cache()

    def apply(self, policy: Policy) -> None:
        """Follow a changed policy."""
        self.enforcing = policy.enable_queue
        self.prompt_limit = policy.max_prompt_tokens
        counted = self.load is not None and self.load.first_tokens is not None
        self.sees_first_tokens = policy.first_byte_probe or counted
        if policy.first_byte_probe:
            self.prefill.forget()

    # ---- room

    @property
    def available(self) -> bool:
        """Whether it may be sent anything at all."""
        return self.health.is_usable and not self.removed

    @property
    def is_open(self) -> bool:
        """Whether it has room for a request that needs no tokens: necessary, not sufficient."""
        return self.held_by() is None

    def held_by(self, ticket: Ticket | None = None) -> HeldBy | None:
        """Return what keeps `ticket` from being dispatched here, None for one that needs no tokens; None: nothing."""
        health = self.health
        if self.removed or not health.is_usable:
            return health.shut_by or _DOWN
        if not self.enforcing:
            return None
        if self.closed_until is not None:
            return _HOT
        by = health.held_back_by
        if by is not None:
            return by
        if self.quota is not None and len(self.leases) >= self.quota:
            return _PART
        if self.held >= self.limit.value:
            return _LIMIT
        return None if ticket is None else self.lacks(ticket)

    @property
    def held(self) -> int:
        """How many requests count against its limit: ours, and foreign ones."""
        return len(self.leases) + self.foreign

    def has_room_for(self, ticket: Ticket) -> bool:
        """Whether `ticket` may be dispatched here now. An idle endpoint takes any one request, however big."""
        return self.held_by(ticket) is None

    def lacks(self, ticket: Ticket) -> HeldBy | None:
        """Return which limit on tokens has no room for `ticket`, given that it is open; None: it fits."""
        if not self.enforcing or not self.held:
            return None
        if self.kv_capacity is not None:
            used = self.kv_tokens + self.kv_excess
            if used + ticket.kv_tokens > KV_SHARE * self.kv_capacity:
                return _KV
        if not self.sees_first_tokens or self.prefill.tokens <= 0:  # a prompt above the limit goes alone
            return None
        return None if self.prefill.tokens + ticket.work_tokens <= self.prompt_limit else _PROMPTS

    @property
    def pressure(self) -> float:
        """How full it is: the fullest of its limits. The least pressed endpoint has the most room."""
        count = self.held
        if not self.enforcing:
            return float(count)
        share = count / self.limit.value
        if self.kv_capacity is not None:
            return max(share, self.kv_tokens / (KV_SHARE * self.kv_capacity))
        return share

    def has_evicted(self, before: int) -> bool:
        """Tell whether what it cached at the turnover `before` is gone: more came since than the cache holds."""
        return self.kv_capacity is not None and self.kv_turnover - before > self.kv_capacity

    # ---- leases

    def lease(self, ticket: Ticket, now: float) -> None:
        """Put `ticket` in the books."""
        self.leases[ticket] = None
        ticket.leased_at = now
        self.health.leased(now)
        self.kv_tokens += ticket.kv_tokens
        self.prefill.add(ticket, now)
        self.kv_turnover += ticket.work_tokens + ticket.output_tokens
        self.dispatched += 1

    def release(self, ticket: Ticket, now: float) -> None:
        """Take `ticket` out of the books."""
        del self.leases[ticket]
        self.kv_tokens -= ticket.kv_tokens
        self.prefill.done(ticket, now)
        self.completed += 1
        if not self.leases and self.load is None and self.report is not None:
            self.kv_excess = 0.0  # no page, and no answer that could bring better news
            self.closed_until = None

    def disown(self, ticket: Ticket, now: float) -> None:
        """Take `ticket` out of the books, although its engine may still run it: from now on telemetry counts it."""
        del self.leases[ticket]
        self.kv_tokens -= ticket.kv_tokens
        self.prefill.done(ticket, now)
        if self.load is not None and self.load.running is not None:  # else nothing would ever tell that it is over
            self.foreign, self._foreign_at = min(self.foreign + 1, self.limit.value), now

    def meet_again(self) -> None:
        """Look at the next telemetry as at the first: others' requests may have come."""
        self._met = False

    def first_token(self, ticket: Ticket, now: float) -> None:
        """Note that the engine has computed the prompt of `ticket`."""
        self.prefill.done(ticket, now)

    def is_at_work(self, now: float) -> bool:
        """Tell whether the engine computes anything, as far as one can tell: a lease that it did not refuse at once."""
        oldest = next(iter(self.leases), None)
        if oldest is not None and oldest.leased_at + ARRIVED_S <= now:
            return True
        return bool(self.foreign) or (self.load is not None and bool(self.load.running))

    # ---- what the endpoint says of itself

    @property
    def known(self) -> Load | None:
        """The last report over the last page; None: nothing is known, or all is stale."""
        return self.load if self.report is None else self.report.over(self.load)

    def observe(self, load: Load, now: float, policy: Policy, *, wanted: bool) -> None:
        """Follow fresh telemetry. `wanted`: requests wait that this endpoint could serve."""
        full = self.held >= self.limit.value
        self._count_foreign(load, now)
        self.health.is_asleep = load.asleep is True
        elapsed_s = now - self.load_at if self.load is not None else 1.0
        self.load, self.load_at = load, now
        if self.report is not None:
            self.report = self.report.without(load)
        known = load if self.report is None else self.report.over(load)
        self._size_cache()
        self.limit.observe(
            load,
            wanted=wanted and full,
            in_flight=self.held,
            elapsed_s=elapsed_s,
            knows_kv=self.kv_capacity is not None and load.kv_usage is not None,
        )
        if self.report is None or self.report.kv_usage is None:
            self._compare_kv(load.kv_usage)
        self.sees_first_tokens = policy.first_byte_probe or load.first_tokens is not None
        if load.first_tokens is not None and not policy.first_byte_probe:
            engine_holds = (load.running or 0.0) + (load.waiting or 0.0)
            ours = min(len(self.leases) / engine_holds, 1.0) if engine_holds else 1.0  # others may use it too
            self.prefill.observe(load.first_tokens * ours, elapsed_s, now)
        idle = not self.leases and known.running == 0
        if _is_hot(known, policy) and not idle:
            self.closed_until = now + policy.stale_after_s
        else:
            self.closed_until = None

    def merge(self, report: Load, now: float, policy: Policy) -> None:
        """Follow a report that came with an answer: what it doesn't say stays as it was.

        It is no look at the page: the limit takes no step, no prompt counts as computed, nobody is found foreign.
        """
        self.report, self.report_at = report, now
        self._size_cache()
        if report.kv_usage is not None:
            self._compare_kv(report.kv_usage)
        if _is_hot(report.over(self.load), policy):
            self.closed_until = now + policy.stale_after_s
        else:
            self.closed_until = None

    def _size_cache(self) -> None:
        """Take the size of the KV cache from the config, else from the page, whose word lasts, else from a report."""
        if self.load is not None and self.load.kv_capacity_tokens:  # an engine may say 0 before it knows
            self._page_capacity = self.load.kv_capacity_tokens
        reported = self.report.kv_capacity_tokens if self.report is not None else None
        self.kv_capacity = self.spec.kv_capacity_tokens or self._page_capacity or reported or None

    def _compare_kv(self, usage: float | None) -> None:
        """Note what the engine has in its KV cache beyond what our books say."""
        self.kv_excess = 0.0
        if usage is not None and self.kv_capacity is not None:
            self.kv_excess = max(usage * self.kv_capacity - self.kv_tokens, 0.0)

    def _count_foreign(self, load: Load, now: float) -> None:
        """Count the requests of others when telemetry comes first; after that they can only become fewer.

        Never more: what an engine holds above our leases later is mostly our own, between two looks at it.
        """
        if load.running is None:
            self.foreign = 0
            return
        there = int(load.running + (load.waiting or 0.0))
        most = self.limit.value  # more would only take longer to forget
        if not self._met:
            self._met = True
            self.foreign, self._foreign_at = min(max(there - len(self.leases), 0), most), now
        elif self.foreign:
            arrived = sum(ticket.leased_at <= now - ARRIVED_S for ticket in self.leases)
            left = min(max(there - arrived, 0), most)
            if left < self.foreign:
                self.foreign, self._foreign_at = left, now
            elif now >= self._foreign_at + FOREIGN_S:
                self.foreign, self._foreign_at = self.foreign // 2, now

    def forget_stale(self, now: float, policy: Policy) -> bool:
        """Ignore what has become stale; tell whether anything had."""
        before = len(self.told_at)
        if self.load is not None and now >= self.load_at + policy.stale_after_s:  # as deadlines are, to the last bit
            self._forget_load(policy)
        if self.report is not None and now >= self.report_at + policy.stale_after_s:
            self.report = None
            self._size_cache()
            self._cool_down(policy)
        return len(self.told_at) < before

    @property
    def told_at(self) -> list[float]:
        """When its page and its answers spoke last, as far as that still counts."""
        page = [] if self.load is None else [self.load_at]
        return page if self.report is None else [*page, self.report_at]

    def _forget_load(self, policy: Policy) -> None:
        self.load = None
        self.foreign = 0
        self.health.is_asleep = False
        self.prefill.forget()
        self._cool_down(policy)
        self.sees_first_tokens = policy.first_byte_probe

    def _cool_down(self, policy: Policy) -> None:
        """Take back what stale telemetry did, unless what is still known says the same."""
        known = self.known
        if known is None or known.kv_usage is None:
            self.kv_excess = 0.0
        if known is None or not _is_hot(known, policy):
            self.closed_until = None

    # ---- time

    def next_change(self) -> float | None:
        """Return when time alone changes whether it has room."""
        soonest: float | None = None
        for at in (self.closed_until, self.health.next_change(), self.prefill.next_change()):
            if at is not None and (soonest is None or at < soonest):
                soonest = at
        return soonest

    def pass_time(self, now: float) -> None:
        """Open gates and end ejections whose time is over."""
        self.prefill.pass_time(now)
        if self.closed_until is not None and now >= self.closed_until:
            self.closed_until = None
        self.health.pass_time(now)

    @property
    def condition(self) -> str:
        """Whether it may be used, in a few words for people."""
        if self.removed:
            return "removed"
        return self.health.condition

    def __repr__(self) -> str:
        """Show the state that tests, logs and people read."""
        return f"<Endpoint {self.name} {self.condition} in_flight={len(self.leases)}/{self.limit.value}>"


def _limit_of(spec: EndpointSpec) -> Limit:
    if spec.max_running_requests is None:
        return AdaptiveLimit()
    return FixedLimit(spec.max_running_requests)


def _is_hot(load: Load, policy: Policy) -> bool:
    kv, gpu = load.kv_usage, load.gpu_usage
    return (kv is not None and kv >= policy.max_kv_usage) or (
        gpu is not None and policy.max_gpu_usage is not None and gpu >= policy.max_gpu_usage
    )
