"""How answers slow down: what their times alone tell of an engine that says nothing of its tokens."""

from __future__ import annotations

from math import inf
from random import Random

import pytest

from extproc.admission.laws import LAWS
from extproc.admission.slowdown import EVERY, Slowdown

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


@pytest.mark.parametrize("took_s", [0.0, 1e-9, 1e9])
def test_what_should_run_stays_possible_whatever_answers_take(took_s: float) -> None:
    slowdown = Slowdown()
    for beside in (0.0, 1.0, 500.0) * 100:
        slowdown.learn(took_s, beside)
        assert slowdown.most >= 1.0
