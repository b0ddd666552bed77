"""Requests that may go to some endpoints alone, as a gateway says; answers that came from another than was picked."""

from __future__ import annotations

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.outcome import Outcome
from extproc.admission.pools import MOST_SUBSETS, Pools
from extproc.admission.ticket import State
from extproc.admission.values import Answer, EndpointSpec
from extproc.errors import TransitionError

from .desk import Desk, one

EJECT_AFTER = LAWS.health.eject_after


def names(*allowed: str) -> frozenset[str]:
    return frozenset(allowed)


def test_a_request_goes_to_an_endpoint_that_it_is_allowed_whatever_room_others_have():
    desk = Desk(one("a"), one("b", 5), one("c", 5))
    first = desk.ask("first", allowed=names("a"))
    waits = desk.ask("waits", allowed=names("a"))
    assert (desk.where(first), desk.where(waits)) == ("a", None)
    desk.release(first)
    assert desk.where(waits) == "a"


def test_where_none_of_the_allowed_endpoints_is_there_the_answer_is_503_at_once():
    desk = Desk(one("a"))
    refused = desk.ask(allowed=names("gone", "nowhere"))
    assert desk.outcome(refused) is Outcome.NONE_ALLOWED
    assert desk.outcome(refused).status == 503
    assert desk.outcome(desk.ask(allowed=frozenset())) is Outcome.NONE_ALLOWED


def test_allowed_endpoints_that_serve_another_model_are_none():
    desk = Desk(one("a", models=frozenset({"m1"})), one("b", models=frozenset({"m2"})))
    assert desk.outcome(desk.ask(model="m1", allowed=names("b"))) is Outcome.NONE_ALLOWED
    assert desk.where(desk.ask(model="m2", allowed=names("a", "b"))) == "b"
    assert desk.outcome(desk.ask(model="m3", allowed=names("a"))) is Outcome.UNKNOWN_MODEL


def test_one_whose_allowed_endpoint_goes_waits_for_it_to_come_back_and_is_refused_when_its_budget_ends():
    desk = Desk(one("a"), one("b"))
    desk.ask("filler", allowed=names("a"))
    waits, gives_up = desk.ask(allowed=names("a"), budget_s=20.0), desk.ask(allowed=names("a"), budget_s=2.0)
    desk.remove("a")
    assert desk.where(waits) is None
    desk.advance(3.0)
    assert desk.outcome(gives_up) is Outcome.NO_ENDPOINT
    desk.put(one("a", 2))
    assert desk.where(waits) == "a"


def test_allowed_and_other_requests_share_an_endpoint_by_class_and_arrival():
    desk = Desk(one("a"))
    desk.put(one("b"))
    held = [desk.ask("held"), desk.ask("held too")]
    any_first = desk.ask("any, first")
    only_a = desk.ask("a only", allowed=names("a"))
    urgent = desk.ask("a only, urgent", "urgent", allowed=names("a"))
    (at_a,) = [ticket for ticket in held if desk.where(ticket) == "a"]
    desk.release(at_a)
    assert desk.where(urgent) == "a"
    desk.release(urgent)
    assert desk.where(any_first) == "a"
    desk.release(any_first)
    assert desk.where(only_a) == "a"


def test_one_that_may_go_to_a_full_endpoint_alone_keeps_no_room_elsewhere_however_often_it_is_passed():
    """A guard keeps room where it may go: nobody waits for a place that an allowed few can never take."""
    desk = Desk(one("a"), one("b"))
    desk.ask("held", allowed=names("a"))
    stuck = desk.ask("stuck", allowed=names("a"))
    for number in range(200):
        passing = desk.ask(f"passing {number}")
        assert desk.where(passing) == "b"
        desk.release(passing)
    assert stuck.state is State.WAITING


def test_ever_new_subsets_are_forgotten_but_for_those_that_somebody_waits_for():
    desk = Desk(*(one(f"e{number}") for number in range(9)))
    blocker = desk.ask(allowed=names("e0"))
    waits = desk.ask(allowed=names("e0", "none"))
    for number in range(3 * MOST_SUBSETS):
        desk.release(desk.ask(allowed=names("e1", f"x{number}")))
    assert len(desk.core._books.pools.subsets) <= MOST_SUBSETS
    desk.release(blocker)
    assert desk.where(waits) == "e0"


def test_a_subset_of_all_endpoints_is_no_pool_of_its_own():
    desk = Desk(one("a"), one("b"))
    desk.release(desk.ask(allowed=names("a", "b", "c")))
    assert len(list(desk.core.pools())) == 1


# ---- served elsewhere


def test_a_lease_moves_to_the_endpoint_that_really_answers_over_its_limit_if_need_be():
    desk = Desk(one("a"), one("b"))
    picked, other = desk.ask(allowed=names("a")), desk.ask(allowed=names("b"))
    waits = desk.ask("waits", allowed=names("a"))
    desk.move(picked, "b")
    assert {ticket.endpoint.name for ticket in (picked, other)} == {"b"}
    assert desk.where(waits) == "a", "the picked one has room again"
    next_at_b = desk.ask("next", allowed=names("b"))
    desk.release(picked)
    assert desk.where(next_at_b) is None
    desk.release(other)
    assert desk.where(next_at_b) == "b"


