"""How answers slow down: what their times alone tell of an engine that says nothing of its tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from math import inf
from random import Random

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.slowdown import EVERY, SHARES, SLOT_SHARES, SLOTS, Slowdown

LAW = LAWS.answers


def learned(alone_s: float, share: float, slots: float = inf, answers: int = 600, *, up_to: int = 60) -> Slowdown:
    """Answers of all lengths, beside one to `up_to` others."""
    random, slowdown = Random(3), Slowdown()
    for _ in range(answers):
        beside = random.uniform(1, up_to)
        slower = (1.0 + share * min(beside, slots)) * max(beside / slots, 1.0)
        slowdown.learn(alone_s * slower * random.lognormvariate(0.0, 0.8), beside)
    return slowdown


@pytest.mark.parametrize("slots", [4, 8, 16, 32])
@pytest.mark.parametrize("alone_s", [0.5, 7.0])
def test_an_engine_of_few_slots_is_found_to_have_about_as_many(slots: int, alone_s: float) -> None:
    assert slots / 1.4 <= learned(alone_s, 0.0, slots, up_to=4 * slots).most <= 1.6 * slots


def test_what_never_ran_at_once_is_not_taken_for_impossible() -> None:
    assert learned(2.0, 0.0, slots=16, up_to=4, answers=100).most > 8


def test_the_more_an_answer_slows_others_the_fewer_are_right() -> None:
    most = [learned(4.0, share).most for share in (0.01, 0.04, 0.16)]
    assert most == sorted(most, reverse=True)
    assert most[0] > 2 * most[2]


@pytest.mark.parametrize(
    ("alone_s", "longest"),
    [(1.0, LAW.most), (2.0, LAW.long_s / 2.0), (20.0, LAW.enough)],
    ids=["fast", "usual", "slow"],
)
def test_an_answer_may_become_so_many_times_slower_than_alone_and_not_much_slower_than_people_bear(
    alone_s: float, longest: float
) -> None:
    assert learned(alone_s, 0.04, answers=2000).most == pytest.approx((longest - 1.0) / 0.04, rel=0.5)


def test_doubt_counts_for_more_and_goes_with_answers() -> None:
    known = learned(4.0, 0.16, answers=600).most
    assert Slowdown().most == inf
    assert learned(4.0, 0.16, answers=2 * EVERY).most > 2 * known


def test_one_endless_answer_says_little() -> None:
    slowdown = learned(4.0, 0.08)
    before = slowdown.most
    for took_s in (1e9, *[10.0] * (EVERY - 1)):
        slowdown.learn(took_s, 20.0)
    assert slowdown.most == pytest.approx(before, rel=0.5)


def test_where_nothing_is_too_unlikely_the_least_that_is_possible_will_do() -> None:
    slowdown = Slowdown(replace(LAW, hope=2.0))
    for _ in range(EVERY):
        slowdown.learn(1.0, 2.0)
    assert slowdown.most == 1.0


@pytest.mark.parametrize("took_s", [0.0, 1e-9, 1e9])
def test_what_should_run_stays_possible_whatever_answers_take(took_s: float) -> None:
    slowdown = Slowdown()
    for beside in (0.0, 1.0, 500.0) * 100:
        slowdown.learn(took_s, beside)
        assert slowdown.most >= 1.0


class Reference:
    """The same from a list of all answers, each weighed by its age, by every hypothesis of the room's first lines."""

    def __init__(self) -> None:
        self.hypotheses = [(share, inf, 1.0) for share in SHARES]
        likely = len(SHARES) / (len(SLOTS) * len(SLOT_SHARES))
        self.hypotheses += [(share, float(slots), likely) for slots in SLOTS for share in SLOT_SHARES]
        self.answers: list[tuple[float, float]] = []  # logarithm of its time, beside

    def learn(self, took_s: float, beside: float) -> None:
        took = math.log(max(took_s, 1e-3))
        if self.answers:
            mean = self.mean(0.0, inf)
            took = min(max(took, mean - LAW.farthest), mean + LAW.farthest)
        self.answers.append((took, round(2 * beside) / 2))

    def weighed(self, share: float, slots: float) -> list[tuple[float, float]]:
        """Weights and logarithms of times alone."""
        newest = len(self.answers) - 1
        return [
            (
                (1 - 1 / LAW.memory) ** (newest - number),
                took - math.log((1 + share * min(beside, slots)) * max(beside / slots, 1)),
            )
            for number, (took, beside) in enumerate(self.answers)
        ]

    def mean(self, share: float, slots: float) -> float:
        weighed = self.weighed(share, slots)
        return sum(weight * value for weight, value in weighed) / sum(weight for weight, _ in weighed)

    def most(self) -> float:
        found = []
        for share, slots, likely in self.hypotheses:
            mean = self.mean(share, slots)
            left = sum(weight * (value - mean) ** 2 for weight, value in self.weighed(share, slots))
            longest = max(LAW.enough, min(LAW.most, LAW.long_s / math.exp(mean)))
            allowed = min((longest - 1) / share if share else inf, slots)
            found.append((allowed, likely * math.exp(-left / (2 * LAW.noise**2))))
        chances = sum(chance for _, chance in found)
        fits = [one for one, _ in found if sum(chance for more, chance in found if more > one) <= LAW.hope * chances]
        return min(fits)


@pytest.mark.parametrize(("alone_s", "share", "slots"), [(1.5, 0.04, inf), (0.7, 0.0, 6.0), (9.0, 0.16, 24.0)])
def test_what_should_run_is_what_a_list_of_all_answers_says(alone_s: float, share: float, slots: float) -> None:
    random, slowdown, reference = Random(7), Slowdown(), Reference()
    said = set()
    for number in range(1, 25 * EVERY):
        beside = random.choice((1.0, 2.5, 4.2, 9.0, 20.0, 70.0))
        took_s = alone_s * (1 + share * min(beside, slots)) * max(beside / slots, 1) * random.lognormvariate(0, 1.2)
        slowdown.learn(took_s, beside)
        reference.learn(took_s, beside)
        if number < EVERY:
            assert slowdown.most == inf
        elif number % EVERY == 0:
            assert slowdown.most == pytest.approx(reference.most(), rel=1e-9), number
            said.add(slowdown.most)
    assert len(said) > 3
