"""How long each kind of the core's events takes while very many wait: no single one may hold everybody up.

    python -m bench.events [--waiting 50000] [PART ...]

Milliseconds of CPU, the longest of each kind, with the look at the next deadline that a driver takes after each. What
touches all who wait goes on in ticks that are due at once: the longest of these stands beside, with how many they were
and the time of all together.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from bench.core import CLASSES, LIMIT, POLICY, Load
from extproc.admission.load import Load as Telemetry
from extproc.admission.tenants import TenantRule, TenantRules
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, RequestClass
from extproc.stream.dry_run import DryRun
from tests.unit.replicas.site import Site

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.events import Event
    from extproc.admission.values import Decision


class Longest:
    """The longest of each kind of event that happened to a load, in milliseconds."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.worst: dict[str, float] = {}
        self.ticks: dict[str, list[float]] = {}
        gc.collect()
        gc.disable()  # the sidecar collects what is old when nothing waits: see extproc/garbage.py

    def take(self, what: str, event: Callable[..., list[Decision]], *given: object, **more: object) -> float:
        """Let an event happen; return how long it took."""
        load = self.load
        load.now += 0.001
        began = time.thread_time_ns()
        decisions = event(*given, now=load.now, **more)
        load.core.next_deadline()
        took_ms = (time.thread_time_ns() - began) / 1e6
        self.worst[what] = max(self.worst.get(what, 0.0), took_ms)
        load.note(decisions)
        return took_ms

    def settle(self, what: str) -> None:
        """Tick while ticks are due at once, as a driver does."""
        core, load = self.load.core, self.load
        before = self.worst.get(what, 0.0)
        while (due := core.next_deadline()) is not None and due <= load.now:
            self.ticks.setdefault(what, []).append(self.take(what, core.tick))
        self.worst[what] = before

    def all_at_once(self, what: str, event: Callable[..., list[Decision]], *given: object, **more: object) -> None:
        """Let an event happen that touches all who wait, and what follows."""
        self.take(what, event, *given, **more)
        self.settle(what)

    def show(self) -> None:
        gc.enable()
        for what, took_ms in self.worst.items():
            ticks = self.ticks.get(what, [])
            followed = f", then {len(ticks)} ticks, {sum(ticks):.0f} ms together" if ticks else ""
            print(f"{took_ms:>8.2f} {max(ticks, default=0.0):>8.2f}  {what}{followed}", flush=True)


def of_four(waiting: int) -> Longest:
    """Four endpoints that serve everything: what happens each second."""
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
        take("one of four is down, or up", core.set_up, name, is_up=number % 4 == 3)
        take("one of four is down, or up", core.set_up, name, is_up=True)
        take("time passes", core.tick)
        take("another limit", core.put_endpoint, replace(specs[number % 4], max_running_requests=100 + number))
        take("a part of a limit", core.set_quota, name, 50 + number % 9)
        take("the whole limit again", core.set_quota, name, None)
        if number % 10 == 0:
            take("an endpoint goes", core.remove_endpoints, [name])
            take("an endpoint comes", core.put_endpoint, specs[number % 4])
            take("it is up", core.set_up, name, is_up=True)
    for is_up in (False, True):
        for name in names:
            longest.all_at_once("all four are down, or up", core.set_up, name, is_up=is_up)
    return longest


