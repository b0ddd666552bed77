"""The core's events where several sidecars share endpoints: what one takes over from another's core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.administration import Administration
from extproc.admission.events import Adopted, Disowned, HomeBelieved, LearntBelieved, QuotaSet, Withdrawn
from extproc.admission.lines import placed
from extproc.admission.transitions import DONE, LEASED

if TYPE_CHECKING:
    from extproc.admission.estimate import Learnt
    from extproc.admission.sessions import Home
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Decision


class Sharing(Administration):
    """What another sidecar has to say. One that is alone needs nothing of it."""

    __slots__ = ()

    def adopt(
        self, ticket: Ticket, name: str, now: float, *, held_s: float = 0.0, begun: bool = False
    ) -> list[Decision]:
        """Take over a lease that another sidecar's core gave `held_s` ago, whatever the limits say.

        `begun`: its first token was seen. An unknown endpoint: no-op, and the ticket stays new.
        """
        books = self._begin(now, ticket, "adopted")
        if self._watchers:
            self._event = Adopted(now, ticket, name, held_s, begun)
        endpoint = self.endpoints.get(name)
        if endpoint is not None:
            request = ticket.request
            ticket.request_class = books.class_of(request)
            if books.tenants.are_ruled:
                books.tenants.comes(ticket)
            ticket.pool = self._fleet.pool_of(request) or books.pools.every
            self._lines.budget(ticket, ticket.pool)  # for those who are told of it
            self._tokens.estimate(ticket, ticket.pool.longest)
            ticket.state, ticket.endpoint = LEASED, endpoint
            endpoint.adopt(ticket, now, held_s, begun=begun)
            if request.session is not None:
                self._placing.remember(request.session, ticket, endpoint)
            self._fleet.changed(endpoint)
        return self._end()

    def disown(self, ticket: Ticket, now: float) -> list[Decision]:
        """Forget a lease that another sidecar holds and that we can't follow any more: it counts as foreign."""
        self._begin(now, ticket, "disowned")
        if self._watchers:
            self._event = Disowned(now, ticket)
        endpoint = placed(ticket.endpoint)
        ticket.state = DONE
        endpoint.disown(ticket, now)
        self._fleet.let_go(ticket)
        self._lines.count_out(ticket)
        self._fleet.forget_if_gone(endpoint)
        self._fleet.changed(endpoint)
        return self._end()

    def withdraw(self, ticket: Ticket, now: float) -> list[Decision]:
        """Take a waiting request back without an outcome: another sidecar's core will decide, or this one later."""
        self._begin(now, ticket, "withdrawn")
        if self._watchers:
            self._event = Withdrawn(now, ticket)
        self._lines.take_back(ticket)
        return self._end()

    def set_quota(self, name: str, quota: int | None, now: float) -> list[Decision]:
        """Hold at most `quota` sequences at an endpoint, besides its limit; None: the limit alone. Unknown: no-op."""
        self._begin(now)
        if self._watchers:
            self._event = QuotaSet(now, name, quota)
        endpoint = self.endpoints.get(name)
        if endpoint is not None and endpoint.quota != quota:
            if endpoint.quota is not None and (quota is None or quota > endpoint.quota):
                for pool in endpoint.pools:
                    pool.pace.forget_drain(now)
            endpoint.quota = quota
            self._fleet.changed(endpoint)
        return self._end()

    def homes(self, most: int, at: float) -> list[Home]:
        """Return where the `most` sessions that were seen last are at home, `at` this time, for another core."""
        return self._placing.sessions.homes(most, at)

    def believe_home(self, home: Home, at: float) -> None:
        """Take over where another sidecar's core served a session, as told at this time, if that is news here."""
        endpoint = self.endpoints.get(home.endpoint)
        if endpoint is not None:
            memory = self._books.policy.session_memory
            self._placing.sessions.remember(home.session, endpoint, home.tokens, memory, at - home.age_s)
        if self._watchers:
            self._tell(HomeBelieved(at, home), [])

    def learnt(self) -> list[Learnt]:
        """Return what was learned of tokens, for another sidecar's core."""
        return self._tokens.learnt()

    def believe(self, learnt: Learnt) -> None:
        """Take over what another sidecar's core learned of tokens."""
        self._tokens.believe(learnt)
        if self._watchers:
            self._tell(LearntBelieved(self._books.now, learnt), [])
