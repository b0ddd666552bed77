"""Sidecars that share engines: one leads, and whatever dies, no request is lost, sent twice, or sent too early."""

from __future__ import annotations

import gc
import logging
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from extproc.admission.decision import Crowd
from extproc.admission.load import Load
from extproc.admission.tenants import TenantRule, TenantRules
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Reject, Request, RequestClass
from extproc.observe.log import CAME_LATE, QueueLog
from extproc.observe.recording import Recorder, Recording
from extproc.replicas.door import Guest
from extproc.replicas.messages import VERSION, Asked, Beat, Held, Hello, Member, Offer, Purpose, Refuse, Release
from extproc.replicas.picture import Role
from extproc.replicas.replica import SILENCE_S, STOPPED_S
from extproc.simulate.network import End

from .sidecar import Client
from .site import BrokenError, Site, require
from .storm import Storm, storm

if TYPE_CHECKING:
    from extproc.admission.values import Decision
    from extproc.replicas.messages import Message

    from .sidecar import Sidecar

CLASSES = (RequestClass("std", 0, 60.0), RequestClass("urgent", 10, 60.0))


def site(**more: Any) -> Site:
    """Three sidecars in one group, that has looked at its engines."""
    here = Site(1, **more)
    here.run(10.0)  # each knows that all know of each
    assert here.is_one_group()
    return here


def leader(here: Site) -> Sidecar:
    (found,) = here.leaders()
    return found


def followers(here: Site) -> list[Sidecar]:
    return [one for one in here.alive if one.replica.role is Role.FOLLOWING]


def fill(here: Site, work_s: float) -> None:
    """Fill all engines, from all sidecars."""
    for number in range(sum(engine.limit for engine in here.engines.values())):
        here.send(f"s{number % len(here.sidecars)}", work_s=work_s)
    here.run(0.1)
    assert here.load() == sum(engine.limit for engine in here.engines.values())


def test_sidecars_that_start_together_become_one_group_led_by_the_one_that_joined_first():
    here = Site(1)
    here.run_until(here.is_one_group, 5.0)
    joined = [one.replica.me.joined for one in here.alive]
    assert leader(here).replica.me.joined == min(joined)


def test_a_refusal_that_the_leader_decided_says_at_every_sidecar_how_much_its_tenant_has_in_flight():
    here = site(policy=Policy(tenants=TenantRules({"acme": TenantRule(max_in_flight=1)})))
    here.send(leader(here).place, work_s=5.0, tenant="acme")
    here.run(0.1)
    decisions: list[Decision] = []
    for number, one in enumerate(here.alive):
        one.gate.offer(Ticket(Request(f"r{number}", here.clock.now, tenant="acme"), decisions.append))
    here.run(0.1)
    assert [one.crowd for one in decisions if isinstance(one, Reject)] == [Crowd(1, 1, is_shared=False)] * 3


def test_the_limit_of_an_engine_holds_over_all_sidecars_and_all_of_it_is_used():
    here = site(engines=2, limit=4)
    for number in range(60):
        here.send(f"s{number % 3}", work_s=1.0)
    here.run(0.5)
    assert [len(engine.holds) for engine in here.engines.values()] == [4, 4]
    here.run(30.0, here.check)
    assert [engine.peak for engine in here.engines.values()] == [4, 4]
    assert here.outcomes == {"done": 60}


def test_a_request_that_the_leader_cant_be_told_of_is_refused_at_once_and_held_by_nobody():
    here = site(engines=1, limit=1)
    here.send(leader(here).place, work_s=5.0)
    here.run(0.1)
    one = followers(here)[0]
    following = one.replica.following
    client = here.send(one.place, work_s=1.0)
    (number,) = following._waiting  # its link gives the message back, as that of a real stream does
    following.link.bounced(Offer(number, Asked("", 0.0)))
    assert client.outcomes == ["no_endpoint"]
    assert one.gate.waiting == 0


def test_what_runs_here_and_cant_be_told_with_all_that_it_asked_for_holds_its_slots_at_the_leader_all_the_same():
    """A client's id that is no Unicode: an engine got as many above its limit as such requests ran at who came back."""
    here = site(engines=1, limit=4)
    one = followers(here)[0]
    following = one.replica.following
    for number in (90, 91):
        following.link.bounced(Held(number, Asked("\udcff", 1.0, tenant="a", sequences=1), "e0", 1.0, begun=True))
    following.link.bounced(Held(92, Asked("", 1.0), "nowhere", 1.0, begun=True))  # it asked for nothing: not again
    here.run(0.1)
    assert leader(here).controller.endpoints["e0"].sequences == 2


def test_what_happens_to_the_leader_is_recorded_and_runs_again_with_the_requests_of_all():
    here = site(engines=1, limit=2)
    for place in here.sidecars:
        for _ in range(2):
            here.send(place, work_s=1.0, session=place)
    here.run(0.3)
    core = leader(here).controller
    recorder = Recorder(core)
    core.watch(recorder.happened)
    here.run(4.0)
    again = Recording(recorder.text().splitlines())
    differences = list(again.run())
    assert len(differences) > 6
    assert not any(differences)
    assert repr(again.core) == repr(core)


def test_of_two_sidecars_requests_the_more_important_goes_first_wherever_it_came():
    here = Site(1, engines=1, limit=1)
    for sidecar in here.sidecars.values():
        sidecar.gate.set_policy(here.policy.__class__(classes=CLASSES))
    here.run(6.0)
    first, second = followers(here)
    here.send(leader(here).place, work_s=2.0)
    low = here.send(first.place, work_s=2.0, request_class="std")
    here.run(0.2)
    high = here.send(second.place, work_s=2.0, request_class="urgent")
    here.run(2.5)
    assert (high.dispatches, low.dispatches) == (1, 0)


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_leader_that_is_lost_takes_no_other_sidecars_request_with_it_and_the_oldest_goes_first(end):
    here = site(engines=1, limit=4)
    lost = leader(here)
    places = [one.place for one in followers(here)]
    for number in range(4):
        here.send(places[number % 2], work_s=8.0 + 1.5 * number)
    here.run(0.1)
    waiting = []
    for number in range(8):  # the elder follower's came last: each tells its own, and age decides
        waiting.append(here.send(places[1 - number % 2], work_s=6.0, budget_s=60.0))
        here.run(0.01)
    (here.kill if end == "kill" else here.stop)(lost.place)
    order: list[Client] = []
    here.run(40.0, lambda: order.extend(one for one in waiting if one.dispatches and one not in order))
    assert [one.number for one in order] == [one.number for one in waiting]
    assert {one.dispatches for one in waiting} == {1}
    assert here.engines["e0"].peak == 4


