"""Dry run: beside a core with the queue switched off, one with the queue on that decides the same requests for nobody.

It watches the real core: whatever happens there happens to the other one too. What it counts is an estimate: a request
that the other core still holds when its real answer ends was served sooner than it would have been, and is counted as
held.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from extproc.admission.applying import apply
from extproc.admission.controller import Controller
from extproc.admission.events import Adopted, Disowned, Moved, Offered, OfTicket, PolicySet, Released
from extproc.admission.outcome import Outcome
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Dispatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extproc.admission.events import Event
    from extproc.admission.values import Decision, Policy

HELD = "held"
"""What the queue would have kept waiting, and then dispatched."""


class DryRun:
    """A watcher that counts what the queue would have held or refused.

    Attributes:
        counts: by what would have happened ("dispatched", "held", or a refusal's outcome) and class.
    """

    def __init__(self, policy: Policy) -> None:
        """Rehearse `policy`, with the queue on."""
        self.counts: dict[tuple[str, str], int] = {}
        self._other = Controller(replace(policy, enable_queue=True))
        self._twins: dict[Ticket, Ticket] = {}

    def happened(self, event: Event, decisions: Sequence[Decision]) -> None:
        """Have the same happen to the other core: to a request's twin, if it has one there."""
        del decisions
        self._catch_up(event.at)
        match event:
            case Offered(ticket=ticket) | Adopted(ticket=ticket):
                if ticket.state is State.LEASED:
                    self._twins[ticket] = Ticket(ticket.request)
                    self._apply(replace(event, ticket=self._twins[ticket]))
            case Released() | Disowned():
                self._end(event)
            case Moved(ticket=ticket) if ticket.state is State.DONE:  # to an endpoint that nobody knows
                self._end(Released(event.at, ticket, Answer.FAILED))
            case OfTicket(ticket=ticket):
                twin = self._twins.get(ticket)
                if twin is not None and twin.state is State.LEASED:
                    self._apply(replace(event, ticket=twin))
            case PolicySet(policy=policy):
                self._apply(replace(event, policy=replace(policy, enable_queue=True)))
            case _:
                self._apply(event)

    def _end(self, event: Released | Disowned) -> None:
        twin = self._twins.pop(event.ticket, None)
        if twin is not None and twin.state is State.WAITING:
            if isinstance(event, Released):
                self._note(HELD, twin)
            self._count(self._other.withdraw(twin, event.at))
        elif twin is not None and twin.state is State.LEASED:
            self._apply(replace(event, ticket=twin))

    def _apply(self, event: Event) -> None:
        self._count(apply(self._other, event))

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
