"""Fair shares between the tenants of a class, by the tokens of prompts and answers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from extproc.admission import fairness
from extproc.admission.controller import Controller
from extproc.admission.fairness import AT_ONCE, MAX_TENANTS, FairShare, Memory
from extproc.admission.laws import LAWS
from extproc.admission.settling import PIECE
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request

from .desk import CLASSES, GUESS, Desk, one, shared

GUARD = LAWS.guard.passes


def test_a_tenant_with_six_times_the_requests_does_not_delay_the_others() -> None:
    desk = Desk(one())
    first = desk.ask("0", tenant="noisy")
    for _ in range(60):
        desk.ask("noisy", tenant="noisy", prompt_tokens=100)
    for _ in range(10):
        desk.ask("quiet", tenant="quiet", prompt_tokens=100)
    order = desk.serve_one_by_one(first)
    assert order[:20].count("quiet") in (9, 10)


def test_without_fairness_arrival_alone_decides() -> None:
    desk = Desk(one(), fair=False)
    first = desk.ask("0", tenant="noisy")
    for _ in range(5):
        desk.ask("noisy", tenant="noisy")
    desk.ask("quiet", tenant="quiet")
    assert desk.serve_one_by_one(first)[-1] == "quiet"


def test_a_tenants_own_requests_stay_in_order_after_cancels_and_refunds() -> None:
    desk = Desk(one())
    first = desk.ask("0", tenant="t")
    early = [desk.ask(f"early{number}", tenant="t", prompt_tokens=1000) for number in range(4)]
    for ticket in early[:3]:
        desk.cancel(ticket)
    desk.ask("late", tenant="t")
    assert desk.serve_one_by_one(first) == ["early3", "late"]


def test_a_tenants_own_requests_stay_in_order_after_a_cheap_answer() -> None:
    desk = Desk(one())
    holder = desk.ask("0", tenant="t", prompt_tokens=10)
    early = desk.ask("early", tenant="t")
    last = desk.ask("last", tenant="t")
    desk.release(holder, Answer.OK)  # at once: 200 were charged twice, and it wrote none
    desk.ask("late", tenant="t")
    assert early.state is State.LEASED
    assert desk.serve_one_by_one(early) == ["last", "late"]
    assert last.key[1] > 0


def test_of_too_many_tenants_the_one_that_asked_longest_ago_is_forgotten_first() -> None:
    memory = Memory()
    memory.each = 10
    share = FairShare(memory)
    for tenant in ("a", "b", *"cdefgh", "a", *"ijk"):
        share.charge(tenant, 100.0)
    assert list(share._tenants) == [*"cdefgh", "a", *"ijk"]


def test_tenants_go_on_taking_turns_when_an_endpoint_comes_that_serves_a_model_of_theirs() -> None:
    desk = Desk()
    for number in range(6):
        desk.ask(f"many{number}", tenant="many", model="m")
    for number in range(2):
        desk.ask(f"few{number}", tenant="few", model="m")
    desk.put(one("a", models=frozenset({"m"})))
    (holder,) = desk.leased
    for _ in range(4):
        desk.ask("few later", tenant="few", model="m")
    assert desk.serve_one_by_one(holder)[:4] == ["few0", "many1", "few1", "many2"]


def test_a_tenants_own_requests_stay_in_order_when_fairness_is_switched_on_meanwhile() -> None:
    """Found by storm seed 2: untagged requests that left were counted as tagged ones."""
    desk = Desk(one(), fair=False)
    first = desk.ask("0", tenant="t")
    untagged = [desk.ask(f"untagged{number}", tenant="t") for number in range(4)]
    desk.set_policy(Policy(classes=CLASSES, shed=False))
    tagged = [desk.ask(f"tagged{number}", tenant="t", prompt_tokens=5000) for number in range(3)]
    desk.cancel(tagged[0])
    for ticket in untagged:
        desk.cancel(ticket)
    desk.ask("late", tenant="t")
    assert desk.serve_one_by_one(first) == ["tagged1", "tagged2", "late"]


def test_an_untagged_request_gives_its_tenant_no_refund() -> None:
    desk = shared(one(), fair=False)
    desk.ask()
    desk.ask("tagged", tenant="t")
    untagged = desk.fill(PIECE, tenant="t")[-1]
    desk.set_policy(Policy(classes=CLASSES, shed=False))
    desk.tick()
    share = desk.core._books.pools.any_model.share(0)
    charged = share._tenants["t"].finish
    assert charged > 0
    desk.cancel(untagged)
    assert share._tenants["t"].finish == charged


def test_idling_earns_no_credit() -> None:
    desk = Desk(one())
    holder = desk.ask("0", tenant="busy")
    for _ in range(20):
        follower = desk.ask("1", tenant="busy")
        desk.release(holder)
        holder = follower
    desk.ask("busy", tenant="busy")
    for number in range(3):
        desk.ask(f"idle{number}", tenant="idle")
    order = desk.serve_one_by_one(holder)
    assert order.index("busy") <= 2, "who idled goes at most as far ahead as one who just came"


@pytest.mark.parametrize("end", [Answer.OK, Answer.UNKNOWN])
def test_the_same_shares_apply_when_answers_turn_out_longer(end: Answer) -> None:
    desk = Desk(one())
    answers_of(desk, 2.0)
    holder = desk.ask("0", tenant="long")
    desk.advance(25.0)
    desk.release(holder, end)
    holder = desk.ask("1", tenant="other")
    desk.ask("long", tenant="long")
    desk.ask("other", tenant="other")
    assert desk.serve_one_by_one(holder) == ["other", "long"]


def test_tenants_are_forgotten_before_they_fill_the_memory() -> None:
    share = FairShare()
    for number in range(MAX_TENANTS + 10):
        share.charge(f"t{number}", 1.0).served(0.0)
    assert len(share) == MAX_TENANTS


def test_of_very_many_tenants_that_are_to_be_forgotten_some_are_with_each_tick() -> None:
    """10,000 in three classes were freed in the one event of another order: 8 ms."""
    core = Controller(Policy(shed=False))
    memory = core._books.pools.every.tenants
    shares = [memory.share() for _ in range(3)]

    def remembered() -> int:
        return sum(map(len, (*shares, *memory._dropped)))

    def forgotten() -> list[int]:
        """Tick until nobody is forgotten any more; return how many were each time."""
        counts, before = [], remembered()
        while not counts or counts[-1]:
            core.tick(1.0)
            counts.append(before - (before := remembered()))
        return counts[:-1]

    for share in shares:
        for number in range(3 * AT_ONCE):
            share.charge(f"t{number}", 1.0)
    assert forgotten() == []
    shares[0].begin_anew()
    assert not shares[0]
    assert forgotten() == [AT_ONCE] * 3
    memory.keep([shares[0], shares[2]])
    assert forgotten() == [AT_ONCE] * 3, "those of a pool that is gone, too"
    while memory.each > 2 * AT_ONCE:
        memory.share()
    assert forgotten() == [AT_ONCE, 2 * AT_ONCE - memory.each], "and who are too many, as shares come"


def test_a_tenant_that_was_forgotten_while_it_waited_does_no_harm() -> None:
    share = FairShare()
    before = share.charge("t", 1.0)
    for number in range(MAX_TENANTS):
        share.charge(f"t{number}", 1.0)
    again = share.charge("t", 1.0)
    before.left(1.0)
    before.served(0.0)
    before.finish += 100.0
    assert share._tenants["t"] is again
    assert (again.waiting, again.finish, before.waiting) == (1, 1.0, 0)


def test_a_request_that_left_costs_its_tenant_nothing() -> None:
    desk = Desk(one())
    first = desk.ask("0", tenant="holder")
    gone = [desk.ask("gone", tenant="t", prompt_tokens=5000) for _ in range(2)]
    for ticket in gone:
        desk.cancel(ticket)
    for number in range(3):
        desk.ask(f"o{number}", tenant="o")
    desk.ask("t", tenant="t")
    assert desk.serve_one_by_one(first) == ["o0", "t", "o1", "o2"]


def test_a_refund_takes_no_more_than_what_was_charged() -> None:
    desk = Desk(one())
    first = desk.ask("0", tenant="holder")
    desk.ask("t0", tenant="t", prompt_tokens=1000)
    desk.cancel(desk.ask("gone", tenant="t", prompt_tokens=100))
    desk.ask("t1", tenant="t")
    for number in range(5):
        desk.ask(f"o{number}", tenant="o")
    assert desk.serve_one_by_one(first) == ["t0", "o0", "o1", "o2", "o3", "t1", "o4"]


@pytest.mark.parametrize(
    ("longer_s", "order"), [(0.1, ["o0", "t2", "o1", "o2", "late"]), (-0.1, ["o0", "t2", "o1", "late", "o2"])]
)
def test_a_longer_answer_costs_what_it_is_longer_on_top_of_what_was_charged(longer_s: float, order: list[str]) -> None:
    desk = Desk(one())
    answers_of(desk, 10.0)
    desk.core._books.pools.any_model.shares.clear()
    first = desk.ask("t0", tenant="t", max_output_tokens=GUESS)
    second, _ = (desk.ask(name, tenant="t", max_output_tokens=GUESS) for name in ("t1", "t2"))
    desk.advance(10.0 + longer_s)
    desk.release(first, Answer.OK)
    desk.ask("late", tenant="t")
    for number in range(4):
        desk.ask(f"o{number}", tenant="o", max_output_tokens=GUESS)
    assert desk.serve_one_by_one(second)[:5] == order


def test_a_tenant_with_nothing_waiting_is_not_held_to_the_place_of_a_request_that_left() -> None:
    desk = Desk(one())
    first = desk.ask("t0", tenant="t")
    second = desk.ask("t1", tenant="t", prompt_tokens=5000)
    desk.cancel(desk.ask("gone", tenant="t"))
    desk.release(first, Answer.OK)  # both at once: nothing was written
    desk.release(second, Answer.OK)
    holder = desk.ask("holder", tenant="holder")
    desk.ask("o0", tenant="o", prompt_tokens=4900)
    desk.ask("o1", tenant="o")
    desk.ask("late", tenant="t")
    assert desk.serve_one_by_one(holder) == ["o0", "late", "o1"]


def test_a_tenant_with_something_waiting_is_held_to_its_order() -> None:
    share = FairShare()
    flow = share.charge("t", 100.0)
    first, last = flow.tag, share.charge("t", 100.0).tag
    flow.served(first)
    flow.finish -= 150.0
    assert share.charge("t", 100.0).tag >= last


def test_the_tenant_that_asked_longest_ago_is_forgotten_first() -> None:
    share = FairShare()
    for number in range(MAX_TENANTS):
        share.charge(f"t{number}", 100.0)
    share.charge("t0", 100.0)
    share.charge("newcomer", 100.0)
    assert [share.charge(name, 1.0).tag for name in ("t0", "newcomer", "t1")] == [200.0, 100.0, 0.0]


def test_a_token_of_output_costs_twice_one_of_input() -> None:
    desk = Desk(one())
    first = desk.ask("0", tenant="holder")
    for number in range(4):
        desk.ask(f"in{number}", tenant="in", prompt_tokens=100, max_output_tokens=0)
    for number in range(3):
        desk.ask(f"out{number}", tenant="out", max_output_tokens=75)
    assert desk.serve_one_by_one(first) == ["in0", "out0", "in1", "out1", "in2", "in3", "out2"]


def answers_of(desk: Desk, seconds: float, count: int = 20) -> None:
    """Let `count` answers be written that take `seconds` each: so long is what the mean of GUESS tokens takes."""
    for _ in range(count):
        ticket = desk.ask("before", tenant="before")
        desk.advance(seconds)
        desk.release(ticket, Answer.OK)


@pytest.mark.parametrize("end", [Answer.FAILED, Answer.ERROR, Answer.SATURATED])
def test_an_answer_that_never_was_is_not_charged_by_its_time(end: Answer) -> None:
    desk = Desk(one("a", 2))
    answers_of(desk, 2.0)
    ticket = desk.ask("0", tenant="unlucky")
    charged = desk.core._books.pools.any_model.share(0)._tenants["unlucky"].finish
    desk.advance(25.0)
    desk.release(ticket, end)
    assert desk.core._books.pools.any_model.share(0)._tenants["unlucky"].finish == charged


def test_naming_another_model_of_the_same_endpoints_gains_a_tenant_nothing() -> None:
    """A tenant that spreads its requests over two names was served 200 times before anybody else."""
    desk = Desk(one("a", models=frozenset({"m", "n"})))
    first = desk.ask(tenant="x", model="m")
    for number in range(100):
        desk.ask("noisy", tenant="noisy", model=("m", "n")[number % 2], prompt_tokens=100)
    for _ in range(10):
        desk.ask("victim", tenant="victim", model="n", prompt_tokens=100)
    served = desk.serve_one_by_one(first)
    assert served[:25].count("victim") == 10


def test_models_come_and_go_and_a_request_costs_the_same() -> None:
    desk = Desk(one("a", 9, models=frozenset(f"model-{number}" for number in range(500))))
    assert len(desk.endpoint("a").pools) == 1
    for number in range(50):
        desk.put(one("a", 9, models=frozenset({f"new-{number}"})))
    assert len(list(desk.core.pools())) <= 2


def test_all_pools_together_remember_only_so_many_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can name a model can't have a memory of his own for each."""
    monkeypatch.setattr(fairness, "MOST_TENANTS", 200)
    core = Controller(Policy(shed=False))
    for number in range(10):
        core.put_endpoint(EndpointSpec(f"e{number}", models=frozenset({f"m{number}"})), 0.0)
    for tenant in range(100):
        for number in range(10):
            ticket = Ticket(Request("", 0.0, model=f"m{number}", tenant=f"t{tenant}"))
            core.offer(ticket, 0.0)
    shares = [share for pool in core.pools() for share in pool.shares.values()]
    assert [len(share) for share in shares] == [16] * 10, "their part is halved now and then, and not less for each"
    for number in range(9):
        core.remove_endpoints([f"e{number}"], 1.0)
        for lease in list(core.endpoints[f"e{number}"].leases):
            core.release(lease, 1.0)
    assert core._books.pools.every.tenants.each >= 100, "those of pools that are gone are there for the others"


