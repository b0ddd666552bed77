"""Streams that wait for their client to say something, and for how long.

Envoy opens a stream to send a request's headers, and does so at once. Whoever else can connect could open them
without end, and each costs memory: one that says nothing ends after a while, and sooner when there are many. Many
come at once on a good day, too, and are heard later than they spoke, and not in the order in which they came: of 10,000
in one moment those that came last were heard in milliseconds, and the first after a second and more. So as many as
were just heard are no crowd; and where they are heard in their order, one is only taken to be silent if another that
began long after it has been heard. And a body whose model is looked for may never come: its request is then offered
without one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Stream = TypeVar("Stream")

SILENT_S = 10.0
"""How long a stream may say nothing."""
MOST, CROWDED_S = 2000, 3.0
"""When more streams than this say nothing, and more than were heard in so many seconds, they may for no longer."""
LATE_S = 0.5
"""Who looks so late was stopped, or had no turn: what came meanwhile is not read yet."""
READING_S = 10.0
"""How long a body may take to name its model."""
MOST_READING = 2000
"""Bodies that are read for their model at a time; beyond that the oldest has CROWDED_S, as above."""


class Clock(Protocol):
    """What is needed of the gate."""

    def now(self) -> float:
        """Return monotonic seconds."""

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call once, in so many seconds."""


class Silence(Generic[Stream]):
    """The streams that something is awaited on, oldest first, and one timer for all of them."""

    def __init__(
        self,
        clock: Clock,
        give_up: Callable[[Stream], None],
        silent_s: float = SILENT_S,
        most: int = MOST,
        crowded_s: float = CROWDED_S,
    ) -> None:
        """Measure by `clock`, and give a stream up after `silent_s`; where there are more than `most`, `crowded_s`."""
        self._clock = clock
        self._give_up = give_up
        self._silent_s, self._most, self._crowded_s = silent_s, most, crowded_s
        self._began: dict[Stream, float] = {}
        self._spoke_at = self._heard_until = -math.inf  # when one spoke last; when the latest that ever spoke had begun
        self._heard = self._heard_before = 0  # how many spoke; until the crowd was looked at last
        self._is_watching = self._is_crowded = False

    def began(self, stream: Stream) -> None:
        """Note a stream that shall say something."""
        self._began[stream] = self._clock.now()
        if not self._is_watching:
            self._is_watching = True
            self._call_later(self._silent_s, self._look)
        elif not self._is_crowded and len(self._began) > self._most:
            self._watch_crowd()

    def spoke(self, stream: Stream) -> None:
        """Note that it came."""
        began = self._began.pop(stream, None)
        if began is not None:
            self._heard += 1
            self._spoke_at = self._clock.now()
            if began > self._heard_until:
                self._heard_until = began

    def ended(self, stream: Stream) -> None:
        """Note the stream's end."""
        self._began.pop(stream, None)

    def end_all(self) -> None:
        """Give up all streams now."""
        began, self._began = self._began, {}
        for stream in began:
            self._give_up(stream)

    def _call_later(self, delay_s: float, look: Callable[[float], None]) -> None:
        due = self._clock.now() + delay_s
        self._clock.call_later(delay_s, lambda: look(due))

    def _is_late(self, due: float) -> bool:
        return self._clock.now() - due > LATE_S

    def _look(self, due: float) -> None:
        if not self._is_late(due):
            self._end(self._silent_s, 0)
        self._is_watching = bool(self._began)
        if self._is_watching:
            self._call_later(self._silent_s, self._look)

    def _watch_crowd(self) -> None:
        """Have a crowd looked at when it has had its moment, whether any more come or not."""
        self._is_crowded, self._heard_before = True, self._heard
        self._call_later(self._crowded_s, self._thin)

    def _thin(self, due: float) -> None:
        """End the oldest of too many. Of as many as spoke since the last look the rest is about to be heard."""
        self._is_crowded = False
        if not self._is_late(due):
            self._end(self._crowded_s, max(self._most, self._heard - self._heard_before))
        if len(self._began) > self._most:
            self._watch_crowd()

    def _end(self, silent_s: float, most: int) -> None:
        """Give up the streams that have been silent for so long, the oldest first, while there are more than `most`."""
        now = self._clock.now()
        until = (now if now - self._spoke_at > self._crowded_s else self._heard_until) - silent_s
        while len(self._began) > most:
            stream, began = next(iter(self._began.items()))
            if began > until:
                return
            del self._began[stream]
            self._give_up(stream)
