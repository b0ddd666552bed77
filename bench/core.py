"""What one request costs the admission core: offer, dispatch and release, with many others waiting; and at scale.

    python -m bench.core [--rounds 3000]

A round is one request in and one out: `offer` of a new one that has to wait, `release` of a lease, which dispatches
the best of the waiting ones. Microseconds, median of all rounds; measures the core alone, no I/O, no clock.
The longest of each kind of event with 50,000 waiting: `bench/events.py`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from random import Random
from typing import TYPE_CHECKING

from extproc.admission.controller import Controller
from extproc.admission.ticket import Ticket
from extproc.admission.values import Dispatch, EndpointSpec, Policy, Request, RequestClass

if TYPE_CHECKING:
    from extproc.admission.values import Decision

CLASSES = (RequestClass("std", 0, 3600.0), RequestClass("int", 10, 3600.0), RequestClass("batch", -10, 3600.0))
POLICY = Policy(classes=CLASSES, shed=False, max_queued_requests=10**9)
LIMIT = 64


class Load:
    """A controller with `waiting` requests in its lines and every endpoint full."""

    def __init__(self, waiting: int, kv: bool, endpoints: int, models: int = 0, tenants: int = 5) -> None:
        self.random = Random(1)
        self.models, self.tenants = [f"model-{number}" for number in range(models)], tenants
        self.now = 0.0
        self.held: list[Ticket] = []
        self.core = Controller(POLICY)
        # About 1100 tokens a request: with a KV limit, tokens close an endpoint before its request limit does.
        capacity = 1100 * LIMIT if kv else None
        served = frozenset(self.models)
        limit = LIMIT * 2 if kv else LIMIT
        for name in (f"endpoint-{number}" for number in range(endpoints)):
            self.core.put_endpoint(EndpointSpec(name, "", served, limit, capacity), 0.0)
            self.core.set_up(name, 0.0, is_up=True)
        while self.core.waiting < waiting:
            self.note(self.core.offer(self.request(), self.now))

    def request(self) -> Ticket:
        random = self.random
        return Ticket(
            Request(
                id="",
                arrived=self.now,
                model=random.choice(self.models) if self.models else None,
                request_class=random.choice(("std", "std", "int", "batch")),
                tenant=f"tenant-{random.randrange(self.tenants)}",
                prompt_tokens=int(random.lognormvariate(6.5, 0.8)),
            )
        )

    def note(self, decisions: list[Decision]) -> None:
        self.held += [decision.ticket for decision in decisions if isinstance(decision, Dispatch)]

    def round_us(self) -> tuple[float, float]:
        """Return what one offer and one release with its dispatches took, in microseconds."""
        self.now += 0.001
        held, ticket = self.held, self.request()
        where = self.random.randrange(len(held))
        held[where], held[-1] = held[-1], held[where]
        leaving = held.pop()
        began = time.thread_time_ns()
        first = self.core.offer(ticket, self.now)
        between = time.thread_time_ns()
        second = self.core.release(leaving, self.now)
        ended = time.thread_time_ns()
        self.note(first)
        self.note(second)
        return (between - began) / 1000, (ended - between) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3000)
    rounds = parser.parse_args().rounds
    print(HEAD)
    for waiting in (0, 1_000, 100_000):
        for endpoints in (1, 4):
            for kv in (False, True):
                measure(Load(waiting, kv, endpoints), waiting, endpoints, kv, rounds)
    print("\n1,000 models, 200 tenants")
    for waiting in (0, 100_000):
        for kv in (False, True):
            measure(Load(waiting, kv, 500, models=1_000, tenants=200), waiting, 500, kv, rounds)
    print("\n500 endpoints, one after the other: {:.1f} ms, the slowest {:.2f} ms".format(*adding(500)))


HEAD = (
    f"{'waiting':>8} {'endpoints':>9} {'KV limit':>8} {'offer':>8} {'release':>8} {'both':>8} {'p99':>8} {'worst':>8}"
)


def measure(load: Load, waiting: int, endpoints: int, kv: bool, rounds: int) -> None:
    """Print what a round takes, in microseconds."""
    if not load.held:
        load.note(load.core.offer(load.request(), load.now))
    gc.collect()
    gc.freeze()  # a collection of what the bench itself made says nothing of the core
    times = [load.round_us() for _ in range(rounds)]
    gc.unfreeze()
    offers, releases = zip(*times, strict=True)
    both = sorted(map(sum, times))
    print(
        f"{waiting:>8} {endpoints:>9} {'on' if kv else 'off':>8} {statistics.median(offers):>8.1f}"
        f" {statistics.median(releases):>8.1f} {statistics.median(both):>8.1f} {both[rounds * 99 // 100]:>8.1f}"
        f" {max(*offers, *releases):>8.1f}"
    )


def adding(count: int) -> tuple[float, float]:
    """Return the milliseconds that it takes to add endpoints, all of them and the slowest."""
    core, times = Controller(POLICY), []
    for number in range(count):
        began = time.thread_time_ns()
        core.put_endpoint(EndpointSpec(f"endpoint-{number}"), 0.0)
        times.append((time.thread_time_ns() - began) / 1e6)
    return sum(times), max(times)


if __name__ == "__main__":
    main()