MODELS = ("x", "y", "z")


@given(
    served=st.lists(st.sets(st.sampled_from(MODELS), min_size=1), min_size=1, max_size=4),
    floods=st.sets(st.sampled_from(MODELS), min_size=1),
)
@example(served=[{"x", "y"}, {"y"}], floods={"y"})
@example(served=[{"x"}, {"x"}, {"x"}, {"x", "y"}], floods={"y"})
@settings(max_examples=30)
def test_naming_other_models_starves_nobody_where_their_servers_are_also_those_of_a_victim(
    served: list[set[str]], floods: set[str]
) -> None:
    """The flood came first. Where requests of several sets of servers meet, who asks for `x` has at least a quarter.

    A half, but that the shares of a pool count what went to all its servers, and a guard goes before who came later.
    """
    sets = {model: frozenset(number for number, some in enumerate(served) if model in some) for model in MODELS}
    desk = Desk(*(one(f"e{number}", models=frozenset(models)) for number, models in enumerate(served)))
    with desk.checked_at_its_end():
        for model in sorted(floods):
            for _ in range(100):
                desk.ask(model=model, tenant="noisy", prompt_tokens=100)
        for _ in range(40 * len(served)):  # as many as end here: there is somebody to go at the last server, too
            desk.ask(model="x", tenant="victim", prompt_tokens=100)
    waited: list[str] = []
    for number, models in enumerate(served):
        went: list[str] = []
        while len(went) < 40 and (holder := next(iter(desk.endpoint(f"e{number}").leases), None)) is not None:
            went.append(holder.request.tenant)
            desk.release(holder)
        if "x" in models and len({sets[model] for model in models}) > 1:
            waited += went[1:]  # who came to an idle server had nobody to wait for
    assert waited.count("victim") >= len(waited) // 4


