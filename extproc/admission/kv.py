"""The KV cache of one endpoint: what its leases will need there, held against what the engine says is in use.

A request will need its prompt and its answer. What requests share, a system prompt, is in the cache once: how much of
a booked prompt really takes room is learned from the engine's own figure. What the figure shows beyond our books is
somebody else's. It may also be wrong (blocks that are only kept for reuse, a page that lies): an engine that makes
nobody wait and preempts nobody is not full, whatever the figure.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from extproc.admission.laws import LAWS

if TYPE_CHECKING:
    from extproc.admission.laws import KvLaw
    from extproc.admission.ticket import Ticket


class KvBooks:
    """Tokens in one engine's KV cache.

    Attributes:
        law: its constants.
        capacity: tokens that the cache holds; None: not known, and no limit.
        prompts, outputs: tokens booked for the prompts and the answers of all leases.
        promised: tokens that are kept for what is leased elsewhere, and may come.
        real: share of a booked prompt that really takes room.
        excess: tokens in use beyond our books.
        trust: how far the engine's figure is believed, 0..1.
        turnover: tokens that the cache had to take in for all leases so far.
    """

    __slots__ = ("capacity", "excess", "law", "outputs", "promised", "prompts", "real", "trust", "turnover")

    def __init__(self, capacity: int | None, law: KvLaw = LAWS.kv) -> None:
        """Start with an empty cache."""
        self.law = law
        self.capacity = capacity
        self.prompts = 0
        self.outputs = 0
        self.promised = 0
        self.real = 1.0
        self.excess = 0.0
        self.trust = 1.0
        self.turnover = 0

    @property
    def tokens(self) -> float:
        """Tokens that the leases will need."""
        return self.prompts * self.real + self.outputs

    @property
    def share(self) -> float:
        """Tokens of the cache that may be booked."""
        return math.inf if self.capacity is None else self.law.share * self.capacity

    @property
    def pressure(self) -> float:
        """The share of the room that is booked; 0 while nobody knows how much there is."""
        if self.capacity is None:
            return 0.0
        return (self.prompts * self.real + self.outputs) / (self.law.share * self.capacity)

    @property
    def room(self) -> float:
        """The most tokens, prompt and answer together, that there may be room for: prompts that share take less."""
        if self.capacity is None:
            return math.inf
        free = self.law.share * self.capacity - self.excess - self.tokens
        return free / self.real + 1.0  # the token is for rounding

    def fits(self, ticket: Ticket, promised: int | None = None) -> bool:
        """Whether there is room for `ticket` too, besides what is booked and `promised`; None: what is."""
        if self.capacity is None:
            return True
        prompts = (self.prompts + ticket.prompt_tokens) * self.real
        others = self.outputs + self.excess + (self.promised if promised is None else promised)
        return prompts + ticket.output_tokens + others <= self.law.share * self.capacity

    def add(self, ticket: Ticket) -> None:
        """Book a lease."""
        self.prompts += ticket.prompt_tokens
        self.outputs += ticket.output_tokens
        self.turnover += ticket.work_tokens + ticket.output_tokens

    def remove(self, ticket: Ticket) -> None:
        """Take a lease out of the books."""
        self.prompts -= ticket.prompt_tokens
        self.outputs -= ticket.output_tokens

    def compare(self, usage: float | None) -> None:
        """Follow the engine's figure for what is in use, as far as it is believed."""
        self.excess = 0.0
        if usage is not None and self.capacity is not None:
            self.excess = self.trust * max(usage * self.capacity - self.tokens, 0.0)

    def learn(self, usage: float, prompts: int, outputs: int, elapsed_s: float) -> None:
        """Learn what prompts really take, from `usage` after `elapsed_s`.

        `prompts`, `outputs`: what is booked for the leases whose prompts are computed; their answers are half written.
        """
        if self.capacity is not None and prompts > self.law.enough * self.capacity:
            seen = (usage * self.capacity - outputs / 2) / prompts
            weight = 1.0 - math.exp(-elapsed_s / self.law.memory_s)
            self.real += weight * (min(max(seen, self.law.least_real), 1.0) - self.real)

    def judge(
        self, usage: float, waiting: float | None, preemptions: int | None, elapsed_s: float, *, wanted: bool
    ) -> None:
        """Doubt a figure that no pressure confirms, while requests wait for this endpoint; believe one that it does."""
        if preemptions or (waiting and usage >= self.law.pressed):
            self.trust = 1.0
            self.real += (1.0 - self.real) / 2  # the guess was too low
        elif wanted and waiting is not None:
            self.trust = max(self.trust - elapsed_s / self.law.doubt_s, 0.0)
