"""A gateway that lets another endpoint answer than the one picked: every sidecar's books follow, whoever leads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Request

from .test_group import followers, leader, site
from .test_handed_over import killed, resigned

if TYPE_CHECKING:
    from .sidecar import Sidecar
    from .site import Site


def pick(here: Site, one: Sidecar, name: str = "e0") -> Ticket:
    """Have a request of `one` be sent to the endpoint called so."""
    ticket = Ticket(Request("asked", here.clock.now, allowed=frozenset({name})), lambda _: None)
    one.gate.offer(ticket)
    here.run(0.1)
    assert ticket.state is State.LEASED
    return ticket


def leased(one: Sidecar) -> dict[str, int]:
    return {name: endpoint.sequences for name, endpoint in one.controller.endpoints.items() if endpoint.sequences}


def test_a_followers_request_that_another_endpoint_answers_is_counted_there_by_the_leader():
    here = site(limit=1)
    ticket = pick(here, followers(here)[0])
    followers(here)[0].gate.move(ticket, "e1")
    here.run(0.1)
    assert leased(leader(here)) == leased(followers(here)[0]) == {"e1": 1}
    followers(here)[0].gate.close(ticket, Answer.OK)
    here.run(0.1)
    assert leased(leader(here)) == leased(followers(here)[0]) == {}


def test_the_endpoint_that_a_gateway_found_dead_has_failed_in_the_leaders_eyes_too():
    here = site()
    for _ in range(20):
        ticket = pick(here, followers(here)[0])
        followers(here)[0].gate.move(ticket, "e1")
        followers(here)[0].gate.close(ticket, Answer.OK)
        here.run(0.1)
        if leader(here).controller.endpoints["e0"].health.is_doubted:
            return
    pytest.fail("the leader still trusts it")


def test_an_answer_from_an_endpoint_that_nobody_knows_ends_the_lease_at_the_leader_and_the_release_changes_nothing():
    here = site()
    one = followers(here)[0]
    ticket = pick(here, one)
    one.gate.move(ticket, "")
    here.run(0.1)
    assert leased(leader(here)) == leased(one) == {}
    one.gate.move(ticket, "")
    one.gate.first_token(ticket)
    one.gate.close(ticket, Answer.OK)
    here.run(0.1)
    assert leased(leader(here)) == leased(one) == {}
    assert leader(here).replica.forwarded == 0


@pytest.mark.parametrize("end", [killed, resigned])
def test_the_next_leader_counts_a_request_where_it_is_now(end):
    here = site()
    one = followers(here)[-1]
    ticket = pick(here, one)
    old = leader(here)
    end(here, old)
    one.gate.move(ticket, "e1")  # the old one hears no more of it, or hands over just now
    here.run(6.0)
    (new,) = here.leaders()
    assert new is not old
    assert leased(new) == {"e1": 1}


def test_a_request_that_moved_while_its_sidecar_was_cut_off_is_counted_where_it_is_by_the_group_it_comes_back_to():
    here = site()
    one = followers(here)[0]
    ticket = pick(here, one)
    here.net.cut([one.place], list(here.sidecars))
    one.gate.move(ticket, "e1")
    here.run(8.0)
    here.net.heal()
    here.run_until(here.is_one_group, 10.0)
    here.run(1.0)
    assert leased(leader(here)) == {"e1": 1}
