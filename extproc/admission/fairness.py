"""Fair shares between tenants: a virtual token counter kept as start tags (start-time fair queueing).

A tenant's next request is tagged with the tokens that the tenant has been promised so far, but never with less than
the tag that was served last: idling earns no credit. Requests of one class go in the order of their tags. A tenant
who sends six times its share waits behind its own tags; the others do not. Start-time fair queueing is Goyal, Vin
and Cheng (SIGCOMM 1996); charging input once and output twice follows VTC (Sheng et al., OSDI 2024).
"""

from __future__ import annotations

from collections import OrderedDict

OUTPUT_WEIGHT = 2
"""Tokens of output cost twice those of input."""

MAX_TENANTS = 10_000
"""Tenants remembered per pool and priority; the one that asked longest ago is forgotten first, and so starts afresh."""


class _Tenant:
    __slots__ = ("finish", "last_tag", "waiting")

    def __init__(self) -> None:
        self.finish = 0.0  # the tokens promised to it so far
        self.last_tag = 0.0
        self.waiting = 0


class FairShare:
    """The tags of one pool and one priority."""

    __slots__ = ("_tenants", "_virtual_time")

    def __init__(self) -> None:
        """Start with every tenant at zero."""
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._virtual_time = 0.0

    def __len__(self) -> int:
        """Count the tenants that are remembered."""
        return len(self._tenants)

    def tag(self, tenant: str, cost: float) -> float:
        """Charge `cost` tokens to `tenant` and return the place of its request. FIFO within a tenant."""
        record = self._tenants.get(tenant)
        if record is None:
            record = self._tenants[tenant] = _Tenant()
            if len(self._tenants) > MAX_TENANTS:
                self._tenants.popitem(last=False)
        else:
            self._tenants.move_to_end(tenant)
        tag = max(self._virtual_time, record.finish)
        if record.waiting > 0 and tag < record.last_tag:  # a refund must not let it pass its own earlier requests
            tag = record.last_tag
        record.last_tag = tag
        record.finish = tag + cost
        record.waiting += 1
        return tag

    def left(self, tenant: str, refund: float) -> None:
        """Note that a waiting request of `tenant` went without being served, and give back its cost."""
        record = self._tenants.get(tenant)
        if record is not None:
            record.waiting = max(record.waiting - 1, 0)
            record.finish -= refund

    def served(self, tenant: str, tag: float) -> None:
        """Note that the request with `tag` was dispatched: nobody is tagged lower from now on."""
        if tag > self._virtual_time:
            self._virtual_time = tag
        record = self._tenants.get(tenant)
        if record is not None:
            record.waiting = max(record.waiting - 1, 0)  # 0: it was forgotten and came back

    def correct(self, tenant: str, difference: float) -> None:
        """Charge (or, negative, give back) what a finished request cost beyond its estimate."""
        record = self._tenants.get(tenant)
        if record is not None:
            record.finish += difference
