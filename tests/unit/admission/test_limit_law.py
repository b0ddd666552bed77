"""The law of the adaptive limit, reading by reading: evidence overrules it, whatever it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from extproc.admission.limit import (
    CEILING,
    DEFAULT_LAW,
    LONGEST_S,
    AdaptiveLimit,
    FixedLimit,
    Limit,
)
from extproc.admission.load import Load
from extproc.admission.steps import StepCost

from .desk import slow

START, FLOOR, TPOT_S = DEFAULT_LAW.start, DEFAULT_LAW.floor, DEFAULT_LAW.tpot_s


def follow(limit: Limit, load: Load, costs: StepCost | None = None, **said: Any) -> int:
    """One reading, a second after the one before; the limit is what holds requests back only if `wanted`."""
    said = {"wanted": False, "in_flight": START, "elapsed_s": 1.0, "knows_kv": False, **said}
    costs = StepCost() if costs is None else costs
    costs.follow(load, None, said["elapsed_s"])
    limit.observe(load, costs, **said)
    return limit.value


@pytest.mark.parametrize(
    ("load", "said", "factor"),
    [
        (Load(), {"wanted": True}, 1.0),
        (Load(preemptions=1), {}, 0.9),
        (Load(preemptions=1), {"elapsed_s": 0.5}, 0.9**0.5),
        (Load(kv_usage=0.93), {}, 0.9),
        (Load(kv_usage=0.92, preemptions=0), {}, 1.0),
        (Load(kv_usage=0.99, preemptions=9), {"knows_kv": True}, 1.0),
        (slow(0.09), {}, 0.08 / 0.09),
        (slow(0.5), {}, 0.85),
        (slow(0.5), {"elapsed_s": 0.5}, 0.85**0.5),
        (slow(0.5), {"elapsed_s": 60.0}, 0.85**LONGEST_S),
        (slow(0.09), {"in_flight": 2 * START}, 1.0),
        (Load(running=100 * TPOT_S, tokens_per_s=100.0), {"in_flight": 1}, 1.0),
        (slow(0.06), {"wanted": True}, 1.1),
        (slow(0.075), {"wanted": True}, 0.08 / 0.075),
        (slow(0.05), {"wanted": True}, 1.1),
        (slow(0.04), {"wanted": True}, 2.0),
        (slow(0.001), {"wanted": True}, 2.0),
        (slow(0.049), {"wanted": True}, 0.08 / 0.049),
        (slow(0.04), {"wanted": True, "elapsed_s": 0.5}, 2.0**0.5),
        (slow(0.04), {"wanted": True, "elapsed_s": 0.0}, 1.0),
        (slow(0.04), {}, 1.0),
        (slow(0.04, preemptions=1), {"wanted": True}, 0.9),
        (Load(running=10.0), {"wanted": True}, 1.0),
        (Load(tokens_per_s=10.0), {"wanted": True}, 1.0),
        (Load(running=10.0, tokens_per_s=0.0), {"wanted": True}, 1.0),
        (Load(running=1.0, tokens_per_s=1.0), {}, 0.85),
        (Load(running=0.0, tokens_per_s=5.0), {"wanted": True}, 1.0),
    ],
)
def test_the_adaptive_limit_follows_its_law(load: Load, said: dict[str, Any], factor: float) -> None:
    assert follow(AdaptiveLimit(), load, **said) == int(START * factor)


def test_the_adaptive_limit_has_a_floor_and_a_ceiling() -> None:
    limit = AdaptiveLimit()
    for _ in range(100):
        follow(limit, Load(preemptions=1))
    assert limit.value == FLOOR
    for _ in range(100):
        follow(limit, slow(0.001), wanted=True)
    assert limit.value == CEILING


def test_one_slow_reading_is_smoothed() -> None:
    limit, costs = AdaptiveLimit(), StepCost()
    follow(limit, slow(0.04), costs)
    assert follow(limit, slow(0.15), costs) == START
    assert follow(limit, slow(0.15), costs) < START


def test_the_limit_doubles_from_its_low_start_while_answers_are_fast() -> None:
    limit, costs = AdaptiveLimit(), StepCost()
    assert [follow(limit, slow(0.03), costs, wanted=True) for _ in range(4)] == [32, 64, 128, 256]
    assert START == 16
    assert limit.why == "growth"


def test_a_slow_second_long_ago_does_not_shrink_the_limit_of_an_idle_engine() -> None:
    """It fell from 33 to 4 while nothing ran at all: the last time per token was believed for ever."""
    limit, costs = AdaptiveLimit(replace(DEFAULT_LAW, start=33)), StepCost()
    assert follow(limit, slow(0.1), costs, in_flight=33) < 33
    before = limit.value
    for _ in range(100):
        follow(limit, Load(running=0.0, waiting=0.0, tokens_per_s=0.0), costs, in_flight=0)
    assert limit.value == before


def test_a_fixed_limit_ignores_telemetry_and_answers() -> None:
    limit = FixedLimit(7)
    assert follow(limit, Load(preemptions=9, kv_usage=1.0), wanted=True) == 7
    limit.learn(1e6, 7.0, wanted=True)
    limit.forget()
    assert limit.value == 7


# ---- an engine whose steps are slow


def busy(limit: AdaptiveLimit, step_s: float, seconds: int, *, wanted: bool = True) -> StepCost:
    """An engine that runs what the limit allows, each step `step_s` long, however many run."""
    costs = StepCost()
    for _ in range(seconds):
        running = float(limit.value)
        load = Load(running=running, waiting=0.0, tokens_per_s=running / step_s)
        costs.follow(load, running, 1.0)
        limit.observe(load, costs, wanted=wanted, in_flight=limit.value, elapsed_s=1.0, knows_kv=False)
    return costs


def test_the_limit_of_an_engine_whose_steps_are_slow_does_not_fall_to_the_floor() -> None:
    """No limit, however low, makes its answers faster than 90 ms a token; at 4 it would only serve fewer."""
    limit = AdaptiveLimit()
    costs = busy(limit, 0.09, 60)
    assert costs.base_s == pytest.approx(0.09, rel=0.25)
    assert limit.target_s == DEFAULT_LAW.best_factor * costs.base_s > TPOT_S
    assert limit.value > START


def test_an_engine_whose_steps_grow_with_what_runs_is_held_where_they_are_as_long_as_wanted() -> None:
    limit, costs, running = AdaptiveLimit(), StepCost(), 0.0
    for _ in range(120):
        before, running = running, float(limit.value)
        load = Load(running=running, waiting=0.0, tokens_per_s=running / (0.01 + 0.001 * running))
        costs.follow(load, before, 1.0)
        limit.observe(load, costs, wanted=True, in_flight=limit.value, elapsed_s=1.0, knows_kv=False)
    assert limit.value == pytest.approx(70, abs=7), "10 ms and 1 ms for each are 80 ms at 70"


# ---- the engine's batch size


def engine(limit: AdaptiveLimit, batch: int, costs: StepCost, *, wanted: bool = True, **said: Any) -> int:
    """A second of an engine that runs at most `batch` of what the limit allows, fast; the others wait inside."""
    running = float(min(limit.value, batch))
    load = Load(running=running, waiting=float(limit.value - running), tokens_per_s=running / 0.02, **said)
    return follow(limit, load, costs, wanted=wanted, in_flight=limit.value)


def found(batch: int) -> tuple[AdaptiveLimit, StepCost]:
    """A limit that has found the engine's batch size."""
    limit, costs = AdaptiveLimit(), StepCost()
    for _ in range(30):
        engine(limit, batch, costs)
        if limit.batch is not None:
            break
    return limit, costs


