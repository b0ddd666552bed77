"""How many requests an endpoint may hold: a fixed number, or one steered by the time per output token.

The law is Little's: time per output token = running requests / token rate. A latency-gradient limiter does not work
in front of continuous batching, where the wanted slow-down by batching looks like queueing (docs/adr/0003).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extproc.admission.load import Load

START = 64
FLOOR = 4
CEILING = 512
TARGET_S = 0.080
"""Wanted time per output token: slower shrinks the limit in proportion."""
FAST_S = 0.050
"""Below this the limit grows fast."""
KV_BRAKE = 0.92
"""Fuller than this, the limit shrinks, unless KV tokens are counted in the books."""
MEMORY_S = 4.0
"""What is longer ago weighs less than a third in the time per token."""
LONGEST_S = 2.0
"""One reading after a long silence changes the limit no more than one after this."""


class FixedLimit:
    """A limit that a person chose."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        """Hold at most `value` requests; at least 1."""
        self.value = value

    def start_at(self, value: int) -> None:
        """Stay at what was chosen."""

    def observe(self, load: Load, *, wanted: bool, in_flight: int, elapsed_s: float, knows_kv: bool) -> None:
        """Ignore telemetry."""


class AdaptiveLimit:
    """A limit that follows the engine. Without telemetry it stays where it is.

    Both sides of the law are sums over the last seconds, so that a scrape in the middle of a long step, or between two
    answers, says little; and steps are per second, so that the scrape interval makes no difference.
    """

    __slots__ = ("_exact", "_running", "_tokens", "value")

    def __init__(self) -> None:
        """Start at START: high enough for a big engine, and a small one shows soon that it is too much."""
        self._exact = float(START)
        self._running = 0.0  # running requests x seconds, weighted by age
        self._tokens = 0.0  # output tokens, weighted alike
        self.value = START

    def start_at(self, value: int) -> None:
        """Go on from where another sidecar's limit was."""
        self._exact = float(min(max(value, FLOOR), CEILING))
        self.value = int(self._exact)

    def observe(self, load: Load, *, wanted: bool, in_flight: int, elapsed_s: float, knows_kv: bool) -> None:
        """Follow one fresh `load`, `elapsed_s` after the one before.

        `wanted`: requests wait and this limit is what holds them back. `in_flight`: what the limit allowed lately.
        `knows_kv`: KV tokens are in the books; then a full cache is their affair, and no reason for fewer requests.
        """
        elapsed_s = min(elapsed_s, LONGEST_S)
        if load.running is not None and load.tokens_per_s is not None:
            kept = math.exp(-elapsed_s / MEMORY_S)
            self._running = self._running * kept + load.running * elapsed_s
            self._tokens = self._tokens * kept + load.tokens_per_s * elapsed_s
        slow = self._running / self._tokens if self._running > 0 and self._tokens > 0 else None
        kv, exact = load.kv_usage, self._exact
        if not knows_kv and (load.preemptions or (kv is not None and kv > KV_BRAKE)):
            exact *= 0.9**elapsed_s
        elif slow is not None and slow > TARGET_S:
            # What is in flight made it slow, not the limit: while that runs out, the limit stays at what is right.
            exact = min(exact, max(exact * 0.85**elapsed_s, in_flight * TARGET_S / slow))
        elif wanted and slow is not None:
            growth = min(1.5, TARGET_S / slow)
            exact *= (growth if slow < FAST_S else min(1.1, growth)) ** elapsed_s
        self._exact = min(max(exact, FLOOR), CEILING)
        self.value = int(self._exact)


Limit = FixedLimit | AdaptiveLimit
