"""Who is tried, and how carefully: one that was left out, one that nobody knows yet, one that was silent for long."""

from __future__ import annotations

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.ticket import State
from extproc.admission.values import Answer, EndpointSpec, Request

from .ward import MANY, Ward, out

EJECT_AFTER = LAWS.health.eject_after
EJECT_MAX_S = LAWS.health.eject_most_s
EJECT_S = LAWS.health.eject_s
FEW = LAWS.health.few
QUIET_S = LAWS.health.quiet_s
STEP_MAX_S = LAWS.health.step_most_s
STEP_S = LAWS.health.step_s


@pytest.mark.parametrize("name", ["a", "b"])
def test_an_endpoint_that_comes_or_goes_ends_nobodys_ejection(name: str) -> None:
    """It ended that of the first of them: none was counted as usable yet when it was asked whether any was left."""
    ward = Ward("abc")
    ward.refuse_until_out(name, Answer.FAILED, peers="c")
    ward.put(EndpointSpec("d", models=frozenset("m"), max_running_requests=64))
    ward.remove("c")
    assert ward.is_ejected(name)


def test_each_ejection_lasts_longer_up_to_a_bound_and_a_good_answer_forgives() -> None:
    ward, lasted = Ward(), []
    out(ward)
    for _ in range(6):
        lasted.append(ward.health("a").ejected_until - ward.now)
        ward.advance(lasted[-1])
        assert ward.answer("a", Answer.FAILED, 2) == 1, "one failed trial is enough"
    assert lasted == pytest.approx([EJECT_S, 2 * EJECT_S, 4 * EJECT_S, 8 * EJECT_S, EJECT_MAX_S, EJECT_MAX_S])
    ward.advance(EJECT_MAX_S)
    ward.serve("a")
    out(ward)
    assert ward.health("a").ejected_until - ward.now == pytest.approx(EJECT_S)


def test_one_that_fails_more_trials_than_a_float_has_powers_of_two_is_left_out_as_long_as_any() -> None:
    ward = Ward()
    out(ward)
    for _ in range(1100):
        ward.advance(EJECT_MAX_S)
        assert ward.answer("a", Answer.FAILED) == 1
    assert ward.health("a").ejections == 1101
    assert ward.health("a").ejected_until - ward.now == EJECT_MAX_S


def test_a_trial_ends_with_the_head_of_its_answer_not_with_its_end() -> None:
    ward = Ward()
    out(ward)
    ward.advance(EJECT_S)
    (trial,) = ward.burst("a")
    ward.answered(trial)
    assert len(ward.burst("a")) == 63


def test_a_trial_ends_with_its_first_token() -> None:
    ward = Ward()
    out(ward)
    ward.advance(EJECT_S)
    (trial,) = ward.burst("a")
    ward.first_token(trial)
    assert len(ward.burst("a")) == 63


def test_a_trial_that_is_silent_and_not_refused_lets_twice_as_many_follow_in_each_step() -> None:
    """An answer that does not stream shows nothing for a minute: the endpoint must not stand idle for it."""
    ward = Ward()
    out(ward)
    ward.advance(EJECT_S)
    counts = []
    for _ in range(7):
        counts.append(len(ward.burst("a")))
        ward.advance(STEP_S)
    assert counts == [1, 2, 4, 8, 16, 32, 1]  # 64 in all


def test_answers_from_before_an_ejection_say_nothing_of_the_trial() -> None:
    ward = Ward()
    old = ward.burst("a", 10)
    out(ward)
    until = ward.health("a").ejected_until
    for ticket in old[:5]:
        ward.release(ticket, Answer.FAILED)
    assert (ward.health("a").ejected_until, ward.health("a").ejections) == (until, 1)
    ward.advance(EJECT_S)
    for ticket in old[5:]:
        ward.release(ticket, Answer.FAILED)
    assert not ward.is_ejected("a")
    ward.serve("a")


# ---- unknown


def test_one_that_never_answered_gets_a_few_at_a_time_and_a_dead_one_costs_no_more() -> None:
    ward = Ward(known=False)
    ward.serve("b")
    first = ward.burst("a")
    assert len(first) == FEW
    for ticket in first:
        ward.release(ticket, Answer.FAILED)
    assert not ward.burst("a")
    ward.advance(STEP_S)
    assert len(ward.burst("a")) == 1
    assert FEW + 1 == EJECT_AFTER


