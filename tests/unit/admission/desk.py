"""A desk: the audited core (`audited.py`) with its decisions remembered, and a few words for what tests ask of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Decision, Dispatch, EndpointSpec, Policy, Reject, Request, RequestClass

from .audited import Audited

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extproc.admission.controller import Controller
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.outcome import Outcome

GUESS = int(LAWS.tokens.answer)
STD = RequestClass("std", 0, 30.0)
URGENT = RequestClass("urgent", 10, 2.0)
BATCH = RequestClass("batch", -10, 60.0)
CLASSES = (STD, URGENT, BATCH)


class Desk(Audited):
    """An audited core that remembers its decisions."""

    def __init__(self, *specs: EndpointSpec, **policy: Any) -> None:
        super().__init__(Policy(**{"classes": CLASSES, "shed": False, **policy}))
        self.decided: dict[Ticket, Decision] = {}
        self.order: list[str] = []
        for spec in specs:
            self.put(spec)

    def put(self, *specs: EndpointSpec) -> None:
        """Bring endpoints that are known to work: test_health.py is about those that nobody knows."""
        new = [spec.name for spec in specs if spec.name not in self.books]
        super().put(*specs)
        for name in new:
            self.set_up(name, is_up=True)

    def _end(self, decisions: list[Decision], offered: Ticket | None = None) -> None:
        for decision in decisions:
            self.decided[decision.ticket] = decision
            if isinstance(decision, Dispatch):
                self.order.append(decision.ticket.request.id)
        super()._end(decisions, offered)

    def ask(self, name: str = "r", request_class: str = "std", **request: Any) -> Ticket:
        request.setdefault("arrived", self.now)
        return self.offer(Request(name, request_class=request_class, **request))

    def fill(self, count: int, **request: Any) -> list[Ticket]:
        return [self.ask(f"filler{number}", **request) for number in range(count)]

    def where(self, ticket: Ticket) -> str | None:
        decision = self.decided.get(ticket)
        return decision.endpoint if isinstance(decision, Dispatch) else None

    def outcome(self, ticket: Ticket) -> Outcome | None:
        decision = self.decided.get(ticket)
        return decision.outcome if decision is not None else None

    def retry_after(self, ticket: Ticket) -> int | None:
        decision = self.decided[ticket]
        assert isinstance(decision, Reject)
        return decision.retry_after_s

    def serve_one_by_one(self, first: Ticket) -> list[str]:
        """Release whoever holds the only slot until nobody waits; return who came in between, in order."""
        del self.order[:]
        self.release(first)
        while self.waiting:
            (holder,) = self.leased
            self.release(holder)
        return self.order

    def endpoint(self, name: str) -> Endpoint:
        return self.core.endpoints[name]


def one(name: str = "a", limit: int | None = 1, **spec: Any) -> EndpointSpec:
    return EndpointSpec(name, max_running_requests=limit, **spec)


def in_use(tickets: Iterable[Ticket]) -> list[bool]:
    return [ticket.state is State.LEASED for ticket in tickets]


def shared(*specs: Any, **policy: Any) -> Desk:
    """A desk whose pool has a second member, which is down: so nobody has a home, and all wait in one line."""
    desk = Desk(*specs, one("down"), **policy)
    desk.set_up("down", is_up=False)
    return desk


def elephants(desk: Desk, count: int = 1) -> list[Ticket]:
    """Leave room for small prompts only, and let `count` big ones wait."""
    desk.ask("held", prompt_tokens=4000)
    return [desk.ask(f"elephant{number}", prompt_tokens=6000) for number in range(count)]


def slow(seconds_per_token: float, **load: Any) -> Load:
    return Load(running=10.0, tokens_per_s=10.0 / seconds_per_token, **load)


def let_all_go(core: Controller, now: float, *, at_once: int) -> list[Decision]:
    """Switch the queue of a core off: after the first event some go in each, `at_once` at most; return how all went."""
    went = core.set_policy(replace(core.policy, enable_queue=False), now)
    while core.waiting:
        assert core.next_deadline() == now
        some = core.tick(now)
        assert 0 < len(some) <= at_once
        went += some
    return went
