"""Sidecars under random faults at random times on virtual time: deterministic from the seed.

    python -m tests.unit.replicas.storm --events 1000000 --seed 1

After each event what it touched is checked, and now and then everything. What is promised of limits:

* All reachable, and all that ran at the last fault over: no engine ever holds more than its limit.
* At any other time: at most one request per sidecar above it. A group of M of N uses M/N of a limit and at least one
  slot, and where parts were rounded or what was sent is not seen yet, that is what can come on top.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

from extproc.admission import settling
from extproc.admission.values import EndpointSpec, Policy, RequestClass
from extproc.replicas import leading
from extproc.stream import by_age

from .site import BrokenError, Site, require

if TYPE_CHECKING:
    from collections.abc import Callable

    from .sidecar import Client, Engine

CALM_S = 12.0
"""So long after the last fault every sidecar must be back in one group."""
LONGEST_S = 6.0
"""The longest answer in a storm: what ran at a fault is over by then."""


SPARE = "s9"
"""A place whose sidecar comes amid other faults, and once dead stays away until it does again: all others come back."""
PIECE = 7
"""How many of those who wait are settled in one event, where files change: they are some hundred."""
LET_GO = 3
"""Likewise, how many a leader lets go, or takes out of its core, in one turn of its loop."""
TURN_S = 0.02
"""How long a turn may take there: others' events come between."""
ENVOY_S, PAGE_S = (0.0, 0.08), (0.002, 0.2)
"""How long an Envoy takes to an engine, and to tell that an answer has ended: as `learning.foreign.arrived` allows; how
long an engine's page takes."""
MODELS = tuple(map(frozenset, ("", "", "m", "n", "mn")))
"""What an engine may serve; nothing: any model."""
CLASSES = (RequestClass("std", 0, 60.0), RequestClass("urgent", 10, 60.0))
POLICIES = (Policy(classes=CLASSES), Policy(classes=CLASSES, fair=False), Policy(classes=CLASSES, short_first=True))


