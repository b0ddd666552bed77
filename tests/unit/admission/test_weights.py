"""Weighted classes: shares of what is served, beside strict priority."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from extproc.admission.outcome import Outcome
from extproc.admission.values import RequestClass

from .desk import Desk, one

if TYPE_CHECKING:
    from extproc.admission.ticket import Ticket

CHAT = RequestClass("chat", 0, 1e6, 4.0)
BATCH = RequestClass("batch", 0, 1e6, 1.0)
URGENT = RequestClass("urgent", 10, 1e6)


def desk(*specs: Any, limit: int = 1, **policy: Any) -> Desk:
    """A desk with two weighted classes and one above them."""
    return Desk(*(specs or (one("a", limit),)), classes=(CHAT, BATCH, URGENT), **policy)


def cost(ticket: Ticket) -> int:
    return ticket.prompt_tokens  # answers take no time here, so they are found to have cost nothing


def serve(here: Desk, requests: int, *, keep: dict[str, int], sizes: dict[str, tuple[int, int]], seed: int = 1) -> dict:
    """Serve so many one after the other, with `keep` of each class always waiting; return the tokens of each class."""
    random, served, number = Random(seed), dict.fromkeys(keep, 0), 0

    def top_up() -> None:
        nonlocal number
        for name, wanted in keep.items():
            while sum(ticket.request_class.name == name for ticket in here.waiting) < wanted:
                number += 1
                here.ask(f"{name}{number}", name, prompt_tokens=random.randint(*sizes[name]))

    top_up()
    for _ in range(requests):
        first = next(iter(here.leased))
        here.release(first)
        top_up()
        newest = list(here.leased)[-1]
        served[newest.request_class.name] += cost(newest)
    return served


@pytest.mark.parametrize(
    "sizes", [{"chat": (100, 100), "batch": (100, 100)}, {"chat": (10, 200), "batch": (500, 3000)}]
)
def test_shares_of_tokens_are_as_the_weights_within_two_percent_over_a_thousand_requests(sizes) -> None:
    here = desk()
    here.always = False
    served = serve(here, 1000, keep={"chat": 12, "batch": 12}, sizes=sizes)
    assert served["chat"] / sum(served.values()) == pytest.approx(0.8, abs=0.02)


def test_a_class_with_a_weight_never_starves_however_much_of_the_other_comes() -> None:
    here = desk()
    here.ask("holder")
    patient = here.ask("patient", "batch", prompt_tokens=100)
    for number in range(30):
        here.ask(f"c{number}", prompt_tokens=100)
    order = here.serve_one_by_one(next(iter(here.leased)))
    assert order.index("patient") <= 5
    assert here.outcome(patient) is Outcome.DISPATCHED


def test_a_higher_priority_goes_first_whatever_the_weights_are() -> None:
    here = desk()
    first = here.ask("holder")
    for name in ("chat", "batch", "urgent", "urgent"):
        here.ask(f"{name}{here.offered}", name)
    assert here.serve_one_by_one(first)[:2] == ["urgent3", "urgent4"]


def test_a_class_that_was_idle_has_saved_nothing_up() -> None:
    here = desk()
    here.always = False
    serve(here, 400, keep={"chat": 5, "batch": 0}, sizes={"chat": (100, 100), "batch": (100, 100)})
    late = serve(here, 100, keep={"chat": 5, "batch": 5}, sizes={"chat": (100, 100), "batch": (100, 100)})
    assert late["batch"] / sum(late.values()) == pytest.approx(0.2, abs=0.03)


def test_what_one_class_leaves_the_other_takes() -> None:
    here = desk(limit=4)
    tickets = [here.ask(f"b{number}", "batch") for number in range(8)]
    assert [here.where(ticket) for ticket in tickets[:4]] == ["a"] * 4
    for ticket in tickets[:4]:
        here.release(ticket)
    assert not here.waiting


def test_tenants_share_fairly_inside_a_weighted_class() -> None:
    here = desk()
    first = here.ask("holder", tenant="x")
    for number in range(6):
        here.ask(f"noisy{number}", "batch", tenant="noisy", prompt_tokens=100)
    here.ask("quiet", "batch", tenant="quiet", prompt_tokens=100)
    assert here.serve_one_by_one(first).index("quiet") <= 2


def test_a_full_queue_pushes_out_of_the_class_that_has_most_waiting_for_its_weight() -> None:
    here = desk(max_queued_requests=10)
    here.ask("holder")
    flood = [here.ask(f"b{number}", "batch") for number in range(9)]
    chat = [here.ask(f"c{number}") for number in range(3)]
    assert [here.outcome(ticket) for ticket in chat] == [None] * 3
    assert [ticket for ticket in flood if here.outcome(ticket) is Outcome.QUEUE_FULL] == flood[7:]


def test_a_big_request_whose_turn_it_is_is_passed_over_no_more_often_than_any_other() -> None:
    """A lane's turn is kept while its first does not fit, and after GUARD passes room is kept."""
    here = desk(one("a", 100, kv_capacity_tokens=10_000))
    here.always = False
    for number in range(6):
        here.ask(f"f{number}", prompt_tokens=1200)
    big = here.ask("big", "batch", prompt_tokens=8000)
    for number in range(400):
        here.ask(f"c{number}", prompt_tokens=1200)
        here.release(next(iter(here.leased)))
        if here.where(big):
            break
    assert here.where(big) == "a"
    assert 64 <= number <= 100


