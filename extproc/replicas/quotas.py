"""How much of each limit a group of sidecars may use, from when the group forms until it ends.

A group of M of N sidecars holds at most M/N of each limit, and never more than an engine's own figures leave free, so
groups that don't know of each other stay within the limit together; whom each counts the census tells. A group that has
just formed grows only once those who were left behind have noticed, and a reading from after that has told what runs. A
new endpoint waits for its first reading: others may have known it before.

Who reaches neither the store nor all others may have been counted out: others take his part, in steps that he has the
time to see in an engine's figures. Such a group takes at once as much of its part as these show that others leave of
the least that may be theirs; beyond that only one request for each sidecar of it more than it held, and no more than
that in all if it can't read the figures.
"""

from __future__ import annotations

import math
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Set

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.values import Decision
    from extproc.replicas.census import Census
    from extproc.replicas.gate import SharedGate

READ_S = 0.6
"""A reading that comes later than this after a group formed was begun after it formed: scrapes last half a second."""
UNREAD_S = 2.5
"""An endpoint that has shown nothing so long after its group formed, or it came, has no page, or none to be had."""
BACK_BEATS = 2.25
"""Who was nobody stays so for so many of the store's beats. The others count us in when they ask the store next, one
beat after we have at the latest, and one may fail; until then they use our part."""
UNKNOWN_S = 10.0
"""How long an endpoint stays unused because a follower's Envoy does not know it yet."""
FRESH_S = 1.5
"""Who may have been counted out takes his part at once by figures that were read so lately alone."""
SEEN_S = 2.5
"""What was sent so long ago he sees in these: a scrape lasts half a second, a request's way as long."""
STEP = 1 / 2
"""Of one sidecar's part: those who are left hold so much more than he has seen, and he may take one more than that."""


def _part_of(limit: int, part: float) -> int:
    return max(1, math.floor(limit * part + 1e-9))


class _Moment(NamedTuple):
    """What counts for all endpoints alike.

    Attributes:
        part: of each limit that is the group's.
        is_all: nobody else is seen.
        sidecars: of the group.
        is_nobody: we may be in a corner where nobody sees us: others have the whole limit for themselves, in steps.
        is_beside: somebody vanished who may be alive unseen, and has a part.
    """

    now: float
    part: float
    is_all: bool
    sidecars: int
    is_nobody: bool
    is_beside: bool


