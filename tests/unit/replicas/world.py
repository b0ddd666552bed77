"""Several sidecars, their network, a store and engines on one virtual clock. Real cores, gates and replicas; no sleep.

The engines keep the truth: what they hold, counted by nobody's books. A sidecar can be killed (its Envoy goes on: what
runs runs on, what waits is sent again to the next life), stopped (SIGSTOP: what it is told happens when it goes on) or
cut off. A cut stream loses nothing: what was sent arrives when the network heals, however late, as with TCP.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from random import Random
from typing import TYPE_CHECKING

from extproc.admission.controller import Controller
from extproc.admission.load import Load
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Decision, Dispatch, EndpointSpec, Policy, Request
from extproc.replicas.gate import SharedGate
from extproc.replicas.messages import LAST, Member
from extproc.replicas.picture import Role
from extproc.replicas.replica import Replica

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from extproc.replicas.door import Guest
    from extproc.replicas.messages import Message

STORE_S = 1.0
SCRAPE_S = 1.0


class BrokenError(AssertionError):
    """An invariant does not hold."""


def require(holds: bool, *what: object) -> None:
    if not holds:
        raise BrokenError(" ".join(map(str, what)))


class Timer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Clock:
    """The one clock, and what is due when."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.events = 0
        self._heap: list[tuple[float, int, Timer, Sidecar | None]] = []
        self._sequence = 0

    def at(self, when: float, callback: Callable[[], None], owner: Sidecar | None = None) -> Timer:
        timer = Timer(callback)
        self._sequence += 1
        heappush(self._heap, (max(when, self.now), self._sequence, timer, owner))
        return timer

    def step(self) -> bool:
        """Let the next thing happen; tell whether there was one."""
        while self._heap:
            when, _, timer, owner = heappop(self._heap)
            if timer.callback is None or (owner is not None and owner.is_dead):
                continue
            self.now = when
            self.events += 1
            if owner is not None and owner.is_stopped:
                owner.later.append((None, timer))
            else:
                timer.callback()
            return True
        return False

    def next_at(self) -> float | None:
        return self._heap[0][0] if self._heap else None


