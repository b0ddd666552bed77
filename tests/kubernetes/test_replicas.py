"""Three sidecars, each with an Envoy of its own, find each other by Leases of a real API server, with our Role alone.

Their clocks are 10 s apart. Other misfortunes, and bigger ones, are those of `make faults-replicas`, with Valkey.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.kit.misfortunes import assert_each_is_answered_once, kill_the_leader, restart_each_in_turn
from tests.e2e.kit.pool import Pool
from tests.e2e.kit.processes import wait_until

from .test_rights import grant, keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .cluster import Cluster

LIMIT, HELD = 4, 24
CONFIG = {
    "max_running_requests": LIMIT,
    "classes": [{"name": "default", "budget": "110s"}],
    "scrape_interval": "200ms",
}
CLOCKS_S = (-10.0, 0.0, 10.0)
MISSED_S = 7.0
"""Longer than a Lease that does not change counts as alive."""


@pytest.fixture(scope="module")
def one_group(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Sidecars that may do what our Role says."""
    namespace, folder = cluster.namespace(), tmp_path_factory.mktemp("pool")
    account, _ = grant(cluster, namespace, "replicas")
    found = {"kubernetes_lease": keys(cluster, namespace, account, folder)}
    with Pool(folder, config={**CONFIG, "hand_over": True}, replicas=found, clocks_s=CLOCKS_S) as pool:
        yield pool


def take_the_api_away(cluster: Cluster) -> Callable[[Pool], None]:
    def fault(pool: Pool) -> None:
        before = pool.leader.replicas["id"]
        cluster.kill()
        try:
            wait_until(lambda: pool.leader.replicas["store_age_s"] > MISSED_S, 20, "the leader misses the API")
            assert pool.leader.replicas["id"] == before
            assert {place.replicas["group"] for place in pool.places} == {3}
        finally:
            cluster.start()
        wait_until(lambda: pool.leader.replicas["store_age_s"] < 2.5, 20, "the leader has asked the API again")

    return fault


@pytest.mark.parametrize("what", ["the leader is killed", "each is restarted", "the API is gone for a while"])
def test_whatever_happens_each_request_is_answered_once_and_no_engine_is_filled_above_its_limit(
    cluster, one_group, what
):
    faults = {
        "the leader is killed": kill_the_leader,
        "each is restarted": restart_each_in_turn,
        "the API is gone for a while": take_the_api_away(cluster),
    }
    assert_each_is_answered_once(one_group, faults[what], LIMIT, HELD)
