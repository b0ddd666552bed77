"""What an event costs must not grow with what it does not touch: lines are counted, which no busy machine changes."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import pytest

from extproc.admission import settling
from extproc.admission.controller import Controller
from extproc.admission.endpoint import Endpoint
from extproc.admission.fairness import Memory
from extproc.admission.pools import Pools
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Dispatch, EndpointSpec, Policy, Request, RequestClass
from extproc.pure import is_compiled

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.pool import Pool
    from extproc.admission.values import Decision


def lines_of(work: Callable[[], object]) -> int:
    """Count the lines of Python that `work` runs; hypothesis' own, run at each collection of garbage, are none."""
    count = 0

    def note(frame: object, event: str, arg: object) -> object:
        nonlocal count
        count += event == "line"
        return note

    before = sys.gettrace()
    gc.disable()
    sys.settrace(note)  # type: ignore[arg-type]
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def core_of(
    endpoints: int, models: Callable[[int], list[str]] = lambda _: [], limit: int = 4, cache: int | None = None
) -> Controller:
    core = Controller(Policy(shed=False, patience_s=0.0))
    for number in range(endpoints):
        core.put_endpoint(EndpointSpec(f"e{number}", "", frozenset(models(number)), limit, cache), 0.0)
        core.set_up(f"e{number}", 0.0, is_up=True)
    return core


@pytest.mark.parametrize(
    "models",
    [lambda _: [], lambda _: ["m"], lambda number: [f"m{number}"], lambda number: ["all", f"m{number % 7}"]],
    ids=["no models", "one model", "each its own", "some shared"],
)
def test_adding_twice_as_many_endpoints_costs_twice_as_much(models: Callable[[int], list[str]]) -> None:
    few, many = lines_of(lambda: core_of(40, models)), lines_of(lambda: core_of(80, models))
    assert many < 2.2 * few


def test_twice_as_many_endpoints_that_go_in_one_moment_cost_twice_as_much() -> None:
    def going(count: int) -> int:
        core, names = core_of(2 * count), [f"e{number}" for number in range(count)]
        cost = lines_of(lambda: core.remove_endpoints(names, 1.0))
        assert len(core.endpoints) == count
        return cost

    assert going(80) < 2.2 * going(40)


def test_endpoints_that_go_in_one_moment_leave_what_those_leave_that_go_one_by_one() -> None:
    def after(*, at_once: bool) -> tuple[str, int, list[tuple[str, int, bool]], list[list[str]]]:
        core = core_of(5, lambda number: ["idle"] if number == 4 else ["m", f"own{number % 2}"])
        for number in range(12):
            core.offer(Ticket(Request(f"r{number}", 1.0, model=["m", "own0", "own1"][number % 3])), 1.0)
        if at_once:
            core.remove_endpoints(["e1", "e3", "nobody", "e4", "e4"], 2.0)
            assert core.remove_endpoints(["e1", "nobody"], 2.0) == []
        else:
            for name in ("e1", "e3", "e4"):
                core.remove_endpoints([name], 2.0)
        endpoints = [(name, len(one.leases), one.removed) for name, one in core.endpoints.items()]
        members = [[one.name for one in pool.members] for pool in core.pools()]
        assert {name for names in members for name in names} == {"e0", "e2"}
        return repr(core), core.waiting, endpoints, members

    assert after(at_once=True) == after(at_once=False)


@pytest.mark.parametrize(
    "models", [lambda _: ["m", "other"], lambda number: ["m", f"m{number}"]], ids=["the same ones", "each its own"]
)
def test_twice_as_many_endpoints_that_serve_other_models_from_one_moment_on_cost_twice_as_much(
    models: Callable[[int], list[str]],
) -> None:
    def changing(count: int) -> int:
        core = core_of(count, lambda _: ["m"])
        specs = [EndpointSpec(f"e{number}", "", frozenset(models(number)), 4) for number in range(count)]
        cost = lines_of(lambda: core.put_endpoints(specs, 1.0))
        assert all(core.knows_model(model) for model in models(count - 1))
        return cost

    assert changing(80) < 2.2 * changing(40)


