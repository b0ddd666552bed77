"""Whose requests an engine's page shows, once that can be told.

A request of ours takes a moment to its engine, and what has ended there is in our books until its end is told: for so
long a page has fewer of ours than our books. Who counts all of these as there takes others' requests for gone that
still run, and fills the engine above its limit. So a page says how many fewer others' are a moment later, which the
next page finds, and by the requests that were surely there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.load import Load
    from extproc.admission.ticket import Ticket


class Look:
    """What a page of an engine showed.

    Attributes:
        others: so many of those that ran there were not ours, if all of `ours` did.
        ours: of our leases those that had surely arrived.
        known_at: by then we are told of each end of before the page.
    """

    __slots__ = ("known_at", "others", "ours")

    def __init__(self, others: int, ours: dict[Ticket, None], known_at: float) -> None:
        """Begin."""
        self.others = others
        self.ours = ours
        self.known_at = known_at


class Looks:
    """The pages of engines where others' requests are known to run, the last of each that is not judged yet."""

    def __init__(self) -> None:
        """Begin with none."""
        self._looks: dict[str, Look] = {}

    def unsent(self, endpoint: Endpoint, load: Load, asked_at: float, now: float, left: int = 0) -> int:
        """Return how many more of those that an engine runs may be others' than a page of it shows beside our leases.

        The page was asked for at `asked_at`. `left`: others' that may be on their way there.
        """
        name, foreign = endpoint.name, endpoint.foreign
        if not foreign or load.running is None:
            self._looks.pop(name, None)
            return 0
        arrived_s = endpoint.strangers.law.arrived_s
        there, by = int(load.running + (load.waiting or 0.0)), asked_at - arrived_s
        leases = [ticket for ticket in endpoint.leases if ticket.leased_at <= now - arrived_s]  # those the core counts
        held = sum(ticket.sequences for ticket in leases)
        look = self._looks.get(name)
        if look is None or self._is_known(look, asked_at):
            if look is not None:
                gone = (ticket.sequences for ticket in look.ours if self._may_have_ended(ticket, endpoint, look))
                foreign = look.others + sum(gone)
            ours = {ticket: None for ticket in leases if self._has_arrived(ticket, by)}
            others = there + left - sum(ticket.sequences for ticket in ours)
            self._looks[name] = Look(others, ours, now + arrived_s)
        return min(max(foreign + held - there, 0), held + left)

    def forget(self, names: Iterable[str]) -> None:
        """Keep nothing of endpoints that are gone."""
        for name in names:
            self._looks.pop(name, None)

    def _may_have_ended(self, ticket: Ticket, endpoint: Endpoint, look: Look) -> bool:
        """Tell whether one of ours that a page was taken to show may not have been there any more."""
        if ticket in endpoint.leases:
            return False
        return ticket.endpoint is not endpoint or not self._ended_later(ticket, look)

    # ---- how long the ways are

    def _has_arrived(self, ticket: Ticket, by: float) -> bool:
        """Tell whether a lease was on its way by then, which is long enough."""
        return ticket.leased_at <= by

    def _is_known(self, look: Look, asked_at: float) -> bool:
        """Tell whether we had been told of each end of before a page when we asked for the next: we may stand still."""
        return asked_at >= look.known_at

    def _ended_later(self, ticket: Ticket, look: Look) -> bool:
        """Tell whether we were told so late that a lease has ended that it was there when its engine was looked at."""
        return ticket.ended_at > look.known_at
