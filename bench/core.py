"""What one request costs the admission core: offer, dispatch and release, with many others waiting; and at scale.

    python -m bench.core [--rounds 3000] [events]

A round is one request in and one out: `offer` of a new one that has to wait, `release` of a lease, which dispatches
the best of the waiting ones. Microseconds, median of all rounds; measures the core alone, no I/O, no clock.
`events` alone: the longest of each kind of event with 50,000 waiting, in milliseconds.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

from extproc.admission.controller import Controller
from extproc.admission.load import Load as Telemetry
from extproc.admission.tenants import TenantRule, TenantRules
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, Dispatch, EndpointSpec, Policy, Request, RequestClass

if TYPE_CHECKING:
    from collections.abc import Callable

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

    def note(self, decisions: list) -> None:
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
    parser.add_argument("part", nargs="?", choices=["all", "events"], default="all")
    asked = parser.parse_args()
    rounds = asked.rounds
    if asked.part == "events":
        events(50_000)
        return
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


class Longest:
    """The longest of each kind of event that happened to a load, in milliseconds."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.worst: dict[str, float] = {}
        gc.collect()
        gc.disable()  # the sidecar collects what is old when nothing waits: see extproc/garbage.py

    def take(self, what: str, event: Callable[..., list[Decision]], *given: object, **more: object) -> None:
        """Let an event happen."""
        self.load.now += 0.001
        began = time.thread_time_ns()
        decisions = event(*given, now=self.load.now, **more)
        took_ms = (time.thread_time_ns() - began) / 1e6
        self.worst[what] = max(self.worst.get(what, 0.0), took_ms)
        self.load.note(decisions)

    def settle(self, what: str) -> None:
        """Tick while ticks are due at once, as a driver does."""
        core = self.load.core
        while (due := core.next_deadline()) is not None and due <= self.load.now:
            self.take(f"{what}: a tick of those that follow", core.tick)

    def all_at_once(self, what: str, event: Callable[..., list[Decision]], *given: object, **more: object) -> None:
        """Let an event happen that touches all who wait, and what follows."""
        self.take(what, event, *given, **more)
        self.settle(what)

    def show(self) -> None:
        gc.enable()
        for what, took_ms in self.worst.items():
            print(f"{took_ms:>8.2f}  {what}")


def events(waiting: int) -> None:
    """Print the longest of each kind of event while so many wait, in milliseconds."""
    print(f"with {waiting} waiting, the longest, ms:")
    for part in (_events_of_four, _events_of_pools, _events_of_homes):
        longest = part(waiting)
        longest.show()
        del longest
        gc.collect()


def _events_of_four(waiting: int) -> Longest:
    """Four endpoints that serve everything: what happens each second, other rules, and the end of all budgets."""
    load = Load(waiting, True, 4)
    core, longest = load.core, Longest(load)
    take = longest.take
    names = list(core.endpoints)
    specs = [endpoint.spec for endpoint in core.endpoints.values()]
    for number in range(300):
        name = names[number % 4]
        page = Telemetry(running=60.0, waiting=number % 3, kv_usage=0.9, output_tokens=1000.0, prompt_tokens=9000.0)
        for _ in range(3):
            take("offer", core.offer, load.request())
            take("release", core.release, load.held.pop(0), answer=Answer.OK)
        take("cancel", core.cancel, next(core.waiting_tickets()))
        take("first token", core.first_token, load.held[-1])
        take("a page", core.observe, name, page)
        take("a report", core.report, name, page)
        take("one of four is down, or up", core.set_up, name, is_up=number % 8 >= 4)
        take("time passes", core.tick)
        if number % 10 == 0:
            take("an endpoint goes", core.remove_endpoints, [name])
            take("an endpoint comes", core.put_endpoint, specs[number % 4])
    for is_up in (False, True):
        for name in names:
            take("all four are down, or up", core.set_up, name, is_up=is_up)
    take("other rules", core.set_policy, replace(POLICY, max_prompt_tokens=9000))
    rules = TenantRules(default=TenantRule(None, 3))
    longest.all_at_once("rules of tenants", core.set_policy, replace(POLICY, tenants=rules))
    weighted = tuple(replace(klass, weight=2.0) for klass in CLASSES)
    longest.all_at_once("classes get weights", core.set_policy, replace(POLICY, classes=weighted))
    longest.all_at_once("another order of who waits", core.set_policy, replace(POLICY, fair=False))
    take("another order, and again amid it", core.set_policy, POLICY)
    take("another order, and again amid it", core.tick)
    longest.all_at_once("another order, and again amid it", core.set_policy, replace(POLICY, short_first=True))
    load.now += 4000.0
    while core.waiting:
        take("all budgets are over", core.tick)
    return longest


def _events_of_pools(waiting: int) -> Longest:
    """Two endpoints that serve four models: pools split and join."""
    load = Load(waiting, False, 2, models=4)
    core, longest = load.core, Longest(load)
    some = EndpointSpec("some", "", frozenset(load.models[:2]), LIMIT)
    all_but_one = EndpointSpec("endpoint-0", "", frozenset(load.models[1:]), LIMIT)
    longest.all_at_once("an endpoint comes that serves some models", core.put_endpoint, some)
    longest.all_at_once("it goes", core.remove_endpoints, ["some"])
    longest.all_at_once("a model is listed no more", core.put_endpoint, all_but_one)
    longest.all_at_once("it is listed again", core.put_endpoint, replace(all_but_one, models=frozenset(load.models)))
    load.note(core.offer(Ticket(replace(load.request().request, allowed=frozenset({"endpoint-1"}))), load.now))
    longest.all_at_once("an endpoint comes where gateways choose", core.put_endpoint, some)
    longest.all_at_once("it goes where gateways choose", core.remove_endpoints, ["some"])
    longest.all_at_once("all endpoints go", core.remove_endpoints, ["endpoint-0", "endpoint-1"])
    while core.waiting:
        longest.take("an end, a hundred at a time", core.drain, most=100)
    return longest


def _events_of_homes(waiting: int) -> Longest:
    """One endpoint, where everybody is at home, with a budget of its own for a wait while it is down."""
    load = Load(waiting, False, 1)
    core, longest = load.core, Longest(load)
    policy = replace(POLICY, no_endpoint_budget_s=3700.0)
    longest.take("other rules", core.set_policy, policy)
    for _ in range(2):
        longest.all_at_once("the only endpoint is down", core.set_up, "endpoint-0", is_up=False)
        longest.all_at_once("the only endpoint is up", core.set_up, "endpoint-0", is_up=True)
    longest.all_at_once("the only endpoint goes", core.remove_endpoints, ["endpoint-0"])
    longest.all_at_once("the queue is switched off", core.set_policy, replace(policy, enable_queue=False))
    return longest


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