@pytest.mark.parametrize("seed", range(8))
def test_endpoints_that_come_or_change_in_one_moment_are_as_those_that_do_one_by_one(seed: int) -> None:
    random, together, apart = Random(seed), core_of(0), core_of(0)

    def spec(number: int) -> EndpointSpec:
        models = frozenset(random.sample(("a", "b", "c"), random.randrange(3)))
        return EndpointSpec(f"e{number}", "", models, random.choice((1, 2, None)))

    def state(core: Controller) -> list[object]:
        pools = [core.pools(), *({core._books.pools.find(model): None} for model in (None, "a", "b", "c", "unknown"))]
        facts = [
            [
                (pool.usable, pool.is_served, *sorted(one.name for one in pool.open), *_facts(pool))
                for pool in of
                if pool
            ]
            for of in pools
        ]
        return [repr(core), sorted(facts[0], key=str), facts[1:]]

    for number in range(60):
        specs = [spec(one) for one in random.sample(range(6), random.choice((1, 2, 5)))]
        together.put_endpoints(specs, float(number))
        for one in specs:
            apart.put_endpoints([one], float(number))
        gone, asked = f"e{random.randrange(6)}", random.choice(("a", "b", None))
        for core in (together, apart):
            core.remove_endpoints([gone], float(number))
            ticket = Ticket(Request("r", float(number), model=asked, home="e1"))
            core.offer(ticket, float(number))
            if ticket.state.name == "WAITING":
                core.cancel(ticket, float(number))
        assert state(together) == state(apart), (number, specs)


@pytest.mark.parametrize("waiting", [False, True])
def test_a_request_costs_the_same_among_two_hundred_endpoints_as_among_ten(waiting: bool) -> None:
    def round_of(endpoints: int) -> int:
        core = core_of(endpoints)
        held: list[Ticket] = []

        def note(decisions: list[Decision]) -> None:
            held.extend(decision.ticket for decision in decisions if isinstance(decision, Dispatch))

        def offer() -> None:
            note(core.offer(Ticket(Request("", 1.0)), 1.0))

        for _ in range(endpoints * (5 if waiting else 2)):
            offer()
        assert bool(core.waiting) is waiting
        held.sort(key=lambda ticket: ticket.key)

        def rounds() -> None:
            for _ in range(20):
                offer()
                note(core.release(held.pop(0), 1.0))

        return lines_of(rounds)

    assert round_of(200) < 1.2 * round_of(10)


def test_pools_that_grow_by_one_endpoint_are_as_those_made_anew() -> None:
    random, names = Random(7), ["a", "b", "c", "d"]
    for _ in range(300):
        grown, fresh = Pools(), Pools()
        grown.know(["known"])
        fresh.know(["known"])
        specs = [
            EndpointSpec(str(number), models=frozenset(random.sample(names, random.randrange(3))))
            for number in range(5)
        ]
        for count, spec in enumerate(specs, 1):
            endpoint = Endpoint(spec, Policy())
            endpoint.pools = []
            if grown.join(endpoint) is None:
                grown.regroup([*grown.every.members, endpoint])
            fresh.regroup([Endpoint(spec, Policy()) for spec in specs[:count]])
            for name in (None, "known", *names):
                assert _members(grown, name) == _members(fresh, name), (specs[:count], name)
                assert grown.misses_model == fresh.misses_model
            assert sorted(map(_facts, grown), key=str) == sorted(map(_facts, fresh), key=str)
            for pool in grown:
                assert all(pool in endpoint.pools for endpoint in pool.members)


