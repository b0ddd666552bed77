"""First fit and its guard: small requests pass big ones that don't fit, and not for ever."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.outcome import Outcome
from extproc.admission.queue import WINDOW
from extproc.admission.ticket import State
from extproc.admission.values import Answer, EndpointSpec

from . import audit
from .desk import Desk, elephants, in_use, one, shared

GUARD = LAWS.guard.passes


def test_a_small_request_passes_a_big_one_that_does_not_fit() -> None:
    desk = Desk(one("a", 1000, kv_capacity_tokens=10_000), one("off", 1, models=frozenset({"x"})))
    (big,) = elephants(desk)
    assert (desk.ask("mouse").state, big.state) == (State.LEASED, State.WAITING)


def test_only_the_first_few_are_looked_at() -> None:
    desk = Desk(one("a", 1000, kv_capacity_tokens=10_000), fair=False)
    elephants(desk, WINDOW)
    mouse = desk.ask("mouse")
    assert mouse.state is State.WAITING


def test_who_comes_into_the_window_is_looked_at() -> None:
    desk = Desk(one("a", 1000, kv_capacity_tokens=10_000), fair=False)
    bigs = elephants(desk, WINDOW)
    mouse = desk.ask("mouse")
    desk.cancel(bigs[3])
    assert mouse.state is State.LEASED


def test_those_who_come_into_the_window_together_go_in_order() -> None:
    """Found by reading: the last of them was looked at first."""
    desk = Desk(one("a", 2), one("b", 1000, kv_capacity_tokens=10_000), fair=False)
    a = [desk.ask("a", home="a") for _ in range(2)]
    held = desk.ask("held", home="b", prompt_tokens=8500)
    bigs = [desk.ask(f"big{number}", prompt_tokens=6000, budget_s=5.0) for number in range(WINDOW)]
    first, second = desk.ask("first", prompt_tokens=200), desk.ask("second", prompt_tokens=200)
    desk.advance(5.0)
    assert {desk.outcome(ticket) for ticket in bigs} == {Outcome.BUDGET_EXPIRED}
    assert in_use([*a, held, first, second]) == [True, True, True, True, False]


def test_a_cancel_at_home_lets_one_of_the_shared_line_into_the_window() -> None:
    """Found by reading: the endpoint looks at both lines as one, and only its own line's next was told."""
    desk = Desk(one("a", 1000, kv_capacity_tokens=10_000), one("b", 1), fair=False, patience_s=25.0)
    desk.ask("b", home="b")
    held = [desk.ask(f"held{number}", prompt_tokens=1000, home="a") for number in range(7)]
    at_home = [desk.ask("big", prompt_tokens=6000, home="a") for _ in range(20)]
    for _ in range(WINDOW - 20):
        desk.ask("big", prompt_tokens=6000)
    mouse = desk.ask("mouse", prompt_tokens=1500)  # does not fit on arrival
    desk.release(held[0])
    assert mouse.state is State.WAITING
    desk.cancel(at_home[0])
    assert mouse.state is State.LEASED


def test_nobody_passes_a_big_one_for_ever() -> None:
    desk = Desk(one("a", 1000, kv_capacity_tokens=10_000))
    (big,) = elephants(desk)
    for number in range(GUARD):
        mouse = desk.ask(f"mouse{number}")
        assert mouse.state is State.LEASED
        desk.release(mouse)
    blocked = desk.ask("one too many")
    assert (big.passed_over, blocked.state) == (GUARD, State.WAITING)
    desk.release(next(iter(desk.leased)))
    assert big.state is State.LEASED


def test_room_is_kept_at_the_emptiest_endpoint_alone_and_the_others_serve_on() -> None:
    """Found by an attacker: twenty huge requests of one client kept four endpoints all but empty."""
    desk = Desk(*(one(name, 1000, kv_capacity_tokens=10_000) for name in "abcd"))
    held = [desk.ask("held", prompt_tokens=4000 - 100 * number) for number in range(4)]  # d's room is the biggest
    elephants = [desk.ask("elephant", prompt_tokens=6000) for _ in range(3)]
    while elephants[-1].passed_over < GUARD:
        desk.release(desk.ask("mouse"))
    mice = [desk.ask("mouse", prompt_tokens=800) for _ in range(9)]
    assert in_use(mice) == [True] * 9
    assert {desk.where(mouse) for mouse in mice} == {"a", "b", "c"}
    assert desk.ask("one too many", prompt_tokens=2100).state is State.WAITING  # it would fit at d
    desk.release(held[3])
    assert [desk.where(elephant) for elephant in elephants] == ["d", None, None]


