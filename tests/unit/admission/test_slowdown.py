"""How answers slow down: what their times alone tell of an engine that says nothing of its tokens."""

from __future__ import annotations

from math import isfinite
from random import Random

import pytest

from extproc.admission.slowdown import ENOUGH, LONG_S, MOST, Slowdown


def learned(alone_s: float, each_s: float, answers: int = 400, *, up_to: int = 40) -> Slowdown:
    """Answers of all lengths, beside one to `up_to` others."""
    random, slowdown = Random(3), Slowdown()
    for _ in range(answers):
        beside = random.uniform(1, up_to)
        slowdown.learn((alone_s + each_s * beside) * random.expovariate(1.0), beside)
    return slowdown


@pytest.mark.parametrize(("alone_s", "each_s"), [(1.0, 0.02), (4.0, 0.2), (2.0, 0.5)])
def test_both_times_are_found_from_answers_of_all_lengths(alone_s: float, each_s: float) -> None:
    slowdown = learned(alone_s, each_s, 2000)
    assert slowdown.alone_s + 20 * slowdown.each_s == pytest.approx(alone_s + 20 * each_s, rel=0.15)
    assert slowdown.each_s == pytest.approx(each_s, rel=0.5)


def test_the_more_an_answer_slows_others_the_fewer_are_right() -> None:
    most = [learned(4.0, each_s).most for each_s in (0.05, 0.2, 1.0)]
    assert most == sorted(most, reverse=True)
    assert most[0] > 2 * most[2]


@pytest.mark.parametrize(
    ("alone_s", "longest_s"), [(1.0, MOST * 1.0), (4.0, LONG_S), (20.0, ENOUGH * 20.0)], ids=["fast", "usual", "slow"]
)
def test_an_answer_may_become_so_many_times_slower_than_alone_and_not_much_slower_than_people_bear(
    alone_s: float, longest_s: float
) -> None:
    slowdown = Slowdown()
    slowdown.alone_s, slowdown.each_s = alone_s, 0.5
    slowdown._spread = [0.0, 0.0, 0.0]
    assert slowdown.most == pytest.approx((longest_s - alone_s) / 0.5)


def test_doubt_counts_for_more_and_goes_with_answers() -> None:
    slowdown, sure = Slowdown(), Slowdown()
    sure._spread = [0.0, 0.0, 0.0]
    assert slowdown.most > 1.5 * sure.most
    known = learned(4.0, 0.2, 2000)
    sure.alone_s, sure.each_s = known.alone_s, known.each_s
    assert known.most < 1.4 * sure.most


def test_one_endless_answer_says_little() -> None:
    slowdown = learned(4.0, 0.2)
    before = slowdown.most
    slowdown.learn(1e9, 20.0)
    assert slowdown.most > 0.8 * before


@pytest.mark.parametrize("took_s", [0.0, 1e-9, 1e9])
def test_times_stay_possible_whatever_answers_take(took_s: float) -> None:
    slowdown = Slowdown()
    for beside in (0.0, 1.0, 500.0) * 300:
        slowdown.learn(took_s, beside)
        assert slowdown.alone_s > 0.0
        assert slowdown.each_s > 0.0
        assert isfinite(slowdown.most)
        assert slowdown.most > 0.0
