"""Dry run: beside a core with the queue switched off, one with the queue on that decides the same requests for nobody.

It watches the real core: whatever happens there happens to the other one, its twin. One thing can't: answers end as
the engine gets to them, and it has all requests, also those that the twin holds or refuses, so each takes longer. What
an engine does is shown by all of its answers that end, so each pays for leases that the twin has there: as much as
would have ended with no more requests than these, which the times of the answers tell (`Slowdown`), and the oldest
lease ends first. Where more at once take no longer, that is nothing, and each lease lasts as long as its own answer.

So it is an estimate: what it can't know is in docs/existing-envoy.md.
"""

from __future__ import annotations

from dataclasses import replace
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import TYPE_CHECKING, Final

from extproc.admission.applying import apply
from extproc.admission.controller import Controller
from extproc.admission.events import (
    Adopted,
    Disowned,
    EndpointsRemoved,
    Moved,
    Observed,
    Offered,
    OfTicket,
    PolicySet,
    Released,
    Reported,
)
from extproc.admission.laws import LAWS
from extproc.admission.outcome import Outcome
from extproc.admission.slowdown import Slowdown
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Dispatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.events import Event
    from extproc.admission.load import Load
    from extproc.admission.values import Decision, Policy

HELD = "held"
"""What the queue would have kept waiting, and then dispatched."""
ANSWER_TOKENS: Final = 500
"""What every answer is taken to cost beside its prompt, in tokens of prompts: their own number isn't known before."""
_LAW: Final = replace(LAWS.answers, noise=0.3)
"""Lengths vary more; but here a mistake costs as much to the one side as to the other."""
ENOUGH: Final = 20
"""So many answers of an engine tell how much slower it is with more at once; until then each pays for its own lease."""
MOST_OWED: Final = 8
"""Leases that ended by their own answers before anybody had paid for them: so many are paid for later."""


