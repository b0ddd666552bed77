"""What can happen to the core, as values: to be logged, dumped, counted elsewhere, or to happen again (`applying.py`).

One for each method of the core that is an event; `at` is its time. Nobody makes them while nobody watches the core.
"""

# ruff: noqa: TC001 - compiled, a dataclass needs the types of its fields when it is imported

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from extproc.admission.estimate import Learnt
from extproc.admission.load import Load
from extproc.admission.sessions import Home
from extproc.admission.ticket import Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from extproc.admission.values import Decision


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at `at`, in seconds."""

    at: float


@dataclass(frozen=True, slots=True)
class OfTicket(Event):
    """Something that happened to a request."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class OfEndpoint(Event):
    """Something that happened to an endpoint."""

    name: str


class Offered(OfTicket):
    """A request came."""

    __slots__ = ()


class Sent(OfTicket):
    """A request came that takes no slot."""

    __slots__ = ()


class Cancelled(OfTicket):
    """The client of a waiting request left."""

    __slots__ = ()


class FirstToken(OfTicket):
    """The first token of an answer was seen."""

    __slots__ = ()


class Answered(OfTicket):
    """An answer began well."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Released(OfTicket):
    """A request is over."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class Moved(OfTicket):
    """Another endpoint answers than the one picked."""

    name: str


@dataclass(frozen=True, slots=True)
class Adopted(OfTicket):
    """A lease that another sidecar's core gave is ours now."""

    name: str
    held_s: float
    begun: bool


class Disowned(OfTicket):
    """A lease can't be followed any more."""

    __slots__ = ()


class Withdrawn(OfTicket):
    """A waiting request is taken back."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class EndpointsPut(Event):
    """Endpoints came in one moment, or are others now."""

    specs: tuple[EndpointSpec, ...]


@dataclass(frozen=True, slots=True)
class ModelsKnown(Event):
    """The configuration names models."""

    models: tuple[str, ...]
    expects_any: bool


@dataclass(frozen=True, slots=True)
class EndpointsRemoved(Event):
    """Endpoints went in one moment."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HealthChecked(OfEndpoint):
    """Health checks say something else of an endpoint."""

    is_up: bool | None


@dataclass(frozen=True, slots=True)
class Observed(OfEndpoint):
    """An endpoint's page was read."""

    load: Load
    unsent: int = 0


@dataclass(frozen=True, slots=True)
class Reported(OfEndpoint):
    """An answer said something of its endpoint's load."""

    load: Load


@dataclass(frozen=True, slots=True)
class QuotaSet(OfEndpoint):
    """Our part of an endpoint's room is another now."""

    quota: int | None


class Ticked(Event):
    """Time passed."""

    __slots__ = ()


class Woken(Event):
    """The process goes on after it was stopped."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class PolicySet(Event):
    """The rules are others now."""

    policy: Policy


@dataclass(frozen=True, slots=True)
class Drained(Event):
    """Nothing may wait from now on; of those who did, `most` were refused, or all."""

    most: int | None = None


@dataclass(frozen=True, slots=True)
class HomeBelieved(Event):
    """Another sidecar's core told where it served a session."""

    home: Home


@dataclass(frozen=True, slots=True)
class LearntBelieved(Event):
    """Another sidecar's core told what it learned of tokens."""

    learnt: Learnt


class Watcher(Protocol):
    """Somebody who is told each event once it is over."""

    def __call__(self, event: Event, decisions: Sequence[Decision], /) -> None:
        """Note an event, and what the core decided on it."""
