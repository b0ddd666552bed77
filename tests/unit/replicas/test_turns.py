"""No turn of the loop is long when the leader changes, however many wait.

Counted in calls of functions, as tests/unit/test_turns.py does: 8,000 are a millisecond.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from extproc.admission.events import Offered
from extproc.replicas.replica import STOPPED_S

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


def crowd(here: Site) -> list[Client]:
    """Have many wait at each sidecar, behind who runs."""
    for place in here.sidecars:
        here.send(place, work_s=3.0)
    here.run(0.1)
    return [here.send(place, work_s=0.001, budget_s=600.0) for _ in range(WAITING) for place in here.sidecars]


def longest_turn(here: Site, seconds: float) -> int:
    """Return how many calls the longest of all turns made."""
    longest, end = 0, here.clock.now + seconds
    before = sys.getprofile()
    while (at := here.clock.next()) is not None and at <= end:
        calls = 0

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        here.clock.step()
        sys.setprofile(before)
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


def test_no_turn_of_a_group_at_rest_is_long_however_many_endpoints_there_are():
    """Each beat of the leader looked at the whole configuration, and for each endpoint at the whole group."""
    few, many = (longest_turn(site(engines=engines, limit=1), 2.0) for engines in (100, 300))
    assert (many - few) / 200 < 12


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
