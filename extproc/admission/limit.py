"""How many requests an endpoint may hold: a fixed number, or one steered by the time per output token.

The law is Little's: time per output token = running requests / token rate. A latency-gradient limiter does not work
in front of continuous batching, where the wanted slow-down by batching looks like queueing (docs/adr/0003).
"""

from __future__ import annotations

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
WAITING_BRAKE = 2
SMOOTHING = 0.3


class FixedLimit:
    """A limit that a person chose."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        """Hold at most `value` requests; at least 1."""
        self.value = value

    def observe(self, load: Load, *, wanted: bool) -> None:
        """Ignore telemetry."""


class AdaptiveLimit:
    """A limit that follows the engine. Without telemetry it stays where it is."""

    __slots__ = ("_exact", "_time_per_token_s", "value")

    def __init__(self) -> None:
        """Start at START: high enough for a big engine, and a small one shows soon that it is too much."""
        self._exact = float(START)
        self._time_per_token_s: float | None = None
        self.value = START

    def observe(self, load: Load, *, wanted: bool) -> None:
        """Follow one fresh `load`. `wanted`: requests wait and this limit is what holds them back."""
        seen = load.time_per_token_s
        if seen is not None:
            mean = self._time_per_token_s
            self._time_per_token_s = seen if mean is None else mean + SMOOTHING * (seen - mean)
        slow = self._time_per_token_s
        kv = load.kv_usage
        if load.preemptions or (kv is not None and kv > KV_BRAKE):
            self._exact *= 0.9
        elif load.waiting is not None and load.waiting > WAITING_BRAKE:
            self._exact *= 0.95
        elif slow is not None and slow > TARGET_S:
            self._exact *= max(0.85, TARGET_S / slow)
        elif wanted and slow is not None:
            growth = min(1.5, TARGET_S / slow)
            self._exact *= growth if slow < FAST_S else min(1.1, growth)
        self._exact = min(max(self._exact, FLOOR), CEILING)
        self.value = int(self._exact)


Limit = FixedLimit | AdaptiveLimit
