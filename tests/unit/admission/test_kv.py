"""KV tokens: what the leases of an endpoint will need of its cache."""

from __future__ import annotations

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.ticket import State

from .desk import GUESS, Desk, in_use, one


def test_estimated_kv_tokens_stay_below_their_share_of_the_cache() -> None:
    desk = Desk(one("a", 100, kv_capacity_tokens=10_000))
    tickets = desk.fill(20, prompt_tokens=800)  # and 200 of output
    assert sum(in_use(tickets)) == int(LAWS.kv.share * 10)


def test_what_the_engine_uses_beyond_our_estimate_counts_too() -> None:
    desk = Desk(one("a", 100, kv_capacity_tokens=10_000))
    desk.ask(prompt_tokens=800)
    desk.observe("a", Load(kv_usage=0.8))
    assert in_use(desk.fill(2, prompt_tokens=800)) == [True, False]


@pytest.mark.parametrize("how", ["page", "report", "reload"])
def test_what_runs_when_the_size_of_the_cache_is_told_is_in_its_books(how: str) -> None:
    desk = Desk(one("a", 100))
    running = desk.fill(3, prompt_tokens=800)
    match how:
        case "page":
            desk.observe("a", Load(kv_capacity_tokens=4000))
        case "report":
            desk.report("a", Load(kv_capacity_tokens=4000))
        case "reload":
            desk.put(one("a", 100, kv_capacity_tokens=4000))
    assert desk.endpoint("a").kv.tokens == 3 * (800 + GUESS)
    waiting = desk.ask(prompt_tokens=800)
    assert waiting.state is State.WAITING
    desk.release(running[0])
    assert waiting.state is State.LEASED
    assert desk.endpoint("a").kv.tokens == 3 * (800 + GUESS)


def test_an_idle_endpoint_takes_any_one_request_however_big() -> None:
    desk = Desk(one("a", 100, kv_capacity_tokens=1000))
    giant, next_one = desk.fill(2, prompt_tokens=50_000)
    assert in_use([giant, next_one]) == [True, False]
    desk.release(giant)
    assert next_one.state is State.LEASED


def test_a_dropped_kv_capacity_stops_limiting_until_telemetry_tells_one() -> None:
    desk = Desk(one("a", 100, kv_capacity_tokens=1000))
    tickets = desk.fill(4, prompt_tokens=800)
    assert sum(in_use(tickets)) == 1
    desk.put(one("a", 100))
    assert all(in_use(tickets))


def test_an_engine_that_says_it_has_no_cache_at_all_is_not_believed() -> None:
    """Found by the property machine: a reload took the 0 over, and the next pick divided by it."""
    desk = Desk(one("a", 10, kv_capacity_tokens=1000), one("b", 10))
    desk.observe("a", Load(kv_capacity_tokens=0))
    desk.put(one("a", 10))
    assert desk.endpoint("a").kv.capacity is None
    assert all(in_use(desk.fill(4)))


def test_a_reload_keeps_the_kv_capacity_that_telemetry_told() -> None:
    desk = Desk(one("a", 100))
    desk.observe("a", Load(kv_capacity_tokens=2000))
    desk.put(one("a", 100))
    assert desk.endpoint("a").kv.capacity == 2000


def test_kv_tokens_may_fill_their_share_exactly() -> None:
    desk = Desk(one("a", 100, kv_capacity_tokens=10_000))
    share = int(LAWS.kv.share * 10_000)
    desk.ask(prompt_tokens=share - 2 * GUESS)
    assert in_use([desk.ask(), desk.ask()]) == [True, False]


@pytest.mark.parametrize("how", ["less than estimated", "unknown", "stale"])
def test_only_what_the_engine_uses_beyond_our_estimate_takes_room(how: str) -> None:
    desk = Desk(one("a", 100, kv_capacity_tokens=10_000))
    desk.ask(prompt_tokens=int(LAWS.kv.share * 10_000) - 2 * GUESS)
    desk.observe("a", Load(kv_usage=0.94))
    match how:
        case "less than estimated":
            desk.observe("a", Load(kv_usage=0.01))
        case "unknown":
            desk.observe("a", Load())
        case "stale":
            desk.advance(10.0)
    assert in_use([desk.ask(), desk.ask()]) == [True, False]


def test_a_kv_capacity_that_a_person_chose_comes_before_what_telemetry_tells() -> None:
    desk = Desk(one("a", kv_capacity_tokens=1000))
    desk.observe("a", Load(kv_capacity_tokens=2000))
    assert desk.endpoint("a").kv.capacity == 1000
    desk.put(one("a", kv_capacity_tokens=3000))
    assert desk.endpoint("a").kv.capacity == 3000
    desk.put(one("a"))
    assert desk.endpoint("a").kv.capacity == 2000


def test_a_reading_that_lacks_the_kv_capacity_leaves_it_known() -> None:
    desk = Desk(one("a"))
    desk.observe("a", Load(kv_capacity_tokens=2000))
    desk.observe("a", Load(running=1.0))
    assert desk.endpoint("a").kv.capacity == 2000
