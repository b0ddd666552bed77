"""The endpoints as a whole: what follows when one comes, goes, or has more or less room than before.

An endpoint keeps its own books (`endpoint.py`); here the pools' lists of them are kept true, and their alarms.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from extproc.admission import telemetry
from extproc.admission.alarms import Alarms
from extproc.admission.endpoint import Endpoint
from extproc.admission.held import HeldBy
from extproc.admission.transitions import LEASED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from extproc.admission.books import Books
    from extproc.admission.pool import Pool
    from extproc.admission.settling import Settling
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import EndpointSpec, Request


class Fleet:
    """All endpoints.

    Attributes:
        is_shared: other sidecars may dispatch to the same endpoints: a new one stays closed until it gets a quota.
        changes: when time alone changes an endpoint's room: closed gates, ejections.
        due_at: not before this can any telemetry have become stale, or must a dispatch pass go on; None: there is none.
    """

    __slots__ = ("_at", "_books", "_elsewhere", "_left", "_listings", "_settling", "changes", "due_at", "is_shared")

    def __init__(self, books: Books, settling: Settling) -> None:
        """Start without endpoints."""
        self._books = books
        self._settling = settling
        self._listings = 0
        self._at: dict[str, Endpoint] = {}  # who is there, by address
        self._left: dict[str, list[Ticket]] = {}  # what runs at an address that its holder has left
        self._elsewhere: dict[Ticket, str] = {}  # where each of these runs: there it stays if its holder moves on
        self.is_shared = False
        self.changes: Alarms[Endpoint] = Alarms()
        self.due_at: float | None = None

    # ---- coming and going

    def put(self, specs: Iterable[EndpointSpec]) -> None:
        """Add endpoints, change some, or bring removed ones back with the leases they still have.

        An address has one endpoint: whoever comes there takes the place of another, and takes over its leases.
        Pools are recomputed once, and only if one that was there serves other models now, or a new one can't `_join`.
        """
        books = self._books
        met: dict[Endpoint, None] = {}
        regroups = False
        for spec in specs:
            endpoint = books.endpoints.get(spec.name)
            if endpoint is None:
                endpoint = books.endpoints[spec.name] = Endpoint(spec, books.policy)
                endpoint.quota = 0 if self.is_shared else None
            else:
                regroups |= endpoint.removed or (bool(endpoint.pools) and endpoint.spec.models != spec.models)
                if endpoint.spec.address != spec.address:
                    self._depart(endpoint)
                endpoint.respec(spec, books.policy)
                endpoint.removed = False
            regroups |= spec.address != "" and self._arrive(endpoint)
            if spec.awaits_check:
                endpoint.health.await_check()
            met[endpoint] = None
        self._forget_what_ended(2 * len(met))
        if not regroups:
            regroups = not all(self._followed(endpoint) for endpoint in met)
        if regroups:
            self.regroup()

    def _arrive(self, endpoint: Endpoint) -> bool:
        """Have an endpoint count what runs at its address by other names; tell whether it takes another's place."""
        address, now = endpoint.spec.address, self._books.now
        before = self._at.get(address)
        if before is endpoint:
            return False
        if before is not None:
            self._depart(before)
            before.removed = True
            before.pools = []
        self._at[address] = endpoint
        for ticket in self._left.pop(address, ()):
            del self._elsewhere[ticket]
            holder = ticket.endpoint
            if ticket.state is LEASED and holder is not None and holder is not endpoint:
                endpoint.take_over(ticket, holder, now)
                self.forget_if_gone(holder)
                if holder.removed or holder.pools:  # else it comes, too, and is looked at with the others
                    self.changed(holder)
        if before is not None and before.name in self._books.endpoints:
            self.forget_if_gone(before)
            self.changed(before)
        return before is not None

    def _depart(self, endpoint: Endpoint) -> None:
        """Note what runs at the address that an endpoint leaves."""
        address = endpoint.spec.address
        if self._at.get(address) is endpoint:
            del self._at[address]
            left = [ticket for ticket in endpoint.leases if ticket not in self._elsewhere]
            if left:
                self._left.setdefault(address, []).extend(left)
                self._elsewhere.update(dict.fromkeys(left, address))

    def found(self, ticket: Ticket) -> None:
        """Note that a lease runs where it is counted: its gateway tells."""
        address = self._elsewhere.pop(ticket, None)
        if address is not None:
            self._left[address].remove(ticket)

    def _forget_what_ended(self, addresses: int) -> None:
        """Look at what was left at so many addresses, those first that were looked at longest ago."""
        for address in list(islice(self._left, addresses)):
            running = []
            for ticket in self._left.pop(address):
                if ticket.state is LEASED:
                    running.append(ticket)
                else:
                    del self._elsewhere[ticket]
            if running:
                self._left[address] = running

    def _followed(self, endpoint: Endpoint) -> bool:
        """Follow one that is new, or has another limit, without regrouping; tell whether that was possible.

        What that costs does not grow with how many are there.
        """
        if endpoint.pools:
            self.changed(endpoint)
            return True
        split = self._books.pools.join(endpoint)
        if split is None:
            return False
        self.changed(endpoint)
        self._spare_the_last(endpoint.pools)
        if split:
            self._settling.resettle(split)
        return True

    def remove(self, endpoints: Sequence[Endpoint]) -> None:
        """Send nothing more to endpoints: their leases run out, those at home there go anywhere."""
        for endpoint in endpoints:
            self._depart(endpoint)
            endpoint.removed = True
            self.forget_if_gone(endpoint)
        self._forget_what_ended(2 * len(endpoints))  # at no more do these leave something
        regroups = len(endpoints) > 1 or not self._parted_from(endpoints[0])
        for endpoint in endpoints:
            endpoint.pools = []  # its leases run out: it is nobody's home, and teaches nobody
        if regroups:
            self.regroup()

    def _parted_from(self, endpoint: Endpoint) -> bool:
        """Follow one that is gone without regrouping; tell whether that was possible."""
        left = self._books.pools.leave(endpoint)
        if left is None:
            return False
        self.changed(endpoint)
        if left:
            self._settling.resettle(left)
        for pool in left:
            self._settling.follow_service(pool)
        return True

    def forget_if_gone(self, endpoint: Endpoint) -> None:
        """Forget a removed endpoint once its last lease is back, and nothing is reserved there."""
        if endpoint.removed and not endpoint.leases and not endpoint.reserved:
            del self._books.endpoints[endpoint.name]
            self._books.adapters.forget(endpoint)

    def reserve(self, ticket: Ticket, choices: Iterable[Endpoint]) -> None:
        """Keep room at each of `choices` for a leased `ticket`: its gateway may go there instead."""
        ticket.choices = tuple(choices)
        if self._books.policy.enable_queue:
            ticket.kept, ticket.kept_tokens = ticket.sequences, ticket.kv_tokens
            for endpoint in ticket.choices:
                endpoint.keep(ticket.kept, ticket.kept_tokens)  # each stays open: see `Endpoint.spares_for`

    def let_go(self, ticket: Ticket) -> None:
        """Free what is kept for `ticket`: it is told who answers, or it is over."""
        if ticket.kept:
            for endpoint in ticket.choices:
                endpoint.keep(-ticket.kept, -ticket.kept_tokens)
                self.forget_if_gone(endpoint)
                self.changed(endpoint)
        ticket.choices, ticket.kept = (), 0

    def pool_of(self, request: Request) -> Pool | None:
        """Return the pool of those that serve a request's model and may have it; None: nobody knows the model."""
        pools = self._books.pools
        if request.allowed is not None:
            pools.know_subset(request.model, request.allowed)
        return pools.find(request.model, request.allowed)

    def regroup(self) -> None:
        """Recompute who belongs to which pool, after endpoints came, changed or went."""
        books = self._books
        present = [endpoint for endpoint in books.endpoints.values() if not endpoint.removed]
        before, parted = books.pools.regroup(present, books.lanes)
        for endpoint in present:
            endpoint.closed_by, endpoint.listing = HeldBy.DOWN, 0
        for endpoint in sorted(present, key=_is_shut):  # those who serve are counted before anybody is the last one
            self.changed(endpoint)
        self._spare_the_last(books.pools)
        self._settling.resettle(parted)
        for pool in dict.fromkeys((*before, *books.pools)):  # who moved has a home where it went, if that serves it
            if pool.homes:
                members = set(pool.members)
                for home in [home for home in pool.homes if home not in members]:
                    self._settling.evict(pool, home)
        for pool in books.pools:
            self._settling.follow_service(pool)
        self._settling.run()

    # ---- changes of room

    def changed(self, endpoint: Endpoint) -> None:
        """Follow whatever changed an endpoint's room.

        Room where others wait most often goes to one of them at once: it is measured if there is more than one, and
        listed if the pass leaves it.
        """
        is_usable = endpoint.health.shut_by is None and not endpoint.removed  # `available`, without a call
        if is_usable is not endpoint.counted:
            endpoint.counted = is_usable
            for pool in endpoint.pools:
                pool.usable += 1 if is_usable else -1
            if not is_usable:
                self._spare_the_last(endpoint.pools)
            for pool in endpoint.pools:
                self._settling.follow_service(pool)
        elif not is_usable and endpoint.health.is_spared:  # it was down before: what it serves alone has nobody better
            self._spare_the_last(endpoint.pools)
        if self._books.waiting and not endpoint.listing and endpoint.held_by() is None:
            endpoint.closed_by = None
        else:
            self.follow(endpoint)
        if endpoint.closed_by is None:
            self._books.freed[endpoint] = None
        elif not is_usable:
            for pool in endpoint.pools:
                self._settling.evict(pool, endpoint)

    def follow(self, endpoint: Endpoint) -> None:
        """Keep each pool's list of open endpoints true, who has the most room, and when time alone will change that."""
        was_open = endpoint.closed_by is None
        endpoint.closed_by = closed_by = endpoint.held_by()
        if closed_by is None:
            self._listings += 1
            endpoint.listing = self._listings
            endpoint.crowding = (endpoint.pressure(), endpoint.picked)
        else:
            endpoint.listing = 0
            if endpoint.held_since is None:
                endpoint.held_since = self._books.now
        for pool in endpoint.pools:
            kept = pool.list_open(endpoint) if closed_by is None else pool.close(endpoint, was_open)
            if kept is not None:
                self._books.freed[kept] = None
        at = endpoint.next_change()
        if at is None:
            endpoint.alarm_number = 0
        else:
            self.changes.set(endpoint, at, len(self._books.endpoints))

    def measure(self, endpoints: Iterable[Endpoint]) -> None:
        """Note how much room those have that no list knows yet."""
        for endpoint in endpoints:
            if not endpoint.listing:
                endpoint.crowding = (endpoint.pressure(), endpoint.picked)

    def leave(self, endpoint: Endpoint, waited_for: bool) -> None:
        """Note that nobody takes what room an endpoint has. `waited_for`: if any, it suits nobody who waits."""
        if endpoint.closed_by is None and not endpoint.listing:
            self.follow(endpoint)
        if not waited_for and endpoint.closed_by is None:
            endpoint.held_since = None
        elif endpoint.held_since is None:
            endpoint.held_since = self._books.now

    def lead_nobody(self, endpoint: Endpoint) -> None:
        """Let who waits for an endpoint go anywhere, if its model's requests are led there no more."""
        for pool in endpoint.pools:
            self._settling.evict(pool, endpoint)

    def _spare_the_last(self, pools: Iterable[Pool]) -> None:
        """End what keeps requests from endpoints because others serve, in pools where nobody is left who does."""
        for pool in tuple(pools):
            if not pool.usable and not pool.base.is_part:
                if pool.members:
                    self._forgive(pool)
                spared = {one: one.health.ejected_until for one in pool.members if one.health.is_spared}
                for endpoint in spared:
                    endpoint.health.spare(self._books.now)
                if self._leave_to_others(spared):
                    self.regroup()
                else:
                    for endpoint in spared:
                        self.changed(endpoint)

    def _leave_to_others(self, spared: Mapping[Endpoint, float | None]) -> bool:
        """Leave out for what others serve, until then, who is taken back for what nobody else does; tell of any."""
        served = {model: pool for model, pool in self._books.pools.by_model.items() if pool.usable}
        left = False
        for endpoint, until in spared.items():
            models = [model for model, pool in served.items() if pool in endpoint.pools]
            if models and until is not None:
                endpoint.missing.leave_out(models, until)
                left = True
        return left

    def _forgive(self, pool: Pool) -> None:
        """Try those again that were left out for a model of this pool."""
        of_pool = self._books.pools.by_model
        left_out = [
            (endpoint, models)
            for endpoint in self._books.endpoints.values()
            if endpoint.missing.models
            and (models := frozenset(model for model in endpoint.missing.models if of_pool.get(model) is pool))
        ]
        for endpoint, models in left_out:
            endpoint.missing.forgive(models)
        if left_out:
            self.regroup()

    # ---- time

    def heard(self) -> None:
        """Note that telemetry came, which will become stale."""
        if self.due_at is None:
            self.due_at = self._books.now + self._books.policy.stale_after_s

    def pass_time(self, now: float) -> None:
        """Forget telemetry that has become stale, and open what time alone opens."""
        if self.due_at is not None and now >= self.due_at:
            self.forget_stale()
        serve_more = False
        for endpoint in self.changes.due(now):
            serve_more |= endpoint.pass_time(now)
            self.changed(endpoint)
        if serve_more:
            self.regroup()

    def go_on(self) -> None:
        """Have time pass at once: a dispatch pass is not through."""
        self.due_at = self._books.now
        for endpoint in list(self._books.freed):
            if endpoint.closed_by is None and not endpoint.listing:
                self.follow(endpoint)

    def forget_stale(self) -> None:
        """Ignore what endpoints said of themselves too long ago."""
        books = self._books
        ages: list[float] = []
        for endpoint in books.endpoints.values():
            if telemetry.forget_stale(endpoint, books.now, books.policy):
                self.changed(endpoint)
            ages += endpoint.reading.told_at
        self.due_at = min(ages) + books.policy.stale_after_s if ages else None


def _is_shut(endpoint: Endpoint) -> bool:
    return not endpoint.available
