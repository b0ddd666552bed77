"""Answers are charged by how long they are written: tenants share tokens, not requests."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

import pytest

from extproc.admission.estimate import MOST_OUTPUT
from extproc.admission.fairness import OUTPUT_WEIGHT
from extproc.admission.load import Load
from extproc.admission.tenants import TenantRule, TenantRules
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, RequestClass

from .desk import Desk, in_use, one

PACE = 50.0
"""Tokens a second of one sequence."""
SLOTS = 8
PATIENT = (RequestClass("std", 0, 1e9),)


def contend(answers: dict[str, int], seconds: float, *, counters: bool, end: Answer = Answer.OK) -> dict[str, float]:
    """Keep one endpoint busy with tenants whose line never ends; return the tokens that were written for each.

    `answers`: the tokens of each tenant's answers.
    """
    desk = Desk(one("a", SLOTS), classes=PATIENT)
    desk.always = False  # the checks after each event are for other tests
    lines = {tenant: [desk.ask(tenant, tenant=tenant) for _ in range(SLOTS)] for tenant in answers}
    written = dict.fromkeys(answers, 0.0)
    ends: list[tuple[float, int, Ticket]] = []
    began, read_at, produced, known = desk.now, desk.now, 0.0, set[Ticket]()
    while desk.now < began + seconds:
        for tenant, line in lines.items():
            for ticket in [ticket for ticket, leased in zip(line, in_use(line), strict=True) if leased]:
                line.remove(ticket)
                known.add(ticket)
                heappush(ends, (desk.now + answers[tenant] / PACE, desk.events, ticket))
                line.append(desk.ask(tenant, tenant=tenant))
        heapify(ends)
        at, _, ticket = heappop(ends)
        while counters and read_at + 1.0 <= at:
            read_at += 1.0
            desk.advance(read_at - desk.now)
            produced += SLOTS * PACE
            desk.observe("a", Load(SLOTS, 0.0, tokens_per_s=SLOTS * PACE, output_tokens=int(SLOTS * PACE)))
        desk.advance(at - desk.now)
        if at > began + seconds / 3:  # what comes before that teaches
            written[ticket.request.tenant] += answers[ticket.request.tenant]
        desk.release(ticket, end)
    desk.check()
    return written


@pytest.mark.parametrize(
    ("counters", "end"),
    [(True, Answer.OK), (False, Answer.OK), (True, Answer.UNKNOWN)],
    ids=["counters", "times", "left"],
)
def test_a_tenant_with_answers_forty_times_as_long_gets_about_the_same_tokens(counters: bool, end: Answer) -> None:
    """By counters and times, by times alone, and of clients that leave before the end."""
    written = contend({"long": 4000, "short": 100}, 3000.0, counters=counters, end=end)
    assert 0.5 < written["long"] / written["short"] < 2.0


def test_tenants_whose_answers_are_alike_get_the_same_tokens() -> None:
    written = contend({"one": 300, "other": 300}, 600.0, counters=True)
    assert written["one"] == pytest.approx(written["other"], rel=0.1)


def charged(desk: Desk, ticket: Ticket, answer: Answer) -> float:
    """End `ticket`'s answer; return how many tokens of output its tenant was charged for it, from first to last."""
    record = desk.core._books.pools.any_model.share(0)._tenants[ticket.request.tenant]
    before = record.finish
    desk.release(ticket, answer)
    return ticket.output_tokens + (record.finish - before) / OUTPUT_WEIGHT


def beyond_its_estimate(weight: float) -> float:
    """Return what a tenant of that weight is charged for an answer ten times as long as the one before."""
    desk = Desk(one("a", 1), classes=PATIENT, tenants=TenantRules({"t": TenantRule(weight=weight)}))
    for length_s in (1.0, 10.0):
        ticket = desk.ask(tenant="t")
        desk.advance(length_s)
        beyond = charged(desk, ticket, Answer.OK) - ticket.output_tokens
    return beyond


def test_what_an_answer_cost_beyond_its_estimate_counts_by_its_tenants_weight() -> None:
    alone = beyond_its_estimate(1.0)
    assert alone > 10.0
    assert beyond_its_estimate(4.0) == pytest.approx(alone / 4)


def test_an_engine_that_is_slow_makes_nobodys_answers_dear() -> None:
    """It takes ten times as long for the same tokens: its pace says so."""
    desk = Desk(one("fast", 1), one("slow", 1), classes=PATIENT)
    for _ in range(50):
        fast, slow = (desk.ask(name, tenant=name, home=name) for name in ("fast", "slow"))
        desk.advance(2.0)
        desk.observe("fast", Load(1.0, 0.0, tokens_per_s=100.0))
        of_fast = charged(desk, fast, Answer.OK)
        desk.advance(18.0)
        desk.observe("slow", Load(1.0, 0.0, tokens_per_s=10.0))
        of_slow = charged(desk, slow, Answer.OK)
    assert of_fast == pytest.approx(of_slow, rel=0.02)


@pytest.mark.parametrize("answer", [Answer.OK, Answer.UNKNOWN])
def test_no_answer_is_charged_more_than_the_longest_however_long_it_hung(answer: Answer) -> None:
    desk = Desk(one("a", 1), classes=PATIENT)
    for _ in range(20):
        ticket = desk.ask(tenant="t")
        desk.advance(2.0)
        charged(desk, ticket, Answer.OK)
    stuck = desk.ask(tenant="t")
    desk.advance(1e6)
    assert 0.0 < charged(desk, stuck, answer) <= 2 * MOST_OUTPUT