M1, M2 = frozenset({"m1"}), frozenset({"m2"})


def meeting(**spec: Any) -> Desk:
    """Two pools that meet at `e`: `m1` is served there alone, `m2` by `f` as well, which is down."""
    desk = Desk(one("e", **{"limit": 1, "models": M1 | M2, **spec}), one("f", models=M2))
    desk.set_up("f", is_up=False)
    return desk


def serve_one(desk: Desk, seconds: float = 0.0) -> None:
    """Let the only one that runs end well after so long."""
    (holder,) = desk.leased
    desk.advance(seconds)
    desk.release(holder, Answer.OK)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("quiet", [0, 100])
def test_long_answers_while_nobody_waited_there_cost_a_tenant_none_of_its_turns(quiet: int, elsewhere: bool) -> None:
    """They were charged what they were longer than the mean, on top of nothing: it waited for minutes later."""
    desk = meeting()
    if elsewhere:
        desk.put(one("g", models=frozenset({"m3"})))
        desk.set_up("g", is_up=False)
        desk.ask(model="m3", budget_s=1e9)
    for number in range(4):
        desk.ask(tenant="xz"[number % 2], model="m2", budget_s=1e9)
    for _ in range(4):
        serve_one(desk, 5.0)
    for _ in range(quiet):
        for tenant, seconds in (("z", 2.0), ("z", 2.0), ("x", 60.0)):
            desk.ask(tenant=tenant, model="m2", budget_s=1e9)
            serve_one(desk, seconds)
    for _ in range(2):
        desk.ask(tenant="z", model="m2")
    late = desk.ask(tenant="x", model="m1")
    for _ in range(3):
        desk.ask(tenant="z", model="m2")
        serve_one(desk)
    assert desk.where(late) == "e"


