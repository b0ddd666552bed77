"""How many servers one endpoint's address stands for, of which its page shows one.

Behind a Kubernetes Service, or any balancer, each connection is another server's, and the page shows what runs at that
of the scrapes alone. A limit that is found by it is one server's, and would leave the others idle. What the page shows
of our requests, which we count exactly, tells how many there are; then all that it counts is taken for each of them.

An answer that is written and not yet read is on no page either: a server that counts the answers that it begins must
have left out as many. Nor do others' requests make it look as if there were more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extproc.admission.load import Load
    from extproc.admission.ticket import Ticket

ARRIVED_S = 0.3
"""A lease as old as this was at its server when the page was made that has come just now."""
KEPT = 0.98
"""What a page keeps of what those before it showed."""
ENOUGH, ENOUGH_ANSWERS = 100.0, 16.0
"""So many requests must have been looked for on pages, and so many answers have come, to say anything."""
NEAR = 0.6
"""So far off a number of servers what is shown may be, before there is another number of them."""
MOST = 32
"""A page that shows no more than that part of ours is not believed: it may be anybody's."""


class Servers:
    """The servers of one address.

    Attributes:
        count: how many; 1 until pages show otherwise.
    """

    __slots__ = ("_answered", "_answers", "_arrived", "_begun", "_shown", "count")

    def __init__(self, answered: int = 0) -> None:
        """Take an address for one server's. `answered`: by others, before."""
        self.count = 1
        self._arrived = self._shown = 0.0  # of ours, at the last pages: how many there were, how many they showed
        self._answers = self._begun = 0.0  # lately: how many of ours were answered, how many answers were begun
        self._answered = answered  # by the last page

    def follow(self, load: Load, leases: Iterable[Ticket], held: int, answered: int, now: float, unsent: int) -> bool:
        """Follow a page that has just come; tell whether it is another number now.

        `held`: sequences of `leases`. `answered`: all of ours that were until now. `unsent`: of those who should have
        arrived, how many may not have been sent for all that.
        """
        before, since, self._answered = self.count, answered - self._answered, answered
        if load.running is None:
            return False  # whatever else it tells: an engine without a page has one of its GPU
        shown = load.running + (load.waiting or 0.0)
        if held > shown:  # those who came just now may be missing
            arrived = sum(ticket.sequences for ticket in leases if ticket.leased_at <= now - ARRIVED_S)
            held = max(arrived - unsent, 0)
        self._answers = KEPT * self._answers + since
        self._begun = KEPT * self._begun + (load.first_tokens or 0)
        if not shown and not since:  # it may hang: where ours are then nobody can tell
            return False
        self._arrived = KEPT * self._arrived + held
        self._shown = KEPT * self._shown + shown
        if self._arrived >= ENOUGH and self._answers >= ENOUGH_ANSWERS:
            by_requests = self._arrived / max(self._shown, self._arrived / MOST)
            by_answers = self._answers / max(self._begun, self._answers / MOST)  # the most, where none are counted
            times = min(by_requests, by_answers)
            if abs(times - before) > NEAR:
                self.count = max(round(times), 1)
        return self.count != before
