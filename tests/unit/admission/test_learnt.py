"""What one core has learned of tokens is told another, which goes on from there, as far as it can be true."""

from __future__ import annotations

import pytest

from extproc.admission.estimate import (
    LEAST_SCALE,
    MOST_LEARNT,
    MOST_OUTPUT,
    MOST_PACE,
    MOST_SCALE,
    SCALES,
    Learnt,
    TokenEstimate,
)
from extproc.admission.laws import LAWS
from extproc.admission.ticket import Ticket
from extproc.admission.values import Request

LAW = LAWS.tokens
MEAN, ALL, ANSWERS, SCALE = (
    Learnt("mean", None, "", 0, 300.0, 0.0),
    Learnt("all", None, "", 0, 150.0, 40.0),
    Learnt("answers", "m", "std", 0, 90.0, 12.0),
    Learnt("scale", "m", "image", 11, 0.5, 0.25),
)


def ticket_for(**request: object) -> Ticket:
    return Ticket(Request("r", 0.0, **request))


def taught() -> TokenEstimate:
    """One that knows models, kinds, and answers of several lengths."""
    estimate = TokenEstimate()
    for number in range(1, 60):
        model, kind = f"m{number % 3}", ("", "image")[number % 2]
        ticket = ticket_for(model=model, kind=kind, prompt_tokens=100 * number)
        estimate.learn_prompts(70 * number, [ticket])
        estimate.tokens_of(ticket, 0.1 * number, 60.0, learn=True)
        estimate.learn(150 * number, number)
    return estimate


def test_who_believes_all_that_another_learned_estimates_as_that_one_does() -> None:
    first, second = taught(), TokenEstimate()
    for one in first.learnt():
        second.believe(one)
    assert set(second.learnt()) == set(first.learnt())
    assert {one.what for one in first.learnt()} == {"mean", "all", "answers", "scale"}
    for request in (Request("r", 0.0, "m1", prompt_tokens=900), Request("r", 0.0, "m2", prompt_tokens=4000)):
        tickets = Ticket(request), Ticket(request)
        for estimate, ticket in zip((first, second), tickets, strict=True):
            estimate.estimate(ticket, None)
        assert tickets[0].prompt_tokens == tickets[1].prompt_tokens != request.prompt_tokens
        assert tickets[0].output_tokens == tickets[1].output_tokens != LAW.answer


@pytest.mark.parametrize(
    ("told", "believed"),
    [
        (MEAN, MEAN),
        (ALL, ALL),
        (ANSWERS, ANSWERS),
        (SCALE, SCALE),
        (MEAN._replace(value=-1.0), MEAN._replace(value=0.0)),
        (MEAN._replace(value=1e12), MEAN._replace(value=float(MOST_OUTPUT))),
        (ALL._replace(value=-1.0, weight=-1.0), ALL._replace(value=0.0, weight=0.0)),
        (ALL._replace(value=1e12, weight=1e12), ALL._replace(value=float(MOST_OUTPUT), weight=LAW.memory)),
        (ANSWERS._replace(value=-1.0, weight=0.0), ANSWERS._replace(value=0.0, weight=1.0)),
        (ANSWERS._replace(value=1e12, weight=1e12), ANSWERS._replace(value=float(MOST_OUTPUT), weight=LAW.memory)),
        (SCALE._replace(value=0.0, weight=5.0), SCALE._replace(value=LEAST_SCALE, weight=LAW.unsure)),
        (SCALE._replace(value=99.0, weight=0.0), SCALE._replace(value=MOST_SCALE, weight=LAW.sure * MOST_SCALE**2)),
        (SCALE._replace(value=2.0, weight=0.0), SCALE._replace(value=2.0, weight=LAW.sure * 2.0**2)),
    ],
)
def test_what_another_core_tells_is_believed_as_far_as_it_can_be_true(told: Learnt, believed: Learnt) -> None:
    estimate = TokenEstimate()
    estimate.believe(told)
    assert believed in estimate.learnt()


