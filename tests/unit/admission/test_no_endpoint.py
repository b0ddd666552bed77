"""Nobody is there to serve it: how long a request waits then, what it is told, and which models are worth the wait."""

from __future__ import annotations

import pytest

from extproc.admission.outcome import Outcome
from extproc.admission.values import RequestClass

from .desk import CLASSES, Desk, one

MODEL = frozenset({"m"})
LOADS_S = 90.0
PATIENT = {"no_endpoint_budget_s": 300.0}


def test_who_waits_for_a_pool_that_comes_up_after_90_s_is_served_whatever_its_class_may_wait() -> None:
    desk = Desk(**PATIENT)
    early = [desk.ask(f"r{number}", "urgent", model="m") for number in range(20)]
    desk.advance(LOADS_S)
    assert not desk.decided
    desk.put(one("a", 8, models=MODEL))
    while desk.waiting:
        desk.advance(0.5)
        for ticket in list(desk.leased):
            desk.release(ticket)
    assert {desk.outcome(ticket) for ticket in early} == {Outcome.DISPATCHED}
    assert desk.decided[early[0]].wait_s == LOADS_S


def test_the_budget_of_its_class_begins_when_somebody_is_up() -> None:
    desk = Desk(one(), **PATIENT)
    desk.set_up("a", is_up=False)
    first, second, third = (desk.ask(name, "urgent") for name in "123")
    desk.advance(LOADS_S)
    desk.set_up("a", is_up=True)
    assert desk.where(first) == "a"
    desk.advance(1.9)
    desk.release(first)
    assert desk.where(second) == "a"
    desk.advance(0.1)
    assert desk.outcome(third) is Outcome.BUDGET_EXPIRED
    assert desk.decided[third].wait_s == LOADS_S + 2.0


def test_one_that_nobody_came_for_is_refused_when_that_budget_is_over() -> None:
    desk = Desk(**PATIENT)
    alone = desk.ask(model="m")
    desk.advance(299.9)
    assert desk.outcome(alone) is None
    desk.advance(0.1)
    assert desk.outcome(alone) is Outcome.NO_ENDPOINT
    assert desk.retry_after(alone) == 60


@pytest.mark.parametrize(("budget_s", "retry_after_s"), [(0.0, 300), (5.0, 295), (299.5, 1)])
def test_a_client_that_will_not_wait_so_long_is_told_when_somebody_should_be_up(budget_s, retry_after_s) -> None:
    desk = Desk(**PATIENT)
    hasty = desk.ask(model="m", budget_s=budget_s)
    desk.advance(budget_s)
    assert desk.outcome(hasty) is Outcome.NO_ENDPOINT
    assert desk.retry_after(hasty) == retry_after_s


def test_the_last_endpoint_of_a_pool_that_goes_gives_those_who_wait_the_longer_budget() -> None:
    desk = Desk(one(), **PATIENT)
    desk.ask()
    waits = desk.ask("w", "urgent")
    desk.advance(1.0)
    desk.set_up("a", is_up=False)
    desk.advance(LOADS_S)
    assert desk.outcome(waits) is None
    (running,) = desk.leased
    desk.release(running)
    desk.set_up("a", is_up=True)
    assert desk.where(waits) == "a"


def test_an_endpoint_that_comes_and_goes_keeps_nobody_longer_than_both_budgets_together() -> None:
    desk = Desk(one(), no_endpoint_budget_s=10.0)
    desk.ask()
    waits = desk.ask("w", "urgent")
    for _ in range(30):
        desk.advance(0.5)
        desk.set_up("a", is_up=False)
        desk.advance(0.5)
        desk.set_up("a", is_up=True)
    assert desk.outcome(waits) is not None
    assert desk.decided[waits].wait_s == pytest.approx(12.0, abs=1.0)


def test_who_moves_to_a_pool_that_is_served_waits_by_its_class_there() -> None:
    desk = Desk(one("other", models=frozenset({"n"})), **PATIENT)
    desk.core.know_models(["m"], desk.now)
    first, second = (desk.ask(name, "urgent", model="m") for name in "12")
    desk.advance(LOADS_S)
    desk.put(one("a", models=MODEL))
    assert desk.where(first) == "a"
    desk.advance(2.0)
    assert desk.outcome(second) is Outcome.BUDGET_EXPIRED


def test_a_request_that_waited_for_an_endpoint_is_not_refused_because_the_sidecar_restarts_as_that_is_up() -> None:
    desk = Desk(one(), **PATIENT)
    running = desk.ask()
    replayed = desk.ask("r", "urgent", arrived=desk.now - LOADS_S)
    desk.advance(1.9)
    desk.release(running)
    assert desk.where(replayed) == "a"


def test_with_no_budget_of_its_own_a_wait_for_an_endpoint_is_a_wait() -> None:
    desk = Desk()
    alone = desk.ask("r", "urgent", model="m")
    desk.advance(2.0)
    assert desk.outcome(alone) is Outcome.NO_ENDPOINT
    assert desk.retry_after(alone) == 2


# ---- which models


def test_where_a_source_that_lists_no_models_has_nobody_yet_any_model_waits_for_it() -> None:
    desk = Desk(one("a", 9, models=frozenset({"n"})), classes=CLASSES)
    assert desk.outcome(desk.ask(model="m")) is Outcome.UNKNOWN_MODEL
    desk.core.know_models([], desk.now, expects_any=True)
    waits = desk.ask(model="m")
    assert desk.outcome(waits) is None
    assert desk.where(desk.ask()) == "a", "one that names no model goes where there is but one"
    desk.put(one("any"))
    assert desk.where(waits) == "any"


def test_a_request_without_a_model_waits_for_a_source_that_lists_none_where_others_differ() -> None:
    desk = Desk(one("a", models=frozenset({"n"})), one("b", models=MODEL))
    desk.core.know_models([], desk.now, expects_any=True)
    waits = desk.ask()
    assert desk.outcome(waits) is None
    desk.put(one("any"))
    assert desk.where(waits) == "any"


def test_the_wait_that_a_client_allows_ends_when_it_said_whenever_somebody_comes() -> None:
    desk = Desk(one("a"), no_endpoint_budget_s=300.0)
    held = desk.ask()
    desk.set_up("a", is_up=False)
    waits = desk.ask(budget_s=50.0)
    desk.advance(40.0)
    desk.set_up("a", is_up=True)
    assert held in desk.leased
    desk.advance(9.9)
    assert desk.outcome(waits) is None
    desk.advance(0.1)
    assert desk.outcome(waits) is Outcome.BUDGET_EXPIRED


@pytest.mark.parametrize(("waits_s", "retry_after_s"), [(0.0, 1), (10.0, 10), (300.0, 60)])
def test_one_that_waited_for_nobody_is_told_to_come_back_after_as_long_again(waits_s, retry_after_s) -> None:
    """It was told to come back after a second, to wait ten more for a server that was dead."""
    desk = Desk(one(), classes=(RequestClass("std", 0, 300.0),))
    desk.set_up("a", is_up=False)
    waits = desk.ask(budget_s=waits_s)
    desk.advance(waits_s)
    assert desk.outcome(waits) is Outcome.NO_ENDPOINT
    assert desk.retry_after(waits) == retry_after_s