@pytest.mark.parametrize("batch", [1, 6, 24, 256])
def test_a_queue_inside_an_engine_makes_its_batch_size_within_a_few_readings(batch: int) -> None:
    limit, costs = AdaptiveLimit(), StepCost()
    queued = 0
    while limit.batch is None:
        engine(limit, batch, costs)
        queued += limit.value > batch
        assert queued <= 2 * DEFAULT_LAW.queued_readings
    assert (limit.batch, limit.value, limit.why) == (batch, batch, "batch")


def test_a_batch_size_is_remembered_while_its_queue_is_gone() -> None:
    limit, costs = found(24)
    for _ in range(int(DEFAULT_LAW.probe_s) - 1):
        assert engine(limit, 24, costs) == 24
    for _ in range(100):  # nobody waits for it: nothing to find out
        assert engine(limit, 24, costs, wanted=False) == 24


def test_a_batch_size_is_tried_anew_after_a_while_and_for_longer_each_time_it_is_found_again() -> None:
    limit, costs = found(24)
    values = [engine(limit, 24, costs) for _ in range(200)]
    tries = [second for second in range(1, 200) if values[second] > 24 >= values[second - 1]]
    assert max(values) == 24 + 3, "a little more is enough to see"
    assert tries[0] == pytest.approx(DEFAULT_LAW.probe_s, abs=2)
    assert tries[1] - tries[0] == pytest.approx(2 * DEFAULT_LAW.probe_s, abs=DEFAULT_LAW.queued_readings + 2)
    assert len(tries) == 2


