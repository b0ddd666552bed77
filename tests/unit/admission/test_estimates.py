"""Estimates of tokens: prompts by their size, answers by those before."""

from __future__ import annotations

from typing import Any

import pytest

from extproc.admission.estimate import (
    LEAST_SCALE,
    MOST_CONTEXT,
    MOST_OUTPUT,
    MOST_SCALE,
    SCALES,
    TRIES,
    Learnt,
    TokenEstimate,
)
from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.outcome import Outcome
from extproc.admission.ticket import Ticket
from extproc.admission.values import UNSIZED, Answer, EndpointSpec, Request, RequestClass

from .desk import GUESS, Desk, in_use, one

MEMORY = int(LAWS.tokens.memory)
TEXT, IMAGE = Request("text", 0.0, prompt_tokens=1000), Request("image", 0.0, prompt_tokens=100_000)


def test_output_tokens_of_readings_without_a_finished_answer_are_not_lost() -> None:
    """Found by reading: with one answer in five readings, the mean came out five times too low."""
    desk = Desk(one("a", 10))
    for _ in range(1000):
        ticket = desk.ask()
        for _ in range(4):
            desk.observe("a", Load(output_tokens=200))
        desk.advance(0.2)
        desk.release(ticket)
        desk.observe("a", Load(output_tokens=200))
    assert desk.ask().output_tokens == pytest.approx(1000, rel=0.02)


def test_estimates_learn_from_answers_and_respect_what_a_request_allows() -> None:
    desk = Desk(one("a", 10))
    for _ in range(2000):
        ticket = desk.ask()
        desk.advance(0.1)
        desk.release(ticket, Answer.OK)
        desk.observe("a", Load(output_tokens=20))
    assert desk.ask().output_tokens == 20
    assert desk.ask(max_output_tokens=5).output_tokens == 5
    assert desk.ask(max_output_tokens=5000).output_tokens == 20


def test_prompts_are_as_long_as_engines_count_them() -> None:
    desk = Desk(one("a", 10_000))
    desk.observe("a", Load(first_tokens=0))
    for _ in range(300):
        desk.release(desk.ask(prompt_tokens=100), Answer.OK)
        desk.observe("a", Load(prompt_tokens=300, first_tokens=1))
    assert desk.ask(prompt_tokens=100).prompt_tokens == pytest.approx(300, rel=0.02)


@pytest.mark.parametrize(
    "load", [Load(prompt_tokens=9000, first_tokens=0), Load(prompt_tokens=9000), Load(first_tokens=9)]
)
def test_half_a_reading_says_nothing_of_prompts(load: Load) -> None:
    desk = Desk(one("a", 10))
    desk.observe("a", load)
    assert desk.ask(prompt_tokens=1000).prompt_tokens == 1000


def test_one_answer_says_little_of_the_next_and_many_say_half() -> None:
    few, many = (Ticket(Request("r", 0.0)) for _ in range(2))
    estimate = TokenEstimate()
    estimate.learn(GUESS + 10 * MEMORY, 1)
    estimate.estimate(few, None)
    assert few.output_tokens == GUESS + 10
    estimate = TokenEstimate()
    estimate.learn(1000 * 3 * GUESS, 1000)
    estimate.estimate(many, None)
    assert many.output_tokens == 2 * GUESS


def test_a_reading_is_shared_by_all_answers_that_finished_since_the_one_before() -> None:
    desk = Desk(one("a", 100))
    tickets = desk.fill(20)
    desk.advance(0.2)
    for ticket in tickets:
        desk.release(ticket)
    desk.observe("a", Load(output_tokens=20 * GUESS))
    assert desk.ask().output_tokens == GUESS


def test_the_first_answers_count_as_what_the_counter_says_and_so_do_the_next() -> None:
    desk, mean = Desk(one("a", 10)), float(GUESS)
    for tokens in (800, 100):
        desk.release(desk.ask(), Answer.OK)
        desk.release(desk.ask(), Answer.OK)
        desk.observe("a", Load(output_tokens=tokens))
        mean += 2 / MEMORY * (tokens / 2 - mean)
        assert desk.core.learnt()[0].value == pytest.approx(mean, rel=1e-9)


def counted(estimate: TokenEstimate, tokens: int, *requests: Request) -> None:
    """An engine counted `tokens` prompt tokens for `requests`."""
    estimate.learn_prompts(tokens, [Ticket(request) for request in requests])


