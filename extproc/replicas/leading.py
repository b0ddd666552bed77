"""What a leader keeps: its followers, the requests they forwarded, and how much of each limit the group may use.

A group of M of N sidecars holds at most M/N of each limit, and never more than an engine's own figures leave free, so
groups that don't know of each other stay within the limit together. A group that has just formed grows only once those
who were left behind have noticed, and a reading from after that has told what runs.
"""

from __future__ import annotations

import math
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Dispatch, Reject, Request
from extproc.replicas.messages import (
    Answered,
    Asked,
    Beat,
    Cancel,
    FirstToken,
    Grant,
    Held,
    Learned,
    Leave,
    Moved,
    Names,
    Offer,
    Release,
    Remember,
    Report,
    Return,
    Status,
    Synced,
    Turned,
    Wait,
)
from extproc.replicas.rules import differing, rules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Set

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.values import Decision
    from extproc.replicas.census import Census
    from extproc.replicas.gate import SharedGate
    from extproc.replicas.messages import Link, Member, Message

READ_S = 0.6
"""A reading that comes later than this after a group formed was begun after it formed: scrapes last half a second."""
UNREAD_S = 2.5
"""An endpoint that has shown nothing so long after its group formed has no page, or none that can be had."""
UNKNOWN_S = 10.0
"""How long an endpoint stays unused because a follower's Envoy does not know it yet."""

_arrival = attrgetter("request.arrived")


class Forwarded(Ticket):
    """A follower's request in the leader's core."""

    __slots__ = ("follower", "number")

    def __init__(self, follower: Follower, number: int, request: Request, deliver: Callable[[Decision], None]) -> None:
        """Stand in for request `number` of `follower`."""
        super().__init__(request, deliver)
        self.follower = follower
        self.number = number


class Follower:
    """A sidecar that follows us.

    Attributes:
        tickets: its requests by its own numbers.
        heard: its last beat; `heard_at`: when it came.
        names: endpoints that its Envoy knows.
        rules: marks of its configuration.
        syncing: what it brought along, until it has told all; None after.
    """

    __slots__ = ("heard", "heard_at", "link", "member", "names", "rules", "syncing", "tickets")

    def __init__(
        self, member: Member, link: Link, names: frozenset[str], now: float, rules: frozenset[str] = frozenset()
    ) -> None:
        """Start with nothing."""
        self.member = member
        self.link = link
        self.names = names
        self.rules = rules
        self.tickets: dict[int, Forwarded] = {}
        self.heard = 0
        self.heard_at = now
        self.syncing: list[Forwarded] | None = []