def of_rules(waiting: int) -> Longest:
    """Other rules."""
    load = Load(waiting, True, 4)
    core, longest = load.core, Longest(load)
    policies = {
        "other rules": replace(POLICY, max_prompt_tokens=9000),
        "other budgets": replace(POLICY, classes=tuple(replace(klass, budget_s=1800.0) for klass in CLASSES)),
        "other priorities": replace(POLICY, classes=tuple(replace(klass, priority=3) for klass in CLASSES)),
        "rules of tenants": replace(POLICY, tenants=TenantRules(default=TenantRule(None, 3))),
        "classes get weights": replace(POLICY, classes=tuple(replace(klass, weight=2.0) for klass in CLASSES)),
        "they lose them": POLICY,
        "another order of who waits": replace(POLICY, fair=False),
        "the shortest first": replace(POLICY, short_first=True),
        "fair again": POLICY,
        "next choices": replace(POLICY, next_choices=3),
    }
    for what, policy in policies.items():
        longest.all_at_once(what, core.set_policy, policy)
    longest.all_at_once("models that the configuration names", core.know_models, [f"new-{n}" for n in range(1000)])
    longest.all_at_once("any model is expected", core.know_models, [], expects_any=True)
    for fair in (True, False, True):
        load.now += 0.4  # the third comes when who waits is looked at for .8 s
        longest.take("another order amid another", core.set_policy, replace(POLICY, fair=fair))
        for _ in range(5):
            longest.take("another order amid another", core.tick)
        for _ in range(200):
            longest.take("amid it an offer", core.offer, load.request())
            longest.take("amid it a release", core.release, load.held.pop(0))
            longest.take("amid it a cancel", core.cancel, next(core.waiting_tickets()))
    longest.settle("another order amid another")
    return longest


def of_room(waiting: int) -> Longest:
    """Room for all who wait, in one moment: at one endpoint, where all are at home, and at four."""
    longest = None
    for endpoints in (1, 4):
        load = Load(waiting, False, endpoints)
        longest = longest or Longest(load)
        longest.load = load
        roomy = [replace(one.spec, max_running_requests=2 * waiting) for one in load.core.endpoints.values()]
        longest.all_at_once(f"room for all, endpoints: {endpoints}", load.core.put_endpoints, roomy)
    assert longest is not None
    return longest


def of_queue_off(waiting: int) -> Longest:
    """The queue switched off: with four endpoints, with four or 500 that are down, and without any."""
    longest = None
    for what, endpoints in (("up", 4), ("down", 4), ("down, of 500", 500), ("gone", 4)):
        load = Load(waiting, endpoints == 4, endpoints)
        longest = longest or Longest(load)
        longest.load = load
        core, names = load.core, list(load.core.endpoints)
        if "down" in what:
            for name in names:
                core.set_up(name, 0.0, is_up=False)
        if what == "gone":
            core.remove_endpoints(names, 0.0)
        longest.settle("before that")
        longest.all_at_once(f"the queue is off, all are {what}", core.set_policy, replace(POLICY, enable_queue=False))
    assert longest is not None
    return longest


def of_clients_that_leave(waiting: int) -> Longest:
    """All who wait leave, each by itself; and all are refused, since the sidecar shuts down."""
    longest = None
    for order in ("who came last first", "in order", "in any order"):
        load = Load(waiting, False, 4)
        longest = longest or Longest(load)
        longest.load = load
        tickets = sorted(load.core.waiting_tickets(), key=lambda ticket: ticket.key[2], reverse=order[0] == "w")
        if order == "in any order":
            load.random.shuffle(tickets)
        for ticket in tickets:
            longest.take(f"all clients leave, {order}", load.core.cancel, ticket)
    assert longest is not None
    load = longest.load = Load(waiting, False, 4)
    while load.core.waiting:
        longest.take("the sidecar shuts down, 40 at a time", load.core.drain, most=40)
    return longest


def of_budgets_that_end(waiting: int) -> Longest:
    """All budgets end within half a second, while others come, go and leave."""
    longest = None
    for what, policy in (("", POLICY), ("the shortest first, ", replace(POLICY, short_first=True))):
        load = Load(0, True, 4)
        longest = longest or Longest(load)
        longest.load = load
        load.core.set_policy(policy, load.now)
        while load.core.waiting < waiting:
            load.now += 1e-5
            load.note(load.core.offer(load.request(), load.now))
        load.now = CLASSES[0].budget_s
        for _ in range(100_000):
            waits = next(load.core.waiting_tickets(), None)
            if waits is None:
                break
            longest.take(f"{what}all budgets end: a cancel", load.core.cancel, waits)
            longest.take(f"{what}all budgets end: a tick", load.core.tick)
            longest.take(f"{what}all budgets end: a release", load.core.release, load.held.pop(0))
    assert longest is not None
    return longest


