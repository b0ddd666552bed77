"""Endpoints that may be ill, and what a test does to them: ask, answer, refuse until one is left out."""

from __future__ import annotations

from extproc.admission.laws import LAWS
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request, RequestClass

from .audited import Audited

STEP_S = LAWS.health.step_s

REFUSALS = (Answer.FAILED, Answer.BROKE_OFF, Answer.ERROR, Answer.REFUSED, Answer.EMPTY, Answer.SATURATED)
CLIENTS_MAYBE = (Answer.ERROR, Answer.REFUSED, Answer.EMPTY)
"""What a request may be to blame for."""
MANY = 1000

BURST = 200
"""Three times what an endpoint takes here. Each event is checked against all who wait, so more is slow."""


class Ward(Audited):
    """Endpoints "a", "b", ... of one pool, that work as far as is known, unless `known` is False."""

    def __init__(self, names: str = "ab", limit: int = 64, *, known: bool = True, **policy: object) -> None:
        super().__init__(Policy(classes=(RequestClass("default", 0, 100.0),), shed=False, patience_s=100.0, **policy))
        for name in names:
            self.put(EndpointSpec(name, max_running_requests=limit))
            if known:
                self.set_up(name, is_up=True)

    def ask(self, name: str | None = None, model: str | None = None) -> Ticket:
        """A request, which a gateway lets go to one endpoint alone if named: no client led it there."""
        return self.offer(Request("r", self.now, model=model, allowed=None if name is None else frozenset((name,))))

    def answer(self, name: str, answer: Answer, count: int = 1) -> int:
        """Ask `name` one request after the other, and answer each so; stop where it gets none. Returns how many."""
        for number in range(count):
            ticket = self.ask(name)
            if ticket.state is not State.LEASED or ticket.endpoint.name != name:
                if ticket.state is State.WAITING:
                    self.cancel(ticket)
                else:
                    self.release(ticket)
                return number
            self.release(ticket, answer)
        return count

    def serve(self, name: str, count: int = 1) -> None:
        assert self.answer(name, Answer.OK, count) == count

    def burst(self, name: str, count: int = BURST) -> list[Ticket]:
        """Ask for so many at once; return those that went there."""
        tickets = [self.ask(name) for _ in range(count)]
        there = [t for t in tickets if t.state is State.LEASED and t.endpoint.name == name]
        for ticket in tickets:
            if ticket.state is State.WAITING:
                self.cancel(ticket)
        return there

    def is_ejected(self, name: str) -> bool:
        return self.health(name).ejected_until is not None

    def health(self, name: str):
        return self.core.endpoints[name].health

    def refuse_until_out(self, name: str, answer: Answer, peers: str = "b") -> int:
        """`name` refuses while `peers` serve; returns what that cost."""
        for cost in range(1, MANY):
            for peer in peers:
                self.serve(peer)
            for _ in range(MANY):
                if self.answer(name, answer):
                    break
                self.advance(STEP_S)
            if self.is_ejected(name):
                return cost
        raise AssertionError(f"{name} is never left out")


def out(ward: Ward, name: str = "a") -> None:
    ward.refuse_until_out(name, Answer.FAILED)
