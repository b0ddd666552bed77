"""What a step of an engine costs, found from counters that a made-up engine of known costs would show."""

from __future__ import annotations

from math import exp, inf, isfinite
from random import Random

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.load import Load
from extproc.admission.steps import LEAST, LONGEST_S, StepCost

LAW = LAWS.steps
FIRST = (LAW.base_s, LAW.sequence_s, LAW.prompt_s)
FIRST_OFF = (LAW.base_off_s, LAW.sequence_off_s, LAW.prompt_off_s)
DRIFT = (LAW.base_drift_s, LAW.sequence_drift_s, LAW.prompt_drift_s)
SECONDS = 12
"""A few: an engine that comes up must be known before its limit has done harm."""


def follow(costs: StepCost, base_s: float, sequence_s: float, prompt_s: float, *, seconds: int, seed: int = 0) -> None:
    """Show `costs` readings of a busy engine, one a second, whose concurrency and prompts vary."""
    random, before = Random(seed), 8.0
    for _ in range(seconds):
        running = float(random.randint(4, 120))
        mean = (before + running) / 2
        share = random.uniform(0.0, 0.6)  # of the second that prompts take
        steps = (1.0 - share) / (base_s + sequence_s * mean)
        load = Load(
            running=running,
            tokens_per_s=steps * mean,
            prompt_tokens=int(share / prompt_s),
            output_tokens=int(steps * mean),
        )
        costs.follow(load, before, 1.0)
        before = running


@pytest.mark.parametrize(
    ("base_s", "sequence_s", "prompt_s"),
    [
        pytest.param(0.008, 5e-5, 2e-5, id="a small model on a fast GPU"),
        pytest.param(0.025, 2e-4, 8e-5, id="as guessed"),
        pytest.param(0.09, 3e-4, 3e-4, id="a large model on a slow one"),
    ],
)
def test_the_costs_of_steps_are_found_within_a_few_seconds(base_s: float, sequence_s: float, prompt_s: float) -> None:
    costs = StepCost()
    follow(costs, base_s, sequence_s, prompt_s, seconds=SECONDS)
    assert costs.base_s == pytest.approx(base_s, rel=0.35)
    assert costs.base_s + 60 * costs.sequence_s == pytest.approx(base_s + 60 * sequence_s, rel=0.25)
    assert costs.prompt_s == pytest.approx(prompt_s, rel=0.35)
    assert costs.readings == SECONDS


def test_costs_that_change_are_followed() -> None:
    costs = StepCost()
    follow(costs, 0.02, 1e-4, 5e-5, seconds=60)
    follow(costs, 0.06, 1e-4, 5e-5, seconds=60, seed=1)
    assert costs.base_s == pytest.approx(0.06, rel=0.3)


def test_what_the_prefix_cache_held_is_not_counted_as_computed() -> None:
    with_hits, without = StepCost(), StepCost()
    for _ in range(20):
        for costs, prompts, fresh in ((with_hits, 20_000, 0.25), (without, 5000, 1.0)):
            costs.follow(Load(running=20.0, tokens_per_s=600.0, prompt_tokens=prompts), 20.0, 1.0, fresh)
    assert with_hits.prompt_s == without.prompt_s


def test_the_time_per_token_is_running_requests_over_their_tokens_of_the_last_seconds() -> None:
    costs = StepCost()
    assert (costs.tpot_s, costs.pace) == (None, None)
    costs.follow(Load(running=10.0, tokens_per_s=200.0), None, 1.0)
    assert costs.tpot_s == pytest.approx(0.05)
    assert costs.pace == pytest.approx(20.0)
    for _ in range(30):
        costs.follow(Load(running=10.0, tokens_per_s=100.0), None, 1.0)
    assert costs.tpot_s == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("before", [None, 0.0])
def test_a_time_per_token_to_compare_is_of_readings_between_which_it_was_busy_and_of_lately(
    before: float | None,
) -> None:
    """Two that began just before a reading had written three tokens in all of a second."""
    costs = StepCost()
    costs.follow(Load(running=2.0, tokens_per_s=3.0), before, 1.0)
    assert costs.busy_tpot_s is None
    costs.follow(Load(running=2.0, tokens_per_s=100.0), 2.0, 1.0)
    assert costs.busy_tpot_s == pytest.approx(0.02)
    costs.follow(Load(running=2.0, tokens_per_s=3.0), before, 2.0)
    assert costs.busy_tpot_s == pytest.approx(0.02)
    for _ in range(3):
        costs.follow(Load(running=2.0, tokens_per_s=3.0), before, 2.0)
    assert costs.busy_tpot_s is None, "that was long ago"