def of_pools(waiting: int) -> Longest:
    """Two endpoints that serve four models: pools split and join."""
    load = Load(waiting, False, 2, models=4)
    core, longest = load.core, Longest(load)
    some = EndpointSpec("some", "", frozenset(load.models[:2]), LIMIT)
    all_but_one = EndpointSpec("endpoint-0", "", frozenset(load.models[1:]), LIMIT)
    longest.all_at_once("an endpoint comes that serves some models", core.put_endpoint, some)
    longest.all_at_once("it is up", core.set_up, "some", is_up=True)
    longest.all_at_once("it goes", core.remove_endpoints, ["some"])
    longest.all_at_once("a model is listed no more", core.put_endpoint, all_but_one)
    longest.all_at_once("it is listed again", core.put_endpoint, replace(all_but_one, models=frozenset(load.models)))
    for number, model in enumerate(load.models):
        own = EndpointSpec(f"own-{number}", "", frozenset({model}), LIMIT)
        longest.all_at_once("one comes for each model", core.put_endpoint, own)
        longest.all_at_once("and is up", core.set_up, f"own-{number}", is_up=True)
    longest.all_at_once("these go", core.remove_endpoints, [f"own-{number}" for number in range(4)])
    load.note(core.offer(Ticket(replace(load.request().request, allowed=frozenset({"endpoint-1"}))), load.now))
    longest.all_at_once("an endpoint comes where gateways choose", core.put_endpoint, some)
    longest.all_at_once("it goes where gateways choose", core.remove_endpoints, ["some"])
    longest.all_at_once("all endpoints go", core.remove_endpoints, ["endpoint-0", "endpoint-1"])
    while core.waiting:
        longest.take("an end, a hundred at a time", core.drain, most=100)
    return longest


def of_own_models(waiting: int) -> Longest:
    """Four endpoints that serve 500 or 1,000 models; then one comes for each, 25 in one moment, as a reload has it."""
    longest = None
    for models in (500, 1000):
        load = Load(waiting, False, 4, models=models)
        longest = longest or Longest(load)
        longest.load, core = load, load.core
        own = [EndpointSpec(f"own-{model}", "", frozenset({model}), LIMIT) for model in load.models]
        for first in range(0, len(own), 25):
            some = own[first : first + 25]
            longest.take(f"{models} models: 25 come that serve one each", core.put_endpoints, some)
            for spec in some:
                longest.take(f"{models} models: one of these is up", core.set_up, spec.name, is_up=True)
            longest.take(f"{models} models: a tick amid that", core.tick)
        longest.settle(f"{models} models: a tick amid that")
        for spec in own[:100]:
            longest.all_at_once(f"{models} models: one goes that serves one", core.remove_endpoints, [spec.name])
    assert longest is not None
    return longest


def of_leaders(waiting: int) -> Longest:
    """Three sidecars in one group, a third of all who wait at each: a follower dies, and the leader resigns.

    The longest callback of a sidecar's loop, on virtual time: see tests/unit/replicas/site.py.
    """
    longest = Longest(Load(0, False, 1))
    for what in ("a follower of two dies", "a leader of two resigns"):
        policy = Policy(classes=(RequestClass("std", 0, 3600.0),), shed=False, max_queued_requests=10**9)
        site = Site(1, engines=4, limit=LIMIT, policy=policy)
        site.run(6.0)
        for number in range(4 * LIMIT + waiting):
            site.send(f"s{number % 3}", work_s=3000.0, budget_s=3600.0)
        site.run(1.0)
        (leader,) = site.leaders()
        follower = next(one for one in site.alive if one is not leader)
        act = partial(site.kill, follower.place) if "dies" in what else leader.replica.resign
        site.clock.at(site.clock.now, act)
        end = site.clock.now + 3.0
        while (at := site.clock.next()) is not None and at <= end:
            began = time.thread_time_ns()
            site.step()
            longest.worst[what] = max(longest.worst.get(what, 0.0), (time.thread_time_ns() - began) / 1e6)
    return longest


