"""Which prompts an engine has not computed yet: what bounds the time to the first token behind continuous batching.

The first token of an answer says so exactly, where something sees it. Otherwise it is predicted from the pace that
the engine showed, and the engine's own count of first tokens corrects that at every scrape. Where both are in doubt, a
prompt counts as computed: too early costs some order inside the engine, too late leaves the engine idle.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from extproc.admission.ticket import State

if TYPE_CHECKING:
    from extproc.admission.ticket import Ticket

FIRST_SPEED = 8000.0
"""Prompt tokens per second before anything was seen."""
LEAST_SPEED, MOST_SPEED = 500.0, 1e6
PAUSE_S = 0.02
"""A pause that a late timer explains."""
FASTER, SLOWER = 1.5, 0.9
"""The most that one scrape changes the pace."""
TOLERANCE = 0.25
"""How far behind the prediction an engine may be, as a share of what it could have done, before it counts as slower."""


class Prefill:
    """The prompts of one endpoint's leases that the engine has not computed, oldest first.

    Attributes:
        tokens: estimated tokens of them all.
        predicting: go on by the pace between scrapes.
    """

    __slots__ = ("_begun", "_busy", "_part", "_pending", "_speed", "_uncounted", "predicting", "tokens")

    def __init__(self) -> None:
        """Start idle."""
        self.tokens = 0
        self.predicting = False
        self._pending: dict[Ticket, None] = {}
        self._uncounted: deque[Ticket] = deque()  # sent, and not yet in the engine's counter
        self._part = 0.0  # of a first token: the count is a share where others use the engine too
        self._speed = FIRST_SPEED
        self._begun = 0.0  # when the engine began with the oldest
        self._busy = False  # it had something to do ever since the last scrape

    def add(self, ticket: Ticket, now: float) -> None:
        """Note a prompt that was sent."""
        if not self._pending:
            self._rest(now)
            self._begun = now
        self._pending[ticket] = None
        ticket.prompt_pending = True
        self.tokens += ticket.work_tokens
        if self.predicting:
            self._uncounted.append(ticket)

    def done(self, ticket: Ticket, now: float) -> None:
        """Note that a prompt is computed, or its request over. Repeated: no-op."""
        if ticket.prompt_pending:
            self._drop(ticket)
            self._begun = now
            if self.predicting and ticket in self._uncounted:
                self._uncounted.remove(ticket)

    def next_change(self) -> float | None:
        """Return when the oldest prompt will be computed, if all goes as before."""
        if not self.predicting or not self._pending:
            return None
        return self._begun + next(iter(self._pending)).work_tokens / self._speed

    def pass_time(self, now: float) -> bool:
        """Take the prompts as computed whose time has come; tell whether there were any."""
        changed = False
        while (due := self.next_change()) is not None and due <= now:
            self._drop(next(iter(self._pending)))
            self._begun = due
            changed = True
        return changed

    def observe(self, counted: float, elapsed_s: float, now: float) -> None:
        """Follow the engine's count of first tokens: `counted` for our requests in the last `elapsed_s`."""
        self.predicting = True
        left = self._count(counted)
        could = self._speed * max(elapsed_s, PAUSE_S)
        if not self._pending:
            self._rest(now)
        if self._busy and left < self.tokens:
            self._speed = min(self._speed * min(1.0 + (self.tokens - left) / could, FASTER), MOST_SPEED)
        elif self._uncounted and left - self.tokens - self._uncounted[0].work_tokens > TOLERANCE * could:
            self._speed = max(self._speed * SLOWER, LEAST_SPEED)
        known = set(self._uncounted)
        for ticket in [ticket for ticket in self._pending if ticket not in known]:
            self._drop(ticket)
            self._begun = now
        self._busy = True

    def forget(self) -> None:
        """Predict no more: the counter is silent."""
        self.predicting = False
        self._uncounted.clear()

    def _count(self, counted: float) -> int:
        """Match the count with the prompts sent, oldest first; return the tokens of those that it lacks."""
        uncounted = self._uncounted
        self._part += counted
        done, self._part = int(self._part), self._part % 1.0
        for number, ticket in enumerate(uncounted):
            if ticket.state is State.DONE:  # an answer that is over tells of all prompts sent before it
                done = max(done, number + 1)
        for _ in range(min(done, len(uncounted))):
            uncounted.popleft()
        return sum(ticket.work_tokens for ticket in uncounted)

    def _rest(self, now: float) -> None:
        """Note that the engine had nothing to do since `_begun`."""
        if now > self._begun + PAUSE_S:
            self._busy = False

    def _drop(self, ticket: Ticket) -> None:
        del self._pending[ticket]
        ticket.prompt_pending = False
        self.tokens -= ticket.work_tokens
