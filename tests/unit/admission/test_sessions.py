"""Sessions: their home is where they were served last, and what is cached there need not be computed."""

from __future__ import annotations

from extproc.admission.outcome import Outcome
from extproc.admission.placing import CACHED_AT_MOST
from extproc.admission.sessions import Home
from extproc.admission.values import Binding

from .desk import GUESS, Desk, one


def test_a_home_outside_the_pool_leaves_the_session_its_home() -> None:
    m = frozenset({"m"})
    desk = Desk(one("a", models=m), one("b", models=m), one("other", models=frozenset({"n"})))
    first = desk.ask(model="m", session="s")
    desk.release(first)
    second = desk.ask(model="m", session="s", home="other")
    assert (first.endpoint, second.home) == (second.endpoint, first.endpoint)


def test_a_session_of_another_pool_leaves_a_bound_request_a_home() -> None:
    m, n = frozenset({"m"}), frozenset({"n"})
    specs = (one("a", models=m), one("b", models=m), one("c", models=n), one("d", models=n))
    desk = Desk(*specs, binding=Binding.BOUND)
    desk.ask(model="n", session="s")
    assert desk.ask(model="m", session="s").home is not None


def test_a_session_returns_to_the_endpoint_that_served_it_last() -> None:
    desk = Desk(*(one(name, 10) for name in "abcd"))
    first = desk.ask(session="s")
    for _ in range(6):
        desk.ask()
    assert desk.where(desk.ask(session="s")) == desk.where(first)


def test_a_session_moves_with_its_reroute() -> None:
    desk = Desk(one("a"), one("b"))
    first = desk.ask(session="s")
    second = desk.ask(session="s")
    desk.advance(1.0)
    assert desk.outcome(second) is Outcome.REROUTED
    desk.release(first)
    desk.release(second)
    assert desk.where(desk.ask(session="s")) == desk.where(second)


def test_the_session_seen_longest_ago_is_forgotten_over_the_bound() -> None:
    desk = Desk(one("a", 100), one("b", 100), session_memory=2)
    for session in ("s1", "s2", "s1", "s3"):
        desk.ask(session=session)
    sessions = desk.core._placing.sessions
    assert len(sessions) == 2
    assert sessions.recall("s2") is None
    assert sessions.recall("s1") is not None


def test_a_session_forgets_an_endpoint_that_is_gone() -> None:
    desk = Desk(one("a", 10), one("b", 10))
    first = desk.ask(session="s")
    home = desk.where(first)
    assert home is not None
    desk.remove(home)
    again = desk.ask(session="s")
    assert (again.home is None or again.home.name != home, desk.outcome(again)) == (True, Outcome.DISPATCHED)


def test_of_a_sessions_prompt_only_what_is_new_has_to_be_computed_at_its_home() -> None:
    desk = Desk(one("a", 10), one("b", 10))
    first = desk.ask(session="s", prompt_tokens=1000)
    more = desk.ask(session="s", prompt_tokens=2000)
    same = desk.ask(session="s", prompt_tokens=1000)
    assert first.endpoint is more.endpoint is same.endpoint
    assert first.work_tokens == first.prompt_tokens
    assert more.work_tokens == more.prompt_tokens - (first.prompt_tokens + first.output_tokens)
    assert same.work_tokens == same.prompt_tokens - int(CACHED_AT_MOST * same.prompt_tokens), "the guess may be wrong"
    for request in ({"session": "other"}, {}):
        stranger = desk.ask(home=first.endpoint and first.endpoint.name, prompt_tokens=1000, **request)
        assert stranger.work_tokens == stranger.prompt_tokens


def test_of_a_sessions_prompt_nothing_is_cached_elsewhere() -> None:
    desk = Desk(one("a", 10), one("b", 10))
    first = desk.ask(session="s", prompt_tokens=1000)
    assert first.endpoint is not None
    desk.set_up(first.endpoint.name, is_up=False)
    moved = desk.ask(session="s", prompt_tokens=1000)
    assert (moved.endpoint is not first.endpoint, moved.work_tokens) == (True, 1000)


def test_a_session_whose_cache_was_overwritten_has_no_home_any_more() -> None:
    desk = Desk(*(one(name, 1000, kv_capacity_tokens=10 * GUESS) for name in "ab"))

    def serve(count: int) -> None:
        for _ in range(count):
            desk.release(desk.ask(home="a"))

    serve(25)  # what came before the session does not count
    desk.release(desk.ask(home="a", session="s"))
    serve(10)
    assert desk.core._placing.sessions.recall("s") is desk.endpoint("a")
    serve(1)
    assert desk.core._placing.sessions.recall("s") is None


def test_of_two_that_served_a_session_the_last_one_is_its_home_whoever_tells_of_it() -> None:
    desk = Desk(one("a", 9), one("b", 9))
    desk.advance(100.0)
    desk.release(desk.ask(session="s", home="a"))
    desk.core.believe_home(Home("s", "b", 10, age_s=1.0), desk.now)
    assert desk.ask(session="s").home is desk.endpoint("a")
    desk.advance(2.0)
    desk.core.believe_home(Home("s", "b", 10, age_s=1.0), desk.now)
    assert desk.ask(session="s").home is desk.endpoint("b")
