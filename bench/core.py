"""What one request costs the admission core: offer, dispatch and release, with many others waiting.

    python bench/core.py [--rounds 3000]

A round is one request in and one out: `offer` of a new one that has to wait, `release` of a lease, which dispatches
the best of the waiting ones. Microseconds, median of all rounds; measures the core alone, no I/O, no clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from random import Random

from extproc.admission.controller import Controller
from extproc.admission.ticket import Ticket
from extproc.admission.values import Dispatch, EndpointSpec, Policy, Request, RequestClass

CLASSES = (RequestClass("std", 0, 3600.0), RequestClass("int", 10, 3600.0), RequestClass("batch", -10, 3600.0))
POLICY = Policy(classes=CLASSES, shed=False, max_queued_requests=10**9)
LIMIT = 64


class Load:
    """A controller with `waiting` requests in its lines and every endpoint full."""

    def __init__(self, waiting: int, kv: bool, endpoints: int) -> None:
        self.random = Random(1)
        self.now = 0.0
        self.held: list[Ticket] = []
        self.core = Controller(POLICY)
        # About 1100 tokens a request: with a KV limit, tokens close an endpoint before its request limit does.
        capacity = 1100 * LIMIT if kv else None
        for name in "abcdefgh"[:endpoints]:
            limit = LIMIT * 2 if kv else LIMIT
            self.core.put_endpoint(EndpointSpec(name, max_running_requests=limit, kv_capacity_tokens=capacity), 0.0)
            self.core.set_up(name, 0.0, is_up=True)
        while self.core.waiting < waiting:
            self.note(self.core.offer(self.request(), self.now))

    def request(self) -> Ticket:
        random = self.random
        return Ticket(
            Request(
                id="",
                arrived=self.now,
                request_class=random.choice(("std", "std", "int", "batch")),
                tenant=f"tenant-{random.randrange(5)}",
                prompt_tokens=int(random.lognormvariate(6.5, 0.8)),
            )
        )

    def note(self, decisions: list) -> None:
        self.held += [decision.ticket for decision in decisions if isinstance(decision, Dispatch)]

    def round_us(self) -> tuple[float, float]:
        """Return what one offer and one release with its dispatches took, in microseconds."""
        self.now += 0.001
        held, ticket = self.held, self.request()
        where = self.random.randrange(len(held))
        held[where], held[-1] = held[-1], held[where]
        leaving = held.pop()
        began = time.perf_counter_ns()
        first = self.core.offer(ticket, self.now)
        between = time.perf_counter_ns()
        second = self.core.release(leaving, self.now)
        ended = time.perf_counter_ns()
        self.note(first)
        self.note(second)
        return (between - began) / 1000, (ended - between) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3000)
    rounds = parser.parse_args().rounds
    print(f"{'waiting':>8} {'endpoints':>9} {'KV limit':>8} {'offer':>8} {'release':>8} {'both':>8} {'p99':>8}")
    for waiting in (0, 1_000, 100_000):
        for endpoints in (1, 4):
            for kv in (False, True):
                load = Load(waiting, kv, endpoints)
                if not load.held:
                    load.note(load.core.offer(load.request(), load.now))
                times = [load.round_us() for _ in range(rounds)]
                offers, releases = zip(*times, strict=True)
                both = sorted(map(sum, times))
                p99 = both[rounds * 99 // 100]
                print(
                    f"{waiting:>8} {endpoints:>9} {'on' if kv else 'off':>8} {statistics.median(offers):>8.1f}"
                    f" {statistics.median(releases):>8.1f} {statistics.median(both):>8.1f} {p99:>8.1f}"
                )


if __name__ == "__main__":
    main()