def of_homes(waiting: int) -> Longest:
    """One endpoint, where everybody is at home, with a budget of its own for a wait while it is down."""
    load = Load(waiting, False, 1)
    core, longest = load.core, Longest(load)
    policy = replace(POLICY, no_endpoint_budget_s=3700.0)
    longest.take("other rules", core.set_policy, policy)
    for _ in range(2):
        longest.all_at_once("the only endpoint is down", core.set_up, "endpoint-0", is_up=False)
        longest.all_at_once("the only endpoint is up", core.set_up, "endpoint-0", is_up=True)
    longest.all_at_once("the only endpoint goes", core.remove_endpoints, ["endpoint-0"])
    load = longest.load = Load(waiting, False, 1)
    load.now += POLICY.patience_s + 1.0
    longest.settle("patience ends")
    load.note(load.core.put_endpoint(EndpointSpec("second", "", frozenset(), 2 * LIMIT), load.now))
    longest.all_at_once("a second endpoint is up", load.core.set_up, "second", is_up=True)
    return longest


def of_picked(waiting: int) -> Longest:
    """Gateways choose: each request may go to two of eight endpoints, or to any."""
    load = Load(0, False, 8, models=2)
    core, names, random = load.core, list(load.core.endpoints), load.random
    while core.waiting < waiting:
        allowed = frozenset(random.sample(names, 2)) if random.random() < 0.9 else frozenset(names)
        load.note(core.offer(Ticket(replace(load.request().request, allowed=allowed)), load.now))
    longest = Longest(load)
    fewer = EndpointSpec(names[0], "", frozenset(load.models[:1]), LIMIT)
    longest.all_at_once("gateways choose: an endpoint goes", core.remove_endpoints, names[:1])
    spec = EndpointSpec(names[0], "", frozenset(load.models), LIMIT)
    longest.all_at_once("gateways choose: it comes back", core.put_endpoint, spec)
    longest.all_at_once("gateways choose: and is up", core.set_up, names[0], is_up=True)
    longest.all_at_once("gateways choose: a model is listed no more", core.put_endpoint, fewer)
    longest.all_at_once("gateways choose: a model is known", core.know_models, ["another"])
    return longest


def of_many(waiting: int) -> Longest:
    """500 endpoints that serve 1,000 models."""
    load = Load(waiting, False, 500, models=1000)
    core, longest = load.core, Longest(load)
    names, specs = list(core.endpoints), [endpoint.spec for endpoint in core.endpoints.values()]
    others = [replace(one, max_running_requests=LIMIT + 1) for one in specs[:40]]
    longest.all_at_once("500 endpoints: other rules", core.set_policy, replace(POLICY, max_prompt_tokens=9000))
    longest.all_at_once("500 endpoints: another order", core.set_policy, replace(POLICY, fair=False))
    longest.all_at_once("500 endpoints: one goes", core.remove_endpoints, names[:1])
    longest.all_at_once("500 endpoints: one comes", core.put_endpoint, specs[0])
    longest.all_at_once(
        "500 endpoints: 40 get another limit",
        core.put_endpoints,
        others,
    )
    longest.all_at_once("500 endpoints: 495 go", core.remove_endpoints, names[:495])
    for first in range(0, 495, 40):
        longest.all_at_once("500 endpoints: 40 come", core.put_endpoints, specs[first : min(first + 40, 495)])
    longest.all_at_once("500 endpoints: all go", core.remove_endpoints, names)
    return longest


