"""A clock for bounds: it stands still while the machine lets nobody run, as a shared one does for a second or two.

What must be there within two seconds is there within two seconds of it, whatever neighbours do meanwhile.
"""

from __future__ import annotations

import functools
import threading
import time

_TICK_S = 0.01
_USUAL_S = 0.04
"""How late a sleeper may be on a machine with nothing else to do: no time is lost by that."""


class _Lost:
    """Sleeps for a moment again and again, in a thread of its own: by how much it oversleeps, so much was lost."""

    def __init__(self) -> None:
        self._lost_s = 0.0
        self._slept_at = time.monotonic()
        self._lock = threading.Lock()
        threading.Thread(target=self._sleep, name="awake", daemon=True).start()

    def _sleep(self) -> None:
        while True:
            time.sleep(_TICK_S)
            with self._lock:
                now = time.monotonic()
                self._lost_s += self._late_s(now)
                self._slept_at = now

    def _late_s(self, now: float) -> float:
        late_s = now - self._slept_at - _TICK_S
        return late_s if late_s > _USUAL_S else 0.0

    def until(self, now: float) -> float:
        with self._lock:
            return self._lost_s + self._late_s(now)


@functools.cache
def _lost() -> _Lost:
    return _Lost()


def awake() -> float:
    """Seconds in which this process was let run: as `time.monotonic`, but for what was lost."""
    now = time.monotonic()
    return now - _lost().until(now)


def lost_s() -> float:
    """How many seconds were lost so far: what is true only of a machine that lets all run is tried again after some."""
    return _lost().until(time.monotonic())
