"""Estimates of the tokens a request will need, from its headers and from what engines counted for earlier ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extproc.admission.ticket import Ticket

FIRST_GUESS = 200.0
"""Mean output tokens before anything was seen; public chat traces have means of 130 to 210."""
MEMORY = 200
"""About so many of the last answers make the mean."""
PROMPTS = 500
"""About so many of the last prompts make the correction of estimates, and half as many believe in none at first."""
FIRST_PROMPT = 1000.0
"""Tokens of such a prompt that nobody has seen."""
MOST_PROMPT, MOST_OUTPUT = 262_144, 32_768
"""What a page says of one prompt or answer above this is not believed."""
MOST_OFF = 8.0
"""The most that estimates are corrected by, either way."""


_KEPT_BY_ONE = math.exp(-1 / PROMPTS)


class _Mean:
    """A mean that forgets."""

    __slots__ = ("_count", "_total")

    def __init__(self) -> None:
        self._count = PROMPTS / 2.0
        self._total = self._count * FIRST_PROMPT

    def add(self, total: float, count: int) -> None:
        kept = _KEPT_BY_ONE if count == 1 else math.exp(-count / PROMPTS)
        self._total = self._total * kept + total
        self._count = self._count * kept + count

    @property
    def value(self) -> float:
        return self._total / self._count


class TokenEstimate:
    """The running mean of output tokens, and by how much the announced prompt tokens are off.

    Attributes:
        scale: tokens that engines count per token announced: languages and JSON differ in bytes per token. 1 while no
            engine counts.
    """

    __slots__ = ("_announced", "_counted", "_counts", "_held_over", "_mean", "scale")

    def __init__(self) -> None:
        """Start at FIRST_GUESS, and believe what requests announce."""
        self.scale = 1.0
        self._counts = False  # some engine does
        self._held_over = 0
        self._mean = FIRST_GUESS
        self._announced = _Mean()  # prompt tokens of a request, as announced
        self._counted = _Mean()  # the same, as engines count them

    def estimate(self, ticket: Ticket) -> None:
        """Fill in the ticket's token estimates."""
        request = ticket.request
        ceiling = request.max_output_tokens
        expected = int(self._mean)
        ticket.output_tokens = expected if ceiling is None or ceiling > expected else ceiling
        ticket.prompt_tokens = ticket.work_tokens = int(request.prompt_tokens * self.scale)
        ticket.kv_tokens = ticket.prompt_tokens + ticket.output_tokens

    def sent(self, prompt_tokens: int) -> None:
        """Note what a request announced that went to an engine, once engines count: the two means are compared."""
        if self._counts:
            self._announced.add(prompt_tokens, 1)

    def learn_prompts(self, tokens: int, prompts: int) -> None:
        """Follow what an engine counted: means are compared, so others may use the engine too."""
        self._counts = True
        self._held_over += tokens  # of prompts whose first token comes with a later reading
        if prompts > 0:
            self._counted.add(min(self._held_over, MOST_PROMPT * prompts), prompts)
            self._held_over = 0
            self.scale = min(max(self._counted.value / self._announced.value, 1 / MOST_OFF), MOST_OFF)

    def learn(self, output_tokens: int, answers: int) -> None:
        """Follow `answers` finished answers that had `output_tokens` together.

        One engine's page must not spoil the estimate for all: what it says of an answer is bounded, and one reading
        at most doubles the mean.
        """
        if answers > 0:
            share = min(answers / MEMORY, 0.5)
            seen = min(output_tokens / answers, MOST_OUTPUT)
            self._mean = min(self._mean + share * (seen - self._mean), 2.0 * self._mean + 1.0)
