"""Homes: where a request waits for its own endpoint, and when it goes elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.outcome import Outcome
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Binding

from .desk import Desk, one

EJECT_AFTER = LAWS.health.eject_after


def at_home(desk: Desk, home: str = "a") -> tuple[Ticket, Ticket, Ticket]:
    """Fill both endpoints, then let one wait for `home`."""
    a = desk.ask("fill-a", home="a")
    b = desk.ask("fill-b", home="b")
    return a, b, desk.ask("guest", home=home)


def test_a_request_waits_for_its_home_though_another_endpoint_has_room() -> None:
    desk = Desk(one("a"), one("b"))
    a, b, guest = at_home(desk)
    desk.release(b)
    assert desk.where(guest) is None
    desk.release(a)
    assert (desk.where(guest), desk.outcome(guest)) == ("a", Outcome.DISPATCHED)


def test_with_session_affinity_off_a_session_has_no_home_and_a_reload_switches_it() -> None:
    desk = Desk(one("a", 8), one("b", 8))
    first = desk.ask(session="s")
    desk.release(first)
    desk.fill(2, home=desk.where(first))
    for is_on in (False, True, False):
        desk.set_policy(replace(desk.core.policy, session_affinity=is_on))
        turn = desk.ask(session="s")
        assert (desk.where(turn) == desk.where(first)) is is_on
        desk.release(turn)
        if not is_on:
            desk.release(desk.ask(session="s", home=desk.where(first)))  # back, for the next look


def test_after_its_patience_any_endpoint_takes_a_request() -> None:
    desk = Desk(one("a"), one("b"))
    _, b, guest = at_home(desk)
    desk.release(b)
    desk.advance(0.999)
    assert desk.where(guest) is None
    desk.advance(0.001)
    assert (desk.where(guest), desk.outcome(guest)) == ("b", Outcome.REROUTED)


def test_a_request_whose_patience_is_over_still_counts_as_dispatched_at_home() -> None:
    desk = Desk(one("a"), one("b"))
    a, _, guest = at_home(desk)
    desk.advance(2.0)
    desk.release(a)
    assert (desk.where(guest), desk.outcome(guest)) == ("a", Outcome.DISPATCHED)


def test_patience_does_not_cost_a_request_its_place() -> None:
    desk = Desk(one("a"), one("b"))
    _, b, guest = at_home(desk)
    desk.ask("later")
    desk.advance(1.0)
    desk.release(b)
    assert desk.where(guest) == "b"


@pytest.mark.parametrize("how", ["down", "removed"])
def test_a_request_whose_home_goes_is_rerouted_at_once(how: str) -> None:
    desk = Desk(one("a"), one("b"))
    _, b, guest = at_home(desk)
    desk.release(b)
    assert desk.where(guest) is None
    if how == "down":
        desk.set_up("a", is_up=False)
    else:
        desk.remove("a")
    assert (desk.where(guest), desk.outcome(guest)) == ("b", Outcome.REROUTED)


def test_a_request_at_home_at_an_ejected_endpoint_goes_anywhere() -> None:
    desk = Desk(one("a", EJECT_AFTER + 1), one("b"), patience_s=20.0)
    held = [desk.ask("fill-a", home="a") for _ in range(EJECT_AFTER + 1)]
    b = desk.ask("fill-b", home="b")
    desk.put(one("a", 1))
    guest = desk.ask("guest", home="a")
    desk.release(held[0], Answer.FAILED)
    desk.release(b)
    for number in range(10):  # the peer serves well what "a" refuses
        desk.release(desk.ask(f"well-{number}", home="b"), Answer.OK)
    for ticket in held[1:-1]:
        assert desk.where(guest) is None
        desk.release(ticket, Answer.FAILED)
    assert (desk.where(guest), desk.outcome(guest)) == ("b", Outcome.REROUTED)


def test_a_request_whose_home_is_down_on_arrival_goes_elsewhere_at_once() -> None:
    desk = Desk(one("a"), one("b"))
    desk.set_up("a", is_up=False)
    guest = desk.ask(home="a")
    assert (desk.where(guest), desk.outcome(guest)) == ("b", Outcome.REROUTED)


@pytest.mark.parametrize("home", ["nowhere", "other"])
def test_a_home_outside_the_pool_is_ignored(home: str) -> None:
    desk = Desk(one("a", models=frozenset({"m"})), one("other", models=frozenset({"n"})))
    guest = desk.ask(model="m", home=home)
    assert (desk.where(guest), desk.outcome(guest)) == ("a", Outcome.DISPATCHED)


@pytest.mark.parametrize("leases", [0, 1])
def test_an_endpoint_that_left_is_nobodys_home_while_its_leases_run_out(leases: int) -> None:
    desk = Desk(one("a"), one("b"))
    desk.fill(leases, home="a")
    desk.remove("a")
    guest = desk.ask(home="a")
    assert (desk.where(guest), desk.outcome(guest)) == ("b", Outcome.DISPATCHED)


def test_a_page_of_an_endpoint_that_left_does_not_say_how_long_a_request_may_be() -> None:
    desk = Desk(one("a"), one("b"))
    desk.ask(home="a")
    for name, context_tokens in (("a", 1000), ("b", 1000)):
        desk.observe(name, Load(context_tokens=context_tokens))
    desk.remove("a")
    desk.observe("a", Load(context_tokens=90_000))
    assert {pool.longest for pool in desk.core.pools()} == {1000}


ONE_MODEL, TWO_MODELS = frozenset({"m"}), frozenset({"m", "n"})


def serving_two_models() -> tuple[Desk, dict[str, Ticket]]:
    """Three full endpoints; once one of them has ONE_MODEL, who waits for the other model waits in a new pool."""
    desk = Desk(one("a", models=ONE_MODEL))
    desk.put(*(one(name, models=TWO_MODELS) for name in "abc"))
    return desk, {name: desk.ask(model="m", home=name) for name in "abc"}


def test_a_reload_that_takes_a_model_from_another_endpoint_leaves_who_waits_for_its_home_there() -> None:
    """Its pool is another one then, and its home serves it as before."""
    desk, held = serving_two_models()
    guest = desk.ask("guest", model="n", home="b")
    desk.put(one("a", models=ONE_MODEL))
    desk.advance(0.5)
    desk.release(held["c"])
    assert desk.where(guest) is None
    desk.advance(0.5)
    assert (desk.where(guest), desk.outcome(guest)) == ("c", Outcome.REROUTED)


@pytest.mark.parametrize(("stays", "goes"), [("m", "n"), ("n", "m")])
def test_a_reload_that_takes_another_model_from_its_home_leaves_who_waits_there(stays: str, goes: str) -> None:
    """Either model may keep the pool that both had."""
    both, its = frozenset({stays, goes}), frozenset({stays})
    desk = Desk(one("a", models=both), one("b", models=both))
    a, b, guest = (desk.ask(home=home, model=stays) for home in "aba")
    desk.put(one("a", models=its), one("b", models=both))
    desk.release(b)
    assert desk.where(guest) is None, "for its home"
    desk.release(a)
    assert (desk.where(guest), desk.outcome(guest)) == ("a", Outcome.DISPATCHED)


def test_a_reload_that_takes_its_model_from_its_home_lets_a_request_go_anywhere() -> None:
    desk, held = serving_two_models()
    guest = desk.ask("guest", model="n", home="a")
    desk.put(one("a", models=ONE_MODEL))
    desk.release(held["c"])
    assert (desk.where(guest), desk.outcome(guest)) == ("c", Outcome.REROUTED)


def test_an_endpoint_that_went_and_came_back_is_still_the_home() -> None:
    """Found by storm seed 1: the outcome said "rerouted" of a dispatch to the endpoint that was asked for."""
    desk = Desk(one("a"), one("b"))
    desk.set_up("a", is_up=False)
    desk.ask("fill-b", home="b")
    guest = desk.ask("guest", home="a")
    desk.remove("a")
    desk.put(one("a"))
    assert (desk.where(guest), desk.outcome(guest)) == ("a", Outcome.DISPATCHED)


def test_bound_gives_every_request_a_home_on_arrival_and_levels_the_lines() -> None:
    desk = Desk(one("a"), one("b"), binding=Binding.BOUND)
    tickets = desk.fill(10)
    homes = [ticket.home.name for ticket in tickets if ticket.home is not None]
    assert (homes.count("a"), homes.count("b")) == (5, 5)


def test_the_only_endpoint_of_a_pool_is_the_home_of_all() -> None:
    desk = Desk(one("a"))
    first, second = desk.fill(2)
    assert first.home is second.home is desk.endpoint("a")


@pytest.mark.parametrize("age_s", [0.0, 40.0])
def test_who_has_no_time_for_its_home_goes_anywhere_at_once(age_s: float) -> None:
    """Found by reading: it was refused at its full home, and the other endpoint stood idle."""
    desk = Desk(one("a", 2), one("b", 1))
    guests = [desk.ask(home="a", budget_s=0.0, arrived=desk.now - age_s) for _ in range(4)]
    assert [desk.where(guest) for guest in guests] == ["a", "a", "b", None]
    assert [desk.outcome(guest) for guest in guests[2:]] == [Outcome.REROUTED, Outcome.BUDGET_EXPIRED]


def test_without_patience_a_free_home_is_still_preferred() -> None:
    desk = Desk(one("a", 2), one("b", 1), patience_s=0.0)
    assert [desk.where(desk.ask(home="a")) for _ in range(4)] == ["a", "a", "b", None]


def test_half_of_its_budget_is_left_to_a_request_whose_home_has_no_room() -> None:
    desk = Desk(one("a"), one("b"), patience_s=20.0)
    desk.ask(home="a")
    guest = desk.ask(home="a", budget_s=4.0)
    desk.advance(1.99)
    assert guest.state is State.WAITING
    desk.advance(0.02)
    assert desk.where(guest) == "b"


def test_a_bound_request_waits_without_a_home_while_no_endpoint_is_up() -> None:
    desk = Desk(one("a"), one("b"), binding=Binding.BOUND)
    for name in "ab":
        desk.set_up(name, is_up=False)
    guest = desk.ask()
    assert (guest.state, guest.home) == (State.WAITING, None)


def test_bound_levels_the_lines_by_what_each_endpoint_may_hold() -> None:
    desk = Desk(one("a", 1), one("b", 3), binding=Binding.BOUND)
    assert [ticket.home and ticket.home.name for ticket in desk.fill(8)] == list("abbbabbb")
