"""How fast requests leave and arrive, and what that predicts."""

from __future__ import annotations

import math

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.pace import Pace

ENOUGH = int(LAWS.pace.enough)
HORIZON_S = LAWS.pace.memory_s
LEAST_BUSY_S = LAWS.pace.least_busy_s
SURE = LAWS.pace.sure


def test_a_pause_takes_weight_from_what_was_learnt_and_leaves_the_rate() -> None:
    pace = Pace()
    for number in range(1, 200):
        pace.dispatched(number / 10)
    before = pace.drain_rate()
    pace.backlog_began(19.9 + HORIZON_S)
    assert pace.drain_rate() == pytest.approx(before) == pytest.approx(10.0, rel=0.1)
    pace.backlog_began(19.9 + 10 * HORIZON_S)
    assert pace.drain_rate() is None


def known_pace() -> Pace:
    """The least that is worth believing: ENOUGH dispatches in LEAST_BUSY_S."""
    pace = Pace()
    for _ in range(ENOUGH):
        pace.dispatched(LEAST_BUSY_S)
    return pace


def test_a_rate_is_believed_from_enough_dispatches_in_enough_time() -> None:
    assert known_pace().drain_rate() == ENOUGH / LEAST_BUSY_S
    few, brief = Pace(), Pace()
    for _ in range(ENOUGH - 1):
        few.dispatched(LEAST_BUSY_S)
    for _ in range(ENOUGH):
        brief.dispatched(0.99 * LEAST_BUSY_S)
    assert (few.drain_rate(), brief.drain_rate()) == (None, None)


def test_the_drain_rate_follows_the_last_seconds() -> None:
    pace = Pace()
    for half in range(1, 201):
        pace.dispatched(half / 2)
    for twentieth in range(1, 201):
        pace.dispatched(100.0 + twentieth / 20)
    assert pace.drain_rate() == pytest.approx(2.0 / math.e + 20.0 * (1 - 1 / math.e), rel=0.1)


def test_a_pool_of_few_dispatches_is_known_after_some_of_them_and_remembered_for_longer() -> None:
    pace = Pace()
    for number in range(1, 5):
        pace.dispatched(5.0 * number)
    assert pace.drain_rate() == pytest.approx(0.2, rel=0.3)
    assert pace.wait_s(9, 0, 20.0) == pytest.approx(50.0, rel=0.3)


def test_the_predicted_wait_is_that_of_the_last_in_a_line_that_higher_classes_slow_down() -> None:
    pace = known_pace()
    now, rate = LEAST_BUSY_S, ENOUGH / LEAST_BUSY_S
    assert pace.wait_s(5, 0, now) == pytest.approx(6 / rate)
    for _ in range(20):
        pace.arrived(5, now, now)
    above = 20 / HORIZON_S
    assert pace.wait_s(5, 5, now) == pytest.approx(6 / rate)
    assert pace.wait_s(5, 0, now) == pytest.approx(6 / (rate - above))
    assert pace.wait_s(5, 0, now + HORIZON_S) == pytest.approx(6 / (rate - above / math.e))
    for _ in range(20):
        pace.arrived(5, now + HORIZON_S, now + HORIZON_S)
    assert pace.wait_s(5, 0, now + HORIZON_S) == pytest.approx(6 / (rate - above / math.e - above))
    for _ in range(200):
        pace.arrived(5, now + HORIZON_S, now + HORIZON_S)
    assert pace.wait_s(5, 0, now + HORIZON_S) == pytest.approx(SURE * 6 / rate), "it is no longer than that"


def test_one_long_silence_is_no_pace_and_two_are() -> None:
    pace = Pace()
    for number in range(1, 101):
        pace.dispatched(number / 10)
    pace.dispatched(10.0 + 3 * HORIZON_S)
    for number in range(1, 11):
        pace.dispatched(10.0 + 3 * HORIZON_S + number / 10)
    assert pace.drain_rate() == pytest.approx(10.0, rel=0.1), "it stood still, and goes on as before"
    for number in range(1, 11):
        pace.dispatched(11.0 + 3 * HORIZON_S * (number + 1))
    assert pace.drain_rate() == pytest.approx(1 / (3 * HORIZON_S), rel=0.1), "it is that slow now"


@pytest.mark.parametrize("gap_s", [11.0, 20.0, 60.0])
def test_answers_that_begin_together_and_end_together_are_a_pace_however_long_they_take(gap_s) -> None:
    """Of one length, as a batch's: eight end at once, and then none for longer than the memory, for ever."""
    pace = Pace()
    for gang in range(1, 4):
        for number in range(8):
            pace.dispatched(gang * gap_s + number / 100)
    assert pace.drain_rate() == pytest.approx(8 / gap_s, rel=0.15)