def test_a_cold_pool_opens_with_the_first_heads() -> None:
    ward = Ward("abc", known=False)
    first = [ward.burst(name) for name in "abc"]
    for tickets in first:
        ward.answered(tickets[0])
    assert [len(ward.burst(name)) for name in "abc"] == [60, 60, 60]


def test_a_cold_endpoint_whose_answers_show_nothing_is_full_within_half_a_second() -> None:
    ward = Ward("a", known=False)
    for _ in range(5):
        ward.burst("a")
        ward.advance(STEP_S)
    assert len(ward.core.endpoints["a"].leases) == 64


@pytest.mark.parametrize(
    ("quiet_s", "page", "is_checked", "sent"),
    [
        (QUIET_S + 0.1, False, False, FEW),  # it may have died: a burst would find that out at once
        (QUIET_S - 0.1, False, False, 64),
        (QUIET_S + 0.1, True, False, 64),
        (QUIET_S + 0.1, False, True, 64),
    ],
)
def test_an_idle_one_that_was_silent_for_long_gets_a_few_until_it_is_heard(
    quiet_s: float, page: bool, is_checked: bool, sent: int
) -> None:
    ward = Ward("a", known=is_checked)
    ward.serve("a")
    ward.advance(quiet_s)
    if page:
        ward.observe("a", Load(running=0.0))
    there = ward.burst("a")
    assert len(there) == sent
    ward.answered(there[0])
    assert len(there) + len(ward.burst("a")) == 64


def test_one_that_died_in_a_quiet_time_costs_a_burst_a_few() -> None:
    ward = Ward("ab", known=False)
    for name in "ab":
        ward.serve(name)
    ward.advance(60.0)
    dead = ward.burst("a")
    for ticket in dead:
        ward.release(ticket, Answer.FAILED)
    assert len(dead) == FEW
    assert ward.burst("a") == []


def test_a_passed_check_ends_that_it_is_unknown() -> None:
    ward = Ward("a", known=False)
    assert ward.core.endpoints["a"].condition == "unknown"
    ward.set_up("a", is_up=True)
    assert ward.core.endpoints["a"].condition == "up"
    assert len(ward.burst("a")) == 64


def test_a_passed_check_does_not_clear_one_that_refuses() -> None:
    ward = Ward(known=False)
    for ticket in ward.burst("a"):
        ward.release(ticket, Answer.FAILED)
    ward.set_up("a", is_up=True)
    assert not ward.burst("a")


def test_one_at_a_new_address_is_unknown_again() -> None:
    ward = Ward()
    out(ward)
    ward.set_up("a", is_up=None)
    assert ward.core.endpoints["a"].condition == "unknown"
    assert len(ward.burst("a")) == FEW


def test_a_lone_one_that_refuses_is_known_to_speak() -> None:
    ward = Ward("a", known=False)
    ward.answer("a", Answer.REFUSED)
    assert ward.core.endpoints["a"].condition == "up"
    assert len(ward.burst("a")) == 64


def test_one_that_refuses_connections_and_then_speaks_fails_no_more() -> None:
    ward = Ward("a")
    ward.answer("a", Answer.FAILED, MANY)
    assert ward.health("a").condition == "failing"
    ward.advance(STEP_S)
    ward.answer("a", Answer.REFUSED)
    assert ward.health("a").condition == "up"
    assert len(ward.burst("a")) == 64


def test_what_one_refused_while_it_was_alone_is_in_no_row_with_what_it_refuses_beside_others() -> None:
    ward = Ward("ab")
    ward.answer("a", Answer.REFUSED, EJECT_AFTER - 1)
    ward.set_up("b", is_up=False)
    ward.answer("a", Answer.REFUSED)
    ward.set_up("b", is_up=True)
    ward.serve("b", 20)
    assert ward.answer("a", Answer.REFUSED, EJECT_AFTER - 1) == EJECT_AFTER - 1
    assert len(ward.burst("a")) == 64


def test_after_an_outage_one_whose_answers_show_nothing_is_full_within_half_a_second_of_its_first_quiet_step() -> None:
    ward = Ward("a")
    for _ in range(20):
        ward.answer("a", Answer.FAILED)
        ward.advance(STEP_MAX_S)
    ward.burst("a")
    ward.advance(STEP_MAX_S)
    for _ in range(6):
        ward.burst("a")
        ward.advance(STEP_S)
    assert len(ward.core.endpoints["a"].leases) == 64


