"""How fast a pool's requests arrive and leave, for Retry-After and for refusing what can't be served in time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from extproc.admission.laws import LAWS

if TYPE_CHECKING:
    from extproc.admission.laws import PaceLaw


class Pace:
    """Exponentially weighted rates of one pool, per second.

    The drain rate is measured only while requests wait: an idle pool dispatches as fast as requests arrive, which
    says nothing about what it could do.

    Attributes:
        law: the constants.
    """

    __slots__ = ("_arrivals", "_busy_s", "_horizon_s", "_marked", "_served", "_silent_until", "law")

    def __init__(self, law: PaceLaw = LAWS.pace) -> None:
        """Start knowing nothing."""
        self.law = law
        self._arrivals: dict[int, tuple[float, float]] = {}  # priority -> weight of arrivals, at
        self._served = 0.0
        self._busy_s = 0.0
        self._horizon_s = law.memory_s
        self._marked = 0.0  # up to here busy time is counted
        self._silent_until = -math.inf  # when the last silence of more than a horizon ended

    def arrived(self, priority: int, now: float, came: float) -> None:
        """Count an arrival, as of when it came: what Envoy held while no sidecar was there comes all at once."""
        weight, at = self._arrivals.get(priority, (0.0, now))
        one = 1.0 if came >= now else math.exp((came - now) / self._horizon_s)
        self._arrivals[priority] = (weight * math.exp((at - now) / self._horizon_s) + one, now)

    def backlog_began(self, now: float) -> None:
        """Note that the first request began to wait. What an earlier backlog taught loses weight, not its rate."""
        kept = math.exp(-max(now - self._marked, 0.0) / self._horizon_s)
        self._served *= kept
        self._busy_s *= kept
        self._marked = now

    def dispatched(self, now: float) -> None:
        """Note that a waiting request went to an endpoint.

        A silence of more than a horizon is no pace: an engine stood still, and goes on as before. Two are one, with no
        more between them than the second lasts: answers that began together end together, and then none for as long.
        """
        elapsed = now - self._marked if now > self._marked else 0.0
        if elapsed > self._horizon_s:
            is_pace = self._marked - self._silent_until <= elapsed
            self._silent_until = now
            if not is_pace:
                self.backlog_began(now)
                elapsed = 0.0
        kept = math.exp(-elapsed / self._horizon_s)
        self._busy_s = busy_s = self._busy_s * kept + elapsed
        self._served = served = self._served * kept + 1.0
        law = self.law
        horizon_s = law.gaps * busy_s / served
        self._horizon_s = horizon_s if horizon_s > law.memory_s else law.memory_s
        self._marked = now

    def forget_drain(self, now: float) -> None:
        """Measure anew how fast requests leave: what they left into was a part of what is there now."""
        self._served = self._busy_s = 0.0
        self._marked = now

    def drain_rate(self) -> float | None:
        """Return dispatches per second out of a backlog; None until enough were seen."""
        law = self.law
        enough = law.enough if self._busy_s < law.memory_s else law.enough_slow
        if self._served < enough or self._busy_s < law.least_busy_s:
            return None
        return self._served / self._busy_s

    def wait_s(self, ahead: int, priority: int, now: float) -> float | None:
        """Predict the wait of a request with `priority` that finds `ahead` others before it; None: can't tell.

        Higher classes make it `sure` times as long at the most: a burst or an outage of seconds foretells no ten
        minutes, and who would be in time if nobody came before it any more is not refused for those who may come.
        """
        drain = self.drain_rate()
        if drain is None:
            return None
        above = sum(
            weight * math.exp((at - now) / self._horizon_s) / self._horizon_s
            for other, (weight, at) in self._arrivals.items()
            if other > priority
        )
        return (ahead + 1) / max(drain - above, drain / self.law.sure)
