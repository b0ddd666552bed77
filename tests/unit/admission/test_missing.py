"""An endpoint that refuses one model and serves others is left out for that model, and for nothing else."""

from __future__ import annotations

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.missing import MOST_MODELS, Missing
from extproc.admission.outcome import Outcome
from extproc.admission.streak import Tally
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request, RequestClass

from .audited import Audited
from .desk import Desk, one

EJECT_MAX_S = LAWS.health.eject_most_s
EJECT_S = LAWS.health.eject_s
STEP_MAX_S = LAWS.health.step_most_s

BLAMES = (Answer.REFUSED, Answer.ERROR, Answer.EMPTY)
FEW = 12


class Serving(Audited):
    """Endpoints "a" and "b", which list no models, or these."""

    def __init__(self, names: str = "ab", models: frozenset[str] = frozenset()) -> None:
        super().__init__(Policy(classes=(RequestClass("default", 0, 100.0),), shed=False, patience_s=100.0))
        for name in names:
            self.put(EndpointSpec(name, max_running_requests=64, models=models))
            self.set_up(name, is_up=True)

    def ask(self, model: str, home: str) -> Ticket:
        return self.offer(Request("r", self.now, home=home, model=model))

    def goes(self, model: str, home: str) -> str:
        """Where a request goes that would like to go to `home`."""
        ticket = self.ask(model, home)
        assert ticket.state is State.LEASED
        self.release(ticket)
        return ticket.endpoint.name

    def one(self, model: str, at: str, answer: Answer, **says: str) -> bool:
        """Have `at` chosen, being the emptiest; tell whether it was."""
        held = [self.ask("fine", home=name) for name in self.core.endpoints if name != at]
        ticket = self.offer(Request("r", self.now, model=model, **says))
        for holder in held:
            self.release(holder)
        is_there = ticket.endpoint.name == at
        self.release(ticket, answer if is_there else Answer.OK)
        return is_there

    def refuse(self, answer: Answer = Answer.REFUSED, model: str = "broken") -> int:
        """a refuses `model` and serves another one, b serves both, until a is left out; returns what that cost."""
        for cost in range(1, 100):
            self.one(model, "b", Answer.OK)
            if not self.one(model, "a", answer):
                return cost - 1
            self.one("fine", "a", Answer.OK)
            self.advance(0.01)
        raise AssertionError("never left out")


@pytest.mark.parametrize("answer", BLAMES)
@pytest.mark.parametrize("models", [frozenset[str](), frozenset({"fine", "broken"})], ids=["any model", "listed"])
def test_one_that_refuses_one_model_is_left_out_for_that_one_alone(answer: Answer, models: frozenset[str]) -> None:
    ward = Serving(models=models)
    assert ward.refuse(answer) <= FEW
    assert ward.goes("broken", home="a") == "b"
    assert ward.goes("fine", home="a") == "a"
    assert ward.core.endpoints["a"].condition == "up, left out for broken"


def test_one_that_refuses_a_model_for_months_is_left_out_for_it_as_long_as_at_any_time_before() -> None:
    missing, tally, now = Missing(), Tally(), 0.0
    for _ in range(1100):
        for _ in range(LAWS.health.eject_after):
            tally.served += 100  # by its peers
            if missing.refused("broken", tally, now, 0):
                break
        assert missing.models == {"broken"}
        lasts_s = missing.until - now
        now = missing.until
        missing.pass_time(now)
    assert lasts_s == EJECT_MAX_S


def test_two_servers_that_have_a_model_each_get_what_is_theirs_though_nothing_lists_it() -> None:
    ward = Serving()
    for _ in range(30):
        for home in "ab":
            for model in "ab":
                ward.one(model, home, Answer.OK if model == home else Answer.REFUSED)
        ward.advance(0.01)
    assert [ward.goes(model, home=home) for model in "ab" for home in "ab"] == ["a", "a", "b", "b"]


def test_it_is_tried_again_and_left_out_for_longer_until_it_serves() -> None:
    ward = Serving()
    ward.refuse()
    ward.advance(EJECT_S - 0.1)
    assert ward.goes("broken", home="a") == "b"
    ward.advance(0.2)
    for _ in range(20):
        ward.one("broken", "b", Answer.OK)
    assert ward.one("broken", "a", Answer.REFUSED)
    assert ward.goes("broken", home="a") == "b"
    ward.advance(EJECT_S + 0.1)
    assert ward.goes("broken", home="a") == "b"
    ward.advance(EJECT_MAX_S)
    assert ward.one("broken", "a", Answer.OK)
    assert ward.core.endpoints["a"].condition == "up"
    assert ward.refuse() > 1  # and what was is forgotten


