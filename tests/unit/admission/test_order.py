"""In what order requests go: classes, arrival, short prompts."""

from __future__ import annotations

import pytest

from extproc.admission import placing
from extproc.admission.outcome import Outcome
from extproc.admission.placing import DUE_AT_ONCE
from extproc.admission.settling import PIECE
from extproc.admission.tenants import TenantRule, TenantRules
from extproc.admission.ticket import State
from extproc.admission.values import Policy

from .desk import CLASSES, STD, Desk, in_use, one, shared
from .storm import Storm


def test_requests_of_one_class_go_in_the_order_they_came() -> None:
    desk = Desk(one())
    first = desk.ask("0")
    for number in range(1, 6):
        desk.ask(str(number))
    assert desk.serve_one_by_one(first) == ["1", "2", "3", "4", "5"]


def test_a_higher_class_goes_first_whatever_waits() -> None:
    desk = Desk(one())
    first = desk.ask("first")
    for name in ("batch", "std", "urgent", "batch", "std", "urgent"):
        desk.ask(name, name)
    assert desk.serve_one_by_one(first) == ["urgent", "urgent", "std", "std", "batch", "batch"]


def test_endpoints_that_come_in_one_moment_take_who_waits_in_order_and_no_more_than_fit() -> None:
    desk = Desk(one(), patience_s=0.0)
    desk.ask("first")
    for name in ("batch", "std", "urgent", "batch", "std", "urgent"):
        desk.ask(name, name)
    desk.put(one("b"), one("c", 2), one("d", models=frozenset({"other"})))
    assert desk.order == ["first", "urgent", "urgent", "std"]
    assert desk.core.waiting == 3


def test_of_very_many_who_fit_at_once_some_go_in_each_event_and_who_comes_amid_it_stands_in_line() -> None:
    """10,000 in one event stopped the sidecar for .12 s."""
    desk = Desk(one(), patience_s=0.0, fair=False, max_queued_requests=1000)
    desk.ask("first")
    for number in range(5 * DUE_AT_ONCE):
        desk.ask(f"r{number}")
    desk.put(one(limit=1 + 4 * DUE_AT_ONCE))
    assert len(desk.order) == 1 + DUE_AT_ONCE
    for name in ("late", "urgent"):
        desk.ask(name, "urgent" if name == "urgent" else "std")
    for _ in range(3):
        before = len(desk.order)
        assert desk.core.next_deadline() == desk.now
        desk.tick()
        assert len(desk.order) <= before + DUE_AT_ONCE
    assert desk.order.index("urgent") == 1 + DUE_AT_ONCE
    desk.order.remove("urgent")
    assert desk.order == ["first", *(f"r{number}" for number in range(4 * DUE_AT_ONCE - 1))]


def test_a_storm_breaks_no_promise_where_a_few_waits_that_end_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "DUE_AT_ONCE", 2)
    Storm(2, check_every=10).run(3000)


def test_an_unknown_class_counts_as_the_default_one() -> None:
    desk = Desk(one())
    assert desk.ask(request_class="made up").request_class is STD
    assert desk.ask(request_class="").request_class is STD


def test_short_prompts_go_first_if_that_is_the_rule() -> None:
    desk = Desk(one(), short_first=True)
    first = desk.ask("0")
    for tokens in (900, 10, 400):
        desk.ask(str(tokens), prompt_tokens=tokens)
    assert desk.serve_one_by_one(first) == ["10", "400", "900"]


def test_another_order_of_very_many_who_wait_is_made_in_pieces_by_ticks_that_are_due_at_once() -> None:
    desk = shared(one())
    desk.ask("held")
    sizes = [number * 7 % 401 for number in range(1, 401)]
    before = {ticket: ticket.key for ticket in [desk.ask(f"{size}", prompt_tokens=size) for size in sizes]}
    desk.set_policy(Policy(classes=CLASSES, shed=False, short_first=True))
    changed = [sum(ticket.key != key for ticket, key in before.items())]
    while desk.core.next_deadline() == desk.now:
        desk.tick()
        changed.append(sum(ticket.key != key for ticket, key in before.items()))
    assert changed == [0, PIECE, 400]  # who looked at more than a piece settles nobody in the same event
    assert [ticket.prompt_tokens for ticket in desk.core.waiting_tickets()] == sorted(sizes)


def test_who_comes_while_another_order_is_made_stays_behind_its_tenants_earlier_requests() -> None:
    desk = shared(one(), fair=False)
    first = desk.ask("0", tenant="t")
    for number in range(1, PIECE + 3):
        desk.ask(f"{number}", tenant="t")
    desk.set_policy(Policy(classes=CLASSES, shed=False))
    desk.ask(f"{PIECE + 3}", tenant="t")
    while desk.core.next_deadline() == desk.now:
        desk.tick()
    assert desk.serve_one_by_one(first) == [f"{number}" for number in range(1, PIECE + 4)]


def reordered(desk: Desk) -> Desk:
    while desk.core.next_deadline() == desk.now:
        desk.tick()
    return desk


