"""What comes out of admission: a request goes to an endpoint, or is refused. Others import these from `values`.

A room of its own, and never compiled: a compiled NamedTuple needs its types when it is made, a ticket comes later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from extproc.admission.outcome import Outcome
    from extproc.admission.ticket import Ticket


class Dispatch(NamedTuple):
    """Let it go to `endpoint`; `outcome` is DISPATCHED or REROUTED. The lease exists from this moment."""

    ticket: Ticket
    outcome: Outcome
    endpoint: str
    wait_s: float


class Reject(NamedTuple):
    """Refuse it with the outcome's HTTP status. `retry_after_s` is when trying again makes sense, in whole seconds."""

    ticket: Ticket
    outcome: Outcome
    wait_s: float
    retry_after_s: int | None


Decision = Dispatch | Reject
