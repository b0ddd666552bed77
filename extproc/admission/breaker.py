"""A circuit breaker of Envoy's that is below our limit: how many at once it let through, found by what it did not."""

from __future__ import annotations

from typing import Final

BREAKER_S: Final = 1.0
"""So late one more is tried than a breaker of Envoy's let through, at first: each that it does not costs a request."""
BREAKER_MOST_S: Final = 30.0


class Breaker:
    """The most that it let through. One more is tried now and then.

    It may be gone, as where it was met in a burst, or others' requests filled it: then twice as many more are tried in
    each step, a sixteenth more at the most. From 50 to 1,000 that takes 9 s.

    Attributes:
        most: so many.
        is_reached: so many were sent since: else one more would tell nothing.
    """

    __slots__ = ("_is_raised", "_more", "_until", "_wait_s", "is_reached", "most")

    def __init__(self) -> None:
        """Begin; `refused` follows."""
        self.most = 0
        self._until = 0.0
        self.is_reached = self._is_raised = False
        self._wait_s = BREAKER_S
        self._more = 1

    def refused(self, held: int, now: float) -> None:
        """Note that it let one not through, and `held` others."""
        if self._is_raised:
            self._wait_s = min(2 * self._wait_s, BREAKER_MOST_S)
        self.most, self._until, self._more = held, now + self._wait_s, 1
        self.is_reached, self._is_raised = True, False  # these run

    def next_change(self) -> float | None:
        """Return when one more is tried, as far as time alone decides that."""
        return self._until if self.is_reached else None

    def pass_time(self, now: float) -> None:
        """Allow one more, if it is time; sooner, and more, where the last ones were let through."""
        at = self.next_change()
        if at is not None and now >= at:
            if self._is_raised:
                self._wait_s = max(self._wait_s / 2, BREAKER_S / 8)
                self._more = min(2 * self._more, max(self.most // 16, 1))
            self.most, self._until = self.most + self._more, now + self._wait_s
            self.is_reached, self._is_raised = False, True