def refuse_some(ward: Ward, names: str, bad: int, lasts_s: float) -> None:
    """Have these refuse so many of ten requests."""
    for number in range(round(10 * lasts_s)):
        for name in names:
            ward.answer(name, Answer.REFUSED if number * 7 % 10 < bad else Answer.OK)
        ward.advance(0.1)


def test_one_that_nobody_knows_gets_a_few_at_a_time_where_some_are_refused_all_day() -> None:
    """A refusal was as good as an answer there: one that fails everything got 55 to 72 of a line."""
    ward = Ward("b")
    refuse_some(ward, "b", 1, 30.0)
    ward.put(EndpointSpec("a", max_running_requests=64))
    assert ward.answer("a", Answer.REFUSED) == 1
    assert len(ward.burst("a")) == FEW - 1


def test_one_on_trial_gets_one_where_more_is_refused_than_when_it_was_left_out() -> None:
    ward = Ward("ab")
    ward.refuse_until_out("a", Answer.REFUSED)
    refuse_some(ward, "b", 8, EJECT_S + 0.1)
    assert ward.core.endpoints["a"].condition == "on trial"
    assert ward.answer("a", Answer.REFUSED) == 1
    assert ward.burst("a") == []


def test_who_nobody_knows_is_filled_where_all_refuse_what_comes() -> None:
    """One client's bad requests are the first that come."""
    ward = Ward("ab", known=False)
    for _ in range(20):
        for name in "ab":
            ward.answer(name, Answer.REFUSED, 4)
        ward.advance(STEP_S)
    assert all(len(ward.burst(name)) >= 32 for name in "ab")


def waiting_for_its_check(*served: str) -> Ward:
    """ "a" is up and serves what is `served`, "x" is up and serves another model, "new" comes and serves m and n."""
    ward = Ward("")
    for name, models in (("a", served), ("x", ("other",))):
        ward.put(EndpointSpec(name, models=frozenset(models), max_running_requests=64))
        ward.set_up(name, is_up=True)
    ward.put(EndpointSpec("new", models=frozenset("mn"), max_running_requests=64, awaits_check=True))
    return ward


def test_one_that_comes_beside_others_gets_nothing_before_its_first_check_and_then_a_few() -> None:
    ward = waiting_for_its_check("m", "n")
    assert ward.core.endpoints["new"].condition == "down"
    ward.set_up("new", is_up=True)
    assert sum(ward.ask("new", "m").state is State.LEASED for _ in range(10)) == FEW


@pytest.mark.parametrize("how", ["down", "removed"])
def test_one_that_waits_for_its_first_check_is_used_once_nobody_else_is_left_for_a_model(how: str) -> None:
    """It waited as long as anybody was up, of whatever model: for a check of a second, while its requests waited."""
    ward = waiting_for_its_check("m", "n")
    waits = ward.offer(Request("r", ward.now, model="m", allowed=frozenset(("new",))))
    assert waits.state is State.WAITING
    if how == "removed":
        ward.remove("a")
    else:
        ward.set_up("a", is_up=False)
    assert waits.state is State.LEASED
    assert ward.core.endpoints["new"].condition == "unknown"
    ward.set_up("new", is_up=False)
    assert ward.core.endpoints["new"].condition == "down"


def test_one_that_is_alone_for_one_of_its_models_need_not_wait_for_its_first_check() -> None:
    assert waiting_for_its_check("m").core.endpoints["new"].condition == "unknown"


def test_nothing_of_what_ran_at_another_address_is_held_against_one_that_waits_for_its_check() -> None:
    ward = Ward()
    ward.answer("a", Answer.FAILED, 3)
    ward.put(EndpointSpec("a", max_running_requests=64, awaits_check=True))
    assert (ward.health("a").in_a_row, ward.core.endpoints["a"].condition) == (0, "down")


def test_with_the_queue_off_an_unknown_one_holds_nobody() -> None:
    ward = Ward("a", known=False, enable_queue=False)
    assert len(ward.burst("a", 100)) == 100


def test_one_that_was_down_before_its_first_passed_check_gets_a_few_at_first() -> None:
    """As one that comes beside others is: a check goes straight there, requests go through Envoy, which may lack it."""
    ward = Ward(known=False)
    ward.set_up("a", is_up=False)
    ward.set_up("a", is_up=True)
    ward.set_up("b", is_up=True)
    assert len(ward.burst("a")) == LAWS.health.few
    assert len(ward.burst("b")) == 64
