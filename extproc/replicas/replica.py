"""One sidecar among others, as a state machine: whom it follows, or whom it leads.

    seeking ──welcome──▶ following ──the leader is lost, or leaves──▶ seeking
       └──nobody older answers──▶ leading ──meets a bigger group──▶ seeking

There is no election and no lock. Everybody who follows nobody leads itself, and each group uses its part of the limits
(`leading`), so any number of leaders is safe; that there is one is only better. Whoever seeks asks the oldest first.
Leaders look for others once a second, and the smaller group joins the bigger one.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from extproc.admission.transitions import WAITING
from extproc.admission.values import TELLS_NOTHING, Answer
from extproc.replicas.census import Census
from extproc.replicas.door import Door
from extproc.replicas.following import Following
from extproc.replicas.forwarded import Forwarded
from extproc.replicas.leading import Leading
from extproc.replicas.log import SidecarLog
from extproc.replicas.meeting import Meeting, rank_of
from extproc.replicas.messages import (
    LAST,
    VERSION,
    Grant,
    Hello,
    Learned,
    Leave,
    Member,
    Names,
    Purpose,
    Refuse,
    Remember,
    Status,
    Told,
    Turned,
)
from extproc.replicas.picture import Picture, Role
from extproc.replicas.rules import rules_of
from extproc.replicas.seeking import Outcome, Seeking
from extproc.stream.by_age import ByAge
from extproc.words import some_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from extproc.admission.ticket import Ticket
    from extproc.replicas.forwarded import Follower
    from extproc.replicas.gate import SharedGate
    from extproc.replicas.messages import Ask, Message, Network
    from extproc.replicas.seeking import Call
    from extproc.stream.gate import Loop, Timer

BEAT_S = 0.25
TEACH_S = 5.0
"""How often a leader tells what it has learned of tokens: that much is lost when it dies."""
SILENCE_S = 2.0
"""Who was not heard of for so long is given up, on both sides."""
STOPPED_S = 1.2
"""Who finds that he himself did nothing for so long has been given up by others, or soon will be."""
GATHER_S = 1.0
"""The longest that a new leader waits for others to tell what they hold, so that age decides who goes first."""
REFUSED_S = 5.0
"""How long somebody who refused us is left alone."""
MOST_NAMED = 10
"""Sidecars that one line of the log names."""


class Replica:
    """This sidecar's place among others.

    Attributes:
        role: see `Role`.
        leading, following: the books of the role; None in another.
        door: who comes to us.
        tell: answers a follower who asks what we show, by a call of the second argument.
        turns: how often it began to lead, follow, seek.
        disruptions: how often it lost its leader without a goodbye, or did nothing for so long that others gave it up.
        log: what is written of it.
        bad_answers: how many requests of others each endpoint gave no good answer while we led, by kind.
    """

    def __init__(
        self, gate: SharedGate, me: Member, pool: str, network: Network, loop: Loop, *, store_beat_s: float = 1.0
    ) -> None:
        """Belong to the sidecars of `pool` as `me`; `begin` starts it. The store is asked every `store_beat_s`."""
        self.me = me
        self.log = SidecarLog(me)
        self.census = Census(store_beat_s)
        self.role = Role.SEEKING
        self.leading: Leading | None = None
        self.following: Following | None = None
        self.turns = dict.fromkeys(Role, 0)
        self.disruptions = 0
        self.bad_answers: dict[str, Counter[Answer]] = {}
        self.refused: str | None = None  # why the leader would not have us
        self._gate = gate
        self.pool = pool
        self._network = network
        self._loop = loop
        self._waiting = ByAge()  # ours, while nobody decides
        self.epoch = 0
        self._since = loop.time()
        self._hold_until = 0.0
        self._lost: str | None = None  # the leader that we lost last
        self._refusals: dict[str, float] = {}
        self._seeking: Seeking | None = None
        self._ending: Leading | None = None  # we lead no more, and some still wait in our core: nobody is asked yet
        self._meeting: Meeting | None = None
        self._taught_at = 0.0
        self.door = Door(self)
        self._alive_at = loop.time()
        self._ends_gathering: Timer | None = None
        self._leaving = False
        self._ended = False
        self._on_role: Callable[[Role], None] = lambda _role: None
        self._on_loss: Callable[[], None] = lambda: None
        self.tell: Callable[[Ask, Callable[[str], None]], None] = lambda _ask, _reply: None
        gate.replica = self

    # ---- life

    def begin(self, on_role: Callable[[Role], None], on_loss: Callable[[], None] = lambda: None) -> None:
        """Look for a leader now.

        `on_role` is told of each change of role. `on_loss` is called when another sidecar is gone: an Envoy that knows
        both may send what that one held to us, in any order, and it keeps its age.
        """
        self._on_role, self._on_loss = on_role, on_loss
        self._alive_at = self._loop.time()
        self._seek([], hold_until=self._loop.time() + SILENCE_S, everybody=True)
        self._loop.call_at(self._loop.time() + BEAT_S, self._beat)

    def resign(self) -> None:
        """Have somebody else lead, and follow him, as we are about to leave. Who waits loses nothing but a moment."""
        self._leaving = True
        self.me = self.me._replace(joined=LAST)
        if self.leading is not None and self.leading.followers:
            members = [follower.member for follower in self.leading.followers.values()]
            self._yield_to(min(members, key=lambda member: (member.joined, member.id)))

    def end(self) -> None:
        """Say goodbye and do nothing more. What runs goes on in Envoy; the engines' figures count it."""
        self._ended = True
        self.door.shut()
        if self.following is not None:
            self.following.link.send(Leave())
            self.following.link.close()
        if self.leading is not None:
            for follower in self.leading.followers.values():
                follower.link.send(Leave())
                follower.link.close()
        self._stop_looking()

    def store_says(self, members: Iterable[Member], asked_at: float | None = None) -> None:
        """Take over who is alive, as the store says, which was asked at `asked_at`, or now."""
        found = list(members)
        self.census.heard(found, self._loop.time(), asked_at)
        for member in found:
            if member.id == self.me.id and not self._leaving:
                self.me = member
        if self.leading is not None:
            self.leading.quotas.follow()

    @property
    def decides(self) -> bool:
        """Whether our own core decides, for whoever is in our group."""
        return self.leading is not None

    @property
    def waiting(self) -> int:
        """How many requests wait here that our own core does not know of."""
        held = len(self._waiting)
        if self.following is not None:
            held += self.following.waiting
        if self.leading is not None:
            held += len(self.leading.gathering or ())
        return held

    @property
    def others_waiting(self) -> int:
        """How many requests of others wait in our books."""
        if self.leading is None:
            return 0
        waiting = sum(
            ticket.state is WAITING
            for follower in self.leading.followers.values()
            for ticket in follower.tickets.values()
        )
        return waiting + sum(isinstance(ticket, Forwarded) for ticket in self.leading.gathering or ())

    @property
    def forwarded(self) -> int:
        """How many requests of others are in our books."""
        followers = self.leading.followers.values() if self.leading is not None else ()
        return sum(len(follower.tickets) for follower in followers)

    @property
    def missing(self) -> dict[str, str]:
        """Who is not in our group, with his address; a leader tells its followers."""
        if self.following is not None:
            return {}
        group = self.leading.group if self.leading is not None else {self.me.id}
        return self.census.missing(self._loop.time(), group)

    @property
    def differing(self) -> int:
        """How many of our followers have another configuration than we."""
        leading = self.leading
        return 0 if leading is None else sum(bool(leading.differs(one)) for one in leading.followers.values())

    def now(self) -> float:
        """Return the clock's time, in seconds."""
        return self._loop.time()

    def picture(self) -> Picture:
        """Return what people want to see."""
        now, leading, following = self._loop.time(), self.leading, self.following
        answered_at = self.census.answered_at
        leader = self.me.id if leading is not None else following.leader.id if following is not None else None
        members = group = 0
        if leading is not None:
            members, group = self.census.count(leading.group) or 0, len(leading.group)
        elif following is not None and following.status is not None:
            members, group = following.status.members, following.status.group
        return Picture(
            self.role,
            now - self._since,
            leader,
            self.epoch,
            members,
            group,
            None if answered_at is None else now - answered_at,
            None if following is None else now - following.heard_at,
        )

    def count_bad(self, ticket: Forwarded, answer: Answer) -> None:
        """Count how a request of another sidecar ended, unless well or nobody knows; each counts its own besides."""
        endpoint = ticket.endpoint
        if endpoint is not None and not endpoint.removed and answer not in (Answer.OK, *TELLS_NOTHING):
            self.bad_answers.setdefault(endpoint.name, Counter())[answer] += 1

    # ---- our own requests

    def offer(self, ticket: Ticket) -> bool:
        """Take a new request, unless our own core is to decide it now; tell whether."""
        if self.following is not None:
            self.following.offer(ticket)
            return True
        if self.leading is not None:
            return self.leading.gather(ticket)
        self._waiting.add(ticket, ticket.request.arrived)
        return True

    def close(self, ticket: Ticket, answer: Answer) -> bool:
        """Note the end of one of our requests; tell whether it waited where our own core does not know of it."""
        if self.following is not None:
            return self.following.close(ticket, answer)
        if self.leading is not None:
            return self.leading.close_gathered(ticket)
        return self._waiting.discard(ticket)

    def give_up(self, most: int) -> list[Ticket]:
        """Give up so many of those who wait and are not in our own core; return them."""
        tickets = list(islice(self._waiting, most))
        for ticket in tickets:
            self._waiting.discard(ticket)
        if self.following is not None:
            tickets += self.following.give_up(most)
        return tickets

    def names_changed(self) -> None:
        """Follow a change of our endpoints or rules."""
        if self.following is not None:
            self.following.link.send(Names(self._names(), rules_of(self._gate.controller)))

    def _names(self) -> frozenset[str]:
        endpoints = self._gate.controller.endpoints.values()
        return frozenset(endpoint.name for endpoint in endpoints if not endpoint.removed)

    # ---- roles

    def _become(self, role: Role) -> None:
        if role is not self.role:
            self._since = self._loop.time()
        self.role = role
        self.turns[role] += 1
        self._on_role(role)

    def _seek(
        self,
        first: list[Member],
        *,
        hold_until: float,
        avoid: str | None = None,
        everybody: bool = False,
    ) -> None:
        """Look for a leader: ask `first`, then who is older than we, or everybody."""
        self._hold_until = max(self._hold_until, hold_until)
        self._lost = avoid
        mine = (self.me.joined, self.me.id)
        others = [
            member
            for member in self.census.others(self.me.id)
            if member.id != avoid and (everybody or (member.joined, member.id) < mine)
        ]
        asked = first + [member for member in others if member not in first]
        self._stop_looking()
        self._become(Role.SEEKING)
        self._seeking = Seeking(
            self._network,
            self._loop,
            self._hello(Purpose.FOLLOW),
            [member for member in asked if member.id != self.me.id and not self.is_refused_by(member)],
            avoid,
            Outcome(self._follow, self.was_refused, self._lead),
        )
        if self._ending is None:
            self._seeking.begin()

    def _stop_looking(self) -> None:
        if self._seeking is not None:
            self._seeking.give_up()
        if self._meeting is not None:
            self._meeting.end()
        self._seeking = self._meeting = None

    def is_refused_by(self, member: Member) -> bool:
        """Tell whether somebody is left alone, as he would not have us."""
        return self._refusals.get(member.id, 0.0) > self._loop.time()

    def was_refused(self, member: Member, why: str) -> None:
        """Note that somebody would not have us, and leave him alone for a while; what is told again is no news."""
        is_news, self.refused = why != self.refused, why
        self._refusals[member.id] = self._loop.time() + REFUSED_S
        if is_news:
            self.log.warning("%s does not have us: %s", member, why)

    def _hello(self, purpose: Purpose) -> Hello:
        followers = len(self.leading.followers) if self.leading is not None else 0
        rules = rules_of(self._gate.controller)
        return Hello(VERSION, self.pool, self.me, purpose, followers, self.epoch, self._names(), rules)

    def _looks_anew(self) -> bool:
        """Notice now, and not amid taking on a role, that this process was stopped; tell whether we look anew."""
        seeking = self._seeking
        self.look()
        return self._seeking is not seeking

    def _follow(self, leader: Member, epoch: int, call: Call) -> None:
        if self._looks_anew():
            call.close()
            return
        self._seeking = None
        self.epoch = max(self.epoch, epoch)
        self.refused = None
        self._hold_until = 0.0
        waiting, self._waiting = self._waiting, ByAge()
        self.census.met(leader, self._loop.time())
        self.following = Following(self._gate, leader, epoch, call, waiting)
        call.heard = partial(self._hear_leader, self.following)
        call.ended = partial(self._lose_leader, silent=False)
        self.names_changed()  # they may have, since we said hello
        self._become(Role.FOLLOWING)
        self.log.info("following %s, epoch %d", leader, epoch)
        self.door.answer_parked()

    def _lead(self) -> None:
        if self._looks_anew():
            return
        now = self._loop.time()
        self._seeking = None
        self.epoch += 1
        waiting, self._waiting = self._waiting, ByAge()
        self.leading = Leading(self._gate, self.me, self.census, waiting, hold_until=self._hold_until)
        self._hold_until = 0.0
        self._meeting = Meeting(self, self._network)
        self._become(Role.LEADING)
        others = [str(member) for member in self.census.others(self.me.id)]
        known = some_of(others, MOST_NAMED) or "none"
        self.log.info("leading, epoch %d; other sidecars that are known: %s", self.epoch, known)
        self._ends_gathering = self._loop.call_at(now + GATHER_S, partial(self._stop_gathering, self.leading))
        self.door.answer_parked()
        self.look_whether_all_came()

    def _stop_gathering(self, leading: Leading) -> None:
        if self._ends_gathering is not None:
            self._ends_gathering.cancel()
        if leading is self.leading and leading.gathering is not None:
            leading.stop_gathering()

    def look_whether_all_came(self) -> None:
        """End the gathering once everybody who is expected has told what he holds."""
        leading = self.leading
        if leading is not None and leading.gathering is not None:
            expected = {member.id for member in self.census.others(self.me.id)} - {self._lost}
            told = {name for name, follower in leading.followers.items() if follower.syncing is None}
            if expected <= told and self.census.answered_at is not None:
                self._stop_gathering(leading)

    def _lose_leader(self, *, silent: bool, successor: Member | None = None, clean: bool = False) -> None:
        following = self.following
        if following is None:
            return
        self.following = None
        self._waiting = following.end()
        leader = following.leader
        level = logging.INFO if clean else logging.WARNING
        what = "hands over" if clean else "is silent" if silent else "is gone"
        self.disruptions += not clean
        self.log.log(level, "the leader %s %s", leader, what)
        self._on_loss()
        hold_until = 0.0 if clean else following.heard_at + SILENCE_S
        first = [successor] if successor is not None else [] if silent or clean else [leader]
        if successor is not None and successor.id == self.me.id:
            self._lost = None
            self._hold_until = 0.0
            self._become(Role.SEEKING)
            self._lead()
        else:
            self._seek(first, hold_until=hold_until, avoid=leader.id)

    def _yield_to(self, successor: Member) -> None:
        """Lead no more, and follow `successor`."""
        leading = self.leading
        if leading is None:
            return
        self.log.info("leading no more: following %s", successor)
        leading.teach()
        self._end_leading(leading, successor)
        self._seek([successor], hold_until=0.0)

    def _end_leading(self, leading: Leading, successor: Member | None) -> None:
        self.leading, self._ending = None, leading
        leading.end(successor, self._waiting, self._has_ended)

    def _has_ended(self) -> None:
        """Look for a leader, now that nobody waits in our core: who waits in two may be sent twice."""
        self._ending = None
        if self._seeking is not None:
            self._seeking.begin()

    def lose_follower(self, follower: Follower, *, clean: bool) -> None:
        """Lead without somebody who is gone, and tell the others at once; `clean`: he said goodbye."""
        leading = self.leading
        if leading is None or leading.followers.get(follower.member.id) is not follower:
            return
        leading.drop(follower, clean=clean)
        self._on_loss()
        leading.tell_all()

    # ---- whom we follow

    def _hear_leader(self, following: Following, message: Message) -> None:
        self.look()
        if following is not self.following:
            return  # we have just given it up
        following.heard_at = self._loop.time()
        match message:
            case Grant():
                following.take_grant(message)
            case Turned():
                following.take_refusal(message)
            case Status():
                if following.status is not None and message.group < following.status.group:
                    self._on_loss()
                following.take_status(message)
            case Told():
                following.take_answer(message)
            case Learned() | Remember():
                following.take_knowledge(message)
            case Leave(successor):
                self._lose_leader(silent=False, successor=successor, clean=True)
            case Refuse(why):
                self.was_refused(following.leader, why)
                self._lose_leader(silent=True)
            case _:
                pass  # nothing that has a place here

    # ---- other leaders

    def met(self, followers: int, other: Member) -> None:
        """Follow another leader, who has so many followers, if he should rather lead than we."""
        if self.leading is not None and not self.is_refused_by(other) and not self.outranks(followers, other):
            self._yield_to(other)

    def outranks(self, followers: int, other: Member) -> bool:
        """Tell whether we, who lead, should rather lead than somebody who has so many followers."""
        own = 0 if self.leading is None else len(self.leading.followers)
        return rank_of(own, self.me) >= rank_of(followers, other)

    def _strangers(self, leading: Leading) -> list[Member]:
        """Return who does not follow us, and might lead."""
        return [
            member
            for member in self.census.others(self.me.id)
            if member.id not in leading.followers.keys() | leading.sent_away.keys() and not self.is_refused_by(member)
        ]

    # ---- time

    def look(self) -> None:
        """Notice that this process was stopped for a while: others have gone on without us."""
        now = self._loop.time()
        stopped_s, self._alive_at = now - self._alive_at, now
        if stopped_s > STOPPED_S and not self._ended and self.turns[Role.SEEKING]:
            self._was_stopped(now, stopped_s)

    def _was_stopped(self, now: float, stopped_s: float) -> None:
        self.disruptions += 1
        self.log.warning("this process did nothing for %.1f s; others may have gone on without it", stopped_s)
        if self.following is not None:
            following, self.following = self.following, None
            self._waiting = following.end()
        elif self.leading is not None:
            self._end_leading(self.leading, None)
        self._seek([], hold_until=now + SILENCE_S, everybody=True)

    def _beat(self) -> None:
        if self._ended:
            return
        self.look()
        now = self._loop.time()
        self._loop.call_at(now + BEAT_S, self._beat)
        if self.following is not None:
            if now - self.following.heard_at > SILENCE_S:
                self._lose_leader(silent=True)
        elif self.leading is not None:
            self._beat_as_leader(self.leading, now)

    def _beat_as_leader(self, leading: Leading, now: float) -> None:
        for follower in list(leading.followers.values()):
            if now - follower.heard_at > SILENCE_S:
                self.log.warning("%s is silent: leading without it", follower.member)
                follower.link.close()
                self.lose_follower(follower, clean=False)
            else:
                leading.tell_status(follower, now)
        if now - self._taught_at >= TEACH_S:
            self._taught_at = now
            leading.teach()
        for follower in leading.turn():
            why = leading.send_away(follower)
            self.log.warning("%s is sent away, and decides alone: %s", follower.member, why)
            follower.link.send(Refuse(why))
            follower.link.close()
        if self._meeting is not None and not self._leaving:
            self._meeting.turn(self._strangers(leading), partial(self._hello, Purpose.MEET))
