"""How many sidecars there are. Wrong on the safe side: quick to count somebody in, slow to count him out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Set

    from extproc.replicas.messages import Member

GONE_S = 3.0
"""Somebody must be missing from the store's answers for so long before he counts as gone. A store that was restarted
empty knows everybody again after a second."""
SILENT_BEATS = 3.25
"""A store that was silent for so many of its beats is lost to us: two may fail, and the third's answer takes a moment.

It must be so before others count us out, who then use our part. They do that when our last word is as old as the
store's ALIVE_S and GONE_S together: 3 + 3 s with Valkey, 6 + 3 s with Leases. We count from when we began to say it,
which is no later, however long the answer took. 3.25 beats are 3.25 s of 1 s, and 6.5 s of 2 s; quotas follow within
0.25 s, and a process that did nothing for up to 1.2 s does not notice: 4.7 s < 6 s, and 7.95 s < 9 s."""
WARY_S = 600.0
"""How long after somebody vanished without a word his requests are looked for in the engines' figures at every reading:
he may be alive where neither we nor the store see him."""


class Vanished(NamedTuple):
    """Who was counted out without a goodbye: where he was, his part of limits, and until when he may live unseen."""

    address: str
    part: float
    until: float


class Census:
    """The members of a pool, as the store and streams tell.

    Attributes:
        beat_s: how often the store is asked.
        members: by id.
        answered_at: when the store answered last.
    """

    def __init__(self, beat_s: float = 1.0) -> None:
        """Know nobody. The store is asked every `beat_s`."""
        self.beat_s = beat_s
        self.members: dict[str, Member] = {}
        self.answered_at: float | None = None
        self._asked_at: float | None = None  # when that was asked for, and with it was said that we live
        self._vanished: dict[str, Vanished] = {}  # who was counted out without a goodbye
        self._missing: dict[str, float] = {}  # since when
        self._left: set[str] = set()

    def heard(self, members: Iterable[Member], now: float, asked_at: float | None = None) -> None:
        """Take over an answer of the store, that was asked at `asked_at`, or now."""
        self.answered_at = now
        self._asked_at = now if asked_at is None else asked_at
        seen = {}
        for member in members:
            if member.address:
                seen[member.id] = member
            else:
                self.left(member.id)
        self.members.update(seen)
        everybody = len(self.members) + len(self._places(self.members.keys()))
        for name in list(self.members):
            if name in seen:
                self._missing.pop(name, None)
            elif name in self._left or now - self._missing.setdefault(name, now) >= GONE_S:
                if name not in self._left:
                    self._vanished[name] = Vanished(self.members[name].address, 1 / everybody, now + WARY_S)
                self._forget(name)
        self._left &= seen.keys()
        self._vanished = {name: one for name, one in self._vanished.items() if now < one.until and name not in seen}

    def met(self, member: Member) -> None:
        """Count somebody in who opened a stream to us."""
        self._left.discard(member.id)
        self.members[member.id] = member

    def left(self, name: str) -> None:
        """Count somebody out who said goodbye; the store may still list him for a moment."""
        self._left.add(name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        self.members.pop(name, None)
        self._missing.pop(name, None)

    def count(self, group: Set[str]) -> int | None:
        """Return how many there are, those in `group` surely; None: the store has not told yet.

        To a group that is not all of them also those count who vanished: they may be alive in another part. Each place
        counts once, and not if somebody else is there: who dies again and again has another name in each life.
        """
        if self.answered_at is None:
            return None
        known = self.members.keys() - self._left | group
        return len(known) if known == group else len(known) + len(self._places(known))

    def _places(self, known: Set[str]) -> dict[str, Vanished]:
        """Return who vanished by his place, if nobody else is there; none of `known`."""
        taken = {member.address for member in self.members.values()}
        return {
            one.address: one for name, one in self._vanished.items() if name not in known and one.address not in taken
        }

    def kept(self, now: float) -> float:
        """Return which part of each limit those may use who vanished, to a group that is all others."""
        return sum(one.part for one in self._places(self.members.keys()).values() if now < one.until)

    def part(self, group: Set[str]) -> float:
        """Return the part of each limit that `group` may use, 0..1; 0: the store has not told yet."""
        count = self.count(group)
        return 0.0 if count is None else len(group) / count

    def is_wary(self, now: float) -> bool:
        """Tell whether somebody may be alive whom nobody sees."""
        return any(now < one.until for one in self._vanished.values())

    def are_wary(self, now: float) -> bool:
        """Tell whether others who have counted us out expect still that we are alive."""
        return self._asked_at is not None and now < self._asked_at + WARY_S

    def is_cut_off(self, now: float) -> bool:
        """Tell whether the store has been silent for so long that, if it is so to us alone, others count us out."""
        return self._asked_at is None or now > self._asked_at + SILENT_BEATS * self.beat_s

    def others(self, me: str) -> list[Member]:
        """Return all but `me`, the oldest first."""
        found = [member for name, member in self.members.items() if name != me and name not in self._left]
        return sorted(found, key=lambda member: (member.joined, member.id))
