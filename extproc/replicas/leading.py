"""What a leader keeps: its followers, what they forward, and who of them would lead next.

However many wait, no turn of the loop is long: whoever goes, or we ourselves when we lead no more, who waits is taken
out of our core some in each turn, and what runs elsewhere is left to the engines' figures after that.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from extproc.admission.sessions import Home
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, Dispatch
from extproc.replicas.forwarded import BROUGHT, Forwarded, request_of
from extproc.replicas.homes import tell_homes
from extproc.replicas.looks import SharedLooks
from extproc.replicas.messages import (
    Answered,
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
from extproc.replicas.quotas import Quotas
from extproc.replicas.rules import differing, rules_of
from extproc.stream.by_age import LET_GO_IN_A_TURN, ByAge
from extproc.words import some_of

if TYPE_CHECKING:
    from collections.abc import Callable, Set

    from extproc.admission.values import Decision
    from extproc.replicas.census import Census
    from extproc.replicas.forwarded import Follower
    from extproc.replicas.gate import SharedGate
    from extproc.replicas.messages import Asked, Member, Message


def _seniority(follower: Follower) -> tuple[int, str]:
    """Sort followers as those who seek a leader ask them."""
    return follower.member.joined, follower.member.id


class Leading:
    """The books of one leadership, from when it forms until it ends.

    Attributes:
        followers: by id.
        quotas: how much of each limit the group may use.
        sent_away: followers, and what they lacked for too long.
        heir: who would lead next, the oldest of them: it knows where our own clients' sessions are at home.
        gathering: requests that wait until all followers have told theirs, so that age decides; None: all are offered.
    """

    def __init__(self, gate: SharedGate, me: Member, census: Census, waiting: ByAge, *, hold_until: float) -> None:
        """Lead; `waiting` are our own requests, and nobody is offered yet.

        Until `hold_until` those whom we lost may not have noticed: the group only refills what it holds.
        """
        self._gate = gate
        self._me = me
        self._census = census
        self.followers: dict[str, Follower] = {}
        self.heir: Follower | None = None
        self.gathering: ByAge | None = waiting
        self._lets_go = False  # they are offered, some in each turn of the loop
        self.looks = SharedLooks(gate, self.followers, partial(self.tell_all, limits=False))
        self._going: deque[Ticket] = deque()  # who is to be taken out of our core
        self._running: deque[Forwarded] = deque()  # those of them that run
        self._takes_out = False  # some in each turn of the loop
        self._given_back = ByAge()  # our own requests that are taken out: we lead no more
        self._is_empty: Callable[[], None] = lambda: None  # all of them are out
        self.sent_away: dict[str, list[str]] = {}
        gate.controller.is_shared = True
        self.quotas = Quotas(gate, census, self._told, hold_until=hold_until)

    # ---- the group

    @property
    def group(self) -> Set[str]:
        """Who decides here: our followers and we."""
        return self.followers.keys() | {self._me.id}

    def _told(self) -> Set[str]:
        """Return of whom we know all that they hold: the part of who still tells is his own."""
        return {name for name, follower in self.followers.items() if follower.syncing is None} | {self._me.id}

    def add(self, follower: Follower) -> None:
        """Take somebody in, who tells next what he holds."""
        self._census.met(follower.member, self._gate.now())
        self.followers[follower.member.id] = follower
        self._look_at_heir()
        self.look_at_names()

    def drop(self, follower: Follower, *, clean: bool) -> None:
        """Lose somebody: what waits is his again, what runs is left to the engines' figures."""
        if self.followers.get(follower.member.id) is not follower:
            return
        del self.followers[follower.member.id]
        self._look_at_heir()
        if clean:
            self._census.left(follower.member.id)
        for ticket in follower.tickets.values():
            if ticket.state is State.LEASED and ticket.endpoint is not None:
                self.quotas.hold_less(ticket.endpoint.name, ticket.sequences)
        self.quotas.follow()
        self._forget(follower)
        self._take_out()
        self.look_at_names()

    def _look_at_heir(self) -> None:
        """Tell whoever is the heir now all homes; from then on each as it comes."""
        heir, self.heir = self.heir, min(self.followers.values(), key=_seniority, default=None)
        if self.heir is not None and self.heir is not heir:
            tell_homes(self._gate, self.heir.link, partial(self._is_heir, self.heir))

    def _is_heir(self, follower: Follower) -> bool:
        return self.heir is follower

    def tell_home(self, ticket: Ticket) -> None:
        """Tell the heir where a session of our own clients is served; of the others' each sidecar knows itself."""
        session, endpoint = ticket.request.session, ticket.endpoint
        if session is not None and endpoint is not None and self.heir is not None:
            self.heir.link.send(Remember(Home(session, endpoint.name, ticket.kv_tokens, 0.0)))

    def _forget(self, follower: Follower) -> None:
        """Have nothing of a follower's in our books, and wait for nothing; `_take_out` is yet to begin."""
        self._going.extend(follower.tickets.values())
        follower.tickets, follower.syncing = {}, None

    def end(self, successor: Member | None, given_back: ByAge, is_over: Callable[[], None]) -> None:
        """Stop leading: tell followers, and have our core decide nothing more.

        Our own requests that wait are `given_back`; `is_over` is called when nobody waits in our core.
        """
        self._given_back = given_back
        self._is_empty = partial(self._take_ours_out, is_over)
        self._gate.stop_gathering()
        self.quotas.close()
        gathered, self.gathering = self.gathering or (), None
        given_back.add_all({ticket: None for ticket in gathered if not isinstance(ticket, Forwarded)})
        for follower in list(self.followers.values()):
            follower.link.send(Leave(successor))
            follower.link.close()
            self._forget(follower)
        self.followers.clear()
        self.heir = None
        self._take_out()

    def _take_ours_out(self, is_over: Callable[[], None]) -> None:
        """Take our own requests out, now that nobody else's wait."""
        self._is_empty = is_over
        for pool in self._gate.controller.pools():
            for queue in pool.queues():
                self._going.extend(queue)
        self._take_out()

    def _take_out(self) -> None:
        """Begin to take out who is to go, or go on."""
        if not self._takes_out:
            self._takes_out = True
            self._take_some_out()

    def _take_some_out(self) -> None:
        """Take out as many as are let go in one turn, and the others in the next ones."""
        try:
            for _ in range(LET_GO_IN_A_TURN):
                if self._going:
                    self._take_one_out(self._going.popleft())
                elif self._running:  # now nobody is left who would take the room
                    self._disown(self._running.popleft())
                else:
                    break
        finally:
            if self._going or self._running:
                self._gate.call_later(0.0, self._take_some_out)
            else:
                self._takes_out = False
                self._is_empty()

    def _disown(self, ticket: Forwarded) -> None:
        gate, endpoint = self._gate, ticket.endpoint
        if ticket.state is State.LEASED and endpoint is not None:
            self.looks.disowned(ticket, endpoint)
            gate.do(partial(gate.controller.disown, ticket))
            self.quotas.released(endpoint.name)

    def _take_one_out(self, ticket: Ticket) -> None:
        if ticket.state is State.WAITING:
            self._gate.do(partial(self._gate.controller.withdraw, ticket))
            if not isinstance(ticket, Forwarded):
                self._given_back.add(ticket, ticket.request.arrived)
        elif isinstance(ticket, Forwarded):
            if ticket.state is State.LEASED:
                self._running.append(ticket)
            else:
                self.close_gathered(ticket)

    # ---- endpoints and rules

    def look_at_names(self) -> None:
        """Keep unused, for a while, what some follower's Envoy does not know."""
        missing: set[str] = set()
        for follower in self.followers.values():
            missing.update(self.lacks(follower.names))
        self.quotas.leave_out(missing)

    def lacks(self, names: frozenset[str]) -> list[str]:
        """Return which of our endpoints are not among `names`."""
        endpoints = self._gate.controller.endpoints.values()
        return sorted({endpoint.name for endpoint in endpoints if not endpoint.removed} - names)

    def differs(self, follower: Follower) -> list[str]:
        """Return the keys of its configuration that are not as ours, which count."""
        return differing(rules_of(self._gate.controller), follower.rules)

    def refuses(self, name: str, names: frozenset[str]) -> str | None:
        """Return why somebody called `name` whose Envoy knows `names` can't follow; None: he can."""
        missing = sorted(set(self.sent_away.get(name, ())).intersection(self.lacks(names)))
        if not missing:
            self.sent_away.pop(name, None)
            return None
        return f"we use endpoint(s) that it does not know: {some_of(missing, 5)}"

    def send_away(self, follower: Follower) -> str:
        """Lose a follower whose endpoints differ, until they don't; return why."""
        self.sent_away[follower.member.id] = self.lacks(follower.names)
        why = self.refuses(follower.member.id, follower.names) or ""
        self.drop(follower, clean=False)
        return why

    def turn(self) -> list[Follower]:
        """Follow the passing of time; return the followers whose endpoints have differed from ours for too long."""
        self.quotas.turn()
        late = self.quotas.left_out_too_long()
        return [follower for follower in self.followers.values() if late - follower.names]

    # ---- requests

    def gather(self, ticket: Ticket) -> bool:
        """Keep a request back while followers still tell theirs, or older ones are not offered yet; tell whether."""
        if self.gathering is None:
            return False
        self.gathering.add(ticket, ticket.request.arrived)
        return True

    def close_gathered(self, ticket: Ticket) -> bool:
        """Forget a request that was kept back; tell whether it was."""
        return self.gathering is not None and self.gathering.discard(ticket)

    def stop_gathering(self) -> None:
        """Offer what was kept back, the oldest first."""
        if not self._lets_go:
            self._lets_go = True
            self._let_go()

    def _let_go(self) -> None:
        """Offer the next of them. If this process was stopped, a look at the clock ends our leadership first."""
        try:
            for _ in range(LET_GO_IN_A_TURN):
                self._gate.now()
                ticket = self.gathering.pop() if self.gathering else None
                if ticket is None:
                    break
                self._gate.offer_here(ticket)
        finally:
            if self.gathering:
                self._gate.call_later(0.0, self._let_go)
            else:
                self.gathering, self._lets_go = None, False

    def receive(self, follower: Follower, message: Message) -> None:
        """Take a follower's word."""
        now = self._gate.now()
        match message:
            case Beat(number, seen):
                follower.heard = number
                follower.shows(seen, now)
            case Offer(number, asked) if number not in follower.tickets:  # of two nobody would end the first
                ticket = self._ticket(follower, number, asked, now)
                if follower.syncing is not None:
                    follower.syncing[ticket] = None
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
            case Held(number, asked, endpoint, held_s, begun) if number not in follower.tickets:
                self._adopt(self._ticket(follower, number, asked, now), endpoint, held_s, begun=begun)
            case Remember(home):
                self._gate.controller.believe_home(home, now)
            case Synced():
                brought, follower.syncing = follower.syncing or {}, None
                self.quotas.follow()
                is_over = self.gathering is None
                if self.gathering is None:
                    self.gathering = ByAge()
                self.gathering.add_all(brought)
                if is_over:
                    self.stop_gathering()

    def _hear_of(
        self, ticket: Forwarded, message: Release | Cancel | FirstToken | Answered | Moved | Report | Return
    ) -> None:
        tickets, gate = ticket.follower.tickets, self._gate
        match message:
            case Release(number, answer):
                del tickets[number]
                gate.replica.count_bad(ticket, answer)
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
            ticket.told, ticket.deliver = BROUGHT, None  # its follower knows
            self.quotas.hold_more(name, ticket.sequences)
        else:
            del ticket.follower.tickets[ticket.number]

    def _close(self, ticket: Forwarded, answer: Answer) -> None:
        if ticket.follower.syncing is not None:
            ticket.follower.syncing.pop(ticket, None)
        if not self.close_gathered(ticket):
            self._gate.close_here(ticket, answer)

    def _deliver(self, decision: Decision) -> None:
        ticket = decision.ticket
        assert isinstance(ticket, Forwarded)  # noqa: S101 - it is theirs that we deliver
        follower, number = ticket.follower, ticket.number
        if follower.tickets.get(number) is not ticket:  # he is gone, or his client is
            if ticket.state is State.LEASED:
                self._gate.call_later(0.0, partial(self._end_untold, ticket))
            return
        home = ticket.home.name if ticket.home is not None else None
        wait = Wait(ticket.waited_for, ticket.predicted_s)
        outcome, position = decision.outcome, ticket.position
        if isinstance(decision, Dispatch):
            ticket.told = float(follower.told)
            follower.link.send(Grant(number, outcome, decision.endpoint, position, home, wait))
        else:
            del follower.tickets[number]
            follower.link.send(Turned(number, outcome, decision.retry_after_s, position, wait, decision.crowd))

    def _end_untold(self, ticket: Forwarded) -> None:
        """End a lease that nobody was told of, as its follower is gone: nothing was sent to the engine."""
        if ticket.state is State.LEASED:
            self._gate.close_here(ticket, Answer.UNKNOWN)

    def teach(self) -> None:
        """Tell followers what we have learned of tokens: one of them leads next."""
        lessons = [Learned(learnt) for learnt in self._gate.controller.learnt()]
        for follower in self.followers.values():
            for lesson in lessons:
                follower.link.send(lesson)

    def tell_all(self, *, limits: bool = True) -> None:
        """Tell all followers. If this process was stopped, a look at the clock ends our leadership first."""
        now = self._gate.now()
        for follower in self.followers.values():
            self.tell_status(follower, now, limits=limits)

    def tell_status(self, follower: Follower, now: float, *, limits: bool = True) -> None:
        """Tell a follower that we hear it, and what it is to know; it answers at once."""
        endpoints = self._gate.controller.endpoints.values()
        number = follower.tell(now)
        status = Status(
            follower.heard,
            self._census.count(self.group) or 0,
            len(self.group),
            tuple((endpoint.name, endpoint.limit.value) for endpoint in endpoints) if limits else (),
            frozenset(endpoint.name for endpoint in endpoints if endpoint.health.is_doubted),
            number,
        )
        follower.link.send(status)
