"""How old a request was when it reached us: Envoy stamps it (request.time), and a replay keeps the stamp.

So a request that was held by a sidecar that died keeps its age at the next one. Stamps are wall-clock times; when the
wall clock jumps, ages are not believed for a while rather than budgets being cut short.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

JUMP_S = 1.0
DOUBT_S = 30.0
"""How long after a jump stamps may come from the time before it."""


class Ages:
    """Ages of requests, in seconds, never negative."""

    def __init__(
        self,
        oldest_s: float,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Believe no age above `oldest_s`, the longest that a request may wait: Envoy's clock may not be ours."""
        self.oldest_s = oldest_s
        self._wall, self._monotonic = wall, monotonic
        self._offset = wall() - monotonic()
        self._doubt_until = 0.0

    def age_s(self, stamp: str | None) -> float:
        """Return the age of a request stamped `stamp` (RFC 3339); 0 if it says nothing believable."""
        if not stamp:
            return 0.0
        wall, monotonic = self._wall(), self._monotonic()
        offset = wall - monotonic
        if abs(offset - self._offset) > JUMP_S:
            self._doubt_until = monotonic + DOUBT_S
        self._offset = offset
        if monotonic < self._doubt_until:
            return 0.0
        try:
            age_s = wall - datetime.fromisoformat(stamp).timestamp()
        except (ValueError, OverflowError):
            return 0.0
        return min(max(age_s, 0.0), self.oldest_s)