def prompt_of(estimate: TokenEstimate, announced: int, kind: str = "", model: str | None = None) -> int:
    ticket = Ticket(Request("r", 0.0, model=model, prompt_tokens=announced, kind=kind))
    estimate.estimate(ticket, None)
    assert ticket.work_tokens == ticket.prompt_tokens
    return ticket.prompt_tokens


@pytest.mark.parametrize("answer", [Answer.UNASKED, Answer.UNKNOWN])
@pytest.mark.parametrize("pages", [True, False])
def test_what_reached_no_engine_is_no_answer_of_no_tokens(answer: Answer, pages: bool) -> None:
    """A limiter of Envoy's behind us, or clients that leave at once: nine of ten so, and answers read as a tenth."""
    desk = Desk(one("a", 10))
    with desk.checked_at_its_end():
        for _ in range(1000):
            for _ in range(9):
                desk.release(desk.ask(), answer)
            answered = desk.ask()
            desk.advance(4.0)
            desk.release(answered, Answer.OK)
            if pages:
                desk.observe("a", Load(output_tokens=400))
    assert desk.ask().output_tokens == pytest.approx(400 if pages else GUESS, rel=0.02)


def test_an_answer_whose_client_left_while_it_was_written_counts() -> None:
    desk = Desk(one("a", 10))
    for _ in range(1000):
        answered = desk.ask()
        desk.advance(4.0)
        desk.release(answered, Answer.UNKNOWN)
        desk.observe("a", Load(output_tokens=400))
    assert desk.ask().output_tokens == pytest.approx(400, rel=0.02)


def test_a_size_that_nobody_saw_is_believed_and_a_few_readings_settle_it() -> None:
    estimate = TokenEstimate()
    assert prompt_of(estimate, 1000) == 1000
    counted(estimate, 300, TEXT)
    assert prompt_of(estimate, 1000) == pytest.approx(300, rel=0.1)
    for _ in range(20):
        counted(estimate, 300, TEXT)
    assert prompt_of(estimate, 1000) == pytest.approx(300, rel=0.01)


@pytest.mark.parametrize(
    ("announced", "kind", "model"), [(2100, "", None), (1000, "image", None), (1000, "", "another")]
)
def test_what_bodies_of_one_size_kind_and_model_say_is_said_of_no_others(
    announced: int, kind: str, model: str | None
) -> None:
    estimate = TokenEstimate()
    for _ in range(20):
        counted(estimate, 300, TEXT)
    assert prompt_of(estimate, 900) == pytest.approx(270, rel=0.02), "of its own kind and size"
    assert prompt_of(estimate, announced, kind, model) == announced


def test_a_reading_of_an_image_does_not_move_what_is_known_of_text() -> None:
    estimate = TokenEstimate()
    for _ in range(20):
        counted(estimate, 10 * 1000, *[TEXT] * 10)
    counted(estimate, 10 * 1000 + 1500, *[TEXT] * 10, IMAGE)
    assert prompt_of(estimate, 1000) == pytest.approx(1000, rel=0.1)
    assert prompt_of(estimate, 100_000) < 5000
    for _ in range(50):
        counted(estimate, 10 * 1000 + 1500, *[TEXT] * 10, IMAGE)
    assert prompt_of(estimate, 1000) == pytest.approx(1000, rel=0.1)
    assert prompt_of(estimate, 100_000) == pytest.approx(1500, rel=0.3)


@pytest.mark.parametrize("tokens", [0, 2**52])
def test_what_hostile_counts_make_of_a_prompt_is_bounded_and_honest_ones_repair_it(tokens: int) -> None:
    estimate = TokenEstimate()
    for _ in range(100):
        counted(estimate, tokens, TEXT)
    assert prompt_of(estimate, 1000) in (int(1000 * LEAST_SCALE), int(1000 * MOST_SCALE))
    for _ in range(100):
        counted(estimate, 1000, TEXT)
    assert prompt_of(estimate, 1000) == pytest.approx(1000, rel=0.05)


def test_a_prompt_without_an_announced_size_teaches_nothing() -> None:
    estimate = TokenEstimate()
    counted(estimate, 5000, Request("r", 0.0))
    assert not estimate._scales
    assert prompt_of(estimate, 0) == 0


def test_the_scales_and_means_of_made_up_models_are_bounded() -> None:
    estimate = TokenEstimate()
    for number in range(SCALES + 50):
        request = Request("r", 0.0, model=f"m{number}", prompt_tokens=10)
        counted(estimate, 10, request)
        estimate.tokens_of(Ticket(request), 1.0, 10.0, learn=True)
    assert (len(estimate._scales), len(estimate._answers)) == (SCALES, SCALES)