def test_each_of_two_models_is_tried_again_in_its_own_time() -> None:
    ward = Serving()
    ward.refuse()
    ward.advance(EJECT_S / 2)
    ward.refuse(model="odd")
    ward.advance(EJECT_S / 2)
    assert ward.goes("broken", home="a") == "a"
    assert ward.goes("odd", home="a") == "b"
    ward.advance(EJECT_S / 2)
    assert ward.goes("odd", home="a") == "a"


def test_what_all_refuse_or_only_one_has_puts_nobody_out() -> None:
    ward = Serving()
    for _ in range(100):
        for home in "ab":
            ward.one("typo", home, Answer.REFUSED)
            ward.one("fine", home, Answer.OK)
        ward.advance(0.01)
    assert [ward.goes("typo", home=home) for home in "ab"] == ["a", "b"]


def test_one_whose_peers_are_not_asked_for_a_model_is_not_left_out_for_it() -> None:
    ward = Serving()
    for _ in range(40):
        for name in "ab":
            assert ward.one("fine", name, Answer.OK)
        assert ward.one("rare", "a", Answer.REFUSED)
        ward.advance(0.01)
    assert ward.goes("rare", home="a") == "a"


def test_one_that_serves_a_model_between_its_refusals_is_not_left_out_for_it() -> None:
    ward = Serving()
    for _ in range(20):
        for home, answer in (("b", Answer.OK), ("a", Answer.REFUSED), ("a", Answer.OK)):
            assert ward.one("broken", home, answer)
        ward.advance(0.01)
    assert ward.goes("broken", home="a") == "a"


def test_tried_again_one_refusal_is_enough_whatever_all_refused_before() -> None:
    ward = Serving()
    for _ in range(30):
        for home in "ab":
            ward.one("broken", home, Answer.REFUSED)
            ward.one("fine", home, Answer.OK)
        ward.advance(0.01)
    ward.refuse()
    ward.advance(EJECT_S + 0.1)
    for _ in range(20):
        ward.one("broken", "b", Answer.OK)
    assert ward.one("broken", "a", Answer.REFUSED)
    assert ward.goes("broken", home="a") == "b"


def test_one_that_refuses_everything_is_left_out_as_a_whole() -> None:
    ward = Serving()
    for number in range(40):
        model = ("fine", "broken")[number % 2]
        ward.one(model, "b", Answer.OK)
        ward.one(model, "a", Answer.REFUSED)
        if ward.core.endpoints["a"].health.ejected_until is not None:
            break
        ward.advance(STEP_MAX_S)
    assert ward.core.endpoints["a"].health.ejected_until is not None
    assert ward.core.endpoints["a"].missing.models == frozenset()


def test_when_the_others_go_down_it_is_tried_again_at_once() -> None:
    ward = Serving()
    ward.refuse()
    waiting = ward.ask("broken", home="b")
    ward.release(waiting)
    ward.set_up("b", is_up=False)
    assert ward.goes("broken", home="a") == "a"


def test_when_the_only_other_one_is_taken_out_it_is_tried_again_at_once() -> None:
    ward = Serving(models=frozenset({"fine", "broken"}))
    ward.refuse()
    ward.remove("b")
    assert ward.goes("broken", home="b") == "a"


def test_a_gateways_choice_of_nobody_else_goes_where_its_model_was_refused_all_the_same() -> None:
    ward = Serving()
    ward.refuse()
    for allowed, where in (("ab", "b"), ("a", "a")):
        ticket = ward.offer(Request("r", ward.now, model="broken", allowed=frozenset(allowed)))
        assert ticket.endpoint.name == where
        ward.release(ticket)


def test_one_that_refused_a_model_and_lists_it_no_more_is_nobodys_last_choice_for_it() -> None:
    ward = Serving(models=frozenset({"fine", "broken"}))
    ward.refuse()
    ward.put(EndpointSpec("a", max_running_requests=64, models=frozenset({"fine"})))
    ward.put(EndpointSpec("c", max_running_requests=64))
    ticket = ward.offer(Request("r", ward.now, model="broken", allowed=frozenset("a")))
    assert ticket.endpoint is None
    assert ward.outcomes[Outcome.NONE_ALLOWED] == 1
    ward.check()


def test_requests_that_wait_for_the_model_go_where_it_is_served() -> None:
    ward = Serving()
    held = [ward.ask("fine", home="b") for _ in range(64)]
    waiting = ward.ask("broken", home="b")
    assert waiting.state is State.WAITING
    ward.release(held.pop(), Answer.OK)
    ward.release(waiting, Answer.OK)
    for ticket in held:
        ward.release(ticket, Answer.OK)
    ward.refuse()
    full = [ward.ask("fine", home="b") for _ in range(64)]
    waiting = ward.ask("broken", home="a")
    assert waiting.state is State.WAITING  # a has room, and is not for it
    ward.release(full.pop(), Answer.OK)
    assert waiting.endpoint.name == "b"


