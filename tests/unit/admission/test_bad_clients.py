"""A client whose requests are all bad, hostile or broken: it puts out no engine that serves others well."""

from __future__ import annotations

import heapq
import random
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from extproc.admission.controller import Controller
from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Dispatch, EndpointSpec, Policy, Request, RequestClass

from .ward import CLIENTS_MAYBE, Ward

if TYPE_CHECKING:
    from extproc.admission.values import Decision

EJECT_AFTER = LAWS.health.eject_after
FEW = 15
CLASSES = (RequestClass("default", 0, 100.0),)
WAYS = [{"home": "a"}, {"session": "its"}]
"""In which a client has its requests go to a."""


def offer(ward: Ward, **says: Any) -> Ticket:
    return ward.offer(Request("r", ward.now, **says))


def begin(ward: Ward, **says: Any) -> None:
    """Have a session of these words at home at a."""
    ticket = offer(ward, allowed=frozenset("a"), **says)
    assert ticket.endpoint.name == "a"
    ward.release(ticket, Answer.OK)


@pytest.mark.parametrize("answer", [*CLIENTS_MAYBE, Answer.BROKE_OFF, Answer.TIMEOUT])
@pytest.mark.parametrize("says", WAYS, ids=["by name", "by its session"])
def test_who_has_bad_requests_go_to_one_engine_puts_it_not_out(says: dict[str, str], answer: Answer) -> None:
    """Five in a row did, between two answers to others."""
    ward = Ward()
    if "session" in says:
        begin(ward, **says)
    for _ in range(50):
        with ward.checked_at_its_end():
            ward.serve("b", 40)
        for _ in range(EJECT_AFTER):
            ward.release(offer(ward, **says), answer)
        assert [ward.health(name).condition for name in "ab"] == ["up", "up"]
        ward.serve("a")


def test_a_good_answer_has_others_led_there_again() -> None:
    ward = Ward()
    begin(ward, session="others")
    held = [offer(ward, allowed=frozenset("a")) for _ in range(8)]
    for led in (True, False):
        assert (offer(ward, session="others").endpoint.name == "a") is led
        for _ in range(EJECT_AFTER):
            ward.release(offer(ward, home="a"), Answer.REFUSED)
    ward.release(held.pop(), Answer.OK)
    assert offer(ward, home="a").endpoint.name == "a"


@pytest.mark.parametrize("model", [None, "m"])
@pytest.mark.parametrize("answer", CLIENTS_MAYBE)
def test_an_engine_that_refuses_all_who_are_led_there_costs_a_few(answer: Answer, model: str | None) -> None:
    """Nobody goes there but those who are at home there, and each of them comes again."""
    ward = Ward("abc")
    sessions = [f"s{number}" for number in range(100)]
    for session in sessions:
        begin(ward, session=session, model=model)
    cost = 0
    for session in 3 * sessions:
        ticket = offer(ward, session=session, model=model)
        if ticket.endpoint.name == "a":
            cost += 1
            ward.release(ticket, answer)
        else:
            ward.release(ticket, Answer.OK)
        ward.advance(0.01)
    assert ward.is_ejected("a")
    assert cost <= FEW


def test_an_engine_that_refuses_all_who_are_led_there_is_put_out_however_many_models_they_name() -> None:
    """Above 64 no count of one model came to five: it refused 1,560 of 1,560, and stayed."""
    ward, bad = Ward(limit=1000), 0
    for number in range(1500):
        ticket = offer(ward, model=f"m{number % 100}", home="a")
        is_bad = ticket.endpoint.name == "a"
        bad += is_bad
        ward.release(ticket, Answer.ERROR if is_bad else Answer.OK)
        ward.advance(0.01)
        if ward.is_ejected("a"):
            break
    assert ward.is_ejected("a")
    assert bad <= FEW


def test_who_waits_for_an_engine_that_refuses_all_who_are_led_there_goes_elsewhere() -> None:
    ward = Ward("ab", limit=EJECT_AFTER)
    held = [offer(ward, home="a") for _ in range(EJECT_AFTER)]
    waiting = [offer(ward, home="a") for _ in range(8)]
    for number, ticket in enumerate(held):
        assert {one.state for one in waiting[number:]} == {State.WAITING}, "b has room, and is not their home"
        ward.release(ticket, Answer.REFUSED)
    assert [one.endpoint.name for one in waiting] == ["a"] * 4 + ["b"] * 4