def test_what_an_answer_cost_more_is_charged_where_the_request_was_and_not_where_a_gateway_moved_it() -> None:
    desk = meeting()
    for _ in range(5):
        desk.ask(tenant="z", model="m2")
        serve_one(desk, 5.0)
    desk.put(one("g", models=M1 | M2))
    held = [desk.ask("held", tenant="h", model="m2", home=name) for name in "eg"]
    moved = desk.ask(tenant="x", model="m1")
    for _ in range(3):
        desk.ask(tenant="z", model="m1")
    for ticket in held:
        desk.release(ticket)
    charged = moved.endpoint
    assert charged is not None
    other = desk.endpoint("g" if charged.name == "e" else "e")
    desk.move(moved, other.name)
    there, elsewhere = charged.turns[0]._ahead["x"], dict(other.turns[0]._ahead)
    desk.advance(25.0)
    desk.release(moved, Answer.OK)
    assert charged.turns[0]._ahead["x"] > there
    assert other.turns[0]._ahead.get("x") == elsewhere.get("x")


def test_where_pools_meet_the_tenant_that_was_sent_less_there_goes_first_though_it_came_last() -> None:
    desk = meeting()
    held = desk.ask("held", model="m1", tenant="h")
    desk.ask("x1", model="m1", tenant="x", prompt_tokens=500)
    for tenant in "xy":
        desk.ask(f"{tenant}2", model="m2", tenant=tenant)
    desk.ask("z1", model="m1", tenant="z")
    assert desk.serve_one_by_one(held) == ["x1", "y2", "z1", "x2"]


