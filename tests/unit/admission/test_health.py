"""Who is sent requests, judged by answers: what one endpoint refuses while its peers serve it, and what all refuse."""

from __future__ import annotations

import pytest

from extproc.admission.health import Health
from extproc.admission.laws import LAWS
from extproc.admission.streak import USUAL_S, Tally
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Request

from .ward import CLIENTS_MAYBE, MANY, REFUSALS, Ward

EJECT_AFTER = LAWS.health.eject_after
STEP_MAX_S = LAWS.health.step_most_s

# ---- one refuses, its peers serve


@pytest.mark.parametrize("answer", REFUSALS)
def test_who_refuses_whatever_its_peers_serve_is_left_out_after_a_few(answer: Answer) -> None:
    ward = Ward("abc")
    cost = ward.refuse_until_out("a", answer, peers="bc")
    assert EJECT_AFTER <= cost <= 2 * EJECT_AFTER
    assert not ward.answer("a", Answer.OK)
    assert ward.core.endpoints["a"].condition == "ejected after failures"
    assert ward.health("a").refusals == cost, "in a row"


@pytest.mark.parametrize("answer", REFUSALS)
def test_also_one_that_never_answered_well(answer: Answer) -> None:
    ward = Ward(known=False)
    assert ward.refuse_until_out("a", answer) <= 2 * EJECT_AFTER


@pytest.mark.parametrize("answer", REFUSALS)
def test_also_one_that_passes_its_health_checks(answer: Answer) -> None:
    ward = Ward(known=False)
    ward.set_up("a", is_up=True)
    assert ward.refuse_until_out("a", answer) <= 2 * EJECT_AFTER
    ward.set_up("a", is_up=True)
    assert ward.is_ejected("a")


def test_a_good_answer_between_refusals_starts_the_count_again() -> None:
    ward = Ward()
    for _ in range(20):
        ward.serve("b", 5)
        assert ward.answer("a", Answer.FAILED, EJECT_AFTER - 1) == EJECT_AFTER - 1
        ward.serve("a")
    assert not ward.is_ejected("a")


def test_neither_a_client_that_left_nor_nobody_knows_what_is_a_refusal() -> None:
    ward = Ward()
    for _ in range(50):
        ward.serve("b")
        assert ward.answer("a", Answer.UNKNOWN) == 1
    assert not ward.is_ejected("a")


def test_an_answer_that_began_well_is_no_refusal_however_it_ends() -> None:
    ward = Ward()
    for _ in range(50):
        ward.serve("b")
        ticket = ward.ask("a")
        ward.answered(ticket)
        ward.release(ticket, Answer.FAILED)
    assert not ward.is_ejected("a")


# ---- what all refuse


@pytest.mark.parametrize("answer", CLIENTS_MAYBE)
@pytest.mark.parametrize("names", ["a", "ab", "abcd"])
def test_a_clients_own_mistake_puts_nobody_out_and_holds_nobody_back(answer: Answer, names: str) -> None:
    ward = Ward(names)
    for _ in range(300):
        for name in names:
            ticket = ward.ask(name)
            if ticket.state is State.LEASED:
                ward.release(ticket, answer)
            else:
                ward.cancel(ticket)
            assert not ward.is_ejected(name)
    assert all(len(ward.burst(name)) >= 64 for name in names)


@pytest.mark.parametrize("every", [2, 3, 10])
def test_mistakes_among_good_requests_put_nobody_out(every: int) -> None:
    ward = Ward("abc")
    for number in range(600):
        for name in "abc":
            ward.answer(name, Answer.REFUSED if (number * 7 + ord(name)) % every else Answer.OK)
            assert not ward.is_ejected(name)


@pytest.mark.parametrize("answer", REFUSALS)
def test_an_outage_that_all_share_ejects_none(answer: Answer) -> None:
    ward = Ward("abcd")
    for _ in range(20):
        for name in "abcd":
            ward.serve(name)
    for _ in range(200):
        for name in "abcd":
            ward.answer(name, answer)
            assert not ward.is_ejected(name)
        ward.advance(0.02)


def test_after_a_blink_all_serve_again_within_a_step_as_long_as_the_blink() -> None:
    ward = Ward("abc")
    for _ in range(50):  # half a second
        for name in "abc":
            ward.answer(name, Answer.FAILED)
        ward.advance(0.01)
    ward.advance(0.5)
    for name in "abc":
        ward.serve(name)
        assert len(ward.burst(name)) == 64


