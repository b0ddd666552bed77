"""Time and streams of several sidecars: one virtual clock, an event loop for each, and streams that can be cut.

Whoever simulates says how long a stream's messages take and when it is cut: `Carry`.
"""

from __future__ import annotations

from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.replicas.door import Guest
    from extproc.replicas.messages import Message
    from extproc.replicas.replica import Replica


class Timer:
    """Something that is due, unless it is cancelled."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        """Be due once."""
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Let it never happen."""
        self.callback = None

    def run(self) -> None:
        """Let it happen."""
        if self.callback is not None:
            self.callback()


class Owner(Protocol):
    """Whose a timer, or an end of a stream, is."""

    is_dead: bool
    replica: Replica

    def take(self, timer: Timer) -> None:
        """Run what is due: now, never if it is dead, later if it is stopped."""


class Clock:
    """The one clock, and what is due when.

    Attributes:
        events: how many things have happened.
    """

    def __init__(self, now: float = 0.0) -> None:
        """Begin at `now`, in seconds."""
        self.now = now
        self.events = 0
        self._heap: list[tuple[float, int, Timer, Owner | None]] = []
        self._count = 0

    def at(self, when: float, callback: Callable[[], None], owner: Owner | None = None) -> Timer:
        """Have something happen then, or now if that is past."""
        timer = Timer(callback)
        self._count += 1
        heappush(self._heap, (max(when, self.now), self._count, timer, owner))
        return timer

    def next(self) -> float | None:
        """Return when something is due next."""
        while self._heap and self._heap[0][2].callback is None:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def step(self) -> bool:
        """Let the next thing happen; tell whether there was one."""
        if self.next() is None:
            return False
        self.now, _, timer, owner = heappop(self._heap)
        self.events += 1
        if owner is None:
            timer.run()
        else:
            owner.take(timer)
        return True

    def advance(self, now: float) -> None:
        """Let everything happen that is due by `now`."""
        while (at := self.next()) is not None and at <= now:
            self.step()
        self.now = max(self.now, now)


class Loop:
    """The clock as one sidecar has it."""

    def __init__(self, clock: Clock, owner: Owner) -> None:
        """Belong to `owner`."""
        self._clock, self._owner = clock, owner

    def time(self) -> float:
        """Return seconds."""
        return self._clock.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call it then."""
        return self._clock.at(when, callback, self._owner)

    def call_soon(self, callback: Callable[[], None]) -> Timer:
        """Call it in this moment, after what is due before it."""
        return self._clock.at(self._clock.now, callback, self._owner)


Sidecar = TypeVar("Sidecar", bound=Owner)


class Carry(Protocol[Sidecar]):
    """How something gets from one end to the other."""

    def __call__(self, end: End[Sidecar], arrive: Callable[[], None]) -> None:
        """Have it `arrive` at the peer of `end`, in order; while the two are cut off, put it into `end.queued`."""


class End(Generic[Sidecar]):
    """One side of a stream."""

    def __init__(self, carry: Carry[Sidecar], owner: Sidecar) -> None:
        """Be open, with nobody at the other side yet."""
        self._carry = carry
        self.owner = owner
        self.peer: End[Sidecar]
        self.receive: Callable[[Message], None] = lambda _: None
        self.closed: Callable[[], None] = lambda: None
        self.bounced: Callable[[Message], None] = lambda _: None
        self.is_over = False
        self.last_at = 0.0
        self.queued: list[Callable[[], None]] = []  # held back by a cut

    def send(self, message: Message) -> None:
        """Send a message."""
        if not self.is_over:
            self._carry(self, partial(self.peer.take, message))

    def close(self) -> None:
        """Close it, after what was sent."""
        if not self.is_over:
            self.break_off()

    def break_off(self) -> None:
        """Be over, as the kernel closes what a dead process leaves."""
        self.is_over = True
        self._carry(self, self.peer.finish)

    def take(self, message: Message) -> None:
        """Hear a message."""
        if not self.is_over and not self.owner.is_dead:
            self.receive(message)

    def finish(self) -> None:
        """Hear that the other side closed it."""
        if not self.is_over and not self.owner.is_dead:
            self.is_over = True
            self.closed()

    def go_on(self) -> None:
        """Send again what a cut held back."""
        queued, self.queued = self.queued, []
        for arrive in queued:
            self._carry(self, arrive)


def dial(
    carry: Carry[Sidecar],
    caller: Sidecar,
    target: Sidecar,
    receive: Callable[[Message], None],
    closed: Callable[[], None],
) -> tuple[End[Sidecar], End[Sidecar]]:
    """Open a stream; return the caller's end and the other. A dead one has nobody who would answer."""
    here, there = End(carry, caller), End(carry, target)
    here.peer, there.peer = there, here
    here.receive, here.closed = receive, closed
    if target.is_dead:
        there.break_off()
    else:
        carry(here, partial(_accept, there))
    return here, there


def _accept(there: End[Sidecar]) -> None:
    if not there.owner.is_dead:
        guest: Guest = there.owner.replica.door.accept(there)
        there.receive, there.closed = guest.receive, guest.closed
