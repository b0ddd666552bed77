"""The core against a slow reference where requests differ: models, a gateway's few, sizes, caches, quotas, sidecars.

`test_reference.py` is the page to read first. Here, too, all that waits is looked at after every event: of the
endpoints for which somebody fits, the emptiest gets the first in order, until nobody fits anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import pytest

from extproc.admission.controller import Controller
from extproc.admission.laws import LAWS
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Dispatch, EndpointSpec, Policy, Request, RequestClass

if TYPE_CHECKING:
    from extproc.admission.values import Decision

GUARD = LAWS.guard.passes

CLASSES = (RequestClass("std", 0, 4.0), RequestClass("int", 1, 2.0), RequestClass("batch", -1, 9.0))
BY_NAME = {klass.name: klass for klass in CLASSES}
SPECS = {
    "a": EndpointSpec("a", models=frozenset("m"), max_running_requests=2),
    "b": EndpointSpec("b", models=frozenset("mn"), max_running_requests=3, kv_capacity_tokens=3000),
    "c": EndpointSpec("c", models=frozenset("n"), max_running_requests=1),
}
MANY = SPECS | {
    name: EndpointSpec(name, models=frozenset("m"), max_running_requests=1 + number % 2, kv_capacity_tokens=size)
    for number, (name, size) in enumerate((f"d{number}", (None, 2500)[number % 2]) for number in range(12))
}
"""So many that the dispatch pass drops those of them first that suit nobody."""
PATIENCE_S = 1.0

Told = tuple[str, str, str | None, float]
"""Of a decision: whose, what, where, after which wait."""


@dataclass
class Held:
    """One request of the reference."""

    request: Request
    order: tuple[int, int]
    until: float
    home: str | None = None
    patient_until: float = 0.0
    at: str = ""
    passed: int = 0

    @property
    def tokens(self) -> int:
        output = min(int(LAWS.tokens.answer), self.request.max_output_tokens or int(LAWS.tokens.answer))
        return self.request.prompt_tokens + output * self.request.sequences


@dataclass
class Server:
    """One endpoint of the reference."""

    spec: EndpointSpec
    picked: int
    is_up: bool = True
    is_there: bool = True
    quota: int | None = None
    holds: list[Held] = field(default_factory=list)

    @property
    def is_usable(self) -> bool:
        return self.is_up and self.is_there

    @property
    def is_known(self) -> bool:
        return self.is_there or bool(self.holds)

    def serves(self, request: Request) -> bool:
        return request.model in self.spec.models and (request.allowed is None or self.spec.name in request.allowed)

    @property
    def sequences(self) -> int:
        return sum(held.request.sequences for held in self.holds)

    @property
    def room(self) -> float:
        return LAWS.kv.share * (self.spec.kv_capacity_tokens or 0)

    @property
    def crowding(self) -> tuple[float, int]:
        booked = sum(held.tokens for held in self.holds)
        full = booked / self.room if self.spec.kv_capacity_tokens else 0.0
        return (max(self.sequences / self.spec.max_running_requests, full), self.picked)

    def fits(self, held: Held) -> bool:
        sequences, more, most = self.sequences, held.request.sequences, self.spec.max_running_requests
        if not self.is_usable or sequences >= (most if self.quota is None else min(most, self.quota)):
            return False
        if not self.holds:
            return True
        if more > 1 and sequences + more > (most if self.quota is None else min(most, self.quota)):
            return False
        booked = sum(one.tokens for one in self.holds)
        return not self.spec.kv_capacity_tokens or booked + held.tokens <= self.room


class Reference:
    """Lists, and nothing kept but what is."""

    def __init__(self, most: int, specs: dict[str, EndpointSpec]) -> None:
        self.most, self.now, self.picks = most, 0.0, 0
        self.servers = {name: Server(spec, 0) for name, spec in specs.items()}
        self.waiting: list[Held] = []
        self.told: list[Told] = []

    def serving(self, request: Request) -> list[Server]:
        """All who may ever have it, up or not."""
        return [one for one in self.servers.values() if one.is_there and one.serves(request)]

    def offer(self, number: int, request: Request) -> None:
        klass = BY_NAME[request.request_class]
        budget_s = klass.budget_s if request.budget_s is None else min(klass.budget_s, request.budget_s)
        held = Held(request, (-klass.priority, number), request.arrived + budget_s)
        members = self.serving(request)
        if request.allowed is not None and not members and not self.may_come(request):
            self.told.append((request.id, "none_allowed", None, 0.0))
            return
        names = [one.spec.name for one in members]
        held.home = request.home if request.home in names else names[0] if len(names) == 1 else None
        if held.home is not None and self.servers[held.home].is_up:
            held.patient_until = self.now + min(PATIENCE_S, (held.until - self.now) / 2)
        self.waiting.append(held)
        if held.home is not None and self.servers[held.home].fits(held):
            self.lease(held, self.servers[held.home])  # even if it had no time to wait for it
        self.assign()
        if held in self.waiting and self.now >= held.until:
            self.expire(held)
        elif held in self.waiting and len(self.waiting) > self.most:
            self.end(max(self.waiting, key=lambda one: one.order), "queue_full")
            self.assign()

    def may_come(self, request: Request) -> bool:
        """Whether one of those allowed is there, while nobody serves its model."""
        there = {name for name, one in self.servers.items() if one.is_there}
        served = any(request.model in self.servers[name].spec.models for name in there)
        return not served and bool(there & request.allowed)

    def assign(self) -> None:
        self.waiting.sort(key=lambda held: held.order)
        for held in self.waiting:
            if held.patient_until > self.now and not self.servers[held.home].is_usable:
                held.patient_until = self.now
        while pair := self.next_pair():
            self.lease(*pair)

    def next_pair(self) -> tuple[Held, Server] | None:
        for server in sorted(self.servers.values(), key=lambda one: one.crowding):
            for held in self.waiting:
                is_for_it = self.now >= held.patient_until or held.home == server.spec.name
                if is_for_it and server in self.serving(held.request) and server.fits(held):
                    return held, server
        return None

    def lease(self, held: Held, server: Server) -> None:
        for other in self.waiting:
            other.passed += other.order < held.order
        self.picks += 1
        server.picked = self.picks
        self.end(held, "rerouted" if held.home not in (None, server.spec.name) else "dispatched", server.spec.name)
        held.at = server.spec.name
        server.holds.append(held)

    def end(self, held: Held, what: str, where: str | None = None) -> None:
        self.waiting.remove(held)
        self.told.append((held.request.id, what, where, max(self.now - held.request.arrived, 0.0)))

    def expire(self, held: Held) -> None:
        up = any(one.is_up for one in self.serving(held.request))
        self.end(held, "budget_expired" if up else "no_endpoint")

    def until(self, then: float) -> None:
        while dues := [at for one in self.waiting for at in (one.patient_until, one.until) if self.now < at <= then]:
            self.now = min(dues)
            for held in sorted(self.waiting, key=lambda one: one.order[1]):
                if held.until <= self.now:
                    self.expire(held)
            self.assign()
        self.now = then


class Both:
    """The reference and the core, side by side: each method is one event for both."""

    def __init__(self, most: int, specs: dict[str, EndpointSpec]) -> None:
        self.model, self.now, self.number = Reference(most, specs), 0.0, 0
        self.core = Controller(
            Policy(classes=CLASSES, patience_s=PATIENCE_S, shed=False, fair=False, max_queued_requests=most)
        )
        self.tickets: dict[str, Ticket] = {}
        self.told: list[Told] = []
        for name, spec in specs.items():
            self.put(name, spec)
            self.offer("std", min(spec.models), home=name)  # one pick each: no two are equal then
            self.release(0)

    def note(self, decisions: list[Decision]) -> None:
        for one in decisions:
            where = one.endpoint if isinstance(one, Dispatch) else None
            self.told.append((one.ticket.request.id, one.outcome.value, where, one.wait_s))

    def offer(self, klass: str, model: str, age_s: float = 0.0, home: str | None = None, **says: object) -> None:
        self.number += 1
        if home is not None and not self.model.servers[home].is_there:
            home = None  # one that leaves with leases is still somebody's home, by name
        request = Request(str(self.number), self.now - age_s, model, klass, home=home, **says)
        ticket = self.tickets[request.id] = Ticket(request)
        self.model.offer(self.number, request)
        self.note(self.core.offer(ticket, self.now))

    def held(self) -> list[Held]:
        return [held for server in self.model.servers.values() for held in server.holds]

    def _let_go(self, number: int) -> Ticket | None:
        if not self.held():
            return None
        held = self.held()[number % len(self.held())]
        self.model.servers[held.at].holds.remove(held)
        self.model.assign()
        return self.tickets[held.request.id]

    def release(self, number: int) -> None:
        if ticket := self._let_go(number):
            self.note(self.core.release(ticket, self.now))

    def disown(self, number: int) -> None:
        if ticket := self._let_go(number):
            self.note(self.core.disown(ticket, self.now))

    def _leave(self, number: int) -> Ticket | None:
        if not self.model.waiting:
            return None
        held = self.model.waiting.pop(number % len(self.model.waiting))
        self.model.assign()
        return self.tickets[held.request.id]

    def cancel(self, number: int) -> None:
        if ticket := self._leave(number):
            self.note(self.core.cancel(ticket, self.now))

    def withdraw(self, number: int) -> None:
        if ticket := self._leave(number):
            self.note(self.core.withdraw(ticket, self.now))
            assert ticket.state is State.NEW

    def adopt(self, name: str, tokens: int) -> None:
        self.number += 1
        request = Request(str(self.number), self.now, min(self.model.servers[name].spec.models), prompt_tokens=tokens)
        ticket = self.tickets[request.id] = Ticket(request)
        if self.model.servers[name].is_known:
            self.model.servers[name].holds.append(Held(request, (0, self.number), self.now, at=name))
        self.note(self.core.adopt(ticket, name, self.now))
        assert (ticket.state is State.LEASED) is self.model.servers[name].is_known

    def turn(self, name: str) -> None:
        server = self.model.servers[name]
        if server.is_there:
            server.is_up = not server.is_up
            self.model.assign()
            self.note(self.core.set_up(name, self.now, is_up=server.is_up))

    def quota(self, name: str, quota: int | None) -> None:
        if self.model.servers[name].is_there:
            self.model.servers[name].quota = quota
            self.model.assign()
            self.note(self.core.set_quota(name, quota, self.now))

    def put(self, name: str, spec: EndpointSpec) -> None:
        """Change an endpoint, or bring it: one that has left without leases is another, and nobody has picked it."""
        server = self.model.servers[name]
        is_new = name not in self.core.endpoints
        if is_new:
            server.quota, server.picked, server.is_up = None, 0, True
        server.spec, server.is_there = spec, True
        self.note(self.core.put_endpoint(spec, self.now))
        if is_new:
            self.note(self.core.set_up(name, self.now, is_up=True))
        self.model.assign()

    def remove(self) -> None:
        self.model.servers["a"].is_there = False
        self.model.assign()
        self.note(self.core.remove_endpoints(["a"], self.now))

    def wait(self, seconds: float) -> None:
        then = self.now + seconds
        self.model.until(then)
        while (due := self.core.next_deadline()) is not None and due <= then:
            decisions = self.core.tick(due)
            ended = [one for one in decisions if not isinstance(one, Dispatch)]  # before anybody goes, in any order
            self.note(sorted(ended, key=lambda one: int(one.ticket.request.id)) + decisions[len(ended) :])
        self.now = then

    def check(self, when: object) -> None:
        """Both told the same, the same wait, and each endpoint holds the same."""
        assert self.told == self.model.told, when
        waiting = [name for name, ticket in self.tickets.items() if ticket.state is State.WAITING]
        assert sorted(waiting) == sorted(held.request.id for held in self.model.waiting)
        assert self.core.waiting == len(waiting)
        for name, server in self.model.servers.items():
            if name in self.core.endpoints:
                endpoint = self.core.endpoints[name]
                assert [t.request.id for t in endpoint.leases] == [held.request.id for held in server.holds]
                assert endpoint.sequences == server.sequences
                assert endpoint.crowding == server.crowding or endpoint.closed_by is not None
            else:
                assert not server.holds


ALLOWED = (None, None, None, None, *map(frozenset, ("a", "b", "ab", "bc", "c", "abc")))


def happen(both: Both, random: Random, what: str) -> None:  # noqa: C901 - one case for each event
    """Let one event happen, with whatever it says."""
    pick, number, names = random.choice, random.randrange(21), tuple(both.model.servers)
    name = pick(names)
    match what:
        case "offer":
            both.offer(
                pick(sorted(BY_NAME)),
                pick("mmn"),
                age_s=pick((0.0, 0.0, 0.0, 0.25)),
                home=pick((None, "d0", "d1", name) if "d0" in names else (None, None, *names)),
                budget_s=pick((None, None, None, 0.0, 0.5)),
                prompt_tokens=pick((0, 50, 500, 1500, 2700)),
                max_output_tokens=pick((None, None, 1, 100)),
                sequences=pick((1, 1, 1, 2, 3)),
                allowed=pick(ALLOWED),
            )
        case "release" | "disown" | "cancel" | "withdraw":
            getattr(both, what)(number)
        case "adopt":
            both.adopt(name, pick((10, 1000)))
        case "wait":
            both.wait(pick((0.0, 0.125, 0.5, 1.0, 3.0)))
        case "turn":
            both.turn(name)
        case "quota":
            both.quota(name, pick((None, None, 0, 1, 2)))
        case "change":
            if both.model.servers[name].is_there:
                size = pick((None, 2500, 5000))
                both.put(name, EndpointSpec(name, "", MANY[name].models, random.randint(1, 3), size))
        case "remove":
            both.remove()
        case "return":
            both.put("a", SPECS["a"])


@pytest.mark.parametrize(
    ("most", "specs", "seeds"),
    [(3, SPECS, 40), (1000, SPECS, 40), (1000, MANY, 12)],
    ids=["a short queue", "a long one", "many endpoints"],
)
def test_the_core_decides_what_a_slow_walk_over_all_decides(
    most: int, specs: dict[str, EndpointSpec], seeds: int
) -> None:
    seen = set()
    for seed in range(seeds):
        random, both = Random(seed), Both(most, specs)
        offers = random.randint(4, 10)
        calm = {"offer": offers, "release": random.randint(3, 8), "cancel": 1, "wait": 2}
        churn = {"disown": 1, "withdraw": 1, "adopt": 1, "turn": 1, "quota": 1, "change": 1, "remove": 1, "return": 2}
        if specs is MANY:  # who waits at home for few goes anywhere when their pool is made anew: no list knows that
            churn |= {"remove": 0, "return": 0}
        weather = calm | (churn if seed % 2 else {"return": 0})
        for what in random.choices(list(weather), list(weather.values()), k=150):
            happen(both, random, what)
            if any(held.passed >= GUARD for held in both.model.waiting):
                break  # from here on room is kept: test_first_fit.py
            both.check((seed, what))
        seen |= {what for _, what, *_ in both.told}
    ends = {"dispatched", "rerouted", "budget_expired", "no_endpoint", "none_allowed"}
    assert seen == ends | ({"queue_full"} if most < 1000 else set()), "all of it came by"
