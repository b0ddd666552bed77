"""What one queue does holds over all sidecars: the most that may wait, dry runs, foreign requests, drains, n > 1."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from extproc.admission.controller import Controller
from extproc.admission.ticket import Ticket
from extproc.admission.values import Policy, Request
from extproc.stream.dry_run import HELD, DryRun
from extproc.stream.gate import BURST

from .sidecar import Client
from .site import Site
from .test_group import followers, leader, site


def test_the_most_that_may_wait_is_counted_over_all_sidecars():
    here = site(engines=1, limit=1, policy=Policy(max_queued_requests=3))
    here.send(leader(here).place, work_s=20.0)
    here.run(0.1)
    waiting = [here.send(place, work_s=1.0) for place in here.sidecars for _ in range(2)]
    here.run(0.2)
    assert Counter(outcome for one in waiting for outcome in one.outcomes) == {"queue_full": 3}
    here.run(40.0, here.check)
    assert here.outcomes == {"done": 4, "queue_full": 3}


def world_that_rehearses(engines: int) -> tuple[Site, dict[Controller, DryRun]]:
    """Three sidecars in a dry run, each before engines of two places, and what each counts."""
    rehearsed: dict[Controller, DryRun] = {}

    def core(policy: Policy) -> Controller:
        controller = Controller(replace(policy, enable_queue=False))
        rehearsed[controller] = DryRun(policy, controller.endpoints)
        controller.watch(rehearsed[controller].happened)
        return controller

    return site(engines=engines, limit=2, core=core), rehearsed


def test_a_dry_run_of_several_holds_nobody_and_counts_what_one_queue_would_have_held():
    here, rehearsed = world_that_rehearses(engines=1)
    asked = [here.send(place, work_s=3.0) for place in here.sidecars for _ in range(4)]
    here.run(0.5)
    assert [one.dispatches for one in asked] == [1] * 12
    here.run(20.0)
    counts: Counter[str] = Counter()
    for (what, _), count in rehearsed[leader(here).controller].counts.items():
        counts[what] += count
    assert counts == {"dispatched": 2, HELD: 10}


def test_a_dry_run_survives_a_change_of_the_leader():
    here, _ = world_that_rehearses(engines=2)
    for place in here.sidecars:
        here.send(place, work_s=6.0, session=place)
    here.run(0.2)
    leader(here).replica.resign()
    here.run(5.0)
    assert here.is_one_group()
    assert here.send("s0", work_s=1.0).dispatches == 0
    here.run(0.2)
    assert here.load() == 4


def test_what_an_engine_runs_for_others_takes_its_room_from_all_sidecars():
    here = Site(1, engines=1, limit=5)
    for number in (-1, -2):
        stranger = Client(number, Request(str(number), 0.0), "nowhere", 0.0)
        here.engines["e0"].holds[stranger] = None
    here.run(6.0)
    assert leader(here).controller.endpoints["e0"].foreign == 2
    for place in here.sidecars:
        here.send(place, work_s=30.0)
        here.send(place, work_s=30.0)
    here.run(1.0)
    assert here.load() == 5


def test_who_drains_refuses_what_waits_here_and_leaves_alone_what_waits_elsewhere():
    here = site(engines=1, limit=1)
    here.send(leader(here).place, work_s=3.0)
    here.run(0.1)
    drained, other = followers(here)
    refused = [here.send(drained.place, work_s=1.0) for _ in range(2)]
    kept = here.send(other.place, work_s=1.0)
    here.run(0.1)
    drained.gate.drain()
    here.run(0.1)
    refused.append(here.send(drained.place, work_s=1.0))
    here.run(0.1)
    assert [one.outcomes for one in refused] == [["draining"]] * 3
    assert leader(here).controller.waiting == 1
    here.run(6.0, here.check)
    assert kept.dispatches == 1


def test_a_leader_that_drains_refuses_all_that_waits_here_though_it_leads_no_more_before_all_are_told():
    here = site(engines=1, limit=1)
    drained = leader(here)
    here.send(drained.place, work_s=30.0)
    here.run(0.1)
    refused = [here.send(drained.place, work_s=1.0) for _ in range(2 * BURST)]
    here.run(0.1)
    drained.gate.drain()
    drained.replica.resign()
    here.run(3.0)
    assert Counter(outcome for one in refused for outcome in one.outcomes) == {"draining": 2 * BURST}


def test_a_request_of_several_sequences_takes_as_many_places_wherever_it_came():
    here = site(engines=1, limit=8)
    follower = followers(here)[0]
    wide = Ticket(Request("wide", here.clock.now, sequences=6), lambda _: None)
    follower.gate.offer(wide)
    here.run(0.1)
    assert leader(here).controller.endpoints["e0"].sequences == 6
    for _ in range(4):
        here.send(leader(here).place, work_s=5.0)
    here.run(0.2)
    assert here.load() == 2


def test_a_part_counts_sequences_so_that_wide_requests_get_no_more_of_it():
    here = site(engines=1, limit=9)
    alone = followers(here)[0]
    here.net.cut([alone.place], [one.place for one in here.alive if one is not alone])
    here.run(8.0)
    for name in ("first", "second", "third"):
        alone.gate.offer(Ticket(Request(name, here.clock.now, sequences=2), lambda _: None))
    here.run(1.0)
    assert alone.controller.endpoints["e0"].sequences == 2


def test_who_is_told_why_a_request_waited_is_told_the_same_at_each_sidecar():
    here = site(engines=1, limit=1)
    here.send(leader(here).place, work_s=3.0)
    here.run(0.1)
    why = []
    for place in here.sidecars:
        ticket = Ticket(Request(place, here.clock.now, budget_s=20.0), lambda _: None)
        here.sidecars[place].gate.offer(ticket)
        here.run(0.01)
        why.append(ticket)
    late = Ticket(Request("late", here.clock.now, budget_s=1.0), lambda _: None)
    followers(here)[0].gate.offer(late)
    here.run(2.0)
    assert late.why()["waited_for"] == "limit"
    for ticket in why:
        here.run(3.0)
        assert ticket.why().items() >= {"budget_s": 20.0, "waited_for": "limit"}.items()
        here.sidecars[ticket.request.id].gate.close(ticket)
