"""What all events of the core have in common: how one begins and ends, who is told, what can be looked at in between.

The lowest layer of the controller (`controller.py` names them all): the rooms are made here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extproc.admission.answers import Answers
from extproc.admission.books import Books
from extproc.admission.estimate import TokenEstimate
from extproc.admission.fleet import Fleet
from extproc.admission.hearing import Hearing
from extproc.admission.lines import Lines
from extproc.admission.placing import Placing
from extproc.admission.refusing import Refusing
from extproc.admission.settling import Settling
from extproc.admission.transitions import MUST_BE
from extproc.admission.views import holds, others
from extproc.errors import TransitionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from extproc.admission.endpoint import Endpoint
    from extproc.admission.events import Event, Watcher
    from extproc.admission.held import HeldBy
    from extproc.admission.pool import Pool
    from extproc.admission.ticket import Ticket
    from extproc.admission.values import Decision, Policy, Request, RequestClass


class Frame:
    """The rooms of the core, and the frame of every event.

    Attributes:
        endpoints: by name; a removed one stays until its last lease is back.
    """

    __slots__ = (
        "_answers",
        "_books",
        "_event",
        "_fleet",
        "_hearing",
        "_lines",
        "_placing",
        "_refusing",
        "_settling",
        "_tokens",
        "_watchers",
        "endpoints",
    )

    def __init__(self, policy: Policy) -> None:
        """Start without endpoints; `put_endpoint` brings them."""
        self._books = books = Books(policy)
        self._lines = lines = Lines(books)
        self._settling = Settling(books, lines)
        self._fleet = fleet = Fleet(books, self._settling)
        self._tokens = TokenEstimate(policy.laws.tokens)
        self._refusing = Refusing(books, lines, self._tokens)
        self._placing = Placing(books, lines, fleet, self._refusing)
        self._answers = Answers(books, fleet, self._tokens)
        self._hearing = Hearing(books, lines, fleet, self._tokens)
        self.endpoints = books.endpoints
        self._watchers: list[Watcher] = []
        self._event: Event | None = None  # the one under way, while somebody watches

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` of each event from now on, once it is over, with what was decided."""
        self._watchers.append(watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """Tell `watcher` nothing more."""
        self._watchers.remove(watcher)
        self._event = None

    # ---- what others may look at

    @property
    def policy(self) -> Policy:
        """The rules."""
        return self._books.policy

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return self._books.waiting

    @property
    def draining(self) -> bool:
        """Whether nothing waits any more."""
        return self._refusing.draining

    @property
    def is_shared(self) -> bool:
        """Whether other sidecars may dispatch to the same endpoints: a new one stays closed until `set_quota`."""
        return self._fleet.is_shared

    @is_shared.setter
    def is_shared(self, is_shared: bool) -> None:
        self._fleet.is_shared = is_shared

    def others(self, request: Request, names: frozenset[str]) -> frozenset[str] | None:
        """Return who may serve a request that came back from `names`: its model's other endpoints, if one may be used.

        Else what it allows already: one that refused it is better than nobody.
        """
        return others(self._books, request, names)

    def knows_model(self, model: str) -> bool:
        """Tell whether an endpoint or the configuration names this model."""
        return model in self._books.pools.by_model

    def tenants_in_flight(self) -> dict[str, int]:
        """Count what waits and runs by tenant: each that the rules name, and all others together."""
        return self._books.tenants.in_flight()

    def class_of(self, request: Request) -> RequestClass:
        """Return a request's class: the one it names, if we have it."""
        return self._books.class_of(request)

    def pools(self) -> Iterator[Pool]:
        """Walk all pools."""
        return iter(self._books.pools)

    def waiting_tickets(self) -> Iterator[Ticket]:
        """Walk everything that waits, line by line."""
        return self._books.waiting_tickets()

    def holds(self) -> dict[Endpoint, HeldBy]:
        """Return for each endpoint that would not take the next request what keeps that one from it."""
        return holds(self._books)

    def __repr__(self) -> str:
        """Show the state that tests, logs and people read."""
        return f"<Controller waiting={self.waiting} {list(self.endpoints.values())}>"

    # ---- the frame of every event

    def _begin(self, now: float, ticket: Ticket | None = None, what: str = "") -> Books:
        """Begin an event. If something happens to a request for which it is in the wrong state, nothing changes.

        Raises:
            TransitionError: `transitions.py` has no such step.
        """
        if ticket is not None and ticket.state is not MUST_BE[what]:
            raise misstep(ticket, what)
        self._books.now = now
        return self._books

    def _end(self) -> list[Decision]:
        """End an event: run the dispatch pass and return all decisions that the event led to."""
        books = self._books
        if books.settles:
            self._settling.run()
        if books.freed or books.arrived:
            self._placing.run()
        decisions, books.decisions = books.decisions, []
        if self._event is not None:
            event, self._event = self._event, None
            self._tell(event, decisions)
        return decisions

    def _tell(self, event: Event, decisions: list[Decision]) -> None:
        for watcher in tuple(self._watchers):
            watcher(event, decisions)


def misstep(ticket: Ticket, what: str) -> TransitionError:
    """Return what to raise where this can't happen to a request as it is."""
    state, must_be = ticket.state.name.lower(), MUST_BE[what].name.lower()
    return TransitionError(f"{ticket!r} can't be {what}: it is {state}, not {must_be}")
