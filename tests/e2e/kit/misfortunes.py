"""What may happen to several sidecars, whatever store they have, and what must hold whatever happens."""

from __future__ import annotations

import signal
from collections import Counter
from typing import TYPE_CHECKING

from .awake import lost_s
from .pool import longest_stuck_s
from .processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from .pool import Place, Pool

STUCK_S = 10.0
REGROUPED = 5.0
"""How long a group may need to come together again, in times of a stall of the machine that parted it."""
RUNNING_TOKENS, HELD_TOKENS = 250, 20


def kill(place: Place) -> None:
    """Kill a sidecar and start it again at once, as a kubelet does."""
    child = place.sidecar.child
    child.signal(signal.SIGKILL)
    child.wait_exit()
    child.stop()
    place.sidecar.start()


def kill_the_leader(pool: Pool) -> None:
    kill(pool.leader)


def kill_a_follower(pool: Pool) -> None:
    kill(pool.in_order()[1])


def stop_the_leader_for_a_while(pool: Pool) -> None:
    leader, *others = pool.in_order()
    leader.sidecar.child.signal(signal.SIGSTOP)
    try:
        wait_until(lambda: [one.replicas["role"] for one in others].count("leading") == 1, message="another leads")
    finally:
        leader.sidecar.child.signal(signal.SIGCONT)


def restart_each_in_turn(pool: Pool) -> None:
    for place in pool.places:
        place.sidecar.child.signal(signal.SIGTERM)
        assert place.sidecar.child.wait_exit(20) == 0
        place.sidecar.child.stop()
        place.sidecar.start()


def assert_each_is_answered_once(pool: Pool, fault: Callable[[Pool], None], limit: int, held: int) -> None:
    """Fill two engines of `limit` slots, hold `held` more at all sidecars together, and let `fault` happen."""
    name, before, each = fault.__name__, pool.served(), 2 * limit // 3 + 1
    lost_before_s = lost_s()
    running = [pool.send(place, f"{name}-{n}", each, RUNNING_TOKENS) for n, place in enumerate(pool.places)]
    wait_until(lambda: pool.in_flight() == 2 * limit, message="all slots taken")
    waiting = [pool.send(place, f"{name}-held-{n}", held // 3, HELD_TOKENS) for n, place in enumerate(pool.places)]
    sent = 3 * each + 3 * (held // 3)
    wait_until(lambda: pool.waiting() == sent - 2 * limit, message="all others held")
    fault(pool)
    by_place = [first.result() + then.result() for first, then in zip(running, waiting, strict=True)]
    answers = [answer for batch in by_place for answer in batch]
    assert Counter(answer.status for answer in answers) == {200: sent}
    most_s = STUCK_S + REGROUPED * (lost_s() - lost_before_s)
    assert max(longest_stuck_s(batch) for batch in by_place) < most_s
    assert not [answer.error for answer in answers if answer.error]
    pool.wait_one_group()
    wait_until(lambda: pool.in_flight() == 0 and pool.waiting() == 0, message="all books empty")
    assert pool.served() - before == sent
    peaks = pool.peaks()
    assert max(peaks.values()) == limit, "\n".join([str(peaks), *map(pool.fullest, peaks)])
    for place in pool.places:
        assert "Traceback" not in place.sidecar.child.output()