def test_names_that_clients_make_up_drive_out_no_model_that_answers_all_the_time() -> None:
    """The means of answers were forgotten by when they were first seen."""
    estimate, real = TokenEstimate(), Ticket(Request("r", 0.0, model="real"))
    for number in range(SCALES + 50):
        made_up = Ticket(Request("r", 0.0, model=f"m{number}"))
        estimate.tokens_of(made_up, 1.0, 10.0, learn=True)
        if number % 1000 == 0:
            estimate.tokens_of(real, 20.0, 10.0, learn=True)
    assert ("real", real.request_class.name) in estimate._answers
    assert "real" in [one.model for one in estimate.learnt() if one.what == "answers"]
    assert len(estimate._answers) == SCALES


def test_nobody_needs_more_than_the_model_takes() -> None:
    ticket = Ticket(Request("r", 0.0, prompt_tokens=50_000))
    TokenEstimate().estimate(ticket, 150)
    assert (ticket.prompt_tokens, ticket.work_tokens, ticket.output_tokens) == (150, 150, 150)


def test_several_sequences_share_their_prompt_and_not_their_answers() -> None:
    ticket = Ticket(Request("r", 0.0, prompt_tokens=100, sequences=4))
    TokenEstimate().estimate(ticket, None)
    assert (ticket.prompt_tokens, ticket.output_tokens) == (100, 4 * GUESS)
    assert ticket.kv_tokens == 100 + 4 * GUESS


# ---- sizes that nobody has counted


BIG: dict[str, Any] = {"kind": "image", "prompt_tokens": 50_000}


IDLE = Load(first_tokens=0, prompt_tokens=0)
"""A page of an engine that counts prompts: none since the page before."""


def refused(*others: EndpointSpec, limit: int = 100, page: Load = IDLE, **also: Any) -> Desk:
    """A desk whose engine is never idle and too small for what an image seems to be: one was refused for that."""
    desk = Desk(one("a", limit, kv_capacity_tokens=20_000), *others)
    desk.observe("a", page)
    for name in desk.core.endpoints:
        desk.ask(prompt_tokens=1000, allowed=frozenset({name}))
    for big in (BIG, *([{**BIG, **also}] if also else [])):
        image = desk.ask(**big, budget_s=1.0)
        assert image.prompt_tokens == big["prompt_tokens"]
        desk.advance(1.0)
        assert desk.outcome(image) is Outcome.BUDGET_EXPIRED
    return desk


def test_one_of_a_kind_that_no_engine_has_counted_is_tried_once_its_guessed_size_had_another_refused() -> None:
    """Else text keeps every engine busy, no image is ever sent, and nobody learns that it has a thousand tokens."""
    desk = refused()
    first, second = desk.ask(**BIG), desk.ask(**BIG)
    assert in_use([first, second]) == [True, False]
    assert (first.prompt_tokens, second.prompt_tokens) == (LAWS.tokens.untried, 50_000)


@pytest.mark.parametrize("page", [Load(), Load(first_tokens=0), Load(prompt_tokens=0)])
def test_nothing_is_tried_where_no_engine_would_count_it(page: Load) -> None:
    """A size may be true: where nothing ever tells, a cache would be overfilled again and again."""
    desk = refused(page=page)
    assert desk.ask(**BIG).prompt_tokens == BIG["prompt_tokens"]


def test_nothing_is_tried_where_it_might_go_to_an_engine_that_does_not_count() -> None:
    desk = refused(one("b", 100, kv_capacity_tokens=20_000))
    assert desk.ask(**BIG).prompt_tokens == BIG["prompt_tokens"]


def test_one_is_tried_at_a_time_of_all_sizes_together() -> None:
    other = {"prompt_tokens": 100_000}
    desk = refused(**other)
    first = desk.ask(**BIG)
    assert first.prompt_tokens == LAWS.tokens.untried
    assert desk.ask(**{**BIG, **other}).prompt_tokens == other["prompt_tokens"]
    desk.observe("a", Load(first_tokens=2, prompt_tokens=2000))
    assert first.prompt_tokens < BIG["prompt_tokens"], "counted"
    assert desk.ask(**{**BIG, **other}).prompt_tokens == LAWS.tokens.untried


def test_a_size_that_was_served_whole_and_not_counted_is_not_tried_again() -> None:
    desk = refused()
    desk.release(desk.ask(**BIG), Answer.OK)
    assert desk.ask(**BIG).prompt_tokens == BIG["prompt_tokens"]