def test_the_endpoint_that_was_picked_is_taken_to_have_failed():
    desk = Desk(one("a", 10), one("b", 100))
    for _ in range(30):
        good = desk.ask(allowed=names("b"))
        desk.answered(good)
        desk.release(good)
        moved = desk.ask(allowed=names("a"))
        desk.move(moved, "b")
        desk.answered(moved)
        desk.release(moved)
        desk.advance(0.2)
        if not desk.endpoint("a").available:
            break
    else:
        raise AssertionError(desk.endpoint("a"))
    assert desk.endpoint("b").available


def test_one_that_fails_what_a_gateway_sends_it_alone_is_judged_by_the_most_who_serve_with_it():
    both = frozenset({"x", "y"})
    desk = Desk(one("a", 99, models=both), one("b", 99, models=both), one("c", 99, models=frozenset({"x"})))
    for _ in range(EJECT_AFTER):
        assert desk.endpoint("a").available
        desk.release(desk.ask(model="y", allowed=names("a")), Answer.FAILED)
        for name in "bc" * 10:
            desk.release(desk.ask(model="x", home=name), Answer.OK)
    assert not desk.endpoint("a").available, "though those of its own model alone have served nothing"


def test_an_answer_from_an_endpoint_that_is_none_of_ours_ends_the_lease():
    desk = Desk(one("a"))
    ticket = desk.ask()
    desk.move(ticket, "nowhere")
    assert ticket.state is State.DONE
    assert desk.endpoint("a").leases == {}
    with pytest.raises(TransitionError):
        desk.move(ticket, "a")


def test_an_answer_from_the_picked_endpoint_changes_nothing():
    desk = Desk(one("a"))
    ticket = desk.ask()
    desk.move(ticket, "a")
    assert (ticket.state, ticket.endpoint.name) == (State.LEASED, "a")


# ---- many subsets


def test_the_pools_of_subsets_share_the_memory_of_tenants_of_all_others():
    desk = Desk(one("a"), one("b"))
    desk.ask(tenant="t", allowed=names("a"))
    desk.ask(tenant="u", allowed=names("b"))
    pools = list(desk.core.pools())
    assert len(pools) == 3
    assert len({id(pool.tenants) for pool in pools}) == 1


def test_made_up_models_make_no_pools_of_their_own():
    desk = Desk(one("a", 500), one("b", 500))
    for number in range(200):
        desk.ask(model=f"made-up-{number}", allowed=names("a"))
    assert len(desk.core._books.pools.subsets) == 1


def test_a_new_subset_regroups_nobody_else_even_when_more_are_waited_for_than_are_remembered(monkeypatch):
    desk = Desk(*(one(f"e{number}") for number in range(9)))
    waiting = [desk.ask(f"w{number}", allowed=names("e0", f"e{number % 9}", f"x{number}")) for number in range(100)]
    before = list(desk.core.pools())
    monkeypatch.setattr(Pools, "regroup", lambda *_: pytest.fail("all were regrouped"))
    for number in range(2 * MOST_SUBSETS):
        desk.ask(allowed=names("e1", f"y{number}"), budget_s=0.0)
    late = desk.ask("late", allowed=names("e1", "e2", "e3"))
    assert set(before) <= set(desk.core.pools())
    assert late.state is not State.DONE
    assert any(ticket.state is State.WAITING for ticket in waiting)


def test_one_that_waits_for_a_model_that_gets_a_name_meanwhile_goes_where_it_was_allowed():
    desk = Desk(one("a"), one("b"))
    held = desk.ask("held", allowed=names("a"))
    waits = desk.ask("waits", model="m", allowed=names("a"))
    desk.put(one("c", models=frozenset({"m"})))
    assert desk.where(waits) is None
    desk.release(held)
    assert desk.where(waits) == "a"


def test_one_that_was_left_out_for_a_model_and_lists_it_no_more_is_no_last_resort_for_it():
    desk = Desk(one("a", models=frozenset({"m", "n"})), one("b", models=frozenset({"m"})))
    desk.core.endpoints["a"].missing.models = frozenset({"m"})
    desk.put(one("a", models=frozenset({"n"})))
    assert desk.outcome(desk.ask(model="m", allowed=names("a"))) is Outcome.NONE_ALLOWED


def test_the_last_that_serves_a_model_is_not_put_out_for_refusals_of_a_gateways_choice() -> None:
    """It was judged beside those who serve another model."""
    models = {"a": "x", "b": "x", "c": "y", "d": "y"}
    desk = Desk(*(EndpointSpec(name, models=names(model)) for name, model in models.items()))
    desk.set_up("b", is_up=False)
    for _ in range(40):
        for request in ({"model": "y"}, {"model": "x", "allowed": frozenset("a")}):
            ticket = desk.ask(**request)
            assert desk.where(ticket), request
            desk.release(ticket, Answer.OK if request["model"] == "y" else Answer.REFUSED)
    assert desk.endpoint("a").available
