"""Models: which endpoints may serve a request, and what comes before they are known."""

from __future__ import annotations

from typing import Any

import pytest

from extproc.admission.outcome import Outcome
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Decision, Dispatch, Request

from .desk import URGENT, Desk, one


@pytest.mark.parametrize("model", [None, "m"])
def test_a_request_that_came_before_all_endpoints_goes_to_the_first_that_fits(model: str | None) -> None:
    """Found by reading: it stayed in the pool of endpoints that list no models, where none ever came."""
    desk = Desk()
    early = desk.ask(model=model)
    other = desk.ask(model="another")
    desk.put(one("a", models=frozenset({"m"})))
    assert desk.where(early) == "a"
    assert desk.outcome(other) is None, "its endpoint may still come"
    desk.put(one("b", models=frozenset({"another"})))
    assert desk.where(other) == "b"


def test_a_model_that_no_endpoint_lists_is_unknown() -> None:
    desk = Desk(one("a", models=frozenset({"m"})))
    stranger = desk.ask(model="n")
    assert (desk.outcome(stranger), desk.retry_after(stranger)) == (Outcome.UNKNOWN_MODEL, None)


def test_models_are_known_in_the_order_of_their_names_so_that_every_run_decides_alike() -> None:
    """A set of names has another order in each process, and the order decides which model keeps a pool."""
    models = [f"m{number}" for number in range(10, 40)]
    desk = Desk(one("a", models=frozenset(models[5:15])))
    desk.put(one("b", models=frozenset(models[:5])))  # joins
    desk.know_models(*frozenset(models[15:]))
    known = list(desk.core._books.pools.by_model)
    assert known == [*models[5:15], *models[:5], *models[15:]]


def test_an_unknown_model_stays_unknown_while_a_removed_endpoint_runs_out() -> None:
    desk = Desk(one("a", models=frozenset({"m"})))
    desk.ask(model="m")
    desk.remove("a")
    assert desk.outcome(desk.ask(model="n")) is None, "no endpoint at all: nobody can tell what is unknown"


def test_a_known_model_whose_endpoints_went_is_waited_for() -> None:
    desk = Desk(one("a", models=frozenset({"m"})), one("b", models=frozenset({"n"})))
    desk.remove("a")
    guest = desk.ask(model="m")
    assert desk.outcome(guest) is None
    desk.put(one("a", models=frozenset({"m"})))
    assert desk.where(guest) == "a"


def test_an_endpoint_that_lists_no_models_serves_all() -> None:
    desk = Desk(one("any", 10), one("m", models=frozenset({"m"})))
    assert desk.where(desk.ask(model="unheard of")) == "any"
    assert {desk.where(desk.ask(model="m")) for _ in range(2)} == {"any", "m"}


def test_an_endpoint_that_lists_models_gets_no_others() -> None:
    desk = Desk(one("any"), one("m", models=frozenset({"m"})))
    assert [desk.where(desk.ask(model="n")) for _ in range(2)] == ["any", None]


def test_a_request_without_a_model_goes_anywhere_if_all_endpoints_list_the_same() -> None:
    desk = Desk(one("m", models=frozenset({"m"})), one("n", models=frozenset({"m"})))
    assert {desk.where(desk.ask()) for _ in range(2)} == {"m", "n"}


def test_a_request_without_a_model_goes_nowhere_if_endpoints_list_different_ones() -> None:
    desk = Desk(one("m", models=frozenset({"m"})), one("n", models=frozenset({"n"})))
    assert desk.outcome(desk.ask()) is Outcome.MODEL_MISSING
    assert desk.where(desk.ask(model="n")) == "n"
    desk.remove("n")
    assert desk.where(desk.ask()) == "m"


def passed(desk: Desk, **request: Any) -> Decision:
    """What becomes of a request that takes no slot."""
    (decision,) = desk.core.send(Ticket(Request("p", desk.now, **request)), desk.now)
    desk.check()
    return decision


def test_a_request_that_takes_no_slot_goes_to_each_available_endpoint_in_turn_whatever_runs_there() -> None:
    desk = Desk(one("a"), one("b"), one("down"))
    desk.fill(3)
    desk.set_up("down", is_up=False)
    decisions = [passed(desk) for _ in range(4)]
    assert {decision.outcome for decision in decisions} == {Outcome.PASSED}
    names = [decision.endpoint for decision in decisions if isinstance(decision, Dispatch)]
    assert sorted(names) == ["a", "a", "b", "b"]
    assert names[0] != names[1]


