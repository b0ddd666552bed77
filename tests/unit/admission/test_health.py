"""Who is sent requests, judged by answers: what one endpoint refuses while its peers serve it, and what all refuse."""

from __future__ import annotations

import pytest

from extproc.admission.health import EJECT_AFTER, EJECT_MAX_S, EJECT_S, FEW, QUIET_S, SATURATED_S, STEP_MAX_S, STEP_S
from extproc.admission.held import HeldBy
from extproc.admission.load import Load
from extproc.admission.outcome import Outcome
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request, RequestClass

from .world import World

REFUSALS = (Answer.FAILED, Answer.ERROR, Answer.REFUSED, Answer.EMPTY, Answer.SATURATED)
CLIENTS_MAYBE = (Answer.ERROR, Answer.REFUSED, Answer.EMPTY)
"""What a request may be to blame for."""
MANY = 1000

BURST = 200
"""Three times what an endpoint takes here. Each event is checked against all who wait, so more is slow."""


class Ward(World):
    """Endpoints "a", "b", ... of one pool, that work as far as is known, unless `known` is False."""

    def __init__(self, names: str = "ab", limit: int = 64, *, known: bool = True, **policy: object) -> None:
        super().__init__(Policy(classes=(RequestClass("default", 0, 100.0),), shed=False, patience_s=100.0, **policy))
        for name in names:
            self.put(EndpointSpec(name, max_running_requests=limit))
            if known:
                self.set_up(name, is_up=True)

    def ask(self, name: str | None = None, model: str | None = None) -> Ticket:
        """A request, for one endpoint if named."""
        return self.offer(Request("r", self.now, home=name, model=model))

    def answer(self, name: str, answer: Answer, count: int = 1) -> int:
        """Ask `name` one request after the other, and answer each so; stop where it gets none. Returns how many."""
        for number in range(count):
            ticket = self.ask(name)
            if ticket.state is not State.LEASED or ticket.endpoint.name != name:
                if ticket.state is State.WAITING:
                    self.cancel(ticket)
                else:
                    self.release(ticket)
                return number
            self.release(ticket, answer)
        return count

    def serve(self, name: str, count: int = 1) -> None:
        assert self.answer(name, Answer.OK, count) == count

    def burst(self, name: str, count: int = BURST) -> list[Ticket]:
        """Ask for so many at once; return those that went there."""
        tickets = [self.ask(name) for _ in range(count)]
        there = [t for t in tickets if t.state is State.LEASED and t.endpoint.name == name]
        for ticket in tickets:
            if ticket.state is State.WAITING:
                self.cancel(ticket)
        return there

    def is_ejected(self, name: str) -> bool:
        return self.health(name).ejected_until is not None

    def health(self, name: str):
        return self.core.endpoints[name].health

    def refuse_until_out(self, name: str, answer: Answer, peers: str = "b") -> int:
        """`name` refuses while `peers` serve; returns what that cost."""
        for cost in range(1, MANY):
            for peer in peers:
                self.serve(peer)
            for _ in range(MANY):
                if self.answer(name, answer):
                    break
                self.advance(STEP_S)
            if self.is_ejected(name):
                return cost
        raise AssertionError(f"{name} is never left out")


# ---- one refuses, its peers serve


@pytest.mark.parametrize("answer", REFUSALS)
def test_who_refuses_whatever_its_peers_serve_is_left_out_after_a_few(answer: Answer) -> None:
    ward = Ward("abc")
    cost = ward.refuse_until_out("a", answer, peers="bc")
    assert EJECT_AFTER <= cost <= 2 * EJECT_AFTER
    assert not ward.answer("a", Answer.OK)
    assert ward.core.endpoints["a"].condition == "ejected after failures"


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


def test_a_clients_own_mistakes_make_nobody_failing() -> None:
    ward = Ward("ab")
    for _ in range(20):
        for name in "ab":
            ward.answer(name, Answer.REFUSED)
    assert {ward.health(name).condition for name in "ab"} == {"up"}


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