def test_made_up_names_take_no_memory() -> None:
    ward = Serving()
    for number in range(20 * MOST_MODELS):
        ward.one(f"m{number}", "a", Answer.REFUSED)
        ward.one("fine", "a", Answer.OK)
        ward.one("fine", "b", Answer.OK)
    assert len(ward.core.endpoints["a"].missing._known) <= MOST_MODELS


def test_after_any_number_of_made_up_names_one_that_lacks_a_model_is_still_left_out_for_it() -> None:
    ward = Serving()
    for number in range(MOST_MODELS + 5):
        ward.one(f"m{number}", "a", Answer.REFUSED)
        ward.one("fine", "a", Answer.OK)
    assert ward.refuse() <= FEW


@pytest.mark.parametrize("answer", BLAMES)
@pytest.mark.parametrize("says", [{"home": "a"}, {"session": "s"}], ids=["home", "session"])
def test_a_client_that_says_where_its_bad_requests_go_has_nobody_left_out(says: dict[str, str], answer: Answer) -> None:
    ward = Serving()
    ward.one("rare", "a", Answer.OK, **says)
    for number in range(100):
        ward.one("rare", "ab"[number % 8 > 0], Answer.OK)
        for ticket in [ward.offer(Request("r", ward.now, model="rare", **says)) for _ in range(2)]:
            ward.release(ticket, answer)
        ward.one("fine", "a", Answer.OK)
        ward.advance(0.01)
        assert [one.condition for one in ward.core.endpoints.values()] == ["up", "up"]


def test_sessions_that_begin_at_one_that_lacks_their_model_have_it_left_out() -> None:
    ward = Serving()
    for number in range(FEW):
        ward.one("rare", "b", Answer.OK)
        ward.one("rare", "a", Answer.REFUSED, session=f"s{number}")
        ward.one("fine", "a", Answer.OK)
    assert ward.goes("rare", home="a") == "b"


@pytest.mark.parametrize("answer", [Answer.FAILED, Answer.ERROR, Answer.REFUSED])
@pytest.mark.parametrize("own", [frozenset({"a", "own"}), frozenset()], ids=["a model", "whatever"])
def test_a_broken_one_that_serves_a_model_alone_is_left_out_for_what_others_serve(
    answer: Answer, own: frozenset[str]
) -> None:
    """It was tried again at once, being the last one there: 243 of 300 requests that its peer serves went to it."""
    desk = Desk(one("good", limit=4, models=frozenset({"a"})), one("broken", limit=4, models=own))
    got, running = 0, []
    for _ in range(300):
        desk.advance(0.2)
        ticket = desk.ask(model="a")
        if desk.where(ticket) == "broken":
            got += 1
            desk.release(ticket, answer)
        else:
            running.append(ticket)
        if len(running) > 3:
            desk.release(running.pop(0), Answer.OK)
    assert got < 20
    assert desk.where(desk.ask(model="own")) == "broken"
    desk.advance(200.0)
    assert not desk.endpoint("broken").missing.models


def fail_at(desk: Desk, *names: str) -> None:
    """Have each of these fail what it gets until it is out, and the others answer."""
    for _ in range(400):
        if all(desk.endpoint(name).missing.models or desk.endpoint(name).health.ejected_until for name in names):
            return
        desk.advance(0.05)
        ticket = desk.ask(model="a")
        desk.release(ticket, Answer.FAILED if desk.where(ticket) in names else Answer.OK)
    raise AssertionError("never left out")


def test_two_that_are_taken_back_in_one_moment_are_not_left_out_for_one_another() -> None:
    """The first was tried again, and the other left out for it up to a minute, whichever of them works."""
    desk = Desk(*(one(name, models=frozenset({"a"})) for name in "bcd"))
    fail_at(desk, "b", "c")
    desk.set_up("d", is_up=False)
    assert {desk.where(desk.ask(model="a")) for _ in range(2)} == {"b", "c"}


def test_two_that_serve_a_model_alone_are_both_kept_for_it() -> None:
    desk = Desk(one("d", models=frozenset({"a"})), *(one(name, models=frozenset({"a", "own"})) for name in "bc"))
    fail_at(desk, "b", "c")
    assert [desk.endpoint(name).missing.models for name in "bc"] == [{"a"}, {"a"}]
    assert {desk.where(desk.ask(model="own")) for _ in range(2)} == {"b", "c"}


def test_one_that_fails_beside_another_that_fails_another_models_requests_is_not_left_out() -> None:
    """Cold engines: in its own pool nobody else refused anything, and it was out for up to a minute, ready or not."""
    desk = Desk(one("a", models=frozenset({"m"})), one("b", models=frozenset({"m", "own"})))
    for _ in range(60):
        for model in ("own", "m"):
            ticket = desk.ask(model=model)
            if desk.where(ticket) is not None:
                desk.release(ticket, Answer.FAILED)
            else:
                desk.cancel(ticket)
        desk.advance(1.0)
        assert desk.endpoint("a").health.ejected_until is None
    assert desk.endpoint("a").condition == "failing"
