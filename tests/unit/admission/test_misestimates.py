"""Faults of estimates that were found by reading: a first cancel, long intervals, pages that lie."""

from __future__ import annotations

from random import Random

import pytest

from extproc.admission.estimate import TokenEstimate
from extproc.admission.load import Load
from extproc.admission.steps import StepCost
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, Request

from .desk import GUESS, Desk, one


def test_before_any_answer_was_timed_a_client_that_leaves_is_not_charged_for_the_longest_answer() -> None:
    """Else who gives up first after a start waits behind 65,000 tokens of everybody else."""
    desk = Desk(one())
    ticket = desk.ask(tenant="t")
    desk.advance(1.0)
    desk.release(ticket, Answer.UNKNOWN)
    assert desk.core._books.pools.any_model.share(0)._tenants["t"].finish <= 4 * GUESS


def test_one_lying_reading_does_not_make_eight_prompts_of_one() -> None:
    estimate = TokenEstimate()
    ticket = Ticket(Request("r", 0.0, prompt_tokens=1000))
    for _ in range(3):
        estimate.learn_prompts(1000, [ticket])
    estimate.learn_prompts(2**52, [ticket])
    estimate.estimate(ticket, None)
    assert ticket.prompt_tokens <= 2000


def test_an_engine_that_is_looked_at_every_five_seconds_has_the_same_costs() -> None:
    found = []
    for elapsed_s in (1.0, 5.0):
        costs, random = StepCost(), Random(1)
        for _ in range(60):
            running, share = float(random.randint(10, 100)), random.uniform(0.1, 0.6)
            rate = (1.0 - share) * running / (0.02 + 1e-4 * running)
            prompts = int(elapsed_s * share / 5e-5)
            costs.follow(Load(running=running, tokens_per_s=rate, prompt_tokens=prompts), running, elapsed_s)
        found.append(costs.prompt_s)
    assert found[0] == pytest.approx(5e-5, rel=0.2)
    assert found[1] == pytest.approx(5e-5, rel=0.3)


def test_one_engine_that_lies_about_its_pace_does_not_make_the_answers_of_others_free() -> None:
    desk = Desk(one("liar", 9, models=frozenset({"x"})), one("a", 9, models=frozenset({"m"})))
    for _ in range(100):
        tickets = [desk.ask(model=model) for model in ("x", "m")]
        desk.advance(4.0)
        desk.observe("liar", Load(running=1.0, waiting=0.0, tokens_per_s=1e12, output_tokens=200))
        desk.observe("a", Load(running=1.0, waiting=0.0, tokens_per_s=50.0, output_tokens=200))
        for ticket in tickets:
            desk.release(ticket, Answer.OK)
    assert desk.ask(model="m").output_tokens > GUESS / 2
