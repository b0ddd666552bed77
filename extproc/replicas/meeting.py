"""How leaders find each other: once a second a leader asks somebody who does not follow it whether he leads, too."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from extproc.replicas.messages import LAST, Met, Redirect, Refuse
from extproc.replicas.seeking import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from extproc.replicas.messages import Hello, Member, Message, Network
    from extproc.replicas.replica import Replica

MEET_S = 1.0

Rank = tuple[int, int, str]


def rank_of(followers: int, member: Member) -> Rank:
    """Return who leads when two meet: who has more followers, then who is older; who is about to leave never does."""
    if member.joined == LAST:
        return (-1, -LAST, member.id)
    return (followers, -member.joined, member.id)


class Meeting:
    """One leadership's looking for others; one stranger at a time, each in turn."""

    def __init__(self, host: Replica, network: Network) -> None:
        """Look for others on behalf of `host`, from MEET_S after now."""
        self._host = host
        self._network = network
        self._call: Call | None = None
        self._next: Member | None = None  # whom a stranger has named as his leader
        self._asked = 0
        self._asked_at = host.now()

    def end(self) -> None:
        """Look for nobody any more."""
        if self._call is not None:
            self._call.close()
        self._call = None

    def turn(self, strangers: Sequence[Member], hello: Callable[[], Hello]) -> None:
        """Say hello to the next one of `strangers`, if it is time to."""
        now = self._host.now()
        if now - self._asked_at < MEET_S:
            return
        self._asked_at = now
        if not strangers:
            return
        self._asked += 1
        target = self._next or strangers[self._asked % len(strangers)]
        self._next = None
        self.end()
        self._call = Call(self._network, target, hello(), now, partial(self._hear, target), lambda: None)

    def _hear(self, other: Member, message: Message) -> None:
        host = self._host
        host.look()
        leading = host.leading
        if self._call is None or leading is None:
            return
        self.end()
        match message:
            case Met(member, followers, epoch):
                host.epoch = max(host.epoch, epoch)
                host.met(followers, member)
            case Redirect(leader) if leader.id != host.me.id and leader.id not in leading.followers:
                self._next = None if host.is_refused_by(leader) else leader
            case Refuse(why):
                host.was_refused(other, why)
            case _:
                pass
