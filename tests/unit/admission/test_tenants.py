"""What the operator says of tenants: caps, guarantees, weights, and who counts as one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.outcome import Outcome
from extproc.admission.tenants import OTHERS, TenantRule, TenantRules
from extproc.admission.values import Answer, Policy

from .desk import CLASSES, Desk, one


def each(**rule: Any) -> TenantRules:
    """The same for every name."""
    return TenantRules(default=TenantRule(**rule))


def test_a_tenant_has_no_more_in_flight_than_it_may_waiting_or_running() -> None:
    desk = Desk(one("a", 2), tenants=each(max_in_flight=4))
    mine = [desk.ask(f"m{number}", tenant="mine") for number in range(6)]
    assert [desk.outcome(ticket) for ticket in mine] == [
        *[Outcome.DISPATCHED] * 2, *[None] * 2, *[Outcome.TENANT_LIMIT] * 2
    ]  # fmt: skip
    assert desk.retry_after(mine[4]) == 1
    assert desk.outcome(desk.ask("other", tenant="other")) is None, "another's requests are another's"


@pytest.mark.parametrize("end", ["release", "cancel", "expire", "disown"])
def test_whatever_ends_makes_room_for_the_tenants_next(end: str) -> None:
    desk = Desk(one("a", 1), tenants=each(max_in_flight=2))
    runs, waits = desk.ask(tenant="t"), desk.ask("w", "urgent", tenant="t")
    assert desk.outcome(desk.ask(tenant="t")) is Outcome.TENANT_LIMIT
    match end:
        case "release":
            desk.release(runs, Answer.OK)
        case "cancel":
            desk.cancel(waits)
        case "expire":
            desk.advance(2.0)
        case "disown":
            desk.disown(runs)
    assert desk.outcome(desk.ask("next", tenant="t")) is not Outcome.TENANT_LIMIT


def test_names_that_nobody_listed_count_as_one_tenant_so_that_made_up_ones_gain_nothing() -> None:
    rules = TenantRules({"known": TenantRule()}, TenantRule(max_in_flight=3), apart=False)
    desk = Desk(one("a", 1), tenants=rules)
    liars = [desk.ask(f"l{number}", tenant=f"made-up-{number}") for number in range(5)]
    assert [desk.outcome(ticket) for ticket in liars[3:]] == [Outcome.TENANT_LIMIT] * 2
    known = [desk.ask(f"k{number}", tenant="known") for number in range(3)]
    order = desk.serve_one_by_one(liars[0])
    assert order == ["k0", "l1", "k1", "l2", "k2"], "one share for all made-up names together"
    assert {desk.outcome(ticket) for ticket in known} == {Outcome.DISPATCHED}


def test_without_names_each_is_a_tenant_and_a_flood_of_them_is_remembered_no_longer_than_it_is_in_flight() -> None:
    desk = Desk(one("a", 1), tenants=each(max_in_flight=3))
    desk.always = False
    for number in range(200):
        desk.ask(f"r{number}", tenant=f"t{number}", budget_s=0.0)
    assert len(desk.core._books.tenants) == 1
    desk.release(next(iter(desk.leased)))
    assert len(desk.core._books.tenants) == 0


def test_what_is_guaranteed_goes_before_all_others_of_its_class() -> None:
    desk = Desk(one("a", 1), tenants=TenantRules({"vip": TenantRule(guaranteed=2)}))
    first = desk.ask("first", tenant="noisy")
    for number in range(4):
        desk.ask(f"n{number}", tenant="noisy", prompt_tokens=10)
    for number in range(4):
        desk.ask(f"v{number}", tenant="vip", prompt_tokens=5000)
    order = desk.serve_one_by_one(first)
    assert order[:2] == ["v0", "v1"]
    assert order[2:4] == ["v2", "v3"], "each that ends passes its guarantee on"


def test_what_is_guaranteed_is_no_more_at_once_than_was_said() -> None:
    desk = Desk(one("a", 3), tenants=TenantRules({"vip": TenantRule(guaranteed=2)}))
    held = [desk.ask(f"h{number}", tenant="other") for number in range(3)]
    for number in range(3):
        desk.ask(f"v{number}", tenant="vip", prompt_tokens=9000)
    desk.ask("cheap", tenant="other")
    del desk.order[:]
    for ticket in held:
        desk.release(ticket)
    assert desk.order == ["v0", "v1", "cheap"]


def test_a_higher_class_goes_before_what_is_guaranteed_in_a_lower_one() -> None:
    desk = Desk(one("a", 1), tenants=each(guaranteed=5))
    first = desk.ask("first", tenant="x")
    desk.ask("low", tenant="vip")
    desk.ask("high", "urgent", tenant="x")
    assert desk.serve_one_by_one(first) == ["high", "low"]


def test_a_guarantee_that_comes_free_goes_to_the_tenants_highest_class() -> None:
    desk = Desk(one("a", 1), tenants=TenantRules({"vip": TenantRule(guaranteed=1)}))
    first = desk.ask("first", tenant="vip")
    low, high = desk.ask("low", tenant="vip"), desk.ask("high", "urgent", tenant="vip")
    desk.release(first)
    assert desk.where(high) == "a"
    assert (low.is_favoured, high.is_favoured) == (False, True)


def test_fair_shares_are_as_the_weights_of_tenants() -> None:
    desk = Desk(one("a", 1), tenants=TenantRules({"big": TenantRule(weight=3.0)}))
    first = desk.ask("first", tenant="x")
    for number in range(40):
        for name in ("big", "small"):
            desk.ask(f"{name}{number}", tenant=name, prompt_tokens=100)
    order = desk.serve_one_by_one(first)[:40]
    assert sum(name.startswith("big") for name in order) == pytest.approx(30, abs=1)


def test_with_the_queue_off_no_tenant_is_refused() -> None:
    desk = Desk(one("a", 1), tenants=each(max_in_flight=1), enable_queue=False)
    assert {desk.outcome(ticket) for ticket in desk.fill(3, tenant="t")} == {Outcome.DISPATCHED}


def test_a_request_that_was_taken_back_counts_for_whom_the_rules_then_say() -> None:
    """Found by the storm: it kept the tenant that it had counted for, and passed or was passed by its own."""
    together = TenantRules(default=TenantRule(), apart=False)
    desk = Desk(one("a", 1), tenants=together)
    running = desk.ask(tenant="x")
    back = desk.ask("back", tenant="t", prompt_tokens=9000)
    desk.withdraw(back)
    desk.set_policy(Policy(classes=CLASSES, shed=False))
    desk.offer_again(back)
    desk.ask("later", tenant="t", prompt_tokens=10)
    assert back.tenant == "t"
    assert desk.serve_one_by_one(running) == ["back", "later"]


def test_changed_rules_hold_from_then_on() -> None:
    desk = Desk(one("a", 9), tenants=each(max_in_flight=5))
    desk.fill(3, tenant="t")
    desk.set_policy(Policy(classes=CLASSES, shed=False, tenants=each(max_in_flight=3)))
    assert desk.outcome(desk.ask(tenant="t")) is Outcome.TENANT_LIMIT
    desk.set_policy(Policy(classes=CLASSES, shed=False))
    assert desk.outcome(desk.ask(tenant="t")) is Outcome.DISPATCHED


def test_what_is_in_flight_is_told_of_those_who_are_named_and_of_all_others_together() -> None:
    desk = Desk(one("a", 2))
    assert desk.core.tenants_in_flight() == {}, "there are no rules"
    desk = Desk(one("a", 2), tenants=TenantRules({"named": TenantRule(), "idle": TenantRule()}))
    for tenant in ("named", "made up", "named", "another", "named"):
        desk.ask(tenant=tenant)
    assert desk.core.tenants_in_flight() == {"named": 3, "idle": 0, OTHERS: 2}
    desk.release(next(iter(desk.leased)))
    assert desk.core.tenants_in_flight() == {"named": 2, "idle": 0, OTHERS: 2}


def test_an_answer_that_cannot_be_judged_gives_back_its_slot_and_its_tenants_place_all_the_same() -> None:
    faulty = replace(LAWS, tokens=replace(LAWS.tokens, memory=0.0))  # no config file can say so: a mean of no answers
    desk = Desk(one(), tenants=TenantRules(default=TenantRule(max_in_flight=2)), laws=faulty)
    first, second = desk.ask(tenant="t"), desk.ask(tenant="t")
    with pytest.raises(ZeroDivisionError):
        desk.release(first, Answer.OK)
    desk.advance(0.1)
    assert desk.where(second) == "a", "with the next event"
    assert desk.outcome(desk.ask(tenant="t")) is None, "it waits: the first one is over, and counts no more"