@pytest.mark.parametrize(
    "load",
    [
        Load(),
        Load(running=5.0),
        Load(tokens_per_s=50.0),
        Load(running=0.0, tokens_per_s=50.0),
        Load(running=5.0, tokens_per_s=0.0),
        Load(running=-5.0, tokens_per_s=50.0),
        Load(running=5.0, tokens_per_s=-50.0),
    ],
)
def test_a_reading_in_which_the_engine_did_nothing_teaches_nothing(load: Load) -> None:
    costs = StepCost()
    costs.follow(Load(running=5.0, tokens_per_s=50.0), 5.0, 1.0)
    before = (costs.base_s, costs.sequence_s, costs.prompt_s, costs.tpot_s, costs.readings)
    assert costs.worked
    costs.follow(load, 5.0, 1.0)
    assert not costs.worked
    assert (costs.base_s, costs.sequence_s, costs.prompt_s, costs.tpot_s, costs.readings) == before


@pytest.mark.parametrize("before", [None, 0.0])
def test_a_reading_that_was_not_busy_from_end_to_end_says_nothing_of_steps(before: float | None) -> None:
    costs = StepCost()
    costs.follow(Load(running=5.0, tokens_per_s=50.0), before, 1.0)
    assert (costs.readings, costs.base_s, costs.worked) == (0, FIRST[0], True)


def test_a_reading_after_a_long_silence_weighs_no_more_than_one_after_some_seconds() -> None:
    silent, usual = StepCost(), StepCost()
    for costs, elapsed_s in ((silent, 3600.0), (usual, LONGEST_S)):
        costs.follow(Load(running=50.0, tokens_per_s=400.0), 50.0, elapsed_s)
    assert (silent.base_s, silent.sequence_s, silent.tpot_s) == (usual.base_s, usual.sequence_s, usual.tpot_s)


@pytest.mark.parametrize("seed", range(20))
def test_no_reading_makes_what_it_shows_less_explained_than_before(seed: int) -> None:
    """One cost stayed at its least, and what it could not take went to another: up, against all that was seen."""
    random, costs = Random(seed), StepCost()
    for number in range(60):
        running, prompts = random.uniform(4.0, 20.0), random.uniform(4000.0, 18_000.0)
        steps = (1.0 - prompts * 2e-5) / (0.0075 + 2e-4 * running)
        counted = prompts * (2.0 if number < 2 else 1.0)  # the first ones stood in a cache

        def missing_s(steps: float = steps, tokens: float = steps * running, counted: float = counted) -> float:
            return abs(1.0 - costs.base_s * steps - costs.sequence_s * tokens - costs.prompt_s * counted)

        before_s = missing_s()
        costs.learn(1.0, steps, steps * running, counted)
        assert missing_s() <= before_s + 1e-9


def test_an_engine_whose_first_prompts_stood_in_its_cache_is_not_held_to_be_slow_for_ever() -> None:
    """h100-8b, shared prefixes: one of four was held to be ten times slower at prompts, and got a tenth of the work."""
    costs = StepCost()
    costs.learn(1.0, 79.0, 632.0, 29_600.0)  # nearly all of it was found there
    costs.learn(1.0, 33.5, 369.0, 15_900.0)
    for second in range(20):
        running, prompts = 12.0 + second % 5, 9000.0 + 500 * (second % 7)
        steps = (1.0 - prompts * 2.1e-5) / (0.0075 + 2e-4 * running)
        costs.learn(1.0, steps, steps * running, prompts)
    assert costs.prompt_s == pytest.approx(2.1e-5, rel=0.6)
    assert costs.base_s + 15 * costs.sequence_s == pytest.approx(0.0105, rel=0.3)


ODD = (0.0, 1e-12, 1e-3, 1.0, 1e6, 1e15)


@pytest.mark.parametrize("seed", range(5))
def test_costs_stay_numbers_and_possible_whatever_a_page_says(seed: int) -> None:
    random, costs = Random(seed), StepCost()
    for _ in range(500):
        running, rate, prompts = (random.choice(ODD) for _ in range(3))
        costs.follow(
            Load(running=running, tokens_per_s=rate, prompt_tokens=int(prompts)),
            random.choice((None, *ODD)),
            random.choice((0.0, 1e-9, 0.2, 1.0, 1e9)),
        )
        known = (costs.base_s, costs.sequence_s, costs.prompt_s)
        assert all(least <= cost < inf for cost, least in zip(known, LEAST, strict=True))
        assert costs.tpot_s is None or isfinite(costs.tpot_s)
    follow(costs, 0.02, 1e-4, 5e-5, seconds=3000)
    assert costs.base_s == pytest.approx(0.02, rel=0.5), "and an honest page is believed again"


