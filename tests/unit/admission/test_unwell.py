"""Endpoints that are not broken: full, loading, asleep; and what people read of each."""

from __future__ import annotations

from extproc.admission.held import HeldBy
from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.outcome import Outcome
from extproc.admission.ticket import State
from extproc.admission.values import Answer

from .ward import MANY, Ward, out

EJECT_AFTER = LAWS.health.eject_after
SATURATED_S = LAWS.health.full_s
STEP_MAX_S = LAWS.health.step_most_s

# ---- full, loading, asleep


def assert_only_slowed(ward: Ward) -> None:
    """Whatever "a" refuses as full, it gets a request after a while, and is never left out."""
    for _ in range(10 * EJECT_AFTER):
        ward.serve("b")
        assert ward.answer("a", Answer.SATURATED, 2) == 1
        ward.advance(SATURATED_S)
    assert not ward.is_ejected("a")


def test_a_full_engine_is_slowed_and_nothing_else() -> None:
    ward = Ward()
    ward.ask("a")
    ward.advance(1.0)
    assert_only_slowed(ward)


def test_a_page_that_shows_others_requests_tells_a_full_engine_too() -> None:
    ward = Ward(stale_after_s=1000.0)
    ward.observe("a", Load(running=8.0))
    assert_only_slowed(ward)


def test_a_page_that_shows_what_ran_a_moment_ago_tells_a_full_engine_too() -> None:
    ward = Ward(stale_after_s=1000.0)
    runs = ward.ask("a")
    ward.advance(1.0)
    ward.observe("a", Load(running=1.0))
    ward.release(runs, Answer.OK)
    assert ward.core.endpoints["a"].foreign == 0
    assert_only_slowed(ward)


def test_an_engine_works_at_a_request_that_has_had_time_to_arrive() -> None:
    ward = Ward()
    endpoint, lease = ward.core.endpoints["a"], ward.ask("a")
    arrives_at = lease.leased_at + LAWS.foreign.arrived_s
    assert [endpoint.is_at_work(at) for at in (arrives_at - 0.01, arrives_at)] == [False, True]


def test_a_pool_that_loads_is_tried_a_request_at_a_time_until_it_serves() -> None:
    ward = Ward(known=False)
    cost = sum(ward.answer(name, Answer.SATURATED, MANY) for name in "ab")
    for _ in range(100):
        cost += sum(ward.answer(name, Answer.SATURATED, MANY) for name in "ab")
        ward.advance(0.1)
    assert cost <= 2 * (4 + 10 / STEP_MAX_S)
    ward.advance(STEP_MAX_S)
    waits = ward.ask()
    assert waits.state is State.LEASED


def test_one_that_sleeps_gets_nothing_until_it_is_awake() -> None:
    ward = Ward()
    ward.observe("a", Load(running=0.0, asleep=True))
    assert ward.core.endpoints["a"].condition == "asleep"
    assert {ward.ask().endpoint.name for _ in range(8)} == {"b"}
    ward.observe("a", Load(running=0.0, asleep=False))
    assert ward.core.endpoints["a"].condition == "up"
    ward.serve("a")


def test_while_all_sleep_requests_wait_and_go_when_one_awakes() -> None:
    ward = Ward("a")
    ward.observe("a", Load(asleep=True))
    waits = ward.ask()
    assert waits.state is State.WAITING
    ward.observe("a", Load(asleep=False))
    assert waits.state is State.LEASED


def test_a_page_that_went_stale_says_of_nobody_that_he_sleeps() -> None:
    ward = Ward("a", stale_after_s=5.0)
    ward.observe("a", Load(asleep=True))
    waits = ward.ask()
    ward.advance(5.0)
    assert waits.state is State.LEASED


# ---- what people read


def test_an_endpoint_says_in_words_whether_it_may_be_used() -> None:
    ward = Ward("ab", known=False)
    endpoint = ward.core.endpoints["a"]
    words = [endpoint.condition]
    ward.serve("a")
    words.append(endpoint.condition)
    held = ward.ask("a")
    out(ward)
    assert endpoint.held_by() is HeldBy.EJECTED
    words.append(endpoint.condition)
    ward.set_up("a", is_up=False)
    words.append(endpoint.condition)
    ward.remove("a")
    words.append(endpoint.condition)
    assert words == ["unknown", "up", "ejected after failures", "down", "removed"]
    ward.release(held)


def test_when_all_are_out_of_use_a_request_that_runs_out_of_time_hears_that_there_is_no_endpoint() -> None:
    ward = Ward("ab")
    for name in "ab":
        ward.set_up(name, is_up=False)
    ward.ask()
    ward.advance(100.0)
    assert ward.outcomes[Outcome.NO_ENDPOINT] == 1
