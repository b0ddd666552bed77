"""How fast an engine computes prompts, by the first bytes of its answers: where they are seen, and nothing counts them.

Prompts that were computed side by side have their first bytes in one moment: that burst took as long as all their work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extproc.admission.laws import PromptLaw
    from extproc.admission.ticket import Ticket

BURST_S, LEAST_WORK = 0.005, 256
"""First bytes so close together come from one step of the engine; less work than this says nothing of the pace."""


class Burst:
    """First bytes that came together: the engine computed their prompts side by side, so that one time is for all.

    Attributes:
        begun_at: when it began with them.
        seen_at: when the last of them came.
        work_tokens: of all their prompts.
        told: it has taught the pace.
    """

    __slots__ = ("begun_at", "seen_at", "told", "work_tokens")

    def __init__(self, begun_at: float, seen_at: float) -> None:
        """Start with none."""
        self.begun_at, self.seen_at = begun_at, seen_at
        self.work_tokens = 0
        self.told = False


class FirstBytes:
    """The first bytes of one endpoint's answers."""

    __slots__ = ("_burst", "_seen_at")

    def __init__(self) -> None:
        """Start with none."""
        self._burst: Burst | None = None  # the last one
        self._seen_at = 0.0  # when the last burst of enough work before it was seen

    def note(self, ticket: Ticket, now: float) -> None:
        """Put one in the burst that it came with. One of little work, or of ends alone, is not when others began."""
        burst, begun_at = self._burst, max(ticket.leased_at, self._seen_at)
        if burst is None or now - burst.seen_at > BURST_S:
            if burst is not None and burst.work_tokens >= LEAST_WORK:
                self._seen_at = burst.seen_at
                begun_at = max(ticket.leased_at, self._seen_at)
            burst = self._burst = Burst(begun_at, now)
        burst.begun_at, burst.seen_at = min(burst.begun_at, begun_at), now
        burst.work_tokens += ticket.work_tokens
        ticket.burst = burst

    @staticmethod
    def learn(ticket: Ticket, burst: Burst, now: float, token_s: float, law: PromptLaw) -> float | None:
        """Return what a token takes, in seconds, as the burst of an answer that is over tells, once; None: no news.

        `token_s`: what it was thought to take. An answer that was not streamed is none of its burst.
        """
        if now - burst.seen_at <= law.streamed * (now - ticket.leased_at):
            burst.work_tokens -= ticket.work_tokens
            return None
        if burst.work_tokens < LEAST_WORK or burst.told:
            return None
        burst.told = True
        slower = burst.seen_at - burst.begun_at > token_s * burst.work_tokens
        return token_s * (law.nudge if slower else 1.0 / law.nudge)
