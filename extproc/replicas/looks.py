"""Whose requests an engine's page shows to a leader, whose followers have Envoys of their own.

A grant takes as long as the network does, or as its follower stands still: that it has acted its beats show. What has
ended there is told once it has answered a status that it was sent after its Envoy must have told it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.looks import Looks
from extproc.replicas.forwarded import Forwarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.load import Load
    from extproc.admission.looks import Look
    from extproc.admission.ticket import Ticket
    from extproc.replicas.forwarded import Follower
    from extproc.replicas.gate import SharedGate

ASK_S = 0.01
"""Followers are asked so much later than they could be: one question for all pages that come in the meantime."""


class SharedLooks(Looks):
    """The looks of one leadership."""

    def __init__(self, gate: SharedGate, followers: Mapping[str, Follower], tell_all: Callable[[], None]) -> None:
        """Have all `followers` answer by `tell_all`."""
        super().__init__()
        self._gate = gate
        self._followers = followers
        self._tell_all = tell_all
        self._asked: dict[Look, dict[Follower, int]] = {}  # for the sake of which, by which status
        self._asks = False  # whoever follows, soon
        self._disowned: dict[str, list[tuple[float, int]]] = {}  # lately, at each endpoint: when, how many sequences

    def unsent_of_all(self, endpoint: Endpoint, load: Load, asked_at: float, now: float) -> int:
        """Return what `unsent` does, beside what sidecars that are gone sent last."""
        by = asked_at - endpoint.strangers.law.arrived_s
        lately = [one for one in self._disowned.pop(endpoint.name, ()) if one[0] > by]
        if lately:
            self._disowned[endpoint.name] = lately
        count = self.unsent(endpoint, load, asked_at, now, sum(sequences for _, sequences in lately))
        self._ask_soon(now)
        return count

    def disowned(self, ticket: Ticket, endpoint: Endpoint) -> None:
        """Note that a lease of a follower is another's from now on: what it sent last is on its way."""
        self._disowned.setdefault(endpoint.name, []).append((self._gate.now(), ticket.sequences))
        look = self._looks.get(endpoint.name)
        if look is not None and ticket not in look.ours:
            look.others += ticket.sequences

    def forget(self, names: Iterable[str]) -> None:
        """Keep nothing of endpoints that are gone."""
        gone = tuple(names)
        super().forget(gone)
        for name in gone:
            self._disowned.pop(name, None)

    def _ask_soon(self, now: float) -> None:
        """Have followers answer as soon as the first look that nobody was asked for is old enough."""
        if self._asks:
            return
        due = [look.known_at for look in self._looks.values() if look not in self._asked]
        if due:
            self._asks = True
            self._gate.call_later(max(min(due) - now, 0.0) + ASK_S, self._ask)

    def _ask(self) -> None:
        now = self._gate.now()
        self._asks = False
        looks = self._looks.values()
        asked = {look: self._asked[look] for look in looks if look in self._asked}
        numbers = {follower: follower.told + 1 for follower in self._followers.values()}
        self._asked = asked | {look: numbers for look in looks if look not in asked and look.known_at <= now}
        self._tell_all()
        self._ask_soon(now)

    # ---- how long the ways are

    def _has_arrived(self, ticket: Ticket, by: float) -> bool:
        is_sent = not isinstance(ticket, Forwarded) or ticket.follower.has_acted(ticket, by)
        return is_sent and super()._has_arrived(ticket, by)

    def _is_known(self, look: Look, asked_at: float) -> bool:
        asked = self._asked.get(look)
        if asked is None or not super()._is_known(look, asked_at):
            return False
        return all(follower.shown >= number for follower, number in asked.items() if self._follows(follower))

    def _ended_later(self, ticket: Ticket, look: Look) -> bool:
        if not isinstance(ticket, Forwarded):
            return super()._ended_later(ticket, look)
        number = self._asked[look].get(ticket.follower)
        return number is not None and ticket.ended_at > ticket.follower.shown_at(number)

    def _follows(self, follower: Follower) -> bool:
        return self._followers.get(follower.member.id) is follower
