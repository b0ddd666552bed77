"""One line of waiting tickets, beside a list that is sorted each time: blocks split, and go when they are empty."""

from __future__ import annotations

from itertools import chain
from random import Random

import pytest

from extproc.admission.queue import BLOCK, WINDOW, Queue
from extproc.admission.ticket import Ticket
from extproc.admission.values import Request


def ticket(number: int, random: Random) -> Ticket:
    one = Ticket(Request(f"{number}", 0.0))
    one.key = (random.choice((-10, 0, 0, 10)), float(random.randrange(50)), number)
    return one


def assert_line(queue: Queue, waiting: list[Ticket]) -> None:
    waiting.sort(key=lambda one: one.key)
    assert list(queue) == waiting
    assert (len(queue), queue.head) == (len(waiting), waiting[0] if waiting else None)
    assert list(queue.window()) == waiting[:WINDOW]
    assert queue.entrant() is (waiting[WINDOW - 1] if len(waiting) >= WINDOW else None)
    assert queue.behind_window() is (waiting[WINDOW] if len(waiting) > WINDOW else None)
    for place, one in list(enumerate(waiting))[:: max(len(waiting) // 9, 1)]:
        assert queue.rank(one) == place
        assert queue.in_window(one) is (place < WINDOW)
        assert queue.behind(one.key, 40) == waiting[place + 1 : place + 41]
    assert list(chain.from_iterable(queue.pieces(100))) == waiting
    if waiting:
        assert queue.last() is waiting[-1]


@pytest.mark.parametrize("leaves", ["the first", "the last", "anybody"])
def test_a_line_of_many_blocks_is_in_order_while_it_grows_and_until_the_last_has_left(leaves: str) -> None:
    random, queue, waiting = Random(1), Queue(), list[Ticket]()
    for number in range(6 * BLOCK):
        one = ticket(number, random)
        queue.add(one)
        waiting.append(one)
        if number % BLOCK == 9:
            assert_line(queue, waiting)
    while waiting:
        place = {"the first": 0, "the last": -1}.get(leaves, random.randrange(len(waiting)))
        queue.remove(waiting.pop(place))
        if len(waiting) % BLOCK in (0, 9):
            assert_line(queue, waiting)
    for number in range(2 * BLOCK):
        one = ticket(number, random)
        queue.add(one)
        waiting.append(one)
    assert_line(queue, waiting)


def test_who_does_not_stand_in_a_line_can_not_be_taken_out_of_it_and_nobody_else_is() -> None:
    random, queue = Random(1), Queue()
    here = [ticket(number, random) for number in range(5)]
    for one in here:
        queue.add(one)
    with pytest.raises(KeyError):
        queue.remove(ticket(9, random))
    assert_line(queue, here)
