"""What a change of the leader leaves as it was: shares, classes, session homes, and what was learned of tokens."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from extproc.admission.estimate import Learnt
from extproc.admission.sessions import Home
from extproc.admission.values import RequestClass
from extproc.replicas.messages import Remember, Synced
from extproc.simulate.network import End
from extproc.stream.by_age import ByAge

from .test_group import followers, leader, site

if TYPE_CHECKING:
    from extproc.replicas.messages import Message

    from .sidecar import Client, Sidecar
    from .site import Site


def killed(here: Site, one: Sidecar) -> None:
    here.kill(one.place)


def resigned(_: Site, one: Sidecar) -> None:
    one.replica.resign()


over_ends = pytest.mark.parametrize("end", [killed, resigned])


def order_of(here: Site, clients: list[Client]) -> list[Client]:
    """The order in which these go to an engine."""
    order: list[Client] = []
    here.run(60.0, lambda: order.extend(one for one in clients if one.dispatches and one not in order))
    return order


@over_ends
def test_a_noisy_tenant_has_no_more_of_the_line_under_a_new_leader(end):
    """What a tenant owes is what it has waiting: that is tagged anew, in order of age."""
    here = site(engines=1, limit=1)
    first, second = (one.place for one in followers(here))
    here.send(first, work_s=4.0)
    here.run(0.1)
    noisy = [here.send(first, work_s=0.5, budget_s=60.0, tenant="noisy") for _ in range(12)]
    here.run(0.1)
    quiet = [here.send(second, work_s=0.5, budget_s=60.0, tenant="quiet") for _ in range(4)]
    here.run(0.1)
    end(here, leader(here))
    order = order_of(here, noisy + quiet)
    assert len(order) == 16
    assert set(quiet) <= set(order[:9])


@over_ends
def test_the_urgent_go_first_under_a_new_leader_too(end):
    here = site(engines=1, limit=1)
    for sidecar in here.sidecars.values():
        sidecar.gate.set_policy(here.policy.__class__(classes=(RequestClass("std"), RequestClass("urgent", 10))))
    first, second = (one.place for one in followers(here))
    here.send(first, work_s=4.0)
    here.run(0.1)
    std = [here.send(first, work_s=0.5, budget_s=60.0, request_class="std") for _ in range(4)]
    here.run(0.1)
    urgent = [here.send(second, work_s=0.5, budget_s=60.0, request_class="urgent") for _ in range(4)]
    here.run(0.1)
    end(here, leader(here))
    assert set(order_of(here, std + urgent)[:4]) == set(urgent)


def serve_session(here: Site, place: str, session: str) -> str:
    """Let a request of `session` run and end; return where."""
    client = here.send(place, work_s=0.2, session=session)
    here.run(0.1)
    (where,) = (name for name, engine in here.engines.items() if client in engine.holds)
    here.run(0.5)
    return where


@over_ends
def test_a_session_stays_at_home_under_a_new_leader_whoever_its_client_asked(end):
    here = site(engines=4, limit=4)
    places = [one.place for one in (leader(here), *followers(here))]
    homes = {f"session-{n}": serve_session(here, places[n % 3], f"session-{n}") for n in range(8)}
    assert len(set(homes.values())) == 4
    end(here, leader(here))
    here.run(5.0)
    found = {session: serve_session(here, places[1], session) for session in homes}
    assert found == homes


def heir_of(here: Site) -> Sidecar:
    return min(followers(here), key=lambda one: (one.replica.me.joined, one.replica.me.id))


def test_homes_outlive_the_heir_who_was_told_of_them_and_then_the_leader():
    here = site(engines=4, limit=4)
    homes = {f"session-{n}": serve_session(here, leader(here).place, f"session-{n}") for n in range(8)}
    killed(here, heir_of(here))
    here.run(5.0)
    killed(here, leader(here))
    here.run(5.0)
    (last,) = here.leaders()
    assert {session: serve_session(here, last.place, session) for session in homes} == homes


def remember(sidecar: Sidecar, count: int) -> dict[str, str]:
    """Have it know homes of so many sessions; return them."""
    homes = {f"old-{number}": f"e{number % 3}" for number in range(count)}
    for session, endpoint in homes.items():
        sidecar.controller.believe_home(Home(session, endpoint, 100, 0.0), sidecar.site.clock.now)
    return homes


def homes_of(sidecar: Sidecar) -> dict[str, str]:
    return {home.session: home.endpoint for home in sidecar.controller.homes(9999, sidecar.site.clock.now)}


def per_turn(sent: list[tuple[int, Message]]) -> list[int]:
    """How many homes were told in each turn of the loop."""
    return list(Counter(turn for turn, message in sent if isinstance(message, Remember)).values())


def listen(here: Site, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Message]]:
    """All that is sent from now on, and in which event of the site."""
    sent: list[tuple[int, Message]] = []
    send = End.send

    def note(end: End, message: Message) -> None:
        sent.append((here.clock.events, message))
        send(end, message)

    monkeypatch.setattr(End, "send", note)
    return sent


def test_the_heir_is_told_everything_in_pieces_and_what_it_hears_meanwhile_is_newer(monkeypatch):
    here = site()
    old = remember(leader(here), 1000)
    sent = listen(here, monkeypatch)
    here.kill(heir_of(here).place)
    here.run_until(lambda: bool(per_turn(sent)), 5.0)
    teller, heir = leader(here), heir_of(here)
    here.stop(teller.place)
    here.run(0.2)
    heir.controller.believe_home(Home("old-0", "e1", 100, 0.0), here.clock.now)
    here.run(0.3)
    here.resume(teller.place)
    here.run(1.0)
    assert per_turn(sent) == [200] * 5
    assert homes_of(heir) == old | {"old-0": "e1"}


def test_an_heir_who_is_none_any_more_is_told_nothing_more(monkeypatch):
    here = site()
    remember(leader(here), 1000)
    sent = listen(here, monkeypatch)
    here.kill(heir_of(here).place)
    here.run_until(lambda: bool(per_turn(sent)), 5.0)
    leader(here).replica.leading.end(None, ByAge(), lambda: None)
    here.run(0.5)
    assert per_turn(sent) == [200]


def test_who_comes_to_a_leader_tells_its_homes_in_pieces_and_only_then_that_this_is_all(monkeypatch):
    """Until then the leader decides nothing of what waits: it would not go home."""
    here = site()
    one = followers(here)[-1]
    old = remember(one, 1000)
    sent = listen(here, monkeypatch)
    here.kill(leader(here).place)
    here.run(5.0)
    assert per_turn(sent) == [200] * 5
    kinds = [type(message) for _, message in sent]
    assert kinds.index(Synced) == max(n for n, kind in enumerate(kinds) if kind is Remember) + 1
    assert homes_of(leader(here)) == old


def test_who_loses_a_leader_tells_it_nothing_more(monkeypatch):
    here = site()
    one = followers(here)[-1]
    remember(one, 1000)
    sent = listen(here, monkeypatch)
    here.kill(leader(here).place)
    here.run_until(lambda: bool(per_turn(sent)), 5.0)
    one.replica.following.end()
    here.run(0.5)
    assert per_turn(sent) == [200]


def test_of_two_words_about_a_session_the_newer_counts_and_no_endpoint_that_is_not_known_here():
    here = site(engines=2)
    controller, now = leader(here).controller, here.clock.now
    for endpoint, age_s in (("e0", 5.0), ("e1", 9.0), ("nowhere", 1.0)):
        controller.believe_home(Home("s", endpoint, 100, age_s), now)
    assert [home.endpoint for home in controller.homes(9, now)] == ["e0"]
    controller.believe_home(Home("s", "e1", 100, 1.0), now)
    assert controller.homes(9, now) == [Home("s", "e1", 100, 1.0)]


@over_ends
def test_what_was_learned_of_prompts_and_answers_is_known_to_the_next_leader(end):
    here = site()
    lessons = [
        Learnt("mean", None, "", 0, 912.0, 0.0),
        Learnt("all", None, "", 0, 850.0, 150.0),
        Learnt("answers", "llama", "std", 0, 700.0, 40.0),
        Learnt("scale", "llama", "text", 11, 0.4, 0.02),
    ]
    old = leader(here)
    for lesson in lessons:
        old.controller.believe(lesson)
    here.run(6.0 if end is killed else 0.0)
    end(here, old)
    here.run(5.0)
    (new,) = here.leaders()
    assert new is not old
    assert set(lessons) <= set(new.controller.learnt())


@pytest.mark.parametrize("value", [-1.0, 0.0, 1e30])
@pytest.mark.parametrize("what", ["mean", "all", "answers", "scale", "something new"])
def test_what_another_core_says_it_learned_is_believed_within_what_can_be_true(what, value):
    here = site()
    controller = leader(here).controller
    controller.believe(Learnt(what, "llama", "std", 3, value, value))
    for learnt in controller.learnt():
        assert 0.0 <= learnt.value <= 32_768
    client = here.send("s0", work_s=0.5)
    here.run(2.0, here.check)
    assert client.dispatches == 1
