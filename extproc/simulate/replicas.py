"""Several sidecars as one front: real cores, gates and replicas on the simulation's clock, with a network and a store.

Arrivals go to the sidecars in turn. A fault comes at FAULT_AT_S and lasts FAULT_S: what a sidecar's Envoy holds while
its sidecar is dead is offered again to the next life, what runs goes on, what a stopped one is told it hears when it
goes on, and what is sent to one that is cut off arrives when it is back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from extproc.admission.controller import Controller
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Dispatch, EndpointSpec, Request
from extproc.replicas.gate import SharedGate
from extproc.replicas.messages import Member
from extproc.replicas.picture import Role
from extproc.replicas.replica import Replica
from extproc.simulate.fronts import Verdict
from extproc.simulate.network import Clock, End, Loop, dial

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.admission.load import Load
    from extproc.admission.values import Decision
    from extproc.replicas.messages import Link, Message
    from extproc.simulate.contenders import Setting
    from extproc.simulate.fronts import Group, Job
    from extproc.simulate.network import Timer

FAULTS = ("none", "leader-killed", "leader-hangs", "one-cut-off", "one-unseen", "halves", "each-alone", "store-gone")
FAULT_AT_S = 60.0
FAULT_S = 20.0
RESTART_S = 3.0
"""How long a sidecar that was killed is gone."""
STORE_S = 1.0
DELAY_S = 0.001
"""From one sidecar to another."""


@dataclass(eq=False)
class _Place:
    """An Envoy, and the sidecar that it has now."""

    number: int
    sidecar: _Sidecar
    life: int = 0


class _Sidecar:
    """One life of a sidecar."""

    def __init__(self, pool: Several, place: int, life: int) -> None:
        self.pool = pool
        self.place = place
        self.is_dead = False
        self.is_stopped = False
        self._later: list[Callable[[], None]] = []
        self.tickets: dict[Job, Ticket] = {}
        self.gate = SharedGate(Controller(pool.setting.policy), Loop(pool.clock, self))
        me = Member(f"{place}.{life}", str(place), life * 1000 + place)
        self.replica = Replica(self.gate, me, "simulated", self, Loop(pool.clock, self))
        self.gate.watch()
        for spec in pool.specs:
            self.gate.put_endpoint(spec)

    def start(self) -> None:
        self._ask_store()
        self.replica.begin(lambda _: None)

    def take(self, timer: Timer) -> None:
        self.do(timer.run)

    def do(self, what: Callable[[], None]) -> None:
        if self.is_stopped:
            self._later.append(what)
        elif not self.is_dead:
            what()

    def resume(self) -> None:
        self.is_stopped = False
        later, self._later = self._later, []
        for what in later:
            self.do(what)

    def _ask_store(self) -> None:
        pool = self.pool
        if pool.store_is_up and self.place not in pool.unseen:
            self.replica.store_says([one.replica.me for one in pool.in_store()])
        pool.clock.at(pool.clock.now + STORE_S, self._ask_store, self)

    def dial(self, address: str, receive: Callable[[Message], None], closed: Callable[[], None]) -> Link:
        here, there = dial(self.pool.carry, self, self.pool.places[int(address)].sidecar, receive, closed)
        self.pool.ends += [here, there]
        return here

    def offer(self, job: Job, request: Request) -> None:
        ticket = self.tickets[job] = Ticket(request, partial(self._decided, job))
        self.do(partial(self.gate.offer, ticket))

    def _decided(self, job: Job, decision: Decision) -> None:
        if job in self.tickets:
            self.pool.decided(job, decision)
            if not isinstance(decision, Dispatch):
                self.close(job, Answer.UNKNOWN)

    def close(self, job: Job, answer: Answer) -> None:
        ticket = self.tickets.pop(job, None)
        if ticket is not None:
            self.do(partial(self.gate.close, ticket, answer))


class Several:
    """A front of so many sidecars."""

    def __init__(self, groups: Sequence[Group], setting: Setting) -> None:
        """Start `setting.replicas` of them before the engines of `groups`."""
        self.setting = setting
        self.clock = Clock()
        self.store_is_up = True
        self.unseen: set[int] = set()  # by the store
        self.ends: list[End[_Sidecar]] = []
        self._cuts: set[frozenset[int]] = set()
        models = [frozenset(group.models) for group in groups for _ in range(group.engines)]
        self._names = [f"engine-{number}" for number in range(len(models))]
        self._index = {name: number for number, name in enumerate(self._names)}
        self.specs = [
            EndpointSpec(
                name,
                models=served,
                max_running_requests=setting.max_running_requests,
                kv_capacity_tokens=setting.kv_capacity_tokens,
            )
            for name, served in zip(self._names, models, strict=True)
        ]
        self._verdicts: list[Verdict] = []
        self._requests: dict[Job, Request] = {}
        self._count = 0
        self.places: list[_Place] = []
        for number in range(setting.replicas):
            self.places.append(_Place(number, _Sidecar(self, number, 0)))
        for place in self.places:
            place.sidecar.start()
        if setting.replicas_fault != "none":
            self.clock.at(FAULT_AT_S, self._harm)

    def in_store(self) -> list[_Sidecar]:
        """Return those that the store lists."""
        seen = [place.sidecar for place in self.places if place.number not in self.unseen]
        return [sidecar for sidecar in seen if not sidecar.is_dead and not sidecar.is_stopped]

    def carry(self, end: End[_Sidecar], arrive: Callable[[], None]) -> None:
        """Bring something to the other end of a stream, unless nothing gets from one of the two to the other."""
        one, other = end.owner, end.peer.owner
        if end.queued or frozenset((one.place, other.place)) in self._cuts:
            end.queued.append(arrive)
        else:
            self.clock.at(self.clock.now + DELAY_S, arrive, other)

    def decided(self, job: Job, decision: Decision) -> None:
        """Note a decision for the simulation."""
        engine = self._index[decision.endpoint] if isinstance(decision, Dispatch) else None
        self._verdicts.append(Verdict(job, engine, decision.outcome.value))

    # ---- as any front

    def arrive(self, job: Job, now: float) -> list[Verdict]:
        """Offer it at the next sidecar."""
        self.clock.advance(now)
        demand = job.demand
        self._requests[job] = request = Request(
            id=str(job.number),
            arrived=now,
            model=demand.model,
            request_class=demand.klass.name,
            tenant=demand.tenant,
            session=demand.session if self.setting.session_homes and demand.names_session else None,
            prompt_tokens=demand.estimate,
        )
        self._place_of(job).offer(job, request)
        return self._taken()

    def leave(self, job: Job, now: float) -> list[Verdict]:
        """Cancel it."""
        return self.end(job, now, Answer.UNKNOWN)

    def end(self, job: Job, now: float, answer: Answer) -> list[Verdict]:
        """Give the lease back."""
        self.clock.advance(now)
        self._place_of(job).close(job, answer)
        del self._requests[job]
        return self._taken()

    def first_token(self, job: Job, now: float) -> list[Verdict]:
        """Tell its sidecar that the answer began."""
        self.clock.advance(now)
        sidecar = self._place_of(job)
        ticket = sidecar.tickets.get(job)
        if ticket is not None and not sidecar.is_dead:
            sidecar.do(partial(sidecar.gate.answered, ticket))
        return self._taken()

    def observe(self, engine: int, load: Load, now: float) -> list[Verdict]:
        """Show a page to whoever leads."""
        self.clock.advance(now)
        for place in self.places:
            sidecar = place.sidecar
            if sidecar.replica.role is Role.LEADING and not sidecar.is_stopped:
                sidecar.do(partial(sidecar.gate.observe, self._names[engine], load))
        return self._taken()

    def set_up(self, engine: int, now: float, *, is_up: bool) -> list[Verdict]:  # noqa: ARG002
        """There are no active health checks: failures tell."""
        return []

    def tick(self, now: float) -> list[Verdict]:
        """Let what is due happen."""
        self.clock.advance(now)
        return self._taken()

    def next_deadline(self) -> float | None:
        """Return when something is due, while there is anything to decide."""
        return self.clock.next() if self._requests else None

    def _place_of(self, job: Job) -> _Sidecar:
        return self.places[job.number % len(self.places)].sidecar

    def _taken(self) -> list[Verdict]:
        verdicts, self._verdicts = self._verdicts, []
        for verdict in verdicts:
            if verdict.engine is None:
                self._requests.pop(verdict.job, None)
        return verdicts

    # ---- faults

    def _harm(self) -> None:
        leader = next((place for place in self.places if place.sidecar.replica.role is Role.LEADING), self.places[0])
        numbers = [place.number for place in self.places]
        match self.setting.replicas_fault:
            case "leader-killed":
                self._kill(leader)
                return
            case "leader-hangs":
                leader.sidecar.is_stopped = True
            case "one-cut-off" | "one-unseen":
                self._cuts = {frozenset((numbers[-1], other)) for other in numbers[:-1]}
                if self.setting.replicas_fault == "one-unseen":
                    self.unseen.add(numbers[-1])
            case "halves":
                half = len(numbers) // 2
                self._cuts = {frozenset((one, other)) for one in numbers[:half] for other in numbers[half:]}
            case "each-alone":
                self._cuts = {frozenset((one, other)) for one in numbers for other in numbers if one != other}
            case "store-gone":
                self.store_is_up = False
        self.clock.at(self.clock.now + FAULT_S, partial(self._mend, leader))

    def _mend(self, leader: _Place) -> None:
        self._cuts.clear()
        self.unseen.clear()
        self.store_is_up = True
        if leader.sidecar.is_stopped:
            leader.sidecar.resume()
        for end in self.ends:
            end.go_on()
        self.ends.clear()

    def _kill(self, place: _Place) -> None:
        dead = place.sidecar
        dead.is_dead = True
        for end in self.ends:
            if end.owner is dead and not end.is_over:
                end.break_off()
        self.clock.at(self.clock.now + RESTART_S, partial(self._restart, place))

    def _restart(self, place: _Place) -> None:
        dead, place.life = place.sidecar, place.life + 1
        place.sidecar = _Sidecar(self, place.number, place.life)
        place.sidecar.start()
        for job, ticket in dead.tickets.items():
            if job in self._requests and ticket.state in (State.NEW, State.WAITING):
                place.sidecar.offer(job, self._requests[job])
