"""Which tenants have most in flight, and which were refused most: for who looks for the one that floods.

Names are what clients wrote, so they make no metrics: those have a series for each tenant that the configuration names.
Here they are counted when somebody looks, and the first few are told.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from extproc.admission.controller import Controller

MOST = 5
"""Tenants that are told."""
TURN = 500
"""Requests looked at in one turn of the event loop."""
MOST_SCANNED = 50_000
"""Waiting requests that are looked at."""


async def busiest(controller: Controller, refused: Counter[str]) -> list[dict[str, Any]]:
    """Return the tenants with most requests in flight and `refused`, a few; none where no request names one.

    What is in flight waits or runs. `max_in_flight`: of a tenant that has a cap; those that are not named may share it.
    """
    waiting, running = await _waiting(controller), await _running(controller)
    all_of_it = waiting + running + refused
    if not any(all_of_it):
        return []
    rules, rows = controller.policy.tenants, []
    for name, _ in all_of_it.most_common(MOST):
        account, rule = rules.who(name)
        row: dict[str, Any] = {"tenant": name, "in_flight": waiting[name] + running[name], "waiting": waiting[name]}
        if rule.max_in_flight is not None:
            row |= {"max_in_flight": rule.max_in_flight, "shared": account != name}
        rows.append(row | {"refused": refused[name]})
    return rows


async def _waiting(controller: Controller) -> Counter[str]:
    found, scanned = Counter[str](), 0
    for queue in [queue for pool in controller.pools() for queue in pool.queues() if queue]:
        some = queue.behind(None, TURN)
        while some and scanned < MOST_SCANNED:
            scanned += len(some)
            found.update(ticket.request.tenant for ticket in some)
            await asyncio.sleep(0)
            some = queue.behind(some[-1].key, TURN)
    return found


async def _running(controller: Controller) -> Counter[str]:
    found, scanned = Counter[str](), 0
    for endpoint in list(controller.endpoints.values()):
        found.update(ticket.request.tenant for ticket in endpoint.leases)
        scanned += len(endpoint.leases)
        if scanned >= TURN:
            scanned = 0
            await asyncio.sleep(0)
    return found
