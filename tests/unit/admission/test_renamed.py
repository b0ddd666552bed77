"""A server is where its address is: whoever comes there by another name counts what runs there."""

from __future__ import annotations

import pytest

from extproc.admission.controller import Controller
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request


class Core:
    """A core, and what runs where by the addresses of its decisions."""

    def __init__(self, *specs: EndpointSpec) -> None:
        self.core = Controller(Policy(shed=False))
        self.core.put_endpoints(specs, 0.0)

    def ask(self, count: int = 1) -> list[Ticket]:
        tickets = [Ticket(Request("r", 0.0)) for _ in range(count)]
        for ticket in tickets:
            self.core.offer(ticket, 0.0)
        return tickets

    def held(self) -> dict[str, int]:
        return {name: one.sequences for name, one in self.core.endpoints.items()}


def at(name: str, address: str, limit: int = 2) -> EndpointSpec:
    return EndpointSpec(name, max_running_requests=limit, address=address)


@pytest.mark.parametrize("order", ["comes, then goes", "goes, then comes", "takes its place"])
def test_a_server_that_is_renamed_again_and_again_has_its_limit_once(order: str) -> None:
    """After five renames 12 ran at a server whose limit is 2."""
    here = Core(at("n0", "x"))
    running, waiting = here.ask(2), here.ask(20)
    for turn in range(1, 6):
        before, now = f"n{turn - 1}", f"n{turn}"
        if order.startswith("goes"):
            here.core.remove_endpoints([before], float(turn))
        here.core.put_endpoints([at(now, "x")], float(turn))
        if order.endswith("goes"):
            here.core.remove_endpoints([before], float(turn))
        assert here.held() == {now: 2}
        assert {ticket.state for ticket in waiting} == {State.WAITING}
    for ticket in running:
        here.core.release(ticket, 9.0, Answer.OK)
    assert here.held() == {"n5": 2}
    assert sum(ticket.state is State.LEASED for ticket in waiting) == 2


def test_two_that_change_their_addresses_change_what_runs_there() -> None:
    here = Core(at("a", "x", 9))
    here.ask(3)
    here.core.put_endpoints([at("b", "y", 9)], 0.0)
    here.ask(2)
    assert here.held() == {"a": 3, "b": 2}
    here.core.put_endpoints([at("a", "y", 9), at("b", "x", 9)], 1.0)
    assert here.held() == {"a": 2, "b": 3}


@pytest.mark.parametrize("at_once", [True, False])
def test_who_comes_where_another_one_was_counts_what_that_one_left_there(at_once: bool) -> None:
    here = Core(at("a", "x"))
    running, waiting = here.ask(2), here.ask(9)
    changes = [at("a", "y"), at("b", "x")]
    for specs in [changes] if at_once else [changes[:1], changes[1:]]:
        here.core.put_endpoints(specs, 1.0)
    assert here.held() == {"a": 2, "b": 2}  # those that run at the old place are its own, two more went to the new
    assert [ticket.endpoint.name for ticket in running if ticket.endpoint] == ["b", "b"]
    assert sum(ticket.state is State.LEASED for ticket in waiting) == 2


def test_what_runs_at_a_server_is_its_own_wherever_who_sent_it_there_has_moved_since() -> None:
    """Back where it came from, one no longer counted what it had left there: somebody else had come where it was."""
    here = Core(at("a", "x"))
    here.ask(2)
    here.core.put_endpoints([at("a", "y")], 1.0)
    here.core.put_endpoints([at("a", "x"), at("b", "y")], 2.0)
    assert here.held() == {"a": 2, "b": 0}
    here.core.put_endpoints([at("c", "x"), at("a", "z")], 3.0)
    assert here.held() == {"c": 2, "b": 0, "a": 0}


def test_who_moved_twice_left_nothing_at_the_second_place_that_runs_at_the_first() -> None:
    here = Core(at("a", "x"))
    here.ask(2)
    for when, specs in enumerate(([at("a", "y")], [at("a", "z")], [at("b", "x")], [at("c", "y")]), 1):
        here.core.put_endpoints(specs, float(when))
    assert here.held() == {"a": 0, "b": 2, "c": 0}


def test_what_a_gateway_says_runs_elsewhere_is_not_counted_where_it_was_sent() -> None:
    here = Core(at("a", "x"))
    ticket, other = here.ask(2)
    here.core.put_endpoints([at("a", "y"), at("b", "w")], 1.0)
    here.core.move(ticket, "b", 2.0)
    here.core.put_endpoints([at("c", "x")], 3.0)
    assert here.held() == {"a": 0, "b": 1, "c": 1}
    for one in (ticket, other):
        here.core.release(one, 4.0)
    here.core.put_endpoints([at("c", "x", 3)], 5.0)
    assert (here.core._fleet._left, here.core._fleet._elsewhere) == ({}, {})


def test_what_is_over_is_counted_nowhere_and_who_comes_back_has_its_own() -> None:
    here = Core(at("a", "x", 9))
    over, *running = here.ask(3)
    here.core.remove_endpoints(["a"], 1.0)
    here.core.release(over, 2.0)
    here.core.put_endpoints([at("a", "x", 9)], 3.0)
    assert here.held() == {"a": 2}
    here.core.remove_endpoints(["a"], 4.0)
    here.core.put_endpoints([at("b", "x", 9)], 5.0)
    assert here.held() == {"b": 2}
    for ticket in running:
        here.core.release(ticket, 6.0)
    here.core.remove_endpoints(["b"], 7.0)
    assert here.held() == {}
    assert here.core._fleet._left == {}


def test_what_runs_there_keeps_its_age_and_its_tokens() -> None:
    here = Core(EndpointSpec("a", kv_capacity_tokens=10_000, address="x"))
    (ticket,) = here.ask()
    here.core.first_token(ticket, 1.0)
    booked, begun = here.core.endpoints["a"].kv.prompts, ticket.leased_at
    here.core.put_endpoints([EndpointSpec("b", kv_capacity_tokens=10_000, address="x")], 5.0)
    assert (here.core.endpoints["b"].kv.prompts, ticket.leased_at) == (booked, begun)
    assert here.core.endpoints["b"].prefill.tokens == 0  # its first token has come
    here.core.release(ticket, 6.0, Answer.OK)
    assert here.core.endpoints["b"].kv.prompts == 0
