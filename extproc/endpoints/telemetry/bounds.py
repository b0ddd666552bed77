"""Which numbers are believed. Anything else is None: unknown, and unknown is never 0."""

from __future__ import annotations

MOST_REQUESTS = 1e6
"""Running or waiting at one endpoint: above it, somebody's arithmetic went wrong."""
MOST_TOKENS = 1e12
"""Of a KV cache, and per second."""
MOST_COUNTED = float(2**53)
"""A counter above it is no longer exact, and differences of it mean nothing."""
_ROUNDING = 1.01


def within(value: float | None, most: float) -> float | None:
    """Return `value` if it lies in 0..`most`. NaN, infinity and negatives don't."""
    return value if value is not None and 0.0 <= value <= most else None


def share(value: float | None) -> float | None:
    """Return a share of 1. A hair above 1 is rounding; more is a percentage or nonsense, and unknown."""
    known = within(value, _ROUNDING)
    return None if known is None else min(known, 1.0)


def whole(value: float | None, most: float) -> int | None:
    """Return a whole number in 1..`most`: 0 is no size."""
    known = within(value, most)
    return int(known) if known is not None and known >= 1.0 else None
