"""A sidecar with its Envoy, the engines behind it and the store beside it: each through what the clock brings."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from extproc.admission.load import Load
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, Decision, Dispatch, Request
from extproc.replicas.gate import SharedGate
from extproc.replicas.messages import LAST, Member
from extproc.replicas.picture import Role
from extproc.replicas.replica import Replica
from extproc.simulate.network import End, Loop, Timer

if TYPE_CHECKING:
    from collections.abc import Callable

    from .site import Site

from .network import Dialer

SCRAPE_S = 1.0


@dataclass(eq=False)
class Client:
    """One request of the site, through all lives of its sidecar."""

    number: int
    request: Request
    place: str
    work_s: float
    dispatches: int = 0
    outcomes: list[str] = field(default_factory=list)
    gone: bool = False
    running: bool = False


@dataclass(eq=False)
class Engine:
    """The truth about one engine."""

    name: str
    limit: int
    adapter: str | None = None  # has the only slot: requests for others wait
    holds: dict[Client, None] = field(default_factory=dict)
    peak: int = 0
    peak_over: int = 0

    def page(self) -> Load:
        if self.adapter is None:
            return Load(running=float(len(self.holds)), waiting=0.0)
        models = [client.request.model for client in self.holds]
        running, waits = models.count(self.adapter), {model for model in models if model not in (None, self.adapter)}
        return Load(
            running=float(running),
            waiting=float(len(models) - running),
            adapters=(self.adapter,),
            waiting_adapters=tuple(str(model) for model in waits),
            adapter_slots=1,
        )


class Sidecar:
    """One place for a sidecar, with its Envoy, through one life."""

    def __init__(self, site: Site, place: str, life: int) -> None:
        self.site = site
        self.place = place
        self.life = life
        self.is_dead = False
        self.is_stopped = False
        self.later: list[tuple[End[Sidecar] | None, Timer]] = []
        self.tickets: dict[Client, Ticket] = {}
        self.loop = _Loop(site, self)
        self._policy = site.policy
        self.controller = site.core(site.policy)
        self.gate = SharedGate(self.controller, self.loop)
        me = Member(f"{place}.{life}", place, LAST - 1)
        network = Dialer(site.net, self)
        self.replica = Replica(self.gate, me, "pool", network, self.loop, store_beat_s=site.store.beat_s)
        self.gate.watch()
        self._reads = 0
        self.losses = 0

    def start(self) -> None:
        self.load()
        self._ask_store()
        self.replica.begin(self._turned, self._lost_one)

    def load(self) -> None:
        """Follow the configuration as it is now, and what health checks say."""
        site, gate = self.site, self.gate
        if self._policy is not site.policy:
            self._policy = site.policy
            gate.set_policy(site.policy)
        gate.remove_endpoints(set(self.controller.endpoints) - set(site.specs))
        gate.put_endpoints(site.specs.values())
        for name in site.specs:
            gate.set_up(name, is_up=name not in site.down)

    def _turned(self, role: Role) -> None:
        self._reads += 1
        if role is Role.LEADING:
            for name in self.site.engines:
                self._scrape(name, self._reads)

    def _lost_one(self) -> None:
        self.losses += 1

    def _scrape(self, name: str, reads: int) -> None:
        if reads == self._reads:
            site = self.site
            engine = site.engines[name]
            load = engine.page()
            takes_s = site.random.uniform(*site.page_s)
            self.loop.call_at(site.clock.now + takes_s, partial(self._read, name, load, reads, site.clock.now))

    def _read(self, name: str, load: Load, reads: int, asked_at: float) -> None:
        if reads == self._reads:
            if self.place not in self.site.blind:
                self.gate.observe(name, load, asked_at)
            self.loop.call_at(self.site.clock.now + SCRAPE_S, partial(self._scrape, name, reads))

    def _ask_store(self) -> None:
        self.site.store.ask(self)
        self.loop.call_at(self.site.clock.now + self.site.store.beat_s, self._ask_store)

    # ---- its Envoy

    def offer(self, client: Client) -> None:
        ticket = Ticket(client.request, partial(self._decided, client))
        self.tickets[client] = ticket
        self.do(partial(self.gate.offer, ticket))

    def do(self, what: Callable[[], None]) -> None:
        """Have something happen here: at once, or when it goes on."""
        self.take(Timer(what))

    def take(self, timer: Timer) -> None:
        if self.is_stopped:
            self.later.append((None, timer))
        elif not self.is_dead:
            timer.run()

    def close(self, client: Client, answer: Answer = Answer.UNKNOWN) -> None:
        ticket = self.tickets.pop(client, None)
        if ticket is not None:
            self.do(partial(self.gate.close, ticket, answer))

    def _decided(self, client: Client, decision: Decision) -> None:
        if client.gone or client not in self.tickets:
            return
        client.outcomes.append(decision.outcome.value)
        if isinstance(decision, Dispatch):
            self.site.dispatch(client, decision.endpoint)
        else:
            self.close(client)

    def __repr__(self) -> str:
        state = "dead" if self.is_dead else "stopped" if self.is_stopped else self.replica.role.value
        picture = self.replica.picture()
        group = f"{picture.group}/{picture.members}"
        return f"<{self.place}.{self.life} {state} {group} waiting={self.gate.waiting} {self.controller}>"


class _Loop(Loop):
    """Its loop, with other work: what is left for the next turn comes a little later, and others' events before it."""

    def __init__(self, site: Site, owner: Sidecar) -> None:
        super().__init__(site.clock, owner)
        self._site = site

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        site = self._site
        if site.turn_s and when <= site.clock.now:
            when = site.clock.now + site.random.uniform(0.0, site.turn_s)
        return super().call_at(when, callback)


class Store:
    """Who is alive, by the store's own clock."""

    def __init__(self, site: Site, beat_s: float) -> None:
        self.site = site
        self.beat_s = beat_s
        self.alive_s = 3 * beat_s
        self.is_up = True
        self.delay_s = 0.002
        self.cut: set[str] = set()
        self._seen: dict[str, tuple[Member, float]] = {}
        self._joined = 0

    def restart_empty(self) -> None:
        self._seen.clear()
        self._joined = 0

    def ask(self, sidecar: Sidecar) -> None:
        if not self.is_up or sidecar.place in self.cut:
            return
        clock, me = self.site.clock, sidecar.replica.me
        known = self._seen.get(me.id)
        if known is not None:
            me = known[0]
        elif me.joined >= LAST - 1:
            self._joined += 1
            me = me._replace(joined=self._joined)
        else:
            self._joined = max(self._joined, me.joined)
        self._seen[me.id] = (me, clock.now)
        members = [member for member, at in self._seen.values() if at > clock.now - self.alive_s]
        self._seen = {member.id: self._seen[member.id] for member in members}
        clock.at(clock.now + self.delay_s, partial(sidecar.replica.store_says, members, clock.now), sidecar)