@pytest.mark.skipif(is_compiled(), reason="a method of a compiled class can't be replaced")
@pytest.mark.parametrize("seed", range(8))
def test_pools_that_lose_one_endpoint_are_as_those_made_anew(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random, names = Random(seed), ["a", "b", "c", None, "unknown"]
    shrinks, anew = cores = core_of(0), core_of(0)
    leave, followed = Pools.leave, 0

    def note(pools: Pools, endpoint: Endpoint) -> list[Pool] | None:
        nonlocal followed
        left = leave(pools, endpoint) if pools is shrinks._books.pools else None
        followed += left is not None
        return left

    def state(core: Controller) -> list[object]:
        pools = core._books.pools
        found = [pools.find(name) for name in names]
        facts = [(pool.usable, pool.is_served, sorted(one.name for one in pool.open), *_facts(pool)) for pool in pools]
        return [
            sorted(fact for fact in facts if fact[-1]),  # who waits in one that is for no models is yet to be settled
            [pool and _facts(pool) for pool in found],
            [pools.misses_model, *(pools.is_awaited(name) for name in names)],
            sorted(ticket.request.id for ticket in core.waiting_tickets()),
            {name: len(one.leases) for name, one in core.endpoints.items()},
        ]

    monkeypatch.setattr(Pools, "leave", note)
    held: list[tuple[Ticket, ...]] = []
    for number in range(150):
        name, home = (f"e{random.randrange(7)}" for _ in range(2))
        spec = EndpointSpec(name, "", frozenset(random.sample(("a", "b", "c"), random.randrange(4))), 2)
        comes, is_up, ends = random.random() < 0.6, random.random() < 0.8, random.random() < 0.3
        request = Request(f"r{number}", float(number), model=random.choice(names), home=home, budget_s=40.0)
        held.append((Ticket(request), Ticket(request)))
        over = held.pop(random.randrange(len(held) - 1)) if ends and len(held) > 1 else (None, None)
        for core, new, old in zip(cores, held[-1], over, strict=True):
            change(core, spec if comes else name, float(number), is_up=is_up)
            if old is not None and old.state is State.LEASED:
                core.release(old, float(number))
            core.offer(new, float(number))
            while core.next_deadline() == number:
                core.tick(float(number))
        assert state(shrinks) == state(anew), number
    assert followed > 10


def change(core: Controller, what: EndpointSpec | str, now: float, *, is_up: bool) -> None:
    """Have an endpoint come, or change, or, if it is only named, go."""
    if isinstance(what, str):
        core.remove_endpoints([what], now)
    else:
        core.put_endpoint(what, now)
        core.set_up(what.name, now, is_up=is_up)


def test_one_of_many_endpoints_that_goes_costs_the_same_however_many_serve_other_models() -> None:
    """All pools were made anew: with 500 that serve a model of their own each it was 11 to 26 ms."""

    def leaving(count: int, models: Callable[[int], list[str]]) -> int:
        core = core_of(count, models)
        core.put_endpoint(EndpointSpec("all", "", frozenset(f"m{number}" for number in range(count))), 0.0)
        return max(lines_of(lambda name=name: core.remove_endpoints([name], 1.0)) for name in ("e1", "e2", "e3"))

    for models in (lambda number: [f"m{number}"], lambda number: [f"m{number // 2}"]):
        assert leaving(160, models) - leaving(80, models) < 80 * 12


def test_a_change_of_one_endpoint_looks_at_no_more_than_two_of_the_addresses_that_were_left() -> None:
    core, names = Controller(Policy(shed=False)), [f"e{number}" for number in range(20)]
    core.put_endpoints([EndpointSpec(name, address=name) for name in names], 0.0)
    for name in names:
        core.set_up(name, 0.0, is_up=True)
    for _ in range(80):
        core.offer(Ticket(Request("", 1.0)), 1.0)
    core.put_endpoint(EndpointSpec("new", address="x"), 1.0)
    core.remove_endpoints(names, 1.0)
    before = dict(core._fleet._left)
    assert len(before) == 20
    core.put_endpoint(EndpointSpec("new", address="x", max_running_requests=9), 2.0)
    assert sum(left is not before[address] for address, left in core._fleet._left.items()) <= 2


def test_who_fits_into_no_cache_costs_the_same_among_two_hundred_endpoints_as_among_ten() -> None:
    def offers(endpoints: int) -> int:
        core = core_of(endpoints, limit=100, cache=1000)
        for number in range(2 * endpoints):
            core.offer(Ticket(Request("", 1.0, prompt_tokens=200 + number % 7)), 1.0)
        assert not core.waiting
        assert not any(held.value != "kv" for held in core.holds().values())
        return lines_of(lambda: [core.offer(Ticket(Request("", 1.0, prompt_tokens=300)), 1.0) for _ in range(20)])

    few, many = offers(10), offers(200)
    assert many < 1.5 * few


def _members(pools: Pools, name: str | None) -> list[str] | None:
    pool = pools.find(name)
    return None if pool is None else [endpoint.name for endpoint in pool.members]


def _facts(pool: object) -> tuple[list[str], int]:
    return [endpoint.name for endpoint in pool.members], pool.names  # type: ignore[attr-defined]


def test_who_waits_for_a_model_that_gets_an_endpoint_of_its_own_goes_there() -> None:
    core = core_of(1, lambda _: ["shared", "own"], limit=1)
    first, shared, own = (Ticket(Request(name, 0.0, model=name)) for name in ("shared", "shared", "own"))
    for ticket in (first, shared, own):
        core.offer(ticket, 0.0)
    assert core.waiting == 2
    decisions = core.put_endpoint(EndpointSpec("new", models=frozenset({"own"}), max_running_requests=1), 1.0)
    assert [(decision.ticket, decision.endpoint) for decision in decisions] == [(own, "new")]
    assert [decision.ticket for decision in core.release(first, 2.0)] == [shared]


def test_an_endpoint_that_goes_costs_those_nothing_who_wait_on_where_they_were() -> None:
    def leaving(waiting: int) -> int:
        core = core_of(3, lambda _: ["m"])
        for _ in range(12 + waiting):
            core.offer(Ticket(Request("", 1.0, model="m")), 1.0)
        assert core.waiting == waiting
        return lines_of(lambda: core.remove_endpoints(["e2"], 2.0))

    assert leaving(1000) < 1.2 * leaving(40)


CHANGES: dict[str, Callable[[Controller], object]] = {
    "a pool splits": lambda core: core.put_endpoint(EndpointSpec("new", models=frozenset({"m"})), 2.0),
    "an endpoint goes that some may go to alone": lambda core: core.remove_endpoints(["e1"], 2.0),
    "all endpoints go": lambda core: core.remove_endpoints([f"e{number}" for number in range(3)], 2.0),
    "the last one is down": lambda core: core.set_up("e0", 2.0, is_up=False),
    "another order": lambda core: core.set_policy(Policy(shed=False, fair=False), 2.0),
    "the shortest first": lambda core: core.set_policy(Policy(shed=False, short_first=True), 2.0),
    "another order for the third time in a second": lambda core: [
        core.set_policy(Policy(shed=False, fair=bool(number % 2)), 1.0 + number / 2) for number in range(3)
    ],
    "weights": lambda core: core.set_policy(Policy(classes=(RequestClass("d", weight=2.0),), shed=False), 2.0),
    "the queue is off": lambda core: core.set_policy(Policy(enable_queue=False), 2.0),
    "room for all": lambda core: core.put_endpoint(replace(core.endpoints["e0"].spec, max_running_requests=9000), 2.0),
    "a drain": lambda core: core.drain(2.0, 40),
    "a model is known": lambda core: core.know_models(["another"], 2.0),
    "time passes": lambda core: core.tick(2.0),
    "all budgets end": lambda core: core.tick(5000.0),
}


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_no_event_costs_more_the_more_wait(what: str, chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`chosen`: gateways choose, so that each may go to two endpoints alone."""
    monkeypatch.setattr(settling, "PIECE", 50)

    def cost(waiting: int) -> int:
        core = core_of(3, lambda _: ["m", "other"])
        for name in ("e1", "e2"):
            core.set_up(name, 0.5, is_up=False)
        for number in range(4 + waiting):
            allowed = frozenset({"e0", f"e{1 + number % 2}"}) if chosen else None
            core.offer(Ticket(Request("", 1.0, model=("m", "other")[number % 2], allowed=allowed)), 1.0)
        assert core.waiting == waiting
        worst = lines_of(lambda: CHANGES[what](core))
        for _ in range(25):
            worst = max(worst, lines_of(lambda: core.tick(2.0)))
        return worst

    assert cost(3000) < 1.2 * cost(1000) + 200


def costliest_tick_of(count: int, waiting: int) -> int:
    """Have so many wait for so many models of which each gets an endpoint of its own, and settle them all."""
    models = [f"m{number}" for number in range(count)]
    core = core_of(1, lambda _: models)
    for number in range(4 + waiting):
        core.offer(Ticket(Request("", 1.0, model=models[number % count])), 1.0)
    core.put_endpoints([EndpointSpec(f"own{model}", "", frozenset({model}), 1) for model in models], 2.0)
    worst = 0
    while core.next_deadline() == 2.0:
        worst = max(worst, lines_of(lambda: core.tick(2.0)))
    return worst


def test_a_tick_that_settles_some_of_many_pools_costs_no_more_the_more_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at some of them left a run for each pool, and all runs of all pools were merged with each tick."""
    monkeypatch.setattr(settling, "PIECE", 20)
    assert costliest_tick_of(20, 3000) < 1.2 * costliest_tick_of(20, 1000)


def test_a_tick_that_settles_some_of_very_many_pools_costs_the_same_however_many_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All pools were looked at in each tick, for their lines and their room, though most had nobody in the piece."""
    monkeypatch.setattr(settling, "PIECE", 20)
    assert costliest_tick_of(160, 4 * 160) < 1.2 * costliest_tick_of(40, 4 * 40)


def test_an_event_that_sends_those_whom_it_settles_costs_hardly_more_than_one_that_finds_no_room() -> None:
    def cost(limit: int) -> int:
        core = core_of(1, limit=limit)
        core.set_up("e0", 0.5, is_up=False)
        for _ in range(1000):
            core.offer(Ticket(Request("", 1.0)), 1.0)
        worst = lines_of(lambda: core.set_up("e0", 1.0, is_up=True))
        while core.next_deadline() == 1.0:
            worst = max(worst, lines_of(lambda: core.tick(1.0)))
        assert core.waiting == 1000 - limit
        return worst

    assert cost(1000) < 1.6 * cost(1)


def test_of_those_who_are_settled_no_more_go_in_one_event_where_endpoints_are_nearly_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To 82 endpoints with eight slots left each 194 were sent in one event, where 83 are meant to be."""
    monkeypatch.setattr(settling, "PIECE", 60)
    models = [f"m{number}" for number in range(20)]
    core = core_of(1, lambda _: models, limit=1)
    for number in range(20 * 18):
        core.offer(Ticket(Request("", 1.0, model=models[number % 20])), 1.0)
    core.put_endpoints([EndpointSpec(f"own{model}", "", frozenset({model}), 16) for model in models], 2.0)
    for model in models:
        core.set_up(f"own{model}", 2.0, is_up=True)
    sent = []
    while core.next_deadline() == 2.0:
        sent.append(len(core.tick(2.0)))
    assert (max(sent), core.waiting) == (60 / settling.GOING, 20 * 18 - 20 * 16 - 1)


def test_who_goes_where_all_are_down_as_the_queue_is_off_costs_the_same_however_many_endpoints_there_are() -> None:
    def cost(endpoints: int) -> int:
        core = core_of(endpoints)
        for number in range(endpoints):
            core.set_up(f"e{number}", 0.5, is_up=False)
        for _ in range(1000):
            core.offer(Ticket(Request("", 1.0)), 1.0)
        core.set_policy(Policy(shed=False, enable_queue=False), 1.0)
        worst = 0
        while core.next_deadline() == 1.0:
            worst = max(worst, lines_of(lambda: core.tick(1.0)))
        assert not core.waiting
        return worst

    assert cost(400) < cost(40) + 360 * 20


def test_twice_as_many_pools_that_get_shares_of_their_own_cost_twice_as_much() -> None:
    def shares(count: int) -> int:
        memory = Memory()
        return lines_of(lambda: [memory.share() for _ in range(count)])

    assert shares(300) < 2.3 * shares(150)


def test_names_of_models_that_come_and_go_leave_no_pools() -> None:
    core = core_of(3, lambda _: ["base"])
    for generation in range(200):
        models = frozenset({"base", f"adapter-{generation}"})
        core.put_endpoint(EndpointSpec("e0", models=models, max_running_requests=4), float(generation))
    assert len(list(core.pools())) <= 4


def test_a_request_costs_the_same_at_an_endpoint_of_a_thousand_models_and_after_two_thousand_reloads() -> None:
    def round_of(models: int, reloads: int) -> int:
        core = core_of(1, lambda _: [f"m{number}" for number in range(models)])
        for number in range(reloads):
            served = frozenset({"m0", f"new-{number}"})
            core.put_endpoint(EndpointSpec("e0", models=served, max_running_requests=4), 0.0)

        def rounds() -> None:
            for _ in range(20):
                ticket = Ticket(Request("", 1.0, model="m0"))
                core.offer(ticket, 1.0)
                core.release(ticket, 1.0)

        rounds()
        return lines_of(rounds)

    plain = round_of(1, 0)
    assert round_of(1000, 0) < 1.1 * plain
    assert round_of(1, 2000) < 1.1 * plain
