"""Endpoints come and go, and the one with the most room is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from extproc.admission.laws import (
    AdapterLaw,
    AnswerLaw,
    CounterLaw,
    ForeignLaw,
    GuardLaw,
    HealthLaw,
    KvLaw,
    Laws,
    PaceLaw,
    PromptLaw,
    StepLaw,
    TokenLaw,
)
from extproc.admission.limit import AdaptiveLimit
from extproc.admission.load import Load
from extproc.admission.ticket import State
from extproc.admission.values import EndpointSpec, Policy

from .desk import CLASSES, Desk, in_use, one


def test_a_removed_endpoint_gets_nothing_and_its_leases_run_out() -> None:
    desk = Desk(one("a", 3), one("b", 3))
    held = desk.ask(home="a")
    desk.remove("a")
    assert {desk.where(desk.ask()) for _ in range(3)} == {"b"}
    assert "a" in desk.core.endpoints
    desk.release(held)
    assert "a" not in desk.core.endpoints


def test_an_endpoint_that_comes_back_keeps_its_books() -> None:
    desk = Desk(one("a", 2))
    held = desk.fill(2, prompt_tokens=100)
    desk.remove("a")
    desk.put(one("a", 3))
    assert list(desk.endpoint("a").leases) == held
    assert in_use(desk.fill(2)) == [True, False]


def test_events_for_an_unknown_endpoint_are_ignored() -> None:
    desk = Desk(one("a"))
    desk.observe("nobody", Load(kv_usage=1.0))
    desk.set_up("nobody", is_up=False)
    desk.remove("nobody")
    assert list(desk.core.endpoints) == ["a"]


def test_equal_endpoints_take_turns() -> None:
    desk = Desk(*(one(name, 10) for name in "abcd"))
    holds = [desk.where(ticket) for ticket in desk.fill(20)]
    assert [holds.count(name) for name in "abcd"] == [5] * 4
    for _ in range(40):
        desk.release(next(iter(desk.leased)))
        desk.ask()
    assert all(abs(len(desk.endpoint(name).leases) - 5) <= 1 for name in "abcd")


def test_one_request_after_the_other_visits_all_idle_endpoints() -> None:
    desk = Desk(*(one(name, 10) for name in "abc"))
    visited = []
    for _ in range(6):
        ticket = desk.ask()
        visited.append(desk.where(ticket))
        desk.release(ticket)
    assert sorted(visited[:3]) == sorted(visited[3:]) == ["a", "b", "c"]


def test_the_endpoint_with_the_biggest_share_free_is_chosen() -> None:
    desk = Desk(one("small", 2), one("big", 10))
    assert sorted(str(desk.where(ticket)) for ticket in desk.fill(6)) == ["big"] * 5 + ["small"]


def test_an_endpoint_counts_all_that_was_ever_sent_to_it() -> None:
    desk = Desk(one("a", 2))
    assert desk.endpoint("a").dispatched == 0
    for ticket in desk.fill(3)[:2]:
        desk.release(ticket)
    assert desk.endpoint("a").dispatched == 3


@pytest.mark.parametrize(("prompt_a", "prompt_b", "limit_b", "goes_to"), [(7800, 0, 10, "b"), (1800, 0, 3, "a")])
def test_the_fullest_of_an_endpoints_limits_says_how_full_it_is(
    prompt_a: int, prompt_b: int, limit_b: int, goes_to: str
) -> None:
    desk = Desk(*(one(name, limit, kv_capacity_tokens=10_000) for name, limit in (("a", 10), ("b", limit_b))))
    for _ in range(2):
        desk.ask(home="b", prompt_tokens=prompt_b)
    desk.ask(home="a", prompt_tokens=prompt_a)
    assert desk.where(desk.ask()) == goes_to


def test_a_full_endpoint_that_was_removed_gets_nothing_as_its_leases_run_out() -> None:
    desk = Desk(one("a", 2), one("b", 1))
    held = [desk.ask(home="a") for _ in range(2)]
    desk.ask(home="b")
    waits = desk.ask()
    desk.remove("a")
    desk.release(held[0])
    assert waits.state is State.WAITING


def test_who_asks_for_a_home_that_runs_out_goes_elsewhere_at_once() -> None:
    desk = Desk(one("a", 2), one("b", 2))
    desk.ask(home="a")
    desk.remove("a")
    assert desk.where(desk.ask(home="a")) == "b"


def test_of_endpoints_that_get_room_together_the_emptiest_is_filled_first() -> None:
    desk = Desk(one("a", 10), one("b", 10), first_byte_probe=True)
    for _ in range(3):
        desk.ask(home="a", prompt_tokens=1000)
    desk.ask(home="b", prompt_tokens=3000)
    waits = desk.ask(prompt_tokens=4000)
    assert waits.state is State.WAITING
    desk.set_policy(Policy(classes=CLASSES, shed=False))
    assert desk.where(waits) == "b"


def test_constants_that_are_reloaded_hold_for_endpoints_and_pools_that_are_there_and_that_come() -> None:
    laws = Laws(
        KvLaw(share=0.5),
        PromptLaw(chunk=5000),
        AnswerLaw(hope=0.1),
        CounterLaw(far=9.0),
        StepLaw(noise=0.5),
        TokenLaw(own=1.0),
        PaceLaw(sure=3.0),
        GuardLaw(passes=3),
        HealthLaw(eject_after=9),
        ForeignLaw(steady_s=1.0),
        AdapterLaw(below=0.1),
    )
    desk = Desk(EndpointSpec("a"))
    desk.set_policy(replace(desk.core.policy, laws=laws))
    endpoint = desk.endpoint("a")
    limit = endpoint.limit
    assert isinstance(limit, AdaptiveLimit)
    held = (endpoint.kv.law, endpoint.prefill.law, limit.slowdown.law, endpoint.counters.law, endpoint.steps.law)
    health = endpoint.health.law
    (pool,) = endpoint.pools
    judged = (pool.pace.law, pool.guard.law, health, endpoint.strangers.law, desk.core.policy.laws.adapters)
    assert Laws(*held, desk.core._tokens.law, *judged) == laws
    assert endpoint.missing.law is health
    assert endpoint.prompt_limit == 2 * 5000
    desk.put(EndpointSpec("b", models=frozenset({"m"})))
    new = desk.endpoint("b")
    assert (new.health.law, new.missing.law, new.strangers.law) == (health, health, laws.foreign)
    desk.put(EndpointSpec("b", models=frozenset({"m", "n"})), EndpointSpec("c", models=frozenset({"n"})))
    desk.put(EndpointSpec("a", models=frozenset({"m"})))
    assert {(one.pace.law, one.guard.law) for one in desk.core.pools()} == {(laws.pace, laws.guard)}
