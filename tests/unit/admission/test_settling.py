"""What touches all who wait, settled some at a time: three here, where it is 250. Each event is audited."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from extproc.admission import pools, settling
from extproc.admission.outcome import Outcome
from extproc.admission.tenants import TenantRule, TenantRules

from .desk import Desk, in_use, one
from .storm import Storm

BOTH, SECOND = frozenset({"m", "n"}), frozenset({"n"})


@pytest.fixture(autouse=True)
def _three_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "PIECE", 3)
    monkeypatch.setattr(settling, "LOOKS", 2)
    monkeypatch.setattr(settling, "GOING", 1)


def unsettled(desk: Desk) -> int:
    return sum(ticket.queue.is_left for ticket in desk.waiting if ticket.queue is not None)


def settle(desk: Desk) -> None:
    for _ in range(1000):
        if desk.core.next_deadline() != desk.now:
            return
        before = unsettled(desk)
        desk.tick()
        assert 0 <= before - unsettled(desk) <= settling.PIECE
    raise AssertionError("some are never settled")


def eight_of_two_models(desk: Desk) -> None:
    desk.ask("held", model="m")
    for number in range(1, 9):
        desk.ask(f"{number}", model="mn"[number % 2], tenant=f"t{number % 3}")


def test_a_pool_that_splits_is_settled_some_at_a_time_and_everybody_waits_for_who_serves_its_model() -> None:
    desk = Desk(one(models=BOTH), patience_s=0.0)
    eight_of_two_models(desk)
    desk.put(one("b", limit=9, models=SECOND))
    assert unsettled(desk)
    settle(desk)
    assert desk.order == ["held", "1", "3", "5", "7"]
    assert [ticket.request.model for ticket in desk.waiting] == ["m"] * 4


def test_pools_that_join_before_all_are_settled_lose_nobody_and_keep_the_order_of_arrival() -> None:
    desk = Desk(one(models=BOTH), fair=False)
    eight_of_two_models(desk)
    desk.put(one("b", models=SECOND), one("c", models=SECOND))
    desk.set_up("b", is_up=False)
    desk.set_up("c", is_up=False)
    desk.tick()
    desk.remove("b")
    desk.remove("c")
    assert unsettled(desk)
    settle(desk)
    (held,) = desk.leased
    assert desk.serve_one_by_one(held) == [f"{number}" for number in range(1, 9)]


def test_who_waited_for_the_first_endpoint_gets_its_budget_before_the_old_one_is_over() -> None:
    desk = Desk(one(), no_endpoint_budget_s=300.0)
    desk.set_up("a", is_up=False)
    tickets = [desk.ask(f"{number}", "urgent") for number in range(6)]
    desk.advance(299.9)
    desk.set_up("a", is_up=True)
    assert unsettled(desk) == 3
    desk.advance(0.2, late=True)
    assert in_use(tickets) == [True] + [False] * 5
    assert Outcome.BUDGET_EXPIRED not in map(desk.outcome, tickets)


def test_the_first_endpoint_that_is_up_serves_the_highest_class_first_whoever_came_before() -> None:
    desk = Desk(one(limit=2), no_endpoint_budget_s=300.0)
    desk.set_up("a", is_up=False)
    for number in range(7):
        desk.ask(f"{number}", tenant="many")
    desk.ask("another's", tenant="one")
    desk.ask("urgent", "urgent")
    desk.set_up("a", is_up=True)
    settle(desk)
    assert desk.order == ["urgent", "0"]
    desk.release(next(iter(desk.leased)))
    assert desk.order[2:] == ["another's"]


def test_of_those_who_come_while_all_get_new_places_the_highest_class_is_settled_first() -> None:
    desk = Desk(one(), patience_s=0.0)
    held = desk.ask("held")
    for number in range(12):
        desk.ask(f"{number}")
    desk.set_policy(replace(desk.core.policy, fair=False))
    desk.ask("urgent", "urgent")
    desk.tick()
    desk.release(held)
    assert unsettled(desk)
    assert desk.order == ["held", "urgent"]


def test_who_may_go_to_some_endpoints_alone_goes_to_no_other_though_its_set_was_forgotten_before_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pools, "MOST_SUBSETS", 2)
    desk = Desk(one("a"), one("b"))
    held = desk.ask("held a", home="a")
    desk.ask("held b", home="b")
    tickets = [desk.ask(f"{number}", allowed=frozenset("ab")) for number in range(6)]
    desk.put(one("c"))  # they were all that there are: those who may go there alone get a pool of their own
    for ticket in tickets[:3]:
        desk.cancel(ticket)
    for allowed in ("a", "b", "c", "ac", "bc"):
        ticket = desk.ask(allowed, allowed=frozenset(allowed))
        if ticket in desk.waiting:
            desk.cancel(ticket)
    desk.put(one("d", limit=9))
    settle(desk)
    assert desk.order == ["held a", "held b", "c"]
    desk.release(held)
    assert desk.order == ["held a", "held b", "c", "3"]


def test_who_waits_where_there_is_room_is_settled_before_all_of_a_long_line_are() -> None:
    desk = Desk(one(models=BOTH), patience_s=0.0)
    desk.ask("held", model="m")
    for number in range(60):
        desk.ask(f"{number}", "urgent", model="m")
    desk.ask("last", "batch", model="n")
    desk.put(one("b", models=SECOND))
    for _ in range(61 // 6 + 1):  # they are looked at, some at a time
        desk.tick()
    assert desk.order == ["held", "last"]
    assert unsettled(desk) > 50


def test_a_small_pool_that_is_touched_together_with_a_large_one_is_settled_with_its_first_piece() -> None:
    desk = Desk(one("a", models=BOTH), one("b", models=SECOND), no_endpoint_budget_s=300.0)
    for name in "ab":
        desk.set_up(name, is_up=False)
    for number in range(60):
        desk.ask(f"{number}", "urgent", model="m")
    desk.ask("last", "batch", model="n")
    desk.set_up("a", is_up=True)
    desk.set_up("b", is_up=True)
    assert desk.order == ["0", "last"]
    assert unsettled(desk) > 50


def test_who_gets_its_guarantee_while_its_line_is_looked_at_is_settled_too() -> None:
    desk = Desk(one(models=BOTH), patience_s=0.0, tenants=TenantRules({"t": TenantRule(None, 1)}))
    held = desk.ask("held", model="m", tenant="t")
    for number in range(12):
        desk.ask(f"{number}", model="m", tenant=f"other{number}")
    for number in range(3):
        desk.ask(f"t{number}", model="m", tenant="t")
    desk.put(one("b", models=SECOND))
    desk.release(held)  # t0 is guaranteed from now on, and would stand before all who were looked at
    settle(desk)
    assert unsettled(desk) == 0
    assert len(desk.waiting) == 14


@pytest.mark.parametrize("seed", [200, 202])
def test_a_storm_whose_lines_are_looked_at_two_at_a_time_breaks_no_invariant(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "PIECE", 1)
    Storm(seed, check_every=20).run(5000)


@pytest.mark.parametrize("seed", [4, 21])
def test_a_storm_whose_lines_are_settled_three_at_a_time_breaks_no_invariant(seed: int) -> None:
    Storm(seed, check_every=20).run(3000)


def test_changes_that_follow_each_other_before_all_are_looked_at_keep_nobody_waiting_for_ever() -> None:
    desk = Desk(one("a"), one("b"))
    held = desk.ask("held", allowed=frozenset("a"))
    desk.fill(2 * settling.LOOKS * settling.PIECE, allowed=frozenset("a"))
    desk.put(one("c"))
    desk.release(held)
    went = []
    for number in range(40):
        desk.now += 0.1
        if number % 2:
            desk.put(one("c"))
        else:
            desk.remove("c")
        desk.tick()
        for ticket in list(desk.leased):
            desk.release(ticket)
        went.append(desk.order[1:])
    assert went[8] == []
    assert went[-1] == [f"filler{number}" for number in range(12)]


def test_ever_new_subsets_are_forgotten_while_some_are_yet_to_be_settled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "MOST_SUBSETS", 4)
    desk = Desk(one("a"), *(one(name, limit=99) for name in "bcdefg"))
    waiting = desk.fill(99, allowed=frozenset("a"))[1:]
    desk.put(one("h", models=frozenset("m")))
    for pair in combinations("bcdefg", 2):
        assert desk.where(desk.ask(allowed=frozenset(pair))) in pair
    assert unsettled(desk) == len(waiting)
    assert len(desk.core._books.pools.subsets) <= 5