def test_elapsed_time_of_nothing_teaches_nothing() -> None:
    costs = StepCost()
    costs.follow(Load(running=5.0, tokens_per_s=50.0), 5.0, 0.0)
    assert (costs.base_s, costs.tpot_s) == (FIRST[0], None)


class Reference:
    """The filter as textbooks have it, with whole matrices: x' = x + K (z - H x), P' = (I - K H) P, and some drift."""

    def __init__(self) -> None:
        self.costs = list(FIRST)
        self.spread = [[FIRST_OFF[row] ** 2 * (row == column) for column in range(3)] for row in range(3)]
        self.sums: list[tuple[float, float, float]] = []  # at, running requests x seconds, tokens
        self.at = 0.0

    def follow(self, load: Load, before: float | None, elapsed_s: float, fresh: float) -> None:
        part = min(LONGEST_S / elapsed_s, 1.0)
        elapsed_s *= part
        if not load.running or not load.tokens_per_s:
            return
        self.at += elapsed_s
        tokens = load.tokens_per_s * elapsed_s
        self.sums.append((self.at, load.running * elapsed_s, tokens))
        if not before:
            return
        did = [tokens / ((load.running + before) / 2), tokens]
        did.append(part * (load.prompt_tokens or 0) * fresh)
        drifted = [
            [self.spread[row][column] + (row == column) * DRIFT[row] ** 2 * elapsed_s for column in range(3)]
            for row in range(3)
        ]
        noise = (LAW.noise * elapsed_s) ** 2 + (LAW.uncounted * self.costs[2]) ** 2
        total = sum(did[row] * drifted[row][column] * did[column] for row in range(3) for column in range(3)) + noise
        gain = [sum(drifted[row][column] * did[column] for column in range(3)) / total for row in range(3)]
        off = elapsed_s - sum(self.costs[row] * did[row] for row in range(3))
        self.costs = [self.costs[row] + gain[row] * off for row in range(3)]
        keeps = [[(row == column) - gain[row] * did[column] for column in range(3)] for row in range(3)]
        self.spread = [
            [sum(keeps[row][k] * drifted[k][column] for k in range(3)) for column in range(3)] for row in range(3)
        ]
        spread = self.spread
        for one, least in enumerate(LEAST):  # who would cost less than the least is seen to cost that, exactly
            if self.costs[one] < least:
                gain = [spread[row][one] / spread[one][one] for row in range(3)]
                off = least - self.costs[one]
                self.costs = [self.costs[row] + gain[row] * off for row in range(3)]
                spread = [[spread[row][k] - gain[row] * spread[one][k] for k in range(3)] for row in range(3)]
        self.costs = [max(*both) for both in zip(self.costs, LEAST, strict=True)]

    @property
    def tpot_s(self) -> float:
        weighed = [(exp((at - self.at) / LAW.memory_s), busy, tokens) for at, busy, tokens in self.sums]
        return sum(weight * busy for weight, busy, _ in weighed) / sum(weight * made for weight, _, made in weighed)


@pytest.mark.parametrize("seed", range(3))
def test_costs_are_those_that_the_filter_of_textbooks_finds(seed: int) -> None:
    random, costs, reference = Random(seed), StepCost(), Reference()
    for _ in range(60):
        load = Load(
            running=random.choice((4.0, 30.0, 90.0)),
            tokens_per_s=random.choice((50.0, 400.0, 2500.0, None)),
            prompt_tokens=random.choice((None, 0, 900, 12_000)),
        )
        before, elapsed_s = random.choice((None, 0.0, 8.0, 50.0, 50.0)), random.choice((0.3, 1.0, 1.7, 8.0))
        fresh = random.choice((1.0, 0.4))
        costs.follow(load, before, elapsed_s, fresh)
        reference.follow(load, before, elapsed_s, fresh)
        assert (costs.base_s, costs.sequence_s, costs.prompt_s) == pytest.approx(tuple(reference.costs), rel=1e-6)
        if costs.tpot_s is not None:
            assert costs.tpot_s == pytest.approx(reference.tpot_s)