def test_the_last_one_of_a_pool_stays_and_is_tried_a_request_at_a_time() -> None:
    ward = Ward("a")
    assert ward.answer("a", Answer.FAILED, MANY) == EJECT_AFTER
    assert not ward.is_ejected("a")
    ward.advance(10.0)
    assert ward.answer("a", Answer.FAILED, MANY) == 1
    ward.advance(STEP_MAX_S)
    ward.serve("a")
    assert len(ward.burst("a")) == 64


@pytest.mark.parametrize("names", ["a", "ab"])
def test_a_pool_that_is_dead_altogether_says_so_until_it_serves(names: str) -> None:
    ward = Ward(names)
    for _ in range(20):
        for name in names:
            ward.answer(name, Answer.FAILED)
        ward.advance(STEP_MAX_S)
    assert [ward.health(name).condition for name in names] == ["failing"] * len(names)
    assert all(ward.core.endpoints[name].available for name in names)  # and is tried
    ward.serve("a")
    assert ward.health("a").condition == "up"


@pytest.mark.parametrize("peers_fail", [True, False])
def test_one_that_failed_and_refuses_what_may_be_to_blame_fails_no_more(peers_fail: bool) -> None:
    ward = Ward("ab")
    for _ in range(EJECT_AFTER):
        for name in "ab" if peers_fail else "a":
            ward.answer(name, Answer.FAILED)
        ward.advance(STEP_MAX_S)
    assert ward.health("a").condition == "failing"
    assert ward.answer("a", Answer.REFUSED) == 1
    assert ward.health("a").condition == "up"
    assert len(ward.burst("a")) == (64 if peers_fail else 0), "if they did, it was as good as they are"


def test_one_that_is_left_out_as_its_peers_serve_again_fails_no_more() -> None:
    ward = Ward("ab")
    for _ in range(20):
        for name in "ab":
            ward.answer(name, Answer.FAILED)
        ward.advance(STEP_MAX_S)
    ward.refuse_until_out("a", Answer.FAILED)
    assert not ward.health("a").is_failing


def test_what_one_refused_in_pools_that_are_gone_is_forgotten() -> None:
    health, now = Health(), 0.0
    for _ in range(100):
        health.refused(Ticket(Request("r", now)), Tally(), now, is_own_fault=False, has_peers=True)
        health.answered(now)
        now += USUAL_S
    assert len(health._streaks) <= 3


def test_a_clients_own_mistakes_make_nobody_failing() -> None:
    ward = Ward("ab")
    for _ in range(20):
        for name in "ab":
            ward.answer(name, Answer.REFUSED)
    assert {ward.health(name).condition for name in "ab"} == {"up"}


def test_what_one_refuses_beside_another_that_fails_holds_nobody_back() -> None:
    """With nobody better to compare it with the requests may be to blame."""
    ward = Ward("ab")
    ward.answer("b", Answer.FAILED, EJECT_AFTER)
    assert ward.health("b").condition == "failing"
    ward.answer("a", Answer.REFUSED, 4 * EJECT_AFTER)
    assert len(ward.burst("a")) == 64


def test_however_long_an_outage_lasts_its_end_is_seen_within_a_second() -> None:
    ward = Ward("a")
    for _ in range(100):
        ward.answer("a", Answer.FAILED)
        ward.advance(STEP_MAX_S)
    ward.serve("a")


def test_when_the_others_go_down_an_ejected_one_is_tried_again_at_once() -> None:
    ward = Ward()
    ward.refuse_until_out("a", Answer.FAILED)
    ward.set_up("b", is_up=False)
    assert not ward.is_ejected("a")
    ward.serve("a")


def test_the_only_one_of_another_model_is_tried_on_where_its_peers_eject_it() -> None:
    ward = Ward("")
    ward.put(EndpointSpec("a", models=frozenset("mx"), max_running_requests=64))
    ward.put(EndpointSpec("b", models=frozenset("m"), max_running_requests=64))
    waits = None
    for _ in range(4 * EJECT_AFTER):
        for name, answer in (("b", Answer.OK), ("a", Answer.FAILED)):
            ticket = ward.ask(name, "m")
            if ticket.state is State.LEASED:
                ward.release(ticket, answer)
            else:
                ward.cancel(ticket)
        ward.advance(STEP_MAX_S)
    waits = ward.ask("a", "x")
    ward.advance(STEP_MAX_S)
    assert waits.state is State.LEASED
