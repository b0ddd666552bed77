"""Streams on which nothing comes: Envoy opens one to send a request's headers, and does so at once.

Whoever else can connect could open them without end, and each costs memory. So they end after a while, and sooner when
there are many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

SILENT_S = 10.0
"""How long a stream may say nothing."""
MOST, CROWDED_S = 2000, 1.0
"""When more streams than this say nothing, they may do so for a second only."""


class Clock(Protocol):
    """What is needed of the gate."""

    def now(self) -> float:
        """Return monotonic seconds."""

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call once, in so many seconds."""


class Stream(Protocol):
    """What is needed of a stream."""

    hang_up: Callable[[], object] | None


class Silence:
    """The streams that nothing came on yet, oldest first, and one timer for all of them."""

    def __init__(self, clock: Clock) -> None:
        """Measure by `clock`."""
        self._clock = clock
        self._began: dict[Stream, float] = {}
        self._is_watching = False

    def began(self, stream: Stream) -> None:
        """Note a new stream."""
        self._began[stream] = self._clock.now()
        if not self._is_watching:
            self._is_watching = True
            self._clock.call_later(SILENT_S, self._look)
        elif len(self._began) > MOST:
            self._hang_up(CROWDED_S)

    def ended(self, stream: Stream) -> None:
        """Note a stream's first message, or its end."""
        self._began.pop(stream, None)

    def _look(self) -> None:
        self._hang_up(SILENT_S)
        self._is_watching = bool(self._began)
        if self._is_watching:
            self._clock.call_later(SILENT_S, self._look)

    def _hang_up(self, silent_s: float) -> None:
        """End the streams that have been silent for so long: the oldest, so that it costs what it ends."""
        until = self._clock.now() - silent_s
        while self._began:
            stream, began = next(iter(self._began.items()))
            if began > until:
                return
            del self._began[stream]
            if stream.hang_up is not None:
                stream.hang_up()