class End:
    """One side of a stream."""

    def __init__(self, net: Net, owner: Sidecar) -> None:
        self.net = net
        self.owner = owner
        self.peer: End
        self.receive: Callable[[Message], None] = lambda _: None
        self.closed: Callable[[], None] = lambda: None
        self.bounced: Callable[[Message], None] = lambda _: None
        self.is_over = False
        self.last_at = 0.0
        self.queued: list[Callable[[], None]] = []  # held back by a cut

    def send(self, message: Message) -> None:
        if not self.is_over:
            self.net.carry(self, partial(self.peer.take, message))

    def close(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.net.carry(self, self.peer.finish)

    def take(self, message: Message) -> None:
        if not self.is_over and not self.owner.is_dead:
            self.receive(message)

    def finish(self) -> None:
        if not self.is_over and not self.owner.is_dead:
            self.is_over = True
            self.closed()


class Net:
    """Streams between sidecars."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.delay_s = (0.0002, 0.002)
        self.cuts: set[frozenset[str]] = set()
        self.ends: list[End] = []

    def is_cut(self, one: Sidecar, other: Sidecar) -> bool:
        return frozenset((one.place, other.place)) in self.cuts

    def carry(self, sender: End, arrive: Callable[[], None]) -> None:
        """Bring something to the other end: in order, and not while the two are cut off from each other."""
        if sender.queued or self.is_cut(sender.owner, sender.peer.owner):
            sender.queued.append(arrive)
            return
        clock = self.world.clock
        at = sender.last_at = max(sender.last_at, clock.now + self.world.random.uniform(*self.delay_s))
        clock.at(at, partial(self._arrive, sender, arrive))

    def _arrive(self, sender: End, arrive: Callable[[], None]) -> None:
        target = sender.peer.owner
        if target.is_stopped:
            target.later.append((sender.peer, Timer(arrive)))
        else:
            arrive()

    def heal(self) -> None:
        self.cuts.clear()
        self.ends = [end for end in self.ends if not (end.is_over and end.peer.is_over)]
        for end in self.ends:
            queued, end.queued = end.queued, []
            for arrive in queued:
                self.carry(end, arrive)

    def cut(self, one: Iterable[str], other: Iterable[str]) -> None:
        others = list(other)
        self.cuts |= {frozenset((a, b)) for a in one for b in others if a != b}

    def died(self, sidecar: Sidecar) -> None:
        """The kernel of a dead process closes its streams."""
        for end in self.ends:
            if end.owner is sidecar and not end.is_over:
                end.is_over = True
                self.carry(end, end.peer.finish)


class Dialer:
    """The network as one sidecar has it."""

    def __init__(self, net: Net, owner: Sidecar) -> None:
        self._net = net
        self._owner = owner

    def dial(self, address: str, receive: Callable[[Message], None], closed: Callable[[], None]) -> End:
        net, world = self._net, self._net.world
        here = End(net, self._owner)
        here.receive, here.closed = receive, closed
        target = world.sidecars[address]
        there = End(net, target)
        here.peer, there.peer = there, here
        net.ends += [here, there]
        if target.is_dead:
            there.is_over = True
            net.carry(there, here.finish)
        else:
            net.carry(here, partial(self._accept, there))
        return here

    @staticmethod
    def _accept(there: End) -> None:
        if not there.owner.is_dead:
            guest: Guest = there.owner.replica.door.accept(there)
            there.receive, there.closed = guest.receive, guest.closed


class Loop:
    """The event loop of one sidecar."""

    def __init__(self, clock: Clock, owner: Sidecar) -> None:
        self._clock, self._owner = clock, owner

    def time(self) -> float:
        return self._clock.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        return self._clock.at(when, callback, self._owner)

    def call_soon(self, callback: Callable[[], None]) -> Timer:
        return self._clock.at(self._clock.now, callback, self._owner)


@dataclass(eq=False)
class Client:
    """One request of the world, through all lives of its sidecar."""

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
    holds: dict[Client, None] = field(default_factory=dict)
    peak: int = 0
    peak_over: int = 0


class Sidecar:
    """One place for a sidecar, with its Envoy, through one life."""

    def __init__(self, world: World, place: str, life: int) -> None:
        self.world = world
        self.place = place
        self.life = life
        self.is_dead = False
        self.is_stopped = False
        self.later: list[tuple[End | None, Timer]] = []
        self.tickets: dict[Client, Ticket] = {}
        self.loop = Loop(world.clock, self)
        self.controller = world.core(world.policy)
        self.gate = SharedGate(self.controller, self.loop)
        me = Member(f"{place}.{life}", place, LAST - 1)
        network = Dialer(world.net, self)
        self.replica = Replica(self.gate, me, "pool", network, self.loop, store_beat_s=world.store.beat_s)
        self.gate.watch()
        self._reads = 0
        self.losses = 0

    def start(self) -> None:
        for engine in self.world.engines.values():
            self.gate.put_endpoint(EndpointSpec(engine.name, max_running_requests=engine.limit))
            self.gate.set_up(engine.name, is_up=True)
        self._ask_store()
        self.replica.begin(self._turned, self._lost_one)

    def _turned(self, role: Role) -> None:
        self._reads += 1
        if role is Role.LEADING:
            for name in self.world.engines:
                self._scrape(name, self._reads)

    def _lost_one(self) -> None:
        self.losses += 1

    def _scrape(self, name: str, reads: int) -> None:
        if reads == self._reads:
            world = self.world
            engine = world.engines[name]
            load = Load(running=float(len(engine.holds)), waiting=0.0)
            takes_s = world.random.uniform(0.002, 0.03)
            self.loop.call_at(world.clock.now + takes_s, partial(self._read, name, load, reads))

    def _read(self, name: str, load: Load, reads: int) -> None:
        if reads == self._reads:
            if self.place not in self.world.blind:
                self.gate.observe(name, load)
            self.loop.call_at(self.world.clock.now + SCRAPE_S, partial(self._scrape, name, reads))

    def _ask_store(self) -> None:
        self.world.store.ask(self)
        self.loop.call_at(self.world.clock.now + self.world.store.beat_s, self._ask_store)

    # ---- its Envoy

    def offer(self, client: Client) -> None:
        ticket = Ticket(client.request, partial(self._decided, client))
        self.tickets[client] = ticket
        self.do(partial(self.gate.offer, ticket))

    def do(self, what: Callable[[], None]) -> None:
        """Have something happen here: at once, or when it goes on."""
        if self.is_stopped:
            self.later.append((None, Timer(what)))
        elif not self.is_dead:
            what()

    def close(self, client: Client, answer: Answer = Answer.UNKNOWN) -> None:
        ticket = self.tickets.pop(client, None)
        if ticket is not None:
            self.do(partial(self.gate.close, ticket, answer))

    def _decided(self, client: Client, decision: Decision) -> None:
        if client.gone or client not in self.tickets:
            return
        client.outcomes.append(decision.outcome.value)
        if isinstance(decision, Dispatch):
            self.world.dispatch(client, decision.endpoint)
        else:
            self.close(client)

    def __repr__(self) -> str:
        state = "dead" if self.is_dead else "stopped" if self.is_stopped else self.replica.role.value
        picture = self.replica.picture()
        group = f"{picture.group}/{picture.members}"
        return f"<{self.place}.{self.life} {state} {group} waiting={self.gate.waiting} {self.controller}>"


class Store:
    """Who is alive, by the store's own clock."""

    def __init__(self, world: World, beat_s: float) -> None:
        self.world = world
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
        clock, me = self.world.clock, sidecar.replica.me
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


class World:
    """All of it."""

    def __init__(
        self,
        seed: int,
        *,
        sidecars: int = 3,
        engines: int = 3,
        limit: int = 8,
        work_s: float = 2.0,
        budget_s: float = 30.0,
        policy: Policy | None = None,
        store_beat_s: float = STORE_S,
        core: Callable[[Policy], Controller] = Controller,
    ) -> None:
        self.core = core
        self.random = Random(seed)
        self.clock = Clock()
        self.policy = Policy() if policy is None else policy
        self.net = Net(self)
        self.store = Store(self, store_beat_s)
        self.blind: set[str] = set()  # places from which no engine's page can be had
        self.work_s = work_s
        self.budget_s = budget_s
        self.engines = {f"e{n}": Engine(f"e{n}", limit) for n in range(engines)}
        self.clients = 0
        self.outcomes: Counter[str] = Counter()
        self.open: dict[Client, None] = {}
        self.sidecars: dict[str, Sidecar] = {}
        self.lives = 0
        for n in range(sidecars):
            self.start(f"s{n}")

    # ---- sidecars

    def start(self, place: str) -> Sidecar:
        self.lives += 1
        before = self.sidecars.get(place)
        sidecar = self.sidecars[place] = Sidecar(self, place, self.lives)
        sidecar.start()
        if before is not None:  # Envoy sends again what it held
            for client in list(before.tickets):
                if not client.dispatches and not client.gone:
                    sidecar.offer(client)
        return sidecar

    def kill(self, place: str) -> None:
        sidecar = self.sidecars[place]
        sidecar.is_dead = True
        sidecar.is_stopped = False
        sidecar.later.clear()
        self.net.died(sidecar)

    def stop(self, place: str) -> None:
        self.sidecars[place].is_stopped = True

    def resume(self, place: str) -> None:
        """Let it go on: what was due meanwhile happens now, timers or the network first as chance will have it."""
        sidecar = self.sidecars[place]
        sidecar.is_stopped = False
        later, sidecar.later = sidecar.later, []
        timers_first = self.random.random() < 0.5
        for _, timer in sorted(later, key=lambda one: (one[0] is None) is not timers_first):
            if timer.callback is not None and not sidecar.is_dead:
                timer.callback()

    # ---- requests

    def send(
        self,
        place: str,
        *,
        work_s: float | None = None,
        budget_s: float | None = None,
        request_class: str = "",
        tenant: str = "",
        session: str | None = None,
    ) -> Client:
        self.clients += 1
        request = Request(
            id=str(self.clients),
            arrived=self.clock.now,
            budget_s=self.budget_s if budget_s is None else budget_s,
            request_class=request_class,
            tenant=tenant,
            session=session,
            prompt_tokens=100,
        )
        client = Client(
            self.clients, request, place, self.random.expovariate(1 / self.work_s) if work_s is None else work_s
        )
        self.open[client] = None
        sidecar = self.sidecars[place]
        if sidecar.is_dead:
            sidecar.tickets[client] = Ticket(request)  # Envoy holds it until there is one
        else:
            sidecar.offer(client)
        return client

    def hang_up(self, client: Client) -> None:
        """The client leaves."""
        client.gone = True
        if not client.running:
            self._over(client, "gone")
            self.sidecars[client.place].close(client)

    def dispatch(self, client: Client, name: str) -> None:
        client.dispatches += 1
        require(client.dispatches == 1, "dispatched twice:", client.number)
        engine = self.engines[name]
        engine.holds[client] = None
        client.running = True
        engine.peak = max(engine.peak, len(engine.holds))
        self.check_engine(engine)
        self.clock.at(self.clock.now + 0.005 + client.work_s, partial(self._answered, client, engine))

    def _answered(self, client: Client, engine: Engine) -> None:
        del engine.holds[client]
        client.running = False
        self._over(client, "done")
        self.sidecars[client.place].close(client, Answer.OK)

    def _over(self, client: Client, how: str) -> None:
        self.outcomes[how] += 1
        self.open.pop(client, None)

    # ---- invariants

    def check_engine(self, engine: Engine) -> None:
        """For a subclass or a test: the truth about an engine has changed."""
        engine.peak_over = max(engine.peak_over, len(engine.holds) - engine.limit)

    def check(self) -> None:
        """What holds always."""
        for client in list(self.open):
            require(len(client.outcomes) <= 1, "two outcomes:", client.number, client.outcomes)
            if client.outcomes and not client.dispatches:
                self._over(client, client.outcomes[0])
        for sidecar in self.sidecars.values():
            if sidecar.is_dead or sidecar.is_stopped:
                continue
            leased = [ticket for endpoint in sidecar.controller.endpoints.values() for ticket in endpoint.leases]
            require(all(ticket.state is State.LEASED for ticket in leased), "a lease that is none at", sidecar)
            own = {ticket for ticket in sidecar.tickets.values() if ticket.state is State.LEASED}
            require(own <= set(leased), "a lease in nobody's books at", sidecar)
            leading = sidecar.replica.leading
            theirs = 0
            if leading is not None:
                for follower in leading.followers.values():
                    theirs += sum(ticket.state is State.LEASED for ticket in follower.tickets.values())
            require(len(leased) == len(own) + theirs, "leaked leases at", sidecar, len(leased), len(own), theirs)

    # ---- time

    def run(self, seconds: float, each: Callable[[], None] = lambda: None) -> None:
        end = self.clock.now + seconds
        while (at := self.clock.next_at()) is not None and at <= end:
            self.clock.step()
            each()
        self.clock.now = max(self.clock.now, end)

    def run_until(self, condition: Callable[[], bool], most_s: float = 30.0) -> None:
        end = self.clock.now + most_s
        while not condition():
            at = self.clock.next_at()
            require(at is not None and at <= end, "not within", most_s, "s:", list(self.sidecars.values()))
            self.clock.step()

    # ---- what a test asks

    @property
    def alive(self) -> list[Sidecar]:
        return [one for one in self.sidecars.values() if not one.is_dead and not one.is_stopped]

    def leaders(self) -> list[Sidecar]:
        return [one for one in self.alive if one.replica.role is Role.LEADING]

    def is_one_group(self) -> bool:
        """Whether everybody alive is in one group that knows that it is everybody."""
        leaders = self.leaders()
        if len(leaders) != 1:
            return False
        picture = leaders[0].replica.picture()
        return picture.group == picture.members == len(self.alive)

    def load(self) -> int:
        return sum(len(engine.holds) for engine in self.engines.values())
