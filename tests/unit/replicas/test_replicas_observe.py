"""What people see of a sidecar among others: who decides, and who is cut off; of one that is alone, nothing."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from extproc.admin.http import Admin
from extproc.admin.state import merged
from extproc.admission.controller import Controller
from extproc.admission.laws import KvLaw, Laws
from extproc.admission.limit import LimitLaw
from extproc.admission.tenants import TenantRules
from extproc.admission.values import Answer, Binding, EndpointSpec, Policy, RequestClass
from extproc.app import App
from extproc.commands.top import lines
from extproc.observe.metrics import Metrics
from extproc.replicas.observe import ReplicaMetrics, Shown, described
from extproc.replicas.picture import Role
from extproc.replicas.rules import differing, rules_of
from tests.unit.endpoint_lists import config

from .site import Site

if TYPE_CHECKING:
    from .sidecar import Sidecar


def seen(sidecar: Sidecar) -> dict[str, Any]:
    return described(SimpleNamespace(replica=sidecar.replica, store_errors=0), sidecar.gate.waiting)


def test_the_leader_shows_its_followers_and_a_follower_shows_its_leader():
    here = Site(1)
    here.run(6.0)
    (leader,) = here.leaders()
    shown = seen(leader)
    assert (shown["role"], shown["group"], shown["members"], shown["cut_off"]) == ("leading", 3, 3, False)
    assert sorted(one["address"] for one in shown["followers"]) == ["s1", "s2"]
    follower = seen(here.sidecars["s1"])
    assert follower["leader"] == leader.replica.me.id
    assert follower["words"] == f"follows {leader.replica.me.id}: all that waits is shown as it tells (3 of 3 sidecars)"
    assert follower["leader_age_s"] < 0.5


def test_what_others_forwarded_is_counted_in_the_moment_of_what_runs(monkeypatch):
    """Read some turns later it was fewer than are in the books: ExtprocLeaseLeak was pending while answers ended."""
    forwarded = [7]
    monkeypatch.setattr("extproc.app._replica_metrics", lambda _: ReplicaMetrics(forwarded=lambda: forwarded[0]))

    async def page() -> bytes:
        here = {"listen": "127.0.0.1:0", "valkey": {"url": "valkey://127.0.0.1:1"}}
        pieces = App(config(replicas=here), asyncio.get_running_loop()).metrics.pieces()
        first = next(pieces)
        forwarded[0] = 5
        return first + b"".join(pieces)

    assert b"\nextproc_replica_forwarded_requests 7.0\n" in asyncio.run(page())


def test_who_is_cut_off_says_so():
    here = Site(1)
    here.run(6.0)
    here.net.cut(["s1"], ["s0", "s2"])
    here.run(8.0)
    shown = seen(here.sidecars["s1"])
    assert shown["cut_off"]
    assert shown["missing"] == ["s0.1 at s0", "s2.3 at s2"]
    assert shown["words"] == "leads 1 of 3 sidecars, without s0.1 at s0, s2.3 at s2"


def test_who_left_the_group_is_named_until_all_of_the_limits_are_used_without_him():
    here = Site(1)
    here.run(6.0)
    here.kill("s2")
    here.run(60.0)
    shown = seen(here.sidecars["s0"])
    assert (shown["members"], shown["words"]) == (2, "leads 2 of 2 sidecars, without s2.3 at s2")
    here.start("s2")
    here.run(6.0)
    assert seen(here.sidecars["s0"])["words"] == "leads 3 of 3 sidecars"
    here.sidecars["s2"].gate.leave()
    here.run(1.0)
    assert seen(here.sidecars["s0"])["words"] == "leads 2 of 2 sidecars"


def test_a_rolling_restart_disrupts_nobody_and_a_leader_that_dies_or_hangs_everybody_once():
    """One restart of three and a leader that was killed were six looks for a leader: ExtprocReplicaRestless fired."""
    here = Site(1, sidecars=8)
    here.run(6.0)
    for number in range(7):
        before = here.sidecars[f"s{number}"]
        before.replica.resign()
        here.run(0.5)
        before.gate.leave()
        here.kill(f"s{number}")
        here.start(f"s{number}")
        here.run(3.0)
    last = here.sidecars["s7"].replica
    assert last.turns[Role.SEEKING] > 5
    assert {one.replica.disruptions for one in here.alive} == {0}
    here.run(10.0)
    (leader,) = here.leaders()
    here.stop(leader.place)
    here.run(5.0)
    here.resume(leader.place)
    here.run(5.0)
    assert {one.replica.disruptions for one in here.alive} == {1}


def test_waiting_here_is_what_came_through_a_sidecar_and_waits_on_a_leader_too():
    here = Site(1)
    here.run(6.0)
    for _ in range(24):  # all there is room for
        here.send("s0", work_s=30.0)
    here.run(1.0)
    sent = {"s0": 1, "s1": 2, "s2": 3}
    for place, count in sent.items():
        for _ in range(count):
            here.send(place, work_s=30.0, budget_s=60.0)
    here.run(1.0)
    assert {place: seen(sidecar)["waiting_here"] for place, sidecar in here.sidecars.items()} == sent


def admin_of(sidecar: Sidecar) -> Admin:
    async def nobody_leads_us(*_: object) -> dict[str, Any]:
        return {}

    membership = SimpleNamespace(replica=sidecar.replica, store_errors=0, ask_leader=nobody_leads_us)
    metrics = Metrics(sidecar.controller, lambda: 0, clock=sidecar.loop.time)
    return Admin("127.0.0.1:0", sidecar.gate, metrics, others=Shown(membership, sidecar.gate))


def failed_lately(admin: Admin) -> dict[str, dict[str, int]]:
    rows = asyncio.run(admin.view())["endpoints"]
    return {row["name"]: row["failed_lately"] for row in rows if "failed_lately" in row}


@pytest.mark.parametrize("how", ["goes and comes back", "moves", "moves beside others"])
def test_what_an_endpoint_failed_lately_is_told_by_who_leads_for_the_clients_of_all(how: str):
    """A follower's page shows the leader's endpoints: what its own clients met stood nowhere."""
    here = Site(1, engines=1, limit=8)
    here.run(6.0)
    (leader,) = here.leaders()
    admin = admin_of(leader)
    for place, answer in (("s1", Answer.ERROR), ("s1", Answer.REFUSED), ("s2", Answer.ERROR), ("s2", Answer.FAILED)):
        client = here.send(place, work_s=30.0)
        here.run(0.1)
        here.sidecars[place].close(client, answer)
    here.run(0.1)
    assert failed_lately(admin) == {"e0": {"error": 2, "failed": 1}}
    if how == "goes and comes back":
        for one in here.alive:
            one.gate.remove_endpoints(["e0"])
        here.run(10.0)
    for one in here.alive:
        one.gate.put_endpoint(EndpointSpec("e0", max_running_requests=8, awaits_check=how == "moves beside others"))
        if how == "moves":
            one.gate.set_up("e0", is_up=None)
    assert failed_lately(admin) == {}, "another server of that name"


def samples_of(sidecar: Sidecar) -> dict[tuple[str, ...], float]:
    collector = ReplicaMetrics.of(SimpleNamespace(replica=sidecar.replica, store_errors=0))
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in collector.collect()
        for sample in family.samples
    }


def test_whose_configuration_is_not_the_leaders_is_shown_with_the_keys_and_follows_a_reload():
    here = Site(1)
    here.run(6.0)
    (leader,) = here.leaders()
    other = here.sidecars["s1"]
    other.gate.set_policy(replace(here.policy, patience_s=7.0, max_queued_requests=5))
    other.gate.put_endpoint(EndpointSpec("e0", max_running_requests=3))
    here.run(0.5)
    differs = {one["address"]: one["differs"] for one in seen(leader)["followers"]}
    assert differs == {"s1": ["endpoints.e0", "max_queue_wait_time", "max_queued_requests"], "s2": []}
    assert samples_of(leader)["extproc_replica_differing",] == 1
    here.kill("s2")
    here.start("s2")
    leader.gate.set_policy(other.controller.policy)
    here.run(6.0)
    differs = {one["address"]: one["differs"] for one in seen(leader)["followers"]}
    assert differs == {"s1": ["endpoints.e0"], "s2": ["max_queue_wait_time", "max_queued_requests"]}


def test_each_rule_of_the_policy_makes_a_difference():
    same = rules_of(Controller(Policy()))
    assert rules_of(Controller(Policy())) == same
    others = {
        "classes": (RequestClass("other"),),
        "binding": Binding.BOUND,
        "limit_law": LimitLaw(start=3),
        "laws": Laws(kv=KvLaw(share=0.5)),
        "max_prompt_tokens": 9,
        "max_gpu_usage": 0.9,
        "no_endpoint_budget_s": 9.0,
        "tenants": TenantRules(apart=False),
    }
    for field in fields(Policy):
        value = getattr(Policy(), field.name)
        other = others.get(field.name, not value if isinstance(value, bool) else None)
        changed = Policy(**{field.name: value + 1 if other is None else other})
        assert len(differing(same, rules_of(Controller(changed)))) == 1, field.name


def test_a_page_of_one_that_follows_shows_what_the_leader_told_and_its_own_mode():
    own = {"endpoints": [1], "waiting": [], "outcomes": "own", "draining": True, "replicas": {"role": "following"}}
    told = {"followers": ["a"], "missing": ["b at b:1"]}
    whole = {"endpoints": [2], "waiting": [3], "outcomes": "its", "draining": False, "replicas": told}
    assert merged(own, whole | {"more": 1}, {}) == {
        "endpoints": [2],
        "waiting": [3],
        "outcomes": "own",
        "draining": True,
        "replicas": {"role": "following", **told},
    }
    assert merged(own, {}, {}) == own


def test_a_page_of_one_that_follows_names_the_tenant_that_its_own_clients_are_refused_for():
    def row(tenant, in_flight, refused):
        return {"tenant": tenant, "in_flight": in_flight, "waiting": 0, "refused": refused}

    calm = [row(f"calm{number}", 2, 7) for number in range(5)]
    own = {"replicas": None, "tenants": [row("flooder", 1, 1996), row("calm0", 1, 3)]}
    listed = merged(own, {"tenants": calm}, {"flooder": 1996, "calm0": 3, "calm4": 1})["tenants"]
    assert listed[:3] == [row("flooder", 1, 1996), row("calm0", 2, 3), row("calm4", 2, 1)]
    assert [one["refused"] for one in listed[3:]] == [0, 0], "what the leader refused is on its own page"
    assert merged(own, {"tenants": [row("flooder", 4, 0)]}, {"flooder": 1996})["tenants"][0] == row("flooder", 4, 1996)


def test_the_metrics_tell_the_role_and_the_requests_of_others():
    here = Site(1, engines=1, limit=1)
    here.run(6.0)
    (leader,) = here.leaders()
    for _ in range(3):
        here.send("s1", work_s=5.0)
    here.run(0.5)
    samples = samples_of(leader)
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
