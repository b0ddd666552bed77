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
LISTED_BEATS = 3
"""Who says nothing more is listed by the store for so many beats."""
NEW_BEATS = 6
"""Who came is known to everybody that still counts so many of the store's beats, and GONE_S, later. Who said that he
lives just before, and nothing since, is listed for three beats, missed in the next answer, and counted out GONE_S and a
beat after that; one is to spare. By time, not by answers: a store may be silent soon after a start, and for long."""
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
        self._new_until: dict[str, float] = {}  # of each place: not all may know of it before
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
        places, until = {member.address for member in self.members.values()}, self._known_at(now)
        self._new_until = {place: self._new_until.get(place, until) for place in places}
        gone = set()
        for name in self.members:
            if name in seen:
                self._missing.pop(name, None)
            elif name in self._left or now - self._missing.setdefault(name, now) >= GONE_S:
                gone.add(name)
        self._let_go(gone, now)
        self._left &= seen.keys()
        self._vanished = {name: one for name, one in self._vanished.items() if now < one.until and name not in seen}

    def _let_go(self, gone: Set[str], now: float) -> None:
        """Count out who is gone. Who did so without a goodbye keeps the part that he may think is his.

        He may know of nobody who came after he was seen last: of the others each has as much as he.
        """
        known = {name for name in self.members if self._is_known(name, now)}
        if known <= gone:  # those who stay are all new; he may know of who came before he was heard last
            heard_at = now - LISTED_BEATS * self.beat_s - GONE_S
            known = {name for name in self.members if self._came_at(name) <= heard_at}
        if known <= gone:  # they have all just come: that the others live unseen is least likely
            known = set(self.members)
        rest = 1.0 - self.kept(now)
        for name in gone:
            if name not in self._left:
                part = rest / len(known | {name})
                self._vanished[name] = Vanished(self.members[name].address, part, now + WARY_S)
            self._forget(name)

    def _known_at(self, came_at: float) -> float:
        return came_at + NEW_BEATS * self.beat_s + GONE_S

    def _came_at(self, name: str) -> float:
        return self._new_until[self.members[name].address] - NEW_BEATS * self.beat_s - GONE_S

    def met(self, member: Member, now: float) -> None:
        """Count somebody in who opened a stream to us, or to whom we did."""
        self._left.discard(member.id)
        self.members[member.id] = member
        self._new_until.setdefault(member.address, self._known_at(now))

    def left(self, name: str) -> None:
        """Count somebody out who said goodbye; the store may still list him for a moment."""
        self._left.add(name)
        self._vanished.pop(name, None)
        self._forget(name)

    def _forget(self, name: str) -> None:
        self.members.pop(name, None)
        self._missing.pop(name, None)

    def _is_known(self, name: str, now: float) -> bool:
        """Tell whether everybody who counts knows of somebody at his place."""
        member = self.members.get(name)
        return member is not None and now >= self._new_until[member.address]

    def count(self, group: Set[str]) -> int | None:
        """Return how many there are, those in `group` surely; None: the store has not told yet."""
        return None if self.answered_at is None else len(self.members.keys() - self._left | group)

    def kept(self, now: float, group: Set[str] = frozenset()) -> float:
        """Return which part of each limit those may use who vanished and are not in `group`: all others share the rest.

        Each place counts once, and not if somebody else is there: who dies again and again has another name each time.
        """
        return sum({one.address: one.part for one in self._unseen(now, group).values()}.values())

    def _unseen(self, now: float, group: Set[str]) -> dict[str, Vanished]:
        taken = {member.address for member in self.members.values()}
        return {
            name: one
            for name, one in self._vanished.items()
            if now < one.until and name not in group and one.address not in taken
        }

    def missing(self, now: float, group: Set[str]) -> dict[str, str]:
        """Return who is not in `group`, with his address: alive by what we know, or lately gone without a goodbye."""
        gone = {name: one.address for name, one in self._unseen(now, group).items()}
        known = {name: one.address for name, one in self.members.items() if name not in group | self._left}
        return known | gone

    def part(self, group: Set[str], now: float) -> float:
        """Return the part of that rest that `group` may use, 0..1; 0: the store has not told yet.

        Somebody outside may not know yet of who has just come. So that one adds nothing to its own group, if there are
        others, and counts at once among the others of another group.
        """
        if self.answered_at is None:
            return 0.0
        others = len(self.members.keys() - self._left - group)
        ours = sum(self._is_known(name, now) for name in group)
        return ours / (ours + others) if others else 1.0

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
