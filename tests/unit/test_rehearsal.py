"""Dry run: nothing is held, and what would have been is counted."""

from __future__ import annotations

from extproc.admission.rehearsal import Rehearsal
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Dispatch, EndpointSpec, Policy, Request, RequestClass

NAME = "default"


def rehearse(**policy) -> Rehearsal:
    rehearsal = Rehearsal(Policy(classes=(RequestClass(NAME, 0, 5.0),), shed=False, **policy))
    rehearsal.put_endpoint(EndpointSpec("a", max_running_requests=2), 0.0)
    return rehearsal


def offer(rehearsal: Rehearsal, now: float) -> Ticket:
    ticket = Ticket(Request("r", now))
    (decision,) = rehearsal.offer(ticket, now)
    assert isinstance(decision, Dispatch)
    return ticket


def test_everything_is_dispatched_at_once_and_what_would_wait_is_counted_when_its_end_is_known():
    rehearsal = rehearse()
    tickets = [offer(rehearsal, 0.0) for _ in range(5)]
    assert rehearsal.counts == {("dispatched", NAME): 2}
    rehearsal.release(tickets[0], 1.0, Answer.OK)
    assert rehearsal.counts == {("dispatched", NAME): 2, ("held", NAME): 1}
    for ticket in tickets[1:]:
        rehearsal.release(ticket, 2.0, Answer.OK)
    assert rehearsal.counts == {("dispatched", NAME): 2, ("held", NAME): 3}
    assert all(ticket.state is State.DONE for ticket in tickets)


def test_what_would_have_been_refused_is_counted_under_its_outcome():
    rehearsal = rehearse(max_queued_requests=1)
    tickets = [offer(rehearsal, 0.0) for _ in range(5)]
    assert rehearsal.counts == {("dispatched", NAME): 2, ("queue_full", NAME): 2}
    rehearsal.release(tickets[4], 6.0)
    assert rehearsal.counts[("budget_expired", NAME)] == 1


def test_the_rehearsal_remembers_nothing_of_requests_that_are_over():
    rehearsal = rehearse()
    for ticket in [offer(rehearsal, 0.0) for _ in range(10)]:
        rehearsal.release(ticket, 1.0)
    assert rehearsal._twins == {}
    assert rehearsal._stage.waiting == 0
    assert not rehearsal._stage.endpoints["a"].leases


def test_endpoints_policy_and_health_reach_both():
    rehearsal = rehearse()
    rehearsal.put_endpoint(EndpointSpec("b", max_running_requests=1), 0.0)
    rehearsal.set_up("a", 0.0, is_up=False)
    first, second = offer(rehearsal, 0.0), offer(rehearsal, 0.0)
    assert (first.endpoint.name, second.endpoint.name) == ("b", "b")
    assert rehearsal.counts == {("dispatched", NAME): 1}
    rehearsal.set_policy(Policy(classes=(RequestClass("other"),)), 0.0)
    rehearsal.remove_endpoint("b", 0.0)
    assert set(rehearsal._stage.endpoints) == {"a", "b"}
    rehearsal.release(first, 0.0)
    rehearsal.release(second, 0.0)
    assert set(rehearsal._stage.endpoints) == set(rehearsal.endpoints) == {"a"}