class Leading:
    """The books of one leadership, from when it forms until it ends.

    Attributes:
        followers: by id.
        gathering: requests that wait until all followers have told theirs, so that age decides; None: over.
    """

    def __init__(self, gate: SharedGate, me: Member, census: Census, *, hold_until: float) -> None:
        """Lead. Until `hold_until` those whom we lost may not have noticed: the group only refills what it holds."""
        self._gate = gate
        self._me = me
        self._census = census
        self.began_at = gate.now()
        self._fresh_from = max(hold_until, self.began_at + READ_S)
        self.followers: dict[str, Follower] = {}
        self.gathering: dict[Ticket, None] | None = {}
        endpoints = gate.controller.endpoints
        self._refill = {name: endpoint.sequences for name, endpoint in endpoints.items()}
        self._unread = set(endpoints)
        self._caps = {name: endpoint.limit.value for name, endpoint in endpoints.items()}
        self._lacking: dict[str, float] = {}  # endpoints that not every follower knows, since when
        self._sent_away: dict[str, list[str]] = {}  # followers, and what they lacked for too long
        gate.controller.is_shared = True
        for endpoint in endpoints.values():
            endpoint.meet_again()
        self.relimit()

    # ---- the group

    @property
    def group(self) -> Set[str]:
        """Who decides here: our followers and we."""
        return self.followers.keys() | {self._me.id}

    @property
    def part(self) -> float:
        """The part of each limit that we may use."""
        return self._census.part(self.group)

    def add(self, follower: Follower) -> None:
        """Take somebody in, who tells next what he holds."""
        self._census.met(follower.member)
        self.followers[follower.member.id] = follower
        self.look_at_names()

    def drop(self, follower: Follower, *, clean: bool) -> None:
        """Lose somebody: what waits is his again, what runs is left to the engines' figures."""
        if self.followers.get(follower.member.id) is not follower:
            return
        del self.followers[follower.member.id]
        if clean:
            self._census.left(follower.member.id)
        self.relimit()
        self._forget(follower)
        self.look_at_names()

    def _forget(self, follower: Follower) -> None:
        gate, controller = self._gate, self._gate.controller
        tickets, follower.tickets, follower.syncing = follower.tickets, {}, None
        for ticket in tickets.values():
            self.close_gathered(ticket)
            if ticket.state is State.WAITING:
                gate.do(partial(controller.withdraw, ticket))
        for ticket in tickets.values():
            if ticket.state is State.LEASED and ticket.endpoint is not None:
                name = ticket.endpoint.name
                self._refill[name] = max(self._refill.get(name, 0) - ticket.sequences, 0)
                gate.do(partial(controller.disown, ticket))

    def end(self, successor: Member | None) -> list[Ticket]:
        """Stop leading: tell followers, forget what is theirs, and return our own requests that wait."""
        gate, controller = self._gate, self._gate.controller
        gate.stop_gathering()
        for name in list(controller.endpoints):
            gate.do(partial(controller.set_quota, name, 0))
        for follower in list(self.followers.values()):
            follower.link.send(Leave(successor))
            follower.link.close()
            self._forget(follower)
        self.followers.clear()
        own = list(controller.waiting_tickets())
        for ticket in own:
            gate.do(partial(controller.withdraw, ticket))
        own += self.gathering or ()
        self.gathering = None
        return own

    # ---- limits

    def _quota(self, endpoint: Endpoint, part: float) -> int | None:
        """Return the most sequences that the group may hold at an endpoint; None: its limit alone decides."""
        name = endpoint.name
        if name in self._lacking and self._gate.now() < self._lacking[name] + UNKNOWN_S:
            return 0
        if name in self._unread:
            return self._refill.get(name, 0)
        if part >= 1.0:
            self._caps[name] = endpoint.limit.value
            return None
        # A limit may only fall while others share it: each group would let its own grow for what all send together.
        cap = self._caps[name] = min(self._caps.get(name, endpoint.limit.value), endpoint.limit.value)
        return max(1, math.floor(cap * part + 1e-9))

    def relimit(self) -> None:
        """Follow a change of the group, of the census, or of time."""
        part = self.part
        for endpoint in list(self._gate.controller.endpoints.values()):
            self._limit(endpoint, part)

    def _limit(self, endpoint: Endpoint, part: float) -> None:
        quota, name = self._quota(endpoint, part), endpoint.name
        if quota != endpoint.quota:
            self._gate.do(partial(self._gate.controller.set_quota, name, quota))

    def before_reading(self, name: str) -> None:
        """Have the next reading count others' requests, if there may be others."""
        endpoint = self._gate.controller.endpoints.get(name)
        if endpoint is not None and (name in self._unread or self.part < 1.0 or self._census.is_wary(self._gate.now())):
            endpoint.meet_again()

    def after_reading(self, name: str) -> None:
        """Follow what a reading changed."""
        if self._gate.now() >= self._fresh_from:
            self._unread.discard(name)
        endpoint = self._gate.controller.endpoints.get(name)
        if endpoint is not None:
            self._limit(endpoint, self.part)

    def came(self, name: str) -> None:
        """Follow an endpoint that is new or changed."""
        self.look_at_names()
        endpoint = self._gate.controller.endpoints.get(name)
        if endpoint is not None:
            self._limit(endpoint, self.part)

    def look_at_names(self) -> None:
        """Keep unused, for a while, what some follower's Envoy does not know."""
        now = self._gate.now()
        missing: set[str] = set()
        for follower in self.followers.values():
            missing.update(self.lacks(follower.names))
        self._lacking = {name: self._lacking.get(name, now) for name in missing}
        self.relimit()

    def lacks(self, names: frozenset[str]) -> list[str]:
        """Return which of our endpoints are not among `names`."""
        endpoints = self._gate.controller.endpoints.values()
        return sorted({endpoint.name for endpoint in endpoints if not endpoint.removed} - names)

    def differs(self, follower: Follower) -> list[str]:
        """Return the keys of its configuration that are not as ours, which count."""
        return differing(rules_of(self._gate.controller), follower.rules)

    def refuses(self, name: str, names: frozenset[str]) -> str | None:
        """Return why somebody called `name` whose Envoy knows `names` can't follow; None: he can."""
        missing = sorted(set(self._sent_away.get(name, ())).intersection(self.lacks(names)))
        if not missing:
            self._sent_away.pop(name, None)
            return None
        return f"we use endpoint(s) that it does not know: {', '.join(missing[:5])}"

    def send_away(self, follower: Follower) -> str:
        """Lose a follower whose endpoints differ, until they don't; return why."""
        self._sent_away[follower.member.id] = self.lacks(follower.names)
        why = self.refuses(follower.member.id, follower.names) or ""
        self.drop(follower, clean=False)
        return why

    def turn(self) -> list[Follower]:
        """Follow the passing of time; return the followers whose endpoints have differed from ours for too long."""
        now = self._gate.now()
        if self._unread and now >= self._fresh_from + UNREAD_S:
            self._unread.clear()
        self.relimit()
        late = {name for name, since in self._lacking.items() if now >= since + UNKNOWN_S}
        return [follower for follower in self.followers.values() if late - follower.names]

    # ---- requests

    def gather(self, ticket: Ticket) -> bool:
        """Keep a request back while followers still tell theirs; tell whether."""
        if self.gathering is None:
            return False
        self.gathering[ticket] = None
        return True

    def close_gathered(self, ticket: Ticket) -> bool:
        """Forget a request that was kept back; tell whether it was."""
        if self.gathering is None or ticket not in self.gathering:
            return False
        del self.gathering[ticket]
        return True

    def stop_gathering(self) -> None:
        """Offer what was kept back, the oldest first."""
        gathered, self.gathering = self.gathering or {}, None
        self._offer_all(list(gathered))

    def _offer_all(self, tickets: list[Ticket]) -> None:
        for ticket in sorted(tickets, key=_arrival):
            self._gate.offer_here(ticket)

    def receive(self, follower: Follower, message: Message) -> None:
        """Take a follower's word."""
        now = self._gate.now()
        follower.heard_at = now
        match message:
            case Beat(number):
                follower.heard = number
            case Offer(number, asked):
                ticket = self._ticket(follower, number, asked, now)
                if follower.syncing is not None:
                    follower.syncing.append(ticket)
                elif not self.gather(ticket):
                    self._gate.offer_here(ticket)
            case Held() | Remember() | Synced():
                self._take_over(follower, message, now)
            case Names(names, rules):
                follower.names, follower.rules = names, rules
                self.look_at_names()
            case Release() | Cancel() | FirstToken() | Answered() | Moved() | Report() | Return():
                ticket_of = follower.tickets.get(message.number)
                if ticket_of is not None:  # else it ended meanwhile
                    self._hear_of(ticket_of, message)
            case _:
                pass  # nothing that has a place here

    def _take_over(self, follower: Follower, message: Held | Remember | Synced, now: float) -> None:
        """Take what a new follower brings along."""
        match message:
            case Held(number, asked, endpoint, held_s, begun):
                self._adopt(self._ticket(follower, number, asked, now), endpoint, held_s, begun=begun)
            case Remember(home):
                self._gate.controller.believe_home(home, now)
            case Synced():
                brought, follower.syncing = follower.syncing or [], None
                self.relimit()
                here = [ticket for ticket in brought if follower.tickets.get(ticket.number) is ticket]
                self._offer_all([ticket for ticket in here if not self.gather(ticket)])

    def _hear_of(
        self, ticket: Forwarded, message: Release | Cancel | FirstToken | Answered | Moved | Report | Return
    ) -> None:
        tickets, gate = ticket.follower.tickets, self._gate
        match message:
            case Release(number, answer):
                del tickets[number]
                self._close(ticket, answer)
            case Cancel(number):
                del tickets[number]
                self._close(ticket, Answer.UNKNOWN)
            case Return(number):
                if ticket.state is State.LEASED:
                    gate.close_here(ticket, Answer.UNKNOWN)
                    tickets[number] = again = Forwarded(ticket.follower, number, ticket.request, self._deliver)
                    gate.offer_here(again)
            case FirstToken():
                gate.first_token(ticket)
            case Answered():
                gate.answered(ticket)
            case Moved(_, endpoint):
                gate.move(ticket, endpoint)
            case Report(_, load):
                gate.report(ticket, load)

    def _ticket(self, follower: Follower, number: int, asked: Asked, now: float) -> Forwarded:
        ticket = Forwarded(follower, number, request_of(asked, now), self._deliver)
        follower.tickets[number] = ticket
        return ticket

    def _adopt(self, ticket: Forwarded, name: str, held_s: float, *, begun: bool) -> None:
        controller = self._gate.controller
        self._gate.do(partial(controller.adopt, ticket, name, held_s=held_s, begun=begun))
        if ticket.state is State.LEASED:
            self._refill[name] = self._refill.get(name, 0) + ticket.sequences
        else:
            del ticket.follower.tickets[ticket.number]

    def _close(self, ticket: Forwarded, answer: Answer) -> None:
        if not self.close_gathered(ticket):
            self._gate.close_here(ticket, answer)

    def _deliver(self, decision: Decision) -> None:
        ticket = decision.ticket
        assert isinstance(ticket, Forwarded)  # noqa: S101 - it is theirs that we deliver
        follower, number = ticket.follower, ticket.number
        if follower.tickets.get(number) is not ticket:
            return  # he is gone, or his client is
        home = ticket.home.name if ticket.home is not None else None
        wait = Wait(ticket.waited_for, ticket.predicted_s)
        match decision:
            case Dispatch(_, outcome, endpoint, _):
                follower.link.send(Grant(number, outcome, endpoint, ticket.position, home, wait))
            case Reject(_, outcome, _, retry_after_s):
                del follower.tickets[number]
                follower.link.send(Turned(number, outcome, retry_after_s, ticket.position, wait))

    def teach(self) -> None:
        """Tell followers what we have learned of tokens: one of them leads next."""
        lessons = [Learned(learnt) for learnt in self._gate.controller.learnt()]
        for follower in self.followers.values():
            for lesson in lessons:
                follower.link.send(lesson)

    def status(self, follower: Follower) -> Status:
        """Return what a follower is to know."""
        endpoints = self._gate.controller.endpoints.values()
        return Status(
            follower.heard,
            self._census.count(self.group) or 0,
            len(self.group),
            tuple((endpoint.name, endpoint.limit.value) for endpoint in endpoints),
            frozenset(endpoint.name for endpoint in endpoints if endpoint.health.is_doubted),
        )


def request_of(asked: Asked, now: float) -> Request:
    """Return what was asked elsewhere as a request here."""
    return Request(
        id=asked.id,
        arrived=now - asked.age_s,
        model=asked.model,
        request_class=asked.request_class,
        tenant=asked.tenant,
        session=asked.session,
        home=asked.home,
        budget_s=asked.budget_s,
        prompt_tokens=asked.prompt_tokens,
        max_output_tokens=asked.max_output_tokens,
        sequences=asked.sequences,
        kind=asked.kind,
        allowed=asked.allowed,
    )


def asked_by(request: Request, now: float) -> Asked:
    """Return a request as it travels."""
    return Asked(
        request.id,
        now - request.arrived,
        request.model,
        request.request_class,
        request.tenant,
        request.session,
        request.home,
        request.budget_s,
        request.prompt_tokens,
        request.max_output_tokens,
        request.sequences,
        request.kind,
        request.allowed,
    )