class Quotas:
    """What a group may hold at each endpoint; the core is told whenever that changes."""

    def __init__(self, gate: SharedGate, census: Census, group: Callable[[], Set[str]], *, hold_until: float) -> None:
        """Begin with what we hold ourselves. Until `hold_until` those whom we lost may not have noticed.

        `group`: we, and whoever follows us and has told what he holds.
        """
        self._gate = gate
        self._census = census
        self._group = group
        self._fresh_from = max(hold_until, gate.now() + READ_S)
        endpoints = gate.controller.endpoints
        self._refill = {name: endpoint.sequences for name, endpoint in endpoints.items()}
        self._unread = dict.fromkeys(endpoints, self._fresh_from + UNREAD_S)  # until when at most
        self._known = set(endpoints)
        self._held: dict[str, int] = {}  # the least that we held since the last reading, where that counts
        self._before: dict[str, deque[tuple[float, int]]] = {}  # the same of earlier readings of the last SEEN_S
        self._there: dict[str, int] = {}  # what an engine ran at the last reading, ours and others'
        self._caps = {name: endpoint.limit.value for name, endpoint in endpoints.items()}
        self._read_at: dict[str, float] = {}
        self._nobody_at: dict[str, float] = {}  # when nobody knew of us last, or saw us, nor we an endpoint's page
        self._lacking: dict[str, float] = {}  # endpoints that not every follower knows, since when
        self._is_over = False
        for endpoint in endpoints.values():
            endpoint.meet_again()
        self.follow()

    def _moment(self) -> _Moment:
        now, group = self._gate.now(), self._group()
        part, kept = self._census.part(group, now), self._census.kept(now, group)
        is_nobody = part < 1.0 and self._census.is_cut_off(now)
        return _Moment(now, part * (1.0 - kept), part >= 1.0, len(group), is_nobody, kept > 0.0)

    def _quota(self, endpoint: Endpoint, moment: _Moment) -> int | None:
        """Return the most sequences that the group may hold at an endpoint; None: its limit alone decides."""
        name, value = endpoint.name, endpoint.limit.value
        if name in self._lacking and moment.now < self._lacking[name] + UNKNOWN_S:
            return 0
        most = self._most(endpoint, moment)
        if name in self._unread:
            ours: int | None = self._refill.get(name, 0)
        elif moment.is_all:  # or so it looks: a store that has just come back may list us alone
            self._caps[name] = value
            ours = self._beside_who_vanished(endpoint, moment)
        else:
            # A limit may only fall while others share it: each group would let its own grow for what all send together.
            cap = self._caps[name] = min(self._caps.get(name, value), value)
            ours = _part_of(cap, moment.part)
            self._before.pop(name, None)
        return ours if most is None else most if ours is None else min(ours, most)

    def _most(self, endpoint: Endpoint, moment: _Moment) -> int | None:
        """Return the most that a group may hold that others may not see; None: they do.

        At once it takes, for each of its sidecars, what the figures show that others leave of one sidecar's part: none
        of them holds more than its own then, however many they have counted out. More it takes in steps, as they see
        its requests in the figures.
        """
        name, value = endpoint.name, endpoint.limit.value
        if self._is_apart(name, moment):
            return moment.sidecars
        if not moment.is_nobody:
            return None
        most = self._least(endpoint) + moment.sidecars
        if self._there_lately(name, moment.now) and self._census.are_wary(moment.now):
            one = _part_of(min(self._caps.get(name, value), value), moment.part / moment.sidecars)
            most += moment.sidecars * max(one - self._there[name], 0)
        return most

    def _there_lately(self, name: str, now: float) -> bool:
        return name in self._there and now <= self._read_at[name] + FRESH_S

    def _beside_who_vanished(self, endpoint: Endpoint, moment: _Moment) -> int | None:
        """Return the most that all others may hold while somebody may be alive whom nobody sees; None: nobody is.

        They take his part in steps: he sees by the figures what they leave of their own, and takes that at once.
        """
        name = endpoint.name
        if not moment.is_beside or name not in self._there:  # without figures he sends next to nothing
            self._before.pop(name, None)
            return None
        ours = _part_of(endpoint.limit.value, moment.part)
        step = max(int(ours / moment.sidecars * STEP), 1)
        return max(ours, min(self._least_seen(endpoint, moment.now), self._there[name]) + step)

    def _least_seen(self, endpoint: Endpoint, now: float) -> int:
        """Return the least that we held in the last SEEN_S."""
        before = self._before.setdefault(endpoint.name, deque([(now, 0)]))  # as if nothing: we did not look
        while before and before[0][0] < now - SEEN_S:
            before.popleft()
        return min((self._least(endpoint), *(least for _, least in before)))

    def _least(self, endpoint: Endpoint) -> int:
        """Return the least that we held since the last reading."""
        held = self._held[endpoint.name] = min(self._held.get(endpoint.name, endpoint.sequences), endpoint.sequences)
        return held

    def _is_blind(self, name: str, now: float) -> bool:
        """Tell whether an endpoint's page can't be had, before what it said last is forgotten as stale."""
        lately_s = self._gate.controller.policy.stale_after_s / 2
        return now > self._read_at.get(name, -math.inf) + lately_s

    def _is_apart(self, name: str, moment: _Moment) -> bool:
        """Tell whether an endpoint is anybody's but ours: nobody knows of us, or we can't tell if they do by now."""
        if self._census.answered_at is None or (moment.is_nobody and self._is_blind(name, moment.now)):
            self._nobody_at[name] = moment.now
        at = self._nobody_at.get(name)
        return at is not None and moment.now <= at + BACK_BEATS * self._census.beat_s

    def follow(self) -> None:
        """Follow a change of the group, of who is alive, or of time."""
        moment, endpoints = self._moment(), self._gate.controller.endpoints
        for name in endpoints.keys() - self._known:
            self._refill[name], self._unread[name] = 0, moment.now + UNREAD_S
        self._known = set(endpoints)
        for endpoint in list(endpoints.values()):
            self._limit(endpoint, moment)

    def follow_one(self, name: str) -> None:
        """Follow a change of one endpoint."""
        endpoint = self._gate.controller.endpoints.get(name)
        if endpoint is not None:
            self._limit(endpoint, self._moment())

    def _limit(self, endpoint: Endpoint, moment: _Moment) -> None:
        quota, name = self._quota(endpoint, moment), endpoint.name
        if quota != endpoint.quota:
            self._gate.do(partial(self._set, name, quota))

    def _set(self, name: str, quota: int | None, now: float) -> list[Decision]:
        """Tell the core, unless the look at the clock has just ended our leadership: this process was stopped."""
        return [] if self._is_over else self._gate.controller.set_quota(name, quota, now)

    def close(self) -> None:
        """Have the core send nothing to anybody: the group has ended."""
        self._is_over = True
        for name in list(self._gate.controller.endpoints):
            self._gate.do(partial(self._gate.controller.set_quota, name, 0))

    def turn(self) -> None:
        """Follow the passing of time."""
        if self._unread:
            now = self._gate.now()
            self._unread = {name: until for name, until in self._unread.items() if now < until}
        self.follow()

    # ---- what the group brings along, and loses

    def hold_more(self, name: str, sequences: int) -> None:
        """Have the group refill what somebody who joined brought along."""
        self._refill[name] = self._refill.get(name, 0) + sequences

    def hold_less(self, name: str, sequences: int) -> None:
        """Have it no more refill what somebody held who is gone."""
        self._refill[name] = max(self._refill.get(name, 0) - sequences, 0)

    def released(self, name: str) -> None:
        """Follow, where that counts, that we hold less."""
        if name in self._held:
            self.follow_one(name)

    # ---- readings

    def before_reading(self, name: str) -> None:
        """Have the next reading count others' requests, if there may be others."""
        endpoint, moment = self._gate.controller.endpoints.get(name), self._moment()
        if endpoint is not None and (name in self._unread or not moment.is_all or self._census.is_wary(moment.now)):
            endpoint.meet_again()

    def after_reading(self, name: str) -> None:
        """Follow what a reading changed."""
        self._read_at[name] = self._gate.now()
        held = self._held.pop(name, None)
        if held is None:
            self._before.pop(name, None)
        elif name in self._before:
            self._before[name].append((self._read_at[name], held))
        endpoint = self._gate.controller.endpoints.get(name)
        page = None if endpoint is None else endpoint.reading.page
        if page is not None and page.running is not None:
            self._there[name] = int(page.running + (page.waiting or 0.0))
        if self._gate.now() >= self._fresh_from:
            self._unread.pop(name, None)
        self.follow_one(name)

    # ---- endpoints that not everybody knows

    def leave_out(self, missing: Iterable[str]) -> None:
        """Keep these unused, for a while: some follower's Envoy does not know them."""
        now = self._gate.now()
        self._lacking = {name: self._lacking.get(name, now) for name in missing}
        self.follow()

    def left_out_too_long(self) -> set[str]:
        """Return those that were kept unused for so long that they are used in spite of it."""
        now = self._gate.now()
        return {name for name, since in self._lacking.items() if now >= since + UNKNOWN_S}
