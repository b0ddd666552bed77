"""What can become of a request: the one table of its states. Read this before anything else in the core.

    new ──offer──▶ waiting ──dispatch──▶ leased ──release──▶ done
     │                └──cancel, refuse──▶ left
     └──offer, while there is room──▶ leased

Where a gateway had another endpoint answer than the one picked, a lease moves, or ends where that is none of ours.
Where several sidecars share endpoints, a lease may also come from elsewhere (adopt) or be left to telemetry (disown),
and who waits may be taken back to be decided elsewhere (withdraw).

A new request that is offered leaves at once where nobody serves its model, and one that is sent takes no slot at all.
No state but `new` comes back, and `done` and `left` are the end: a lease is given back once, a refusal is told once.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final


class State(Enum):
    """Where a request stands. `WAITING`: in one line. `LEASED`: it holds a slot of one endpoint."""

    NEW = auto()
    WAITING = auto()
    LEASED = auto()
    DONE = auto()
    LEFT = auto()


NEW: Final = State.NEW
WAITING: Final = State.WAITING
LEASED: Final = State.LEASED
DONE: Final = State.DONE
LEFT: Final = State.LEFT
"""Bound once: a member looked up on its Enum costs four times a global, and states are asked for all the time."""

STEPS: tuple[tuple[State, str, State], ...] = (
    # it is,         and this happens, it becomes
    (NEW, "offered", WAITING),
    (NEW, "offered", LEASED),
    (NEW, "offered", LEFT),
    (NEW, "sent", LEFT),
    (NEW, "adopted", LEASED),
    (WAITING, "dispatched", LEASED),
    (WAITING, "refused", LEFT),
    (WAITING, "cancelled", LEFT),
    (WAITING, "withdrawn", NEW),
    (LEASED, "moved", LEASED),
    (LEASED, "moved", DONE),
    (LEASED, "released", DONE),
    (LEASED, "disowned", DONE),
)
"""Every step that a request can make. `dispatched` and `refused` are the core's own, the others the driver's."""

MUST_BE: dict[str, State] = {what: before for before, what, _ in STEPS}
"""What a request must be for something to happen to it: else the driver gets a TransitionError, and nothing changed."""
