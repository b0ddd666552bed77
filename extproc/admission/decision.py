"""What comes out of admission: a request goes to an endpoint, or is refused. Others import these from `values`.

A room of its own, and never compiled: a compiled dataclass needs its types when it is made, a ticket comes later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from extproc.admission.outcome import Outcome
    from extproc.admission.ticket import Ticket


@dataclass(slots=True, init=False)
class Dispatch:
    """Let it go to `endpoint`; `outcome` is DISPATCHED or REROUTED. The lease exists from this moment."""

    ticket: Ticket
    outcome: Outcome
    endpoint: str
    wait_s: float

    def __init__(self, ticket: Ticket, outcome: Outcome, endpoint: str, wait_s: float) -> None:
        """Say this."""
        self.ticket = ticket
        self.outcome = outcome
        self.endpoint = endpoint
        self.wait_s = wait_s


@dataclass(slots=True, init=False)
class Reject:
    """Refuse it with the outcome's HTTP status. `retry_after_s` is when trying again makes sense, in whole seconds."""

    ticket: Ticket
    outcome: Outcome
    wait_s: float
    retry_after_s: int | None

    def __init__(self, ticket: Ticket, outcome: Outcome, wait_s: float, retry_after_s: int | None) -> None:
        """Say this."""
        self.ticket = ticket
        self.outcome = outcome
        self.wait_s = wait_s
        self.retry_after_s = retry_after_s


Decision = Dispatch | Reject