def test_when_another_endpoint_becomes_the_emptiest_the_room_kept_until_then_is_free() -> None:
    desk = Desk(*(one(name, 1000, kv_capacity_tokens=10_000) for name in "ab"))
    a, _ = (desk.ask("held", prompt_tokens=tokens) for tokens in (4000, 3900))
    desk.ask("held", home="a", prompt_tokens=2500)
    desk.ask("elephant", prompt_tokens=7000)
    for _ in range(GUARD):
        desk.release(desk.ask("mouse", home="a"))
    waiting = [desk.ask("mouse", prompt_tokens=4000) for _ in range(2)]  # only b has that room, and keeps it
    assert in_use(waiting) == [False, False]
    desk.release(a)  # now a is the emptiest, though the elephant does not fit yet
    assert [desk.where(ticket) for ticket in waiting] == ["b", None]


def test_one_that_was_full_and_is_the_emptiest_now_keeps_its_room_and_the_other_no_more() -> None:
    desk = Desk(one("a", 2, kv_capacity_tokens=10_000), one("b", 1000, kv_capacity_tokens=10_000))
    _, leaving = (desk.ask("held", home="a", prompt_tokens=tokens) for tokens in (3500, 10))
    desk.ask("held", home="b", prompt_tokens=6000)
    elephant = desk.ask("elephant", prompt_tokens=7000)
    for _ in range(GUARD):
        desk.release(desk.ask("mouse"))
    mouse = desk.ask("mouse", prompt_tokens=2000)
    assert mouse.state is State.WAITING  # b keeps its room
    desk.release(leaving)  # now a does, though the elephant does not fit yet
    assert [desk.where(ticket) for ticket in (elephant, mouse)] == [None, "b"]


@pytest.mark.parametrize("models", ["xy", "yx"], ids=" then ".join)
def test_of_guards_of_two_models_the_senior_goes_first(models: str) -> None:
    both = frozenset(models)
    desk = Desk(
        one("a", 1000, kv_capacity_tokens=10_000, models=both),
        *(one(model, models=frozenset({model})) for model in "xy"),
    )
    for model in "xy":
        desk.ask("filler", model=model, home=model)
    held = desk.ask("held", model="x", home="a", prompt_tokens=4000)
    first, second = (desk.ask(f"elephant of {model}", model=model, prompt_tokens=6000) for model in models)
    while not (first.is_guard and second.is_guard):
        mouse = desk.ask("mouse", model=models[desk.events % 2])
        assert desk.where(mouse) == "a"
        desk.release(mouse)
    assert desk.ask("one too many", model="x").state is State.WAITING
    desk.release(held)
    assert (desk.where(first), desk.where(second)) == ("a", None)
    desk.release(first)
    assert desk.where(second) == "a"


def test_a_guard_that_is_pushed_out_of_the_window_keeps_no_room_from_another_model() -> None:
    models = frozenset({"huge", "tiny"})
    desk = Desk(one("a", 1000, kv_capacity_tokens=10_000, models=models), one("b", models=frozenset({"huge"})))
    desk.ask("held", model="huge", prompt_tokens=4000)
    desk.ask("blocker", model="huge", prompt_tokens=1)  # takes all of b
    desk.ask("guard", model="huge", prompt_tokens=6000)
    for _ in range(GUARD):
        desk.release(desk.ask("mouse", model="tiny"))
    for _ in range(WINDOW - 1):
        desk.ask("first", "urgent", model="huge", prompt_tokens=6000)
    mouse = desk.ask("mouse", model="tiny")
    assert mouse.state is State.WAITING
    desk.ask("first", "urgent", model="huge", prompt_tokens=6000)
    assert mouse.state is State.LEASED


@pytest.mark.parametrize("how", ["cancel", "expire"])
def test_when_the_guarded_one_leaves_the_others_go(how: str) -> None:
    desk = Desk(one("a", 1000, kv_capacity_tokens=10_000))
    (big,) = elephants(desk)
    for _ in range(GUARD):
        desk.release(desk.ask("mouse"))
    blocked = desk.ask("mouse")
    desk.ask("big too", prompt_tokens=6000)
    desk.cancel(big) if how == "cancel" else desk.advance(30.0)
    assert (desk.outcome(blocked) in (Outcome.DISPATCHED,)) == (how == "cancel")


def test_a_higher_class_passes_the_guarded_one() -> None:
    desk = Desk(one("a", 1000, kv_capacity_tokens=10_000))
    elephants(desk)
    for _ in range(GUARD):
        desk.release(desk.ask("mouse"))
    assert desk.ask("urgent", "urgent").state is State.LEASED


def test_who_is_kept_from_one_endpoint_by_a_guard_goes_to_another() -> None:
    """Found by reading: only the endpoint with the most room was tried."""
    desk = Desk(one("a", 1000, kv_capacity_tokens=10_000), one("b", 2), fair=False, patience_s=20.0)
    desk.ask("b", home="b")
    desk.ask("held", prompt_tokens=4000, home="a")
    desk.ask("elephant", prompt_tokens=6000, home="a")
    for _ in range(GUARD):
        desk.release(desk.ask("mouse", home="a"))
    stuck = desk.ask("mouse", home="a")
    assert stuck.state is State.WAITING
    assert desk.endpoint("a").pressure() < desk.endpoint("b").pressure()
    assert desk.where(desk.ask("free")) == "b"