def test_what_the_last_one_left_refuses_is_held_against_none_that_comes_back() -> None:
    """Its good answers were counted, and its refusals were not: it seemed to serve all that the others refused."""
    ward = Ward()
    ward.answer("b", Answer.REFUSED, EJECT_AFTER)
    ward.set_up("b", is_up=False)
    for _ in range(30):
        ward.answer("a", Answer.REFUSED)
        ward.serve("a")
    ward.set_up("b", is_up=True)
    ward.advance(1.0)
    assert ward.answer("b", Answer.REFUSED) == 1
    assert not ward.is_ejected("b")


def live(ward: Ward, lasts_s: float, bad: int, but: str = "") -> None:
    """Have every engine in use by many, but for one, and so many of ten requests refused."""
    with ward.checked_at_its_end():
        for _ in range(round(10 * lasts_s)):
            is_bad = round(10 * ward.now) * 7 % 10 < bad
            for name in ward.core.endpoints:
                if name != but:
                    ward.answer(name, Answer.REFUSED if is_bad else Answer.OK)
            ward.advance(0.1)


@pytest.mark.parametrize("answer", [*CLIENTS_MAYBE, Answer.BROKE_OFF, Answer.TIMEOUT])
@pytest.mark.parametrize(("bad", "in_a_row"), [(2, 6), (5, 12), (8, 40)])
def test_where_a_client_is_refused_all_day_more_of_its_requests_in_a_row_hold_nobody_back(
    answer: Answer, bad: int, in_a_row: int
) -> None:
    """They all go to the emptiest. Five of them closed it for all: it got one a step, mostly a bad one again."""
    ward = Ward("abcd")
    live(ward, 30.0, bad)
    ward.serve("a")
    assert ward.answer("a", answer, in_a_row) == in_a_row
    assert len(ward.burst("a")) == 64


def test_the_only_one_that_hangs_up_is_held_back_where_no_answer_runs_that_shows_it_alive() -> None:
    ward = Ward("a")
    runs = ward.ask()
    assert ward.answer("a", Answer.BROKE_OFF, 64) == EJECT_AFTER, "it has died"
    ward.answered(runs)
    assert ward.answer("a", Answer.BROKE_OFF, 64) == 64, "a client's body is too big for it"
    assert ward.health("a").condition == "up"


@pytest.mark.parametrize("is_read", [False, True], ids=["an answer", "its page"])
def test_the_only_one_that_hangs_up_is_not_held_back_while_anything_was_heard_of_it_just_now(is_read: bool) -> None:
    """Between two short answers to others it was in doubt, had one request a second, and that was a bad one again."""
    ward = Ward("a")
    ward.serve("a")
    ward.advance(LAWS.health.quiet_s - 0.1)
    assert ward.answer("a", Answer.BROKE_OFF, 64) == 64
    ward.advance(0.2)
    if is_read:
        ward.observe("a", Load(running=0, waiting=0))
    assert ward.answer("a", Answer.BROKE_OFF, 64) == (64 if is_read else EJECT_AFTER)


def test_the_first_refusals_in_a_row_are_news() -> None:
    ward = Ward("abcd")
    live(ward, 30.0, 0)
    assert ward.answer("a", Answer.ERROR, 64) == EJECT_AFTER
    assert ward.health("a").condition == "up", "held back, and not said to fail: the requests may be to blame"


def test_what_was_refused_long_ago_is_no_excuse() -> None:
    ward = Ward("abcd")
    live(ward, 30.0, 5)
    for _ in range(2):
        live(ward, 15.0, 0)
        ward.answer("b", Answer.ERROR)
    assert ward.answer("a", Answer.ERROR, 64) == EJECT_AFTER


def test_what_one_alone_refused_before_is_no_excuse_for_it() -> None:
    ward = Ward("ab")
    for _ in range(100):
        ward.answer("a", Answer.ERROR, EJECT_AFTER - 1)
        ward.serve("a")
        ward.serve("b", 5)
        ward.advance(0.1)
    assert ward.answer("a", Answer.ERROR, 64) == EJECT_AFTER