def test_who_leads_next_does_not_say_that_envoy_held_what_waited_with_itself_for_a_leader(caplog):
    caplog.set_level(logging.INFO, "extproc.queue")
    here = site(engines=1, limit=2)
    fill(here, 8.0)
    heir = min(followers(here), key=lambda one: one.replica.me.joined)
    log = QueueLog(heir.controller, heir.loop.time)
    heir.gate._observers = (*heir.gate._observers, log)
    here.send(heir.place, budget_s=1.5)
    here.run(0.2)
    here.stop(leader(here).place)
    here.run(5.0)
    (record,) = (record for record in caplog.records if record.name == "extproc.queue")
    assert record.getMessage().endswith(f"of a budget of 1.5 s, {CAME_LATE}")
    assert "Envoy" not in record.getMessage()


def test_a_leader_that_was_stopped_sends_nothing_when_it_goes_on_until_it_has_found_the_others():
    here = site(engines=1, limit=4)
    lost = leader(here)
    fill(here, work_s=1.0)
    for _ in range(20):
        here.send(lost.place, work_s=1.0)
        here.send(followers(here)[0].place, work_s=5.0)
    here.run(0.05)
    here.stop(lost.place)
    here.run(14.0)
    assert here.load() == 4  # the others have filled the engine
    here.resume(lost.place)
    assert here.load() == 4
    here.run(60.0, here.check)
    assert here.engines["e0"].peak == 4
    assert here.is_one_group()


@pytest.mark.parametrize("first", [0.0, 0.9], ids=["timers", "network"])
def test_who_was_stopped_while_it_looked_for_a_leader_does_not_lead_and_follow_at_once(first):
    """It notices amid beginning to lead, looks for others anew, and follows who answers: its own core went on."""
    here = site(engines=1, limit=4)
    one = followers(here)[-1]  # it asks the older one first
    here.net.cut([one.place], here.sidecars)
    here.run_until(lambda: one.replica.role is Role.SEEKING)
    here.run(0.3)  # what is due next is to give up the one who does not answer
    here.stop(one.place)
    here.run(4.0)
    for place in 3 * list(here.sidecars):
        here.send(place, work_s=10.0, budget_s=60.0)
    here.run(1.0)
    here.net.heal()
    here.random.random = lambda: first  # type: ignore[method-assign]
    here.resume(one.place)
    here.run(3.0, lambda: require(one.replica.leading is None or one.replica.following is None, "both"))
    assert here.is_one_group()
    assert here.engines["e0"].peak == 4


def test_a_leader_that_was_stopped_for_a_moment_is_counted_on_by_who_followed_it():
    """It lets its followers go when it wakes, which is no goodbye: each would have half of a limit, and it a third."""
    here = site(engines=1, limit=12)
    woken = leader(here)
    here.stop(woken.place)
    here.run(1.5)
    here.resume(woken.place)
    here.run(6.0)
    assert here.is_one_group()
    here.net.cut(here.sidecars, here.sidecars)
    here.run(8.0)
    assert [one.controller.endpoints["e0"].quota for one in here.alive] == [4, 4, 4]


def test_a_leader_that_finds_as_it_asks_its_followers_that_it_was_stopped_leads_no_more():
    """Its followers went while it told one after the other: an error, and a page of an engine was not asked about."""
    here = site()
    one = leader(here).replica
    leading = one.leading
    assert leading is not None
    here.clock.now += STOPPED_S + 0.1
    leading.looks._ask()
    assert one.leading is None
    here.run(10.0, here.check)
    assert here.is_one_group()


def test_a_number_that_a_follower_gives_twice_holds_no_slot_for_ever():
    here = site(engines=1, limit=4)
    (leads,), one = here.leaders(), followers(here)[0]
    leading = leads.replica.leading
    assert leading is not None
    follower = leading.followers[one.replica.me.id]
    for message in (Held(90, Asked("a", 0.0), "e0", 1.0, False), Offer(91, Asked("b", 0.0))):
        leading.receive(follower, message)
        leading.receive(follower, message)
    assert len(leads.controller.endpoints["e0"].leases) == 2
    here.kill(one.place)
    here.run(1.0, here.check)
    assert not leads.controller.endpoints["e0"].leases


def test_what_runs_for_a_sidecar_that_died_keeps_its_place_at_the_engine():
    here = site(engines=1, limit=4)
    dead = followers(here)[0]
    for _ in range(3):
        here.send(dead.place, work_s=20.0)
    here.run(0.1)
    here.kill(dead.place)
    for _ in range(10):
        here.send(leader(here).place, work_s=2.0)
    here.run(15.0, here.check)
    assert here.engines["e0"].peak == 4