class DryRun:
    """A watcher that counts what the queue would have held or refused.

    Attributes:
        counts: by what would have happened ("dispatched", "held", or a refusal's outcome) and class.
    """

    def __init__(self, policy: Policy, endpoints: Mapping[str, Endpoint]) -> None:
        """Rehearse `policy`, with the queue on, beside a core whose `endpoints` are these."""
        self.counts: dict[tuple[str, str], int] = {}
        self._endpoints = endpoints
        self._other = Controller(replace(policy, enable_queue=True))
        self._twins: dict[Ticket, Ticket] = {}  # of requests that are under way
        self._of: dict[Ticket, Ticket] = {}  # whose twin one is that waits or holds a lease
        self._engines: dict[str, _Engine] = {}
        self._ends: list[tuple[float, int, Ticket]] = []  # a heap: leases whose own answers are over
        self._numbers = count()
        self._at = -inf

    def happened(self, event: Event, decisions: Sequence[Decision]) -> None:  # noqa: C901 - a line or two for each event
        """Have the same happen to the other core: to a request's twin, if it has one there."""
        del decisions
        self._catch_up(event.at)
        self._at = event.at
        match event:
            case Offered(ticket=ticket) | Adopted(ticket=ticket):
                if ticket.state is State.LEASED:
                    twin = self._twins[ticket] = Ticket(ticket.request)
                    self._of[twin] = ticket
                    self._apply(replace(event, ticket=twin))
            case Released(ticket=ticket, answer=answer):
                self._end(ticket, answer)
            case Disowned(ticket=ticket):
                self._disown(ticket, event)
            case Moved(ticket=ticket) if ticket.state is State.DONE:  # to an endpoint that nobody knows
                self._end(ticket, Answer.FAILED)
            case OfTicket(ticket=ticket):
                follows = self._twins.get(ticket)
                if follows is not None and follows.state is State.LEASED:
                    self._apply(replace(event, ticket=follows))
            case PolicySet(policy=policy):
                self._apply(replace(event, policy=replace(policy, enable_queue=True)))
            case Observed(name=name, load=load) | Reported(name=name, load=load):
                self._apply(replace(event, load=self._seen(name, load)))
            case EndpointsRemoved():
                self._engines = {name: engine for name, engine in self._engines.items() if name in self._endpoints}
                self._apply(event)
            case _:
                self._apply(event)

    # ---- answers

    def _end(self, ticket: Ticket, answer: Answer) -> None:
        """Let a real answer be over: that of its twin's lease, and what its engine did meanwhile."""
        twin, endpoint, is_whole = self._twins.pop(ticket, None), ticket.endpoint, answer is Answer.OK
        assert endpoint is not None  # noqa: S101 - it held a lease
        engine, there = self._engine(endpoint.name), self._other.endpoints.get(endpoint.name)
        if is_whole:
            many = endpoint.sequences + ticket.sequences
            engine.learn(self._at - ticket.leased_at, (ticket.beside + many) / 2)
            if there is not None and engine.answers >= ENOUGH:
                engine.paid += _cost(ticket) * engine.speed(endpoint, there.sequences, many)
        if twin is not None and twin.state is State.WAITING:
            if not is_whole:  # its client left, or it failed: nobody waits for it any more
                self._note(HELD, twin)
                self._withdraw(twin)
        elif twin is not None and twin.state is State.LEASED:
            if is_whole:
                self._ends_with(twin, ticket)
                self._catch_up(self._at)
            else:
                self._over(twin, self._at, answer)
        if there is not None:
            self._pay(engine, there)

    def _pay(self, engine: _Engine, there: Endpoint) -> None:
        """End the oldest leases that are paid for."""
        while there.leases:
            oldest = next(iter(there.leases))
            if engine.paid < _cost(self._of.get(oldest, oldest)):
                return
            self._over(oldest, self._at, Answer.OK)
        engine.paid = min(engine.paid, 0.0)  # an engine with nothing to do saves nothing up

    def _disown(self, ticket: Ticket, event: Disowned) -> None:
        twin = self._twins.pop(ticket, None)
        if twin is not None and twin.state is State.WAITING:
            self._withdraw(twin)
        elif twin is not None and twin.state is State.LEASED:
            self._of.pop(twin, None)
            self._apply(replace(event, ticket=twin))

    def _ends_with(self, twin: Ticket, ticket: Ticket) -> None:
        """Let the lease of `twin` last as long as its answer did."""
        heappush(self._ends, (twin.leased_at + ticket.ended_at - ticket.leased_at, next(self._numbers), twin))

    def _over(self, twin: Ticket, now: float, answer: Answer) -> None:
        endpoint, ticket = twin.endpoint, self._of.pop(twin, twin)
        if endpoint is not None and answer is Answer.OK:
            engine, cost = self._engine(endpoint.name), _cost(ticket)
            engine.paid = max(engine.paid - cost, -MOST_OWED * cost)
        self._count(self._other.release(twin, now, answer))

    def _engine(self, name: str) -> _Engine:
        if name not in self._engines:
            self._engines[name] = _Engine()
        return self._engines[name]

    def _seen(self, name: str, load: Load) -> Load:
        """Return what an endpoint would say of its load if it had the twin's leases only.

        How many prompts it would have computed nobody can tell: so the limit of prompts is not rehearsed.
        """
        load = replace(load, first_tokens=None, cached_tokens=None)
        endpoint, there = self._endpoints.get(name), self._other.endpoints.get(name)
        if endpoint is None or there is None or there.sequences >= endpoint.sequences:
            return load
        return _with_fewer(load, there.sequences / endpoint.sequences, self._engine(name).slowdown)

    # ---- the other core

    def _apply(self, event: Event) -> None:
        self._count(apply(self._other, event))

    def _withdraw(self, twin: Ticket) -> None:
        self._of.pop(twin, None)
        self._count(self._other.withdraw(twin, self._at))

    def _catch_up(self, now: float) -> None:
        """Let ends and deadlines of the other core pass; nobody waits for them, so they need no timer."""
        ticked = -inf
        while True:
            while self._ends and self._ends[0][2].state is not State.LEASED:
                heappop(self._ends)
            end, due = self._ends[0][0] if self._ends else inf, self._other.next_deadline()
            if end <= now and (due is None or end <= due):
                self._at = max(self._at, end)
                self._over(heappop(self._ends)[2], self._at, Answer.OK)
            elif due is not None and ticked < due <= now:
                self._at = ticked = due
                self._count(self._other.tick(due))
            else:
                return

    def _count(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            twin = decision.ticket
            if isinstance(decision, Dispatch):
                self._note(HELD if twin.alarm > 0 else _name(decision.outcome), twin)
                ticket = self._of.get(twin)
                if ticket is not None and ticket.state is State.DONE:  # it waited here, and was answered meanwhile
                    self._ends_with(twin, ticket)
            else:
                self._of.pop(twin, None)
                self._note(_name(decision.outcome), twin)

    def _note(self, what: str, ticket: Ticket) -> None:
        key = (what, ticket.request_class.name)
        self.counts[key] = self.counts.get(key, 0) + 1


class _Engine:
    """What one engine's answers show.

    Attributes:
        slowdown: how much longer they take beside more others.
        answers: how many were seen.
        paid: what they paid for the twin's leases there and was not used yet, in tokens.
    """

    __slots__ = ("answers", "paid", "slowdown")

    def __init__(self) -> None:
        self.slowdown = Slowdown(_LAW)
        self.answers = 0
        self.paid = 0.0

    def learn(self, took_s: float, beside: float) -> None:
        """Follow an answer that took so long beside so many."""
        self.answers += 1
        self.slowdown.learn(took_s, beside)

    def speed(self, endpoint: Endpoint, few: float, many: float) -> float:
        """Return what it would do with `few` requests, as a share of what it does with `many`.

        Those that its page says wait inside it make no difference to that.
        """
        page = endpoint.reading.page
        if page is not None and page.running and page.waiting:
            many = min(many, page.running)
        return self.slowdown.speed(few, many)


def _cost(ticket: Ticket) -> float:
    return ticket.prompt_tokens + ANSWER_TOKENS * ticket.sequences


def _with_fewer(load: Load, share: float, slowdown: Slowdown) -> Load:
    """Return what an engine would say with a share of its requests."""
    running, waiting = load.running, load.waiting
    there = ((running or 0.0) + (waiting or 0.0)) * share
    runs = min(there, running) if running is not None else 0.0
    part = runs / running if running else share
    pace = slowdown.speed(runs, running) if running else share
    return replace(
        load,
        running=None if running is None else runs,
        waiting=None if waiting is None else there - runs,
        kv_usage=None if load.kv_usage is None else load.kv_usage * part,
        tokens_per_s=None if load.tokens_per_s is None else load.tokens_per_s * pace,
        prompt_tokens=None if load.prompt_tokens is None else round(load.prompt_tokens * pace),
        output_tokens=None if load.output_tokens is None else round(load.output_tokens * pace),
        preemptions=None if load.preemptions is None else 0,
    )


def _name(outcome: Outcome) -> str:
    return str(Outcome.DISPATCHED.value if outcome is Outcome.REROUTED else outcome.value)