class Storm(Site):
    """A site with bad weather; with `reloads`, files change, too: order, engines, models, and what is up."""

    def __init__(
        self, seed: int, *, sidecars: int = 5, engines: int = 4, limit: int = 8, reloads: bool = False
    ) -> None:
        super().__init__(seed, sidecars=sidecars, engines=engines, limit=limit, budget_s=15.0)
        self.reloads = reloads
        self.calm_from = self.clock.now + CALM_S + LONGEST_S
        self.faults: dict[str, int] = {}
        self.worst_over = 0
        self.full = engines * limit / 32
        """How many times the traffic that fills engines of 32 slots in all fills these."""
        self.rate = 20.0 * self.full
        self.envoy_s, self.page_s = ENVOY_S, PAGE_S
        self._undo: list[Callable[[], None]] = []

    # ---- traffic

    def rain(self) -> None:
        """Send one request, and plan the next."""
        random = self.random
        places = [place for place, one in self.sidecars.items() if place != SPARE or not one.is_dead]
        place = random.choice(places) if random.random() < 0.7 else "s1"
        client = self.send(
            place,
            work_s=min(random.expovariate(1 / 1.5), LONGEST_S),
            budget_s=random.choice((0.0, 2.0, 15.0)),
            tenant=random.choice("abc"),
            request_class=random.choice(CLASSES).name if self.reloads else "",
            model=random.choice("mn") if self.reloads else None,
        )
        if random.random() < 0.1:
            self.clock.at(self.clock.now + random.expovariate(1.0), lambda: self.hang_up(client))
        self.clock.at(self.clock.now + random.expovariate(self.rate), self.rain)

    def hang_up(self, client: Client) -> None:
        if client in self.open and not client.running:
            super().hang_up(client)

    # ---- files that are loaded anew, and health checks

    def reload(self) -> None:
        """Change the file, or what is up; each sidecar follows within a second. Plan the next."""
        if not self.reloads:
            return
        random, specs = self.random, self.specs
        name = random.choice(list(self.engines))
        what = random.choice(("order", "goes", "models", "down", "up"))
        if what == "order":
            self.policy = random.choice(POLICIES)
        elif what == "goes" and len(specs) > 1:
            specs.pop(name, None)
        elif what == "down":
            self.down.add(name)
        elif what == "up":
            self.down.clear()
        else:  # it serves others, or comes
            models = random.choice(MODELS)
            specs[name] = EndpointSpec(name, models=models, max_running_requests=self.engines[name].limit)
        self.faults[what] = self.faults.get(what, 0) + 1
        for one in self.sidecars.values():
            self.clock.at(self.clock.now + random.random(), partial(one.do, one.load))
        self.clock.at(self.clock.now + random.expovariate(0.3), self.reload)

    # ---- faults

    def blow(self) -> None:
        """Do some harm, or undo all of it."""
        random = self.random
        if self._undo and random.random() < 0.4:
            self.mend()
            self.clock.at(self.clock.now + random.choice((0.5, 3.0, CALM_S + LONGEST_S + 15.0)), self.blow)
            return
        places = list(self.sidecars)
        one = random.choice(places)
        name, harm = random.choice(
            (
                ("kill", lambda: self._kill(one)),
                ("kill and start", lambda: self._restart(one)),
                ("stop", lambda: self._stop(one)),
                ("leader stops", lambda: self._stop(self._leader() or one)),
                ("leader killed", lambda: self._kill(self._leader() or one)),
                ("cut off", lambda: self.net.cut([one], places)),
                ("leader cut off", lambda: self.net.cut([self._leader() or one], places)),
                ("halves", lambda: self.net.cut(places[: len(places) // 2], places[len(places) // 2 :])),
                ("each alone", lambda: self.net.cut(places, places)),
                ("two can't meet", lambda: self.net.cut([one], [random.choice(places)])),
                ("store gone", self._lose_store),
                ("store empty", self.store.restart_empty),
                ("store not seen by one", lambda: self.store.cut.add(one)),
                ("cut off from everything", lambda: self._corner(one)),
                ("slow network", self._slow),
                ("resign", lambda: self._resign(one)),
                ("one more", lambda: self._restart(SPARE)),
                ("rate", self._other_rate),
            )
        )
        self.faults[name] = self.faults.get(name, 0) + 1
        harm()
        self._undo.append(lambda: None)
        self.clock.at(self.clock.now + random.choice((0.05, 0.3, 1.0, 3.0, 8.0)), self.blow)

    def mend(self) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.net.heal()
        self.net.delay_s = (0.0002, 0.002)
        self.store.is_up, self.store.delay_s = True, 0.002
        self.store.cut.clear()
        self.blind.clear()
        for place, sidecar in list(self.sidecars.items()):
            if sidecar.is_dead and place == SPARE:
                for client in list(sidecar.tickets):  # its Envoy has gone, too
                    self.hang_up(client)
            elif sidecar.is_dead:
                self.start(place)
            elif sidecar.is_stopped:
                self.resume(place)
        self.calm_from = self.clock.now + CALM_S + LONGEST_S

    def _leader(self) -> str | None:
        leaders = self.leaders()
        return leaders[0].place if leaders else None

    def _kill(self, place: str) -> None:
        if not self.sidecars[place].is_dead and len(self.alive) > 1:
            self.kill(place)

    def _restart(self, place: str) -> None:
        if place in self.sidecars and not self.sidecars[place].is_dead:
            self.kill(place)
        self.start(place)

    def _stop(self, place: str) -> None:
        sidecar = self.sidecars[place]
        if not sidecar.is_dead and not sidecar.is_stopped and len(self.alive) > 1:
            self.stop(place)
            wakes = self.random.choice((0.3, 1.5, 2.5, 10.0))
            self.clock.at(self.clock.now + wakes, lambda: self._wake(sidecar.place, sidecar.life))

    def _wake(self, place: str, life: int) -> None:
        sidecar = self.sidecars[place]
        if sidecar.life == life and sidecar.is_stopped:
            self.resume(place)
            if not self._undo:
                self.calm_from = self.clock.now + CALM_S + LONGEST_S

    def _resign(self, place: str) -> None:
        """A rolling restart: hand over, say goodbye, come again."""
        sidecar = self.sidecars[place]
        if sidecar.is_dead or sidecar.is_stopped:
            return
        sidecar.replica.resign()

        def leave() -> None:
            if self.sidecars[place] is sidecar and not sidecar.is_dead and not sidecar.is_stopped:
                sidecar.gate.leave()
                self.kill(place)
                self.start(place)

        self.clock.at(self.clock.now + 1.0, leave)

    def _lose_store(self) -> None:
        self.store.is_up = False

    def _corner(self, place: str) -> None:
        """From the others, the store and the engines' pages; its Envoy reaches the engines."""
        self.net.cut([place], list(self.sidecars))
        self.store.cut.add(place)
        self.blind.add(place)

    def _slow(self) -> None:
        self.net.delay_s = self.random.choice(((0.005, 0.05), (0.05, 0.4), (0.2, 1.0), (0.5, 3.0)))

    def _other_rate(self) -> None:
        self.rate = self.full * self.random.choice((5.0, 15.0, 22.0, 40.0))

    # ---- promises

    @property
    def is_calm(self) -> bool:
        return not self._undo and self.clock.now >= self.calm_from

    def check_engine(self, engine: Engine) -> None:
        super().check_engine(engine)
        over = len(engine.holds) - engine.limit
        self.worst_over = max(self.worst_over, over)
        bound = 0 if self.is_calm else len(self.sidecars)
        self.demand(
            over <= bound,
            "over the limit by",
            over,
            "at",
            engine.name,
            "calm:",
            self.is_calm,
            list(self.sidecars.values()),
        )

    def check_all(self) -> None:
        self.check()
        if self.is_calm:
            require(self.is_one_group(), "no one group:", list(self.sidecars.values()))
            for client in self.open:
                waited_s = self.clock.now - client.request.arrived
                stuck = not client.running and waited_s > self.budget_s + CALM_S
                require(not stuck, "stuck:", client, list(self.sidecars.values()))

    def finish(self) -> None:
        """Let it clear up: everything ends, and no book holds anything."""
        self.rate = 1e-9
        self.reloads = False
        self.down.clear()
        for sidecar in self.sidecars.values():
            sidecar.do(sidecar.load)
        self._undo.append(lambda: None)
        self.mend()
        self.blow = self.mend  # type: ignore[method-assign]
        self.run(CALM_S + self.budget_s + LONGEST_S + 30)
        self.check_all()
        require(not self.open, "never ended:", list(self.open)[:3])
        for sidecar in self.alive:
            require(not sidecar.tickets and not sidecar.gate.waiting, "something waits at", sidecar)
            for endpoint in sidecar.controller.endpoints.values():
                require(not endpoint.leases and not endpoint.foreign, "something is leased at", sidecar)


def storm(
    seed: int,
    events: int,
    *,
    check_every: int = 100,
    sidecars: int = 5,
    limit: int = 8,
    reloads: bool = False,
    progress: Callable[[Storm], None] = lambda _: None,
) -> Storm:
    """Let `events` events happen; with `reloads` what is done in pieces is in small ones, and others come between."""
    here = Storm(seed, sidecars=sidecars, limit=limit, reloads=reloads)
    here.rain()
    here.clock.at(here.clock.now + 5.0, here.blow)
    all_at_once = settling.PIECE, leading.LET_GO_IN_A_TURN, by_age.PLACED_IN_A_TURN
    if reloads:
        here.reload()
        here.turn_s = TURN_S
        settling.PIECE, leading.LET_GO_IN_A_TURN, by_age.PLACED_IN_A_TURN = PIECE, LET_GO, LET_GO
    try:
        for number in count(1):
            if here.clock.events >= events:
                break
            here.step()
            if number % check_every == 0:
                here.check_all()
            if number % 50_000 == 0:
                progress(here)
        here.finish()
    finally:
        settling.PIECE, leading.LET_GO_IN_A_TURN, by_age.PLACED_IN_A_TURN = all_at_once
    return here


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.unit.replicas.storm", description=__doc__.split("\n")[0])
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check-every", type=int, default=100)
    parser.add_argument("--sidecars", type=int, default=5)
    parser.add_argument("--limit", type=int, default=8, help="of each of the 4 engines; parts above 1 show with more")
    parser.add_argument("--reloads", action="store_true", help="with other orders, engines and models, too")
    asked = parser.parse_args(arguments)
    began = time.monotonic()

    def progress(here: Storm) -> None:
        print(
            f"{here.clock.events:>9} events  {time.monotonic() - began:6.1f} s  {here.clients} requests  "
            f"over {here.worst_over}"
        )

    try:
        here = storm(
            asked.seed,
            asked.events,
            check_every=asked.check_every,
            sidecars=asked.sidecars,
            limit=asked.limit,
            reloads=asked.reloads,
            progress=progress,
        )
    except BrokenError as error:
        print(f"BROKEN, seed {asked.seed}: {error}", file=sys.stderr)
        return 1
    outcomes = "  ".join(f"{what}={count}" for what, count in here.outcomes.most_common())
    faults = "  ".join(f"{what}={count}" for what, count in sorted(here.faults.items()))
    took_s = time.monotonic() - began
    print(
        f"{here.clock.events} events, {here.clients} requests, seed {asked.seed}, {took_s:.1f} s: 0 invariants broken"
    )
    print(f"most above a limit: {here.worst_over}\n{outcomes}\n{faults}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
