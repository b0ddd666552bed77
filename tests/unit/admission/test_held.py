"""Why a request waits: what the core says keeps it, on virtual time. `World` checks that room and reason agree."""

from __future__ import annotations

import pytest

from extproc.admission.held import HeldBy
from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.outcome import Outcome
from extproc.admission.values import Answer, EndpointSpec, Reject

from .desk import Desk, one

GUARD = LAWS.guard.passes
EJECT_AFTER = LAWS.health.eject_after


def held(desk: Desk) -> dict[str, HeldBy]:
    return {endpoint.name: by for endpoint, by in desk.core.holds().items()}


def at_limit(desk: Desk) -> None:
    desk.fill(8)


def down(desk: Desk) -> None:
    desk.set_up("a", is_up=False)


def asleep(desk: Desk) -> None:
    desk.observe("a", Load(running=0.0, asleep=True))


def on_trial(desk: Desk) -> None:
    for ticket in desk.fill(EJECT_AFTER):
        desk.release(ticket, Answer.FAILED)


def just_refused(desk: Desk) -> None:
    desk.release(desk.ask(), Answer.SATURATED)


def hot(desk: Desk) -> None:
    desk.ask()  # one at a time
    desk.observe("a", Load(running=1.0, kv_usage=0.99))


def out_of_cache(desk: Desk) -> None:
    desk.ask(prompt_tokens=8_000)


def computing_prompts(desk: Desk) -> None:
    desk.observe("a", Load(running=0.0, first_tokens=0, kv_capacity_tokens=1_000_000))
    desk.ask(prompt_tokens=3_000)


def at_our_part(desk: Desk) -> None:
    desk.fill(2)
    desk.core.set_quota("a", 2, desk.now)


@pytest.mark.parametrize(
    ("fill", "by"),
    [
        (at_limit, HeldBy.LIMIT),
        (at_our_part, HeldBy.PART),
        (down, HeldBy.DOWN),
        (asleep, HeldBy.ASLEEP),
        (on_trial, HeldBy.TRIAL),
        (just_refused, HeldBy.REFUSED),
        (hot, HeldBy.HOT),
        (out_of_cache, HeldBy.KV),
        (computing_prompts, HeldBy.PROMPTS),
    ],
    ids=lambda one: getattr(one, "value", None),
)
def test_a_request_that_waits_says_which_limit_it_waits_for(fill, by):
    desk = Desk(EndpointSpec("a", max_running_requests=8, kv_capacity_tokens=10_000))
    if by is HeldBy.PROMPTS:
        desk.put(EndpointSpec("a", max_running_requests=8))
    fill(desk)
    ticket = desk.ask(prompt_tokens=2_000)
    assert desk.outcome(ticket) is None, "it waits"
    assert ticket.waited_for is by
    assert held(desk) == {"a": by}


def test_what_fits_waited_for_nothing_and_an_endpoint_with_room_is_held_by_nothing():
    desk = Desk(EndpointSpec("a", max_running_requests=1))
    ticket = desk.ask()
    assert (desk.where(ticket), ticket.waited_for) == ("a", None)
    assert held(desk) == {"a": HeldBy.LIMIT}, "the next one would wait"
    desk.release(ticket)
    assert held(desk) == {}


def test_since_when_an_endpoint_has_had_no_room_is_known_until_it_has_some():
    desk = Desk(EndpointSpec("a", max_running_requests=1))
    endpoint = desk.endpoint("a")
    assert endpoint.held_since is None
    first, since = desk.ask(), desk.now
    desk.advance(3.0)
    second = desk.ask()  # waits, and changes nothing
    assert endpoint.held_since == since
    desk.release(first)
    assert (desk.where(second), endpoint.held_since) == ("a", since), "no room in between"
    desk.release(second)
    assert endpoint.held_since is None


def test_since_when_a_limit_is_what_its_reason_says_is_known_once_that_has_changed():
    desk = Desk(EndpointSpec("a"))
    endpoint = desk.endpoint("a")
    desk.observe("a", Load(running=1.0, waiting=0.0))
    assert (endpoint.limit.why, endpoint.limit_since) == ("start", None)
    desk.advance(1.0)
    desk.observe("a", Load(running=1.0, waiting=0.0, max_running=4))
    since = desk.now
    desk.advance(1.0)
    desk.observe("a", Load(running=1.0, waiting=0.0, max_running=4))
    assert (endpoint.limit.why, endpoint.limit_since) == ("batch", since)


def test_a_queue_that_is_off_is_held_by_nothing_but_what_takes_an_endpoint_out():
    desk = Desk(EndpointSpec("a", max_running_requests=1), EndpointSpec("b"), enable_queue=False)
    desk.fill(3)
    desk.set_up("b", is_up=False)
    assert held(desk) == {"b": HeldBy.DOWN}


def test_at_home_it_is_the_homes_limit_that_is_named():
    desk = Desk(EndpointSpec("a", max_running_requests=1), EndpointSpec("b", max_running_requests=9))
    desk.ask(home="a")
    ticket = desk.ask(home="a")
    assert ticket.waited_for is HeldBy.LIMIT
    assert held(desk) == {"a": HeldBy.LIMIT}, "b has room, and nobody who may go there waits"


def test_room_that_is_kept_for_somebody_who_goes_first_is_called_so():
    desk = Desk(EndpointSpec("a", max_running_requests=9, kv_capacity_tokens=10_000))
    desk.ask(prompt_tokens=2_000)
    big = desk.ask("big", prompt_tokens=8_000)
    for _ in range(GUARD):
        desk.release(desk.ask("small"))
    late = desk.ask("late")
    assert (big.waited_for, late.waited_for) == (HeldBy.KV, HeldBy.GUARD)
    assert held(desk) == {"a": HeldBy.KV}, "the line's first is held by that"


def test_each_endpoint_is_described_by_the_first_of_those_who_may_go_there():
    models = {"a": frozenset({"m"}), "b": frozenset({"n"})}
    desk = Desk(*(EndpointSpec(name, "", of, 8, 10_000) for name, of in models.items()))
    desk.ask(model="m", prompt_tokens=8_000)
    desk.ask(model="m", prompt_tokens=8_000)
    desk.ask("urgent", "urgent", model="n")
    assert held(desk) == {"a": HeldBy.KV}


def test_a_refusal_for_a_wait_too_long_knows_the_prediction_and_what_held_it():
    desk = Desk(EndpointSpec("a", max_running_requests=1), shed=True)
    running = desk.fill(1)[0]
    waiting = desk.fill(30, request_class="batch")
    for ticket in waiting[:12]:
        desk.advance(0.5)
        desk.release(running)
        running = ticket
    refused = desk.ask(request_class="batch", budget_s=2.0)
    decision = desk.decided[refused]
    assert isinstance(decision, Reject)
    assert decision.outcome is Outcome.BUDGET_PREDICTED
    assert refused.waited_for is HeldBy.LIMIT
    assert refused.predicted_s == pytest.approx(9.5, rel=0.2), "18 before it, two a second"


def test_a_line_waits_for_what_the_member_lacks_that_was_open_last() -> None:
    desk = Desk(one("a"), one("b", 9))
    desk.ask(home="a")
    desk.ask(home="b")
    desk.observe("b", Load(kv_usage=1.0))
    assert desk.ask().waited_for is HeldBy.HOT
    desk.observe("b", Load(kv_usage=0.1))
    desk.fill(9)
    assert desk.ask().waited_for is HeldBy.LIMIT
