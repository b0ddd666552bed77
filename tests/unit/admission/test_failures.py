"""Failures and refusals of engines: ejection, trial, being left alone."""

from __future__ import annotations

from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.ticket import State
from extproc.admission.values import Answer, EndpointSpec

from .desk import Desk, one

SATURATED_S = LAWS.health.full_s


def test_a_saturated_endpoint_is_left_alone_for_a_moment() -> None:
    desk = Desk(one("a", 2))
    a, _, waits = desk.fill(3)
    desk.release(a, Answer.SATURATED)
    assert waits.state is State.WAITING
    desk.advance(SATURATED_S)
    assert waits.state is State.LEASED


def test_good_telemetry_does_not_cut_short_the_moment_that_an_engine_wanted_after_it_refused_a_request() -> None:
    desk = Desk(EndpointSpec("a", max_running_requests=4))
    (ticket,) = desk.fill(1)
    desk.release(ticket, Answer.SATURATED)
    desk.observe("a", Load(running=0, kv_usage=0.1))
    (waiting,) = desk.fill(1)
    assert desk.where(waiting) is None
    desk.advance(SATURATED_S)
    assert desk.where(waiting) == "a"


def test_a_saturated_endpoint_stays_closed_for_that_moment() -> None:
    desk = Desk(one("a", 2))
    a, _, waits = desk.fill(3)
    desk.release(a, Answer.SATURATED)
    desk.advance(0.99 * SATURATED_S)
    assert waits.state is State.WAITING


def test_a_saturated_endpoint_that_was_closed_by_its_cache_stays_closed() -> None:
    desk = Desk(one("a", 2))
    a, _, waits = desk.fill(3)
    desk.observe("a", Load(kv_usage=1.0))
    desk.release(a, Answer.SATURATED)
    desk.advance(2 * SATURATED_S)
    assert waits.state is State.WAITING


def test_an_endpoint_that_is_down_is_not_ejected_where_it_serves_alone_so_that_it_serves_once_it_is_up() -> None:
    """Found by the storm: its leases of a model that others serve, too, failed after its health check had."""
    a = EndpointSpec("a", models=frozenset({"all"}), max_running_requests=20)
    b = EndpointSpec("b", models=frozenset({"all", "own"}), max_running_requests=20)
    desk = Desk(a, b)
    tickets = [desk.ask(f"r{number}", model="all") for number in range(40)]
    for ticket in tickets:
        if desk.where(ticket) == "a":
            desk.release(ticket, Answer.OK)
    desk.set_up("b", is_up=False)
    for ticket in tickets:
        if desk.where(ticket) == "b" and ticket.state is State.LEASED:
            desk.release(ticket, Answer.FAILED)
    assert desk.core.endpoints["b"].health.ejected_until is None
    desk.set_up("b", is_up=True)
    assert desk.where(desk.ask("own", model="own")) == "b"
