"""What comes out of admission: a request goes to an endpoint, or is refused. Others import these from `values`.

No dataclasses: a compiled one needs its types when it is made, and a ticket comes later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from extproc.admission.outcome import Outcome
    from extproc.admission.ticket import Ticket


class Dispatch:
    """Let it go to `endpoint`; `outcome` is DISPATCHED or REROUTED. The lease exists from this moment."""

    __slots__ = ("endpoint", "outcome", "ticket", "wait_s")

    def __init__(self, ticket: Ticket, outcome: Outcome, endpoint: str, wait_s: float) -> None:
        """Say this."""
        self.ticket = ticket
        self.outcome = outcome
        self.endpoint = endpoint
        self.wait_s = wait_s


class Crowd(NamedTuple):
    """What a tenant had in flight when it was refused one more, and the most that it may have.

    Attributes:
        is_shared: it is all tenants that are not named, which count as one.
    """

    in_flight: int
    most: int
    is_shared: bool

    @property
    def words(self) -> str:
        """It in words for people."""
        whose = "with all tenants that are not named it has" if self.is_shared else "it has"
        return f"{whose} {self.in_flight} of {self.most} in flight"


class Reject:
    """Refuse it with the outcome's HTTP status. `retry_after_s` is when trying again makes sense, in whole seconds.

    `crowd`: of one whose tenant has all in flight that it may.
    """

    __slots__ = ("crowd", "outcome", "retry_after_s", "ticket", "wait_s")

    def __init__(
        self,
        ticket: Ticket,
        outcome: Outcome,
        wait_s: float,
        retry_after_s: int | None,
        crowd: Crowd | None = None,
    ) -> None:
        """Say this."""
        self.ticket = ticket
        self.outcome = outcome
        self.wait_s = wait_s
        self.retry_after_s = retry_after_s
        self.crowd = crowd


Decision = Dispatch | Reject
