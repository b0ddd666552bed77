"""Dry run: the queue switched off, and beside it a core with the queue on that decides the same requests for nobody.

It looks like a `Controller` to its driver. What it rehearses is an estimate: a request that the rehearsal still holds
when its real answer ends was served sooner than it would have been, and is counted as held.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from extproc.admission.controller import Controller
from extproc.admission.outcome import Outcome
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Dispatch

if TYPE_CHECKING:
    from extproc.admission.load import Load
    from extproc.admission.values import Decision, EndpointSpec, Policy

HELD = "held"
"""What the rehearsal would have kept waiting, and then dispatched."""


class Rehearsal(Controller):
    """A controller that holds nothing, and counts what it would have held or refused.

    Attributes:
        counts: by what would have happened ("dispatched", "held", or a refusal's outcome) and class.
    """

    def __init__(self, policy: Policy) -> None:
        """Rehearse `policy`, whether it has the queue on or off."""
        super().__init__(replace(policy, enable_queue=False))
        self.counts: dict[tuple[str, str], int] = {}
        self._stage = Controller(replace(policy, enable_queue=True))
        self._twins: dict[Ticket, Ticket] = {}

    def offer(self, ticket: Ticket, now: float) -> list[Decision]:
        """Offer for real, and to the rehearsal."""
        decisions = super().offer(ticket, now)
        if ticket.state is State.LEASED:
            twin = self._twins[ticket] = Ticket(ticket.request)
            self._count(self._stage.offer(twin, now))
        return decisions

    def release(
        self, ticket: Ticket, now: float, answer: Answer = Answer.UNKNOWN, output_tokens: int | None = None
    ) -> list[Decision]:
        """End a request, and its twin wherever that stands."""
        decisions = super().release(ticket, now, answer, output_tokens)
        twin = self._twins.pop(ticket, None)
        self._catch_up(now)
        if twin is not None and twin.state is State.WAITING:
            self._note(HELD, twin)
            self._count(self._stage.cancel(twin, now))
        elif twin is not None and twin.state is State.LEASED:
            self._count(self._stage.release(twin, now, answer, output_tokens))
        return decisions

    def first_token(self, ticket: Ticket, now: float) -> list[Decision]:
        """Note a first token in both."""
        twin = self._twins.get(ticket)
        if twin is not None:
            self._count(self._stage.first_token(twin, now))
        return super().first_token(ticket, now)

    def put_endpoint(self, spec: EndpointSpec, now: float) -> list[Decision]:
        """Add or change an endpoint in both."""
        self._count(self._stage.put_endpoint(spec, now))
        return super().put_endpoint(spec, now)

    def remove_endpoint(self, name: str, now: float) -> list[Decision]:
        """Remove an endpoint from both."""
        self._count(self._stage.remove_endpoint(name, now))
        return super().remove_endpoint(name, now)

    def set_up(self, name: str, now: float, *, is_up: bool) -> list[Decision]:
        """Note an endpoint's health in both."""
        self._count(self._stage.set_up(name, now, is_up=is_up))
        return super().set_up(name, now, is_up=is_up)

    def observe(self, name: str, load: Load, now: float) -> list[Decision]:
        """Follow telemetry in both."""
        self._count(self._stage.observe(name, load, now))
        return super().observe(name, load, now)

    def report(self, name: str, load: Load, now: float) -> list[Decision]:
        """Follow what an answer says of its endpoint's load in both."""
        self._count(self._stage.report(name, load, now))
        return super().report(name, load, now)

    def set_policy(self, policy: Policy, now: float) -> list[Decision]:
        """Replace the rules that are rehearsed."""
        self._count(self._stage.set_policy(replace(policy, enable_queue=True), now))
        return super().set_policy(replace(policy, enable_queue=False), now)

    def _catch_up(self, now: float) -> None:
        """Let the rehearsal's deadlines pass; nobody waits for them, so they need no timer."""
        due = self._stage.next_deadline()
        while due is not None and due <= now:
            self._count(self._stage.tick(due))
            following = self._stage.next_deadline()
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
