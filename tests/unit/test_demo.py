"""The demo's own figures: what a newcomer sees first."""

from __future__ import annotations

import asyncio
import re
from typing import Any, cast

from extproc.commands.demo import CLASSES, WAVE, Demo


def test_who_waits_still_counts_so_that_a_class_of_which_a_few_were_served_does_not_look_the_quickest() -> None:
    """The first line read `interactive 1.81s ... batch 0.17s`: ten of its eighteen batch requests waited still."""

    async def look() -> str:
        demo = Demo([], cast("Any", None), "")
        now = asyncio.get_running_loop().time()
        demo._first_tokens = {"batch": [0.1] * 8, "interactive": [1.8] * 8}
        demo._waiting = dict.fromkeys(range(10), ("batch", now - 3.0))
        return demo._first_token_line()

    told = dict(re.findall(r"(\w+) +(\d+\.\d+)s", asyncio.run(look())))
    assert float(told["batch"]) >= 3.0
    assert told["interactive"] == "1.80"


def test_a_wave_fills_the_engines_before_its_lowest_class_comes() -> None:
    (first, count), (second, _), *_ = WAVE
    assert (first, second) == ("default", "batch")
    assert count >= 8, "two engines of four slots"
    assert {name for name, _ in WAVE} == set(CLASSES)