def test_a_size_whose_tries_all_fail_is_given_up() -> None:
    desk = refused()
    for _ in range(TRIES):
        first = desk.ask(**BIG)
        assert first.prompt_tokens == LAWS.tokens.untried
        desk.release(first, Answer.UNKNOWN)
    assert desk.ask(**BIG).prompt_tokens == BIG["prompt_tokens"]


@pytest.mark.parametrize("ends", ["released", "cancelled", "withdrawn"])
def test_a_try_that_told_nothing_is_made_again(ends: str) -> None:
    desk = refused()
    if ends != "released":
        desk.fill(2, prompt_tokens=8000)
    first = desk.ask(**BIG)
    assert in_use([first]) == [ends == "released"]
    match ends:
        case "released":
            desk.release(first, Answer.UNKNOWN)
        case "cancelled":
            desk.cancel(first)
        case _:
            desk.withdraw(first)
    assert desk.ask(**BIG).prompt_tokens == LAWS.tokens.untried


@pytest.mark.parametrize("waits", [False, True])
def test_a_size_that_another_core_knows_is_tried_no_more(waits: bool) -> None:
    desk = refused()
    if waits:
        desk.fill(2, prompt_tokens=8000)
        first = desk.ask(**BIG)
        assert first.prompt_tokens == LAWS.tokens.untried
    desk.core.believe(Learnt("scale", None, "image", BIG["prompt_tokens"].bit_length(), 1.0, 0.01))
    if waits:
        assert first.prompt_tokens == BIG["prompt_tokens"], "it is not sent as what it is known not to be"
    assert desk.ask(**BIG).prompt_tokens == BIG["prompt_tokens"]


def test_only_the_kind_and_size_that_was_refused_for_its_size_is_tried_and_none_that_was_counted() -> None:
    desk = refused()
    for other in ({"kind": "audio"}, {"prompt_tokens": 100_000}, {"model": "m"}):
        assert desk.ask(**{**BIG, **other}).prompt_tokens > LAWS.tokens.untried
    desk.core._tokens.learn_prompts(40_000, [Ticket(Request("r", 0.0, **BIG))])
    assert desk.ask(**BIG).prompt_tokens == pytest.approx(40_000, rel=0.2)
    desk.core._tokens.doubt(desk.ask(**BIG))
    assert desk.ask(**BIG).prompt_tokens > LAWS.tokens.untried


def test_a_prompt_that_was_refused_for_want_of_slots_is_no_reason_to_doubt_its_size() -> None:
    desk = refused(limit=1)
    assert desk.ask(**BIG).prompt_tokens == 50_000


def test_made_up_sizes_that_were_refused_take_no_memory() -> None:
    estimate = TokenEstimate()
    for number in range(2 * SCALES):
        ticket = Ticket(Request("r", 0.0, model=f"m{number}", **BIG))
        estimate.estimate(ticket, None)
        estimate.doubt(ticket)
    assert len(estimate._tries) == SCALES


def answered(model: str, seconds: float, estimate: TokenEstimate, *, sequences: int = 1, times: int = 1) -> float:
    """Whole answers for `model` were written for `seconds` each, at 50 tokens a second; return what the last one is
    taken to have had."""
    tokens = 0.0
    for _ in range(times):
        ticket = Ticket(Request("r", 0.0, model=model, sequences=sequences))
        tokens = estimate.tokens_of(ticket, seconds, 50.0, learn=True)
    return tokens


def answer_of(estimate: TokenEstimate, model: str) -> int:
    ticket = Ticket(Request("r", 0.0, model=model))
    estimate.estimate(ticket, None)
    return ticket.output_tokens


def test_answers_of_models_are_told_apart_by_the_time_they_take_and_their_mean_by_the_counters() -> None:
    estimate = TokenEstimate()
    for _ in range(200):
        answered("short", 1.0, estimate)
        answered("long", 9.0, estimate)
        estimate.learn(400, 2)  # the pace says 500
    assert answer_of(estimate, "short") == pytest.approx(40, rel=0.2)
    assert answer_of(estimate, "long") == pytest.approx(360, rel=0.1)
    assert answer_of(estimate, "unheard of") == GUESS


