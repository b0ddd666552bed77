"""Dry run: the queue switched off, and beside it a core with the queue on that decides the same requests for nobody.

It looks like a `Controller` to its driver. What it counts is an estimate: a request that the other core still holds
when its real answer ends was served sooner than it would have been, and is counted as held.

Whatever happens to the real core happens to the other one too, by construction: its events are not listed here, they
are found (`EVENTS`), and each is passed on unless it is said here what else becomes of it.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any

from extproc.admission.controller import Controller
from extproc.admission.outcome import Outcome
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Dispatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.values import Decision, Policy

HELD = "held"
"""What the queue would have kept waiting, and then dispatched."""

EVENTS = tuple(
    name
    for name, method in vars(Controller).items()
    if not name.startswith("_") and inspect.isfunction(method) and "now" in inspect.signature(method).parameters
)
"""The names of the core's events: "every public method that takes `now` is an event"."""


class DryRun(Controller):
    """A controller that holds nothing, and counts what it would have held or refused.

    Attributes:
        counts: by what would have happened ("dispatched", "held", or a refusal's outcome) and class.
    """

    def __init__(self, policy: Policy) -> None:
        """Rehearse `policy`, whether it has the queue on or off."""
        super().__init__(replace(policy, enable_queue=False))
        self.counts: dict[tuple[str, str], int] = {}
        self._other = Controller(replace(policy, enable_queue=True))
        self._twins: dict[Ticket, Ticket] = {}

    def offer(self, ticket: Ticket, now: float) -> list[Decision]:
        """Offer for real, and a twin to the other core."""
        decisions = super().offer(ticket, now)
        if ticket.state is State.LEASED:
            self._catch_up(now)
            twin = self._twins[ticket] = Ticket(ticket.request)
            self._count(self._other.offer(twin, now))
        return decisions

    def release(self, ticket: Ticket, now: float, answer: Answer = Answer.UNKNOWN) -> list[Decision]:
        """End a request, and its twin wherever that stands."""
        decisions = super().release(ticket, now, answer)
        twin = self._twins.pop(ticket, None)
        self._catch_up(now)
        if twin is not None and twin.state is State.WAITING:
            self._note(HELD, twin)
            self._count(self._other.cancel(twin, now))
        elif twin is not None and twin.state is State.LEASED:
            self._count(self._other.release(twin, now, answer))
        return decisions

    def adopt(
        self, ticket: Ticket, name: str, now: float, *, held_s: float = 0.0, begun: bool = False
    ) -> list[Decision]:
        """Take over a lease, and a twin of it in the other core."""
        decisions = super().adopt(ticket, name, now, held_s=held_s, begun=begun)
        if ticket.state is State.LEASED:
            self._catch_up(now)
            twin = self._twins[ticket] = Ticket(ticket.request)
            self._count(self._other.adopt(twin, name, now, held_s=held_s, begun=begun))
        return decisions

    def disown(self, ticket: Ticket, now: float) -> list[Decision]:
        """Forget a lease, and its twin wherever that stands."""
        decisions = super().disown(ticket, now)
        twin = self._twins.pop(ticket, None)
        self._catch_up(now)
        if twin is not None and twin.state is State.WAITING:
            self._count(self._other.withdraw(twin, now))
        elif twin is not None and twin.state is State.LEASED:
            self._count(self._other.disown(twin, now))
        return decisions

    def set_policy(self, policy: Policy, now: float) -> list[Decision]:
        """Replace the rules of both, each with the queue as it has it."""
        self._catch_up(now)
        self._count(self._other.set_policy(replace(policy, enable_queue=True), now))
        return super().set_policy(replace(policy, enable_queue=False), now)

    def _pass_on(self, event: str, arguments: dict[str, Any]) -> None:
        """Have the other core see `event`: one about a request that it runs too, or about no request."""
        self._catch_up(arguments["now"])
        if "ticket" in arguments:
            twin = self._twins.get(arguments["ticket"])
            if twin is None or twin.state is not State.LEASED:
                return
            arguments["ticket"] = twin
        self._count(getattr(self._other, event)(**arguments))

    def _catch_up(self, now: float) -> None:
        """Let the other core's deadlines pass; nobody waits for them, so they need no timer."""
        due = self._other.next_deadline()
        while due is not None and due <= now:
            self._count(self._other.tick(due))
            following = self._other.next_deadline()
            due = following if following is not None and following > due else None

    def _count(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            waited = isinstance(decision, Dispatch) and decision.ticket.alarm > 0
            self._note(HELD if waited else _name(decision.outcome), decision.ticket)

    def _note(self, what: str, ticket: Ticket) -> None:
        key = (what, ticket.request_class.name)
        self.counts[key] = self.counts.get(key, 0) + 1


def _name(outcome: Outcome) -> str:
    return str(Outcome.DISPATCHED.value if outcome is Outcome.REROUTED else outcome.value)


def _passed_on(event: str) -> Callable[..., list[Decision]]:
    real = getattr(Controller, event)
    signature = inspect.signature(real)

    @wraps(real)
    def both(self: DryRun, *args: Any, **kwargs: Any) -> list[Decision]:
        arguments = dict(signature.bind(self, *args, **kwargs).arguments)
        del arguments["self"]
        self._pass_on(event, arguments)
        decisions: list[Decision] = real(self, *args, **kwargs)
        return decisions

    return both


for _event in EVENTS:
    if _event not in vars(DryRun):
        setattr(DryRun, _event, _passed_on(_event))