# ---- trials


def out(ward: Ward, name: str = "a") -> None:
    ward.refuse_until_out(name, Answer.FAILED)


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


def test_with_the_queue_off_an_unknown_one_holds_nobody() -> None:
    ward = Ward("a", known=False, enable_queue=False)
    assert len(ward.burst("a", 100)) == 100


# ---- full, loading, asleep


def test_a_full_engine_is_slowed_and_nothing_else() -> None:
    ward = Ward()
    ward.ask("a")
    ward.advance(1.0)
    for _ in range(10 * EJECT_AFTER):
        ward.serve("b")
        assert ward.answer("a", Answer.SATURATED, 2) == 1
        ward.advance(SATURATED_S)
    assert not ward.is_ejected("a")


def test_a_page_that_shows_others_requests_tells_a_full_engine_too() -> None:
    ward = Ward(stale_after_s=1000.0)
    ward.observe("a", Load(running=8.0))
    for _ in range(10 * EJECT_AFTER):
        ward.serve("b")
        assert ward.answer("a", Answer.SATURATED, 2) == 1
        ward.advance(SATURATED_S)
    assert not ward.is_ejected("a")


def test_a_pool_that_loads_is_tried_a_request_at_a_time_until_it_serves() -> None:
    ward = Ward(known=False)
    cost = sum(ward.answer(name, Answer.SATURATED, MANY) for name in "ab")
    for _ in range(100):
        cost += sum(ward.answer(name, Answer.SATURATED, MANY) for name in "ab")
        ward.advance(0.1)
    assert cost <= 2 * (4 + 10 / STEP_MAX_S)
    ward.advance(STEP_MAX_S)
    waits = ward.ask()
    assert waits.state is State.LEASED


def test_one_that_sleeps_gets_nothing_until_it_is_awake() -> None:
    ward = Ward()
    ward.observe("a", Load(running=0.0, asleep=True))
    assert ward.core.endpoints["a"].condition == "asleep"
    assert {ward.ask().endpoint.name for _ in range(8)} == {"b"}
    ward.observe("a", Load(running=0.0, asleep=False))
    assert ward.core.endpoints["a"].condition == "up"
    ward.serve("a")


def test_while_all_sleep_requests_wait_and_go_when_one_awakes() -> None:
    ward = Ward("a")
    ward.observe("a", Load(asleep=True))
    waits = ward.ask()
    assert waits.state is State.WAITING
    ward.observe("a", Load(asleep=False))
    assert waits.state is State.LEASED


def test_a_page_that_went_stale_says_of_nobody_that_he_sleeps() -> None:
    ward = Ward("a", stale_after_s=5.0)
    ward.observe("a", Load(asleep=True))
    waits = ward.ask()
    ward.advance(5.0)
    assert waits.state is State.LEASED


# ---- what people read


def test_an_endpoint_says_in_words_whether_it_may_be_used() -> None:
    ward = Ward("ab", known=False)
    endpoint = ward.core.endpoints["a"]
    words = [endpoint.condition]
    ward.serve("a")
    words.append(endpoint.condition)
    held = ward.ask("a")
    out(ward)
    assert endpoint.held_by() is HeldBy.EJECTED
    words.append(endpoint.condition)
    ward.set_up("a", is_up=False)
    words.append(endpoint.condition)
    ward.remove("a")
    words.append(endpoint.condition)
    assert words == ["unknown", "up", "ejected after failures", "down", "removed"]
    ward.release(held)


def test_when_all_are_out_of_use_a_request_that_runs_out_of_time_hears_that_there_is_no_endpoint() -> None:
    ward = Ward("ab")
    for name in "ab":
        ward.set_up(name, is_up=False)
    ward.ask()
    ward.advance(100.0)
    assert ward.outcomes[Outcome.NO_ENDPOINT] == 1