def test_a_big_request_is_not_passed_over_without_end_by_another_models_small_ones() -> None:
    models = frozenset({"huge", "tiny"})
    desk = Desk(EndpointSpec("a", models=models, kv_capacity_tokens=10_000, max_running_requests=100))
    small = [desk.ask(f"first{n}", model="tiny", prompt_tokens=1000, max_output_tokens=100) for n in range(4)]
    big = desk.ask("big", model="huge", prompt_tokens=6000, max_output_tokens=1000)
    passed = 0
    while desk.where(big) is None:
        passed += 1
        assert passed < 3 * GUARD
        small.append(desk.ask(f"later{passed}", model="tiny", prompt_tokens=1000, max_output_tokens=100))
        leased = next(ticket for ticket in small if ticket.state is State.LEASED)
        desk.release(leased)
    assert passed >= GUARD


def test_who_comes_into_the_window_of_a_shared_line_is_looked_at() -> None:
    desk = shared(one("a", 1000, kv_capacity_tokens=10_000), fair=False)
    bigs = elephants(desk, WINDOW)
    mouse = desk.ask("mouse")
    assert (mouse.state, mouse.home) == (State.WAITING, None)
    desk.cancel(bigs[3])
    assert mouse.state is State.LEASED


def test_nobody_passes_a_big_one_in_a_shared_line_for_ever() -> None:
    desk = shared(one("a", 1000, kv_capacity_tokens=10_000))
    (big,) = elephants(desk)
    for _ in range(GUARD):
        desk.release(desk.ask("mouse"))
    assert (big.passed_over, desk.ask("one too many").state) == (GUARD, State.WAITING)


@pytest.mark.parametrize("how", ["none leaves", "one leaves", "their patience ends"])
def test_each_of_those_who_were_passed_over_too_often_is_a_guard(how: str) -> None:
    desk = Desk(one("a", 1000, kv_capacity_tokens=10_000), one("b", 1), patience_s=10.0)
    desk.ask("b", home="b")
    desk.ask("held", prompt_tokens=4000, home="a")
    bigs = [desk.ask("big", prompt_tokens=6000, home="a") for _ in range(2)]
    for _ in range(GUARD):
        desk.release(desk.ask("mouse", home="a"))
    if how == "one leaves":
        desk.cancel(bigs[0])
    elif how == "their patience ends":
        desk.advance(10.0)
    assert [big.passed_over for big in bigs] == [GUARD, GUARD]
    assert desk.ask("mouse", home="a").state is State.WAITING


def test_who_comes_as_the_last_in_the_window_is_looked_at() -> None:
    desk = Desk(one("a", 1000, kv_capacity_tokens=10_000), fair=False)
    elephants(desk, 10)
    for _ in range(WINDOW - 1):
        desk.ask("urgent big", "urgent", prompt_tokens=6000)
    assert desk.ask("urgent mouse", "urgent").state is State.LEASED


@pytest.mark.parametrize("seed", range(4))
def test_room_that_guards_keep_is_handed_on_whoever_comes_or_leaves(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit after each event finds who waits though it fits; guards are many, as two may pass one and no more."""
    monkeypatch.setattr(audit, "GUARD", 2)
    random, lists = Random(seed), [{"x"}, {"y"}, {"x", "y"}] if seed % 2 else [set[str]()]
    specs = [
        one(name, random.choice((3, 1000)), kv_capacity_tokens=10_000, models=frozenset(random.choice(lists)))
        for name in "abcd"
    ]
    desk = shared(*specs, patience_s=3.0, laws=replace(LAWS, guard=replace(LAWS.guard, passes=2)))
    guards = 0
    for number in range(600):
        waiting, leased, what = list(desk.waiting), list(desk.leased), random.random()
        if what < 0.5 and len(waiting) < 60:
            desk.ask(
                str(number),
                random.choice(("std", "std", "urgent")),
                prompt_tokens=random.choice((1, 100, 800, 2000, 5000, 7500)),
                model=random.choice("xy") if seed % 2 else None,
                home=random.choice((None, None, "a", "b")),
            )
        elif what < 0.8 and leased:
            desk.release(random.choice(leased), Answer.OK)
        elif what < 0.9 and waiting:
            desk.cancel(next((one for one in waiting if one.is_guard), waiting[0]))
        elif what < 0.95:
            desk.advance(0.5)
        else:
            desk.set_up(random.choice("abcd"), is_up=random.random() < 0.7)
        guards += any(ticket.is_guard for ticket in desk.waiting)
    assert guards > 100
