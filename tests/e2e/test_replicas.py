"""Three sidecars, each with an Envoy of its own, share two engines. Whatever dies, every request is answered once.

`EXTPROC_LONG=1` sends more: 50 running and 200 held.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import tool

from .kit.clients import complete_many
from .kit.misfortunes import (
    assert_each_is_answered_once,
    kill_a_follower,
    kill_the_leader,
    restart_each_in_turn,
    stop_the_leader_for_a_while,
)
from .kit.pool import Pool, body
from .kit.processes import PATIENCE_S, Child, free_pair, http_get, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG = bool(os.environ.get("EXTPROC_LONG"))
LIMIT = 25 if LONG else 4
HELD = 200 if LONG else 24
CONFIG = {
    "max_running_requests": LIMIT,
    "classes": [{"name": "default", "budget": "110s"}, {"name": "urgent", "priority": 10, "budget": "110s"}],
    "scrape_interval": "200ms",
}


def kill_the_store_and_start_it_empty(pool: Pool) -> None:
    pool.store.child.signal(signal.SIGKILL)
    pool.store.child.wait_exit()
    pool.store.child.stop()
    wait_until(lambda: pool.leader.replicas["store_age_s"] > 2.5)
    pool.store.start()
    wait_until(lambda: pool.leader.replicas["store_age_s"] < 1.5)


def stop_the_store_for_a_while(pool: Pool) -> None:
    pool.store.child.signal(signal.SIGSTOP)
    try:
        wait_until(lambda: pool.leader.replicas["store_age_s"] > 4)
    finally:
        pool.store.child.signal(signal.SIGCONT)


def make_the_store_read_only_for_a_while(pool: Pool) -> None:
    """As after a failover to a replica that nobody promotes."""
    pool.store.command("REPLICAOF", "127.0.0.1", "1")
    try:
        wait_until(lambda: pool.leader.replicas["store_age_s"] > 4)
    finally:
        pool.store.command("REPLICAOF", "NO", "ONE")
    wait_until(lambda: pool.leader.replicas["store_age_s"] < 1.5)


def let_the_store_run_out_of_memory_for_a_while(pool: Pool) -> None:
    pool.store.command("CONFIG", "SET", "maxmemory", "1")
    try:
        wait_until(lambda: pool.leader.replicas["store_age_s"] > 4)
    finally:
        pool.store.command("CONFIG", "SET", "maxmemory", "0")
    wait_until(lambda: pool.leader.replicas["store_age_s"] < 1.5)


FAULTS = [kill_the_leader, stop_the_leader_for_a_while, kill_the_store_and_start_it_empty, restart_each_in_turn]
LONG_FAULTS = [
    kill_a_follower,
    stop_the_store_for_a_while,
    make_the_store_read_only_for_a_while,
    let_the_store_run_out_of_memory_for_a_while,
]


@pytest.fixture(scope="module")
def one_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """What all faults happen to, one after the other: it comes together again after each."""
    with Pool(tmp_path_factory.mktemp("pool"), config={**CONFIG, "hand_over": True}) as pool:
        yield pool


@pytest.mark.parametrize("fault", FAULTS + (LONG_FAULTS if LONG else []), ids=lambda fault: fault.__name__)
def test_whatever_happens_each_request_is_answered_once_and_no_engine_is_filled_above_its_limit(
    one_group: Pool, fault: Callable[[Pool], None]
):
    assert_each_is_answered_once(one_group, fault, LIMIT, HELD)


def test_sidecars_that_do_not_reach_each_other_use_their_parts_and_come_together_again(tmp_path):
    """All cables between them are cut for a while, and the store is there: each knows how many they are."""
    with Pool(tmp_path, config={**CONFIG, "max_running_requests": 6}, cables=True) as pool:
        first = [pool.send(place, f"first-{n}", 12, 150) for n, place in enumerate(pool.places)]
        wait_until(lambda: pool.in_flight() == 12, message="all slots taken")
        for cable in pool.cables:
            cable.cut()
        alone = {("leading", 1, True)}
        wait_until(
            lambda: (
                {tuple(place.replicas[key] for key in ("role", "group", "cut_off")) for place in pool.places} == alone
            ),
            message="each leads itself, and knows that it is cut off",
        )
        second = [pool.send(place, f"second-{n}", 6, 20) for n, place in enumerate(pool.places)]

        def parts() -> list[int]:
            return [
                max(endpoint["in_flight"] for endpoint in place.sidecar.queues()["endpoints"]) for place in pool.places
            ]

        wait_until(lambda: max(parts()) <= 2, 60, "each uses its third")
        for cable in pool.cables:
            cable.mend()
        answers = [answer for batch in (*first, *second) for answer in batch.result()]
        assert Counter(answer.status for answer in answers) == {200: 54}
        pool.wait_one_group()
        wait_until(lambda: pool.in_flight() == 0 and pool.waiting() == 0, message="all books empty")
        assert pool.served() == 54
        assert max(pool.peaks().values()) <= 6 + 3, "at most one request per sidecar above the limit"


def test_requests_of_all_sidecars_stand_in_one_line_and_the_urgent_go_first(tmp_path):
    with Pool(tmp_path, engines=("one",), config={**CONFIG, "max_running_requests": 1}) as pool:
        leader, first, second = pool.in_order()
        running = pool.send(first, "running", 1, 100)
        wait_until(lambda: pool.in_flight() == 1)
        low = pool.send(first, "low", 3, 30)
        wait_until(lambda: pool.waiting() == 3)
        urgent = pool.send(second, "urgent", 3, 30, **{"x-request-class": "urgent"})
        wait_until(lambda: pool.waiting() == 6)
        for place in pool.places:  # whoever is asked, all are shown, and whose they are
            page = place.sidecar.queues()
            assert (page["waiting_total"], page["endpoints"][0]["in_flight"]) == (6, 1)
            held = Counter(row["sidecar"] for row in page["waiting"])
            assert held == {first.replicas["id"]: 3, second.replicas["id"]: 3}
            assert {one["id"] for one in page["replicas"]["followers"]} == held.keys()
        inflight = 'extproc_inflight_requests{endpoint="one"}'
        told = [place.sidecar.metrics().get(inflight) for place in pool.places]
        assert sorted(told, key=str) == [1.0, None, None], "in a sum over all, it counts once"
        assert [answer.status for answer in (*running.result(), *low.result(), *urgent.result())] == [200] * 7
        last_urgent, last_low = (max(one.started_at + one.end_s for one in each.result()) for each in (urgent, low))
        assert last_urgent < last_low
        wrong = complete_many(first.url, 3, lambda n: {"x-test-id": f"wrong-{n}"}, body=b'{"model": "none"}')
        assert [answer.status for answer in wrong] == [404] * 3
        refused = 'extproc_bad_answers_total{answer="refused",endpoint="one"}'
        wait_until(
            lambda: [place.sidecar.metrics().get(refused) for place in (first, second, leader)] == [3, None, None],
            message="who has the client counts what it got",
        )


def test_up_runs_several_sidecars_that_decide_as_one_each_behind_an_envoy_of_its_own(tmp_path):
    tool("redis-server", "redis-server")
    http, admin = free_pair(), free_pair()
    argv = [sys.executable, "-m", "extproc", "up", "--engines", "1", "--replicas", "2"]
    argv += ["--http", f"127.0.0.1:{http}", "--admin", f"127.0.0.1:{admin}"]
    with Child(argv, tmp_path / "up.log", name="up", grace_s=15) as up:
        up.wait_line(r"^curl ", 2 * PATIENCE_S)

        def are_one() -> bool:
            seen = [json.loads(http_get(f"127.0.0.1:{admin + n}", "/queues")[1])["replicas"] for n in range(2)]
            return [one["group"] for one in seen] == [2, 2] and seen[0]["leader"] == seen[1]["leader"]

        wait_until(are_one, message="one group of two")
        for n in range(2):
            url = f"http://127.0.0.1:{http + n}/v1/chat/completions"
            (answer,) = complete_many(url, 1, lambda _: {}, body=body(2))
            assert answer.status == 200
        (other,) = (pid for pid in children_of(up.pid) if b"\0serve\0" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(other, signal.SIGKILL)
        up.wait_line(r"^extproc: sidecar-2 died with exit code -9: ")
        up.signal(signal.SIGTERM)
        assert up.wait_exit() == 0


def children_of(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