def test_what_nobody_here_knows_of_changes_nothing() -> None:
    estimate = taught()
    before = estimate.learnt()
    estimate.believe(Learnt("fashion", "m1", "std", 3, 1.0, 1.0))
    assert estimate.learnt() == before


def test_what_was_used_last_is_told_and_what_was_used_longest_ago_is_forgotten() -> None:
    estimate = TokenEstimate()
    for number in range(SCALES + 1):
        estimate.believe(ANSWERS._replace(model=f"m{number}"))
        estimate.believe(SCALE._replace(model=f"m{number}"))
    last = [f"m{number}" for number in range(SCALES, SCALES - MOST_LEARNT, -1)]
    told = estimate.learnt()
    assert [one.model for one in told if one.what == "answers"] == last
    assert [one.model for one in told if one.what == "scale"] == last
    assert len(told) == 2 + 2 * MOST_LEARNT
    for number in (0, 1):
        ticket = ticket_for(model=f"m{number}", kind="image", prompt_tokens=2000)
        estimate.estimate(ticket, None)
        assert ticket.prompt_tokens == (2000 if number == 0 else 1000)


def test_an_answer_is_as_long_as_its_engine_writes_in_that_time_and_the_mean_is_followed() -> None:
    estimate = TokenEstimate()
    assert estimate.tokens_of(ticket_for(sequences=2), 3.0, 40.0, learn=True) == pytest.approx(
        240 * min(LAW.answer / 240, MOST_SCALE)
    ), "as counters say of all answers"
    assert estimate.tokens_of(ticket_for(), 3.0, 40.0, learn=True) == pytest.approx(120 * LAW.answer / 180)
    assert estimate.tokens_of(ticket_for(), 1.0, 45.0, learn=False) == pytest.approx(45 * LAW.answer / 180)
    told = {one.what: (one.value, one.weight) for one in estimate.learnt()}
    assert told["all"] == pytest.approx((180.0, 2.0))
    assert told["answers"] == pytest.approx((120.0, 2.0)), "of one sequence"


def test_where_no_engine_tells_its_pace_an_answer_is_as_much_longer_than_the_mean_as_it_took_longer() -> None:
    estimate = TokenEstimate()
    assert estimate.tokens_of(ticket_for(), 2.0, None, learn=False) == pytest.approx(LAW.answer)
    assert estimate.tokens_of(ticket_for(), 6.0, None, learn=False) == pytest.approx(1.5 * LAW.answer)


def test_an_engine_is_taken_to_write_a_few_times_as_fast_as_the_median_and_answers_move_that_a_little() -> None:
    estimate = TokenEstimate()

    def seen_at(pace: float) -> float:
        return estimate.tokens_of(ticket_for(), 1.0, pace, learn=False)

    assert seen_at(1e6) == pytest.approx(LAW.first_pace * LAW.nudge * LAW.most_faster)
    assert seen_at(1e6) == pytest.approx(LAW.first_pace * LAW.nudge**2 * LAW.most_faster)
    assert seen_at(10.0) == 10.0
    assert seen_at(1e6) == pytest.approx(LAW.first_pace * LAW.nudge**2 * LAW.most_faster), "once up, once down, once up"
    for _ in range(400):
        seen_at(1e6)
    assert seen_at(1e6) == pytest.approx(MOST_PACE * LAW.most_faster)


def test_a_reading_moves_the_mean_by_the_share_of_its_answers_and_at_most_doubles_it() -> None:
    estimate = TokenEstimate()

    def mean_after(output_tokens: int, answers: int) -> float:
        estimate.learn(output_tokens, answers)
        return estimate.learnt()[0].value

    assert mean_after(10 * 300, 10) == pytest.approx(200 + 10 / LAW.memory * 100)
    assert mean_after(1000 * 105, 1000) == pytest.approx((205 + 105) / 2), "half, at the most"
    assert mean_after(1000 * 10**6, 1000) == pytest.approx(2 * 155 + 1)
    assert mean_after(5, 0) == pytest.approx(311), "no answer says nothing"
