"""Several sidecars, their network, a store and engines on one virtual clock. Real cores, gates and replicas; no sleep.

The engines keep the truth: what they hold, counted by nobody's books. A sidecar can be killed (its Envoy goes on: what
runs runs on, what waits is sent again to the next life), stopped (SIGSTOP: what it is told happens when it goes on) or
cut off.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from extproc.admission.controller import Controller
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request
from extproc.replicas.picture import Role
from extproc.simulate.network import Clock

if TYPE_CHECKING:
    from collections.abc import Callable


from .network import Net
from .sidecar import Client, Engine, Sidecar, Store

STORE_S = 1.0


class BrokenError(AssertionError):
    """An invariant does not hold."""


def require(holds: bool, *what: object) -> None:
    if not holds:
        raise BrokenError(" ".join(map(str, what)))


class Site:
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
        self.clock = Clock(1000.0)
        self.policy = Policy() if policy is None else policy
        self.net = Net(self)
        self.store = Store(self, store_beat_s)
        self.blind: set[str] = set()  # places from which no engine's page can be had
        self.turn_s = 0.0  # how long a turn of a loop may take
        self.envoy_s = (0.0, 0.0)  # how long an Envoy takes to an engine, and to tell that an answer has ended
        self.page_s = (0.002, 0.03)  # how long an engine's page takes to who asked for it
        self.work_s = work_s
        self.budget_s = budget_s
        self.engines = {f"e{n}": Engine(f"e{n}", limit) for n in range(engines)}
        self.specs = {name: EndpointSpec(name, max_running_requests=limit) for name in self.engines}  # as configured
        self.down: set[str] = set()  # by the health checks of all
        self.clients = 0
        self.outcomes: Counter[str] = Counter()
        self.open: dict[Client, None] = {}
        self.sidecars: dict[str, Sidecar] = {}
        self.lives = 0
        self._broken: BrokenError | None = None
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
            if not sidecar.is_dead:
                timer.run()

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
        model: str | None = None,
    ) -> Client:
        self.clients += 1
        request = Request(
            id=str(self.clients),
            arrived=self.clock.now,
            budget_s=self.budget_s if budget_s is None else budget_s,
            request_class=request_class,
            tenant=tenant,
            session=session,
            model=model,
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
        self.demand(client.dispatches == 1, "dispatched twice:", client.number)
        client.running = True
        self._by_envoy(partial(self._arrived, client, self.engines[name]))

    def _by_envoy(self, what: Callable[[], None]) -> None:
        """Have it happen when an Envoy has brought it: at once, if these take no time."""
        takes_s = self.random.uniform(*self.envoy_s) if self.envoy_s[1] else 0.0
        if takes_s:
            self.clock.at(self.clock.now + takes_s, what)
        else:
            what()

    def _arrived(self, client: Client, engine: Engine) -> None:
        engine.holds[client] = None
        engine.peak = max(engine.peak, len(engine.holds))
        self.check_engine(engine)
        self.clock.at(self.clock.now + 0.005 + client.work_s, partial(self._answered, client, engine))

    def _answered(self, client: Client, engine: Engine) -> None:
        del engine.holds[client]
        self._by_envoy(partial(self._ended, client))

    def _ended(self, client: Client) -> None:
        client.running = False
        self._over(client, "done")
        self.sidecars[client.place].close(client, Answer.OK)

    def _over(self, client: Client, how: str) -> None:
        self.outcomes[how] += 1
        self.open.pop(client, None)

    # ---- invariants

    def demand(self, holds: bool, *what: object) -> None:
        """Require it of what a gate has us do: it would take what we raise for an observer's fault, and go on."""
        if not holds and self._broken is None:
            self._broken = BrokenError(" ".join(map(str, what)))

    def step(self) -> None:
        """Have the next thing happen."""
        self.clock.step()
        if self._broken is not None:
            raise self._broken

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
            going = 0
            for one in (leading, sidecar.replica._ending):
                if one is not None:  # of sidecars that are gone
                    going += sum(ticket.state is State.LEASED for ticket in {*one._going, *one._running} - own)
            held = len(own) + theirs + going
            require(len(leased) == held, "leaked leases at", sidecar, len(leased), len(own), theirs, going)

    # ---- time

    def run(self, seconds: float, each: Callable[[], None] = lambda: None) -> None:
        end = self.clock.now + seconds
        while (at := self.clock.next()) is not None and at <= end:
            self.step()
            each()
        self.clock.now = max(self.clock.now, end)

    def run_until(self, condition: Callable[[], bool], most_s: float = 30.0) -> None:
        end = self.clock.now + most_s
        while not condition():
            at = self.clock.next()
            require(at is not None and at <= end, "not within", most_s, "s:", list(self.sidecars.values()))
            self.step()

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
