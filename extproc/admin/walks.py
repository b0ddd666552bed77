"""All who wait, and all who run, some in a turn of the event loop: who reads them for people stops no request."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from extproc.admission.controller import Controller
    from extproc.admission.ticket import Ticket
    from extproc.turns import Turns

MOST_SCANNED = 50_000
"""Waiting requests that are looked at; with more, the oldest wait is "at least"."""
TURN = 500
"""Tickets looked at in one turn of the event loop."""


async def waiting(controller: Controller, turns: Turns) -> AsyncIterator[list[Ticket]]:
    """Walk those who wait until MOST_SCANNED were looked at; each line in its order."""
    scanned = 0
    for queue in [queue for pool in controller.pools() for queue in pool.queues() if queue]:
        for some in queue.pieces(TURN):
            await turns.take()
            if scanned >= MOST_SCANNED:
                return
            scanned += len(some)
            yield some


async def leases(controller: Controller, turns: Turns) -> AsyncIterator[list[Ticket]]:
    """Walk all leases that there are now; some may be over when they are told."""
    now = [ticket for endpoint in controller.endpoints.values() for ticket in endpoint.leases]
    for start in range(0, len(now), TURN):
        await turns.take()
        yield now[start : start + TURN]
