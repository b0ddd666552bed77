"""Whom to follow: the candidates are asked one after the other, the oldest first. No I/O."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from extproc.replicas.messages import Redirect, Refuse, Welcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from extproc.replicas.messages import Hello, Member, Message, Network
    from extproc.stream.gate import Loop, Timer

TRY_S = 0.5
"""How long one sidecar is given to answer whether it leads."""
RETRY_S = 0.1
NOTICE_S = 1.0
"""How long somebody who still follows a leader that we have lost is given to lose it, too."""
SEEK_S = 2.0
"""How long to look for a leader before leading oneself."""


class Call:
    """A stream that we opened at `asked_at`, with who listens to it; that may change."""

    __slots__ = ("asked_at", "ended", "heard", "link")

    def __init__(
        self,
        network: Network,
        member: Member,
        hello: Hello,
        asked_at: float,
        heard: Callable[[Message], None],
        ended: Callable[[], None],
    ) -> None:
        """Say `hello` to `member`; `heard` and `ended` hear of what comes."""
        self.asked_at = asked_at
        self.heard = heard
        self.ended = ended
        self.link = network.dial(member.address, self._receive, self._closed)
        self.link.send(hello)

    def _receive(self, message: Message) -> None:
        self.heard(message)

    def _closed(self) -> None:
        self.ended()

    def close(self) -> None:
        """End it, and listen no more."""
        self.heard = lambda _: None
        self.ended = lambda: None
        self.link.close()


class Outcome(NamedTuple):
    """Whom a seeker tells what.

    Attributes:
        found: a leader has welcomed us, with its epoch, on this call.
        refused: somebody would not have us, and why.
        alone: nobody leads us.
    """

    found: Callable[[Member, int, Call], None]
    refused: Callable[[Member, str], None]
    alone: Callable[[], None]


class Seeking:
    """One search, until it has found somebody, nobody, or is given up."""

    def __init__(
        self, network: Network, loop: Loop, hello: Hello, candidates: Iterable[Member], lost: str | None, tell: Outcome
    ) -> None:
        """Say `hello` to `candidates`. `lost`: a leader that others may not have lost yet."""
        self._network = network
        self._loop = loop
        self._hello = hello
        self._candidates = deque(candidates)
        self._lost = lost
        self._tell = tell
        self._until = 0.0
        self._call: Call | None = None
        self._timer: Timer | None = None

    def begin(self) -> None:
        """Ask the first one."""
        self._until = self._loop.time() + SEEK_S
        self.next()

    def next(self) -> None:
        """Ask the next one; after the last, or when it has taken too long, nobody leads us."""
        self.give_up()
        if not self._candidates or self._loop.time() >= self._until:
            self._tell.alone()
        else:
            self._ask(self._candidates.popleft(), self._loop.time())

    def give_up(self) -> None:
        """Ask nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._call is not None:
            self._call.close()
        self._timer = self._call = None

    def _ask(self, member: Member, since: float) -> None:
        """Ask somebody whom we have asked first at `since`."""
        now = self._loop.time()
        self._call = Call(self._network, member, self._hello, now, partial(self._hear, member, since), self.next)
        self._timer = self._loop.call_at(now + TRY_S, self.next)

    def _hear(self, member: Member, since: float, message: Message) -> None:
        match message:
            case Welcome(leader, epoch):
                call, self._call = self._call, None
                self.give_up()
                if call is not None:
                    self._tell.found(leader, epoch, call)
            case Redirect(leader) if leader.id in (self._lost, self._hello.member.id, member.id):
                self._wait_for(member, since)  # he has not noticed yet that he lost him, too
            case Redirect(leader):
                self._candidates.appendleft(leader)
                self.next()
            case Refuse(why):
                self._tell.refused(member, why)
                self.next()
            case _:
                self.next()

    def _wait_for(self, member: Member, since: float) -> None:
        self.give_up()
        now = self._loop.time()
        if now + RETRY_S < min(since + NOTICE_S, self._until):
            self._timer = self._loop.call_at(now + RETRY_S, partial(self._ask, member, since))
        else:
            self.next()
