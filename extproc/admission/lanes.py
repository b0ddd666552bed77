"""Weighted classes: those of one priority that have a weight share what is served, each as its weight.

Such a class has a line of its own in each pool, a lane: a pool of the same members, with its own lines, pace and shares
of tenants. Between lanes of one priority turns decide, kept as start tags like the tenants' (fairness.py): a lane's
turn is what it was promised so far, in tokens over its weight; the least goes first. A lane that comes back from idling
begins where the others are, and so earns no credit; one that waits but can't use its turn, because nothing of it fits,
keeps it.

Strict priority stays above all this: a lane of a higher priority goes first whatever the weights are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.fairness import OUTPUT_WEIGHT
from extproc.admission.guard import place_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.pool import Pool
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import RequestClass


def lane_of(pool: Pool, request_class: RequestClass) -> Pool:
    """Return where a request of this class waits in `pool`: the pool itself, or the lane of its class."""
    if request_class.weight is None:
        return pool
    return pool.lanes.get(request_class.name) or _open(pool, request_class.name)


def _open(pool: Pool, name: str) -> Pool:
    lane = pool.lanes[name] = pool.part()
    lane.base, lane.tally, lane.longest = pool, pool.tally, pool.longest
    return lane


def comes(lane: Pool, ticket: Ticket) -> None:
    """Note that a request comes to a lane where nobody waits: its turn is not before that of those served last."""
    lane.turn = max(lane.turn, lane.base.turns.get(ticket.request_class.priority, 0.0))


def served(lane: Pool, ticket: Ticket) -> None:
    """Charge a lane for a request that was dispatched."""
    request_class, turns = ticket.request_class, lane.base.turns
    if request_class.weight is not None:
        turns[request_class.priority] = max(lane.turn, turns.get(request_class.priority, 0.0))
        correct(lane, ticket, ticket.prompt_tokens + OUTPUT_WEIGHT * ticket.output_tokens)


def correct(lane: Pool, ticket: Ticket, tokens: float) -> None:
    """Charge (or, negative, give back) what a request cost beyond its estimate."""
    if ticket.request_class.weight is not None:
        lane.turn += tokens / ticket.request_class.weight


def first_of(firsts: Sequence[Ticket], endpoint: Endpoint) -> Ticket:
    """Return who goes to `endpoint` first of those who are first in their pools, one of each.

    Class decides, then the tenants' turns there, then arrival; but within a pool its lanes of that class's priority go
    by their own turns.
    """
    best = min(firsts, key=lambda ticket: place_at(ticket, endpoint))
    if best.request_class.weight is None:
        return best
    priority, base = best.key[0], best.pool.base if best.pool is not None else None
    lanes = [one for one in firsts if one.pool is not None and one.pool.base is base and one.key[0] == priority]
    return min((one for one in lanes if one.request_class.weight is not None), key=_turn)


def _turn(ticket: Ticket) -> tuple[float, int]:
    return (ticket.pool.turn if ticket.pool is not None else 0.0, ticket.key[2])
