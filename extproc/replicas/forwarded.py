"""Requests of one sidecar at another: how they travel, and what a leader keeps of each follower and its requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.ticket import Ticket
from extproc.admission.values import Request
from extproc.replicas.messages import Asked

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.values import Decision
    from extproc.replicas.messages import Link, Member


class Forwarded(Ticket):
    """A follower's request in the leader's core."""

    __slots__ = ("follower", "number")

    def __init__(self, follower: Follower, number: int, request: Request, deliver: Callable[[Decision], None]) -> None:
        """Stand in for request `number` of `follower`."""
        super().__init__(request, deliver)
        self.follower = follower
        self.number = number


class Follower:
    """A sidecar that follows us.

    Attributes:
        tickets: its requests by its own numbers.
        heard: its last beat; `heard_at`: when it came.
        names: endpoints that its Envoy knows.
        rules: marks of its configuration.
        syncing: what it brought along, until it has told all; None after.
    """

    __slots__ = ("heard", "heard_at", "link", "member", "names", "rules", "syncing", "tickets")

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
        self.syncing: list[Forwarded] | None = []


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