@pytest.mark.parametrize("meanwhile", ["an endpoint goes", "another order comes and goes"])
def test_tenants_take_turns_though_more_happens_while_another_order_of_very_many_is_made(meanwhile: str) -> None:
    desk = shared(one(models=frozenset({"m", "n"})), fair=meanwhile != "an endpoint goes")
    first = desk.ask("0", model="n")
    desk.put(one("b", models=frozenset({"n"})))
    desk.set_up("b", is_up=False)
    for number in range(PIECE + 2):
        desk.ask(f"many{number}", tenant="many", model="n")
    desk.ask("few0", tenant="few", model="n")
    if meanwhile == "an endpoint goes":
        desk.set_policy(Policy(classes=CLASSES, shed=False))
        desk.remove("b")
    else:
        desk.set_policy(Policy(classes=CLASSES, shed=False, short_first=True))
        desk.tick()
        desk.set_policy(Policy(classes=CLASSES, shed=False))
    reordered(desk)
    for number in range(1, 3):
        desk.ask(f"few{number}", tenant="few", model="n")
    assert desk.serve_one_by_one(first)[:5] == ["many0", "few0", "many1", "few1", "many2"]


def test_one_that_is_withdrawn_and_offered_again_while_another_order_is_made_is_placed_once() -> None:
    desk = shared(one(), short_first=True)
    first = desk.ask("0")
    waiting = [desk.ask(f"{number}", prompt_tokens=900 - number) for number in range(1, PIECE + 5)]
    desk.set_policy(Policy(classes=CLASSES, shed=False, fair=False))
    desk.tick()
    desk.withdraw(waiting[-2])
    desk.offer_again(waiting[-2])
    reordered(desk)
    behind = [f"{PIECE + 2}", f"{PIECE + 4}", f"{PIECE + 3}"]
    assert desk.serve_one_by_one(first)[-3:] == behind


def test_who_comes_while_another_order_is_made_passes_nobody_who_is_yet_to_get_a_place() -> None:
    desk = shared(one(), short_first=True)
    first = desk.ask("0")
    for number in range(PIECE + 2):
        desk.ask(f"{number}", prompt_tokens=100 + number)
    desk.set_policy(Policy(classes=CLASSES, shed=False, fair=False))
    late = desk.ask("late")
    assert list(desk.core.waiting_tickets())[-1] is late
    assert reordered(desk).serve_one_by_one(first)[-1] == "late"


def test_who_is_guaranteed_to_its_tenant_goes_first_also_while_another_order_is_made() -> None:
    rules = TenantRules({"vip": TenantRule(guaranteed=1)})
    desk = shared(one(), short_first=True, tenants=rules)
    desk.fill(PIECE + 2)
    desk.set_policy(Policy(classes=CLASSES, shed=False, tenants=rules))
    vip = desk.ask("vip", tenant="vip")
    assert next(desk.core.waiting_tickets()) is vip
    assert next(reordered(desk).core.waiting_tickets()) is vip


def test_requests_that_came_before_all_endpoints_keep_their_order() -> None:
    desk = Desk()
    tickets = [desk.ask(f"{number}", model="m", tenant=f"t{number % 2}") for number in range(6)]
    desk.put(one("a", models=frozenset({"m"})))
    assert in_use(tickets) == [True] + [False] * 5
    assert sorted(desk.serve_one_by_one(tickets[0])) == ["1", "2", "3", "4", "5"]


def test_an_endpoint_of_two_models_serves_the_higher_class_then_who_came_first() -> None:
    desk = Desk(one("a", models=frozenset({"m", "n"})))
    first = desk.ask("0", model="m")
    desk.ask("m1", model="m")
    desk.ask("n1", model="n")
    desk.ask("m2", model="m")
    desk.ask("n-urgent", "urgent", model="n")
    assert desk.serve_one_by_one(first) == ["n-urgent", "m1", "n1", "m2"]


def test_a_position_counts_who_waits_in_the_class_or_above() -> None:
    desk = Desk(one("a"))
    names = ("std", "std", "batch", "urgent", "std", "batch")
    assert [desk.ask(request_class=name).position for name in names] == [0, 0, 1, 0, 2, 4]


def test_requests_that_came_before_all_endpoints_keep_their_class() -> None:
    desk = Desk()
    names = ("batch", "std", "urgent", "std")
    tickets = [desk.ask(name, name, model="m", budget_s=60.0, tenant=str(n)) for n, name in enumerate(names)]
    desk.put(one("a", models=frozenset({"m"})))
    assert tickets[2].state is State.LEASED
    assert desk.serve_one_by_one(tickets[2]) == ["std", "std", "batch"]


@pytest.mark.parametrize("patience_s", [0.0, 1.0])
def test_those_whose_budgets_end_together_are_refused_in_the_order_they_came(patience_s: float) -> None:
    desk = Desk(one(), patience_s=patience_s)
    desk.ask()
    waiting = desk.fill(5)
    desk.advance(30.0)
    assert [ticket for ticket in desk.decided if desk.outcome(ticket) is Outcome.BUDGET_EXPIRED] == waiting


def test_a_long_line_is_walked_in_pieces_in_order_though_some_leave_between() -> None:
    desk = shared(one("a"))
    desk.ask("held")
    waiting = desk.fill(9)
    (line,) = (pool.shared for pool in desk.core.pools())
    first = line.behind(None, 4)
    assert first == waiting[:4]
    desk.cancel(waiting[3])
    desk.cancel(waiting[5])
    assert line.behind(first[-1].key, 2) == [waiting[4], waiting[6]]
    assert line.behind(waiting[6].key, 10) == waiting[7:]
    assert line.behind(waiting[8].key, 10) == []
    pieces = line.pieces(3)
    assert next(pieces) == [waiting[0], waiting[1], waiting[2]]
    desk.cancel(waiting[2])
    desk.cancel(waiting[6])
    assert list(pieces) == [[waiting[4], *waiting[7:]]]
