"""Whether an endpoint has room: all of its limits, and what is asked of them. Here nothing changes.

What changes it stands in `endpoint.py`: leases, time, what the endpoint says of itself, and the rules.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

from extproc.admission.health import Health
from extproc.admission.held import HeldBy
from extproc.admission.kv import KvBooks
from extproc.admission.limit import AdaptiveLimit, FixedLimit
from extproc.admission.prefill import Prefill
from extproc.admission.reading import Foreign, Reading

if TYPE_CHECKING:
    from extproc.admission.limit import Limit
    from extproc.admission.pool import Pool
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import EndpointSpec, Policy

KEPT_PARTS = 8
"""Of an endpoint's slots, and of its cache, one in so many at most is kept for requests that are leased elsewhere."""
CLOSED: Final = 1e6
"""The pressure of an endpoint whose telemetry says that it is full: all others go before it."""
_DOWN: Final = HeldBy.DOWN
_HOT: Final = HeldBy.HOT
_PART: Final = HeldBy.PART
_LIMIT: Final = HeldBy.LIMIT
_REFUSED: Final = HeldBy.REFUSED
_KV: Final = HeldBy.KV
_PROMPTS: Final = HeldBy.PROMPTS
"""Bound once: a member looked up on its Enum costs four times a global, and these are asked for in every dispatch."""


class Room:
    """What one inference server holds, and what it may.

    Attributes:
        leases: the tickets that hold a slot here, oldest first; how many there are is what "in flight" means.
        sequences: how many sequences they are for the engine.
        reserved: how many more may come: this is a next choice of requests that are leased elsewhere. They take room,
            and don't make it busy.
        pools: those that it is a member of.
        removed: True once the config or discovery no longer has it; its leases run out.
        enforcing: False while the queue is switched off: then there is always room.
        health: whether it works, as far as checks and answers say.
        closed_until: its telemetry says that it is full: it gets one request at a time until then, or better telemetry.
        quota: the most sequences that we may hold while sidecars that we can't reach dispatch here too; None: no such.
        limit: how many sequences it may hold.
        is_learned: nobody chose a number for it: all that holds requests back is a guess, and evidence overrules it.
        strangers: the requests that it runs and that we don't know.
        kv: what its KV cache has to take.
        prefill: the leases whose first token was not seen.
        keeps_tokens: whether these two are kept: where nothing tells of its cache or of prompts nobody asks.
        sees_first_tokens: whether anything tells when a first token came; without it the prompt limit can't work.
        reading: what it says of itself.
    """

    __slots__ = (
        "_prompt_limit",
        "closed_until",
        "enforcing",
        "health",
        "is_learned",
        "keeps_tokens",
        "kv",
        "leases",
        "limit",
        "pools",
        "prefill",
        "quota",
        "reading",
        "removed",
        "reserved",
        "sees_first_tokens",
        "sequences",
        "strangers",
    )

    def __init__(self, spec: EndpointSpec, policy: Policy) -> None:
        """Make all of it free."""
        self.leases: dict[Ticket, None] = {}
        self.sequences = 0
        self.reserved = 0
        self.pools: list[Pool] = []
        self.removed = False
        self.enforcing = policy.enable_queue
        self.health = Health(policy.laws.health)
        self.closed_until: float | None = None
        self.quota: int | None = None
        self.limit: Limit = limit_of(spec, policy)
        self.is_learned = False
        self.strangers = Foreign(policy.laws.foreign)
        self.kv = KvBooks(spec.kv_capacity_tokens, policy.laws.kv)
        self.prefill = Prefill(policy.laws.prompts)
        self.keeps_tokens = False
        self._prompt_limit = policy.max_prompt_tokens
        self.sees_first_tokens = False
        self.reading = Reading()

    @property
    def available(self) -> bool:
        """Whether it may be sent anything at all."""
        return self.health.shut_by is None and not self.removed

    def peers(self) -> Pool | None:
        """Return those whom it is judged against, itself among them: most of those who serve one of its models."""
        return max((pool for pool in self.pools if pool.names), key=lambda pool: len(pool.members), default=None)

    @property
    def is_open(self) -> bool:
        """Whether it has room for a request that needs no tokens: necessary, not sufficient."""
        return self.held_by() is None

    def held_by(self, ticket: Ticket | None = None) -> HeldBy | None:
        """Return what keeps `ticket` from being dispatched here, None for one that needs no tokens; None: nothing."""
        health = self.health
        if health.shut_by is not None or self.removed:
            return health.shut_by or _DOWN
        if not self.enforcing:
            return None
        lets = self.strangers.lets
        if self.closed_until is not None and self.leases and self.sequences >= lets:
            return _HOT  # one at a time: the figure may be wrong, or never change
        if not health.is_well:
            by = health.held_back_by
            if by is not None:
                return by
            if health.breaker is not None and self.sequences >= health.breaker.most:
                return _REFUSED
        if self.quota is not None and self.sequences >= self.quota:
            return _PART
        held = self.sequences + self.strangers.takes
        if held and held + self.reserved >= self.limit.value and self.sequences >= lets:
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
        return self.sequences + self.strangers.takes

    def lacks(self, ticket: Ticket) -> HeldBy | None:
        """Return which limit has no room for all of `ticket`, given that it is open; None: it fits.

        An idle endpoint takes any one request, however big.
        """
        if not self.enforcing:
            return None
        held = self.sequences + self.strangers.takes
        if not held:
            return self._lacks_beside_kept(ticket) if self.reserved and not self._keeps_too_much else None
        is_let_in = self.sequences + ticket.sequences <= self.strangers.lets
        if ticket.sequences > 1:
            if not is_let_in and held + self.reserved + ticket.sequences > self.limit.value:
                return _LIMIT
            if self.quota is not None and self.sequences and self.sequences + ticket.sequences > self.quota:
                return _PART
        if is_let_in or not self.keeps_tokens:
            return None
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

    def pressure(self) -> float:
        """Return how full it is: the fullest of its limits. The least pressed endpoint has the most room."""
        held = self.sequences + self.strangers.takes
        if not self.enforcing:
            return float(held)
        if self.closed_until is not None:
            return CLOSED
        pressure = held / self.limit.own
        if self.kv.capacity is None:
            return pressure
        booked = self.kv.pressure
        return booked if booked > pressure else pressure

    @property
    def cache_room(self) -> float:
        """The most tokens of one request that its cache may have room for. An idle endpoint takes any.

        So does one that others fill, while ours are few there.
        """
        if not self.enforcing or not self.sequences + self.strangers.takes or self.sequences < self.strangers.lets:
            return inf
        return self.kv.room

    def spares_for(self, ticket: Ticket) -> bool:
        """Whether it may be a next choice of `ticket`, and be kept room for it: little, and nobody waits for any.

        Another slot is left free, so it stays open. Where nothing is held, nothing has to be kept.
        """
        if not self.health.is_well or self.held_by(ticket) is not None:
            return False
        if not self.enforcing:
            return True
        kept, held = self.reserved + ticket.sequences, self.sequences + self.strangers.takes
        return (
            kept * KEPT_PARTS <= self.limit.value
            and held + kept + ticket.sequences <= self.limit.value
            and self.kv.promised + ticket.kv_tokens <= self.kv.share / KEPT_PARTS
            and not self.is_waited_for
        )


def limit_of(spec: EndpointSpec, policy: Policy) -> Limit:
    """Return the limit of an endpoint that is new: a number that a person chose, else one that is learned."""
    if spec.max_running_requests is None:
        return AdaptiveLimit(policy.limit_law, policy.laws.answers)
    return FixedLimit(spec.max_running_requests)
