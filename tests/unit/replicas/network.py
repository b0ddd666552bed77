"""The network of several sidecars: how long messages take, and cuts. Its clock and streams are the simulator's.

A cut stream loses nothing: what was sent arrives when the network heals, however late, as with TCP.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from extproc.simulate.network import End, Timer, dial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from extproc.replicas.messages import Message

    from .sidecar import Sidecar
    from .site import Site


class Net:
    """Streams between sidecars."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.delay_s = (0.0002, 0.002)
        self.cuts: set[frozenset[str]] = set()
        self.ends: list[End[Sidecar]] = []

    def is_cut(self, one: Sidecar, other: Sidecar) -> bool:
        return frozenset((one.place, other.place)) in self.cuts

    def carry(self, sender: End[Sidecar], arrive: Callable[[], None]) -> None:
        """Bring something to the other end: in order, and not while the two are cut off from each other."""
        if sender.queued or self.is_cut(sender.owner, sender.peer.owner):
            sender.queued.append(arrive)
            return
        clock = self.site.clock
        at = sender.last_at = max(sender.last_at, clock.now + self.site.random.uniform(*self.delay_s))
        clock.at(at, partial(self._arrive, sender, arrive))

    def _arrive(self, sender: End[Sidecar], arrive: Callable[[], None]) -> None:
        target = sender.peer.owner
        if target.is_stopped:
            target.later.append((sender.peer, Timer(arrive)))
        else:
            arrive()

    def heal(self) -> None:
        self.cuts.clear()
        self.ends = [end for end in self.ends if not (end.is_over and end.peer.is_over)]
        for end in self.ends:
            end.go_on()

    def cut(self, one: Iterable[str], other: Iterable[str]) -> None:
        others = list(other)
        self.cuts |= {frozenset((a, b)) for a in one for b in others if a != b}

    def died(self, sidecar: Sidecar) -> None:
        """The kernel of a dead process closes its streams."""
        for end in self.ends:
            if end.owner is sidecar and not end.is_over:
                end.break_off()


class Dialer:
    """The network as one sidecar has it."""

    def __init__(self, net: Net, owner: Sidecar) -> None:
        self._net = net
        self._owner = owner

    def dial(self, address: str, receive: Callable[[Message], None], closed: Callable[[], None]) -> End[Sidecar]:
        net = self._net
        here, there = dial(net.carry, self._owner, net.site.sidecars[address], receive, closed)
        net.ends += [here, there]
        return here