@pytest.mark.parametrize("phase_s", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("slow", ["the network", "who asks"])
def test_a_grant_that_is_on_its_way_is_not_taken_for_what_a_dead_sidecar_left_running(slow, phase_s):
    """What its leader granted long ago is at the engine only if the sidecar that asked shows that it acted."""
    here = site(engines=1, limit=12)
    here.run(phase_s)
    dead, late = followers(here)
    for _ in range(6):
        here.send(dead.place, work_s=30.0)
    here.run(0.1)
    here.kill(dead.place)
    if slow == "the network":
        here.net.delay_s = (0.4, 0.4)
    here.run(3.0)
    for _ in range(60):
        here.send(late.place, work_s=0.5, budget_s=60.0)
    if slow == "who asks":
        here.run(0.0001)
        here.stop(late.place)
        here.run(1.1)
        here.resume(late.place)
    here.run(20.0, here.check)
    assert here.engines["e0"].peak == 12
    assert here.outcomes["done"] == 60


def test_what_a_dead_sidecar_left_running_ends_though_another_dies_before_it_has_told_what_ended_there():
    here = site(engines=1, limit=12, sidecars=4)
    first, second, _ = followers(here)
    for place in (first.place, second.place):
        for _ in range(3):
            here.send(place, work_s=5.0)
    here.run(0.1)
    here.kill(first.place)
    books = leader(here).controller.endpoints["e0"]
    here.stop(second.place)
    here.run(1.1)  # it is asked, and does not answer any more
    here.kill(second.place)
    here.run(8.0)
    assert (books.foreign, here.load()) == (0, 0)


@pytest.mark.parametrize("delay_s", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("phase_s", [0.0, 0.3, 0.6])
def test_what_has_ended_and_is_not_told_yet_is_not_taken_for_what_a_dead_sidecar_left_running(delay_s, phase_s):
    """Its leader counts what a follower runs until it hears that it is over: a page showed less than both together."""
    here = site(engines=1, limit=96)
    here.run(phase_s)
    dead, far = followers(here)
    for _ in range(48):
        here.send(dead.place, work_s=25.0)
    here.run(0.1)
    here.kill(dead.place)
    here.net.delay_s = (delay_s, delay_s)
    for _ in range(80):
        for _ in range(48):
            here.send(far.place, work_s=0.5, budget_s=1.0)
        here.run(0.25)
    assert here.engines["e0"].peak == 96
    here.run(8.0, here.check)
    assert not leader(here).controller.endpoints["e0"].foreign


@pytest.mark.parametrize("pages_are_late", [False, True])
@pytest.mark.parametrize("goes", ["is killed", "is restarted"])
@pytest.mark.parametrize("whose", ["the leader's", "a follower's"])
def test_what_a_sidecar_left_running_keeps_its_place_though_envoys_and_pages_take_their_time(
    whose, goes, pages_are_late
):
    """What is on its way, or has ended and is not told yet, is on no page: an engine of 12 had 17."""
    here = site(engines=1, limit=12)
    gone, far = followers(here)
    for _ in range(6):
        here.send(gone.place, work_s=25.0)
    here.run(0.1)
    if goes == "is restarted":
        gone.replica.resign()
        here.run(1.0)
        gone.gate.leave()
        here.run(0.05)
    here.kill(gone.place)
    here.envoy_s = (0.08, 0.09)
    if pages_are_late:
        here.page_s = (0.1, 0.4)
    place = leader(here).place if whose == "the leader's" else far.place
    for _ in range(80):
        for _ in range(6):
            here.send(place, work_s=here.random.expovariate(2.0), budget_s=1.0)
        here.run(0.25)
    assert here.engines["e0"].peak == 12
    here.run(8.0, here.check)
    assert not leader(here).controller.endpoints["e0"].foreign


def test_nothing_is_kept_of_what_was_sent_last_to_an_endpoint_that_is_gone():
    here = site(engines=1)
    gone, _ = followers(here)
    here.send(gone.place, work_s=25.0)
    here.run(0.1)
    here.blind = {one.place for one in here.alive}  # no page comes, which would forget it
    here.kill(gone.place)
    here.run_until(lambda: bool(leader(here).replica.leading.looks._disowned))
    leader(here).gate.remove_endpoints(["e0"])
    assert not leader(here).replica.leading.looks._disowned


@pytest.mark.parametrize("first", ["the leader", "its Envoy"])
def test_who_stood_still_tells_what_its_envoy_said_meanwhile_before_it_answers_its_leader(first, monkeypatch):
    """Its leader takes an answer for a sign that it was told of all that has ended."""
    here = site(engines=1, limit=4)
    one = followers(here)[0]
    here.send(one.place, work_s=0.5)
    here.run(0.1)
    here.stop(one.place)
    here.run(0.8)
    said: list[type] = []
    send = End.send

    def note(end: End, message: Message) -> None:
        if end.owner is one:
            said.append(type(message))
        send(end, message)

    monkeypatch.setattr(End, "send", note)
    monkeypatch.setattr(here.random, "random", lambda: 0.9 if first == "the leader" else 0.1)
    here.resume(one.place)
    here.run(0.001)
    assert [kind for kind in said if kind in (Release, Beat)][:2] == [Release, Beat]


def test_a_page_of_just_before_a_sidecar_died_does_not_forget_what_it_sent_last():
    here = site(engines=1, limit=12)
    dead = followers(here)[0]
    here.run_until(lambda: 0.5 < here.clock.now % 1.0 < 0.6)
    for _ in range(6):
        here.send(dead.place, work_s=30.0)
    here.run(0.02)
    here.kill(dead.place)
    here.run(0.02)
    books = leader(here).controller.endpoints["e0"]
    leader(here).gate.observe("e0", Load(running=0.0, waiting=0.0))
    assert books.foreign == 6
    here.run(5.0)
    assert books.foreign == 6


@pytest.mark.parametrize("has_page", [True, False])
def test_an_endpoint_that_comes_waits_for_its_first_page_if_it_has_one_as_others_may_have_known_it_before(has_page):
    """Who leads may be the last to hear of it; what followers run there is not told to a core that does not know it."""
    here = site(engines=1, limit=4)
    if not has_page:
        here.blind.update(here.sidecars)
    for one in here.alive:
        one.gate.remove_endpoints(["e0"])
    here.run(0.1)
    for number in (-1, -2, -3):
        here.engines["e0"].holds[Client(number, Request(str(number), 0.0), "nowhere", 0.0)] = None
    for one in here.alive:
        one.load()
    asked = [here.send(place, work_s=20.0, budget_s=60.0) for place in here.sidecars]
    here.run(2.0)
    assert sum(one.dispatches for one in asked) == (1 if has_page else 0)
    here.run(2.0)
    assert sum(one.dispatches for one in asked) == (1 if has_page else 3), "without a page nothing ever tells"


def test_a_sidecar_that_is_cut_off_uses_its_part_alone_and_comes_back_by_itself():
    here = site(engines=1, limit=9)
    alone = followers(here)[0]
    rest = [one.place for one in here.alive if one is not alone]
    here.net.cut([alone.place], rest)
    for _ in range(30):
        here.send(alone.place, work_s=2.0)
        here.send(rest[0], work_s=2.0)
    here.run(SILENCE_S + 6.0, here.check)
    assert len(here.leaders()) == 2
    parts = {one.place: len(one.controller.endpoints["e0"].leases) for one in here.leaders()}
    assert parts == {alone.place: 3, rest[0] if rest[0] in parts else rest[1]: 6}
    here.net.heal()
    here.run(15.0, here.check)
    assert here.is_one_group()
    assert here.engines["e0"].peak == 9


def test_a_sidecar_whose_requests_wait_for_the_slot_of_an_adapter_comes_back_with_all_of_them():
    """What it says of their age is no reason to think that they have begun, and none to be sent away."""
    here = site(engines=1, limit=9)
    alone = followers(here)[0]
    here.engines["e0"].adapter = "law"
    here.send(leader(here).place, model="law", work_s=60.0)
    for _ in range(5):
        here.send(alone.place, model="med", work_s=60.0)
    here.run(3.0, here.check)
    here.net.cut([alone.place], [one.place for one in here.alive if one is not alone])
    here.run(SILENCE_S + 6.0, here.check)
    assert len(here.leaders()) == 2
    here.net.heal()
    here.run(15.0, here.check)
    assert here.is_one_group()
    assert [len(one.controller.endpoints["e0"].leases) for one in (leader(here), alone)] == [6, 5]
    assert leader(here).controller.endpoints["e0"].deferred.count == 5


@pytest.mark.parametrize("lost", [leader, lambda here: followers(here)[0]], ids=["the leader", "a follower"])
def test_a_sidecar_that_is_cut_off_from_everything_adds_one_request_to_what_the_others_send(lost):
    """Its Envoy still reaches the engine. The store counts it out, so the others use its part, too."""
    here = site(engines=1, limit=12)
    corner = lost(here).place
    for number in range(3 * 12):
        here.send(f"s{number % 3}", work_s=1.0, budget_s=60.0)
    here.run(0.1)
    here.net.cut([corner], set(here.sidecars) - {corner})
    here.store.cut.add(corner)
    here.blind.add(corner)
    for _ in range(60):
        here.run(0.2)
        for place in 2 * list(here.sidecars):
            here.send(place, work_s=0.5, budget_s=60.0)
    assert here.sidecars[corner].gate.waiting > 0
    assert here.engines["e0"].peak <= 12 + 1


def test_a_group_that_is_cut_off_from_everything_adds_one_request_for_each_sidecar_of_it():
    here = site(engines=1, limit=12)
    here.net.cut(["s1", "s2"], ["s0"])
    here.store.cut.update(["s1", "s2"])
    here.blind.update(["s1", "s2"])
    for _ in range(60):
        here.run(0.2)
        for place in 2 * list(here.sidecars):
            here.send(place, work_s=0.5, budget_s=60.0)
    assert leader_of_most(here).replica.picture().group == 2
    assert here.engines["e0"].peak <= 12 + 2
    assert leader_of_most(here).controller.endpoints["e0"].sequences == 2


@pytest.mark.parametrize("first", ["the store", "the pages", "the others"])
def test_a_sidecar_that_was_cut_off_from_everything_takes_its_part_when_the_others_have_counted_it_in(first):
    """They use the whole limit until they have asked the store again, and its own cables come back one by one."""
    here = site(engines=1, limit=12)
    corner = followers(here)[0].place
    rest = sorted(set(here.sidecars) - {corner})

    def run(seconds: float) -> None:
        for _ in range(round(seconds / 0.2)):
            here.run(0.2)
            for place in 2 * list(here.sidecars):
                here.send(place, work_s=0.5, budget_s=60.0)

    here.net.cut([corner], rest)
    here.store.cut.add(corner)
    here.blind.add(corner)
    run(12.0)
    assert leader_of_most(here).replica.picture().members == 2
    back = {"the store": here.store.cut.clear, "the pages": here.blind.clear, "the others": here.net.heal}
    back.pop(first)()
    run(0.0 if first == "the others" else 1.2)
    assert here.engines["e0"].peak <= 12 + 1
    for cable in back.values():
        cable()
    run(10.0)
    assert here.is_one_group()
    assert here.engines["e0"].peak <= 12 + 1


def test_who_was_cut_off_from_everything_and_sees_the_store_again_has_its_part_soon_though_no_page_can_be_had():
    here = site(engines=1, limit=12)
    corner = followers(here)[0].place
    here.net.cut([corner], set(here.sidecars) - {corner})
    here.store.cut.add(corner)
    here.blind.add(corner)
    here.run(12.0)
    books = here.sidecars[corner].controller.endpoints["e0"]
    assert books.quota == 1
    here.store.cut.clear()
    here.run(1.5)
    assert books.quota == 1
    here.run(3.0)
    assert books.quota == 4


def test_who_was_nobody_sends_no_more_to_an_engine_because_somebody_follows_it_before_all_know_of_it():
    """The others have a third of the limit each: the first may be alive, although nobody sees it."""
    here = site(engines=1, limit=12)
    corner = leader(here).place
    rest = sorted(set(here.sidecars) - {corner})
    here.net.cut(here.sidecars, here.sidecars)
    here.store.cut.add(corner)
    here.blind.add(corner)
    here.run(12.0)
    for place in here.sidecars:
        for _ in range(12):
            here.send(place, work_s=60.0, budget_s=60.0)
    here.run(3.0)
    assert here.engines["e0"].peak == 4 + 4 + 1
    here.net.cuts.discard(frozenset((corner, rest[0])))
    here.run_until(lambda: len(here.leaders()) == 2)
    here.store.cut.clear()
    here.run(2.0)
    assert here.engines["e0"].peak == 4 + 4 + 1


@pytest.mark.parametrize("first", ["the others", "itself"])
def test_who_reaches_the_store_at_last_has_its_part_when_the_others_have_counted_it_in(first):
    """It sees the engine's page, which may be older than what the others have sent since.

    And the store may have forgotten the others, so that it lists who asks first alone.
    """
    here = site(engines=1, limit=12)
    here.store.is_up = False
    here.kill("s2")
    here.net.cut(["s2"], ["s0", "s1"])
    late = here.start("s2")
    here.run(8.0)
    books = late.controller.endpoints["e0"]
    assert books.quota == 1
    here.store.is_up = True
    here.store.cut.update(["s0", "s1"] if first == "itself" else ())
    here.run_until(lambda: late.replica.census.answered_at is not None)
    assert late.replica.picture().members == (1 if first == "itself" else 3)
    here.store.cut.clear()
    quotas: set[int | None] = set()
    here.run(1.2, lambda: quotas.add(books.quota))
    assert quotas == {1}
    here.run(10.0)
    assert books.quota is not None
    assert books.quota >= 4


def test_what_a_new_follower_holds_counts_before_its_part_does():
    """Its leader sees no page, so it knows of that only when it is told."""
    here = site(sidecars=2, engines=1, limit=12)
    first, second = leader(here), followers(here)[0]
    here.net.cut([first.place], [second.place])
    here.blind.add(first.place)
    here.run(8.0)
    for place in (first.place, second.place):
        for _ in range(12):
            here.send(place, work_s=20.0, budget_s=60.0)
    here.run(1.0)
    assert here.load() == 6 + 6
    here.net.heal()
    here.run_until(here.is_one_group)
    here.run(3.0)
    assert here.engines["e0"].peak == 12
    here.run(20.0)
    assert here.load() == 12


def test_who_is_cut_off_from_everything_refills_what_it_held_no_longer_than_the_others_count_it_in():
    """It began to lead late, so that it would still wait for a first page when they use its part."""
    here = site(engines=1, limit=12)
    fill(here, work_s=60.0)
    corner = followers(here)[0].place
    here.net.cut([corner], set(here.sidecars) - {corner})
    here.store.cut.add(corner)
    here.blind.add(corner)
    books = here.sidecars[corner].controller.endpoints["e0"]
    here.run_until(lambda: here.sidecars[corner].replica.role is Role.LEADING)
    here.run_until(lambda: here.sidecars[corner].replica.census.is_cut_off(here.clock.now))
    here.run(0.3)
    assert books.sequences > 1
    assert books.quota == 1


def test_a_beat_that_the_store_misses_changes_nothing_for_a_sidecar_alone_with_engines_that_show_nothing():
    """It has its part as long as the store is only slow: with Leases answers are 2 s apart, 4 s when one fails."""
    here = site(sidecars=2, engines=1, limit=12, store_beat_s=2.0)
    here.blind.update(here.sidecars)
    here.net.cut(["s0"], ["s1"])
    here.run(30.0)
    one = here.sidecars["s0"]
    quotas: set[int | None] = set()
    for _ in range(3):
        here.run_until(lambda: one.replica.picture().store_age_s == 0.0)
        here.store.is_up = False
        here.run(2.5, lambda: quotas.add(one.controller.endpoints["e0"].quota))
        here.store.is_up = True
        here.run(6.0, lambda: quotas.add(one.controller.endpoints["e0"].quota))
    assert quotas == {6}
    here.store.is_up = False
    here.run(7.0)
    assert one.controller.endpoints["e0"].quota == 1


def test_a_grant_that_comes_when_its_leader_may_have_given_us_up_waits_for_the_leaders_next_word():
    here = site(engines=1, limit=2)
    late = followers(here)[0]
    here.net.delay_s = (0.1, 0.1)
    asked = here.send(late.place, work_s=5.0)
    here.run(0.05)  # the offer is on its way; the grant will be held back with all else that the leader says
    here.net.cut([leader(here).place], [late.place])
    here.run(1.7)
    here.net.heal()
    here.run(0.15)
    assert late.replica.role is Role.FOLLOWING
    assert asked.dispatches == 0  # it is here, but of a leader that has not shown for 1.7 s that it hears us
    here.run(1.0, here.check)
    assert asked.dispatches == 1


def test_a_leader_does_not_count_on_a_follower_whose_words_are_old_however_many_still_come():
    """Found by the storm: whoever had left it long ago used its own part, and it the whole of a limit."""
    here = site(engines=1, limit=9)
    lead, far = leader(here), followers(here)[0]
    takes_s = 1.9

    def late(end: Any, arrive: Any) -> None:
        here.net.delay_s = (takes_s, takes_s)
        here.net.carry(end, arrive)
        here.net.delay_s = (0.001, 0.001)

    for end in here.net.ends:
        if end.owner is far:
            end._carry = late
    here.run(2.0)
    takes_s = 3.5
    here.run(2.0)
    here.net.cut([far.place], set(here.sidecars) - {far.place})
    here.run(4.6)
    assert far.controller.endpoints["e0"].quota == 3
    for place in 9 * [far.place, lead.place]:
        here.send(place, work_s=5.0, budget_s=60.0)
    here.run(0.1)
    assert 6 <= here.engines["e0"].peak <= 9


def test_a_group_that_has_just_formed_does_not_take_the_room_of_a_sidecar_that_it_loses_at_once():
    here = site(engines=1, limit=6)
    for place in ("s0", "s1", "s2") * 2:
        here.send(place, work_s=30.0)
    here.run(0.1)
    here.kill("s0")
    here.run(0.3)
    here.kill("s2")
    for _ in range(10):
        here.send("s1", work_s=5.0)
    here.run(20.0, here.check)
    assert here.engines["e0"].peak == 6


def test_who_has_lost_the_leader_takes_no_room_until_the_leader_must_have_noticed():
    """The stream has ended on one side alone, and the engine is idle: both see the same free room."""
    here = site(engines=1, limit=9)
    lost = followers(here)[0]
    here.net.cut([lost.place], [one.place for one in here.alive if one is not lost])
    for end in here.net.ends:
        if end.owner is lost:
            end.finish()
    here.run(1.7)
    assert lost.replica.role is Role.LEADING
    for _ in range(9):
        here.send(lost.place, work_s=5.0)
    here.run(0.2)
    for _ in range(9):
        here.send(followers(here)[0].place, work_s=5.0)
    here.run(4.0, here.check)
    assert here.engines["e0"].peak == 9


def test_requests_of_a_sidecar_that_nobody_sees_any_more_are_found_in_the_engines_figures():
    """Cut off from all others and from the store: it is counted out, and the others may use every limit whole."""
    here = site(engines=1, limit=9)
    unseen = followers(here)[0]
    here.net.cut([unseen.place], [one.place for one in here.alive if one is not unseen])
    here.store.cut.add(unseen.place)
    here.run(12.0)
    assert leader_of_most(here).replica.picture().members == 2
    for _ in range(3):
        here.send(unseen.place, work_s=30.0)
    here.run(4.0)  # one more from each reading to the next
    for _ in range(20):
        here.send(leader_of_most(here).place, work_s=3.0)
    here.run(20.0, here.check)
    assert here.engines["e0"].peak == 9


def test_a_group_that_may_not_be_seen_any_more_sends_an_engine_one_more_for_each_sidecar_of_it_at_a_time():
    """Neither the store nor the third sidecar sees two, which it may count out: both sides have a burst at once."""
    here = site(engines=1, limit=12)
    here.net.cut(["s1", "s2"], ["s0"])
    here.store.cut.update(["s1", "s2"])
    here.run(15.0)
    assert here.sidecars["s0"].replica.picture().members == 1
    for place in 12 * list(here.sidecars):
        here.send(place, work_s=10.0, budget_s=60.0)
    here.run(1.5)
    assert here.engines["e0"].peak <= 12 + 2
    here.run(40.0)
    assert here.engines["e0"].peak <= 12 + 2
    for place in 12 * ["s1", "s2"]:
        here.send(place, work_s=30.0, budget_s=60.0)
    here.run(6.0)
    assert here.load() == 8, "their part in the end"


def test_what_a_group_that_may_not_be_seen_holds_less_for_a_moment_it_does_not_send_again_at_once():
    """Found by the storm: its engine was shut, all that it held there ended, and three came when it was open again."""
    here = site(engines=1, limit=12)
    corner = followers(here)[0]
    here.net.cut([corner.place], set(here.sidecars) - {corner.place})
    here.store.cut.add(corner.place)
    here.run(10.0)
    for _ in range(8):
        here.send(leader_of_most(here).place, work_s=60.0)
    here.run(2.0)
    held = [here.send(corner.place, work_s=60.0, budget_s=60.0) for _ in range(8)]
    here.run(6.0)
    assert here.load() == 8 + 4
    corner.gate.set_up("e0", is_up=False)
    for client in held[:4]:
        here.engines["e0"].holds.pop(client)
        corner.close(client, Answer.OK)
    corner.gate.set_up("e0", is_up=True)
    assert here.load() == 8 + 1


@pytest.mark.parametrize("lost", ["by itself", "with the store", "the store of all"])
def test_who_may_not_be_seen_any_more_fills_its_part_of_an_idle_engine_at_once(lost):
    """The others do not take that at once: those with a budget of nothing were refused at engines that stood idle."""
    here = site(engines=1, limit=24)
    corner = followers(here)[0]
    rest = sorted(set(here.sidecars) - {corner.place})
    here.net.cut([corner.place], rest)
    if lost == "with the store":
        here.store.cut.update(rest)
    elif lost == "by itself":
        here.store.cut.add(corner.place)
    else:
        here.store.is_up = False
    here.run(15.0)
    both = (corner.place, rest[0])
    asked = [[here.send(place, work_s=30.0, budget_s=0.0) for _ in range(24)] for place in both]
    here.run(0.1)
    assert [sum(one.dispatches for one in clients) for clients in asked] == [8, 16]
    here.run(20.0)
    assert here.engines["e0"].peak == 24


@pytest.mark.parametrize(
    ("sidecars", "limit", "gone", "at_once", "all_s"), [(3, 24, 1, 16, 6.1), (2, 7, 1, 3, 12.1), (3, 96, 2, 32, 12.1)]
)
def test_those_who_are_left_take_the_part_of_who_vanished_in_steps_and_all_when_it_is_surely_gone(
    sidecars, limit, gone, at_once, all_s
):
    """How late a burst gets all of an idle engine stands in docs/replicas.md."""
    here = site(engines=1, limit=limit, sidecars=sidecars)
    for one in followers(here)[:gone]:
        here.kill(one.place)
    here.run(12.0)
    assert leader(here).replica.picture().members == sidecars - gone
    for _ in range(2 * limit):
        here.send(leader(here).place, work_s=700.0, budget_s=60.0)
    here.run(0.1)
    assert here.load() == at_once
    here.run(all_s - 0.6)
    assert here.load() < limit
    here.run(1.0)
    assert here.load() == limit
    here.run(600.0)
    assert leader(here).controller.endpoints["e0"].quota is None


@pytest.mark.parametrize(("unseen", "dead"), [(1, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize("held", [0, 1 / 3, 1 / 2])
def test_who_takes_the_part_of_others_and_they_themselves_stay_within_a_limit_whenever_each_has_a_burst(
    unseen, dead, held
):
    """One sees the engine as it was before the rest filled it, and the rest as it was before that one's burst."""
    here = site(engines=1, limit=96, sidecars=2 + unseen + dead)
    gone = [one.place for one in followers(here)[: unseen + dead]]
    corners, rest = gone[:unseen], sorted(set(here.sidecars) - set(gone))
    for place in corners:
        here.net.cut([place], set(here.sidecars) - {place})
        here.store.cut.add(place)
    for place in gone[unseen:]:
        here.kill(place)
    here.run(15.0)
    for _ in range(int(96 * held)):
        here.send(rest[0], work_s=60.0)
    here.run(5.0)
    read_at = [here.sidecars[place].replica.leading.quotas._read_at for place in corners]
    before = [dict(one) for one in read_at]
    here.run_until(lambda: all(one != was for one, was in zip(read_at, before, strict=True)))
    for burst, then_s in ((rest[:1], 0.97), (corners, 10.0)):
        for place in 96 * burst:
            here.send(place, work_s=60.0, budget_s=60.0)
        here.run(then_s)
    assert 94 <= here.engines["e0"].peak <= 96 + unseen


@pytest.mark.parametrize("first", ["the rest", "who is cut off"])
@pytest.mark.parametrize("after_s", [1.0, 3.0, 6.0, 9.0])
def test_somebody_who_joins_while_another_is_cut_off_takes_nothing_of_what_that_one_may_hold(first, after_s):
    """It fills its third of the limit, and does not know that there are four: 104 were at an engine of 96."""
    here = site(engines=1, limit=96)
    corner = followers(here)[0].place
    rest = [*sorted(set(here.sidecars) - {corner}), "s3"]
    here.net.cut([corner], rest)
    here.store.cut.add(corner)
    here.run(3.0)
    here.start("s3")
    here.run(after_s)
    bursts = (rest, [corner]) if first == "the rest" else ([corner], rest)
    for places in bursts:
        for place in 96 * places:
            here.send(place, work_s=60.0, budget_s=60.0)
        here.run(0.05)
    here.run(20.0)
    assert here.load() <= here.engines["e0"].peak <= 96 + 1
    assert here.load() >= 95


@pytest.mark.parametrize(
    ("beat_s", "cut_at", "joins"), [(1.0, 2.0, (3, 4, 5)), (2.0, 5.0, (6, 7, 8)), (1.0, 2.5, (3,))]
)
def test_who_is_cut_off_soon_after_a_start_keeps_the_part_of_those_who_were_there(beat_s, cut_at, joins):
    """Nobody was known for long, so all counted, who came later, too: 124 were at an engine of 96."""
    here = Site(1, engines=1, limit=96, sidecars=2, store_beat_s=beat_s)
    here.run(cut_at)
    places = [f"s{number}" for number in range(2, 2 + len(joins))]
    here.net.cut(["s0"], ["s1", *places])
    here.store.cut.add("s0")
    for place, at in zip(places, joins, strict=True):
        here.run(at - cut_at)
        cut_at = at
        here.start(place)
    here.run(14.0)
    for place in here.sidecars:
        for _ in range(96):
            here.send(place, work_s=60.0, budget_s=60.0)
    here.run(15.0)
    assert 95 <= here.engines["e0"].peak <= 96


def test_who_joins_while_another_is_cut_off_from_the_group_alone_adds_its_part_once_that_one_must_know():
    here = site(engines=1, limit=96)
    corner = followers(here)[0].place
    here.net.cut([corner], [*here.sidecars, "s3"])
    here.run(6.0)
    here.start("s3")
    here.run(4.0)
    quotas = [here.sidecars[place].controller.endpoints["e0"].quota for place in (leader_of_most(here).place, corner)]
    assert quotas == [64, 24]
    here.run(7.0)
    assert leader_of_most(here).controller.endpoints["e0"].quota == 72


def test_who_follows_and_is_not_seen_by_the_store_keeps_nothing_from_its_group_and_its_part_when_it_is_lost():
    here = site(engines=1, limit=24)
    one, books = followers(here)[0], leader(here).controller.endpoints["e0"]
    here.store.cut.add(one.place)
    here.run(20.0)
    assert books.quota is None, "all of it at once"
    here.net.cut([one.place], set(here.sidecars) - {one.place})
    here.run(2.5)
    assert books.quota == 16
    here.net.heal()
    here.run(6.0)
    one.gate.leave()  # it says goodbye
    here.run(1.0)
    assert books.quota is None


def test_a_sidecar_that_died_and_is_back_at_its_place_leaves_no_part_behind():
    here = site(engines=1, limit=24)
    place = followers(here)[0].place
    here.kill(place)
    here.run(1.0)
    here.start(place)
    here.run(12.0)
    fill(here, work_s=1.0)


def test_an_endpoint_that_is_new_stays_closed_until_it_is_known_how_much_of_it_is_ours():
    here = Site(1, sidecars=1, engines=2, limit=8)
    here.store.is_up = False
    here.sidecars.clear()
    alone = here.start("s0")
    alone.gate.remove_endpoints(["e1"])
    for _ in range(20):
        here.send("s0", work_s=30.0)
    here.run(6.0)
    alone.gate.put_endpoint(EndpointSpec("e1", max_running_requests=8))
    here.run(6.0)
    assert [len(engine.holds) for engine in here.engines.values()] == [1, 1]


def test_without_a_word_of_the_store_a_sidecar_sends_one_request_at_a_time_to_an_engine():
    here = Site(1, sidecars=1, engines=2, limit=8)
    here.store.is_up = False
    here.sidecars.clear()
    alone = here.start("s0")
    for _ in range(20):
        here.send("s0", work_s=3.0)
    here.run(6.0)
    assert alone.replica.role is Role.LEADING
    assert [len(engine.holds) for engine in here.engines.values()] == [1, 1]


def test_a_store_that_goes_away_and_comes_back_empty_changes_nothing():
    here = site(engines=1, limit=9)
    here.store.is_up = False
    here.run(20.0)
    fill(here, work_s=1.0)
    here.store.is_up = True
    here.store.restart_empty()
    turns = [dict(one.replica.turns) for one in here.alive]
    here.run(10.0, here.check)
    fill(here, work_s=1.0)
    assert [dict(one.replica.turns) for one in here.alive] == turns
    assert here.engines["e0"].peak == 9


def test_one_that_is_all_there_is_goes_on_where_the_store_goes_away_and_no_engine_has_a_page():
    here = Site(1, engines=1, limit=8)
    here.blind.update(here.sidecars)
    here.run(8.0)
    for one in followers(here):
        one.gate.leave()  # they say goodbye
        here.kill(one.place)
    here.run(8.0)
    here.store.is_up = False
    here.run(10.0)
    for _ in range(20):
        here.send(leader(here).place, work_s=2.0)
    here.run(1.0)
    assert here.load() == 8


def test_whoever_is_gone_all_others_know_it_at_once_and_expect_what_its_envoy_held():
    here = site()
    gone = followers(here)[0]
    here.kill(gone.place)
    here.run(0.05)
    assert [one.losses for one in here.alive] == [1, 1]
    gone = leader(here)
    here.kill(gone.place)
    here.run(0.05)
    assert [one.losses for one in here.alive] == [2]


def test_who_says_goodbye_is_missed_as_much_as_who_dies():
    """With `hand_over`, Envoy sends again what waited there, also to us if it knows us."""
    here = site()
    followers(here)[0].gate.leave()
    here.run(0.05)
    assert leader(here).losses == 1


def test_a_leader_that_resigns_hands_everything_over_and_nobody_waits_longer():
    here = site(engines=1, limit=4)
    old = leader(here)
    fill(here, work_s=3.0)
    waiting = [here.send(place, work_s=0.1) for place in here.sidecars]
    here.run(0.05)
    old.replica.resign()
    here.run(1.0, here.check)
    assert old.replica.role is Role.FOLLOWING
    assert here.is_one_group()
    here.run(5.0, here.check)
    assert [one.dispatches for one in waiting] == [1, 1, 1]
    assert here.engines["e0"].peak == 4


def test_a_client_that_leaves_while_its_grant_is_on_the_way_leaves_no_lease_behind():
    here = site(engines=1, limit=1)
    follower = followers(here)[0]
    here.net.delay_s = (0.1, 0.1)
    gone = here.send(follower.place)
    here.run(0.15)  # the leader has decided; its grant is on the way
    assert leader(here).controller.endpoints["e0"].leases
    here.hang_up(gone)
    here.run(1.0, here.check)
    assert gone.dispatches == 0
    assert not leader(here).controller.endpoints["e0"].leases


def test_an_endpoint_that_one_sidecars_envoy_does_not_know_is_not_used_and_then_that_sidecar_is_on_its_own(caplog):
    here = site(engines=2, limit=4)
    poor = followers(here)[0]
    poor.gate.remove_endpoints(["e1"])
    here.run(0.5)
    asked = [here.send(leader(here).place, work_s=1.0) for _ in range(4)]
    here.run(0.1)
    assert [one.dispatches for one in asked] == [1, 1, 1, 1]
    assert not here.engines["e1"].holds
    here.run(15.0)
    assert poor.replica.role is Role.LEADING
    assert "e1" in (poor.replica.refused or "")
    turns = dict(poor.replica.turns)
    for _ in range(10):  # and it stays so, however often that one asks again
        here.send(leader_of_most(here).place, work_s=1.0)
        here.send(leader_of_most(here).place, work_s=1.0)
        here.run(0.5)
        assert here.engines["e1"].holds
        here.run(2.0)
    assert poor.replica.turns == turns, "it led anew once a second, and what waited with it began to wait anew"
    assert sum("does not have us" in record.message for record in caplog.records) == 1
    poor.gate.put_endpoint(EndpointSpec("e1", max_running_requests=4))
    here.run(12.0, here.check)
    assert here.is_one_group()


def test_an_endpoint_that_is_gone_everywhere_may_finish_its_answers_without_anybody_being_sent_away():
    here = site(engines=2, limit=4)
    for _ in range(6):
        here.send(leader(here).place, work_s=30.0)
    here.run(0.1)
    for one in here.alive:
        one.gate.remove_endpoints(["e1"])
    turns = [dict(one.replica.turns) for one in here.alive]
    here.run(20.0)
    assert here.engines["e1"].holds
    assert [dict(one.replica.turns) for one in here.alive] == turns


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (Hello(VERSION + 1, "pool", Member("x", "s1", 9), None, 0, 1, frozenset()), "version"),
        (Hello(VERSION, "pool", Member("x", "s1", 9), None, 0, 1, frozenset()), "purpose"),
        (Hello(VERSION, "lake", Member("x", "s1", 9), Purpose.FOLLOW, 0, 1, frozenset()), "pool"),
    ],
)
def test_who_comes_for_what_we_dont_know_is_told_why_he_is_sent_away(hello, why):
    here = site(engines=1)
    heard: list[Any] = []
    here.sidecars["s1"].replica._network.dial(leader(here).place, heard.append, lambda: None).send(hello)
    here.run(0.1)
    (said,) = heard
    assert isinstance(said, Refuse)
    assert why in said.why


def test_who_comes_back_at_the_same_address_does_not_wait_for_itself_nor_follow_itself(caplog):
    """The store still lists its life before, there: what it says to that one it says to itself."""
    caplog.set_level(logging.INFO, "extproc.replicas")
    here = site(sidecars=2)
    gone = followers(here)[0]
    here.kill(gone.place)
    again = here.start(gone.place)
    here.run_until(lambda: again.replica.role is Role.FOLLOWING and gone.replica.me.id in again.replica.census.members)
    here.kill(leader(here).place)
    at = here.clock.now
    here.run_until(lambda: again.replica.role is Role.LEADING)
    assert here.clock.now - at < 0.1
    here.run(8.0)
    me = again.replica.me
    assert f"{me}: {me} follows" not in caplog.messages


def test_a_leader_that_many_have_asked_keeps_nothing_of_them():
    here = site(engines=1)
    before = gc_count(Guest)
    for _ in range(200):
        here.sidecars["s1"].replica._network.dial(leader(here).place, lambda _: None, lambda: None).send(
            Hello(VERSION, "pool", Member("x", "s1", 9), Purpose.MEET, 0, 1, frozenset())
        )
        here.run(0.01)
    here.net.heal()
    assert gc_count(Guest) <= before + 1


def gc_count(kind: type) -> int:
    gc.collect()
    return sum(isinstance(one, kind) for one in gc.get_objects())


def leader_of_most(here: Site) -> Sidecar:
    return max(here.leaders(), key=lambda one: one.replica.picture().group)


@pytest.mark.parametrize(
    ("seed", "sidecars", "limit", "reloads"), [(1, 5, 8, False), (2, 5, 8, True), (3, 3, 24, False), (29, 3, 24, True)]
)
def test_a_storm_of_faults_breaks_no_promise(seed, sidecars, limit, reloads):
    """A slice of `make storm-replicas`."""
    here = storm(seed, 60_000, sidecars=sidecars, limit=limit, reloads=reloads)
    assert here.outcomes["done"] > 1000


def test_every_line_of_the_log_says_who_writes_it_and_whom_it_is_about_with_their_addresses(caplog):
    """Who is on call reads the logs of three sidecars side by side."""
    caplog.set_level(logging.INFO, "extproc.replicas")
    storm(1, 20_000, sidecars=3, limit=24, reloads=True)
    here = site()
    lost = leader(here)
    here.net.cut([lost.place], [one.place for one in followers(here)])
    here.run(3.0)
    here.net.heal()
    here.run_until(here.is_one_group)
    here.kill(leader(here).place)
    here.run(3.0)
    lines = [record for record in caplog.records if record.name == "extproc.replicas"]
    whom = Counter[str]()
    for record in lines:
        said = re.fullmatch(r"(s\d\.\d+) at (s\d): (.*)", record.getMessage())
        assert said is not None
        assert record.about == {"sidecar": said[1], "sidecar_address": said[2]}
        assert not re.search(r"s\d\.\d+\b(?! at s\d)", said[3])
        whom[re.sub(r"s\d\.\d+ at s\d", "X", said[3]).split(",")[0]] += 1
    assert {"X follows", "following X", "the leader X is gone", "X is silent: leading without it"} <= whom.keys()


def test_a_storm_sees_an_engine_above_its_limit_though_a_gate_takes_what_is_raised_there_for_an_observers_fault():
    here = Storm(1, sidecars=1, engines=1, limit=2)
    here.run(6.0)
    here.engines["e0"].limit = -2
    here.send("s0", work_s=1.0)
    with pytest.raises(BrokenError, match="over the limit by 3 at e0"):
        here.run(1.0)