def test_however_often_it_is_found_a_batch_size_is_believed_no_longer_than_the_law_allows() -> None:
    limit, costs = found(24)
    values = [engine(limit, 24, costs) for _ in range(5000)]
    tries = [second for second in range(1, 5000) if values[second] > 24 >= values[second - 1]]
    assert tries[-1] - tries[-2] == pytest.approx(DEFAULT_LAW.probe_most_s, rel=0.03)


def test_a_batch_size_is_dropped_when_the_engine_runs_more() -> None:
    limit, costs = found(24)
    follow(limit, Load(running=40.0, waiting=0.0, tokens_per_s=2000.0), costs, wanted=True)
    assert limit.batch is None
    for _ in range(3):
        engine(limit, 400, costs)
    assert limit.value > 40


def test_a_batch_size_that_grew_is_found_out_by_the_try() -> None:
    limit, costs = found(24)
    for _ in range(int(DEFAULT_LAW.probe_s) + 10):
        engine(limit, 100, costs)
    assert limit.value > 32


@pytest.mark.parametrize("load", [Load(running=20.0, waiting=2.0), Load(running=0.0, waiting=9.0)])
def test_few_that_wait_for_their_turn_are_no_queue(load: Load) -> None:
    limit, costs = AdaptiveLimit(), StepCost()
    for _ in range(10):
        follow(limit, replace(load, tokens_per_s=1000.0), costs, wanted=True)
    assert limit.batch is None


def test_a_queue_while_an_engine_starts_more_and_more_makes_no_batch_size() -> None:
    limit, costs = AdaptiveLimit(), StepCost()
    for running in (8.0, 10.0, 13.0, 17.0, 22.0, 28.0, 36.0):
        follow(limit, Load(running=running, waiting=9.0, tokens_per_s=50 * running), costs, wanted=True)
        assert limit.batch is None


def test_queues_that_come_and_go_make_no_batch_size() -> None:
    limit, costs = AdaptiveLimit(), StepCost()
    for number in range(20):
        follow(limit, Load(running=20.0, waiting=9.0 * (number % 3 > 0), tokens_per_s=1000.0), costs, wanted=True)
    assert limit.batch is None


def test_the_limit_does_not_grow_while_the_engine_queues() -> None:
    limit, costs = AdaptiveLimit(), StepCost()
    assert follow(limit, Load(running=8.0, waiting=8.0, tokens_per_s=400.0), costs, wanted=True) == START


def test_an_engine_that_says_its_batch_size_is_believed_at_once() -> None:
    limit, costs = AdaptiveLimit(), StepCost()
    assert follow(limit, Load(running=3.0, max_running=6), costs) == 6
    assert follow(limit, Load(running=6.0, waiting=0.0, max_running=200, tokens_per_s=300.0), costs, wanted=True) == 12
    assert limit.batch == 200


@pytest.mark.parametrize("said", [0, 5])
def test_an_engine_that_says_less_than_it_runs_is_not_believed(said: int) -> None:
    limit = AdaptiveLimit()
    assert follow(limit, Load(running=9.0, waiting=0.0, max_running=said)) == START
    assert limit.batch is None


def test_an_idle_engine_that_says_it_runs_none_at_all_is_still_sent_one() -> None:
    assert follow(AdaptiveLimit(), Load(running=0.0, waiting=0.0, max_running=0)) == 1


# ---- an engine that says nothing of its tokens


def blind(
    answers: int, *, wanted: bool = True, took_s: float = 4.0, limit: AdaptiveLimit | None = None
) -> AdaptiveLimit:
    limit = AdaptiveLimit() if limit is None else limit
    for _ in range(answers):
        limit.learn(took_s, float(limit.value), wanted=wanted)
    return limit


def test_a_blind_limit_grows_by_one_with_each_answer_while_requests_wait_for_it() -> None:
    limit = blind(5)
    assert (limit.value, limit.why) == (START + 5, "answers")
    assert blind(50, wanted=False).value == START


