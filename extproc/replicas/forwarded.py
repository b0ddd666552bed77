"""Requests of one sidecar at another: how they travel, and what a leader keeps of each follower and its requests."""

from __future__ import annotations

from collections import deque
from math import inf
from typing import TYPE_CHECKING

from extproc.admission.ticket import Ticket
from extproc.admission.values import Request
from extproc.replicas.messages import Asked

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.values import Decision
    from extproc.replicas.messages import Link, Member


MOST_SHOWN = 32
"""Beats of a follower that are kept: eight seconds of them, and a third of one where it is asked for many pages."""
BROUGHT = -1.0
"""What a new follower holds it was granted before any status of ours."""


class Forwarded(Ticket):
    """A follower's request in the leader's core."""

    __slots__ = ("follower", "number", "told")

    def __init__(self, follower: Follower, number: int, request: Request, deliver: Callable[[Decision], None]) -> None:
        """Stand in for request `number` of `follower`."""
        super().__init__(request, deliver)
        self.follower = follower
        self.number = number
        self.told: float = inf  # the status before its grant; none is later than that of one that is not on its way yet


class Follower:
    """A sidecar that follows us.

    Attributes:
        tickets: its requests by its own numbers.
        heard: its last beat.
        heard_at: when it followed us for sure: then it was sent the last status that it has shown that it acted upon.
            What it says may be older than it looks, and whoever loses us waits SILENCE_S from when he heard of us last.
        told: the last status that it was sent.
        names: endpoints that its Envoy knows.
        rules: marks of its configuration.
        syncing: what it brought along, until it has told all; None after.
    """

    __slots__ = (
        "_sent",
        "_shown",
        "heard",
        "heard_at",
        "link",
        "member",
        "names",
        "rules",
        "syncing",
        "tickets",
        "told",
    )

    def __init__(
        self, member: Member, link: Link, names: frozenset[str], now: float, rules: frozenset[str] = frozenset()
    ) -> None:
        """Start with nothing."""
        self.member = member
        self.link = link
        self.names = names
        self.rules = rules
        self.tickets: dict[int, Forwarded] = {}
        self.heard = 0
        self.heard_at = now
        self.syncing: dict[Ticket, None] | None = {}
        self.told = 0
        self._sent: deque[tuple[int, float]] = deque()  # of two seconds: who shows none for so long is given up
        self._shown: deque[tuple[float, int]] = deque([(-inf, 0)], maxlen=MOST_SHOWN)

    def tell(self, now: float) -> int:
        """Return the number of the status that it is sent now."""
        self.told += 1
        self._sent.append((self.told, now))
        return self.told

    def shows(self, seen: int, now: float) -> None:
        """Note that it has acted upon the status `seen`, and upon all that was sent before."""
        if self.shown < seen <= self.told:
            self._shown.append((now, seen))
        while self._sent and self._sent[0][0] <= seen:
            self.heard_at = self._sent.popleft()[1]

    @property
    def shown(self) -> int:
        """The last status that it has shown that it acted upon."""
        return self._shown[-1][1]

    def shown_at(self, number: int) -> float:
        """Return when it showed that it had acted upon this status."""
        return next((when for when, seen in self._shown if seen >= number), inf)

    def has_acted(self, ticket: Forwarded, at: float) -> bool:
        """Tell whether it has shown by `at` that it knows what became of `ticket`."""
        return any(when <= at and ticket.told < seen for when, seen in self._shown)


def request_of(asked: Asked, now: float) -> Request:
    """Return what was asked elsewhere as a request here."""
    return Request(
        id=asked.id,
        arrived=now - asked.age_s,
        model=asked.model,
        request_class=asked.request_class,
        tenant=asked.tenant,
        session=asked.session,
        home=asked.home,
        budget_s=asked.budget_s,
        prompt_tokens=asked.prompt_tokens,
        max_output_tokens=asked.max_output_tokens,
        sequences=asked.sequences,
        kind=asked.kind,
        allowed=asked.allowed,
    )


def asked_by(request: Request, now: float) -> Asked:
    """Return a request as it travels."""
    return Asked(
        request.id,
        now - request.arrived,
        request.model,
        request.request_class,
        request.tenant,
        request.session,
        request.home,
        request.budget_s,
        request.prompt_tokens,
        request.max_output_tokens,
        request.sequences,
        request.kind,
        request.allowed,
    )
