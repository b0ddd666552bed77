"""Time and the network of several sidecars: one virtual clock, an event loop for each, streams that can be cut.

A cut stream loses nothing: what was sent arrives when the network heals, however late, as with TCP.
"""

from __future__ import annotations

from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from extproc.replicas.door import Guest
    from extproc.replicas.messages import Message

    from .sidecar import Sidecar
    from .site import Site


class Timer:
    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Clock:
    """The one clock, and what is due when."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.events = 0
        self._heap: list[tuple[float, int, Timer, Sidecar | None]] = []
        self._sequence = 0

    def at(self, when: float, callback: Callable[[], None], owner: Sidecar | None = None) -> Timer:
        timer = Timer(callback)
        self._sequence += 1
        heappush(self._heap, (max(when, self.now), self._sequence, timer, owner))
        return timer

    def step(self) -> bool:
        """Let the next thing happen; tell whether there was one."""
        while self._heap:
            when, _, timer, owner = heappop(self._heap)
            if timer.callback is None or (owner is not None and owner.is_dead):
                continue
            self.now = when
            self.events += 1
            if owner is not None and owner.is_stopped:
                owner.later.append((None, timer))
            else:
                timer.callback()
            return True
        return False

    def next_at(self) -> float | None:
        return self._heap[0][0] if self._heap else None


class End:
    """One side of a stream."""

    def __init__(self, net: Net, owner: Sidecar) -> None:
        self.net = net
        self.owner = owner
        self.peer: End
        self.receive: Callable[[Message], None] = lambda _: None
        self.closed: Callable[[], None] = lambda: None
        self.bounced: Callable[[Message], None] = lambda _: None
        self.is_over = False
        self.last_at = 0.0
        self.queued: list[Callable[[], None]] = []  # held back by a cut

    def send(self, message: Message) -> None:
        if not self.is_over:
            self.net.carry(self, partial(self.peer.take, message))

    def close(self) -> None:
        if not self.is_over:
            self.is_over = True
            self.net.carry(self, self.peer.finish)

    def take(self, message: Message) -> None:
        if not self.is_over and not self.owner.is_dead:
            self.receive(message)

    def finish(self) -> None:
        if not self.is_over and not self.owner.is_dead:
            self.is_over = True
            self.closed()


class Net:
    """Streams between sidecars."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.delay_s = (0.0002, 0.002)
        self.cuts: set[frozenset[str]] = set()
        self.ends: list[End] = []

    def is_cut(self, one: Sidecar, other: Sidecar) -> bool:
        return frozenset((one.place, other.place)) in self.cuts

    def carry(self, sender: End, arrive: Callable[[], None]) -> None:
        """Bring something to the other end: in order, and not while the two are cut off from each other."""
        if sender.queued or self.is_cut(sender.owner, sender.peer.owner):
            sender.queued.append(arrive)
            return
        clock = self.site.clock
        at = sender.last_at = max(sender.last_at, clock.now + self.site.random.uniform(*self.delay_s))
        clock.at(at, partial(self._arrive, sender, arrive))

    def _arrive(self, sender: End, arrive: Callable[[], None]) -> None:
        target = sender.peer.owner
        if target.is_stopped:
            target.later.append((sender.peer, Timer(arrive)))
        else:
            arrive()

    def heal(self) -> None:
        self.cuts.clear()
        self.ends = [end for end in self.ends if not (end.is_over and end.peer.is_over)]
        for end in self.ends:
            queued, end.queued = end.queued, []
            for arrive in queued:
                self.carry(end, arrive)

    def cut(self, one: Iterable[str], other: Iterable[str]) -> None:
        others = list(other)
        self.cuts |= {frozenset((a, b)) for a in one for b in others if a != b}

    def died(self, sidecar: Sidecar) -> None:
        """The kernel of a dead process closes its streams."""
        for end in self.ends:
            if end.owner is sidecar and not end.is_over:
                end.is_over = True
                self.carry(end, end.peer.finish)


class Dialer:
    """The network as one sidecar has it."""

    def __init__(self, net: Net, owner: Sidecar) -> None:
        self._net = net
        self._owner = owner

    def dial(self, address: str, receive: Callable[[Message], None], closed: Callable[[], None]) -> End:
        net, site = self._net, self._net.site
        here = End(net, self._owner)
        here.receive, here.closed = receive, closed
        target = site.sidecars[address]
        there = End(net, target)
        here.peer, there.peer = there, here
        net.ends += [here, there]
        if target.is_dead:
            there.is_over = True
            net.carry(there, here.finish)
        else:
            net.carry(here, partial(self._accept, there))
        return here

    @staticmethod
    def _accept(there: End) -> None:
        if not there.owner.is_dead:
            guest: Guest = there.owner.replica.door.accept(there)
            there.receive, there.closed = guest.receive, guest.closed


class Loop:
    """The event loop of one sidecar."""

    def __init__(self, clock: Clock, owner: Sidecar) -> None:
        self._clock, self._owner = clock, owner

    def time(self) -> float:
        return self._clock.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        return self._clock.at(when, callback, self._owner)

    def call_soon(self, callback: Callable[[], None]) -> Timer:
        return self._clock.at(self._clock.now, callback, self._owner)