def test_a_request_that_takes_no_slot_goes_where_its_model_its_home_and_its_session_are() -> None:
    desk = Desk(
        one("a", models=frozenset({"m"})), one("b", 9, models=frozenset({"n"})), one("c", 9, models=frozenset({"n"}))
    )
    where = desk.where(desk.ask(model="n", session="s"))
    for request, expected in (
        ({"model": "m"}, "a"),
        ({"model": "n", "session": "s"}, where),
        ({"model": "n", "home": "c"}, "c"),
    ):
        assert {getattr(passed(desk, **request), "endpoint", None) for _ in range(3)} == {expected}


def test_a_request_that_takes_no_slot_is_refused_only_where_nobody_could_answer_it() -> None:
    desk = Desk(one("a", models=frozenset({"m"})))
    assert passed(desk, model="x").outcome is Outcome.UNKNOWN_MODEL
    desk.set_up("a", is_up=False)
    assert passed(desk).outcome is Outcome.NO_ENDPOINT


def test_without_a_queue_a_request_that_takes_no_slot_goes_to_a_doubtful_endpoint_rather_than_nowhere() -> None:
    desk = Desk(one("a"), enable_queue=False)
    desk.set_up("a", is_up=False)
    decision = passed(desk)
    assert (decision.outcome, getattr(decision, "endpoint", None)) == (Outcome.PASSED, "a")


def test_before_its_model_is_listed_a_request_goes_nowhere() -> None:
    desk = Desk()
    other = desk.ask(model="another")
    desk.put(one("a", 10, models=frozenset({"m"})))
    assert other.state is State.WAITING


def test_an_endpoint_whose_models_change_serves_the_new_ones_and_no_others() -> None:
    desk = Desk(one("a", 10, models=frozenset({"m"})), one("b", 10, models=frozenset({"other"})))
    desk.put(one("a", 10, models=frozenset({"n"})))
    assert desk.where(desk.ask(model="n")) == "a"
    assert desk.ask(model="m").state is State.WAITING


def test_when_somebody_who_lists_none_is_expected_no_more_those_who_waited_for_it_go_to_who_is_there() -> None:
    """They stayed where they had waited, for an endpoint that was not to come."""
    desk = Desk()
    desk.know_models("m", "n", expects_any=True)
    for name in "mn":
        desk.put(one(name, models=frozenset({name})))
    anyone = desk.ask()
    assert desk.outcome(anyone) is None
    desk.know_models("m", "n")
    assert desk.where(anyone) in ("m", "n")


def test_when_a_second_list_comes_those_without_a_model_wait_where_new_ones_do() -> None:
    desk = Desk(one("m", models=frozenset({"m"})))
    desk.know_models(expects_any=True)
    desk.ask("held")
    before = desk.ask("before")
    desk.put(one("n", models=frozenset({"m", "n"})))
    assert before.pool is desk.ask("after").pool


def test_when_the_second_list_goes_those_without_a_model_go_to_who_is_there() -> None:
    desk = Desk(one("m", models=frozenset({"m"})), one("n", models=frozenset({"n"})))
    desk.know_models(expects_any=True)
    anyone = desk.ask()
    assert desk.outcome(anyone) is None
    desk.remove("n")
    assert desk.where(anyone) == "m"


@pytest.mark.parametrize("model", [None, "unheard of"])
def test_a_gateways_choice_waits_for_one_that_may_serve_it_as_others_do(model: str | None) -> None:
    desk = Desk(one("m", models=frozenset({"m"})), one("n", models=frozenset({"n"})))
    desk.know_models(expects_any=True)
    chosen = desk.ask(model=model, allowed=frozenset({"n"}))
    assert (desk.outcome(chosen), desk.outcome(desk.ask(model=model))) == (None, None)
    assert desk.outcome(desk.ask(model=model, allowed=frozenset({"gone"}))) is Outcome.NONE_ALLOWED
    desk.put(one("n", models=frozenset()))
    assert desk.where(chosen) == "n"


def test_a_request_that_came_back_may_go_to_the_others_of_its_model_if_one_of_them_may_be_used() -> None:
    desk = Desk(*(one(name, models=frozenset({"m"})) for name in "ab"), one("c", models=frozenset({"n"})))

    def others(*names: str, **request: object) -> frozenset[str] | None:
        return desk.core.others(Request("r", desk.now, "m", **request), frozenset(names))

    assert others("a") == {"b"}
    assert others("a", "b") is None, "one that refused it is better than nobody"
    assert others("c") == {"a", "b"}
    few = frozenset({"a"})
    desk.ask(model="m", allowed=few)
    assert others("a", allowed=few) == few
    desk.set_up("b", is_up=False)
    assert others("a") is None
    assert desk.core.others(Request("r", desk.now, "unheard of"), frozenset({"a"})) is None


def test_a_request_that_takes_no_slot_is_of_its_own_class() -> None:
    desk = Desk(one("a"))
    sent = Ticket(Request("r", desk.now, request_class="urgent"))
    desk.core.send(sent, desk.now)
    assert sent.request_class is URGENT
