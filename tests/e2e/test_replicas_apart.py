"""Three sidecars on machines of their own, with clocks that are 10 s apart, and cables between them that are cut.

Each has a network namespace; their Envoys, the engines and the store are outside. `EXTPROC_LONG=1` cuts all cables.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from .kit.awake import lost_s
from .kit.machines import Machines
from .kit.misfortunes import REGROUPED
from .kit.pool import Pool, longest_stuck_s
from .kit.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from .kit.pool import Place

LONG = bool(os.environ.get("EXTPROC_LONG"))
LIMIT = 24 if LONG else 6
HELD = 201 if LONG else 24
LATE = 2 * LIMIT
"""For each sidecar, while a cable is cut: who took all room for its own would fill both engines with them."""
CONFIG = {
    "max_running_requests": LIMIT,
    "classes": [{"name": "default", "budget": "110s"}],
    "scrape_interval": "200ms",
}
CLOCKS_S = (-10.0, 0.0, 10.0)
STUCK_S = 10.0
LEAVES_S = 4.0
"""How long a cut lasts after everybody has noticed."""


def running(place: Place) -> int:
    """How many requests the group of this leader has at engines."""
    return sum(endpoint["in_flight"] for endpoint in place.sidecar.queues()["endpoints"])


def a_follower_from_the_leader(pool: Pool, machines: Machines) -> None:
    """They still reach the third one, the store and the engines."""
    leader, follower, _ = (pool.places.index(place) for place in pool.in_order())
    machines.cut(leader, machines.addresses[follower])
    machines.cut(follower, machines.addresses[leader])
    alone = pool.places[follower]
    wait_until(
        lambda: [alone.replicas[key] for key in ("role", "cut_off", "members")] == ["leading", True, 3],
        message="it leads itself, and knows of all",
    )


def the_leader_from_the_store(pool: Pool, machines: Machines) -> None:
    turns = [place.sidecar.metrics()['extproc_replica_turns_total{role="seeking"}'] for place in pool.places]
    leader = pool.places.index(pool.leader)
    machines.cut(leader, machines.store)
    place = pool.places[leader]
    wait_until(lambda: place.replicas["store_age_s"] > 6, message="the leader has missed the store")
    assert (place.replicas["role"], place.replicas["group"], place.replicas["members"]) == ("leading", 3, 3)
    after = [place.sidecar.metrics()['extproc_replica_turns_total{role="seeking"}'] for place in pool.places]
    assert after == turns, "the store changes nothing while there is a leader"


def a_follower_from_everything(pool: Pool, machines: Machines) -> None:
    """From the others, the store and the engines' pages; its Envoy still reaches it and the engines."""
    follower = pool.places.index(pool.in_order()[1])
    others = [address for number, address in enumerate(machines.addresses) if number != follower]
    machines.cut(follower, machines.store, machines.engines, *others)
    alone = pool.places[follower]
    wait_until(lambda: alone.replicas["role"] == "leading", message="it leads itself")
    wait_until(lambda: pool.most_members() == 2, message="the others count it out")


def the_leader_from_everything(pool: Pool, machines: Machines) -> None:
    leader = pool.places.index(pool.leader)
    others = [address for number, address in enumerate(machines.addresses) if number != leader]
    machines.cut(leader, machines.store, machines.engines, *others)
    rest = [place for number, place in enumerate(pool.places) if number != leader]
    wait_until(lambda: [place.replicas["role"] for place in rest].count("leading") == 1, message="another leads")


def both_followers_from_the_rest(pool: Pool, machines: Machines, *more: str) -> None:
    """They reach each other, and the engines; neither the leader nor the store sees them."""
    leader = pool.places.index(pool.leader)
    followers = [number for number in range(3) if number != leader]
    machines.cut(leader, *(machines.addresses[number] for number in followers))
    for number in followers:
        machines.cut(number, machines.store, machines.addresses[leader], *more)
    group = [pool.places[number] for number in followers]
    wait_until(lambda: [place.replicas["group"] for place in group] == [2, 2], message="they are a group")
    assert {place.replicas["members"] for place in group} == {3}
    wait_until(lambda: pool.places[leader].replicas["members"] == 1, message="the other one counts them out")


def both_followers_from_everything(pool: Pool, machines: Machines) -> None:
    """From the engines' pages, too: their Envoys still reach the engines."""
    both_followers_from_the_rest(pool, machines, machines.engines)


CUTS = [a_follower_from_the_leader]
LONG_CUTS = [
    the_leader_from_the_store,
    a_follower_from_everything,
    the_leader_from_everything,
    both_followers_from_the_rest,
    both_followers_from_everything,
]


@pytest.mark.parametrize("cut", CUTS + (LONG_CUTS if LONG else []), ids=lambda cut: cut.__name__)
def test_with_a_cable_cut_and_clocks_apart_each_request_is_answered_once_and_none_is_stuck(
    tmp_path, cut: Callable[[Pool, Machines], None]
):
    lost_before_s = lost_s()
    with Machines(3) as machines, Pool(tmp_path, config=CONFIG, machines=machines, clocks_s=CLOCKS_S) as pool:
        waves = [[pool.send(place, f"running-{n}", 2 * LIMIT // 3, 150) for n, place in enumerate(pool.places)]]
        wait_until(lambda: pool.in_flight() == 2 * LIMIT, message="all slots taken")
        waves.append([pool.send(place, f"held-{n}", HELD // 3, 20) for n, place in enumerate(pool.places)])
        wait_until(lambda: pool.waiting() == HELD, message="all others held")
        cut(pool, machines)
        waves.append([pool.send(place, f"late-{n}", LATE, 120) for n, place in enumerate(pool.places)])
        leaders = [place for place in pool.places if place.replicas["role"] == "leading"]
        wait_until(lambda: all(running(place) for place in leaders), message="each group has room of its own")
        pool.rest(LEAVES_S)
        machines.mend()
        by_place = [[answer for wave in waves for answer in wave[n].result()] for n in range(3)]
        answers = [answer for batch in by_place for answer in batch]
        sent = 3 * (2 * LIMIT // 3) + HELD + 3 * LATE
        assert Counter(answer.status for answer in answers) == {200: sent}
        assert not [answer.error for answer in answers if answer.error]
        # Who sees nothing at all sends two at a time, and before that waits for what it had sent to end.
        slow = 3 if cut is both_followers_from_everything else 1
        most_s = slow * STUCK_S + REGROUPED * (lost_s() - lost_before_s)
        assert max(longest_stuck_s(batch) for batch in by_place) < most_s
        pool.wait_one_group()
        wait_until(lambda: pool.in_flight() == 0 and pool.waiting() == 0, message="all books empty")
        assert pool.served() == sent, "none twice"
        over = 0 if cut is the_leader_from_the_store else 3
        assert max(pool.peaks().values()) <= LIMIT + over, "at most one request per sidecar above the limit"
        for place in pool.places:
            assert "Traceback" not in place.sidecar.child.output()
