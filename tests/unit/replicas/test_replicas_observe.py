"""What people see of a sidecar among others: who decides, and who is cut off; of one that is alone, nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from extproc.commands.top import lines
from extproc.replicas.observe import ReplicaMetrics, described
from extproc.replicas.picture import Role

from .world import Sidecar, World


def seen(sidecar: Sidecar) -> dict[str, Any]:
    return described(SimpleNamespace(replica=sidecar.replica, store_errors=0), sidecar.gate.waiting)


def test_the_leader_shows_its_followers_and_a_follower_shows_its_leader():
    here = World(1)
    here.run(6.0)
    (leader,) = here.leaders()
    shown = seen(leader)
    assert (shown["role"], shown["group"], shown["members"], shown["cut_off"]) == ("leading", 3, 3, False)
    assert sorted(one["address"] for one in shown["followers"]) == ["s1", "s2"]
    follower = seen(here.sidecars["s1"])
    assert follower["leader"] == leader.replica.me.id
    assert follower["words"] == f"follows {leader.replica.me.id}: who waits is on its page (3 of 3 sidecars)"
    assert follower["leader_age_s"] < 0.5


def test_who_is_cut_off_says_so():
    here = World(1)
    here.run(6.0)
    here.net.cut(["s1"], ["s0", "s2"])
    here.run(8.0)
    shown = seen(here.sidecars["s1"])
    assert (shown["cut_off"], shown["words"]) == (True, "leads 1 of 3 sidecars")


def test_the_metrics_tell_the_role_and_the_requests_of_others():
    here = World(1, engines=1, limit=1)
    here.run(6.0)
    (leader,) = here.leaders()
    for _ in range(3):
        here.send("s1", work_s=5.0)
    here.run(0.5)
    replica = leader.replica
    collector = ReplicaMetrics(replica.picture, lambda: replica.turns, lambda: replica.forwarded, int)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in collector.collect()
        for sample in family.samples
    }
    assert samples["extproc_replica_role", "leading"] == 1
    assert samples["extproc_replica_role", "following"] == 0
    assert samples["extproc_replica_forwarded_requests",] == 3
    assert samples["extproc_replica_group",] == samples["extproc_replica_members",] == 3
    assert samples["extproc_replica_turns_total", Role.LEADING.value] >= 1


def test_top_says_in_its_heading_who_decides():
    view = {
        "dry_run": False,
        "enable_queue": True,
        "draining": False,
        "endpoints": [],
        "waiting_total": 0,
        "classes": [],
        "waiting": [],
        "outcomes": [],
        "config_refused": False,
        "restart_needed": [],
        "version": "1",
        "up_s": 5,
        "scanned_all": True,
        "rehearsed": {},
        "limits": {},
    }
    alone = "\n".join(lines(view, 120, 40))
    among = "\n".join(lines({**view, "replicas": {"words": "leads 3 of 3 sidecars"}}, 120, 40))
    assert "sidecars" not in alone
    assert "queue on, leads 3 of 3 sidecars" in among