@pytest.mark.parametrize("lead", [1000, 10_000])
def test_a_tenant_whose_turn_is_far_keeps_nobody_behind_it_from_theirs(lead: int) -> None:
    """It was first in its pool, and waited for its turn; the next one there was passed over 1,000 times."""
    desk = meeting()
    holder = desk.ask("hold", model="m2", tenant="h")
    desk.ask("x0", model="m2", tenant="x", prompt_tokens=lead)
    desk.ask("z", model="m2", tenant="z")
    desk.release(holder)
    desk.ask("x", model="m1", tenant="x")
    patient = desk.ask("y", model="m1", tenant="y")
    for _ in range(4):
        desk.ask(model="m2", tenant="z")
        serve_one(desk)
    assert desk.where(patient) == "e"
    assert patient.passed_over == 0


@pytest.mark.parametrize("model", ["m1", "m2"], ids=["of its pool", "of another"])
def test_who_goes_by_turns_passes_those_whose_turn_was_before_and_no_others(model: str) -> None:
    desk = meeting(limit=1000, kv_capacity_tokens=10_000)
    for tenant in "yt":  # in its pool each goes after x: while nobody waits, that is no turn at e
        desk.release(desk.ask(model="m1", tenant=tenant, prompt_tokens=5000))
    desk.ask("held", model="m2", tenant="h", prompt_tokens=4000)
    desk.ask("too big", model="m2", tenant="q", prompt_tokens=6000)
    desk.release(desk.ask("x0", model="m1", tenant="x", prompt_tokens=1000))
    held = desk.ask("held", model="m1", tenant="h", prompt_tokens=4000)
    far = desk.ask("x1", model="m1", tenant="x", prompt_tokens=4000)
    big = desk.ask("y", model="m1", tenant="y", prompt_tokens=6000)
    small = desk.ask("t", model=model, tenant="t", prompt_tokens=1000)
    desk.release(held)
    assert (desk.where(far), desk.where(big), desk.where(small)) == (None, None, "e")
    assert (far.passed_over, big.passed_over) == (0, 1)