@pytest.mark.parametrize("bad", [6, 8])
def test_a_client_that_is_refused_all_day_shields_no_broken_engine(bad: int) -> None:
    """Where more than half was refused, it was as good as the others: it was never left, and got what it could."""
    ward, cost = Ward("abcd"), 0
    live(ward, 30.0, bad)
    while not ward.is_ejected("a"):
        cost += ward.answer("a", Answer.ERROR)
        assert cost < 100
        live(ward, 0.1, bad, but="a")


@pytest.mark.parametrize("model", [None, "m"])
def test_who_serves_sessions_is_no_measure_for_one_that_only_bad_requests_come_to(model: str | None) -> None:
    """Those of sessions go where they are at home, and so the bad ones of others to an engine where nobody is."""
    ward = Ward("abc", limit=4)
    for name in "bc":
        ward.release(offer(ward, session=name, model=model, allowed=frozenset(name)), Answer.OK)
    for _ in range(400):
        held = [offer(ward, session=name, model=model) for name in "bc"]
        ward.release(ward.ask(model=model), Answer.REFUSED)  # to the emptiest that has room
        for ticket in held:
            ward.release(ticket, Answer.OK)
        ward.advance(0.05)
        assert not ward.is_ejected("a")
        assert not ward.core.endpoints["a"].missing.models
    assert len(ward.burst("a")) == 4


class Town:
    """Engines in use by many, and one client more whose requests are refused wherever they go, in 10 ms."""

    def __init__(self, engines: int, *, rate: float, bad_rate: float, head_s: float, seed: int, **says: Any) -> None:
        self.core = Controller(Policy(classes=CLASSES, shed=False))
        names = [chr(ord("a") + number) for number in range(engines)]
        self.core.put_endpoints([EndpointSpec(name, max_running_requests=64) for name in names], 0.0)
        for name in names:
            self.core.set_up(name, 0.0, is_up=True)
        self.random = random.Random(seed)
        self.rate, self.bad_rate, self.head_s, self.says = rate, bad_rate, head_s, says
        self.now, self.ejections = 0.0, 0
        self.due: list[tuple[float, int, str, Ticket | None]] = []
        self.number = count()

    def at(self, when: float, what: str, ticket: Ticket | None = None) -> None:
        heapq.heappush(self.due, (when, next(self.number), what, ticket))

    def run(self, lasts_s: float) -> int:
        """Return in how many events one was left out."""
        self.at(0.0, "good")
        self.at(0.0, "bad")
        while self.due[0][0] < lasts_s:
            at, _, what, ticket = heapq.heappop(self.due)
            while (tick := self.core.next_deadline()) is not None and self.now < tick <= at:
                self.now = tick
                self.follow(self.core.tick(tick))
            self.now = at
            self.follow(self.happens(what, ticket))
        return self.ejections

    def happens(self, what: str, ticket: Ticket | None) -> list[Decision]:
        now = self.now
        if ticket is None:
            bad = what == "bad"
            self.at(now + self.random.expovariate(self.bad_rate if bad else self.rate), what)
            return self.core.offer(Ticket(Request(what, now, model="m", **(self.says if bad else {}))), now)
        if what == "head":
            return self.core.answered(ticket, now)
        return self.core.release(ticket, now, Answer.REFUSED if ticket.request.id == "bad" else Answer.OK)

    def follow(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            assert isinstance(decision, Dispatch)
            if decision.ticket.request.id == "bad":
                self.at(self.now + 0.01, "end", decision.ticket)
            else:
                self.at(self.now + self.head_s, "head", decision.ticket)
                self.at(self.now + self.head_s + self.random.expovariate(0.2), "end", decision.ticket)
        for endpoint in self.core.endpoints.values():
            self.ejections += endpoint.health.ejected_until is not None or bool(endpoint.missing.models)


@pytest.mark.parametrize("says", [{}, {"home": "a"}], ids=["goes anywhere", "names one"])
@pytest.mark.parametrize(("engines", "rate", "head_s"), [(2, 1, 0.3), (2, 10, 0.3), (2, 40, 0.3), (4, 10, 5.0)])
def test_a_client_whose_requests_fail_everywhere_puts_no_engine_out(
    engines: int, rate: float, head_s: float, says: dict[str, str]
) -> None:
    """They are over at once, so they all go to the emptiest: five in a row there, before a good answer begins."""
    out = [Town(engines, rate=rate, bad_rate=50.0, head_s=head_s, seed=seed, **says).run(20.0) for seed in range(3)]
    assert out == [0] * 3
