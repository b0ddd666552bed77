"""What no request waits for shares the turns of the loop, in the order in which it asks."""

from __future__ import annotations

import asyncio

from extproc.turns import ALL, Turns

THIRD = ALL // 3


def turns_of(tasks: int, cancelled: frozenset[int] = frozenset()) -> list[list[int]]:
    """Let `tasks` come in one moment; return which went on in each turn of the loop."""
    loop = asyncio.new_event_loop()
    turns, seen = Turns(), [[]]

    async def go_on(number: int) -> None:
        await turns.take(THIRD)
        seen[-1].append(number)

    try:
        every = [loop.create_task(go_on(number)) for number in range(tasks)]
        for turn in range(10 * tasks):
            loop.call_soon(loop.stop)
            loop.run_forever()
            if turn == 0:
                for number in cancelled:
                    every[number].cancel()
            seen.append([])
            if all(task.done() for task in every):
                break
    finally:
        loop.close()
    return [turn for turn in seen if turn]


def test_three_go_on_in_a_turn_in_the_order_in_which_they_came():
    assert turns_of(20) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14], [15, 16, 17], [18, 19]]


def test_few_go_on_at_once():
    assert turns_of(2) == [[0, 1]]


def test_who_is_gone_takes_nobodys_turn():
    assert turns_of(10, frozenset({3, 4, 5, 9})) == [[0, 1, 2], [6, 7, 8]]