def test_a_guard_that_does_not_fit_lends_its_place_to_those_before_it_by_their_turns() -> None:
    desk = meeting(limit=1000, kv_capacity_tokens=20_000)
    held, _ = (desk.ask("held", model="m2", tenant="h", prompt_tokens=tokens) for tokens in (14_000, 2000))
    both_wait = desk.ask("blocker", model="m1", tenant="w", prompt_tokens=18_000)
    for tenant, tokens in (("far", 1500), ("near", 1000)):
        desk.release(desk.ask(model="m2", tenant=tenant, prompt_tokens=tokens))
    far, near = (desk.ask(tenant, model="m2", tenant=tenant, prompt_tokens=3000) for tenant in ("far", "near"))
    guard = desk.ask("elephant", model="m1", tenant="e", prompt_tokens=17_000)
    desk.cancel(both_wait)
    for number in range(GUARD):
        desk.release(desk.ask(model="m2", tenant=f"mouse{number}", prompt_tokens=10))
    assert (guard.is_guard, far.passed_over, near.passed_over) == (True, 0, 0)
    mouse = desk.ask("mouse", model="m2", tenant="mouse", prompt_tokens=10)
    del desk.order[:]
    desk.release(held)
    assert desk.order == ["near", "far"]
    assert desk.where(mouse) is None


def test_a_guard_that_fits_goes_before_other_pools_later_ones_whatever_the_turns_are() -> None:
    desk = meeting(limit=1000, kv_capacity_tokens=10_000)
    held = desk.ask("held", model="m2", tenant="h", prompt_tokens=4000)
    guard = desk.ask("elephant", model="m1", tenant="e", prompt_tokens=6000)
    for number in range(GUARD):
        last = number == GUARD - 1
        desk.release(desk.ask(model="m2", tenant="e" if last else "mice", prompt_tokens=1000, max_output_tokens=1))
    assert guard.is_guard
    fresh = desk.ask("fresh", model="m2", tenant="fresh", prompt_tokens=10)
    assert endpoint_turn(desk, "fresh") < endpoint_turn(desk, "e")
    assert desk.where(fresh) is None
    del desk.order[:]
    desk.release(held)
    assert desk.order[0] == guard.request.id


def endpoint_turn(desk: Desk, tenant: str) -> float:
    return desk.endpoint("e").turns[0].of(tenant)


def test_all_turns_together_remember_only_so_many_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "MOST_TENANTS", 400)
    desk = Desk(*(one(f"e{number}", models=frozenset({"m", f"m{number}"})) for number in range(8)))
    for number in range(8):
        for tenant in range(500):
            desk.endpoint(f"e{number}").turns_at(0).served(f"t{tenant}", 100.0 + tenant)
    for _ in range(8):
        desk.core.tick(desk.now)
    assert 0 < sum(len(desk.endpoint(f"e{number}").turns_at(0)) for number in range(8)) <= 400
    memory = desk.core._books.pools.every.tenants
    assert memory.each_turns == 50
    for number in range(1, 8):
        desk.remove(f"e{number}")
    assert memory.each_turns == 400, "those of endpoints that are gone are there for the others"


def test_where_too_many_tenants_are_ahead_the_one_that_is_most_is_not_forgiven() -> None:
    turns = Memory().turns()
    turns.served("noisy", 1_000_000.0)
    for number in range(5000):
        turns.served(f"made up {number}", 10.0)
    assert turns.of("noisy") >= 1_000_000.0 > turns.of("somebody")
