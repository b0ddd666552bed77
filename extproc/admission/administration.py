"""The core's events that are no request's: who serves, how they fare, by which rules, and that it ends."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from extproc.admission.events import (
    Drained,
    EndpointsPut,
    EndpointsRemoved,
    HealthChecked,
    ModelsKnown,
    Observed,
    PolicySet,
    Reported,
)
from extproc.admission.frame import Frame
from extproc.admission.outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extproc.admission.load import Load
    from extproc.admission.values import Decision, EndpointSpec, Policy


class Administration(Frame):
    """What the configuration, discovery, health checks and telemetry have to say."""

    __slots__ = ()

    # ---- endpoints

    def put_endpoint(self, spec: EndpointSpec, now: float) -> list[Decision]:
        """Add or change one endpoint: see `put_endpoints`."""
        return self.put_endpoints((spec,), now)

    def put_endpoints(self, specs: Iterable[EndpointSpec], now: float) -> list[Decision]:
        """Add endpoints, change some, or bring removed ones back with the leases they still have.

        Many in one moment: who belongs together is found once, and then who waits is looked at.
        """
        self._begin(now)
        specs = tuple(specs)
        if self._watchers:
            self._event = EndpointsPut(now, specs)
        self._fleet.put(specs)
        return self._end()

    def know_models(self, models: Iterable[str], now: float, *, expects_any: bool = False) -> list[Decision]:
        """Note which models the configuration names: requests for them wait even while nobody serves them.

        `expects_any`: it names endpoints, or sources of them, that list no models: they may come and serve any.
        """
        books, models = self._begin(now), tuple(models)
        if self._watchers:
            self._event = ModelsKnown(now, models, expects_any)
        changes = books.pools.expects_any is not expects_any
        books.pools.expects_any = expects_any
        if books.pools.know(models) or changes:
            self._fleet.regroup()
        return self._end()

    def remove_endpoints(self, names: Iterable[str], now: float) -> list[Decision]:
        """Send nothing more to endpoints: their leases run out, those at home there go anywhere.

        Many cost what one does. Those that are unknown, or gone: no-op.
        """
        self._begin(now)
        names = tuple(dict.fromkeys(names))
        if self._watchers:
            self._event = EndpointsRemoved(now, names)
        gone = [endpoint for name in names if (endpoint := self.endpoints.get(name)) and not endpoint.removed]
        if gone:
            self._fleet.remove(gone)
        return self._end()

    def set_up(self, name: str, now: float, *, is_up: bool | None) -> list[Decision]:
        """Follow health checks; None: nothing is known, as of a new endpoint. Unknown endpoint: no-op."""
        self._begin(now)
        if self._watchers:
            self._event = HealthChecked(now, name, is_up)
        endpoint = self.endpoints.get(name)
        if endpoint is not None and (is_up is None or endpoint.health.is_up is not is_up):
            endpoint.health.check(is_up=is_up)
            self._fleet.changed(endpoint)
        return self._end()

    def observe(self, name: str, load: Load, now: float, unsent: int = 0) -> list[Decision]:
        """Follow an endpoint's telemetry. Unknown: no-op.

        `unsent`: of the sequences leased long enough ago to have arrived, how many may not be there: on their way for
        longer, or over and not told yet (`looks.py`).
        """
        self._begin(now)
        if self._watchers:
            self._event = Observed(now, name, load, unsent)
        endpoint = self.endpoints.get(name)
        if endpoint is not None:
            self._hearing.page(endpoint, load, unsent)
        return self._end()

    def report(self, name: str, load: Load, now: float) -> list[Decision]:
        """Follow what an endpoint's answer says of its load. Unknown: no-op."""
        self._begin(now)
        if self._watchers:
            self._event = Reported(now, name, load)
        endpoint = self.endpoints.get(name)
        if endpoint is not None:
            self._hearing.report(endpoint, load)
        return self._end()

    # ---- rules

    def set_policy(self, policy: Policy, now: float) -> list[Decision]:
        """Replace the rules. Waiting requests keep the class and the budget they came with.

        If the order is another, they get new places; of very many some at a time, in ticks that are due at once.
        """
        books = self._begin(now)
        if self._watchers:
            self._event = PolicySet(now, policy)
        old, lanes = books.policy, books.lanes
        reorder = (policy.fair, policy.short_first) != (old.fair, old.short_first)
        books.follow(policy)
        self._tokens.law = policy.laws.tokens
        if books.lanes != lanes:
            self._fleet.regroup()
        if reorder:
            self._settling.reorder()
        if policy != replace(old, fair=policy.fair, short_first=policy.short_first):  # else endpoints are as before
            for endpoint in self.endpoints.values():
                endpoint.apply(policy)
                self._fleet.changed(endpoint)
        self._fleet.forget_stale()
        if not policy.enable_queue:
            self._settling.let_all_go()
        return self._end()

    def drain(self, now: float, most: int | None = None) -> list[Decision]:
        """Refuse what waits, and from now on everything that would have to.

        `most`: of those who wait, so many now; drain again while some do.
        """
        books = self._begin(now)
        if self._watchers:
            self._event = Drained(now, most)
        self._refusing.draining = True
        for ticket in list(islice(books.waiting_tickets(), most)):
            self._refusing.refuse(ticket, Outcome.DRAINING)
        return self._end()
