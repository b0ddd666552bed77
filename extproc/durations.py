"""Durations as people write them: `10s`, `250ms`, `1.5m`, `2h`, or a bare number of seconds."""

from __future__ import annotations

import re

_PATTERN = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h)?", re.ASCII)
_SECONDS = {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float | None:
    """Return seconds, or None if `text` is no duration. Negative ones, NaN and infinity are none."""
    match = _PATTERN.fullmatch(text.strip())
    return float(match[1]) * _SECONDS[match[2]] if match else None


def format_duration(seconds: float) -> str:
    """Write `seconds` so that `parse_duration` and Envoy read it: Envoy knows only `s`."""
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"
