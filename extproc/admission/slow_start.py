"""A few requests at a time, for an endpoint that nobody knows or that is in doubt: more as long as that goes well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from extproc.admission.laws import HealthLaw

MOST: Final = 1 << 20
"""More at a time than any endpoint takes."""


class SlowStart:
    """Steps, each with a number of requests that may be sent in it, and what became of them.

    A step begins with its first request. If it ends without a refusal, the next one has twice as many. With one it ends
    a step's time after that, and the next one has a single request, and is twice as long.

    Attributes:
        allowed: requests in this step.
        step_s: how long it is.
    """

    __slots__ = ("_ends", "_has_failed", "_sent", "allowed", "step_s")

    def __init__(self, allowed: int, step_s: float) -> None:
        """Begin with so many requests in a step, and steps so long."""
        self.allowed = allowed
        self._sent = 0
        self.step_s = step_s
        self._has_failed = False
        self._ends: float | None = None  # of this step; None: nothing was sent in it yet

    @property
    def is_spent(self) -> bool:
        """Whether no more may be sent in this step."""
        return self._has_failed or self._sent >= self.allowed

    def send(self, now: float, law: HealthLaw) -> None:
        """Note that a request is sent."""
        self.pass_time(now, law)
        if self._ends is None:
            self._ends = now + self.step_s
        self._sent += 1

    def fail(self, now: float, law: HealthLaw) -> None:
        """Note a refusal. Others of the same step have nothing to add."""
        self.pass_time(now, law)
        if not self._has_failed:
            self._has_failed, self._ends = True, now + self.step_s

    def next_change(self) -> float | None:
        """Return when more may be sent, once no more may be."""
        return self._ends if self.is_spent else None

    def pass_time(self, now: float, law: HealthLaw) -> None:
        """Begin the next step, if this one is over."""
        if self._ends is None or now < self._ends:
            return
        if self._has_failed:
            self.allowed, self.step_s = 1, min(2 * self.step_s, law.step_most_s)
        else:
            self.allowed, self.step_s = min(2 * self.allowed, MOST), law.step_s
        self._sent, self._ends, self._has_failed = 0, None, False
