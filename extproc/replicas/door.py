"""Who comes to a sidecar: whoever wants to follow it, or to know whether it leads. Everybody gets one answer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from extproc.replicas.forwarded import Follower
from extproc.replicas.messages import VERSION, Ask, Hello, Leave, Met, Purpose, Redirect, Refuse, Told, Welcome

if TYPE_CHECKING:
    from extproc.replicas.messages import Link, Message
    from extproc.replicas.replica import Replica


class Guest:
    """Who opened a stream to us: a follower, a leader that wants to meet, or nobody yet."""

    __slots__ = ("_door", "follower", "hello", "link")

    def __init__(self, door: Door, link: Link) -> None:
        """Expect a hello on `link`."""
        self._door = door
        self.link = link
        self.hello: Hello | None = None
        self.follower: Follower | None = None

    def receive(self, message: Message) -> None:
        """Take a message."""
        self._door.hear(self, message)

    def closed(self) -> None:
        """Note that the stream ended."""
        self._door.lose(self)


class Door:
    """Answers guests: a leader takes them in, a follower names its leader, a seeker lets them wait."""

    def __init__(self, host: Replica) -> None:
        """Open to guests of `host`."""
        self._host = host
        self._parked: list[Guest] = []
        self._is_shut = False

    def accept(self, link: Link) -> Guest:
        """Take a stream that somebody opened; the network calls the guest's `receive` and `closed`."""
        return Guest(self, link)

    def shut(self) -> None:
        """Answer nobody any more."""
        self._is_shut = True
        for guest in self._parked:
            guest.link.close()

    def hear(self, guest: Guest, message: Message) -> None:
        """Take a message of somebody who came to us."""
        host = self._host
        host.look()
        if self._is_shut:
            guest.link.close()
        elif guest.follower is not None:
            leading = host.leading
            if leading is None or leading.followers.get(guest.follower.member.id) is not guest.follower:
                return  # we lead him no more
            if isinstance(message, Ask):
                host.tell(message, partial(_reply, guest, message.number))
            elif isinstance(message, Leave):
                host.lose_follower(guest.follower, clean=True)
                guest.link.close()
            else:
                leading.receive(guest.follower, message)
                host.look_whether_all_came()
        elif isinstance(message, Hello) and guest.hello is None:
            guest.hello = message
            self._answer(guest, message)
        else:
            guest.link.close()

    def lose(self, guest: Guest) -> None:
        """Note that somebody's stream ended."""
        if guest in self._parked:
            self._parked.remove(guest)
        if guest.follower is not None:
            self._host.lose_follower(guest.follower, clean=False)

    def answer_parked(self) -> None:
        """Answer who came while it was not clear who leads."""
        parked, self._parked = self._parked, []
        for guest in parked:
            if guest.hello is not None:
                self._answer(guest, guest.hello)

    def _answer(self, guest: Guest, hello: Hello) -> None:
        host = self._host
        if hello.member.id == host.me.id:  # it is we: the store still lists our life before, at our address
            guest.link.close()
            return
        refusal = self._refusal_of(hello)
        if refusal is not None:
            _send_away(guest, refusal)
            return
        host.epoch = max(host.epoch, hello.epoch)
        host.census.met(hello.member, host.now())
        if host.following is not None:
            guest.link.send(Redirect(host.following.leader))
            guest.link.close()
        elif host.leading is None:
            self._parked.append(guest)
        elif hello.purpose is Purpose.MEET:
            if host.outranks(hello.followers, hello.member):  # else he would follow us, be sent away, and meet us again
                why = host.leading.refuses(hello.member.id, hello.names)
                if why is not None:
                    _send_away(guest, why)
                    return
            guest.link.send(Met(host.me, len(host.leading.followers), host.epoch))
            guest.link.close()
            host.met(hello.followers, hello.member)
        else:
            self._take_in(guest, hello)

    def _refusal_of(self, hello: Hello) -> str | None:
        if hello.version != VERSION:
            return f"its protocol is version {hello.version}, ours {VERSION}"
        if hello.pool != self._host.pool:
            return f"its pool is {hello.pool!r}, ours {self._host.pool!r}"
        if hello.purpose is None:
            return "it says hello for a purpose that we don't know"
        return None

    def _take_in(self, guest: Guest, hello: Hello) -> None:
        host, leading = self._host, self._host.leading
        assert leading is not None  # noqa: S101 - asked before
        why = leading.refuses(hello.member.id, hello.names)
        if why is not None:
            _send_away(guest, why)
            return
        before = leading.followers.get(hello.member.id)
        if before is not None:  # its old stream has died unnoticed
            before.link.close()
            leading.drop(before, clean=False)
        guest.follower = Follower(hello.member, guest.link, hello.names, host.now(), hello.rules)
        guest.link.send(Welcome(host.me, host.epoch))
        leading.add(guest.follower)
        leading.tell_status(guest.follower, host.now())
        differs = leading.differs(guest.follower)
        if differs:
            host.log.warning(
                "%s follows, with another configuration than ours, which counts: %s", hello.member, differs
            )
        else:
            host.log.info("%s follows", hello.member)


def _reply(guest: Guest, number: int, text: str) -> None:
    guest.link.send(Told(number, text))


def _send_away(guest: Guest, why: str) -> None:
    guest.link.send(Refuse(why))
    guest.link.close()
