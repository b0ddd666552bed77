"""What a sidecar keeps of its own requests while another one decides: their numbers, and whether a grant still counts.

A grant counts if the leader has shown that it heard us lately: as long as it has, it has not given us up, and counts
what we hold. A grant that comes when that is in doubt waits for the next word of the leader.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING

from extproc.admission.outcome import Outcome
from extproc.admission.ticket import State
from extproc.admission.values import Answer, Dispatch, Reject
from extproc.replicas.forwarded import asked_by
from extproc.replicas.homes import tell_homes
from extproc.replicas.messages import (
    Answered,
    Ask,
    Asked,
    Beat,
    Cancel,
    FirstToken,
    Grant,
    Held,
    Learned,
    Moved,
    Offer,
    Release,
    Remember,
    Report,
    Return,
    Status,
    Synced,
    Turned,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from extproc.admission.load import Load
    from extproc.admission.ticket import Ticket
    from extproc.replicas.gate import SharedGate
    from extproc.replicas.messages import Member, Message, Told
    from extproc.replicas.seeking import Call
    from extproc.stream.by_age import ByAge

FRESH_S = 1.2
"""How old the last beat may be that the leader has surely heard. It gives us up after SILENCE_S without one."""
MOST_ASKED = 32
"""Questions that wait for an answer; an older one is forgotten."""
TOLD_IN_A_TURN = 200
"""Waiting requests that a new leader is told of in one turn of the loop: 2 ms, with their way onto the wire."""
PROMPT_S = 1.0
"""A prompt sent longer ago is taken as computed: nobody tells a sidecar that does not lead."""


class Following:
    """Our requests under one leader, from its welcome until we leave or lose it.

    Attributes:
        leader: whom we follow; `epoch`: of its leadership.
        status: its last word about the whole; None: not yet.
    """

    def __init__(self, gate: SharedGate, leader: Member, epoch: int, call: Call, waiting: ByAge) -> None:
        """Tell `leader`, who welcomed us on `call`, what we hold and what of ours waits."""
        link = call.link
        self._gate = gate
        self.leader = leader
        self.epoch = epoch
        self.link = link
        link.bounced = self._take_back
        self.heard_at = gate.now()
        self.status: Status | None = None
        self._numbers: dict[Ticket, int] = {}
        self._untold = waiting  # the leader is yet to be told of them
        self._waiting: dict[int, Ticket] = {}
        self._last = 0
        self._beat = 0
        self._seen = 0  # the last status that came when no grant was in doubt
        self._beats: deque[tuple[int, float]] = deque()
        self._confirmed_at = call.asked_at  # its welcome may be old: it came when this process was stopped
        self._doubtful: list[Grant] = []
        self._asked: dict[int, Callable[[str], None]] = {}
        self._asked_last = 0
        now = gate.now()
        for endpoint in list(gate.controller.endpoints.values()):
            gate.do(partial(gate.controller.set_quota, endpoint.name, None))  # nobody waits for it in our own core
            for ticket in endpoint.leases:
                number = self._number(ticket)
                asked, held_s = asked_by(ticket.request, now), now - ticket.leased_at
                begun = not ticket.prompt_pending or held_s > PROMPT_S
                link.send(Held(number, asked, endpoint.name, held_s, begun=begun))
        self._is_over = False
        self._tell_waiting()

    def _tell_waiting(self) -> None:
        """Tell the leader who of ours waits, some in each turn of the loop; then of homes, and that this is all.

        Until it has heard that, it decides none of ours.
        """
        now = self._gate.now()
        if self._is_over:
            return
        for _ in range(TOLD_IN_A_TURN):
            ticket = self._untold.pop()
            if ticket is None:
                break
            self._tell_of(ticket, now)
        if self._untold:
            self._gate.call_later(0.0, self._tell_waiting)
        else:
            link = self.link
            tell_homes(self._gate, link, lambda: not self._is_over, lambda: link.send(Synced()))

    def _tell_of(self, ticket: Ticket, now: float) -> None:
        number = self._number(ticket)
        self._waiting[number] = ticket
        self.link.send(Offer(number, asked_by(ticket.request, now)))

    def _number(self, ticket: Ticket) -> int:
        self._last += 1
        self._numbers[ticket] = self._last
        return self._last

    @property
    def waiting(self) -> int:
        """How many of our requests wait."""
        return len(self._waiting) + len(self._untold)

    def end(self) -> ByAge:
        """Leave; return our requests that wait."""
        self._is_over = True
        self.link.close()
        self._doubtful.clear()
        self._untold.add_all(dict.fromkeys(self._waiting.values()))
        return self._untold

    # ---- our sessions' words

    def offer(self, ticket: Ticket) -> None:
        """Have the leader decide."""
        self._tell_of(ticket, self._gate.now())

    def close(self, ticket: Ticket, answer: Answer) -> bool:
        """Note that one of our requests is over; tell whether it waited."""
        if self._untold.discard(ticket):
            return True
        number = self._numbers.pop(ticket, None)
        if number is None:
            return False
        if self._waiting.pop(number, None) is None:
            self.link.send(Release(number, answer))
            return False
        self.link.send(Cancel(number))
        return True

    def first_token(self, ticket: Ticket) -> None:
        """Pass on that the answer began."""
        if ticket in self._numbers:
            self.link.send(FirstToken(self._numbers[ticket]))

    def answered(self, ticket: Ticket) -> None:
        """Pass on that an answer began well, where that is news."""
        status, endpoint = self.status, ticket.endpoint
        if status is not None and endpoint is not None and endpoint.name in status.doubted and ticket in self._numbers:
            self.link.send(Answered(self._numbers[ticket]))

    def move(self, ticket: Ticket, endpoint: str) -> None:
        """Pass on that another endpoint answers than the one granted."""
        if ticket in self._numbers:
            self.link.send(Moved(self._numbers[ticket], endpoint))

    def report(self, ticket: Ticket, load: Load) -> None:
        """Pass on what an answer said of its endpoint."""
        if ticket in self._numbers:
            self.link.send(Report(self._numbers[ticket], load))

    def ask(self, what: str, limit: int, heard: Callable[[str], None]) -> None:
        """Have the leader tell what it shows; `heard` is called if it does."""
        self._asked_last += 1
        self._asked[self._asked_last] = heard
        if len(self._asked) > MOST_ASKED:
            self._asked.pop(next(iter(self._asked)))
        self.link.send(Ask(self._asked_last, what, limit))

    def take_answer(self, told: Told) -> None:
        """Pass on what the leader shows."""
        heard = self._asked.pop(told.number, None)
        if heard is not None:
            heard(told.text)

    def give_up(self, most: int) -> list[Ticket]:
        """Give up so many of those who wait; return them."""
        tickets = list(islice(chain(self._waiting.values(), self._untold), most))
        for ticket in tickets:
            self.close(ticket, Answer.UNKNOWN)
        return tickets

    def _take_back(self, message: Message) -> None:
        """Refuse a request that the leader can't be told of; of one that runs say no more than that it does."""
        match message:
            case Offer(number):
                self.take_refusal(Turned(number, Outcome.NO_ENDPOINT, None, 0))
            case Held(_, asked) if asked != (bare := Asked("", asked.age_s, sequences=asked.sequences)):
                self.link.send(message._replace(asked=bare))
            case _:
                pass  # nobody waits for it

    # ---- the leader's words

    def _answer(self) -> None:
        """Tell the leader that we live, and what we have acted upon: at once, so that both know how old that is."""
        self._beat += 1
        self._beats.append((self._beat, self._gate.now()))
        self.link.send(Beat(self._beat, self._seen))

    def take_status(self, status: Status) -> None:
        """Follow the leader's word, and look again at grants that were in doubt."""
        self.status = status
        while self._beats and self._beats[0][0] <= status.heard:
            self._confirmed_at = max(self._confirmed_at, self._beats.popleft()[1])
        doubtful, self._doubtful = self._doubtful, []
        for grant in doubtful:
            self.take_grant(grant)
        if not self._doubtful:
            self._seen = status.number
        self._gate.call_later(0.0, self._answer)  # after what our Envoy said meanwhile, if this process stood still
        for name, value in status.limits:
            endpoint = self._gate.controller.endpoints.get(name)
            if endpoint is not None:
                endpoint.limit.start_at(value)

    def take_knowledge(self, message: Learned | Remember) -> None:
        """Take over what the leader knows: we may lead next."""
        match message:
            case Learned(learnt):
                self._gate.controller.believe(learnt)
            case Remember(home):
                self._gate.controller.believe_home(home, self._gate.now())

    def take_grant(self, grant: Grant) -> None:
        """Dispatch a request. The lease is in our own books before anybody hears of it."""
        if self._gate.now() - self._confirmed_at > FRESH_S:
            self._doubtful.append(grant)
            return
        ticket = self._waiting.get(grant.number)
        if ticket is None:
            return  # its client left, and our word of that is on its way
        controller = self._gate.controller
        endpoint = controller.endpoints.get(grant.endpoint)
        if endpoint is None or endpoint.removed:
            self.link.send(Return(grant.number))
            return
        del self._waiting[grant.number]
        self._gate.do(lambda now: controller.adopt(ticket, grant.endpoint, now))
        assert ticket.state is State.LEASED  # noqa: S101 - the endpoint is there
        ticket.position = grant.position
        ticket.waited_for, ticket.predicted_s = grant.wait
        ticket.home = controller.endpoints.get(grant.home) if grant.home is not None else None
        wait_s = max(self._gate.now() - ticket.request.arrived, 0.0)
        self._gate.carry(Dispatch(ticket, grant.outcome, grant.endpoint, wait_s))

    def take_refusal(self, turned: Turned) -> None:
        """Refuse a request."""
        ticket = self._waiting.pop(turned.number, None)
        if ticket is not None:
            del self._numbers[ticket]
            self.turn_away(ticket, turned)

    def turn_away(self, ticket: Ticket, turned: Turned) -> None:
        """Carry a refusal to the session that holds the request."""
        controller = self._gate.controller
        ticket.state = State.LEFT
        ticket.request_class = controller.class_of(ticket.request)
        ticket.position = turned.position
        ticket.waited_for, ticket.predicted_s = turned.wait
        wait_s = max(self._gate.now() - ticket.request.arrived, 0.0)
        self._gate.carry(Reject(ticket, turned.outcome, wait_s, turned.retry_after_s, turned.crowd))
