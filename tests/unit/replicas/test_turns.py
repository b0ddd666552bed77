"""No turn of the loop is long when the leader changes, however many wait.

Counted in calls of functions, as tests/unit/test_turns.py does: 8,000 are a millisecond.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

import pytest

from extproc.admission.events import Offered
from extproc.admission.ticket import Ticket
from extproc.admission.values import EndpointSpec, Policy, Request, RequestClass
from extproc.pure import is_compiled
from extproc.replicas import leading
from extproc.replicas.picture import Role
from extproc.replicas.replica import STOPPED_S
from extproc.stream.by_age import PLACED_IN_A_TURN, ByAge
from extproc.stream.gate import BURST

from .storm import POLICIES
from .test_group import followers, leader, site
from .test_handed_over import killed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.admission.events import Event
    from extproc.admission.values import Decision

    from .sidecar import Client, Sidecar
    from .site import Site

WAITING = 600
"""At each of three sidecars."""
MOST_CALLS = 10_000


def crowd(here: Site, each: int = WAITING) -> list[Client]:
    """Have many wait at each sidecar, behind who runs."""
    for place in here.sidecars:
        here.send(place, work_s=3.0)
    here.run(0.1)
    return [here.send(place, work_s=0.001, budget_s=600.0) for _ in range(each) for place in here.sidecars]


def longest_turn(here: Site, seconds: float) -> int:
    """Return how many calls the longest of all turns made."""
    longest, end = 0, here.clock.now + seconds
    before = sys.getprofile()
    while (at := here.clock.next()) is not None and at <= end:
        calls = 0

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        gc.disable()  # hypothesis notes collections
        sys.setprofile(count)
        here.clock.step()
        sys.setprofile(before)
        gc.enable()
        longest = max(longest, calls)
    return longest


def test_no_turn_is_long_when_the_leader_is_gone_and_what_all_hold_comes_to_the_next():
    here = site(engines=3, limit=1)
    crowd(here)
    here.run(0.2)
    killed(here, leader(here))
    assert longest_turn(here, 2.0) < MOST_CALLS
    (now,) = here.leaders()
    assert now.replica.leading is not None
    assert now.replica.leading.gathering is None
    assert now.controller.waiting + here.load() >= 2 * WAITING


@pytest.mark.parametrize("how", ["resigns", "was stopped", "loses a follower", "loses one who says goodbye"])
def test_no_turn_is_long_when_a_leader_leads_no_more_or_a_follower_goes(how):
    here = site(engines=3, limit=1)
    crowd(here)
    here.run(0.2)
    old, gone = leader(here), followers(here)[0]
    act: Callable[[], object] = {
        "resigns": old.replica.resign,
        "was stopped": lambda: old.replica._was_stopped(here.clock.now, STOPPED_S),
        "loses a follower": lambda: here.kill(gone.place),
        "loses one who says goodbye": lambda: (gone.gate.leave(), here.kill(gone.place)),
    }[how]
    here.clock.at(here.clock.now, act)
    assert longest_turn(here, 2.0) < MOST_CALLS
    for one in here.alive:
        assert one.gate.waiting >= WAITING - 10
    here.run(1.0, here.check)


def turns_of(here: Site, seconds: float, count: Callable[[], int]) -> list[int]:
    """Return by how much `count` grew in each turn of a loop."""
    grew, end, before = [], here.clock.now + seconds, count()
    while (at := here.clock.next()) is not None and at <= end:
        here.step()
        grew.append(count() - before)
        before = count()
    return grew


def test_a_follower_that_is_drained_refuses_some_in_each_turn_also_those_whom_no_leader_was_told_of():
    here = site(engines=3, limit=1)
    waiting = crowd(here, 3 * BURST)
    one = followers(here)[0]
    own = [client for client in waiting if client.place == one.place]
    killed(here, leader(here))
    here.run_until(lambda: one.replica.role is Role.SEEKING)
    here.clock.at(here.clock.now, one.gate.drain)
    refused = turns_of(here, 3.0, lambda: sum(client.outcomes == ["draining"] for client in own))
    assert (sum(refused), max(refused)) == (3 * BURST, BURST)


def test_a_follower_that_is_drained_refuses_some_in_each_turn_of_those_whom_the_leader_knows():
    here = site(engines=3, limit=1)
    waiting = crowd(here, 3 * BURST)
    here.run(0.5)
    one = followers(here)[0]
    own = [client for client in waiting if client.place == one.place]
    here.clock.at(here.clock.now, one.gate.drain)
    refused = turns_of(here, 1.0, lambda: sum(client.outcomes == ["draining"] for client in own))
    assert (sum(refused), max(refused)) == (3 * BURST, BURST)
    assert leader(here).controller.waiting == 2 * 3 * BURST


def test_who_comes_in_one_moment_is_put_in_order_some_in_a_turn_and_before_anybody_is_let_go():
    """Of 50,000 all were, in one turn of 14 to 18 ms."""
    kept, count = ByAge(), 2 * PLACED_IN_A_TURN + 10
    tickets = [Ticket(Request("", float(number * 7919 % count))) for number in range(count)]
    gone = next(one for one in tickets if one.request.arrived == 5.0)
    kept.add_all(dict.fromkeys(tickets))
    assert [kept.pop(), kept.pop()] == [None, None]
    assert (kept.discard(gone), kept.discard(gone)) == (True, False)
    kept.add(Ticket(Request("late", 0.5)), 0.5)
    assert len(kept) == len(list(kept)) == count
    order = [one.request.arrived for _ in range(count) if (one := kept.pop())]
    assert order == sorted({*map(float, range(count)), 0.5} - {5.0})
    assert (kept.pop(), len(kept), bool(kept)) == (None, 0, False)


def test_no_turn_of_a_group_at_rest_is_long_however_many_endpoints_there_are():
    """Each beat of the leader looked at the whole configuration, and for each endpoint at the whole group."""
    few, many = (longest_turn(site(engines=engines, limit=1), 2.0) for engines in (100, 300))
    assert (many - few) / 200 < 12


def test_while_a_leader_gives_back_who_waits_it_asks_nobody_to_lead_and_sends_nobody_anywhere(monkeypatch):
    """Who waits in two cores may be sent twice. Others come and leave, what runs ends, endpoints and rules change."""
    monkeypatch.setattr(leading, "LET_GO_IN_A_TURN", 7)
    here = site(engines=3, limit=1)
    crowd(here, 100)
    here.turn_s = 0.01
    here.run(2.8)
    old, random = leader(here), here.random
    ran = [client for client in here.open if client.running]
    old.replica.resign()
    turns = 0
    while old.controller.waiting:
        turns += 1
        assert old.replica.role is Role.SEEKING
        assert old.replica._seeking is not None
        assert old.replica._seeking._call is None
        assert not any(client.dispatches for client in old.tickets if client not in ran)
        here.send(old.place, work_s=0.001, budget_s=600.0)
        here.hang_up(random.choice([client for client in old.tickets if not client.dispatches]))
        old.gate.set_up(random.choice(list(here.engines)), is_up=random.random() < 0.5)
        old.gate.put_endpoint(EndpointSpec(f"new{turns}", max_running_requests=9))
        old.gate.set_up(f"new{turns}", is_up=True)
        old.gate.set_policy(random.choice(POLICIES))
        here.step()
    assert turns > 300 / 7
    assert not any(client.running for client in ran)
    for number in range(1, turns + 1):
        old.gate.remove_endpoints([f"new{number}"])
    for name in here.engines:
        old.gate.set_up(name, is_up=True)
    here.run(30.0, here.check)
    assert not here.open
    assert all(engine.peak == 1 for engine in here.engines.values())


def test_a_leader_that_was_stopped_amid_giving_out_parts_opens_nothing_to_those_who_wait_still(monkeypatch):
    here = site(engines=3, limit=1)
    crowd(here)
    here.run(0.1)
    old = leader(here)
    quotas = old.replica.leading.quotas

    def of_one(*_: object) -> int:
        here.clock.now += STOPPED_S + 0.1
        return 99

    monkeypatch.setattr(quotas, "_quota", of_one)
    quotas.follow()
    assert old.replica.role is Role.SEEKING
    assert old.controller.waiting
    assert [endpoint.quota for endpoint in old.controller.endpoints.values()] == [0, 0, 0]


@pytest.mark.skipif(is_compiled(), reason="a method of a compiled object can't be looked into")
@pytest.mark.skipif(is_compiled(), reason="a method of a compiled object can't be looked into")
def test_room_that_was_given_to_a_follower_while_it_is_forgotten_is_free_at_once(monkeypatch):
    """Its requests are forgotten some in each turn, and the urgent ones among the last may have their turn before."""
    monkeypatch.setattr(leading, "LET_GO_IN_A_TURN", 2)
    here = site(engines=1, limit=4, policy=Policy(classes=(RequestClass("std"), RequestClass("urgent", 10))))
    here.blind.update(here.sidecars)  # no page says that the room is free
    lead, gone = leader(here), followers(here)[0]
    for _ in range(4):
        here.send(lead.place, work_s=0.3, budget_s=600.0)
    here.run(0.1)
    for number in range(200):
        here.send(gone.place, budget_s=600.0, request_class="urgent" if number > 100 else "std")
    here.run(0.1)
    here.turn_s = 0.01
    here.kill(gone.place)
    own = [here.send(lead.place, work_s=0.1, budget_s=600.0) for _ in range(8)]
    given = [0]
    end_untold = lead.replica.leading._end_untold
    monkeypatch.setattr(lead.replica.leading, "_end_untold", lambda ticket: (given.append(1), end_untold(ticket)))
    here.run(3.0, here.check)
    assert sum(given)
    assert all(client.dispatches == 1 for client in own)
    assert lead.controller.endpoints["e0"].held == 0


def twenty_at_each() -> Site:
    """Return a group at three engines of one slot, each sidecar with twenty clients."""
    here = site(engines=3, limit=1)
    for place in here.sidecars:
        for _ in range(20):
            here.send(place, work_s=0.1, budget_s=60.0)
    return here


def amid_letting_go(here: Site, then: Callable[[Sidecar], None]) -> None:
    """Have the next leader do something once, amid those whom it lets go."""
    killed(here, leader(here))
    for one in here.alive:
        offered: list[Event] = []

        def watch(event: Event, _: Sequence[Decision], one=one, offered=offered) -> None:
            if isinstance(event, Offered):
                offered.append(event)
                if len(offered) == 5:
                    then(one)

        one.controller.watch(watch)


def test_who_is_stopped_amid_letting_go_leaves_the_rest_to_whoever_decides_then():
    here = twenty_at_each()

    def stops(_: Sidecar) -> None:
        here.clock.now += STOPPED_S + 0.1

    amid_letting_go(here, stops)
    here.run(30.0, here.check)
    assert here.outcomes["done"] >= 2 * 20
    assert all(engine.peak <= 2 for engine in here.engines.values())


def test_a_fault_at_one_that_a_new_leader_lets_go_keeps_no_other_back():
    here = twenty_at_each()

    def fails(_: Sidecar) -> None:
        raise RuntimeError("a bug")

    amid_letting_go(here, fails)
    with pytest.raises(RuntimeError, match="a bug"):
        here.run(30.0)
    here.run(30.0)
    assert here.outcomes["done"] >= 2 * 20 - 1


def test_clients_that_leave_at_any_moment_of_a_hand_over_are_forgotten_and_leave_no_slot_taken():
    here = site(engines=3, limit=1)
    waiting = crowd(here)
    killed(here, leader(here))
    here.run_until(lambda: bool(here.leaders()))
    leaving = [client for client in waiting if not here.sidecars[client.place].is_dead]

    def some_leave() -> None:
        for client in (*leaving[:2], *leaving[-2:]):  # one whom the leader was told of, and one whom it was not
            if client in here.open and not client.running:
                here.hang_up(client)
        del leaving[:2], leaving[-2:]

    here.run(2.0, some_leave)
    assert here.outcomes["gone"] > WAITING
    here.run(10.0)
    here.check()
    assert all(one.controller.waiting == 0 for one in here.alive)


def test_what_one_brings_who_comes_late_is_offered_though_another_is_missing():
    here = site(engines=1, limit=1)
    late, missing = followers(here)
    here.store.is_up = False  # it would forget who is missing
    killed(here, missing)
    here.send(leader(here).place, work_s=3.0)
    here.run(0.1)
    here.net.cut([late.place], [leader(here).place])
    here.run(2.5)
    here.send(late.place, work_s=0.1, budget_s=60.0)
    here.net.heal()
    here.run(10.0)
    here.send(leader(here).place, work_s=0.1, budget_s=60.0)
    here.run(20.0)
    assert here.outcomes == {"done": 3}
