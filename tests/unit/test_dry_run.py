"""Dry run: nothing is held, and what would have been is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from extproc.admission.controller import Controller
from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Dispatch, EndpointSpec, Policy, Request, RequestClass
from extproc.stream.dry_run import DryRun
from tests.unit.admission.methods import events_of_the_core

EJECT_AFTER = LAWS.health.eject_after

NAME = "default"
NEEDED = events_of_the_core()
SAMPLES = {
    "name": "a",
    "names": ("a",),
    "spec": EndpointSpec("a", max_running_requests=3),
    "specs": (EndpointSpec("a", max_running_requests=3),),
    "is_up": True,
    "load": Load(running=1.0),
    "policy": Policy(enable_queue=False),
    "quota": 1,
    "models": frozenset({"m"}),
}


class Run:
    """The real core, with the queue off, and who watches it."""

    def __init__(self, policy: Policy) -> None:
        self.core = Controller(replace(policy, enable_queue=False))
        self.dry = DryRun(policy)
        self.counts = self.dry.counts
        self.core.watch(self.dry.happened)

    def __getattr__(self, name: str) -> object:
        return getattr(self.core, name)


def started(**policy) -> Run:
    run = Run(Policy(classes=(RequestClass(NAME, 0, 5.0),), shed=False, **policy))
    run.put_endpoint(EndpointSpec("a", max_running_requests=2), 0.0)
    return run


def offer(run: Run, now: float) -> Ticket:
    ticket = Ticket(Request("r", now))
    (decision,) = run.offer(ticket, now)
    assert isinstance(decision, Dispatch)
    return ticket


def test_everything_is_dispatched_at_once_and_what_would_wait_is_counted_when_its_end_is_known():
    run = started()
    tickets = [offer(run, 0.0) for _ in range(5)]
    assert run.counts == {("dispatched", NAME): 2}
    run.release(tickets[0], 1.0, Answer.OK)
    assert run.counts == {("dispatched", NAME): 2, ("held", NAME): 1}
    for ticket in tickets[1:]:
        run.release(ticket, 2.0, Answer.OK)
    assert run.counts == {("dispatched", NAME): 2, ("held", NAME): 3}
    assert all(ticket.state is State.DONE for ticket in tickets)


def test_what_would_have_been_refused_is_counted_under_its_outcome():
    run = started(max_queued_requests=1)
    tickets = [offer(run, 0.0) for _ in range(5)]
    assert run.counts == {("dispatched", NAME): 2, ("queue_full", NAME): 2}
    run.release(tickets[4], 6.0)
    assert run.counts[("budget_expired", NAME)] == 1


def test_the_run_remembers_nothing_of_requests_that_are_over():
    run = started()
    for ticket in [offer(run, 0.0) for _ in range(10)]:
        run.release(ticket, 1.0)
    assert run.dry._twins == {}
    assert run.dry._other.waiting == 0
    assert not run.dry._other.endpoints["a"].leases


def test_a_request_that_a_gateway_took_elsewhere_is_over_in_both():
    run = started()
    run.put_endpoint(EndpointSpec("b", max_running_requests=1), 0.0)
    tickets = [offer(run, 0.0) for _ in range(5)]
    run.remove_endpoints(["b"], 0.0)
    for ticket in tickets:
        run.move(ticket, "nobody's", 1.0)
    assert run.dry._twins == {}
    assert run.dry._other.waiting == 0
    assert not run.dry._other.endpoints["a"].leases
    assert run.counts == {("dispatched", NAME): 3, ("held", NAME): 2}


def test_endpoints_policy_and_health_reach_both():
    run = started()
    run.put_endpoint(EndpointSpec("b", max_running_requests=1), 0.0)
    run.set_up("a", 0.0, is_up=False)
    first, second = offer(run, 0.0), offer(run, 0.0)
    assert (first.endpoint.name, second.endpoint.name) == ("b", "b")
    assert run.counts == {("dispatched", NAME): 1}
    run.set_policy(Policy(classes=(RequestClass("other"),), enable_queue=False), 0.0)
    assert run.dry._other.policy.enable_queue
    run.remove_endpoints(["b"], 0.0)
    assert set(run.dry._other.endpoints) == {"a", "b"}
    run.release(first, 0.0)
    run.release(second, 0.0)
    assert set(run.dry._other.endpoints) == set(run.endpoints) == {"a"}


# With the queue off nobody waits, so nobody leaves or is taken back; and "send" takes no slot.
@pytest.mark.parametrize("event", sorted(NEEDED.keys() - {"cancel", "send", "withdraw"}))
def test_whatever_happens_to_the_real_core_happens_to_the_other_one(event):
    run = started()
    ticket = Ticket(Request("r", 0.0)) if event in ("offer", "adopt") else offer(run, 0.0)
    other, twin = Controller(Policy(enable_queue=True)), Ticket(Request("r", 0.0))
    other.put_endpoint(SAMPLES["spec"], 0.0)
    other.offer(twin, 0.0)
    run.dry._other, run.dry._twins[ticket] = other, twin
    happened, heard = [], []
    run.watch(lambda event, _: happened.append(type(event)))
    other.watch(lambda event, _: heard.append(type(event)))
    known = {"ticket": ticket, "now": 1.0, **SAMPLES}
    assert set(NEEDED[event]) <= known.keys(), "a new kind of argument: give a sample of it"
    getattr(run, event)(**{name: known[name] for name in NEEDED[event]})
    assert happened[0] in heard


def test_an_answer_that_begins_well_ends_the_trial_in_both():
    run = started()
    for _ in range(EJECT_AFTER):
        run.release(offer(run, 0.0), 0.0, Answer.FAILED)
    run.put_endpoint(EndpointSpec("a", max_running_requests=64), 0.0)
    run.tick(run.next_deadline())
    before = dict(run.counts)
    long = offer(run, 20.0)
    run.answered(long, 20.1)
    for _ in range(20):
        run.release(offer(run, 21.0), 22.0, Answer.OK)
    assert run.counts == {**before, ("dispatched", NAME): before["dispatched", NAME] + 21}


def test_what_an_answer_reports_closes_the_gate_in_both():
    run = started()
    first = offer(run, 0.0)
    run.report("a", Load(kv_usage=0.99), 1.0)
    run.release(offer(run, 1.0), 2.0)
    assert run.counts["held", NAME] == 1
    run.release(first, 2.0)


def test_budgets_end_in_the_other_core_as_time_passes_whatever_the_event():
    run = started()
    for _ in range(3):
        offer(run, 0.0)
    run.observe("a", Load(), 6.0)
    assert run.counts[("budget_expired", NAME)] == 1