def of_changes(waiting: int) -> Longest:
    """500 endpoints that serve one model: what a reload, or discovery, changes of them, 40 in one moment; and back."""
    load = Load(waiting, False, 500, models=1)
    core, longest = load.core, Longest(load)
    specs = [endpoint.spec for endpoint in core.endpoints.values()]
    names = [spec.name for spec in specs]
    changes = {
        "limits": [replace(spec, max_running_requests=LIMIT + 1) for spec in specs],
        "models": [replace(spec, models=spec.models | {f"{spec.name}'s own"}) for spec in specs],
        "addresses": [replace(spec, address=f"other-{spec.name}") for spec in specs],
    }
    for what, others in changes.items():
        for some in (others, specs):
            for first in range(0, 500, 40):
                longest.all_at_once(f"40 of 500 get other {what}", core.put_endpoints, some[first : first + 40])
    longest.all_at_once("half of 500 go", core.remove_endpoints, names[::2])
    for first in range(0, 500, 40):
        longest.all_at_once("40 of these come back", core.put_endpoints, specs[first : first + 40])
    for is_up in (False, True):
        for name in names:
            longest.all_at_once("all 500 are down, or up", core.set_up, name, is_up=is_up)
    return longest


def of_tenants(waiting: int) -> Longest:
    """10,000 tenants: other rules of theirs, another order, and a class that is gone."""
    load = Load(waiting, True, 4, tenants=10_000)
    core, longest = load.core, Longest(load)
    named = {f"tenant-{number}": TenantRule(None, number % 3, 1.0 + number % 2) for number in range(10_000)}
    longest.all_at_once("10,000 tenants get rules", core.set_policy, replace(POLICY, tenants=TenantRules(named)))
    for _ in range(10_000):
        longest.take("10,000 tenants: an offer", core.offer, load.request())
        longest.take("10,000 tenants: a release", core.release, load.held.pop(0))
    longest.all_at_once("10,000 tenants lose them", core.set_policy, POLICY)
    longest.all_at_once("10,000 tenants: another order", core.set_policy, replace(POLICY, fair=False))
    longest.all_at_once("10,000 tenants: and back", core.set_policy, POLICY)
    longest.all_at_once("a class is gone", core.set_policy, replace(POLICY, classes=CLASSES[:2]))
    weighted = tuple(replace(klass, weight=2.0) for klass in CLASSES)
    longest.all_at_once("classes with weights", core.set_policy, replace(POLICY, classes=weighted))
    longest.all_at_once("one of these is gone", core.set_policy, replace(POLICY, classes=weighted[:2]))
    return longest


def of_dry_run(waiting: int) -> Longest:
    """The twin of a dry run, where so many would wait."""
    load = Load(0, False, 4)
    core, longest = load.core, Longest(load)
    run = DryRun(POLICY, core.endpoints)

    def watch(event: Event, decisions: list[Decision]) -> None:
        began = time.thread_time_ns()
        run.happened(event, decisions)
        took_ms = (time.thread_time_ns() - began) / 1e6
        what = f"dry run: {type(event).__name__}"
        longest.worst[what] = max(longest.worst.get(what, 0.0), took_ms)

    for endpoint in core.endpoints.values():
        run._other.put_endpoint(endpoint.spec, load.now)
        run._other.set_up(endpoint.name, load.now, is_up=True)
    core.set_policy(replace(POLICY, enable_queue=False), load.now)
    core.watch(watch)
    while len(load.held) < waiting:
        load.now += 1e-5
        load.note(core.offer(load.request(), load.now))
    for is_up in (False, True):
        for name in list(core.endpoints):
            load.note(core.set_up(name, load.now, is_up=is_up))
    for _ in range(300):
        load.now += 0.001
        load.note(core.offer(load.request(), load.now))
        load.note(core.release(load.held.pop(0), load.now))
    return longest


PARTS = {
    "four": of_four,
    "rules": of_rules,
    "room": of_room,
    "off": of_queue_off,
    "leave": of_clients_that_leave,
    "budgets": of_budgets_that_end,
    "pools": of_pools,
    "own_models": of_own_models,
    "leaders": of_leaders,
    "homes": of_homes,
    "picked": of_picked,
    "many": of_many,
    "changes": of_changes,
    "tenants": of_tenants,
    "dry_run": of_dry_run,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--waiting", type=int, default=50_000)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    asked = parser.parse_args()
    print(f"with {asked.waiting} waiting, ms: the longest, and that of the ticks that follow")
    for part in asked.parts or PARTS:
        longest = PARTS[part](asked.waiting)
        longest.show()
        del longest
        gc.collect()


if __name__ == "__main__":
    main()