def test_weights_that_a_reload_gives_or_takes_lose_nobody_who_waits() -> None:
    here = desk()
    first = here.ask("holder")
    for name in ("chat", "batch"):
        for number in range(3):
            here.ask(f"{name}{number}", name)
    plain = tuple(RequestClass(klass.name, klass.priority, klass.budget_s) for klass in (CHAT, BATCH, URGENT))
    for classes in (plain, (CHAT, BATCH, URGENT), plain):
        here.set_policy(type(here.core.policy)(classes=classes, shed=False))
        here.ask(f"after{here.offered}", "batch")
    assert len(here.serve_one_by_one(first)) == 9
    assert not [pool for pool in here.core.pools() if pool.waiting_total]


def test_endpoints_that_come_and_go_keep_shares_and_places() -> None:
    here = desk()
    here.always = False
    sizes = {"chat": (100, 100), "batch": (100, 100)}
    serve(here, 50, keep={"chat": 5, "batch": 5}, sizes=sizes)
    here.put(one("b", 1))
    here.remove("a")
    served = serve(here, 300, keep={"chat": 5, "batch": 5}, sizes=sizes)
    here.check()
    assert served["chat"] / sum(served.values()) == pytest.approx(0.8, abs=0.03)


def test_a_class_that_moves_to_an_endpoint_where_the_other_was_served_has_saved_nothing_up() -> None:
    here = desk(one("a", 1, models=frozenset({"m"})), one("other", 1, models=frozenset({"z"})))
    here.always = False
    here.core.know_models(["n"], here.now)
    for number in range(300):
        here.ask(f"chat{number}", model="m", prompt_tokens=100)
    for _ in range(250):
        here.release(next(iter(here.leased)))
    for number in range(50):
        here.ask(f"batch{number}", "batch", model="n", prompt_tokens=100)
    here.put(one("a", 1, models=frozenset({"m", "n"})))
    del here.order[:]
    for _ in range(25):
        here.release(next(iter(here.leased)))
    assert sum(name.startswith("chat") for name in here.order) == pytest.approx(20, abs=2)


def test_a_class_that_had_its_turn_has_not_got_it_back_when_endpoints_are_told_apart_anew() -> None:
    here = desk()
    here.release(here.ask("had", "chat", prompt_tokens=4000))
    here.core.know_models(["m"], here.now)
    held = here.ask("held", "urgent")
    here.ask("chat", "chat")
    here.ask("batch", "batch")
    assert here.serve_one_by_one(held) == ["batch", "chat"]
