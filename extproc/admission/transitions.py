"""What can become of a request: the one table of its states. Read this before anything else in the core.

    new ──offer──▶ waiting ──dispatch──▶ leased ──release──▶ done
     │                └──cancel, refuse──▶ left
     └──offer, while there is room──▶ leased

Where several sidecars share endpoints, a lease may also come from elsewhere (adopt) or be left to telemetry (disown),
and who waits may be taken back to be decided elsewhere (withdraw).

A new request that is offered leaves at once where nobody serves its model, and one that is sent takes no slot at all.
No state but `new` comes back, and `done` and `left` are the end: a lease is given back once, a refusal is told once.
"""

from __future__ import annotations

from enum import Enum, auto


class State(Enum):
    """Where a request stands. `WAITING`: in one line. `LEASED`: it holds a slot of one endpoint."""

    NEW = auto()
    WAITING = auto()
    LEASED = auto()
    DONE = auto()
    LEFT = auto()


STEPS: tuple[tuple[State, str, State], ...] = (
    # it is,         and this happens, it becomes
    (State.NEW, "offered", State.WAITING),
    (State.NEW, "offered", State.LEASED),
    (State.NEW, "offered", State.LEFT),
    (State.NEW, "sent", State.LEFT),
    (State.NEW, "adopted", State.LEASED),
    (State.WAITING, "dispatched", State.LEASED),
    (State.WAITING, "refused", State.LEFT),
    (State.WAITING, "cancelled", State.LEFT),
    (State.WAITING, "withdrawn", State.NEW),
    (State.LEASED, "released", State.DONE),
    (State.LEASED, "disowned", State.DONE),
)
"""Every step that a request can make. `dispatched` and `refused` are the core's own, the others the driver's."""

MUST_BE: dict[str, State] = {what: before for before, what, _ in STEPS}
"""What a request must be for something to happen to it: else the driver gets a TransitionError, and nothing changed."""
