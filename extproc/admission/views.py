"""What others ask of the core between two events: nothing is changed here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.guard import seniority
from extproc.admission.held import HeldBy

if TYPE_CHECKING:
    from extproc.admission.books import Books
    from extproc.admission.endpoint import Endpoint
    from extproc.admission.values import Request

_GUARD = HeldBy.GUARD


def holds(books: Books) -> dict[Endpoint, HeldBy]:
    """Return for each endpoint that would not take the next request what keeps that one from it.

    The next is the first who waits for it, by class and arrival; where nobody does, one that needs no tokens.
    """
    found: dict[Endpoint, HeldBy | None] = {}
    firsts = [
        (queue.head, pool, home)
        for pool in books.pools
        if pool.waiting_total
        for home, queue in ((None, pool.shared), *pool.homes.items())
        if queue.head is not None
    ]
    for ticket, pool, home in sorted(firsts, key=lambda line: seniority(line[0])):
        if len(found) == len(books.endpoints):
            break
        for endpoint in pool.members if home is None else (home,):
            if endpoint not in found:
                found[endpoint] = endpoint.held_by(ticket) or _GUARD
    for endpoint in books.endpoints.values():
        if endpoint not in found:
            found[endpoint] = endpoint.held_by()
    return {endpoint: held for endpoint, held in found.items() if held is not None}


def others(books: Books, request: Request, names: frozenset[str]) -> frozenset[str] | None:
    """Return who may serve a request that came back from `names`: its model's other endpoints, if one may be used.

    Else what it allows already: one that refused it is better than nobody.
    """
    pool = books.pools.find(request.model, request.allowed)
    rest = [one for one in pool.members if one.name not in names] if pool is not None else []
    if any(one.available for one in rest):
        return frozenset(one.name for one in rest)
    return request.allowed