def test_the_next_answer_is_estimated_by_all_that_is_known_at_that_moment() -> None:
    """What counters and our own view differ by is kept: it has to follow both, and what another core told."""
    estimate = TokenEstimate()
    answered("m", 2.0, estimate, times=MEMORY)
    before = answer_of(estimate, "m")
    estimate.learn(1000 * MEMORY, MEMORY)
    by_counters = answer_of(estimate, "m")
    assert by_counters > 1.3 * before
    mean, *_ = estimate.learnt()
    estimate.believe(mean._replace(value=mean.value / 2))
    assert answer_of(estimate, "m") == pytest.approx(by_counters / 2, abs=1)
    believed = answer_of(estimate, "m")
    answered("other", 20.0, estimate, times=MEMORY)
    assert answer_of(estimate, "m") < 0.5 * believed


def test_one_answer_of_a_model_says_little_of_its_next() -> None:
    estimate = TokenEstimate()
    answered("usual", 4.0, estimate, times=200)
    answered("new", 40.0, estimate)
    assert answer_of(estimate, "new") < 2.5 * GUESS


def test_an_answer_of_several_sequences_counts_for_each_of_them() -> None:
    estimate = TokenEstimate()
    answered("usual", 4.0, estimate, times=100)
    assert answered("many", 4.0, estimate, sequences=5, times=20) == pytest.approx(5 * GUESS, rel=0.5)
    assert answer_of(estimate, "many") == pytest.approx(answer_of(estimate, "usual"), rel=0.2)


def test_an_endless_answer_is_taken_for_no_more_than_the_longest() -> None:
    estimate = TokenEstimate()
    answered("usual", 4.0, estimate, times=200)
    assert answered("stuck", 1e9, estimate) <= MOST_OUTPUT


def test_an_answer_that_a_client_left_is_measured_and_teaches_nothing() -> None:
    estimate = TokenEstimate()
    answered("usual", 4.0, estimate, times=200)
    left = Ticket(Request("r", 0.0, model="usual"))
    assert estimate.tokens_of(left, 1.0, 50.0, learn=False) == pytest.approx(50, rel=0.01)
    assert answer_of(estimate, "usual") == GUESS
    assert estimate.tokens_of(left, 0.0, None, learn=False) == 0.0


def test_before_anything_is_known_an_answer_costs_a_bounded_sum() -> None:
    ticket = Ticket(Request("r", 0.0))
    assert 0.0 <= TokenEstimate().tokens_of(ticket, 30.0, None, learn=False) <= MOST_OUTPUT


def test_a_size_books_no_more_than_a_model_could_take_where_nobody_says_how_much_that_is() -> None:
    ticket = Ticket(Request("r", 0.0, prompt_tokens=10**12))
    TokenEstimate().estimate(ticket, None)
    assert ticket.prompt_tokens == MOST_CONTEXT


def test_bodies_without_a_size_have_a_scale_for_each_class() -> None:
    estimate = TokenEstimate()
    tickets = {}
    for name in ("chat", "batch"):
        tickets[name] = Ticket(Request("r", 0.0, prompt_tokens=1000, kind=UNSIZED))
        tickets[name].request_class = RequestClass(name)
    for _ in range(20):
        estimate.learn_prompts(200, [tickets["chat"]])
        estimate.learn_prompts(4000, [tickets["batch"]])
    for ticket in tickets.values():
        estimate.estimate(ticket, None)
    assert [ticket.prompt_tokens for ticket in tickets.values()] == pytest.approx([200, 4000], rel=0.02)


def test_those_who_wait_are_estimated_anew_once_the_first_of_their_kind_has_shown_what_it_costs() -> None:
    desk = Desk(one("a", 16, kv_capacity_tokens=24_000))
    desk.observe("a", Load(first_tokens=0, running=0.0, waiting=0.0))
    images = desk.fill(6, prompt_tokens=100_000)
    assert in_use(images) == [True, *[False] * 5], "more than the cache has room for: one at a time"
    desk.advance(1.0)
    desk.observe("a", Load(first_tokens=1, prompt_tokens=500, running=1.0, waiting=0.0))
    assert all(in_use(images))


def test_a_wait_that_is_estimated_anew_is_charged_as_it_was_when_it_came() -> None:
    desk = Desk(one("a", 1))
    desk.observe("a", Load(first_tokens=0, running=0.0, waiting=0.0))
    desk.ask(prompt_tokens=1000, tenant="t")
    waiting = desk.ask(prompt_tokens=1000, tenant="t")
    charge = waiting.charge
    desk.observe("a", Load(first_tokens=1, prompt_tokens=100, running=1.0, waiting=0.0))
    assert waiting.prompt_tokens < 200
    assert waiting.charge == charge
    assert waiting.kv_tokens == waiting.prompt_tokens + waiting.output_tokens