def test_a_blind_limit_is_bounded_by_what_answers_say_is_right() -> None:
    limit = blind(20)
    said = []
    for _ in range(3000):  # each beside it makes an answer half a second longer
        limit.learn(1.0 + 0.5 * limit.value, float(limit.value), wanted=True)
        said.append(limit.slowdown.most)
    assert min(said[-50:]) - 1 <= limit.value <= max(said[-50:]) < 40
    assert limit.value < 40
    for _ in range(5000):
        limit.learn(0.001, float(limit.value), wanted=True)
    assert limit.value <= CEILING


def test_a_limit_that_sees_tokens_does_not_follow_the_times_of_answers_until_they_are_not_seen_any_more() -> None:
    limit = AdaptiveLimit()
    follow(limit, slow(0.06))
    assert blind(50, limit=limit).value == START
    limit.forget()
    assert blind(5, limit=limit).value == START + 5


def test_a_blind_limit_does_not_grow_beyond_a_batch_size() -> None:
    limit = AdaptiveLimit()
    for _ in range(DEFAULT_LAW.queued_readings):
        follow(limit, Load(running=8.0, waiting=8.0), wanted=True)
    assert blind(50, limit=limit).value == 8


@pytest.mark.parametrize(
    ("law", "base_s", "target_s"),
    [
        ({}, 0.02, TPOT_S),
        ({}, 0.08, DEFAULT_LAW.best_factor * 0.08),
        ({"objective_s": 0.05}, 0.02, DEFAULT_LAW.aimed * 0.05),
        ({"objective_s": 0.2}, 0.02, DEFAULT_LAW.aimed * 0.2),
        ({"objective_s": 0.05}, 0.09, DEFAULT_LAW.attainable * 0.09),
    ],
)
def test_what_users_want_wins_over_the_laws_own_figure_as_far_as_steps_allow(
    law: dict[str, float], base_s: float, target_s: float
) -> None:
    assert replace(DEFAULT_LAW, **law).target_s(base_s) == target_s


def test_a_guess_of_what_steps_cost_makes_no_target() -> None:
    limit, costs = AdaptiveLimit(), StepCost()
    costs.base_s = 9.0
    follow(limit, slow(0.06), costs)
    assert (costs.readings, limit.target_s) == (0, TPOT_S)


def test_a_limit_goes_on_from_where_another_sidecars_was_within_its_own_bounds() -> None:
    limit = AdaptiveLimit()
    values = []
    for value in (100, 1, 10**6):
        limit.start_at(value)
        values.append(limit.value)
    assert values == [100, FLOOR, CEILING]
    fixed = FixedLimit(3)
    fixed.start_at(100)
    assert fixed.value == 3


@pytest.mark.parametrize(
    ("load", "why"), [(Load(), "start"), (Load(preemptions=1), "kv"), (slow(0.2), "speed"), (slow(0.06), "growth")]
)
def test_the_limit_says_what_set_it_last(load: Load, why: str) -> None:
    limit = AdaptiveLimit()
    follow(limit, load, wanted=True)
    assert limit.why == why
    follow(limit, Load(running=limit.value, max_running=limit.value))
    assert limit.why == "batch"


def test_an_engine_whose_own_batch_is_full_is_sent_no_more_though_it_could_run_more_some_time() -> None:
    limit = AdaptiveLimit()
    assert follow(limit, Load(running=9.0, waiting=1.0, max_running=200, tokens_per_s=900.0), wanted=True) == START


@pytest.mark.parametrize(("batch", "tried"), [(6, 7), (40, 45)])
def test_a_try_is_one_more_or_an_eighth(batch: int, tried: int) -> None:
    limit, costs = found(batch)
    assert max(engine(limit, batch, costs) for _ in range(40)) == tried


def test_a_blind_limit_shrinks_by_one_with_each_answer() -> None:
    limit = AdaptiveLimit(replace(DEFAULT_LAW, start=400))
    limit.slowdown.most = 100.0
    values = [blind(1, limit=limit, took_s=60.0).value for _ in range(3)]
    assert values == [399, 398, 397]


def test_a_page_that_says_nothing_of_tokens_any_more_leaves_the_limit_to_the_answers() -> None:
    limit = AdaptiveLimit()
    follow(limit, slow(0.06))
    follow(limit, Load(running=5.0))
    assert blind(5, limit=limit).value == START, "one reading without a word is no silence"
    for _ in range(DEFAULT_LAW.silent_readings):
        follow(limit, Load(running=5.0))
    assert blind(5, limit=limit).value == START + 5
