"""What the rooms of the core share: the rules, who is there, who waits where, and what the event under way led to.

Nothing is decided here. Between two events no decision is left. Nothing is freed and nobody has arrived then, but where
a dispatch pass ended early and goes on with a tick.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final

from extproc.admission.adapters import Adapters
from extproc.admission.pools import Pools
from extproc.admission.tenants import Tenants
from extproc.admission.transitions import WAITING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.ticket import Key, Ticket
    from extproc.admission.values import Decision, Policy, Request, RequestClass


MANY: Final = 8
"""Endpoints that are looked at one by one, each with those at the head of its lines."""


class Books:
    """The state of one core.

    Attributes:
        policy: the rules.
        endpoints: by name; a removed one stays until its last lease is back.
        pools: who serves what, and who waits for them.
        adapters: who has which LoRA adapter loaded.
        tenants: who they are, and what each has in flight.
        waiting: how many requests wait.
        now: the time of the event under way, or of the last one.
        freed: endpoints that may have room they did not have before this event.
        has_freed_many: more of them than the pass should look at one by one.
        goes_on: a pass ended early; the next tick goes on with it, and no other event.
        decisions: what the event led to so far.
        settles: the event is to settle some of those whose lines were given up: see settling.py.
    """

    __slots__ = (
        "_arrivals",
        "_classes",
        "adapters",
        "arrived",
        "decisions",
        "endpoints",
        "freed",
        "goes_on",
        "has_freed_many",
        "now",
        "policy",
        "pools",
        "settles",
        "tenants",
        "waiting",
    )

    def __init__(self, policy: Policy) -> None:
        """Start without endpoints."""
        self.endpoints: dict[str, Endpoint] = {}
        self.pools = Pools(policy.laws)
        self.adapters = Adapters()
        self.tenants = Tenants(policy.tenants)
        self.waiting = 0
        self.now = 0.0
        self.freed: dict[Endpoint, None] = {}
        self.has_freed_many = self.goes_on = False
        self.arrived: list[tuple[Key, int, Ticket]] = []  # a heap: tickets that may go where they could not before
        self._arrivals = 0
        self.decisions: list[Decision] = []
        self.settles = False
        self.policy = policy
        self._classes = {klass.name: klass for klass in policy.classes}

    def follow(self, policy: Policy) -> None:
        """Replace the rules."""
        self.policy = policy
        for pool in self.pools:
            pool.obey(policy.laws)
        self.tenants.follow(policy.tenants)
        self._classes = {klass.name: klass for klass in policy.classes}

    def class_of(self, request: Request) -> RequestClass:
        """Return a request's class: the one it names, if we have it."""
        return self._classes.get(request.request_class, self.policy.classes[0])

    @property
    def lanes(self) -> set[str]:
        """The names of the weighted classes."""
        return {klass.name for klass in self.policy.classes if klass.weight is not None}

    def waiting_tickets(self) -> Iterator[Ticket]:
        """Walk everything that waits, line by line."""
        for pool in self.pools:
            for queue in pool.queues():
                yield from queue

    def free(self, endpoints: dict[Endpoint, None]) -> None:
        """Have the dispatch pass look at endpoints, maybe at many."""
        self.freed.update(endpoints)
        self.has_freed_many = len(self.freed) > MANY

    def arrive(self, ticket: Ticket) -> None:
        """Have the dispatch pass look at a ticket, in the order of keys."""
        self._arrivals += 1
        heappush(self.arrived, (ticket.key, self._arrivals, ticket))

    def next_arrived(self) -> Ticket:
        """Take out the ticket that is to be looked at first. There must be one."""
        return heappop(self.arrived)[2]

    def forget_gone(self, most: int) -> None:
        """Drop up to `most` of those who are to be looked at first and wait no more."""
        arrived = self.arrived
        while arrived and most and arrived[0][2].state is not WAITING:
            heappop(arrived)
            most -= 1
