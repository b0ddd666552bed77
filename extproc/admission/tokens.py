"""Estimates of the tokens a request will need, from its headers and from the mean of what was seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extproc.admission.ticket import Ticket

FIRST_GUESS = 200.0
"""Mean output tokens before anything was seen; public chat traces have means of 130 to 210."""
MEMORY = 200
"""About so many of the last answers make the mean."""


class TokenEstimate:
    """The running mean of output tokens."""

    __slots__ = ("_mean",)

    def __init__(self) -> None:
        """Start at FIRST_GUESS."""
        self._mean = FIRST_GUESS

    def estimate(self, ticket: Ticket) -> None:
        """Fill in the ticket's token estimates."""
        request = ticket.request
        ceiling = request.max_output_tokens
        expected = int(self._mean)
        ticket.output_tokens = expected if ceiling is None or ceiling > expected else ceiling
        ticket.prompt_tokens = request.prompt_tokens
        ticket.kv_tokens = request.prompt_tokens + ticket.output_tokens

    def learn(self, output_tokens: int, answers: int) -> None:
        """Follow `answers` finished answers that had `output_tokens` together."""
        if answers > 0:
            share = min(answers / MEMORY, 0.5)
            self._mean += share * (output_tokens / answers - self._mean)
